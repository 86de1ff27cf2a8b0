"""Load test of the audit log: many tasks' events at once, with every proof verified as the log grows.

`make load-test` runs it on a separate local cloud. It writes the events to the tasks table, as the task store does,
so the rest is the real path: stream, recorder, stream, sequencer, anchor, ledger. Then it checks each entry's
inclusion under the root that the ledger's transaction carries, checks that each anchored log begins with the previous
one, and runs fsck. It prints its figures as the tables of docs/performance.md. It exits with 1 if a proof does not
hold, fsck has a finding, an event never gets into the log, or the median wait of an entry for its index is too long.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from audit.anchors import Anchor
from audit.log import Log
from audit.store import ROLES, EntryKey
from local.cloud import Cloud
from local.environment import LocalCloudError
from local.fsck import settled, show
from qaes.adapters import clients
from qaes.adapters.task_items import TaskItems
from qaes.domain.anchor import decode
from qaes.domain.canonical import salted_hash
from qaes.domain.errors import QaesError
from qaes.domain.ids import new_task_id, now, timestamp
from qaes.domain.merkle import HASH_BYTES, ProofError, leaf_digest, root_of, verify_consistency, verify_inclusion
from qaes.domain.models import Event
from qaes.domain.qubic import transaction
from qaes.domain.tiles import TILE_WIDTH, appended, consistency_proof, inclusion_proof

SIZES = (10**2, 10**3, 10**4, 10**5, 10**6)
MEDIAN_SECONDS_TO_INDEX = 10.0
"""The audit trail's guarantee on the local AWS."""


class LoadTestError(Exception):
    """A guarantee does not hold; the text names it."""


