"""DynamoDB's units by its documented rules: item sizes, before-images, indexes, transactions.

Sources: the DynamoDB Developer Guide, "Item sizes and formats", "Read and write operations" and "Provisioned throughput
considerations for global secondary indexes". Whole units are counted for each item, as DynamoDB bills them.
"""

from __future__ import annotations

import math
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest.mock import patch

from botocore.exceptions import ClientError

from tests.support import cloud as moto_cloud
from tests.support import template

Item = dict[str, Any]
Call = Callable[[Any, str, Any], Any]

WRITE_BYTES, READ_BYTES = 1024, 4096
CONTAINER_BYTES, ELEMENT_BYTES = 3, 1
"""Bytes of a list or a map itself, and of each of its elements."""
OUTSIDE = frozenset({"ChainTable"})
"""The mock network's table, which represents an outside system."""


def item_size(item: Item) -> int:
    """Return an item's size in bytes: each attribute's name in UTF-8, and its value."""
    return sum(len(name.encode()) + value_size(value) for name, value in item.items())


def value_size(value: Item) -> int:
    """Return the size in bytes of one typed value, such as `{"S": "text"}`."""
    [(kind, content)] = value.items()
    if kind == "S":
        return len(content.encode())
    if kind == "N":
        return _number_size(content)
    if kind == "B":
        return len(content)
    if kind in {"BOOL", "NULL"}:
        return 1
    if kind == "M":
        return CONTAINER_BYTES + sum(ELEMENT_BYTES for _ in content) + item_size(content)
    if kind == "L":
        return CONTAINER_BYTES + sum(ELEMENT_BYTES + value_size(each) for each in content)
    return sum(value_size({kind[0]: each}) for each in content)  # SS, NS, BS


def _number_size(text: str) -> int:
    """Return about one byte for each two significant digits, plus one, plus one for a sign."""
    digits = text.lstrip("-").partition("e")[0].partition("E")[0].replace(".", "").strip("0")
    return math.ceil(len(digits) / 2) + 1 + text.startswith("-")


def write_units(size: int) -> int:
    """Return the units of one write of `size` bytes, the larger of the item before and after; at least one."""
    return max(1, math.ceil(size / WRITE_BYTES))


def read_units(size: int, *, consistent: bool) -> float:
    """Return the units of one read of `size` bytes; a missing item counts as one block."""
    return max(1, math.ceil(size / READ_BYTES)) * (1 if consistent else 0.5)


@dataclass(frozen=True)
class Index:
    """A global secondary index: its keys and its projected attributes (None: all)."""

    name: str
    keys: tuple[str, ...]
    projected: frozenset[str] | None

    def image(self, item: Item | None) -> Item | None:
        """Return the attributes of `item` in the index; None if the item lacks one of the index's keys."""
        if item is None or not all(key in item for key in self.keys):
            return None
        return item if self.projected is None else {name: item[name] for name in item if name in self.projected}

    def write_units(self, before: Item | None, after: Item | None) -> int:
        """Return the write units of a change of the item.

        An unchanged image costs nothing; a changed key is a delete and a put.
        """
        old, new = self.image(before), self.image(after)
        if old == new:
            return 0
        if old and new and any(old[key] != new[key] for key in self.keys):
            return write_units(item_size(old)) + write_units(item_size(new))
        return write_units(max(item_size(image) for image in (old, new) if image))


@dataclass(frozen=True)
class Schema:
    """A table's key and indexes, as template.yaml defines them."""

    keys: tuple[str, ...]
    indexes: tuple[Index, ...]

    def key_of(self, item: Item) -> Item:
        """Return the item's primary key."""
        return {name: item[name] for name in self.keys}

    def index(self, name: str) -> Index:
        """Return the index with this name."""
        return next(index for index in self.indexes if index.name == name)


@cache
def schemas() -> dict[str, Schema]:
    """Return the schema of each table of the template, by the table's name."""
    return {
        name: _schema(template.resolve(body["Properties"]))
        for name, body in template.resources("AWS::DynamoDB::Table").items()
    }


def _schema(properties: dict[str, Any]) -> Schema:
    keys = tuple(each["AttributeName"] for each in properties["KeySchema"])
    indexes = []
    for index in properties.get("GlobalSecondaryIndexes", []):
        own = tuple(each["AttributeName"] for each in index["KeySchema"])
        projection = index["Projection"]
        projected = frozenset({*keys, *own, *projection.get("NonKeyAttributes", [])})
        indexes.append(Index(index["IndexName"], own, None if projection["ProjectionType"] == "ALL" else projected))
    return Schema(keys, tuple(indexes))


@dataclass
class Units:
    """Consumed units, in total and by (table, operation)."""

    written: int = 0
    read: float = 0
    by_operation: Counter[tuple[str, str]] = field(default_factory=Counter)
    uncounted: set[int] = field(default_factory=set)
    """Threads with the benchmark's own calls."""

    def write(self, table: str, operation: str, units: int) -> None:
        self.written += units
        self.by_operation[table, operation] += units

    def add_read(self, table: str, operation: str, units: float) -> None:
        self.read += units
        self.by_operation[table, operation] += units  # type: ignore[assignment]  # halves

    @contextmanager
    def not_counted(self) -> Iterator[None]:
        """Do not count this thread's calls meanwhile: waiting, and reading the result."""
        own = threading.get_ident()
        self.uncounted.add(own)
        try:
            yield
        finally:
            self.uncounted.discard(own)


