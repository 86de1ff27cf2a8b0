"""The windows of the worker: each step counts once, gives back once, and no sum exceeds its limit at any moment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qaes.adapters import dynamo
from qaes.adapters.limits import LimitsTable, Windows
from qaes.domain.errors import PermanentError
from qaes.domain.policy import ActionRequest, Decision, evaluate
from tests.support import policies
from tests.support.cloud import cloud

HOUR = 3600
BUCKET = HOUR // 60
MIDNIGHT = datetime(2026, 11, 24, tzinfo=UTC)


@dataclass
class Clock:
    moment: datetime = field(default_factory=lambda: MIDNIGHT)

    def __call__(self) -> datetime:
        return self.moment

    def pass_seconds(self, seconds: float) -> None:
        self.moment += timedelta(seconds=seconds)


@pytest.fixture(scope="module", autouse=True)
def aws() -> Iterator[None]:
    with cloud(state_machine=False, policy=False):
        yield


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def table(clock: Clock) -> LimitsTable:
    return LimitsTable("LimitsTable", clock=clock)


def decision(subject: str, maximum: int, amount: int = 1, *, counts: str = "count", over: Any = "deny") -> Decision:
    """Decide on a request of `subject`, in whose own window of an hour it counts."""
    limit = {"window_seconds": HOUR, f"max_{counts}": maximum, "per": "requester", "over": over}
    policy = policies.of_limits("transaction", limit)
    return evaluate(policy, ActionRequest("transaction", {"amount": amount}, subject))


def used(table: Windows, subject: str) -> int:
    return table.read(decision(subject, 1).limits)[0].used


def claim(table: LimitsTable, task_id: str, of: Decision, step_index: int = 2, **options: Any) -> None:
    dynamo.transact(table.reserve_for(task_id, step_index, of, **options).writes)


def give_back(table: LimitsTable, task_id: str) -> None:
    if writes := table.give_back_of(task_id, 2):
        dynamo.transact(writes)


def test_step_counts_once_in_every_execution(table: LimitsTable, clock: Clock) -> None:
    of = decision("once", 1)
    claim(table, "task_1", of)
    clock.pass_seconds(HOUR / 2)
    claim(table, "task_1", of)
    assert used(table, "once") == 1
    clock.pass_seconds(HOUR * 0.75)  # the first claim is not in the window any more, the second is
    assert used(table, "once") == 1
    with pytest.raises(PermanentError) as caught:
        claim(table, "task_2", of)
    assert caught.value.code == "limit_exceeded"
    claim(table, "task_1", of)


def test_step_gives_back_once(table: LimitsTable) -> None:
    of = decision("back", 2)
    for task_id in ("task_3", "task_4"):
        claim(table, task_id, of)
    for _ in range(3):
        give_back(table, "task_3")
    assert used(table, "back") == 1
    claim(table, "task_3", of)
    assert used(table, "back") == 2
    give_back(table, "task_3")
    assert used(table, "back") == 1


def test_step_gives_back_once_when_two_do_at_once(table: LimitsTable) -> None:
    claim(table, "task_5", decision("twice", 2))
    claim(table, "task_6", decision("twice", 2))
    writes = [table.give_back_of("task_5", 2) for _ in range(2)]
    dynamo.transact(writes[0])
    with pytest.raises(dynamo.ConditionFailedError):
        dynamo.transact(writes[1])
    assert used(table, "twice") == 1


def test_step_that_counts_nothing_writes_nothing(table: LimitsTable) -> None:
    free = evaluate(policies.of_limits("transaction"), ActionRequest("transaction", {}, "free"))
    assert table.reserve_for("task_7", 2, free).writes == ()
    assert table.give_back_of("task_7", 2) == []


def test_claims_of_two_tasks_at_once_count_both_or_fail(table: LimitsTable) -> None:
    first, second = (table.reserve_for(task_id, 2, decision("race", 1)) for task_id in ("task_8", "task_9"))
    dynamo.transact(first.writes)
    with pytest.raises(dynamo.ConditionFailedError):
        dynamo.transact(second.writes)
    assert used(table, "race") == 1


def test_reservation_states_the_earlier_usage(table: LimitsTable) -> None:
    of = decision("stated", 100, 30, counts="amount")
    for expected in (0, 30, 60):
        reservation = table.reserve_for(f"task_{expected}", 2, of)
        assert [(use.used, use.is_over) for use in reservation.used] == [(expected, False)]
        dynamo.transact(reservation.writes)
    assert [use.is_over for use in table.read(of.limits)] == [True]


def test_approved_step_counts_beyond_the_limit(table: LimitsTable) -> None:
    of = decision("beyond", 1, over={"approvals": 1, "approvers": "finance"})
    claim(table, "task_a", of)
    with pytest.raises(PermanentError):
        claim(table, "task_b", of)
    claim(table, "task_b", of, granted=[of.limits[0].key])
    key = {"requester": "beyond"}
    assert table.read(of.limits)[0].used == 2, key


def test_window_expires_after_its_last_bucket(table: LimitsTable, clock: Clock) -> None:
    of = decision("kept", 1)
    claim(table, "task_c", of)
    keys = [dynamo.key(f"LIMIT#{of.limits[0].key}", "LIMIT"), dynamo.key("task_c", "RESERVED#002")]
    for key in keys:
        item = boto3.client("dynamodb").get_item(TableName="LimitsTable", Key=key)["Item"]
        assert int(item["expires_at_epoch"]["N"]) > clock.moment.timestamp() + HOUR * 61 / 60
        boto3.client("dynamodb").delete_item(TableName="LimitsTable", Key=key)
    clock.pass_seconds(HOUR * 2)
    claim(table, "task_c", of)
    assert used(table, "kept") == 1


def test_window_holds_61_buckets_at_most(table: LimitsTable, clock: Clock) -> None:
    of = decision("pruned", 1000)
    for number in range(70):
        claim(table, f"task_{number}", of)
        clock.pass_seconds(BUCKET)
    key = dynamo.key(f"LIMIT#{of.limits[0].key}", "LIMIT")
    item = boto3.client("dynamodb").get_item(TableName="LimitsTable", Key=key)["Item"]
    assert len(item["buckets"]["M"]) == 61


ACTS = st.lists(
    st.tuples(
        st.one_of(st.integers(0, 3 * BUCKET), st.integers(0, 2 * HOUR), st.just(BUCKET), st.just(HOUR)),
        st.integers(1, 40),
        st.sampled_from([60, 100]),
        st.booleans(),
    ),
    min_size=1,
    max_size=25,
)
"""Seconds that pass, the amount of a request, the maximum of the version in force, and whether the act does nothing."""
numbers = iter(range(10**6))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(acts=ACTS, start=st.integers(-2 * BUCKET, 2 * BUCKET))
def test_sum_is_exact_up_to_a_bucket(acts: list[tuple[int, int, int, bool]], start: int) -> None:
    """Over edges of buckets, midnight and changes of the version."""
    clock = Clock(MIDNIGHT + timedelta(seconds=start))
    table, subject = LimitsTable("LimitsTable", clock=clock), f"subject {next(numbers)}"
    admitted: list[tuple[datetime, int]] = []

    def total(seconds: int) -> int:
        return sum(amount for moment, amount in admitted if moment > clock.moment - timedelta(seconds=seconds))

    for number, (seconds, amount, maximum, does_nothing) in enumerate(acts):
        clock.pass_seconds(seconds)
        try:
            claim(table, f"{subject} {number}", decision(subject, maximum, amount, counts="amount"))
        except PermanentError:
            assert total(HOUR + 2 * BUCKET) + amount > maximum, "refused although the limit has room"
            continue
        assert total(HOUR) + amount <= maximum, "admitted beyond the limit"
        if does_nothing:
            give_back(table, f"{subject} {number}")
        else:
            admitted.append((clock.moment, amount))
