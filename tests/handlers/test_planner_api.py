"""The planner on moto: previews, the rights to stored plans, and the pinned policy."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import boto3
import pytest

from qaes import VERSION
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.task_items import plan_item
from qaes.adapters.task_repository import TaskStore
from qaes.domain.errors import ConflictError
from qaes.domain.ids import is_plan_id, parse_timestamp
from qaes.domain.models import Plan
from qaes.domain.policy import Policy, Rule, policy_of
from qubic.policy.lifecycle import Policies
from tests.handlers.test_gateway import (
    BAD,
    CONTRACT,
    DESTINATION,
    IDENTITY,
    MONITOR,
    SOURCE,
    SOURCE_IDENTITY,
    TRANSFER,
    UNKNOWN,
    ZERO,
)
from tests.handlers.test_task_repository import new_task, planned
from tests.support.api import ALICE, BOB, CAROL, MALLORY, NOBODY, OLIVIA, Api, items, named
from tests.support.bundles import policy_text
from tests.support.cloud import Cloud, cloud

UNKNOWN_PLAN = UNKNOWN.replace("task", "plan")


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def api(aws: Cloud) -> Api:
    return Api(aws, "PlannerApiFunction")


@pytest.fixture
def store(aws: Cloud) -> TaskStore:
    return TaskStore("TasksTable")


def create(api: Api, body: Any = None, **caller: Any) -> dict[str, Any]:
    answer = api("POST", "/plan/create", body or TRANSFER, **caller)
    assert answer.status == 200, answer
    return answer.body


def down(_: Any) -> None:
    raise RuntimeError("down")


def test_plan_has_the_inherited_fields_and_is_not_executed(api: Api) -> None:
    plan = create(api)
    inherited = {"plan_id": str, "steps": list, "created_at": str, "analysis": dict, "policy": dict}
    assert {name: type(plan[name]) for name in inherited} == inherited
    assert is_plan_id(plan["plan_id"])
    assert plan["task_id"] is None
    assert parse_timestamp(plan["created_at"]).utcoffset() is not None
    assert plan["analysis"] == {"action_type": "transfer_funds", "risk_level": "high"}
    assert (plan["policy"]["allowed"], plan["policy"]["requires_approval"]) == (True, True)
    assert [(step["step_id"], step["type"], step["requires_approval"]) for step in plan["steps"]] == [
        ("step_1", "check_balance", False),
        ("step_2", "policy_check", False),
        ("step_3", "onchain_action", True),
    ]
    assert plan["steps"][2]["parameters"] == {"from_address": SOURCE, "to_address": DESTINATION, "amount": 250}
    assert [item["pk"]["S"] for item in items("PreviewsTable")] == [plan["plan_id"]]
    assert items("TasksTable") == []


def test_plan_to_watch_needs_nobodys_approval(api: Api) -> None:
    plan = create(api, MONITOR)
    assert plan["analysis"] == {"action_type": "monitoring", "risk_level": "low"}
    assert [step["type"] for step in plan["steps"]] == ["check_balance", "policy_check", "monitor_action"]
    assert not any(step["requires_approval"] for step in plan["steps"])


def test_action_without_a_rule_is_planned_as_denied(api: Api) -> None:
    plan = create(api, {"task_type": "launch_rocket", "description": "x"})
    assert plan["analysis"] == {"action_type": "launch_rocket", "risk_level": "high"}
    assert plan["policy"]["allowed"] is False


def test_preview_is_stored_for_thirty_days(api: Api) -> None:
    plan = create(api)
    kept = {name: value for name, value in plan.items() if name != "verdict"}
    for caller in (ALICE, BOB, CAROL, OLIVIA):
        answer = api("GET", f"/plan/{plan['plan_id']}", **caller)
        assert (answer.status, answer.body) == (200, kept)
    [item] = items("PreviewsTable")
    assert plan["plan_hash"] == Plan.model_validate_json(item["data"]["S"]).hash()
    days = (int(item["expires_at_epoch"]["N"]) - parse_timestamp(plan["created_at"]).timestamp()) / 86400
    assert days == pytest.approx(30, abs=0.01)


def test_plan_is_readable_by_readers_of_its_task(api: Api, store: TaskStore) -> None:
    task_id, plan = planned(store)
    for caller in (ALICE, BOB, CAROL, OLIVIA):
        answer = api("GET", f"/plan/{plan.plan_id}", **caller)
        assert (answer.status, answer.body["task_id"], answer.body["plan_hash"]) == (200, task_id, plan.hash())
    hidden, missing = api("GET", f"/plan/{plan.plan_id}", **MALLORY), api("GET", f"/plan/{UNKNOWN_PLAN}", **MALLORY)
    assert (hidden.status, hidden.body["detail"]) == (missing.status, missing.body["detail"]) == (404, "no such plan")


def test_plan_preview_leaves_the_tasks_plan_unchanged(api: Api, store: TaskStore) -> None:
    task_id, plan = planned(store)
    preview = create(api, MONITOR | {"task_id": task_id})
    assert (preview["task_id"], preview["plan_id"] == plan.plan_id) == (task_id, False)
    assert store.get_task(task_id).plan_id == plan.plan_id
    assert api("GET", f"/plan/{preview['plan_id']}", **MALLORY).status == 404


def test_plan_returns_404_when_task_is_hidden(api: Api, store: TaskStore) -> None:
    task_id, _ = planned(store)
    before = items("TasksTable")
    for named_task, caller in ((task_id, MALLORY), (UNKNOWN, ALICE), (UNKNOWN, OLIVIA)):
        answer = api("POST", "/plan/create", MONITOR | {"task_id": named_task}, **caller)
        assert (answer.status, named(answer)) == (404, {"task_id"})
    assert items("TasksTable") == before


def test_older_clients_name_a_task_by_any_word(api: Api) -> None:
    plan = create(api, MONITOR | {"task_id": "task_123"})
    assert plan["task_id"] == "task_123"
    assert api("GET", f"/plan/{plan['plan_id']}").body == {name: plan[name] for name in plan if name != "verdict"}


def test_plan_rejects_bad_input_without_storing(api: Api) -> None:
    bad = BAD | {
        "a task id that is no word": ({**MONITOR, "task_id": "a b"}, 422, {"task_id"}),
        "an empty task id": ({**MONITOR, "task_id": ""}, 422, {"task_id"}),
        "a task id of another type": ({**MONITOR, "task_id": 7}, 422, {"task_id"}),
    }
    for what, (body, status, fields) in bad.items():
        answer = api("POST", "/plan/create", body)
        assert (answer.status, named(answer)) == (status, fields), (what, answer)
    assert items("TasksTable") == []


def test_plan_routes_check_their_roles(api: Api) -> None:
    plan_id = create(api, **OLIVIA)["plan_id"]
    for caller in (BOB, CAROL, ALICE | {"roles": ""}):
        assert api("POST", "/plan/create", TRANSFER, **caller).status == 403
    assert api("GET", f"/plan/{plan_id}", **(ALICE | {"roles": "staff"})).status == 403
    for method, path, body in (("POST", "/plan/create", TRANSFER), ("GET", f"/plan/{plan_id}", None)):
        assert api(method, path, body, **NOBODY).status == 401


def test_malformed_plan_id_returns_404(api: Api, store: TaskStore) -> None:
    task_id, _ = planned(store)
    for plan_id in ("nonsense", "plan_", UNKNOWN_PLAN, UNKNOWN_PLAN.upper(), task_id, "create"):
        assert api("GET", f"/plan/{plan_id}", **OLIVIA).status == 404, plan_id
    assert api("GET", "/plan", **OLIVIA).status == 404
    assert api("DELETE", f"/plan/{UNKNOWN_PLAN}", **OLIVIA).status == 405


def test_without_the_ledgers_policy_there_is_no_plan(api: Api) -> None:
    api.aws.faults["LedgerFunction"] = down
    answer = api("POST", "/plan/create", TRANSFER)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert items("TasksTable") == []


def test_health_names_failing_dependencies(api: Api) -> None:
    answer = api("GET", "/planner/health", **NOBODY)
    assert (answer.status, answer.body) == (200, {"status": "healthy", "service": "planner", "version": VERSION})
    api.aws.faults["LedgerFunction"] = down
    answer = api("GET", "/planner/health", **NOBODY)
    assert (answer.status, answer.body["status"], answer.body["failing"]) == (503, "unhealthy", ["ledger"])
    boto3.client("dynamodb").delete_table(TableName="TasksTable")
    assert api("GET", "/planner/health", **NOBODY).body["failing"] == ["tasks_table", "ledger"]


# The state that plans

OTHER = policy_of(policy_text())


def test_plan_task_writes_one_transaction_after_one_call(aws: Cloud, store: TaskStore) -> None:
    task, _ = store.start_task(new_task())
    answer = aws.invoke("PlanTaskFunction", {"task_id": task.task_id})
    assert store.get_task(task.task_id).version == task.version + 1
    assert aws.invocations["LedgerFunction"] == 1
    assert [each["step_index"] for each in answer["steps"]] == [0, 1]
    assert answer["action"] == {"step_index": 2, "step_id": "step_3", "step_type": "onchain_action"}


def test_plan_task_called_again_returns_the_same_plan(aws: Cloud, store: TaskStore) -> None:
    task, _ = store.start_task(new_task())
    first = aws.invoke("PlanTaskFunction", {"task_id": task.task_id})
    before = store.get_task(task.task_id)
    assert aws.invoke("PlanTaskFunction", {"task_id": task.task_id}) == first
    assert (store.get_task(task.task_id), aws.invocations["LedgerFunction"]) == (before, 1)


def test_plan_task_leaves_out_finished_steps(aws: Cloud, store: TaskStore) -> None:
    task, _ = store.start_task(new_task())
    event = {"task_id": task.task_id}
    aws.invoke("PlanTaskFunction", event)
    aws.invoke("RunStepFunction", event | {"step_index": 0})
    store.end_task(task.task_id, "failed", actor="test", reason="so")
    store.retry(task.task_id, subject="alice")
    answer = aws.invoke("PlanTaskFunction", event)
    assert [each["step_index"] for each in answer["steps"]] == [1]
    assert answer["action"]["step_index"] == 2


@pytest.mark.parametrize("outcome", ["cancelled", "denied"])
def test_plan_task_plans_nothing_for_an_ended_task(aws: Cloud, store: TaskStore, outcome: Any) -> None:
    task, _ = store.start_task(new_task())
    store.end_task(task.task_id, outcome, actor="alice", reason="so")
    before = store.get_task(task.task_id)
    assert aws.invoke("PlanTaskFunction", {"task_id": task.task_id})["allowed"] is False
    assert (store.get_task(task.task_id), aws.invocations["LedgerFunction"]) == (before, 0)


def test_overtaken_attempt_does_not_switch_policy(
    aws: Cloud, store: TaskStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another attempt stores its plan while this one has read a newer policy."""
    task, _ = store.start_task(new_task())
    event, policy, overtaken = {"task_id": task.task_id}, LedgerClient.policy, iter([True])
    first: list[Any] = []

    def newer(ledger: LedgerClient) -> Policy:
        if not next(overtaken, False):
            return policy(ledger)
        first.append(aws.invoke("PlanTaskFunction", event))
        return OTHER

    monkeypatch.setattr(LedgerClient, "policy", newer)
    assert aws.invoke("PlanTaskFunction", event) == first[0]
    pinned = store.get_task(task.task_id).policy_id
    assert pinned == first[0]["nodes"][1]["result"]["policy_id"] != OTHER.policy_id


