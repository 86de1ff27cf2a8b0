"""Tracking: the first transaction of a source's queue is sent, and looked up until it is final.

A tick that passed without the transaction ends a transfer, and causes a record to be signed again. A node that is
behind must not cause this by mistake. The decision therefore needs a look-up of the id, and a list of the source's
transactions that contains none of the transactions signed for this act, and that states its last tick. For a
transfer, the balance must agree as well.
"""

from __future__ import annotations

import time
from dataclasses import replace

from qaes.adapters import metrics
from qaes.adapters.limits import Reservation
from qaes.adapters.logs import logger
from qaes.domain.errors import InvalidInputError, PermanentError, TransientError
from qaes.domain.qubic.identity import encode_identity
from qaes.domain.qubic.transaction import Transaction
from qubic.items import ChangedError, Item
from qubic.network.base import Included
from qubic.transactions.model import (
    MAX_OPEN,
    NO_EFFECT,
    OUTCOME_UNKNOWN,
    Place,
    Source,
    State,
    Submission,
    changed,
    head_of,
)
from qubic.transactions.signing import (
    Signing,
)

MIN_LEAD_TICKS = 3
"""Minimum lead to send a transaction: with less, it would probably arrive too late."""
EXPIRY_MARGIN_TICKS = 5
"""Ticks after the named one before absence counts: the nodes behind one address may be at different ticks."""
ADVANCE_SECONDS = 5.0
"""Time that a request spends on a source's queue. The transaction worker does the rest."""
REFUSED_METRIC = "LedgerRefused"


