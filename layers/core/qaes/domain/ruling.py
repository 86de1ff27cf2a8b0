"""Decisions of the pinned policy and of the policy in force on a task's request, each evaluated from its document.

The request is the task's recorded request. A plan's copy of its policy is compared, never trusted.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qaes.domain import planning
from qaes.domain.errors import InvalidInputError
from qaes.domain.models import Decision as Approved
from qaes.domain.models import Quorum, Task, Terms
from qaes.domain.policy import (
    ActionRequest,
    Decision,
    Policy,
    PolicyDecision,
    Requirement,
    evaluate,
    pinned_form,
    refusal_over,
    requirement_over,
)
from qaes.domain.text import same_subject

TOO_FEW = "too_few_approvers"
"""Code of a refusal: too few people can approve a task."""

Usage = Mapping[str, int]
"""Usage of each limit of the policy in force in its window, by the limit's key."""


@dataclass(frozen=True)
class Ruling:
    """The decisions of the pinned policy and of the policy in force on one request: both must allow it.

    Attributes
    ----------
    pins, recorded
        The two decisions in the form in which a plan pins them and entries record them.
    tiers
        The approvals that the tiers of the two policies require.
    pays_contracts
        Whether both policies let a transfer go to a smart contract or to the zero address.
    flaw
        Reason why the parameters do not fit the action's schema in one of the policies; None if they do.
    involved
        The people whose approvals do not count: the requester, who also owns the request's agent, and the retriers.
    """

    pinned: Decision
    current: Decision
    pins: PolicyDecision
    recorded: PolicyDecision
    tiers: tuple[Quorum, ...]
    involved: tuple[str, ...]
    flaw: str | None = None
    pays_contracts: bool = False

    @property
    def has_terms(self) -> bool:
        """Return whether one of the policies has format 2, so that an approval has terms."""
        return 2 in (self.pinned.format, self.current.format)

    def quorums(self, usage: Usage) -> tuple[Quorum, ...]:
        """Return the required approvals: of the tiers, and of each limit that the request exceeds now."""
        over = [requirement_over(use, used=usage.get(use.key, 0)) for use in self.current.limits]
        return merged((*self.tiers, *(quorum_of(each, self.involved) for each in over if each)))

    def exceeds(self, usage: Usage) -> bool:
        """Return whether the request exceeds a limit that approvals can exceed."""
        return any(requirement_over(use, used=usage.get(use.key, 0)) for use in self.current.limits)

    def granted(self, decisions: Sequence[Approved]) -> tuple[str, ...]:
        """Return the keys of the limits beyond which these people have approved the request."""
        return tuple(
            use.key
            for use in self.current.limits
            if use.over != "deny" and quorum_of(use.over, self.involved).is_met(decisions)
        )

    def refusal_by_usage(self, usage: Usage) -> str | None:
        """Return the reason why a limit has no room for the request now; None if no limit denies it."""
        refusals = (
            refusal_over(self.current.policy_id, use, used=usage.get(use.key, 0)) for use in self.current.limits
        )
        return next((f"{refusal.code}: {refusal.message}" for refusal in refusals if refusal), None)

    def limits(self, usage: Usage) -> list[dict[str, Any]]:
        """Return the limits of the policy in force as the action's claim states them."""
        stated = ("key", "per", "value", "window_seconds", "counts", "add", "maximum")
        return [
            {name: getattr(use, name) for name in stated} | {"used": usage.get(use.key, 0)}
            for use in self.current.limits
        ]

    def terms(self, quorums: tuple[Quorum, ...]) -> Terms | None:
        """Return the terms of an approval; None if both policies have format 1."""
        if not self.has_terms:
            return None
        escalations = [
            (decision.escalate_after, decision.escalate_to)
            for decision in (self.pinned, self.current)
            if decision.escalate_after is not None
        ]
        after, group = min(escalations, key=lambda each: each[0], default=(None, None))
        return Terms(
            quorums=quorums,
            tier=self.pinned.tier,
            amount=self.current.amount,
            unit=self.current.unit if self.current.amount is not None else None,
            escalate_after=after,
            escalate_to=group,
        )


