#!/usr/bin/env python3
"""Check a task's audit bundle, offline: Python's standard library, one file, no network unless asked.

    python verify_bundle.py bundle.json --log-id qaes --anchor-identity ABC...

Formats and rules: docs/audit.md and docs/policy.md, which number each rule (R1 ...); a failure names its rule. Exit
status 0: all checks held, and the report says what was not checked. 1: the first check that failed. 2: called wrongly.
Written apart from the program that makes the bundles.

What to trust is given by you: the name of the log and the identity that anchors it. The rest follows, in this order:

    JSON        the file is JSON without surprises, and has the members of a bundle
    Chain       every entry has its canonical text and names the one before it; inputs and outputs have their hashes
    Anchor      the transaction on the ledger carries the log's size and root; every entry is included under that root
    Story       what was decided follows from the policy; who approved; what ran is what was asked for and approved
    Qubic       the transaction's id and signature (K12, FourQ, SchnorrQ)
    Network     if asked: the ledger has the transaction; the whole log has these entries of the task, and no others
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import http.client
import json
import os
import re
import sys
import unicodedata
import urllib.error
import urllib.request
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

if sys.version_info < (3, 11):  # noqa: UP036 - this file must parse, and say so, on an older Python too
    sys.stderr.write(f"verify_bundle.py needs Python 3.11 or later; this is Python {sys.version.split()[0]}\n")
    sys.exit(2)

TEXTS = (
    "log_id", "task_id", "step_id", "step_type", "kind", "actor", "status", "input_hash", "output_hash", "plan_hash",
    "policy_id", "nonce", "prev", "timestamp",
)  # fmt: skip
ENTRY = dict.fromkeys(TEXTS, str) | dict.fromkeys(("v", "seq", "step_index"), int)
NONE = type(None)
BUNDLE: dict[str, Any] = dict.fromkeys(("format", "log_id", "network", "task_id", "salt"), str)
BUNDLE |= {"entries": list, "anchor": (dict, NONE), "policies": dict}
SENT = {"text": str, "input": str, "output": str, "index": (int, NONE), "proof": (list, NONE)}
DEPTH = 250
DEEP = f"nested more than {DEPTH} levels deep"
FORMS = {
    "hash": r"[0-9a-f]{64}", "salt": r"[0-9a-f]{32}", "time": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z",
    "txid": r"[a-z]{60}", "task": r"task_[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    "action": r"[A-Za-z0-9_.-]{1,64}", "address": r"0x[0-9a-f]{16,40}|[A-Z]{60}",
    "policy": r"policy-v[1-9][0-9]{0,8}-[0-9a-f]{64}",
}  # fmt: skip


class Failed(Exception):  # noqa: N818 - it is an answer
    """A check that does not hold, and where. `rule` is the rule's number in the documentation and the check's name."""

    def __init__(self, rule: str, message: str, where: str = "bundle") -> None:
        self.rule, _, self.check = rule.partition(" ")
        self.where = where
        super().__init__(f"FAILED {self.check} ({where}): {message} [{self.rule}]")


def need(holds: bool, rule: str, message: str, where: str = "bundle") -> None:
    if not holds:
        raise Failed(rule, message, where)


def has_form(value: Any, form: str) -> bool:
    return isinstance(value, str) and re.fullmatch(FORMS[form], value, re.ASCII) is not None


# JSON -----------------------------------------------------------------------------------------------------------------


def parse(text: str, where: str, *, fractions: bool) -> Any:
    """Read JSON strictly: no duplicate keys, no NaN, no lone surrogates; fractions and exponents only if allowed."""

    def members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        need(len(dict(pairs)) == len(pairs), "R1 json", "a key stands twice", where)
        return dict(pairs)

    def fraction(digits: str) -> float:
        need(fractions and digits[-1].isdigit(), "R1 json", f"{digits} is no integer", where)  # nor NaN, nor Infinity
        return float(digits)

    def integer(digits: str) -> float:
        # Beyond 2^53 a number of JSON is whatever double is nearest: the canonical text shows whether it is that one.
        return int(digits) if len(digits) < 17 and abs(int(digits)) < 2**53 else fraction(digits)

    try:
        text.encode()
        numbers: dict[str, Any] = {"parse_constant": fraction, "parse_float": fraction, "parse_int": integer}
        value = json.loads(text, object_pairs_hook=members, **numbers)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise Failed("R2 json", DEEP, where) from None
    except ValueError as error:
        raise Failed("R1 json", f"not JSON in UTF-8: {type(error).__name__}", where) from None
    level = [value]
    for _ in range(DEPTH):
        inner = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, (dict, list))]
        level = [each for values in inner for each in values]
    need(not level, "R2 json", DEEP, where)
    return value


def canonical(value: Any) -> str:
    """The text of RFC 8785."""
    if isinstance(value, dict):
        # Keys are sorted by UTF-16 code units.
        keys = sorted(value, key=lambda key: key.encode("utf-16-be"))
        return "{" + ",".join(canonical(key) + ":" + canonical(value[key]) for key in keys) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(canonical, value)) + "]"
    return ecmascript(value) if isinstance(value, float) else json.dumps(value, ensure_ascii=False)


def ecmascript(number: float) -> str:
    """A double as JavaScript writes it: the shortest digits, with an exponent below 1e-6 and from 1e21 on."""
    if number == 0 or 1e-6 <= abs(number) < 1e21:
        return f"{Decimal(repr(number or 0.0)):f}".removesuffix(".0")
    return re.sub("e([+-])0", r"e\1", repr(number))


def same(one: Any, other: Any) -> bool:
    """Whether two values have one text: to Python, 1, 1.0 and True are equal."""
    return canonical(one) == canonical(other)


def parse_canonical(text: str, rule: str, where: str) -> Any:
    value = parse(text, where, fractions=True)
    need(canonical(value) == text, rule, "not a canonical text", where)
    return value


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def members(value: Any, types: dict[str, Any], rule: str, where: str, *, exactly: bool = False) -> dict[str, Any]:
    """Check that an object has these members, each of its type (a bool is no integer)."""
    need(isinstance(value, dict), rule, "not an object", where)
    need(not exactly or set(value) == set(types), rule, "not exactly the members that belong there", where)
    for name, kind in types.items():
        kinds = kind if isinstance(kind, tuple) else (kind,)
        need(name in value and type(value[name]) in kinds, rule, f"{name} is missing, or of another type", where)
    return dict(value)


# The bundle and its chain ---------------------------------------------------------------------------------------------


def read_bundle(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode()
    except UnicodeDecodeError:
        raise Failed("R1 json", "not UTF-8") from None
    value = parse(text, "bundle", fractions=False)
    if isinstance(value, dict) and "entries" not in value and {"detail", "message"} & set(value):
        said = canonical({name: value[name] for name in ("detail", "message", "status") if name in value})
        raise Failed("R3 format", f"an error response of the API, not a bundle: {said[:300]}")
    bundle = members(value, BUNDLE, "R3 format", "bundle", exactly=True)
    need(bundle["format"] == "qaes-bundle-1", "R3 format", "not a bundle of this format")
    need(bundle["network"] in ("mock", "mainnet"), "R3 format", "there is no such network")
    need(has_form(bundle["salt"], "salt"), "R3 format", "not a salt")
    need(has_form(bundle["task_id"], "task"), "R3 format", "not the id of a task")
    need(len(bundle["entries"]) > 0, "R3 format", "there are no entries")
    for number, each in enumerate(bundle["entries"], start=1):
        members(each, SENT, "R3 format", f"entry {number}", exactly=True)
    for hash_, document in bundle["policies"].items():
        held = isinstance(document, str) and sha256(document) == hash_
        need(held, "R75 policy", "not the document of this hash", hash_)
    return bundle


def check_chain(bundle: dict[str, Any], log_id: str) -> list[dict[str, Any]]:
    """Each entry's text, its place in the task's chain, and what its two hashes are of."""
    need(bundle["log_id"] == log_id, "R4 log", "of another log than the pinned one")
    prev, entries = "0" * 64, []
    for seq, sent in enumerate(bundle["entries"], start=1):
        where = f"entry {seq}"
        value = parse_canonical(sent["text"], "R7 text", where)
        entry = members(value, ENTRY, "R7 text", where, exactly=True)
        need(entry["v"] == 1, "R7 text", "an entry of another version", where)
        need(has_form(entry["nonce"], "salt"), "R7 text", "not a nonce", where)
        need(entry["log_id"] == log_id, "R4 log", "of another log than the pinned one", where)
        need(entry["task_id"] == bundle["task_id"], "R5 task", "of another task", where)
        need(entry["seq"] == seq, "R8 seq", f"its number is {entry['seq']}", where)
        need(entry["prev"] == prev, "R9 prev", "does not name the entry before", where)
        for side in ("input", "output"):
            value = parse_canonical(sent[side], f"R10 {side}", where)
            # The canonical text of the two members is put together from canonical texts.
            salted = sha256('{"salt":"' + bundle["salt"] + '","value":' + sent[side] + "}")
            need(entry[f"{side}_hash"] == salted, f"R10 {side}", f"not what the {side}'s hash is of", where)
            entry[side] = value
        prev = leaf_hash(sent["text"].encode()).hex()
        entries.append(entry | {"where": where, "leaf": bytes.fromhex(prev)})
    return entries


# The log and its anchor (RFC 6962) ------------------------------------------------------------------------------------


def leaf_hash(data: bytes) -> bytes:
    return hashlib.sha256(b"\x00" + data).digest()


def node_hash(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def root_of(leaves: list[bytes]) -> bytes:
    """The root of a tree (RFC 6962, section 2.1): what is left is the largest power of two below its size."""
    if len(leaves) == 1:
        return leaves[0]
    left = 1 << (len(leaves) - 1).bit_length() - 1
    return node_hash(root_of(leaves[:left]), root_of(leaves[left:]))


def root_by(leaf: bytes, index: int, size: int, proof: list[bytes], where: str) -> bytes:
    """The root to which an inclusion proof leads (RFC 6962, section 2.1.1): its last hash is the other half's root."""
    need(0 <= index < size, "R15 index", f"a log of {size} has no entry {index}", where)
    if size == 1:
        need(not proof, "R16 proof", "the proof is too long", where)
        return leaf
    need(bool(proof), "R16 proof", "the proof is too short", where)
    left, (*rest, other) = 1 << (size - 1).bit_length() - 1, proof
    if index < left:
        return node_hash(root_by(leaf, index, left, rest, where), other)
    return node_hash(other, root_by(leaf, index - left, size - left, rest, where))


