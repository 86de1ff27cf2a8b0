"""The log's anchors in AuditAnchorsTable. Only the anchor's role writes this table, and it cannot write the log.

pk / sk                      item, and condition for writing it
ANCHOR / ANCHORING           the newest anchor, pending (in flight) or confirmed: only over the anchor that was read
ANCHOR / SIZE#size           a confirmed anchor: once

All reads are consistent.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from audit.store import Item, transact
from audit.table import Table
from qaes.adapters import settings
from qaes.adapters.dynamo import key

State = Literal["pending", "confirmed"]
_STORED_PENDING = "sealed"
"""The stored word for `pending`, which older items have and older releases read (decision 19)."""


@dataclass(frozen=True)
class Anchoring:
    """The newest anchor: `pending` until its transaction is confirmed."""

    sequence: int
    size: int
    payload: bytes
    begun_at: str
    state: State
    network: str


@dataclass(frozen=True)
class Anchor:
    """A confirmed anchor: its payload, the transaction that carries it, and the log's signed note of that size."""

    sequence: int
    size: int
    root: bytes
    previous: bytes
    payload: bytes
    txid: str
    tick: int
    source: str
    encoded: bytes
    network: str
    note: str
    verifier_key: str
    confirmed_at: str


class Anchors(Table):
    """Items of the anchors."""

    def __init__(self, table: str | None = None) -> None:
        super().__init__(table or settings.text("AUDIT_ANCHORS_TABLE"))

    def anchoring(self) -> Anchoring | None:
        """Read the newest anchor; None before the first."""
        item = self._get("ANCHOR", "ANCHORING")
        if item is None:
            return None
        state: State = "confirmed" if item["state"]["S"] == "confirmed" else "pending"
        return Anchoring(
            int(item["sequence"]["N"]),
            int(item["size"]["N"]),
            item["payload"]["B"],
            item["sealed_at"]["S"],
            state,
            item["network"]["S"],
        )

    def begin(self, pending: Anchoring, *, after: Anchoring | None) -> bool:
        """Store an anchor as the one in flight. Return False if `after` is no longer the newest, confirmed anchor."""
        condition: Item = {"ConditionExpression": "attribute_not_exists(pk)"}
        if after is not None:
            previous_is_confirmed = "#sequence = :sequence AND #state = :confirmed"
            condition = {
                "ConditionExpression": previous_is_confirmed,
                "ExpressionAttributeNames": {"#sequence": "sequence", "#state": "state"},
                "ExpressionAttributeValues": {
                    ":sequence": {"N": str(after.sequence)},
                    ":confirmed": {"S": "confirmed"},
                },
            }
        item = _anchoring_item(pending, _STORED_PENDING)
        return transact([{"Put": {"TableName": self._table, "Item": item} | condition}])

    def confirm(self, pending: Anchoring, anchor: Anchor) -> bool:
        """Record a confirmed anchor, so that the next can begin. Return False if another run did so first."""
        anchor_is_in_flight = "#sequence = :sequence AND #state = :pending AND payload = :payload"
        update = {
            "TableName": self._table,
            "Item": _anchoring_item(pending, "confirmed"),
            "ConditionExpression": anchor_is_in_flight,
            "ExpressionAttributeNames": {"#sequence": "sequence", "#state": "state"},
            "ExpressionAttributeValues": {
                ":sequence": {"N": str(pending.sequence)},
                ":pending": {"S": _STORED_PENDING},
                ":payload": {"B": pending.payload},
            },
        }
        item = key("ANCHOR", f"SIZE#{anchor.size:012d}") | {
            "sequence": {"N": str(anchor.sequence)},
            "size": {"N": str(anchor.size)},
            "root": {"B": anchor.root},
            "previous": {"B": anchor.previous},
            "payload": {"B": anchor.payload},
            "txid": {"S": anchor.txid},
            "tick": {"N": str(anchor.tick)},
            "source": {"S": anchor.source},
            "encoded": {"B": anchor.encoded},
            "network": {"S": anchor.network},
            "note": {"S": anchor.note},
            "verifier_key": {"S": anchor.verifier_key},
            "confirmed_at": {"S": anchor.confirmed_at},
        }
        return transact([{"Put": update}, self._put_new(item)])

    def of(self, index: int) -> Anchor | None:
        """Read the first confirmed anchor that covers an index of the log."""
        item = self._first("ANCHOR", f"SIZE#{index + 1:012d}", "SIZE#~")
        return _anchor(item) if item else None

    def newest(self) -> Anchor | None:
        """Read the newest confirmed anchor."""
        item = self._first("ANCHOR", "SIZE#", "SIZE#~", newest=True)
        return _anchor(item) if item else None

    def all(self) -> Iterable[Anchor]:
        """Read all confirmed anchors, in order."""
        return map(_anchor, self._all("ANCHOR", "SIZE#"))


def _anchoring_item(anchoring: Anchoring, state: str) -> Item:
    return key("ANCHOR", "ANCHORING") | {
        "sequence": {"N": str(anchoring.sequence)},
        "size": {"N": str(anchoring.size)},
        "payload": {"B": anchoring.payload},
        "sealed_at": {"S": anchoring.begun_at},
        "state": {"S": state},
        "network": {"S": anchoring.network},
    }


def _anchor(item: Item) -> Anchor:
    return Anchor(
        int(item["sequence"]["N"]),
        int(item["size"]["N"]),
        item["root"]["B"],
        item["previous"]["B"],
        item["payload"]["B"],
        item["txid"]["S"],
        int(item["tick"]["N"]),
        item["source"]["S"],
        item["encoded"]["B"],
        item["network"]["S"],
        item["note"]["S"],
        item["verifier_key"]["S"],
        item["confirmed_at"]["S"],
    )
