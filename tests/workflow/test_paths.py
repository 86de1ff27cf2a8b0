"""Every path through the deployed state machine, with the template's own handlers and tables."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import boto3
import pytest

from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.task_items import plan_item
from qaes.adapters.task_store import TaskStore
from qaes.domain import policy
from qaes.domain.policy import Policy, PolicyDocument, Rule
from qubic.chain.mock import Faults, MockChain
from tests.support import template
from tests.support.cloud import Cloud, call, cloud
from tests.support.stories import check_every_story
from tests.workflow.conftest import DESTINATION, SOURCE, begin

pytestmark = pytest.mark.xdist_group("paths")  # one process: the last test asks what all the others have visited

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


def raise_always(event: Any) -> None:
    raise ConnectionError("secret internals")


def test_a_monitoring_task_completes_in_at_most_20_transitions(aws: Cloud, start: Callable[..., str]) -> None:
    task_id = start(alert_threshold=500)
    task = aws.wait(task_id, "completed")
    assert task["total_steps"] == 3 and task["requires_approval"] is False
    assert aws.execution(task_id)["status"] == "SUCCEEDED"
    assert len(visited(aws, task_id)) <= 20
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


def test_an_action_without_a_rule_is_denied_and_nothing_is_executed(aws: Cloud, start: Callable[..., str]) -> None:
    task_id = start("delete_everything")
    task = aws.wait(task_id, "denied")
    assert aws.execution(task_id)["status"] == "SUCCEEDED"
    assert "DenyTask" in visited(aws, task_id)
    assert task["plan_id"] is None and TaskStore("TasksTable").steps(task_id) == []
    assert kinds(aws, task_id) == ["task_started:pending", "policy_checked:denied", "task_ended:denied"]


def test_an_approved_transfer_moves_the_amount_once_in_24_transitions(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any]
) -> None:
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    assert balance(SOURCE) == 1000
    decide(task_id, approved=True)
    aws.wait(task_id, "completed")
    aws.execution(task_id)
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)
    assert len(visited(aws, task_id)) == 24
    assert kinds(aws, task_id)[-5:] == [
        "approval_requested:pending",
        "approval_decided:approved",
        "step_started:running",
        "step_executed:succeeded",
        "task_ended:completed",
    ]


def test_a_rejected_transfer_moves_nothing(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any]
) -> None:
    task_id = transfer(250)
    decide(task_id, approved=False)
    task = aws.wait(task_id, "rejected")
    assert task["reason"] == "because"
    aws.execution(task_id)
    assert "RejectTask" in visited(aws, task_id)
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)
    assert kinds(aws, task_id)[-2:] == ["approval_decided:rejected", "task_ended:rejected"]


def test_an_approval_that_nobody_decides_expires() -> None:
    with cloud(parameters={"ApprovalTimeoutSeconds": "2"}) as aws:
        task_id = begin(aws, "transfer_funds")
        task = aws.wait(task_id, "expired")
        assert task["reason"] == "nobody decided in time"
        aws.execution(task_id)
        assert "ExpireTask" in visited(aws, task_id)
        assert balance(SOURCE) == 1000
        assert kinds(aws, task_id)[-2:] == ["approval_expired:expired", "task_ended:expired"]


def test_a_worker_that_fails_at_first_is_tried_again(aws: Cloud, start: Callable[..., str]) -> None:
    failures = iter([True, True])

    def flaky(event: Any) -> None:
        if next(failures, False):
            raise RuntimeError("the network is down")

    aws.faults["ExecuteStepFunction"] = flaky
    task_id = start()
    aws.wait(task_id, "completed")
    assert aws.invocations["ExecuteStepFunction"] == 5
    assert len(TaskStore("TasksTable").steps(task_id)) == 3
    assert kinds(aws, task_id).count("step_executed:succeeded") == 3


def test_a_worker_that_fails_for_good_fails_the_task(aws: Cloud, start: Callable[..., str]) -> None:
    aws.faults["ExecuteStepFunction"] = raise_always
    task_id = start()
    task = aws.wait(task_id, "failed")
    assert "internals" not in task["reason"]
    assert aws.execution(task_id)["status"] == "FAILED"
    assert visited(aws, task_id)[-3:] == ["ExecuteStep", "FailTask", "TaskFailed"]


def test_transfer_beyond_the_balance_is_denied_before_anybody_is_asked(
    aws: Cloud, transfer: Callable[..., str]
) -> None:
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
    monkeypatch.setattr("qaes.adapters.ledger_client.LedgerClient.policy", policy_of(transfer_funds=rule))
    task_id = transfer(1001)
    task = aws.wait(task_id, "denied")
    assert task["reason"] == "insufficient_balance: the wallet holds 1000 QU; the transfer needs 1001 QU"
    aws.execution(task_id)
    assert "SubmitTransfer" not in visited(aws, task_id)
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)


def spend_one() -> None:
    """Another task's transfer takes 1 QU from the wallet."""
    ledger = LedgerClient("LedgerTransferFunction")
    ledger.transfer(reference="another", source=SOURCE, destination="0xabcdef1234567890", amount=1, requester="alice")


