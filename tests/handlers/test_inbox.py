"""An approver's inbox, `GET /tasks?status=waiting_approval&for_me=true`, and the decisions of groups over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from benchmarks.units import Units, metered
from qaes.adapters.task_items import task_item
from qaes.adapters.task_repository import TaskStore
from qaes.domain.models import Quorum, Terms
from tests.handlers.test_task_repository import build, new_task
from tests.support.api import ALICE, BOB, CAROL, OLIVIA, Answer, Api, named, set_environment
from tests.support.cloud import Cloud, cloud

FINANCE = Quorum(approvals=2, approvers="finance", members=("bob", "dora", "olivia"))
CFO = Quorum(approvals=1, approvers="cfo", members=("erin",))
DORA, ERIN = {"subject": "dora", "roles": "approver"}, {"subject": "erin", "roles": "approver"}
YES = {"approved": True, "reason": "it is due"}


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    set_environment("GatewayFunction", monkeypatch)
    with cloud(state_machine=False, policy=False) as it:
        yield it


@pytest.fixture
def api(aws: Cloud) -> Api:
    return Api(aws, "GatewayFunction")


@pytest.fixture
def store(aws: Cloud) -> TaskStore:
    return TaskStore("TasksTable")


def wait(store: TaskStore, *quorums: Quorum, requester: str = "alice", expires_in: int = 60) -> str:
    """Make a task that waits for an approval; without quorums, of any approvers."""
    task, _ = store.start_task(new_task(requester))
    task, plan = store.plan_task(task, build(task.task_id))
    terms = Terms(quorums=quorums, tier=1, amount=250, unit="QU") if quorums else None
    required = terms.required if terms else 1
    store.request_approval(task, plan, 2, "token", expires_in, required=required, terms=terms)
    return task.task_id


def page(api: Api, query: dict[str, str] | None = None, **caller: str) -> Answer:
    """Read one page of the inbox."""
    query = {"status": "waiting_approval", "for_me": "true"} | (query or {})
    event = api.event("GET", "/tasks", **caller)
    event |= {"queryStringParameters": query, "multiValueQueryStringParameters": {k: [v] for k, v in query.items()}}
    return api.checked(api.aws.invoke(api.function, event))


def inbox(api: Api, limit: int = 20, **caller: str) -> list[str]:
    """Read every page."""
    found: list[str] = []
    cursor: dict[str, str] = {}
    for _ in range(50):
        answer = page(api, {"limit": str(limit)} | cursor, **caller)
        assert answer.status == 200
        found += [task["task_id"] for task in answer.body["tasks"]]
        if answer.body["next_cursor"] is None:
            return found
        cursor = {"cursor": answer.body["next_cursor"]}
    raise AssertionError("the pages do not end")


def test_inbox_lists_tasks_each_person_may_decide(api: Api, store: TaskStore) -> None:
    of_anybody, of_finance, of_cfo = wait(store), wait(store, FINANCE), wait(store, CFO)
    of_both, of_bob = wait(store, FINANCE, CFO), wait(store, FINANCE, requester="bob")
    assert inbox(api, **BOB) == [of_both, of_finance, of_anybody]
    assert inbox(api, **DORA) == [of_bob, of_both, of_finance, of_anybody]
    assert inbox(api, **ERIN) == [of_both, of_cfo, of_anybody]
    assert inbox(api, **OLIVIA) == [of_bob, of_both, of_finance, of_anybody]


def test_inbox_leaves_out_a_task_when_its_reader_has_decided(api: Api, store: TaskStore) -> None:
    task_id = wait(store, FINANCE)
    store.decide(task_id, approved=True, subject="bob", reason="")
    assert (inbox(api, **BOB), inbox(api, **DORA)) == ([], [task_id])


def test_inbox_leaves_out_tasks_its_reader_retried(api: Api, store: TaskStore) -> None:
    task_id = wait(store, FINANCE)
    store.end_task(task_id, "failed", actor="execution", reason="a test")
    task = store.retry(task_id, subject="bob")
    terms = Terms(quorums=(FINANCE,))
    store.request_approval(task, store.plan_of(task), 2, "token-2", 60, required=2, terms=terms)
    assert (inbox(api, **BOB), inbox(api, **DORA)) == ([], [task_id])


def test_inbox_leaves_out_an_approval_that_has_expired(api: Api, store: TaskStore) -> None:
    wait(store, FINANCE, expires_in=0)
    assert inbox(api, **BOB) == []


def test_inbox_is_empty_for_callers_who_decide_nothing(api: Api, store: TaskStore) -> None:
    wait(store)
    with metered(units := Units()):
        assert (inbox(api, **CAROL), inbox(api, **ALICE)) == ([], [])
        assert inbox(api, **(BOB | {"roles": "requester approver", "agent": "crm-agent"})) == []
    assert units.read == 0


@pytest.mark.parametrize("status", [None, "executing"])
def test_inbox_is_of_waiting_tasks_only(api: Api, status: str | None) -> None:
    query = {"for_me": "true"} | ({"status": status} if status else {})
    event = api.event("GET", "/tasks", **BOB)
    event |= {"queryStringParameters": query, "multiValueQueryStringParameters": {k: [v] for k, v in query.items()}}
    answer = api.checked(api.aws.invoke(api.function, event))
    assert (answer.status, named(answer)) == (422, {"for_me"})


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
def test_inbox_pages_have_each_task_once(api: Api, store: TaskStore, limit: int) -> None:
    """Most of the tasks are for others, so most pages are short or empty, and lead on."""
    quorums: list[tuple[Quorum, ...]] = [(CFO,), (CFO,), (FINANCE,), (CFO,), (), (CFO,), (CFO,)]
    tasks = [wait(store, *each) for each in quorums]
    assert inbox(api, limit, **BOB) == [tasks[4], tasks[2]]


def test_inbox_page_reads_no_more_than_its_tasks(api: Api, store: TaskStore) -> None:
    for _ in range(12):
        wait(store, CFO)
    with metered(few := Units()):
        answer = page(api, {"limit": "2"}, **BOB)
    assert (answer.body["tasks"], bool(answer.body["next_cursor"])) == ([], True)
    with metered(more := Units()):
        page(api, {"limit": "4"}, **BOB)
    assert few.read < more.read < 2 * few.read + 2


def test_inbox_skips_an_item_that_no_request_made(api: Api, store: TaskStore) -> None:
    task_id = wait(store)
    forged = new_task().model_copy(update={"status": "waiting_approval"})
    boto3.client("dynamodb").put_item(TableName="TasksTable", Item=task_item(forged))
    assert inbox(api, **BOB) == [task_id]


def test_decide_returns_403_for_an_approver_outside_the_group(api: Api, store: TaskStore) -> None:
    task_id = wait(store, FINANCE)
    answer = api("POST", f"/task/{task_id}/approve", YES, **ERIN)
    assert answer.status == 403
    assert answer.body["detail"] == "only people in `finance` can decide on this task: you are not among them"
    assert store.latest_approval(task_id, 2).decisions == ()  # type: ignore[union-attr]
    assert api("POST", f"/task/{task_id}/approve", YES, **BOB).status == 200


def test_question_names_tier_group_amount_and_unit(api: Api, store: TaskStore) -> None:
    def question(task_id: str) -> dict[str, Any]:
        found: dict[str, Any] = api("GET", f"/task/{task_id}", **BOB).body["approval"]
        shown = ("tier", "approvers", "amount", "unit", "quorums", "approvals_required")
        return {name: found[name] for name in shown}

    finance = {"approvals": 2, "approvers": "finance"}
    money = {"amount": 250, "unit": "QU"}
    assert question(wait(store, FINANCE)) == money | {
        "tier": 1, "approvers": "finance", "quorums": [finance], "approvals_required": 2,
    }  # fmt: skip
    both = question(wait(store, FINANCE, CFO))
    assert (both["approvers"], both["quorums"]) == (None, [finance, {"approvals": 1, "approvers": "cfo"}])
    before = question(wait(store))
    assert before == {"amount": 5, "unit": "QU"} | {
        "tier": None, "approvers": None, "quorums": [{"approvals": 1, "approvers": None}], "approvals_required": 1,
    }  # fmt: skip


def test_answer_to_an_approval_counts_each_group(api: Api, store: TaskStore) -> None:
    def approve(task_id: str, **caller: str) -> str:
        return str(api("POST", f"/task/{task_id}/approve", YES, **caller).body["message"])

    of_one, of_both, waits = wait(store, FINANCE), wait(store, FINANCE, CFO), "the task still waits for approvals."
    assert approve(of_one, **BOB) == f"Approved by 1 of 2; {waits}"
    assert approve(of_both, **BOB) == f"Approved by 1 of 2 from finance, by 0 of 1 from cfo; {waits}"
    assert approve(of_both, **DORA) == f"Approved by 2 of 2 from finance, by 0 of 1 from cfo; {waits}"
    assert approve(of_both, **ERIN) == "The step has been approved."
