"""The suspensions of PolicyTable: each service can read them, and each intent's transaction checks them.

Items (pk / sk): SUSPENSIONS#<copy>/SUSPENSIONS, with `suspended`: a map of names (an action's, or `*`) to suspensions.
One transaction writes all copies. An intent's transaction checks one of them, by its task's id: two transactions that
check one item conflict with each other, two that check different copies do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from zlib import crc32

from qaes.adapters import dynamo, settings
from qaes.domain.policy_events import EVERY_ACTION
from qaes.domain.suspensions import Suspension

Item = dict[str, Any]

COPIES = 8


def check(action: str, task_id: str) -> Item:
    """Return the part of an intent's transaction that fails while `action`, or every action, is suspended."""
    neither_is_suspended = "attribute_not_exists(suspended.#action) AND attribute_not_exists(suspended.#all)"
    return {
        "ConditionCheck": {
            "TableName": _table(),
            "Key": _key(_copy_of(task_id)),
            "ConditionExpression": neither_is_suspended,
            "ExpressionAttributeNames": {"#action": action, "#all": EVERY_ACTION},
        }
    }


def is_check(write: Item) -> bool:
    """Return whether a part of a transaction is a `check`: if its condition fails, the action is suspended."""
    checked = write.get("ConditionCheck")
    return checked is not None and checked["ExpressionAttributeNames"].get("#all") == EVERY_ACTION


def suspended(action: str | None = None, task_id: str = "", *, consistent: bool = True) -> dict[str, Suspension]:
    """Read the suspensions: of all names, or only of `action` and `*`.

    A read that is not `consistent` costs half, and may be a moment old. It is sufficient for information, because each
    intent's transaction checks the suspensions.
    """
    item = dynamo.get(_table(), **_names(_copy_of(task_id)), consistent=consistent)
    found = item["suspended"]["M"] if item else {}
    return {
        name: _suspension(value["M"]) for name, value in found.items() if action in (None, name) or name == EVERY_ACTION
    }


def puts(names: Mapping[str, Suspension]) -> list[Item]:
    """Return the writes of all copies, for one transaction."""
    value = {"suspended": {"M": {name: {"M": _attributes(each)} for name, each in names.items()}}}
    return [{"Put": {"TableName": _table(), "Item": _key(copy) | value}} for copy in range(COPIES)]


def _copy_of(task_id: str) -> int:
    return crc32(task_id.encode()) % COPIES


def _names(copy: int) -> dict[str, str]:
    return {"pk": f"SUSPENSIONS#{copy}", "sk": "SUSPENSIONS"}


def _key(copy: int) -> Item:
    return dynamo.key(**_names(copy))


def _attributes(suspension: Suspension) -> Item:
    return {name: {"S": value} for name, value in suspension.model_dump(exclude_none=True).items()}


def _suspension(attributes: Item) -> Suspension:
    return Suspension.model_validate({name: value["S"] for name, value in attributes.items()})


def _table() -> str:
    return settings.text("POLICY_TABLE")
