"""Suspension of an action by one operator, at once, and its resumption by two operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from qaes.adapters import dynamo, suspensions
from qaes.adapters.logs import logger
from qaes.adapters.policy_events import newest_event
from qaes.domain.errors import ConflictError, TransientError
from qaes.domain.ids import now, timestamp
from qaes.domain.policy_events import EVERY_ACTION
from qaes.domain.suspensions import Suspension
from qaes.domain.text import same_subject
from qubic.items import attempts
from qubic.policy.versions import Versions

MAX_SUSPENDED = 100
"""Maximum number of names: each copy of the suspensions is one item, and each intent's transaction reads one."""

Status = Literal["active", "suspended", "resume_requested"]


@dataclass(frozen=True)
class Suspended:
    """An action, or `*`, and its suspension; None for the status `active`."""

    name: str
    status: Status
    suspension: Suspension | None


class Suspending(Versions):
    """Suspends and resumes actions, each change with its event in one transaction.

    The number of the event guards the transaction: if another operator changed anything since the suspensions were
    read, an event has that number already, and this change starts again.

    Parameters
    ----------
    network
        The network of the policy.
    table
        Name of the table; the default is LEDGER_TABLE.
    clock
        Returns the current time.
    """

    def __init__(self, network: str, table: str | None = None, *, clock: Callable[[], datetime] | None = None) -> None:
        super().__init__(network, table)
        self._clock = clock or now

    def suspended(self, name: str | None = None) -> list[Suspended]:
        """List the suspensions by name; with `name`, only of that action and `*`."""
        return [self._shown(each, found) for each, found in sorted(suspensions.suspended(name).items())]

    def suspend(self, name: str, *, subject: str, reason: str) -> Suspended:
        """Suspend an action, or every action. After this call, no new intent is recorded.

        A suspended name stays suspended, with its first reason. If a request to resume it is open, the request ends,
        and the suspension gets the new reason.

        Raises
        ------
        ConflictError
            The maximum number of names is suspended.
        TransientError
            The table does not respond, or too many intents are recorded at the moment. Nothing is suspended.
        """
        for _ in attempts():
            newest, names = newest_event(self._policy_table), suspensions.suspended()
            before = names.get(name)
            if before is not None and not before.resumes_with(self._clock()):
                return self._shown(name, before)
            if before is None and len(names) >= MAX_SUSPENDED:
                raise ConflictError(f"{MAX_SUSPENDED} names are suspended: suspend `{EVERY_ACTION}` instead")
            after = Suspension(by=subject, at=timestamp(self._clock()), reason=reason)
            event = self._event("action_suspended", newest, actor=subject, at=after.at, name=name, reason=reason)
            if _write([event, *suspensions.puts(names | {name: after})]):
                logger().warning("action suspended", extra={"action": name, "subject": subject})
                return self._shown(name, after)
        raise TransientError("other callers are changing the suspensions at the moment; try again")

    def resume(self, name: str, *, subject: str, four_eyes: bool) -> Suspended:
        """Request that a suspended action resumes, or, if another operator has requested it, resume it.

        The operator who suspended it can be one of the two. A request counts for one day. A repetition by the operator
        who requested it changes nothing, but with `four_eyes` off that operator resumes it.

        Raises
        ------
        TransientError
            The table does not respond, or other callers are changing the suspensions.
        """
        for _ in attempts():
            newest, names = newest_event(self._policy_table), suspensions.suspended()
            before, moment = names.get(name), self._clock()
            if before is None:
                return Suspended(name, "active", None)
            at = timestamp(moment)
            if not before.resumes_with(moment):
                after = before.model_copy(update={"resume_by": subject, "resume_at": at})
                event = self._event("resume_requested", newest, actor=subject, at=at, name=name)
                if _write([event, *suspensions.puts(names | {name: after})]):
                    logger().info("resume requested", extra={"action": name, "subject": subject})
                    return self._shown(name, after)
                continue
            if four_eyes and same_subject(str(before.resume_by), subject):
                return self._shown(name, before)
            event = self._event("action_resumed", newest, actor=subject, at=at, name=name)
            left = {each: found for each, found in names.items() if each != name}
            if _write([event, *suspensions.puts(left)]):
                logger().warning("action resumed", extra={"action": name, "subject": subject})
                return Suspended(name, "active", None)
        raise TransientError("other callers are changing the suspensions at the moment; try again")

    def _shown(self, name: str, suspension: Suspension) -> Suspended:
        """Return a suspension as it counts now, without a request to resume that is too old."""
        if suspension.resumes_with(self._clock()):
            return Suspended(name, "resume_requested", suspension)
        return Suspended(name, "suspended", suspension.model_copy(update={"resume_by": None, "resume_at": None}))


def _write(writes: list[dynamo.Item]) -> bool:
    """Write all items or none. Return False if another event was first."""
    try:
        dynamo.transact(writes, urgent=True)
    except dynamo.ConditionFailedError:
        return False
    return True
