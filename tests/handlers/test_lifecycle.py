"""Lists, cancellation, retry, several approvers, keys and limits: the gateway's routes on moto."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import timedelta
from itertools import count
from typing import Any

import boto3
import pytest

from audit.store import Outbox
from qaes.adapters import task_changes
from qaes.adapters.executions import Executions
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.task_repository import TaskStore
from qaes.domain.ids import now, parse_timestamp
from qaes.domain.policy import Policy
from qaes.domain.tasks.lifecycle import MAX_RETRIES
from tests.handlers.test_gateway import DOWN, MONITOR, NO, SOURCE, TRANSFER, YES, executions, start, start_waiting
from tests.handlers.test_task_repository import new_task, planned, replace_approval, waiting
from tests.support.api import ALICE, BOB, CAROL, MALLORY, OLIVIA, Api, items, named, set_environment
from tests.support.cloud import Cloud, cloud
from tests.support.tokens import approval_token
from tests.workflow.test_paths import in_force

BARBARA = {"subject": "barbara", "roles": "approver"}
BOTH = {"subject": "alice", "roles": "requester approver"}


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    set_environment("GatewayFunction", monkeypatch)
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def api(aws: Cloud) -> Api:
    return Api(aws, "GatewayFunction")


@pytest.fixture
def store(aws: Cloud) -> TaskStore:
    return TaskStore("TasksTable")


@pytest.fixture
def live(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """All of the template, tasks being executed."""
    set_environment("GatewayFunction", monkeypatch)
    monkeypatch.setattr("agent_runtime.reconciler.GRACE_SECONDS", -1)
    with cloud() as it:
        yield Api(it, "GatewayFunction")


@pytest.fixture
def rule(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the policy have another rule for transfers."""
    versions = count(2)

    def change(**changes: Any) -> None:
        policy, policy_id = LedgerClient.policy, f"policy-v{next(versions)}-{'0' * 64}"

        def changed(self: LedgerClient) -> Policy:
            found = policy(self)
            rules = found.rules | {"transfer_funds": found.rules["transfer_funds"].model_copy(update=changes)}
            return found.model_copy(update={"rules": rules, "policy_id": policy_id})

        in_force(monkeypatch, changed)

    return change


def kinds(task_id: str) -> list[str]:
    return [event.kind for _, event in Outbox("TasksTable").events_after(task_id, 0)]


def open_tasks() -> list[int]:
    return [int(item["open_tasks"]["N"]) for item in items("TasksTable") if item["sk"]["S"] == "OPEN"]


def balance() -> int:
    return LedgerClient("LedgerFunction").balance(SOURCE)


# Lists


def listed(api: Api, query: str = "", **caller: Any) -> tuple[list[str], str | None]:
    event = api.event("GET", "/tasks", **caller)
    parameters = dict(part.split("=", 1) for part in query.split("&") if part)
    event |= {
        "queryStringParameters": parameters,
        "multiValueQueryStringParameters": {name: [value] for name, value in parameters.items()},
    }
    answer = api.checked(api.aws.invoke(api.function, event))
    assert answer.status == 200, answer
    return [task["task_id"] for task in answer.body["tasks"]], answer.body["next_cursor"]


def test_list_is_newest_first_and_own_for_requesters(api: Api) -> None:
    mine = [start(api) for _ in range(3)]
    others = start(api, **MALLORY)
    assert listed(api) == (mine[::-1], None)
    assert listed(api, **MALLORY) == ([others], None)
    for everyone in (BOB, CAROL, OLIVIA):
        assert listed(api, **everyone) == ([others, *mine[::-1]], None)
    assert listed(api, "mine=true", **BOTH) == (mine[::-1], None)
    assert listed(api, "mine=true", **BOB) == ([], None)


def test_pages_show_each_task_once_during_changes(api: Api, store: TaskStore) -> None:
    expected = [start(api) for _ in range(7)][::-1]
    for who in (ALICE, BOB):
        seen: list[str] = []
        page, cursor = listed(api, "limit=3", **who)
        while True:
            seen += page
            if cursor is None:
                break
            newer = start(api)  # comes before the first page, and so on none of the next
            store.end_task(expected[-1], "failed", actor="test", reason="")
            page, cursor = listed(api, f"limit=3&cursor={cursor}", **who)
            assert newer not in page
        assert seen[-7:] == expected
        assert not [task for task, times in Counter(seen).items() if times > 1]


