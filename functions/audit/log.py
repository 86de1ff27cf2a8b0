"""The global log in AuditLogTable: an RFC 6962 tree over the entries of all tasks.

pk / sk                      what, and when it is written
LOG / HEAD                   version, size, root; how far tiles and indexes are there: under the version that was read
LOG / BATCH#start            the entries with the indexes from `start` on; size and root after them: once, with HEAD
TILE#level#index / TILE      up to 256 hashes: only wider than it is
task id / INDEX#seq          the index of the task's entries in one batch, up to that one, and their leaf hashes: once
SWEEP / SWEPT                how far the sweeper has looked, and what was behind then

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
    """The log's items contradict each other or what is asked of them: nothing is done on top of that."""


@dataclass(frozen=True)
class Head:
    """The log's state. Tiles and indexes are there up to `integrated`, whose root is `integrated_root`."""

    version: int = 0
    size: int = 0
    root: bytes = EMPTY_ROOT
    integrated: int = 0
    integrated_root: bytes = EMPTY_ROOT


@dataclass(frozen=True)
class Leaf:
    """An entry as the log has it."""

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
    """Leaves that got the indexes from `start` on; size and root of the log after them."""

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
    """Entries of one task that follow each other in the log, from the number `first` and the index `index` on."""

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
        """Give the index of each of its entries, in order."""
        for place, at in enumerate(range(0, len(self.leaves), HASH_BYTES)):
            yield Indexed(self.first + place, self.index + place, self.leaves[at : at + HASH_BYTES].hex())


@dataclass(frozen=True)
class Swept:
    """Up to when the sweeper has looked at events for good, and the tasks of which one, by number, was not in the log.

    `since` tells of each of these since when it has been on that list.
    """

    through: str
    behind: dict[str, int]
    since: dict[str, str]


