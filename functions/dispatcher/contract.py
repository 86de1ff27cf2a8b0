"""The handler contract (docs/actions.md): the content of a request, and the meaning of each answer.

This module is pure. A transport returns a `Reply`; `classify` turns the reply into the one `Outcome` that the contract
gives it. Every reply that the contract does not name has an unknown outcome: the handler may have acted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from pydantic import Field

from qaes.domain.canonical import canonical_json
from qaes.domain.errors import InvalidInputError
from qaes.domain.models import Model
from qaes.domain.text import inert

Mode = Literal["execute", "dry_run", "query"]
Kind = Literal["done", "accepted", "refused", "busy", "not_found", "conflict", "not_sent", "unknown"]

MAX_ANSWER_BYTES = 1024 * 1024
MAX_DRY_RUN_BYTES = 2 * 1024
MAX_MESSAGE_LENGTH = 500
MAX_RETRY_AFTER = 3600
"""Seconds: a handler cannot postpone the next request for longer."""

_REFERENCE = re.compile(r"(?P<task_id>task_[0-9a-f-]{36})\.(?P<step>0|[1-9][0-9]{0,2})\.(?P<attempt>[1-9][0-9]{0,5})")
_CODE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_HASH = r"^[0-9a-f]{64}$"
_TIMESTAMP = r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}\.[0-9]{3}Z$"


# References


class Reference(NamedTuple):
    """One attempt at one step of one task; its text is the key under which a handler acts at most once."""

    task_id: str
    step_index: int
    attempt: int

    def __str__(self) -> str:
        """Return `<task id>.<index of the step>.<attempt>`, which is fit for a header and for a path."""
        return f"{self.task_id}.{self.step_index}.{self.attempt}"

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read the text of a reference.

        Raises
        ------
        InvalidInputError
            The text is not a reference in its one spelling.
        """
        match = _REFERENCE.fullmatch(text)
        if match is None:
            raise InvalidInputError("`reference` must be `<task id>.<step>.<attempt>`", field="reference")
        return cls(match["task_id"], int(match["step"]), int(match["attempt"]))


# The request


class Decision(Model):
    """One approver's yes, as a handler sees it."""

    subject: str
    decided_at: str = Field(pattern=_TIMESTAMP)


class ActionRequest(Model):
    """The body of a request to a handler, the same in every mode."""

    reference: str = Field(pattern=rf"^{_REFERENCE.pattern}$")
    mode: Mode
    task_id: str
    step_id: str
    action: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    policy_id: str
    parameters: dict[str, Any]
    requester: str
    agent: str | None = None
    approvals: tuple[Decision, ...] = ()
    plan_hash: str = Field(pattern=_HASH)
    step_hash: str = Field(pattern=_HASH)
    deadline: str = Field(pattern=_TIMESTAMP)

    def body(self) -> bytes:
        """Return the request as canonical JSON: the same request has the same bytes."""
        return canonical_json(self.model_dump(mode="json")).encode()


# Results of a transport


@dataclass(frozen=True)
class Received:
    """A complete answer. `status` is the HTTP status, None for the answer of a Lambda function."""

    body: bytes
    status: int | None = None
    retry_after: str | None = None


@dataclass(frozen=True)
class NotSent:
    """The transport is certain that the handler received nothing."""

    reason: str


@dataclass(frozen=True)
class NoAnswer:
    """The handler may have received the request, and no complete answer came back."""

    reason: str


Reply = Received | NotSent | NoAnswer


# Meaning of a reply


class Outcome(Model):
    """The meaning of one reply. `reason` explains it in words; `code` and `message` are the handler's own."""

    kind: Kind
    reason: str = ""
    result: Any = None
    code: str | None = None
    message: str | None = None
    retry_after: int | None = None


@dataclass(frozen=True)
class Terms:
    """The terms of the policy's action that decide about an answer.

    Parameters
    ----------
    flaw_of_result
        Returns why a result does not match the action's schema, or None if it matches.
    callbacks
        Whether the action has `public_keys`: a handler without them cannot finish later.
    """

    flaw_of_result: Callable[[Any], str | None]
    callbacks: bool = False


_STATUS_OF: dict[str, tuple[int, ...]] = {
    "done": (200,),
    "accepted": (202,),
    "refused": (422,),
    "busy": (429, 503),
    "not_found": (404,),
    "conflict": (409,),
}


def classify(mode: Mode, reply: Reply, terms: Terms) -> Outcome:
    """Return the outcome that the contract gives to a reply."""
    if isinstance(reply, NotSent):
        return Outcome(kind="not_sent", reason=fold_message(reply.reason))
    if isinstance(reply, NoAnswer):
        return _unknown(reply.reason)
    try:
        answer = _object(reply.body)
    except ValueError as error:
        return _by_status_alone(reply) or _unknown(f"the answer {error}")
    status = answer.get("status")
    if not isinstance(status, str) or status not in _STATUS_OF:
        return _by_status_alone(reply) or _unknown("the answer has no `status` of the contract")
    if reply.status is not None and reply.status not in _STATUS_OF[status]:
        return _unknown(f"HTTP {reply.status} contradicts the answer's status `{status}`")
    return _READERS[status](mode, answer, reply, terms)


