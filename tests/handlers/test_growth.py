"""No request and no scheduled run costs more after more tasks. `make bench ONLY=growth` has a million."""

from __future__ import annotations

import pytest

from benchmarks import growth
from benchmarks.units import Units
from qaes.adapters.task_repository import TaskStore

SIZES = (400, 4_000)
OPERATIONS = [
    "POST /task/start",
    "POST /task/{task_id}/approve",
    "GET /task/{task_id}",
    *(
        f"GET /tasks, {whose}, {status}"
        for whose in ("all tasks", "a requester's own")
        for status in ("every status", "completed", "executing", "waiting_approval")
    ),
    "the reconciler's run",
    "the sweeper's run",
]
EVERYTHING = "a list of all that was completed"


@pytest.fixture(scope="module")
def measured() -> list[growth.Measured]:
    """Consumption of each operation at each size, and of one that reads the whole history."""
    more = {EVERYTHING: lambda: TaskStore("TasksTable").open_tasks("completed", 0)}
    return [growth.measure(size, more)[1] for size in SIZES]


def test_every_operation_is_measured(measured: list[growth.Measured]) -> None:
    assert {name for found in measured for name in found} == {*OPERATIONS, EVERYTHING}


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operation_costs_the_same_after_more_tasks(measured: list[growth.Measured], operation: str) -> None:
    before, after = (found[operation] for found in measured)
    assert (before.read, before.written) == (after.read, after.written)
    assert before.read + before.written > 0


def test_growth_is_seen_when_a_read_is_of_all_tasks(measured: list[growth.Measured]) -> None:
    before, after = (found[EVERYTHING] for found in measured)
    assert growth.grown(before, after) > 5


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [((2, 1), (3, 1), 1.5), ((2, 1), (2, 3), 3.0), ((0, 4), (0, 4), 1.0), ((0, 4), (1, 4), 2.0)],
)
def test_grown_takes_the_units_that_grew_more(before: tuple[int, int], after: tuple[int, int], expected: float) -> None:
    units = [Units(read=read, written=written) for read, written in (before, after)]
    assert growth.grown(*units) == expected
