"""The audit's sweeper: nothing is left in the outbox, or out of the log, because a stream gave up on it.

Every minute it looks at what has happened since it last looked: the events of an index that has nothing else, each up
to three times, and never at all tasks. What has a place in the log is done with. What has an entry only is handed to
the sequencer, what has none to the recorder; both find what is there already, so the stream may come later and do no
harm.
A task stays on the sweeper's list until all that it was listed for is in the log, or erased. Metrics tell how many do,
apart from these how many have for a day, whom handing over does not help, and how far back the sweeper itself is.
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
"""What is younger is left to the streams."""
OVERLAP = timedelta(minutes=2)
"""Newer events are looked at again: an index is a moment behind, and clocks are not all the same."""
FIRST_LOOK = timedelta(days=7)
"""Where it begins when it has never looked."""
CHUNK = 500
"""Events that are looked at together."""
MOST_BEHIND = 1_000
"""Tasks on its list, beyond which it looks no further: first these have to be helped."""
STUCK_AFTER = timedelta(days=1)
"""Who has been on its list for so long is not merely late: it is counted apart, so that others are seen."""
MOST_HANDED = 100
"""Tasks that are handed to each, recorder and sequencer, in one run."""
SECONDS_TO_HAND_OVER = 30
"""With less time left, no further events are looked at: what is found is handed over and stored first."""
SECONDS_TO_STORE = 15
"""With less time left, nothing further is handed over."""

HandOver = Callable[[list[str]], None]
HasTime = Callable[[float], bool]
"""Return whether so many seconds are left of this run."""


@dataclass(frozen=True)
class Outcome:
    """What a run found.

    The tasks that were handed to the recorder and to the sequencer; how many are behind, and which, beside these, have
    been for too long; the seconds before now up to which it has looked.
    """

    to_record: list[str]
    to_sequence: list[str]
    behind: int
    stuck: list[str]
    lag_seconds: int


class Sweeper:
    """Finds what the streams have not brought, and hands it over."""

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
        """Look at what was written until shortly before `moment`, and at what was behind before.

        When time runs short, it stores how far it has looked; the next run goes on from there.

        Raises
        ------
        TransientError
            A table did not answer; to be called again.
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
            logger().warning("neither event nor entry", extra={"task_id": task_id, "number": behind.pop(task_id)})
        to_record = [task_id for task_id, number in behind.items() if (task_id, number) not in recorded][:MOST_HANDED]
        to_sequence = [task_id for task_id, number in behind.items() if (task_id, number) in recorded][:MOST_HANDED]
        if to_record:
            self._record(to_record)
        if to_sequence:
            self._sequence(to_sequence)
        # Who had their turn goes to the end: what cannot be helped must not keep others from being.
        handed = {*to_record, *to_sequence}
        ordered = sorted(behind.items(), key=lambda each: each[0] in handed)
        since = {task_id: before.since.get(task_id, timestamp(moment)) for task_id in behind}
        # A list belongs to its `through`: whichever of two runs at the same time stores its own, nothing is missed.
        settled = timestamp(moment - GRACE - OVERLAP)
        self._log.record_swept(Swept(min(through, settled), dict(ordered), since))
        stuck = [task_id for task_id in behind if since[task_id] <= timestamp(moment - STUCK_AFTER)]
        lag = int((moment - parse_timestamp(through)).total_seconds())
        return Outcome(to_record, to_sequence, len(behind) - len(stuck), stuck, lag)

    def _written(self, first: str, last: str) -> Iterator[tuple[str, dict[str, int]]]:
        """Chunks of events, as (up to when, the last number of each task); after all of them, up to `last`."""
        events = self._outbox.written(first, last)
        while chunk := list(islice(events, CHUNK)):
            found: dict[str, int] = {}
            for _, task_id, number in chunk:
                found[task_id] = max(number, found.get(task_id, 0))
            yield chunk[-1][0], found
        yield last, {}

    def _newest_of_the_policy(self, last: str) -> dict[str, int]:
        """The number of the policy's newest event: whoever records it records all before it. Empty after `last`."""
        newest = self._policy_outbox.newest()
        return {STREAM: newest.number} if newest and newest.timestamp <= last else {}

    def _behind(self, found: dict[str, int]) -> dict[str, int]:
        """Those of the events, as {task: number}, that have no place in the log."""
        keys: list[EntryKey] = list(found.items())
        there = self._log.indexes(keys)
        return {task_id: number for task_id, number in keys if (task_id, number) not in there}

    def _erased(self, unrecorded: list[EntryKey]) -> list[str]:
        """Those of the tasks whose event is gone: there is nothing left to record."""
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
    """Hand over without waiting. If Lambda refuses, the tasks stay on the list, and a later run hands them over."""
    try:
        clients.lambda_client().invoke(
            FunctionName=settings.text(function), InvocationType="Event", Payload=json.dumps(event)
        )
    except (BotoCoreError, ClientError) as error:
        logger().warning("not handed over", extra={"function": function, "error": type(error).__name__})


def _count(outcome: Outcome) -> None:
    told = (
        ("TasksBehindInAudit", MetricUnit.Count, outcome.behind),
        ("TasksStuckInAudit", MetricUnit.Count, len(outcome.stuck)),
        ("AuditSweepLagSeconds", MetricUnit.Seconds, outcome.lag_seconds),
    )
    for name, unit, value in told:
        with single_metric(name=name, unit=unit, value=value, namespace=namespace()) as metric:
            metric.add_dimension("service", "audit")


@function
def sweep(_event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Take anything, give `{"recorded": [task ids], "sequenced": [task ids], "behind": n, "stuck": n}`.

    The tasks are those that were handed over.
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
            "not in the log yet", extra=handed | {"behind": found.behind, "stuck": found.stuck[:MOST_HANDED]}
        )
    return {
        "recorded": found.to_record,
        "sequenced": found.to_sequence,
        "behind": found.behind,
        "stuck": len(found.stuck),
    }
