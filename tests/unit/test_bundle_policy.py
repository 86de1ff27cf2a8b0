"""Which events of the policy a task's bundle contains."""

from __future__ import annotations

import pytest

from qaes.domain.bundle import policy_numbers
from qaes.domain.ids import parse_timestamp, timestamp
from qaes.domain.policy_events import PolicyEvent, next_event

NOON = parse_timestamp("2026-11-23T12:00:00.000Z")
USED, OTHER = f"policy-v2-{'a' * 64}", f"policy-v3-{'b' * 64}"


def at(minutes: float) -> str:
    return timestamp(NOON.fromtimestamp(NOON.timestamp() + 60 * minutes, NOON.tzinfo))


def events(*of: tuple[float, str, str]) -> list[PolicyEvent]:
    """Events from (minutes after noon, kind, subject)."""
    found: list[PolicyEvent] = []
    for minutes, kind, about in of:
        subject = {"policy_id": about} if kind.startswith("policy_") else {"name": about}
        before = found[-1] if found else None
        found.append(next_event(before, kind, actor="olivia", at=at(minutes), **subject))  # type: ignore[arg-type]
    return found


VERSIONS = [
    (-300, "policy_proposed", USED),
    (-299, "policy_rejected", OTHER),
    (-298, "policy_approved", USED),
    (-297, "policy_in_force", USED),
    (-200, "action_suspended", "paint"),
    (-100, "action_suspended", "transfer_funds"),
]


def numbers(*more: tuple[float, str, str], last: float | None = 10) -> list[int]:
    found = events(*VERSIONS, *more)
    return policy_numbers(found, versions={USED}, first=at(0), last=at(last) if last is not None else None)


def test_bundle_has_used_versions_and_the_last_event_before() -> None:
    assert numbers() == [1, 3, 4, 6]


def test_bundle_has_every_event_while_the_task_ran() -> None:
    assert numbers((1, "resume_requested", "paint"), (9, "policy_proposed", OTHER), (90, "action_suspended", "*")) == [
        *(1, 3, 4, 6),
        *(7, 8),
    ]


def test_bundle_has_every_later_event_while_the_task_is_open() -> None:
    assert numbers((90, "action_suspended", "*"), last=None) == [1, 3, 4, 6, 7]


@pytest.mark.parametrize("minutes", [-4, 14])
def test_bundle_has_events_within_clock_skew(minutes: float) -> None:
    assert numbers((minutes, "action_suspended", "*")) == [1, 3, 4, 6, 7]


def test_bundle_has_no_gap_when_an_event_looks_too_late() -> None:
    assert numbers((90, "action_suspended", "*"), (9, "action_suspended", "*")) == [1, 3, 4, 6, 7, 8]


def test_bundle_has_no_policy_events_when_there_are_none() -> None:
    assert policy_numbers([], versions={USED}, first=at(0), last=None) == []
