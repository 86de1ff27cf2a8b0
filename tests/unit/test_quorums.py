"""Approvals of groups: who may decide, and when enough people have approved."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaes.domain.errors import ConflictError, ForbiddenError
from qaes.domain.models import Approval, Decision, Quorum, Task, Terms
from qaes.domain.tasks import approvals
from qaes.domain.tasks.decisions import Decisions
from qaes.domain.tasks.lifecycle import Change
from tests.unit.test_compliance import APPROVED, AT, PLAN, TASK, changed

FINANCE = Quorum(approvals=2, approvers="finance", members=("bob", "carol", "dora"))
CFO = Quorum(approvals=1, approvers="cfo", members=("dora", "erin"))
ANYBODY = Quorum(approvals=1)
LATER = "2026-11-23T13:00:00.000Z"
WAITING = changed(TASK, status="waiting_approval", salt="0" * 32, retriers=("carol",))
NOT_RETRIED = changed(WAITING, retriers=())


def asked(*quorums: Quorum, **changes: Any) -> Approval:
    terms = Terms(quorums=quorums, tier=1, amount=250, unit="QU")
    fields = {"status": "pending", "decisions": (), "terms": terms, "required": terms.required, "expires_at": LATER}
    return changed(APPROVED, **(fields | changes))


def decide(approval: Approval, subject: str, *, approved: bool = True, task: Task = WAITING) -> Change:
    return approvals.decide(task, PLAN, [approval], approved=approved, subject=subject, reason="so", at=AT)


def after(approval: Approval, *subjects: str) -> Approval:
    """The approval after these people have approved."""
    for subject in subjects:
        decided = decide(approval, subject, task=NOT_RETRIED).approval
        assert decided is not None
        approval = decided
    return approval


def test_approval_of_format_1_is_stored_as_before() -> None:
    assert "terms" not in APPROVED.model_dump()
    assert Approval.model_validate_json(APPROVED.model_dump_json()) == APPROVED
    with_terms = asked(FINANCE)
    assert Approval.model_validate_json(with_terms.model_dump_json()) == with_terms


def test_decide_refuses_a_person_outside_the_group() -> None:
    for approved in (True, False):
        with pytest.raises(ForbiddenError, match="only people in `finance`"):
            decide(asked(FINANCE), "mallory", approved=approved)
    with pytest.raises(ForbiddenError, match="only people in `cfo` or `finance`"):
        decide(asked(FINANCE, CFO), "mallory")


def test_decide_ends_with_the_last_approval_of_the_group() -> None:
    once = after(asked(FINANCE), "bob")
    assert (once.status, once.is_met) == ("pending", False)
    twice = after(once, "dora")
    assert (twice.status, twice.is_met) == ("approved", True)


def test_decide_waits_for_every_group() -> None:
    """Two of finance are as many as are required, and neither is of the other group."""
    of_finance = after(asked(FINANCE, CFO), "bob", "carol")
    assert of_finance.status == "pending"
    assert after(of_finance, "erin").status == "approved"


def test_person_in_two_groups_counts_for_both() -> None:
    assert after(asked(FINANCE, CFO), "bob", "dora").status == "approved"
    assert after(asked(CFO, ANYBODY), "dora").status == "approved"


def test_rejection_by_one_group_ends_the_approval() -> None:
    change = decide(asked(FINANCE, CFO), "erin", approved=False)
    assert change.approval is not None
    assert change.approval.status == "rejected"


def test_same_person_decides_once_in_any_spelling() -> None:
    accented = ("Zo\u00eb", "Zoe\u0308")
    quorum = Quorum(approvals=2, approvers="finance", members=accented)
    once = after(asked(quorum), accented[0])
    with pytest.raises(ConflictError, match="already"):
        decide(once, accented[1])


def test_event_of_an_approval_names_its_groups() -> None:
    [event] = decide(asked(FINANCE, CFO), "bob").events
    assert '"quorums":[{"approvals":2,"approvers":"finance"},{"approvals":1,"approvers":"cfo"}]' in event.input
    assert "dora" not in event.input
    [before] = decide(changed(APPROVED, status="pending", decisions=(), expires_at=LATER), "bob").events
    assert "quorums" not in before.input


@pytest.mark.parametrize(("subjects", "status"), [(("bob", "carol"), "pending"), (("bob", "dora"), "approved")])
def test_recorded_decisions_meet_the_groups_or_not(subjects: tuple[str, ...], status: str) -> None:
    """The status follows from the decisions in their table, regardless of the approval's item."""
    approval, events = asked(FINANCE, CFO), {}
    for number, subject in enumerate(subjects, start=2):
        change = decide(approval, subject, task=NOT_RETRIED)
        assert change.approval is not None
        approval, events[number] = change.approval, change.events[0]
    stored = changed(asked(FINANCE, CFO), status="approved", decisions=())
    [read] = Decisions("0" * 32, events).of_approvals([stored])
    assert read.status == status
    assert read.decisions == approval.decisions


PEOPLE = st.sampled_from(["alice", "bob", "carol", "dora", "erin", "mallory"])
QUORUMS = st.lists(st.sampled_from([FINANCE, CFO, ANYBODY]), min_size=1, max_size=3)


@given(
    subject=PEOPLE,
    quorums=QUORUMS,
    by=st.lists(PEOPLE, max_size=3, unique=True),
    run=st.sampled_from([1, 2]),
    status=st.sampled_from(["waiting_approval", "executing", "cancelled"]),
    expires_at=st.sampled_from(["2026-11-23T12:00:00.000Z", "2026-11-23T12:00:01.000Z"]),
    four_eyes=st.booleans(),
    approved=st.booleans(),
)
def test_may_decide_is_true_when_decide_takes_it(
    subject: str,
    quorums: list[Quorum],
    by: list[str],
    run: int,
    status: str,
    expires_at: str,
    four_eyes: bool,
    approved: bool,
) -> None:
    given = tuple(Decision(subject=who, approved=True, reason="", decided_at="2026-11-23T11:00:00.000Z") for who in by)
    approval = asked(*quorums, decisions=given, run=run, expires_at=expires_at)
    task = changed(WAITING, status=status)
    try:
        approvals.decide(
            task, PLAN, [approval], approved=approved, subject=subject, reason="", at=AT, four_eyes=four_eyes
        )
        taken = True
    except (ForbiddenError, ConflictError):
        taken = False
    assert approvals.may_decide(task, [approval], subject, AT, four_eyes=four_eyes) == taken
