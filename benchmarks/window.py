"""Savings of the windows of the sequencer and of the anchor: `make bench ONLY=window`.

Tasks arrive at even intervals. Their entries are recorded on moto. The sequencer receives them in batches: Lambda
invokes it at the end of the window after the first entry, with all entries up to then.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.units import Units, metered
from qaes.adapters import clients
from qaes.adapters.logs import logger
from tests.support import template
from tests.support.cloud import cloud
from tests.support.trail import deliver, entry_items, put_entries

TASKS = 40
RATES = (0.1, 1.0, 5.0)
"""Rates in tasks a second."""
EVENTS = 7
RECORDED_AFTER = (1.0, 1.0, 1.0, 1.0, 2.2, 2.2, 2.2)
"""Seconds from a task's start to each of its entries. The recorder's window is one second."""
WINDOWS = ((1, 1), (5, 15))
"""Pairs (sequencer, anchor) in seconds: before, and the template's defaults."""


@dataclass
class Saved:
    """Cost of a task in the log with one pair of windows, at one rate."""

    rate: float
    sequencer_window: int
    anchor_window: int
    batches: float
    anchor_calls: float
    written: dict[str, float]
    read: float


def batches_of(moments: list[float], window: float, most: int) -> list[list[int]]:
    """Divide the entries at these moments into Lambda's batches, by their numbers."""
    found: list[list[int]] = []
    end = -1.0
    for number, moment in enumerate(moments):
        if moment > end or len(found[-1]) == most:
            found.append([])
            end = moment + window
        found[-1].append(number)
    return found


def measure() -> Iterator[Saved]:
    """Measure each rate with each pair of windows."""
    logger().setLevel("ERROR")
    source = template.template()["Resources"]["SequencerFunction"]["Properties"]["Events"]["NewEntries"]["Properties"]
    for rate in RATES:
        for sequencer_window, anchor_window in WINDOWS:
            with cloud(state_machine=False, policy=False) as aws:
                clients.client("dynamodb")
                arrivals = sorted(_entries(rate), key=lambda each: each[0])
                units, moments = Units(), [moment for moment, _ in arrivals]
                batches = batches_of(moments, sequencer_window, source["BatchSize"])
                with metered(units):
                    for batch in batches:
                        if failed := deliver(aws, [arrivals[number][1] for number in batch]):
                            raise RuntimeError(f"not sequenced: {failed}")
                grown = [moments[batch[0]] + sequencer_window for batch in batches]
                written: dict[str, float] = {}
                for (_, operation), count in units.by_operation.items():
                    kind = operation.rpartition(" ")[2]
                    if kind in {"BATCH", "HEAD", "TILE", "INDEX"}:
                        written[kind] = written.get(kind, 0) + count / TASKS
                yield Saved(
                    rate,
                    sequencer_window,
                    anchor_window,
                    batches=len(batches) / TASKS,
                    anchor_calls=len(batches_of(grown, anchor_window, 100)) / TASKS,
                    written=written,
                    read=units.read / TASKS,
                )


def _entries(rate: float) -> Iterator[tuple[float, Any]]:
    """Record the tasks; yield (moment, item) of each entry."""
    for number in range(TASKS):
        for after, item in zip(RECORDED_AFTER, entry_items(put_entries(EVENTS)), strict=True):
            yield number / rate + after, item
