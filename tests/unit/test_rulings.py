"""Format 2 before a step runs: tiers, groups and limits of the pinned policy and of the one in force."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaes.domain import compliance, planning
from qaes.domain.canonical import sha256_hex
from qaes.domain.errors import ApprovalNeededError, ConflictError, StepDeniedError
from qaes.domain.models import Approval, Decision, Plan, Quorum, Task
from qaes.domain.policy import Policy
from qaes.domain.ruling import Ruling, merged, rule
from qaes.domain.tasks import lifecycle
from qaes.domain.tasks.lifecycle import History, StepOutcome
from tests.unit.test_compliance import APPROVED, AT, NOW, TASK, changed
from tests.unit.test_compliance import policy as format_1
from tests.unit.test_planning import POLICY, TRANSFER

GROUPS = {"finance": ["bob", "carol", "dora"], "cfo": ["dora", "erin"]}
FREE = {"max_amount": 10, "approvals": 0}
BY_FINANCE = {"max_amount": 100, "approvals": 2, "approvers": "finance"}
BY_CFO = {"max_amount": None, "approvals": 1, "approvers": "cfo"}
REFUND = {
    "title": "Refund a customer",
    "effect": "irreversible",
    "handler": {"type": "lambda", "function_name": "qaes-action-refund"},
    "parameters": {
        "type": "object", "required": ["amount"], "additionalProperties": False,
        "properties": {"amount": {"type": "integer", "minimum": 1, "maximum": 1000}},
    },
    "amount": "/amount",
    "unit": "EUR-cent",
}  # fmt: skip


def policy(
    version: int = 7,
    *tiers: dict[str, Any],
    groups: dict[str, list[str]] | None = None,
    action: str = "transfer_funds",
    actions: dict[str, Any] | None = None,
    **members: Any,
) -> Policy:
    """A policy of format 2 with one rule."""
    allowed = {"allowed": True, "risk_level": "high", "tiers": list(tiers or (FREE, BY_FINANCE, BY_CFO))}
    return Policy.model_validate({
        "policy_id": f"policy-v{version}-{sha256_hex(str(version))}", "version": version, "format": 2,
        "groups": GROUPS if groups is None else groups, "rules": {action: allowed | members}, "actions": actions or {},
    })  # fmt: skip


def task_of(amount: Any = 50, **fields: Any) -> Task:
    return changed(TASK, parameters=TRANSFER | {"amount": amount}, **fields)


def planned(task: Task, pinned: Policy) -> tuple[Task, Plan]:
    """The task with the plan that the planner makes of it."""
    plan = planning.build_plan(
        plan_id="plan_1", task_id=task.task_id, created_at=NOW, task_type=task.task_type, description=task.description,
        parameters=task.parameters, analysis=planning.analyze(task.task_type, pinned),
        policy=rule(task, pinned, pinned).pins,
    )  # fmt: skip
    planning.check_plan(plan, task.task_id)
    return changed(task, plan_hash=plan.hash()), plan


def approved(plan: Plan, *subjects: str, ruling: Ruling | None = None) -> Approval:
    """An approval of the plan's action by these people."""
    by = tuple(Decision(subject=subject, approved=True, reason="", decided_at=NOW) for subject in subjects)
    step = len(plan.steps) - 1
    hashes = {"plan_hash": plan.hash(), "step_hash": plan.steps[step].hash(), "step_index": step}
    terms = ruling.terms(ruling.quorums({})) if ruling else None
    return changed(APPROVED, decisions=by, terms=terms, **hashes)


def verdict(
    task: Task, pinned: Policy, current: Policy, *subjects: str, usage: dict[str, int] | None = None
) -> compliance.Verdict:
    """The verdict on the action, which these people have approved; a claim meets the same."""
    task, plan = planned(task, pinned)
    ruling, last = rule(task, pinned, current), len(plan.steps) - 1
    approval = approved(plan, *subjects, ruling=ruling) if subjects else None
    found = compliance.decide(task, plan, last, ruling, approval, usage or {})
    stops = {"denied": StepDeniedError, "await_approval": ApprovalNeededError}
    if found.verdict == "execute":
        compliance.check_may_act(task, plan, last, ruling, approval, usage or {}, at=AT)
    else:
        with pytest.raises(stops[found.verdict]):
            compliance.check_may_act(task, plan, last, ruling, approval, usage or {}, at=AT)
    return found