def check_anchor(bundle: dict[str, Any], log_id: str, identity: str) -> dict[str, Any]:
    """The transaction, what it carries, and from whom; its signature is checked at the end."""
    need(bundle["anchor"] is not None, "R11 anchor", "nothing is anchored yet: this proves nothing to anybody")
    types = {"payload": str, "transaction": str, "txid": str, "tick": int}
    anchor = members(bundle["anchor"], types, "R3 format", "anchor", exactly=True)
    try:
        sent = base64.b64decode(anchor["transaction"], validate=True)
    except ValueError:
        raise Failed("R12 anchor", "not base64", "anchor") from None
    need(
        base64.b64encode(sent).decode() == anchor["transaction"],
        "R12 anchor",
        "not base64 in its one form",
        "anchor",
    )
    need(len(sent) == 80 + 93 + 64, "R12 anchor", "not a transaction with an anchor", "anchor")
    little = [int.from_bytes(sent[at:end], "little") for at, end in ((64, 72), (72, 76), (76, 78), (78, 80))]
    need(
        little == [0, anchor["tick"], 0x5141, 93],
        "R12 anchor",
        "not the header of an anchor for this tick",
        "anchor",
    )
    need(sent[:32] == sent[32:64], "R12 anchor", "not from an identity to itself", "anchor")
    payload = sent[80:173]
    need(payload.hex() == anchor["payload"], "R12 anchor", "the transaction carries another payload", "anchor")
    need(payload[:5] == b"QAES\x01", "R13 anchor", "not an anchor of this version", "anchor")
    need(payload[5:13] == hashlib.sha256(log_id.encode()).digest()[:8], "R4 log", "an anchor of another log", "anchor")
    need(letters(sent[:32]) == identity, "R14 identity", "not from the pinned identity", "anchor")
    size, sequence = int.from_bytes(payload[13:21], "little"), int.from_bytes(payload[85:], "little")
    need(size > 0, "R13 anchor", "an anchor of an empty log", "anchor")
    first = payload[53:85] == bytes(32)
    need(first == (sequence == 0), "R13 anchor", "the first, and no other, has none before", "anchor")
    return anchor | {"bytes": sent, "size": size, "root": payload[21:53], "sequence": sequence}


def check_inclusion(bundle: dict[str, Any], entries: list[dict[str, Any]], anchor: dict[str, Any]) -> int:
    """Count the entries that are in the anchored log; those that are not come last."""
    last = -1
    for number, (sent, entry) in enumerate(zip(bundle["entries"], entries, strict=True)):
        if sent["index"] is None or sent["proof"] is None:
            rest = bundle["entries"][number:]
            need(all(each["index"] is each["proof"] is None for each in rest), "R15 index", "a gap", entry["where"])
            return number
        hashes = all(has_form(each, "hash") for each in sent["proof"])
        need(hashes, "R16 proof", "not a list of hashes", entry["where"])
        proof = [bytes.fromhex(each) for each in sent["proof"]]
        root = root_by(entry["leaf"], sent["index"], anchor["size"], proof, entry["where"])
        need(
            root == anchor["root"],
            "R16 proof",
            "the proof leads to another root than the anchored one",
            entry["where"],
        )
        need(sent["index"] > last, "R15 index", "before the entry before it", entry["where"])
        last = sent["index"]
    return len(entries)


# The story ------------------------------------------------------------------------------------------------------------