def test_plan_task_runs_no_plan_that_was_altered(aws: Cloud, store: TaskStore) -> None:
    task_id, plan = planned(store)
    richer = plan.steps[2].model_copy(update={"parameters": plan.steps[2].parameters | {"amount": 999}})
    altered = plan_item(plan.model_copy(update={"steps": (*plan.steps[:2], richer)}))
    boto3.client("dynamodb").put_item(TableName="TasksTable", Item=altered)
    with pytest.raises(ConflictError, match="differs from the recorded plan"):
        aws.invoke("PlanTaskFunction", {"task_id": task_id})


# The verdict


HALF = "0xabcdef1234567890"
"""A demo wallet of 500 QU; DESTINATION has a balance of 0."""
SOURCES = (*[SOURCE] * 6, SOURCE_IDENTITY, HALF, HALF, DESTINATION, *[IDENTITY] * 3, CONTRACT)
TARGETS = (*[IDENTITY] * 4, HALF, *[DESTINATION] * 4, SOURCE_IDENTITY, ZERO)


def random_rule(chance: random.Random) -> Rule:
    if chance.random() < 0.5:
        return Rule(allowed=True, requires_approval=chance.random() < 0.5, risk_level="high")
    highest = chance.choice([None, None, None, 5, 250, 500])
    return Rule(
        allowed=chance.random() < 0.9,
        requires_approval=chance.random() < 0.5,
        risk_level="high",
        approvals=chance.choice([1, 1, 2]),
        max_amount=highest,
        daily_limit=chance.choice([None, None, highest or 5, 500, 1000]),
        allowed_addresses=chance.choice([None, None, (DESTINATION, HALF, IDENTITY), (SOURCE, HALF)]),
    )


