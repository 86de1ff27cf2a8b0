"""The JSON Schemas of operators' actions: the subset, the pointers, and the values that they admit."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any

import pytest

from qaes.domain.errors import InvalidInputError
from qaes.domain.policy import PolicyDocumentV2
from qaes.domain.policy.proposing import check_actions
from qaes.domain.policy.schemas import check_parameters, check_schema, check_value, is_anchored
from tests.support.policies import CONTENT, REFUND, changed, document, policy, with_rule

DIALECT = "https://json-schema.org/draft/2020-12/schema"
PARAMETERS = "actions.refund_customer.parameters"


def refused(content: dict[str, Any]) -> InvalidInputError:
    """Return the error of a proposal."""
    with pytest.raises(InvalidInputError) as caught:
        check_actions(PolicyDocumentV2.write(content, version=7))
    return caught.value


def accept(schema: dict[str, Any]) -> None:
    check_schema(schema, "schema", closed=True)


def closed(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "additionalProperties": False, "properties": properties}


TEXT = {"type": "string"}


def test_schemas_of_the_example_are_accepted() -> None:
    check_actions(document())


@pytest.mark.parametrize(
    "schema",
    [
        closed(a={"$ref": "#/$defs/text"}) | {"$defs": {"text": TEXT}, "$schema": DIALECT},
        closed(a={"anyOf": [TEXT, {"type": "null"}]}, b={"type": ["integer", "null"]}),
        closed(a={"type": "array", "items": TEXT, "maxItems": 5, "uniqueItems": True}),
        closed(a={"type": "array", "items": False, "prefixItems": [TEXT]}),
        closed(a={"enum": ["x", 1, None]}, b={"const": True}),
        closed(a=TEXT | {"format": "email", "description": "only a note", "default": "x", "examples": ["y"]}),
        closed(a=closed(b=closed(c={"type": "boolean"}))),
    ],
    ids=["reference", "choice", "array", "tuple", "values", "notes", "nested"],
)
def test_schema_inside_the_subset_is_accepted(schema: dict[str, Any]) -> None:
    accept(schema)


@pytest.mark.parametrize(
    ("schema", "field"),
    [
        ({"type": "object", "properties": {}}, "additionalProperties"),
        (closed(a={"type": "object"}), "properties.a.additionalProperties"),
        (closed(a={}), "properties.a"),
        (closed(a=True), "properties.a"),
        (closed(a={"description": "anything"}), "properties.a"),
        (closed(a={"type": "array"}), "properties.a.items"),
        (closed(a={"type": "array", "items": True}), "properties.a.items"),
        (closed(a={"properties": {}, "enum": [{}]}), "properties.a.type"),
        (closed() | {"required": ["b"]}, "required.0"),
        (closed(a={"type": "strin"}), "properties.a.type"),
        (closed(a={"type": 5}), "properties.a.type"),
        (closed(a=TEXT | {"minLength": -1}), "properties.a.minLength"),
        (closed() | {"required": 5}, "required"),
        (closed() | {"properties": [TEXT]}, "properties"),
        (closed(a={"anyOf": TEXT}), "properties.a.anyOf"),
        (closed(a={"anyOf": []}), "properties.a.anyOf"),
        (closed(a={"not": TEXT}), "properties.a.not"),
        (closed(a={"if": TEXT}), "properties.a.if"),
        (closed() | {"patternProperties": {"^a": TEXT}}, "patternProperties"),
        (closed() | {"unevaluatedProperties": False}, "unevaluatedProperties"),
        (closed() | {"$id": "https://example.com/x"}, "$id"),
        (closed() | {"$schema": "http://json-schema.org/draft-07/schema#"}, "$schema"),
        (closed(a={"$ref": "https://example.com/x"}), "properties.a.$ref"),
        (closed(a={"$ref": "#"}), "properties.a.$ref"),
        (closed(a={"$ref": "#/properties/a"}), "properties.a.$ref"),
        (closed(a={"$ref": "#/$defs/none"}), "properties.a.$ref"),
        (closed(a={"$ref": "#/$defs/a"}) | {"$defs": {"a": {"$ref": "#/$defs/a"}}}, "$defs.a.$ref"),
        (closed(a=TEXT | {"pattern": "(?=a)b"}), "properties.a.pattern"),
        (closed(a=TEXT | {"pattern": "(a)\\1"}), "properties.a.pattern"),
        (closed(a=TEXT | {"pattern": "["}), "properties.a.pattern"),
        (closed(a=TEXT | {"pattern": "(\\w{500}){500}"}), "properties.a.pattern"),
        (closed(**{f"p{n}": TEXT | {"pattern": "a"} for n in range(51)}), None),
        (closed(a=TEXT | {"description": "x" * 16384}), None),
    ],
)  # fmt: skip
def test_schema_outside_the_subset_names_its_place(schema: dict[str, Any], field: str | None) -> None:
    with pytest.raises(InvalidInputError) as caught:
        accept(schema)
    assert caught.value.field == ("schema" if field is None else f"schema.{field}")


def test_schema_that_grows_by_references_is_refused() -> None:
    """Twenty definitions, each with two references to the next: a million checks of one value."""
    names = [f"d{number}" for number in range(20)]
    definitions: dict[str, Any] = {
        name: {"anyOf": [{"$ref": f"#/$defs/{after}"}] * 2} for name, after in pairwise(names)
    }
    definitions[names[-1]] = TEXT
    with pytest.raises(InvalidInputError, match="more than 1000 parts"):
        accept(closed(a={"$ref": "#/$defs/d0"}) | {"$defs": definitions})


def test_long_chain_of_references_is_refused() -> None:
    names = [f"d{number}" for number in range(500)]
    definitions: dict[str, Any] = {name: {"$ref": f"#/$defs/{after}"} for name, after in pairwise(names)}
    definitions[names[-1]] = TEXT
    with pytest.raises(InvalidInputError, match="more than 32 references"):
        accept(closed(a={"$ref": "#/$defs/d0"}) | {"$defs": definitions})


def test_value_with_many_errors_is_refused_at_once() -> None:
    """Each of 15,000 elements fits none of 900 choices: all errors together would take gigabytes."""
    choices = {"type": "array", "items": {"anyOf": [{"const": number} for number in range(900)]}}
    schema = closed(a=choices)
    accept(schema)
    started = time.perf_counter()
    with pytest.raises(InvalidInputError):
        check_value(schema, {"a": ["x"] * 15_000}, "parameters")
    assert time.perf_counter() - started < 2


def test_pattern_takes_time_in_proportion_to_the_text() -> None:
    content = changed(CONTENT, f"{PARAMETERS}.properties.order_id.pattern", "^(a+)+$")
    check_actions(PolicyDocumentV2.write(content, version=7))
    started = time.perf_counter()
    with pytest.raises(InvalidInputError) as caught:
        check_parameters(policy(content), "refund_customer", {"order_id": "a" * 30_000 + "b", "amount": 1})
    assert caught.value.field == "parameters.order_id"
    assert time.perf_counter() - started < 2


# Pointers


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        ("amount", "/none", "amount"),
        ("amount", "/order_id", "amount"),
        ("amount", "/amount/inner", "amount"),
        ("parameters.properties.amount", {"type": "integer", "minimum": 0, "maximum": 5}, "amount"),
        ("parameters.properties.amount", {"type": "integer", "minimum": 1}, "amount"),
        ("parameters.properties.amount", {"type": "integer", "minimum": 1, "maximum": 9, "anyOf": [TEXT]}, "amount"),
        ("parameters.properties.amount", {"type": ["integer"], "minimum": 1, "maximum": 5}, "amount"),
        ("parameters.properties.amount", {"type": "number", "minimum": 1, "maximum": 5}, "amount"),
        ("parameters.required", ["order_id"], "amount"),
        ("parameters.required", ["amount"], "destination"),
        ("destination", "/amount", "destination"),
        ("parameters.properties.order_id", TEXT, "destination"),
        ("parameters.properties.order_id", TEXT | {"pattern": "[0-9]{6}"}, "destination"),
        ("parameters.properties.order_id", TEXT | {"pattern": "^a|b$"}, "destination"),
        ("sensitive", ["/order_id"], "sensitive.0"),
        ("sensitive", ["/note"], "sensitive.0"),
        ("handler.function_name", "other-function", "handler.function_name"),
    ],
)  # fmt: skip
def test_action_that_does_not_fit_its_schema_names_the_member(path: str, value: Any, field: str) -> None:
    content = changed(CONTENT, f"actions.refund_customer.{path}", value)
    assert refused(content).field == f"actions.refund_customer.{field}"


def test_pointers_lead_through_plain_objects_only() -> None:
    inner = closed(amount={"type": "integer", "minimum": 1, "maximum": 5}) | {"required": ["amount"]}
    nested = closed(order_id=TEXT | {"enum": ["a"]}, money=inner) | {"required": ["order_id", "money"]}
    content = changed(CONTENT, PARAMETERS, nested)
    content["actions"]["refund_customer"]["amount"] = "/money/amount"
    check_actions(PolicyDocumentV2.write(content, version=7))
    for wrapped in ({"anyOf": [inner]}, {"$ref": "#/$defs/money"}, {"type": "array", "items": inner}):
        nested["properties"]["money"] = wrapped
        nested["$defs"] = {"money": inner}
        assert refused(changed(content, PARAMETERS, nested)).field == "actions.refund_customer.amount"


def test_sensitive_pointer_may_lead_into_parameters_or_result() -> None:
    content = changed(CONTENT, "actions.refund_customer.sensitive", ["/note", "/refund_id"])
    content["actions"]["refund_customer"]["parameters"]["properties"]["note"] = TEXT
    check_actions(PolicyDocumentV2.write(content, version=7))


@pytest.mark.parametrize("name", ["Transfer_Funds", "transfer-funds", "MONITOR.WALLET", "Transaction"])
def test_action_that_looks_like_a_built_in_one_is_refused(name: str) -> None:
    error = refused(CONTENT | {"actions": {name: REFUND}, "rules": {name: CONTENT["rules"]["refund_customer"]}})
    assert error.field == f"actions.{name}"
    assert "looks like the built-in action" in error.message


def test_destination_of_a_rule_must_fit_the_schema() -> None:
    error = refused(with_rule(destinations=["123456", "12345"]))
    assert error.field == "rules.refund_customer.destinations.1"


@pytest.mark.parametrize(
    ("pattern", "anchored"),
    [
        ("^[0-9]{6}$", True), ("^(a|b)$", True), ("^(?:a|b)c$", True), (r"^a\|b$", True), ("^[|]$", True),
        ("^a|b$", False), ("[0-9]{6}", False), ("^a", False), ("a$", False), (r"^a\$", False), ("(?m)^a$", False),
        ("^(a$", False), ("(?:^a$)", False), ("^?a$", False), ("^*a$", False), ("^{0}a$", False), (r"^[\]]$", True),
        ("^[](]x|y[])]$", False), ("^[^](]x|y[^])]$", False), (r"^\[[(?]\]$", True),
        ("^(a)|(b)$", False), ("", False), ("^[[]|x$", False), ("^(?m:a)$", False),
    ],
)  # fmt: skip
def test_is_anchored_accepts_patterns_of_the_whole_text(pattern: str, anchored: bool) -> None:
    assert is_anchored(pattern) is anchored


# Values


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({"amount": 5}, "order_id"),
        ({"order_id": "123456", "amount": 0}, "amount"),
        ({"order_id": "123456", "amount": 1_000_001}, "amount"),
        ({"order_id": "123456", "amount": 1.0}, "amount"),
        ({"order_id": "123456", "amount": "5"}, "amount"),
        ({"order_id": "123456", "amount": True}, "amount"),
        ({"order_id": "123456", "amount": 2**60}, "amount"),
        ({"order_id": "12345", "amount": 5}, "order_id"),
        ({"order_id": "123456\n", "amount": 5}, "order_id"),
        ({"order_id": "123456", "amount": 5, "note": "x"}, "note"),
        ({"order_id": None, "amount": 5}, "order_id"),
    ],
)
def test_check_parameters_names_the_parameter(parameters: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        check_parameters(policy(), "refund_customer", parameters)
    assert caught.value.field == f"parameters.{field}"


def test_check_parameters_does_not_repeat_the_value() -> None:
    with pytest.raises(InvalidInputError) as caught:
        check_parameters(policy(), "refund_customer", {"order_id": "hunter2", "amount": 5})
    assert "hunter2" not in caught.value.message


def test_check_parameters_accepts_matching_parameters() -> None:
    check_parameters(policy(), "refund_customer", {"order_id": "123456", "amount": 5})
    check_parameters(policy(), "transfer_funds", {"anything": 1})  # a built-in action has its own checks
    assert REFUND["parameters"] == policy().actions["refund_customer"].parameters
