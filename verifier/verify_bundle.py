#!/usr/bin/env python3
"""Check a task's audit bundle, offline: Python's standard library, one file, no network unless asked.

    python verify_bundle.py bundle.json --log-id qaes --anchor-identity ABC...

Formats and rules: docs/audit.md and docs/policy.md, which number each rule (R1 ...); a failure names its rule. Exit
status 0: all checks held, and the report says what was not checked. 1: the first check that failed. 2: called wrongly.
Written apart from the program that makes the bundles.

What to trust is given by you: the name of the log and the identity that anchors it. The rest follows, in this order:

    JSON        the file is JSON without surprises, and has the members of a bundle
    Chain       every entry has its canonical text and names the one before it; inputs and outputs have their hashes
    Policy      how the policy changed while the task ran: proposed, approved, in force, suspended, resumed
    Anchor      the transaction on the ledger carries the log's size and root; every entry is included under that root
    Story       what was decided follows from the policy; who approved; what ran is what was asked for and approved
    Qubic       the transaction's id and signature (K12, FourQ, SchnorrQ)
    Network     if asked: the ledger has the transaction; the whole log has these entries of the task, and no others
"""

from __future__ import annotations

import argparse
import base64
import functools
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
FORMAT_1, FORMAT_2 = "qaes-bundle-1", "qaes-bundle-2"  # a bundle of format 2 has entries of the policy, too
BUNDLE_2, SENT_2 = BUNDLE | {"policy_entries": list}, SENT | {"salt": str}
ENTRY_2 = ENTRY | {"stream": str, "task_id": NONE}  # an entry of another stream than a task's
DEPTH = 250
DEEP = f"nested more than {DEPTH} levels deep"
FORMS = {
    "hash": r"[0-9a-f]{64}", "salt": r"[0-9a-f]{32}", "time": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z",
    "txid": r"[a-z]{60}", "task": r"task_[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}",
    "action": r"[A-Za-z0-9_.-]{1,64}", "address": r"0x[0-9a-f]{16,40}|[A-Z]{60}",
    "legacy": r"0[xX][0-9a-fA-F]{16,40}", "identity": r"[A-Z]{60}",
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
    with_policy = isinstance(value, dict) and value.get("format") == FORMAT_2
    bundle = members(value, BUNDLE_2 if with_policy else BUNDLE, "R3 format", "bundle", exactly=True)
    need(bundle["format"] in (FORMAT_1, FORMAT_2), "R3 format", "not a bundle of this format")
    need(bundle["network"] in ("mock", "mainnet"), "R3 format", "there is no such network")
    need(has_form(bundle["salt"], "salt"), "R3 format", "not a salt")
    need(has_form(bundle["task_id"], "task"), "R3 format", "not the id of a task")
    need(len(bundle["entries"]) > 0, "R3 format", "there are no entries")
    for number, each in enumerate(bundle["entries"], start=1):
        members(each, SENT, "R3 format", f"entry {number}", exactly=True)
    bundle.setdefault("policy_entries", [])
    need(bool(bundle["policy_entries"]) == with_policy, "R3 format", "there are no entries of the policy")
    for number, each in enumerate(bundle["policy_entries"], start=1):
        members(each, SENT_2, "R3 format", f"policy entry {number}", exactly=True)
        need(has_form(each["salt"], "salt"), "R3 format", "not a salt", f"policy entry {number}")
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
        entry = read_entry(sent["text"], ENTRY, 1, log_id, where)
        need(entry["task_id"] == bundle["task_id"], "R5 task", "of another task", where)
        need(entry["seq"] == seq, "R8 seq", f"its number is {entry['seq']}", where)
        need(entry["prev"] == prev, "R9 prev", "does not name the entry before", where)
        disclose(entry, sent, bundle["salt"])
        prev = entry["leaf"].hex()
        entries.append(entry)
    return entries


def read_entry(text: str, types: dict[str, Any], version: int, log_id: str, where: str) -> dict[str, Any]:
    """Read the text of one entry, and add where it stands and its leaf hash."""
    entry = members(parse_canonical(text, "R7 text", where), types, "R7 text", where, exactly=True)
    need(entry["v"] == version, "R7 text", "an entry of another version", where)
    need(has_form(entry["nonce"], "salt"), "R7 text", "not a nonce", where)
    need(entry["log_id"] == log_id, "R4 log", "of another log than the pinned one", where)
    return entry | {"where": where, "leaf": leaf_hash(text.encode())}


def disclose(entry: dict[str, Any], sent: dict[str, Any], salt: str) -> None:
    """Add an entry's input and output, whose salted hashes it has."""
    for side in ("input", "output"):
        entry[side] = parse_canonical(sent[side], f"R10 {side}", entry["where"])
        # The canonical text of the two members is put together from canonical texts.
        salted = sha256('{"salt":"' + salt + '","value":' + sent[side] + "}")
        need(entry[f"{side}_hash"] == salted, f"R10 {side}", f"not what the {side}'s hash is of", entry["where"])


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


def check_inclusion(all_sent: list[dict[str, Any]], entries: list[dict[str, Any]], anchor: dict[str, Any]) -> int:
    """Count the entries of a stream that are in the anchored log; those that are not come last."""
    last = -1
    for number, (sent, entry) in enumerate(zip(all_sent, entries, strict=True)):
        if sent["index"] is None or sent["proof"] is None:
            rest = all_sent[number:]
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
        last = entry["index"] = sent["index"]
    return len(entries)


# What the story is made of --------------------------------------------------------------------------------------------


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
BLANK = "\u2800"  # the empty cell of Braille
LEDGER = "ledger"  # the actor of a change of the policy that no person made
PARTS = ("planner", "compliance", "worker", "execution", "reconciler", LEDGER)
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
    if isinstance(written, dict) and same(written.get("format"), 2):
        return Document(written, text, hash_).content
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


# How the policy changed -----------------------------------------------------------------------------------------------


CHANGES = {  # kind: the status of its entries
    "policy_proposed": "proposed", "policy_approved": "approved", "policy_rejected": "rejected",
    "policy_in_force": "in_force", "action_suspended": "suspended", "resume_requested": "requested",
    "action_resumed": "resumed",
}  # fmt: skip
SUSPENSION = {"event": int, "resume_requested_by": TEXT}
A_DAY = 86_400  # seconds: so long counts a request to resume an action


class PolicyStream:
    """The entries of the policy in a bundle: when which version was in force, and when which action was suspended."""

    def __init__(self, bundle: dict[str, Any], log_id: str) -> None:
        self.entries: list[dict[str, Any]] = []
        self.of_version: dict[str, dict[str, dict[str, Any]]] = {}
        self.in_force: list[tuple[float, float, Any]] = []  # (since, until, policy_id)
        self.suspended: list[tuple[str, float, float]] = []  # (name, since, until)
        self.during: list[dict[str, Any]] = []  # the entries from before the task began on
        self.requested: dict[str, float] = {}  # when people requested to resume an action
        self.newest, self.anchored = 0.0, 0
        self.version: Any = None  # the newest that was in force so far
        for number, sent in enumerate(bundle["policy_entries"], start=1):
            entry = read_entry(sent["text"], ENTRY_2, 2, log_id, f"policy entry {number}")
            disclose(entry, sent, sent["salt"])
            self._check(entry, self.entries[-1] if self.entries else None)
            self.entries.append(entry)
            self._check_versions(entry, self.of_version.setdefault(entry["about"], {}))
            self.of_version[entry["about"]][entry["kind"]] = entry

    def _check(self, entry: dict[str, Any], last: dict[str, Any] | None) -> None:
        where, kind, about_action = entry["where"], entry["kind"], not entry["kind"].startswith("policy_")
        known = kind in CHANGES and entry["status"] == CHANGES[kind] and entry["stream"] == "policy"
        need(known, "R91 text", "there is no such kind, status or stream", where)
        alone = place_of(entry) == (-1, "", kind) and entry["plan_hash"] == ""
        need(alone, "R91 text", "it is about no step and no plan", where)
        of_ledger = entry["actor"] == LEDGER and kind in ("policy_in_force", "policy_rejected")
        by_person = is_person(entry["actor"]) and kind != "policy_in_force"
        need(of_ledger or by_person, "R91 text", "no such actor", where)
        about = members(entry["input"], {"name" if about_action else "policy_id": str}, "R91 text", where)
        name = about["name"] if about_action else about["policy_id"]
        names_one = name == "*" or has_form(name, "action") if about_action else has_form(name, "policy")
        need(names_one and entry["policy_id"] == ("" if about_action else name), "R91 text", "about what?", where)
        state = members(entry["output"], {"in_force": TEXT, "suspended": dict}, "R91 text", where, exactly=True)
        version = state["in_force"]
        need(version is None or has_form(version, "policy"), "R91 text", "no version is in force", where)
        for each in state["suspended"].values():
            by = members(each, SUSPENSION, "R91 text", where, exactly=True)["resume_requested_by"]
            need(by is None or is_person(by), "R91 text", "nobody requested to resume it", where)
        entry |= {"about": name, "time": moment(entry["timestamp"], where), "state": state}
        need(entry["time"] > self.newest - SKEW, "R28 time", "long before an entry before it", where)
        self.newest = max(self.newest, entry["time"])
        need(entry["seq"] > (last["seq"] if last else 0), "R92 seq", "not after the entry before", where)
        follows = last is not None and last["seq"] + 1 == entry["seq"]
        if last is not None and follows:
            need(entry["prev"] == last["leaf"].hex(), "R93 prev", "does not name the entry before", where)
        need((entry["seq"] == 1) == (entry["prev"] == "0" * 64), "R93 prev", "first, or not?", where)
        if follows or entry["seq"] == 1:
            # Which version was in force before the first change, that change alone says.
            before = last["state"] if last and follows else {"in_force": state["in_force"], "suspended": {}}
            self._check_change(entry, before, where)

    def _check_versions(self, entry: dict[str, Any], before: dict[str, dict[str, Any]]) -> None:
        """Check that a version has each change once, and that the version in force is never an older one again."""
        kind, name, where, version = entry["kind"], entry["about"], entry["where"], entry["state"]["in_force"]
        over = "policy_rejected" in before or (kind == "policy_rejected" and "policy_in_force" in before)
        once = not kind.startswith("policy_") or (kind not in before and not over)
        need(once, "R98 policy", f"{name} was decided already", where)
        rises = self.version in (None, version) or version_in(version) > version_in(self.version)
        need(rises, "R98 policy", f"{version} in force after {self.version}", where)
        self.version = version

    def _check_change(self, entry: dict[str, Any], before: dict[str, Any], where: str) -> None:
        """Recompute the state after a change from the state before it."""
        kind, name, suspended = entry["kind"], entry["about"], dict(before["suspended"])
        now = suspended.get(name)
        if kind == "action_suspended":
            suspended[name] = {"event": entry["seq"], "resume_requested_by": None}
        if kind in ("resume_requested", "action_resumed"):
            need(now is not None, "R94 state", f"{name} was not suspended", where)
        if kind == "resume_requested":
            suspended[name] = suspended[name] | {"resume_requested_by": entry["actor"]}
            self.requested[name] = entry["time"]
        if kind == "action_resumed":
            asked = suspended.pop(name)["resume_requested_by"]
            need(asked is not None, "R94 state", "nobody had requested it", where)
            need(person(asked) != person(entry["actor"]), "R95 four eyes", "resumed by one person alone", where)
            # The request itself may be older than the bundle's entries.
            in_time = entry["time"] - self.requested.get(name, entry["time"]) < A_DAY + SKEW
            need(in_time, "R95 four eyes", "the request to resume it had ended a day after it was made", where)
        in_force = name if kind == "policy_in_force" else before["in_force"]
        expected = {"in_force": in_force, "suspended": suspended}
        need(same(entry["state"], expected), "R94 state", "the state does not follow from the one before", where)

    def begin(self, began: float, action: str) -> None:
        """Find what was in force, and whether the action was suspended, from before the task began on."""
        first = len(self.entries) - 1
        while first and self.entries[first - 1]["seq"] + 1 == self.entries[first]["seq"]:
            first -= 1
        entry, during = self.entries[first], self.entries[first:]
        whole = entry["seq"] == 1 or entry["time"] < began - SKEW
        need(whole, "R96 seq", "entries of the policy from before the task are missing", entry["where"])
        self.during = during
        self.in_force = periods([(each["time"], each["state"]["in_force"]) for each in during])
        for name in (action, "*"):
            suspended = periods([(each["time"], name in each["state"]["suspended"]) for each in during])
            self.suspended += [(name, since, until) for since, until, is_so in suspended if is_so]

    def lines(self) -> list[str]:
        """What the report says of the entries."""
        seqs = ", ".join(str(each["seq"]) for each in self.entries)
        return [f"changes   of the policy: entries {seqs}, of which {self.anchored} are in the anchored log"]

    def unproved(self, story: Story, *, has_log: bool) -> list[tuple[bool, str]]:
        """What the report says was not checked of the policy."""
        last, action = self.entries[-1]["seq"], story.analysis.get("action_type")
        own = any(action in each.get("actions", {}) for each in story.policies.values())
        return [
            (
                not has_log,
                f"NOT CHECKED whether the policy changed after its entry {last}, while the task ran: use --log",
            ),
            (own, f"NOT CHECKED that the parameters obey the JSON Schema of {action}, nor its result"),
        ]

    def check_not_suspended(self, action: str, entry: dict[str, Any]) -> str:
        """Check the times; return a note where the log's order, which no clock makes, is another one."""
        time, where = moment(entry["timestamp"], entry["where"]), entry["where"]
        for name, since, until in self.suspended:
            need(not since < time < until, "R97 step", f"begun while {name} was suspended", where)
        before = next((each for each in reversed(self.during) if is_before(each, entry)), None)
        found = [name for name in (action, "*") if before and name in before["state"]["suspended"]]
        return f"NOTE      in the log, {found[0]} was suspended when it began ({where})" if found else ""

    def check_version(self, policy_id: str, document: dict[str, Any], time: float, where: str) -> str:
        """Check how a version came into force, and that this was before its use; a note where no entry says it."""
        found = self.of_version.get(policy_id, {})
        proposed, approved, in_force = map(found.get, ("policy_proposed", "policy_approved", "policy_in_force"))
        # Version 1 alone comes with the system; nobody proposes it.
        first = document["proposed_by"] is None and document["version"] == 1
        wanted = [in_force] if first else [proposed, approved, in_force]
        if document["format"] == 1 and None in wanted:
            return f"NOTE      no entry of the policy says how {policy_id} came into force"
        need(None not in wanted, "R98 policy", f"how {policy_id} came into force is missing", where)
        steps = [each["seq"] for each in wanted if each]
        need(steps == sorted(steps), "R98 policy", f"{policy_id} was not proposed, approved, in force in turn", where)
        if proposed and approved:
            by_author = proposed["actor"] == document["proposed_by"]
            need(by_author, "R98 policy", f"{policy_id} was proposed by another person than its document says", where)
            alone = person(proposed["actor"]) == person(approved["actor"])
            need(not alone, "R99 four eyes", f"{policy_id} was approved by its author", where)
        early = in_force is not None and time < in_force["time"] - SKEW
        need(not early, "R100 policy", f"{policy_id} was not in force yet", where)
        for since, until, other in self.in_force:
            if other and since < time < until and version_in(other) > document["version"]:
                return f"NOTE      {policy_id} was used, although {other} was in force ({where})"
        return ""


def is_before(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the anchored log has one entry before another."""
    return "index" in one and "index" in other and bool(one["index"] < other["index"])


def version_in(policy_id: Any) -> int:
    """The number of a version; 0 for none."""
    return int(policy_id.split("-")[1][1:]) if has_form(policy_id, "policy") else 0


def periods(changes: list[tuple[float, Any]]) -> list[tuple[float, float, Any]]:
    """When each value held for certain, whatever clocks differ by: (since, until, value)."""
    found: list[tuple[float, float, Any]] = []
    for place, (time, value) in enumerate(changes):
        if place == 0 or value != changes[place - 1][1]:
            found.append((time + SKEW, float("inf"), value))
            if place:
                found[-2] = (found[-2][0], time - SKEW, found[-2][2])
    return found


def is_person(name: str) -> bool:
    """Whether a change of the policy can be by this actor, who is no part of the system."""
    return person(name) not in ("", LEDGER, *PARTS)


def person(name: str) -> str:
    """A name in the one form in which two names are compared."""
    visible = "".join(each for each in name if each.isprintable() and not re.match(INVISIBLE, each))
    return unicodedata.normalize("NFC", visible).strip()


# A policy of format 2 -------------------------------------------------------------------------------------------------


WHOLE = (int, NONE)
DOCUMENT_2 = DOCUMENT | {"roots": list, "signed_operations": list, "groups": dict, "actions": dict}
ACTION = {
    "title": str, "description": str, "effect": str, "handler": dict, "parameters": dict, "result": (dict, NONE),
    "amount": TEXT, "unit": TEXT, "destination": TEXT, "sensitive": list, "timeout_seconds": int,
    "result_timeout_seconds": int, "dry_run": bool,
}  # fmt: skip
HANDLERS: dict[str, dict[str, Any]] = {
    "lambda": {"type": str, "function_name": str},
    "https": {"type": str, "url": str, "public_keys": list, "credential": (dict, NONE)},
}
RULE_2 = {
    "allowed": bool, "risk_level": str, "requesters": (list, NONE), "destinations": (list, NONE), "tiers": list,
    "allow_derived": bool, "smart_contracts": bool, "limits": list,
}  # fmt: skip
TIER = {
    "max_amount": WHOLE, "approvals": int, "approvers": TEXT, "signature": bool, "expires_after": WHOLE,
    "escalate_after": WHOLE, "escalate_to": TEXT,
}  # fmt: skip
LIMIT = {"window_seconds": int, "max_amount": WHOLE, "max_count": WHOLE, "per": str, "over": (str, dict)}
NEEDED = {"approvals": int, "approvers": TEXT}
LARGEST = 2**53 - 1
BUILT_IN: dict[str, dict[str, Any]] = {  # the actions of every policy, and what a policy can limit of them
    "monitoring": {"effect": "none", "amount": None, "destination": None, "source": "/wallet_address"},
    "transaction": {"effect": "none", "amount": "/amount", "destination": "/to_address", "source": "/wallet_address"},
    "transfer_funds": {
        "effect": "irreversible", "amount": "/amount", "destination": "/to_address", "source": "/wallet_address",
    },
}  # fmt: skip
FORMS |= {
    "function": r"[A-Za-z0-9_-]{1,64}", "secret": r"qaes/actions/[A-Za-z0-9_.-]{1,64}",
    "pointer": r"(?:/(?:[^/~]|~[01])+){1,16}", "url": r"https://[!-~]+", "key": r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=",
}  # fmt: skip


HIDDEN = (  # beyond the categories: fillers, replacements, noncharacters, and selectors that select nothing
    "[\u034f\u115f\u1160\u17b4\u17b5\u2065\u3164\ufdd0-\ufdef\ufe03-\ufe0d\uffa0\ufff0-\ufff8\ufffc-\uffff"
    + "".join(chr(plane << 16 | last) for plane in range(1, 17) for last in (0xFFFE, 0xFFFF))
    + "\U000e0000-\U000e00ff\U000e01f0-\U000e0fff]"
)


class Document:
    """Reads a policy document of format 2 as the service does: what one accepts, the other accepts.

    Two things are for the service alone to refuse, when a document is proposed, because they decide nothing here: to
    which hosts a handler's address may lead, and where in a text a variation selector may stand.
    """

    def __init__(self, written: dict[str, Any], text: str, hash_: str) -> None:
        self.hash = hash_
        self.content = document = self._members(written, DOCUMENT_2)
        self._need(len(text.encode()) <= 2**18, "more than 256 KiB")
        self._need(0 < document["version"] < 10**9, "no version")
        based_on = document["based_on"]
        self._need(based_on is None or has_form(based_on, "policy"), "based on no policy")
        self._check_values(written)
        later = document["roots"] == document["signed_operations"] == []
        self._need(later, "roots or signed operations, which do not exist yet")
        for part in ("groups", "actions", "rules"):
            names = len(document[part]) <= 200 and all(has_form(each, "action") for each in document[part])
            self._need(names, f"more than 200 {part}, or one without a name")
        for group in document["groups"].values():
            self._need(type(group) is list and 1 <= len(group) <= 200, "a group has 1 to 200 members")
            self._need(all(is_subject(each) for each in group) and self._once(group), "a group has other members")
        for name, action in document["actions"].items():
            self._need(name not in (*BUILT_IN, "monitor_wallet"), f"{name} cannot be defined")
            self._check_action(self._members(action, ACTION))
        for name, rule in document["rules"].items():
            defined: Any = BUILT_IN.get(name) or document["actions"].get(name)
            self._need(defined is not None, f"a rule for {name}, which is no action")
            self._check_rule(name, self._members(rule, RULE_2), defined)

    def _need(self, holds: bool, message: str) -> None:
        need(holds, "R102 policy", message, self.hash)

    def _members(self, value: Any, types: dict[str, Any]) -> dict[str, Any]:
        return members(value, types, "R102 policy", self.hash, exactly=True)

    def _once(self, values: list[Any]) -> bool:
        return all(type(each) is str for each in values) and len(set(values)) == len(values)

    def _check_values(self, value: Any) -> None:
        """Check all texts and numbers, level by level: no hidden characters, no fractions, at most 32 levels deep."""
        level = [value]
        for _ in range(33):
            named = [name for each in level if isinstance(each, dict) for name in each]
            letters = "".join(set().union(*named, *(each for each in level if isinstance(each, str))))
            hidden = any(unicodedata.category(letter) in ("Cc", "Cf", "Cs", "Co", "Zl", "Zp") for letter in letters)
            hidden = hidden or re.search(HIDDEN, letters) is not None
            self._need(not hidden, "a control, bidi, zero-width or another invisible character")
            self._need(not any(isinstance(each, float) for each in level), "a number that is no integer")
            inner = [each.values() if isinstance(each, dict) else each for each in level if type(each) in (dict, list)]
            level = [each for values in inner for each in values]
        self._need(not level, "nested more than 32 levels deep")

    def _check_action(self, action: dict[str, Any]) -> None:
        self._need(1 <= len(action["title"]) <= 100 and len(action["description"]) <= 2000, "a text has another length")
        self._need(action["effect"] in ("none", "reversible", "irreversible"), "there is no such effect")
        pointers = [action[each] for each in ("amount", "destination") if action[each] is not None]
        self._need(len(action["sensitive"]) <= 50 and self._once(action["sensitive"]), "sensitive lists no pointers")
        for each in (*pointers, *action["sensitive"]):
            self._need(has_form(each, "pointer") and len(each) <= 512, "a value is no pointer")
        self._need((action["amount"] is None) == (action["unit"] is None), "amount and unit need each other")
        self._need(action["unit"] is None or has_form(action["unit"], "action"), "the unit has no name")
        in_time = 1 <= action["timeout_seconds"] <= 20 and 1 <= action["result_timeout_seconds"] <= 604_800
        self._need(in_time, "a timeout is out of range")
        kind = action["handler"].get("type")
        self._need(type(kind) is str and kind in HANDLERS, "there is no such handler")
        handler = self._members(action["handler"], HANDLERS[str(kind)])
        if kind == "lambda":
            self._need(has_form(handler["function_name"], "function"), "the handler has no name")
            return
        self._need(has_form(handler["url"], "url") and len(handler["url"]) <= 2048, "the handler has no address")
        keys = [self._members(each, {"keyid": str, "ed25519": str}) for each in handler["public_keys"]]
        for key in keys:
            self._need(has_form(key["keyid"], "action") and has_form(key["ed25519"], "key"), "a key has another form")
        self._need(len(keys) <= 10 and self._once([key["keyid"] for key in keys]), "more than 10 keys, or one twice")
        if handler["credential"] is not None:
            credential = self._members(handler["credential"], {"type": str, "secret": str})
            known = credential["type"] in ("bearer", "basic", "header", "oauth2")
            self._need(known and has_form(credential["secret"], "secret"), "the credential has another form")

    def _check_rule(self, name: str, rule: dict[str, Any], action: dict[str, Any]) -> None:
        self._need(rule["risk_level"] in ("low", "medium", "high"), "there is no such risk level")
        self._need(1 <= len(rule["tiers"]) <= 5 and len(rule["limits"]) <= 10, "1 to 5 tiers, and at most 10 limits")
        self._need(not rule["smart_contracts"] or name == "transfer_funds", f"{name} moves no money")
        for requester in self._list(rule["requesters"]):
            kind, _, value = requester.partition(":")
            good = kind in ("user", "group", "agent") and value != ""
            self._need(good and (kind != "user" or is_subject(value)), "there is no such requester")
            self._need(kind != "group" or value in self.content["groups"], f"there is no group {value}")
            self._need(kind != "agent" or len(value) <= 256, "an agent's name is too long")
        self._check_destinations(name, rule, action)
        most = 0
        for tier in rule["tiers"]:
            self._need(most is not None, "a tier after the last")
            self._check_tier(name, self._members(tier, TIER))
            self._need(tier["max_amount"] is None or tier["max_amount"] > most, "the tiers do not rise")
            most = tier["max_amount"]
        one = len(rule["tiers"]) == 1 and rule["tiers"][0]["max_amount"] is None
        self._need(action["amount"] is not None or one, f"{name} has no amount, so one tier")
        limits = [self._check_limit(action, self._members(limit, LIMIT)) for limit in rule["limits"]]
        self._need(len(set(limits)) == len(limits), "a limit stands twice")
        counted = any(limit["max_count"] is not None for limit in rule["limits"])
        free = not rule["allowed"] or action["effect"] == "none" or action["amount"] is not None
        self._need(free or counted, f"{name} has an effect, no amount, and no limit with max_count")

    def _list(self, values: list[Any] | None) -> list[str]:
        good = values is None or (1 <= len(values) <= 100 and self._once(values))
        self._need(good, "a list has 1 to 100 texts, each once")
        return values or []

    def _check_destinations(self, name: str, rule: dict[str, Any], action: dict[str, Any]) -> None:
        destinations = self._list(rule["destinations"])
        self._need(not destinations or action["destination"] is not None, f"{name} has no destination")
        for each in destinations:
            self._need(len(each) <= 256, "a destination has more than 256 characters")
            if name in BUILT_IN:
                good = address(each) == each and (rule["smart_contracts"] or not is_contract(each))
                self._need(good, f"{each} is no address in its one spelling, or of a smart contract")

    def _check_tier(self, name: str, tier: dict[str, Any]) -> None:
        top = MOST if name in BUILT_IN else LARGEST
        self._need(tier["max_amount"] is None or 1 <= tier["max_amount"] <= top, "a tier's max_amount is out of range")
        self._need(0 <= tier["approvals"] <= 10 and not tier["signature"], "0 to 10 approvals, without signatures")
        after, to, expires = tier["escalate_after"], tier["escalate_to"], tier["expires_after"]
        for each in (after, expires):
            self._need(each is None or 1 <= each <= RANGES["expires_after"], "a tier's time is out of range")
        self._need((after is None) == (to is None), "escalate_after and escalate_to need each other")
        self._need(None in (after, expires) or after < expires, "it expires before it escalates")
        without = (tier["approvers"], after, to) == (None, None, None)
        self._need(tier["approvals"] > 0 or without, "a tier without approvals names people")
        self._need(to is None or to in self.content["groups"], f"there is no group {to}")
        self._check_group(tier)

    def _check_group(self, needed: dict[str, Any]) -> None:
        group = needed["approvers"]
        self._need(group is None or group in self.content["groups"], f"there is no group {group}")
        enough = group is None or len(self.content["groups"][group]) >= needed["approvals"]
        self._need(enough, f"the group {group} has fewer members than approvals")

    def _check_limit(self, action: dict[str, Any], limit: dict[str, Any]) -> tuple[Any, ...]:
        by_count = limit["max_count"] is not None
        self._need(by_count == (limit["max_amount"] is None), "a limit has one of max_amount and max_count")
        maximum = limit["max_count"] if by_count else limit["max_amount"]
        self._need(1 <= maximum <= (10**6 if by_count else LARGEST), "a limit's maximum is out of range")
        self._need(60 <= limit["window_seconds"] <= 2_678_400, "a limit's window is out of range")
        self._need(by_count or action["amount"] is not None, "a limit of amounts, and no amount")
        per = limit["per"]
        self._need(per in ("action", "requester", "agent", "source", "destination"), "there is no such per")
        has_it = per not in ("source", "destination") or action.get(per) is not None
        self._need(has_it, f"the action has no {per}")
        if limit["over"] != "deny":
            over = self._members(limit["over"], NEEDED)
            self._need(1 <= over["approvals"] <= 10, "1 to 10 approvals over a limit")
            self._check_group(over)
        return by_count, per, limit["window_seconds"]


def is_subject(value: Any) -> bool:
    """Whether a text can be a person's subject, in its one spelling."""
    hidden = INVISIBLE.replace(BLANK, "\ufffc\ufffd")
    if type(value) is not str or not value.isprintable() or re.search(hidden, value):
        return False
    shown = any(unicodedata.category(letter)[0] not in "ZCM" and letter != BLANK for letter in value)
    normal = unicodedata.normalize("NFC", value).strip(" ") == value
    return shown and normal and len(value) <= 256 and value not in PARTS


def address(value: Any) -> str | None:
    """A Qubic address in its one spelling; None for what is no address."""
    if has_form(value, "legacy"):
        return str(value).lower()
    return value if has_form(value, "identity") and letters(number_of(value)) == value else None


def number_of(identity: str) -> bytes:
    """The 32 bytes of an identity, without its checksum."""
    words = [identity[at : at + 14] for at in (0, 14, 28, 42)]
    numbers = [sum((ord(letter) - 65) * 26**n for n, letter in enumerate(word)) for word in words]
    return b"".join((number % 2**64).to_bytes(8, "little") for number in numbers)


def is_contract(known: str) -> bool:
    """Whether an address is that of a smart contract, or zero: nobody holds its key."""
    return int(known, 16) < 1024 if known.startswith("0x") else not any(number_of(known)[8:])


@functools.cache
def wallet_of(text: str) -> str:
    """The identity of a wallet: of an address of the older clients, the one that the mock network derives from it."""
    if not text.startswith(("0x", "0X")):
        return text
    digest = hashlib.shake_256(b"qaes demo wallet, worth nothing: " + text.lower().encode()).digest(55)
    key = k12(k12(bytes(byte % 26 for byte in digest)))
    x, (real, imaginary) = times(int.from_bytes(key, "little") % ORDER, G)
    sign = (x[0] or x[1]) >> 126
    return letters((real | imaginary << 128 | sign << 255).to_bytes(32, "little"))


def pointed(value: Any, pointer: str | None) -> Any:
    for part in pointer.split("/")[1:] if pointer else ():
        if not isinstance(value, dict):
            return None
        value = value.get(part.replace("~1", "/").replace("~0", "~"))
    return value if pointer else None


class Evaluation:
    """What a document of format 2 decides on a request, recomputed.

    `decision` is the form that plans and entries have, `limits` what the request adds to each window (with `over`),
    `members` the people of the tier's group.
    """

    def __init__(self, document: dict[str, Any], policy_id: str, action: str, request: dict[str, Any]) -> None:
        self.groups, parameters = document["groups"], request["parameters"]
        self.rule = rule = document["rules"].get(action)
        self.built_in = action in BUILT_IN
        defined: Any = BUILT_IN.get(action) or document["actions"].get(action)
        self.limits: list[dict[str, Any]] = []
        tier, risk = None, "high"
        if defined is not None and rule is not None:
            risk = rule["risk_level"]
            amount = pointed(parameters, defined["amount"])
            self.amount = amount if type(amount) is int and 1 <= amount <= LARGEST else None
            self.unit = "QU" if self.built_in else defined["unit"] or ""
            to = pointed(parameters, defined["destination"])
            self.values = {
                "action": action, "requester": request["requester"], "agent": request.get("agent"),
                "source": pointed(parameters, defined.get("source")), "destination": to,
            }  # fmt: skip
            tier = self._tier(defined) if rule["allowed"] and self._may_request() and self._may_go_to(to) else None
            if tier is not None and not all(self._add(limit) for limit in rule["limits"]):
                tier, self.limits = None, []
        self.tier: dict[str, Any] = {} if tier is None or rule is None else rule["tiers"][tier]
        approvals = self.tier.get("approvals", 0)
        self.decision = {
            "policy_id": policy_id, "action_type": action, "allowed": tier is not None, "risk_level": risk,
            "requires_approval": approvals > 0, "approvals": approvals, "format": 2, "tier": tier,
            "expires_after": self.tier.get("expires_after"), "approvers": self.tier.get("approvers"),
            "signature": self.tier.get("signature", False),
        }  # fmt: skip

    def lines(self) -> list[str]:
        """What the report says of the tier."""
        if not self.decision["allowed"]:
            return []
        number, count, policy_id = self.decision["tier"] + 1, len(self.rule["tiers"]), self.decision["policy_id"]
        amount = f"{self.amount} {self.unit}, " if self.amount is not None else ""
        people = f"by {self.decision['approvers'] or 'any approvers'}" if self.decision["approvals"] else ""
        approvals = f"{self.decision['approvals']} approval(s) {people}".strip()
        return [f"tier      {number} of {count} of {policy_id}: {amount}{approvals}"]

    def _may_request(self) -> bool:
        requesters, agent = self.rule["requesters"], self.values["agent"]
        if requesters is None or agent is not None:
            return requesters is None or f"agent:{agent}" in requesters
        who = self.values["requester"]
        groups = [self.groups[each[6:]] for each in requesters if each.startswith("group:")]
        return f"user:{who}" in requesters or any(who in group for group in groups)

    def _may_go_to(self, destination: Any) -> bool:
        known = address(destination) if self.built_in else destination
        return self.rule["destinations"] is None or (type(known) is str and known in self.rule["destinations"])

    def _tier(self, defined: dict[str, Any]) -> int | None:
        """The first tier that reaches the amount."""
        tiers = self.rule["tiers"]
        limited = any(limit["max_amount"] is not None for limit in self.rule["limits"])
        needs_amount = limited or tiers[0]["max_amount"] is not None or not self.built_in
        if defined["amount"] is not None and self.amount is None and needs_amount:
            return None
        reach = (tier["max_amount"] is None or (self.amount or 0) <= tier["max_amount"] for tier in tiers)
        return next((index for index, reaches in enumerate(reach) if reaches), None)

    def _add(self, limit: dict[str, Any]) -> bool:
        """Compute what the request adds to a window; whether an empty window has room for it."""
        per, value = limit["per"], self.values[limit["per"]]
        if value is None and per == "agent":
            return True
        if type(value) is not str:
            return False
        value = wallet_of(value) if self.built_in and per in ("source", "destination") else value
        counts = "amount" if limit["max_amount"] is not None else "count"
        maximum = limit[f"max_{counts}"]
        key = f"{self.values['action']}/{self.unit}/{counts}/{per}/{limit['window_seconds']}/{sha256(value)}"
        add = 1 if counts == "count" else self.amount or 0
        use = {"key": key, "per": per, "value": value, "window_seconds": limit["window_seconds"]}
        self.limits.append(use | {"counts": counts, "add": add, "maximum": maximum, "over": limit["over"]})
        return bool(limit["over"] != "deny" or add <= maximum)


# The story ------------------------------------------------------------------------------------------------------------


class Story:
    """What the entries tell, one after the other; each may only tell what follows from those before.

    No value in it is changed in place: a copy of its attributes is a copy of its state.
    """

    def __init__(self, policies: dict[str, str], network: str = "", stream: PolicyStream | None = None) -> None:
        self.network, self.stream, self.began = network, stream, 0.0
        documents = {hash_: read_document(text, hash_) for hash_, text in policies.items()}
        self.policies = {f"policy-v{each['version']}-{hash_}": each for hash_, each in documents.items()}
        one_each = len({each["version"] for each in documents.values()}) == len(documents)
        need(one_each, "R77 policy", "two documents of one version")
        self.unused = frozenset(self.policies)
        # By groups, as many as are required may have approved, and it does not suffice: then more people decide.
        self.by_groups = stream is not None or any(each["format"] == 2 for each in documents.values())
        self.request: dict[str, Any] = {}
        self.analysis: dict[str, Any] = {}
        self.policy: dict[str, Any] = {}  # the pinned decision
        self.plan: dict[str, Any] = {}
        self.plan_hash = self.ended = self.request_hash = ""
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
        self.decided: tuple[str, ...] = ()  # tiers and limits that applied

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
            of_it = given["request_hash"] == self.request_hash
            need(of_it, "R31 input", "of another request", where)
        getattr(self, str(teller))(entry, where)

    def _person(self, entry: dict[str, Any]) -> str:
        """The person who is an entry's actor, in the one form in which two names are compared."""
        name = person(entry["actor"])
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
        self.request_hash = sha256(canonical(self.request))
        self.began = moment(entry["timestamp"], where)
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
        if self.stream:
            self.stream.begin(self.began, action)
        self.policy = self._decision(entry["output"], entry)
        need(self.policy["risk_level"] == self.analysis["risk_level"], "R80 policy", "another risk", where)
        decided = entry["policy_id"] == self.policy["policy_id"]
        need(decided, "R35 policy", "not the policy that decided", where)
        said = "allowed" if self.policy["allowed"] else "denied"
        need(entry["status"] == said, "R81 policy", f"the policy says {said}", where)

    def _evaluate(self, policy_id: str) -> Evaluation:
        return Evaluation(self.policies[policy_id], policy_id, self.analysis["action_type"], self.request)

    def _decision(self, value: Any, entry: dict[str, Any]) -> dict[str, Any]:
        """Recompute a decision from the document that it names."""
        types, action, where = {"policy_id": str, "action_type": str}, self.analysis["action_type"], entry["where"]
        decision = ABSENT | members(value, types, "R79 policy", where)
        known = decision["policy_id"] in self.policies
        need(known, "R78 policy", "its document is not in the bundle", where)
        self.unused -= {decision["policy_id"]}
        document = self.policies[decision["policy_id"]]
        if document["version"] < self.version:  # the last good one, when the newest has been altered; or a lie
            again = f"version {document['version']} after {self.version} ({where})"
            self.notes += (f"NOTE      an older version of the policy was in force again: {again}",)
        self.version = document["version"]
        if self.stream:
            time = moment(entry["timestamp"], where)
            note = self.stream.check_version(decision["policy_id"], document, time, where)
            in_force = self.stream.of_version.get(decision["policy_id"], {}).get("policy_in_force", entry)
            late = f"NOTE      in the log, {decision['policy_id']} came into force after its use ({where})"
            for each in (note, late if is_before(entry, in_force) else ""):
                self.notes += (each,) if each and each not in self.notes else ()
        if document["format"] == 2:
            evaluated = self._evaluate(decision["policy_id"])
            need(same(value, evaluated.decision), "R103 policy", "not what the document says of the request", where)
            self.decided += tuple(line for line in evaluated.lines() if line not in self.decided)
            return decision
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
        ended = before.get("state", "approved") not in ("approved", "enough") or self.rejected_in == self.run
        need(not ended, "R42 approval", "another one is open, or was a no, or came to nothing", where)
        need(asked["required"] > given or self.by_groups, "R42 approval", "as many have approved already", where)
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
        self.approval = {"state": "pending", "asked": asked, "by": (), "subjects": (), "step": place_of(entry)}
        self._said(entry)

    def _said(self, entry: dict[str, Any]) -> None:
        said = members(entry["output"], {"status": str, "actor": str}, "R45 output", entry["where"])
        alike = (said["status"], said["actor"]) == (entry["status"], entry["actor"])
        need(alike, "R45 output", "the entry says something else", entry["where"])

    def _of_approval(self, entry: dict[str, Any], state: str) -> None:
        # The step may have succeeded since: an execution before this one had begun it.
        approval = self.approval if self.approval.get("step") == place_of(entry) else {}
        # `enough` is either: as many as required have approved, and the groups are counted when the step begins.
        asked = approval.get("state") in (state, "enough") and same(entry["input"], approval["asked"])
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
        subjects = self.approval["subjects"] + ((entry["actor"],) if yes else ())
        need(said["approvals"] == len(by), "R53 approval", "not as many have approved", where)
        state = ("enough" if self.by_groups else "approved") if len(by) >= asked["required"] else "pending"
        if not yes:
            state, self.rejected_in = "rejected", self.run
            place = " ".join(place_of(entry)[1:])
            self.rejections += (f"rejected  {place} by {entry['actor']}, in run {self.run}: {said['reason']}",)
        self.approval = self.approval | {"state": state, "by": by, "subjects": subjects}

    def _claim(self, entry: dict[str, Any], where: str) -> None:
        """A step is begun, once in a run: by the policy in force now and the pinned one, with what both ask for."""
        said, step = members(entry["input"], CLAIM, "R54 step", where), self._step(entry, "step")
        need(said["step_hash"] == sha256(canonical(step)), "R54 step", "another step was begun", where)
        need(said["run"] == self.run and said["attempt"] > 0, "R54 step", "begun for another run", where)
        need(not self._tried(), "R55 step", "begun a second time", where)
        output = members(entry["output"], {}, "R79 policy", where)
        of_format_2, acts = same(output.get("format"), 2), step["type"] in NEEDS_APPROVAL
        stated = output.pop("limits", []) if of_format_2 and acts else []
        policy, approval = self._decision(output, entry), self.approval
        need(policy["allowed"], "R87 step", "begun though the policy in force did not allow it", where)
        held = approval.get("state", "approved") in ("approved", "enough") and self.rejected_in != self.run
        need(held, "R56 step", "begun without its approval", where)
        approval = approval if approval.get("step") == place_of(entry) else {}
        by, of_round = approval.get("by", ()), approval["asked"]["round"] if approval else None
        need(said["approval"] == of_round, "R57 step", "by another approval than the one that was given", where)
        if approval:
            late = moment(entry["timestamp"], where) - moment(approval["asked"]["expires_at"], where) >= LATE
            need(not late, "R58 step", "begun long after its approval had expired", where)
        subjects = approval.get("subjects", ())
        if acts and self.stream:
            note = self.stream.check_not_suspended(policy["action_type"], entry)
            self.notes += (note,) if note else ()
        over = self._over_limits(stated, policy, subjects, where) if acts and of_format_2 else False
        if step["requires_approval"] or self._must_ask(step, policy) or over:
            self._check_people(policy, by, subjects, where)
        if step["type"] == "onchain_action":
            for each in (self.policy, policy):
                self._within_limits(step["parameters"], each, where)
            if 2 in (self.policy.get("format"), policy.get("format")):
                self._check_ends(step["parameters"], policy, where)
        if self.claim and step["type"] == "onchain_action":
            self.lost += (self.unknown(self.claim),)
        self.claim, self.approval = {"run": self.run, "step": step}, {}
        self.approvers += tuple(each for each in by if each not in self.approvers)

    def _check_people(self, policy: dict[str, Any], by: tuple[str, ...], subjects: tuple[str, ...], where: str) -> None:
        """Check that as many people have approved as each of the two policies requires, of its groups."""
        groups = self._groups(policy)
        for each in (self.policy, policy):
            if each.get("format") != 2:
                need(len(by) >= each["approvals"], "R88 step", "begun without its approval", where)
            elif each["approvals"]:
                # Who has left the group since then does not count, nor who was not in it.
                of_both = set(self._groups(each).get(each["approvers"], [])) & set(groups.get(each["approvers"], []))
                self._enough(each, of_both, subjects, "R104 step", where)

    def _groups(self, policy: dict[str, Any]) -> dict[str, list[str]]:
        """The groups of a policy; one of format 1 has none."""
        return dict(self.policies[policy["policy_id"]].get("groups", {}))

    def _enough(
        self, needed: dict[str, Any], people: set[str], subjects: tuple[str, ...], rule: str, where: str
    ) -> None:
        group = needed["approvers"]
        given = sum(group is None or each in people for each in subjects)
        whom = f"by {group}" if group is not None else "by any approvers"
        need(given >= needed["approvals"], rule, f"{given} of {needed['approvals']} approvals {whom}", where)

    def _over_limits(self, stated: Any, policy: dict[str, Any], subjects: tuple[str, ...], where: str) -> bool:
        """Check what a claim states of the limits; whether the request exceeds one that lets people approve it."""
        evaluated, exceeds = self._evaluate(policy["policy_id"]), False
        uses = evaluated.limits
        need(type(stated) is list and len(stated) == len(uses), "R105 step", "not the limits of its policy", where)
        for each, use in zip(stated, uses, strict=False):
            said = members(each, {"used": int}, "R105 step", where)
            used, expected = said.pop("used"), {name: value for name, value in use.items() if name != "over"}
            need(same(said, expected) and used >= 0, "R105 step", "not what the policy says of a limit", where)
            unit = evaluated.unit if use["counts"] == "amount" else "requests"
            window = f"{use['maximum']} {unit} in {use['window_seconds']} s, by {use['per']} {use['value']}"
            self.decided += (f"limit     {window}: {used} used before (NOT PROVED), and {use['add']} now",)
            if used + use["add"] <= use["maximum"]:
                continue
            need(use["over"] != "deny", "R106 step", f"beyond the limit of {window}", where)
            exceeds = True
            people = set(self._groups(policy).get(use["over"]["approvers"], []))
            self._enough(use["over"], people, subjects, "R107 step", where)
        return exceeds

    def unknown(self, claim: dict[str, Any]) -> str:
        name = "{step_id} {type}".format(**claim["step"])
        return f"UNKNOWN   what became of {name}, which was begun in run {claim['run']}: outcome unknown"

    def _tried(self) -> bool:
        """Whether this execution has begun the step, or was refused it."""
        return self.run in (self.failed_in, self.claim.get("run"))

    def _within_limits(self, moved: dict[str, Any], policy: dict[str, Any], where: str) -> None:
        if policy.get("format") == 2:  # its amounts and destinations are part of its decision
            return
        most = min(policy[limit] or MOST for limit in ("max_amount", "daily_limit"))
        need(moved["amount"] <= most, "R89 step", "moves more than the policy allows", where)
        known = moved["to_address"] in (policy["allowed_addresses"] or [moved["to_address"]])
        need(known, "R90 step", "moves money to where the policy does not allow", where)

    def _check_ends(self, moved: dict[str, Any], policy: dict[str, Any], where: str) -> None:
        """Check that no contract pays, and that a contract is paid only if both policies, of format 2, allow it."""
        rules = [self.policies[each["policy_id"]]["rules"].get("transfer_funds", {}) for each in (self.policy, policy)]
        payable = all(rule.get("smart_contracts", False) for rule in rules)
        pays, paid = (address(moved[name]) for name in ("from_address", "to_address"))
        need(pays is None or not is_contract(pays), "R108 step", "moves money from a smart contract", where)
        allowed = payable or paid is None or not is_contract(paid)
        need(allowed, "R108 step", "moves money to a smart contract, or burns it", where)

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
            pinned, decision = seen.pop("pinned"), self._decision(seen, entry)
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
        raise Failed("R20 rpc", f"the node did not return it: {error}", "anchor") from None
    for name, each in alike.items():
        need(each, "R20 rpc", f"the node has another {name}", "anchor")


def check_whole_log(
    prefix: str, bundle: dict[str, Any], anchor: dict[str, Any], anchored: int, open_: bool, story: Story
) -> list[str]:
    """Read the log up to its newest checkpoint (C2SP tlog-tiles): both roots, and which entries the task has in it."""
    note = read(prefix, "checkpoint").split(b"\n")
    try:
        size, newest = int(note[1]), base64.b64decode(note[2], validate=True)
    except (ValueError, IndexError):
        raise Failed("R21 whole log", "its checkpoint is none", prefix) from None
    need(size >= anchor["size"], "R21 whole log", f"its checkpoint, of size {size}, is older than the anchor", prefix)
    leaves: list[bytes] = []
    found: list[bytes] = []
    of_policy: list[bytes] = []
    data = b""
    for at in range(size):
        if at % 256 == 0:
            data = read_tile(prefix, at // 256, min(256, size - at))
        length = int.from_bytes(data[:2], "big")
        text, data = data[2 : 2 + length], data[2 + length :]
        if f'"task_id":"{bundle["task_id"]}"'.encode() in text:
            found.append(text)
        if b'"stream":"policy"' in text:
            of_policy.append(text)
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
    check_policy_in_log(prefix, of_policy, story, open_)
    return [f"log       as of size {size}, root {newest.hex()}: {follow}"]


def check_policy_in_log(prefix: str, texts: list[bytes], story: Story, open_: bool) -> None:
    """Check that the log has the bundle's entries of the policy, one chain, and no other change that concerns it."""
    rule, prev, latest, stream = "R109 whole log", "0" * 64, 0.0, story.stream
    # A bundle of format 1 has no entries: it is from before the first change.
    numbers = [each["seq"] for each in stream.entries] if stream else [0]
    leaves = {each["seq"]: each["leaf"] for each in stream.entries[: stream.anchored]} if stream else {}
    for number, text in enumerate(texts, start=1):
        types = {"seq": int, "prev": str, "timestamp": str, "policy_id": str}
        entry = members(parse(text.decode(errors="replace"), prefix, fractions=True), types, rule, prefix)
        linked = (entry["seq"], entry["prev"]) == (number, prev)
        need(linked, rule, f"its entries of the policy are no chain, at {number}", prefix)
        leaf = leaf_hash(text)
        prev = leaf.hex()
        need(leaves.pop(number, leaf) == leaf, rule, f"it has another entry {number} of the policy", prefix)
        time = moment(entry["timestamp"], prefix)
        need(time > latest - SKEW, rule, f"its entry {number} of the policy is long before an earlier one", prefix)
        after, latest = number <= numbers[-1] or time > story.newest, max(latest, time)
        used = stream is not None and entry["policy_id"] in story.policies
        need(not used or number in numbers, rule, f"entry {number} is about a policy of the task, and left out", prefix)
        need(after or open_, rule, f"entry {number} of the policy, while the task ran: ask for a newer bundle", prefix)
    need(not leaves, rule, "it lacks entries of the policy", prefix)


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
    stream = PolicyStream(bundle, log_id) if bundle["policy_entries"] else None
    anchor = check_anchor(bundle, log_id, anchor_identity)
    anchored = check_inclusion(bundle["entries"], entries, anchor)
    if stream:
        stream.anchored = check_inclusion(bundle["policy_entries"], stream.entries, anchor)
    story = Story(bundle["policies"], bundle["network"], stream)
    of_format_2 = any(each["format"] == 2 for each in story.policies.values())
    need(stream is not None or not of_format_2, "R101 policy", "a document of format 2, and no entries of the policy")
    for sent, entry in zip(bundle["entries"], entries, strict=True):
        story.tell(entry, sent["output"])
    need(not story.unused, "R78 policy", "a document that nothing refers to")
    if not open_:
        last, begun = entries[-1]["where"], story.claim.get("step", {})
        rest, known = f"entry {anchored + 1}", begun.get("type") != "onchain_action"
        need(anchored == len(entries), "R19 complete", "not anchored yet (--open accepts that)", rest)
        for each in stream.entries[stream.anchored :] if stream else ():
            need(False, "R19 complete", "not anchored yet (--open accepts that)", each["where"])
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
        *(stream.unproved(story, has_log=bool(log)) if stream else ()),
    ]
    lines = report(bundle, anchor, entries, anchored, story) + [line for is_so, line in unproved if is_so]
    return lines + (check_whole_log(log, bundle, anchor, anchored, open_, story) if log else [])


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
        *story.decided,
        *(story.stream.lines() if story.stream else ()),
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
