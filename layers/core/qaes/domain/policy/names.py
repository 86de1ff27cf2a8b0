"""The names, texts and bounds that every part of a policy document shares."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from typing import Annotated

from pydantic import Field, ValidationError

from qaes.domain.errors import InvalidInputError
from qaes.domain.text import flaw_of

TRANSFER_ACTION = "transfer_funds"
"""The one action type whose steps move money: its rule judges every transfer, regardless of the task."""
ACTION_TYPE_PATTERN = r"^[A-Za-z0-9_.-]{1,64}$"
POLICY_ID_PATTERN = r"^policy-v[1-9][0-9]{0,8}-[0-9a-f]{64}$"
POINTER_PATTERN = r"^(/([^/~]|~[01])+){1,16}$"
_PATTERN_FLAWS = {
    ACTION_TYPE_PATTERN: "a name has 1 to 64 letters, digits, `_`, `.` or `-`",
    POINTER_PATTERN: "must be a JSON Pointer, such as `/amount` or `/order/total`",
}
MAX_INTEGER = 2**53 - 1
"""The largest integer that every reader of JSON reads alike."""
MAX_SECONDS = 2_592_000
"""Thirty days: the longest that an approval stays open."""

ActionType = Annotated[str, Field(pattern=ACTION_TYPE_PATTERN)]
Name = ActionType
"""The name of an action, a group or a unit."""

_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})
"""Unicode categories: control, format (bidi, zero-width), surrogate, private use, line and paragraph separator."""


def text_flaw(text: str) -> str | None:
    """Return the reason why a text of a format 2 document is rejected; None if it is acceptable."""
    for letter in text:
        if unicodedata.category(letter) in _INVISIBLE:
            return f"contains U+{ord(letter):04X}, which is a control, bidi or zero-width character"
    return flaw_of(text, lines=False)


def once(values: Iterable[str]) -> None:
    """Raise ValueError if a value appears twice."""
    seen: set[str] = set()
    for value in values:
        if value in seen:
            raise ValueError(f"`{value}` appears twice")
        seen.add(value)


def version_of(policy_id: str) -> int | None:
    """Return the number in a policy's id; None for a malformed id."""
    return int(policy_id.split("-")[1][1:]) if re.fullmatch(POLICY_ID_PATTERN, policy_id) else None


def policy_id_of(version: int, hash_: str) -> str:
    """Return the id of a version: its number and its document's whole hash, which pins the document."""
    return f"policy-v{version}-{hash_}"


def invalid_input(error: ValidationError, within: str = "") -> InvalidInputError:
    """Turn the first error of a model into one whose `field` is the path in the document."""
    first = error.errors()[0]
    message, path = first["msg"].removeprefix("Value error, "), path_of((within, *first["loc"]))
    if first["type"] == "policy" and first["ctx"]["at"]:
        path = f"{path}.{first['ctx']['at']}"
    if first["type"] == "extra_forbidden":
        message = "the format has no such member"
    if first["type"] == "string_pattern_mismatch":
        message = _PATTERN_FLAWS.get(first["ctx"]["pattern"], message)
    return InvalidInputError(message, field=path or None)


def path_of(location: Iterable[int | str]) -> str:
    """Return the dotted path of a model's error; the tags of a union (`<deny>`) are no part of the document."""
    return ".".join(str(part) for part in location if part != "" and not re.fullmatch(r"<[a-z]+>|\[key\]", str(part)))