def asked_of(found: compliance.Verdict) -> list[tuple[int, str | None, tuple[str, ...] | None]]:
    assert found.verdict == "await_approval" and found.terms is not None
    return [(quorum.approvals, quorum.approvers, quorum.members) for quorum in found.terms.quorums]


# Tiers and groups of one policy


@pytest.mark.parametrize(
    ("amount", "asked"),
    [
        (10, None),
        (11, [(2, "finance", ("bob", "carol", "dora"))]),
        (100, [(2, "finance", ("bob", "carol", "dora"))]),
        (101, [(1, "cfo", ("dora", "erin"))]),
    ],
)
def test_tier_of_the_amount_names_its_approvers(amount: int, asked: list[Any] | None) -> None:
    found = verdict(task_of(amount), policy(), policy())
    if asked is None:
        assert found.verdict == "execute"
    else:
        assert asked_of(found) == asked


def test_terms_of_an_approval_state_tier_amount_and_escalation() -> None:
    tier = BY_FINANCE | {"escalate_after": 60, "escalate_to": "cfo", "expires_after": 300}
    found = verdict(task_of(), policy(7, FREE, tier), policy(7, FREE, tier))
    assert found.terms is not None
    stated = found.terms.model_dump(exclude={"quorums"})
    assert stated == {"tier": 1, "amount": 50, "unit": "QU", "escalate_after": 60, "escalate_to": "cfo"}
    assert (found.approvals, found.expires_after) == (2, 300)


def test_amount_beyond_all_tiers_is_denied_before_a_plan() -> None:
    ruling = rule(task_of(101), policy(7, FREE, BY_FINANCE), policy(7, FREE, BY_FINANCE))
    assert "over max_amount" in str(compliance.refusal_at_start(ruling))
    assert ruling.recorded.allowed is False


@pytest.mark.parametrize("subjects", [("bob",), ("bob", "mallory"), ("mallory", "frank")])
def test_approvals_from_outside_the_group_do_not_count(subjects: tuple[str, ...]) -> None:
    assert verdict(task_of(), policy(), policy(), *subjects).verdict == "await_approval"


def test_enough_members_of_the_group_let_the_step_run() -> None:
    assert verdict(task_of(), policy(), policy(), "bob", "dora").verdict == "execute"


@pytest.mark.parametrize("fields", [{"requester": "bob"}, {"retriers": ("bob",)}, {"requester": "bob", "agent": "crm"}])
def test_people_who_started_or_retried_do_not_count(fields: dict[str, Any]) -> None:
    """An agent acts for the owner of its token, who is the requester."""
    task = task_of(**fields)
    assert asked_of(verdict(task, policy(), policy())) == [(2, "finance", ("carol", "dora"))]
    assert verdict(task, policy(), policy(), "bob", "carol").verdict == "await_approval"
    assert verdict(task, policy(), policy(), "carol", "dora").verdict == "execute"


def test_requester_does_not_count_in_another_spelling() -> None:
    groups = {"finance": ["Zo\u00eb", "carol"], "cfo": ["erin"]}
    found = verdict(task_of(requester="Zoe\u0308"), policy(groups=groups), policy(groups=groups))
    assert (found.verdict, found.reason.split(":")[0]) == ("denied", "too_few_approvers")


def test_too_few_people_deny_the_task_at_its_start() -> None:
    groups = {"finance": ["alice", "bob"], "cfo": ["erin"]}
    ruling = rule(task_of(), policy(groups=groups), policy(groups=groups))
    reason = str(compliance.refusal_at_start(ruling))
    assert "requires 2 approvals by the group `finance`, in which 1 person can approve this task" in reason
    assert compliance.refusal_at_start(rule(task_of(5), policy(groups=groups), policy(groups=groups))) is None