class Tracking(Signing):
    """Advances the queues of one chain's sources."""

    def advance(self, identity: str, *, seconds: float = 15) -> None:
        """Advance a source's queue as far as possible. Any caller can do this at any time.

        After `seconds`, no further work is started. Raises TransientError if the network does not respond; call again
        then.
        """
        end = time.monotonic() + seconds
        attempts_at_first: dict[str, int] = {}
        for look in range(4 * MAX_OPEN):
            if look and time.monotonic() > end:
                return
            source = self._source(identity)
            if not source.open:
                return
            head = head_of(source)
            submission = self.get(head.key)
            if submission is None:
                raise TransientError("a submission is missing")  # it is written with its place, in one transaction
            if submission.attempt > attempts_at_first.setdefault(submission.key, submission.attempt) + 1:
                raise TransientError("a new signature is late again: the network's ticks are not plausible")
            try:
                if not self._advance_first(submission, head, source):
                    return
            except ChangedError:
                pass  # another caller advances it at the same time
        raise TransientError("other callers are writing to the ledger at the moment; try again")

    def _advance_first(self, submission: Submission, head: Place, source: Source) -> bool:
        """Advance the first submission of a queue by one step. Return False if it must wait."""
        if submission.is_open and submission.source == source.identity:
            if submission.tick != head.tick:
                return True  # signed again since the queue was read: it is not the first any more
            return self._decide(submission, source)
        if not submission.is_open:
            self._on_closed(submission)
        self._items.write(self._put_source(replace(source, open=tuple(each for each in source.open if each != head))))
        return True

    def _decide(self, submission: Submission, source: Source) -> bool:
        """Settle the transaction in flight. Return False if it is not final yet."""
        if submission.state == "signed":
            if refusal := self._refusal(submission):
                # It was never sent, so it certainly moves nothing.
                self._close(submission, "expired", f"expired: {refusal}; nothing was moved")
                return True
            if self._send(submission):
                return False
            self._sign_anew(submission, source)
            return True
        processed = self.chain.last_processed_tick().tick
        if processed < submission.tick:
            self._send(submission)
            return False
        if self.chain.transaction(submission.txid) is not None:
            # The id is the hash of the bytes, so these are the signed bytes, which contain the tick.
            self._close(submission, *self._moved(submission))
            return True
        if processed < submission.tick + EXPIRY_MARGIN_TICKS:
            return False
        if self._close_if_found(submission):
            return True
        if submission.kind == "transfer":
            self._close(
                submission, "expired", f"expired: tick {submission.tick} has passed without it, nothing was moved"
            )
        else:
            self._sign_anew(submission, source)
        return True

    def _refusal(self, submission: Submission) -> str:
        """Return the reason why an unsent transfer must not be sent; empty if it may, or is not a transfer."""
        if submission.kind != "transfer" and not submission.amount and submission.destination == submission.source:
            return ""
        if not self.sends_transfers:
            return "transfers are no longer enabled"
        try:
            self._rule_for(submission)
        except (PermanentError, InvalidInputError) as error:
            return error.message
        return ""

    def _sign_anew(self, submission: Submission, source: Source) -> None:
        try:
            key = self._wallets.key(submission.source)
        except PermanentError as error:
            self._close(submission, "failed", f"{error.code}: {error.message}")
            return
        if not self.chain.balance(submission.source).balance:
            metrics.count_one(REFUSED_METRIC)
            raise TransientError(f"{submission.source} has no balance: the network drops its transactions")
        logger().info("signed anew", extra={"submission": submission.key, "passed": submission.tick})
        try:
            self._sign(submission, key, submission, source, self._rule_for(submission) if submission.amount else None)
        except PermanentError as error:  # an unsent transfer
            self._close(submission, "expired", f"expired: {error.message}; nothing was moved")

    def _close_if_found(self, submission: Submission) -> Submission | None:
        """Close it if one of its transactions is in its tick. None: none is, and none will be.

        Raises TransientError while this is unknown.
        """
        signed = self._signed_for(submission)
        first = min(int(item["tick"]["N"]) for item in signed.values())
        for each in self._listed(submission.source, first, submission.tick):
            if each.txid in signed:
                found = replace(submission, txid=each.txid, tick=each.tick, encoded=each.transaction.encode())
                return self._close(found, *self._moved(found))
        if submission.amount:
            self._check_balance_agrees(submission)
        return None

    def _signed_for(self, submission: Submission) -> dict[str, Item]:
        """Return its signed transactions that may still appear, by id."""
        found = self._items.query(
            KeyConditionExpression="pk = :pk AND sk > :settled",
            ExpressionAttributeValues={
                ":pk": {"S": self._pk(submission.key)},
                ":settled": {"S": f"ATTEMPT#{submission.settled:06d}"},
            },
        )
        return {item["txid"]["S"]: item for item in found if item["sk"]["S"] != "SUBMISSION"}

    def _listed(self, identity: str, first_tick: int, last_tick: int) -> tuple[Included, ...]:
        """List an identity's transactions, from a node whose response confirms that it is past `last_tick`."""
        found = self.chain.sent(identity, first_tick, last_tick)
        if found.valid_for_tick < last_tick:
            raise TransientError("the node that lists transactions is behind")
        return found.transactions

    def _check_balance_agrees(self, submission: Submission) -> None:
        """Check that the balance shows no transfer that could be this one. Raises TransientError."""
        balance = self.chain.balance(submission.source)
        if balance.valid_for_tick < submission.tick:
            raise TransientError("the balance after the transfer is not known yet")
        newest = balance.latest_outgoing_transfer_tick
        if newest < submission.tick:
            return
        # The wallet's key is also used elsewhere, or look-ups are behind and do not show the transfer either.
        if any(each.transaction.amount for each in self._listed(submission.source, newest, newest)):
            return
        raise TransientError("the balance shows a transfer that look-ups do not show")

    def _moved(self, submission: Submission) -> tuple[State, str]:
        """Return the state of an included transfer: the network includes even a transfer that its source cannot pay.

        The RPC's `moneyFlew` is not used. Only one transaction of the source is in flight, so either its newest
        outgoing transfer is this one, or this one moved nothing.
        """
        if not submission.amount:
            return "confirmed", ""
        balance = self.chain.balance(submission.source)
        if balance.valid_for_tick < submission.tick:
            raise TransientError("the balance after the transfer is not known yet")
        newest = balance.latest_outgoing_transfer_tick
        if newest == submission.tick:
            return "confirmed", ""
        if newest < submission.tick:
            return "failed", f"{NO_EFFECT} tick {submission.tick} has it, and the source could not pay it"
        return "failed", f"{OUTCOME_UNKNOWN} the wallet's key is used elsewhere, too; look the transaction up"

    def _send(self, submission: Submission) -> bool:
        """Send it. Return False if it would probably arrive too late."""
        left = submission.tick - self.chain.tick_info().tick
        if left < (MIN_LEAD_TICKS if submission.state == "signed" else 1):
            return False
        if submission.state == "signed":
            # `broadcast` means that it may have been sent; `signed` means that it was not.
            self._items.write(self._put_submission(changed(submission, state="broadcast"), submission))
        try:
            self.chain.broadcast(submission.encoded)
        except PermanentError as error:
            # If the rejection persists, its tick passes without it. Before that, its loss is not certain.
            is_late = submission.tick <= self.chain.tick_info().tick  # which is no error
            log = logger().warning if is_late else logger().error
            log("the network rejects the transaction", extra={"submission": submission.key, "reason": error.message})
            if not is_late:
                metrics.count_one(REFUSED_METRIC)
        return True

    def _close(self, submission: Submission, state: State, error: str) -> Submission:
        """Store its end, and correct the counts of the limits in the same transaction."""
        closed = changed(submission, state=state, error=error)
        if closed.no_effect:
            closed = replace(closed, counted_on="")

        def counted(reservation: Reservation) -> list[Item]:
            nonlocal closed
            closed = replace(closed, counted_in=reservation.shares)
            return [self._put_submission(closed, submission)]

        self._write_counted(counted, lambda: self._recount(submission, closed))
        logger().info("closed", extra={"submission": closed.key, "state": state, "tick": closed.tick})
        return closed

    def _recount(self, before: Submission, closed: Submission) -> Reservation:
        """Subtract the counts of a transfer that moved nothing. A given-up transfer that is found counts again.

        The limits do not apply to a transfer that has moved.
        """
        if not closed.amount or closed.no_effect == before.no_effect:
            return Reservation(shares=before.counted_in)
        if not closed.no_effect:
            of_wallet = self.spending.of_wallet(before.source, before.amount)
            return self.spending.count_again(before.counted_in or [of_wallet])
        writes = self.spending.give_back(before.counted_in)
        if before.counted_on:
            writes += self.spending.give_back_of_day(before.source, before.amount, before.counted_on)
        return Reservation(shares=before.counted_in, writes=tuple(writes))

    def is_included(self, transaction: Transaction) -> bool:
        """Return whether the network has a transaction in its tick, by id or by its source's list.

        Raises TransientError while this is unknown.
        """
        if self.chain.transaction(transaction.id) is not None:
            return True
        listed = self._listed(encode_identity(transaction.source), transaction.tick, transaction.tick)
        return any(each.txid == transaction.id for each in listed)