def request_of(task: Task) -> ActionRequest:
    """Return a task's request as a policy decides on it."""
    return ActionRequest(planning.action_type(task.task_type), task.parameters, task.requester, task.agent)


def rule(task: Task, pinned: Policy, current: Policy) -> Ruling:
    """Evaluate both policies on a task's request."""
    request, involved = request_of(task), (task.requester, *task.retriers)
    then, now = evaluate(pinned, request), evaluate(current, request)
    decisions = [(pinned, then)] if pinned.policy_id == current.policy_id else [(pinned, then), (current, now)]
    tiers: list[Quorum] = []
    if any(decision.requirement for _, decision in decisions):
        for policy, decision in decisions:
            if decision.format == 1:
                # Its rule counts the people even where it does not require them itself.
                tiers.append(Quorum(approvals=pinned_form(policy, decision).approvals))
            elif decision.requirement:
                tiers.append(quorum_of(decision.requirement, involved, current))
    forms = pinned_form(pinned, then), pinned_form(current, now)
    flaws = (flaw_of(policy, request) for policy, _ in decisions)
    flaw = next((flaw for flaw in flaws if flaw), None)
    return Ruling(
        then,
        now,
        *forms,
        tiers=merged(tiers),
        involved=involved,
        flaw=flaw,
        pays_contracts=pinned.pays_contracts and current.pays_contracts,
    )


def flaw_of(policy: Policy, request: ActionRequest) -> str | None:
    """Return why the parameters do not fit the schema of an operator's action; None if they do."""
    if request.action not in policy.actions:
        return None
    from qaes.domain.policy.schemas import check_parameters  # it takes a while to import

    try:
        check_parameters(policy, request.action, request.parameters)
    except InvalidInputError as error:
        return f"invalid_parameters: {error.field}: {error.message}"
    return None


def quorum_of(requirement: Requirement, involved: Iterable[str], current: Policy | None = None) -> Quorum:
    """Return the people whose approvals count: members of the group, in the `current` policy too, and not involved."""
    if requirement.members is None:
        return Quorum(approvals=requirement.approvals)
    members = (
        requirement.members & (current.members(requirement.approvers) or frozenset())
        if current
        else requirement.members
    )
    without = tuple(involved)
    counting = sorted(each for each in members if not any(same_subject(each, other) for other in without))
    return Quorum(approvals=requirement.approvals, approvers=requirement.approvers, members=tuple(counting))


def merged(quorums: Iterable[Quorum]) -> tuple[Quorum, ...]:
    """Return the quorums without those that are met whenever another one is."""
    found = list(dict.fromkeys(quorums))
    return tuple(quorum for quorum in found if not any(_implies(other, quorum) for other in found if other != quorum))


def _implies(one: Quorum, other: Quorum) -> bool:
    """Whether `other` is met whenever `one` is; of two quorums that imply each other, only the group's name differs."""
    if one.approvals < other.approvals:
        return False
    if other.members is None:
        return True
    if one.members is None or not set(one.members) <= set(other.members):
        return False
    same = (one.approvals, set(one.members)) == (other.approvals, set(other.members))
    return not same or str(one.approvers) < str(other.approvers)


def refusal_by_people(quorums: Iterable[Quorum], policy_id: str) -> str | None:
    """Return the reason why the approvals can never be given: a group has too few people left; None if they can."""
    for quorum in quorums:
        if quorum.members is not None and len(quorum.members) < quorum.approvals:
            left = len(quorum.members)
            people = {0: "no person", 1: "1 person"}.get(left, f"{left} people")
            needs = "1 approval" if quorum.approvals == 1 else f"{quorum.approvals} approvals"
            return (
                f"{TOO_FEW}: policy {policy_id} requires {needs} by the group `{quorum.approvers}`, in which {people} "
                "can approve this task (a person who started or retried a task cannot)"
            )
    return None
