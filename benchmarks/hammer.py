"""Hammer: many tasks' events at once, and every proof verified as the log grows.

`python -m benchmarks.hammer` runs on a local cloud of its own. It puts the events into the tasks' table, as the task
store does, so that everything after that is the real way: stream, recorder, stream, sequencer, anchor, ledger. Then it
checks each entry's inclusion under the root that the ledger's transaction carries, and that each anchored log begins
with the one before; and runs fsck.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from audit.log import Anchor, Log
from local.cloud import Cloud
from local.fsck import settled, show
from qaes.adapters import clients
from qaes.adapters.task_items import TaskItems
from qaes.domain.anchor import decode
from qaes.domain.canonical import salted_hash
from qaes.domain.ids import new_task_id, now, timestamp
from qaes.domain.merkle import HASH_BYTES, leaf_digest, root_of, verify_consistency, verify_inclusion
from qaes.domain.models import Event
from qaes.domain.qubic import transaction
from qaes.domain.tiles import appended, consistency_proof, inclusion_proof

SIZES = (10**2, 10**3, 10**4, 10**5, 10**6)


@dataclass
class Figures:
    """What was measured; times in seconds."""

    entries: int = 0
    seconds: float = 0
    to_index: list[float] = field(default_factory=list)
    to_anchor: list[float] = field(default_factory=list)
    anchors: int = 0
    proofs: int = 0
    bytes_per_entry: float = 0

    def lines(self) -> list[str]:
        return [
            f"entries                            {self.entries}",
            f"entries per second, sustained      {self.entries / self.seconds:.0f}",
            f"seconds to an index, median, p99   {_middle(self.to_index):.1f}, {_p99(self.to_index):.1f}",
            f"seconds to an anchor, median, p99  {_middle(self.to_anchor):.1f}, {_p99(self.to_anchor):.1f}",
            f"ledger transactions, 1000 entries  {1000 * self.anchors / self.entries:.1f}",
            f"proofs verified                    {self.proofs}",
            f"storage bytes per entry            {self.bytes_per_entry:.0f}",
        ]


def _middle(values: list[float]) -> float:
    return statistics.median(values)


def _p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98] if len(values) > 1 else values[0]


def write_events(tasks: int, events: int, workers: int, started: dict[tuple[str, int], float]) -> None:
    """Write the events of `tasks` tasks, from as many threads as there are workers."""
    items = TaskItems(os.environ["TASKS_TABLE"])
    salt = "0" * 32

    def one_task(_: int) -> None:
        task_id = new_task_id()
        for number in range(1, events + 1):
            event = Event(
                kind="step_executed",
                actor="hammer",
                status="succeeded",
                input_hash=salted_hash(salt, number),
                output_hash=salted_hash(salt, [task_id, number]),
                timestamp=timestamp(now()),
            )
            clients.client("dynamodb").put_item(**items.event(task_id, number, event)["Put"])
            started[task_id, number] = time.monotonic()

    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(one_task, range(tasks)))


def watch(
    log: Log, expected: int, started: dict[tuple[str, int], float], figures: Figures, patience: float
) -> list[Anchor]:
    """Follow the log until the ledger has confirmed all of it; returns its anchors."""
    last = time.monotonic()
    indexed: list[tuple[str, int]] = []
    anchored = 0
    while anchored < expected:
        head = log.head()
        if head.integrated > len(indexed):
            fresh = log.leaves(len(indexed), head.integrated - len(indexed))
            last = time.monotonic()
            figures.to_index += [last - started[each.key] for each in fresh if each.key in started]
            indexed += [each.key for each in fresh]
            figures.seconds = last - min(started.values())
        newest = log.newest_anchor()
        if newest is not None and newest.size > anchored:
            last = time.monotonic()
            figures.to_anchor += [last - started[key] for key in indexed[anchored : newest.size] if key in started]
            anchored = newest.size
        if time.monotonic() - last > patience:
            raise TimeoutError(f"{len(indexed)} of {expected} are in the log, {anchored} anchored")
        time.sleep(0.1)
    return list(log.anchors())


def verify_all(log: Log, anchors: list[Anchor]) -> int:
    """Verify each entry under the first anchor over it, and each anchor's log against the one before."""
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
    """What entries and log take in their tables, by the length of names and values."""

    def size(value: Any) -> int:
        [(kind, content)] = value.items()
        return len(content) if kind in {"S", "B", "N"} else 1

    total = 0
    for table in ("AUDIT_ENTRIES_TABLE", "AUDIT_LOG_TABLE"):
        for page in clients.client("dynamodb").get_paginator("scan").paginate(TableName=os.environ[table]):
            total += sum(len(name) + size(value) for item in page["Items"] for name, value in item.items())
    return total


