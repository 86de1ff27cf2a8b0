"""The arithmetic of rolling windows: never less than the exact sum, and never more than one bucket's worth too much."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaes.domain.limits import BUCKETS, bucket_at, counts, used

MIDNIGHT = datetime(2026, 11, 24, tzinfo=UTC)
WINDOWS = st.sampled_from([60, 61, 3600, 86_400, 2_678_400])
ACTS = st.lists(st.tuples(st.floats(0, 1), st.integers(1, 1000)), max_size=30)


@given(window=WINDOWS, acts=ACTS, ahead=st.floats(0, 1.5))
def test_sum_covers_the_window_and_little_more(window: int, acts: list[tuple[float, int]], ahead: float) -> None:
    """Each act is in the window before midnight; `ahead` of its length later, the window has moved on."""
    moments = [(MIDNIGHT - timedelta(seconds=window * back), amount) for back, amount in acts]
    buckets: Counter[int] = Counter()
    for moment, amount in moments:
        buckets[bucket_at(moment, window)] += amount
    now = MIDNIGHT + timedelta(seconds=window * ahead)
    bucket = timedelta(seconds=window) / BUCKETS

    counted = used(buckets, bucket_at(now, window))

    exact = sum(amount for moment, amount in moments if moment >= now - timedelta(seconds=window))
    rounded = sum(amount for moment, amount in moments if moment > now - timedelta(seconds=window) - 2 * bucket)
    assert exact <= counted <= rounded


@pytest.mark.parametrize("window", [60, 3600, 86_400, 100_000])
def test_bucket_changes_at_its_edge(window: int) -> None:
    number = bucket_at(MIDNIGHT, window)
    edge = datetime.fromtimestamp(0, UTC) + (number + 1) * timedelta(seconds=window) / BUCKETS
    assert bucket_at(edge - timedelta(microseconds=1), window) == number
    assert bucket_at(edge, window) == number + 1


def test_bucket_of_a_clock_that_is_ahead_counts() -> None:
    assert used({100: 5, 101: 7}, 100) == 12
    assert [number for number in range(35, 105) if counts(number, 100)] == list(range(40, 105))
