"""What the service has handed in to the network, or is about to: write-ahead records on the ledger table.

A transaction is signed and stored, bytes and id, before it is sent; so whatever crashes, the same bytes can be sent
again and their fate be found out. A submission is

    signed → broadcast → confirmed                     its tick has it
                       → (signed, for a later tick)    its tick passed without it: a record is signed anew
                       → expired                       the same for a transfer, which is never repeated by itself
                       → failed                        the tick has it, and it moved nothing
           → (signed, for a later tick)                its turn came too late to be sent at all

One transaction of a source is in flight at a time. Each has its own tick, later than that of the one before, and is
sent when that one's fate is known: so its id can be told at once, and still nothing overtakes. `broadcast` is written
before it is sent: what is still `signed` was never handed to the network, nor shown to anybody if it is a transfer.

"Its tick passed without it" ends a transfer, and has a record signed again; a node that is behind must not bring that
about. So it takes a look-up of the id, and a list of the source's transactions in which none that was ever signed for
this act is to be found; the list says itself up to which tick it goes. For a transfer, the balance must agree.

A refusal of a transfer is stored, too: a twin of the call that was refused can then not sign it in the same run.

Items (pk / sk; all with the network's name, so that what one network confirmed is never shown of another):
SUBMISSION#<network>#<key>/SUBMISSION  the present state
SUBMISSION#<network>#<key>/ATTEMPT#n   each transaction that was ever signed for it, never changed
TXID#<network>#<txid>/TXID             whose it is
SOURCE#<network>#<identity>/SOURCE     a source's queue: what is open; its version guards each signature
SOURCES#<network>/<identity>           which sources there are
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from typing import Any, Literal

from botocore.exceptions import BotoCoreError, ClientError

from qaes.adapters import metrics, settings
from qaes.adapters.logs import logger
from qaes.domain.anchor import ANCHOR_INPUT_TYPE
from qaes.domain.canonical import canonical_json
from qaes.domain.errors import InvalidInputError, LimitError, RefusedError, UnavailableError
from qaes.domain.ids import now, timestamp
from qaes.domain.policy import PolicyDecision
from qaes.domain.qubic import MAX_QU
from qaes.domain.qubic.identity import check_address, encode_identity
from qaes.domain.qubic.transaction import Transaction
from qubic.chain.base import Balance, Chain, Included
from qubic.items import ChangedError, Item, Items, attempts, item_key
from qubic.spending import Spending
from qubic.wallets import Key, Wallets, public_key, service_identity, service_key

Kind = Literal["hash", "instruction", "anchor", "policy", "transfer"]
State = Literal["signed", "broadcast", "confirmed", "expired", "failed", "simulated"]
OPEN: frozenset[State] = frozenset({"signed", "broadcast"})
INPUT_TYPES: dict[Kind, int] = {
    "hash": 0x5148,
    "instruction": 0x5149,
    "anchor": ANCHOR_INPUT_TYPE,
    "policy": 0x5150,
    "transfer": 0,
}
"""One for each kind of record, in the signed bytes: the record of one kind is never that of another."""

LEAD_TICKS = 15
"""How far ahead the named tick is (Qubic's documents: 15 to 20), and how far the ticks of one source are apart."""
MIN_LEAD_TICKS = 3
"""What has fewer ticks left when its turn comes is not sent any more: it would hardly get there."""
MAX_TICKS_AHEAD = 2_000
"""A present tick so far beyond what look-ups know is not believed: a source's ticks only go up."""
EXPIRY_MARGIN_TICKS = 5
"""Absent counts only so many ticks after the named one: nodes behind one address may not all be at the same tick."""
MAX_OPEN = 100
"""Most open submissions of one source; beyond, the ledger is busy."""
MAX_OPEN_HASHES = 50
"""Beyond so many, no further hashes, nor transfers of the service's own wallet: policy and anchors find a place."""
KEPT_BALANCE = 1
"""What the service's own wallet keeps, in QU: the network takes nothing of a source without any balance."""
FOLLOW_SECONDS = 5.0
"""How long a request follows a source's queue: what is left is the writer's."""
MAX_METADATA_BYTES = 4096
MAX_REFERENCE_CHARACTERS = 256
REFUSED_METRIC = "LedgerRefused"
_TOO_SMALL = "the source's balance is too small"


@dataclass(frozen=True)
class Submission:
    """One act on the ledger under one `key`, and the transaction that is to do it, or has done it.

    Attributes
    ----------
    key
        `hash:<sha256>`, `instruction:<sha256>`, `anchor:<log id>:<sequence>`, `policy:<version>` or
        `transfer:<reference>`.
    source, destination
        Identities.
    attempt
        How many transactions were signed for it; `txid`, `tick` and `encoded` are those of the one that is confirmed,
        or of the newest.
    settled
        How many of them, from the first, are in their tick and have moved nothing.
    run
        For a transfer: which of the task's executions asked for it.
    requested_by
        The task's requester, or the operator who wrote a hash; empty for the system's own records.
    error
        Why it expired or failed: `expired`, `moved_nothing`, `moved_unknown`, `no_key` or a refusal's code, and a text.
    address
        Of a transfer: the destination as the caller named it, which the policy's limits are about.
    counted_on
        The day on which a transfer's amount counts as spent; empty: on none.
    """

    key: str
    network: str
    kind: Kind
    state: State
    source: str
    destination: str
    amount: int
    input_type: int
    payload: bytes
    metadata: dict[str, Any]
    attempt: int
    run: int
    tick: int
    txid: str
    encoded: bytes
    created_at: str
    updated_at: str
    error: str = ""
    version: int = 0
    settled: int = 0
    requested_by: str = ""
    address: str = ""
    counted_on: str = ""

    @property
    def is_open(self) -> bool:
        return self.state in OPEN

    @property
    def moved_nothing(self) -> bool:
        """Whether a transfer has ended, and is known to have moved nothing: it may be asked for anew."""
        return self.state == "expired" or (self.state == "failed" and not self.error.startswith("moved_unknown:"))

    @property
    def may_be_found(self) -> bool:
        """Whether it has ended without effect, and one of its transactions may turn up in its tick all the same."""
        return self.attempt > self.settled and (self.state == "expired" or (self.state == "failed" and not self.txid))

    def answer(self) -> dict[str, Any]:
        """Tell what other services may know of it, as JSON.

        The bytes of a transfer that was not sent are nobody's: who has them could send them.
        """
        is_shown = self.kind != "transfer" or self.state not in {"signed", "simulated"}
        return {
            "state": self.state,
            "txid": self.txid,
            "tick": self.tick,
            "timestamp": self.updated_at,
            "source": self.source,
            "encoded": base64.b64encode(self.encoded).decode() if is_shown else "",
            "network": self.network,
            "error": self.error or None,
        }


@dataclass(frozen=True)
class _Place:
    """A place in a source's queue."""

    tick: int
    key: str
    amount: int


@dataclass(frozen=True)
class _Source:
    """A source's queue; `last_tick` is the newest tick that was ever named."""

    identity: str
    version: int = 0
    last_tick: int = 0
    open: tuple[_Place, ...] = ()


class Submissions:
    """The service's submissions to one chain.

    Parameters
    ----------
    chain
        The network.
    table
        By default that of LEDGER_TABLE.
    on_signed
        Told of each new submission, once it is stored: somebody has to follow it.
    on_closed
        Told of each submission that is not open any more; at least once, before anything else of its source goes on.
    rule_for
        Called before a transfer is signed, before one that has waited is sent, and before one is signed for a later
        tick. Returns the rule that lets it pass; raises RefusedError if there is none.
    sends_transfers
        False: a transfer that was not sent yet is not sent any more.
    clock
        The present moment, whose day a transfer counts on.
    """

    def __init__(
        self,
        chain: Chain,
        table: str | None = None,
        *,
        on_signed: Callable[[Submission], None] = lambda _: None,
        on_closed: Callable[[Submission], None] = lambda _: None,
        rule_for: Callable[[Submission], PolicyDecision | None] = lambda _: None,
        sends_transfers: bool = True,
        clock: Callable[[], datetime] | None = None,
    ) -> None:
        self.chain = chain
        self._network = chain.network
        self._table = table or settings.text("LEDGER_TABLE")
        self._items = Items(self._table)
        self._wallets = Wallets(chain.network)
        self._on_signed = on_signed
        self._on_closed = on_closed
        self._rule_for = rule_for
        self.sends_transfers = sends_transfers
        self.spending = Spending(self._items, self._network, clock=clock)

    # Handing in

    def submit_record(
        self, key: str, payload: bytes, *, kind: Kind, metadata: dict[str, Any], requested_by: str = ""
    ) -> Submission:
        """Write `payload` on the ledger, once for each `key`: amount 0, from the service's identity to itself.

        Raises
        ------
        RefusedError
            `key_conflict`: another payload was submitted under this key.
        InvalidInputError
            The metadata is larger than 4,096 bytes of canonical JSON.
        LimitError
            Too much is waiting to be written: later.
        UnavailableError
            The ledger does not answer.
        """
        signer = service_key()
        wanted = Submission(
            key=key,
            network=self._network,
            kind=kind,
            state="signed",
            source=signer.identity,
            destination=signer.identity,
            amount=0,
            input_type=INPUT_TYPES[kind],
            payload=payload,
            metadata=check_metadata(metadata),
            requested_by=requested_by,
            attempt=0,
            run=1,
            tick=0,
            txid="",
            encoded=b"",
            created_at=timestamp(now()),
            updated_at="",
        )
        return self._submit(wanted, signer)

    def submit_transfer(
        self,
        reference: str,
        *,
        source: str,
        destination: str,
        amount: int,
        run: int = 1,
        requested_by: str = "",
    ) -> Submission:
        """Move `amount` QU, once for each `reference`; one that moved nothing is signed anew only for a later `run`.

        Its amount counts as spent from the transaction that stores the signature on, until the one that closes it as
        having moved nothing. A transfer that waits for its turn is judged again; once it was sent, nothing stops it.

        Raises
        ------
        InvalidInputError
            An address, the amount (1 to 10^15) or the reference is not acceptable.
        RefusedError
            The policy forbids it, by its code; `insufficient_balance`; `no_key`; `reference_conflict`: the reference
            stands for another transfer.
        LimitError
            Too much is waiting to be written: later.
        UnavailableError
            The ledger does not answer.
        """
        wanted, key = self._wanted_transfer(reference, source, destination, amount, run)
        return self._submit(replace(wanted, requested_by=requested_by), key)

    def simulate_transfer(self, reference: str, *, source: str, destination: str, amount: int) -> Submission:
        """Sign a transfer and send nothing: what a network shows whose transfers are not allowed here.

        Nothing is stored: the same call gives another tick, and so another id. Raises as `submit_transfer`.
        """
        wanted, key = self._wanted_transfer(reference, source, destination, amount, 1)
        self._rule_for(wanted)
        balance = self.chain.balance(key.identity).balance
        if balance < amount:
            raise RefusedError("insufficient_balance", _TOO_SMALL, balance=balance, amount=amount)
        tick = self.chain.tick_info().tick + LEAD_TICKS
        transaction = _transaction(wanted, key, tick)
        return replace(
            wanted,
            state="simulated",
            tick=tick,
            txid=transaction.id,
            encoded=transaction.encode(),
            updated_at=wanted.created_at,
        )

    def _wanted_transfer(
        self, reference: str, source: str, destination: str, amount: int, run: int
    ) -> tuple[Submission, Key]:
        check_reference(reference)
        check_amount(amount)
        key, to = self._wallets.parties(source, destination)
        wanted = Submission(
            key=f"transfer:{reference}",
            network=self._network,
            kind="transfer",
            state="signed",
            source=key.identity,
            destination=to,
            amount=amount,
            input_type=0,
            payload=b"",
            metadata={"reference": reference},
            address=check_address(destination),
            attempt=0,
            run=run,
            tick=0,
            txid="",
            encoded=b"",
            created_at=timestamp(now()),
            updated_at="",
        )
        return wanted, key

    def _submit(self, wanted: Submission, key: Key) -> Submission:
        for _ in attempts():
            before = self.get(wanted.key)
            if before is not None:
                _check_same(before, wanted)
                if not _may_be_repeated(before, wanted):
                    return self._adopted(before, wanted.run)
            try:
                if before is not None and before.may_be_found and (found := self._close_if_found(before)):
                    self._on_closed(found)
                    continue
                source = self._source(wanted.source)
                self._check_queue(wanted, source)
                try:
                    rule = self._rule_for(wanted) if wanted.amount else None
                    if wanted.amount:
                        source = self._check_balance(source, wanted.amount)
                    signed = self._sign(wanted, key, before, source, rule)
                except RefusedError as refusal:
                    self._store_refusal(wanted, before, refusal)
                    raise
            except ChangedError:
                continue
            self._send_soon(signed, alone=not source.open)
            return signed
        raise UnavailableError("others are writing to the ledger at the moment")

    def _check_queue(self, wanted: Submission, source: _Source) -> None:
        may_wait = wanted.kind in {"hash", "instruction"} or (wanted.amount and wanted.source == service_identity())
        limit = MAX_OPEN_HASHES if may_wait else MAX_OPEN
        if len(source.open) >= limit:
            raise LimitError("the ledger has too much to write at the moment", max_open=limit)

    def _store_refusal(self, wanted: Submission, before: Submission | None, refusal: RefusedError) -> None:
        """Store that a transfer is refused in this run. Raises ChangedError when a twin was first.

        Whoever is refused ends the step; so a twin, which may have read another balance, must not sign it later.
        """
        refused = _changed(
            before or wanted,
            state="failed",
            error=f"{refusal.code}: {refusal.message}",
            txid="",
            encoded=b"",
            run=wanted.run,
        )
        self._items.write(self._put_submission(refused, before))

    def _adopted(self, before: Submission, run: int) -> Submission:
        """Return it; what is under way is a later run's from now on: its end is not taken for an earlier one's."""
        if not before.is_open or run <= before.run:
            return before
        adopted = replace(before, run=run, version=before.version + 1)
        try:
            self._items.write(self._put_submission(adopted, before))
        except ChangedError:
            raise UnavailableError("others are bringing it forward at the moment") from None
        return adopted

    def _check_balance(self, source: _Source, amount: int) -> _Source:
        """Refuse what the source cannot pay; return its queue as it was looked at.

        What others of this source will move counts as moved: the version of the queue guards that none is added.
        """
        found, available = self._available(source)
        if available < amount and source.open:
            self.follow(source.identity, seconds=FOLLOW_SECONDS)  # what is decided by now is out of the way
            source = self._source(source.identity)
            found, available = self._available(source)
        if available < amount:
            raise RefusedError("insufficient_balance", _TOO_SMALL, balance=found.balance, amount=amount)
        return source

    def available(self, identity: str) -> tuple[Balance, int]:
        """Return an identity's balance, and what of it is not promised to its transfers in flight: 0 at least."""
        balance, available = self._available(self._source(identity))
        return balance, max(available, 0)

    def _available(self, source: _Source) -> tuple[Balance, int]:
        """Return the balance, and what of it is not promised.

        What was sent and has its tick behind it is in the balance, or moves nothing; only the first can be that far.
        """
        found = self.chain.balance(source.identity)
        promised = sum(place.amount for place in source.open)
        if source.identity == service_identity():
            promised += KEPT_BALANCE
        if source.open:
            head = _head(source)
            submission = self.get(head.key) if head.tick <= found.valid_for_tick else None
            if submission is not None and submission.tick == head.tick and submission.state != "signed":
                promised -= head.amount
        return found, found.balance - promised

    def _sign(
        self, wanted: Submission, key: Key, before: Submission | None, source: _Source, rule: PolicyDecision | None
    ) -> Submission:
        """Sign for a tick that is free, and store it, with what it spends: the commit point.

        Raises ChangedError when others were first, RefusedError when the day's limit has no room.
        """
        tick = max(self._present_tick(), source.last_tick) + LEAD_TICKS
        transaction = _transaction(wanted, key, tick)
        counted_on, spends = self._spend(wanted, rule)
        signed = replace(
            wanted,
            state="signed",
            tick=tick,
            txid=transaction.id,
            encoded=transaction.encode(),
            attempt=(before.attempt if before else 0) + 1,
            settled=_settled_before(before),
            counted_on=counted_on,
            created_at=before.created_at if before else wanted.created_at,
            updated_at=timestamp(now()),
            version=(before.version if before else 0) + 1,
            error="",
        )
        places = tuple(place for place in source.open if place.key != signed.key)
        queue = replace(source, last_tick=tick, open=(*places, _Place(tick, signed.key, signed.amount)))
        writes = [
            self._put_submission(signed, before),
            self._items.put_new(item_key(self._pk(signed.key), f"ATTEMPT#{signed.attempt:06d}") | _signed(signed)),
            self._items.put_new(
                item_key(f"TXID#{self._network}#{signed.txid}", "TXID") | {"key": {"S": signed.key}} | _signed(signed)
            ),
            self._put_source(queue),
            *spends,
        ]
        if source.version == 0:
            named = item_key(f"SOURCES#{self._network}", source.identity)
            writes.append({"Put": {"TableName": self._table, "Item": named}})
        self._items.write(*writes)
        return signed

    def _spend(self, wanted: Submission, rule: PolicyDecision | None) -> tuple[str, list[Item]]:
        """Return the day on which a transfer counts, and what its signature's transaction writes for that.

        One that is signed again on a later day, not having been sent, counts on that day instead.
        """
        today = self.spending.today()
        if not wanted.amount or wanted.counted_on == today:
            return wanted.counted_on, []
        if rule is not None and (refusal := self.spending.refusal_today(rule, wanted.source, wanted.amount)):
            raise refusal
        writes = [self.spending.add(wanted.source, wanted.amount, today, rule.daily_limit if rule else None)]
        if wanted.counted_on:
            writes += self.spending.give_back(wanted.source, wanted.amount, wanted.counted_on)
        return today, writes

    def _present_tick(self) -> int:
        """Return the present tick, if it can be true: a wrong one would hold up its source for ever."""
        tick, processed = self.chain.tick_info().tick, self.chain.last_processed_tick().tick
        if tick > processed + MAX_TICKS_AHEAD:
            raise UnavailableError(f"the present tick is said to be {tick}, look-ups are at {processed}")
        return max(tick, processed)

    def _send_soon(self, signed: Submission, *, alone: bool) -> None:
        """Have it followed, and send it if its turn has come; what fails here is the writer's to do."""
        with _left_to_the_writer(signed):
            self._on_signed(signed)
        with _left_to_the_writer(signed):
            if alone and (signed.kind != "transfer" or self.sends_transfers):
                self._send(signed)
            else:
                self.follow(signed.source, seconds=FOLLOW_SECONDS)

    # Following

    def follow(self, identity: str, *, seconds: float = 15) -> None:
        """Bring a source's queue forward as far as it goes now; called by anybody, at any time.

        After so many `seconds` nothing further is begun. Raises UnavailableError when the network does not answer: to
        be called again.
        """
        end = time.monotonic() + seconds
        attempts_at_first: dict[str, int] = {}
        for look in range(4 * MAX_OPEN):
            if look and time.monotonic() > end:
                return
            source = self._source(identity)
            if not source.open:
                return
            head = _head(source)
            submission = self.get(head.key)
            if submission is None:
                raise UnavailableError("a submission is missing")  # written with its place, in one transaction
            if submission.attempt > attempts_at_first.setdefault(submission.key, submission.attempt) + 1:
                raise UnavailableError("what was just signed is late again: the network's ticks are not to be trusted")
            try:
                if not self._bring_forward(submission, head, source):
                    return
            except ChangedError:
                pass  # somebody else brings it forward at the same time
        raise UnavailableError("others are writing to the ledger at the moment")

    def _bring_forward(self, submission: Submission, head: _Place, source: _Source) -> bool:
        """Take the next step with the first of a queue; False when there is none yet."""
        if submission.is_open and submission.source == source.identity:
            if submission.tick != head.tick:
                return True  # signed anew since the queue was read: it is not the first any more
            return self._decide(submission, source)
        if not submission.is_open:
            self._on_closed(submission)
        self._items.write(self._put_source(replace(source, open=tuple(each for each in source.open if each != head))))
        return True

    def _decide(self, submission: Submission, source: _Source) -> bool:
        """Find out the fate of what is in flight; False when there is none yet."""
        if submission.state == "signed":
            if refusal := self._refusal(submission):
                # No byte of it has left: that it moves nothing is certain.
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
            # The id is that of the bytes, so these are the bytes that were signed; the tick is in them.
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
        """Return why a transfer that was never sent may not be sent any more; empty if it may, or is none."""
        if submission.kind != "transfer" and not submission.amount and submission.destination == submission.source:
            return ""
        if not self.sends_transfers:
            return "transfers are not allowed any more"
        try:
            self._rule_for(submission)
        except (RefusedError, InvalidInputError) as error:
            return error.message
        return ""

    def _sign_anew(self, submission: Submission, source: _Source) -> None:
        try:
            key = self._wallets.key(submission.source)
        except RefusedError as error:
            self._close(submission, "failed", f"{error.code}: {error.message}")
            return
        if not self.chain.balance(submission.source).balance:
            metrics.count_one(REFUSED_METRIC)
            raise UnavailableError(f"{submission.source} has no balance: the network takes nothing of it")
        logger().info("signed anew", extra={"submission": submission.key, "passed": submission.tick})
        try:
            self._sign(submission, key, submission, source, self._rule_for(submission) if submission.amount else None)
        except RefusedError as error:  # it is a transfer that was never sent
            self._close(submission, "expired", f"expired: {error.message}; nothing was moved")

    def _close_if_found(self, submission: Submission) -> Submission | None:
        """Close it if a transaction that was ever signed for it is in its tick. None: none is, and none will be.

        Raises UnavailableError while that cannot be told.
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
        """Return what was signed for it and may still be found, by id."""
        found = self._items.query(
            KeyConditionExpression="pk = :pk AND sk > :settled",
            ExpressionAttributeValues={
                ":pk": {"S": self._pk(submission.key)},
                ":settled": {"S": f"ATTEMPT#{submission.settled:06d}"},
            },
        )
        return {item["txid"]["S"]: item for item in found if item["sk"]["S"] != "SUBMISSION"}

    def _listed(self, identity: str, first_tick: int, last_tick: int) -> tuple[Included, ...]:
        """List what an identity sent, from a node that has got past `last_tick`; it says so in the same answer."""
        found = self.chain.sent(identity, first_tick, last_tick)
        if found.valid_for_tick < last_tick:
            raise UnavailableError("the node that lists transactions is behind")
        return found.transactions

    def _check_balance_agrees(self, submission: Submission) -> None:
        """Check that the balance has no transfer that may be this one. Raises UnavailableError."""
        balance = self.chain.balance(submission.source)
        if balance.valid_for_tick < submission.tick:
            raise UnavailableError("the balance after the transfer is not known yet")
        newest = balance.latest_outgoing_transfer_tick
        if newest < submission.tick:
            return
        # The wallet's key is used elsewhere, too; or look-ups are behind, and then they do not have that one either.
        if any(each.transaction.amount for each in self._listed(submission.source, newest, newest)):
            return
        raise UnavailableError("the balance shows a transfer that look-ups do not")

    def _moved(self, submission: Submission) -> tuple[State, str]:
        """Tell whether an included transfer moved something; one that its source cannot pay is included, too.

        What the RPC says of that (`moneyFlew`) is not relied on. Only one transaction of the source is in flight, so
        its newest outgoing transfer is this one, or this one moved nothing.
        """
        if not submission.amount:
            return "confirmed", ""
        balance = self.chain.balance(submission.source)
        if balance.valid_for_tick < submission.tick:
            raise UnavailableError("the balance after the transfer is not known yet")
        newest = balance.latest_outgoing_transfer_tick
        if newest == submission.tick:
            return "confirmed", ""
        if newest < submission.tick:
            return "failed", f"moved_nothing: tick {submission.tick} has it, and the source could not pay it"
        return "failed", "moved_unknown: the wallet's key is used elsewhere, too; look the transaction up"

    def _send(self, submission: Submission) -> bool:
        """Send it; False when it could hardly get there in time."""
        left = submission.tick - self.chain.tick_info().tick
        if left < (MIN_LEAD_TICKS if submission.state == "signed" else 1):
            return False
        if submission.state == "signed":
            # Whoever finds it so does not know whether it was sent; whoever finds it `signed`, that it was not.
            self._items.write(self._put_submission(_changed(submission, state="broadcast"), submission))
        try:
            self.chain.broadcast(submission.encoded)
        except RefusedError as error:
            # Its tick will pass without it, if that stays so; nothing is known to be lost before.
            logger().error("the network refuses it", extra={"submission": submission.key, "reason": error.message})
            if submission.tick > self.chain.tick_info().tick:  # else it came too late, which is nobody's fault
                metrics.count_one(REFUSED_METRIC)
        return True

    def _close(self, submission: Submission, state: State, error: str) -> Submission:
        """Store how it has ended, and in the same transaction give back what it did not spend, or count what it did."""
        closed = _changed(submission, state=state, error=error)
        spends: list[Item] = []
        if closed.counted_on and closed.moved_nothing:
            spends = self.spending.give_back(closed.source, closed.amount, closed.counted_on)
            closed = replace(closed, counted_on="")
        elif closed.amount and not closed.counted_on and not closed.moved_nothing:
            # It was given up, and has been found after all: no limit undoes that.
            closed = replace(closed, counted_on=self.spending.today())
            spends = [self.spending.add(closed.source, closed.amount, closed.counted_on)]
        self._items.write(self._put_submission(closed, submission), *spends)
        logger().info("closed", extra={"submission": closed.key, "state": state, "tick": closed.tick})
        return closed

    # Reading

    def get(self, key: str) -> Submission | None:
        """The submission under `key`."""
        item = self._items.get(self._pk(key), "SUBMISSION")
        return _submission(item) if item else None

    def attempt(self, txid: str) -> Submission | None:
        """The submission for which this transaction was signed, with the transaction's own bytes, tick and id.

        If a later one was signed, the state is `expired`: this one is in no tick.
        """
        item = self._items.get(f"TXID#{self._network}#{txid}", "TXID")
        if item is None:
            return None
        found = self.get(item["key"]["S"])
        if found is None or found.txid == txid:
            return found
        return replace(found, state="expired", txid=txid, tick=int(item["tick"]["N"]), encoded=item["encoded"]["B"])

    def is_included(self, transaction: Transaction) -> bool:
        """Tell whether the network has a transaction in its tick, by id or by its source's list.

        Raises UnavailableError while that cannot be told.
        """
        if self.chain.transaction(transaction.id) is not None:
            return True
        listed = self._listed(encode_identity(transaction.source), transaction.tick, transaction.tick)
        return any(each.txid == transaction.id for each in listed)

    def open_sources(self) -> list[str]:
        """The identities that have something open."""
        found = self._items.query(
            KeyConditionExpression="pk = :pk",
            ExpressionAttributeValues={":pk": {"S": f"SOURCES#{self._network}"}},
        )
        identities = [item["sk"]["S"] for item in found]
        return [identity for identity in identities if self._source(identity).open]

    def _source(self, identity: str) -> _Source:
        item = self._items.get(f"SOURCE#{self._network}#{identity}", "SOURCE")
        if item is None:
            return _Source(identity)
        places = tuple(_Place(*each) for each in json.loads(item["open"]["S"]))
        return _Source(identity, int(item["version"]["N"]), int(item["last_tick"]["N"]), places)

    # DynamoDB

    def _pk(self, key: str) -> str:
        return f"SUBMISSION#{self._network}#{key}"

    def _put_submission(self, submission: Submission, before: Submission | None) -> Item:
        return self._items.put_after(_submission_item(submission), before.version if before else 0)

    def _put_source(self, source: _Source) -> Item:
        item = item_key(f"SOURCE#{self._network}#{source.identity}", "SOURCE") | {
            "version": {"N": str(source.version + 1)},
            "last_tick": {"N": str(source.last_tick)},
            "open": {"S": json.dumps([[place.tick, place.key, place.amount] for place in source.open])},
        }
        return self._items.put_after(item, source.version)


def check_reference(reference: object) -> str:
    """Return a reference. Raises InvalidInputError."""
    if not isinstance(reference, str) or not 0 < len(reference) <= MAX_REFERENCE_CHARACTERS:
        raise InvalidInputError(f"the reference has 1 to {MAX_REFERENCE_CHARACTERS} characters", field="reference")
    return reference


def check_amount(amount: object) -> int:
    """Return an amount in QU. Raises InvalidInputError."""
    if isinstance(amount, bool) or not isinstance(amount, int) or not 0 < amount <= MAX_QU:
        raise InvalidInputError("the amount is a whole number from 1 to 10^15", field="amount")
    return amount


def check_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a record. Raises InvalidInputError."""
    try:
        size = len(canonical_json(metadata).encode())
    except InvalidInputError as error:
        raise InvalidInputError(error.message, field="metadata") from error
    if size > MAX_METADATA_BYTES:
        raise InvalidInputError(f"the metadata has at most {MAX_METADATA_BYTES} bytes", field="metadata")
    return metadata


@contextmanager
def _left_to_the_writer(signed: Submission) -> Iterator[None]:
    try:
        yield
    except (UnavailableError, LimitError, ChangedError, BotoCoreError, ClientError) as error:
        logger().warning("not sent yet", extra={"submission": signed.key, "error": type(error).__name__})


def _head(source: _Source) -> _Place:
    """Tell whose turn it is in a queue that is not empty."""
    return min(source.open, key=lambda place: place.tick)


def _transaction(wanted: Submission, key: Key, tick: int) -> Transaction:
    return Transaction(
        key.public_key, public_key(wanted.destination), wanted.amount, tick, wanted.input_type, wanted.payload
    ).sign(key.subseed)


def _check_same(before: Submission, wanted: Submission) -> None:
    """Refuse another act under the same key; metadata is a remark, and the first one stays.

    A record is the same whoever signs it: the service's key may have been replaced meanwhile.
    """
    terms = ["kind", "amount", "input_type", "payload"]
    if wanted.kind == "transfer":
        terms += ["source", "destination"]
    if any(getattr(before, name) != getattr(wanted, name) for name in terms):
        if wanted.kind == "transfer":
            raise RefusedError("reference_conflict", "this reference was used for another transfer")
        raise RefusedError("key_conflict", "something else was written under this key")


def _settled_before(before: Submission | None) -> int:
    """Tell how many of the transactions signed before are in their tick, and have moved nothing."""
    if before is None:
        return 0
    return before.attempt if before.state == "failed" and before.txid else before.settled


def _may_be_repeated(before: Submission, wanted: Submission) -> bool:
    """Tell whether it is known to have had no effect, and may be signed anew.

    A transfer for a later execution of its task; a record whose key was not here any more, by the one that is.
    """
    if wanted.kind == "transfer":
        return before.moved_nothing and wanted.run > before.run
    return before.state == "failed" and before.error.startswith("no_key:")


def _changed(submission: Submission, **changes: Any) -> Submission:
    return replace(submission, updated_at=timestamp(now()), version=submission.version + 1, **changes)


def _signed(submission: Submission) -> Item:
    return {
        "txid": {"S": submission.txid},
        "tick": {"N": str(submission.tick)},
        "encoded": {"B": submission.encoded},
        "signed_at": {"S": submission.updated_at},
    }


def _submission_item(submission: Submission) -> Item:
    item = item_key(f"SUBMISSION#{submission.network}#{submission.key}", "SUBMISSION")
    for name, value in asdict(submission).items():
        if isinstance(value, bytes):
            item[name] = {"B": value}
        elif isinstance(value, int):
            item[name] = {"N": str(value)}
        else:  # metadata stays text: DynamoDB would make Decimals of its numbers
            item[name] = {"S": value if isinstance(value, str) else canonical_json(value)}
    return item


def _submission(item: Item) -> Submission:
    fields: dict[str, Any] = {}
    for name, attribute in item.items():
        if name not in {"pk", "sk"}:
            [(kind, value)] = attribute.items()
            fields[name] = int(value) if kind == "N" else bytes(value) if kind == "B" else value
    return Submission(**fields | {"metadata": json.loads(fields["metadata"])})
