"""Submissions, and their items in the ledger's table.

Items (pk / sk; all with the network's name, so that one network's items are never shown as another's):
SUBMISSION#<network>#<key>/SUBMISSION  the current state
SUBMISSION#<network>#<key>/ATTEMPT#n   each transaction that was signed for it, never changed
TXID#<network>#<txid>/TXID             the submission of a transaction
SOURCE#<network>#<identity>/SOURCE     a source's queue of open submissions; its version guards each signature
SOURCES#<network>/<identity>           the list of sources
"""

from __future__ import annotations

import base64
import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from qaes.adapters import settings
from qaes.adapters.limits import Share
from qaes.domain.anchor import ANCHOR_INPUT_TYPE
from qaes.domain.canonical import canonical_json
from qaes.domain.errors import InvalidInputError
from qaes.domain.ids import now, timestamp
from qaes.domain.qubic import MAX_QU, OPEN_STATES
from qubic.items import Item, Items, item_key

Kind = Literal["hash", "instruction", "anchor", "policy", "transfer"]
State = Literal["signed", "broadcast", "confirmed", "expired", "failed", "simulated"]
INPUT_TYPES: dict[Kind, int] = {
    "hash": 0x5148,
    "instruction": 0x5149,
    "anchor": ANCHOR_INPUT_TYPE,
    "policy": 0x5150,
    "transfer": 0,
}
"""Input type of each kind of record. It is in the signed bytes, so a record always has one kind."""

NO_EFFECT = "moved_nothing:"
OUTCOME_UNKNOWN = "moved_unknown:"
"""Prefix of the stored error of a transfer without effect, or with an unknown outcome (decision 19)."""
_LEFT_OUT = frozenset({"agent", "granted", "counted_in"})
"""Fields of a submission that its item omits without a value."""

MAX_OPEN = 100
"""Maximum number of open submissions of one source. With more, the ledger is busy."""
MAX_METADATA_BYTES = 4096
MAX_REFERENCE_CHARACTERS = 256


@dataclass(frozen=True)
class Submission:
    """One act on the ledger under one `key`, and its newest or confirmed transaction.

    Attributes
    ----------
    key
        `hash:<sha256>`, `instruction:<sha256>`, `anchor:<log id>:<sequence>`, `policy:<version>` or
        `transfer:<reference>`.
    source, destination
        Identities.
    attempt
        Number of transactions that were signed for it; `txid`, `tick` and `encoded` belong to the confirmed one, or to
        the newest.
    settled
        Number of the first of them that are in their tick and have moved nothing.
    run
        For a transfer: the execution of the task that requested it.
    requested_by
        The task's requester, or the operator who recorded a hash; empty for the system's own records.
    error
        Reason of an expiry or a failure: `expired`, `moved_nothing`, `moved_unknown`, `no_key` or a rejection's code,
        and a text.
    address
        For a transfer: the destination in the caller's spelling, which the policy's limits use.
    agent
        The client of the agent that requested the transfer; empty if a person requested it.
    granted
        The keys of the limits that people's approvals allow the transfer to exceed.
    counted_in
        The transfer's share in the windows of its rule's limits; after an end without effect, the former share.
    counted_on
        The day on which an earlier release counted a transfer's amount; empty if it does not count.
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
    agent: str = ""
    granted: tuple[str, ...] = ()
    counted_in: tuple[Share, ...] = ()

    @property
    def is_open(self) -> bool:
        return self.state in OPEN_STATES

    @property
    def no_effect(self) -> bool:
        """Return whether a transfer has ended without effect, so that it may be requested again."""
        return self.state == "expired" or (self.state == "failed" and not self.error.startswith(OUTCOME_UNKNOWN))

    @property
    def may_be_found(self) -> bool:
        """Return whether it has ended without effect, but one of its transactions may still appear in its tick."""
        return self.attempt > self.settled and (self.state == "expired" or (self.state == "failed" and not self.txid))

    def answer(self) -> dict[str, Any]:
        """Return the public part of the submission as JSON.

        The bytes of a transfer that was not sent are secret, because anyone who has them could send them.
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
class Place:
    """A place in a source's queue."""

    tick: int
    key: str
    amount: int


@dataclass(frozen=True)
class Source:
    """A source's queue; `last_tick` is the newest tick of its transactions."""

    identity: str
    version: int = 0
    last_tick: int = 0
    open: tuple[Place, ...] = ()