@dataclass
class Figures:
    """Measured figures; times in seconds since the event was written."""

    entries: int = 0
    writers: int = 0
    written_in: float = 0
    seconds: float = 0
    to_index: list[float] = field(default_factory=list)
    to_anchor: list[float] = field(default_factory=list)
    anchors: int = 0
    proofs: int = 0
    bytes_per_entry: float = 0

    def rows(self) -> list[tuple[str, str]]:
        return [
            (
                "events written",
                f"{self.entries} by {self.writers} writers, {self.entries / self.written_in:.0f} a second",
            ),
            ("entries a second, sustained, until all are in the log", f"{self.entries / self.seconds:.0f}"),
            ("recorded to index, median / p99", f"{_middle(self.to_index):.1f} s / {_p99(self.to_index):.1f} s"),
            ("recorded to anchor, median / p99", f"{_middle(self.to_anchor):.1f} s / {_p99(self.to_anchor):.1f} s"),
            ("ledger transactions for 1,000 entries", f"{1000 * self.anchors / self.entries:.1f}"),
            ("bytes stored for an entry, in tables and indexes", f"{self.bytes_per_entry:.0f}"),
            ("proofs verified", f"{self.proofs}"),
        ]


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Render a Markdown table."""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _middle(values: list[float]) -> float:
    return statistics.median(values) if values else 0


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98] if len(values) > 1 else max(values, default=0)


def write_events(tasks: int, events: int, workers: int, rate: float, started: dict[EntryKey, float]) -> None:
    """Write the events of `tasks` tasks from `workers` threads; `started` receives the time of each.

    `rate` limits the events a second of all threads together; 0: no limit.
    """
    turns, begin = itertools.count(), time.monotonic()

    def wait_for_turn() -> None:
        due = begin + next(turns) / rate if rate else 0
        time.sleep(max(0.0, due - time.monotonic()))

    items = TaskItems(os.environ["TASKS_TABLE"])
    salt = "0" * 32

    def one_task(_: int) -> None:
        task_id = new_task_id()
        for number in range(1, events + 1):
            event = Event(
                kind="step_executed",
                actor="load-test",
                status="succeeded",
                input_hash=salted_hash(salt, number),
                output_hash=salted_hash(salt, [task_id, number]),
                timestamp=timestamp(now()),
            )
            wait_for_turn()
            moment = time.monotonic()
            clients.client("dynamodb").put_item(**items.put_events(task_id, number, [event])["Put"])
            started[task_id, number] = moment

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one_task, range(tasks)))


def watch(
    log: Log, writer: threading.Thread, started: dict[EntryKey, float], figures: Figures, patience: float
) -> None:
    """Poll the log until the ledger has confirmed all written events.

    Raises LoadTestError if there is no progress for `patience` seconds.
    """
    begin = log.head().size
    last = time.monotonic()
    indexed: list[tuple[EntryKey, float]] = []
    anchored = 0
    while True:
        writing = writer.is_alive()
        head = log.head()
        if head.integrated > begin + len(indexed):
            fresh = log.leaves(begin + len(indexed), head.integrated - begin - len(indexed))
            last = time.monotonic()
            indexed += [(each.key, last) for each in fresh]
        newest = log.anchors.newest()
        if newest is not None and newest.size - begin > anchored:
            last = time.monotonic()
            covered = indexed[anchored : newest.size - begin]
            figures.to_anchor += [last - started[key] for key, _ in covered if key in started]
            anchored += len(covered)
        if not writing and anchored == len(indexed) and started.keys() <= {key for key, _ in indexed}:
            break
        if time.monotonic() - last > patience:
            there = f"{len(started)} events are written, {len(indexed)} in the log, {anchored} anchored"
            raise LoadTestError(f"no progress for {patience:.0f} s: {there}")
        time.sleep(0.2)
    # A poll may precede the entry in `started`, which the writer adds after the write to the table.
    figures.to_index = [moment - started[key] for key, moment in indexed if key in started]
    if not figures.to_index:
        raise LoadTestError("no event could be written")
    figures.seconds = max(moment for key, moment in indexed if key in started) - min(started.values())
    figures.entries = len(started)


def verify_all(log: Log, anchors: Iterable[Anchor]) -> int:
    """Verify each entry under the first anchor over it, and each anchor's log against the one before.

    Raises ProofError for the first proof that does not hold.
    """
    checked, before = 0, None
    tiles: dict[tuple[int, int, int], bytes] = {}

    def read(level: int, index: int, width: int) -> bytes:
        if (level, index, width) not in tiles:
            tiles[level, index, width] = log.tile(level, index, width)
        return tiles[level, index, width]

    for anchor in anchors:
        payload = decode(transaction.decode(anchor.encoded).payload)
        first = before.size if before else 0
        for index, leaf in enumerate(log.leaves(first, payload.size - first), start=first):
            proof = inclusion_proof(index, payload.size, read)
            verify_inclusion(leaf=leaf.hash, index=index, size=payload.size, proof=proof, root=payload.root)
            checked += 1
        if before is not None:
            verify_consistency(
                first=before.size,
                second=payload.size,
                proof=consistency_proof(before.size, payload.size, read),
                first_root=before.root,
                second_root=payload.root,
            )
        before = payload
    return checked


def stored_bytes() -> int:
    """Return the bytes of entries and log in their tables and indexes, by the length of names and values."""

    def size(value: Any) -> int:
        [(kind, content)] = value.items()
        return len(content) if kind in {"S", "B", "N"} else 1

    total = 0
    entries, log = os.environ["AUDIT_ENTRIES_TABLE"], os.environ["AUDIT_LOG_TABLE"]
    indexes = [{"TableName": entries, "IndexName": f"by_{role}"} for role in ROLES]
    for scanned in ({"TableName": entries}, {"TableName": log}, *indexes):
        for page in clients.client("dynamodb").get_paginator("scan").paginate(**scanned):
            total += sum(len(name) + size(value) for item in page["Items"] for name, value in item.items())
    return total


def load(tasks: int, events: int, workers: int, rate: float, patience: float) -> Figures:
    """Load the log of the environment's tables, and verify it completely."""
    log, figures = Log(), Figures(writers=workers)
    started: dict[EntryKey, float] = {}
    anchors_before = sum(1 for _ in log.anchors.all())
    begin = time.monotonic()

    def write() -> None:
        write_events(tasks, events, workers, rate, started)
        figures.written_in = time.monotonic() - begin

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    watch(log, writer, started, figures, patience)
    if len(started) < tasks * events:
        raise LoadTestError(f"only {len(started)} of {tasks * events} events could be written")
    anchors = list(log.anchors.all())
    figures.anchors = len(anchors) - anchors_before
    figures.proofs = verify_all(log, anchors)
    if figures.proofs < figures.entries:
        raise LoadTestError(f"only {figures.proofs} of {figures.entries} entries are anchored")
    figures.bytes_per_entry = stored_bytes() / log.head().size
    return figures


