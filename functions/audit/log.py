"""The global log in AuditLogTable: an RFC 6962 tree over the entries of all tasks.

pk / sk                      item, and condition for writing it
LOG / HEAD                   version, size, root; progress of tiles and indexes: only over the version that was read
LOG / BATCH#start            the entries with the indexes from `start` on; size and root after them: once, with HEAD
TILE#level#index / TILE      up to 256 hashes: only if wider than the stored tile
task id / INDEX#seq          the indexes and leaf hashes of a task's entries in one batch, up to entry `seq`: once
SWEEP / SWEPT                progress of the sweeper, and the tasks that were not in the log then

All reads are consistent.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby

from audit.anchors import Anchors
from audit.store import EntryKey, Item, at_once, put_if, transact
from audit.table import Table
from qaes.adapters import dynamo, settings
from qaes.adapters.dynamo import get_many, key
from qaes.domain.errors import QaesError
from qaes.domain.merkle import EMPTY_ROOT, HASH_BYTES


class CorruptLogError(QaesError):
    """The log's items contradict each other or the request. Nothing is written on top of that."""


@dataclass(frozen=True)
class Head:
    """The log's state. Tiles and indexes exist up to `integrated`, whose root is `integrated_root`."""

    version: int = 0
    size: int = 0
    root: bytes = EMPTY_ROOT
    integrated: int = 0
    integrated_root: bytes = EMPTY_ROOT


@dataclass(frozen=True)
class Leaf:
    """An entry in the log."""

    task_id: str
    seq: int
    leaf: str

    @property
    def key(self) -> EntryKey:
        return self.task_id, self.seq

    @property
    def hash(self) -> bytes:
        return bytes.fromhex(self.leaf)


@dataclass(frozen=True)
class Batch:
    """Leaves with the indexes from `start` on; the log's size and root after them."""

    start: int
    leaves: tuple[Leaf, ...]
    root: bytes

    @property
    def size(self) -> int:
        return self.start + len(self.leaves)


@dataclass(frozen=True)
class Indexed:
    """An entry's index in the log, from 0."""

    seq: int
    index: int
    leaf: str


@dataclass(frozen=True)
class Span:
    """Entries of one task with consecutive numbers from `first` and consecutive indexes from `index`."""

    task_id: str
    first: int
    index: int
    leaves: bytes

    @property
    def count(self) -> int:
        return len(self.leaves) // HASH_BYTES

    @property
    def last(self) -> int:
        return self.first + self.count - 1

    def indexed(self) -> Iterator[Indexed]:
        """Yield the index of each entry, in order."""
        for place, at in enumerate(range(0, len(self.leaves), HASH_BYTES)):
            yield Indexed(self.first + place, self.index + place, self.leaves[at : at + HASH_BYTES].hex())


@dataclass(frozen=True)
class Swept:
    """The time up to which the sweeper has read all events, and the tasks with an event, by number, not in the log.

    `since` is the time at which each of these tasks was added.
    """

    through: str
    behind: dict[str, int]
    since: dict[str, str]


