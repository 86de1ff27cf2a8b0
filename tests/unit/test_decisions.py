"""The recorded decisions of people count, regardless of the task's items."""

from __future__ import annotations

import json
from typing import Any

import pytest

from qaes.domain.canonical import hash_of
from qaes.domain.models import Approval, Decision, Event, Task
from qaes.domain.tasks.decisions import Decisions, is_decision

NOW = "2026-11-23T12:00:00.000Z"
REQUEST = {
    "task_id": "task_1", "task_type": "transfer_funds", "description": "pay", "parameters": {"amount": 5},
    "requester": "alice",
}  # fmt: skip
SHOWN = {
    "plan_hash": hash_of("plan"),
    "step_hash": hash_of("step"),
    "policy_id": "policy-v1",
    "round": 1,
    "required": 1,
}
EXPIRES = "2026-11-23T13:00:00.000Z"
APPROVAL = Approval.model_validate(
    SHOWN | {"step_index": 2, "status": "pending", "requested_at": NOW, "expires_at": EXPIRES}
)
TASK = Task.model_validate(
    REQUEST | {"status": "waiting_approval", "requester": "mallory", "parameters": {"amount": 999}, "run": 7}
    | {"retriers": ("mallory",), "salt": "f" * 32, "created_at": NOW, "updated_at": NOW}
)  # fmt: skip


def event(kind: str, actor: str, status: str, input_: Any = None, output: Any = None, step_index: int = -1) -> Event:
    hashes = {"input_hash": hash_of(input_), "output_hash": hash_of(output)}
    texts = {"input": json.dumps(input_), "output": json.dumps(output)}
    fields = {"kind": kind, "actor": actor, "status": status, "timestamp": NOW, "step_index": step_index}
    return Event.model_validate(fields | hashes | texts)


STARTED = event("task_started", "alice", "pending", REQUEST)
RETRIED = event("task_retried", "rita", "executing")


def decided(actor: str = "bob", approved: bool = True, **shown: Any) -> Event:
    asked = SHOWN | {"expires_at": EXPIRES} | shown
    said = {"approved": approved, "reason": "because", "decided_at": NOW}
    return event("approval_decided", actor, "approved" if approved else "rejected", asked, said, 2)


def decisions(*events: Event) -> Decisions:
    return Decisions("0" * 32, dict(enumerate((STARTED, *events), start=1)))


def test_recorded_decisions_override_the_tasks_item() -> None:
    task = decisions(RETRIED, event("task_retried", "rita", "executing")).of_task(TASK)
    assert (task.requester, task.parameters, task.agent) == ("alice", {"amount": 5}, None)
    assert (task.run, task.retriers, task.salt) == (3, ("rita",), "0" * 32)
    assert task.status == "waiting_approval", "the engine reports the progress"


def test_recorded_cancellation_overrides_the_item() -> None:
    assert decisions(event("task_ended", "alice", "cancelled")).of_task(TASK).status == "cancelled"


def test_approval_has_the_decisions_that_were_made_on_it() -> None:
    [read] = decisions(decided()).of_approvals([APPROVAL])
    assert read.status == "approved"
    assert read.decisions == (Decision(subject="bob", approved=True, reason="because", decided_at=NOW),)


@pytest.mark.parametrize("status", ["approved", "rejected"])
def test_approval_is_pending_without_decisions(status: str) -> None:
    forged = APPROVAL.model_copy(update={"status": status, "decisions": decisions(decided()).of_approvals([APPROVAL])})
    [read] = decisions().of_approvals([forged])
    assert (read.status, read.decisions) == ("pending", ())


@pytest.mark.parametrize("status", ["expired", "cancelled"])
def test_engine_closes_undecided_approvals(status: str) -> None:
    [read] = decisions().of_approvals([APPROVAL.model_copy(update={"status": status})])
    assert read.status == status


@pytest.mark.parametrize(
    "change",
    [
        {"step_index": 1}, {"round": 2}, {"run": 2}, {"plan_hash": hash_of("another")}, {"step_hash": hash_of("x")},
        {"policy_id": "policy-v2"}, {"expires_at": "2027-01-01T00:00:00.000Z"},
    ],
)  # fmt: skip
def test_decision_counts_for_nothing_else(change: dict[str, Any]) -> None:
    [read] = decisions(decided()).of_approvals([APPROVAL.model_copy(update=change | {"status": "approved"})])
    assert (read.status, read.decisions) == ("pending", ())


def test_decision_of_a_run_before_counts_for_nothing() -> None:
    present = APPROVAL.model_copy(update={"run": 2, "status": "approved"})
    assert decisions(decided(), RETRIED).of_approvals([present])[0].status == "pending"
    assert decisions(RETRIED, decided()).of_approvals([present])[0].status == "approved"


def test_quorum_is_the_one_that_was_shown() -> None:
    lowered = APPROVAL.model_copy(update={"required": 1})
    one = decisions(decided(required=2))
    two = decisions(decided(required=2), decided("carol", required=2))
    assert (one.of_approvals([lowered])[0].status, two.of_approvals([lowered])[0].status) == ("pending", "approved")


def test_rejection_counts_among_approvals() -> None:
    read = decisions(decided(), decided("carol", approved=False)).of_approvals([APPROVAL])[0]
    assert (read.status, read.decided_by) == ("rejected", "carol")


def test_only_events_of_people_are_decisions() -> None:
    people = {"task_started", "approval_decided", "task_retried"}
    for kind in Event.model_fields["kind"].annotation.__args__:  # type: ignore[union-attr]
        assert is_decision(event(kind, "x", "failed")) is (kind in people), kind
    assert is_decision(event("task_ended", "alice", "cancelled"))
