"""Every path through the deployed state machine, with the template's own handlers and tables."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import boto3
import pytest

from qaes.adapters.executions import Executions
from qaes.adapters.ledger_client import LedgerClient, Policies
from qaes.adapters.task_items import plan_item
from qaes.adapters.task_repository import TaskStore
from qaes.domain import policy
from qaes.domain.policy import Policy, PolicyDocument, Rule
from qubic.network.faults import Faults
from qubic.network.mock import MockChain
from tests.support import template
from tests.support.cloud import Cloud, call, cloud
from tests.support.stories import check_every_story
from tests.support.tokens import action_token, approval_token
from tests.workflow.conftest import DESTINATION, SOURCE, begin

pytestmark = pytest.mark.xdist_group("paths")  # one process: the last test checks the states that all others visited

VISITED: set[tuple[str, str]] = set()
"""Each pair of states that followed one another."""


def balance(address: str) -> int:
    answer = call("LedgerFunction", {"operation": "balance", "address": address})
    return int(answer["result"]["balance"])


def kinds(aws: Cloud, task_id: str) -> list[str]:
    aws.drain(task_id)
    found = boto3.client("dynamodb").query(
        TableName="AuditEntriesTable",
        KeyConditionExpression="pk = :pk",
        ExpressionAttributeValues={":pk": {"S": task_id}},
    )
    entries = [json.loads(item["text"]["S"]) for item in found["Items"]]
    assert [entry["seq"] for entry in entries] == list(range(1, len(entries) + 1))
    return [f"{entry['kind']}:{entry['status']}" for entry in entries]


def visited(aws: Cloud, task_id: str) -> list[str]:
    states = aws.history(task_id)
    VISITED.update(zip(["", *states], states, strict=False))
    return states


def policy_of(**changes: dict[str, Any]) -> Callable[[Any], Policy]:
    """The ledger's policy with other rules, from now on; its document is where the tasks' stories are checked by it."""
    base = Policy.model_validate(call("LedgerFunction", {"operation": "policy"})["result"])
    rules = base.rules | {name: Rule.model_validate(rule) for name, rule in changes.items()}
    text = PolicyDocument.write(rules, version=2).text()
    item = {"pk": {"S": "TEST"}, "sk": {"S": "VERSION#000000002"}, "text": {"S": text}}
    boto3.client("dynamodb").put_item(TableName="LedgerTable", Item=item)
    changed = policy.policy_of(text)
    return lambda client: changed


WITH_APPROVAL = {"allowed": True, "requires_approval": True, "risk_level": "low"}


def after_planning(monkeypatch: pytest.MonkeyPatch, changed: Callable[[Any], Policy]) -> None:
    """Have another policy in force as soon as a plan is stored."""
    plan_task = TaskStore.plan_task

    def then_changed(self: TaskStore, *arguments: Any) -> Any:
        planned = plan_task(self, *arguments)
        in_force(monkeypatch, changed)
        return planned

    monkeypatch.setattr(TaskStore, "plan_task", then_changed)


def in_force(monkeypatch: pytest.MonkeyPatch, changed: Callable[..., Policy]) -> None:
    """Make the ledger's client return another policy; the ledger still returns the pinned one."""
    names = ("policies", "policy_and_balance", "policy_and_check")
    policy, real = LedgerClient.policy, {name: getattr(LedgerClient, name) for name in names}

    def read(self: LedgerClient, name: str, *arguments: Any, **terms: Any) -> Any:
        current = changed(self)
        if terms.get("pinned") == current.policy_id != policy(self).policy_id:
            found = real[name](self, *arguments, **terms | {"pinned": None})
            both = Policies(current, current, {})
        else:
            found = real[name](self, *arguments, **terms)
            both = Policies(current, (found if name == "policies" else found[0]).pinned, {})
        return both if name == "policies" else (both, found[1])

    monkeypatch.setattr(LedgerClient, "policy", changed)
    for name in names:
        monkeypatch.setattr(
            LedgerClient, name, lambda self, *some, name=name, **terms: read(self, name, *some, **terms)
        )


def raise_always(event: Any) -> None:
    raise ConnectionError("secret internals")


