"""Items of the policy's versions in the ledger's table.

Items (pk / sk), pk being POLICY#<network>:
HEAD                the newest version, the approved one, and the one in force; its revision guards all other changes
VERSION#<number>    `text`, the document, never changed; `record`, its status
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from qaes.adapters import settings
from qaes.adapters.policy_events import put_event
from qaes.domain.errors import (
    NotFoundError,
)
from qaes.domain.policy_events import PolicyEvent, PolicyEventKind, next_event
from qubic.items import Item, Items, item_key

MAX_VERSION = 10**9 - 1

Status = Literal["proposed", "approved", "anchoring", "in_force", "superseded", "rejected"]


class PolicyVersion(BaseModel):
    """A version of the policy, and its status."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    policy_id: str
    status: Status = Field(description="`approved`: not submitted to the ledger yet; `anchoring`: submitted")
    hash: str = Field(description="SHA-256 of the document's text")
    based_on: str | None = Field(None, description="policy in force at the time of the proposal")
    proposed_by: str | None = Field(None, description="the proposing operator; null for version 1")
    proposed_at: str
    approved_by: str | None = None
    approved_at: str | None = None
    rejected_by: str | None = None
    rejected_at: str | None = None
    reason: str = Field("", description="reason of the rejection")
    in_force_at: str | None = None
    txid: str | None = Field(None, description="transaction with the hash")
    tick: int | None = None


@dataclass(frozen=True)
class Head:
    """`approved` is the version on its way to the ledger, `in_force` the newest confirmed one; 0 means no version."""

    revision: int = 0
    newest: int = 0
    approved: int = 0
    in_force: int = 0


class Versions:
    """The items of one network's policy.

    Parameters
    ----------
    network
        The network of the policy.
    table
        Name of the table; the default is LEDGER_TABLE.
    """

    def __init__(self, network: str, table: str | None = None) -> None:
        self.network = network
        self._table = table or settings.text("LEDGER_TABLE")
        self._policy_table = settings.text("POLICY_TABLE")
        self._items = Items(self._table)

    @property
    def _pk(self) -> str:
        return f"POLICY#{self.network}"

    def _key(self, sk: str) -> Item:
        return item_key(self._pk, sk)

    def _head(self) -> Head:
        item = self._items.get(self._pk, "HEAD")
        return Head(**{name: int(item[name]["N"]) for name in asdict(Head())}) if item else Head()

    def _item(self, version: int, *, consistent: bool = True) -> Item | None:
        return self._items.get(self._pk, version_sk(version), consistent=consistent)

    def _existing(self, version: int) -> Item:
        item = self._item(version)
        if item is None:
            raise NotFoundError("this version of the policy does not exist", field="version")
        return item

    def _records(self, oldest: str, newest: str = "VERSION#~", limit: int | None = None) -> Iterator[PolicyVersion]:
        """Read the records of the versions between these keys, newest first."""
        found = self._items.query(
            KeyConditionExpression="pk = :pk AND sk BETWEEN :oldest AND :newest",
            ExpressionAttributeValues={
                ":pk": {"S": self._pk},
                ":oldest": {"S": oldest},
                ":newest": {"S": newest},
            },
            ExpressionAttributeNames={"#record": "record"},
            ProjectionExpression="#record",
            ScanIndexForward=False,
            **({"Limit": limit} if limit else {}),
        )
        return map(record_of, islice(found, limit))

    def _put(self, record: PolicyVersion, text: str) -> Item:
        item = self._key(version_sk(record.version)) | {
            "text": {"S": text},
            "record": {"S": record.model_dump_json()},
        }
        return self._items.put_new(item)

    def _changed(self, record: PolicyVersion) -> Item:
        return {
            "Update": {
                "TableName": self._table,
                "Key": self._key(version_sk(record.version)),
                "UpdateExpression": "SET #record = :record",
                "ConditionExpression": "attribute_exists(pk)",
                "ExpressionAttributeNames": {"#record": "record"},
                "ExpressionAttributeValues": {":record": {"S": record.model_dump_json()}},
            }
        }

    def _event(
        self,
        kind: PolicyEventKind,
        newest: PolicyEvent | None,
        *,
        actor: str,
        at: str,
        policy_id: str = "",
        name: str = "",
        **details: Any,
    ) -> Item:
        """Return the write of the event after `newest`. Its condition fails if another event was first."""
        event = next_event(
            newest,
            kind,
            actor=actor,
            at=at,
            policy_id=policy_id,
            name=name,
            in_force=self._in_force_before_events() if newest is None else None,
            details=details,
        )
        return put_event(self._policy_table, event)

    def _in_force_before_events(self) -> str | None:
        """Return the version that came into force before events existed; None if no version did."""
        version = self._head().in_force
        item = self._item(version) if version else None
        return record_of(item).policy_id if item else None

    def _write(self, before: Head, after: Head, *writes: Item) -> None:
        """Write all items or none. Raises ChangedError if HEAD has changed since `before` was read."""
        after = replace(after, revision=before.revision + 1)
        head = self._key("HEAD") | {name: {"N": str(value)} for name, value in asdict(after).items()}
        self._items.write(self._items.put_after(head, before.revision, "revision"), *writes)


def record_of(item: Item) -> PolicyVersion:
    return PolicyVersion.model_validate_json(item["record"]["S"])


def text_of(item: Item) -> str:
    return str(item["text"]["S"])


def version_sk(version: int) -> str:
    return f"VERSION#{version:09d}"
