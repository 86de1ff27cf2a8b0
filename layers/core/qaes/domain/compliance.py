"""May this step run now? Asked by the compliance agent before a step, and by the worker right before it acts."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Literal

from qaes.domain.errors import (
    ApprovalExpiredError,
    ApprovalNeededError,
    ApprovalRejectedError,
    ConflictError,
    InvalidInputError,
    PermanentError,
    StepDeniedError,
    StoppedError,
)
from qaes.domain.ids import parse_timestamp
from qaes.domain.models import TERMINAL, Approval, Model, Plan, Quorum, Step, Task, Terms, WalletBalance
from qaes.domain.planning import can_require_approval, step_requires_approval
from qaes.domain.qubic.identity import check_payable
from qaes.domain.ruling import Ruling, Usage, refusal_by_people

REJECTED = "an approver rejected it"
NOTHING_USED: Usage = MappingProxyType({})

MAX_APPROVAL_AGE = timedelta(minutes=55)
"""How long after an approval's `expires_at` its step may still begin; the verifier refuses a step after an hour."""


class Verdict(Model):
    """The compliance agent's answer, a value that the state machine chooses by."""

    verdict: Literal["execute", "await_approval", "denied", "rejected", "expired"]
    reason: str
    approvals: int = 1
    """How many people have to approve, when `verdict` is `await_approval`."""
    expires_after: int | None = None
    """Seconds that they have; None: as long as the system allows."""
    balance: WalletBalance | None = None
    """Of the wallet that is to pay, when `verdict` is `await_approval` for a transfer; it is shown to the approver."""
    terms: Terms | None = None
    """Who must approve by a policy of format 2, when `verdict` is `await_approval`."""


_STOPS: dict[str, type[StoppedError]] = {
    "await_approval": ApprovalNeededError,
    "rejected": ApprovalRejectedError,
    "expired": ApprovalExpiredError,
}


def stopped_by(verdict: Verdict) -> StoppedError | None:
    """Return the error that stops a step by this verdict; None when the step may run. What is no clear yes denies."""
    if verdict.verdict == "execute":
        return None
    return _STOPS.get(verdict.verdict, StepDeniedError)(verdict.reason)


def check_same_plan(task: Task, plan: Plan) -> None:
    """Raises ConflictError unless `plan` is, to the letter, the one that was recorded for the task."""
    if task.plan_id != plan.plan_id or task.plan_hash != plan.hash():
        raise ConflictError("the plan is not the one that was recorded", field="plan_hash")


def decide(
    task: Task, plan: Plan, step_index: int, ruling: Ruling, approval: Approval | None, usage: Usage = NOTHING_USED
) -> Verdict:
    """Decide whether a step may run: the pinned policy and the one in force must allow it, and people approve just it.

    Nobody is asked to approve what either policy forbids. Nor is anybody asked if too few people are left who can
    approve. `approval` is the newest that was asked for; a policy that has become stricter since asks for one anew, and
    so does another execution of the task (a retry). Once somebody was asked, their answer counts, even if by now no
    policy would ask.

    Parameters
    ----------
    usage
        What the limits of the policy in force have used. A limit without room denies nothing here, because it may have
        room by the time people have approved; but one that lets people approve the excess asks for their approval.

    Raises
    ------
    ConflictError
        The plan is not the one that was recorded, or says something else of its policy than the policy's document.
    """
    if rejected := rejection(task, approval):
        return rejected
    check_same_plan(task, plan)
    if plan.policy != ruling.pins:
        raise ConflictError("the plan's policy is not what the policy's document says", field="plan.policy")
    step = plan.steps[step_index]
    if approval is not None and approval.run != task.run:
        approval = None
    if task.status in TERMINAL:
        return Verdict(verdict="denied", reason=f"the task has ended: {task.status}")
    for refusal in _refusals(step, ruling):
        return Verdict(verdict="denied", reason=refusal)
    return _by_approval(plan, step, ruling, approval, usage)


def _refusals(step: Step, ruling: Ruling) -> Iterator[str]:
    """Yield why the policies, the parameters or a transfer's addresses do not let the step run, the first reason first.

    In format 1, limits are those of the transfer alone: the steps before it run.
    """
    denials = [decision for decision in (ruling.pinned, ruling.current) if not decision.allowed]
    for denial in denials:
        if denial.format == 2 or denial.code == "not_allowed":
            yield denial.reason
    if ruling.flaw:
        yield ruling.flaw
    if refusal := refusal_by_address(step):
        yield refusal
    if step.type == "onchain_action":
        yield from (denial.reason for denial in denials)


def rejection(task: Task, approval: Approval | None) -> Verdict | None:
    """Return the verdict on a step whose approval was rejected in this execution; None if it was not.

    Nothing else counts then: neither the plan, the policies nor the ledger can let the step run.
    """
    if approval is None or approval.run != task.run or approval.status != "rejected":
        return None
    return Verdict(verdict="rejected", reason=REJECTED)


