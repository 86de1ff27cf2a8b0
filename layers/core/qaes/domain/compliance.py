"""Decision whether a step may run: for the compliance agent before a step, and for the worker right before it acts."""

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
from qaes.domain.qubic.identity import check_address, check_payable
from qaes.domain.ruling import Ruling, Usage, refusal_by_people

REJECTED = "an approver rejected it"
NOTHING_USED: Usage = MappingProxyType({})

MAX_APPROVAL_AGE = timedelta(minutes=55)
"""Maximum delay of a step after its approval's `expires_at`; the verifier rejects a step after an hour."""


class Verdict(Model):
    """The compliance agent's verdict. The state machine branches on its value."""

    verdict: Literal["execute", "await_approval", "denied", "rejected", "expired"]
    reason: str
    approvals: int = 1
    """Number of people who must approve if `verdict` is `await_approval`."""
    expires_after: int | None = None
    """Seconds until the approval expires; None: the system's limit."""
    balance: WalletBalance | None = None
    """Balance of the paying wallet, shown to the approver, if `verdict` is `await_approval` for a transfer."""
    terms: Terms | None = None
    """Required approvals by a policy of format 2, if `verdict` is `await_approval`."""


_STOPS: dict[str, type[StoppedError]] = {
    "await_approval": ApprovalNeededError,
    "rejected": ApprovalRejectedError,
    "expired": ApprovalExpiredError,
}


def stopped_by(verdict: Verdict) -> StoppedError | None:
    """Return the error for this verdict; None if the step may run. Any verdict other than `execute` denies the step."""
    if verdict.verdict == "execute":
        return None
    return _STOPS.get(verdict.verdict, StepDeniedError)(verdict.reason)


def check_same_plan(task: Task, plan: Plan) -> None:
    """Raise ConflictError unless `plan` is exactly the recorded plan of the task."""
    if task.plan_id != plan.plan_id or task.plan_hash != plan.hash():
        raise ConflictError("the plan differs from the recorded plan", field="plan_hash")


def decide(
    task: Task, plan: Plan, step_index: int, ruling: Ruling, approval: Approval | None, usage: Usage = NOTHING_USED
) -> Verdict:
    """Decide whether a step may run: the pinned policy and the one in force must allow it, and its approval too.

    No approval is requested for a step that either policy forbids, or if too few people can approve it. `approval` is
    the newest request. A stricter policy requires a new approval, and so does a retry of the task. After a request, the
    people's decision counts, even if the current policy requires no approval.

    Parameters
    ----------
    usage
        Usage of the limits of the policy in force. A limit without room denies no step here, because it may have room
        by the time of the approval. A limit that approvals can exceed requires an approval.

    Raises
    ------
    ConflictError
        The plan differs from the recorded one, or its policy from the policy's document.
    """
    if rejected := rejection(task, approval):
        return rejected
    check_same_plan(task, plan)
    if plan.policy != ruling.pins:
        raise ConflictError("the plan's policy differs from the policy's document", field="plan.policy")
    step = plan.steps[step_index]
    if approval is not None and approval.run != task.run:
        approval = None
    if task.status in TERMINAL:
        return Verdict(verdict="denied", reason=f"the task has ended: {task.status}")
    for refusal in _refusals(step, ruling):
        return Verdict(verdict="denied", reason=refusal)
    return _by_approval(plan, step, ruling, approval, usage)


def _refusals(step: Step, ruling: Ruling) -> Iterator[str]:
    """Yield the reasons why the policies, the parameters or a transfer's addresses do not allow the step, in order.

    In format 1, limits apply to the transfer only: the steps before it run.
    """
    denials = [decision for decision in (ruling.pinned, ruling.current) if not decision.allowed]
    for denial in denials:
        if denial.format == 2 or denial.code == "not_allowed":
            yield denial.reason
    if ruling.flaw:
        yield ruling.flaw
    if refusal := refusal_by_address(step, ruling):
        yield refusal
    if step.type == "onchain_action":
        yield from (denial.reason for denial in denials)


def rejection(task: Task, approval: Approval | None) -> Verdict | None:
    """Return the verdict on a step whose approval was rejected in this execution; None without a rejection.

    A rejection is final: neither the plan, the policies nor the ledger can allow the step.
    """
    if approval is None or approval.run != task.run or approval.status != "rejected":
        return None
    return Verdict(verdict="rejected", reason=REJECTED)


def preview(task: Task, plan: Plan, ruling: Ruling, usage: Usage = NOTHING_USED) -> tuple[Step | None, Verdict]:
    """Return the verdict on `task` with this plan if it started now, and the step that determines it.

    The first verdict of `decide` other than `execute` is the task's. The policy's permission is checked before the
    steps: then the step is None.
    """
    if refusal := refusal_at_start(ruling):
        return None, Verdict(verdict="denied", reason=refusal)
    planned = {"status": "executing", "plan_id": plan.plan_id, "plan_hash": plan.hash()}
    task = task.model_copy(update=planned)
    found: tuple[Step | None, Verdict] = None, Verdict(verdict="execute", reason="no approval is required")
    for index, step in enumerate(plan.steps):
        verdict = decide(task, plan, index, ruling, None, usage)
        if verdict.verdict == "denied":
            return step, verdict
        if verdict.verdict != "execute" and found[0] is None:
            found = step, verdict
    return found