def test_plan_that_misquotes_its_document_is_a_conflict() -> None:
    task, plan = planned(task_of(), policy())
    free = rule(task_of(5), policy(), policy()).pins
    steps = (*plan.steps[:2], changed(plan.steps[2], requires_approval=False))
    forged = changed(plan, policy=free, steps=steps)
    with pytest.raises(ConflictError, match="document"):
        compliance.decide(changed(task, plan_hash=forged.hash()), forged, 2, rule(task, policy(), policy()), None)


# The policy changes after the plan


@pytest.mark.parametrize(
    ("current", "named"),
    [
        (policy(8, allowed=False), "does not allow transfer_funds"),
        (policy(8, action="monitoring"), "does not allow transfer_funds"),
        (policy(8, FREE), "over max_amount"),
        (policy(8, requesters=["user:zed"]), "does not allow this requester"),
        (policy(8, destinations=["0xabcdef1234567890"]), "does not allow this destination"),
        (format_1(allowed=False), "does not allow transfer_funds"),
        (format_1(max_amount=49), "over max_amount"),
    ],
)
def test_stricter_policy_denies_an_approved_step(current: Policy, named: str) -> None:
    found = verdict(task_of(), policy(), current, "bob", "carol")
    assert (found.verdict, named in found.reason) == ("denied", True), found.reason


def test_looser_policy_does_not_take_the_pinned_tier_back() -> None:
    free = policy(8, {"max_amount": None, "approvals": 0})
    assert verdict(task_of(), policy(), free).verdict == "await_approval"
    assert verdict(task_of(), policy(), free, "bob", "dora").verdict == "execute"


def test_policy_without_groups_denies_a_pinned_tier_of_a_group() -> None:
    """Format 1 came into force again: the group has no members under it."""
    found = verdict(task_of(), policy(), format_1())
    assert (found.verdict, found.reason.split(":")[0]) == ("denied", "too_few_approvers")


def test_member_who_left_the_group_does_not_count() -> None:
    left = policy(8, groups=GROUPS | {"finance": ["bob", "dora", "zed"]})
    assert verdict(task_of(), policy(), left, "bob", "carol").verdict == "await_approval"
    assert verdict(task_of(), policy(), left, "bob", "dora").verdict == "execute"


def test_member_who_joined_counts_for_the_new_policy_only() -> None:
    joined = policy(8, groups=GROUPS | {"finance": [*GROUPS["finance"], "zed"]})
    assert verdict(task_of(), policy(), joined, "bob", "zed").verdict == "await_approval"


def test_group_that_is_gone_denies_the_step() -> None:
    gone = policy(8, FREE, BY_CFO, groups={"cfo": ["dora", "erin"]})
    found = verdict(task_of(), policy(), gone, "bob", "carol")
    assert (found.verdict, found.reason.split(":")[0]) == ("denied", "too_few_approvers")


def test_two_tiers_with_different_groups_must_both_be_met() -> None:
    current = policy(8, FREE, BY_CFO)
    both = [(2, "finance", ("bob", "carol", "dora")), (1, "cfo", ("dora", "erin"))]
    assert asked_of(verdict(task_of(), policy(), current)) == both
    assert verdict(task_of(), policy(), current, "bob", "carol").verdict == "await_approval"
    assert verdict(task_of(), policy(), current, "bob", "carol", "erin").verdict == "execute"
    assert verdict(task_of(), policy(), current, "bob", "dora").verdict == "execute"  # dora counts for both


def test_format_2_comes_into_force_while_a_task_waits() -> None:
    """Any approver was enough; by now it takes two of finance, who are also any approvers."""
    assert verdict(task_of(), POLICY, policy(), "mallory").verdict == "await_approval"
    assert asked_of(verdict(task_of(), POLICY, policy(), "mallory")) == [(2, "finance", ("bob", "carol", "dora"))]
    assert verdict(task_of(), POLICY, policy(), "bob", "carol").verdict == "execute"


def test_earlier_expiry_applies() -> None:
    later, earlier = ({"max_amount": None, "approvals": 1, "expires_after": each} for each in (900, 300))
    for pinned, current in ((later, earlier), (earlier, later)):
        assert verdict(task_of(), policy(7, pinned), policy(8, current)).expires_after == 300


