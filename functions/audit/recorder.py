"""The audit recorder: turns the events of a stream (a task, or the policy) into the entries of its chain.

Several callers invoke it: the streams of the tasks table and of the policy's table, about a second after each change;
the state ExecuteAction for one task before an effect, if the stream is late; and the sweeper for events that a stream
gave up. All of them run the same `drain`, even at the same time. It may stop at any point: recorded entries stay, and
the next run records the rest. The recorder does not call the ledger. The entries' stream adds the entries to the log
(`audit.sequencer`), and `audit.anchor` anchors the log as a whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from aws_lambda_powertools.utilities.typing import LambdaContext

from audit.policy_stream import PolicyOutbox
from audit.store import AuditStore, ForgedEventError, Outbox, StoredEntry
from qaes.adapters import metrics, settings
from qaes.adapters.handlers import function
from qaes.adapters.logs import logger
from qaes.adapters.policy_events import EVENTS_PK
from qaes.domain.audit import GENESIS, AuditEntry, BrokenChainError, build_entry, build_policy_entry
from qaes.domain.policy_events import STREAM

FORGED_EVENT_METRIC = "ForgedEvent"
SECONDS_FOR_A_TASK = 10
"""With less time left, the recorder starts no other task of a batch."""


@dataclass(frozen=True)
class Drained:
    """The number of entries that this run recorded, and the number of the task's newest entry (0 without entries)."""

    recorded: int
    seq: int


class _Build(Protocol):
    def __call__(self, *, prev: str) -> AuditEntry: ...


class Recorder:
    """Records the outstanding events of a stream."""

    def __init__(
        self, outbox: Outbox, store: AuditStore, *, log_id: str, policy_outbox: PolicyOutbox | None = None
    ) -> None:
        self._outbox = outbox
        self._policy_outbox = policy_outbox or PolicyOutbox()
        self._store = store
        self._log_id = log_id

    def drain(self, stream: str) -> Drained:
        """Record the events of a task, or of the policy (STREAM), after the stream's last entry.

        Raises
        ------
        TransientError
            A table did not respond. Call again later.
        BrokenChainError
            An event is missing, or the stored entries were altered. Nothing is recorded after that.
        ForgedEventError
            An event claims a person's decision that the gateway does not have. Nothing is recorded after that.
        """
        try:
            return self._drain(stream)
        except ForgedEventError as error:
            logger().error("forged event rejected", extra={"task_id": stream, "why": error.message})
            metrics.count_one(FORGED_EVENT_METRIC)
            raise

    def _drain(self, stream: str) -> Drained:
        last = self._store.last_entry(stream)
        seq, prev = (last.seq, last.intact().leaf) if last else (0, GENESIS)
        recorded = 0
        for number, build in self._entries_after(stream, seq):
            if number != seq + 1:
                raise BrokenChainError(seq + 1, "seq", f"its event is missing; the next event is {number}")
            stored = self._store.append(build(prev=prev))
            recorded += stored is not None
            seq, prev = number, (stored or self._recorded_by_another(stream, number)).leaf
        return Drained(recorded, seq)

    def _entries_after(self, stream: str, seq: int) -> Iterator[tuple[int, _Build]]:
        """Read the numbers of the events after `seq`, each with a function that builds its entry."""
        if stream == STREAM:
            for change in self._policy_outbox.events_after(seq):
                yield change.number, partial(build_policy_entry, change, log_id=self._log_id)
        else:
            for number, event in self._outbox.events_after(stream, seq):
                yield number, partial(build_entry, event, log_id=self._log_id, task_id=stream, seq=number)

    def _recorded_by_another(self, stream: str, seq: int) -> StoredEntry:
        stored = self._store.entry(stream, seq)
        if stored is None:
            raise BrokenChainError(seq, "seq", "the entry was deleted")
        return stored.intact()


def recorder() -> Recorder:
    """Create the recorder from the environment of this function."""
    return Recorder(Outbox(), AuditStore(), log_id=settings.text("LOG_ID"))


@function
def record_events(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Record a batch of a table's stream.

    Returns `{"batchItemFailures": [{"itemIdentifier": sequence number}]}`.

    The event `{task_id}`, from a function of this system, returns `{recorded, seq}`, and raises if a table is
    unavailable. The id is the id of a task, or STREAM.

    A task, or the policy, is drained once, regardless of the number of its events in the batch. If that fails, the
    stream delivers all of them again. A task that cannot be recorded does not block the others.
    """
    if "task_id" in event:
        drained = recorder().drain(str(event["task_id"]))
        return {"recorded": drained.recorded, "seq": drained.seq}
    deliveries: dict[str, list[str]] = {}
    for record in event["Records"]:
        change = record["dynamodb"]
        if change["Keys"]["sk"]["S"].startswith("EVENT#"):
            pk = change["Keys"]["pk"]["S"]
            deliveries.setdefault(STREAM if pk == EVENTS_PK else pk, []).append(change["SequenceNumber"])
    to_record = recorder()
    failed: list[str] = []
    for stream, sequence_numbers in deliveries.items():
        if context.get_remaining_time_in_millis() < SECONDS_FOR_A_TASK * 1000:
            logger().warning("no time left; the stream delivers the events again", extra={"task_id": stream})
            failed += sequence_numbers
            continue
        try:
            to_record.drain(stream)
        except Exception:  # noqa: BLE001 - log any error; the stream delivers the events again
            logger().exception("the events could not be recorded", extra={"task_id": stream})
            failed += sequence_numbers
    return {"batchItemFailures": [{"itemIdentifier": number} for number in failed]}