@pytest.mark.parametrize("who", [ALICE, BOB])
def test_list_of_one_status_is_an_inbox(api: Api, store: TaskStore, who: dict[str, str]) -> None:
    start(api)
    wait, _ = waiting(store)
    assert listed(api, "status=waiting_approval", **who) == ([wait], None)
    assert listed(api, "status=completed", **who) == ([], None)


def test_listed_task_has_the_approvers_fields(api: Api, store: TaskStore) -> None:
    task_id, _ = waiting(store)
    [task] = api("GET", "/tasks", **BOB).body["tasks"]
    approval = store.open_approval(task_id)
    assert approval is not None
    assert (task["requester"], task["status"]) == ("alice", "waiting_approval")
    assert task["waiting_until"] == approval.expires_at
    assert "parameters" not in task


@pytest.mark.parametrize(
    ("name", "value"),
    [("status", "sleeping"), ("limit", "0"), ("limit", "101"), ("limit", "x"), ("cursor", "x"), ("mine", "perhaps")],
)
def test_bad_filter_is_refused_with_its_name(api: Api, name: str, value: str) -> None:
    event = api.event("GET", "/tasks")
    event |= {"queryStringParameters": {name: value}, "multiValueQueryStringParameters": {name: [value]}}
    answer = api.checked(api.aws.invoke(api.function, event))
    assert (answer.status, named(answer)) == (422, {name})


# Cancelling


def test_cancel_ends_waiting_task_with_approval(live: Api) -> None:
    task_id = start_waiting(live)
    answer = live("POST", f"/task/{task_id}/cancel", {"reason": "the invoice was wrong"})
    assert (answer.status, answer.body["status"]) == (200, "cancelled")
    shown = live("GET", f"/task/{task_id}").body
    assert (shown["status"], shown["approval"], shown["error"]["reason"]) == (
        "cancelled",
        None,
        "the invoice was wrong",
    )
    assert kinds(task_id)[-2:] == ["approval_cancelled", "task_ended"]
    late = live("POST", f"/task/{task_id}/approve", YES, **BOB)
    assert (late.status, late.body["task_status"]) == (409, "cancelled")
    again = live("POST", f"/task/{task_id}/cancel")
    assert (again.status, again.body["task_status"]) == (409, "cancelled")
    ended = {"detail-type": "Step Functions Execution Status Change",
             "detail": {"status": "ABORTED", "name": task_id, "input": json.dumps({"task_id": task_id})}}  # fmt: skip
    assert live.aws.invoke("ReconcilerFunction", ended) == {"reconciled": []}
    assert live("GET", f"/task/{task_id}").body["status"] == "cancelled"
    assert balance() == 1000
    assert open_tasks() == [0]


def test_unstarted_task_is_cancelled_and_never_started(live: Api) -> None:
    task, _ = TaskStore("TasksTable").start_task(new_task())
    assert live("POST", f"/task/{task.task_id}/cancel").status == 200
    assert live.aws.invoke("ReconcilerFunction", {}) == {"reconciled": []}
    assert executions(live.aws) == []