SKEW = 300  # seconds: functions have clocks of their own; by more than that no entry is older than one before it
LATE = 3600  # seconds after an approval's time in which a step may still begin by it: retries and deliveries take time
MOST = 10**15  # QU: the supply is of that order
ACTIONS = {  # action: the type of the step that performs it, and the parameters of the step from those of the request
    "transfer_funds": (
        "onchain_action",
        {"to_address": "to_address", "amount": "amount", "from_address": "wallet_address"},
    ),
    "monitoring": ("monitor_action", {"wallet_address": "wallet_address", "alert_threshold": "alert_threshold"}),
}
NEEDS_APPROVAL = ("generic_action", *(type_ for type_, _ in ACTIONS.values()))
INVISIBLE = (  # and printable
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2800\u3164\ufe00-\ufe0f\uffa0\U000e0100-\U000e01ef]"
)
PARTS = ("planner", "compliance", "worker", "execution", "reconciler")
KINDS = {  # kind: who checks it, by whom it is (None: a person, or by its status), what its status may be
    "task_started": ("_start", None, "pending"),
    "policy_checked": ("_policy", "planner", "allowed", "denied"),
    "plan_built": ("_plan", "planner", "planned"),
    "approval_requested": ("_ask", "compliance", "pending"),
    "approval_decided": ("_decide", None, "approved", "rejected"),
    "approval_reminder": ("_close", "reconciler", "pending"),
    "approval_expired": ("_close", "compliance", "expired"),
    "approval_cancelled": ("_close", "compliance", "cancelled"),
    "approval_undeliverable": ("_close", "execution", "undeliverable"),
    "step_started": ("_claim", "worker", "running"),
    "step_executed": ("_outcome", "worker", "succeeded", "failed"),
    "task_retried": ("_retry", None, "pending", "executing"),
    "task_ended": ("_end", None, "completed", "denied", "rejected", "expired", "failed", "cancelled"),
}
TEXT = (str, NONE)
REQUEST = {"task_id": str, "task_type": str, "description": str, "parameters": dict, "requester": str}
ASKED = {"plan_hash": str, "step_hash": str, "policy_id": str, "round": int, "required": int, "expires_at": str}
DECIDED = {"approved": bool, "reason": str, "approvals": int, "decided_at": str, "plan_hash": str, "step_hash": str}
CLAIM = {"step_hash": str, "run": int, "attempt": int, "approval": (int, NONE)}
RULE = {"allowed": bool, "requires_approval": bool, "risk_level": str}
RANGES = {"approvals": 10, "expires_after": 2_592_000, "max_amount": MOST, "daily_limit": MOST}
LIMITS: dict[str, Any] = dict.fromkeys(("expires_after", "max_amount", "daily_limit"), (int, NONE))
LIMITS |= {"approvals": int, "allowed_addresses": (list, NONE)}
DOCUMENT = {"format": int, "version": int, "rules": dict, "proposed_by": TEXT, "based_on": TEXT}
ABSENT: dict[str, Any] = dict.fromkeys(LIMITS) | {"approvals": 1}
DENIED = {"allowed": False, "requires_approval": True, "risk_level": "high"}


def moment(text: str, where: str) -> float:
    try:
        need(has_form(text, "time"), "R27 text", "not a time", where)
        return datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise Failed("R27 text", "not a time", where) from None


def place_of(entry: dict[str, Any]) -> tuple[int, str, str]:
    return entry["step_index"], entry["step_id"], entry["step_type"]


def read_document(text: str, hash_: str) -> dict[str, Any]:
    """A policy document, each rule in its full form."""
    rule, written = "R76 policy", parse_canonical(text, "R76 policy", hash_)
    need(isinstance(written, dict) and same(written.get("format"), 1), rule, "not a document of format 1", hash_)
    document = members({"proposed_by": None, "based_on": None} | written, DOCUMENT, rule, hash_, exactly=True)
    based_on, rules = document["based_on"], document["rules"]
    numbered = 0 < document["version"] < 10**9 and (based_on is None or has_form(based_on, "policy"))
    need(numbered, rule, "no version, or based on none", hash_)
    need(len(rules) <= 200 and len(text.encode()) <= 2**16, rule, "more than 200 rules, or than 64 KiB", hash_)
    for action, given in rules.items():
        need(has_form(action, "action"), rule, "a rule for what is no action type", hash_)
        full = members(ABSENT | members(given, RULE, rule, hash_), LIMITS, rule, hash_)
        # What this verifier does not know might be a limit.
        known = all(name in RULE | LIMITS or value is None for name, value in full.items())
        need(known, rule, f"the rule for {action} has a member that no rule may have", hash_)
        numbers = all(full[name] is None or 0 < full[name] <= most for name, most in RANGES.items())
        where_to, (most, a_day) = full["allowed_addresses"], (full["max_amount"], full["daily_limit"])
        texts = where_to is None or all(has_form(each, "address") for each in where_to)
        once = where_to is None or (texts and 1 <= len(set(where_to)) == len(where_to) <= 100)
        good = numbers and once and (most or 0) <= (a_day or MOST) and full["risk_level"] in ("low", "medium", "high")
        need(good, rule, f"the rule for {action} has a value that no rule may have", hash_)
        rules[action] = full
    return document


def planned(request: dict[str, Any], policy: dict[str, Any]) -> list[list[Any]]:
    """Id, type and parameters of the steps that a request makes; there are no other types of steps."""
    parameters, action = request["parameters"], policy["action_type"]
    wallet = parameters.get("wallet_address")
    steps: list[tuple[str, Any]] = [("check_balance", {"wallet_address": wallet})] if wallet is not None else []
    steps.append(("policy_check", {"action_type": action, "policy_id": policy["policy_id"]}))
    if action in ACTIONS:
        type_, takes = ACTIONS[action]
        steps.append((type_, {name: parameters.get(given) for name, given in takes.items()}))
    else:
        steps.append(("generic_action", {name: request[name] for name in ("task_type", "description", "parameters")}))
    return [[f"step_{number}", *each] for number, each in enumerate(steps, start=1)]


