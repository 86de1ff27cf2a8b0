"""The audit agent's recorder: turns a task's events into the entries of its chain.

The stream of the tasks table invokes it, within about a second of each change. The state ExecuteAction invokes it for
one task before an effect, if the stream is late, and the sweeper for what the stream gave up on. All do the same
`drain`, at the same time too, and it may stop anywhere: what is there stays, what is not there yet is done by the next
one. The ledger is not asked: the entries' stream brings them into the log (`audit.sequencer`), and the log is anchored
as a whole (`audit.anchor`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from audit.store import AuditStore, ForgedEventError, Outbox, StoredEntry
from qaes.adapters import metrics, settings
from qaes.adapters.handlers import function
from qaes.adapters.logs import logger
from qaes.domain.audit import GENESIS, BrokenChainError, build_entry

FORGED_EVENT_METRIC = "ForgedEvent"
SECONDS_FOR_A_TASK = 10
"""With less time left, the recorder begins no other task of a batch."""


@dataclass(frozen=True)
class Drained:
    """How many entries this drain recorded, and the number of the task's newest entry (0: none)."""

    recorded: int
    seq: int


class Recorder:
    """Records what is outstanding of a task."""

    def __init__(self, outbox: Outbox, store: AuditStore, *, log_id: str) -> None:
        self._outbox = outbox
        self._store = store
        self._log_id = log_id

    def drain(self, task_id: str) -> Drained:
        """Record the events after the last entry.

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
            return self._drain(task_id)
        except ForgedEventError as error:
            logger().error("forged event refused", extra={"task_id": task_id, "why": error.message})
            metrics.count_one(FORGED_EVENT_METRIC)
            raise

    def _drain(self, task_id: str) -> Drained:
        last = self._store.last_entry(task_id)
        seq, prev = (last.seq, last.intact().leaf) if last else (0, GENESIS)
        recorded = 0
        for number, event in self._outbox.events_after(task_id, seq):
            if number != seq + 1:
                raise BrokenChainError(seq + 1, "seq", f"its event is missing, the next is {number}")
            entry = build_entry(event, log_id=self._log_id, task_id=task_id, seq=number, prev=prev)
            stored = self._store.append(entry)
            recorded += stored is not None
            seq, prev = number, (stored or self._recorded_by_another(task_id, number)).leaf
        return Drained(recorded, seq)

    def _recorded_by_another(self, task_id: str, seq: int) -> StoredEntry:
        stored = self._store.entry(task_id, seq)
        if stored is None:
            raise BrokenChainError(seq, "seq", "the entry was there and is gone")
        return stored.intact()


def recorder() -> Recorder:
    """Make the recorder of this function's environment."""
    return Recorder(Outbox(), AuditStore(), log_id=settings.text("LOG_ID"))


@function
def record_events(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Take a batch of the tasks table's stream, give `{"batchItemFailures": [{"itemIdentifier": sequence number}]}`.

    `{task_id}`, from a function of this system, gives `{recorded, seq}`, and raises when anything is unavailable.

    A task is drained once however many of its events are in the batch; when that fails, all of them are to be
    delivered again. One task that cannot be recorded does not keep the others from being recorded.
    """
    if "task_id" in event:
        drained = recorder().drain(str(event["task_id"]))
        return {"recorded": drained.recorded, "seq": drained.seq}
    deliveries: dict[str, list[str]] = {}
    for record in event["Records"]:
        change = record["dynamodb"]
        if change["Keys"]["sk"]["S"].startswith("EVENT#"):
            deliveries.setdefault(change["Keys"]["pk"]["S"], []).append(change["SequenceNumber"])
    to_record = recorder()
    failed: list[str] = []
    for task_id, sequence_numbers in deliveries.items():
        if context.get_remaining_time_in_millis() < SECONDS_FOR_A_TASK * 1000:
            logger().warning("no time left: it is delivered again", extra={"task_id": task_id})
            failed += sequence_numbers
            continue
        try:
            to_record.drain(task_id)
        except Exception:  # noqa: BLE001 - whatever it is, it is logged, and delivered again
            logger().exception("could not record", extra={"task_id": task_id})
            failed += sequence_numbers
    return {"batchItemFailures": [{"itemIdentifier": number} for number in failed]}
