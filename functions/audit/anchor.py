"""The anchor: writes the log's size and root to the ledger, one transaction at a time.

The function runs when the log grows (stream of the log's table), when an anchor's transaction ends (the qubic
service's event `anchor_settled`), and every minute as a safety net. Each run does all the work that is possible now.
Runs may overlap, and may stop at any point.

pending      The anchor's payload is decided and stored. It never changes, so the log has one root for each anchored
            size, and every run submits the same bytes under the same key.
confirmed   The ledger has the anchor's transaction permanently, and its bytes were checked. Only then can the next
            anchor, which names this one, begin.

An error that a later run cannot repair stops the anchor and raises an alarm. docs/runbook.md describes the repair.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable
from typing import Any

from aws_lambda_powertools.metrics import MetricUnit, single_metric
from aws_lambda_powertools.utilities.typing import LambdaContext

from audit.anchors import Anchor, Anchoring
from audit.log import CorruptLogError, Log
from qaes.adapters import clients, settings
from qaes.adapters.handlers import function
from qaes.adapters.ledger_client import CALL_SECONDS, LedgerClient
from qaes.adapters.logs import logger
from qaes.adapters.metrics import namespace
from qaes.domain.anchor import AnchorPayload, decode, failed_checks, log_id_bytes
from qaes.domain.errors import PermanentError, TransientError
from qaes.domain.ids import now, parse_timestamp, timestamp
from qaes.domain.note import checkpoint_text, public_key_of, sign_note, verifier_key
from qaes.domain.qubic import transaction as qubic
from qaes.domain.tiles import tree_root

_ROUNDS = 3
"""Maximum number of anchors that one run completes. The next run continues."""
ROUND_SECONDS = CALL_SECONDS + 10
"""Maximum duration of one round: one call to the ledger and the calls to the table."""


class Anchorer:
    """Advances the newest anchor, and begins the next one."""

    def __init__(self, log: Log, ledger: LedgerClient, *, log_id: str, origin: str, network: str) -> None:
        self._log = log
        self._ledger = ledger
        self._log_id = log_id
        self._origin = origin
        self._network = network

    def advance(self, has_time: Callable[[], bool] = lambda: True) -> Anchoring | None:
        """Do all the work that is possible now. Return the newest anchor after that, or None before the first anchor.

        A round after the first begins only if `has_time` allows it.

        Raises
        ------
        TransientError
            A table or the ledger did not respond. Call again later.
        PermanentError
            `another_network`: the log's anchors are on another network. `key_conflict`: the ledger has another
            payload for this anchor. `given_up`: the ledger will not write this anchor.
        CorruptLogError
            The confirmed transaction differs from the pending anchor.
        """
        newest = self._log.anchors.anchoring()
        self._check_network(newest)
        for number in range(_ROUNDS):
            if number and not has_time():
                return newest
            if newest is None or newest.state == "confirmed":
                pending = self._begin_next(newest)
                if pending is None:
                    return newest
                newest = pending
            if newest.state == "pending":
                confirmed = self._confirm(newest)
                if confirmed is None:
                    return newest
                newest = confirmed
        return newest

    def _check_network(self, newest: Anchoring | None) -> None:
        """Reject another network: each anchor names the one before, so a chain cannot continue on a second network."""
        if newest is not None and newest.network != self._network:
            raise PermanentError(
                "another_network",
                f"the log {self._log_id} is anchored on {newest.network} and cannot continue on {self._network}: "
                "create a log with a new LOG_ID and new tables",
            )

    def _begin_next(self, before: Anchoring | None) -> Anchoring | None:
        """Begin the next anchor. Return None if the log has not grown."""
        head = self._log.head()
        # Anchor only integrated entries: their tiles exist, so clients can request proofs at once.
        size, root = head.integrated, head.integrated_root
        if size == 0 or (before is not None and size <= before.size):
            return None
        if before is not None and tree_root(before.size, self._log.tile) != decode(before.payload).root:
            raise CorruptLogError(f"the log's root differs from the anchored root at size {before.size}")
        payload = (
            AnchorPayload(log_id_bytes(self._log_id), size, root)
            if before is None
            else decode(before.payload).next(size=size, root=root)
        )
        pending = Anchoring(payload.sequence, size, payload.encode(), timestamp(now()), "pending", self._network)
        if self._log.anchors.begin(pending, after=before):
            logger().info("pending", extra={"sequence": pending.sequence, "size": size})
            return pending
        return self._log.anchors.anchoring()  # another run was faster: its anchor counts

    def _confirm(self, pending: Anchoring) -> Anchoring | None:
        """Submit the anchor; safe to repeat. Return None while its transaction is in flight.

        If the ledger gave up the transaction because its key was replaced, this call also signs it with the new key.
        """
        answer = self._submit(pending)
        if answer["network"] != self._network:
            raise CorruptLogError(f"the ledger reports the network {answer['network']}, expected {self._network}")
        if answer["state"] in {"failed", "expired"}:
            raise PermanentError(
                "given_up", f"the ledger gave up anchor {pending.sequence} of {self._log_id}: {answer['error']}"
            )
        if answer["state"] != "confirmed":
            return None
        anchor = self._anchor(pending, answer)
        if self._log.anchors.confirm(pending, anchor):
            logger().info("confirmed", extra={"sequence": pending.sequence, "txid": anchor.txid, "tick": anchor.tick})
            _count(anchor)
        return self._log.anchors.anchoring()

    def _submit(self, pending: Anchoring) -> dict[str, Any]:
        try:
            return self._ledger.submit_anchor(
                log_id=self._log_id, sequence=pending.sequence, payload=pending.payload.hex()
            )
        except PermanentError as error:
            if error.code != "key_conflict":
                raise
            raise PermanentError(
                error.code,
                f"the ledger has another payload for anchor {pending.sequence} of {self._log_id}: the log's table "
                "was restored to an earlier state, or another service uses this log's id",
            ) from error

    def _anchor(self, pending: Anchoring, answer: dict[str, Any]) -> Anchor:
        payload = decode(pending.payload)
        encoded = checked_transaction(pending.payload, answer)
        text = checkpoint_text(self._origin, payload.size, payload.root)
        note, verifier = sign_checkpoint(text, self._origin)
        return Anchor(
            sequence=payload.sequence,
            size=payload.size,
            root=payload.root,
            previous=payload.previous,
            payload=pending.payload,
            txid=str(answer["txid"]),
            tick=int(answer["tick"]),
            source=str(answer["source"]),
            encoded=encoded,
            network=str(answer["network"]),
            note=note,
            verifier_key=verifier,
            confirmed_at=timestamp(now()),
        )


def checked_transaction(payload: bytes, answer: dict[str, Any]) -> bytes:
    """Return the bytes of the ledger's transaction if they carry the payload and the signature of its source.

    Raises
    ------
    CorruptLogError
        The bytes do not match the pending payload.
    """
    try:
        encoded = base64.b64decode(str(answer["encoded"]), validate=True)
        found = qubic.decode(encoded)
    except (ValueError, binascii.Error) as error:
        raise CorruptLogError("the anchor's transaction cannot be read") from error
    failed = failed_checks(
        found, payload, txid=str(answer["txid"]), tick=int(answer["tick"]), source=str(answer["source"])
    )
    if failed:
        raise CorruptLogError(f"the anchor's transaction differs from the pending anchor: {', '.join(failed)}")
    return encoded


def _count(anchor: Anchor) -> None:
    with single_metric(name="AnchorConfirmed", unit=MetricUnit.Count, value=1, namespace=namespace()) as metric:
        metric.add_dimension("network", anchor.network)
        metric.add_metric(name="AnchoredSize", unit=MetricUnit.Count, value=anchor.size)


def _count_age(newest: Anchoring | None) -> None:
    """Publish how long the anchor has been in flight, 0 if no anchor is. A missing metric also raises an alarm."""
    in_flight = newest is not None and newest.state == "pending"
    age = (now() - parse_timestamp(newest.begun_at)).total_seconds() if newest and in_flight else 0
    with single_metric(
        name="AnchorInFlightSeconds", unit=MetricUnit.Seconds, value=age, namespace=namespace()
    ) as metric:
        metric.add_dimension("service", "audit")


def _count_stopped(error: PermanentError | CorruptLogError) -> None:
    code = error.code if isinstance(error, PermanentError) else "corrupt"
    logger().error("anchoring has stopped", extra={"code": code, "why": error.message})
    with single_metric(name="AnchorStopped", unit=MetricUnit.Count, value=1, namespace=namespace()) as metric:
        metric.add_dimension("service", "audit")


def sign_checkpoint(text: str, name: str) -> tuple[str, str]:
    """Sign a checkpoint as a note under the log's origin. Return the note and the key that verifies it.

    The private key is derived from a secret that only this function's role can read, and is not stored.
    """
    answer = clients.client("secretsmanager").get_secret_value(SecretId=settings.text("LOG_SIGNING_KEY"))
    seed = hashlib.sha256(str(answer["SecretString"]).encode("utf-8")).digest()
    return sign_note(text, name, seed), verifier_key(name, public_key_of(seed))


def anchorer() -> Anchorer:
    """Create the anchorer from the environment of this function."""
    return Anchorer(
        Log(),
        LedgerClient(),
        log_id=settings.text("LOG_ID"),
        origin=settings.text("LOG_ORIGIN"),
        network=settings.text("QUBIC_NETWORK"),
    )


@function
def anchor_log(_event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Advance the newest anchor and return its `{sequence, size, state}`. The event is ignored."""
    try:
        newest = anchorer().advance(lambda: context.get_remaining_time_in_millis() >= ROUND_SECONDS * 1000)
    except (PermanentError, CorruptLogError) as error:
        _count_stopped(error)
        raise
    except TransientError:
        _count_age(Log().anchors.anchoring())  # publish the age even if the ledger does not respond
        raise
    _count_age(newest)
    if newest is None:
        return {"sequence": None, "size": 0, "state": "none"}
    return {"sequence": newest.sequence, "size": newest.size, "state": newest.state}
