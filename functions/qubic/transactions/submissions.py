"""Submissions to the network: write-ahead records in the ledger table.

A transaction is signed and stored, with bytes and id, before it is sent. After any crash, the same bytes can therefore
be sent again and tracked. A submission is

    signed → broadcast → confirmed                     its tick has it
                       → (signed, for a later tick)    its tick passed without it: a record is signed again
                       → expired                       its tick passed without it: a transfer is never repeated
                       → failed                        the tick has it, but it moved nothing
           → (signed, for a later tick)                its turn came too late to send it

One transaction of a source is in flight at a time. Each has its own tick, later than the previous one's, and is sent
when the previous one is final. Its id is therefore known at once, and no transaction overtakes another. `broadcast` is
written before it is sent: a transaction that is still `signed` was never sent, and a transfer's bytes never disclosed.

The rejection of a transfer is stored too, so that a concurrent copy of the call cannot sign it in the same run.
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
"""With more, the queue rejects hashes and transfers of the service's wallet, to leave room for policy and anchors."""
_TOO_SMALL = "the source's balance is too small"


class Submissions(Tracking):
    """The service's submissions to one chain: each act once for its key."""

    def submit_record(
        self, key: str, payload: bytes, *, kind: Kind, metadata: dict[str, Any], requested_by: str = ""
    ) -> Submission:
        """Record `payload` on the ledger, once for each `key`: amount 0, from the service's identity to itself.

        Raises
        ------
        PermanentError
            `key_conflict`: another payload was submitted under this key.
        InvalidInputError
            The metadata is larger than 4,096 bytes of canonical JSON.
        LimitError
            The ledger's queue is full. Try again later.
        TransientError
            The ledger does not respond.
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
        """Move `amount` QU, once for each `reference`. Only a later `run` repeats a transfer that moved nothing.

        It counts in the windows of its rule's limits from the DynamoDB transaction that stores the signature to the one
        that closes it without effect. In the windows of the limits whose keys are `granted`, it counts without a bound.
        A transfer that waits for its turn is checked again; a sent transfer cannot be stopped.

        Raises
        ------
        InvalidInputError
            An address, the amount (1 to 10^15) or the reference is invalid.
        PermanentError
            The policy forbids it (code of the rule); `insufficient_balance`; `no_key`; `reference_conflict`: the
            reference belongs to another transfer.
        LimitError
            The ledger's queue is full. Try again later.
        TransientError
            The ledger does not respond.
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
        """Sign a transfer without sending it, for a network whose transfers are not enabled.

        Nothing is stored: a repetition has another tick and another id. Raises as `submit_transfer`.
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
        """Sign it, unless it was signed before: then neither key nor policy is needed."""
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
        raise TransientError("other callers are writing to the ledger at the moment; try again")

    def _check_queue(self, wanted: Submission, source: Source) -> None:
        may_wait = wanted.kind in {"hash", "instruction"} or (wanted.amount and wanted.source == service_identity())
        limit = MAX_OPEN_HASHES if may_wait else MAX_OPEN
        if len(source.open) >= limit:
            raise LimitError("the ledger's queue is full; try again later", max_open=limit)

    def _store_refusal(self, wanted: Submission, before: Submission | None, refusal: PermanentError) -> None:
        """Store the rejection of a transfer in this run. Raises ChangedError if another call was first.

        A rejection ends the step. A concurrent call, which may have read another balance, must not sign it later.
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
        """Assign a transfer in flight to this run, so that its end counts for this run only; return the submission."""
        if not before.is_open or run <= before.run:
            return before
        adopted = replace(before, run=run, version=before.version + 1)
        try:
            self._items.write(self._put_submission(adopted, before))
        except ChangedError:
            raise TransientError("other callers are advancing it at the moment; try again") from None
        return adopted

    def _check_balance(self, source: Source, amount: int) -> Source:
        """Reject a transfer that the source cannot pay; return the queue that was checked.

        Other transfers of this source count as moved. The queue's version guards that no further one is added.
        """
        found, available = self._available(source)
        if available < amount and source.open:
            self.advance(source.identity, seconds=ADVANCE_SECONDS)  # close the transactions that are final
            source = self._source(source.identity)
            found, available = self._available(source)
        if available < amount:
            raise PermanentError("insufficient_balance", _TOO_SMALL, balance=found.balance, amount=amount)
        return source

    def _send_soon(self, signed: Submission, *, alone: bool) -> None:
        """Enqueue it, and send it if its turn has come. After a failure, the transaction worker continues."""
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
        logger().warning(
            "the transaction is not sent yet", extra={"submission": signed.key, "error": type(error).__name__}
        )


def _check_same(before: Submission, wanted: Submission) -> None:
    """Reject a different act under the same key. Metadata is a remark: the first one stays.

    A record is the same under any signing key, because the service's key may have been replaced.
    """
    terms = ["kind", "amount", "input_type", "payload"]
    if wanted.kind == "transfer":
        terms += ["source", "destination"]
    if any(getattr(before, name) != getattr(wanted, name) for name in terms):
        if wanted.kind == "transfer":
            raise PermanentError("reference_conflict", "this reference was used for another transfer")
        raise PermanentError("key_conflict", "another record was written under this key")


def _may_be_repeated(before: Submission, wanted: Submission) -> bool:
    """Return whether it had no effect and may be signed again.

    This applies to a transfer in a later execution of its task, and to a record whose signing key was replaced.
    """
    if wanted.kind == "transfer":
        return before.no_effect and wanted.run > before.run
    return before.state == "failed" and before.error.startswith("no_key:")
