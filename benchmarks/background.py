"""Items that exist before a benchmark begins: a million, in addition to moto's items, which are in memory.

SQLite stores their keys in the table and in its indexes. The first read of an item, by key or by query, creates the
whole item in moto. The benchmark therefore reads, writes and counts the same items as DynamoDB would.
"""

from __future__ import annotations

import inspect
import sqlite3
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

from moto.backends import get_backend
from moto.dynamodb.models.dynamo_type import DynamoType, Item
from moto.dynamodb.models.table import Table

from benchmarks.units import Schema, schemas
from tests.support.template import ACCOUNT, REGION

Keys = dict[str, str]
"""Attributes of an item that are keys of the table or of an index."""
Made = dict[str, Any]

CHUNK = 100_000
_COMPARISONS = {"=": "= ?", "<": "< ?", "<=": "<= ?", ">": "> ?", ">=": ">= ?", "BETWEEN": "BETWEEN ? AND ?"}
_BIND = inspect.signature(Table.query)


class Background:
    """Items of one table by their keys; `make` returns the whole item for the text that was stored with its keys."""

    def __init__(self, table: str, make: Callable[[str], Made]) -> None:
        self.schema: Schema = schemas()[table]
        self.make = make
        self._database = sqlite3.connect("", check_same_thread=False, isolation_level=None)
        for pragma in ("journal_mode = OFF", "synchronous = OFF", "cache_size = -400000", "locking_mode = EXCLUSIVE"):
            self._database.execute(f"PRAGMA {pragma}")
        for name in ("", *(index.name for index in self.schema.indexes)):
            self._database.execute(
                f'CREATE TABLE "keys_{name}" (a TEXT, b TEXT, pk TEXT, sk TEXT, given TEXT, PRIMARY KEY (a, b, pk, sk))'
                " WITHOUT ROWID"
            )

    def add(self, items: Iterator[tuple[Keys, str]]) -> None:
        """Add items by their keys, each with the text for `make`."""
        while chunk := list(islice(items, CHUNK)):
            rows: dict[str, list[tuple[str, ...]]] = {"": []}
            for keys, given in chunk:
                place = (keys["pk"], keys["sk"])
                rows[""].append((*place, *place, given))
                for index in self.schema.indexes:
                    if all(name in keys for name in index.keys):
                        rows.setdefault(index.name, []).append((*(keys[name] for name in index.keys), *place, given))
            self._database.execute("BEGIN")
            for name, values in rows.items():
                self._database.executemany(f'INSERT INTO "keys_{name}" VALUES (?, ?, ?, ?, ?)', sorted(values))  # noqa: S608
            self._database.execute("COMMIT")

    def find(
        self, index: str, value: str, comparison: str | None, operands: list[str], *, newest: bool, limit: int
    ) -> list[tuple[str, str, str]]:
        """Return (pk, sk, given) of the first items of a query, at most `limit`; -1 for all."""
        condition = {None: "", "BEGINS_WITH": " AND b BETWEEN ? AND ? || char(1114111)"}.get(comparison)
        if condition is None:
            condition = f" AND b {_COMPARISONS[str(comparison)]}"
        if comparison == "BEGINS_WITH":
            operands = operands * 2
        order = "DESC" if newest else "ASC"
        statement = f'SELECT pk, sk, given FROM "keys_{index}" WHERE a = ?{condition} ORDER BY b {order} LIMIT ?'  # noqa: S608
        return list(self._database.execute(statement, (value, *operands, limit)))


class _TableWithBackground(Table):
    """moto's table with the background items."""

    background: Background

    def get_item(self, hash_key: Any, range_key: Any = None, projection_expression: Any = None) -> Any:
        if super().get_item(hash_key, range_key) is None and range_key is not None:
            for place in self.background.find("", hash_key.value, "=", [range_key.value], newest=False, limit=1):
                self._take(*place)
        return super().get_item(hash_key, range_key, projection_expression)

    def query(self, *arguments: Any, **named: Any) -> Any:
        bound = _BIND.bind(self, *arguments, **named).arguments
        conditions, limit = bound.get("hash_key_conditions"), bound.get("limit") or -1
        if bound.get("exclusive_start_key"):
            if limit > 0:
                raise NotImplementedError("a second page of a query with a limit")
            return super().query(*arguments, **named)  # the first query has created all items
        key = conditions[0][1] if bound.get("index_name") and conditions else bound["hash_key"]
        # Items in moto may have changed their keys, so read as many more.
        found = self.background.find(
            bound.get("index_name") or "",
            key.value,
            bound.get("range_comparison"),
            [each.value for each in bound.get("range_objs") or []],
            newest=not bound["scan_index_forward"],
            limit=limit if limit < 0 else limit + 1 + len(self),
        )
        for place in found if limit < 0 else self._first(found, limit + 1):
            self._take(*place)
        return super().query(*arguments, **named)

    def _first(self, found: list[tuple[str, str, str]], count: int) -> list[tuple[str, str, str]]:
        return [each for each in found if not self._has(each[0], each[1])][:count]

    def _has(self, pk: str, sk: str) -> bool:
        return super().get_item(DynamoType({"S": pk}), DynamoType({"S": sk})) is not None

    def _take(self, pk: str, sk: str, given: str) -> None:
        if not self._has(pk, sk):
            keys = DynamoType({"S": pk}), DynamoType({"S": sk})
            self.items[keys[0]][keys[1]] = Item(*keys, self.background.make(given))


def attach(table: str, background: Background) -> None:
    """Put the items into moto's table."""
    found = get_backend("dynamodb")[ACCOUNT][REGION].get_table(table)
    found.__class__ = _TableWithBackground
    found.background = background
