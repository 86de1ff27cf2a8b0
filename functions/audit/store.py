"""The entries (append-only), the indexes for the lookup by hash, and the outbox. `audit.log` has the log.

All reads are consistent, except the reads of an index. `qaes.adapters.dynamo` repeats each call, and defines the
errors.
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
HashRole = Literal["leaf", "input", "output"]

EntryKey = tuple[str, int]
"""Stream (a task's id, or `policy`) and number of the entry."""

HASH_ROLES: tuple[HashRole, ...] = ("leaf", "input", "output")
"""Lookup attributes of an entry, each with its own index: `by_leaf`, `by_input`, `by_output`."""
CALLS_AT_ONCE = 8
_LAST = 999_999
_Argument = TypeVar("_Argument")
_Answer = TypeVar("_Answer")


@dataclass(frozen=True)
class StoredEntry:
    """A stored entry: its exact text, and the leaf hash that was recorded with it."""

    seq: int
    text: str
    leaf: str

    def intact(self) -> StoredEntry:
        """Return itself. Raises BrokenChainError if the text does not have the leaf hash."""
        if leaf_hash(self.text) != self.leaf:
            raise BrokenChainError(self.seq, "leaf", "its text does not have the recorded hash")
        return self

    def parsed(self) -> AuditEntry | None:
        """Parse the text of the entry. Return None if it was altered and is not a valid entry any more."""
        try:
            return parse_entry(self.text)
        except InvalidInputError:
            return None


@dataclass(frozen=True)
class Occurrence:
    """A place where a hash occurs: an entry's own leaf hash, or the hash of its input or output."""

    task_id: str
    seq: int
    role: HashRole


class ForgedEventError(QaesError):
    """An event that claims a person's decision without one, or that has the number of another event."""


class Outbox:
    """The events of tasks. The execution side writes them; this service only reads them.

    An event of a person is accepted only if the gateway has recorded the decision. Its body comes from there.
    """

    def __init__(self, table: str | None = None, decisions: str | None = None) -> None:
        self._table = table or settings.text("TASKS_TABLE")
        self._decisions_table = decisions

    @cached_property
    def _decisions(self) -> DecisionsTable:
        # The sweeper reads no decision, and its function does not have the right to.
        return DecisionsTable(self._decisions_table)

    def events_after(self, task_id: str, seq: int) -> Iterator[tuple[int, Event]]:
        """Read the events after number `seq` as (number, event), in order, without the texts from other items.

        Raises ForgedEventError at the first event that claims a person's decision without one, or that has the number
        of an earlier item.
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
        """Read all events, as `events_after`. Also raises ForgedEventError if an event has a decision's number."""
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
            raise ForgedEventError(f"event {number} claims a person's decision, but the gateway recorded none")
        return decision

    def disclosed(self, task_id: str) -> dict[int, Event]:
        """Read the events of a task with their texts, by number, up to the first forged event."""
        texts = Texts(self._table, task_id, self._request(task_id))
        found: dict[int, Event] = {}
        with suppress(ForgedEventError):
            for number, event in self.events(task_id):
                found[number] = texts.disclose(event)
        return found

    def agents(self, task_id: str) -> dict[int, str]:
        """Read the client ids of the agents that acted, by the event's number."""
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
        """Find the changes between two timestamps as (timestamp, task, number), the oldest first.

        The number is the change's last event. The index is eventually consistent.
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
        """Read all tasks as (task, number of the last event, number of events that the task counts); for fsck.

        The count is None if only events exist. A scan is not a snapshot: a change during the scan may be visible in one
        of the two and not in the other.
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
        """Return the items that exist, by task and number of the last event."""
        found = get_many(
            self._table,
            [key(task_id, f"EVENT#{number:06d}") for task_id, number in keys],
            ProjectionExpression="pk, sk",
        )
        return {(item["pk"]["S"], _number(item)) for item in found}

    def last_event(self, task_id: str) -> int:
        """Read the number of the task's newest event; 0 without events."""
        item = _newest(self._table, task_id, "EVENT")
        return _number(item) if item else 0

    def events_said(self, task_id: str) -> int | None:
        """Read the number of events that the task counts; None if the task does not exist."""
        item = dynamo.get(self._table, task_id, "TASK")
        return _events_said(item) if item else None


class AuditStore:
    """Entries. An entry is never changed or deleted."""

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
        """Read the texts of many entries. Entries that do not exist are omitted."""
        found = get_many(self._entries, [key(task_id, f"ENTRY#{seq:06d}") for task_id, seq in keys])
        return {(item["pk"]["S"], _number(item)): item["text"]["S"] for item in found}

    def trails(self) -> Iterator[tuple[str, list[tuple[StoredEntry, Item]]]]:
        """Read all tasks' entries, each with its stored `lookup`, in order; for fsck, which no role here runs.

        A scan returns the items of one partition key consecutively and sorted.
        """
        for task_id, items in groupby(_scan(self._entries), lambda item: str(item["pk"]["S"])):
            yield (
                task_id,
                [(entry_of(item), {role: item[role] for role in HASH_ROLES if role in item}) for item in items],
            )

    def last_entry(self, task_id: str) -> StoredEntry | None:
        """Read the task's newest entry."""
        item = _newest(self._entries, task_id, "ENTRY")
        return entry_of(item) if item else None

    def append(self, entry: AuditEntry) -> StoredEntry | None:
        """Record an entry.

        Returns the recorded entry, or None if an entry with that number exists. The existing entry stays unchanged.
        """
        text = entry_text(entry)
        stored = StoredEntry(entry.seq, text, leaf_hash(text))
        item = key(entry.stream_name(), f"ENTRY#{entry.seq:06d}") | {"text": {"S": text}} | lookup(stored.leaf, entry)
        not_there_yet = "attribute_not_exists(pk)"
        return stored if put_if(self._entries, item, not_there_yet) else None

    def occurrences(self, hash_: str) -> Iterator[Occurrence]:
        """Find the occurrences of the hash, newest task first.

        The indexes are eventually consistent: an entry of the last few seconds may be missing.
        """
        by_role = [self._found_by(role, hash_) for role in HASH_ROLES]
        found = heapq.merge(*by_role, key=lambda each: each.task_id, reverse=True)
        for _, of_task in groupby(found, lambda each: each.task_id):
            yield from sorted(of_task, key=lambda each: (each.seq, each.role), reverse=True)

    def _found_by(self, role: HashRole, hash_: str) -> Iterator[Occurrence]:
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
        """Raise an error unless the table exists."""
        dynamo.call("describe_table", TableName=self._entries)


def lookup(leaf: str, entry: AuditEntry) -> Item:
    """Return the lookup attributes of an entry. An entry without a hash is not in that hash's index."""
    hashes: dict[HashRole, str] = {"leaf": leaf, "input": entry.input_hash, "output": entry.output_hash}
    return {role: _lookup_value(role, hash_) for role, hash_ in hashes.items() if hash_}


def _lookup_value(role: HashRole, hash_: str) -> Item:
    """Store hashes as bytes, half the size of text. The leaf hash is text, because the entries' stream delivers it."""
    return {"S": hash_} if role == "leaf" else {"B": bytes.fromhex(hash_)}


def put_if(table: str, item: Item, condition: str, **expression: Item) -> bool:
    """Put the item if the condition holds; return whether it does."""
    try:
        dynamo.call("put_item", TableName=table, Item=item, ConditionExpression=condition, **expression)
    except dynamo.ConditionFailedError:
        return False
    return True


def at_once(call: Callable[[_Argument], _Answer], arguments: Sequence[_Argument]) -> list[_Answer]:
    """Call a function for each argument, a few at a time. Return the results in order, or raise the first error."""
    if len(arguments) == 1:
        return [call(arguments[0])]
    with ThreadPoolExecutor(CALLS_AT_ONCE) as pool:
        return list(pool.map(call, arguments))


def transact(writes: list[Item]) -> bool:
    """Write all items at once. Return False, and write nothing, if a condition does not hold."""
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
    """Return the agent in the content behind an event's hashes."""
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