def test_transfer_denied_when_spent_while_it_waits(
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
    assert "SubmitTransfer" not in visited(aws, task_id)
    assert (balance(SOURCE), balance(DESTINATION)) == (999, 0)
    assert kinds(aws, task_id)[-2:] == ["approval_decided:approved", "task_ended:denied"]


def test_transfer_fails_when_spent_as_it_is_submitted(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any]
) -> None:
    task_id = transfer(1000)
    aws.wait(task_id, "waiting_approval")
    aws.faults["ExecuteStepFunction"] = lambda event: spend_one() if event.get("submit") else None
    decide(task_id, approved=True)
    task = aws.wait(task_id, "failed")
    assert task["failed_step"] == "step_3" and "insufficient_balance" in task["reason"]
    aws.settle()
    assert (balance(SOURCE), balance(DESTINATION)) == (999, 0)
    # A refusal is not tried again: three steps, three calls.
    assert aws.invocations["ExecuteStepFunction"] == 3
    assert kinds(aws, task_id)[-2:] == ["step_executed:failed", "task_ended:failed"]


def test_a_ledger_that_is_down_fails_the_task_after_its_retries(aws: Cloud, start: Callable[..., str]) -> None:
    aws.faults["LedgerFunction"] = raise_always
    task_id = start()
    aws.wait(task_id, "failed")
    assert aws.invocations["AnalyzeTaskFunction"] == 3


def test_a_ledger_that_comes_back_is_found_by_a_retry(aws: Cloud, start: Callable[..., str]) -> None:
    failures = iter([True])

    def flaky(event: Any) -> None:
        if event["operation"] == "write_hashes" and next(failures, False):
            raise ConnectionError("down")

    aws.faults["LedgerFunction"] = flaky
    task_id = start()
    aws.wait(task_id, "completed")
    assert kinds(aws, task_id)[-1] == "task_ended:completed"


def test_a_policy_that_denies_by_now_stops_the_step(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    rule = {"allowed": False, "requires_approval": True, "risk_level": "high"}
    monkeypatch.setattr("qaes.adapters.ledger_client.LedgerClient.policy", policy_of(transfer_funds=rule))
    decide(task_id, approved=True)
    task = aws.wait(task_id, "denied")
    assert "does not allow transfer_funds" in task["reason"]
    aws.execution(task_id)
    visited(aws, task_id)
    assert balance(SOURCE) == 1000


def test_a_policy_that_has_become_stricter_asks_for_an_approval(
    aws: Cloud, start: Callable[..., str], decide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stricter = policy_of(monitoring={"allowed": True, "requires_approval": True, "risk_level": "low"})
    store_plan = TaskStore.save_plan

    def then_stricter(self: TaskStore, task_id: str, plan: Any) -> Any:
        monkeypatch.setattr("qaes.adapters.ledger_client.LedgerClient.policy", stricter)
        return store_plan(self, task_id, plan)

    monkeypatch.setattr(TaskStore, "save_plan", then_stricter)
    task_id = start()
    decide(task_id, approved=True)
    aws.wait(task_id, "completed")


def test_a_plan_that_was_swapped_while_the_approval_was_open_does_not_run(
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


def test_a_step_that_is_run_again_takes_effect_once(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any]
) -> None:
    """The worker dies after the transfer and before its record is written."""
    task_id = transfer(250)
    finish, crashes = TaskStore.finish_step, iter([True])

    def crash(self: TaskStore, task: str, record: Any, **outcome: Any) -> Any:
        if record.type == "onchain_action" and next(crashes, False):
            raise RuntimeError("crashed after the effect")
        return finish(self, task, record, **outcome)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TaskStore, "finish_step", crash)
        decide(task_id, approved=True)
        aws.wait(task_id, "completed")
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)
    record = TaskStore("TasksTable").step(task_id, 2)
    assert record is not None and record.attempt == 1  # looking again at what became of it is no other attempt