def test_monitoring_task_completes_in_6_transitions(aws: Cloud, start: Callable[..., str]) -> None:
    task_id = start(alert_threshold=500)
    task = aws.wait(task_id, "completed")
    assert task["total_steps"] == 3 and task["requires_approval"] is False
    assert aws.execution(task_id)["status"] == "SUCCEEDED"
    assert visited(aws, task_id) == ["PlanTask", "PolicyAllows?", "RunSteps", *["RunStep"] * 3]
    assert aws.invocations == {"PlanTaskFunction": 1, "RunStepFunction": 3, "LedgerFunction": 4}
    records = TaskStore("TasksTable").steps(task_id)
    assert [record.status for record in records] == ["succeeded"] * 3
    assert records[2].result is not None and records[2].result["balance"] == 1000
    assert kinds(aws, task_id) == [
        "task_started:pending",
        "policy_checked:allowed",
        "plan_built:planned",
        *["step_started:running", "step_executed:succeeded"] * 3,
        "task_ended:completed",
    ]


def test_action_without_rule_is_denied_without_effect(aws: Cloud, start: Callable[..., str]) -> None:
    task_id = start("delete_everything")
    task = aws.wait(task_id, "denied")
    assert aws.execution(task_id)["status"] == "SUCCEEDED"
    assert visited(aws, task_id) == ["PlanTask", "PolicyAllows?", "TaskEnded"]
    assert task["plan_id"] is None and TaskStore("TasksTable").steps(task_id) == []
    assert kinds(aws, task_id) == ["task_started:pending", "policy_checked:denied", "task_ended:denied"]


def test_approved_transfer_moves_once_in_7_transitions(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any]
) -> None:
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    assert balance(SOURCE) == 1000
    decide(task_id, approved=True)
    aws.wait(task_id, "completed")
    aws.execution(task_id)
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)
    steps = ["RunFirstSteps", *["RunFirstStep"] * 2]
    assert visited(aws, task_id) == ["PlanTask", "PolicyAllows?", *steps, "AwaitApproval", "ExecuteAction"]
    assert kinds(aws, task_id)[-5:] == [
        "approval_requested:pending",
        "approval_decided:approved",
        "step_started:running",
        "step_executed:succeeded",
        "task_ended:completed",
    ]


def test_rejected_transfer_moves_nothing(aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any]) -> None:
    task_id = transfer(250)
    decide(task_id, approved=False)
    task = aws.wait(task_id, "rejected")
    assert task["reason"] == "because"
    aws.execution(task_id)
    assert visited(aws, task_id)[-4:] == ["AwaitApproval", "EndTask", "TaskFailed?", "TaskEnded"]
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)
    assert kinds(aws, task_id)[-2:] == ["approval_decided:rejected", "task_ended:rejected"]


def test_undecided_approval_expires() -> None:
    with cloud(parameters={"ApprovalTimeoutSeconds": "2"}) as aws:
        task_id = begin(aws, "transfer_funds")
        task = aws.wait(task_id, "expired")
        assert task["reason"] == "no decision was made in time"
        aws.execution(task_id)
        assert visited(aws, task_id)[-4:] == ["AwaitApproval", "EndTask", "TaskFailed?", "TaskEnded"]
        assert balance(SOURCE) == 1000
        assert kinds(aws, task_id)[-2:] == ["approval_expired:expired", "task_ended:expired"]


def test_worker_that_fails_at_first_is_tried_again(aws: Cloud, start: Callable[..., str]) -> None:
    failures = iter([True, True])

    def flaky(event: Any) -> None:
        if next(failures, False):
            raise RuntimeError("the network is down")

    aws.faults["RunStepFunction"] = flaky
    task_id = start()
    aws.wait(task_id, "completed")
    assert aws.invocations["RunStepFunction"] == 5
    assert len(TaskStore("TasksTable").steps(task_id)) == 3
    assert kinds(aws, task_id).count("step_executed:succeeded") == 3


def test_worker_that_fails_for_good_fails_the_task(aws: Cloud, start: Callable[..., str]) -> None:
    aws.faults["RunStepFunction"] = raise_always
    task_id = start()
    task = aws.wait(task_id, "failed")
    assert (task["reason"], task["failed_step"]) == ("a service did not respond; retry the task", "step_1")
    assert aws.execution(task_id)["status"] == "FAILED"
    assert visited(aws, task_id)[-4:] == ["RunStep", "EndTask", "TaskFailed?", "TaskFailed"]