def hammer(tasks: int, events: int, workers: int, patience: float = 180) -> Figures:
    """Load the log of the environment's tables, and verify all of it."""
    log, figures, started = Log(), Figures(), {}
    before = log.head().size
    writer = threading.Thread(target=write_events, args=(tasks, events, workers, started))
    writer.start()
    while not started:
        time.sleep(0.01)
    figures.entries = tasks * events
    anchors = watch(log, before + figures.entries, started, figures, patience)
    writer.join()
    figures.anchors = len(anchors)
    figures.proofs = verify_all(log, anchors)
    figures.bytes_per_entry = stored_bytes() / log.head().size
    return figures


def proof_costs(sizes: tuple[int, ...] = SIZES, samples: int = 50) -> list[str]:
    """Bytes of an inclusion proof and time to verify it, by the size of the log."""
    lines = []
    for size in sizes:
        leaves = [leaf_digest(str(number).encode()) for number in range(size)]
        tiles = appended(0, leaves, _nothing)
        read: Callable[[int, int, int], bytes] = lambda level, index, width, tiles=tiles: tiles[level, index][
            : width * HASH_BYTES
        ]
        root = root_of(leaves)
        chosen = [number * (size - 1) // (samples - 1) for number in range(samples)]
        proofs = [inclusion_proof(index, size, read) for index in chosen]
        begin = time.perf_counter()
        for index, proof in zip(chosen, proofs, strict=True):
            verify_inclusion(leaf=leaves[index], index=index, size=size, proof=proof, root=root)
        each = (time.perf_counter() - begin) / samples
        longest = max(len(proof) for proof in proofs) * HASH_BYTES
        lines.append(f"{size:>9} entries: proof of {longest} bytes, verified in {each * 1e6:.0f} µs")
    return lines


def _nothing(level: int, index: int, width: int) -> bytes:
    raise LookupError(f"tile {level}/{index} of an empty log")


def main() -> int:
    """Hammer a local cloud of its own; return an exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.hammer", description="Load the audit log, verify it.")
    parser.add_argument("--tasks", type=int, default=50)
    parser.add_argument("--events", type=int, default=20, help="of each task")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--proofs-only", action="store_true", help="only what proofs cost, without a cloud")
    arguments = parser.parse_args()
    print("\n".join(proof_costs()))
    if arguments.proofs_only:
        return 0
    cloud = Cloud(f"hammer-{os.getpid()}", progress=lambda _: None)
    try:
        with cloud:
            os.environ.update(cloud.environment)
            names = {
                "TASKS_TABLE": "TasksTable",
                "AUDIT_ENTRIES_TABLE": "AuditEntriesTable",
                "AUDIT_LOG_TABLE": "AuditLogTable",
                "LEDGER_FUNCTION": "LedgerFunction",
            }
            os.environ.update({name: cloud.resources[resource] for name, resource in names.items()})
            clients.reset()
            print("\n".join(hammer(arguments.tasks, arguments.events, arguments.workers).lines()))
            report = settled(30, log_id="qaes")
            print(show(report))
    finally:
        cloud.remove_directory()
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
