"""Usage of the policy's rolling limits: one item for each limit's key, written in the transaction of the intent.

Item (pk / sk): LIMIT#<scope><key>/LIMIT, with `buckets` (the sum of each bucket, by its number), and a `version` that
guards each write. Two tables have such items: the ledger counts transfers in its own, and the worker counts all other
actions in LimitsTable, which also has the counts of a step's claim under <task_id>/RESERVED#<step>, with the
`run` that claimed it: only the worker's roles can write that item, so it proves a claim.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, NamedTuple

from qaes.adapters import dynamo, settings
from qaes.domain import limits
from qaes.domain.errors import PermanentError
from qaes.domain.ids import now
from qaes.domain.policy import Decision, LimitUse, limit_words, refusal_over

Item = dict[str, Any]

_KEPT_SECONDS = 24 * 3600
"""Retention of an item after its last bucket has left the window."""
_CLAIM_KEPT_SECONDS = 30 * 24 * 3600
"""Retention of a step's claim after its last bucket has left the window: longer than any execution."""


class Share(NamedTuple):
    """The count of one act in one window: `add` in the bucket with the number `bucket`."""

    key: str
    window_seconds: int
    bucket: int
    add: int


@dataclass(frozen=True)
class Used:
    """A limit, and the usage of its window by earlier acts."""

    limit: LimitUse
    used: int

    @property
    def is_over(self) -> bool:
        """Return whether the limit has no room for the act."""
        return self.used + self.limit.add > self.limit.maximum


@dataclass(frozen=True)
class Reservation:
    """The counts of an act, and their writes for the transaction of its intent."""

    used: tuple[Used, ...] = ()
    shares: tuple[Share, ...] = ()
    writes: tuple[Item, ...] = ()


class Windows:
    """Windows in one table.

    Parameters
    ----------
    scope
        Prefix of each key: the sums of two scopes are independent.
    """

    def __init__(self, table: str, scope: str = "", *, clock: Callable[[], datetime] | None = None) -> None:
        self._table = table
        self._scope = scope
        self._clock = clock or now

    def read(self, uses: Iterable[LimitUse], held: Sequence[Share] = ()) -> tuple[Used, ...]:
        """Read the usage of each limit's window, without the act's own earlier counts (`held`)."""
        at, own, used = self._clock(), {share.key: share for share in held}, []
        for use in uses:
            window = self._window(use.key)
            if use.key in own:
                window = window.without(own[use.key])
            used.append(Used(use, self._used(use, window, at)))
        return tuple(used)

    def reserve(
        self,
        decision: Decision,
        *,
        granted: Collection[str] = (),
        held: Sequence[Share] = (),
        bounded: bool = True,
    ) -> Reservation:
        """Count an act in the windows of all its limits, and remove its earlier counts (`held`).

        Parameters
        ----------
        granted
            Keys of the limits that people's approvals allow the act to exceed: it counts there without a bound.
        bounded
            If False, it counts in every window without a bound.

        Raises
        ------
        PermanentError
            A limit has no room for the act.
        """
        at, used, shares, writes = self._clock(), [], [], []
        left = {share.key: share for share in held}
        for use in decision.limits:
            window, before = self._window(use.key), left.pop(use.key, None)
            rest = window.without(before) if before else window
            used.append(Used(use, self._used(use, rest, at)))
            if bounded and (use.over == "deny" or use.key not in granted):
                _check(decision.policy_id, used[-1])
            share = Share(use.key, use.window_seconds, limits.bucket_at(at, use.window_seconds), use.add)
            shares.append(share)
            if share != before:
                writes.append(self._put(window, rest.plus(share), use.window_seconds, at))
        return Reservation(tuple(used), tuple(shares), (*writes, *self.give_back(left.values())))

    def give_back(self, shares: Iterable[Share]) -> list[Item]:
        """Return the writes that remove shares from their windows. A share that its window has lost needs no write."""
        at, writes = self._clock(), []
        for share in shares:
            window = self._window(share.key)
            if share.bucket in window.buckets:
                writes.append(self._put(window, window.without(share), share.window_seconds, at))
        return writes

    def count_again(self, shares: Iterable[Share]) -> Reservation:
        """Count a removed share again, now and without a bound, because the act has happened."""
        at = self._clock()
        again = tuple(share._replace(bucket=limits.bucket_at(at, share.window_seconds)) for share in shares)
        windows = [self._window(share.key) for share in again]
        pairs = zip(again, windows, strict=True)
        writes = [self._put(window, window.plus(share), share.window_seconds, at) for share, window in pairs]
        return Reservation(shares=again, writes=tuple(writes))

    def _used(self, use: LimitUse, window: _Window, at: datetime) -> int:
        own = limits.used(window.buckets, limits.bucket_at(at, use.window_seconds))
        return own + self._elsewhere(use, at, window.began)

    def _elsewhere(self, use: LimitUse, at: datetime, began: datetime | None) -> int:  # noqa: ARG002
        """Return the part of the window's usage that is not in its item, which was first written at `began`."""
        return 0

    def _window(self, key: str) -> _Window:
        return _Window.of(dynamo.get(self._table, self._pk(key), "LIMIT"), key)

    def _pk(self, key: str) -> str:
        return f"LIMIT#{self._scope}{key}"

    def _put(self, before: _Window, after: _Window, window_seconds: int, at: datetime) -> Item:
        newest = limits.bucket_at(at, window_seconds)
        buckets = {number: total for number, total in after.buckets.items() if total and limits.counts(number, newest)}
        item = dynamo.key(self._pk(before.key), "LIMIT") | {
            "buckets": {"M": {str(number): {"N": str(total)} for number, total in buckets.items()}},
            "version": {"N": str(before.version + 1)},
            "began": {"N": str(int((before.began or at).timestamp()))},
            "expires_at_epoch": {"N": str(int(at.timestamp()) + 2 * window_seconds + _KEPT_SECONDS)},
        }
        return dynamo.put_after(self._table, item, before.version)