class _Meter:
    """Counts each call to DynamoDB; `call` is botocore's function, with moto behind it."""

    def __init__(self, units: Units, call: Call) -> None:
        self._units, self._call = units, call

    def __call__(self, client: Any, operation: str, arguments: Any) -> Any:
        if client.meta.service_model.service_name != "dynamodb" or threading.get_ident() in self._units.uncounted:
            return self._call(client, operation, arguments)
        writes = [each for each in _writes(operation, arguments) if each[1]["TableName"] not in OUTSIDE]
        before = [self._stored(client, kind, body) for kind, body in writes]
        try:
            answer = self._call(client, operation, arguments)
        except ClientError:
            # A write whose condition fails consumes the units of the existing item.
            self._count_writes(client, operation, writes, before, failed=True)
            raise
        self._count_writes(client, operation, writes, before, failed=False)
        self._count_reads(client, operation, arguments)
        return answer

    def _stored(self, client: Any, kind: str, body: Any) -> Item | None:
        key = schemas()[body["TableName"]].key_of(body["Item"]) if kind == "Put" else body["Key"]
        arguments = {"TableName": body["TableName"], "Key": key, "ConsistentRead": True}
        found: Item | None = self._call(client, "GetItem", arguments).get("Item")
        return found

    def _count_writes(
        self, client: Any, operation: str, writes: list[tuple[str, Any]], before: list[Item | None], *, failed: bool
    ) -> None:
        factor = 2 if operation == "TransactWriteItems" else 1
        for (kind, body), old in zip(writes, before, strict=True):
            table, unchanged = body["TableName"], failed or kind == "ConditionCheck"
            new = old if unchanged else self._stored(client, kind, body)
            size = max((item_size(image) for image in (old, new) if image), default=0)
            self._units.write(table, f"{kind} {_kind_of(body)}", factor * write_units(size))
            for index in schemas()[table].indexes:
                if units := index.write_units(old, new):
                    self._units.write(table, f"index {index.name} {_kind_of(body)}", units)

    def _count_reads(self, client: Any, operation: str, arguments: Any) -> None:
        if operation == "GetItem" and arguments["TableName"] not in OUTSIDE:
            size = item_size(self._whole(client, arguments) or {})
            self._read(arguments["TableName"], operation, size, bool(arguments.get("ConsistentRead")))
        elif operation in {"Query", "Scan"} and arguments["TableName"] not in OUTSIDE:
            size = sum(map(item_size, self._scanned(client, operation, arguments)))
            self._read(arguments["TableName"], operation, size, bool(arguments.get("ConsistentRead")))
        elif operation == "BatchGetItem":
            for table, request in arguments["RequestItems"].items():
                for key in request["Keys"]:  # each key is rounded separately
                    size = item_size(self._whole(client, {"TableName": table, "Key": key}) or {})
                    self._read(table, operation, size, bool(request.get("ConsistentRead")))
        elif operation == "TransactGetItems":
            for each in arguments["TransactItems"]:
                size = item_size(self._whole(client, each["Get"]) or {})
                self._units.add_read(each["Get"]["TableName"], operation, 2 * read_units(size, consistent=True))

    def _read(self, table: str, operation: str, size: int, consistent: bool) -> None:
        self._units.add_read(table, operation, read_units(size, consistent=consistent))

    def _whole(self, client: Any, arguments: Any) -> Item | None:
        return self._stored(client, "Get", {"TableName": arguments["TableName"], "Key": arguments["Key"]})

    def _scanned(self, client: Any, operation: str, arguments: Any) -> list[Item]:
        """Return the whole items that were read, before filters and projections."""
        kept = {name: value for name, value in arguments.items() if name not in _NARROWING}
        condition = str(kept.get("KeyConditionExpression", ""))
        for name in ("ExpressionAttributeNames", "ExpressionAttributeValues"):
            used = {key: value for key, value in kept.get(name, {}).items() if key in condition}
            kept[name] = used
            if not used:
                del kept[name]
        found = self._call(client, operation, kept)["Items"]
        if name := arguments.get("IndexName"):
            index = schemas()[arguments["TableName"]].index(name)
            return [index.image(item) or item for item in found]
        return list(found)


_NARROWING = frozenset({"FilterExpression", "ProjectionExpression", "Select"})


def _writes(operation: str, arguments: Any) -> list[tuple[str, Any]]:
    """Return the writes of a call as (Put, Update, Delete or ConditionCheck; its arguments)."""
    if operation in {"PutItem", "UpdateItem", "DeleteItem"}:
        return [(operation.removesuffix("Item"), arguments)]
    if operation == "TransactWriteItems":
        return [next(iter(each.items())) for each in arguments["TransactItems"]]
    if operation == "BatchWriteItem":
        return [
            ("Put", {"TableName": table, "Item": each["PutRequest"]["Item"]})
            if "PutRequest" in each
            else ("Delete", {"TableName": table, "Key": each["DeleteRequest"]["Key"]})
            for table, requests in arguments["RequestItems"].items()
            for each in requests
        ]
    return []


def _kind_of(body: Any) -> str:
    """Return the kind of item, the first word of its sort key: EVENT, STEP, ENTRY."""
    key = body.get("Item") or body["Key"]
    return str(next(iter(key.get("sk", key["pk"]).values()))).partition("#")[0]


@contextmanager
def metered(units: Units) -> Iterator[None]:
    """Count in `units` the consumption of every thread of this process, one call at a time."""
    with patch.object(moto_cloud, "_make_api_call", _Meter(units, moto_cloud._make_api_call)):  # noqa: SLF001
        yield
