"""A rejection is final, under concurrent and later failures, expiries, cancellations and retries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest

from qaes.adapters import clients, dynamo
from qaes.adapters.callbacks import Callback, CallbacksTable
from qaes.adapters.task_repository import TaskStore
from qaes.domain.errors import ConflictError, ForbiddenError
from qaes.domain.ids import now
from qaes.domain.models import Approval, Plan, Task
from tests.handlers.test_gateway import NO, YES
from tests.handlers.test_task_repository import claim, events, planned, waiting
from tests.support.api import ALICE, BOB, OLIVIA, Api, set_environment
from tests.support.cloud import Cloud, cloud
from tests.support.tokens import action_token, approval_token

Step = Callable[[TaskStore, str], object]


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


def reject(store: TaskStore, task_id: str) -> Approval:
    return store.decide(task_id, approved=False, subject="bob", reason="not this wallet")


def approve(store: TaskStore, task_id: str) -> Approval:
    return store.decide(task_id, approved=True, subject="bob", reason="fine")


def end(store: TaskStore, task_id: str, outcome: Any) -> Task:
    return store.end_task(
        task_id,
        outcome,
        actor="execution",
        reason="a service did not respond; retry the task",
        failed_step="step_1",
        execution=task_id,
    )


def reconcile(store: TaskStore, task_id: str) -> Task:
    return store.end_task(task_id, "failed", actor="reconciler", reason="stopped", execution=task_id)


def cancel(store: TaskStore, task_id: str) -> Task:
    return store.cancel(task_id, subject="alice", reason="changed my mind")


ENDS: dict[str, Step] = {
    **{
        outcome: lambda store, task_id, outcome=outcome: end(store, task_id, outcome)  # type: ignore[misc]
        for outcome in ("completed", "denied", "rejected", "expired", "failed")
    },
    "reconciler": reconcile,
}


@pytest.mark.parametrize("how", ENDS)
def test_every_end_after_a_rejection_is_rejected(store: TaskStore, how: str) -> None:
    task_id, _ = waiting(store)
    reject(store, task_id)
    ENDS[how](store, task_id)
    task = store.get_task(task_id)
    assert (task.status, task.reason, task.failed_step) == ("rejected", "not this wallet", None)
    assert events(task_id)[-2:] == ["approval_decided", "task_ended"]
    with pytest.raises(ConflictError):
        store.retry(task_id, subject="alice")


def test_cancel_returns_409_after_a_rejection(api: Api, store: TaskStore) -> None:
    task_id, _ = waiting(store)
    reject(store, task_id)
    answer = api("POST", f"/task/{task_id}/cancel", **ALICE)
    assert (answer.status, answer.body["decision"], answer.body["decided_by"]) == (409, "rejected", "bob")
    assert events(task_id)[-1] == "approval_decided"


@pytest.mark.parametrize("caller", [ALICE, OLIVIA])
def test_retry_returns_409_after_a_rejection(
    api: Api, store: TaskStore, monkeypatch: pytest.MonkeyPatch, caller: dict[str, str]
) -> None:
    """Also for a task that ended as failed before every end after a rejection was `rejected`."""
    task_id, _ = waiting(store)
    reject(store, task_id)
    with monkeypatch.context() as before_this_rule:
        before_this_rule.setattr("qaes.domain.tasks.lifecycle.rejected_of", lambda approvals: None)
        assert end(store, task_id, "failed").status == "failed"
    told = events(task_id)
    answer = api("POST", f"/task/{task_id}/retry", **caller)
    assert (answer.status, answer.body["decision"], answer.body["task_status"]) == (409, "rejected", "failed")
    assert events(task_id) == told and store.get_task(task_id).run == 1


@pytest.mark.parametrize("how", [*ENDS, "cancel", "expire"])
def test_of_a_rejection_and_an_end_at_once_one_stands(
    store: TaskStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The rejection is committed after the other has read the task and before it writes: the other reads again."""
    task_id, _ = waiting(store, expires_in=60)
    late = {"cancel": cancel, "expire": lambda store, task_id: store.expire(task_id), **ENDS}[how]
    transact, rejected, ahead = dynamo.transact, iter([True]), timedelta(hours=1 if how == "expire" else 0)

    def after_a_rejection(writes: Any) -> None:
        if next(rejected, False):
            with monkeypatch.context() as in_time:
                in_time.setattr("qaes.adapters.task_repository.now", now)
                reject(TaskStore("TasksTable"), task_id)
        transact(writes)

    with monkeypatch.context() as patch:
        patch.setattr("qaes.adapters.task_repository.now", lambda: now() + ahead)
        patch.setattr(dynamo, "transact", after_a_rejection)
        if how == "cancel":
            with pytest.raises(ConflictError, match="has rejected"):
                late(store, task_id)
        else:
            late(store, task_id)
    assert [approval.status for approval in store.approvals(task_id)] == ["rejected"]
    assert "approval_cancelled" not in events(task_id) and "approval_expired" not in events(task_id)
    if how in ENDS:
        assert store.get_task(task_id).status == "rejected"
    else:
        assert end(store, task_id, "failed").status == "rejected"