def _unknown(reason: str) -> Outcome:
    return Outcome(kind="unknown", reason=fold_message(reason))


def _by_status_alone(reply: Received) -> Outcome | None:
    """Return the outcome of an HTTP status that needs no body: a proxy may have answered, so no status means `done`."""
    if reply.status == 429 or (reply.status == 503 and reply.retry_after is not None):
        return Outcome(kind="busy", reason=f"HTTP {reply.status}", retry_after=_seconds(reply.retry_after))
    if reply.status == 409:
        return Outcome(kind="conflict", reason="HTTP 409")
    return _unknown(f"HTTP {reply.status} without an answer of the contract") if reply.status is not None else None


def _done(mode: Mode, answer: dict[str, Any], _reply: Received, terms: Terms) -> Outcome:
    result = answer.get("result")
    try:
        text = canonical_json(result)
    except InvalidInputError as error:
        return _unknown(f"the result {error.message}")
    if mode == "dry_run":
        if len(text.encode()) > MAX_DRY_RUN_BYTES:
            return _unknown(f"the answer to a dry run is larger than {MAX_DRY_RUN_BYTES} bytes")
        return Outcome(kind="done", result=result)
    flaw = terms.flaw_of_result(result)
    if flaw is not None:
        return _unknown(f"the result does not match the action's `result` schema: {flaw}")
    return Outcome(kind="done", result=result)


def _accepted(mode: Mode, _answer: dict[str, Any], _reply: Received, terms: Terms) -> Outcome:
    if mode == "dry_run":
        return _unknown("a dry run cannot be accepted for later")
    if not terms.callbacks:
        return _unknown("the handler accepted the request, but the action has no `public_keys` for its callback")
    return Outcome(kind="accepted")


def _refused(_mode: Mode, answer: dict[str, Any], _reply: Received, _terms: Terms) -> Outcome:
    error = answer.get("error")
    code, message = (error.get("code"), error.get("message")) if isinstance(error, dict) else (None, None)
    return Outcome(
        kind="refused",
        code=code if isinstance(code, str) and _CODE.fullmatch(code) else "unspecified",
        message=fold_message(message) if isinstance(message, str) else "The handler gave no message.",
    )


def _busy(_mode: Mode, answer: dict[str, Any], reply: Received, _terms: Terms) -> Outcome:
    if reply.status == 503 and reply.retry_after is None:
        return _unknown("HTTP 503 without Retry-After")
    named = answer.get("retry_after")
    seconds = named if isinstance(named, int) and not isinstance(named, bool) else _seconds(reply.retry_after)
    return Outcome(kind="busy", retry_after=None if seconds is None else min(max(seconds, 1), MAX_RETRY_AFTER))


def _not_found(mode: Mode, _answer: dict[str, Any], _reply: Received, _terms: Terms) -> Outcome:
    if mode != "query":
        return _unknown("`not_found` answers a query only")
    return Outcome(kind="not_found")


def _conflict(_mode: Mode, _answer: dict[str, Any], _reply: Received, _terms: Terms) -> Outcome:
    return Outcome(kind="conflict", reason="the handler has this reference with different content")


_READERS: dict[str, Callable[[Mode, dict[str, Any], Received, Terms], Outcome]] = {
    "done": _done,
    "accepted": _accepted,
    "refused": _refused,
    "busy": _busy,
    "not_found": _not_found,
    "conflict": _conflict,
}


def _seconds(retry_after: str | None) -> int | None:
    """Return the seconds of a Retry-After header; None if it is a date or missing, which sets no time here."""
    if retry_after is None or not re.fullmatch("[0-9]{1,9}", retry_after, re.ASCII):
        return None
    return min(max(int(retry_after), 1), MAX_RETRY_AFTER)


# Text and JSON that a handler wrote


def fold_message(text: str) -> str:
    """Return a handler's text on one line, inert and with at most `MAX_MESSAGE_LENGTH` characters."""
    line = " ".join(text[: 4 * MAX_MESSAGE_LENGTH].split())
    shown = inert(line[: MAX_MESSAGE_LENGTH + 1])
    return shown if len(shown) <= MAX_MESSAGE_LENGTH else shown[: MAX_MESSAGE_LENGTH - 1] + "…"


def _object(body: bytes) -> dict[str, Any]:
    """Read a JSON object that every reader reads alike.

    Raises
    ------
    ValueError
        The body is not one; the message continues the sentence "the answer …".
    """
    if len(body) > MAX_ANSWER_BYTES:
        raise ValueError(f"is larger than {MAX_ANSWER_BYTES} bytes")
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise ValueError("is not JSON with unique names") from None
    if not isinstance(value, dict):
        raise ValueError("is not a JSON object")  # noqa: TRY004 - the caller handles one kind of error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name occurs twice")
    return members


def _no_constant(name: str) -> Any:
    raise ValueError(name)