class Log(Table):
    """The items of the log, and the anchors that `audit.anchors` makes of it."""

    def __init__(self, table: str | None = None, anchors: str | None = None) -> None:
        super().__init__(table or settings.text("AUDIT_LOG_TABLE"))
        self._anchors_table = anchors

    @cached_property
    def anchors(self) -> Anchors:
        """The log's anchors, in a table that the sequencer's role cannot write."""
        return Anchors(self._anchors_table)

    # Head and batches

    def head(self) -> Head:
        """Read the log's state; an empty log has one too."""
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
        """Give the batch its indexes: the one moment at which that happens.

        False when somebody else has done something since `head` was read; nothing is written then.
        """
        nobody_wrote_since = "version = :before" if head.version else "attribute_not_exists(pk)"
        state = key("LOG", "HEAD") | {
            "version": {"N": str(head.version + 1)},
            "size": {"N": str(batch.size)},
            "root": {"B": batch.root},
            "integrated": {"N": str(head.integrated)},
            "integrated_root": {"B": head.integrated_root},
        }
        put: Item = {"TableName": self._table, "Item": state, "ConditionExpression": nobody_wrote_since}
        if head.version:
            put["ExpressionAttributeValues"] = {":before": {"N": str(head.version)}}
        return transact([{"Put": put}, self._put_new(_batch_item(batch))])

    def batch(self, start: int) -> Batch:
        """Read the batch that begins at `start`. Raises CorruptLogError when there is none."""
        item = self._get("LOG", f"BATCH#{start:012d}")
        if item is None:
            raise CorruptLogError(f"no batch begins at {start}")
        return _batch(item)

    def batches(self) -> Iterable[Batch]:
        """Read all batches, in order."""
        return map(_batch, self._all("LOG", "BATCH#"))

    def leaves(self, first: int, count: int) -> list[Leaf]:
        """Read the leaves with the indexes from `first` on, at most `count`; fewer where the log ends."""
        before = self._first("LOG", "BATCH#", f"BATCH#{first:012d}", newest=True)
        if before is None:
            return []
        found: list[Leaf] = []
        end = int(before["sk"]["S"].partition("#")[2])
        # Batches may be of one entry each: they are read by the page, not one by one.
        for batch in map(_batch, self._between("LOG", before["sk"]["S"], f"BATCH#{first + count - 1:012d}")):
            if batch.start != end:
                break
            found += batch.leaves[max(0, first - batch.start) : first + count - batch.start]
            end = batch.size
        return found

    def record_integrated(self, batch: Batch) -> None:
        """Say that the tiles and indexes of the batch are there; somebody else may have said so, of a later one too."""
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
        """Read the first `width` hashes of a tile. Raises CorruptLogError when it has fewer."""
        content = self.stored_tile(level, index)
        if len(content) < width * HASH_BYTES:
            raise CorruptLogError(f"tile {level}/{index} has not {width} hashes")
        return content[: width * HASH_BYTES]

    def stored_tile(self, level: int, index: int) -> bytes:
        """Read a tile as wide as it is; empty when there is none."""
        item = self._get(*_tile_key(level, index))
        return bytes(item["hashes"]["B"]) if item else b""

    def stored_tiles(self, places: Sequence[tuple[int, int]]) -> dict[tuple[int, int], bytes]:
        """Read many tiles, by (level, index), as wide as they are; those that are not there are left out."""
        found: dict[tuple[int, int], bytes] = {}
        for item in get_many(self._table, [key(*_tile_key(*place)) for place in places]):
            _, level, index = item["pk"]["S"].split("#")
            found[int(level), int(index)] = bytes(item["hashes"]["B"])
        return found

    def widen_tile(self, level: int, index: int, content: bytes) -> None:
        """Write a tile, unless it is as wide already."""
        wider_than_stored = "attribute_not_exists(pk) OR width < :width"
        width = {"N": str(len(content) // HASH_BYTES)}
        item = key(*_tile_key(level, index)) | {"width": width, "hashes": {"B": content}}
        put_if(self._table, item, wider_than_stored, ExpressionAttributeValues={":width": width})

    # Indexes

    def indexes(self, keys: Sequence[EntryKey]) -> dict[EntryKey, Indexed]:
        """Read the indexes of those of the entries that have one."""
        found: dict[EntryKey, Indexed] = {}
        # Most that are asked for are the last of their task in a batch, and so are named by the item's key.
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
        """Read where a task's entries are in the log, in order of their numbers."""
        return self._spans(task_id, 1)

    def _spans(self, task_id: str, seq: int) -> list[Span]:
        return list(map(_span, self._between(task_id, f"INDEX#{seq:06d}", "INDEX#~")))

    def last_index(self, task_id: str) -> Indexed | None:
        """Read the index of the task's newest entry that has one."""
        item = self._first(task_id, "INDEX#", "INDEX#~", newest=True)
        return list(_span(item).indexed())[-1] if item else None

    def record_indexes(self, batch: Batch) -> None:
        """Write the indexes of the batch's entries, one item for each task.

        Raises CorruptLogError when there are others: the log would have an entry twice.
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
            raise CorruptLogError(f"{span.task_id} {span.first} to {span.last} have another index than {span.index}")

    # The sweeper's list

    def swept(self) -> Swept | None:
        """Read how far the sweeper has looked; None when it never has."""
        item = self._get("SWEEP", "SWEPT")
        if item is None:
            return None
        return Swept(item["through"]["S"], json.loads(item["behind"]["S"]), json.loads(item["since"]["S"]))

    def record_swept(self, swept: Swept) -> None:
        """Write how far it has looked."""
        item = key("SWEEP", "SWEPT") | {
            "through": {"S": swept.through},
            "behind": {"S": json.dumps(swept.behind)},
            "since": {"S": json.dumps(swept.since)},
        }
        dynamo.call("put_item", TableName=self._table, Item=item)


def _tile_key(level: int, index: int) -> tuple[str, str]:
    return f"TILE#{level:02d}#{index:012d}", "TILE"


def _spans(batch: Batch) -> Iterator[Span]:
    """One for each task of the batch: the sequencer puts a task's entries there one after the other."""
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
        raise CorruptLogError(f"the index of {item['pk']['S']} up to {last} has not the leaf hashes of its entries")
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
        raise CorruptLogError(f"the batch at {start} has not the leaves that it counts")
    return batch
