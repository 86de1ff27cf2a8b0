"""Trails that break one rule about format 2 of the policy, or about its stream, each as an operator could write it."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

from qaes.domain.canonical import canonical_json, salted_hash, sha256_hex
from qaes.domain.merkle import leaf_hash
from qaes.domain.policy import policy_of
from qaes.domain.policy_events import LEDGER
from tests.support.bundles import SALT, WALLET, Anchorer, Log, Trail, approved
from tests.support.policies import changed
from tests.support.refunds import ORDER, SMALL, Refund, approve, content, last_of, planned, refunded, text_of

ANCHORER = Anchorer()
ADDRESS_OF_A_CONTRACT = "0x0000000000000001"
Bundle = dict[str, Any]


def rewritten(
    trail: Trail,
    change: Callable[[list[dict[str, Any]]], Any],
    *,
    drop: tuple[int, ...] = (),
    log: Log | None = None,
) -> Bundle:
    """Change the policy's entries, and hash, chain and anchor them again; `drop` omits numbers."""
    log = log or Log()
    sent = [
        {"entry": json.loads(each.entry.text), "salt": each.salt}
        | {side: json.loads(getattr(each.entry, side)) for side in ("input", "output")}
        for each in trail.policy_entries(Log())
    ]
    change(sent)
    prev, places = "0" * 64, []
    for each in sent:
        entry = each["entry"] | {f"{side}_hash": salted_hash(each["salt"], each[side]) for side in ("input", "output")}
        if each.get("linked", True):
            entry["prev"] = prev
        text = canonical_json(entry)
        prev = leaf_hash(text)
        texts = {"text": text, "input": canonical_json(each["input"]), "output": canonical_json(each["output"])}
        places.append(texts | {"salt": each["salt"], "index": log.append(text)[0], "seq": entry["seq"]})
    trail.changes, changes = [], trail.changes
    bundle = trail.bundle(ANCHORER, log=log)
    trail.changes = changes
    size = len(log.texts)
    for each in places:
        each["proof"] = [node.hex() for node in log.prove(each["index"], size)]
    entries = [{name: each[name] for name in each if name != "seq"} for each in places if each["seq"] not in drop]
    return bundle | {"format": "qaes-bundle-2", "policy_entries": entries}


def with_policy(change: Callable[[list[dict[str, Any]]], Any] = lambda _: None, **more: Any) -> Bundle:
    """A refund that is genuine but for the entries of the policy."""
    return rewritten(refunded(), change, **more)


def say(at: int, **text: Any) -> Callable[[list[dict[str, Any]]], Any]:
    """Change members of an entry of the policy; `input` and `output` are merged into those."""

    def change(sent: list[dict[str, Any]]) -> None:
        for side in ("input", "output"):
            sent[at][side] |= text.pop(side, {})
        sent[at]["entry"] |= text

    return change


def with_suspension(*kinds: tuple[str, str]) -> Refund:
    """A refund before its action, and the policy's changes a minute later."""
    trail = approve(planned(), "bob", "carol")
    for number, (kind, actor) in enumerate(kinds):
        trail.change(kind, actor, name="refund_customer", seconds=60 + number)
    return trail


def ended(trail: Trail, minutes: float = 20) -> Trail:
    trail.moment += timedelta(minutes=minutes)
    return trail.execute(last_of(trail)).end("completed")  # type: ignore[arg-type]


def suspended(*kinds: tuple[str, str], minutes: float = 20) -> Trail:
    return ended(with_suspension(("action_suspended", "olivia"), *kinds), minutes)


def resumed_alone() -> Bundle:
    trail = with_suspension(("action_suspended", "olivia"), ("resume_requested", "oscar"), ("action_resumed", "olivia"))
    return rewritten(ended(trail), say(5, actor="oscar"))


PROPOSED, APPROVED = ("policy_proposed", "olivia"), ("policy_approved", "oscar")
REJECTED, IN_FORCE = ("policy_rejected", "oscar"), ("policy_in_force", LEDGER)


