"""Signing: the DynamoDB transaction that stores a signature, its spending, and its place in the source's queue.

A transaction is signed and stored, with bytes and id, before it is sent. After any crash, the same bytes can therefore
be sent again and tracked.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from qaes.adapters import dynamo, suspensions
from qaes.adapters.limits import Reservation
from qaes.domain.errors import PermanentError, ThrottledError, TransientError
from qaes.domain.ids import now, timestamp
from qaes.domain.policy import TRANSFER_ACTION, Decision
from qaes.domain.qubic.transaction import Transaction
from qaes.domain.suspensions import refusal
from qubic.items import ChangedError, Item, item_key
from qubic.network.base import Balance, Chain
from qubic.spending import Spending
from qubic.transactions.model import (
    Place,
    Source,
    Store,
    Submission,
    head_of,
    signed_item,
)
from qubic.wallets import Key, Wallets, public_key, service_identity

LEAD_TICKS = 15
"""Lead of a named tick (Qubic's documents: 15 to 20), and distance of the ticks of one source."""
MAX_TICKS_AHEAD = 2_000
"""Maximum lead of the current tick over look-ups. A larger lead is an error: a source's ticks only increase."""
KEPT_BALANCE = 1
"""Minimum balance of the service's wallet in QU: the network drops transactions of a source without a balance."""


class Signing(Store):
    """Signs for one chain with the service's keys.

    Parameters
    ----------
    chain
        The network.
    table
        Name of the table; the default is LEDGER_TABLE.
    on_signed
        Called with each stored submission, to enqueue its tracking.
    on_closed
        Called with each closed submission, at least once, before its source's queue advances.
    rule_for
        Called before a transfer is signed, before a waiting transfer is sent, and before a transfer is signed for a
        later tick. Returns the rule that allows it; raises PermanentError if no rule does.
    sends_transfers
        If False, unsent transfers are no longer sent.
    clock
        Returns the current time, which determines the day on which a transfer counts.
    """

    def __init__(
        self,
        chain: Chain,
        table: str | None = None,
        *,
        on_signed: Callable[[Submission], None] = lambda _: None,
        on_closed: Callable[[Submission], None] = lambda _: None,
        rule_for: Callable[[Submission], Decision | None] = lambda _: None,
        sends_transfers: bool = True,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        super().__init__(chain.network, table)
        self.chain = chain
        self._wallets = Wallets(chain.network)
        self._on_signed = on_signed
        self._on_closed = on_closed
        self._rule_for = rule_for
        self.sends_transfers = sends_transfers
        self.spending = Spending(self._items, self._network, clock=clock)

    def available(self, identity: str) -> tuple[Balance, int]:
        """Return an identity's balance, and the part that is available: without its transfers in flight, at least 0."""
        balance, available = self._available(self._source(identity))
        return balance, max(available, 0)

    def _available(self, source: Source) -> tuple[Balance, int]:
        """Return the balance and its available part.

        A sent transfer whose tick has passed is already in the balance or moves nothing. Only the first can be one.
        """
        found = self.chain.balance(source.identity)
        promised = sum(place.amount for place in source.open)
        if source.identity == service_identity():
            promised += KEPT_BALANCE
        if source.open:
            head = head_of(source)
            submission = self.get(head.key) if head.tick <= found.valid_for_tick else None
            if submission is not None and submission.tick == head.tick and submission.state != "signed":
                promised -= head.amount
        return found, found.balance - promised

    def _sign(
        self, wanted: Submission, key: Key, before: Submission | None, source: Source, rule: Decision | None
    ) -> Submission:
        """Sign for a free tick, and store the signature with its spending: the commit point.

        Raises ChangedError when others were first, PermanentError when a limit has no room or transfers are suspended.
        """
        tick = max(self._present_tick(), source.last_tick) + LEAD_TICKS
        transaction = transaction_of(wanted, key, tick)
        signed = replace(
            wanted,
            state="signed",
            tick=tick,
            txid=transaction.id,
            encoded=transaction.encode(),
            attempt=(before.attempt if before else 0) + 1,
            settled=settled_before(before),
            created_at=before.created_at if before else wanted.created_at,
            updated_at=timestamp(now()),
            version=(before.version if before else 0) + 1,
            error="",
        )
        places = tuple(place for place in source.open if place.key != signed.key)
        queue = replace(source, last_tick=tick, open=(*places, Place(tick, signed.key, signed.amount)))
        writes = [
            self._items.put_new(item_key(self._pk(signed.key), f"ATTEMPT#{signed.attempt:06d}") | signed_item(signed)),
            self._items.put_new(
                item_key(f"TXID#{self._network}#{signed.txid}", "TXID")
                | {"key": {"S": signed.key}}
                | signed_item(signed)
            ),
            self._put_source(queue),
        ]
        if source.version == 0:
            named = item_key(f"SOURCES#{self._network}", source.identity)
            writes.append({"Put": {"TableName": self._table, "Item": named}})
        if signed.kind == "transfer":
            writes.append(suspensions.check(TRANSFER_ACTION, _task_of(signed)))

        def counted(reservation: Reservation) -> list[Item]:
            nonlocal signed
            signed = replace(signed, counted_in=reservation.shares, counted_on="")
            return [self._put_submission(signed, before), *writes]

        self._write_counted(counted, lambda: self._reserve(wanted, rule))
        return signed

    def _reserve(self, wanted: Submission, rule: Decision | None) -> Reservation:
        """Count a transfer in the windows of its rule's limits. A transfer that is signed again counts again.

        Raises PermanentError if a limit has no room.
        """
        if rule is None:
            return Reservation(shares=wanted.counted_in)
        # An amount that an earlier release counted is moved into the window, and needs no room.
        bounded = not (wanted.counted_on and self.spending.counts_day(wanted.counted_on))
        held, granted = wanted.counted_in, wanted.granted
        reservation = self.spending.reserve(rule, granted=granted, held=held, bounded=bounded)
        if wanted.counted_on:
            given = self.spending.give_back_of_day(wanted.source, wanted.amount, wanted.counted_on)
            reservation = replace(reservation, writes=(*reservation.writes, *given))
        return reservation

    def _write_counted(self, writes: Callable[[Reservation], list[Item]], reserve: Callable[[], Reservation]) -> None:
        """Write all items and the counts, or none. If only the windows have changed, count again.

        Raises
        ------
        ChangedError
            Others have changed something else.
        PermanentError
            Transfers are suspended.
        ThrottledError
            Others keep changing the windows.
        """
        pauses = dynamo.Pauses()
        while True:
            reservation = reserve()
            others = writes(reservation)
            try:
                return self._items.write(*others, *reservation.writes)
            except ChangedError as error:
                refused = [others[index] for index in error.refused if index < len(others)]
                if any(suspensions.is_check(write) for write in refused):
                    raise _suspended() from error
                if refused:
                    raise
            pauses.wait_or_raise(ThrottledError("other callers use the same limits at the moment; try again"))

    def _present_tick(self) -> int:
        """Return the current tick if it is plausible: a wrong one would block its source for ever."""
        tick, processed = self.chain.tick_info().tick, self.chain.last_processed_tick().tick
        if tick > processed + MAX_TICKS_AHEAD:
            raise TransientError(f"the node reports the current tick {tick}, but look-ups are at {processed}")
        return max(tick, processed)


def _task_of(submission: Submission) -> str:
    """Return the task that a transfer's reference names."""
    return submission.key.removeprefix("transfer:").partition("#")[0]


def _suspended() -> Exception:
    """Return the error for a transaction that found transfers suspended."""
    reason = refusal(TRANSFER_ACTION, suspensions.suspended(TRANSFER_ACTION))
    if reason is None:
        return ThrottledError("transfers were resumed at this moment: try again")
    code, _, words = reason.partition(": ")
    return PermanentError(code, words)


def transaction_of(wanted: Submission, key: Key, tick: int) -> Transaction:
    return Transaction(
        key.public_key, public_key(wanted.destination), wanted.amount, tick, wanted.input_type, wanted.payload
    ).sign(key.subseed)


def settled_before(before: Submission | None) -> int:
    """Return the number of earlier transactions that are in their tick and have moved nothing."""
    if before is None:
        return 0
    return before.attempt if before.state == "failed" and before.txid else before.settled