class Story:
    """What the entries tell, one after the other; each may only tell what follows from those before.

    No value in it is changed in place: a copy of its attributes is a copy of its state.
    """

    def __init__(self, policies: dict[str, str], network: str = "") -> None:
        self.network = network
        documents = {hash_: read_document(text, hash_) for hash_, text in policies.items()}
        self.policies = {f"policy-v{each['version']}-{hash_}": each for hash_, each in documents.items()}
        one_each = len({each["version"] for each in documents.values()}) == len(documents)
        need(one_each, "R77 policy", "two documents of one version")
        self.unused = frozenset(self.policies)
        self.request: dict[str, Any] = {}
        self.analysis: dict[str, Any] = {}
        self.policy: dict[str, Any] = {}  # the pinned decision
        self.plan: dict[str, Any] = {}
        self.plan_hash = self.ended = ""
        self.approval: dict[str, Any] = {}  # of this run, not used yet
        self.rounds: dict[int, int] = {}  # by step, the round of the newest approval that was asked for
        self.claim: dict[str, Any] = {}  # the step that was begun, and whose outcome is not on record
        self.done, self.run, self.failed_in, self.rejected_in, self.version, self.newest = 0, 1, 0, 0, 0, 0.0
        self.askers: tuple[str, ...] = ()  # who started the task, or had it run again
        self.approvers: tuple[str, ...] = ()
        self.agents: tuple[str, ...] = ()  # lines of the report, as the next four
        self.notes: tuple[str, ...] = ()
        self.rejections: tuple[str, ...] = ()
        self.effects: tuple[str, ...] = ()  # what ran, failed, or was refused
        self.lost: tuple[str, ...] = ()  # transfers that were begun, and begun anew without an outcome

    def tell(self, entry: dict[str, Any], output_text: str) -> None:
        kind, where = entry["kind"], entry["where"]
        need(kind in KINDS, "R23 text", "there is no such kind", where)
        teller, by, *statuses = KINDS[kind]
        need(by in (None, entry["actor"]) and entry["status"] in statuses, "R23 text", "no such actor or status", where)
        of_step = kind.startswith(("approval_", "step_"))
        need(of_step or place_of(entry) == (-1, "", kind), "R24 text", "it is about no step", where)
        first = kind == "task_started"
        need(first != bool(self.request), "R29 text", "the first entry, and no other, is the task's start", where)
        time = moment(entry["timestamp"], where)
        need(time > self.newest - SKEW, "R28 time", "long before an entry before it", where)
        self.newest = max(self.newest, time)
        open_ = not self.ended or kind in ("task_retried", "step_executed")
        need(open_, "R30 end", "it goes on after its end", where)
        if kind == "plan_built":
            need(not self.plan, "R36 plan", "a second plan", where)
            self.plan_hash = sha256(output_text)
        if kind == "policy_checked":
            need(not self.policy, "R35 policy", "a second decision", where)
        else:
            pinned = entry["policy_id"] == self.policy.get("policy_id", "")
            need(pinned, "R35 policy", "not the pinned policy", where)
        need(entry["plan_hash"] == self.plan_hash, "R36 plan", "not the hash of the task's plan", where)
        if kind in ("task_started", "plan_built"):
            given = members(entry["input"], REQUEST, "R31 input", where)
            need(first or same(given, self.request), "R31 input", "not the request that was made", where)
        if kind in ("task_retried", "task_ended"):
            given = members(entry["input"], {"request_hash": str}, "R31 input", where)
            of_it = given["request_hash"] == sha256(canonical(self.request))
            need(of_it, "R31 input", "of another request", where)
        getattr(self, str(teller))(entry, where)

    def _person(self, entry: dict[str, Any]) -> str:
        """The person who is an entry's actor, in the one form in which two names are compared."""
        visible = "".join(each for each in entry["actor"] if each.isprintable() and not re.match(INVISIBLE, each))
        name = unicodedata.normalize("NFC", visible).strip()
        need(name not in ("", *PARTS), "R25 text", "not done by a person", entry["where"])
        return name

    def _agent(self, entry: dict[str, Any], side: str, did: str) -> None:
        """Report the program through which a person did something, if there was one."""
        agent = entry[side].get("agent")
        good = agent is None or (isinstance(agent, str) and agent != "")
        need(good, f"R34 {side}", "the agent has no name", entry["where"])
        self.agents += (f"agent     {agent} {did} for {entry['actor']}",) if agent else ()

    def _start(self, entry: dict[str, Any], where: str) -> None:
        self.request = entry["input"]
        started = entry["actor"] == self.request["requester"]
        need(started, "R32 input", "not started by the requester", where)
        said = members(entry["output"], {"task_id": str}, "R33 task", where)
        of_it = self.request["task_id"] == said["task_id"] == entry["task_id"]
        need(of_it, "R33 task", "a request of another task", where)
        self.askers = (self._person(entry),)
        self._agent(entry, "input", "started it")

    def _policy(self, entry: dict[str, Any], where: str) -> None:
        types = {"action_type": str, "risk_level": str}
        self.analysis = members(entry["input"], types, "R80 policy", where)
        action, asked = self.analysis["action_type"], self.request["task_type"]
        follows = action == {"monitor_wallet": "monitoring"}.get(asked, asked)
        need(follows, "R80 policy", "another action type", where)
        self.policy = self._decision(entry["output"], where)
        need(self.policy["risk_level"] == self.analysis["risk_level"], "R80 policy", "another risk", where)
        decided = entry["policy_id"] == self.policy["policy_id"]
        need(decided, "R35 policy", "not the policy that decided", where)
        said = "allowed" if self.policy["allowed"] else "denied"
        need(entry["status"] == said, "R81 policy", f"the policy says {said}", where)

    def _decision(self, value: Any, where: str) -> dict[str, Any]:
        """Recompute a decision from the document that it names."""
        types, action = {"policy_id": str, "action_type": str}, self.analysis["action_type"]
        decision = ABSENT | members(value, types, "R79 policy", where)
        known = decision["policy_id"] in self.policies
        need(known, "R78 policy", "its document is not in the bundle", where)
        self.unused -= {decision["policy_id"]}
        document = self.policies[decision["policy_id"]]
        if document["version"] < self.version:  # the last good one, when the newest has been altered; or a lie
            again = f"version {document['version']} after {self.version} ({where})"
            self.notes += (f"NOTE      an older version of the policy was in force again: {again}",)
        self.version = document["version"]
        # An action type without a rule is denied.
        rule = document["rules"].get(action, ABSENT | DENIED)
        says = rule | {"policy_id": decision["policy_id"], "action_type": action}
        # A member that is absent, in a document that is older than the member, is null.
        follows = same(*({name: each for name, each in side.items() if each is not None} for side in (decision, says)))
        need(follows, "R79 policy", "not what the document's rule says", where)
        return decision

    def _plan(self, entry: dict[str, Any], where: str) -> None:
        types: dict[str, Any] = {"task_id": str, "analysis": dict, "policy": dict, "steps": list}
        plan = members(entry["output"], types, "R37 plan", where)
        need(bool(self.policy) and self.policy["allowed"], "R82 plan", "no policy has allowed it", where)
        need(plan["task_id"] == entry["task_id"], "R37 plan", "of another task", where)
        need(same(ABSENT | plan["policy"], self.policy), "R37 plan", "under another policy", where)
        need(same(plan["analysis"], self.analysis), "R37 plan", "under another analysis", where)
        types = {"step_id": str, "type": str, "requires_approval": bool, "parameters": dict}
        steps = [members(step, types, "R38 plan", where) for step in plan["steps"]]
        for step in steps:
            asks = step["requires_approval"] or not self._must_ask(step, self.policy)
            need(asks, "R83 plan", f"{step['step_id']} asks for no approval", where)
        made = [[step["step_id"], step["type"], step["parameters"]] for step in steps]
        need(same(made, planned(self.request, self.policy)), "R38 plan", "not the steps that were asked for", where)
        for moved in (step["parameters"] for step in steps if step["type"] == "onchain_action"):
            whole = type(moved["amount"]) is int and 0 < moved["amount"] <= MOST
            need(whole, "R39 plan", "the amount is no whole number from 1 to 10^15", where)
            named = all(moved[each] and isinstance(moved[each], str) for each in ("from_address", "to_address"))
            need(named, "R39 plan", "a transfer without an address", where)
        self.plan = plan

    def _must_ask(self, step: dict[str, Any], policy: dict[str, Any]) -> bool:
        return policy["requires_approval"] and step["type"] in NEEDS_APPROVAL

    def _step(self, entry: dict[str, Any], check: str) -> dict[str, Any]:
        """The plan's step that an entry is about; steps come in their order, each until it has succeeded."""
        index, steps = entry["step_index"], self.plan.get("steps", [])
        need(0 <= index < len(steps), f"R40 {check}", "the plan has no such step", entry["where"])
        need(index == self.done, f"R40 {check}", "out of order, or a second time", entry["where"])
        named = place_of(entry) == (index, steps[index]["step_id"], steps[index]["type"])
        need(named, f"R40 {check}", "not the plan's step", entry["where"])
        return dict(steps[index])

    def _ask(self, entry: dict[str, Any], where: str) -> None:
        asked = members(entry["input"], ASKED, "R41 approval", where)
        step, before = self._step(entry, "approval"), self.approval
        given = len(before["by"]) if before.get("step") == place_of(entry) else 0
        # Approved already: a policy that became stricter since wants more people.
        ended = before.get("state", "approved") != "approved" or self.rejected_in == self.run
        need(not ended, "R42 approval", "another one is open, or was a no, or came to nothing", where)
        need(asked["required"] > given, "R42 approval", "as many have approved already", where)
        need(not self._tried(), "R43 approval", "the step was begun, refused, or has failed already", where)
        need(asked["plan_hash"] == self.plan_hash, "R41 approval", "asked for another plan", where)
        need(asked["step_hash"] == sha256(canonical(step)), "R41 approval", "asked for another step", where)
        need(asked["policy_id"] == self.policy["policy_id"], "R41 approval", "under another policy", where)
        next_round = self.rounds.get(entry["step_index"], 0) + 1
        need(asked["round"] == next_round, "R44 approval", f"not round {next_round} of its step", where)
        need(asked["required"] >= self.policy["approvals"], "R84 approval", "too few are asked", where)
        limit = self.policy["expires_after"] or RANGES["expires_after"]
        open_for = moment(asked["expires_at"], where) - moment(entry["timestamp"], where)
        need(open_for > 0, "R85 approval", "expired before it was asked for", where)
        need(open_for <= limit, "R85 approval", "open for longer than the policy says, or than 30 days", where)
        self.rounds = self.rounds | {entry["step_index"]: next_round}
        self.approval = {"state": "pending", "asked": asked, "by": (), "step": place_of(entry)}
        self._said(entry)

    def _said(self, entry: dict[str, Any]) -> None:
        said = members(entry["output"], {"status": str, "actor": str}, "R45 output", entry["where"])
        alike = (said["status"], said["actor"]) == (entry["status"], entry["actor"])
        need(alike, "R45 output", "the entry says something else", entry["where"])

    def _of_approval(self, entry: dict[str, Any], state: str) -> None:
        # The step may have succeeded since: an execution before this one had begun it.
        approval = self.approval if self.approval.get("step") == place_of(entry) else {}
        asked = approval.get("state") == state and same(entry["input"], approval["asked"])
        need(asked, "R46 approval", "nobody was asked this", entry["where"])
        self._said(entry)

    def _close(self, entry: dict[str, Any], where: str) -> None:
        """A reminder, or an approval's end without a decision."""
        self._of_approval(entry, "approved" if entry["kind"] == "approval_undeliverable" else "pending")
        if entry["kind"] == "approval_expired":
            over = moment(entry["timestamp"], where) > moment(self.approval["asked"]["expires_at"], where) - SKEW
            need(over, "R47 time", "it had not expired", where)
        self.approval = self.approval | {"state": entry["status"]}

    def _decide(self, entry: dict[str, Any], where: str) -> None:
        self._of_approval(entry, "pending")
        asked, by, who = self.approval["asked"], self.approval["by"], self._person(entry)
        said = members(entry["output"], DECIDED, "R48 approval", where)
        for name in ("plan_hash", "step_hash"):
            need(said[name] == asked[name], "R48 approval", f"decided on another {name}", where)
        need(said.get("agent") is None, "R50 four eyes", "decided by a program", where)
        need(who not in self.askers, "R49 four eyes", "decided by who started it or had it run again", where)
        need(who not in by, "R51 approval", "the same person twice", where)
        need(said["decided_at"] == entry["timestamp"], "R52 approval", "at another time", where)
        in_time = moment(said["decided_at"], where) < moment(asked["expires_at"], where)
        need(in_time, "R52 approval", "decided after it had expired", where)
        yes = said["approved"]
        need(entry["status"] == ("approved" if yes else "rejected"), "R48 approval", "neither nor", where)
        by += (who,) if yes else ()
        need(said["approvals"] == len(by), "R53 approval", "not as many have approved", where)
        state = "approved" if len(by) >= asked["required"] else "pending"
        if not yes:
            state, self.rejected_in = "rejected", self.run
            place = " ".join(place_of(entry)[1:])
            self.rejections += (f"rejected  {place} by {entry['actor']}, in run {self.run}: {said['reason']}",)
        self.approval = self.approval | {"state": state, "by": by}

    def _claim(self, entry: dict[str, Any], where: str) -> None:
        """A step is begun, once in a run: by the policy in force now and the pinned one, with what both ask for."""
        said, step = members(entry["input"], CLAIM, "R54 step", where), self._step(entry, "step")
        need(said["step_hash"] == sha256(canonical(step)), "R54 step", "another step was begun", where)
        need(said["run"] == self.run and said["attempt"] > 0, "R54 step", "begun for another run", where)
        need(not self._tried(), "R55 step", "begun a second time", where)
        policy, approval = self._decision(entry["output"], where), self.approval
        need(policy["allowed"], "R87 step", "begun though the policy in force did not allow it", where)
        held = approval.get("state", "approved") == "approved" and self.rejected_in != self.run
        need(held, "R56 step", "begun without its approval", where)
        approval = approval if approval.get("step") == place_of(entry) else {}
        by, of_round = approval.get("by", ()), approval["asked"]["round"] if approval else None
        need(said["approval"] == of_round, "R57 step", "by another approval than the one that was given", where)
        if approval:
            late = moment(entry["timestamp"], where) - moment(approval["asked"]["expires_at"], where) >= LATE
            need(not late, "R58 step", "begun long after its approval had expired", where)
        if step["requires_approval"] or self._must_ask(step, policy):
            required = max(self.policy["approvals"], policy["approvals"])
            need(len(by) >= required, "R88 step", "begun without its approval", where)
        if step["type"] == "onchain_action":
            for each in (self.policy, policy):
                self._within_limits(step["parameters"], each, where)
        if self.claim and step["type"] == "onchain_action":
            self.lost += (self.unknown(self.claim),)
        self.claim, self.approval = {"run": self.run, "step": step}, {}
        self.approvers += tuple(each for each in by if each not in self.approvers)

    def unknown(self, claim: dict[str, Any]) -> str:
        name = "{step_id} {type}".format(**claim["step"])
        return f"UNKNOWN   what became of {name}, which was begun in run {claim['run']}: outcome unknown"

    def _tried(self) -> bool:
        """Whether this execution has begun the step, or was refused it."""
        return self.run in (self.failed_in, self.claim.get("run"))

    def _within_limits(self, moved: dict[str, Any], policy: dict[str, Any], where: str) -> None:
        most = min(policy[limit] or MOST for limit in ("max_amount", "daily_limit"))
        need(moved["amount"] <= most, "R89 step", "moves more than the policy allows", where)
        known = moved["to_address"] in (policy["allowed_addresses"] or [moved["to_address"]])
        need(known, "R90 step", "moves money to where the policy does not allow", where)

    def _outcome(self, entry: dict[str, Any], where: str) -> None:
        """What became of a step that was begun; or that this execution did not begin it, being refused."""
        step, name = self._step(entry, "step"), " ".join(place_of(entry)[1:])
        need(same(entry["input"], step["parameters"]), "R59 step", "ran with other parameters", where)
        output, failed = members(entry["output"], {}, "R60 output", where), entry["status"] == "failed"
        error = members(output, {"error": str}, "R60 output", where)["error"] if failed else ""
        told = output.get("error", "") != ""
        need(told == failed, "R60 output", "it failed without an error, or succeeded with one", where)
        begun = output.get("begun", True)
        need(type(begun) is bool, "R61 step", "begun is neither true nor false", where)
        need(begun or failed, "R61 step", "it succeeded, and was not begun", where)
        if failed and begun is False:
            # What an execution before this one has begun may still have an outcome.
            need(not self.ended, "R30 end", "it goes on after its end", where)
            need(not self._tried(), "R62 step", "refused, and it was begun, or refused, already", where)
            self.failed_in = self.run
            self.effects += (f"refused   {name}: {error}",)
            return
        need(bool(self.claim) or not self.ended, "R30 end", "it goes on after its end", where)
        need(bool(self.claim), "R63 step", "ran, and was never begun", where)
        claim, self.claim = self.claim, {}
        if failed:
            self.failed_in = max(self.failed_in, claim["run"])
            self.lost += (self.unknown(claim),) if error.startswith("moved_unknown") else ()
            self.effects += (f"failed    {name}: {error}",)
            return
        done = ""
        if step["type"] in ("onchain_action", "generic_action"):
            members(output, {"txid": str, "tick": int}, "R64 step", where)
            sent = has_form(output["txid"], "txid") and 0 < output["tick"] < 2**32
            need(sent, "R64 step", "no transaction's id, or no tick", where)
        if step["type"] == "onchain_action":
            members(output, {"network": str}, "R65 step", where)
            need(output["network"] == self.network, "R65 step", "on another network than the bundle's", where)
            for each, value in step["parameters"].items():
                need(each in output and same(output[each], value), "R66 step", f"moved with another {each}", where)
            # An execution before this one may have begun it, under what was approved then.
            of_its_run = same(output.get("run", claim["run"]), claim["run"])
            need(of_its_run, "R67 step", "not handed in by the execution that began it", where)
            why = output.get("simulated", "sent")
            need(isinstance(why, str) and why != "", "R68 step", "simulated, and it does not say why", where)
            done = ": {amount} QU from {from_address} to {to_address}, transaction {txid}, {network}".format(**output)
            done += ", NOT SENT, only simulated" if "simulated" in output else ""
        if step["type"] == "generic_action":
            members(output, {"instruction_hash": str}, "R69 step", where)
            instruction = {"reference": f"{entry['task_id']}#{step['step_id']}", "instruction": step["parameters"]}
            alike = output["instruction_hash"] == sha256(canonical(instruction))
            need(alike, "R69 step", "the hash of another instruction", where)
            # The ledger may have signed the record again since.
            done = f": instruction {output['instruction_hash']} submitted as {output['txid']}"
        if step["type"] == "policy_check":
            seen = members(output, {"pinned": bool}, "R86 policy", where)
            pinned, decision = seen.pop("pinned"), self._decision(seen, where)
            need(pinned == (decision["policy_id"] == self.policy["policy_id"]), "R86 policy", "pinned or not?", where)
        self.effects += (f"ran       {name}{done}",)
        self.done, self.failed_in = self.done + 1, 0

    def _retry(self, entry: dict[str, Any], where: str) -> None:
        need(self.ended in ("failed", "expired"), "R70 end", "only what failed or expired is retried", where)
        run = members(entry["output"], {"run": int}, "R71 output", where)["run"]
        need(run == self.run + 1, "R71 output", "not the next execution", where)
        status = "executing" if self.plan else "pending"
        need(entry["status"] == status, "R71 output", "another status", where)
        self.ended, self.run, self.approval = "", run, {}
        self.askers += (self._person(entry),)
        self._agent(entry, "output", f"retried it (run {run})")

    def _end(self, entry: dict[str, Any], where: str) -> None:
        types = {"status": str, "reason": TEXT, "failed_step": TEXT}
        output = members(entry["output"], types, "R72 output", where)
        said, steps = output["status"], self.plan.get("steps", [])
        need(said == entry["status"], "R72 output", "the entry says something else", where)
        broken = output["failed_step"] in (None, *(each["step_id"] for each in steps))
        need(broken, "R72 output", "the plan has no such step", where)
        if said == "cancelled":
            self._person(entry)
            self._agent(entry, "output", "cancelled it")
        else:
            by = ("execution", "reconciler") if said in ("failed", "rejected") else ("execution",)
            need(entry["actor"] in by, "R26 text", f"{said} by an actor that cannot end a task so", where)
        all_done = bool(steps) and self.done == len(steps)
        if self.rejected_in == self.run:
            # What an execution before this one had begun may have been done all the same.
            passed = said == "rejected" or (said == "completed" and all_done)
            need(passed, "R73 end", f"a person had rejected it, and it ended {said}", where)
        leads_there = {
            "completed": all_done, "rejected": self.rejected_in == self.run, "denied": not all_done,
            "expired": self.approval.get("state") == "expired", "failed": True, "cancelled": True,
        }  # fmt: skip
        need(leads_there[said], "R74 end", f"nothing led to the end {said}", where)
        self.ended = said