def random_case(seed: int) -> tuple[Policy, dict[str, Any]]:
    chance = random.Random(seed)  # noqa: S311
    money = random_rule(chance)
    plain = money.model_copy(update={"max_amount": None, "daily_limit": None, "allowed_addresses": None})
    rules = {name: plain for name in ("monitoring", "note") if chance.random() < 0.8}
    if chance.random() < 0.9:
        rules["transfer_funds"] = money
    source, target = chance.choice(SOURCES), chance.choice(TARGETS)
    amount = chance.choice((1, 5, 6, 250, 251, 500, 501, 1000, 1001))
    transfer = TRANSFER | {"wallet_address": source, "parameters": {"to_address": target, "amount": amount}}
    request = chance.choice([MONITOR, {"task_type": "note", "description": "x"}, *[transfer] * 10])
    return Policy(policy_id=f"policy-v1-{seed:064x}", version=1, rules=rules), request


@pytest.fixture(autouse=True)
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The answers to callback tokens."""
    answers: list[dict[str, str]] = []
    monkeypatch.setattr("qaes.adapters.executions._send", lambda _, **said: answers.append(said) or True)
    return answers


Sent = list[dict[str, str]]


def engine(aws: Cloud, store: TaskStore, task_id: str, sent: Sent) -> tuple[str, str | None, str]:
    """Return the first verdict of the state machine's functions that is not `execute`, step by step.

    A transfer that may be executed is submitted: the ledger must take it.
    """
    planned = aws.invoke("PlanTaskFunction", {"task_id": task_id})
    if not planned["allowed"]:
        return "denied", None, str(store.get_task(task_id).reason)
    for step in planned["steps"]:
        aws.invoke("RunStepFunction", {"task_id": task_id, "step_index": step["step_index"]})
    if "action" not in planned:
        return "execute", None, ""
    verdict, reason = ask(aws, task_id, sent)
    if verdict != "execute":
        return verdict, planned["action"]["step_id"], reason
    if planned["action"]["step_type"] == "onchain_action":
        assert submit(aws, task_id) == "submitted"
    return "execute", None, ""


def ask(aws: Cloud, task_id: str, sent: Sent) -> tuple[str, str]:
    """The compliance agent's verdict on the action, and its reason."""
    answer = aws.invoke("AwaitApprovalFunction", {"task_id": task_id, "task_token": "token"})
    if "verdict" not in answer:
        assert answer["status"] == "StepDeniedError"
        return "denied", sent[-1]["cause"]
    return {"pending": "await_approval"}.get(answer["verdict"], answer["verdict"]), answer["reason"]


