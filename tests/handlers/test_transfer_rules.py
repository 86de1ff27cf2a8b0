"""A transfer is judged by its effect: no caller can name another action to have it judged by another rule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest

from qaes.adapters.ledger_client import LedgerClient
from qaes.domain.errors import PermanentError
from qaes.domain.policy import DEFAULT_RULES, Policy, Rule
from qubic import wiring
from qubic.network.mock import MockChain
from qubic.spending import rule_for
from qubic.wallets import DEMO_BALANCES, demo_key, genesis
from tests.support.cloud import PARAMETERS, Cloud, cloud
from tests.support.cloud import _environment as function_environment
from tests.support.template import environment

RICH, POOR, EMPTY = DEMO_BALANCES
ALLOWED = Rule(allowed=True, requires_approval=False, risk_level="low")
FORBIDDEN = Rule(allowed=False, requires_approval=True, risk_level="high")
TERMS = {"reference": "task#step_3", "source": RICH, "destination": EMPTY, "amount": 10}
CLAIMS = ["monitoring", "transaction", "pay_invoice", "transfer_funds", "", None, 7]
Enforce = Callable[..., None]


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def enforce(aws: Cloud) -> Enforce:
    """Put a policy in force in which every action but a transfer is allowed, without limits."""

    def put(settle: bool = True, **transfer: Any) -> None:
        rules = DEFAULT_RULES | {"transaction": ALLOWED, "monitoring": ALLOWED, "pay_invoice": ALLOWED}
        rule = FORBIDDEN.model_copy(update=transfer)
        with function_environment(environment("LedgerFunction", PARAMETERS)):
            store = wiring.policies()
            proposed = store.propose(rules | {"transfer_funds": rule}, subject="olivia")
            store.approve(proposed.version, subject="oscar", four_eyes=True)
        if settle:
            aws.settle()

    return put


def code(answer: dict[str, Any]) -> str:
    assert answer["ok"] is False, answer
    return str(answer["error"]["code"])


def signed() -> list[dict[str, Any]]:
    """Return the signatures and counts of the transfer."""
    items = boto3.client("dynamodb").scan(TableName="LedgerTable")["Items"]
    attempts = [item for item in items if item["pk"]["S"].startswith("SUBMISSION#mock#transfer") and "txid" in item]
    return [item for item in attempts if item["txid"]["S"]] + [item for item in items if item["sk"]["S"] == "LIMIT"]


@pytest.mark.parametrize("claim", CLAIMS)
def test_ledger_refuses_forbidden_transfer_by_any_name(aws: Cloud, enforce: Enforce, claim: object) -> None:
    enforce()
    sent = {"operation": "transfer", **TERMS, "run": 1, "action_type": claim}
    assert code(aws.invoke("LedgerTransferFunction", sent)) == "not_allowed"
    assert signed() == []


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"max_amount": 9}, "over_max_amount"),
        ({"daily_limit": 9}, "daily_limit_exceeded"),
        ({"allowed_addresses": (POOR,)}, "address_not_allowed"),
    ],
)
@pytest.mark.parametrize("claim", ["monitoring", "transaction"])
def test_ledger_applies_transfer_limits_by_any_name(
    aws: Cloud, enforce: Enforce, rule: dict[str, Any], expected: str, claim: str
) -> None:
    enforce(allowed=True, **rule)
    sent = {"operation": "transfer", **TERMS, "run": 1, "action_type": claim}
    assert code(aws.invoke("LedgerTransferFunction", sent)) == expected
    assert signed() == []


@pytest.mark.parametrize("claim", ["monitoring", "transfer_funds"])
def test_ledger_does_not_simulate_forbidden_transfer(
    aws: Cloud, enforce: Enforce, monkeypatch: pytest.MonkeyPatch, claim: str
) -> None:
    enforce()
    monkeypatch.setattr(
        "qubic.wiring.chain",
        lambda: MockChain(genesis=genesis(), table="ChainTable", clock=aws.clock, tick_milliseconds=1000),
    )
    monkeypatch.setattr("qubic.operations.submissions", lambda: _without_transfers(wiring.submissions()))
    sent = {"operation": "transfer", **TERMS, "run": 1, "action_type": claim}
    assert code(aws.invoke("LedgerTransferFunction", sent)) == "not_allowed"


def _without_transfers(submissions: Any) -> Any:
    submissions.sends_transfers = False
    return submissions


def test_ledger_never_sends_waiting_transfer_once_forbidden(aws: Cloud, enforce: Enforce) -> None:
    """The queue holds eight signed transfers. A policy that forbids them comes into force while they wait."""
    for number in range(8):
        sent = {"operation": "transfer", **TERMS, "reference": f"task_{number}#step_3", "run": 1}
        assert aws.invoke("LedgerTransferFunction", sent)["ok"]
    enforce()
    states = [_state(aws, f"task_{number}#step_3") for number in range(8)]
    sent_before = [each for each in states if each["state"] == "confirmed"]
    refused = [each for each in states if each["state"] == "expired"]
    assert len(sent_before) + len(refused) == 8
    assert 1 <= len(sent_before) <= 4
    assert all("does not allow transfer_funds; nothing was moved" in each["error"] for each in refused)
    balance = aws.invoke("LedgerFunction", {"operation": "balance", "address": EMPTY})["result"]["balance"]
    assert balance == 10 * len(sent_before)


def _state(aws: Cloud, reference: str) -> dict[str, Any]:
    answer = aws.invoke("LedgerFunction", {"operation": "transfer_state", "reference": reference})
    return dict(answer["result"])


def test_ledger_confirms_transfers_sent_before(aws: Cloud, enforce: Enforce) -> None:
    """A sent transfer cannot be recalled: its real end is reported."""
    aws.invoke("LedgerTransferFunction", {"operation": "transfer", **TERMS, "run": 1})
    assert _state(aws, "task#step_3")["state"] == "broadcast"
    enforce()
    assert _state(aws, "task#step_3")["state"] == "confirmed"


def test_rule_of_transaction_does_not_judge_transfers() -> None:
    rules = {"transfer_funds": ALLOWED, "transaction": FORBIDDEN}
    policy = Policy(policy_id="policy-v7-0123456789ab", version=7, rules=rules)
    rule = rule_for(policy, source=RICH, destination=EMPTY, amount=10)
    assert rule.action == "transfer_funds"


def test_transaction_with_input_type_has_no_rule() -> None:
    policy = Policy(policy_id="policy-v7-0123456789ab", version=7, rules={"transfer_funds": ALLOWED})
    with pytest.raises(PermanentError) as caught:
        rule_for(policy, source=RICH, destination=EMPTY, amount=10, input_type=1)
    assert caught.value.code == "not_allowed"


def test_client_has_no_way_to_name_an_action(aws: Cloud, enforce: Enforce) -> None:
    enforce()
    with pytest.raises(PermanentError) as caught:
        LedgerClient("LedgerTransferFunction").transfer(**TERMS, requester="alice")  # type: ignore[arg-type]
    assert caught.value.code == "not_allowed"


def test_ledger_judges_the_wallet_that_the_signed_bytes_pay(aws: Cloud, enforce: Enforce) -> None:
    """A role that can write the table cannot pay another wallet in the name of an allowed address."""
    enforce(allowed=True, allowed_addresses=(EMPTY,))
    for number in range(2):
        sent = {"operation": "transfer", **TERMS, "reference": f"task_{number}#step_3", "run": 1}
        assert aws.invoke("LedgerTransferFunction", sent)["ok"]
    key = {"pk": {"S": "SUBMISSION#mock#transfer:task_1#step_3"}, "sk": {"S": "SUBMISSION"}}
    boto3.client("dynamodb").update_item(
        TableName="LedgerTable",
        Key=key,
        UpdateExpression="SET destination = :other",
        ExpressionAttributeValues={":other": {"S": demo_key(POOR).identity}},
    )
    aws.settle()
    assert _state(aws, "task_0#step_3")["state"] == "confirmed"
    assert "not among allowed_addresses" in _state(aws, "task_1#step_3")["error"]
