"""The format 2 document: its text, its bounds, and the field that each error names."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest

from qaes.domain.canonical import canonical_json, sha256_hex
from qaes.domain.errors import InvalidInputError
from qaes.domain.policy import (
    DEFAULT_RULES,
    Policy,
    PolicyDocument,
    PolicyDocumentV2,
    difference,
    policy_id_of,
    policy_of,
    read_document,
)
from qaes.domain.policy.proposing import propose
from qaes.domain.qubic.identity import encode_identity
from tests.support.policies import CONTENT, FINANCE, REFUND, changed, document, policy, with_rule

RULE = "rules.refund_customer"
ACTION = "actions.refund_customer"
HANDLER = f"{ACTION}.handler"
PROPERTIES = f"{ACTION}.parameters.properties"
PLAIN = {"allowed": True, "risk_level": "low", "tiers": [{"approvals": 1}]}
HTTPS = {"type": "https", "url": "https://refunds.example.com/v1"}
SECRET = {"type": "bearer", "secret": "qaes/actions/refunds"}
KEY = {"keyid": "one", "ed25519": "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}
FIRST = policy_of(PolicyDocument.write(DEFAULT_RULES, version=1).text())


def refused(content: dict[str, Any]) -> InvalidInputError:
    with pytest.raises(InvalidInputError) as caught:
        PolicyDocumentV2.write(content, version=7)
    return caught.value


# Text and hash


def test_document_is_read_as_it_was_written() -> None:
    text = document().text()
    assert read_document(text) == document()
    assert json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"), ensure_ascii=False) == text
    found = policy_of(text)
    assert (found.format, found.version, found.policy_id) == (2, 7, policy_id_of(7, sha256_hex(text)))
    assert found.groups["finance"] == tuple(FINANCE)


def test_document_text_has_every_member() -> None:
    content = copy.deepcopy(CONTENT)
    for member in ("sensitive", "dry_run", "timeout_seconds", "result_timeout_seconds"):
        del content["actions"]["refund_customer"][member]
    for member in ("requesters", "destinations", "allow_derived", "smart_contracts"):
        del content["rules"]["refund_customer"][member]
    value = json.loads(document(content).text())
    assert (value["roots"], value["signed_operations"]) == ([], [])
    assert value["actions"]["refund_customer"]["sensitive"] == []
    assert value["rules"]["refund_customer"]["tiers"][0] == {
        "max_amount": 10000, "approvals": 0, "approvers": None, "signature": False, "expires_after": None,
        "escalate_after": None, "escalate_to": None,
    }  # fmt: skip
    assert value["rules"]["refund_customer"]["limits"][0] == {
        "window_seconds": 86400, "max_amount": 500000, "max_count": None, "per": "action", "over": "deny",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"version":7', '"version": 7'),
        ('"version":7', '"version":7.0'),
        ('"version":7', '"version":7,"version":7'),
        ('"max_amount":10000', '"max_amount":10000.0'),
        ('"max_amount":10000', '"max_amount":1e4'),
        ('"roots":[],', ""),
        ('"roots":[]', '"roots":["one"]'),
        ('"signed_operations":[]', '"signed_operations":["propose"]'),
        ('"signature":false', '"signature":true'),
        ('"format":2', '"format":3'),
        ('"format":2', '"format":2,"more":1'),
        ('"finn"', '"fi\\u006en"'),
    ],
)
def test_non_canonical_text_is_not_read(text: str, message: str) -> None:
    good = document().text()
    assert text in good
    with pytest.raises(ValueError):  # noqa: PT011 (any reason, and never another error)
        policy_of(good.replace(text, message, 1))


@pytest.mark.parametrize(
    "text",
    ['{"format":2}', '{"format":2,"rules":5,"version":1}', '{"format":2,"rules":{},"version":true}', '{"format":2,'],
)
def test_malformed_document_is_not_read(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011
        policy_of(text)


def test_document_of_256_kib_is_the_largest() -> None:
    content = copy.deepcopy(CONTENT)
    large = {"type": "object", "additionalProperties": False, "properties": {"a": {"const": "x" * 15_000}}}
    for number in range(17):
        content["actions"][f"large_{number}"] = REFUND | {"parameters": large, "amount": None, "unit": None}
    assert "262144" in refused(content).message
    del content["actions"]["large_16"]
    PolicyDocumentV2.write(content, version=7)


# Each error names its field


@pytest.mark.parametrize(
    ("path", "value", "field"),
    [
        # unknown and missing members
        ("more", 1, "more"),
        (f"{RULE}.more", 1, f"{RULE}.more"),
        (f"{RULE}.tiers.1.more", 1, f"{RULE}.tiers.1.more"),
        (f"{RULE}.limits.0.more", 1, f"{RULE}.limits.0.more"),
        (f"{RULE}.limits.1.over.more", 1, f"{RULE}.limits.1.over.more"),
        (f"{ACTION}.more", 1, f"{ACTION}.more"),
        (f"{HANDLER}.more", 1, f"{HANDLER}.more"),
        (f"{RULE}.allowed", ..., f"{RULE}.allowed"),
        (f"{RULE}.tiers", ..., f"{RULE}.tiers"),
        (f"{RULE}.tiers.0.approvals", ..., f"{RULE}.tiers.0.approvals"),
        (f"{RULE}.limits.0.per", ..., f"{RULE}.limits.0.per"),
        (HANDLER, ..., HANDLER),
        (f"{ACTION}.title", ..., f"{ACTION}.title"),
        ("rules", ..., "rules"),
        # later members
        ("roots", ["one"], "roots"),
        ("signed_operations", ["propose"], "signed_operations"),
        (f"{RULE}.tiers.1.signature", True, f"{RULE}.tiers.1.signature"),
        # groups
        ("groups.finance", [], "groups.finance"),
        ("groups.finance", ["a", "a"], "groups.finance"),
        ("groups.finance", [f"sub-{number}" for number in range(201)], "groups.finance"),
        ("groups.finance.1", "", "groups.finance.1"),
        ("groups.finance.1", " a", "groups.finance.1"),
        ("groups.finance.1", "e\u0301", "groups.finance.1"),
        ("groups.finance.1", "a\u200bb", "groups.finance.1"),
        ("groups.finance.1", "worker", "groups.finance.1"),
        ("groups.finance.1", "x" * 257, "groups.finance.1"),
        ("groups.finance.1", 5, "groups.finance.1"),
        ("groups.a b", ["a"], "groups.a b"),
        # tiers
        (f"{RULE}.tiers", [], f"{RULE}.tiers"),
        (f"{RULE}.tiers", [{"max_amount": n, "approvals": 0} for n in range(1, 7)], f"{RULE}.tiers"),
        (f"{RULE}.tiers.1.max_amount", 10000, f"{RULE}.tiers.1.max_amount"),
        (f"{RULE}.tiers.0.max_amount", None, f"{RULE}.tiers.0.max_amount"),
        (f"{RULE}.tiers.0.max_amount", 0, f"{RULE}.tiers.0.max_amount"),
        (f"{RULE}.tiers.1.max_amount", 2**53, f"{RULE}.tiers.1.max_amount"),
        (f"{RULE}.tiers.1.max_amount", 100.0, f"{RULE}.tiers.1.max_amount"),
        (f"{RULE}.tiers.1.max_amount", "100", f"{RULE}.tiers.1.max_amount"),
        (f"{RULE}.tiers.1.max_amount", True, f"{RULE}.tiers.1.max_amount"),
        (f"{RULE}.tiers.1.approvals", 11, f"{RULE}.tiers.1.approvals"),
        (f"{RULE}.tiers.1.approvals", -1, f"{RULE}.tiers.1.approvals"),
        (f"{RULE}.tiers.1.approvals", 4, f"{RULE}.tiers.1.approvals"),
        (f"{RULE}.tiers.1.approvers", "nobody", f"{RULE}.tiers.1.approvers"),
        (f"{RULE}.tiers.1.escalate_to", "nobody", f"{RULE}.tiers.1.escalate_to"),
        (f"{RULE}.tiers.1.escalate_to", None, f"{RULE}.tiers.1"),
        (f"{RULE}.tiers.1.escalate_after", 14400, f"{RULE}.tiers.1"),
        (f"{RULE}.tiers.1.expires_after", 2_592_001, f"{RULE}.tiers.1.expires_after"),
        (f"{RULE}.tiers.0.approvers", "finance", f"{RULE}.tiers.0"),
        # limits
        (f"{RULE}.limits", [], None),
        (f"{RULE}.limits.0.window_seconds", 59, f"{RULE}.limits.0.window_seconds"),
        (f"{RULE}.limits.0.window_seconds", 2_678_401, f"{RULE}.limits.0.window_seconds"),
        (f"{RULE}.limits.0.max_count", 5, f"{RULE}.limits.0"),
        (f"{RULE}.limits.0.max_amount", ..., f"{RULE}.limits.0"),
        (f"{RULE}.limits.0.per", "user", f"{RULE}.limits.0.per"),
        (f"{RULE}.limits.0.per", "source", f"{RULE}.limits.0.per"),
        (f"{RULE}.limits.0.over", "allow", f"{RULE}.limits.0.over"),
        (f"{RULE}.limits.0.over", None, f"{RULE}.limits.0.over"),
        (f"{RULE}.limits.1.over.approvals", 0, f"{RULE}.limits.1.over.approvals"),
        (f"{RULE}.limits.1.over.approvals", 4, f"{RULE}.limits.1.over.approvals"),
        (f"{RULE}.limits.1.over.approvers", "nobody", f"{RULE}.limits.1.over.approvers"),
        (
            f"{RULE}.limits",
            [{"window_seconds": 60, "max_count": n, "per": "agent", "over": "deny"} for n in (1, 2)],
            f"{RULE}.limits.1",
        ),
        (
            f"{RULE}.limits",
            [{"window_seconds": 60 + n, "max_count": 1, "per": "agent", "over": "deny"} for n in range(11)],
            f"{RULE}.limits",
        ),
        # requesters and destinations
        (f"{RULE}.requesters", [], f"{RULE}.requesters"),
        (f"{RULE}.requesters", ["finance"], f"{RULE}.requesters.0"),
        (f"{RULE}.requesters", ["role:auditor"], f"{RULE}.requesters.0"),
        (f"{RULE}.requesters", ["user:"], f"{RULE}.requesters.0"),
        (f"{RULE}.requesters", ["user: a"], f"{RULE}.requesters.0"),
        (f"{RULE}.requesters", ["group:nobody"], f"{RULE}.requesters.0"),
        (f"{RULE}.requesters", ["user:worker"], f"{RULE}.requesters.0"),
        (f"{RULE}.requesters", ["agent:" + "x" * 257], f"{RULE}.requesters.0"),
        (f"{RULE}.requesters", ["user:a", "user:a"], f"{RULE}.requesters"),
        (f"{RULE}.destinations", [], f"{RULE}.destinations"),
        (f"{RULE}.destinations", ["1", "1"], f"{RULE}.destinations"),
        (f"{RULE}.destinations", ["x" * 257], f"{RULE}.destinations.0"),
        (f"{RULE}.destinations", [str(number) for number in range(101)], f"{RULE}.destinations"),
        (f"{RULE}.smart_contracts", True, f"{RULE}.smart_contracts"),
        (f"{RULE}.risk_level", "huge", f"{RULE}.risk_level"),
        (f"{RULE}.allowed", "yes", f"{RULE}.allowed"),
        # rules and actions
        ("rules.send_mail", PLAIN, "rules.send_mail"),
        ("rules.monitor_wallet", PLAIN, "rules.monitor_wallet"),
        ("actions.transfer_funds", REFUND, "actions.transfer_funds"),
        ("actions.monitor_wallet", REFUND, "actions.monitor_wallet"),
        ("actions.a b", REFUND, "actions.a b"),
        (f"{ACTION}.title", "", f"{ACTION}.title"),
        (f"{ACTION}.title", "a\nb", f"{ACTION}.title"),
        (f"{ACTION}.description", "a\u202eb", f"{ACTION}.description"),
        (f"{ACTION}.description", "a\u200db", f"{ACTION}.description"),
        (f"{PROPERTIES}.order_id.description", "\ufeff", f"{PROPERTIES}.order_id.description"),
        (f"{ACTION}.effect", "some", f"{ACTION}.effect"),
        (f"{ACTION}.timeout_seconds", 21, f"{ACTION}.timeout_seconds"),
        (f"{ACTION}.result_timeout_seconds", 604_801, f"{ACTION}.result_timeout_seconds"),
        (f"{ACTION}.dry_run", 1, f"{ACTION}.dry_run"),
        (f"{ACTION}.amount", "amount", f"{ACTION}.amount"),
        (f"{ACTION}.amount", "/a~2", f"{ACTION}.amount"),
        (f"{ACTION}.unit", None, f"{ACTION}.unit"),
        (f"{ACTION}.unit", "EUR cent", f"{ACTION}.unit"),
        (f"{ACTION}.amount", None, f"{ACTION}.unit"),
        (f"{ACTION}.parameters", [], f"{ACTION}.parameters"),
        (f"{PROPERTIES}.amount.multipleOf", 0.5, f"{PROPERTIES}.amount.multipleOf"),
        (f"{PROPERTIES}.amount.maximum", 2**53, f"{PROPERTIES}.amount.maximum"),
        (f"{ACTION}.sensitive", ["/a", "/a"], f"{ACTION}.sensitive"),
        # handlers
        (HANDLER, {"type": "ftp"}, HANDLER),
        (HANDLER, "lambda", HANDLER),
        (f"{HANDLER}.function_name", "a b", f"{HANDLER}.function_name"),
        (HANDLER, HTTPS | {"url": "http://example.com"}, f"{HANDLER}.url"),
        (HANDLER, HTTPS | {"credential": SECRET | {"secret": "other"}}, f"{HANDLER}.credential.secret"),
        (HANDLER, HTTPS | {"credential": SECRET | {"type": "digest"}}, f"{HANDLER}.credential.type"),
        (HANDLER, HTTPS | {"public_keys": [KEY | {"ed25519": "AAAA"}]}, f"{HANDLER}.public_keys.0.ed25519"),
        (HANDLER, HTTPS | {"public_keys": [KEY | {"ed25519": "!"}]}, f"{HANDLER}.public_keys.0.ed25519"),
        (HANDLER, HTTPS | {"public_keys": [KEY, KEY]}, f"{HANDLER}.public_keys"),
    ],
)  # fmt: skip
def test_wrong_member_is_named_by_its_path(path: str, value: Any, field: str | None) -> None:
    content = changed(CONTENT, path, value)
    if field is None:
        PolicyDocumentV2.write(content, version=7)
        return
    error = refused(content)
    assert error.field == field, error.message
    assert error.message


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (f"{ACTION}.amount", "amount", "must be a JSON Pointer, such as `/amount` or `/order/total`"),
        (f"{ACTION}.unit", "EUR cent", "a name has 1 to 64 letters, digits, `_`, `.` or `-`"),
        (f"{RULE}.limits.0.over", "ask", "must be `deny`, or an object with `approvals` and perhaps `approvers`"),
        (f"{RULE}.limits.0.over", 1, "must be `deny`, or an object with `approvals` and perhaps `approvers`"),
    ],
)  # fmt: skip
def test_error_states_the_expected_value(path: str, value: Any, message: str) -> None:
    error = refused(changed(CONTENT, path, value))
    assert (error.field, error.message) == (path, message)


@pytest.mark.parametrize(
    "url",
    [
        "https://127.0.0.1/", "https://10.0.0.1", "https://192.168.1.1:8443/x", "https://169.254.169.254/latest",
        "https://[::1]/", "https://[fd00::1]/", "https://[::ffff:10.0.0.1]/", "https://0.0.0.0", "https://224.0.0.1",
        "https://[2002:0a00:0001::]/", "https://localhost/", "https://a.localhost", "https://db.internal/",
        "https://printer.local", "https://2130706433/", "https://0x7f.1/", "https://127.1/", "https://intranet/",
        "https://user:secret@example.com/", "https://user@example.com", "https://@example.com", "//example.com",
        "HTTPS://example.com", "https://example.com/#part", "https://example.com:0/", "https://example.com:/",
        "https://example.com:99999", "https://", "https:///x", "https://exa mple.com", "https://ex\u00e4mple.com",
        "https://example.com\\@evil.com", "https://example..com", "https://-a.com", "https://" + "a" * 2048 + ".com",
        "https://[64:ff9b::10.0.0.1]/",
    ],
)  # fmt: skip
def test_url_of_handler_must_be_public(url: str) -> None:
    content = changed(CONTENT, HANDLER, HTTPS | {"url": url})
    assert refused(content).field == f"{HANDLER}.url"


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com", "https://api.example.com:8443/v1?x=1", "https://8.8.8.8/", "https://[2606:4700::1111]/x",
        "https://xn--mnchen-3ya.example.com/",
    ],
)  # fmt: skip
def test_public_url_of_handler_is_accepted(url: str) -> None:
    handler = HTTPS | {"url": url, "public_keys": [KEY], "credential": SECRET}
    assert policy(changed(CONTENT, HANDLER, handler)).actions["refund_customer"].handler.type == "https"


def test_effect_without_amount_needs_a_limit_on_the_count() -> None:
    content = changed(CONTENT, ACTION, REFUND | {"amount": None, "unit": None})
    content["rules"]["refund_customer"] |= {"tiers": [{"approvals": 1}], "limits": []}
    assert refused(content).field == f"{RULE}.limits"
    limit = {"window_seconds": 60, "max_count": 5, "per": "action", "over": "deny"}
    PolicyDocumentV2.write(changed(content, f"{RULE}.limits", [limit]), version=7)
    PolicyDocumentV2.write(changed(content, f"{ACTION}.effect", "none"), version=7)
    PolicyDocumentV2.write(changed(content, f"{RULE}.allowed", False), version=7)


def test_action_without_amount_has_one_tier_and_counts_requests() -> None:
    content = changed(CONTENT, ACTION, REFUND | {"amount": None, "unit": None})
    assert refused(content).field == f"{RULE}.tiers"
    content["rules"]["refund_customer"]["tiers"] = [{"approvals": 1}]
    assert refused(content).field == f"{RULE}.limits.0.max_amount"


def test_action_without_destination_has_no_destinations() -> None:
    content = changed(with_rule(destinations=["1"]), f"{ACTION}.destination", None)
    assert refused(content).field == f"{RULE}.destinations"


IDENTITY = encode_identity(bytes(range(32)))
CONTRACT = encode_identity((1).to_bytes(32, "little"))


@pytest.mark.parametrize(
    ("rule", "field"),
    [
        (PLAIN, None),
        (PLAIN | {"destinations": [IDENTITY, "0x1234567890abcdef"]}, None),
        (PLAIN | {"destinations": ["0X1234567890ABCDEF"]}, "destinations.0"),
        (PLAIN | {"destinations": ["somewhere"]}, "destinations.0"),
        (PLAIN | {"destinations": [CONTRACT]}, "destinations.0"),
        (PLAIN | {"destinations": [CONTRACT], "smart_contracts": True}, None),
        (PLAIN | {"tiers": [{"max_amount": 10**15 + 1, "approvals": 1}]}, "tiers.0.max_amount"),
    ],
)
def test_rule_of_transfers_names_addresses_and_qu(rule: dict[str, Any], field: str | None) -> None:
    content = changed(CONTENT, "rules.transfer_funds", rule)
    if field is None:
        PolicyDocumentV2.write(content, version=7)
    else:
        assert refused(content).field == f"rules.transfer_funds.{field}"


def test_rule_of_monitoring_has_a_source_and_nothing_else() -> None:
    limit = {"window_seconds": 60, "max_count": 5, "per": "source", "over": "deny"}
    PolicyDocumentV2.write(changed(CONTENT, "rules.monitoring", PLAIN | {"limits": [limit]}), version=7)
    content = changed(CONTENT, "rules.monitoring", PLAIN | {"limits": [limit | {"per": "destination"}]})
    assert refused(content).field == "rules.monitoring.limits.0.per"


# Proposals

DROPPED = ["monitoring", "transaction", "transfer_funds"]


def test_proposal_with_groups_or_actions_has_format_2() -> None:
    made = propose(FIRST, CONTENT, version=2, proposed_by="olivia", remove=DROPPED)
    assert isinstance(made, PolicyDocumentV2)
    assert (made.version, made.proposed_by, made.based_on) == (2, "olivia", FIRST.policy_id)
    empty = propose(FIRST, {"groups": {}, "rules": {}}, version=2, proposed_by="olivia", remove=DROPPED)
    assert policy_of(empty.text()).format == 2


def test_proposal_with_rules_alone_has_format_1() -> None:
    rules = {name: rule.model_dump(mode="json") for name, rule in DEFAULT_RULES.items()}
    made = propose(FIRST, {"rules": rules}, version=2, proposed_by="olivia")
    assert made == PolicyDocument.write(DEFAULT_RULES, version=2, proposed_by="olivia", based_on=FIRST.policy_id)


@pytest.mark.parametrize(
    ("rules", "field"),
    [
        ({"transfer_funds": {"allowed": True}}, "rules.transfer_funds.requires_approval"),
        ({"transfer_funds": PLAIN}, "rules.transfer_funds.tiers"),
        ({"a b": {"allowed": True, "requires_approval": True, "risk_level": "low"}}, "rules.a b"),
        (5, "rules"),
    ],
)
def test_format_1_proposal_names_the_wrong_field(rules: Any, field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        propose(FIRST, {"rules": rules}, version=2, proposed_by="olivia", remove=DROPPED)
    assert caught.value.field == field


def second() -> Policy:
    return policy_of(propose(FIRST, CONTENT, version=2, proposed_by="olivia", remove=DROPPED).text())


@pytest.mark.parametrize(
    ("remove", "message"),
    [
        ([], "does not name these rules, which the proposal drops: refund_customer"),
        (["refund_customer"], "does not name these groups, which the proposal drops: cfo, finance"),
        (["refund_customer", "finance"], "groups, which the proposal drops: cfo"),
        (["refund_customer", "finance", "cfo", "cfo"], "names twice: cfo"),
        (["refund_customer", "finance", "cfo", "legal"], "that the policy in force does not have: legal"),
    ],
)
def test_proposal_must_name_everything_that_it_drops(remove: list[str], message: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        propose(second(), {"groups": {}, "rules": {}}, version=3, proposed_by="olivia", remove=remove)
    assert caught.value.field == "remove"
    assert message in caught.value.message


def test_format_1_proposal_drops_groups_and_actions_only_by_name() -> None:
    rules = {"monitoring": DEFAULT_RULES["monitoring"].model_dump(mode="json")}
    with pytest.raises(InvalidInputError, match="drops: refund_customer"):
        propose(second(), {"rules": rules}, version=3, proposed_by="olivia")
    names = ["refund_customer", "finance", "cfo"]
    assert propose(second(), {"rules": rules}, version=3, proposed_by="olivia", remove=names).format == 1


def test_proposal_may_keep_an_action_and_drop_its_rule() -> None:
    content = changed(CONTENT, RULE, ...)
    with pytest.raises(InvalidInputError, match="rules, which the proposal drops"):
        propose(second(), content, version=3, proposed_by="olivia")
    propose(second(), content, version=3, proposed_by="olivia", remove=["refund_customer"])
    with pytest.raises(InvalidInputError, match="still contains: finance"):
        propose(second(), content, version=3, proposed_by="olivia", remove=["refund_customer", "finance"])


# Differences


def test_difference_covers_groups_actions_rules_and_new_limits() -> None:
    content = changed(CONTENT, "groups.finance", ["fay", "gus", "gil"])
    content["groups"]["legal"] = ["lea"]
    content["actions"]["refund_customer"]["title"] = "Refund"
    content["rules"]["refund_customer"]["limits"][1]["window_seconds"] = 60
    content["rules"]["refund_customer"]["limits"][0]["max_amount"] = 5
    content["rules"]["monitoring"] = PLAIN
    found = difference(second(), policy(content))
    assert found.groups.model_dump() == {
        "added": {"legal": ["lea"]},
        "removed": {},
        "changed": {"finance": {"added": ["gus", "gil"], "removed": ["finn", "flora"]}},
    }
    assert set(found.actions.changed) == set(found.changed) == {"refund_customer"}
    assert set(found.added) == {"monitoring"}
    assert [limit.model_dump() for limit in found.new_limits] == [
        {"action": "refund_customer", "unit": "EUR-cent", "counts": "count", "per": "requester", "window_seconds": 60}
    ]


def test_difference_of_the_same_content_is_empty() -> None:
    found = difference(second(), policy())
    assert (found.added, found.removed, found.changed, found.new_limits) == ({}, {}, {}, [])


def test_daily_limit_of_format_1_is_no_new_limit_in_format_2() -> None:
    rules = {"transfer_funds": DEFAULT_RULES["transfer_funds"].model_copy(update={"daily_limit": 2000})}
    before = policy_of(PolicyDocument.write(rules, version=2).text())
    limit = {"window_seconds": 86400, "max_amount": 9, "per": "source", "over": "deny"}
    after = policy(changed(CONTENT, "rules.transfer_funds", PLAIN | {"limits": [limit]}))
    assert [each.action for each in difference(before, after).new_limits] == ["refund_customer", "refund_customer"]


def test_canonical_text_of_the_example_has_one_hash() -> None:
    """A change of this text changes every policy's id: it needs another `format`."""
    text = document(version=1).text()
    assert canonical_json(json.loads(text)) == text
    assert sha256_hex(text) == "041ea1e968069847a530a19e8512de924ea2c1a9f5b9dbcf62d295dbd4ef9160"
