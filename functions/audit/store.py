"""The entries (append-only), the indexes that find them by a hash, and the outbox; `audit.log` has their log.

All reads are consistent, but those of an index. Every call is repeated as `qaes.adapters.dynamo` repeats it, and
raises what that raises.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from datetime import date, timedelta
from functools import cached_property
from itertools import groupby
from typing import Any, Literal, TypeVar

from qaes.adapters import dynamo, settings
from qaes.adapters.decisions import DecisionsTable
from qaes.adapters.dynamo import get_many, key
from qaes.adapters.shards import day_keys
from qaes.adapters.task_events import Texts, events_of
from qaes.domain.audit import AuditEntry, BrokenChainError, entry_text, parse_entry
from qaes.domain.errors import InvalidInputError, NotFoundError, QaesError
from qaes.domain.merkle import leaf_hash
from qaes.domain.models import Event
from qaes.domain.tasks.decisions import Decided, is_decision

Item = dict[str, Any]
Role = Literal["leaf", "input", "output"]

EntryKey = tuple[str, int]
"""The stream (a task's id, or `policy`), and the number of the entry in it."""

ROLES: tuple[Role, ...] = ("leaf", "input", "output")
"""Attributes of an entry by which it is found, each with an index of its own: `by_leaf`, `by_input`, `by_output`."""
CALLS_AT_ONCE = 8
_LAST = 999_999
_Argument = TypeVar("_Argument")
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class StoredEntry:
    """An entry as stored: its exact text and the leaf hash that was recorded with it."""

    seq: int
    text: str
    leaf: str

    def intact(self) -> StoredEntry:
        """Return itself. Raises BrokenChainError when text and leaf hash do not belong together."""
        if leaf_hash(self.text) != self.leaf:
            raise BrokenChainError(self.seq, "leaf", "its text does not have the recorded hash")
        return self

    def parsed(self) -> AuditEntry | None:
        """Read the entry that the text says; None when it was altered so that it is none any more."""
        try:
            return parse_entry(self.text)
        except InvalidInputError:
            return None


@dataclass(frozen=True)
class Occurrence:
    """Where a hash occurs: as an entry's own leaf hash, or as the hash of what went in or came out."""

    task_id: str
    seq: int
    role: Role


class ForgedEventError(QaesError):
    """An event that claims a person's decision without one, or that takes the number of another event."""


class Outbox:
    """The events of tasks, written by the execution side; only read here.

    An event that a person made is believed only if the gateway has recorded the decision: its body is read there.
    """

    def __init__(self, table: str | None = None, decisions: str | None = None) -> None:
        self._table = table or settings.text("TASKS_TABLE")
        self._decisions_table = decisions

    @cached_property
    def _decisions(self) -> DecisionsTable:
        # The sweeper reads no decision, and its function has no right to.
        return DecisionsTable(self._decisions_table)

    def events_after(self, task_id: str, seq: int) -> Iterator[tuple[int, Event]]:
        """Read the events after number `seq` as (number, event), in order, without the texts that other items have.

        Raises ForgedEventError at the first event that somebody else than the gateway says a person made, or whose
        number an item before has.
        """
        last = 0
        for item in _range(self._table, task_id, "EVENT", seq + 1, _LAST):
            for number, event in events_of(item):
                if number <= last:
                    raise ForgedEventError(f"two items have an event {number}")
                last = number
                if number > seq:
                    yield number, self._genuine(task_id, number, event)

    def events(self, task_id: str) -> Iterator[tuple[int, Event]]:
        """Read all events, as `events_after`. Raises ForgedEventError also where one has a decision's number."""
        decided = self._decided(task_id)
        for number, event in self.events_after(task_id, 0):
            if number in decided and not is_decision(event):
                raise ForgedEventError(f"event {number} has the number of a person's decision")
            yield number, event

    def _genuine(self, task_id: str, number: int, event: Event | Decided) -> Event:
        if isinstance(event, Event) and not is_decision(event):
            return event
        decision = self._decisions.event(task_id, number) if isinstance(event, Decided) else None
        if decision is None or not is_decision(decision):
            raise ForgedEventError(f"event {number} is a person's, and no decision stands behind it")
        return decision

    def disclosed(self, task_id: str) -> dict[int, Event]:
        """Read the events of a task, with their texts, by their numbers; none from a forged one on."""
        texts = Texts(self._table, task_id, self._request(task_id))
        found: dict[int, Event] = {}
        with suppress(ForgedEventError):
            for number, event in self.events(task_id):
                found[number] = texts.disclose(event)
        return found

    def agents(self, task_id: str) -> dict[int, str]:
        """Read which agents acted: the ids of their clients, by the event's number."""
        found = {number: _agent_of(event) for number, event in self._decided(task_id).items()}
        return {number: agent for number, agent in found.items() if agent is not None}

    def _decided(self, task_id: str) -> Mapping[int, Event]:
        try:
            return self._decisions.of(task_id).events
        except NotFoundError:
            return {}

    def _request(self, task_id: str) -> str:
        request = self._decisions.event(task_id, 1)
        return request.input if request else ""

    def written(self, first: str, last: str) -> Iterator[tuple[str, str, int]]:
        """Find the changes with a timestamp from `first` to `last`, as (timestamp, task, number), the oldest first.

        The number is that of the change's last event. From an index, which is a moment behind.
        """
        day, end = date.fromisoformat(first[:10]), date.fromisoformat(last[:10])
        while day <= end:
            yield from heapq.merge(*(self._written(key, first, last) for key in day_keys(day.isoformat())))
            day += timedelta(days=1)

    def _written(self, day: str, first: str, last: str) -> Iterator[tuple[str, str, int]]:
        found = dynamo.items(
            TableName=self._table,
            IndexName="by_day",
            KeyConditionExpression="#day = :day AND #timestamp BETWEEN :first AND :last",
            ExpressionAttributeNames={"#day": "day", "#timestamp": "timestamp"},
            ExpressionAttributeValues={":day": {"S": day}, ":first": {"S": first}, ":last": {"S": last}},
        )
        return ((item["timestamp"]["S"], item["pk"]["S"], _number(item)) for item in found)

    def tasks(self) -> Iterator[tuple[str, int, int | None]]:
        """Read all tasks as (task, number of its last event, how many it says it has); for fsck.

        What it says is None where only events are there. A scan is no snapshot: what was written meanwhile may be in
        one of the two and not in the other.
        """
        scanned = _scan(
            self._table,
            ProjectionExpression="pk, sk, #data",
            FilterExpression="sk = :task OR begins_with(sk, :event)",
            ExpressionAttributeNames={"#data": "data"},
            ExpressionAttributeValues={":task": {"S": "TASK"}, ":event": {"S": "EVENT#"}},
        )
        for task_id, items in groupby(scanned, lambda item: str(item["pk"]["S"])):
            last, said = 0, None
            for item in items:
                if item["sk"]["S"] == "TASK":
                    said = _events_said(item)
                else:
                    last = max(last, _number(item))
            yield task_id, last, said

    def there(self, keys: Sequence[EntryKey]) -> set[EntryKey]:
        """Tell which of the items, by task and number of the last event, are there."""
        found = get_many(
            self._table,
            [key(task_id, f"EVENT#{number:06d}") for task_id, number in keys],
            ProjectionExpression="pk, sk",
        )
        return {(item["pk"]["S"], _number(item)) for item in found}

    def last_event(self, task_id: str) -> int:
        """Read the number of the task's newest event; 0 where there is none."""
        item = _newest(self._table, task_id, "EVENT")
        return _number(item) if item else 0

    def events_said(self, task_id: str) -> int | None:
        """Read how many events the task says it has; None where there is no task."""
        item = dynamo.get(self._table, task_id, "TASK")
        return _events_said(item) if item else None


class AuditStore:
    """Entries. None is ever changed or deleted."""

    def __init__(self, table: str | None = None) -> None:
        self._entries = table or settings.text("AUDIT_ENTRIES_TABLE")

    def entries(self, task_id: str, first: int = 1, last: int = _LAST) -> Iterator[StoredEntry]:
        """Read the task's entries with numbers from `first` to `last`, in order."""
        return map(entry_of, _range(self._entries, task_id, "ENTRY", first, last))

    def entry(self, task_id: str, seq: int) -> StoredEntry | None:
        """Read one entry."""
        item = dynamo.get(self._entries, task_id, f"ENTRY#{seq:06d}")
        return entry_of(item) if item else None

    def texts(self, keys: Sequence[EntryKey]) -> dict[EntryKey, str]:
        """Read the texts of many entries; those that are not there are left out."""
        found = get_many(self._entries, [key(task_id, f"ENTRY#{seq:06d}") for task_id, seq in keys])
        return {(item["pk"]["S"], _number(item)): item["text"]["S"] for item in found}

    def trails(self) -> Iterator[tuple[str, list[tuple[StoredEntry, Item]]]]:
        """Read all tasks' entries, each with its `lookup` as stored, in order; for fsck, which no role here runs.

        A scan gives the items of one partition key one after the other, sorted.
        """
        for task_id, items in groupby(_scan(self._entries), lambda item: str(item["pk"]["S"])):
            yield task_id, [(entry_of(item), {role: item[role] for role in ROLES if role in item}) for item in items]

    def last_entry(self, task_id: str) -> StoredEntry | None:
        """Read the task's newest entry."""
        item = _newest(self._entries, task_id, "ENTRY")
        return entry_of(item) if item else None

    def append(self, entry: AuditEntry) -> StoredEntry | None:
        """Record an entry.

        Returns what was recorded; None when there is an entry with that number already, which stays as it is.
        """
        text = entry_text(entry)
        stored = StoredEntry(entry.seq, text, leaf_hash(text))
        item = key(entry.stream_name(), f"ENTRY#{entry.seq:06d}") | {"text": {"S": text}} | lookup(stored.leaf, entry)
        not_there_yet = "attribute_not_exists(pk)"
        return stored if put_if(self._entries, item, not_there_yet) else None

    def occurrences(self, hash_: str) -> Iterator[Occurrence]:
        """Find where the hash occurs, newest task first.

        From indexes, which are a moment behind: an entry that was recorded right now may be missing.
        """
        by_role = [self._found_by(role, hash_) for role in ROLES]
        found = heapq.merge(*by_role, key=lambda each: each.task_id, reverse=True)
        for _, of_task in groupby(found, lambda each: each.task_id):
            yield from sorted(of_task, key=lambda each: (each.seq, each.role), reverse=True)

    def _found_by(self, role: Role, hash_: str) -> Iterator[Occurrence]:
        found = dynamo.items(
            TableName=self._entries,
            IndexName=f"by_{role}",
            KeyConditionExpression="#role = :hash",
            ExpressionAttributeNames={"#role": role},
            ExpressionAttributeValues={":hash": _lookup_value(role, hash_)},
            ScanIndexForward=False,
        )
        for item in found:
            yield Occurrence(item["pk"]["S"], _number(item), role)

    def describe(self) -> None:
        """Raise unless the table is there."""
        dynamo.call("describe_table", TableName=self._entries)


def lookup(leaf: str, entry: AuditEntry) -> Item:
    """Return the attributes by which an entry is found. An entry without a hash is not in that hash's index."""
    hashes: dict[Role, str] = {"leaf": leaf, "input": entry.input_hash, "output": entry.output_hash}
    return {role: _lookup_value(role, hash_) for role, hash_ in hashes.items() if hash_}


def _lookup_value(role: Role, hash_: str) -> Item:
    """Bytes take half the room of text; the leaf hash is text, because the entries' stream delivers it."""
    return {"S": hash_} if role == "leaf" else {"B": bytes.fromhex(hash_)}


def put_if(table: str, item: Item, condition: str, **expression: Item) -> bool:
    """Put the item if the condition holds; return whether it does."""
    try:
        dynamo.call("put_item", TableName=table, Item=item, ConditionExpression=condition, **expression)
    except dynamo.ConditionFailedError:
        return False
    return True


def at_once(call: Callable[[_Argument], _Answer], arguments: Sequence[_Argument]) -> list[_Answer]:
    """Make a call for each argument, a few at the same time; return the answers in order. Raises the first error."""
    if len(arguments) == 1:
        return [call(arguments[0])]
    with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        return list(pool.map(call, arguments))


def transact(writes: list[Item]) -> bool:
    """Return whether all of it was written; False if a condition does not hold."""
    try:
        dynamo.transact(writes)
    except dynamo.ConditionFailedError:
        return False
    return True


def _range(table: str, pk: str, kind: str, first: int, last: int) -> Iterator[Item]:
    return dynamo.items(
        TableName=table,
        KeyConditionExpression="pk = :pk AND sk BETWEEN :first AND :last",
        ExpressionAttributeValues={
            ":pk": {"S": pk},
            ":first": {"S": f"{kind}#{first:06d}"},
            ":last": {"S": f"{kind}#{last:06d}"},
        },
        ConsistentRead=True,
    )


def _newest(table: str, pk: str, kind: str) -> Item | None:
    found = dynamo.call(
        "query",
        TableName=table,
        KeyConditionExpression="pk = :pk AND begins_with(sk, :kind)",
        ExpressionAttributeValues={":pk": {"S": pk}, ":kind": {"S": f"{kind}#"}},
        ConsistentRead=True,
        ScanIndexForward=False,
        Limit=1,
    )
    return next(iter(found["Items"]), None)


def _scan(table: str, **options: Any) -> Iterator[Item]:
    return dynamo.items("scan", TableName=table, ConsistentRead=True, **options)


def _number(item: Item) -> int:
    return int(item["sk"]["S"].partition("#")[2])


def _agent_of(event: Event) -> str | None:
    """Find the agent in what an event's hashes are over."""
    text = event.input if event.kind == "task_started" else event.output
    try:
        agent = json.loads(text).get("agent")
    except (ValueError, AttributeError, RecursionError):
        return None
    return agent if isinstance(agent, str) else None


def _events_said(item: Item) -> int:
    return int(json.loads(item["data"]["S"]).get("events", 0))


def entry_of(item: Item) -> StoredEntry:
    """Read an ENTRY item, from the table or from its stream."""
    return StoredEntry(_number(item), item["text"]["S"], item["leaf"]["S"])