def test_a_transfer_that_expires_fails_the_task_clearly_and_its_retry_pays_once(
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
    decide(task_id, approved=True)  # asked for again: what was approved for the run before is not for this one
    aws.wait(task_id, "completed")
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)


def test_a_transfer_that_the_ledger_says_nothing_of_in_time_is_found_by_the_retry_and_paid_once() -> None:
    with cloud(parameters={"ConfirmationTimeoutSeconds": "2"}) as aws:
        chain = network(aws)
        task_id = begin(aws, "transfer_funds")
        aws.wait(task_id, "waiting_approval")
        aws.stop_time()
        approval = TaskStore("TasksTable").decide(task_id, approved=True, subject="bob", reason="because")
        boto3.client("stepfunctions").send_task_success(taskToken=approval.token, output="{}")
        task = aws.wait(task_id, "failed")
        assert "has not confirmed the transfer in time" in str(task["reason"])
        aws.execution(task_id)
        visited(aws, task_id)
        assert chain.tick_info().tick  # the network lives; the transfer is under way all the same
        retry(aws, task_id)
        aws.start_time()
        aws.wait(task_id, "completed")
        assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)
        told = kinds(aws, task_id)
        # Nobody is asked again for what was let through, and cannot be stopped any more.
        assert told.count("approval_requested:pending") == 1
        assert told[-4:] == [
            "task_ended:failed",
            "task_retried:executing",
            "step_executed:succeeded",
            "task_ended:completed",
        ]


def test_an_execution_that_is_woken_too_early_waits_again(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any]
) -> None:
    aws.wait(task_id := transfer(250), "waiting_approval")
    aws.stop_time()
    decide(task_id, approved=True)
    store = TaskStore("TasksTable")
    woken: set[str] = set()
    for _ in range(2):
        token = until(lambda: {store.waiter(task_id, 2)} - woken - {None})
        boto3.client("stepfunctions").send_task_success(taskToken=token, output="{}")
        woken.add(token)
    until(lambda: {store.waiter(task_id, 2)} - woken)
    aws.start_time()
    aws.wait(task_id, "completed")
    aws.execution(task_id)
    assert visited(aws, task_id)[-9:] == [
        "SubmitTransfer",
        *["AwaitConfirmation", "ExecuteStep"] * 3,
        "RecordAudit",
        "CompleteTask",
    ]
    # Woken too early is no failure that is tried again: three looks, of which two were too early.
    assert aws.invocations["ExecuteStepFunction"] == 2 + 1 + 3
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)


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


def retry(aws: Cloud, task_id: str) -> None:
    """Take the end back and start the next execution, as the gateway does."""
    task = TaskStore("TasksTable").retry(task_id, subject="alice")
    boto3.client("stepfunctions").start_execution(
        stateMachineArn=aws.machine_arn, name=task.execution_name, input=json.dumps({"task_id": task_id})
    )


