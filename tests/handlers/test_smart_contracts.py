"""Transfers to a smart contract or the zero address: only by a rule of format 2 that has `smart_contracts`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gateway import known_policy
from qaes.domain.errors import InvalidInputError
from qaes.domain.policy import Policy
from qaes.domain.qubic.identity import encode_identity
from tests.handlers.test_spending import RICH, Ledger
from tests.handlers.test_spending import policy as of_format_1
from tests.support.api import ALICE, Answer, Api, named, set_environment
from tests.support.cloud import Cloud, cloud
from tests.support.policies import of_limits
from tests.support.publishing import publish

ZERO, CONTRACT = (encode_identity(bytes([number]) + bytes(31)) for number in (0, 4))
SHORT = "0x0000000000000004"
"""The contract's address in the older clients' form."""
RULE = {"allowed": True, "risk_level": "high", "tiers": [{"max_amount": None, "approvals": 0}]}


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    for function in ("LedgerFunction", "QubicApiFunction", "PlannerApiFunction", "GatewayFunction"):
        set_environment(function, monkeypatch)
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def ledger(aws: Cloud) -> Ledger:
    return Ledger(aws)


def allowing(**members: Any) -> Policy:
    return of_limits("transfer_funds", smart_contracts=True, **members)


@pytest.mark.parametrize("address", [ZERO, CONTRACT, SHORT])
@pytest.mark.parametrize("policy", [of_format_1(), of_limits("transfer_funds")], ids=["format 1", "format 2"])
def test_ledger_refuses_a_contract_without_the_rule(ledger: Ledger, policy: Policy, address: str) -> None:
    ledger.policy = policy
    assert ledger.refusal("a", 5, to=address) == "invalid_address"


@pytest.mark.parametrize("address", [ZERO, CONTRACT])
def test_ledger_pays_a_contract_by_the_rule(ledger: Ledger, address: str) -> None:
    ledger.policy = allowing()
    sent = ledger.transfer("a", 5, to=address)
    assert (sent.destination, sent.amount, sent.input_type) == (address, 5, 0)
    ledger.settle()
    assert ledger.state("a").state == "confirmed"


def test_ledger_never_takes_a_contract_as_source(ledger: Ledger) -> None:
    ledger.policy = allowing()
    for source in (CONTRACT, ZERO):
        with pytest.raises(InvalidInputError, match=r"^source is the (zero )?address"):
            ledger.transfer("a", 5, source=source, to=RICH)


def test_waiting_transfer_expires_when_the_rule_changes(ledger: Ledger) -> None:
    ledger.policy = allowing()
    ledger.transfer("a", 5)
    ledger.transfer("b", 5, to=CONTRACT)
    ledger.policy = of_limits("transfer_funds")
    ledger.settle()
    assert (ledger.state("a").state, ledger.state("b").state) == ("confirmed", "expired")


def test_contract_must_be_among_the_destinations(ledger: Ledger) -> None:
    ledger.policy = allowing(destinations=[CONTRACT])
    assert ledger.refusal("a", 5, to=ZERO) == "destination_not_allowed"
    ledger.transfer("b", 5, to=CONTRACT)


# The APIs


def send(api: Api, path: str, to: str, source: str = RICH, **caller: Any) -> Answer:
    body = {"description": "to a contract", "task_type": "transfer_funds", "wallet_address": source}
    return api("POST", path, body | {"parameters": {"to_address": to, "amount": 5}}, **caller)


def explain(api: Api, to: str) -> Answer:
    parameters = {"wallet_address": RICH, "to_address": to, "amount": 5}
    return api("POST", "/policy/decide", {"action": "transfer_funds", "parameters": parameters}, **ALICE)


@pytest.mark.parametrize("to", [ZERO, CONTRACT, SHORT, "0x" + "0" * 40])
@pytest.mark.parametrize("contracts", [None, False, True])
def test_apis_take_a_contract_by_the_rule(aws: Cloud, contracts: bool | None, to: str) -> None:
    if contracts is not None:
        publish(aws, {"transfer_funds": RULE | {"smart_contracts": contracts}})
    known_policy.forget()
    gateway, planner = Api(aws, "GatewayFunction"), Api(aws, "PlannerApiFunction")
    answers = {
        202: send(gateway, "/task/start", to, **ALICE),
        200: send(planner, "/plan/create", to, **ALICE),
    }
    explained = explain(planner, to)
    if not contracts:
        for refused in (*answers.values(), explained):
            assert (refused.status, named(refused)) == (422, {"parameters.to_address"})
        return
    assert [answer.status for answer in answers.values()] == [*answers]
    assert answers[200].body["verdict"]["verdict"] == explained.body["decision"] == "execute"


def test_apis_never_take_a_contract_as_source(aws: Cloud) -> None:
    publish(aws, {"transfer_funds": RULE | {"smart_contracts": True}})
    known_policy.forget()
    for function, path in (("GatewayFunction", "/task/start"), ("PlannerApiFunction", "/plan/create")):
        refused = send(Api(aws, function), path, RICH, CONTRACT, **ALICE)
        assert (refused.status, named(refused)) == (422, {"parameters.wallet_address"})


def test_start_repeats_its_answer_when_the_rule_changes(aws: Cloud) -> None:
    api, key = Api(aws, "GatewayFunction"), {"headers": {"Idempotency-Key": "dividend-1"}}
    publish(aws, {"transfer_funds": RULE | {"smart_contracts": True}})
    known_policy.forget()
    first = send(api, "/task/start", CONTRACT, **ALICE, **key)
    publish(aws, {"transfer_funds": RULE})
    known_policy.forget()
    again = send(api, "/task/start", CONTRACT, **ALICE, **key)
    assert (again.status, again.body["task_id"]) == (202, first.body["task_id"])