def test_unstoppable_execution_runs_no_further_step(live: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DOWN

    task_id = start_waiting(live)
    approval = TaskStore("TasksTable").open_approval(task_id)
    assert approval is not None
    with monkeypatch.context() as patch:
        patch.setattr(Executions, "stop", fail)
        assert live("POST", f"/task/{task_id}/cancel").status == 200
    # Any later resumption:
    boto3.client("stepfunctions").send_task_success(taskToken=approval_token(task_id), output="{}")
    live.aws.execution(task_id)
    assert live("GET", f"/task/{task_id}").body["status"] == "cancelled"
    assert balance() == 1000


def test_cancel_and_retry_check_their_roles(api: Api, store: TaskStore) -> None:
    task_id, _ = waiting(store)
    for verb in ("cancel", "retry"):
        path = f"/task/{task_id}/{verb}"
        assert api("POST", path, **MALLORY).status == 404
        assert api("POST", path, **BOB).status == 403
        assert api("POST", path, **CAROL).status == 403
        assert api("POST", path, subject="bob", roles="requester approver").status == 403
    assert store.get_task(task_id).status == "waiting_approval"
    assert api("POST", f"/task/{task_id}/cancel", **OLIVIA).status == 200
    assert kinds(task_id)[-1] == "task_ended"


@pytest.mark.parametrize("outcome", ["completed", "denied", "rejected", "cancelled", "failed", "expired"])
def test_ended_task_not_cancelled_and_partly_retriable(api: Api, store: TaskStore, outcome: Any) -> None:
    task_id, _ = waiting(store) if outcome in {"rejected", "expired"} else planned(store)
    if outcome == "rejected":
        store.decide(task_id, approved=False, subject="bob", reason="so")
    store.end_task(task_id, outcome, actor="test", reason="so")
    answer = api("POST", f"/task/{task_id}/cancel")
    assert (answer.status, answer.body["task_status"]) == (409, outcome)
    answer = api("POST", f"/task/{task_id}/retry")
    assert answer.status == (202 if outcome in {"failed", "expired"} else 409)


def test_person_who_retried_task_cannot_decide(api: Api, store: TaskStore) -> None:
    task_id, plan = planned(store)
    store.end_task(task_id, "failed", actor="test", reason="so")
    assert api("POST", f"/task/{task_id}/retry", **OLIVIA).status == 202
    store.request_approval(store.get_task(task_id), plan, 2, "token-2", 60)
    for body in (YES, {"approved": False, "reason": "no"}):
        answer = api("POST", f"/task/{task_id}/approve", body, **OLIVIA)
        assert (answer.status, answer.body["detail"]) == (403, "you cannot decide on a task that you retried")
    assert store.open_approval(task_id) is not None
    assert api("POST", f"/task/{task_id}/approve", YES, **BOB).status == 200


def test_task_is_not_retried_without_end(api: Api, store: TaskStore) -> None:
    task_id, _ = planned(store)
    for _ in range(MAX_RETRIES):
        store.end_task(task_id, "failed", actor="test", reason="so")
        store.retry(task_id, subject="alice")
    store.end_task(task_id, "failed", actor="test", reason="so")
    answer = api("POST", f"/task/{task_id}/retry")
    assert (answer.status, answer.body["task_status"]) == (409, "failed")
    assert f"at most {MAX_RETRIES} times" in answer.body["detail"]


def test_task_that_runs_is_not_retried(api: Api, store: TaskStore) -> None:
    task_id, _ = planned(store)
    answer = api("POST", f"/task/{task_id}/retry")
    assert (answer.status, answer.body["task_status"]) == (409, "executing")


# Retrying


def test_retry_resumes_at_failed_step_with_both_records(live: Api) -> None:
    task_id = start(live, TRANSFER | {"parameters": {**TRANSFER["parameters"], "amount": 1000}})  # type: ignore[dict-item]
    live.aws.wait(task_id, "waiting_approval")
    ledger = LedgerClient("LedgerTransferFunction")

    def spend(event: dict[str, Any]) -> None:
        elsewhere = {"source": SOURCE, "destination": "0xabcdef1234567890", "amount": 1, "requester": "olivia"}
        ledger.transfer(reference="spent as it is submitted", **elsewhere)

    live.aws.faults["RecordEventsFunction"] = spend  # between the claim and the submission
    live("POST", f"/task/{task_id}/approve", YES, **BOB)
    live.aws.wait(task_id, "failed")
    live.aws.execution(task_id)
    live.aws.faults.clear()
    live.aws.settle()
    gift = {"source": "0xabcdef1234567890", "destination": SOURCE, "amount": 500}
    ledger.transfer(reference="a gift", requester="olivia", **gift)
    live.aws.settle()
    ran = live.aws.invocations.copy()

    answer = live("POST", f"/task/{task_id}/retry")
    assert (answer.status, answer.body["status"]) == (202, "executing")
    live.aws.wait(task_id, "waiting_approval")  # the approval was used, so a new one is requested
    assert live("POST", f"/task/{task_id}/approve", YES, **BOB).status == 200
    live.aws.wait(task_id, "completed")
    again = live.aws.invocations - ran
    assert (again["RunStepFunction"], again["ExecuteActionFunction"]) == (0, 2)  # submitted, and settled
    assert balance() == 1499 - 1000
    steps = [event for event in kinds(task_id) if event == "step_executed"]
    assert len(steps) == 4, "check_balance, policy_check, and the transfer twice"
    assert kinds(task_id).count("task_retried") == 1
    assert kinds(task_id).count("approval_requested") == 2
    assert sorted(executions(live.aws)) == [task_id, f"{task_id}-2"]
    record = TaskStore("TasksTable").step(task_id, 2)
    assert record is not None
    assert (record.status, record.attempt, record.run, record.error) == ("succeeded", 2, 2, None)
    live.aws.drain(task_id)
    shown = live("GET", f"/task/{task_id}").body
    assert (shown["status"], shown["error"]) == ("completed", None)
    assert open_tasks() == [0]


def test_approval_can_be_asked_for_again_after_its_expiry(live: Api) -> None:
    task_id = start_waiting(live)
    expire(task_id)
    assert live.aws.invoke("ReconcilerFunction", {})["reconciled"] == [task_id]
    live.aws.wait(task_id, "expired")
    live.aws.execution(task_id)
    assert live("POST", f"/task/{task_id}/retry").status == 202
    live.aws.wait(task_id, "waiting_approval")
    live("POST", f"/task/{task_id}/approve", YES, **BOB)
    live.aws.wait(task_id, "completed")
    assert balance() == 750


def test_task_failed_before_plan_restarts_from_beginning(live: Api) -> None:
    def fail(_: Any) -> None:
        raise ConnectionError("down")

    live.aws.faults["PlanTaskFunction"] = fail
    task_id = start(live, MONITOR)
    live.aws.wait(task_id, "failed")
    live.aws.execution(task_id)
    live.aws.faults.clear()
    assert live("POST", f"/task/{task_id}/retry").body["status"] == "pending"
    live.aws.wait(task_id, "completed")
    assert kinds(task_id).count("plan_built") == 1


def test_end_of_an_earlier_execution_is_ignored(live: Api) -> None:
    store = TaskStore("TasksTable")
    task_id, _ = planned(store)
    store.end_task(task_id, "failed", actor="test", reason="so", execution=task_id)
    assert live("POST", f"/task/{task_id}/retry").status == 202
    live.aws.wait(task_id, "waiting_approval")
    late = {"task_id": task_id, "outcome": "failed", "execution": task_id, "error": {"Error": "States.TaskFailed"}}
    assert live.aws.invoke("EndTaskFunction", late)["status"] == "waiting_approval"
    ended = {"detail-type": "Step Functions Execution Status Change",
             "detail": {"status": "FAILED", "name": task_id, "input": json.dumps({"task_id": task_id})}}  # fmt: skip
    assert live.aws.invoke("ReconcilerFunction", ended) == {"reconciled": []}
    assert store.get_task(task_id).status == "waiting_approval"


def test_reconciler_starts_execution_of_retry(live: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise DOWN

    store = TaskStore("TasksTable")
    task_id, _ = planned(store)
    store.end_task(task_id, "failed", actor="test", reason="so")
    with monkeypatch.context() as patch:
        patch.setattr(Executions, "start", fail)
        assert live("POST", f"/task/{task_id}/retry").status == 202
    assert executions(live.aws) == []
    assert live.aws.invoke("ReconcilerFunction", {})["reconciled"] == [task_id]
    live.aws.wait(task_id, "waiting_approval")


# Approvals


def expire(task_id: str) -> None:
    """Let the time of the open approval be over."""
    store = TaskStore("TasksTable")
    approval = store.open_approval(task_id)
    assert approval is not None
    moments = {name: now() - timedelta(hours=hours) for name, hours in {"requested_at": 25, "expires_at": 1}.items()}
    past = approval.model_copy(update={name: task_changes.timestamp(moment) for name, moment in moments.items()})
    replace_approval(store, task_id, past)


def test_decision_is_bound_to_the_plan_that_was_looked_at(api: Api, store: TaskStore) -> None:
    task_id, plan = waiting(store)
    answer = api("POST", f"/task/{task_id}/approve", YES | {"plan_hash": "0" * 64}, **BOB)
    assert (answer.status, named(answer)) == (409, {"plan_hash"})
    assert store.open_approval(task_id) is not None
    assert api("POST", f"/task/{task_id}/approve", YES | {"plan_hash": plan.hash()}, **BOB).status == 200


def test_two_people_approve_when_the_policy_requires_it(live: Api, rule: Callable[..., None]) -> None:
    rule(approvals=2)
    task_id = start_waiting(live)
    question = live("GET", f"/task/{task_id}", **BOB).body["approval"]
    assert (question["approvals_required"], question["decisions"], question["rule"]["approvals"]) == (2, [], 2)
    first = live("POST", f"/task/{task_id}/approve", YES, **BOB)
    assert (first.status, first.body["approvals_given"], first.body["approvals_required"]) == (200, 1, 2)
    assert live("GET", f"/task/{task_id}").body["status"] == "waiting_approval"
    assert live("POST", f"/task/{task_id}/approve", YES, **BOB).status == 409
    assert live("POST", f"/task/{task_id}/approve", YES, **BOTH).status == 403
    question = live("GET", f"/task/{task_id}", **BARBARA).body["approval"]
    assert [each["subject"] for each in question["decisions"]] == ["bob"]
    second = live("POST", f"/task/{task_id}/approve", YES, **BARBARA)
    assert (second.status, second.body["approvals_given"]) == (200, 2)
    live.aws.wait(task_id, "completed")
    assert balance() == 750
    assert kinds(task_id).count("approval_decided") == 2


def test_one_rejection_ends_approval_by_two(live: Api, rule: Callable[..., None]) -> None:
    rule(approvals=2)
    task_id = start_waiting(live)
    assert live("POST", f"/task/{task_id}/approve", YES, **BOB).status == 200
    assert live("POST", f"/task/{task_id}/approve", NO, **BARBARA).status == 200
    live.aws.wait(task_id, "rejected")
    assert balance() == 1000


def test_second_decision_names_the_first_decider(api: Api, store: TaskStore) -> None:
    task_id, _ = waiting(store)
    api("POST", f"/task/{task_id}/approve", NO, **BOB)
    answer = api("POST", f"/task/{task_id}/approve", YES, **BARBARA)
    assert (answer.status, answer.body["decided_by"], answer.body["decision"]) == (409, "bob", "rejected")


def test_concurrent_opposite_decisions_have_one_winner(api: Api, store: TaskStore) -> None:
    task_id, _ = waiting(store)
    people = [f"approver-{number}" for number in range(6)]
    answers = api.at_once(
        [
            {
                "method": "POST",
                "path": f"/task/{task_id}/approve",
                "body": NO if number % 2 else YES,
                "subject": person,
                "roles": "approver",
            }
            for number, person in enumerate(people)
        ]
    )
    assert Counter(answer.status for answer in answers) == {200: 1, 409: 5}
    [winner] = [person for person, answer in zip(people, answers, strict=True) if answer.status == 200]
    assert {answer.body["decided_by"] for answer in answers if answer.status == 409} == {winner}


def test_policy_may_give_less_time_than_the_system(live: Api, rule: Callable[..., None]) -> None:
    rule(expires_after=5)
    question = live("GET", f"/task/{start_waiting(live)}").body["approval"]
    asked, expires = parse_timestamp(question["requested_at"]), parse_timestamp(question["expires_at"])
    assert (expires - asked).total_seconds() == 5


def test_people_are_reminded_once_before_an_approval_expires(live: Api) -> None:
    task_id = start_waiting(live)
    assert live.aws.invoke("ReconcilerFunction", {})["reconciled"] == []
    store = TaskStore("TasksTable")
    approval = store.open_approval(task_id)
    assert approval is not None
    soon = {"requested_at": now() - timedelta(hours=20), "expires_at": now() + timedelta(hours=4)}
    late = approval.model_copy(update={name: task_changes.timestamp(moment) for name, moment in soon.items()})
    replace_approval(store, task_id, late)
    assert live.aws.invoke("ReconcilerFunction", {})["reconciled"] == [task_id]
    assert live.aws.invoke("ReconcilerFunction", {})["reconciled"] == []
    assert kinds(task_id)[-1] == "approval_reminder"
    assert live("POST", f"/task/{task_id}/approve", YES, **BOB).status == 200
    live.aws.wait(task_id, "completed")


def test_late_approval_rejected_and_task_expires(live: Api) -> None:
    task_id = start_waiting(live)
    expire(task_id)
    answer = live("POST", f"/task/{task_id}/approve", YES, **BOB)
    assert (answer.status, answer.body["task_status"]) == (409, "expired")
    live.aws.invoke("ReconcilerFunction", {})
    live.aws.wait(task_id, "expired")
    assert kinds(task_id)[-2:] == ["approval_expired", "task_ended"]
    assert balance() == 1000


# Keys


@pytest.mark.parametrize("verb", ["approve", "cancel", "retry"])
def test_key_replays_response_and_conflicts_otherwise(api: Api, store: TaskStore, verb: str) -> None:
    if verb == "retry":
        task_id, _ = planned(store)
        store.end_task(task_id, "failed", actor="test", reason="so")
    else:
        task_id, _ = waiting(store)
    body = YES if verb == "approve" else None
    who = BOB if verb == "approve" else ALICE
    key = {"headers": {"Idempotency-Key": "k1"}}
    first = api("POST", f"/task/{task_id}/{verb}", body, **who, **key)
    again = api("POST", f"/task/{task_id}/{verb}", body, **who, **key)
    assert first.status in {200, 202}
    assert (again.status, again.body) == (first.status, first.body)
    assert "idempotent-replay" not in first.headers
    assert again.headers["idempotent-replay"] == "true"
    other, _ = waiting(store)
    conflict = api("POST", f"/task/{other}/{verb}", body, **who, **key)
    assert (conflict.status, named(conflict)) == (409, {"Idempotency-Key"})


def test_concurrent_cancellations_get_one_response(api: Api, store: TaskStore) -> None:
    task_id, _ = waiting(store)
    request = {"method": "POST", "path": f"/task/{task_id}/cancel", "headers": {"Idempotency-Key": "k"}}
    answers = api.at_once([request] * 20)
    assert {answer.status for answer in answers} == {200}
    assert len({json.dumps(answer.body) for answer in answers}) == 1
    assert sum("idempotent-replay" not in answer.headers for answer in answers) == 1
    assert kinds(task_id).count("task_ended") == 1


def test_key_is_forgotten_after_a_day(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    key = {"headers": {"Idempotency-Key": "k"}}
    first = start(api, **key)
    real = task_changes.time.time
    monkeypatch.setattr(task_changes.time, "time", lambda: real() + 24 * 3600 + 1)
    assert start(api, **key) != first


# Limits


def test_start_returns_429_with_too_many_open_tasks(api: Api, store: TaskStore, aws: Cloud) -> None:
    aws.parameters["MaxOpenTasks"] = "2"
    first, second = start(api), start(api)
    answer = api("POST", "/task/start", TRANSFER)
    assert (answer.status, answer.headers["retry-after"], answer.body["max_open_tasks"]) == (429, "30", 2)
    assert start(api, **MALLORY)
    store.end_task(first, "failed", actor="test", reason="so")
    store.end_task(first, "failed", actor="test", reason="so")  # twice: counted once
    assert start(api)
    answer = api("POST", f"/task/{first}/retry")
    assert answer.status == 429
    assert store.get_task(first).status == "failed"
    assert api("POST", f"/task/{second}/cancel").status == 200
    assert api("POST", f"/task/{first}/retry").status == 202


def test_limit_holds_when_many_start_at_once(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MAX_OPEN_TASKS", "5")
    answers = api.at_once([{"method": "POST", "path": "/task/start", "body": TRANSFER}] * 12)
    assert Counter(answer.status for answer in answers) == {202: 5, 429: 7}
    assert open_tasks() == [5]
