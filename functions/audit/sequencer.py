"""The sequencer: assigns the entries of all tasks their places in one log, batch by batch.

The stream of the entries' table invokes it. Guarantees:

- An entry gets one index, even with repeated delivery and concurrent runs. A batch is committed together with the
  log's head, only over the head's version that was read, and only after all earlier batches are integrated (tiles and
  indexes). The indexes therefore show which entries are in the log.
- The entries of a task follow each other in the log without gaps. The sequencer reads undelivered ones from the table.
- Only entries that hold are added: each text has its hash, and names the previous entry.

Steps: commit, integrate, record the progress in HEAD. After a crash between two steps, the next run first integrates
the committed batch.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator
from typing import Any

from aws_lambda_powertools.metrics import MetricUnit, single_metric
from aws_lambda_powertools.utilities.typing import LambdaContext

from audit.log import Batch, CorruptLogError, Head, Leaf, Log
from audit.store import AuditStore, EntryKey, StoredEntry, at_once, entry_of
from qaes.adapters import settings
from qaes.adapters.handlers import function
from qaes.adapters.logs import logger
from qaes.adapters.metrics import namespace
from qaes.domain.audit import GENESIS, BrokenChainError
from qaes.domain.errors import TransientError
from qaes.domain.merkle import HASH_BYTES
from qaes.domain.tiles import ReadTile, appended, tree_root

BATCH = 256
"""Maximum number of entries in one batch."""
TASKS_AT_ONCE = 10
SECONDS_FOR_TASKS = 20
"""With less time left, the sequencer starts no further tasks of the request."""
_ATTEMPTS = 8

Tiles = dict[tuple[int, int], bytes]


class Sequencer:
    """Adds entries to the log."""

    def __init__(self, log: Log, store: AuditStore, *, log_id: str) -> None:
        self._log = log
        self._store = store
        self._log_id = log_id

    def sequence(self, wanted: Iterable[tuple[str, StoredEntry]]) -> dict[EntryKey, BrokenChainError]:
        """Add the entries (task, entry) to the log, after the entries before them.

        Returns the entries that were not added, because they or an entry before them do not hold.

        Raises
        ------
        TransientError
            A table did not respond, or too many runs compete. Call again later.
        CorruptLogError
            The log contradicts itself. Nothing is added to it.
        """
        tasks: dict[str, dict[int, StoredEntry]] = {}
        for task_id, entry in wanted:
            tasks.setdefault(task_id, {})[entry.seq] = entry
        for attempt in range(_ATTEMPTS):
            head = self.integrate()
            leaves, broken = self._outstanding(tasks)
            if not leaves:
                return broken
            if self._commit_all(head, leaves):
                return broken
            # Another run wrote to the log, so fewer entries may be outstanding. Jitter separates competing runs.
            time.sleep(random.uniform(0.5, 1.5) * 0.02 * 2**attempt)  # noqa: S311 - not for secrets
        raise TransientError("the log is busy; try again later")

    def integrate(self) -> Head:
        """Write the missing tiles and indexes of the committed batches. Return the integrated head."""
        head = self._log.head()
        while head.integrated < head.size:
            batch = self._log.batch(head.integrated)
            head = self._integrate(head, batch, self._appended(batch))
        return head

    def _commit_all(self, head: Head, leaves: list[Leaf]) -> bool:
        for start in range(0, len(leaves), BATCH):
            chosen = tuple(leaves[start : start + BATCH])
            tiles = appended(head.size, [each.hash for each in chosen], self._log.tile)
            root = tree_root(head.size + len(chosen), _over(tiles, self._log.tile))
            batch = Batch(head.size, chosen, root)
            if not self._log.commit(head, batch):
                return False
            committed = Head(head.version + 1, batch.size, root, head.integrated, head.integrated_root)
            head = self._integrate(committed, batch, tiles)
            _count(batch)
        return True

    def _integrate(self, head: Head, batch: Batch, tiles: Tiles) -> Head:
        for (level, index), content in tiles.items():
            self._log.widen_tile(level, index, content)
        self._log.record_indexes(batch)
        self._log.record_integrated(batch)
        return Head(head.version, head.size, head.root, batch.size, batch.root)

    def _appended(self, batch: Batch) -> Tiles:
        tiles = appended(batch.start, [each.hash for each in batch.leaves], self._log.tile)
        if tree_root(batch.size, _over(tiles, self._log.tile)) != batch.root:
            raise CorruptLogError(f"the batch at {batch.start} does not have the committed root")
        return tiles

    # Outstanding entries

    def _outstanding(
        self, tasks: dict[str, dict[int, StoredEntry]]
    ) -> tuple[list[Leaf], dict[EntryKey, BrokenChainError]]:
        leaves: list[Leaf] = []
        broken: dict[EntryKey, BrokenChainError] = {}
        # A task's entries are in the log without gaps: the last index shows the missing ones.
        newest = at_once(self._log.last_index, list(tasks))
        for (task_id, entries), before in zip(tasks.items(), newest, strict=True):
            seq, prev = (before.seq, before.leaf) if before else (0, GENESIS)
            missing = sorted(each for each in entries if each > seq)
            if not missing:
                continue
            try:
                for entry in self._following(task_id, seq, missing[-1], entries):
                    self._check(task_id, entry, prev)
                    leaves.append(Leaf(task_id, entry.seq, entry.leaf))
                    seq, prev = entry.seq, entry.leaf
            except BrokenChainError as error:
                logger().error("the entry cannot be added to the log", extra={"task_id": task_id, "why": error.message})
                broken |= {(task_id, each): error for each in missing if each > seq}
        return leaves, broken

    def _following(self, task_id: str, after: int, last: int, known: dict[int, StoredEntry]) -> Iterator[StoredEntry]:
        for seq in range(after + 1, last + 1):
            entry = known.get(seq) or self._store.entry(task_id, seq)
            if entry is None:
                raise BrokenChainError(seq, "seq", "the entry is missing")
            yield entry

    def _check(self, task_id: str, entry: StoredEntry, prev: str) -> None:
        said = entry.intact().parsed()
        if said is None:
            raise BrokenChainError(entry.seq, "text", "the text is not a valid entry")
        if (said.log_id, said.stream_name(), said.seq) != (self._log_id, task_id, entry.seq):
            raise BrokenChainError(entry.seq, "log", "the entry belongs to another log, stream or number")
        if said.prev != prev:
            raise BrokenChainError(entry.seq, "prev", "the entry does not name the previous entry")


def _over(tiles: Tiles, read_tile: ReadTile) -> ReadTile:
    """Return a reader of the tiles as they will be after the write."""

    def read(level: int, index: int, width: int) -> bytes:
        found = tiles.get((level, index))
        return found[: width * HASH_BYTES] if found is not None else read_tile(level, index, width)

    return read


def _count(batch: Batch) -> None:
    with single_metric(
        name="EntriesSequenced", unit=MetricUnit.Count, value=len(batch.leaves), namespace=namespace()
    ) as metric:
        metric.add_metric(name="LogSize", unit=MetricUnit.Count, value=batch.size)


def sequencer() -> Sequencer:
    """Create the sequencer from the environment of this function."""
    return Sequencer(Log(), AuditStore(), log_id=settings.text("LOG_ID"))


def _sequence_tasks(task_ids: list[str], context: LambdaContext) -> list[str]:
    """Add the tasks' entries to the log, a few tasks at a time. The sweeper lists the remaining tasks again."""
    store, broken = AuditStore(), set[EntryKey]()
    random.shuffle(task_ids)
    for start in range(0, len(task_ids), TASKS_AT_ONCE):
        if start and context.get_remaining_time_in_millis() < SECONDS_FOR_TASKS * 1000:
            logger().warning("no time left for all tasks", extra={"left": len(task_ids) - start})
            break
        chosen = task_ids[start : start + TASKS_AT_ONCE]
        broken |= set(sequencer().sequence((task_id, entry) for task_id in chosen for entry in store.entries(task_id)))
    return sorted(f"{task_id}:{seq}" for task_id, seq in broken)


@function
def sequence_entries(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Sequence a batch of the entries' stream. Return `{"batchItemFailures": [{"itemIdentifier": sequence number}]}`.

    The event `{"task_ids": [...]}`, from the sweeper or after fsck, adds the outstanding entries of these tasks.
    """
    if "task_ids" in event:
        return {"broken": _sequence_tasks([str(task_id) for task_id in event["task_ids"]], context)}
    records = [record["dynamodb"] for record in event["Records"] if record["eventName"] == "INSERT"]
    delivered = [
        (change["Keys"]["pk"]["S"], entry_of(change["NewImage"]), change["SequenceNumber"])
        for change in records
        if change["Keys"]["sk"]["S"].startswith("ENTRY#")
    ]
    broken = sequencer().sequence((task_id, entry) for task_id, entry, _ in delivered)
    failed = [number for task_id, entry, number in delivered if (task_id, entry.seq) in broken]
    return {"batchItemFailures": [{"itemIdentifier": number} for number in failed]}