# Qubic: K12 (RFC 9861, one chunk), FourQ, SchnorrQ, letters -----------------------------------------------------------

MASK = 2**64 - 1
P = 2**127 - 1
ORDER = 0x29CBC14E5E0A72F05397829CBC14E5DFBD004DFE0F79992FB2540EC7768CE7
D = (4205857648805777768770, 125317048443780598345676279555970305165)
G = (
    (0x1A3472237C2FB305286592AD7B3833AA, 0x1E1F553F2878AA9C96869FB360AC77F6),
    (0x0E3FEE9BA120785AB924A2462BCBB287, 0x6E1C4AF8630E024249A7C344844C8B5C),
)
ROUNDS = (
    0x8000808B, 0x800000000000008B, 0x8000000000008089, 0x8000000000008003, 0x8000000000008002, 0x8000000000000080,
    0x800A, 0x800000008000000A, 0x8000000080008081, 0x8000000000008080, 0x80000001, 0x8000000080008008,
)  # fmt: skip


def keccak(a: list[list[int]]) -> list[list[int]]:
    """Keccak-p[1600, 12] on lanes a[x][y] (FIPS 202, section 3.2)."""

    def rotated(lane: int, by: int) -> int:
        return (lane << by % 64 | lane >> (64 - by % 64)) & MASK

    for constant in ROUNDS:
        c = [column[0] ^ column[1] ^ column[2] ^ column[3] ^ column[4] for column in a]
        a = [[lane ^ c[x - 1] ^ rotated(c[(x + 1) % 5], 1) for lane in a[x]] for x in range(5)]  # theta
        x, y, moving = 1, 0, a[1][0]
        for t in range(24):  # rho and pi
            x, y = y, (2 * x + 3 * y) % 5
            moving, a[x][y] = a[x][y], rotated(moving, (t + 1) * (t + 2) // 2)
        a = [[a[x][y] ^ (~a[(x + 1) % 5][y] & a[(x + 2) % 5][y]) for y in range(5)] for x in range(5)]  # chi
        a[0][0] ^= constant  # iota
    return a


def k12(message: bytes, size: int = 32) -> bytes:
    """KT128 of a message of one chunk, with an empty customization string; up to 168 bytes of output."""
    padded = message + b"\x00\x07"
    padded += bytes(-len(padded) % 168)
    padded = padded[:-1] + bytes([padded[-1] ^ 0x80])
    a = [[0] * 5 for _ in range(5)]
    for at in range(0, len(padded), 8):
        lane = at // 8 % 21
        a[lane % 5][lane // 5] ^= int.from_bytes(padded[at : at + 8], "little")
        if lane == 20:
            a = keccak(a)
    return b"".join(a[lane % 5][lane // 5].to_bytes(8, "little") for lane in range(21))[:size]


def letters(data: bytes) -> str:
    """32 bytes as an identity: 4 times 14 letters of base 26, and 4 of a checksum."""
    checksum = int.from_bytes(k12(data, 3), "little") & 0x3FFFF
    words = [(int.from_bytes(data[at : at + 8], "little"), 14) for at in (0, 8, 16, 24)] + [(checksum, 4)]
    return "".join(chr(65 + word // 26**n % 26) for word, count in words for n in range(count))


Number = tuple[int, int]  # a + b i in GF(p^2), i^2 = -1
Point = tuple[Number, Number]  # affine (x, y) on -x^2 + y^2 = 1 + d x^2 y^2


def mul(a: Number, b: Number) -> Number:
    return (a[0] * b[0] - a[1] * b[1]) % P, (a[0] * b[1] + a[1] * b[0]) % P


def plus(a: Number, b: Number, sign: int = 1) -> Number:
    return (a[0] + sign * b[0]) % P, (a[1] + sign * b[1]) % P


def inverse(a: Number) -> Number:
    norm = pow(a[0] * a[0] + a[1] * a[1], -1, P)
    return a[0] * norm % P, -a[1] * norm % P


def add(p: Point, q: Point) -> Point:
    """The addition of a twisted Edwards curve with a = -1, complete: it doubles, too, and has no exceptions."""
    xx, yy = mul(p[0], q[0]), mul(p[1], q[1])
    t = mul(D, mul(xx, yy))
    cross = plus(mul(p[0], q[1]), mul(p[1], q[0]))
    return mul(cross, inverse(plus((1, 0), t))), mul(plus(yy, xx), inverse(plus((1, 0), t, -1)))


def times(scalar: int, p: Point) -> Point:
    total: Point = ((0, 0), (1, 0))
    for bit in f"{scalar:b}":
        total = add(total, total)
        if bit == "1":
            total = add(total, p)
    return total


def root(n: int) -> int:
    return pow(n, (P + 1) // 4, P)


def decode_point(data: bytes) -> Point | None:
    """32 bytes: y, and the sign of x in the highest bit; None when it is no point of the curve."""
    value = int.from_bytes(data, "little")
    y = (value % 2**128, value >> 128 & P)
    if max(y) >= P:
        return None
    yy = mul(y, y)
    square = mul(plus(yy, (1, 0), -1), inverse(plus(mul(D, yy), (1, 0))))  # x^2
    norm = root(square[0] * square[0] + square[1] * square[1])
    for half in ((square[0] + norm) * (P + 1) // 2, (square[0] - norm) * (P + 1) // 2):
        real = root(half % P)
        imaginary = square[1] * pow(2 * real, -1, P) % P if real else root(-square[0] % P)
        for x in ((real, imaginary), (-real % P, -imaginary % P)):
            if mul(x, x) == square and (x[0] or x[1]) >> 126 == value >> 255:
                return x, y
    return None


def is_signed(public_key: bytes, digest: bytes, signature: bytes) -> bool:
    """SchnorrQ: s G + h A = R with h = K12(R, A, digest). Refuses s >= N (a twin) and keys of low order."""
    a, r, s = decode_point(public_key), decode_point(signature[:32]), int.from_bytes(signature[32:], "little")
    if a is None or r is None or s >= ORDER or times(392, a) == ((0, 0), (1, 0)):
        return False
    h = int.from_bytes(k12(signature[:32] + public_key + digest), "little") % ORDER
    return add(times(s, G), times(h, a)) == r


def check_transaction(anchor: dict[str, Any]) -> None:
    sent = anchor["bytes"]
    need(letters(k12(sent)).lower() == anchor["txid"], "R17 txid", "not the id of these bytes", "anchor")
    need(is_signed(sent[:32], k12(sent[:-64]), sent[-64:]), "R18 signature", "not signed by the source", "anchor")


# Over the network, if asked -------------------------------------------------------------------------------------------


UNREADABLE = (OSError, ValueError, http.client.HTTPException)


def fetch(address: str, headers: dict[str, str], data: bytes | None = None) -> bytes:
    request = urllib.request.Request(address, data, headers)  # noqa: S310 - the address is the user's
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
            return bytes(answer.read())
    except urllib.error.HTTPError as error:
        error.close()
        raise


def look_up(rpc: str, anchor: dict[str, Any], identity: str) -> None:
    """Ask a node for the transaction; it must have these very bytes."""
    asked = json.dumps({"hash": anchor["txid"]}).encode()
    try:
        address = rpc.rstrip("/") + "/query/v1/getTransactionByHash"
        found = json.loads(fetch(address, {"Content-Type": "application/json"}, asked))
        found = found.get("transaction", found)
        alike = {
            "hash": found["hash"] == anchor["txid"],
            "source": found["source"] == found["destination"] == identity,
            "amount": str(found.get("amount", 0)) == "0",
            "inputType": str(found["inputType"]) == str(0x5141),
            "tickNumber": str(found["tickNumber"]) == str(anchor["tick"]),
            "inputData": base64.b64decode(found["inputData"]) == anchor["bytes"][80:173],
            "signature": base64.b64decode(found["signature"]) == anchor["bytes"][173:],
        }
    except (*UNREADABLE, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise Failed("R20 rpc", f"the node does not have it: {error}", "anchor") from None
    for name, each in alike.items():
        need(each, "R20 rpc", f"the node has another {name}", "anchor")


def check_whole_log(prefix: str, bundle: dict[str, Any], anchor: dict[str, Any], anchored: int, open_: bool) -> str:
    """Read the log up to its newest checkpoint (C2SP tlog-tiles): both roots, and which entries the task has in it."""
    note = read(prefix, "checkpoint").split(b"\n")
    try:
        size, newest = int(note[1]), base64.b64decode(note[2], validate=True)
    except (ValueError, IndexError):
        raise Failed("R21 whole log", "its checkpoint is none", prefix) from None
    need(size >= anchor["size"], "R21 whole log", f"its checkpoint, of size {size}, is older than the anchor", prefix)
    leaves: list[bytes] = []
    found: list[bytes] = []
    data = b""
    for at in range(size):
        if at % 256 == 0:
            data = read_tile(prefix, at // 256, min(256, size - at))
        length = int.from_bytes(data[:2], "big")
        text, data = data[2 : 2 + length], data[2 + length :]
        if f'"task_id":"{bundle["task_id"]}"'.encode() in text:
            found.append(text)
        leaves.append(leaf_hash(text))
    anchored_root = root_of(leaves[: anchor["size"]])
    need(
        anchored_root == anchor["root"],
        "R21 whole log",
        "its entries have another root than the anchored one",
        prefix,
    )
    need(root_of(leaves) == newest, "R21 whole log", "its entries have another root than its checkpoint", prefix)
    texts = [each["text"].encode() for each in bundle["entries"]]
    one_chain = all(f'"seq":{number},'.encode() in text for number, text in enumerate(found, start=1))
    these = one_chain and len(found) >= anchored and found[: len(texts)] == texts[: len(found)]
    need(these, "R21 whole log", "it has other entries of the task than the bundle", prefix)
    later = max(0, len(found) - len(texts))
    need(
        open_ or not later,
        "R22 later",
        f"{later} entries of the task follow in the log: ask for a newer bundle",
        prefix,
    )
    follow = f"LATER: {later} entries of the task follow" if later else "the task has these entries and no others"
    return f"log       as of size {size}, root {newest.hex()}: {follow}"


def read_tile(prefix: str, index: int, count: int) -> bytes:
    digits = f"{index:03d}".zfill((len(f"{index:03d}") + 2) // 3 * 3)
    groups = [digits[at : at + 3] for at in range(0, len(digits), 3)]
    path = "tile/entries/" + "/".join([f"x{each}" for each in groups[:-1]] + groups[-1:])
    return read(prefix, path, f"{path}.p/{count}")


def read(prefix: str, *names: str) -> bytes:
    """The first of these files that is there."""
    failed = ""
    for name in (f"{prefix.rstrip('/')}/{each}" for each in names):
        try:
            if "://" not in name:
                return Path(name).read_bytes()
            token = os.environ.get("LOG_TOKEN")
            headers = {"Accept": "application/octet-stream"} | ({"Authorization": f"Bearer {token}"} if token else {})
            return fetch(name, headers)
        except UNREADABLE as error:
            failed = f"{name}: {error}"
            if getattr(error, "code", 404) != 404:
                break
    raise Failed("R21 whole log", f"cannot be read: {failed}", prefix)


# All together ---------------------------------------------------------------------------------------------------------


def verify(
    data: bytes, *, log_id: str, anchor_identity: str, task_id: str | None = None, network: str | None = None,
    open_: bool = False, rpc: str | None = None, log: str | None = None,
) -> list[str]:  # fmt: skip
    """Check a bundle; the report's lines. Raises Failed with the first check that does not hold."""
    bundle = read_bundle(data)
    need(task_id in (None, bundle["task_id"]), "R5 task", "not the task that was asked for")
    need(network in (None, bundle["network"]), "R6 network", f"it says {bundle['network']}")
    entries = check_chain(bundle, log_id)
    anchor = check_anchor(bundle, log_id, anchor_identity)
    anchored = check_inclusion(bundle, entries, anchor)
    story = Story(bundle["policies"], bundle["network"])
    for sent, entry in zip(bundle["entries"], entries, strict=True):
        story.tell(entry, sent["output"])
    need(not story.unused, "R78 policy", "a document that nothing refers to")
    if not open_:
        last, begun = entries[-1]["where"], story.claim.get("step", {})
        rest, known = f"entry {anchored + 1}", begun.get("type") != "onchain_action"
        need(anchored == len(entries), "R19 complete", "not anchored yet (--open accepts that)", rest)
        need(bool(story.ended), "R19 complete", "the task's end is missing (--open accepts that)", last)
        need(known, "R19 complete", "what became of the transfer is missing (--open accepts that)", last)
    check_transaction(anchor)
    if rpc:
        look_up(rpc, anchor, anchor_identity)
    named, size = bundle["network"], anchor["size"]
    unproved = [
        (not network, f"NOT CHECKED that the network is {named}: the bundle says so, no signature: --network"),
        (named == "mock", "NOT PROVED  network: mock! Its operator can make another history: nothing to an outsider."),
        (not rpc, "NOT PROVED  that any network has the transaction, and so since when: use --rpc"),
        (not log, f"NOT CHECKED what the log has of the task after size {size}, or besides: use --log"),
    ]
    lines = report(bundle, anchor, entries, anchored, story) + [line for is_so, line in unproved if is_so]
    return lines + ([check_whole_log(log, bundle, anchor, anchored, open_)] if log else [])


def report(
    bundle: dict[str, Any], anchor: dict[str, Any], entries: list[dict[str, Any]], anchored: int, story: Story
) -> list[str]:
    unknown = (*story.lost, *([story.unknown(story.claim)] if story.claim else ()))
    return [
        f"task      {bundle['task_id']}, asked for by {story.request['requester']}",
        *story.agents,
        f"entries   {len(entries)}, of which {anchored} are in the anchored log",
        f"anchor    as of size {anchor['size']}, number {anchor['sequence']}, tick {anchor['tick']}: {anchor['txid']}",
        f"network   {bundle['network']}",
        *(f"policy    {each}" for each in story.policies or ["none was looked at"]),
        *story.notes,
        *story.rejections,
        f"approved  by {', '.join(story.approvers) or 'nobody'}",
        *(story.effects or ["ran       nothing"]),
        *unknown,
        f"ended     {story.ended or 'not yet, or its end was left out'}",
        *(f"NOT ANCHORED YET, worth nothing so far: {each['where']}, {each['kind']}" for each in entries[anchored:]),
    ]


def shown(line: str) -> str:
    """A line that stays one, whatever names are in it."""
    text = "".join(each if each.isprintable() else "?" for each in line)
    return text.encode(sys.stdout.encoding or "ascii", "replace").decode(sys.stdout.encoding or "ascii")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Check a task's audit bundle (docs/audit.md).")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--log-id", required=True, help="the log that you trust")
    parser.add_argument("--anchor-identity", required=True, help="the identity that anchors it: 60 capital letters")
    parser.add_argument("--task-id", help="the task that it must be of")
    parser.add_argument("--network", choices=("mock", "mainnet"), help="the network that it must be of")
    parser.add_argument("--open", dest="open_", action="store_true", help="accept what is not ended, or anchored, yet")
    parser.add_argument("--rpc", help="a node of the network, to look the transaction up")
    parser.add_argument("--log", help="the log's address (token in LOG_TOKEN) or folder, to read it")
    given = vars(parser.parse_args(arguments))
    try:
        lines = verify(given.pop("bundle").read_bytes(), **given)
    except OSError as error:
        parser.error(str(error))
    except Failed as failed:
        print(shown(str(failed)))
        return 1
    print("OK", *map(shown, lines), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
