"""Rolling limits over time: admissions by two versions of a policy, compared with the exact rolling sum."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta
from typing import NamedTuple

from hypothesis import example, given
from hypothesis import strategies as st

from qaes.domain import limits
from qaes.domain.policy import ActionRequest, evaluate, refusal_over
from tests.support.policies import CONTENT, changed, policy

MIDNIGHT = datetime(2026, 11, 24, tzinfo=UTC)
WINDOW = 3600
BUCKET = WINDOW // limits.BUCKETS
FIRST, SECOND = "rules.refund_customer.limits.0.window_seconds", "rules.refund_customer.limits.0.max_amount"
BEFORE = changed(changed(CONTENT, FIRST, WINDOW), SECOND, 10_000)
VERSIONS = [policy(BEFORE, 7), policy(changed(BEFORE, SECOND, 6_000), 8)]
"""The second version has less room in the same window."""


class Act(NamedTuple):
    """A request, the seconds since the act before, the version that decides, and whether its share is given back."""

    seconds: float
    amount: int
    version: int
    returned: bool


EDGES = st.sampled_from(
    [0.0, 1.0, BUCKET - 1.0, float(BUCKET), WINDOW - BUCKET, WINDOW - 1.0, float(WINDOW), WINDOW + BUCKET]
)
ACTS = st.lists(
    st.builds(
        Act,
        seconds=EDGES | st.floats(0, 2 * WINDOW, allow_nan=False),
        amount=st.sampled_from([1, 3000, 5999, 6000, 6001, 10_000]) | st.integers(1, 10_000),
        version=st.integers(0, 1),
        returned=st.booleans(),
    ),
    max_size=40,
)


STARTS = st.builds(lambda bucket, offset: bucket * BUCKET + offset, st.integers(-120, 120), st.sampled_from([0, 1, 59]))


@given(acts=ACTS, start=STARTS)
@example(acts=[Act(0, 6000, 0, False), Act(WINDOW - 1, 6000, 0, False)], start=BUCKET - 1)
@example(acts=[Act(0, 6000, 0, False), Act(WINDOW - 1, 1, 1, False)], start=BUCKET - 1)
def test_limit_admits_no_more_than_the_exact_rolling_sum(acts: list[Act], start: int) -> None:
    """The clock begins around midnight and moves over the edges of buckets, and the version changes on the way.

    A refusal is right except for rounding: the share of one more bucket before the window can count.
    """
    now = MIDNIGHT + timedelta(seconds=start)
    buckets: defaultdict[str, Counter[int]] = defaultdict(Counter)
    admitted: list[tuple[datetime, int]] = []
    for act in acts:
        now += timedelta(seconds=act.seconds)
        request = ActionRequest("refund_customer", {"order_id": "123456", "amount": act.amount}, "rita")
        version = VERSIONS[act.version]
        decision = evaluate(version, request)
        if not decision.allowed:  # more than an empty window admits
            assert act.amount > 6_000
            continue
        use = decision.limits[0]
        newest = limits.bucket_at(now, use.window_seconds)
        refusal = refusal_over(version.policy_id, use, used=limits.used(buckets[use.key], newest))
        exact = sum(amount for moment, amount in admitted if moment > now - timedelta(seconds=WINDOW))
        rounded = sum(amount for moment, amount in admitted if moment > now - timedelta(seconds=WINDOW + BUCKET))
        if refusal is None:
            assert exact + act.amount <= use.maximum
            if not act.returned:
                buckets[use.key][newest] += use.add
                admitted.append((now, act.amount))
        else:
            assert rounded + act.amount > use.maximum
    assert len(buckets) <= 1  # both versions count in one window
    assert sum(sum(each.values()) for each in buckets.values()) == sum(amount for _, amount in admitted)
