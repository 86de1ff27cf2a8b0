"""A table of the audit service: consistent reads by key, and writes of new items only."""

from __future__ import annotations

from collections.abc import Iterable

from audit.store import Item
from qaes.adapters import dynamo


class Table:
    """A table whose items have the keys `pk` and `sk`."""

    def __init__(self, table: str) -> None:
        self._table = table

    def describe(self) -> None:
        """Raise an error unless the table exists."""
        dynamo.call("describe_table", TableName=self._table)

    def _put_new(self, item: Item) -> Item:
        not_there_yet = "attribute_not_exists(pk)"
        return {"Put": {"TableName": self._table, "Item": item, "ConditionExpression": not_there_yet}}

    def _get(self, pk: str, sk: str) -> Item | None:
        return dynamo.get(self._table, pk, sk)

    def _first(self, pk: str, first: str, last: str, *, newest: bool = False) -> Item | None:
        found = dynamo.call(
            "query",
            TableName=self._table,
            KeyConditionExpression="pk = :pk AND sk BETWEEN :first AND :last",
            ExpressionAttributeValues={":pk": {"S": pk}, ":first": {"S": first}, ":last": {"S": last}},
            ConsistentRead=True,
            ScanIndexForward=not newest,
            Limit=1,
        )
        return next(iter(found["Items"]), None)

    def _all(self, pk: str, prefix: str) -> Iterable[Item]:
        return self._between(pk, prefix, f"{prefix}~")

    def _between(self, pk: str, first: str, last: str) -> Iterable[Item]:
        return dynamo.items(
            TableName=self._table,
            KeyConditionExpression="pk = :pk AND sk BETWEEN :first AND :last",
            ExpressionAttributeValues={":pk": {"S": pk}, ":first": {"S": first}, ":last": {"S": last}},
            ConsistentRead=True,
        )
