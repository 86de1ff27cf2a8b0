"""A rejection is final on the deployed state machine; the verifier accepts each resulting trail."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import boto3
import pytest

from qaes.adapters.executions import Executions
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.task_repository import TaskStore
from qaes.domain.errors import ConflictError
from qaes.domain.models import Approval
from tests.support.cloud import Cloud
from tests.support.tokens import approval_token
from tests.workflow.conftest import DESTINATION, SOURCE, verify_bundle
from tests.workflow.test_paths import balance, in_force, kinds, policy_of, raise_always, retry

pytestmark = pytest.mark.usefixtures("audit_environment")


@pytest.fixture
def store(aws: Cloud) -> TaskStore:
    return TaskStore("TasksTable")


def assert_rejected_for_good(aws: Cloud, store: TaskStore, task_id: str) -> None:
    aws.wait(task_id, "rejected")
    aws.execution(task_id)
    assert store.get_task(task_id).reason == "because"
    assert kinds(aws, task_id)[-2:] == ["approval_decided:rejected", "task_ended:rejected"]
    for subject in ("alice", "olivia"):
        with pytest.raises(ConflictError):
            store.retry(task_id, subject=subject)
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)


def test_rejection_stands_when_the_ledger_does_not_answer(
    aws: Cloud, store: TaskStore, transfer: Callable[..., str], decide: Callable[..., Any]
) -> None:
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    aws.faults["LedgerFunction"] = raise_always
    decide(task_id, approved=False)
    aws.wait(task_id, "rejected", "failed")
    aws.faults.clear()
    assert_rejected_for_good(aws, store, task_id)
    assert aws.execution(task_id)["status"] == "SUCCEEDED", "the ledger is not asked about a rejection"
    verify_bundle(aws, task_id)


@pytest.mark.parametrize("allowed", [True, False])
def test_rejection_stands_when_the_policy_changes(
    aws: Cloud,
    store: TaskStore,
    transfer: Callable[..., str],
    decide: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    allowed: bool,
) -> None:
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    rule = {"allowed": allowed, "requires_approval": False, "risk_level": "low"}
    in_force(monkeypatch, policy_of(transfer_funds=rule))
    decide(task_id, approved=False)
    assert_rejected_for_good(aws, store, task_id)


@pytest.mark.parametrize("function", ["AwaitApprovalFunction", "EndTaskFunction"])
def test_rejection_stands_when_a_function_fails_for_good(
    aws: Cloud, store: TaskStore, transfer: Callable[..., str], decide: Callable[..., Any], function: str
) -> None:
    """The state that asks is woken by the rejection, or fails because it is tried again after that."""
    task_id = transfer(250)
    approval = decide(task_id, approved=False, deliver=False)
    aws.faults[function] = raise_always
    if function == "AwaitApprovalFunction":
        boto3.client("stepfunctions").send_task_failure(taskToken=approval_token(task_id), error="ConnectionError")
    else:
        Executions.deliver(task_id, approval)
    assert aws.execution(task_id)["status"] == ("FAILED" if function == "EndTaskFunction" else "SUCCEEDED")
    aws.faults.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("agent_runtime.reconciler.GRACE_SECONDS", -1)
        aws.invoke("ReconcilerFunction", {})
    assert_rejected_for_good(aws, store, task_id)


def test_rejection_stands_when_its_execution_is_stopped(
    aws: Cloud, store: TaskStore, transfer: Callable[..., str], decide: Callable[..., Any]
) -> None:
    task_id = transfer(250)
    decide(task_id, approved=False, deliver=False)
    arn = f"{aws.machine_arn.replace(':stateMachine:', ':execution:')}:{task_id}"
    boto3.client("stepfunctions").stop_execution(executionArn=arn)
    detail = {"status": "ABORTED", "name": task_id, "input": f'{{"task_id": "{task_id}"}}'}
    event = {"detail-type": "Step Functions Execution Status Change", "detail": detail}
    assert aws.invoke("ReconcilerFunction", event) == {"reconciled": [task_id]}
    assert_rejected_for_good(aws, store, task_id)


def test_rejection_in_run_2_stands_though_run_1_pays(
    aws: Cloud, store: TaskStore, transfer: Callable[..., str], decide: Callable[..., Approval]
) -> None:
    """Run 1's worker stalls with an approved transfer in hand; it reaches the ledger while run 2 asks again."""
    task_id = transfer(250)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LedgerClient, "transfer", lambda self, **transfer: raise_always(transfer))
        decide(task_id, approved=True)
        aws.wait(task_id, "failed")
        aws.execution(task_id)
    retry(aws, task_id)
    aws.wait(task_id, "waiting_approval")
    plan = store.plan_of(store.get_task(task_id))
    parameters = plan.steps[2].parameters
    LedgerClient("LedgerTransferFunction").transfer(
        reference=f"{task_id}#{plan.steps[2].step_id}",
        source=parameters["from_address"],
        destination=parameters["to_address"],
        amount=parameters["amount"],
        requester="alice",
    )
    decide(task_id, approved=False)
    assert aws.wait(task_id, "rejected")["reason"] == "because"
    aws.stop_time()
    aws.settle()
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)
    told = kinds(aws, task_id)
    assert told.count("step_executed:succeeded") == 3 and "task_ended:rejected" in told
    with pytest.raises(ConflictError):
        store.retry(task_id, subject="alice")
    verify_bundle(aws, task_id)


@pytest.mark.parametrize("decision", ["undeliverable", "expired"])
def test_approval_that_never_arrived_is_asked_for_again(
    aws: Cloud, store: TaskStore, transfer: Callable[..., str], decide: Callable[..., Approval], decision: str
) -> None:
    task_id = transfer(250)
    if decision == "expired":
        aws.wait(task_id, "waiting_approval")
    else:
        decide(task_id, approved=True, deliver=False)
    arn = f"{aws.machine_arn.replace(':stateMachine:', ':execution:')}:{task_id}"
    boto3.client("stepfunctions").stop_execution(executionArn=arn)
    end = {"task_id": task_id, "outcome": "expired", "execution": task_id}
    aws.invoke("EndTaskFunction", end)
    assert store.get_task(task_id).status == ("expired" if decision == "expired" else "failed")
    retry(aws, task_id)
    decide(task_id, approved=True)
    aws.wait(task_id, "completed")
    assert (balance(SOURCE), balance(DESTINATION)) == (750, 250)
    if decision == "undeliverable":
        verify_bundle(aws, task_id)


def test_late_request_of_run_1_does_not_take_run_2_s_token(
    aws: Cloud, store: TaskStore, transfer: Callable[..., str], decide: Callable[..., Approval]
) -> None:
    requests: list[dict[str, Any]] = []
    aws.faults["AwaitApprovalFunction"] = requests.append
    task_id = transfer(250)
    aws.wait(task_id, "waiting_approval")
    arn = f"{aws.machine_arn.replace(':stateMachine:', ':execution:')}:{task_id}"
    boto3.client("stepfunctions").stop_execution(executionArn=arn)
    store.end_task(task_id, "failed", actor="reconciler", reason="stopped", execution=task_id)
    retry(aws, task_id)
    aws.wait(task_id, "waiting_approval")
    of_run_1, of_run_2 = requests
    assert (of_run_1["execution"], of_run_2["execution"]) == (task_id, f"{task_id}-2")
    with pytest.raises(ConflictError, match="a later execution"):
        aws.invoke("AwaitApprovalFunction", of_run_1)
    approval = store.open_approval(task_id)
    assert approval is not None and approval_token(task_id) == of_run_2["task_token"]
    decide(task_id, approved=True)
    aws.wait(task_id, "completed")
