"""Rules with limits, and the hashed document, which an offline verifier reads."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from qaes.domain.canonical import sha256_hex
from qaes.domain.errors import InvalidInputError
from qaes.domain.models import Step
from qaes.domain.policy import (
    DEFAULT_RULES,
    DENIED,
    ActionRequest,
    Policy,
    PolicyDecision,
    PolicyDocument,
    Rule,
    evaluate,
    policy_id_of,
    policy_of,
    version_of,
)
from qaes.domain.qubic import MAX_QU
from qaes.domain.qubic.identity import encode_identity

RULE: dict[str, Any] = {"allowed": True, "requires_approval": True, "risk_level": "high"}
IDENTITY = encode_identity(bytes(range(32)))
HEX = "0123456789abcdef" * 4
OTHER_ID = f"policy-v1-{HEX}"
LEGACY = "0x1234567890abcdef"
MISTYPED = IDENTITY[:-1] + ("A" if IDENTITY[-1] != "A" else "B")


def fields(error: ValidationError) -> set[str]:
    return {".".join(str(part) for part in each["loc"]) for each in error.errors()}


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"max_amount": 0}, "max_amount"),
        ({"max_amount": -5}, "max_amount"),
        ({"max_amount": 10**15 + 1}, "max_amount"),
        ({"max_amount": 1.0}, "max_amount"),
        ({"max_amount": True}, "max_amount"),
        ({"max_amount": "5"}, "max_amount"),
        ({"daily_limit": 0}, "daily_limit"),
        ({"daily_limit": 10**15 + 1}, "daily_limit"),
        ({"max_amount": 6, "daily_limit": 5}, "daily_limit"),
        ({"allowed_addresses": []}, "allowed_addresses"),
        ({"allowed_addresses": LEGACY}, "allowed_addresses"),
        ({"allowed_addresses": [LEGACY, "0x12"]}, "allowed_addresses.1"),
        ({"allowed_addresses": [MISTYPED]}, "allowed_addresses.0"),
        ({"allowed_addresses": [5]}, "allowed_addresses.0"),
        ({"allowed_addresses": [LEGACY, LEGACY.upper().replace("X", "x")]}, "allowed_addresses"),
        ({"allowed_addresses": [encode_identity(bytes([n] * 32)) for n in range(101)]}, "allowed_addresses"),
        ({"allowed": "yes"}, "allowed"),
        ({"requires_approval": 0}, "requires_approval"),
        ({"approvals": True}, "approvals"),
        ({"approvals": 11}, "approvals"),
        ({"more": 1}, "more"),
    ],
)
def test_rule_that_makes_no_sense_names_its_field(changes: dict[str, Any], field: str) -> None:
    with pytest.raises(ValidationError) as caught:
        Rule.model_validate(RULE | changes)
    assert field in fields(caught.value)


def test_addresses_are_kept_in_their_one_spelling() -> None:
    rule = Rule.model_validate(RULE | {"allowed_addresses": ["0XABCDEFabcdef1234", IDENTITY]})
    assert rule.allowed_addresses == ("0xabcdefabcdef1234", IDENTITY)


def test_limits_may_be_equal_and_as_large_as_the_supply() -> None:
    assert Rule.model_validate(RULE | {"max_amount": MAX_QU, "daily_limit": MAX_QU}).daily_limit == MAX_QU


def test_decision_pins_every_field_of_the_rule() -> None:
    rule = Rule(**RULE, max_amount=5, daily_limit=9, allowed_addresses=(IDENTITY,), approvals=2, expires_after=60)
    decision = Policy(policy_id="p", version=1, rules={"transfer_funds": rule}).decide("transfer_funds")
    assert decision.rule == rule
    assert decision.limits_transfers
    # As it goes through the state machine and back.
    assert PolicyDecision.model_validate(json.loads(decision.model_dump_json())) == decision


def test_action_type_without_a_rule_is_denied() -> None:
    decision = Policy(policy_id="p", version=1, rules=DEFAULT_RULES).decide("burn")
    assert (decision.allowed, decision.rule) == (False, DENIED)
    assert not decision.limits_transfers


@pytest.mark.parametrize("limit", ["max_amount", "daily_limit", "allowed_addresses"])
def test_each_limit_counts_as_one(limit: str) -> None:
    value = (LEGACY,) if limit == "allowed_addresses" else 5
    rules = {"transfer_funds": Rule(**RULE, **{limit: value})}
    assert Policy(policy_id="p", version=1, rules=rules).decide("transfer_funds").limits_transfers


def test_text_of_a_document_to_the_letter() -> None:
    """The example of docs/policy.md. A change of this text changes every policy's id: it needs another `format`."""
    rule = Rule(allowed=True, requires_approval=True, risk_level="high", max_amount=500, allowed_addresses=(LEGACY,))
    document = PolicyDocument.write({"transfer_funds": rule}, version=2, proposed_by="olivia", based_on=OTHER_ID)
    assert document.text() == (
        f'{{"based_on":"{OTHER_ID}","format":1,"proposed_by":"olivia","rules":{{"transfer_funds":'
        '{"allowed":true,"allowed_addresses":["0x1234567890abcdef"],"approvals":1,"daily_limit":null,'
        '"expires_after":null,"max_amount":500,"requires_approval":true,"risk_level":"high"}},"version":2}'
    )


def test_default_policy_is_the_same_everywhere() -> None:
    text = PolicyDocument.write(DEFAULT_RULES, version=1).text()
    assert policy_of(text).policy_id == policy_id_of(1, hashlib.sha256(text.encode()).hexdigest())
    assert policy_of(text) == policy_of(PolicyDocument.write(dict(reversed(DEFAULT_RULES.items())), version=1).text())