def resumed_a_day_late() -> Trail:
    """Resumed on a request that had ended, two days after it was made."""
    trail = with_suspension(("action_suspended", "olivia"), ("resume_requested", "oscar"))
    trail.change("action_resumed", "olivia", name="refund_customer", seconds=2 * 86_400)
    trail.moment += timedelta(days=3)
    return trail.end("cancelled", "alice")


def requested_by_nobody() -> Bundle:
    """The state at the beginning has a request to resume that no person made."""
    trail = Refund()
    for kind, actor in (("action_suspended", "olivia"), ("resume_requested", "oscar")):
        trail.change(kind, actor, name="refund_customer", seconds=-7200)
    trail.start().check_policy().end("cancelled", "alice")
    return rewritten(
        trail,
        lambda sent: sent[3]["output"]["suspended"]["refund_customer"].update(resume_requested_by=""),
    )


def in_force_by(*changes: tuple[str, str], seconds: float = -86_400, **document: Any) -> Trail:
    """A refund whose version came into force by these changes, or whose document has another author or number."""
    trail = Refund(enacted=False)
    trail.policy_text = text_of(content(), **document)
    trail.policy = policy_of(trail.policy_text)
    for kind, actor in changes:
        trail.change(kind, actor, policy_id=trail.policy.policy_id, seconds=seconds)
    return trail.start().check_policy().end("cancelled", "alice")


def with_version(version: int, seconds: float) -> Trail:
    """A refund, and another version in force from that time on."""
    trail = Refund()
    trail.change("policy_in_force", LEDGER, policy_id=f"policy-v{version}-{'0' * 64}", seconds=seconds)
    return trail.start().check_policy().end("cancelled", "alice")


def limited_reader() -> Trail:
    """The claim of a step that only reads states a limit."""
    trail = Refund().start().check_policy().build()  # type: ignore[attr-defined]
    step, fields = trail.of_step(0)
    said = {"step_hash": step.hash(), "run": 1, "attempt": 1, "approval": None}
    output = trail.decision().model_dump(mode="json") | {"limits": [{"used": -5}]}
    return trail.record("step_started", "worker", "running", said, output, **fields)  # type: ignore[no-any-return]


def forgotten() -> Bundle:
    """The state after a suspension does not have it."""
    return rewritten(suspended(), say(3, output={"suspended": {}}))


def resumed_without_request() -> Bundle:
    trail = with_suspension(("action_suspended", "olivia"), ("resume_requested", "oscar"), ("action_resumed", "olivia"))

    def change(sent: list[dict[str, Any]]) -> None:
        for each in (sent[3], sent[4]):
            each["entry"] |= {"kind": "action_suspended", "step_type": "action_suspended", "status": "suspended"}
            seq = each["entry"]["seq"]
            each["output"]["suspended"] = {"refund_customer": {"event": seq, "resume_requested_by": None}}

    return rewritten(ended(trail), change)


def without_baseline() -> Bundle:
    """The first entry of the bundle is from the task's time, although others are before it."""
    trail = suspended(("resume_requested", "oscar"), ("action_resumed", "olivia"))
    return rewritten(trail, lambda _: None, drop=(4,))


def decided_as(**changes: Any) -> Trail:
    """A refund of 50,000 whose records of the decision differ from the document."""
    return lied(Refund(), **changes)


def lied(trail: Refund, **changes: Any) -> Trail:
    """Falsify every record of the decision in the same way."""
    decision = trail.decision().model_dump(mode="json") | changes
    made = type(trail.decision()).model_validate(decision)
    trail.decision = lambda: made  # type: ignore[method-assign]
    return trail.start().check_policy()


def denied_as_allowed(parameters: dict[str, Any], made: dict[str, Any], agent: str | None = None) -> Trail:
    """A request that the document denies, with a record that allows it."""
    return lied(Refund(parameters, made, agent=agent), allowed=True, tier=0)


def approved_by(*people: str, made: dict[str, Any] | None = None) -> Trail:
    trail = approve(planned(None, made), *people)
    return trail.begin(last_of(trail))


def under(rule: dict[str, Any], *people: str, **changes: Any) -> Trail:
    """Begin the action when another version is in force than the pinned one."""
    trail = planned()
    trail.later = [text_of(content(rule, **changes), version=4)]
    newer = policy_of(trail.later[0])
    trail.enact(newer, seconds=1)
    trail.moment += timedelta(minutes=20)
    return approve(trail, *people).begin(last_of(trail), newer)


