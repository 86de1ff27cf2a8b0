"""The events of a task: their input, their output, and the salted hashes of both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qaes.domain.canonical import canonical_json, hash_of, salted_hash
from qaes.domain.models import (
    Analysis,
    Approval,
    Event,
    EventKind,
    Plan,
    Step,
    StepRecord,
    Task,
    by_agent,
)
from qaes.domain.policy import PolicyDecision


def make(
    task: Task, kind: EventKind, actor: str, status: str, input_: Any, output: Any, *, at: str, **more: Any
) -> Event:
    """Build an event of `task` at the time `at`; `more` has further fields of the event."""
    of_the_task = {"plan_hash": task.plan_hash or "", "policy_id": task.policy_id or ""}
    return Event(
        kind=kind,
        actor=actor,
        status=status,
        timestamp=at,
        input_hash=salted_hash(task.salt, input_),
        output_hash=salted_hash(task.salt, output),
        input=canonical_json(input_),
        output=canonical_json(output),
        **(of_the_task | more),
    )


def request_again(task: Task) -> dict[str, Any]:
    """Return the hash of the request. The first entry has the request itself, and a task may be retried often."""
    return {"request_hash": hash_of(task.request())}


def policy_checked(task: Task, analysis: Analysis, decision: PolicyDecision, at: str, **more: Any) -> Event:
    return make(
        task,
        "policy_checked",
        "planner",
        "allowed" if decision.allowed else "denied",
        analysis.model_dump(mode="json"),
        decision.model_dump(mode="json"),
        at=at,
        policy_id=decision.policy_id,
        **more,
    )


def plan_built(task: Task, plan: Plan, at: str) -> Event:
    return make(
        task,
        "plan_built",
        "planner",
        "planned",
        task.request(),
        plan.model_dump(mode="json"),
        at=at,
        plan_hash=plan.hash(),
        policy_id=plan.policy.policy_id,
        input_of="request",
        output_of="plan",
    )


def step_started(
    task: Task,
    begun: StepRecord,
    plan: Plan,
    approval: Approval | None,
    current: PolicyDecision,
    at: str,
    limits: Sequence[Mapping[str, Any]] | None = None,
) -> Event:
    """Build the event of a claim: the step, its approval, and the decision of the policy in force."""
    claim = {
        "step_hash": plan.steps[begun.step_index].hash(),
        "run": begun.run,
        "attempt": begun.attempt,
        "approval": approval.round if approval else None,
    }
    stated = {} if limits is None or current.format == 1 else {"limits": list(limits)}
    same_policy = {"output_of": "policy"} if current == plan.policy and not stated else {}
    return make(
        task,
        "step_started",
        "worker",
        begun.status,
        claim,
        current.model_dump(mode="json") | stated,
        at=at,
        **_of_step(begun),
        **same_policy,
    )


def step_executed(task: Task, final: StepRecord, step: Step, output: Any, at: str) -> Event:
    return make(
        task,
        "step_executed",
        "worker",
        final.status,
        step.parameters,
        output,
        at=at,
        **_of_step(final),
        input_of="parameters",
    )


def task_ended(
    task: Task, actor: str, final: dict[str, Any], at: str, *, key_hash: str | None = None, agent: str | None = None
) -> Event:
    output = final | {"idempotency_key": key_hash, **by_agent(agent)}
    return make(task, "task_ended", actor, final["status"], request_again(task), output, at=at)


def of_approval(
    task: Task,
    kind: EventKind,
    actor: str,
    status: str,
    approval: Approval,
    step: Step,
    at: str,
    key_hash: str | None = None,
) -> Event:
    """Build the event of an approval. Input: the hashes of plan and step. Output: the decision."""
    asked: dict[str, Any] = {
        "plan_hash": approval.plan_hash,
        "step_hash": approval.step_hash,
        "policy_id": approval.policy_id,
        "round": approval.round,
        "required": approval.required,
        "expires_at": approval.expires_at,
    }
    if approval.terms is not None:
        quorums = [quorum.model_dump(include={"approvals", "approvers"}) for quorum in approval.quorums]
        asked |= {"quorums": quorums}
    said: dict[str, Any] = {"status": status, "actor": actor}
    if kind == "approval_decided":
        said |= {
            "approved": approval.decisions[-1].approved,
            "reason": approval.decisions[-1].reason,
            "decided_at": approval.decisions[-1].decided_at,
            "approvals": sum(each.approved for each in approval.decisions),
            "plan_hash": approval.plan_hash,
            "step_hash": approval.step_hash,
            "idempotency_key": key_hash,
        }
    return make(
        task,
        kind,
        actor,
        status,
        asked,
        said,
        at=at,
        step_index=approval.step_index,
        step_id=step.step_id,
        step_type=step.type,
        plan_hash=approval.plan_hash,
        policy_id=approval.policy_id,
    )


def _of_step(record: StepRecord) -> dict[str, Any]:
    return {"step_index": record.step_index, "step_id": record.step_id, "step_type": record.type}
