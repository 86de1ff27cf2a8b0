from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaes.domain import planning
from qaes.domain.errors import InvalidInputError
from qaes.domain.models import Analysis, Plan
from qaes.domain.policy import DEFAULT_RULES, PolicyDocument, policy_of
from qaes.domain.qubic.identity import encode_identity

POLICY = policy_of(PolicyDocument.write(DEFAULT_RULES, version=1).text())
"""The first policy of every ledger."""
TRANSFER = {"wallet_address": "0x1234567890abcdef", "to_address": "0xfedcba0987654321", "amount": 5}


def plan(task_type: str, parameters: dict[str, Any], task_id: str | None = "task_1") -> Plan:
    analysis = planning.analyze(task_type, POLICY)
    return planning.build_plan(
        plan_id="plan_1",
        task_id=task_id,
        created_at="2026-11-23T12:00:00.000Z",
        task_type=task_type,
        description="a test",
        parameters=parameters,
        analysis=analysis,
        policy=POLICY.decide(analysis.action_type),
    )


@pytest.mark.parametrize(
    ("task_type", "parameters", "types", "approvals"),
    [
        (
            "monitor_wallet",
            {"wallet_address": "0x12"},
            ["check_balance", "policy_check", "monitor_action"],
            [False] * 3,
        ),
        ("transfer_funds", TRANSFER, ["check_balance", "policy_check", "onchain_action"], [False, False, True]),
        ("transaction", {}, ["policy_check", "generic_action"], [False, True]),
    ],
)
def test_steps_of_each_kind_of_task(
    task_type: str, parameters: dict[str, Any], types: list[str], approvals: list[bool]
) -> None:
    steps = plan(task_type, parameters).steps
    assert [step.type for step in steps] == types
    assert [step.requires_approval for step in steps] == approvals
    assert [step.step_id for step in steps] == [f"step_{n}" for n in range(1, len(steps) + 1)]


@pytest.mark.parametrize("missing", ["wallet_address", "to_address", "amount"])
def test_transfer_without_a_parameter_names_it(missing: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        plan("transfer_funds", {name: value for name, value in TRANSFER.items() if name != missing})
    assert caught.value.field == f"parameters.{missing}"


@pytest.mark.parametrize("number", [0, 1])
def test_build_plan_refuses_a_contract_as_the_source(number: int) -> None:
    address = encode_identity(number.to_bytes(8, "little") + bytes(24))
    with pytest.raises(InvalidInputError) as caught:
        plan("transfer_funds", TRANSFER | {"wallet_address": address})
    assert caught.value.field == "parameters.wallet_address"
    assert plan("transaction", TRANSFER | {"wallet_address": address}).steps  # it moves nothing
    assert plan("transfer_funds", TRANSFER | {"to_address": address}).steps  # the policy decides before the step


@given(st.text(min_size=1).filter(lambda word: word not in {*POLICY.rules, "monitor_wallet"}))
def test_action_type_without_a_rule_is_denied(word: str) -> None:
    decision = POLICY.decide(planning.analyze(word, POLICY).action_type)
    assert not decision.allowed and decision.requires_approval and decision.risk_level == "high"


def test_monitoring_has_the_policys_risk() -> None:
    assert planning.analyze("monitor_wallet", POLICY) == Analysis(action_type="monitoring", risk_level="low")


def _changed(**changes: Any) -> Plan:
    return plan("transfer_funds", TRANSFER).model_copy(update=changes)


@pytest.mark.parametrize(
    ("bad", "field"),
    [
        (_changed(task_id="task_2"), "plan.task_id"),
        (_changed(steps=()), "plan.steps"),
        (_changed(steps=plan("transfer_funds", TRANSFER).steps * 20), "plan.steps"),
        (_changed(steps=plan("transfer_funds", TRANSFER).steps[:1] * 2), "plan.steps"),
        (_changed(policy=POLICY.decide("unknown")), "plan.policy"),
        (
            _changed(
                steps=tuple(
                    step.model_copy(update={"requires_approval": False})
                    for step in plan("transfer_funds", TRANSFER).steps
                )
            ),
            "plan.steps.2",
        ),
        (
            plan("monitor_wallet", {}).model_copy(
                update={
                    "steps": tuple(
                        step.model_copy(update={"requires_approval": False})
                        for step in plan("transfer_funds", TRANSFER).steps
                    )
                }
            ),
            "plan.steps.2",
        ),
    ],
)
def test_invalid_plan_rejected_with_field(bad: Plan, field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        planning.check_plan(bad, "task_1")
    assert caught.value.field == field


def test_good_plan_passes() -> None:
    planning.check_plan(plan("transfer_funds", TRANSFER), "task_1")


@given(st.integers(min_value=1, max_value=10**15))
def test_plans_hash_depends_on_every_amount(amount: int) -> None:
    one = plan("transfer_funds", TRANSFER | {"amount": amount})
    other = plan("transfer_funds", TRANSFER | {"amount": amount + 1})
    assert one.hash() != other.hash() and one.steps[2].hash() != other.steps[2].hash()
    assert Plan.model_validate_json(one.model_dump_json()).hash() == one.hash()
