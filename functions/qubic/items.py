"""Items of a table of the qubic service: consistent reads, and transactional writes with a condition on each item."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

from qaes.adapters import dynamo

Item = dict[str, Any]
item_key = dynamo.key


class ChangedError(Exception):
    """Another writer changed an item first. Nothing has been written; the caller must read again.

    `refused` lists the writes (from 0) whose conditions did not hold.
    """

    def __init__(self, refused: tuple[int, ...] = (0,)) -> None:
        super().__init__("another writer changed the item first")
        self.refused = refused


class Items:
    """Items of one table in DynamoDB's notation: `{"name": {"S": "text"}}`."""

    def __init__(self, table: str) -> None:
        self.table = table

    def get(self, pk: str, sk: str, *, consistent: bool = True) -> Item | None:
        """Read one item; without `consistent`, as it was a moment ago."""
        return dynamo.get(self.table, pk, sk, consistent=consistent)

    def query(self, **arguments: Any) -> Iterator[Item]:
        """Read the items of a query consistently."""
        return dynamo.items(TableName=self.table, ConsistentRead=True, **arguments)

    def put_new(self, item: Item) -> Item:
        """Return a write for `write` that puts an item only if it does not exist."""
        return dynamo.put_new(self.table, item)

    def put_after(self, item: Item, before: int, counter: str = "version") -> Item:
        """Return a write for `write` that puts an item only if its `counter` is still `before`; 0: no item exists."""
        return dynamo.put_after(self.table, item, before, counter)

    def write(self, *writes: Item) -> None:
        """Write all items or none. Raises ChangedError if a condition does not hold; other errors as `dynamo.call`."""
        try:
            dynamo.transact(writes)
        except dynamo.ConditionFailedError as error:
            raise ChangedError(error.refused) from error

    def update(self, **arguments: Any) -> None:
        """Update one item. Raises the same errors as `write`."""
        try:
            dynamo.call("update_item", TableName=self.table, **arguments)
        except dynamo.ConditionFailedError as error:
            raise ChangedError from error


def attempts(count: int = 12, first_pause: float = 0.01) -> Iterator[int]:
    """Count a few attempts, with growing random pauses of at most 0.2 seconds between them."""
    for attempt in range(count):
        if attempt:
            time.sleep(random.uniform(0, min(first_pause * 2**attempt, 0.2)))  # noqa: S311 (a pause, no secret)
        yield attempt
