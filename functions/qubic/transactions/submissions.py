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

A refusal of a transfer is stored, too: a twin of the call that was refused can then not sign it in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from qaes.adapters.logs import logger
from qaes.domain.errors import LimitError, PermanentError, TransientError
from qaes.domain.ids import now, timestamp
from qaes.domain.qubic.identity import check_address
from qubic.items import ChangedError, attempts
from qubic.transactions.model import (
    INPUT_TYPES,
    MAX_OPEN,
    Kind,
    Source,
    Submission,
    changed,
    check_amount,
    check_metadata,
    check_reference,
)
from qubic.transactions.signing import LEAD_TICKS, transaction_of
from qubic.transactions.tracking import ADVANCE_SECONDS, Tracking
from qubic.wallets import Key, service_identity, service_key

MAX_OPEN_HASHES = 50
"""Beyond so many, no further hashes, nor transfers of the service's own wallet: policy and anchors find a place."""
_TOO_SMALL = "the source's balance is too small"


class Submissions(Tracking):
    """The service's submissions to one chain: each act once, under its key."""

    def submit_record(
        self, key: str, payload: bytes, *, kind: Kind, metadata: dict[str, Any], requested_by: str = ""
    ) -> Submission:
        """Write `payload` on the ledger, once for each `key`: amount 0, from the service's identity to itself.

        Raises
        ------
        PermanentError
            `key_conflict`: another payload was submitted under this key.
        InvalidInputError
            The metadata is larger than 4,096 bytes of canonical JSON.
        LimitError
            Too much is waiting to be written: later.
        TransientError
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
        return self._submit(wanted, lambda: signer)

    def submit_transfer(
        self,
        reference: str,
        *,
        source: str,
        destination: str,
        amount: int,
        run: int = 1,
        requested_by: str = "",
        agent: str = "",
        granted: Sequence[str] = (),
    ) -> Submission:
        """Move `amount` QU, once for each `reference`; one that moved nothing is signed anew only for a later `run`.

        It counts in the windows of its rule's limits from the transaction that stores the signature on, until the one
        that closes it as having moved nothing. In the windows of the limits whose keys are `granted`, it counts without
        a bound. A transfer that waits for its turn is judged again; once it was sent, nothing stops it.

        Raises
        ------
        InvalidInputError
            An address, the amount (1 to 10^15) or the reference is not acceptable.
        PermanentError
            The policy forbids it, by its code; `insufficient_balance`; `no_key`; `reference_conflict`: the reference
            stands for another transfer.
        LimitError
            Too much is waiting to be written: later.
        TransientError
            The ledger does not answer.
        """
        wanted = replace(
            self._wanted_transfer(reference, source, destination, amount, run),
            requested_by=requested_by,
            agent=agent,
            granted=tuple(granted),
        )
        return self._submit(wanted, lambda: self._wallets.parties(source, destination)[0])

    def simulate_transfer(
        self, reference: str, *, source: str, destination: str, amount: int, requested_by: str = "", agent: str = ""
    ) -> Submission:
        """Sign a transfer and send nothing: what a network shows whose transfers are not allowed here.

        Nothing is stored: the same call gives another tick, and so another id. Raises as `submit_transfer`.
        """
        wanted = self._wanted_transfer(reference, source, destination, amount, 1)
        wanted = replace(wanted, requested_by=requested_by, agent=agent)
        key, _ = self._wallets.parties(source, destination)
        self._rule_for(wanted)
        balance = self.chain.balance(key.identity).balance
        if balance < amount:
            raise PermanentError("insufficient_balance", _TOO_SMALL, balance=balance, amount=amount)
        tick = self.chain.tick_info().tick + LEAD_TICKS
        transaction = transaction_of(wanted, key, tick)
        return replace(
            wanted,
            state="simulated",
            tick=tick,
            txid=transaction.id,
            encoded=transaction.encode(),
            updated_at=wanted.created_at,
        )

    def _wanted_transfer(self, reference: str, source: str, destination: str, amount: int, run: int) -> Submission:
        check_reference(reference)
        check_amount(amount)
        return Submission(
            key=f"transfer:{reference}",
            network=self._network,
            kind="transfer",
            state="signed",
            source=self._wallets.identity(source, "source"),
            destination=self._wallets.identity(destination, "destination"),
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

    def _submit(self, wanted: Submission, find_key: Callable[[], Key]) -> Submission:
        """Sign it, unless that was done before: then no key is needed, and no policy asked."""
        for _ in attempts():
            before = self.get(wanted.key)
            if before is not None:
                _check_same(before, wanted)
                if not _may_be_repeated(before, wanted):
                    return self._adopted(before, wanted.run)
            key = find_key()
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
                except PermanentError as refusal:
                    self._store_refusal(wanted, before, refusal)
                    raise
            except ChangedError:
                continue
            self._send_soon(signed, alone=not source.open)
            return signed
        raise TransientError("others are writing to the ledger at the moment")

    def _check_queue(self, wanted: Submission, source: Source) -> None:
        may_wait = wanted.kind in {"hash", "instruction"} or (wanted.amount and wanted.source == service_identity())
        limit = MAX_OPEN_HASHES if may_wait else MAX_OPEN
        if len(source.open) >= limit:
            raise LimitError("the ledger has too much to write at the moment", max_open=limit)

    def _store_refusal(self, wanted: Submission, before: Submission | None, refusal: PermanentError) -> None:
        """Store that a transfer is refused in this run. Raises ChangedError when a twin was first.

        A refusal ends the step, so a twin call, which may have read another balance, must not sign it later.
        """
        refused = changed(
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
            raise TransientError("others are bringing it forward at the moment") from None
        return adopted

    def _check_balance(self, source: Source, amount: int) -> Source:
        """Refuse what the source cannot pay; return its queue as it was looked at.

        What others of this source will move counts as moved: the version of the queue guards that none is added.
        """
        found, available = self._available(source)
        if available < amount and source.open:
            self.advance(source.identity, seconds=ADVANCE_SECONDS)  # what is decided by now is out of the way
            source = self._source(source.identity)
            found, available = self._available(source)
        if available < amount:
            raise PermanentError("insufficient_balance", _TOO_SMALL, balance=found.balance, amount=amount)
        return source

    def _send_soon(self, signed: Submission, *, alone: bool) -> None:
        """Have it advanced, and send it if its turn has come; what fails here is the worker's to do."""
        with _left_to_the_worker(signed):
            self._on_signed(signed)
        with _left_to_the_worker(signed):
            if alone and (signed.kind != "transfer" or self.sends_transfers):
                self._send(signed)
            else:
                self.advance(signed.source, seconds=ADVANCE_SECONDS)


@contextmanager
def _left_to_the_worker(signed: Submission) -> Iterator[None]:
    try:
        yield
    except (TransientError, LimitError, ChangedError, BotoCoreError, ClientError) as error:
        logger().warning("not sent yet", extra={"submission": signed.key, "error": type(error).__name__})


def _check_same(before: Submission, wanted: Submission) -> None:
    """Refuse another act under the same key; metadata is a remark, and the first one stays.

    A record is the same under any key: the service's key may have been replaced meanwhile.
    """
    terms = ["kind", "amount", "input_type", "payload"]
    if wanted.kind == "transfer":
        terms += ["source", "destination"]
    if any(getattr(before, name) != getattr(wanted, name) for name in terms):
        if wanted.kind == "transfer":
            raise PermanentError("reference_conflict", "this reference was used for another transfer")
        raise PermanentError("key_conflict", "something else was written under this key")


def _may_be_repeated(before: Submission, wanted: Submission) -> bool:
    """Tell whether it is known to have had no effect, and may be signed anew.

    A transfer for a later execution of its task; a record whose key was not here any more, by the one that is.
    """
    if wanted.kind == "transfer":
        return before.no_effect and wanted.run > before.run
    return before.state == "failed" and before.error.startswith("no_key:")
