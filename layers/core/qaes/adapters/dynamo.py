"""DynamoDB calls with one retry policy for all services.

A call is repeated after a random pause if it is throttled, gets no response, or conflicts with another transaction.
After `PATIENCE_SECONDS` it raises an error, which HTTP reports as 503 and the state machine retries. A condition that
does not hold is never retried here: the caller reads again and decides.

A transaction carries one token in all attempts: if an attempt was committed but its response was lost, the next
attempt succeeds without a change. A conditional write of a single item has no such token: its caller must expect that
the condition may fail because of an own attempt whose response was lost.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from typing import Any
from uuid import uuid4

from qaes.adapters import clients
from qaes.domain.errors import ThrottledError, TransientError

Item = dict[str, Any]

PATIENCE_SECONDS = 5.0
"""No attempt begins later than this after the first."""
FIRST_PAUSE_SECONDS = 0.025
LONGEST_PAUSE_SECONDS = 0.8
URGENT_PATIENCE_SECONDS = 20.0
"""Patience of an urgent transaction, which writes items that many other transactions check. Its pauses stay short."""
URGENT_PAUSE_SECONDS = 0.05
BATCH_GET = 100
"""Maximum number of keys in a BatchGetItem request."""

_CONFLICTS = frozenset({"TransactionConflictException", "TransactionInProgressException", "TransactionConflict"})
_BUSY_REASONS = frozenset({"TransactionConflict", "ThrottlingError", "ProvisionedThroughputExceeded"})


class ConditionFailedError(Exception):
    """A condition does not hold; `refused` lists the transaction's writes (from 0) whose conditions failed."""

    def __init__(self, refused: tuple[int, ...] = (0,)) -> None:
        super().__init__("the condition does not hold")
        self.refused = refused


def call(operation: str, **arguments: Any) -> dict[str, Any]:
    """Call an operation of DynamoDB by the client's method name, such as `get_item`.

    Raises
    ------
    ConditionFailedError
        The condition of the write, or of a write of the transaction, does not hold.
    ThrottledError
        DynamoDB throttles the call, or other callers keep writing the same items.
    TransientError
        DynamoDB does not respond. The write may have been made.
    """
    return _repeat(Pauses(), operation, **arguments)


def _repeat(pauses: Pauses, operation: str, **arguments: Any) -> dict[str, Any]:
    while True:
        try:
            answer: dict[str, Any] = getattr(clients.client("dynamodb"), operation)(**arguments)
        except Exception as error:  # noqa: BLE001 botocore's errors; importing them here would slow down cold starts
            pauses.wait_or_raise(_retryable(error))
        else:
            return answer


def transact(writes: Sequence[Item], *, urgent: bool = False) -> None:
    """Write all items or none; `urgent`: retry faster and longer if other callers use the items. Raises as `call`."""
    pauses = Pauses(URGENT_PATIENCE_SECONDS, URGENT_PAUSE_SECONDS) if urgent else Pauses()
    _repeat(pauses, "transact_write_items", TransactItems=list(writes), ClientRequestToken=str(uuid4()))


def get(table: str, pk: str, sk: str, *, consistent: bool = True) -> Item | None:
    """Read one item; without `consistent`, as it was a moment ago, for half of the cost."""
    found = call("get_item", TableName=table, Key=key(pk, sk), ConsistentRead=consistent)
    item: Item | None = found.get("Item")
    return item


def get_many(table: str, keys: Sequence[Item], **options: Any) -> Iterator[Item]:
    """Read many items in any order. Items that do not exist are omitted."""
    for start in range(0, len(keys), BATCH_GET):
        left: Any = list(keys[start : start + BATCH_GET])
        pauses = Pauses()
        while left:
            request = {table: {"Keys": left, "ConsistentRead": True} | options}
            answer = call("batch_get_item", RequestItems=request)
            yield from answer["Responses"].get(table, [])
            left = answer.get("UnprocessedKeys", {}).get(table, {}).get("Keys", [])
            if left:
                pauses.wait_or_raise(ThrottledError("DynamoDB throttles the table"))


def pages(operation: str = "query", **arguments: Any) -> Iterator[dict[str, Any]]:
    """Read the pages of a query or a scan lazily."""
    while True:
        page = call(operation, **arguments)
        yield page
        if "LastEvaluatedKey" not in page:
            return
        arguments["ExclusiveStartKey"] = page["LastEvaluatedKey"]


def items(operation: str = "query", **arguments: Any) -> Iterator[Item]:
    """Read the items of a query or a scan, in order."""
    for page in pages(operation, **arguments):
        yield from page["Items"]


def put_new(table: str, item: Item) -> Item:
    """Make the write of an item that is not there yet, for `transact`."""
    not_there_yet = "attribute_not_exists(pk)"
    return {"Put": {"TableName": table, "Item": item, "ConditionExpression": not_there_yet}}


def put_after(table: str, item: Item, before: int, counter: str = "version") -> Item:
    """Return a write that puts an item only if its `counter` is still `before`; 0: no item exists."""
    put = put_new(table, item)
    if before:
        counter_is_unchanged = f"{counter} = :before"
        put["Put"] |= {
            "ConditionExpression": counter_is_unchanged,
            "ExpressionAttributeValues": {":before": {"N": str(before)}},
        }
    return put


def key(pk: str, sk: str) -> Item:
    """Return the key attributes of an item."""
    return {"pk": {"S": pk}, "sk": {"S": sk}}


class Pauses:
    """Random, growing pauses (full jitter) within PATIENCE_SECONDS."""

    def __init__(self, patience: float | None = None, limit: float = LONGEST_PAUSE_SECONDS) -> None:
        self._end = time.monotonic() + (PATIENCE_SECONDS if patience is None else patience)
        self._longest, self._limit = FIRST_PAUSE_SECONDS, limit

    def wait_or_raise(self, error: TransientError) -> None:
        pause = random.uniform(0, self._longest)  # noqa: S311 (a pause, no secret)
        if time.monotonic() + pause > self._end:
            raise error
        time.sleep(pause)
        self._longest = min(2 * self._longest, self._limit)


def _retryable(error: Exception) -> TransientError:
    """Return the error to raise when no attempt is left. Raises at once if a retry cannot help."""
    from botocore import exceptions
    from botocore.exceptions import BotoCoreError, ClientError

    if isinstance(error, (exceptions.ConnectionError, exceptions.HTTPClientError)):
        failure = TransientError(f"the table did not respond ({type(error).__name__})")
        failure.__cause__ = error
        return failure
    if isinstance(error, BotoCoreError):
        raise TransientError(f"the table could not be called ({type(error).__name__})") from error
    if not isinstance(error, ClientError):
        raise error
    code = str(error.response["Error"]["Code"])
    if code == "ConditionalCheckFailedException":
        raise ConditionFailedError from error
    reasons = [reason.get("Code") for reason in error.response.get("CancellationReasons", [])]
    refused = tuple(index for index, reason in enumerate(reasons) if reason == "ConditionalCheckFailed")
    if refused:
        raise ConditionFailedError(refused) from error
    stated = set(reasons) - {None, "None"}
    if clients.is_busy(code) or code in _CONFLICTS or (stated and stated <= _BUSY_REASONS):
        throttled = ThrottledError("the table is busy; try again")
        throttled.__cause__ = error
        return throttled
    raise error
