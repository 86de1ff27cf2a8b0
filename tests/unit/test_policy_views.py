"""The policy as a caller sees it, limits in words, and recorded requests decided again."""

from __future__ import annotations

import json
from typing import Any

from qaes.domain.policy import DEFAULT_RULES, ActionRequest, Policy, evaluate
from qaes.domain.policy.describing import ActionDescription, describe_actions, limit_state
from qaes.domain.policy.replaying import CHANGES, Comparison, Recorded, compare, judge
from tests.support.policies import CONTENT, changed, policy, with_rule

PLAIN = {"allowed": True, "risk_level": "low", "tiers": [{"approvals": 1}]}
FORMAT_1 = Policy(policy_id="p", version=1, rules=DEFAULT_RULES | {"send_mail": DEFAULT_RULES["monitoring"]})


def described(of: Policy, **caller: Any) -> dict[str, ActionDescription]:
    return {each.action: each for each in describe_actions(of, **{"requester": "rita"} | caller)}


def test_actions_of_a_policy_are_the_built_in_ones_and_its_own() -> None:
    found = described(policy())
    assert list(found) == ["monitoring", "transaction", "transfer_funds", "refund_customer"]
    assert [each.may_request for each in found.values()] == [False, False, False, True]
    refund = found["refund_customer"]
    assert (refund.unit, refund.effect, refund.recorded_only) == ("EUR-cent", "irreversible", True)
    assert refund.parameters == CONTENT["actions"]["refund_customer"]["parameters"]
    assert [tier.approvals for tier in refund.tiers] == [0, 2]
    assert len(refund.limits) == 2


def test_description_names_no_handler_and_no_requesters() -> None:
    found = describe_actions(policy(with_rule(requesters=["user:ursula", "group:finance"])), requester="rita")
    text = json.dumps([each.model_dump(mode="json") for each in found])
    for secret in ("qaes-action-refund", "lambda", "ursula", "flora"):
        assert secret not in text


def test_description_depends_on_the_caller() -> None:
    of = policy(with_rule(requesters=["group:finance", "agent:bot"]))
    assert described(of, requester="fay")["refund_customer"].may_request
    assert described(of, requester="rita", agent="bot")["refund_customer"].may_request
    denied = described(of, requester="fay", agent="other")["refund_customer"]
    assert not denied.may_request
    assert denied.reason is not None
    assert "this agent" in denied.reason


def test_description_gives_the_task_type_to_start() -> None:
    found = described(FORMAT_1)
    assert found["monitoring"].task_type == "monitor_wallet"
    assert found["monitoring"].parameters["required"] == ["wallet_address"]
    assert (found["monitoring"].unit, found["transfer_funds"].unit) == (None, "QU")
    assert {name: each.recorded_only for name, each in found.items()} == {
        "monitoring": False, "transaction": True, "transfer_funds": False, "send_mail": True,
    }  # fmt: skip


def test_limit_state_gives_the_room_in_words() -> None:
    amount, count = evaluate(policy(), refund(500).request).limits
    state = limit_state(amount, 100_000)
    assert (state.remaining, state.exceeded, state.over) == (400_000, False, "deny")
    assert state.words == "400000 EUR-cent of 500000 left in 86400 s for this action"
    state = limit_state(count, 20)
    assert (state.remaining, state.exceeded, state.unit) == (0, True, None)
    assert state.words.endswith("(20 requests used): 1 approval by the group `finance`")


# Replay


def refund(amount: object, requester: str = "rita") -> Recorded:
    request = ActionRequest("refund_customer", {"order_id": "123456", "amount": amount}, requester)
    return Recorded(f"task-{amount}", request)


def test_judge_denies_parameters_outside_the_schema() -> None:
    request = ActionRequest("refund_customer", {"order_id": "1", "amount": 5}, "rita")
    assert evaluate(policy(), request).allowed
    decision = judge(policy(), request)
    assert (decision.allowed, decision.code, decision.limits) == (False, "invalid_parameters", ())
    assert decision.reason.startswith("`parameters.order_id` the value does not match")


def compared(content: dict[str, Any], *requests: Recorded) -> Comparison:
    return compare(policy(), policy(content), requests)


def test_replay_classifies_each_change() -> None:
    rule = "rules.refund_customer"
    lower = changed(CONTENT, f"{rule}.tiers.1.max_amount", 100_000)
    assert [each.change for each in compared(lower, refund(5), refund(150_000)).changed] == ["allow_to_deny"]
    higher = changed(CONTENT, f"{rule}.tiers.1.max_amount", 400_000)
    assert [each.change for each in compared(higher, refund(300_000)).changed] == ["deny_to_allow"]
    stricter = changed(CONTENT, f"{rule}.tiers.1.approvals", 3)
    assert [each.change for each in compared(stricter, refund(50_000)).changed] == ["more_approvals"]
    weaker = changed(CONTENT, f"{rule}.tiers.1.approvals", 1)
    assert [each.change for each in compared(weaker, refund(50_000)).changed] == ["fewer_approvals"]
    others = changed(CONTENT, "groups.finance", ["gus", "gil"])
    assert [each.change for each in compared(others, refund(50_000)).changed] == ["other_approvers"]


def test_replay_counts_every_request_once() -> None:
    amounts = range(0, 300_000, 999)
    denied = [amount for amount in amounts if 100_000 < amount <= 200_000]
    lower = changed(CONTENT, "rules.refund_customer.tiers.1.max_amount", 100_000)
    found = compared(lower, *map(refund, amounts))
    assert found.total == len(amounts)
    assert tuple(found.counts) == CHANGES
    assert found.counts["allow_to_deny"] == len(denied)
    assert [each.task_id for each in found.changed] == [f"task-{amount}" for amount in denied]


def test_replay_from_format_1_denies_undefined_actions() -> None:
    mail = Recorded("t", ActionRequest("send_mail", {}, "rita"))
    monitor = Recorded("m", ActionRequest("monitor_wallet", {"wallet_address": "0x1234567890abcdef"}, "rita"))
    found = compare(FORMAT_1, policy(changed(CONTENT, "rules.monitoring", PLAIN)), [mail, monitor])
    assert [(each.task_id, each.change) for each in found.changed] == [("t", "allow_to_deny"), ("m", "more_approvals")]