def _check(policy_id: str, used: Used) -> None:
    if refusal := refusal_over(policy_id, used.limit, used=used.used):
        raise refusal
    if used.is_over:
        raise PermanentError("limit_exceeded", limit_words(used.limit, used.used), used=used.used)


@dataclass(frozen=True)
class _Window:
    """A window's item; `version` is 0 if no item exists."""

    key: str
    version: int
    buckets: dict[int, int]
    began: datetime | None

    def plus(self, share: Share) -> _Window:
        """Return the window with the share added."""
        total = self.buckets.get(share.bucket, 0) + share.add
        return replace(self, buckets={**self.buckets, share.bucket: total})

    def without(self, share: Share) -> _Window:
        """Return the window without the share. If a restored table has lost the share, the sum stops at 0."""
        total = max(0, self.buckets.get(share.bucket, 0) - share.add)
        return replace(self, buckets={**self.buckets, share.bucket: total})

    @classmethod
    def of(cls, item: Item | None, key: str) -> _Window:
        if item is None:
            return cls(key, 0, {}, None)
        buckets = {int(number): int(total["N"]) for number, total in item["buckets"]["M"].items()}
        began = datetime.fromtimestamp(int(item["began"]["N"]), UTC)
        return cls(key, int(item["version"]["N"]), buckets, began)


class LimitsTable(Windows):
    """Windows of every action except transfers, and the counts of each step's claim."""

    def __init__(self, table: str | None = None, *, clock: Callable[[], datetime] | None = None) -> None:
        super().__init__(table or settings.text("LIMITS_TABLE"), clock=clock)

    def reserve_for(
        self, task_id: str, step_index: int, decision: Decision, *, granted: Collection[str] = (), run: int = 0
    ) -> Reservation:
        """Count a step once, regardless of the number of claims. Raises as `reserve`.

        A claim of a later execution replaces the earlier one, whose outcome may be unknown. With `run`, the claim is
        stored even without limits.
        """
        if not decision.limits and not run:
            return Reservation()
        version, held = self._reserved(task_id, step_index)
        reservation = self.reserve(decision, granted=granted, held=held)
        reserved = self._put_reserved(task_id, step_index, version, reservation.shares, run)
        return replace(reservation, writes=(*reservation.writes, reserved))

    def is_claimed(self, task_id: str, step_index: int, run: int) -> bool:
        """Return whether the worker claimed the step in this run, and has not recorded that it had no effect."""
        item = dynamo.get(self._table, task_id, _reserved_sk(step_index))
        return item is not None and "run" in item and int(item["run"]["N"]) == run

    def usage(self, decision: Decision, step: tuple[str, int] | None = None) -> dict[str, int]:
        """Read the usage of each limit's window, by the limit's key, without the counts of the task's `step`."""
        if not decision.limits:
            return {}
        held = self._reserved(*step)[1] if step else ()
        return {each.limit.key: each.used for each in self.read(decision.limits, held)}

    def give_back_of(self, task_id: str, step_index: int) -> list[Item]:
        """Return the writes that remove the counts of a step's claim, with the record that the step had no effect."""
        version, held = self._reserved(task_id, step_index)
        return [*self.give_back(held), self._put_reserved(task_id, step_index, version, ())] if version else []

    def _reserved(self, task_id: str, step_index: int) -> tuple[int, list[Share]]:
        item = dynamo.get(self._table, task_id, _reserved_sk(step_index))
        if item is None:
            return 0, []
        return int(item["version"]["N"]), [Share(*share) for share in json.loads(item["shares"]["S"])]

    def _put_reserved(self, task_id: str, step_index: int, version: int, shares: Sequence[Share], run: int = 0) -> Item:
        longest = max((share.window_seconds for share in shares), default=0)
        item = dynamo.key(task_id, _reserved_sk(step_index)) | {
            "shares": {"S": json.dumps(shares)},
            "version": {"N": str(version + 1)},
            "run": {"N": str(run)},
            "expires_at_epoch": {"N": str(int(self._clock().timestamp()) + 2 * longest + _CLAIM_KEPT_SECONDS)},
        }
        return dynamo.put_after(self._table, item, version)


def _reserved_sk(step_index: int) -> str:
    return f"RESERVED#{step_index:03d}"