def submit(aws: Cloud, task_id: str) -> str:
    return str(aws.invoke("ExecuteActionFunction", {"task_id": task_id, "task_token": "token"})["status"])


def approve(aws: Cloud, store: TaskStore, task_id: str, approvals: int, sent: Sent) -> tuple[str, str]:
    """As many people as the policy wants approve the action; returns the compliance agent's verdict after that."""
    for subject in ("bob", "carol")[:approvals]:
        store.decide(task_id, approved=True, subject=subject, reason="")
    return ask(aws, task_id, sent)


@pytest.mark.parametrize("first", range(0, 60, 10))
def test_preview_verdict_is_the_started_tasks(
    api: Api, store: TaskStore, sent: Sent, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ledger accepts a transfer that may run or be approved."""
    monkeypatch.setenv("MAX_OPEN_TASKS", "100")
    gateway = Api(api.aws, "GatewayFunction")
    for seed in range(first, first + 10):
        if seed % 4 == 0:
            api.aws.settle()
        policy, request = random_case(seed)
        monkeypatch.setattr(Policies, "in_force", lambda _, policy=policy: policy)
        preview = api("POST", "/plan/create", request)
        started = gateway("POST", "/task/start", request)
        if started.status != 202:
            assert (preview.status, named(preview)) == (started.status, named(started)) != (202, set()), seed
            continue
        previewed, task_id = preview.body["verdict"], started.body["task_id"]
        verdict, step_id, reason = engine(api.aws, store, task_id, sent)
        assert (previewed["verdict"], previewed["step_id"]) == (verdict, step_id), (seed, previewed, reason)
        assert previewed["allowed"] is (verdict != "denied")
        assert verdict == "execute" or previewed["reason"].startswith(reason), (seed, previewed, reason)
        if verdict == "await_approval" and step_id is not None:
            approved, why = approve(api.aws, store, task_id, previewed["approvals"], sent)
            denied_today = "after an approval now, it would be denied: " in previewed["reason"]
            assert approved == ("denied" if denied_today else "execute"), (seed, previewed, why)
            assert not denied_today or previewed["reason"].endswith(why)
            if request["task_type"] == "transfer_funds" and not denied_today:
                assert submit(api.aws, task_id) == "submitted", (seed, previewed)


@pytest.mark.parametrize("asks", [True, False])
@pytest.mark.parametrize(
    ("source", "amount", "reason"),
    [
        (SOURCE, 1001, "insufficient_balance: the wallet holds 1000 QU; the transfer needs 1001 QU"),
        (DESTINATION, 1, "insufficient_balance: the wallet holds 0 QU; the transfer needs 1 QU"),
        (IDENTITY, 1, "no_key: "),
    ],
)
def test_preview_and_task_deny_unpayable_transfer(
    api: Api,
    store: TaskStore,
    sent: Sent,
    monkeypatch: pytest.MonkeyPatch,
    asks: bool,
    source: str,
    amount: int,
    reason: str,
) -> None:
    rule = Rule(allowed=True, requires_approval=asks, risk_level="high")
    policy = Policy(policy_id=f"policy-v1-{9:064x}", version=1, rules={"transfer_funds": rule})
    monkeypatch.setattr(Policies, "in_force", lambda _: policy)
    request = TRANSFER | {"wallet_address": source, "parameters": {"to_address": HALF, "amount": amount}}
    previewed = create(api, request)["verdict"]
    started = Api(api.aws, "GatewayFunction")("POST", "/task/start", request)
    verdict = engine(api.aws, store, started.body["task_id"], sent)
    assert (previewed["verdict"], previewed["step_id"], previewed["reason"]) == verdict
    assert verdict[:2] == ("denied", "step_3") and verdict[2].startswith(reason)


def test_preview_names_the_limit_that_denies(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Rule(allowed=True, requires_approval=True, risk_level="high", max_amount=100, daily_limit=1000)
    policy = Policy(policy_id=f"policy-v1-{7:064x}", version=1, rules={"transfer_funds": rule})
    monkeypatch.setattr(Policies, "in_force", lambda _: policy)
    verdict = create(api)["verdict"]
    assert (verdict["allowed"], verdict["verdict"], verdict["step_id"]) == (False, "denied", "step_3")
    assert "max_amount" in verdict["reason"] and "100 QU" in verdict["reason"]


def test_preview_warns_when_the_daily_limit_is_used_up(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Rule(allowed=True, requires_approval=True, risk_level="high", daily_limit=300)
    asks = Policy(policy_id=f"policy-v1-{8:064x}", version=1, rules={"transfer_funds": rule})
    monkeypatch.setattr(Policies, "in_force", lambda _: asks)
    terms = {"reference": "task_1:step_3", "source": SOURCE, "destination": DESTINATION, "amount": 100}
    LedgerClient("LedgerTransferFunction").transfer(**terms, requester="alice")
    verdict = create(api)["verdict"]
    assert (verdict["verdict"], verdict["approvals"]) == ("await_approval", 1)
    assert "after an approval now, it would be denied: daily_limit_exceeded: over daily_limit" in verdict["reason"]
    free = asks.model_copy(update={"rules": {"transfer_funds": rule.model_copy(update={"requires_approval": False})}})
    monkeypatch.setattr(Policies, "in_force", lambda _: free)
    verdict = create(api)["verdict"]
    assert (verdict["allowed"], verdict["verdict"]) == (False, "denied")
    assert "100 QU are used" in verdict["reason"]