def test_a_decision_that_was_committed_and_not_delivered_is_delivered_by_the_reconciler(
    aws: Cloud, transfer: Callable[..., str], decide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    task_id = transfer(250)
    decide(task_id, approved=True, deliver=False)
    monkeypatch.setattr("agent_runtime.reconciler.GRACE_SECONDS", -1)
    assert aws.invoke("ReconcilerFunction", {}) == {"reconciled": [task_id]}
    aws.wait(task_id, "completed")
    assert aws.invoke("ReconcilerFunction", {}) == {"reconciled": []}


def test_an_execution_that_was_stopped_leaves_no_open_task(aws: Cloud, transfer: Callable[..., str]) -> None:
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
    assert outputs and not any(approval.token in output for output in outputs)


@pytest.mark.parametrize(
    ("function", "state"),
    [
        ("AnalyzeTaskFunction", "AnalyzeTask"),
        ("CheckPolicyFunction", "CheckPolicy"),
        ("BuildPlanFunction", "BuildPlan"),
        ("ValidatePlanFunction", "ValidatePlan"),
    ],
)
def test_a_node_that_fails_for_good_fails_the_task(
    aws: Cloud, start: Callable[..., str], function: str, state: str
) -> None:
    aws.faults[function] = raise_always
    task_id = start()
    task = aws.wait(task_id, "failed")
    assert (task["reason"], task["failed_step"]) == ("a service did not answer", None)
    assert aws.execution(task_id)["status"] == "FAILED"
    assert visited(aws, task_id)[-3:] == [state, "FailTask", "TaskFailed"]
    assert aws.invocations["ExecuteStepFunction"] == 0


@pytest.mark.parametrize("outcome", ["completed", "denied", "rejected", "expired"])
def test_an_end_that_cannot_be_recorded_fails_the_task(outcome: str) -> None:
    def not_that_one(event: Any) -> None:
        if event["outcome"] == outcome:
            raise ConnectionError("down")

    with cloud(parameters={"ApprovalTimeoutSeconds": "1" if outcome == "expired" else "60"}) as aws:
        aws.faults["EndTaskFunction"] = not_that_one
        task_id = begin(aws, {"completed": "monitor_wallet", "denied": "unknown"}.get(outcome, "transfer_funds"))
        if outcome == "rejected":
            aws.wait(task_id, "waiting_approval")
            approval = TaskStore("TasksTable").decide(task_id, approved=False, subject="bob", reason="no")
            boto3.client("stepfunctions").send_task_success(taskToken=approval.token, output="{}")
        aws.wait(task_id, "rejected" if outcome == "rejected" else "failed")  # FailTask does not pass over a no
        assert aws.execution(task_id)["status"] == "FAILED"
        assert visited(aws, task_id)[-2:] == ["FailTask", "TaskFailed"]


def test_a_task_whose_end_was_never_recorded_is_ended_by_the_reconciler(aws: Cloud, start: Callable[..., str]) -> None:
    aws.faults["EndTaskFunction"] = raise_always
    task_id = start()
    assert aws.execution(task_id)["status"] == "FAILED"
    assert visited(aws, task_id)[-1] == "TaskFailed"
    assert TaskStore("TasksTable").get_task(task_id).status == "executing"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agent_runtime.reconciler.GRACE_SECONDS", -1)
        assert aws.invoke("ReconcilerFunction", {}) == {"reconciled": [task_id]}
    task = TaskStore("TasksTable").get_task(task_id)
    assert (task.status, task.reason) == ("failed", "the execution failed")
    assert kinds(aws, task_id)[-1] == "task_ended:failed"


def test_every_state_and_every_catch_was_visited() -> None:
    """Runs last: the tests above have walked through the whole definition."""
    machine = template.definition()
    inner = machine["States"]["ExecuteSteps"]["ItemProcessor"]["States"]
    entered = {state for _, state in VISITED}
    assert {*machine["States"], *inner} - entered == set()
    catches = {
        (name, catch["Next"])
        for name, state in (machine["States"] | inner).items()
        for catch in state.get("Catch", [])
        if name != "ExecuteSteps"
    }
    # A Map's Catch is entered from the state inside it that failed.
    catches |= {("StepDenied", "DenyTask"), ("ApprovalRejected", "RejectTask"), ("ApprovalExpired", "ExpireTask")}
    catches |= {("ExecuteStep", "FailTask")}
    assert ("ExecuteStep", "AwaitConfirmation") in catches
    assert catches - VISITED == set()
