"""One row for each rule of docs/audit.md and docs/policy.md: a trail that breaks this rule, and no other.

The attacker is the operator: the altered trail is hashed anew and anchored with the true key. Each row is verified
twice: the verifier must refuse it by its rule, and must accept it when only that rule is not enforced.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from contextlib import suppress
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from qaes.domain.bundle import TrailEntry, build_bundle
from qaes.domain.canonical import canonical_json, salted_hash, sha256_hex
from qaes.domain.merkle import leaf_hash
from qaes.domain.policy import policy_of
from tests.support.bundles import (
    LOG_ID,
    RULES,
    SALT,
    TARGET,
    TASK_ID,
    WALLET,
    Anchorer,
    Log,
    Trail,
    denied,
    load_verifier,
    not_enforced,
    policy_text,
    transfer,
    transferred,
)
from tests.support.policy_rows import IN_LOG, POLICY_ROWS

ROOT = Path(__file__).parents[2]
verifier = load_verifier()
ANCHORER = Anchorer()


class Case(NamedTuple):
    """A bundle, and the options of its verification."""

    data: dict[str, Any] | bytes
    options: dict[str, Any]


def of_trail(trail: Trail) -> Case:
    return Case(trail.bundle(ANCHORER), {"open_": True})


def of_bundle(bundle: dict[str, Any] | bytes, **options: Any) -> Case:
    return Case(bundle, options)


def verify(case: Case) -> list[str]:
    data = case.data if isinstance(case.data, bytes) else canonical_json(case.data).encode()
    lines: list[str] = verifier.verify(data, **{"log_id": LOG_ID, "anchor_identity": ANCHORER.identity} | case.options)
    return lines


# Trails up to the entry that breaks the rule


def planned(**rule: Any) -> Trail:
    """A transfer whose first two steps are done."""
    rules = {name: each.model_copy(update=rule) for name, each in RULES.items()}
    return Trail(rules=rules).start().check_policy().build().execute(0).execute(1)


def approve(trail: Trail, index: int = 2) -> Trail:
    return trail.ask(index).decide(index, "bob", True, 1).decide(index, "carol", True, 2)


def monitoring(upto: int = 0) -> Trail:
    """A task without approvals under the pinned policy, with so many steps done."""
    trail = Trail("monitor_wallet", {"wallet_address": WALLET}).start().check_policy().build()
    for index in range(upto):
        trail.execute(index)
    return trail


def instructed() -> Trail:
    rules = RULES | {"paint": RULES["monitoring"]}
    return Trail("paint", {"colour": "green"}, rules).start().check_policy().build().execute(0).begin(1)


def edit(trail: Trail, at: int = -1, *, input: Any = None, output: Any = None, **text: Any) -> Trail:  # noqa: A002
    """Change an entry, and hash and chain the trail anew. A dict is merged into the entry's input or output."""
    before, input_, output_ = trail.entries[at]
    said = [json.loads(input_), json.loads(output_)]
    for side, changes in enumerate((input, output)):
        if isinstance(changes, dict) and isinstance(said[side], dict):
            merged = {**said[side], **changes}
            said[side] = {name: value for name, value in merged.items() if value is not ...}
        elif changes is not None:
            said[side] = changes
    hashes = {"input_hash": salted_hash(SALT, said[0]), "output_hash": salted_hash(SALT, said[1])}
    entry = canonical_json(json.loads(before) | hashes | text)
    trail.entries[at] = (entry, canonical_json(said[0]), canonical_json(said[1]))
    return rechain(trail)


def rechain(trail: Trail, first: int = 1) -> Trail:
    prev, entries = "0" * 64, []
    for seq, (text, input_, output) in enumerate(trail.entries, start=first):
        linked = canonical_json(json.loads(text) | {"seq": seq, "prev": prev})
        prev = leaf_hash(linked)
        entries.append((linked, input_, output))
    trail.entries, trail.prev = entries, prev
    return trail


def later(trail: Trail, **by: float) -> Trail:
    trail.moment += timedelta(**by)
    return trail


def with_plan(trail: Trail, change: Callable[[dict[str, Any]], Any]) -> Trail:
    """Build another plan than the request makes; its hash is right."""
    said = json.loads(trail.check_policy().build().entries[-1][2])
    change(said)
    text, input_, _ = trail.entries.pop()
    hashes = {"output_hash": salted_hash(SALT, said), "plan_hash": sha256_hex(canonical_json(said))}
    trail.entries.append((canonical_json(json.loads(text) | hashes), input_, canonical_json(said)))
    return rechain(trail)


def under(trail: Trail, index: int, action: str, version: int = 4, **rule: Any) -> Trail:
    """Begin a step when another version of the policy is in force than the pinned one."""
    text = policy_text(RULES | {action: RULES[action].model_copy(update=rule)}, version=version)
    trail.later = [text]
    return trail.begin(index, policy_of(text).decide(action))


def with_document(change: Callable[[dict[str, Any]], Any]) -> Case:
    """A task whose policy document is another one than the system writes."""
    document = json.loads(policy_text())
    change(document)
    text = canonical_json(document)
    trail = Trail("self_destruct").start().check_policy().end("denied")
    policy_id = f"policy-v{document.get('version')}-{sha256_hex(text)}"
    edit(trail, 1, output={"policy_id": policy_id}, policy_id=policy_id)
    edit(trail, 2, policy_id=policy_id)
    trail.policy_text = text
    return of_trail(trail)