def used(number: int, *people: str, **changes: Any) -> Trail:
    """Begin a small refund whose limits had used so much."""
    trail = planned(SMALL)
    if people:
        approve(trail, *people)
    return trail.begin(last_of(trail), used=number, **changes)


def claiming(change: Callable[[list[dict[str, Any]]], Any]) -> Trail:
    """A small refund whose claim states other limits than its policy has."""
    trail = used(0)
    text, input_, output = trail.entries.pop()
    said = json.loads(output)
    change(said["limits"])
    entry = json.loads(text) | {"output_hash": salted_hash(SALT, said)}
    text = canonical_json(entry)
    trail.entries.append((text, input_, canonical_json(said)))
    trail.prev = leaf_hash(text)
    return trail


def to_a_contract(**changes: str) -> Trail:
    parameters = {"wallet_address": WALLET, "to_address": ADDRESS_OF_A_CONTRACT, "amount": 5} | changes
    with patch("qaes.domain.planning.check_payable"):
        trail = planned(parameters, task_type="transfer_funds")
    return approve(trail, "bob", "dora").begin(last_of(trail))


def with_document(path: str, value: Any) -> Trail:
    """A denied task whose document of format 2 is another one than the service accepts."""
    trail = Refund({"order_id": "123456", "amount": 900_000}, enacted=False)
    text = canonical_json(changed(json.loads(trail.policy_text), path, value))
    policy_id = f"policy-v3-{sha256_hex(text)}"
    trail.policy_text, trail.policy = text, trail.policy.model_copy(update={"policy_id": policy_id})
    trail.enact()
    return trail.start().check_policy().end("denied")


def by_the_author() -> Bundle:
    return with_policy(say(1, actor="olivia"))


def changed_meanwhile(folder: Path) -> tuple[Bundle, str]:
    """Genuine, but the log has a change of the policy while the task ran, which the bundle lacks."""
    trail, log = approve(planned(), "bob", "carol"), Log()
    trail.execute(last_of(trail)).end("completed")
    bundle = trail.bundle(ANCHORER, log=log)
    trail.change("action_suspended", name="refund_customer", seconds=-1)
    text = json.loads(trail.policy_entries(Log())[-1].entry.text)
    log.append(canonical_json(text | {"prev": leaf_hash(bundle["policy_entries"][-1]["text"])}))
    return bundle, log.write(folder)


def another_in_the_log(folder: Path) -> tuple[Bundle, str]:
    """The log has two entries with the number of the last one."""
    trail, log = refunded(), Log()
    bundle = trail.bundle(ANCHORER, log=log)
    log.append(bundle["policy_entries"][-1]["text"])
    return bundle, log.write(folder)


def false_time(folder: Path) -> tuple[Bundle, str]:
    """The bundle begins with an entry that seems to be from before the task; the log has a suspension before it."""
    trail, log = approve(planned(), "bob", "carol"), Log()
    trail.change("action_suspended", name="refund_customer", seconds=1)
    trail.change("policy_proposed", policy_id=f"policy-v8-{'0' * 64}", seconds=-7200)
    bundle = rewritten(ended(trail), say(4, output={"suspended": {}}), drop=(4,), log=log)
    return bundle, log.write(folder)


def rejected_before(folder: Path) -> tuple[Bundle, str]:
    """The version was rejected before another operator approved it; the bundle lacks the rejection."""
    log = Log()
    return in_force_by(PROPOSED, REJECTED, APPROVED, IN_FORCE).bundle(ANCHORER, log=log), log.write(folder)


def of_format_1(folder: Path) -> tuple[Bundle, str]:
    """A transfer while it was suspended, without the entries of the policy."""
    trail, log = approved().change("action_suspended", seconds=1), Log()
    trail.moment += timedelta(minutes=20)
    bundle = trail.execute(2).end("completed").bundle(ANCHORER, log=log)
    del bundle["policy_entries"]
    return bundle | {"format": "qaes-bundle-1"}, log.write(folder)