@pytest.mark.parametrize(("task_type", "state"), [("monitor_wallet", "RunStep"), ("transfer_funds", "RunFirstStep")])
def test_policy_that_denies_by_now_stops_a_plain_step(
    aws: Cloud, start: Callable[..., str], monkeypatch: pytest.MonkeyPatch, task_type: str, state: str
) -> None:
    action = {"monitor_wallet": "monitoring"}.get(task_type, task_type)
    rule = {"allowed": False, "requires_approval": False, "risk_level": "low"}
    after_planning(monkeypatch, policy_of(**{action: rule}))
    task_id = start(task_type)
    task = aws.wait(task_id, "denied")
    assert f"does not allow {action}" in task["reason"]
    assert aws.execution(task_id)["status"] == "SUCCEEDED"
    assert visited(aws, task_id)[-4:] == [state, "EndTask", "TaskFailed?", "TaskEnded"]
    assert TaskStore("TasksTable").steps(task_id) == []
    assert kinds(aws, task_id)[-2:] == ["plan_built:planned", "task_ended:denied"]


def test_transfer_above_balance_denied_without_approval(aws: Cloud, transfer: Callable[..., str]) -> None:
    task_id = transfer(1001)
    task = aws.wait(task_id, "denied")
    assert task["reason"] == "insufficient_balance: the wallet holds 1000 QU; the transfer needs 1001 QU"
    assert TaskStore("TasksTable").approvals(task_id) == []
    assert not [kind for kind in kinds(aws, task_id) if kind.startswith("approval")]
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)


def test_transfer_without_approval_is_denied_beyond_the_balance(
    aws: Cloud, transfer: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rule = {"allowed": True, "requires_approval": False, "risk_level": "high"}
    in_force(monkeypatch, policy_of(transfer_funds=rule))
    task_id = transfer(1001)
    task = aws.wait(task_id, "denied")
    assert task["reason"] == "insufficient_balance: the wallet holds 1000 QU; the transfer needs 1001 QU"
    aws.execution(task_id)
    assert "ExecuteAction" not in visited(aws, task_id)
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)


def spend_one() -> None:
    """Another task's transfer takes 1 QU from the wallet."""
    ledger = LedgerClient("LedgerTransferFunction")
    ledger.transfer(reference="another", source=SOURCE, destination="0xabcdef1234567890", amount=1, requester="alice")


def test_transfer_denied_when_balance_is_spent_while_waiting(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any]
) -> None:
    task_id = transfer(1000)
    aws.wait(task_id, "waiting_approval")
    spend_one()
    aws.settle()
    decide(task_id, approved=True)
    task = aws.wait(task_id, "denied")
    assert task["reason"] == "insufficient_balance: the wallet holds 999 QU; the transfer needs 1000 QU"
    aws.execution(task_id)
    assert visited(aws, task_id)[-4:] == ["ExecuteAction", "EndTask", "TaskFailed?", "TaskEnded"]
    assert (balance(SOURCE), balance(DESTINATION)) == (999, 0)
    assert kinds(aws, task_id)[-2:] == ["approval_decided:approved", "task_ended:denied"]


def test_transfer_fails_when_balance_is_spent_at_submission(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any]
) -> None:
    task_id = transfer(1000)
    aws.wait(task_id, "waiting_approval")
    spent = iter([True])
    aws.faults["RecordEventsFunction"] = lambda event: spend_one() if next(spent, False) else None  # after the claim
    attempts: list[Any] = []
    aws.faults["ExecuteActionFunction"] = lambda event: attempts.append(event) if "task_token" in event else None
    decide(task_id, approved=True)
    task = aws.wait(task_id, "failed")
    assert task["failed_step"] == "step_3" and "insufficient_balance" in task["reason"]
    aws.settle()
    assert (balance(SOURCE), balance(DESTINATION)) == (999, 0)
    assert len(attempts) == 1, "a refusal is not tried again"
    aws.execution(task_id)
    assert visited(aws, task_id)[-4:] == ["ExecuteAction", "EndTask", "TaskFailed?", "TaskFailed"]
    assert kinds(aws, task_id)[-2:] == ["step_executed:failed", "task_ended:failed"]


