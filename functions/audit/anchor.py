"""The anchor: writes the log's size and root to the ledger, one transaction at a time.

Called when the log has grown (the stream of the log's table), when an anchor's transaction has ended (the qubic
service's event `anchor_settled`), and every minute as a safety net. Each call does whatever can be done; they may
overlap, and stop anywhere.

pending     what will be written is decided and stored. It never changes, so that no size of the log is anchored twice
            under two roots, and whoever finds it pending submits the same bytes under the same key.
confirmed   the ledger has its transaction for good; this was checked against the transaction's bytes. Only then may the
            next begin, which names this one.

What cannot be put right by calling again stops the anchor, with a metric and an alarm: docs/runbook.md says what then.
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
"""How many anchors one call may bring to their end; the next call goes on."""
ROUND_SECONDS = CALL_SECONDS + 10
"""What a round may take: one call of the ledger, and the table's."""


class Anchorer:
    """Brings the newest anchor forward, and begins the next."""

    def __init__(self, log: Log, ledger: LedgerClient, *, log_id: str, origin: str, network: str) -> None:
        self._log = log
        self._ledger = ledger
        self._log_id = log_id
        self._origin = origin
        self._network = network

    def advance(self, has_time: Callable[[], bool] = lambda: True) -> Anchoring | None:
        """Do what can be done now; return the newest anchor as it is then, None before the first.

        A round after the first begins only if `has_time` allows it.

        Raises
        ------
        TransientError
            A table or the ledger did not answer; to be called again.
        PermanentError
            `another_network`: the log's anchors are on one network, and this is another. `key_conflict`: the ledger has
            another payload for this anchor. `given_up`: the ledger will not write it any more.
        CorruptLogError
            The confirmed transaction is not the pending one.
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
        """Anchors name each other: a chain that began elsewhere would have no beginning on this network."""
        if newest is not None and newest.network != self._network:
            raise PermanentError(
                "another_network",
                f"the log {self._log_id} is anchored on {newest.network}, and cannot go on on {self._network}: that "
                "needs a log of another id, with tables of its own",
            )

    def _begin_next(self, before: Anchoring | None) -> Anchoring | None:
        """Decide what the next anchor says; None when the log has not grown."""
        head = self._log.head()
        # Up to here the tiles are there, so that whatever is anchored can be proved at once.
        size, root = head.integrated, head.integrated_root
        if size == 0 or (before is not None and size <= before.size):
            return None
        if before is not None and tree_root(before.size, self._log.tile) != decode(before.payload).root:
            raise CorruptLogError(f"the log does not have the root that was anchored at its size {before.size}")
        payload = (
            AnchorPayload(log_id_bytes(self._log_id), size, root)
            if before is None
            else decode(before.payload).next(size=size, root=root)
        )
        pending = Anchoring(payload.sequence, size, payload.encode(), timestamp(now()), "pending", self._network)
        if self._log.anchors.begin(pending, after=before):
            logger().info("pending", extra={"sequence": pending.sequence, "size": size})
            return pending
        return self._log.anchors.anchoring()  # somebody else was quicker: theirs counts

    def _confirm(self, pending: Anchoring) -> Anchoring | None:
        """Submit it, as often as one likes; None while its transaction is under way.

        What the ledger has given up, because its key was replaced, the same call has signed by the new one.
        """
        answer = self._submit(pending)
        if answer["network"] != self._network:
            raise CorruptLogError(f"the ledger answers for {answer['network']}, not for {self._network}")
        if answer["state"] in {"failed", "expired"}:
            raise PermanentError(
                "given_up", f"the ledger has given up anchor {pending.sequence} of {self._log_id}: {answer['error']}"
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
                f"the ledger has anchor {pending.sequence} of {self._log_id} with another payload: the log's table "
                "was set back to an earlier state, or somebody else writes under this log's id",
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
    """The bytes of the ledger's transaction, if they carry the payload, signed by who is said to have.

    Raises
    ------
    CorruptLogError
        They do not: then the ledger's answer is not believed.
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
        raise CorruptLogError(f"the anchor's transaction is not the pending one: {', '.join(failed)}")
    return encoded


def _count(anchor: Anchor) -> None:
    with single_metric(name="AnchorConfirmed", unit=MetricUnit.Count, value=1, namespace=namespace()) as metric:
        metric.add_dimension("network", anchor.network)
        metric.add_metric(name="AnchoredSize", unit=MetricUnit.Count, value=anchor.size)


def _tell_age(newest: Anchoring | None) -> None:
    """Say how long the anchor has been in flight, 0 when none is; saying nothing is alarming too."""
    in_flight = newest is not None and newest.state == "pending"
    age = (now() - parse_timestamp(newest.begun_at)).total_seconds() if newest and in_flight else 0
    with single_metric(
        name="AnchorInFlightSeconds", unit=MetricUnit.Seconds, value=age, namespace=namespace()
    ) as metric:
        metric.add_dimension("service", "audit")


def _tell_stopped(error: PermanentError | CorruptLogError) -> None:
    code = error.code if isinstance(error, PermanentError) else "corrupt"
    logger().error("the log is not anchored any more", extra={"code": code, "why": error.message})
    with single_metric(name="AnchorStopped", unit=MetricUnit.Count, value=1, namespace=namespace()) as metric:
        metric.add_dimension("service", "audit")


def sign_checkpoint(text: str, name: str) -> tuple[str, str]:
    """Sign a checkpoint as a note under the log's origin; return the note, and the key to verify it with.

    The private key is made of a secret that this function's role alone may read, and which is not kept.
    """
    answer = clients.client("secretsmanager").get_secret_value(SecretId=settings.text("LOG_SIGNING_KEY"))
    seed = hashlib.sha256(str(answer["SecretString"]).encode("utf-8")).digest()
    return sign_note(text, name, seed), verifier_key(name, public_key_of(seed))


def anchorer() -> Anchorer:
    """Make the anchorer of this function's environment."""
    return Anchorer(
        Log(),
        LedgerClient(),
        log_id=settings.text("LOG_ID"),
        origin=settings.text("LOG_ORIGIN"),
        network=settings.text("QUBIC_NETWORK"),
    )


@function
def anchor_log(_event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Take anything: what is to be done is in the tables. Give `{sequence, size, state}` of the newest anchor."""
    try:
        newest = anchorer().advance(lambda: context.get_remaining_time_in_millis() >= ROUND_SECONDS * 1000)
    except (PermanentError, CorruptLogError) as error:
        _tell_stopped(error)
        raise
    except TransientError:
        _tell_age(Log().anchors.anchoring())  # a ledger that does not answer is no reason not to know the age
        raise
    _tell_age(newest)
    if newest is None:
        return {"sequence": None, "size": 0, "state": "none"}
    return {"sequence": newest.sequence, "size": newest.size, "state": newest.state}
