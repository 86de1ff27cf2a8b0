"""The sequencer: gives the entries of all tasks their places in one log, batch by batch.

Called by the stream of the entries' table. What it promises:

- An entry gets one index, however often it is delivered, and whoever else is at work: a batch is committed together
  with the log's head, under the head's version, and only when all that was committed before is integrated (tiles,
  indexes), so that a look at the indexes tells what is in the log.
- The entries of a task follow each other in the log without gaps: what the stream did not bring is read from the table.
- Nothing is put into the log that does not hold: each text has its hash, and names the entry before.

commit → integrate → HEAD says so. A crash between the two leaves a batch that the next run integrates first.
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
"""Most entries of one batch."""
TASKS_AT_ONCE = 10
SECONDS_FOR_TASKS = 20
"""With less time left, the sequencer begins no further tasks of those that it was asked for."""
_ATTEMPTS = 8

Tiles = dict[tuple[int, int], bytes]


class Sequencer:
    """Puts entries into the log."""

    def __init__(self, log: Log, store: AuditStore, *, log_id: str) -> None:
        self._log = log
        self._store = store
        self._log_id = log_id

    def sequence(self, wanted: Iterable[tuple[str, StoredEntry]]) -> dict[EntryKey, BrokenChainError]:
        """Put the entries (task, entry) into the log, those before them first.

        Returns those that are not in the log afterwards, because they or one before them do not hold.

        Raises
        ------
        TransientError
            A table did not answer, or too many were at it; to be called again.
        CorruptLogError
            The log contradicts itself: nothing is added to it.
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
            # Somebody else wrote: what is outstanding now may be less. Jitter, so that two do not meet again and again.
            time.sleep(random.uniform(0.5, 1.5) * 0.02 * 2**attempt)  # noqa: S311 - not for secrets
        raise TransientError("the log is busy")

    def integrate(self) -> Head:
        """Write the tiles and indexes of what is committed and has none; return the head, integrated."""
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
            raise CorruptLogError(f"the batch at {batch.start} has not the root that was committed")
        return tiles

    # What is to be added

    def _outstanding(
        self, tasks: dict[str, dict[int, StoredEntry]]
    ) -> tuple[list[Leaf], dict[EntryKey, BrokenChainError]]:
        leaves: list[Leaf] = []
        broken: dict[EntryKey, BrokenChainError] = {}
        # A task's entries are in the log without gaps: the last that is there tells which are not.
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
                logger().error("an entry cannot be put into the log", extra={"task_id": task_id, "why": error.message})
                broken |= {(task_id, each): error for each in missing if each > seq}
        return leaves, broken

    def _following(self, task_id: str, after: int, last: int, known: dict[int, StoredEntry]) -> Iterator[StoredEntry]:
        for seq in range(after + 1, last + 1):
            entry = known.get(seq) or self._store.entry(task_id, seq)
            if entry is None:
                raise BrokenChainError(seq, "seq", "it is missing")
            yield entry

    def _check(self, task_id: str, entry: StoredEntry, prev: str) -> None:
        said = entry.intact().parsed()
        if said is None:
            raise BrokenChainError(entry.seq, "text", "it is no entry")
        if (said.log_id, said.stream_name(), said.seq) != (self._log_id, task_id, entry.seq):
            raise BrokenChainError(entry.seq, "log", "it belongs to another log or stream, or another place in it")
        if said.prev != prev:
            raise BrokenChainError(entry.seq, "prev", "it does not name the entry before")


def _over(tiles: Tiles, read_tile: ReadTile) -> ReadTile:
    """Read what the tiles will be."""

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
    """Make the sequencer of this function's environment."""
    return Sequencer(Log(), AuditStore(), log_id=settings.text("LOG_ID"))


def _sequence_tasks(task_ids: list[str], context: LambdaContext) -> list[str]:
    """Put the tasks' entries into the log, a few tasks at a time; the sweeper names again what no time was left for."""
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
    """Take a batch of the entries' stream, give `{"batchItemFailures": [{"itemIdentifier": sequence number}]}`.

    Or take `{"task_ids": [...]}`, which sweeper or fsck name, and put what is outstanding of those tasks into the log.
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
