"""Writes of the intent to run an action, in addition to its task: its share of the limits' windows, and its checks.

Only the worker's roles do this. The ledger counts a transfer with its signature.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qaes.adapters import suspensions
from qaes.adapters.limits import LimitsTable
from qaes.domain.errors import ApprovalNeededError, PermanentError, StepDeniedError
from qaes.domain.models import Decision, Step, Task
from qaes.domain.ruling import Ruling, Usage
from qaes.domain.step_types import CONFIRMED_LATER, EFFECT_TYPES
from qaes.domain.suspensions import refusal
from qaes.domain.tasks.lifecycle import Change

Item = dict[str, Any]


@dataclass(frozen=True)
class Intent:
    """The intent to run the action of a task's plan, with the decisions of the policies.

    Attributes
    ----------
    decisions
        People's decisions on the action, which may allow it to exceed a limit.
    ledger_usage
        Usage of a transfer's limits, as the ledger returned it.
    """

    task: Task
    step_index: int
    step: Step
    ruling: Ruling
    decisions: Sequence[Decision] = ()
    ledger_usage: Usage = field(default_factory=dict)

    @property
    def is_counted_here(self) -> bool:
        """Return whether the action is counted in LimitsTable."""
        return self.step.type not in CONFIRMED_LATER and bool(self.ruling.current.limits)

    @property
    def is_proved_here(self) -> bool:
        """Return whether LimitsTable proves the claim: of each action with an effect except a transfer."""
        return self.step.type in EFFECT_TYPES - CONFIRMED_LATER

    def check_claimed(self) -> None:
        """Raise StepDeniedError if the worker never claimed the step: other roles can write its record and event.

        Claims of earlier releases, which had policies of format 1 only, have no proof.
        """
        needs_proof = self.is_proved_here and self.ruling.has_terms
        if needs_proof and not LimitsTable().is_claimed(self.task.task_id, self.step_index, self.task.run):
            raise StepDeniedError("the step was started, but the worker has not claimed it in this run")

    def usage(self) -> Usage:
        """Return the current usage of the limits of the policy in force."""
        if not self.is_counted_here:
            return self.ledger_usage
        return LimitsTable().usage(self.ruling.current, (self.task.task_id, self.step_index))

    def reserve(self, *, counts: bool = True) -> tuple[Usage, list[Item]]:
        """Return the usage of the windows, and the writes that guard it: they fail if others count in between.

        The writes check that the action is not suspended and, if it `counts`, add its share to the windows.

        Raises
        ------
        StepDeniedError
            A limit has no room.
        ApprovalNeededError
            A limit has no room any more, but people can approve to exceed it.
        """
        check = suspensions.check(self.ruling.current.action, self.task.task_id)
        if not (self.is_counted_here or self.is_proved_here) or not counts:
            return self.usage(), [check]
        granted = self.ruling.granted(self.decisions)
        try:
            reservation = LimitsTable().reserve_for(
                self.task.task_id, self.step_index, self.ruling.current, granted=granted, run=self.task.run
            )
        except PermanentError as full:
            if self.ruling.refusal_by_usage(self.usage()) is None:
                raise ApprovalNeededError(full.message) from full
            raise StepDeniedError(f"{full.code}: {full.message}") from full
        return {use.limit.key: use.used for use in reservation.used}, [check, *reservation.writes]

    def recorded_by(self, make: Callable[[Usage], Change], *, counts: bool = True) -> Change:
        """Return the change that `make` makes with the usage, together with the writes of the intent.

        The change states the usage that its transaction guards: others may count between two reads. Raises as
        `reserve`.
        """
        before = self.usage()
        change = make(before)
        if not change.events:
            return change
        usage, writes = self.reserve(counts=counts)
        return replace(change if usage == before else make(usage), beside=writes)


def refuse_suspended(task_id: str, writes: Sequence[Item], refused: Sequence[int]) -> None:
    """Raise StepDeniedError if the transaction failed because its action is suspended."""
    for index in refused:
        if suspensions.is_check(writes[index]):
            action = writes[index]["ConditionCheck"]["ExpressionAttributeNames"]["#action"]
            reason = refusal(action, suspensions.suspended(action, task_id))
            if reason is not None:  # else it was resumed meanwhile
                raise StepDeniedError(reason)