class Store:
    """The submissions to one network, and the queues of their sources.

    Parameters
    ----------
    network
        The network of the submissions.
    table
        Name of the table; the default is LEDGER_TABLE.
    """

    def __init__(self, network: str, table: str | None = None) -> None:
        self._network = network
        self._table = table or settings.text("LEDGER_TABLE")
        self._items = Items(self._table)

    def get(self, key: str) -> Submission | None:
        """Read the submission with this `key`."""
        item = self._items.get(self._pk(key), "SUBMISSION")
        return submission_of(item) if item else None

    def attempt(self, txid: str) -> Submission | None:
        """Read the submission of a transaction, with the transaction's own bytes, tick and id.

        If a later transaction was signed, the state is `expired`: this one is in no tick.
        """
        item = self._items.get(f"TXID#{self._network}#{txid}", "TXID")
        if item is None:
            return None
        found = self.get(item["key"]["S"])
        if found is None or found.txid == txid:
            return found
        return replace(found, state="expired", txid=txid, tick=int(item["tick"]["N"]), encoded=item["encoded"]["B"])

    def open_sources(self) -> list[str]:
        """Read the identities with open submissions."""
        found = self._items.query(
            KeyConditionExpression="pk = :pk",
            ExpressionAttributeValues={":pk": {"S": f"SOURCES#{self._network}"}},
        )
        identities = [item["sk"]["S"] for item in found]
        return [identity for identity in identities if self._source(identity).open]

    def _source(self, identity: str) -> Source:
        item = self._items.get(f"SOURCE#{self._network}#{identity}", "SOURCE")
        if item is None:
            return Source(identity)
        places = tuple(Place(*each) for each in json.loads(item["open"]["S"]))
        return Source(identity, int(item["version"]["N"]), int(item["last_tick"]["N"]), places)

    def _pk(self, key: str) -> str:
        return f"SUBMISSION#{self._network}#{key}"

    def _put_submission(self, submission: Submission, before: Submission | None) -> Item:
        return self._items.put_after(submission_item(submission), before.version if before else 0)

    def _put_source(self, source: Source) -> Item:
        item = item_key(f"SOURCE#{self._network}#{source.identity}", "SOURCE") | {
            "version": {"N": str(source.version + 1)},
            "last_tick": {"N": str(source.last_tick)},
            "open": {"S": json.dumps([[place.tick, place.key, place.amount] for place in source.open])},
        }
        return self._items.put_after(item, source.version)


def check_reference(reference: object) -> str:
    """Return a reference. Raises InvalidInputError."""
    if not isinstance(reference, str) or not 0 < len(reference) <= MAX_REFERENCE_CHARACTERS:
        raise InvalidInputError(
            f"the reference must have 1 to {MAX_REFERENCE_CHARACTERS} characters", field="reference"
        )
    return reference


def check_amount(amount: object) -> int:
    """Return an amount in QU. Raises InvalidInputError."""
    if isinstance(amount, bool) or not isinstance(amount, int) or not 0 < amount <= MAX_QU:
        raise InvalidInputError("the amount must be a whole number from 1 to 10^15", field="amount")
    return amount


def check_metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata of a record. Raises InvalidInputError."""
    try:
        size = len(canonical_json(metadata).encode())
    except InvalidInputError as error:
        raise InvalidInputError(error.message, field="metadata") from error
    if size > MAX_METADATA_BYTES:
        raise InvalidInputError(f"the metadata must have at most {MAX_METADATA_BYTES} bytes", field="metadata")
    return metadata


def head_of(source: Source) -> Place:
    """Return the first submission of a queue that is not empty."""
    return min(source.open, key=lambda place: place.tick)


def changed(submission: Submission, **changes: Any) -> Submission:
    return replace(submission, updated_at=timestamp(now()), version=submission.version + 1, **changes)


def signed_item(submission: Submission) -> Item:
    return {
        "txid": {"S": submission.txid},
        "tick": {"N": str(submission.tick)},
        "encoded": {"B": submission.encoded},
        "signed_at": {"S": submission.updated_at},
    }


def submission_item(submission: Submission) -> Item:
    item = item_key(f"SUBMISSION#{submission.network}#{submission.key}", "SUBMISSION")
    for name, value in asdict(submission).items():
        if name in _LEFT_OUT and not value:
            continue
        if isinstance(value, bytes):
            item[name] = {"B": value}
        elif isinstance(value, int):
            item[name] = {"N": str(value)}
        else:  # metadata stays text: DynamoDB would convert its numbers to Decimals
            item[name] = {"S": value if isinstance(value, str) else canonical_json(value)}
    return item


def submission_of(item: Item) -> Submission:
    fields: dict[str, Any] = {}
    for name, attribute in item.items():
        if name not in {"pk", "sk"}:
            [(kind, value)] = attribute.items()
            fields[name] = int(value) if kind == "N" else bytes(value) if kind == "B" else value
    fields["metadata"] = json.loads(fields["metadata"])
    fields["granted"] = tuple(json.loads(fields.get("granted", "[]")))
    fields["counted_in"] = tuple(Share(*share) for share in json.loads(fields.get("counted_in", "[]")))
    return Submission(**fields)
