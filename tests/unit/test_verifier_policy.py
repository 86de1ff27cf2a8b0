"""The verifier reads documents of format 2, and decides by them, as the service does; neither has the other's code."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaes.domain.canonical import canonical_json, sha256_hex
from qaes.domain.errors import InvalidInputError
from qaes.domain.policy import ActionRequest, PolicyDocumentV2, evaluate, pinned_form, policy_of
from qaes.domain.policy_events import LEDGER
from qaes.domain.qubic.identity import encode_identity
from qaes.domain.text import SYSTEM_ACTORS
from tests.support import policies
from tests.support.bundles import LOG_ID, TARGET, WALLET, Anchorer, Trail, load_verifier, policy_text
from tests.support.policies import changed
from tests.support.refunds import STORIES, Refund, approve, content, last_of, planned

verifier = load_verifier()
IDENTITY, CONTRACT = encode_identity(bytes(range(32))), encode_identity((7).to_bytes(32, "little"))
HTTPS = {
    "type": "https",
    "url": "https://refunds.example.com/v1",
    "public_keys": [{"keyid": "one", "ed25519": "A" * 43 + "="}, {"keyid": "two", "ed25519": "/" * 42 + "8="}],
    "credential": {"type": "bearer", "secret": "qaes/actions/refunds"},
}


def rich() -> dict[str, Any]:
    """A document in which every kind of member has a value."""
    made = content()
    made["actions"]["paint"] = made["actions"]["refund_customer"] | {
        "handler": HTTPS,
        "sensitive": ["/colour", "/a~1b"],
    }
    counted = {"window_seconds": 60, "max_count": 1, "per": "agent", "over": {"approvals": 10, "approvers": None}}
    made["rules"]["paint"] = made["rules"]["refund_customer"] | {
        "requesters": ["user:zoë", "group:finance", "agent:client-7"],
        "destinations": ["123456", ""],
        "limits": [counted, counted | {"per": "destination"}],
    }
    made["rules"]["transfer_funds"] |= {"destinations": [IDENTITY, WALLET], "smart_contracts": False}
    return PolicyDocumentV2.write(made, version=3, proposed_by="olivia").model_dump(mode="json")


RICH = rich()
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 2, 10, 11, 20, 21, 59, 60, 100, 86_400, 604_800, 604_801, 2_592_000, 2_592_001),
    *(2_678_400, 2_678_401, 10**6, 10**6 + 1, 10**9 - 1, 10**9, 10**15, 10**15 + 1, 2**53 - 1, float(2**53), 1.5),
    *("", "x", "a b", " a", "a" * 64, "a" * 65, "a" * 101, "a" * 2049, "\u202e", "\u200b", "\n", "\x7f", "e\u0301"),
    *("finance", "nobody", "*", "deny", "action", "source", "destination", "low", "none", "lambda", "/amount", "/a/b"),
    *("/", "amount", "/a~2", "/" * 3, "/a" * 17, "/" + "a" * 511, "/" + "a" * 512, "user:alice", "user:"),
    *("group:cfo", "group:x", "agent:" + "a" * 256, "agent:" + "a" * 257, "client:x", "user:planner", "planner"),
    *("\u2800", "a\u2800", "\ufffd", "\u3164", "\ue000", "policy-v2-" + "a" * 64, "policy-v0-" + "a" * 64),
    *(IDENTITY, IDENTITY.lower(), IDENTITY[:-1] + "A", CONTRACT, WALLET, WALLET.upper(), "0x" + "0" * 16),
    *("A" * 43 + "=", "B" * 43 + "=", "A" * 42 + "==", "qaes/actions/x", "qaes/actions/", "bearer", "reversible"),
    *([], {}, ["x"], ["x", "x"], [1], [None], [[]], ["bob"] * 2, [f"s{n}" for n in range(200)]),
    *([f"s{n}" for n in range(201)], {"type": "lambda"}, {"type": "ftp"}, {"approvals": 1}),
    *({"approvals": 1, "approvers": "cfo"}, {"a": {"b": [1.5]}}),
]  # fmt: skip
OWN = {"url"}
"""The service checks more of a handler's address than the verifier: the dispatcher alone uses it."""


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where each value of a document is, without the actions and rules that are like another one."""
    yield path
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, each in inner:
        if path[-1:] not in {("parameters",), ("result",)} and name not in {"refund_customer", "monitoring"}:
            yield from places(each, (*path, name))


def with_value(path: tuple[Any, ...], value: Any) -> Any:
    """The document with another value at a place; `...` takes the member away."""
    made = copy.deepcopy(RICH)
    if not path:
        return value
    at: Any = made
    for name in path[:-1]:
        at = at[name]
    if value is ...:
        del at[path[-1]]
    else:
        at[path[-1]] = value
    return made


def service_accepts(text: str) -> bool:
    try:
        PolicyDocumentV2.read(text)
    except InvalidInputError:
        return False
    return True


def verifier_accepts(text: str) -> bool:
    try:
        return bool(verifier.read_document(text, sha256_hex(text))["format"] == 2)
    except verifier.Failed:
        return False


def both(text: str) -> bool:
    service, offline = service_accepts(text), verifier_accepts(text)
    assert service == offline, text
    return service


def test_document_with_every_member_is_accepted_by_both() -> None:
    assert both(canonical_json(RICH))


PLACES = [path for path in places(RICH) if path]


@pytest.mark.parametrize("number", range(len(PLACES)), ids=[".".join(map(str, path))[-50:] for path in PLACES])
def test_document_with_another_value_is_judged_alike(number: int) -> None:
    """Every fourth value, beginning at another one in each place, and none at all."""
    path = PLACES[number]
    values = [each for each in VALUES[number % 4 :: 4] if not (path[-1] in OWN and isinstance(each, str))]
    verdicts = [both(canonical_json(with_value(path, value))) for value in [..., *values]]
    assert False in verdicts


def objects() -> Iterator[str]:
    """The paths of the objects whose members the format lists."""
    for path in places(RICH):
        at: Any = RICH
        for name in path:
            at = at[name]
        if isinstance(at, dict) and path[-1:] not in {
            ("groups",),
            ("actions",),
            ("rules",),
            ("parameters",),
            ("result",),
        }:
            yield ".".join((*map(str, path), "unknown"))


@pytest.mark.parametrize("path", list(objects()))
def test_document_with_unknown_member_is_refused_by_both(path: str) -> None:
    assert not both(canonical_json(changed(RICH, path, None)))


@pytest.mark.parametrize(
    ("path", "value", "accepted"),
    [
        ("rules.paint.tiers.1.escalate_after", 14_400, False),
        ("rules.paint.tiers.1.expires_after", None, True),
        ("rules.paint.tiers.0.approvers", "finance", False),
        ("rules.paint.tiers.1.max_amount", 10_000, False),
        ("rules.paint.tiers.0.max_amount", None, False),
        ("rules.paint.smart_contracts", True, False),
        ("rules.transfer_funds.smart_contracts", True, True),
        ("rules.transfer_funds.destinations", [CONTRACT], False),
        ("rules.monitoring.tiers.0.max_amount", 1, False),
        ("groups.finance", ["bob"], False),
        ("actions.paint.amount", None, False),
        ("actions.monitoring", RICH["actions"]["paint"], False),
        ("actions.monitor_wallet", RICH["actions"]["paint"], False),
        ("rules.other", RICH["rules"]["paint"], False),
        ("groups", {f"g{n}": ["bob"] for n in range(201)}, False),
        ("actions.paint.parameters", {"deep": json.loads("[" * 29 + "]" * 29)}, True),
        ("actions.paint.parameters", {"deep": json.loads("[" * 30 + "]" * 30)}, False),
        ("actions.paint.parameters", {"number": float(2**53)}, False),
        ("actions.paint.parameters", {"hidden\u200b": 1}, False),
        ("actions.paint.description", "\u0627\u0644\u0639", True),
    ],
)
def test_document_is_judged_alike_across_its_parts(path: str, value: Any, accepted: bool) -> None:
    assert both(canonical_json(changed(RICH, path, value))) == accepted


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        '{"format":2}',
        "[2]",
        canonical_json(RICH).replace(":3}", ":3.0}"),
        canonical_json(RICH).replace(":3}", ":3e0}"),
        canonical_json(RICH).replace('"version":3', '"version":3,"version":3'),
        json.dumps(RICH, sort_keys=True),
        canonical_json(RICH) + " ",
        canonical_json(RICH | {"rules": {}, "actions": {}, "groups": {"g": ["x" * 250 + str(n) for n in range(200)]} | {
            f"g{m}": ["x" * 250 + str(n) for n in range(200)] for m in range(5)
        }}),
    ],
)  # fmt: skip
def test_malformed_document_is_refused_by_both(text: str) -> None:
    assert not both(text)


def test_verifier_reads_256_kib_in_time() -> None:
    """A document of the largest size whose texts are as bad as patterns could make them."""
    pointers = ["/" + "~1" * 250 + f"{n}" for n in range(50)]
    made = changed(RICH, "actions.paint.sensitive", pointers)
    for number in range(8):
        made["actions"][f"paint{number}"] = made["actions"]["paint"]
    assert both(canonical_json(made))
    assert not both(canonical_json(changed(made, "actions.paint.sensitive", ["/" + "~1" * 250 + "~"])))


# Stories


@pytest.mark.parametrize("story", STORIES)
def test_verifier_accepts_a_genuine_story_of_format_2(story: str) -> None:
    anchorer = Anchorer()
    bundle = STORIES[story]().bundle(anchorer)
    lines = verifier.verify(canonical_json(bundle).encode(), log_id=LOG_ID, anchor_identity=anchorer.identity)
    assert bundle["format"] == "qaes-bundle-2"
    assert any(line.startswith("changes   ") for line in lines)


def test_report_names_claims_a_bundle_cannot_prove() -> None:
    anchorer = Anchorer()
    bundle = STORIES["beyond a limit"]().bundle(anchorer)
    lines = verifier.verify(canonical_json(bundle).encode(), log_id=LOG_ID, anchor_identity=anchorer.identity)
    assert "limit     20 requests in 3600 s, by requester alice: 20 used before (NOT PROVED), and 1 now" in lines
    assert "NOT CHECKED whether the policy changed after its entry 3, while the task ran: use --log" in lines
    assert "NOT CHECKED that the parameters obey the JSON Schema of refund_customer, nor its result" in lines


def test_old_version_without_entries_is_a_note() -> None:
    """A version of format 1 may be older than the stream of the policy."""
    trail, anchorer = Trail(), Anchorer()
    trail.change("action_suspended", name="paint", seconds=-86_400)
    trail.start().check_policy().end("cancelled", "alice")
    bundle = trail.bundle(anchorer)
    lines = verifier.verify(canonical_json(bundle).encode(), log_id=LOG_ID, anchor_identity=anchorer.identity)
    policy_id = trail.policy.policy_id
    assert f"NOTE      no entry of the policy says how {policy_id} came into force" in lines  # quoted


def test_version_that_was_superseded_is_a_note() -> None:
    """An older version can be in force again, if the newest is found altered."""
    trail, anchorer = Trail().enact(), Anchorer()
    newer = policy_of(policy_text(version=4))
    trail.enact(newer, seconds=-80_000)
    trail.start().check_policy().end("cancelled", "alice")
    data = canonical_json(trail.bundle(anchorer)).encode()
    lines = verifier.verify(data, log_id=LOG_ID, anchor_identity=anchorer.identity)
    assert [line for line in lines if line.startswith("NOTE")] == [
        f"NOTE      {trail.policy.policy_id} was used, although {newer.policy_id} was in force (entry 2)"
    ]


@pytest.mark.parametrize(("seconds", "refused"), [(-301, True), (-290, False)])
def test_suspension_within_clock_skew_is_no_violation(seconds: float, refused: bool) -> None:
    trail, anchorer = approve(planned(), "bob", "carol"), Anchorer()
    trail.moment += timedelta(minutes=10)
    trail.change("action_suspended", name="*", seconds=seconds)
    data = canonical_json(trail.execute(last_of(trail)).end("completed").bundle(anchorer)).encode()
    with pytest.raises(verifier.Failed, match=r"\[R97\]") if refused else nullcontext():
        verifier.verify(data, log_id=LOG_ID, anchor_identity=anchorer.identity)


@pytest.mark.parametrize("name", ["claims", "retries"])
def test_verifier_reads_repetitions_in_time(name: str) -> None:
    """Each wallet is derived once, and the request is hashed once, however often the entries refer to them."""
    if name == "claims":
        made = content()
        pers = [(window, per) for window in range(60, 65) for per in ("source", "destination")]
        made["rules"]["transfer_funds"] |= {
            "requesters": None,
            "tiers": [{"max_amount": None, "approvals": 0}],
            "limits": [{"window_seconds": at, "max_count": 9, "per": per, "over": "deny"} for at, per in pers],
        }
        parameters = {"wallet_address": WALLET, "to_address": TARGET, "amount": 5}
        trail = planned(parameters, made, task_type="transfer_funds")
        for _ in range(40):
            trail.begin(last_of(trail)).end("failed").retry()
    else:
        trail = Refund({"order_id": "123456", "amount": 500, "more": ["x" * 10] * 40_000}).start().check_policy()
        for _ in range(40):
            trail.end("failed").retry()
    anchorer = Anchorer()
    data = canonical_json(trail.end("cancelled", "alice").bundle(anchorer)).encode()
    started = time.process_time()
    verifier.verify(data, log_id=LOG_ID, anchor_identity=anchorer.identity, open_=True)
    assert time.process_time() - started < 5


def test_log_order_that_contradicts_the_times_is_a_note() -> None:
    """The log has a suspension before the action, whose time is earlier."""
    anchorer = Anchorer()
    trail = approve(planned(), "bob", "carol")
    trail.change("action_suspended", name="refund_customer", seconds=30)
    data = canonical_json(trail.execute(last_of(trail)).end("completed").bundle(anchorer)).encode()
    lines = verifier.verify(data, log_id=LOG_ID, anchor_identity=anchorer.identity)
    notes = [line for line in lines if line.startswith("NOTE")]
    assert notes == ["NOTE      in the log, refund_customer was suspended when it began (entry 9)"]


def test_version_after_its_use_in_the_log_is_a_note() -> None:
    bundle = STORIES["refunded"]().bundle(Anchorer())
    stream = verifier.PolicyStream(bundle, LOG_ID)
    for number, entry in enumerate(stream.entries):
        entry["index"] = 100 + number
    story = verifier.Story(bundle["policies"], "mock", stream)
    for number, entry in enumerate(verifier.check_chain(bundle, LOG_ID)):
        story.tell(entry | {"index": number}, bundle["entries"][number]["output"])
    assert [note.split(" came ")[1] for note in story.notes] == [
        f"into force after its use (entry {number})" for number in (2, 4, 5, 9)
    ]


# Decisions

SUBJECTS, CLIENTS = ("alice", "bob", "carol", "zoë"), (None, "client-7", "client-8")
NAMES = st.sampled_from(["finance", "cfo", None])
AMOUNTS = st.sampled_from([1, 2, 99, 100, 101, 10**6, 10**15, 2**53 - 1])
VALUE = st.one_of(AMOUNTS, st.sampled_from([None, 0, -1, True, "5", 1.5, 2**53, [], {}, "123456", WALLET, IDENTITY]))
OVER = st.one_of(st.just("deny"), st.fixed_dictionaries({"approvals": st.integers(1, 2), "approvers": NAMES}))


@st.composite
def rules(draw: st.DrawFn, *, has_amount: bool, has_destination: bool, has_source: bool) -> dict[str, Any]:
    tops: list[Any] = (
        sorted(draw(st.sets(AMOUNTS.filter(lambda each: each <= 10**15), max_size=3))) if has_amount else []
    )
    tops += [None] if not tops or draw(st.booleans()) else []
    tiers = [{"max_amount": top, "approvals": draw(st.integers(0, 2)), "approvers": None} for top in tops]
    for tier in tiers:
        if tier["approvals"]:
            tier["approvers"] = draw(NAMES)
            tier["expires_after"] = draw(st.sampled_from([None, 60, 14_400]))
    pers = ["action", "requester", "agent", *["source"] * has_source, *["destination"] * has_destination]
    limits = {}
    for _ in range(draw(st.integers(0, 3))):
        limit: dict[str, Any] = {
            "window_seconds": draw(st.sampled_from([60, 3600])),
            "per": draw(st.sampled_from(pers)),
        }
        limit |= {
            "max_amount" if has_amount and draw(st.booleans()) else "max_count": draw(st.sampled_from([1, 100, 10**6]))
        }
        limits[limit["window_seconds"], limit["per"], "max_count" in limit] = limit | {"over": draw(OVER)}
    always = {"window_seconds": 61, "per": "action", "max_count": 10**6, "over": "deny"}
    requesters = st.sampled_from(["user:alice", "user:zoë", "group:finance", "group:cfo", "agent:client-7"])
    places = ["123456", "abc"] if not has_source else [WALLET, IDENTITY]
    return {
        "allowed": draw(st.sampled_from([True, True, True, False])),
        "risk_level": draw(st.sampled_from(["low", "medium", "high"])),
        "requesters": draw(st.one_of(st.none(), st.lists(requesters, min_size=1, max_size=3, unique=True))),
        "destinations": draw(st.sampled_from([None, None, places])) if has_destination else None,
        "tiers": tiers,
        "limits": [*limits.values(), always],
    }


@st.composite
def documents(draw: st.DrawFn) -> str:
    made = content()
    action = made["actions"]["refund_customer"]
    shape = draw(st.sampled_from(["amount and destination", "amount", "neither", "nested"]))
    if shape == "nested":
        action |= {"amount": "/order/a~1b/~0x", "destination": "/order/id"}
    if shape in ("amount", "neither"):
        action |= {"destination": None}
    if shape == "neither":
        action |= {"amount": None, "unit": None}
    own = {"neither": "", "amount": "a"}.get(shape, "ad")
    parts = {"refund_customer": own, "transfer_funds": "ads", "transaction": "ads", "monitoring": "s"}
    for name, has in parts.items():
        made["rules"][name] = draw(rules(has_amount="a" in has, has_destination="d" in has, has_source="s" in has))
    for name in draw(st.sets(st.sampled_from(sorted(made["rules"])), max_size=1)):
        del made["rules"][name]
    return PolicyDocumentV2.write(made, version=3, proposed_by="olivia").text()


@st.composite
def requests(draw: st.DrawFn) -> ActionRequest:
    parameters: dict[str, Any] = {}
    for name in ("amount", "order_id", "wallet_address", "to_address"):
        if draw(st.integers(0, 5)):
            usual = {"amount": AMOUNTS, "order_id": st.just("123456")}.get(
                name, st.sampled_from([WALLET, TARGET, IDENTITY])
            )
            parameters[name] = draw(st.one_of(usual, usual, usual, VALUE))
    parameters["order"] = draw(st.one_of(VALUE, st.just({"id": "abc", "a/b": {"~x": 100}})))
    task_type = draw(st.sampled_from(["refund_customer", "transfer_funds", "transaction", "monitor_wallet", "other"]))
    action = {"monitor_wallet": "monitoring"}.get(task_type, task_type)
    return ActionRequest(action, parameters, draw(st.sampled_from(SUBJECTS)), draw(st.sampled_from(CLIENTS)))


ALIKE = ("key", "per", "value", "window_seconds", "counts", "add", "maximum")


@settings(max_examples=200, deadline=None)
@given(documents(), st.lists(requests(), min_size=5, max_size=5))
def test_verifier_decides_as_the_service_does(text: str, wanted: list[ActionRequest]) -> None:
    policy, document = policy_of(text), verifier.read_document(text, sha256_hex(text))
    for request in wanted:
        decision = evaluate(policy, request)
        said = {"parameters": request.parameters, "requester": request.requester, "agent": request.agent}
        offline = verifier.Evaluation(document, policy.policy_id, request.action, said)
        assert offline.decision == pinned_form(policy, decision).model_dump(mode="json"), decision.reason
        uses = [{name: getattr(use, name) for name in ALIKE} for use in decision.limits]
        assert [{name: use[name] for name in ALIKE} for use in offline.limits] == uses
        overs = [
            use.over if use.over == "deny" else (use.over.approvals, use.over.approvers) for use in decision.limits
        ]
        assert [
            use["over"] if use["over"] == "deny" else (use["over"]["approvals"], use["over"]["approvers"])
            for use in offline.limits
        ] == overs


def test_parts_of_the_system_have_the_same_names_everywhere() -> None:
    parts = {actor for _, actor, *_ in verifier.KINDS.values() if actor} | {LEDGER}
    assert parts <= SYSTEM_ACTORS == set(verifier.PARTS)


@pytest.mark.parametrize("name", sorted(SYSTEM_ACTORS))
def test_no_group_has_a_part_of_the_system(name: str) -> None:
    assert not verifier.is_subject(name)
    with pytest.raises(InvalidInputError, match="part of the system"):
        policies.document(policies.CONTENT | {"groups": {"finance": [name, "fay"], "cfo": ["carla"]}})
