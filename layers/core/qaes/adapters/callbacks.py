"""CallbacksTable: callback tokens of states that wait for people or for the ledger. A token never leaves the service.

pk=task_id, sk=APPROVAL#step or ACTION#step. This is the only table from which a role can delete: used tokens.
"""

from __future__ import annotations

import time
from contextlib import suppress
from typing import Any, Literal, NamedTuple

from qaes.adapters import dynamo, settings
from qaes.domain.errors import ConflictError

Item = dict[str, Any]
Kind = Literal["APPROVAL", "ACTION"]


class Callback(NamedTuple):
    """A callback token and the state that waits with it.

    The token expires after `expires_in` seconds unless it is used. `attempt_of` is the run whose attempt the state
    waits for, if it is not its own.
    """

    kind: Kind
    task_id: str
    step_index: int
    token: str
    expires_in: int
    run: int
    attempt_of: int | None = None


class CallbacksTable:
    """Callback tokens of tasks. All reads are consistent."""

    def __init__(self, table: str | None = None) -> None:
        self._table = table or settings.text("CALLBACKS_TABLE")

    def put(self, callback: Callback) -> Item:
        """Return the write of a token. It replaces earlier tokens, but never a later run's."""
        item = _key(callback.kind, callback.task_id, callback.step_index) | {
            "token": {"S": callback.token},
            "run": {"N": str(callback.run)},
            "attempt_of": {"N": str(callback.attempt_of or callback.run)},
            "expires_at_epoch": {"N": str(int(time.time()) + callback.expires_in)},
        }
        no_later_run_waits = "attribute_not_exists(#run) OR #run <= :run"
        put = {
            "TableName": self._table,
            "Item": item,
            "ConditionExpression": no_later_run_waits,
            "ExpressionAttributeNames": {"#run": "run"},
            "ExpressionAttributeValues": {":run": {"N": str(callback.run)}},
        }
        return {"Put": put}

    def wait(self, callback: Callback) -> None:
        """Store a token by itself, as `put`. Raises ConflictError when a later run waits."""
        try:
            dynamo.call("put_item", **self.put(callback)["Put"])
        except dynamo.ConditionFailedError as error:
            raise ConflictError("a later execution of the task has started") from error

    def token(self, kind: Kind, task_id: str, step_index: int, *, failed: int | None = None) -> str | None:
        """Read the token of the state that waits; with `failed`, unless it waits for an attempt after that run's."""
        key = _key(kind, task_id, step_index)
        item = dynamo.get(self._table, key["pk"]["S"], key["sk"]["S"])
        if item is None or (failed is not None and failed < int(item["attempt_of"]["N"])):
            return None
        return str(item["token"]["S"])

    def forget(self, kind: Kind, task_id: str, step_index: int, token: str) -> None:
        """Delete a token that was used; one that was stored since then stays."""
        with suppress(dynamo.ConditionFailedError):
            dynamo.call(
                "delete_item",
                TableName=self._table,
                Key=_key(kind, task_id, step_index),
                ConditionExpression="#token = :token",
                ExpressionAttributeNames={"#token": "token"},
                ExpressionAttributeValues={":token": {"S": token}},
            )


def _key(kind: Kind, task_id: str, step_index: int) -> Item:
    return dynamo.key(task_id, f"{kind}#{step_index:03d}")