def test_schema_that_no_longer_fits_denies_the_step() -> None:
    tiers: list[dict[str, Any]] = [{"max_amount": None, "approvals": 0}]
    refund = {"action": "refund", "limits": [{"window_seconds": 60, "max_count": 9, "per": "action", "over": "deny"}]}
    before = policy(7, *tiers, actions={"refund": REFUND}, **refund)
    schema = REFUND["parameters"] | {"required": ["amount", "order"]}  # type: ignore[operator]
    after = policy(8, *tiers, actions={"refund": REFUND | {"parameters": schema}}, **refund)
    task = changed(TASK, task_type="refund", parameters={"amount": 50})
    assert verdict(task, before, before).verdict == "execute"
    found = verdict(task, before, after)
    assert (found.verdict, found.reason.split(":")[0]) == ("denied", "invalid_parameters")


# Limits that let people approve


LIMIT = {"window_seconds": 3600, "max_amount": 100, "per": "action", "over": {"approvals": 1, "approvers": "cfo"}}


def limited(version: int = 7, *tiers: dict[str, Any], over: Any = None) -> Policy:
    limit = LIMIT | ({"over": over} if over else {})
    return policy(version, *(tiers or ({"max_amount": None, "approvals": 0},)), limits=[limit])


def key_of(task: Task, current: Policy) -> str:
    [use] = rule(task, current, current).current.limits
    return use.key


def test_limit_that_is_exceeded_asks_its_group() -> None:
    task, current = task_of(), limited()
    key = key_of(task, current)
    assert verdict(task, current, current, usage={key: 50}).verdict == "execute"
    over = {key: 51}
    assert asked_of(verdict(task, current, current, usage=over)) == [(1, "cfo", ("dora", "erin"))]
    assert verdict(task, current, current, "bob", usage=over).verdict == "await_approval"
    assert verdict(task, current, current, "erin", usage=over).verdict == "execute"


def test_limit_asks_beside_the_tier() -> None:
    task, current = task_of(), limited(7, BY_FINANCE)
    over = {key_of(task, current): 100}
    assert verdict(task, current, current, "bob", "carol", usage=over).verdict == "await_approval"
    assert verdict(task, current, current, "bob", "dora", usage=over).verdict == "execute"


def test_only_limits_whose_group_approved_are_granted() -> None:
    task, current = task_of(), limited()
    ruling = rule(task, current, current)
    by_erin, by_bob = (approved(planned(task, current)[1], who).decisions for who in ("erin", "bob"))
    assert ruling.granted(by_erin) == (key_of(task, current),)
    assert ruling.granted(by_bob) == ruling.granted(()) == ()


def test_limit_that_denies_has_a_code_and_words() -> None:
    task, current = task_of(), limited(over="deny")
    ruling, key = rule(task, current, current), key_of(task, current)
    assert ruling.refusal_by_usage({key: 50}) is None
    assert str(ruling.refusal_by_usage({key: 51})).startswith("limit_exceeded: `amount` 50 QU exceeds the limit of 100")
    # Nothing is denied before people are asked: the window may have room by then.
    assert verdict(task, current, current, usage={key: 51}).verdict == "execute"


# Plain steps and claims


def test_plain_step_waits_when_its_limit_is_exceeded() -> None:
    watch = policy(7, {"max_amount": None, "approvals": 0}, action="monitoring", limits=[
        {"window_seconds": 3600, "max_count": 2, "per": "requester", "over": {"approvals": 1}},
    ])  # fmt: skip
    task, plan = planned(WATCHED, watch)
    ruling, records = rule(task, watch, watch), {}
    for index in range(2):
        change = lifecycle.run_step(
            task, index, History(plan, records), StepOutcome(result={}), ruling, run=1, started=AT, at=AT
        )
        assert change.step is not None and '"limits"' not in change.events[0].output
        records[index] = change.step
    [use] = ruling.current.limits

    def last(used: int) -> lifecycle.Change:
        history, outcome, usage = History(plan, records), StepOutcome(result={}), {use.key: used}
        return lifecycle.run_step(task, 2, history, outcome, ruling, run=1, started=AT, at=AT, usage=usage)

    with pytest.raises(ApprovalNeededError):
        last(2)
    assert '"limits":[{"add":1,"counts":"count",' in last(1).events[0].output
    assert '"used":1' in last(1).events[0].output


