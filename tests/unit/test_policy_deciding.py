"""`evaluate`: tiers, groups, requesters, destinations and limits, for both formats."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaes.domain import limits
from qaes.domain.policy import (
    DEFAULT_RULES,
    ActionRequest,
    Decision,
    Policy,
    PolicyDecision,
    Rule,
    decide,
    eligible,
    evaluate,
    policy_of,
    refusal_over,
    requirement_over,
)
from qaes.domain.qubic.demo import wallet_identity
from qaes.domain.qubic.identity import encode_identity
from tests.support.policies import CONTENT, FINANCE, changed, policy, with_rule

ONE, OTHER = "0x1234567890abcdef", "0xfedcba0987654321"
IDENTITY = encode_identity(bytes(range(32)))


def refund(amount: object = 500, *, agent: str | None = None, requester: str = "rita", order: str = "123456") -> Any:
    return ActionRequest("refund_customer", {"order_id": order, "amount": amount}, requester, agent)


def decided(content: dict[str, Any], request: ActionRequest) -> Decision:
    return evaluate(policy(content), request)


# Tiers


@pytest.mark.parametrize(
    ("amount", "tier", "approvals", "members"),
    [
        (1, 0, 0, None),
        (10_000, 0, 0, None),
        (10_001, 1, 2, frozenset(FINANCE)),
        (200_000, 1, 2, frozenset(FINANCE)),
    ],
)
def test_evaluate_applies_first_tier_that_reaches_amount(amount: int, tier: int, approvals: int, members: Any) -> None:
    decision = decided(CONTENT, refund(amount))
    assert decision.allowed
    assert (decision.tier, decision.approvals, decision.members) == (tier, approvals, members)
    assert (decision.amount, decision.unit, decision.destination) == (amount, "EUR-cent", "123456")


def test_evaluate_returns_everything_of_the_tier() -> None:
    decision = decided(CONTENT, refund(50_000))
    assert decision.reason == "tier 2 of 2 (up to 200000 EUR-cent) requires 2 approvals by the group `finance`"
    assert (decision.expires_after, decision.escalate_after, decision.escalate_to) == (14400, 3600, "cfo")
    assert decision.requirement is not None
    assert (decision.approvers, decision.requirement.approvers, decision.signature) == ("finance", "finance", False)


def test_evaluate_denies_amount_above_every_tier() -> None:
    decision = decided(CONTENT, refund(200_001))
    assert (decision.allowed, decision.code, decision.tier, decision.limits) == (False, "over_max_amount", None, ())
    assert decision.reason.endswith("allows at most 200000 EUR-cent for refund_customer")


@pytest.mark.parametrize("amount", [None, 0, -5, 1.0, True, "5", 2**53])
def test_evaluate_denies_amount_that_is_not_an_integer(amount: object) -> None:
    decision = decided(CONTENT, refund(amount))
    assert (decision.allowed, decision.code) == (False, "invalid_amount")
    assert decision.reason == "`amount` must be a whole number from 1, in EUR-cent"


def test_last_tier_without_maximum_reaches_every_amount() -> None:
    content = changed(CONTENT, "rules.refund_customer.tiers.1.max_amount", None)
    content["rules"]["refund_customer"]["limits"] = []
    assert decided(content, refund(999_999)).tier == 1


# Actions


@pytest.mark.parametrize("action", ["refund", "pay", "generic"])
def test_evaluate_denies_action_that_is_not_defined(action: str) -> None:
    decision = decided(CONTENT, ActionRequest(action, {}, "rita"))
    assert (decision.allowed, decision.code) == (False, "unknown_action")


@pytest.mark.parametrize("action", ["monitor_wallet", "transaction", "transfer_funds"])
def test_evaluate_denies_built_in_action_without_rule(action: str) -> None:
    assert decided(CONTENT, ActionRequest(action, {"amount": 5}, "rita")).code == "not_allowed"


def test_monitor_wallet_follows_the_rule_monitoring() -> None:
    rule = {"allowed": True, "risk_level": "low", "tiers": [{"approvals": 0}]}
    content = changed(CONTENT, "rules.monitoring", rule)
    decision = decided(content, ActionRequest("monitor_wallet", {"wallet_address": ONE}, "rita"))
    assert (decision.allowed, decision.action, decision.source) == (True, "monitoring", ONE)


def test_evaluate_denies_action_whose_rule_forbids_it() -> None:
    assert decided(with_rule(allowed=False), refund()).code == "not_allowed"


# Requesters and destinations


@pytest.mark.parametrize(
    ("requester", "agent", "allowed"),
    [
        ("ursula", None, True),
        ("fay", None, True),
        ("rita", None, False),
        ("rita", "bot", True),
        ("rita", "other", False),
        ("ursula", "other", False),
        ("fay", "other", False),
        ("bot", None, False),
    ],
)
def test_evaluate_checks_requester(requester: str, agent: str | None, allowed: bool) -> None:
    """An agent needs a separate entry: the token of a permitted person is not enough."""
    content = with_rule(requesters=["user:ursula", "group:finance", "agent:bot"])
    decision = decided(content, refund(requester=requester, agent=agent))
    assert (decision.allowed, decision.code) == (allowed, "allowed" if allowed else "requester_not_allowed")


def test_evaluate_denies_other_destinations() -> None:
    content = with_rule(destinations=["123456", "000000"])
    assert decided(content, refund(order="123456")).allowed
    assert decided(content, refund(order="999999")).code == "destination_not_allowed"


# Limits


def test_limits_of_a_request_name_their_windows() -> None:
    amount, count = decided(CONTENT, refund(500)).limits
    assert (amount.counts, amount.per, amount.value, amount.add, amount.maximum) == (
        "amount", "action", "refund_customer", 500, 500_000,
    )  # fmt: skip
    assert (count.counts, count.per, count.value, count.add, count.maximum) == ("count", "requester", "rita", 1, 20)
    assert amount.key != count.key


def test_limit_keys_survive_versions_and_other_maxima() -> None:
    other = changed(CONTENT, "rules.refund_customer.limits.0.max_amount", 300_000)
    assert [use.key for use in decided(CONTENT, refund()).limits] == [
        use.key for use in evaluate(policy(other, version=9), refund()).limits
    ]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("actions.refund_customer.unit", "USD-cent"),
        ("rules.refund_customer.limits.0.window_seconds", 3600),
        ("rules.refund_customer.limits.0.per", "destination"),
    ],
)
def test_limit_key_changes_with_its_counter(path: str, value: Any) -> None:
    before, after = decided(CONTENT, refund()), decided(changed(CONTENT, path, value), refund())
    assert before.limits[0].key != after.limits[0].key


def test_limit_per_agent_counts_only_agents() -> None:
    content = changed(CONTENT, "rules.refund_customer.limits.1.per", "agent")
    assert len(decided(content, refund()).limits) == 1
    assert decided(content, refund(agent="bot")).limits[1].value == "bot"


def test_evaluate_denies_amount_above_an_empty_window() -> None:
    content = changed(CONTENT, "rules.refund_customer.limits.0.max_amount", 100_000)
    decision = decided(content, refund(100_001))
    assert (decision.allowed, decision.code) == (False, "limit_exceeded")
    assert "100000 EUR-cent in 86400 s for this action (0 EUR-cent used)" in decision.reason


def test_limit_with_room_admits_and_without_refuses() -> None:
    use = decided(CONTENT, refund(500)).limits[0]
    assert refusal_over("policy-v7", use, used=499_500) is None
    refusal = refusal_over("policy-v7", use, used=499_501)
    assert refusal is not None
    assert (refusal.code, refusal.details["used"]) == ("limit_exceeded", 499_501)
    assert refusal.message == (
        "`amount` 500 EUR-cent exceeds the limit of 500000 EUR-cent in 86400 s for this action (499501 EUR-cent used)"
    )


def test_limit_can_require_approvals_instead() -> None:
    use = decided(CONTENT, refund(500)).limits[1]
    assert refusal_over("policy-v7", use, used=20) is None
    assert requirement_over(use, used=19) is None
    needed = requirement_over(use, used=20)
    assert needed is not None
    assert (needed.approvals, needed.approvers, needed.members) == (1, "finance", frozenset(FINANCE))


def test_transfer_limits_count_a_wallet_not_its_spelling() -> None:
    rule = {
        "allowed": True, "risk_level": "high", "tiers": [{"approvals": 1}],
        "limits": [
            {"window_seconds": 60, "max_amount": 9, "per": "source", "over": "deny"},
            {"window_seconds": 60, "max_count": 9, "per": "destination", "over": "deny"},
        ],
    }  # fmt: skip
    content = changed(CONTENT, "rules.transfer_funds", rule)
    keys = [
        [use.key for use in decided(content, ActionRequest("transfer_funds", parameters, "rita")).limits]
        for parameters in (
            {"wallet_address": ONE, "to_address": OTHER, "amount": 5},
            {"wallet_address": ONE.upper().replace("X", "x"), "to_address": wallet_identity(OTHER), "amount": 5},
        )
    ]
    assert keys[0] == keys[1]


def test_evaluate_denies_transfer_above_every_tier() -> None:
    rule = {"allowed": True, "risk_level": "high", "tiers": [{"max_amount": 500, "approvals": 1}]}
    content = changed(CONTENT, "rules.transfer_funds", rule)
    decision = decided(content, ActionRequest("transfer_funds", {"wallet_address": ONE, "amount": 501}, "rita"))
    assert decision.code == "over_max_amount"
    assert decision.reason.endswith("lets a transfer move at most 500 QU")


def test_limit_denies_request_without_the_wallet_it_counts() -> None:
    rule = {
        "allowed": True, "risk_level": "low", "tiers": [{"approvals": 0}],
        "limits": [{"window_seconds": 60, "max_count": 9, "per": "source", "over": "deny"}],
    }  # fmt: skip
    content = changed(CONTENT, "rules.transaction", rule)
    assert decided(content, ActionRequest("transaction", {}, "rita")).code == "missing_source"


# People


def test_eligible_leaves_out_people_who_cannot_approve() -> None:
    needed = decided(CONTENT, refund(50_000)).requirement
    assert needed is not None
    assert eligible(needed, ["rita"]) == 3
    assert eligible(needed, ["fay", "finn"]) == 1
    assert eligible(decided(CONTENT, refund(5)).requirement or needed, []) == 3


def test_eligible_is_unknown_without_a_group() -> None:
    content = changed(CONTENT, "rules.refund_customer.tiers.0.approvals", 1)
    needed = decided(content, refund(5)).requirement
    assert needed is not None
    assert eligible(needed, ["rita"]) is None


# The pinned form


def test_pinned_form_of_format_2_has_its_members_only() -> None:
    decision = decide(policy(), refund(50_000))
    dump = decision.model_dump(mode="json")
    assert set(dump) == {
        "policy_id", "action_type", "allowed", "requires_approval", "risk_level", "approvals", "expires_after",
        "format", "tier", "approvers", "signature",
    }  # fmt: skip
    assert (dump["tier"], dump["approvals"], dump["approvers"], dump["format"]) == (1, 2, "finance", 2)
    assert PolicyDecision.model_validate(json.loads(decision.model_dump_json())) == decision


def test_pinned_form_of_a_denial_names_no_tier() -> None:
    dump = decide(policy(), refund(200_001)).model_dump(mode="json")
    assert (dump["allowed"], dump["tier"], dump["approvers"], dump["approvals"]) == (False, None, None, 0)
    assert dump["requires_approval"] is False


def test_pinned_form_of_format_1_is_as_it_was() -> None:
    dump = Policy(policy_id="p", version=1, rules=DEFAULT_RULES).decide("transfer_funds").model_dump(mode="json")
    assert json.dumps(dump) == (
        '{"policy_id": "p", "action_type": "transfer_funds", "allowed": true, "requires_approval": true, '
        '"risk_level": "high", "approvals": 1, "expires_after": null, "max_amount": null, "daily_limit": null, '
        '"allowed_addresses": null}'
    )


def test_format_2_policy_refuses_to_decide_without_a_request() -> None:
    with pytest.raises(ValueError, match="decide on a request"):
        policy().decide("refund_customer")


def test_reduced_policy_decides_alike() -> None:
    whole = policy(with_rule(requesters=["group:finance"]))
    reduced = Policy.model_validate(json.loads(whole.reduced("refund_customer").model_dump_json()))
    for amount in (5, 50_000, 200_001):
        for requester in ("fay", "rita"):
            request = refund(amount, requester=requester)
            assert evaluate(reduced, request) == evaluate(whole, request)
    assert set(reduced.groups) == {"finance", "cfo"}
    assert whole.reduced("transfer_funds").groups == {}


# Format 1

RULES = st.builds(
    Rule,
    allowed=st.booleans(),
    requires_approval=st.booleans(),
    risk_level=st.sampled_from(["low", "medium", "high"]),
    approvals=st.integers(1, 10),
    expires_after=st.none() | st.integers(1, 2_592_000),
    max_amount=st.none() | st.integers(1, 50),
    daily_limit=st.none() | st.integers(50, 80),
    allowed_addresses=st.none() | st.lists(st.sampled_from([IDENTITY, ONE]), min_size=1, unique=True).map(tuple),
)


@given(rule=RULES, amount=st.integers(1, 100), to=st.sampled_from([IDENTITY, ONE, OTHER]), spent=st.integers(0, 80))
def test_evaluate_decides_on_format_1_as_its_own_checks_do(rule: Rule, amount: int, to: str, spent: int) -> None:
    first = Policy(policy_id="p", version=1, rules={"transfer_funds": rule})
    request = ActionRequest("transfer_funds", {"wallet_address": IDENTITY, "to_address": to, "amount": amount}, "rita")
    pinned, decision = first.decide("transfer_funds"), evaluate(first, request)
    assert decide(first, request) == pinned
    refusal = limits.refusal_by_limits(pinned, destination=to, amount=amount) if rule.allowed else None
    assert decision.allowed == (rule.allowed and refusal is None)
    if refusal:
        assert (decision.code, decision.reason) == (refusal.code, refusal.message)
    if decision.allowed:
        assert decision.approvals == (rule.approvals if rule.requires_approval else 0)
        assert decision.expires_after == rule.expires_after
        old = limits.refusal_by_daily_limit(pinned, amount=amount, spent=spent)
        new = [each for use in decision.limits if (each := refusal_over("p", use, used=spent))]
        assert [(each.code, each.message, each.details) for each in new] == (
            [(old.code, old.message, old.details)] if old else []
        )


@given(rule=RULES)
def test_limits_of_other_format_1_rules_have_no_effect(rule: Rule) -> None:
    first = Policy(policy_id="p", version=1, rules={"send_mail": rule})
    decision = evaluate(first, ActionRequest("send_mail", {"amount": 10**9}, "rita"))
    assert (decision.allowed, decision.limits) == (rule.allowed, ())


def test_format_1_allows_unknown_actions_that_have_a_rule() -> None:
    first = policy_of(
        '{"format":1,"rules":{"send_mail":{"allowed":true,"requires_approval":false,"risk_level":"low"}},"version":7}'
    )
    assert evaluate(first, ActionRequest("send_mail", {}, "rita")).allowed
    assert evaluate(first, ActionRequest("burn", {}, "rita")).code == "not_allowed"