class Log(Table):
    """Items of the log. `anchors` reads its anchors (`audit.anchors`)."""

    def __init__(self, table: str | None = None, anchors: str | None = None) -> None:
        super().__init__(table or settings.text("AUDIT_LOG_TABLE"))
        self._anchors_table = anchors

    @cached_property
    def anchors(self) -> Anchors:
        """The log's anchors, in a table that the sequencer's role cannot write."""
        return Anchors(self._anchors_table)

    # Head and batches

    def head(self) -> Head:
        """Read the log's state. An empty log has a state too."""
        item = self._get("LOG", "HEAD")
        if item is None:
            return Head()
        return Head(
            int(item["version"]["N"]),
            int(item["size"]["N"]),
            item["root"]["B"],
            int(item["integrated"]["N"]),
            item["integrated_root"]["B"],
        )

    def commit(self, head: Head, batch: Batch) -> bool:
        """Assign the batch its indexes. Indexes are assigned only here.

        Returns False, and writes nothing, if the head has changed since it was read.
        """
        head_is_unchanged = "version = :before" if head.version else "attribute_not_exists(pk)"
        state = key("LOG", "HEAD") | {
            "version": {"N": str(head.version + 1)},
            "size": {"N": str(batch.size)},
            "root": {"B": batch.root},
            "integrated": {"N": str(head.integrated)},
            "integrated_root": {"B": head.integrated_root},
        }
        put: Item = {"TableName": self._table, "Item": state, "ConditionExpression": head_is_unchanged}
        if head.version:
            put["ExpressionAttributeValues"] = {":before": {"N": str(head.version)}}
        return transact([{"Put": put}, self._put_new(_batch_item(batch))])

    def batch(self, start: int) -> Batch:
        """Read the batch that begins at `start`. Raises CorruptLogError if it does not exist."""
        item = self._get("LOG", f"BATCH#{start:012d}")
        if item is None:
            raise CorruptLogError(f"no batch begins at {start}")
        return _batch(item)

    def batches(self) -> Iterable[Batch]:
        """Read all batches, in order."""
        return map(_batch, self._all("LOG", "BATCH#"))

    def leaves(self, first: int, count: int) -> list[Leaf]:
        """Read at most `count` leaves with the indexes from `first` on; fewer at the end of the log."""
        before = self._first("LOG", "BATCH#", f"BATCH#{first:012d}", newest=True)
        if before is None:
            return []
        found: list[Leaf] = []
        end = int(before["sk"]["S"].partition("#")[2])
        # Batches can have one entry each: read a page of them at once.
        for batch in map(_batch, self._between("LOG", before["sk"]["S"], f"BATCH#{first + count - 1:012d}")):
            if batch.start != end:
                break
            found += batch.leaves[max(0, first - batch.start) : first + count - batch.start]
            end = batch.size
        return found

    def record_integrated(self, batch: Batch) -> None:
        """Record that the batch's tiles and indexes exist. Another run may have recorded this or a later batch."""
        not_further_yet = "integrated < :size"
        with suppress(dynamo.ConditionFailedError):
            dynamo.call(
                "update_item",
                TableName=self._table,
                Key=key("LOG", "HEAD"),
                UpdateExpression="SET integrated = :size, integrated_root = :root",
                ConditionExpression=not_further_yet,
                ExpressionAttributeValues={":size": {"N": str(batch.size)}, ":root": {"B": batch.root}},
            )

    # Tiles

    def tile(self, level: int, index: int, width: int) -> bytes:
        """Read the first `width` hashes of a tile. Raises CorruptLogError if it has fewer."""
        content = self.stored_tile(level, index)
        if len(content) < width * HASH_BYTES:
            raise CorruptLogError(f"tile {level}/{index} has fewer than {width} hashes")
        return content[: width * HASH_BYTES]

    def stored_tile(self, level: int, index: int) -> bytes:
        """Read all stored hashes of a tile; empty if it does not exist."""
        item = self._get(*_tile_key(level, index))
        return bytes(item["hashes"]["B"]) if item else b""

    def stored_tiles(self, places: Sequence[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        """Read many tiles by (level, index). Tiles that do not exist are omitted."""
        found: dict[tuple[int, int], bytes] = {}
        for item in get_many(self._table, [key(*_tile_key(*place)) for place in places]):
            _, level, index = item["pk"]["S"].split("#")
            found[int(level), int(index)] = bytes(item["hashes"]["B"])
        return found

    def widen_tile(self, level: int, index: int, content: bytes) -> None:
        """Write a tile, unless the stored tile is as wide."""
        wider_than_stored = "attribute_not_exists(pk) OR width < :width"
        width = {"N": str(len(content) // HASH_BYTES)}
        item = key(*_tile_key(level, index)) | {"width": width, "hashes": {"B": content}}
        put_if(self._table, item, wider_than_stored, ExpressionAttributeValues={":width": width})

    # Indexes

    def indexes(self, keys: Sequence[EntryKey]) -> dict[EntryKey, Indexed]:
        """Read the indexes of the entries. Entries without an index are omitted."""
        found: dict[EntryKey, Indexed] = {}
        # Most requested entries are the last of their task in a batch, so the item's key has their number.
        for item in get_many(self._table, [_index_key(*each) for each in keys]):
            found |= _indexes_of(_span(item))
        first_left = dict(sorted(set(keys) - found.keys(), reverse=True))
        for spans in at_once(lambda each: self._spans(*each), list(first_left.items())):
            for span in spans:
                found |= _indexes_of(span)
        return {each: found[each] for each in keys if each in found}

    def task_indexes(self, task_id: str) -> dict[int, Indexed]:
        """Read the indexes of a task's entries, by number."""
        return {each.seq: each for span in self.task_spans(task_id) for each in span.indexed()}

    def task_spans(self, task_id: str) -> list[Span]:
        """Read the places of a task's entries in the log, in order of their numbers."""
        return self._spans(task_id, 1)

    def _spans(self, task_id: str, seq: int) -> list[Span]:
        return list(map(_span, self._between(task_id, f"INDEX#{seq:06d}", "INDEX#~")))

    def last_index(self, task_id: str) -> Indexed | None:
        """Read the index of the task's newest entry that has one."""
        item = self._first(task_id, "INDEX#", "INDEX#~", newest=True)
        return list(_span(item).indexed())[-1] if item else None

    def record_indexes(self, batch: Batch) -> None:
        """Write the indexes of the batch's entries, one item for each task.

        Raises CorruptLogError if other indexes exist: the log would have an entry twice.
        """
        at_once(self._record_span, list(_spans(batch)))

    def _record_span(self, span: Span) -> None:
        not_there_or_the_same = "attribute_not_exists(pk) OR (#index = :index AND leaves = :leaves)"
        index, leaves = {"N": str(span.index)}, {"B": span.leaves}
        if not put_if(
            self._table,
            _index_key(span.task_id, span.last) | {"index": index, "leaves": leaves},
            not_there_or_the_same,
            ExpressionAttributeNames={"#index": "index"},
            ExpressionAttributeValues={":index": index, ":leaves": leaves},
        ):
            raise CorruptLogError(
                f"{span.task_id} {span.first} to {span.last} have other indexes than the batch at {span.index}"
            )

    # The sweeper's list

    def swept(self) -> Swept | None:
        """Read the progress of the sweeper; None before its first run."""
        item = self._get("SWEEP", "SWEPT")
        if item is None:
            return None
        return Swept(item["through"]["S"], json.loads(item["behind"]["S"]), json.loads(item["since"]["S"]))

    def record_swept(self, swept: Swept) -> None:
        """Record the progress of the sweeper."""
        item = key("SWEEP", "SWEPT") | {
            "through": {"S": swept.through},
            "behind": {"S": json.dumps(swept.behind)},
            "since": {"S": json.dumps(swept.since)},
        }
        dynamo.call("put_item", TableName=self._table, Item=item)


def _tile_key(level: int, index: int) -> tuple[str, str]:
    return f"TILE#{level:02d}#{index:012d}", "TILE"


def _spans(batch: Batch) -> Iterator[Span]:
    """Yield the span of each task of the batch: the sequencer writes a task's entries consecutively."""
    places = enumerate(batch.leaves, start=batch.start)
    for _, group in groupby(places, lambda place: (place[1].task_id, place[1].seq - place[0])):
        span = list(group)
        index, first = span[0]
        yield Span(first.task_id, first.seq, index, b"".join(leaf.hash for _, leaf in span))


def _index_key(task_id: str, last: int) -> Item:
    return key(task_id, f"INDEX#{last:06d}")


def _indexes_of(span: Span) -> dict[EntryKey, Indexed]:
    return {(span.task_id, each.seq): each for each in span.indexed()}


def _span(item: Item) -> Span:
    last, leaves = int(item["sk"]["S"].partition("#")[2]), bytes(item["leaves"]["B"])
    count, rest = divmod(len(leaves), HASH_BYTES)
    if rest or not 0 < count <= last:
        raise CorruptLogError(f"the index of {item['pk']['S']} up to {last} has the wrong number of leaf hashes")
    return Span(item["pk"]["S"], last - count + 1, int(item["index"]["N"]), leaves)


def _batch_item(batch: Batch) -> Item:
    return key("LOG", f"BATCH#{batch.start:012d}") | {
        "size": {"N": str(batch.size)},
        "root": {"B": batch.root},
        "spans": {"S": "\n".join(f"{span.task_id} {span.first} {span.count}" for span in _spans(batch))},
        "leaves": {"B": b"".join(each.hash for each in batch.leaves)},
    }


def _batch(item: Item) -> Batch:
    start, content, leaves = int(item["sk"]["S"].partition("#")[2]), item["leaves"]["B"], list[Leaf]()
    for line in item["spans"]["S"].split("\n"):
        task_id, first, count = line.split(" ")
        at = len(leaves) * HASH_BYTES
        span = Span(task_id, int(first), start + len(leaves), content[at : at + int(count) * HASH_BYTES])
        leaves += [Leaf(task_id, each.seq, each.leaf) for each in span.indexed()]
    batch = Batch(start, tuple(leaves), item["root"]["B"])
    if _batch_item(batch) != item:
        raise CorruptLogError(f"the batch at {start} has the wrong number of leaves")
    return batch