@pytest.mark.parametrize("how", [*ENDS, "cancel"])
def test_of_an_end_and_a_rejection_at_once_one_stands(
    store: TaskStore, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """The other way round: the end is committed after the rejection has read the task and before it writes."""
    task_id, _ = waiting(store)
    transact, ended = dynamo.transact, iter([True])

    def after_an_end(writes: Any) -> None:
        if next(ended, False):
            ({"cancel": cancel} | ENDS)[how](TaskStore("TasksTable"), task_id)
        transact(writes)

    with monkeypatch.context() as patch:
        patch.setattr(dynamo, "transact", after_an_end)
        with pytest.raises(ConflictError, match="does not wait"):
            reject(store, task_id)
    assert "approval_decided" not in events(task_id)
    assert store.get_task(task_id).status in {"cancelled", "completed", "denied", "rejected", "expired", "failed"}


def test_rejection_and_ends_in_threads_leave_one_story(store: TaskStore) -> None:
    clients.client("dynamodb")
    acts: list[Step] = [reject, cancel, reconcile, lambda store, task_id: end(store, task_id, "failed")]
    for first in range(len(acts)):
        task_id, _ = waiting(store)

        def act(step: Step, task_id: str = task_id) -> None:
            with suppress(ConflictError):
                step(store, task_id)

        with ThreadPoolExecutor(len(acts)) as pool:
            list(pool.map(act, acts[first:] + acts[:first]))
        told, status = events(task_id), store.get_task(task_id).status
        if "approval_decided" in told:
            assert (status, told.count("task_ended")) in {("rejected", 1), ("executing", 0)}
            assert reconcile(store, task_id).status == "rejected"
        else:
            assert told[-2:] == ["approval_cancelled", "task_ended"] and status in {"cancelled", "failed"}


# Honest trails that look like it


def test_retry_goes_on_after_an_undeliverable_approval(store: TaskStore) -> None:
    task_id, _ = waiting(store)
    approve(store, task_id)
    assert end(store, task_id, "expired").status == "failed"
    assert events(task_id)[-2:] == ["approval_undeliverable", "task_ended"]
    assert store.retry(task_id, subject="alice").run == 2


def test_retry_goes_on_after_an_expired_approval(store: TaskStore) -> None:
    task_id, plan = waiting(store, expires_in=0)
    store.expire(task_id)
    assert end(store, task_id, "expired").status == "expired"
    assert store.retry(task_id, subject="alice").run == 2
    store.request_approval(store.get_task(task_id), plan, 2, "token-2", 60)
    assert approve(store, task_id).status == "approved"


def test_expiry_in_run_1_does_not_make_run_2_rejected(store: TaskStore) -> None:
    task_id, plan = waiting(store, expires_in=0)
    store.expire(task_id)
    end(store, task_id, "expired")
    store.retry(task_id, subject="alice")
    assert store.end_task(task_id, "failed", actor="execution", reason="x").status == "failed"
    store.retry(task_id, subject="alice")
    store.request_approval(store.get_task(task_id), plan, 2, "token-3", 60)
    reject(store, task_id)
    assert store.end_task(task_id, "failed", actor="execution", reason="x").status == "rejected"


# Runs


def retried(store: TaskStore, by: str = "alice") -> tuple[str, Plan]:
    """A task whose run 1 asked for an approval and failed, in run 2."""
    task_id, plan = waiting(store)
    end(store, task_id, "failed")
    store.retry(task_id, subject=by)
    return task_id, plan


def test_decision_that_arrives_after_the_retry_decides_nothing(api: Api, store: TaskStore) -> None:
    task_id, _ = retried(store)
    for body in (YES, NO):
        answer = api("POST", f"/task/{task_id}/approve", body, **BOB)
        assert (answer.status, answer.body["task_status"]) == (409, "executing")
    assert "approval_decided" not in events(task_id)


def test_late_request_of_run_1_changes_nothing_in_run_2(aws: Cloud, store: TaskStore) -> None:
    task_id, plan = retried(store)
    for step_index in (0, 1):
        aws.invoke("RunStepFunction", {"task_id": task_id, "step_index": step_index})
    late = {"task_id": task_id, "task_token": "token of run 1", "execution": task_id}
    with pytest.raises(ConflictError, match="a later execution"):
        aws.invoke("AwaitApprovalFunction", late)
    assert store.get_task(task_id).status == "executing" and store.open_approval(task_id) is None
    ours = {"task_id": task_id, "task_token": "token of run 2", "execution": f"{task_id}-2"}
    aws.invoke("AwaitApprovalFunction", ours)
    with pytest.raises(ConflictError, match="a later execution"):
        aws.invoke("AwaitApprovalFunction", late)
    approval = store.open_approval(task_id)
    assert approval is not None and (approval.run, approval_token(task_id)) == (2, "token of run 2")
    assert plan.steps[2].hash() == approval.step_hash


def test_request_that_a_retry_overtakes_replaces_no_token(store: TaskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The retry is committed after the late request has read run 1 and before it writes."""
    task_id, plan = waiting(store)
    transact, overtaken = dynamo.transact, iter([True])

    def after_a_retry(writes: Any) -> None:
        if next(overtaken, False):
            end(store, task_id, "failed")
            store.retry(task_id, subject="alice")
            store.request_approval(store.get_task(task_id), plan, 2, "token of run 2", 60, execution=f"{task_id}-2")
        transact(writes)

    monkeypatch.setattr(dynamo, "transact", after_a_retry)
    with pytest.raises(ConflictError, match="a later execution"):
        store.request_approval(store.get_task(task_id), plan, 2, "late token of run 1", 60, execution=task_id)
    approval = store.open_approval(task_id)
    assert approval is not None and (approval.run, approval_token(task_id)) == (2, "token of run 2")


def test_late_worker_of_run_1_changes_nothing_in_run_2(aws: Cloud, store: TaskStore) -> None:
    task_id, plan = retried(store)
    store.request_approval(store.get_task(task_id), plan, 2, "token-2", 60)
    told = events(task_id)
    late = {"task_id": task_id, "step_index": 2, "task_token": "token of run 1", "execution": task_id}
    for function in ("RunStepFunction", "ExecuteActionFunction", "AwaitApprovalFunction", "PlanTaskFunction"):
        with pytest.raises(ConflictError, match="a later execution"):
            aws.invoke(function, late)
    task = store.get_task(task_id)
    with pytest.raises(ConflictError, match="a later execution"):
        store.refuse_step(task.model_copy(update={"run": 1}), plan, 2, None, "no approval")
    assert events(task_id) == told and store.step(task_id, 2) is None


def test_late_wait_of_run_1_does_not_take_run_2_s_token(aws: Cloud, store: TaskStore) -> None:
    task_id, plan = retried(store)
    claim(store, task_id, plan, 2, None, run=2, current=plan.policy)
    CallbacksTable().wait(Callback("ACTION", task_id, 2, "token of run 2", 60, 2))
    late = {"task_id": task_id, "task_token": "token of run 1", "execution": task_id}
    with pytest.raises(ConflictError, match="a later execution"):
        aws.invoke("ExecuteActionFunction", late)
    with pytest.raises(ConflictError, match="a later execution"):
        CallbacksTable().wait(Callback("ACTION", task_id, 2, "token of run 1", 60, 1))
    assert action_token(task_id) == "token of run 2"
    CallbacksTable().wait(Callback("ACTION", task_id, 2, "newer token of run 2", 60, 2))
    assert action_token(task_id) == "newer token of run 2"


# Who retries does not decide


def test_decide_returns_403_to_everyone_who_retried(api: Api, store: TaskStore) -> None:
    task_id, plan = planned(store)
    for caller in (OLIVIA, ALICE, {"subject": "otto", "roles": "operator"}, ALICE):
        store.end_task(task_id, "failed", actor="test", reason="so")
        assert api("POST", f"/task/{task_id}/retry", **caller).status == 202
    store.request_approval(store.get_task(task_id), plan, 2, "token-2", 60)
    both = "requester approver operator"
    for subject in ("olivia", "otto", "alice", " olivia", "otto\u200b"):
        for body in (YES, NO):
            answer = api("POST", f"/task/{task_id}/approve", body, subject=subject, roles=both)
            assert (answer.status, answer.body["detail"][:17]) == (403, "you cannot decide"), subject
    assert store.open_approval(task_id) is not None
    assert api("POST", f"/task/{task_id}/approve", YES, **BOB).status == 200
    assert store.get_task(task_id).retriers == ("olivia", "alice", "otto")


def test_store_refuses_the_requester_and_retriers(store: TaskStore) -> None:
    task_id, plan = retried(store, by="olivia")
    store.request_approval(store.get_task(task_id), plan, 2, "token-2", 60)
    for subject in ("alice", "olivia"):
        with pytest.raises(ForbiddenError, match="you cannot decide"):
            store.decide(task_id, approved=True, subject=subject, reason="x")
    assert store.decide(task_id, approved=True, subject="alice", reason="x", four_eyes=False).status == "approved"


def test_decision_is_refused_when_its_decider_retries_first(store: TaskStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read in run 1, where they may decide; written in run 2, which they have asked for."""
    task_id, plan = waiting(store)
    transact, overtaken = dynamo.transact, iter([True])

    def after_a_retry(writes: Any) -> None:
        if next(overtaken, False):
            end(store, task_id, "failed")
            store.retry(task_id, subject="olivia")
            store.request_approval(store.get_task(task_id), plan, 2, "token-2", 60)
        transact(writes)

    monkeypatch.setattr(dynamo, "transact", after_a_retry)
    with pytest.raises(ForbiddenError, match="you cannot decide"):
        store.decide(task_id, approved=True, subject="olivia", reason="mine")


def test_two_retries_at_once_make_one_run(api: Api, store: TaskStore) -> None:
    task_id, _ = planned(store)
    store.end_task(task_id, "failed", actor="test", reason="so")
    request = {"method": "POST", "path": f"/task/{task_id}/retry"}
    answers = api.at_once([request | OLIVIA, request | ALICE])
    assert sorted(answer.status for answer in answers) == [202, 409]
    winner = [who for who, answer in zip(("olivia", "alice"), answers, strict=True) if answer.status == 202]
    task = store.get_task(task_id)
    assert (task.run, list(task.retriers)) == (2, winner)
    assert events(task_id).count("task_retried") == 1