def by_another_hash() -> Case:
    trail, policy_id = Trail().start().check_policy(), f"policy-v3-{'0' * 64}"
    bundle = edit(trail, output={"policy_id": policy_id}, policy_id=policy_id).bundle(ANCHORER)
    return of_bundle(bundle | {"policies": {"0" * 64: policy_text()}}, open_=True)


def without_link() -> Case:
    trail = Trail().start()
    trail.prev = "1" * 64
    return of_trail(trail.end("cancelled", "alice"))


def change_rule(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda document: document["rules"]["transfer_funds"].update(changes)


def with_rule(*actions: str) -> Callable[[dict[str, Any]], Any]:
    """Add the rule for monitoring under other names."""
    return lambda document: document["rules"].update(dict.fromkeys(actions, document["rules"]["monitoring"]))


def drop(bundle: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in bundle.items() if key != name}


def anchored(sent: bytes, bundle: dict[str, Any]) -> dict[str, Any]:
    from qaes.domain.qubic import transaction

    decoded = transaction.decode(sent)
    said = {"payload": decoded.payload.hex(), "txid": decoded.id, "tick": decoded.tick}
    return bundle | {"anchor": said | {"transaction": base64.b64encode(sent).decode()}}


def with_entry(bundle: dict[str, Any], at: int, **changes: Any) -> dict[str, Any]:
    bundle = deepcopy(bundle)
    bundle["entries"][at] |= changes
    return bundle


def backwards() -> Case:
    """Each entry is in the anchored log, and the second is before the first."""
    trail, log = denied(), Log()
    log.append(*(text for text, _, _ in reversed(trail.entries)))
    entries = [TrailEntry(*each, 2 - number) for number, each in enumerate(trail.entries)]
    sent = ANCHORER.transaction(log.anchor().encode()).encode()
    return of_bundle(
        build_bundle(
            log_id=LOG_ID, network="mock", task_id=TASK_ID, salt=SALT, entries=entries, prove=log.prove,
            anchored=sent, policies=[trail.policy_text],
        )
    )  # fmt: skip


def not_anchored() -> Case:
    return of_bundle(SMALL | {"anchor": None})


SMALL = denied().bundle(ANCHORER)
GOOD = transferred().bundle(ANCHORER)
NESTED = "[" * 600 + "]" * 600
ASK_AGAIN = "it was decided, and is asked again"
CANCEL = {"status": "cancelled", "actor": "compliance"}


def entry_says(old: str, new: str) -> Case:
    bundle = deepcopy(SMALL)
    assert old in bundle["entries"][0]["text"]
    bundle["entries"][0]["text"] = bundle["entries"][0]["text"].replace(old, new)
    return of_bundle(bundle)


def decided(**changes: Any) -> Case:
    return of_trail(edit(planned().ask(2).decide(2, "bob", True, 1), output=changes))


def asked(**changes: Any) -> Case:
    return of_trail(planned().ask(2, **changes))


def begun(**changes: Any) -> Case:
    return of_trail(approve(planned()).begin(2, **changes))


def moved(**changes: Any) -> Case:
    return of_trail(edit(approve(planned()).execute(2), output=changes))


def failed(**changes: Any) -> Case:
    return of_trail(edit(planned().end("failed"), output=changes))


def planned_for(trail: Trail, **changes: Any) -> Case:
    return of_trail(with_plan(trail.start(), lambda plan: plan.update(changes)))


def with_step(at: int, **changes: Any) -> Case:
    return of_trail(with_plan(Trail().start(), lambda plan: plan["steps"][at].update(changes)))


def of_transfer(**changes: Any) -> Case:
    """Asked for and planned: the system itself would refuse it."""
    trail = Trail().start().check_policy().build()
    request = {"parameters": trail.request["parameters"] | changes}
    plan = json.loads(trail.entries[-1][2])
    plan["steps"][2]["parameters"] |= changes
    edit(trail, 0, input=request)
    return of_trail(edit(trail, input=request, output=plan, plan_hash=sha256_hex(canonical_json(plan))))


def started(**changes: Any) -> Case:
    trail = Trail()
    trail.request |= changes
    return of_trail(trail.start())


def two_documents() -> Case:
    """Pinned under one document of version 3; the step begins under another one, of version 3 as well."""
    return of_trail(under(monitoring(), 0, "monitoring", version=3, risk_level="high"))


def decided_by_another_rule() -> Case:
    trail = Trail().start().check_policy(approvals=1)
    return of_trail(trail)


def other_action() -> Case:
    """Decided by the rule for something harmless."""
    trail, decision = Trail().start(), Trail().policy.decide("monitoring")
    trail.policy_id = decision.policy_id
    said = {"action_type": "monitoring", "risk_level": "low"}
    return of_trail(trail.record("policy_checked", "planner", "allowed", said, decision.model_dump(mode="json")))


ROWS: dict[str, dict[str, Callable[..., Case | Trail]]] = {
    # The file and the chain
    "R1 json": {
        "a number with an exponent": lambda: of_bundle(
            canonical_json(SMALL).replace('"index":1,', '"index":1e0,').encode()
        ),
        "a member twice": lambda: of_bundle(canonical_json(SMALL).replace('{"anchor"', '{"salt":"","anchor"').encode()),
        "NaN": lambda: entry_says('"seq":1', '"seq":NaN'),
        "not UTF-8": lambda: of_bundle(b"\xff"),
        "an empty file": lambda: of_bundle(b""),
    },
    "R2 json": {
        "the file": lambda: of_bundle(NESTED.encode()),
        "an input": lambda: of_bundle(with_entry(SMALL, 0, input=NESTED)),
        "a request": lambda: started(parameters={"a": json.loads(NESTED[350:-350])}),
        "many more": lambda: of_bundle(b"[" * 100_000),
    },
    "R3 format": {
        "a member more": lambda: of_bundle(SMALL | {"more": 1}),
        "a member less": lambda: of_bundle(drop(SMALL, "salt")),
        "an index that is a boolean": lambda: of_bundle(with_entry(SMALL, 0, index=True)),
        "a malformed salt": lambda: of_bundle(SMALL | {"salt": SALT.upper()}),
        "another network": lambda: of_bundle(SMALL | {"network": "testnet"}),
        "no entries": lambda: of_bundle(SMALL | {"entries": []}),
        "an error response": lambda: of_bundle({"title": "Not Found", "status": 404, "detail": "no such task"}),
        "an error of the gateway": lambda: of_bundle({"message": "Unauthorized"}),
    },
    "R4 log": {"another log": lambda: Case(SMALL, {"log_id": "another"})},
    "R5 task": {"another task": lambda: of_bundle(SMALL, task_id=TASK_ID[:-1] + "2")},
    "R6 network": {"another network": lambda: of_bundle(SMALL, network="mainnet")},
    "R7 text": {
        "version 2": lambda: edit(Trail().start(), v=2),
        "no nonce": lambda: edit(Trail().start(), nonce=""),
        "a member more": lambda: edit(Trail().start(), more=""),
        "a boolean for a number": lambda: edit(Trail().start(), v=True),
    },
    "R8 seq": {"from 2 on": lambda: rechain(denied(), first=2)},
    "R9 prev": {"another entry": without_link},
    "R10 input": {"another input": lambda: edit(Trail().start(), input_hash="0" * 64)},
    "R10 output": {"another output": lambda: edit(Trail().start(), output_hash="0" * 64)},
    # The anchor
    "R11 anchor": {"none": not_anchored},
    "R12 anchor": {
        "an amount": lambda: of_bundle(
            anchored(ANCHORER.transaction(bytes.fromhex(SMALL["anchor"]["payload"]), amount=1).encode(), SMALL)
        ),
        "another tick": lambda: of_bundle(SMALL | {"anchor": SMALL["anchor"] | {"tick": 1}}),
        "not base64": lambda: of_bundle(SMALL | {"anchor": SMALL["anchor"] | {"transaction": "\u00e9"}}),
    },
    "R13 anchor": {
        "another version": lambda: of_bundle(
            anchored(ANCHORER.transaction(b"QAES\x02" + bytes.fromhex(SMALL["anchor"]["payload"])[5:]).encode(), SMALL)
        ),
    },
    "R14 identity": {"another identity": lambda: Case(SMALL, {"anchor_identity": Anchorer("b" * 55).identity})},
    "R15 index": {
        "backwards": backwards,
        "beyond the size": lambda: of_bundle(with_entry(SMALL, 0, index=99)),
        "a gap": lambda: of_bundle(with_entry(SMALL, 0, index=None, proof=None)),
    },
    "R16 proof": {"another proof": lambda: of_bundle(with_entry(SMALL, 0, proof=["0" * 64] * 3))},
    "R17 txid": {"another id": lambda: of_bundle(SMALL | {"anchor": SMALL["anchor"] | {"txid": "a" * 60}})},
    "R18 signature": {
        "another signature": lambda: of_bundle(
            anchored(base64.b64decode(SMALL["anchor"]["transaction"])[:-64] + bytes(64), SMALL)
        ),
    },
    "R19 complete": {
        "no end": lambda: of_bundle(transfer().bundle(ANCHORER)),
        "no outcome": lambda: of_bundle(approve(planned()).begin(2).end("failed").bundle(ANCHORER)),
        "not anchored": lambda: of_bundle(transferred().bundle(ANCHORER, unanchored=1)),
    },
    "R20 rpc": {"a node without it": lambda: of_bundle(SMALL, rpc="http://127.0.0.1:1")},
    "R21 whole log": {"a log that is not there": lambda: of_bundle(SMALL, log="/nowhere")},
    # Every entry
    "R23 text": {
        "no such kind": lambda: edit(Trail().start().end("cancelled", "alice"), kind="task_forgotten"),
        "no such actor": lambda: edit(Trail().start().check_policy(), actor="worker"),
        "no such status": lambda: edit(Trail().start(), status="running"),
        "undeliverable by a person": lambda: edit(
            approve(planned()).close("approval_undeliverable", 2), actor="bob", output={"actor": "bob"}
        ),
    },
    "R24 text": {
        "an end of a step": lambda: edit(planned().end("failed"), step_index=2),
        "a plan of a step": lambda: edit(Trail().start().check_policy().build(), step_id="step_1"),
    },
    "R25 text": {
        "started without a requester": lambda: edit(Trail().start(), actor="", input={"requester": ""}),
        "decided by the worker": lambda: planned().ask(2).decide(2, "worker", True, 1),
        "decided by the ledger": lambda: planned().ask(2).decide(2, "ledger", True, 1),
        "retried by the reconciler": lambda: planned().end("failed").retry("reconciler"),
        "cancelled by the execution": lambda: planned().end("cancelled", "execution"),
    },
    "R26 text": {
        "completed by a person": lambda: transfer().end("completed", "alice"),
        "failed by a person": lambda: planned().end("failed", "alice"),
        "denied by the reconciler": lambda: planned().end("denied", "reconciler"),
        "expired by the reconciler": lambda: planned().ask(2).close("approval_expired", 2).end("expired", "reconciler"),
        "rejected by the worker": lambda: planned().ask(2).decide(2, "bob", False, 0).end("rejected", "worker"),
    },
    "R27 text": {
        "yesterday": lambda: edit(Trail().start(), timestamp="yesterday"),
        "no such day": lambda: edit(Trail().start(), timestamp="2026-02-30T12:00:00.000Z"),
        "no time of expiry": lambda: asked(expires_at="2026-11-24"),
    },
    "R28 time": {"six minutes back": lambda: later(planned(), minutes=-6).ask(2)},
    "R29 text": {
        "started twice": lambda: Trail().start().start(),
    },
    "R30 end": {
        "it ends twice": lambda: transferred().end("failed"),
        "begun after it failed": lambda: monitoring().end("failed").begin(0),
        "refused after its end": lambda: monitoring().end("failed").refuse(0),
        "decided after its end": lambda: planned().ask(2).end("failed").decide(2, "bob", True, 1),
    },
    # Request and plan
    "R31 input": {
        "a plan of another request": lambda: edit(
            Trail().start().check_policy().build(), input={"description": "another"}
        ),
        "an end of another request": lambda: edit(planned().end("failed"), input={"request_hash": "0" * 64}),
        "a retry without its hash": lambda: edit(planned().end("failed").retry(), input={"request_hash": ...}),
        "a description that is a number": lambda: started(description=1),
    },
    "R32 input": {"started by another": lambda: edit(Trail().start(), actor="mallory")},
    "R33 task": {
        "a request of another task": lambda: started(task_id=TASK_ID[:-1] + "2"),
        "an answer about another task": lambda: edit(Trail().start(), output={"task_id": TASK_ID[:-1] + "2"}),
        "an answer about no task": lambda: edit(Trail().start(), output={"task_id": ...}),
    },
    "R34 input": {
        "an agent without a name": lambda: started(agent=""),
        "an agent that is true": lambda: started(agent=True),
    },
    "R34 output": {
        "retried by a list": lambda: planned().end("failed").retry(agent=[]),
        "cancelled by a number": lambda: planned().end("cancelled", "alice", agent=7),
    },
    "R35 policy": {
        "decided twice": lambda: Trail().start().check_policy().check_policy(),
        "pinned to another later": lambda: edit(planned(), policy_id="policy-v9-" + "0" * 64),
        "not the one that decided": lambda: edit(Trail().start().check_policy(), policy_id="policy-v9-"),
        "pinned before it was decided": lambda: edit(Trail().start(), policy_id="policy-v9-"),
    },
    "R36 plan": {
        "a second plan": lambda: Trail().start().check_policy().build().build(),
        "another plan's hash": lambda: edit(planned(), plan_hash="0" * 64),
    },
    "R37 plan": {
        "of another task": lambda: planned_for(Trail(), task_id="task_2"),
        "under another decision": lambda: with_plan(Trail().start(), lambda plan: plan["policy"].update(approvals=1)),
        "of another analysis": lambda: with_plan(
            Trail().start(), lambda plan: plan["analysis"].update(risk_level="low")
        ),
    },
    "R38 plan": {
        "no steps": lambda: planned_for(Trail(), steps=[]),
        "another step": lambda: with_step(0, parameters={"wallet_address": TARGET}),
        "it pays more": lambda: with_step(2, parameters={"from_address": WALLET, "to_address": TARGET, "amount": 101}),
        "a step of another name": lambda: with_step(1, step_id="step_9"),
    },
    "R39 plan": {
        "a negative amount": lambda: of_transfer(amount=-5),
        "no amount": lambda: of_transfer(amount=0),
        "an amount that is true": lambda: of_transfer(amount=True),
        "half an amount": lambda: of_transfer(amount=0.5),
        "an amount in words": lambda: of_transfer(amount="100"),
        "more than there is": lambda: of_transfer(amount=10**15 + 1),
        "an address that is a number": lambda: of_transfer(amount=1, to_address=7),
        "an empty address": lambda: of_transfer(amount=1, to_address=""),
    },
    # Approvals
    "R40 approval": {
        "about a step that is done": lambda: monitoring(2).ask(1, required=1),
        "about a step that comes later": lambda: monitoring(1).ask(2, required=1),
        "under another name": lambda: edit(planned().ask(2), step_id="step_9"),
    },
    "R40 step": {
        "out of order": lambda: monitoring().begin(1),
        "a step that is done": lambda: planned().begin(1),
        "as another type": lambda: edit(monitoring().begin(0), step_type="policy_check"),
    },
    "R41 approval": {
        "about another plan": lambda: asked(plan_hash="0" * 64),
        "about another step": lambda: asked(step_hash="0" * 64),
        "under another policy": lambda: asked(policy_id="policy-v9-"),
        "required is true": lambda: monitoring(2).ask(2, required=True),
        "no round": lambda: edit(planned().ask(2), input={"round": ...}),
    },
    "R42 approval": {
        "while people are asked": lambda: planned().ask(2).ask(2),
        "after a no": lambda: planned().ask(2).decide(2, "bob", False, 0).ask(2),
        "after it expired": lambda: planned().ask(2).close("approval_expired", 2).ask(2),
        "after enough have approved": lambda: approve(planned()).ask(2),
        "about the next step, after a no": lambda: (
            monitoring(1)
            .begin(1)
            .end("failed")
            .retry()
            .ask(1, required=1)
            .decide(1, "bob", False, 0)
            .finish(1)
            .ask(2, required=1, round=1)
        ),
    },
    "R43 approval": {
        "after it was begun": lambda: approve(planned()).begin(2).ask(2),
        "after it failed": lambda: approve(planned()).execute(2, {"error": "x"}, "failed").ask(2),
        "after it was refused": lambda: planned().refuse(2).ask(2),
    },
    "R44 approval": {
        "a round again": lambda: planned().ask(2).close("approval_expired", 2).end("expired").retry().ask(2, round=1),
        "a negative round": lambda: asked(round=-1),
        "round 0": lambda: asked(round=0),
        "a round left out": lambda: asked(round=2),
    },
    "R45 output": {
        "another actor": lambda: edit(planned().ask(2), output={"actor": "bob"}),
        "another status": lambda: edit(planned().ask(2), output={"status": "approved"}),
        "a decision by another": lambda: edit(planned().ask(2).decide(2, "bob", True, 1), actor="dave"),
    },
    "R46 approval": {
        "no approver was asked": lambda: edit(planned().ask(2).decide(2, "bob", True, 1), input={"round": 9}),
        "approved after a no": lambda: planned().ask(2).decide(2, "bob", False, 0).decide(2, "carol", True, 1),
        "a reminder after the decision": lambda: approve(planned()).close("approval_reminder", 2),
        "undeliverable, and not decided": lambda: planned().ask(2).close("approval_undeliverable", 2),
    },
    "R47 time": {
        "expired at once": lambda: edit(
            planned().ask(2).close("approval_expired", 2), timestamp="2026-11-23T12:00:30.000Z"
        ),
    },
    "R48 approval": {
        "on another plan": lambda: decided(plan_hash="0" * 64),
        "on another step": lambda: decided(step_hash="0" * 64),
        "a no as a yes": lambda: edit(
            planned().ask(2).decide(2, "bob", False, 0), status="approved", output={"status": "approved"}
        ),
        "no reason": lambda: decided(reason=...),
        "a reason that is null": lambda: planned().ask(2).decide(2, "bob", True, 1, reason=None),
        "approved is 1": lambda: decided(approved=1),
    },
    "R49 four eyes": {
        "the requester": lambda: planned().ask(2).decide(2, "alice", True, 1),
        "the requester rejects": lambda: planned().ask(2).decide(2, "alice", False, 0),
        "the requester, with a space": lambda: planned().ask(2).decide(2, "alice ", True, 1),
        "the requester, with a variation selector": lambda: planned().ask(2).decide(2, "ali\ufe0fce", True, 1),
        "the requester, with a blank of Braille": lambda: planned().ask(2).decide(2, "alice\u2800", True, 1),
        "the requester, with a zero-width space": lambda: planned().ask(2).decide(2, "\u200balice", True, 1),
        "who retried it": lambda: planned().end("failed").retry("olivia").ask(2).decide(2, "olivia", True, 1),
        "who retried it before": lambda: (
            planned().end("failed").retry("olivia").end("failed").retry("alice").ask(2).decide(2, "olivia", True, 1)
        ),
        "who retried it, otherwise composed": lambda: (
            planned().end("failed").retry("Zo\u00eb").ask(2).decide(2, "Zoe\u0308", True, 1)
        ),
    },
    "R50 four eyes": {
        "an agent approves": lambda: planned().ask(2).decide(2, "bob", True, 1, agent="client-7"),
        "an agent rejects": lambda: planned().ask(2).decide(2, "bob", False, 0, agent=""),
    },
    "R51 approval": {
        "bob and bob": lambda: planned().ask(2).decide(2, "bob", True, 1).decide(2, "bob", True, 2),
        "bob approves and rejects": lambda: planned().ask(2).decide(2, "bob", True, 1).decide(2, "bob", False, 1),
    },
    "R52 approval": {
        "too late": lambda: planned().ask(2, seconds=1).decide(2, "bob", True, 1),
        "at another time": lambda: decided(decided_at="2026-11-23T12:00:00.000Z"),
    },
    "R53 approval": {
        "more than there are": lambda: decided(approvals=2),
        "a rejection that counts": lambda: planned().ask(2).decide(2, "bob", False, 1),
    },
    # Steps
    "R54 step": {
        "another step": lambda: begun(step_hash="0" * 64),
        "another run": lambda: begun(run=2),
        "attempt 0": lambda: begun(attempt=0),
        "no attempt": lambda: edit(approve(planned()).begin(2), input={"attempt": ...}),
        "run is true": lambda: begun(run=True),
    },
    "R55 step": {
        "begun twice": lambda: monitoring().begin(0).begin(0),
        "begun again after it failed": lambda: monitoring().execute(0, {"error": "x"}, "failed").begin(0),
        "begun after it was refused": lambda: monitoring().refuse(0).begin(0),
    },
    "R56 step": {
        "while an approval is pending": lambda: monitoring(2).ask(2, required=1).begin(2, approval=1),
        "after a no": lambda: monitoring(2).ask(2, required=1).decide(2, "bob", False, 0).begin(2),
        "the next step, after a no": lambda: (
            monitoring(1)
            .begin(1)
            .end("failed")
            .retry()
            .ask(1, required=1)
            .decide(1, "bob", False, 0)
            .finish(1)
            .begin(2, approval=None)
        ),
    },
    "R57 step": {
        "another approval": lambda: begun(approval=2),
        "an approval that does not exist": lambda: monitoring(2).begin(2, approval=1),
        "not the one that was given": lambda: begun(approval=None),
        "the approval of another step": lambda: (
            monitoring(1)
            .begin(1)
            .end("failed")
            .retry()
            .ask(1, required=1)
            .decide(1, "bob", True, 1)
            .finish(1)
            .begin(2, approval=1)
        ),
    },
    "R58 step": {
        "two days after it expired": lambda: later(approve(planned()), days=3).begin(2),
        "an hour after it expired": lambda: later(approve(planned()), seconds=86_400 + 3600).begin(2),
    },
    "R59 step": {
        "other parameters": lambda: edit(monitoring().execute(0), input={"wallet_address": TARGET}),
        "of another type": lambda: edit(approve(planned()).execute(2), input={"amount": "100"}),
    },
    "R60 output": {
        "no error": lambda: monitoring().execute(0, {}, "failed"),
        "an error that is null": lambda: monitoring().execute(0, {"error": None}, "failed"),
        "an empty error": lambda: monitoring().execute(0, {"error": ""}, "failed"),
        "an error of a successful step": lambda: moved(error="expired: its tick passed"),
        "a result that is a list": lambda: edit(monitoring().execute(0), output=[1]),
    },
    "R61 step": {
        "begun is 0": lambda: monitoring().execute(0, {"error": "x", "begun": 0}, "failed"),
        "it succeeded, and was not begun": lambda: moved(begun=False),
    },
    "R62 step": {
        "refused, and it was begun": lambda: monitoring().begin(0).refuse(0),
        "refused twice": lambda: monitoring().refuse(0).refuse(0),
    },
    "R63 step": {
        "never begun": lambda: approve(planned()).finish(2, {"error": "x"}, "failed"),
        "two outcomes": lambda: (
            approve(planned()).execute(2, {"error": "x"}, "failed").finish(2, {"error": "x"}, "failed")
        ),
    },
    "R64 step": {
        "an empty txid": lambda: moved(txid=""),
        "no txid": lambda: moved(txid=...),
        "a malformed txid": lambda: moved(txid="A" * 60),
        "no tick": lambda: moved(tick=...),
        "tick 0": lambda: moved(tick=0),
        "a tick that is true": lambda: moved(tick=True),
        "a tick that no ledger has": lambda: moved(tick=2**32),
        "an instruction without a tick": lambda: edit(instructed().finish(1), output={"tick": ...}),
        "an instruction without a txid": lambda: edit(instructed().finish(1), output={"txid": ""}),
    },
    "R65 step": {
        "another network": lambda: moved(network="mainnet"),
        "no network": lambda: moved(network=...),
        "an empty network": lambda: moved(network=""),
    },
    "R66 step": {
        "another amount": lambda: moved(amount=999),
        "the amount in words": lambda: moved(amount="100"),
        "to another address": lambda: moved(to_address=WALLET),
        "without a source address": lambda: moved(from_address=None),
    },
    "R67 step": {
        "by a run that there was not": lambda: moved(run=2),
        "by the run before": lambda: moved(run=0),
        "run is true": lambda: moved(run=True),
    },
    "R68 step": {
        "null": lambda: moved(simulated=None),
        "false": lambda: moved(simulated=False),
        "an empty text": lambda: moved(simulated=""),
    },
    "R69 step": {
        "another instruction": lambda: edit(instructed().finish(1), output={"instruction_hash": "0" * 64}),
        "none": lambda: edit(instructed().finish(1), output={"instruction_hash": ...}),
    },
    # Ends and retries
    "R70 end": {
        "a completed task": lambda: transferred().retry(),
        "a rejected task": lambda: planned().ask(2).decide(2, "bob", False, 0).end("rejected").retry(),
        "a cancelled task": lambda: planned().end("cancelled", "alice").retry(),
        "a denied task": lambda: planned().end("denied").retry(),
        "a task that has not ended": lambda: planned().retry(),
    },
    "R71 output": {
        "run 3 after run 1": lambda: edit(planned().end("failed").retry(), output={"run": 3}),
        "run 1 again": lambda: edit(planned().end("failed").retry(), output={"run": 1}),
        "it starts over": lambda: edit(planned().end("failed").retry(), status="pending"),
    },
    "R72 output": {
        "another end": lambda: failed(status="denied"),
        "no reason": lambda: failed(reason=...),
        "a reason that is a number": lambda: failed(reason=1),
        "no failed step": lambda: failed(failed_step=...),
        "a step that the plan has not": lambda: failed(failed_step="step_9"),
    },
    "R73 end": {
        "it failed": lambda: planned().ask(2).decide(2, "bob", False, 0).end("failed"),
        "it failed, recorded by the reconciler": lambda: (
            planned().ask(2).decide(2, "bob", False, 0).end("failed", "reconciler")
        ),
        "it was denied": lambda: planned().ask(2).decide(2, "bob", False, 0).end("denied"),
        "it was cancelled": lambda: planned().ask(2).decide(2, "bob", False, 0).end("cancelled", "alice"),
        "it failed after a late confirmation": lambda: (
            approve(planned()).begin(2).end("failed").retry().ask(2).decide(2, "dave", False, 0).finish(2).end("failed")
        ),
        "it failed in its second run": lambda: (
            planned().end("failed").retry().ask(2).decide(2, "bob", False, 0).end("failed")
        ),
    },
    "R74 end": {
        "completed, with a step missing": lambda: approve(planned()).end("completed"),
        "completed, without a plan": lambda: Trail().start().check_policy().end("completed"),
        "rejected without a decision": lambda: planned().end("rejected"),
        "rejected in the run before": lambda: approve(planned()).end("failed").retry().end("rejected"),
        "expired, and no approval was pending": lambda: planned().end("expired"),
        "denied, and all was done": lambda: transfer().end("denied"),
    },
    # The policy
    "R75 policy": {"another hash": by_another_hash},
    "R76 policy": {
        "version 0": lambda: with_document(lambda document: document.update(version=0)),
        "version -1": lambda: with_document(lambda document: document.update(version=-1)),
        "a version that is true": lambda: with_document(lambda document: document.update(version=True)),
        "another format": lambda: with_document(lambda document: document.update(format=3)),
        "rules that are a list": lambda: with_document(lambda document: document.update(rules=[])),
        "a rule that is null": lambda: with_document(lambda document: document["rules"].update(x=None)),
        "approvals 0": lambda: with_document(change_rule(approvals=0)),
        "approvals 11": lambda: with_document(change_rule(approvals=11)),
        "approvals null": lambda: with_document(change_rule(approvals=None)),
        "approvals true": lambda: with_document(change_rule(approvals=True)),
        "a negative amount": lambda: with_document(change_rule(max_amount=-1)),
        "an amount in words": lambda: with_document(change_rule(max_amount="5", daily_limit=6)),
        "open for no time": lambda: with_document(change_rule(expires_after=0)),
        "a daily limit below the amount": lambda: with_document(change_rule(max_amount=2, daily_limit=1)),
        "no addresses": lambda: with_document(change_rule(allowed_addresses=[])),
        "addresses that are a text": lambda: with_document(change_rule(allowed_addresses=TARGET)),
        "an address twice": lambda: with_document(change_rule(allowed_addresses=[TARGET, TARGET])),
        "no such risk": lambda: with_document(change_rule(risk_level="none")),
        "allowed is 1": lambda: with_document(change_rule(allowed=1)),
        "an unknown limit": lambda: with_document(change_rule(weekly_limit=5)),
        "an empty address": lambda: with_document(change_rule(allowed_addresses=[""])),
        "an address in another spelling": lambda: with_document(change_rule(allowed_addresses=[TARGET.upper()])),
        "a version beyond all": lambda: with_document(lambda document: document.update(version=10**9)),
        "a member more": lambda: with_document(lambda document: document.update(suspended=True)),
        "proposed by a number": lambda: with_document(lambda document: document.update(proposed_by=7)),
        "based on nothing": lambda: with_document(lambda document: document.update(based_on="")),
        "no format": lambda: with_document(lambda document: document.pop("format")),
        "a rule for no action type": lambda: with_document(with_rule("transfer funds")),
        "a rule with a name that looks like another": lambda: with_document(with_rule("tr\u0430nsfer_funds")),
        "201 rules": lambda: with_document(with_rule(*(f"rule_{number}" for number in range(199)))),
        "more than 64 KiB": lambda: with_document(lambda document: document.update(proposed_by="o" * 65_536)),
    },
    "R77 policy": {"two documents of one version": two_documents},
    "R78 policy": {
        "a document is missing": lambda: of_bundle(SMALL | {"policies": {}}),
        "a document that nothing refers to": lambda: of_bundle(
            SMALL | {"policies": SMALL["policies"] | {sha256_hex(policy_text(version=9)): policy_text(version=9)}}
        ),
    },
    "R79 policy": {
        "fewer approvals": decided_by_another_rule,
        "a member more": lambda: Trail().start().check_policy(extra=1),
        "allowed without a rule": lambda: edit(
            Trail("destroy").start().check_policy(), status="allowed", output={"allowed": True}
        ),
        "begun by the rule for something else": lambda: approve(planned()).begin(
            2, Trail().policy.decide("monitoring")
        ),
    },
    "R80 policy": {
        "another action": other_action,
        "another risk": lambda: edit(Trail().start().check_policy(), input={"risk_level": "low"}),
    },
    "R81 policy": {"marked as denied": lambda: edit(Trail().start().check_policy(), status="denied")},
    "R82 plan": {"a plan for a denied action": lambda: Trail("destroy").start().check_policy().build()},
    "R83 plan": {"no approval is required": lambda: with_step(2, requires_approval=False)},
    "R84 approval": {"one is asked, and two are needed": lambda: asked(required=1)},
    "R85 approval": {
        "a second too long": lambda: planned().ask(2, seconds=86_401),
        "no time": lambda: planned().ask(2, seconds=0),
        "closed before it was asked for": lambda: planned().ask(2, seconds=-60),
        "31 days, where the policy names no time": lambda: planned(expires_after=None).ask(2, seconds=31 * 86_400),
    },
    "R86 policy": {
        "marked as not pinned": lambda: edit(monitoring(1).execute(1), output={"pinned": False}),
        "pinned is 1": lambda: edit(monitoring(1).execute(1), output={"pinned": 1}),
    },
    "R87 step": {"the policy in force denies it": lambda: under(monitoring(), 0, "monitoring", allowed=False)},
    "R88 step": {
        "no approver was asked": lambda: planned().begin(2),
        "the policy in force asks": lambda: under(monitoring(2), 2, "monitoring", requires_approval=True),
        "the policy in force asks more people": lambda: under(approve(planned()), 2, "transfer_funds", approvals=3),
        "an approval of the run before": lambda: approve(planned()).end("failed").retry().begin(2),
    },
    "R89 step": {
        "max_amount": lambda: approve(planned(max_amount=99)).begin(2),
        "daily_limit": lambda: approve(planned(daily_limit=99)).begin(2),
        "max_amount in force": lambda: under(approve(planned()), 2, "transfer_funds", max_amount=99),
    },
    "R90 step": {
        "allowed_addresses": lambda: approve(planned(allowed_addresses=(WALLET,))).begin(2),
        "allowed_addresses in force": lambda: under(
            approve(planned()), 2, "transfer_funds", allowed_addresses=(WALLET,)
        ),
    },
}


def followed(folder: Path) -> Case:
    """Genuine, from before a retry, which the log has."""
    log, trail = Log(), planned().end("failed")
    bundle = trail.bundle(ANCHORER, log=log)
    log.append(*(text for text, _, _ in trail.retry().entries[-1:]))
    return of_bundle(bundle, log=log.write(folder))


def in_log(row: Callable[[Path], tuple[dict[str, Any], str]]) -> Callable[[Path], Case]:
    def made(folder: Path) -> Case:
        bundle, log = row(folder)
        return of_bundle(bundle, log=log)

    return made


WITH_LOG = {name: in_log(row) for name, row in IN_LOG.items()} | {"a retry follows": followed}
ROWS |= POLICY_ROWS | {"R109 whole log": {name: WITH_LOG[name] for name in IN_LOG}}
ROWS["R22 later"] = {"a retry follows": followed}
CASES = [(rule, name) for rule, variants in ROWS.items() for name in variants]


def make(rule: str, name: str, folder: Path) -> Case:
    row = ROWS[rule][name]
    made = row(folder) if name in WITH_LOG else row()
    if isinstance(made, dict):
        return of_bundle(made)
    return of_trail(made) if isinstance(made, Trail) else made


STRUCTURAL = {"R1", "R2", "R3", "R11", "R12", "R20", "R21", "R27"}
"""Without these there is nothing that could be looked at further."""
NOT_ALONE = {
    ("R15 index", "beyond the size"),  # nor is there a proof
    ("R15 index", "a gap"),
    ("R91 text", "a state with another member"),  # nor does it follow from the one before
}
"""Each of these breaks another rule as well."""


@pytest.mark.parametrize(("rule", "name"), CASES)
def test_broken_rule_is_refused_and_no_other(rule: str, name: str, tmp_path: Path) -> None:
    case, number = make(rule, name, tmp_path), rule.split(maxsplit=1)[0]
    with pytest.raises(verifier.Failed) as caught:
        verify(case)
    assert f"{caught.value.rule} {caught.value.check}" == rule
    assert str(caught.value).endswith(f" [{number}]")
    if number in STRUCTURAL or (rule, name) in NOT_ALONE:
        return
    with not_enforced(verifier, number), suppress(KeyError, TypeError, AttributeError):  # it used an unchecked value
        assert verify(case)


def test_every_documented_rule_has_a_row_and_is_in_the_code() -> None:
    pages = [(ROOT / "docs" / name).read_text() for name in ("audit.md", "policy.md")]
    rows = [row for page in pages for row in re.findall(r"^\| (R\d+) \| ([^|]+) \|", page, re.MULTILINE)]
    documented = [f"{number} {check}" for number, checks in rows for check in re.findall("`(.+?)`", checks)]
    assert [number for number, _ in rows] == [f"R{n}" for n in range(1, len(rows) + 1)]
    assert sorted(documented) == sorted(ROWS)
    code = (ROOT / "verifier" / "verify_bundle.py").read_text()
    cited = re.findall(r'"(R\d+) ([a-z ]+|\{(?:side|check)\})"', code)
    assert {number for number, _ in cited} == {number for number, _ in rows}
    assert {f"{number} {check}" for number, check in cited if "{" not in check} <= set(documented)
