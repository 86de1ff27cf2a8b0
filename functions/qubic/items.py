"""Items of a table of the qubic service: read consistently, written all or nothing, if nobody else was first."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from typing import Any

from botocore.exceptions import ClientError

from qaes.adapters import clients

Item = dict[str, Any]

_WORTH_ANOTHER_TRY = {
    "ConditionalCheckFailed",
    "TransactionConflict",
    "ThrottlingError",
    "ProvisionedThroughputExceeded",
}


class ChangedError(Exception):
    """What was read is no longer so, or was being changed: nothing has been written."""


class Items:
    """The items of one table, in DynamoDB's own notation: `{"name": {"S": "text"}}`."""

    def __init__(self, table: str) -> None:
        self.table = table

    def get(self, pk: str, sk: str) -> Item | None:
        """Read one item, as it is now."""
        found = clients.client("dynamodb").get_item(TableName=self.table, Key=item_key(pk, sk), ConsistentRead=True)
        item: Item | None = found.get("Item")
        return item

    def put_new(self, item: Item) -> Item:
        """For `write`: put an item that is not there yet."""
        not_there_yet = "attribute_not_exists(pk)"
        return {"Put": {"TableName": self.table, "Item": item, "ConditionExpression": not_there_yet}}

    def put_after(self, item: Item, before: int, counter: str = "version") -> Item:
        """For `write`: put an item whose `counter` was `before` when it was read; 0: it was not there."""
        put = self.put_new(item)
        if before:
            nobody_wrote_since = f"{counter} = :before"
            put["Put"] |= {
                "ConditionExpression": nobody_wrote_since,
                "ExpressionAttributeValues": {":before": {"N": str(before)}},
            }
        return put

    def write(self, *writes: Item) -> None:
        """Write all or nothing. Raises ChangedError when it is worth reading again."""
        try:
            clients.client("dynamodb").transact_write_items(TransactItems=list(writes))
        except ClientError as error:
            reasons = {each.get("Code") for each in error.response.get("CancellationReasons", ())} - {"None", None}
            cancelled = error.response["Error"]["Code"] == "TransactionCanceledException"
            if cancelled and reasons and reasons <= _WORTH_ANOTHER_TRY:
                raise ChangedError from error
            raise


def item_key(pk: str, sk: str) -> Item:
    """Make the key of an item."""
    return {"pk": {"S": pk}, "sk": {"S": sk}}


def attempts(count: int = 12, first_pause: float = 0.01) -> Iterator[int]:
    """Count a few attempts, with growing random pauses of at most 0.2 seconds in between."""
    for attempt in range(count):
        if attempt:
            time.sleep(random.uniform(0, min(first_pause * 2**attempt, 0.2)))  # noqa: S311 (a pause, no secret)
        yield attempt
