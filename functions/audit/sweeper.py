"""The audit sweeper: finds events that the streams gave up, and hands them to the recorder or the sequencer.

Every minute it reads the events since its last run from an index that contains only events, each up to three times.
It never scans all tasks. An event with a place in the log is done. A task with an unsequenced entry goes to the
sequencer, and a task with an unrecorded event goes to the recorder. Both skip completed work, so a late delivery by
the stream does no harm.
A task stays on the sweeper's list until the listed events are in the log, or erased. Metrics count the tasks on the
list, separately those that are on it for a day in spite of the hand-over, and the sweeper's own lag.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import islice
from typing import Any

from aws_lambda_powertools.metrics import MetricUnit, single_metric
from aws_lambda_powertools.utilities.typing import LambdaContext
from botocore.exceptions import BotoCoreError, ClientError

from audit.log import Log, Swept
from audit.policy_stream import PolicyOutbox
from audit.store import AuditStore, EntryKey, Outbox
from qaes.adapters import clients, settings
from qaes.adapters.handlers import function
from qaes.adapters.logs import logger
from qaes.adapters.metrics import namespace
from qaes.domain.ids import now, parse_timestamp, timestamp
from qaes.domain.policy_events import STREAM

GRACE = timedelta(seconds=60)
"""Younger events are left to the streams."""
OVERLAP = timedelta(minutes=2)
"""Newer events are read again: an index is eventually consistent, and clocks differ."""
FIRST_LOOK = timedelta(days=7)
"""Period that the first run covers."""
CHUNK = 500
"""Number of events that are read together."""
MOST_BEHIND = 1_000
"""Maximum number of tasks on the list. With a full list, the sweeper reads no further events."""
STUCK_AFTER = timedelta(days=1)
"""A task that is on the list for this long is counted separately, so that it does not hide the others."""
MOST_HANDED = 100
"""Maximum number of tasks for the recorder, and for the sequencer, in one run."""
SECONDS_TO_HAND_OVER = 30
"""With less time left, the sweeper reads no further events, so that it can hand over and store its findings."""
SECONDS_TO_STORE = 15
"""With less time left, the sweeper hands over no further tasks."""

HandOver = Callable[[list[str]], None]
HasTime = Callable[[float], bool]
"""Return whether so many seconds are left of this run."""


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    The tasks that were handed to the recorder and to the sequencer; the number of tasks that are behind; the tasks
    that have been behind for too long; and the lag of the sweeper in seconds.
    """

    to_record: list[str]
    to_sequence: list[str]
    behind: int
    stuck: list[str]
    lag_seconds: int


