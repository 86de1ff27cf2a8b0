"""The audit agent's recorder: turns the events of a stream (a task, or the policy) into the entries of its chain.

The stream of the tasks table, and that of the policy's table, invoke it within about a second of each change. The state
ExecuteAction invokes it for one task before an effect, if the stream is late, and the sweeper for what the streams gave
up on. All do the same `drain`, at the same time too, and it may stop anywhere: what is there stays, what is not there
yet is done by the next one. The ledger is not asked: the entries' stream brings them into the log (`audit.sequencer`),
and the log is anchored as a whole (`audit.anchor`).
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
"""With less time left, the recorder begins no other task of a batch."""


@dataclass(frozen=True)
class Drained:
    """How many entries this drain recorded, and the number of the task's newest entry (0: none)."""

    recorded: int
    seq: int


class _Build(Protocol):
    def __call__(self, *, prev: str) -> AuditEntry: ...


class Recorder:
    """Records what is outstanding of a stream."""

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
            A table did not answer; to be called again.
        BrokenChainError
            An event is missing, or the stored entries were altered: nothing is recorded on top of that.
        ForgedEventError
            An event says that a person made it, and the gateway has no such decision: as above.
        """
        try:
            return self._drain(stream)
        except ForgedEventError as error:
            logger().error("forged event refused", extra={"task_id": stream, "why": error.message})
            metrics.count_one(FORGED_EVENT_METRIC)
            raise

    def _drain(self, stream: str) -> Drained:
        last = self._store.last_entry(stream)
        seq, prev = (last.seq, last.intact().leaf) if last else (0, GENESIS)
        recorded = 0
        for number, build in self._entries_after(stream, seq):
            if number != seq + 1:
                raise BrokenChainError(seq + 1, "seq", f"its event is missing, the next is {number}")
            stored = self._store.append(build(prev=prev))
            recorded += stored is not None
            seq, prev = number, (stored or self._recorded_by_another(stream, number)).leaf
        return Drained(recorded, seq)

    def _entries_after(self, stream: str, seq: int) -> Iterator[tuple[int, _Build]]:
        """Read the numbers of the events after `seq`, and what makes the entry of each."""
        if stream == STREAM:
            for change in self._policy_outbox.events_after(seq):
                yield change.number, partial(build_policy_entry, change, log_id=self._log_id)
        else:
            for number, event in self._outbox.events_after(stream, seq):
                yield number, partial(build_entry, event, log_id=self._log_id, task_id=stream, seq=number)

    def _recorded_by_another(self, stream: str, seq: int) -> StoredEntry:
        stored = self._store.entry(stream, seq)
        if stored is None:
            raise BrokenChainError(seq, "seq", "the entry was there and is gone")
        return stored.intact()


def recorder() -> Recorder:
    """Make the recorder of this function's environment."""
    return Recorder(Outbox(), AuditStore(), log_id=settings.text("LOG_ID"))


@function
def record_events(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Take a batch of a table's stream, give `{"batchItemFailures": [{"itemIdentifier": sequence number}]}`.

    `{task_id}`, from a function of this system, gives `{recorded, seq}`, and raises when anything is unavailable. The
    id is that of a task, or STREAM.

    A stream is drained once however many of its events are in the batch; when that fails, all of them are to be
    delivered again. One stream that cannot be recorded does not keep the others from being recorded.
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
            logger().warning("no time left: it is delivered again", extra={"task_id": stream})
            failed += sequence_numbers
            continue
        try:
            to_record.drain(stream)
        except Exception:  # noqa: BLE001 - whatever it is, it is logged, and delivered again
            logger().exception("could not record", extra={"task_id": stream})
            failed += sequence_numbers
    return {"batchItemFailures": [{"itemIdentifier": number} for number in failed]}
