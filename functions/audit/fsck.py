"""fsck: reads events, entries, log, tiles, indexes and anchors, and reports each invariant that does not hold.

It reads everything, and trusts nothing: it computes the tree again from the entries' texts. It reads in pages, and
keeps one task, one tile of each level, and 16 bytes for each entry of the log in memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice

from audit.log import Batch, Head, Indexed, Leaf, Log
from audit.policy_stream import PolicyOutbox
from audit.store import (
    HASH_ROLES,
    AuditStore,
    EntryKey,
    ForgedEventError,
    Item,
    Outbox,
    StoredEntry,
    lookup,
)
from qaes.adapters.dynamo import BATCH_GET
from qaes.adapters.ledger_client import LedgerClient
from qaes.domain.anchor import AnchorPayload, decode, failed_checks, log_id_bytes
from qaes.domain.audit import AuditEntry, BrokenChainError, build_entry, build_policy_entry, verify_chain
from qaes.domain.errors import PermanentError
from qaes.domain.merkle import EMPTY_ROOT, HASH_BYTES, ProofError, node_hash
from qaes.domain.models import Event
from qaes.domain.note import parse_checkpoint, verify_note
from qaes.domain.policy_events import STREAM, PolicyEvent, follows
from qaes.domain.qubic import transaction
from qaes.domain.tiles import TILE_WIDTH, tile_root

INVARIANTS = {
    "unrecorded": "every event of a task, and of the policy, is recorded as an entry",
    "event": "an entry matches its event, and no event is missing",
    "policy": "the policy's events are numbered from 1, and the state after each follows from the state before",
    "decision": "each event of a person has its decision, and no other event has a decision's number",
    "chain": "the entries of a task have their hashes, name each other, and have no gap",
    "lookup": "an entry has the lookup attributes for the hashes of its input and output, and no others",
    "unsequenced": "every entry has an index in the log",
    "index": "each index is the place of an existing entry in the batches, and an entry has one index",
    "batch": "batches follow each other from 0 to the head's size, and each root is the root of the tree",
    "twice": "no entry is in the log twice, and the entries of a task are there in order",
    "head": "the head has the size and root of the last batch, and all of it is integrated",
    "tile": "each tile has all hashes of the tree at its place, and no others",
    "anchor": "anchors are numbered from 0, grow, name the one before, and have one network and the tree's root",
    "transaction": "an anchor's transaction carries its payload and the signature of its source",
    "note": "an anchor's checkpoint is signed, and has its size and root",
    "in flight": "at most one anchor is in flight, and its number follows the last confirmed one",
    "ledger": "the ledger has confirmed each anchor's transaction",
}
MOST_FINDINGS = 10_000
"""Further findings are only counted."""

_TILES_AT_ONCE = 50
_MARK_BYTES = 16
_COVERED = bytes(_MARK_BYTES)


@dataclass(frozen=True)
class Finding:
    """An invariant that does not hold, and the place."""

    invariant: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.invariant}: {self.where}: {self.what}"


@dataclass
class Report:
    """Counts of the items that were read, and the findings.

    `erased` counts the tasks of which only the entries are left, because their items were deleted.
    """

    tasks: int = 0
    entries: int = 0
    erased: int = 0
    size: int = 0
    tiles: int = 0
    anchors: int = 0
    anchored: int = 0
    findings: list[Finding] = field(default_factory=list)
    not_shown: int = 0

    @property
    def unrecorded(self) -> list[str]:
        """Tasks with events that have no entry. Invoke the recorder with `{"task_id": ...}` for each."""
        return self._tasks_of("unrecorded")

    @property
    def unsequenced(self) -> list[str]:
        """Tasks with entries that are not in the log. Invoke the sequencer with `{"task_ids": [...]}`."""
        return self._tasks_of("unsequenced")

    def _tasks_of(self, invariant: str) -> list[str]:
        return sorted({each.where.partition(" ")[0] for each in self.findings if each.invariant == invariant})


class _Tree:
    """The log's tree during the read: its root so far, and each tile as soon as it is complete."""

    def __init__(self) -> None:
        self.size = 0
        self._subtrees: list[tuple[int, bytes]] = []
        self._tiles: list[tuple[int, bytearray]] = []

    def add(self, leaf: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Add a leaf. Yields (level, index, content) of each tile that this leaf completes."""
        self.size += 1
        size, hash_ = 1, leaf
        while self._subtrees and self._subtrees[-1][0] == size:
            hash_ = node_hash(self._subtrees.pop()[1], hash_)
            size *= 2
        self._subtrees.append((size, hash_))
        return self._add_to_tile(0, leaf)

    def _add_to_tile(self, level: int, hash_: bytes) -> Iterator[tuple[int, int, bytes]]:
        if level == len(self._tiles):
            self._tiles.append((0, bytearray()))
        index, content = self._tiles[level]
        content += hash_
        if len(content) == TILE_WIDTH * HASH_BYTES:
            full = bytes(content)
            self._tiles[level] = (index + 1, bytearray())
            yield level, index, full
            yield from self._add_to_tile(level + 1, tile_root(full))

    def unfinished(self) -> list[tuple[int, int, bytes]]:
        """Return the last tile of each level, the empty tile after it, and the first tile above the top level."""
        rest: list[tuple[int, int, bytes]] = []
        for level, (index, content) in enumerate(self._tiles):
            rest.append((level, index, bytes(content)))
            if content:
                rest.append((level, index + 1, b""))
        return [*rest, (len(self._tiles), 0, b"")]

    @property
    def root(self) -> bytes:
        if not self._subtrees:
            return EMPTY_ROOT
        root = self._subtrees[-1][1]
        for _, left in reversed(self._subtrees[:-1]):
            root = node_hash(left, root)
        return root


class Fsck:
    """Checks one log. Without a ledger or an outbox, the checks that need it are skipped."""

    def __init__(
        self,
        store: AuditStore,
        log: Log,
        ledger: LedgerClient | None,
        *,
        log_id: str,
        outbox: Outbox | None = None,
        policy_outbox: PolicyOutbox | None = None,
    ) -> None:
        self._store = store
        self._policy_outbox = policy_outbox or PolicyOutbox()
        self._log = log
        self._ledger = ledger
        self._outbox = outbox
        self._log_id = log_id
        self._report = Report()
        self._places = bytearray()
        """A mark for each place in the log. The mark becomes zeros when the entry of that place is read."""
        self._misplaced: dict[EntryKey, tuple[StoredEntry, Indexed | None]] = {}
        self._tiles: dict[tuple[int, int], bytes] = {}

    def run(self) -> Report:
        """Run all checks; nothing is written."""
        # Read the log first: entries that are recorded during the run have no place in it, and are reported as such.
        head, anchors_before = self._log.head(), self._log.anchors.anchoring()
        roots: dict[int, bytes | None] = {each.size: None for each in self._log.anchors.all()}
        self._check_log(head, roots)
        if self._outbox is not None:
            self._check_recorded(self._outbox)
        for task_id, trail in self._store.trails():
            self._check_trail(task_id, trail)
        self._check_places()
        self._check_anchors(roots)
        if anchors_before is not None:
            self._check_in_flight(anchors_before.sequence)
        return self._report

    def _fail(self, invariant: str, where: str, what: str) -> None:
        if len(self._report.findings) < MOST_FINDINGS:
            self._report.findings.append(Finding(invariant, where, what))
        else:
            self._report.not_shown += 1

    # The log

    def _check_log(self, head: Head, roots: dict[int, bytes | None]) -> None:
        """Compare all batches with the tree, the tiles and the head. Fills in the requested `roots`."""
        tree, last = _Tree(), EMPTY_ROOT
        for batch in self._log.batches():
            self._check_batch(batch, tree, roots)
            last = batch.root
        for level, index, content in tree.unfinished():
            self._check_tile(level, index, content)
        self._compare_tiles()
        self._report.size = tree.size
        if (head.size, head.root) != (tree.size, last):
            self._fail("head", "HEAD", f"size or root differ from the last batch, which ends at {tree.size}")
        elif head.root != tree.root:
            self._fail("head", "HEAD", "its root differs from the tree's root")
        if (head.integrated, head.integrated_root) != (head.size, head.root):
            self._fail("head", "HEAD", f"only {head.integrated} of {head.size} entries are integrated")

    def _check_batch(self, batch: Batch, tree: _Tree, roots: dict[int, bytes | None]) -> None:
        if batch.start != tree.size:
            self._fail("batch", f"batch {batch.start}", f"it should begin at {tree.size}")
        for each in batch.leaves:
            self._places += _mark(each)
            for level, index, content in tree.add(each.hash):
                self._check_tile(level, index, content)
            if tree.size in roots:
                roots[tree.size] = tree.root
        if tree.root != batch.root:
            self._fail("batch", f"batch {batch.start}", "its root differs from the tree's root")

    def _check_tile(self, level: int, index: int, content: bytes) -> None:
        self._tiles[level, index] = content
        self._report.tiles += bool(content)
        if len(self._tiles) == _TILES_AT_ONCE:
            self._compare_tiles()

    def _compare_tiles(self) -> None:
        stored = self._log.stored_tiles(list(self._tiles))
        for place, content in self._tiles.items():
            found = stored.get(place, b"")
            if found == content:
                continue
            what = f"it has {len(found) // HASH_BYTES} hashes" if content.startswith(found) else "it has other hashes"
            self._fail("tile", f"tile {place[0]}/{place[1]}", what if content else "the tree does not have this tile")
        self._tiles.clear()

    # Events and entries

    def _check_recorded(self, outbox: Outbox) -> None:
        """Find events without an entry. Numbers have no gaps, so each task's last event is sufficient."""
        wanted: dict[str, int] = {}
        for task_id, last_event, said in outbox.tasks():
            if said is not None and said != last_event:
                self._check_count(outbox, task_id)
            wanted[task_id] = max(last_event, said or 0)
            if len(wanted) == BATCH_GET:
                self._check_last_entries(wanted)
                wanted = {}
        newest = self._policy_outbox.newest()
        self._check_last_entries(wanted | {STREAM: newest.number if newest else 0})

    def _check_count(self, outbox: Outbox, task_id: str) -> None:
        """Read the count and last event of a task again if they differ in the scan, because the task may be changing.

        An event and the count are written at once, so they are equal at any moment. The last event before the count was
        read cannot be above it, and the last event afterwards cannot be below it.
        """
        before, said, after = outbox.last_event(task_id), outbox.events_said(task_id), outbox.last_event(task_id)
        if said is not None and not before <= said <= after:
            last = before if before > said else after
            self._fail("event", f"{task_id} {said}", f"the task counts {said} events, but its last event is {last}")

    def _check_last_entries(self, wanted: dict[str, int]) -> None:
        found = self._store.texts(list(wanted.items()))
        for task_id, number in wanted.items():
            if number and (task_id, number) not in found:
                last = self._store.last_entry(task_id)
                seq = last.seq + 1 if last else 1
                # An index means that the entry was deleted. `_check_trail` reports it; do not record the entry again.
                if (task_id, seq) not in self._log.indexes([(task_id, seq)]):
                    self._fail("unrecorded", f"{task_id} {seq}", f"events {seq} to {number} have no entries")

    def _check_trail(self, task_id: str, trail: list[tuple[StoredEntry, Item]]) -> None:
        self._report.tasks += task_id != STREAM
        self._report.entries += len(trail)
        try:
            verify_chain([(each.text, each.leaf) for each, _ in trail], log_id=self._log_id, stream=task_id)
        except BrokenChainError as error:
            self._fail("chain", f"{task_id} {error.seq}", error.message)
        events = self._events(self._outbox, task_id) if self._outbox is not None else {}
        self._report.erased += self._outbox is not None and not events and task_id != STREAM
        indexes, before = self._indexes(task_id), -1
        for entry, stored in trail:
            said = entry.parsed()
            if (events or task_id == STREAM) and said is not None and self._outbox is not None:
                self._check_event(task_id, said, entry.seq, events.get(entry.seq))
            if said is not None:
                self._check_lookup(task_id, entry, stored, lookup(entry.leaf, said))
            before = self._check_index(task_id, entry, indexes.get(entry.seq), before)
        for seq in indexes.keys() - {entry.seq for entry, _ in trail}:
            self._fail("index", f"{task_id} {seq}", "it has an index, but the entry does not exist")

    def _events(self, outbox: Outbox, task_id: str) -> Mapping[int, Event | PolicyEvent]:
        if task_id == STREAM:
            return self._policy_events()
        events: dict[int, Event] = {}
        try:
            events.update(outbox.events(task_id))  # keeps the events before the error
        except ForgedEventError as error:
            self._fail("decision", task_id, error.message)
        return events

    def _policy_events(self) -> dict[int, PolicyEvent]:
        events: dict[int, PolicyEvent] = {}
        before: PolicyEvent | None = None
        for event in self._policy_outbox.events_after():
            if not follows(before, event):
                self._fail("policy", f"{STREAM} {event.number}", "it does not follow from the event before")
            before = events[event.number] = event
        return events

    def _check_event(self, task_id: str, said: AuditEntry, seq: int, event: Event | PolicyEvent | None) -> None:
        if event is None:
            self._fail("event", f"{task_id} {seq}", "the event does not exist")
            return
        expected: AuditEntry
        if isinstance(event, PolicyEvent):
            expected = build_policy_entry(event, log_id=said.log_id, prev=said.prev)
        else:
            expected = build_entry(event, log_id=said.log_id, task_id=task_id, seq=said.seq, prev=said.prev)
        recorded, happened = said.model_dump(exclude={"nonce"}), expected.model_dump(exclude={"nonce"})
        if other := [name for name in happened if recorded[name] != happened[name]]:
            self._fail("event", f"{task_id} {seq}", f"entry and event differ in {', '.join(other)}")

    def _check_lookup(self, task_id: str, entry: StoredEntry, stored: Item, expected: Item) -> None:
        for role in HASH_ROLES:
            if stored.get(role) != expected.get(role):
                self._fail("lookup", f"{task_id} {entry.seq}", f"the lookup by its {role} hash does not find it")

    def _indexes(self, task_id: str) -> dict[int, Indexed]:
        indexes: dict[int, Indexed] = {}
        for span in self._log.task_spans(task_id):
            if again := [each.seq for each in span.indexed() if each.seq in indexes]:
                self._fail("index", f"{task_id} {again[0]}", f"it has two indexes, one in the span up to {span.last}")
            indexes |= {each.seq: each for each in span.indexed()}
        return indexes

    def _check_index(self, task_id: str, entry: StoredEntry, indexed: Indexed | None, before: int) -> int:
        """Compare index and place. Return the index for the comparison with the next entry."""
        index = indexed.index if indexed else len(self._places)
        place = slice(index * _MARK_BYTES, (index + 1) * _MARK_BYTES)
        there = self._places[place] == _mark(Leaf(task_id, entry.seq, entry.leaf))
        if indexed is None or not there or indexed.leaf != entry.leaf:
            self._misplaced[task_id, entry.seq] = (entry, indexed)
            return before
        self._places[place] = _COVERED
        if index < before:
            self._fail("twice", f"{task_id} {entry.seq}", f"it is at {index}, but the entry before at {before}")
        return index

    def _check_places(self) -> None:
        """Report the remaining differences: entries that are not at their index, and places without their entry."""
        if self._places.strip(b"\0"):
            for batch in self._log.batches():
                self._check_batch_places(batch)
        for (task_id, seq), (_, indexed) in self._misplaced.items():
            self._fail("unsequenced", f"{task_id} {seq}", "it has no place in the log")
            if indexed is not None:
                self._fail("index", f"{task_id} {seq}", f"its index is {indexed.index}, but the log has another entry")

    def _check_batch_places(self, batch: Batch) -> None:
        left = {
            index: each
            for index, each in enumerate(batch.leaves, start=batch.start)
            if self._places[index * _MARK_BYTES : (index + 1) * _MARK_BYTES] not in (_COVERED, b"")
        }
        there = self._store.texts([each.key for each in left.values()])
        for index, each in left.items():
            where = f"{each.task_id} {each.seq}"
            _, indexed = self._misplaced.pop(each.key, (None, None))
            if indexed is not None:
                self._fail("index", where, f"index, place ({index}) and leaf hash differ")
            elif each.key not in there:
                self._fail("index", where, "the log has it, but the entry does not exist")
            elif each.key in self._log.indexes([each.key]):
                self._fail("twice", where, f"it is also at {index}")
            else:
                self._fail("index", where, "it has no index item")

    # Anchors

    def _check_anchors(self, roots: dict[int, bytes | None]) -> None:
        before: AnchorPayload | None = None
        network = ""
        # Read only the anchors of this moment: a later one may have a size that was not read.
        for sequence, anchor in enumerate(islice(self._log.anchors.all(), len(roots))):
            where = f"anchor {anchor.sequence}"
            self._report.anchors, self._report.anchored = sequence + 1, anchor.size
            try:
                payload = decode(anchor.payload)
                root = roots.get(anchor.size) or b""
                expected = (
                    AnchorPayload(log_id_bytes(self._log_id), anchor.size, root)
                    if before is None
                    else before.next(size=anchor.size, root=root)
                )
            except ProofError as error:
                self._fail("anchor", where, error.message)
                continue
            before = payload
            kept = (anchor.sequence, anchor.size, anchor.root, anchor.previous)
            if payload != expected or kept != (sequence, payload.size, payload.root, payload.previous):
                self._fail("anchor", where, "number, size, root or previous anchor are wrong")
            if network not in ("", anchor.network):
                self._fail("anchor", where, f"it is on {anchor.network}, but the one before on {network}")
            network = anchor.network
            try:
                found = transaction.decode(anchor.encoded)
                failed = failed_checks(found, anchor.payload, txid=anchor.txid, tick=anchor.tick, source=anchor.source)
            except ValueError as error:
                failed = [str(error)]
            if failed:
                self._fail("transaction", where, f"wrong: {', '.join(failed)}")
            try:
                said = parse_checkpoint(verify_note(anchor.note, anchor.verifier_key))
                # The origin is a URL, and may have changed since: a checkpoint is signed under the origin of its time.
                origin = anchor.verifier_key.partition("+")[0]
                if (said.origin, said.size, said.root) != (origin, anchor.size, anchor.root):
                    self._fail("note", where, "origin, size or root differ from the anchor")
            except ProofError as error:
                self._fail("note", where, error.message)
            self._check_ledger(where, anchor.sequence, anchor.txid)

    def _check_ledger(self, where: str, sequence: int, txid: str) -> None:
        if self._ledger is None:
            return
        try:
            answer = self._ledger.anchor_state(log_id=self._log_id, sequence=sequence)
        except PermanentError as error:
            self._fail("ledger", where, error.message)
            return
        if (answer["state"], answer["txid"]) != ("confirmed", txid):
            self._fail("ledger", where, f"the ledger reports {answer['state']} with id {answer['txid']}")

    def _check_in_flight(self, sequence_before: int) -> None:
        newest, last = self._log.anchors.anchoring(), self._log.anchors.newest()
        if newest is None:
            self._fail("in flight", f"anchor {sequence_before}", "the item was deleted")
            return
        confirmed = last.sequence if last else -1
        expected = confirmed + 1 if newest.state == "pending" else confirmed
        if newest.sequence != expected:
            self._fail("in flight", f"anchor {newest.sequence}", f"it is {newest.state}, and {confirmed} is confirmed")
        payload = last.payload if last and newest.state == "confirmed" else newest.payload
        if newest.payload != payload:
            self._fail("in flight", f"anchor {newest.sequence}", "it differs from the confirmed anchor")
        if self._ledger is not None:
            try:
                self._ledger.anchor_state(log_id=self._log_id, sequence=newest.sequence + 1)
            except PermanentError:
                return
            self._fail("in flight", f"anchor {newest.sequence + 1}", "the ledger has an anchor that was never begun")


def _mark(leaf: Leaf) -> bytes:
    """Return a short hash that identifies an entry and its leaf hash."""
    return hashlib.sha256(f"{leaf.task_id} {leaf.seq} {leaf.leaf}".encode()).digest()[:_MARK_BYTES]


def fsck(
    store: AuditStore,
    log: Log,
    ledger: LedgerClient | None,
    *,
    log_id: str,
    outbox: Outbox | None = None,
    policy_outbox: PolicyOutbox | None = None,
) -> Report:
    """Check the log and return the report."""
    return Fsck(store, log, ledger, log_id=log_id, outbox=outbox, policy_outbox=policy_outbox).run()
