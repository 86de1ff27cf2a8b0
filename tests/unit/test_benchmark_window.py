"""The benchmark's windows make the batches that Lambda's would."""

from __future__ import annotations

import pytest

from benchmarks.window import batches_of


@pytest.mark.parametrize(
    ("window", "most", "expected"),
    [
        (1, 9, [[0, 1], [2, 3], [4]]),
        (5, 9, [[0, 1, 2, 3], [4]]),
        (5, 3, [[0, 1, 2], [3], [4]]),
        (0, 9, [[0, 1], [2], [3], [4]]),
        (60, 9, [[0, 1, 2, 3, 4]]),
    ],
)
def test_window_begins_with_the_first_of_a_batch(window: float, most: int, expected: list[list[int]]) -> None:
    assert batches_of([0.0, 0.0, 1.5, 2.5, 9.0], window, most) == expected
