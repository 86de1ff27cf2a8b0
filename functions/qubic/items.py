"""Items of a table of the qubic service: read consistently, written all or nothing, if nobody else was first."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

from qaes.adapters import dynamo

Item = dict[str, Any]
item_key = dynamo.key


class ChangedError(Exception):
    """Another writer was first: nothing has been written, and the caller reads again.

    `refused` lists the writes (from 0) whose conditions did not hold.
    """

    def __init__(self, refused: tuple[int, ...] = (0,)) -> None:
        super().__init__("another writer was first")
        self.refused = refused


class Items:
    """The items of one table, in DynamoDB's own notation: `{"name": {"S": "text"}}`."""

    def __init__(self, table: str) -> None:
        self.table = table

    def get(self, pk: str, sk: str) -> Item | None:
        """Read one item, as it is now."""
        return dynamo.get(self.table, pk, sk)

    def query(self, **arguments: Any) -> Iterator[Item]:
        """Read the items of a query, as they are now."""
        return dynamo.items(TableName=self.table, ConsistentRead=True, **arguments)

    def put_new(self, item: Item) -> Item:
        """For `write`: put an item that is not there yet."""
        return dynamo.put_new(self.table, item)

    def put_after(self, item: Item, before: int, counter: str = "version") -> Item:
        """For `write`: put an item whose `counter` was `before` when it was read; 0: it was not there."""
        return dynamo.put_after(self.table, item, before, counter)

    def write(self, *writes: Item) -> None:
        """Write all or nothing. Raises ChangedError if a condition does not hold, and what `dynamo.call` raises."""
        try:
            dynamo.transact(writes)
        except dynamo.ConditionFailedError as error:
            raise ChangedError(error.refused) from error

    def update(self, **arguments: Any) -> None:
        """Update one item. Raises as `write`."""
        try:
            dynamo.call("update_item", TableName=self.table, **arguments)
        except dynamo.ConditionFailedError as error:
            raise ChangedError from error


def attempts(count: int = 12, first_pause: float = 0.01) -> Iterator[int]:
    """Count a few attempts, with growing random pauses of at most 0.2 seconds in between."""
    for attempt in range(count):
        if attempt:
            time.sleep(random.uniform(0, min(first_pause * 2**attempt, 0.2)))  # noqa: S311 (a pause, no secret)
        yield attempt
