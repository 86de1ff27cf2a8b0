"""Any JSON as a proposal: it is accepted, or refused with an error that names a field. Nothing else happens."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from qaes.domain.errors import InvalidInputError
from qaes.domain.policy import ActionRequest, Policy, PolicyDocumentV2, evaluate, policy_of
from qaes.domain.policy.proposing import check_actions
from tests.support.policies import CONTENT, policy

SCALARS = (
    st.none() | st.booleans() | st.integers(-5, 5) | st.sampled_from([2**53, 10**15, 1.5, 1.0, "", "a", "/a", "deny"])
    | st.sampled_from(["finance", "user:a", "group:x", "https://example.com", "#/$defs/a", "^a$", "object", "string"])
)  # fmt: skip
KEYS = st.sampled_from(["type", "properties", "$defs", "$ref", "items", "anyOf", "approvals", "max_amount", "a b", "x"])
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3), max_leaves=6
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every value inside a value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from places(each, (*path, key))


PLACES = list(places(CONTENT))


@settings(max_examples=400)
@given(changes=st.lists(st.tuples(st.sampled_from(PLACES), JSON), min_size=1, max_size=2), name=KEYS, extra=JSON)
def test_changed_proposal_is_accepted_or_names_a_field(changes: list[tuple[Any, Any]], name: str, extra: Any) -> None:
    content = copy.deepcopy(CONTENT)
    for path, value in changes:
        at: Any = content
        with suppress(KeyError, IndexError, TypeError):  # the change before has removed the place
            for part in path[:-1]:
                at = at[part]
            at[path[-1]] = value
            if isinstance(at, dict) and len(changes) > 1:
                at[name] = extra
    try:
        document = PolicyDocumentV2.write(content, version=2)
        check_actions(document)
    except InvalidInputError as error:
        named = bool(error.field and error.message)
    else:
        named = policy_of(document.text()).rules == document.rules
    assert named


@settings(max_examples=300)
@given(parameters=st.dictionaries(st.sampled_from(["order_id", "amount", "wallet_address"]), JSON), requester=st.text())
def test_evaluate_decides_on_any_parameters(parameters: dict[str, Any], requester: str) -> None:
    rule = {
        "allowed": True, "risk_level": "low", "tiers": [{"approvals": 0}],
        "limits": [{"window_seconds": 60, "max_count": 5, "per": "source", "over": "deny"}],
    }  # fmt: skip
    for of in (policy(), policy(CONTENT | {"rules": CONTENT["rules"] | {"transfer_funds": rule, "transaction": rule}})):
        for action in ("refund_customer", "transfer_funds", "transaction", "monitor_wallet", "x"):
            decision = evaluate(of, ActionRequest(action, parameters, requester))
            assert decision.reason
            assert decision.allowed == (decision.code == "allowed") == (decision.tier is not None)


@settings(max_examples=200)
@given(value=JSON)
def test_policy_of_any_text_raises_only_value_errors(value: Any) -> None:
    for each in (value, {"format": 2, "rules": value, "version": 1}, {"format": 1, "rules": value, "version": 1}):
        with suppress(ValueError):
            assert isinstance(policy_of(json.dumps(each)), Policy)