def preview(task: Task, plan: Plan, ruling: Ruling, usage: Usage = NOTHING_USED) -> tuple[Step | None, Verdict]:
    """Return the verdict that `task` with this plan would get if it were started now, and the step that gets it.

    The first verdict that is not `execute` is the task's: `decide` says it, step by step, as it does for a task. The
    state machine asks for the policy's permission before there are steps: then the step is None.
    """
    if refusal := refusal_at_start(ruling):
        return None, Verdict(verdict="denied", reason=refusal)
    planned = {"status": "executing", "plan_id": plan.plan_id, "plan_hash": plan.hash()}
    task = task.model_copy(update=planned)
    found: tuple[Step | None, Verdict] = None, Verdict(verdict="execute", reason="no approval is needed")
    for index, step in enumerate(plan.steps):
        verdict = decide(task, plan, index, ruling, None, usage)
        if verdict.verdict == "denied":
            return step, verdict
        if verdict.verdict != "execute" and found[0] is None:
            found = step, verdict
    return found


def refusal_at_start(ruling: Ruling) -> str | None:
    """Return why a task is denied before it has a plan; None if it may be planned.

    In format 1, the limits of a transfer deny it later.
    """
    if not ruling.recorded.allowed:
        return ruling.current.reason
    return ruling.flaw or refusal_by_people(ruling.tiers, ruling.current.policy_id)


def go_on(task: Task, plan: Plan) -> Verdict:
    """The verdict on a step whose transfer was let through by an execution before this one: its end is waited for.

    Nobody is asked again, and no policy: a rejection would not stop it any more. Raises ConflictError as
    `check_same_plan`.
    """
    check_same_plan(task, plan)
    if task.status in TERMINAL:
        return Verdict(verdict="denied", reason=f"the task has ended: {task.status}")
    return Verdict(verdict="execute", reason="its transfer was handed in before, and let through then")


def _by_approval(plan: Plan, step: Step, ruling: Ruling, approval: Approval | None, usage: Usage) -> Verdict:
    quorums = ruling.quorums(usage)
    if approval is not None and approval.status != "approved":
        return _not_approved(ruling, quorums, approval)
    decisions = approval.decisions if approval else ()
    if needs_approval(step, ruling, usage) and not all(quorum.is_met(decisions) for quorum in quorums):
        return _ask(ruling, quorums)
    if approval is None:
        return Verdict(verdict="execute", reason="no approval is needed")
    if not covers(approval, plan, step):
        return Verdict(verdict="denied", reason="what was approved is not what would run")
    return Verdict(verdict="execute", reason="approved")


def _not_approved(ruling: Ruling, quorums: tuple[Quorum, ...], approval: Approval) -> Verdict:
    if approval.status == "pending":
        return _ask(ruling, quorums or approval.quorums)
    if approval.status == "expired":
        return Verdict(verdict="expired", reason="nobody decided in time")
    return Verdict(verdict="denied", reason=f"the approval was {approval.status}")


def _ask(ruling: Ruling, quorums: tuple[Quorum, ...]) -> Verdict:
    policy_id = ruling.current.policy_id
    if refusal := refusal_by_people(quorums, policy_id):
        return Verdict(verdict="denied", reason=refusal)
    expiries = [each for each in (ruling.pins.expires_after, ruling.recorded.expires_after) if each is not None]
    return Verdict(
        verdict="await_approval",
        reason=f"policy {policy_id} asks for an approval",
        approvals=max(quorum.approvals for quorum in quorums),
        expires_after=min(expiries, default=None),
        terms=ruling.terms(quorums),
    )


def refusal_by_address(step: Step) -> str | None:
    """Tell why a transfer may not go from or to its addresses; None when it may, or when it is no transfer.

    A task's start checks its parameters; a plan that was stored before that check existed is checked here.
    """
    if step.type != "onchain_action":
        return None
    try:
        for field in ("from_address", "to_address"):
            check_payable(step.parameters.get(field), field)
    except InvalidInputError as error:
        return f"invalid_address: {error.message}"
    return None


def refusal_by_balance(step: Step, balance: WalletBalance) -> str | None:
    """Tell why a transfer's source cannot pay it; None when it can."""
    amount = step.parameters["amount"]
    if balance.available >= amount:
        return None
    promised = balance.balance - balance.available
    rest = f", of which {promised} QU are promised to other transfers" if promised > 0 else ""
    return f"insufficient_balance: the wallet holds {balance.balance} QU{rest}; the transfer needs {amount} QU"


def needs_approval(step: Step, ruling: Ruling, usage: Usage = NOTHING_USED) -> bool:
    """Whether the plan, the policy in force or a limit that is exceeded requires a person's approval."""
    over = ruling.exceeds(usage) and can_require_approval(step.type)
    return step.requires_approval or step_requires_approval(step.type, ruling.recorded) or over


def covers(approval: Approval, plan: Plan, step: Step) -> bool:
    """Whether the approval is for exactly this plan and this step, by their hashes."""
    return approval.plan_hash == plan.hash() and approval.step_hash == step.hash()


def check_may_act(
    task: Task,
    plan: Plan,
    step_index: int,
    ruling: Ruling,
    approval: Approval | None,
    usage: Usage = NOTHING_USED,
    *,
    at: datetime,
) -> None:
    """Check, as the last before a step begins at the moment `at`, that it may run.

    Raises
    ------
    StoppedError
        The step may not run, or not yet: by its class.
    PermanentError
        `approval_too_old`: its approval expired `MAX_APPROVAL_AGE` ago or earlier, so a retry asks for a new one.
    """
    if stopped := stopped_by(decide(task, plan, step_index, ruling, approval, usage)):
        raise stopped
    if approval is None or approval.run != task.run:
        return
    if at - parse_timestamp(approval.expires_at) >= MAX_APPROVAL_AGE:
        raise PermanentError("approval_too_old", f"its approval expired at {approval.expires_at}: retry the task")