def guessed() -> Bundle:
    trail = refunded().change("policy_rejected", policy_id=f"policy-v9-{'0' * 64}")
    return rewritten(trail, say(3, kind="policy_guessed", step_type="policy_guessed"))


def again(sent: list[dict[str, Any]]) -> None:
    sent[1]["entry"] |= {"seq": 1, "prev": "0" * 64}
    sent[1]["linked"] = False


def unlinked(sent: list[dict[str, Any]]) -> None:
    sent[1]["entry"]["prev"] = "1" * 64
    sent[1]["linked"] = False


def later_numbers(sent: list[dict[str, Any]]) -> None:
    for each in sent:
        each["entry"]["seq"] += 1


def swapped(sent: list[dict[str, Any]]) -> None:
    """Have the approval come before the proposal."""
    for at, kind, status, actor in (
        (0, "policy_approved", "approved", "oscar"),
        (1, "policy_proposed", "proposed", "olivia"),
    ):
        sent[at]["entry"] |= {"kind": kind, "step_type": kind, "status": status, "actor": actor}


def early() -> Trail:
    trail = Refund(enacted=False).enact(seconds=400)
    return trail.start().check_policy().end("cancelled", "alice")


def without_entries() -> Trail:
    return Refund(enacted=False).start().check_policy().end("cancelled", "alice")