def test_task_fails_after_retries_when_ledger_is_down(aws: Cloud, start: Callable[..., str]) -> None:
    aws.faults["LedgerFunction"] = raise_always
    task_id = start()
    aws.wait(task_id, "failed")
    assert aws.invocations["PlanTaskFunction"] == 3


def test_ledger_that_comes_back_is_found_by_a_retry(aws: Cloud, start: Callable[..., str]) -> None:
    failures = iter([True])

    def flaky(event: Any) -> None:
        if event["operation"] == "write_hashes" and next(failures, False):
            raise ConnectionError("down")

    aws.faults["LedgerFunction"] = flaky
    task_id = start()
    aws.wait(task_id, "completed")
    assert kinds(aws, task_id)[-1] == "task_ended:completed"


def test_policy_that_denies_by_now_stops_the_step(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    rule = {"allowed": False, "requires_approval": True, "risk_level": "high"}
    in_force(monkeypatch, policy_of(transfer_funds=rule))
    decide(task_id, approved=True)
    task = aws.wait(task_id, "denied")
    assert "does not allow transfer_funds" in task["reason"]
    aws.execution(task_id)
    visited(aws, task_id)
    assert balance(SOURCE) == 1000


def test_stricter_policy_requests_an_approval(
    aws: Cloud, start: Callable[..., str], decide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    after_planning(monkeypatch, policy_of(monitoring=WITH_APPROVAL))
    task_id = start()
    decide(task_id, approved=True)
    aws.wait(task_id, "completed")
    aws.execution(task_id)
    assert visited(aws, task_id)[-4:] == ["RunStep", "RunStep", "RunStep", "AwaitApproval", "ExecuteAction"][-4:]
    assert kinds(aws, task_id)[-5:] == [
        "approval_requested:pending",
        "approval_decided:approved",
        "step_started:running",
        "step_executed:succeeded",
        "task_ended:completed",
    ]
    assert aws.invocations["LedgerTransferFunction"] == 0


def test_stricter_policy_requests_approval_again(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    in_force(monkeypatch, policy_of(transfer_funds=WITH_APPROVAL | {"approvals": 2}))
    decide(task_id, approved=True)
    until(lambda: {str(TaskStore("TasksTable").approvals(task_id)[1:] or "")} - {""})
    decide(task_id, approved=True)
    decide(task_id, approved=True, subject="carol")
    aws.wait(task_id, "completed")
    aws.execution(task_id)
    assert visited(aws, task_id)[-4:] == ["AwaitApproval", "ExecuteAction"] * 2
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)
    assert kinds(aws, task_id).count("approval_requested:pending") == 2


def test_policy_stricter_for_the_first_steps_asks_later(
    aws: Cloud, transfer: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the action needs people: the steps before it only read."""
    after_planning(monkeypatch, policy_of(transfer_funds=WITH_APPROVAL | {"approvals": 2}))
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    assert kinds(aws, task_id).count("step_executed:succeeded") == 2


@pytest.mark.parametrize("wakes", ["success", "ApprovalRejectedError", "ApprovalExpiredError"])
def test_callback_of_an_execution_decides_nothing(wakes: str) -> None:
    """The token reports an expiry without a decision."""
    with cloud(parameters={"ApprovalTimeoutSeconds": "3600"}) as aws:
        task_id = begin(aws, "transfer_funds")
        aws.wait(task_id, "waiting_approval")
        if wakes == "success":
            used = approval_token(task_id)
            boto3.client("stepfunctions").send_task_success(taskToken=used, output='{"decision": "approved"}')
            until(lambda: {approval_token(task_id)} - {used})
            assert visited(aws, task_id)[-3:] == ["AwaitApproval", "ExecuteAction", "AwaitApproval"]
        else:
            boto3.client("stepfunctions").send_task_failure(taskToken=approval_token(task_id), error=wakes)
            task = aws.wait(task_id, "failed")
            assert task["reason"] == "the execution was resumed without a decision"
            assert kinds(aws, task_id)[-2:] == ["approval_cancelled:cancelled", "task_ended:failed"]
        assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)


def test_plan_swapped_during_approval_does_not_run(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any]
) -> None:
    task_id = transfer(1)
    task = aws.wait(task_id, "waiting_approval")
    plan = TaskStore("TasksTable").get_plan(task["plan_id"])
    step = plan.steps[2]
    richer = step.model_copy(update={"parameters": step.parameters | {"amount": 999}})
    swapped = plan.model_copy(update={"steps": (*plan.steps[:2], richer)})
    boto3.client("dynamodb").put_item(TableName="TasksTable", Item=plan_item(swapped))
    decide(task_id, approved=True)
    aws.wait(task_id, "failed")
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)
    with pytest.raises(AssertionError, match="plan"):
        check_every_story()  # the trail has the genuine plan's hash
    boto3.client("dynamodb").put_item(TableName="TasksTable", Item=plan_item(plan))


@pytest.mark.parametrize("crash", ["after the submission", "before the record"])
def test_repeated_step_takes_effect_once(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any], crash: str
) -> None:
    """The worker dies when the ledger has the transfer, or when it is confirmed and before its record is written."""
    task_id = transfer(250)
    crashes = iter([True])
    owner, name = (LedgerClient, "transfer") if crash == "after the submission" else (TaskStore, "finish_step")
    real = getattr(owner, name)

    def crash_once(*arguments: Any, **named: Any) -> Any:
        if name == "transfer":
            real(*arguments, **named)
        if next(crashes, False):
            raise RuntimeError("crashed after the effect")
        return real(*arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, crash_once)
        decide(task_id, approved=True)
        aws.wait(task_id, "completed")
    assert next(crashes, None) is None
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)
    record = TaskStore("TasksTable").step(task_id, 2)
    assert record is not None and record.attempt == 1  # another read of its outcome is no new attempt


def test_expired_transfer_fails_task_and_retry_pays_once(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any]
) -> None:
    network(aws).set_faults(Faults(empty_ticks=40))
    task_id = transfer(250)
    decide(task_id, approved=True)
    task = aws.wait(task_id, "failed")
    assert task["failed_step"] == "step_3"
    assert "nothing was moved" in str(task["reason"])
    aws.execution(task_id)
    visited(aws, task_id)
    assert balance(SOURCE) == 1000
    network(aws).set_faults(Faults())
    retry(aws, task_id)
    decide(task_id, approved=True)  # requested again: the earlier run's approval does not count
    aws.wait(task_id, "completed")
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)


def test_retry_finds_transfer_of_silent_ledger_and_pays_once() -> None:
    with cloud(parameters={"ConfirmationTimeoutSeconds": "2"}) as aws:
        chain = network(aws)
        task_id = begin(aws, "transfer_funds")
        aws.wait(task_id, "waiting_approval")
        aws.stop_time()
        approval = TaskStore("TasksTable").decide(task_id, approved=True, subject="bob", reason="because")
        Executions.deliver(task_id, approval)
        task = aws.wait(task_id, "failed")
        assert "did not confirm the transfer in time" in str(task["reason"])
        aws.execution(task_id)
        visited(aws, task_id)
        assert chain.tick_info().tick  # the network has new ticks, and the transfer is still in flight
        retry(aws, task_id)
        aws.start_time()
        aws.wait(task_id, "completed")
        assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)
        told = kinds(aws, task_id)
        # A submitted transfer needs no new approval, and cannot be stopped.
        assert told.count("approval_requested:pending") == 1
        assert told[-4:] == [
            "task_ended:failed",
            "task_retried:executing",
            "step_executed:succeeded",
            "task_ended:completed",
        ]


def test_early_resumption_leaves_transfer_to_ledger(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any]
) -> None:
    aws.wait(task_id := transfer(250), "waiting_approval")
    aws.stop_time()
    decide(task_id, approved=True)
    store = TaskStore("TasksTable")
    token = until(lambda: {action_token(task_id)} - {None})
    boto3.client("stepfunctions").send_task_success(taskToken=token, output='{"status": "succeeded"}')
    aws.execution(task_id)
    assert (store.get_task(task_id).status, balance(DESTINATION)) == ("executing", 0), (
        "the message that resumes it is not trusted"
    )
    aws.start_time()
    aws.wait(task_id, "completed")
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)
    assert kinds(aws, task_id)[-2:] == ["step_executed:succeeded", "task_ended:completed"]


def until(look: Callable[[], set[str | None]]) -> str:
    """Wait until there is something to see."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if found := look():
            return str(found.pop())
        time.sleep(0.02)
    raise AssertionError("nothing came")


def network(aws: Cloud) -> MockChain:
    return MockChain(genesis={}, table="ChainTable", clock=aws.clock, tick_milliseconds=1000)


def retry(aws: Cloud, task_id: str, subject: str = "alice") -> None:
    """Take the end back and start the next execution, as the gateway does."""
    task = TaskStore("TasksTable").retry(task_id, subject=subject)
    boto3.client("stepfunctions").start_execution(
        stateMachineArn=aws.machine_arn, name=task.execution_name, input=json.dumps({"task_id": task_id})
    )


def test_reconciler_delivers_committed_decision(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = transfer(250)
    decide(task_id, approved=True, deliver=False)
    monkeypatch.setattr("agent_runtime.reconciler.GRACE_SECONDS", -1)
    assert aws.invoke("ReconcilerFunction", {}) == {"reconciled": [task_id]}
    aws.wait(task_id, "completed")
    assert aws.invoke("ReconcilerFunction", {}) == {"reconciled": []}


def test_execution_that_was_stopped_leaves_no_open_task(aws: Cloud, transfer: Callable[..., str]) -> None:
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    arn = f"{aws.machine_arn.replace(':stateMachine:', ':execution:')}:{task_id}"
    boto3.client("stepfunctions").stop_execution(executionArn=arn)
    event = {
        "detail-type": "Step Functions Execution Status Change",
        "detail": {"status": "ABORTED", "name": task_id, "input": f'{{"task_id": "{task_id}"}}'},
    }
    assert aws.invoke("ReconcilerFunction", event) == {"reconciled": [task_id]}
    assert TaskStore("TasksTable").get_task(task_id).status == "failed"


def test_no_token_is_in_the_executions_history_output(aws: Cloud, transfer: Callable[..., str]) -> None:
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    approval = TaskStore("TasksTable").open_approval(task_id)
    assert approval is not None
    arn = f"{aws.machine_arn.replace(':stateMachine:', ':execution:')}:{task_id}"
    history = boto3.client("stepfunctions").get_execution_history(executionArn=arn, includeExecutionData=True)
    outputs = [
        event["stateExitedEventDetails"].get("output", "")
        for event in history["events"]
        if "stateExitedEventDetails" in event
    ]
    assert outputs and not any(approval_token(task_id) in output for output in outputs)


def test_plan_that_fails_for_good_fails_the_task(aws: Cloud, start: Callable[..., str]) -> None:
    aws.faults["PlanTaskFunction"] = raise_always
    task_id = start()
    task = aws.wait(task_id, "failed")
    assert (task["reason"], task["failed_step"]) == ("a service did not respond; retry the task", None)
    assert aws.execution(task_id)["status"] == "FAILED"
    assert visited(aws, task_id) == ["PlanTask", "EndTask", "TaskFailed?", "TaskFailed"]
    assert kinds(aws, task_id) == ["task_started:pending", "task_ended:failed"]


@pytest.mark.parametrize("function", ["AwaitApprovalFunction", "ExecuteActionFunction"])
def test_token_state_that_fails_for_good_fails_the_task(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any], function: str
) -> None:
    aws.faults[function] = raise_always
    task_id = transfer(250)
    if function == "ExecuteActionFunction":
        decide(task_id, approved=True)
    task = aws.wait(task_id, "failed")
    assert (task["reason"], task["failed_step"]) == ("a service did not respond; retry the task", "step_3")
    assert aws.execution(task_id)["status"] == "FAILED"
    assert visited(aws, task_id)[-4:] == [function.removesuffix("Function"), "EndTask", "TaskFailed?", "TaskFailed"]
    assert aws.invocations[function] == 3
    assert balance(SOURCE) == 1000


def test_nodes_of_the_planner_are_in_the_history(aws: Cloud, start: Callable[..., str]) -> None:
    """The display in the console of Step Functions."""
    task_id = start()
    aws.wait(task_id, "completed")
    aws.execution(task_id)
    arn = f"{aws.machine_arn.replace(':stateMachine:', ':execution:')}:{task_id}"
    history = boto3.client("stepfunctions").get_execution_history(executionArn=arn, includeExecutionData=True)
    exited = [each["stateExitedEventDetails"] for each in history["events"] if "stateExitedEventDetails" in each]
    planned = next(json.loads(each["output"]) for each in exited if each["name"] == "PlanTask")
    task = TaskStore("TasksTable").get_task(task_id)
    results = {node["node"]: node["result"] for node in planned["nodes"]}
    assert list(results) == ["analyze_task", "policy_check", "plan_builder", "validate_plan"]
    assert results["policy_check"]["policy_id"] == task.policy_id
    assert results["plan_builder"] == {"plan_id": task.plan_id, "plan_hash": task.plan_hash}
    assert [step["step_type"] for step in planned["steps"]] == ["check_balance", "policy_check", "monitor_action"]
    ran = [json.loads(each["output"]) for each in exited if each["name"] == "RunStep"]
    assert ran == [{"step_id": f"step_{number}", "status": "succeeded", "attempt": 1} for number in (1, 2, 3)]


@pytest.mark.parametrize("outcome", ["denied", "rejected", "expired", "failed"])
def test_reconciler_ends_task_without_recorded_end(outcome: str) -> None:
    with cloud(parameters={"ApprovalTimeoutSeconds": "1" if outcome == "expired" else "60"}) as aws:
        aws.faults["EndTaskFunction"] = raise_always
        if outcome == "failed":
            aws.faults["RunStepFunction"] = raise_always
        task_id = begin(aws, "transfer_funds", amount=5000 if outcome == "denied" else 250)
        if outcome == "rejected":
            aws.wait(task_id, "waiting_approval")
            no = TaskStore("TasksTable").decide(task_id, approved=False, subject="bob", reason="no")
            Executions.deliver(task_id, no)
        assert aws.execution(task_id)["status"] == "FAILED"
        assert visited(aws, task_id)[-3:] == ["EndTask", "TaskFailed?", "TaskFailed"]
        assert TaskStore("TasksTable").get_task(task_id).status in {"executing", "waiting_approval"}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("agent_runtime.reconciler.GRACE_SECONDS", -1)
            assert aws.invoke("ReconcilerFunction", {}) == {"reconciled": [task_id]}
        task = TaskStore("TasksTable").get_task(task_id)
        # The task has failed for any reason, but a rejection takes precedence.
        expected = ("rejected", "no") if outcome == "rejected" else ("failed", "the execution failed")
        assert (task.status, task.reason) == expected
        assert kinds(aws, task_id)[-1] == f"task_ended:{task.status}"


def test_retry_with_nothing_left_to_do_completes(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any]
) -> None:
    """The transfer of the first execution is confirmed between the end of the task and its retry."""
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    aws.stop_time()
    decide(task_id, approved=True)
    store = TaskStore("TasksTable")
    until(lambda: {action_token(task_id)} - {None})
    submitted = {"operation": "transfer_state", "reference": f"{task_id}#step_3"}
    until(lambda: {aws.invoke("LedgerFunction", submitted)["ok"]} - {False})
    arn = f"{aws.machine_arn.replace(':stateMachine:', ':execution:')}:{task_id}"
    boto3.client("stepfunctions").stop_execution(executionArn=arn)
    store.end_task(task_id, "failed", actor="reconciler", reason="stopped", execution=task_id)
    aws.settle()
    assert store.get_task(task_id).status == "failed"
    retry(aws, task_id)
    aws.wait(task_id, "completed")
    aws.execution(f"{task_id}-2")
    assert visited(aws, f"{task_id}-2") == [
        "PlanTask",
        "PolicyAllows?",
        "RunFirstSteps",
        "AwaitApproval",
        "ExecuteAction",
    ]
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)
    assert kinds(aws, task_id)[-3:] == ["step_executed:succeeded", "task_retried:executing", "task_ended:completed"]


def test_every_state_and_every_catch_was_visited() -> None:
    """Runs last: the tests above have walked through the whole definition."""
    machine = template.definition()["States"]
    maps = {name: state for name, state in machine.items() if state["Type"] == "Map"}
    inside = {name: set(state["ItemProcessor"]["States"]) for name, state in maps.items()}
    entered = {state for _, state in VISITED}
    assert {*machine, *set().union(*inside.values())} - entered == set()
    # A Map's Catch is entered from the state inside it that failed.
    catches = {
        (inner, catch["Next"])
        for name, state in machine.items()
        for catch in state.get("Catch", [])
        for inner in inside.get(name, {name})
    }
    assert catches - VISITED == set()