@pytest.mark.parametrize("limits", [None, [], [{"key": "k", "used": 5}]])
def test_claim_states_the_limits_of_format_2_only(limits: Any) -> None:
    for pinned, current in ((policy(), policy()), (POLICY, POLICY), (POLICY, policy())):
        task, plan = planned(task_of(5, salt="0" * 32), pinned)
        recorded = rule(task, pinned, current).recorded
        done = {index: changed(record, step_index=index) for index in range(2) for record in [RECORD]}
        change = lifecycle.claim_step(task, 2, History(plan, done), None, recorded, run=1, at=AT, limits=limits)
        assert ('"limits"' in change.events[0].output) == (current.format == 2 and limits is not None)


WATCHED = changed(TASK, task_type="monitor_wallet", parameters={"wallet_address": "0x12"}, salt="0" * 32)
RECORD = lifecycle.StepRecord(
    step_index=0, step_id="step_1", type="check_balance", status="succeeded", attempt=1, input_hash="", started_at=NOW
)


# Properties of any two policies

PEOPLE = ["alice", "bob", "carol", "dora", "erin"]
TIERS = st.builds(
    lambda approvals, group: (
        {"max_amount": None, "approvals": approvals} | ({"approvers": group} if approvals and group else {})
    ),
    st.integers(0, 3),
    st.sampled_from([None, "finance", "cfo"]),
)
MEMBERS = st.lists(st.sampled_from(PEOPLE), min_size=1, max_size=5, unique=True)
POLICIES = st.builds(
    lambda tier, finance, cfo, version: policy(version, tier, groups={"finance": finance, "cfo": cfo}),
    TIERS,
    MEMBERS,
    MEMBERS,
    st.sampled_from([7, 8]),
)


@given(then=POLICIES, now=POLICIES, by=st.lists(st.sampled_from([*PEOPLE[1:], "zed"]), max_size=4, unique=True))
def test_step_runs_only_with_every_documents_approvals(then: Policy, now: Policy, by: list[str]) -> None:
    """Recounted here from the documents: each tier's approvals, by people in its group by both documents."""
    if then.version == now.version:
        now = then
    found = verdict(task_of(), then, now, *by)

    def given_for(document: Policy) -> bool:
        [tier] = document.rules["transfer_funds"].tiers  # type: ignore[union-attr]
        group = tier.approvers
        counted = [who for who in by if group is None or (who in document.groups[group] and who in now.groups[group])]
        return len(counted) >= tier.approvals

    assert (found.verdict == "execute") == (given_for(then) and given_for(now))


QUORUMS = st.lists(
    st.builds(
        lambda approvals, members: Quorum(
            approvals=approvals, approvers=None if members is None else "g", members=members
        ),
        st.integers(1, 3),
        st.none() | st.lists(st.sampled_from(PEOPLE), max_size=4, unique=True).map(tuple),
    ),
    max_size=4,
)


def test_merged_quorums_keep_one_of_two_that_imply_each_other() -> None:
    one, other = (Quorum(approvals=1, approvers=name, members=("bob", "dora")) for name in ("cfo", "finance"))
    assert merged([one, other]) == merged([other, one]) == (one,)
    turned = one.model_copy(update={"members": ("dora", "bob")})
    assert merged([one, turned]) == (one, turned)


@given(quorums=QUORUMS, by=st.lists(st.sampled_from(PEOPLE), max_size=5, unique=True))
def test_merged_quorums_are_met_when_all_are(quorums: list[Quorum], by: list[str]) -> None:
    decisions = [Decision(subject=who, approved=True, reason="", decided_at=NOW) for who in by]
    assert all(each.is_met(decisions) for each in merged(quorums)) == all(each.is_met(decisions) for each in quorums)