def refusal_at_start(ruling: Ruling) -> str | None:
    """Return the reason why a task is denied before it has a plan; None if it may be planned.

    In format 1, the limits of a transfer deny it later.
    """
    if not ruling.recorded.allowed:
        return ruling.current.reason
    return ruling.flaw or refusal_by_people(ruling.tiers, ruling.current.policy_id)


def go_on(task: Task, plan: Plan) -> Verdict:
    """Return the verdict on a step whose transfer an earlier execution submitted: wait for its end.

    Neither people nor policies are asked again, because they could not stop it any more. Raises ConflictError as
    `check_same_plan`.
    """
    check_same_plan(task, plan)
    if task.status in TERMINAL:
        return Verdict(verdict="denied", reason=f"the task has ended: {task.status}")
    return Verdict(verdict="execute", reason="an earlier execution submitted its transfer")


def _by_approval(plan: Plan, step: Step, ruling: Ruling, approval: Approval | None, usage: Usage) -> Verdict:
    quorums = ruling.quorums(usage)
    if approval is not None and approval.status != "approved":
        return _not_approved(ruling, quorums, approval)
    decisions = approval.decisions if approval else ()
    if needs_approval(step, ruling, usage) and not all(quorum.is_met(decisions) for quorum in quorums):
        return _ask(ruling, quorums)
    if approval is None:
        return Verdict(verdict="execute", reason="no approval is required")
    if not covers(approval, plan, step):
        return Verdict(verdict="denied", reason="the approved plan or step differs from the one that would run")
    return Verdict(verdict="execute", reason="approved")


def _not_approved(ruling: Ruling, quorums: tuple[Quorum, ...], approval: Approval) -> Verdict:
    if approval.status == "pending":
        return _ask(ruling, quorums or approval.quorums)
    if approval.status == "expired":
        return Verdict(verdict="expired", reason="no decision was made in time")
    return Verdict(verdict="denied", reason=f"the approval was {approval.status}")


def _ask(ruling: Ruling, quorums: tuple[Quorum, ...]) -> Verdict:
    policy_id = ruling.current.policy_id
    if refusal := refusal_by_people(quorums, policy_id):
        return Verdict(verdict="denied", reason=refusal)
    expiries = [each for each in (ruling.pins.expires_after, ruling.recorded.expires_after) if each is not None]
    return Verdict(
        verdict="await_approval",
        reason=f"policy {policy_id} requires an approval",
        approvals=max(quorum.approvals for quorum in quorums),
        expires_after=min(expiries, default=None),
        terms=ruling.terms(quorums),
    )


def refusal_by_address(step: Step, ruling: Ruling) -> str | None:
    """Return the reason why a transfer cannot use its addresses; None if it can, or without a transfer.

    A task's start checks its parameters by the policy of that moment. This function checks both policies, and plans
    that were stored before that check existed.
    """
    if step.type != "onchain_action":
        return None
    try:
        check_payable(step.parameters.get("from_address"), "from_address")
        check = check_address if ruling.pays_contracts else check_payable
        check(step.parameters.get("to_address"), "to_address")
    except InvalidInputError as error:
        return f"invalid_address: {error.message}"
    return None


def refusal_by_balance(step: Step, balance: WalletBalance) -> str | None:
    """Return the reason why a transfer's source cannot pay; None if it can."""
    amount = step.parameters["amount"]
    if balance.available >= amount:
        return None
    promised = balance.balance - balance.available
    rest = f", of which {promised} QU are promised to other transfers" if promised > 0 else ""
    return f"insufficient_balance: the wallet holds {balance.balance} QU{rest}; the transfer needs {amount} QU"


def needs_approval(step: Step, ruling: Ruling, usage: Usage = NOTHING_USED) -> bool:
    """Return whether the plan, the policy in force or an exceeded limit requires an approval."""
    over = ruling.exceeds(usage) and can_require_approval(step.type)
    return step.requires_approval or step_requires_approval(step.type, ruling.recorded) or over


def covers(approval: Approval, plan: Plan, step: Step) -> bool:
    """Return whether the approval is for exactly this plan and this step, by their hashes."""
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
    """Check right before a step starts, at the time `at`, that it may run.

    Raises
    ------
    StoppedError
        The step must not run, or not yet. The class has the reason.
    PermanentError
        `approval_too_old`: its approval expired `MAX_APPROVAL_AGE` ago or earlier, so a retry asks for a new one.
    """
    if stopped := stopped_by(decide(task, plan, step_index, ruling, approval, usage)):
        raise stopped
    if approval is None or approval.run != task.run:
        return
    if at - parse_timestamp(approval.expires_at) >= MAX_APPROVAL_AGE:
        raise PermanentError("approval_too_old", f"its approval expired at {approval.expires_at}; retry the task")