def proof_costs(sizes: Iterable[int] = SIZES, samples: int = 50) -> list[tuple[str, ...]]:
    """Return the cost of an inclusion proof by the size of the log: bytes, time to verify, tiles to read."""
    rows = []
    for size in sizes:
        leaves = [leaf_digest(str(number).encode()) for number in range(size)]
        tiles = appended(0, leaves, _nothing)
        reads = 0

        def read(level: int, index: int, width: int, tiles: dict[tuple[int, int], bytes] = tiles) -> bytes:
            nonlocal reads
            reads += 1
            return tiles[level, index][: width * HASH_BYTES]

        root = root_of(leaves)
        chosen = sorted({number * (size - 1) // (samples - 1) for number in range(samples)})
        proofs, most = [], 0
        for index in chosen:
            reads = 0
            proofs.append(inclusion_proof(index, size, read))
            most = max(most, reads)
        begin = time.perf_counter()
        for index, proof in zip(chosen, proofs, strict=True):
            verify_inclusion(leaf=leaves[index], index=index, size=size, proof=proof, root=root)
        each = (time.perf_counter() - begin) / len(chosen)
        longest = max(len(proof) for proof in proofs) * HASH_BYTES
        bound = 2 * math.ceil(math.log(size, TILE_WIDTH)) + 2
        if most > bound:
            raise LoadTestError(f"a proof of {size} entries takes {most} reads, more than {bound}")
        rows.append((f"{size:,}", f"{longest} bytes", f"{each * 1e6:.0f} µs", f"{most} (≤ {bound})"))
    return rows


def _nothing(level: int, index: int, width: int) -> bytes:
    raise LookupError(f"tile {level}/{index} of an empty log")


def check_median(figures: Figures, limit: float) -> None:
    """Raise LoadTestError if the median wait of entries for their index exceeds `limit` seconds; 0: never."""
    if limit and (median := _middle(figures.to_index)) > limit:
        raise LoadTestError(f"the median wait for an index is {median:.1f} s, more than {limit:g} s")


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.load_test", description="Load and verify the audit log."
    )
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--events", type=int, default=20, help="events of each task (20)")
    parser.add_argument("--workers", type=int, default=4, help="threads that write (4)")
    parser.add_argument("--rate", type=float, default=0, help="events a second of all threads (0: no limit)")
    parser.add_argument("--patience", type=float, default=300, help="maximum seconds without progress (300)")
    parser.add_argument(
        "--median",
        type=float,
        default=MEDIAN_SECONDS_TO_INDEX,
        help="maximum median seconds to an index (10; 0: no limit)",
    )
    parser.add_argument(
        "--sizes", type=int, nargs="*", default=SIZES, help="sizes of the logs whose proofs are measured"
    )
    parser.add_argument("--proofs-only", action="store_true", help="measure only the cost of proofs, without a cloud")
    return parser.parse_args(arguments)


def main() -> int:
    """Load a separate local cloud; return an exit code."""
    arguments = parse()
    try:
        if arguments.sizes:
            costs = proof_costs(arguments.sizes)
            print(table(("entries in the log", "inclusion proof", "verified in", "tiles read"), costs), flush=True)
        if not arguments.proofs_only:
            print()
            _load_a_cloud(arguments)
    except (LoadTestError, LocalCloudError, ProofError, QaesError) as error:
        print(f"FAILED: {error}", file=sys.stderr)
        return 1
    return 0


def _load_a_cloud(arguments: argparse.Namespace) -> None:
    cloud = Cloud(f"load-test-{os.getpid()}", progress=lambda _: None)
    try:
        with cloud:
            os.environ.update(cloud.environment)
            names = {
                "TASKS_TABLE": "TasksTable",
                "DECISIONS_TABLE": "DecisionsTable",
                "AUDIT_ENTRIES_TABLE": "AuditEntriesTable",
                "AUDIT_LOG_TABLE": "AuditLogTable",
                "AUDIT_ANCHORS_TABLE": "AuditAnchorsTable",
                "LEDGER_FUNCTION": "LedgerFunction",
            }
            os.environ.update({name: cloud.resources[resource] for name, resource in names.items()})
            clients.reset()
            figures = load(arguments.tasks, arguments.events, arguments.workers, arguments.rate, arguments.patience)
            print(table(("the log under load, on the local AWS", ""), figures.rows()), flush=True)
            report = settled(60, log_id="qaes")
            print(f"\n{show(report)}", flush=True)
            if report.findings:
                raise LoadTestError("fsck has findings")
            check_median(figures, arguments.median)
    finally:
        cloud.remove_directory()


if __name__ == "__main__":
    sys.exit(main())
