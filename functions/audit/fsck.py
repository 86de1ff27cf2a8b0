"""fsck: walks entries, pointers, log, tiles, indexes and anchors, and names each invariant that does not hold.

It reads everything, and trusts none of it: the tree is computed anew from the entries' texts.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from audit.anchor import failed_checks
from audit.log import Batch, CorruptLogError, Head, Indexed, Log
from audit.store import AuditStore, StoredEntry
from qaes.adapters.ledger_client import LedgerClient
from qaes.domain.anchor import AnchorPayload, decode, log_id_bytes
from qaes.domain.audit import BrokenChainError, verify_chain
from qaes.domain.errors import RefusedError
from qaes.domain.merkle import EMPTY_ROOT, HASH_BYTES, ProofError, node_hash
from qaes.domain.note import parse_checkpoint, verify_note
from qaes.domain.qubic import transaction
from qaes.domain.tiles import appended, tree_root

INVARIANTS = {
    "chain": "the entries of a task have their hashes, name each other, and none is missing",
    "pointer": "an entry is found by its leaf hash, and by the hashes of its input and output",
    "unsequenced": "every entry has an index in the log",
    "index": "an index is that of the entry's place in the batches, and the entry is there",
    "batch": "batches follow each other from 0 to the head's size, and each root is that of the tree",
    "twice": "no entry is in the log twice, and the entries of a task are there in order",
    "head": "the head has the size and root of the last batch, and all of it is integrated",
    "tile": "each tile has the hashes of the tree, all of them and no others",
    "anchor": "anchors are numbered from 0, grow, name the one before, and have the root of the tree",
    "transaction": "an anchor's transaction carries its payload, and is signed by who is named",
    "note": "an anchor's checkpoint is signed, and says its size and root",
    "in flight": "at most one anchor is in flight, and it is the next",
    "ledger": "the ledger has confirmed each anchor's transaction",
}


@dataclass(frozen=True)
class Finding:
    """An invariant that does not hold, and where."""

    invariant: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.where}: {self.what}"


@dataclass
class Report:
    """What was looked at, and what does not hold."""

    tasks: int = 0
    entries: int = 0
    size: int = 0
    tiles: int = 0
    anchors: int = 0
    anchored: int = 0
    findings: list[Finding] = field(default_factory=list)

    @property
    def unsequenced(self) -> list[str]:
        """The tasks with entries that the log has not: the sequencer takes them as `{"task_ids": [...]}`."""
        found = (each.where.partition(" ")[0] for each in self.findings if each.invariant == "unsequenced")
        return sorted(set(found))


class Fsck:
    """Checks one log; without a ledger, that part is left out."""

    def __init__(self, store: AuditStore, log: Log, ledger: LedgerClient | None, *, log_id: str) -> None:
        self._store = store
        self._log = log
        self._ledger = ledger
        self._log_id = log_id
        self._report = Report()

    def run(self) -> Report:
        """Look at everything; nothing is written."""
        # The log first: what is recorded meanwhile has no place in it, and is told as such.
        head, anchors_before = self._log.head(), self._log.anchoring()
        batches = list(self._log.batches())
        placed = self._check_batches(head, batches)
        entries = self._entries()
        self._check_entries(entries, placed)
        leaves = [each.hash for batch in batches for each in batch.leaves]
        roots = self._check_tiles(leaves, head)
        for batch in batches:
            if roots.get(batch.size) != batch.root:
                self._tell("batch", f"batch {batch.start}", "its root is not that of the tree")
        self._check_anchors(roots)
        if anchors_before is not None:
            self._check_in_flight(anchors_before.sequence)
        return self._report

    def _tell(self, invariant: str, where: str, what: str) -> None:
        self._report.findings.append(Finding(invariant, where, what))

    # Entries

    def _entries(self) -> dict[str, list[StoredEntry]]:
        found: dict[str, list[StoredEntry]] = defaultdict(list)
        for task_id, entry in self._store.everything():
            found[task_id].append(entry)
        for entries in found.values():
            entries.sort(key=lambda entry: entry.seq)
        self._report.tasks = len(found)
        self._report.entries = sum(map(len, found.values()))
        return found

    def _check_entries(
        self, entries: dict[str, list[StoredEntry]], placed: dict[tuple[str, int], tuple[int, str]]
    ) -> None:
        for task_id, trail in entries.items():
            try:
                verify_chain([(each.text, each.leaf) for each in trail], log_id=self._log_id, task_id=task_id)
            except BrokenChainError as error:
                self._tell("chain", f"{task_id} {error.seq}", error.message)
            indexes = self._log.task_indexes(task_id)
            for entry in trail:
                self._check_pointers(task_id, entry)
                self._check_index(task_id, entry, indexes.get(entry.seq), placed.get((task_id, entry.seq)))
        there = {(task_id, each.seq) for task_id, trail in entries.items() for each in trail}
        for task_id, seq in placed.keys() - there:
            self._tell("index", f"{task_id} {seq}", "the log has it, and it is gone")

    def _check_pointers(self, task_id: str, entry: StoredEntry) -> None:
        said = entry.parsed()
        hashes = [(entry.leaf, "leaf")]
        hashes += [(said.input_hash, "input"), (said.output_hash, "output")] if said else []
        for hash_, role in hashes:
            if hash_ and not self._store.has_pointer(hash_, task_id, entry.seq, role):
                self._tell("pointer", f"{task_id} {entry.seq}", f"its {role} hash does not lead to it")

    def _check_index(
        self, task_id: str, entry: StoredEntry, indexed: Indexed | None, placed: tuple[int, str] | None
    ) -> None:
        where = f"{task_id} {entry.seq}"
        if placed is None:
            self._tell("unsequenced", where, "it has no place in the log")
            if indexed is not None:
                self._tell("index", where, f"it has the index {indexed.index}, where the log has it not")
        elif indexed is None:
            self._tell("index", where, "its index is not written")
        elif (indexed.index, indexed.leaf) != placed or indexed.leaf != entry.leaf:
            self._tell("index", where, "index, place and leaf hash are not the same")

    # The log

    def _check_batches(self, head: Head, batches: list[Batch]) -> dict[tuple[str, int], tuple[int, str]]:
        placed: dict[tuple[str, int], tuple[int, str]] = {}
        last: dict[str, int] = defaultdict(int)
        size = 0
        for batch in batches:
            if batch.start != size:
                self._tell("batch", f"batch {batch.start}", f"it should begin at {size}")
            for index, each in enumerate(batch.leaves, start=batch.start):
                if each.key in placed:
                    self._tell("twice", f"{each.task_id} {each.seq}", f"it is at {placed[each.key][0]} and {index}")
                elif each.seq != last[each.task_id] + 1:
                    self._tell("twice", f"{each.task_id} {each.seq}", f"it follows entry {last[each.task_id]}")
                placed.setdefault(each.key, (index, each.leaf))
                last[each.task_id] = max(last[each.task_id], each.seq)
            size = batch.size
        if (head.size, head.root) != (size, batches[-1].root if batches else EMPTY_ROOT):
            self._tell("head", "HEAD", f"its size or root are not those of the last batch, which ends at {size}")
        if (head.integrated, head.integrated_root) != (head.size, head.root):
            self._tell("head", "HEAD", f"only {head.integrated} of {head.size} are integrated")
        self._report.size = size
        return placed

    def _check_tiles(self, leaves: list[bytes], head: Head) -> dict[int, bytes]:
        """Compare the stored tiles with those of the tree; returns its root at each size."""
        computed = _tiles(leaves)
        for (level, index), content in computed.items():
            stored = self._log.stored_tile(level, index)
            if stored != content:
                found = f"{len(stored) // HASH_BYTES} hashes" if content.startswith(stored) else "other hashes"
                self._tell("tile", f"tile {level}/{index}", f"it has {found}")
        for level, count in itertools.groupby(sorted(computed), key=lambda tile: tile[0]):
            after = max(index for _, index in count) + 1
            if self._log.stored_tile(level, after):
                self._tell("tile", f"tile {level}/{after}", "there is no such tile in the tree")
        self._report.tiles = len(computed)

        def read(level: int, index: int, width: int) -> bytes:
            return computed[level, index][: width * HASH_BYTES]

        if leaves and tree_root(len(leaves), read) != head.root:
            self._tell("head", "HEAD", "its root is not that of the tree")
        return dict(_roots(leaves))

    # Anchors

    def _check_anchors(self, roots: dict[int, bytes]) -> None:
        before: AnchorPayload | None = None
        for sequence, anchor in enumerate(self._log.anchors()):
            where = f"anchor {anchor.sequence}"
            self._report.anchors, self._report.anchored = sequence + 1, anchor.size
            try:
                payload = decode(anchor.payload)
                expected = (
                    AnchorPayload(log_id_bytes(self._log_id), anchor.size, roots.get(anchor.size, b""))
                    if before is None
                    else before.next(size=anchor.size, root=roots.get(anchor.size, b""))
                )
            except ProofError as error:
                self._tell("anchor", where, error.message)
                continue
            before = payload
            kept = (anchor.sequence, anchor.size, anchor.root, anchor.previous)
            if payload != expected or kept != (sequence, payload.size, payload.root, payload.previous):
                self._tell("anchor", where, "number, size, root or the one before it are not what they should be")
            try:
                found = transaction.decode(anchor.encoded)
                failed = failed_checks(found, anchor.payload, txid=anchor.txid, tick=anchor.tick, source=anchor.source)
            except ValueError as error:
                failed = [str(error)]
            if failed:
                self._tell("transaction", where, f"wrong: {', '.join(failed)}")
            try:
                said = parse_checkpoint(verify_note(anchor.note, anchor.verifier_key))
                # The origin is an address, and may have changed; a checkpoint is signed under its own.
                origin = anchor.verifier_key.partition("+")[0]
                if (said.origin, said.size, said.root) != (origin, anchor.size, anchor.root):
                    self._tell("note", where, "it says something else")
            except ProofError as error:
                self._tell("note", where, error.message)
            self._check_ledger(where, anchor.sequence, anchor.txid)

    def _check_ledger(self, where: str, sequence: int, txid: str) -> None:
        if self._ledger is None:
            return
        try:
            answer = self._ledger.anchor_state(log_id=self._log_id, sequence=sequence)
        except RefusedError as error:
            self._tell("ledger", where, error.message)
            return
        if (answer["state"], answer["txid"]) != ("confirmed", txid):
            self._tell("ledger", where, f"the ledger has it as {answer['state']}, under {answer['txid']}")

    def _check_in_flight(self, sequence_before: int) -> None:
        newest, last = self._log.anchoring(), self._log.newest_anchor()
        if newest is None:
            self._tell("in flight", f"anchor {sequence_before}", "it was there and is gone")
            return
        confirmed = last.sequence if last else -1
        expected = confirmed + 1 if newest.state == "sealed" else confirmed
        if newest.sequence != expected:
            self._tell("in flight", f"anchor {newest.sequence}", f"it is {newest.state}, and {confirmed} is confirmed")
        payload = last.payload if last and newest.state == "confirmed" else newest.payload
        if newest.payload != payload:
            self._tell("in flight", f"anchor {newest.sequence}", "it is not the one that was confirmed")
        if self._ledger is not None:
            try:
                self._ledger.anchor_state(log_id=self._log_id, sequence=newest.sequence + 1)
            except RefusedError:
                return
            self._tell("in flight", f"anchor {newest.sequence + 1}", "the ledger has one that was never sealed")


def _tiles(leaves: list[bytes]) -> dict[tuple[int, int], bytes]:
    def nothing(level: int, index: int, width: int) -> bytes:
        raise CorruptLogError(f"tile {level}/{index} of an empty log")

    return appended(0, leaves, nothing)


def _roots(leaves: list[bytes]) -> Iterator[tuple[int, bytes]]:
    """The root at each size: complete subtrees from the left, and what they add up to."""
    stack: list[tuple[int, bytes]] = []
    for count, leaf in enumerate(leaves, start=1):
        size, hash_ = 1, leaf
        while stack and stack[-1][0] == size:
            hash_ = node_hash(stack.pop()[1], hash_)
            size *= 2
        stack.append((size, hash_))
        root = stack[-1][1]
        for _, left in reversed(stack[:-1]):
            root = node_hash(left, root)
        yield count, root


def fsck(store: AuditStore, log: Log, ledger: LedgerClient | None, *, log_id: str) -> Report:
    """Check the log, and tell what does not hold."""
    return Fsck(store, log, ledger, log_id=log_id).run()