RULES = st.builds(
    Rule,
    allowed=st.booleans(),
    requires_approval=st.booleans(),
    risk_level=st.sampled_from(["low", "medium", "high"]),
    approvals=st.integers(1, 10),
    expires_after=st.none() | st.integers(1, 2_592_000),
    max_amount=st.none() | st.integers(1, 500),
    daily_limit=st.none() | st.integers(500, MAX_QU),
    allowed_addresses=st.none() | st.lists(st.sampled_from([IDENTITY, LEGACY]), min_size=1, unique=True).map(tuple),
)


@given(
    rules=st.dictionaries(st.from_regex(r"[A-Za-z0-9_.-]{1,64}", fullmatch=True), RULES, max_size=5),
    version=st.integers(1, 10**9 - 1),
)
def test_a_document_is_read_as_it_was_written(rules: dict[str, Rule], version: int) -> None:
    document = PolicyDocument.write(rules, version=version, proposed_by="olivia")
    assert PolicyDocument.read(document.text()) == document
    policy = policy_of(document.text())
    assert policy.rules == rules
    assert policy.policy_id == policy_id_of(version, sha256_hex(document.text()))
    assert version_of(policy.policy_id) == version
    # The steps of a verifier, with the standard library.
    read = json.loads(document.text())
    assert json.dumps(read, sort_keys=True, separators=(",", ":"), ensure_ascii=False) == document.text()


def test_hash_is_of_the_whole_document() -> None:
    rules = {"monitoring": DEFAULT_RULES["monitoring"]}
    texts = {
        PolicyDocument.write(rules, version=2).text(),
        PolicyDocument.write(rules, version=3).text(),
        PolicyDocument.write(rules, version=2, proposed_by="olivia").text(),
        PolicyDocument.write(rules, version=2, based_on=OTHER_ID).text(),
        PolicyDocument.write(DEFAULT_RULES, version=2).text(),
    }
    assert len({sha256_hex(text) for text in texts}) == 5


def test_older_text_keeps_its_hash() -> None:
    """Fields that a rule has by now are absent in it: they count as null, and the hash is that of the text."""
    rule = '{"allowed":true,"approvals":1,"requires_approval":false,"risk_level":"low"}'
    text = f'{{"format":1,"rules":{{"monitoring":{rule}}},"version":7}}'
    policy = policy_of(text)
    assert policy.policy_id == policy_id_of(7, hashlib.sha256(text.encode()).hexdigest())
    assert policy.rules["monitoring"].max_amount is None


@pytest.mark.parametrize(
    "rules",
    [
        {f"action_{number}": DENIED for number in range(201)},
        {"": DENIED},
        {"a b": DENIED},
        {"x" * 65: DENIED},
        {"pay\n": DENIED},
    ],
)
def test_rules_that_are_not_acceptable(rules: dict[str, Rule]) -> None:
    with pytest.raises(InvalidInputError) as caught:
        PolicyDocument.write(rules, version=2)
    assert caught.value.field == "rules"


def test_document_larger_than_64_kib_is_refused() -> None:
    addresses = tuple(encode_identity(bytes([n] * 32)) for n in range(1, 101))
    rule = Rule(**RULE, allowed_addresses=addresses)
    assert PolicyDocument.write({f"action_{n}": rule for n in range(10)}, version=2)
    with pytest.raises(InvalidInputError) as caught:
        PolicyDocument.write({f"action_{n}": rule for n in range(11)}, version=2)
    assert (caught.value.field, "65536" in caught.value.message) == ("rules", True)


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[]", '{"format":2,"rules":{},"version":1}', '{"format":1,"rules":{},"version":0}',
     '{"format":1,"rules":{},"version":1,"more":1}', '{"format":1,"rules":{"x":{}},"version":1}'],
)  # fmt: skip
def test_malformed_document_is_not_read(text: str) -> None:
    with pytest.raises(ValueError, match="PolicyDocument"):
        policy_of(text)


@pytest.mark.parametrize(
    "text", ["", f"policy-v0-{HEX}", f"policy-v1-{HEX[1:]}", f"policy-v1-{HEX[1:]}B", "policy-v1-0123456789ab", "v1"]
)
def test_malformed_policy_id_is_refused(text: str) -> None:
    assert version_of(text) is None


# docs/policy.md

GUIDE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text()


def test_document_in_the_guide_is_one() -> None:
    [text] = re.findall(r"```json\n(.*)\n```", GUIDE)
    assert PolicyDocument.read(text).text() == text


@given(rules=st.dictionaries(st.sampled_from(["transfer_funds", "monitoring"]), RULES), amount=st.integers(1, 600))
def test_verifier_in_the_guide_decides_as_the_policy_does(rules: dict[str, Rule], amount: int) -> None:
    [program] = re.findall(r"```python\n(.*?)\n```", GUIDE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(program, names)  # noqa: S102 (our own)
    text = PolicyDocument.write(rules, version=3, proposed_by="olivia").text()
    policy = policy_of(text)
    step = Step(
        step_id="step_1", type="onchain_action", requires_approval=True,
        parameters={"from_address": LEGACY, "to_address": LEGACY, "amount": amount},
    )  # fmt: skip
    decision = policy.decide("transfer_funds")
    request = ActionRequest(
        "transfer_funds", {"wallet_address": LEGACY, "to_address": LEGACY, "amount": amount}, "alice"
    )
    allowed = evaluate(policy, request).allowed
    approvals = decision.approvals if allowed and decision.requires_approval else 0
    found = names["decide"](text, policy.policy_id, "transfer_funds", step.model_dump(mode="json"))
    assert found == (allowed, approvals)
    with pytest.raises(AssertionError):
        names["decide"](text, "policy-v3-000000000000", "transfer_funds")
