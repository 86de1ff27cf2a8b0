"""A request that can never succeed is refused before anything is written, and the field is named."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaes.domain import planning
from qaes.domain.errors import InvalidInputError
from qaes.domain.policy import Policy, Rule
from qaes.domain.qubic.demo import is_same_wallet
from qaes.domain.requests import TaskRequest
from qubic.wallets import DEMO_BALANCES, demo_key

IDENTITY = "BZBQFLLBNCXEMGLOBHUVFTLUPLVCPQUASSILFABOFFBCADQSSUPNWLZBQEXK"
OLDER = "0x1234567890abcdef"
SPELLINGS = {
    address: [address, address.upper().replace("X", "x"), address.replace("x", "X"), demo_key(address).identity]
    for address in DEMO_BALANCES
}


def request(task_type: str, wallet: str | None = None, **parameters: Any) -> TaskRequest:
    return TaskRequest(task_type=task_type, description="a test", wallet_address=wallet, parameters=parameters)


def field_of(asked: TaskRequest, network: str = "mock") -> str | None:
    with pytest.raises(InvalidInputError) as caught:
        asked.resolved(network)
    return caught.value.field


@pytest.mark.parametrize("network", ["mainnet", "testnet"])
@pytest.mark.parametrize("task_type", ["monitor_wallet", "transfer_funds", "note"])
def test_older_address_refused_on_a_real_network(task_type: str, network: str) -> None:
    assert field_of(request(task_type, OLDER), network) == "wallet_address"
    assert field_of(request(task_type, wallet_address=OLDER), network) == "parameters.wallet_address"
    assert field_of(request(task_type, IDENTITY, to_address=OLDER, amount=1), network) == "parameters.to_address"


def test_identity_accepted_on_a_real_network() -> None:
    assert request("monitor_wallet", IDENTITY).resolved("mainnet") == {"wallet_address": IDENTITY}


@given(st.sampled_from(list(SPELLINGS)), st.sampled_from(list(SPELLINGS)), st.data())
def test_transfer_refused_just_when_both_are_one_wallet(source: str, target: str, data: st.DataObject) -> None:
    pays, gets = data.draw(st.sampled_from(SPELLINGS[source])), data.draw(st.sampled_from(SPELLINGS[target]))
    asked = request("transfer_funds", pays, to_address=gets, amount=1)
    if source == target:
        assert field_of(asked) == "parameters.to_address"
    else:
        resolved = asked.resolved("mock")
        assert not is_same_wallet(resolved["wallet_address"], resolved["to_address"])


@given(
    st.sampled_from(["monitor_wallet", "monitoring", "transfer_funds", "transaction", "note"]),
    st.none() | st.sampled_from([OLDER, IDENTITY]),
    st.dictionaries(
        st.sampled_from(["wallet_address", "to_address", "amount", "alert_threshold", "note"]),
        st.sampled_from([None, OLDER, IDENTITY, "0xfedcba0987654321", 0, 1, -1, 1.5, True, 10**15, 10**15 + 1, "1"]),
    ),
)
def test_accepted_request_makes_complete_plan(task_type: str, wallet: str | None, parameters: dict[str, Any]) -> None:
    try:
        resolved = request(task_type, wallet, **parameters).resolved("mock")
    except InvalidInputError:
        return
    action = planning.action_type(task_type)
    policy = Policy(policy_id="p", version=1, rules={action: Rule(
        allowed=True, requires_approval=False, risk_level="low")})  # fmt: skip
    plan = planning.build_plan(
        plan_id="plan_1", task_id=None, created_at="now", task_type=task_type, description="x", parameters=resolved,
        analysis=planning.analyze(task_type, policy), policy=policy.decide(action),
    )  # fmt: skip
    for step in plan.steps:
        if step.type in {"check_balance", "monitor_action"}:
            assert isinstance(step.parameters["wallet_address"], str)
        if step.type == "onchain_action":
            assert type(step.parameters["amount"]) is int and 1 <= step.parameters["amount"] <= 10**15
            assert not is_same_wallet(step.parameters["from_address"], step.parameters["to_address"])