class Sweeper:
    """Finds events that the streams have not delivered, and hands their tasks over."""

    def __init__(
        self,
        outbox: Outbox,
        store: AuditStore,
        log: Log,
        *,
        record: HandOver,
        sequence: HandOver,
        policy_outbox: PolicyOutbox | None = None,
    ) -> None:
        self._outbox = outbox
        self._policy_outbox = policy_outbox or PolicyOutbox()
        self._store = store
        self._log = log
        self._record = record
        self._sequence = sequence

    def sweep(self, moment: datetime, has_time: HasTime = lambda _: True) -> Outcome:
        """Read the events until shortly before `moment`, and check the tasks that were behind before.

        If time runs short, it stores its progress, and the next run continues there.

        Raises
        ------
        TransientError
            A table did not respond. Call again later.
        """
        before = self._log.swept() or Swept(timestamp(moment - FIRST_LOOK), {}, {})
        through, behind = before.through, self._behind(before.behind)
        for looked, found in self._written(before.through, timestamp(moment - GRACE)):
            through = looked
            for task_id, number in self._behind(found).items():
                behind[task_id] = max(number, behind.get(task_id, 0))
            if len(behind) >= MOST_BEHIND or not has_time(SECONDS_TO_HAND_OVER):
                break
        behind |= self._behind(self._newest_of_the_policy(timestamp(moment - GRACE)))
        recorded = self._store.texts(list(behind.items()))
        for task_id in self._erased([each for each in behind.items() if each not in recorded]):
            logger().warning(
                "the task has neither event nor entry", extra={"task_id": task_id, "number": behind.pop(task_id)}
            )
        to_record = [task_id for task_id, number in behind.items() if (task_id, number) not in recorded][:MOST_HANDED]
        to_sequence = [task_id for task_id, number in behind.items() if (task_id, number) in recorded][:MOST_HANDED]
        if to_record:
            self._record(to_record)
        if to_sequence:
            self._sequence(to_sequence)
        # Tasks that were handed over go to the end of the list, so that a stuck task does not block the others.
        handed = {*to_record, *to_sequence}
        ordered = sorted(behind.items(), key=lambda each: each[0] in handed)
        since = {task_id: before.since.get(task_id, timestamp(moment)) for task_id in behind}
        # Each list belongs to its `through`, so either of two concurrent runs can store its list without a gap.
        settled = timestamp(moment - GRACE - OVERLAP)
        self._log.record_swept(Swept(min(through, settled), dict(ordered), since))
        stuck = [task_id for task_id in behind if since[task_id] <= timestamp(moment - STUCK_AFTER)]
        lag = int((moment - parse_timestamp(through)).total_seconds())
        return Outcome(to_record, to_sequence, len(behind) - len(stuck), stuck, lag)

    def _written(self, first: str, last: str) -> Iterator[tuple[str, dict[str, int]]]:
        """Yield chunks of events as (time read up to, last number of each task); at the end (`last`, no events)."""
        events = self._outbox.written(first, last)
        while chunk := list(islice(events, CHUNK)):
            found: dict[str, int] = {}
            for _, task_id, number in chunk:
                found[task_id] = max(number, found.get(task_id, 0))
            yield chunk[-1][0], found
        yield last, {}

    def _newest_of_the_policy(self, last: str) -> dict[str, int]:
        """Return the number of the policy's newest event, if not after `last`: earlier events are recorded with it."""
        newest = self._policy_outbox.newest()
        return {STREAM: newest.number} if newest and newest.timestamp <= last else {}

    def _behind(self, found: dict[str, int]) -> dict[str, int]:
        """Return the events, as {task: number}, that have no place in the log."""
        keys: list[EntryKey] = list(found.items())
        there = self._log.indexes(keys)
        return {task_id: number for task_id, number in keys if (task_id, number) not in there}

    def _erased(self, unrecorded: list[EntryKey]) -> list[str]:
        """Return the tasks whose event was deleted: nothing is left to record."""
        there = self._outbox.there([each for each in unrecorded if each[0] != STREAM])
        return [each[0] for each in unrecorded if each not in there and each[0] != STREAM]


def _record(tasks: list[str], has_time: HasTime = lambda _: True) -> None:
    for number, task_id in enumerate(tasks):
        if not has_time(SECONDS_TO_STORE):
            logger().warning("no time left to hand over", extra={"left_to_the_next_run": len(tasks) - number})
            return
        _invoke("RECORDER_FUNCTION", {"task_id": task_id})


def _sequence(tasks: list[str]) -> None:
    _invoke("SEQUENCER_FUNCTION", {"task_ids": tasks})


def _invoke(function: str, event: dict[str, Any]) -> None:
    """Hand tasks over without waiting. If Lambda rejects the call, the tasks stay on the list for a later run."""
    try:
        clients.lambda_client().invoke(
            FunctionName=settings.text(function), InvocationType="Event", Payload=json.dumps(event)
        )
    except (BotoCoreError, ClientError) as error:
        logger().warning("not handed over", extra={"function": function, "error": type(error).__name__})


def _count(outcome: Outcome) -> None:
    told = (
        ("AuditBacklog", MetricUnit.Count, outcome.behind),
        ("TasksStuckInAudit", MetricUnit.Count, len(outcome.stuck)),
        ("AuditSweepLagSeconds", MetricUnit.Seconds, outcome.lag_seconds),
    )
    for name, unit, value in told:
        with single_metric(name=name, unit=unit, value=value, namespace=namespace()) as metric:
            metric.add_dimension("service", "audit")


@function
def sweep(_event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Run the sweeper. Return `{"recorded": [task ids], "sequenced": [task ids], "behind": n, "stuck": n}`.

    The listed tasks are those that were handed over. The event is ignored.
    """

    def has_time(seconds: float) -> bool:
        return context.get_remaining_time_in_millis() >= seconds * 1000

    def record(tasks: list[str]) -> None:
        _record(tasks, has_time)

    found = Sweeper(Outbox(), AuditStore(), Log(), record=record, sequence=_sequence).sweep(now(), has_time)
    _count(found)
    if found.behind or found.stuck:
        handed = {"to_record": found.to_record, "to_sequence": found.to_sequence}
        logger().warning(
            "some tasks are not in the log yet",
            extra=handed | {"behind": found.behind, "stuck": found.stuck[:MOST_HANDED]},
        )
    return {
        "recorded": found.to_record,
        "sequenced": found.to_sequence,
        "behind": found.behind,
        "stuck": len(found.stuck),
    }
