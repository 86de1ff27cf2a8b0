"""Audit entries: one chain for each stream, in which every entry contains the hash of the previous one.

A stream is a task, named by its id, or the policy (`policy_events.STREAM`). Entries of a task have version 1, all
others version 2, which adds the stream's name.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Iterable
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from qaes.domain.canonical import canonical_json, salted_hash
from qaes.domain.errors import InvalidInputError, QaesError
from qaes.domain.merkle import leaf_hash
from qaes.domain.models import Event, EventKind, Model
from qaes.domain.policy_events import STREAM, PolicyEvent, PolicyEventKind

GENESIS = "0" * 64
"""`prev` of a stream's first entry."""

Check = Literal["text", "log", "seq", "prev", "leaf", "index"]
Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
HashOrNone = Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]


class BrokenChainError(QaesError):
    """A chain does not hold: `seq` is the first wrong entry (from 1), and `check` the failed check."""

    def __init__(self, seq: int, check: Check, message: str) -> None:
        super().__init__(f"entry {seq}: {message}", seq=seq, check=check)
        self.seq = seq
        self.check = check


class _Entry(Model):
    log_id: str
    seq: int = Field(ge=1)
    step_index: int = Field(ge=-1)
    step_id: str
    step_type: str
    actor: str
    status: str
    input_hash: HashOrNone
    output_hash: HashOrNone
    plan_hash: HashOrNone
    policy_id: str
    nonce: str = Field(pattern=r"^[0-9a-f]{32}$")
    prev: Hash
    timestamp: str


class TaskEntry(_Entry):
    """A task's event in the form that is hashed. Without a step, `step_index` is -1 and `step_type` is the kind."""

    v: Literal[1] = 1
    task_id: str
    kind: EventKind

    def stream_name(self) -> str:
        return self.task_id


class PolicyEntry(_Entry):
    """An event of the policy in the form that is hashed. It has no task, no plan and no step."""

    v: Literal[2] = 2
    stream: Literal["policy"] = STREAM
    task_id: None = None
    kind: PolicyEventKind

    def stream_name(self) -> str:
        return self.stream


AuditEntry = TaskEntry | PolicyEntry
_ENTRY: TypeAdapter[AuditEntry] = TypeAdapter(Annotated[AuditEntry, Field(discriminator="v")])


def build_entry(event: Event, *, log_id: str, task_id: str, seq: int, prev: str) -> TaskEntry:
    """Build the entry for `event`, number `seq` of its task; `prev` is the leaf hash of the previous entry.

    The nonce is random, so hashing guesses does not reveal an entry's text. Two calls return two different entries; the
    one that is stored first counts.
    """
    return TaskEntry(
        log_id=log_id,
        task_id=task_id,
        seq=seq,
        step_index=event.step_index,
        step_id=event.step_id,
        step_type=event.step_type or event.kind,
        kind=event.kind,
        actor=event.actor,
        status=event.status,
        input_hash=event.input_hash,
        output_hash=event.output_hash,
        plan_hash=event.plan_hash,
        policy_id=event.policy_id,
        nonce=secrets.token_hex(16),
        prev=prev,
        timestamp=event.timestamp,
    )


def build_policy_entry(event: PolicyEvent, *, log_id: str, prev: str) -> PolicyEntry:
    """Build the entry for an event of the policy, as `build_entry`; its number is the event's."""
    return PolicyEntry(
        log_id=log_id,
        seq=event.number,
        step_index=-1,
        step_id="",
        step_type=event.kind,
        kind=event.kind,
        actor=event.actor,
        status=event.status,
        input_hash=salted_hash(event.salt, json.loads(event.input)),
        output_hash=salted_hash(event.salt, json.loads(event.output)),
        plan_hash="",
        policy_id=event.policy_id,
        nonce=secrets.token_hex(16),
        prev=prev,
        timestamp=event.timestamp,
    )


def entry_text(entry: AuditEntry) -> str:
    """Return the RFC 8785 text that is stored and hashed."""
    return canonical_json(entry.model_dump(mode="json"))


def parse_entry(text: str) -> AuditEntry:
    """Parse a stored text.

    Raises
    ------
    InvalidInputError
        The text is not an entry, or is not in the canonical form of `entry_text`.
    """
    try:
        entry = _ENTRY.validate_json(text, strict=True)
    except ValidationError as error:
        raise InvalidInputError("the text is not an audit entry") from error
    if entry_text(entry) != text:
        raise InvalidInputError("the text is not the canonical text of the entry")
    return entry


def verify_chain(links: Iterable[tuple[str, str]], *, log_id: str, stream: str) -> str:
    """Check a stream's whole chain, or a prefix of it.

    Parameters
    ----------
    links
        (text, leaf hash) of each stored entry, from the first.
    log_id, stream
        The log and the stream that the entries must belong to. The caller provides them; the entries do not.

    Returns
    -------
    str
        The leaf hash of the last entry; GENESIS for an empty chain.

    Raises
    ------
    BrokenChainError
        The first link that does not hold. Its `check`: `text` (not a canonical entry), `log` (another log or stream),
        `seq` (a gap), `prev` (wrong previous entry) or `leaf` (another hash).
    """
    prev = GENESIS
    for seq, (text, leaf) in enumerate(links, start=1):
        try:
            entry = parse_entry(text)
        except InvalidInputError as error:
            raise BrokenChainError(seq, "text", error.message) from error
        if (entry.log_id, entry.stream_name()) != (log_id, stream):
            raise BrokenChainError(seq, "log", "the entry belongs to another log or stream")
        if entry.seq != seq:
            raise BrokenChainError(seq, "seq", f"its number is {entry.seq}")
        if entry.prev != prev:
            raise BrokenChainError(seq, "prev", "the entry does not name the previous entry")
        if leaf_hash(text) != leaf:
            raise BrokenChainError(seq, "leaf", "its text does not have the recorded hash")
        prev = leaf
    return prev
