"""Read access of the audit to the policy's events. `qaes.domain.policy_events` describes their writer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

from audit.log import Log
from audit.store import AuditStore
from qaes.adapters import policy_events, settings
from qaes.domain.bundle import PolicyTrailEntry, TrailEntry, policy_ids, policy_numbers
from qaes.domain.policy_events import STREAM, PolicyEvent


class PolicyOutbox:
    """Events of the policy. The qubic service writes them; this service only reads them."""

    def __init__(self, table: str | None = None) -> None:
        self._table = table

    def events_after(self, number: int = 0) -> Iterator[PolicyEvent]:
        """Read the events after that number, in order."""
        return policy_events.events_after(self._name(), number)

    def newest(self) -> PolicyEvent | None:
        """Read the newest event; None before the first."""
        return policy_events.newest_event(self._name())

    def _name(self) -> str:
        return self._table or settings.text("POLICY_TABLE")


def policy_entries(entries: Sequence[TrailEntry], log: Log, store: AuditStore) -> list[PolicyTrailEntry]:
    """Read the entries of the policy's stream that a task depends on, with the texts of their events.

    The list ends before the first event without an entry.
    """
    try:
        said = [json.loads(each.text) for each in entries]
        times = [each["timestamp"] for each in said]
        open_ = [each["kind"] for each in said if each["kind"] in ("task_ended", "task_retried")][-1:] != ["task_ended"]
        used = policy_ids(entries)
    except (ValueError, KeyError, TypeError):
        return []  # an entry was altered: the verifier reports which
    events = list(PolicyOutbox().events_after())
    numbers = policy_numbers(events, versions=used, first=times[0], last=None if open_ else times[-1])
    keys = [(STREAM, number) for number in numbers]
    texts, indexes = store.texts(keys), log.indexes(keys)
    found: list[PolicyTrailEntry] = []
    for place in keys:
        if place not in texts:
            break
        event, indexed = events[place[1] - 1], indexes.get(place)
        index = indexed.index if indexed else None
        found.append(PolicyTrailEntry(TrailEntry(texts[place], event.input, event.output, index), event.salt))
    return found