POLICY_ROWS: dict[str, dict[str, Callable[[], Any]]] = {
    "R91 text": {
        "another stream": lambda: with_policy(say(0, stream="keys")),
        "no such kind": guessed,
        "another status": lambda: with_policy(say(0, status="approved")),
        "about a step": lambda: with_policy(say(0, step_id="step_1")),
        "about a plan": lambda: with_policy(say(0, plan_hash="0" * 64)),
        "by nobody": lambda: with_policy(say(1, actor=" ")),
        "by a part of the system": lambda: with_policy(say(1, actor="planner")),
        "a request to resume without a person": requested_by_nobody,
        "approved by the ledger": lambda: with_policy(say(1, actor="ledger")),
        "in force by a person": lambda: with_policy(say(2, actor="olivia")),
        "about another version than its number": lambda: with_policy(say(1, policy_id=f"policy-v3-{'0' * 64}")),
        "a state with another member": lambda: with_policy(say(2, output={"more": 1})),
        "no version in force": lambda: with_policy(
            lambda sent: [say(at, output={"in_force": "latest"})(sent) for at in (0, 1)]
        ),
    },
    "R92 seq": {"a number twice": lambda: with_policy(again)},
    "R93 prev": {
        "another one before": lambda: with_policy(unlinked),
        "no first one": lambda: with_policy(later_numbers),
    },
    "R94 state": {
        "a suspension that is forgotten": forgotten,
        "in force without coming into force": lambda: with_policy(say(1, output={"in_force": f"policy-v2-{'0' * 64}"})),
        "resumed without a request": resumed_without_request,
    },
    "R95 four eyes": {
        "resumed by the operator who requested it": resumed_alone,
        "resumed on a request that had ended": resumed_a_day_late,
    },
    "R96 seq": {"an entry is left out while the task ran": without_baseline},
    "R97 step": {
        "suspended": suspended,
        "a request to resume is no resumption": lambda: suspended(("resume_requested", "oscar")),
        "every action is suspended": lambda: ended(
            approve(planned(), "bob", "carol").change("action_suspended", name="*", seconds=5)
        ),
    },
    "R98 policy": {
        "no approval": lambda: with_policy(drop=(2,)),
        "no coming into force": lambda: with_policy(drop=(3,)),
        "proposed by another person": lambda: with_policy(say(0, actor="otto")),
        "approved before it was proposed": lambda: with_policy(swapped),
        "a later version without a proposal": lambda: in_force_by(IN_FORCE, version=7, proposed_by=None),
        "approved twice": lambda: in_force_by(PROPOSED, APPROVED, ("policy_approved", "otto"), IN_FORCE),
        "rejected": lambda: in_force_by(PROPOSED, APPROVED, REJECTED, IN_FORCE, seconds=-200),
        "rejected after it was in force": lambda: in_force_by(PROPOSED, APPROVED, IN_FORCE, REJECTED, seconds=-200),
        "another document of its number in force": lambda: with_version(3, -4000),
        "an older version in force again": lambda: with_version(2, -4000),
    },
    "R99 four eyes": {"approved by its author": by_the_author},
    "R100 policy": {"used before it was in force": early},
    "R101 policy": {"no entries of the policy": without_entries},
    "R102 policy": {
        "another unit": lambda: with_document("actions.refund_customer.unit", "a b"),
        "a group that does not exist": lambda: with_document("rules.refund_customer.tiers.1.approvers", "nobody"),
        "a member that no rule has": lambda: with_document("rules.refund_customer.exempt", ["mallory"]),
        "signatures": lambda: with_document("rules.refund_customer.tiers.1.signature", True),
        "roots": lambda: with_document("roots", ["key_1"]),
        "tiers that fall": lambda: with_document("rules.refund_customer.tiers.0.max_amount", 300_000),
    },
    "R103 policy": {
        "the first tier, for an amount of the second": lambda: decided_as(tier=0, approvals=0, requires_approval=False),
        "fewer approvals": lambda: decided_as(approvals=1),
        "another group": lambda: decided_as(approvers="cfo"),
        "any approver": lambda: decided_as(approvers=None),
        "more time": lambda: decided_as(expires_after=None),
        "limits of a step that only reads": limited_reader,
        "another risk": lambda: lied(Refund(), risk_level="low"),
        "beyond every tier": lambda: denied_as_allowed({"order_id": "123456", "amount": 900_000}, content()),
        "no amount": lambda: denied_as_allowed({"order_id": "123456", "amount": "5"}, content()),
        "another requester": lambda: denied_as_allowed(ORDER, content({"requesters": ["user:bob"]})),
        "of no group": lambda: denied_as_allowed(ORDER, content({"requesters": ["group:finance"]})),
        "by an agent": lambda: denied_as_allowed(ORDER, content({"requesters": ["user:alice"]}), agent="client-7"),
        "another destination": lambda: denied_as_allowed(ORDER, content({"destinations": ["654321"]})),
        "beyond an empty window": lambda: denied_as_allowed(
            ORDER,
            content({"limits": [{"window_seconds": 60, "max_amount": 9, "per": "action", "over": "deny"}]}),
        ),
    },
    "R104 step": {
        "one of another group": lambda: approved_by("bob", "erin"),
        "no longer of the group": lambda: under(
            {}, "bob", "carol", groups={"finance": ["bob", "dora"], "cfo": ["erin"]}
        ),
        "not yet of the group": lambda: under(
            {}, "bob", "frank", groups={"finance": ["bob", "frank"], "cfo": ["erin"]}
        ),
        "the group of the version in force": lambda: under(
            {"tiers": [{"max_amount": None, "approvals": 1, "approvers": "cfo"}]}, "carol", "dora"
        ),
    },
    "R105 step": {
        "none": lambda: claiming(lambda limits: limits.clear()),
        "one less": lambda: claiming(lambda limits: limits.pop()),
        "another window": lambda: claiming(lambda limits: limits[0].update(key="other")),
        "another maximum": lambda: claiming(lambda limits: limits[0].update(maximum=10**9)),
        "less added": lambda: claiming(lambda limits: limits[0].update(add=1)),
        "less than nothing used": lambda: claiming(lambda limits: limits[0].update(used=-1)),
    },
    "R106 step": {"beyond a limit that denies": lambda: used(499_600, "bob")},
    "R107 step": {
        "beyond a limit without a request": lambda: used(20),
        "beyond a limit, by another group": lambda: used(20, "erin"),
    },
    "R108 step": {
        "to a smart contract": to_a_contract,
        "from a smart contract": lambda: to_a_contract(wallet_address=ADDRESS_OF_A_CONTRACT, to_address=WALLET),
    },
}  # fmt: skip


IN_LOG: dict[str, Callable[[Path], tuple[Bundle, str]]] = {
    "a change while the task ran": changed_meanwhile,
    "an entry twice": another_in_the_log,
    "a suspension before an entry with a false time": false_time,
    "a rejection of the version that the task used": rejected_before,
    "a suspension, and a bundle of format 1": of_format_1,
}
"""For rule R109."""
