"""Attacks on the audit trail, and the check of docs/audit.md that catches each.

There are three attackers. One alters a bundle in transit. One rewrites the database and computes every hash anew, but
lacks the anchor key. The third is the operator, who has the key and records a history that the rules forbid.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaes.domain.anchor import AnchorPayload, log_id_bytes
from qaes.domain.bundle import TrailEntry, build_bundle
from qaes.domain.canonical import canonical_json, salted_hash, sha256_hex
from qaes.domain.ids import timestamp
from qaes.domain.merkle import ProofError, leaf_digest, leaf_hash, node_hash, verify_consistency, verify_inclusion
from qaes.domain.models import Analysis
from qaes.domain.policy import PolicyDecision, Rule, policy_of
from qaes.domain.qubic import fourq, transaction
from qaes.domain.tiles import consistency_proof
from tests.support.bundles import (
    LOG_ID,
    RULES,
    SALT,
    START,
    STORIES,
    TARGET,
    TRANSFER,
    WALLET,
    Anchorer,
    Log,
    Trail,
    cancelled,
    confirmed_late,
    denied,
    load_verifier,
    monitored,
    on_chain,
    policy_text,
    rejected,
    transfer,
    transferred,
)
from tests.support.http_server import serve
from tests.support.sampling import sample
from tests.support.tracing import untraced
from tests.unit.test_canonical import JSON

verifier = load_verifier()
ANCHORER = Anchorer()
OTHER = Anchorer("b" * 55)
ID = "019ab000"


def verify(data: dict[str, Any] | bytes, **options: Any) -> list[str]:
    data = data if isinstance(data, bytes) else canonical_json(data).encode()
    lines: list[str] = verifier.verify(data, **{"log_id": LOG_ID, "anchor_identity": ANCHORER.identity} | options)
    return lines


def caught(data: dict[str, Any] | bytes, **options: Any) -> tuple[str, str]:
    """The check that fails, and where."""
    with pytest.raises(verifier.Failed) as failed:
        verify(data, **options)
    return failed.value.check, failed.value.where


GOOD = transferred().bundle()
SMALL = denied().bundle()


def alter_text(entry: dict[str, Any], **changes: Any) -> None:
    entry["text"] = canonical_json(json.loads(entry["text"]) | changes)


def rewrite(bundle: dict[str, Any], change: Callable[[list[dict[str, Any]]], None]) -> dict[str, Any]:
    """Change the entries, then number and chain them anew: the database rewritten with all hashes recomputed."""
    bundle = deepcopy(bundle)
    change(bundle["entries"])
    prev = "0" * 64
    for seq, entry in enumerate(bundle["entries"], start=1):
        hashes = {f"{side}_hash": salted_hash(SALT, json.loads(entry[side])) for side in ("input", "output")}
        alter_text(entry, seq=seq, prev=prev, **hashes)
        prev = leaf_hash(entry["text"])
    return bundle


def anchored_with(sent: bytes, bundle: dict[str, Any] = GOOD) -> dict[str, Any]:
    """The bundle with another transaction, and with every field about that transaction adapted."""
    decoded = transaction.decode(sent)
    anchor = {
        "payload": decoded.payload.hex(),
        "transaction": base64.b64encode(sent).decode(),
        "txid": decoded.id,
        "tick": decoded.tick,
    }
    return bundle | {"anchor": anchor}


def payload_of(bundle: dict[str, Any]) -> bytes:
    return bytes.fromhex(bundle["anchor"]["payload"])


# One entry altered

FIELDS = {
    "v": (2, "text"), "log_id": ("another", "log"), "task_id": ("task_1", "task"), "seq": (9, "seq"),
    "step_index": (0, "prev"), "step_id": ("step_9", "prev"), "step_type": ("generic_action", "prev"),
    "kind": ("approval_expired", "prev"), "actor": ("mallory", "prev"), "status": ("rejected", "prev"),
    "input_hash": ("0" * 64, "input"), "output_hash": ("0" * 64, "output"), "plan_hash": ("0" * 64, "prev"),
    "policy_id": ("policy-v9-000000000000", "prev"), "nonce": ("0" * 32, "prev"), "prev": ("0" * 64, "prev"),
    "timestamp": ("2026-11-24T12:00:00.000Z", "prev"),
}  # fmt: skip


def test_table_has_every_field() -> None:
    assert set(FIELDS) == set(json.loads(GOOD["entries"][0]["text"]))


@pytest.mark.parametrize("field", FIELDS)
def test_field_of_an_entry_altered(field: str) -> None:
    value, check = FIELDS[field]
    bundle = deepcopy(GOOD)
    alter_text(bundle["entries"][6], **{field: value})
    # The next entry shows a change that the entry itself does not show.
    assert caught(bundle) == (check, "entry 8" if check == "prev" and field != "prev" else "entry 7")


@pytest.mark.parametrize(
    "field", sorted(set(FIELDS) - {"v", "log_id", "task_id", "seq", "prev", "input_hash", "output_hash"})
)
@pytest.mark.parametrize("at", [0, 6, -1])
def test_field_altered_and_all_hashes_recomputed(field: str, at: int) -> None:
    bundle = rewrite(GOOD, lambda entries: alter_text(entries[at], **{field: FIELDS[field][0]}))
    assert caught(bundle) == ("proof", f"entry {at + 1 if at >= 0 else len(bundle['entries'])}")


@pytest.mark.parametrize("side", ["input", "output"])
def test_altered_input_or_output_is_caught(side: str) -> None:
    bundle = deepcopy(GOOD)
    said = json.loads(bundle["entries"][0]["input"])
    bundle["entries"][0][side] = canonical_json(said | {"description": "another"})
    assert caught(bundle) == (side, "entry 1")

    def change(entries: list[dict[str, Any]]) -> None:
        entries[0][side] = canonical_json(said | {"description": "another"})

    assert caught(rewrite(GOOD, change)) == ("proof", "entry 1")


def test_replaced_salt_is_caught() -> None:
    assert caught(GOOD | {"salt": "0" * 32}) == ("input", "entry 1")


@pytest.mark.parametrize("salt", ["", SALT[:-1], SALT.upper(), SALT + "\n", 'x","value":1,"y":"', "\u0660" * 32])
def test_malformed_salt_is_refused(salt: str) -> None:
    """A salt is put into a text as it is: one with quotes would let two values have one hash."""
    assert caught(GOOD | {"salt": salt}) == ("format", "bundle")


def test_bundle_of_another_format() -> None:
    assert caught(GOOD | {"format": "qaes-bundle-2"}) == ("format", "bundle")
    assert caught(GOOD | {"entries": []}) == ("format", "bundle")


# Entries deleted, reordered, duplicated, inserted


def swap(entries: list[dict[str, Any]]) -> None:
    entries[3], entries[4] = entries[4], entries[3]


MOVES: dict[str, tuple[Callable[[list[dict[str, Any]]], Any], str]] = {
    "first deleted": (lambda entries: entries.pop(0), "entry 1"),
    "one deleted": (lambda entries: entries.pop(4), "entry 5"),
    "reordered": (swap, "entry 4"),
    "duplicated": (lambda entries: entries.insert(4, deepcopy(entries[4])), "entry 6"),
    "inserted": (lambda entries: entries.insert(5, deepcopy(entries[0])), "entry 6"),
}


@pytest.mark.parametrize("name", MOVES)
def test_entries_moved(name: str) -> None:
    move, where = MOVES[name]
    bundle = deepcopy(GOOD)
    move(bundle["entries"])
    assert caught(bundle) == ("seq", where)
    assert caught(rewrite(GOOD, move))[0] == "proof"


def test_two_entries_at_one_place() -> None:
    bundle = deepcopy(GOOD)
    for name in ("index", "proof"):
        bundle["entries"][4][name] = bundle["entries"][3][name]
    assert caught(bundle) == ("proof", "entry 5")


def test_log_in_which_a_task_runs_backwards() -> None:
    """The operator's own root over entries out of order: each is included, and yet."""
    trail, log = denied(), Log()
    texts = [text for text, _, _ in trail.entries]
    log.append(*reversed(texts))
    entries = [TrailEntry(*each, 2 - number) for number, each in enumerate(trail.entries)]
    bundle = build_bundle(
        log_id=LOG_ID, network="mock", task_id=GOOD["task_id"], salt=SALT, entries=entries, prove=log.prove,
        anchored=ANCHORER.transaction(log.anchor().encode()).encode(), policies=[trail.policy_text],
    )  # fmt: skip
    assert caught(bundle) == ("index", "entry 2")


# The tail


@pytest.mark.parametrize("kept", [1, 5, 13])
def test_anchored_tail_truncated(kept: int) -> None:
    cut = GOOD | {"entries": GOOD["entries"][:kept]}
    assert caught(cut)[0] in {"complete", "policy"}  # a policy that nothing refers to any more gives it away too
    assert caught(cut | {"policies": GOOD["policies"] if kept > 1 else {}}) == ("complete", f"entry {kept}")


def test_unanchored_tail_truncated() -> None:
    """An entry can be dropped until it is anchored, and no bundle shows it: docs/audit.md states this."""
    bundle = transferred().bundle(unanchored=2)
    cut = bundle | {"entries": bundle["entries"][:-1]}
    assert caught(bundle) == ("complete", "entry 13") == caught(cut)
    assert any("NOT ANCHORED YET" in line for line in verify(cut, open_=True))
    without = bundle | {"entries": bundle["entries"][:-2]}
    assert caught(without) == ("complete", "entry 12")  # the end is missing: it is not finished, or not whole
    assert not any("NOT ANCHORED YET" in line for line in verify(without, open_=True))


def test_unanchored_tail_rewritten() -> None:
    """An entry can be rewritten until it is anchored, and proves nothing until then."""
    bundle = transferred().bundle(unanchored=1)
    tail = rewrite(bundle, lambda entries: alter_text(entries[-1], timestamp="2026-11-24T12:00:00.000Z"))
    assert any("worth nothing so far: entry 14" in line for line in verify(tail, open_=True))
    anchored = rewrite(bundle, lambda entries: alter_text(entries[-2], timestamp="2026-11-24T12:00:00.000Z"))
    assert caught(anchored, open_=True) == ("proof", "entry 13")


def test_anchored_entries_passed_off_as_not_anchored() -> None:
    bundle = deepcopy(GOOD)
    bundle["entries"][5] |= {"index": None, "proof": None}
    assert caught(bundle) == ("index", "entry 6")
    bundle["entries"][5]["index"] = 5
    assert caught(bundle) == ("index", "entry 6")
    for entry in bundle["entries"][5:]:
        entry |= {"index": None, "proof": None}
    assert caught(bundle) == ("complete", "entry 6")


# The whole history rewritten; forks


def test_history_rewritten_with_another_anchor_key() -> None:
    forged = rejected().bundle(OTHER)
    assert caught(forged) == ("identity", "anchor")
    assert verify(forged, anchor_identity=OTHER.identity)  # which is why the identity must come from elsewhere


def test_history_rewritten_under_the_true_anchor() -> None:
    assert caught(rejected().bundle() | {"anchor": GOOD["anchor"]})[0] == "proof"


def test_rewritten_history_without_signature_is_rejected() -> None:
    forged = rejected().bundle()
    signature = base64.b64decode(GOOD["anchor"]["transaction"])[-64:]
    sent = base64.b64decode(forged["anchor"]["transaction"])[:-64] + signature
    assert caught(anchored_with(sent, forged)) == ("signature", "anchor")


def test_two_roots_of_one_size() -> None:
    """A fork: the entries of one side fail under the other's anchor, and no proof leads from one to the other."""
    one, other = Log(), Log()
    mine, yours = transferred().bundle(log=one), transferred().bundle(log=other)
    first, second = one.anchor(), other.anchor()
    assert first.size == second.size and first.root != second.root
    assert caught(mine | {"anchor": yours["anchor"]})[0] == "proof"
    with pytest.raises(ProofError) as fork:
        verify_consistency(
            first=first.size, second=second.size, proof=[], first_root=first.root, second_root=second.root
        )
    assert fork.value.check == "root"


def test_fork_that_goes_on() -> None:
    one, other = Log(), Log()
    transferred().bundle(log=one)
    rejected().bundle(log=other)
    other.append(*(f"more {number}" for number in range(30)))
    seen, now = one.anchor(), other.anchor()
    with pytest.raises(ProofError) as fork:
        verify_consistency(
            first=seen.size,
            second=now.size,
            proof=consistency_proof(seen.size, now.size, other.read),
            first_root=seen.root,
            second_root=now.root,
        )
    assert fork.value.check == "root"


# Anchors


def test_older_anchor_replayed() -> None:
    log = Log()
    log.append("somebody's entry")
    older = log.anchor()
    assert caught(anchored_with(ANCHORER.transaction(older.encode()).encode())) == ("index", "entry 1")


def test_anchor_of_another_log() -> None:
    payload = replace(AnchorPayload(log_id_bytes(LOG_ID), 23, bytes(32)), log_id=log_id_bytes("another"))
    assert caught(anchored_with(ANCHORER.transaction(payload.encode()).encode())) == ("log", "anchor")


def test_server_that_answers_with_another_log() -> None:
    other = Trail(log_id="another").start().end("cancelled", "alice").bundle()
    assert verify(other, log_id="another")
    assert caught(other) == ("log", "bundle")
    assert caught(other | {"log_id": LOG_ID}) == ("log", "entry 1")


def test_server_that_answers_with_another_task() -> None:
    assert caught(GOOD, task_id=GOOD["task_id"][:-1] + "2") == ("task", "bundle")
    assert caught(GOOD | {"task_id": GOOD["task_id"][:-1] + "2"}) == ("task", "entry 1")
    assert caught(GOOD | {"task_id": "task_2"}) == ("format", "bundle")


def test_anchor_of_another_network() -> None:
    """Nothing in the bytes of a transaction names its network. The identity does, where it is another one on each."""
    mock = transferred().bundle(OTHER, network="mock")
    assert caught(mock | {"network": "mainnet"}) == ("identity", "anchor")
    assert caught(GOOD | {"network": "testnet"}) == ("format", "bundle")
    # With one key on both, any holder can change the bundle's network: it is pinned, or reported as unproved.
    # Where money has moved, the result names the network too.
    said = SMALL | {"network": "mainnet"}
    assert caught(said, network="mock") == ("network", "bundle") == caught(SMALL, network="mainnet")
    assert verify(GOOD, network="mock")
    assert caught(GOOD | {"network": "mainnet"}) == ("step", "entry 13")
    report = "\n".join(verify(said))
    assert "NOT CHECKED that the network is mainnet" in report
    assert "NOT PROVED  that any network has the transaction" in report


def test_verifier_reports_node_without_transaction() -> None:
    """Only a look-up shows it: the node of one network has the transaction, the node of the other does not."""
    kept: dict[str, Any] = {}

    def node(method: str, path: str, body: bytes, headers: dict[str, str]) -> dict[str, Any]:
        known = path == "/query/v1/getTransactionByHash" and json.loads(body)["hash"] in kept
        answer = kept[json.loads(body)["hash"]] if known else {"code": 5, "message": "transaction not found"}
        return {"statusCode": 200 if known else 404, "body": json.dumps(answer)}

    with serve(node) as rpc:
        assert caught(GOOD, rpc=rpc) == ("rpc", "anchor")
        kept[GOOD["anchor"]["txid"]] = {"transaction": on_chain(GOOD)}
        assert not any("any network has" in line for line in verify(GOOD, rpc=rpc))
        assert caught(SMALL, rpc=rpc) == ("rpc", "anchor")  # whose anchor is another one


def test_anchor_in_a_transfer_is_refused() -> None:
    payload = payload_of(GOOD)
    for changes in (
        {"amount": 1},
        {"input_type": 0},
        {"destination": OTHER.public_key},
        {"payload": payload + b"\0"},
        {"payload": payload[:-1]},
        {"payload": b"QAEZ" + payload[4:]},
        {"payload": payload[:4] + b"\x02" + payload[5:]},
        {"payload": payload[:13] + bytes(8) + payload[21:]},  # size 0
        {"payload": payload[:-8] + b"\x01" + bytes(7)},  # not the first, and none before it
    ):
        sent = ANCHORER.transaction(changes.pop("payload", payload), **changes).encode()
        assert caught(anchored_with(sent)) == ("anchor", "anchor")


def test_altered_anchor_fields_are_caught() -> None:
    for changes, check in (
        ({"tick": 75_241_801}, "anchor"),
        ({"payload": payload_of(SMALL).hex()}, "anchor"),
        ({"txid": SMALL["anchor"]["txid"]}, "txid"),
        ({"txid": GOOD["anchor"]["txid"].upper()}, "txid"),
        ({"transaction": SMALL["anchor"]["transaction"]}, "anchor"),
        ({"transaction": GOOD["anchor"]["transaction"] + "===="}, "anchor"),
        ({"transaction": "\u00e9"}, "anchor"),
    ):
        assert caught(GOOD | {"anchor": GOOD["anchor"] | changes}) == (check, "anchor")


def test_bytes_before_or_after_the_transaction() -> None:
    sent = base64.b64decode(GOOD["anchor"]["transaction"])
    for data in (sent + b"\0", sent[:-1], b"", sent * 2):
        anchor = GOOD["anchor"] | {"transaction": base64.b64encode(data).decode()}
        with pytest.raises(verifier.Failed, match="not a transaction with an anchor"):
            verify(GOOD | {"anchor": anchor})


def test_signature_mutated() -> None:
    sent = bytearray(base64.b64decode(GOOD["anchor"]["transaction"]))
    for at in (len(sent) - 64, len(sent) - 33, len(sent) - 32, len(sent) - 2, len(sent) - 1):
        mutated = sent.copy()
        mutated[at] ^= 1
        assert caught(anchored_with(bytes(mutated))) == ("signature", "anchor")


def test_signature_s_twin() -> None:
    """With s + N the equation still holds; it would be a second id for the same act."""
    sent = base64.b64decode(GOOD["anchor"]["transaction"])
    s = int.from_bytes(sent[-32:], "little") + fourq.N
    twin = sent[:-32] + s.to_bytes(32, "little")
    assert not transaction.decode(twin).is_signed_by_source()
    assert caught(anchored_with(twin)) == ("signature", "anchor")


def test_signature_for_one_tick_fails_for_another() -> None:
    sent = base64.b64decode(GOOD["anchor"]["transaction"])
    moved = sent[:72] + (75_241_801).to_bytes(4, "little") + sent[76:]
    assert caught(anchored_with(moved)) == ("signature", "anchor")


# Proofs


@pytest.mark.parametrize(
    ("change", "check"),
    [
        (lambda entry: entry["proof"].append("0" * 64), "proof"),
        (lambda entry: entry["proof"].pop(), "proof"),
        (lambda entry: entry.update(proof=[]), "proof"),
        (lambda entry: entry["proof"].reverse(), "proof"),
        (lambda entry: entry["proof"].__setitem__(0, "0" * 64), "proof"),
        (lambda entry: entry["proof"].__setitem__(0, entry["proof"][0].upper()), "proof"),
        (lambda entry: entry["proof"].__setitem__(0, entry["proof"][0][:-1]), "proof"),
        (lambda entry: entry["proof"].__setitem__(0, 0), "proof"),
        (lambda entry: entry.update(index=29), "index"),
        (lambda entry: entry.update(index=-1), "index"),
        (lambda entry: entry.update(index=2**53 - 1), "index"),
        (lambda entry: entry.update(index=entry["index"] + 1), "proof"),
        (lambda entry: entry.update(index=True), "format"),
        (lambda entry: entry.update(index="1"), "format"),
    ],
)
def test_malformed_proofs_are_refused(change: Callable[[dict[str, Any]], None], check: str) -> None:
    bundle = deepcopy(GOOD)
    change(bundle["entries"][2])
    assert caught(bundle) == (check, "entry 3")


@pytest.mark.parametrize(
    ("change", "message"), [(lambda proof: [*proof, proof[0]], "long"), (lambda proof: proof[:-1], "short")]
)
def test_proofs_of_another_length(change: Callable[[list[str]], list[str]], message: str) -> None:
    bundle = deepcopy(GOOD)
    bundle["entries"][2]["proof"] = change(bundle["entries"][2]["proof"])
    with pytest.raises(verifier.Failed, match=f"too {message}"):
        verify(bundle)


def test_node_passed_off_as_a_leaf() -> None:
    leaves = [leaf_digest(bytes([number])) for number in range(4)]
    left, right = node_hash(*leaves[:2]), node_hash(*leaves[2:])
    root = node_hash(left, right)
    with pytest.raises(ProofError) as short:
        verify_inclusion(leaf=left, index=0, size=4, proof=[right], root=root)
    assert short.value.check == "short"
    # Nor is there an entry with a node's hash: a leaf is hashed behind another byte.
    assert leaf_digest(leaves[0] + leaves[1]) != left
    # And a tree of two, in which it would be one, is not the tree whose size is anchored.
    bundle = deepcopy(GOOD)
    bundle["entries"][0]["proof"].pop(0)
    assert caught(bundle) == ("proof", "entry 1")


# JSON


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        ('"seq":1,', '"seq":1.0,', "text"),
        ('"seq":1,', '"seq":1e0,', "text"),
        ('"step_index":-1', '"step_index":-0', "text"),
        ('"seq":1,', '"seq":9007199254740993,', "text"),
        ('"seq":1,', '"seq":NaN,', "json"),
        ('"status":"pending"', '"status":"\\ud800"', "json"),
        ('"seq":1,', '"seq":1,"seq":1,', "json"),
        ('"v":1', '"v":true', "text"),
        ('"seq":1,', '"seq": 1,', "text"),
        ('"status":"pending"', '"status":"\\u0070ending"', "text"),
        ('"seq":1,', '"seq":1,"shown":1,', "text"),
        ('"seq":1,', "", "text"),
        ('"actor":"alice","input_hash"', '"input_hash"', "text"),
    ],
)  # fmt: skip
def test_traps_of_json_in_an_entry(old: str, new: str, check: str) -> None:
    bundle = deepcopy(GOOD)
    assert old in bundle["entries"][0]["text"]
    bundle["entries"][0]["text"] = bundle["entries"][0]["text"].replace(old, new)
    assert caught(bundle) == (check, "entry 1")


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize(
    ("new", "check"), [("1.0", ""), ("NaN", "json"), ("-0", ""), ('{"b":1,"a":2}', ""), ('1,"x":2', "json")]
)
def test_json_traps_in_disclosed_values_are_caught(side: str, new: str, check: str) -> None:
    bundle = deepcopy(GOOD)
    bundle["entries"][1][side] = new
    assert caught(bundle) == (check or side, "entry 2")


@pytest.mark.parametrize(
    ("old", "new", "check"),
    [
        (b'"index":1,', b'"index":1.0,', "json"),
        (b'"index":1,', b'"index":1e0,', "json"),
        (b'"index":1,', b'"index":9007199254740993,', "json"),
        (b'"index":1,', b'"index":NaN,', "json"),
        (b'"index":1,', b'"index":1,"index":1,', "json"),
        (b'"index":1,', b'"index":true,', "format"),
        (b'"index":1,', b'"index":-0,', "proof"),
        (b'"network":"mock"', b'"network":"\\ud800"', "json"),
        (b'"network":"mock"', b'"network":"\xff"', "json"),
        (b'"network":"mock"', b'"network":"mock","more":1', "format"),
        (b'"network":"mock",', b"", "format"),
    ],
)
def test_traps_of_json_in_the_bundle(old: bytes, new: bytes, check: str) -> None:
    data = canonical_json(GOOD).encode()
    assert data.count(old) == 1
    assert caught(data.replace(old, new))[0] == check


@pytest.mark.parametrize("value", [{}, [], None, 1, "x", [GOOD], {"format": "qaes-bundle-1"}])
def test_malformed_bundle_is_refused(value: Any) -> None:
    assert caught(canonical_json(value).encode())[0] == "format"


# Any byte, any value


Output = pytest.CaptureFixture[str]
UNKNOWN_OUTCOME = "UNKNOWN   what became of step_3 onchain_action, which was begun in run {}: outcome unknown"  # quoted
MASKS = [0x01, 0x20, 0x80]
FLIPS = 3
"""Number of bytes of each kind that are flipped, by QAES_SEED; `make fuzz` flips every byte."""


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["denied", "transferred"])
def test_byte_flipped_anywhere_is_refused(name: str, mask: int, tmp_path: Path, capsys: Output) -> None:
    """No flip may pass: there is nothing in a bundle that is not checked, and no other way to write it by one flip."""
    data = canonical_json({"denied": SMALL, "transferred": GOOD}[name]).encode()
    path = tmp_path / "bundle.json"
    arguments = [str(path), "--log-id", LOG_ID, "--anchor-identity", ANCHORER.identity]
    for member, places in members_of(data).items():
        for at in sample(places, FLIPS, f"{name} {mask} {member}"):
            path.write_bytes(data[:at] + bytes([data[at] ^ mask]) + data[at + 1 :])
            status, told = verifier.main(arguments), capsys.readouterr()
            where = f"{member}, byte {at}: …{data[max(0, at - 40) : at + 40]!r}… {told.out}{told.err}"
            assert (status, told.err, told.out.count("\n")) == (1, "", 1), where
            [check] = re.findall(r"^FAILED ([a-z ]+) \(.*\): .* \[R\d+\]$", told.out)
            assert check in WHOSE[member.split()[0]] | {"json", "format"}, where


@cache
def members_of(data: bytes) -> dict[str, list[int]]:
    """The places of a bundle's bytes by kind: in which member they are, and in which one of a text within it."""
    names = {found.start(): found[1].decode() for found in re.finditer(rb'(?<=[{,])"([a-z_]+)":', data)}
    within = {found.start(): found[1].decode() for found in re.finditer(rb'\\"([a-z_]+)\\":', data)}
    outer, inner, places = "anchor", "", dict[str, list[int]]()
    for at in range(len(data)):
        if names.get(at) in WHOSE:
            outer, inner = names[at], ""
        inner = within.get(at, inner)
        places.setdefault(f"{outer} {inner}".strip(), []).append(at)
    return places


WHOSE = {
    "payload": {"anchor"}, "transaction": {"anchor", "identity", "signature", "txid"}, "txid": {"txid"},
    "tick": {"anchor", "format"}, "index": {"index", "proof", "format"}, "input": {"input"}, "output": {"output"},
    "proof": {"proof", "format"}, "text": {"text", "log", "task", "seq", "prev", "input", "output", "proof"},
    "format": {"format"}, "log_id": {"log"}, "network": {"format"}, "policies": {"policy", "format"},
    "salt": {"input", "format"}, "task_id": {"task", "format"}, "anchor": {"format"}, "entries": {"format"},
}  # fmt: skip
"""The checks that catch an altered byte in a member, beside `json`; `format` catches one in its name."""


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(each for key, one in inner for each in places(one, (*path, key)))]


def replaced(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = replaced(value[path[0]], path[1:], new)
    return copy


@untraced
@settings(max_examples=150, deadline=None)
@given(st.data())
def test_replaced_value_is_caught_by_check(data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(places(SMALL)))
    bundle = replaced(SMALL, path, data.draw(JSON))
    if canonical_json(bundle) != canonical_json(SMALL):
        assert caught(bundle, open_=True)


@untraced
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_verifier_never_crashes_on_recorded_entries(data: st.DataObject) -> None:
    """An operator records anything at all, properly hashed, included and anchored."""
    story = STORIES[data.draw(st.sampled_from(sorted(STORIES)))]()
    at = data.draw(st.integers(0, len(story.entries) - 1))
    text, input_, output = story.entries[at]
    side = data.draw(st.sampled_from(["input", "output", "text"]))
    values = {"input": json.loads(input_), "output": json.loads(output), "text": json.loads(text)}
    path = data.draw(st.sampled_from(places(values[side])))
    values[side] = replaced(values[side], path, data.draw(JSON))
    if side == "text" and not path:
        return
    said = values["text"] if isinstance(values["text"], dict) else {}
    said |= {f"{each}_hash": salted_hash(SALT, values[each]) for each in ("input", "output")}
    story.entries[at] = (canonical_json(said), canonical_json(values["input"]), canonical_json(values["output"]))
    rechain(story)
    try:
        verify(story.bundle(), open_=True)
    except verifier.Failed as failed:
        assert failed.check not in {"proof", "index", "prev", "seq"} or side == "text"  # noqa: PT017


def rechain(story: Trail) -> None:
    prev, entries = "0" * 64, []
    for seq, (before, input_, output) in enumerate(story.entries, start=1):
        text = canonical_json(json.loads(before) | {"seq": seq, "prev": prev})
        prev = leaf_hash(text)
        entries.append((text, input_, output))
    story.entries = entries


# Entries that the rules forbid: their hashes hold, and their order does not


def planned(**rules: Any) -> Trail:
    changed = {name: rule.model_copy(update=rules) for name, rule in RULES.items()}
    return Trail(rules=changed).start().check_policy().build().execute(0).execute(1)


def planned_upto(count: int) -> Trail:
    """A transfer with so many steps done."""
    trail = Trail().start().check_policy().build()
    for index in range(count):
        trail.execute(index)
    return trail


def swapped_plan() -> Trail:
    trail = approved(planned()).begin(2)
    assert trail.plan is not None
    steps = list(trail.plan.steps)
    steps[2] = steps[2].model_copy(update={"parameters": {**steps[2].parameters, "amount": 999}})
    kept, trail.plan = trail.plan, trail.plan.model_copy(update={"steps": tuple(steps)})
    _, fields = trail.of_step(2)
    parameters, trail.plan = trail.plan.steps[2].parameters, kept
    return trail.record("step_executed", "worker", "succeeded", parameters, moved(), **fields)


def lax_plan() -> Trail:
    trail = Trail().start().check_policy()
    built = deepcopy(trail).build().plan
    assert built is not None
    steps = tuple(step.model_copy(update={"requires_approval": False}) for step in built.steps)
    return trail.build(steps=steps)


def monitoring(upto: int = 0) -> Trail:
    """A task without approvals under the pinned policy, with so many steps done."""
    trail = Trail("monitor_wallet", {"wallet_address": WALLET}).start().check_policy().build()
    for index in range(upto):
        trail.execute(index)
    return trail


def in_force(trail: Trail, index: int, action: str = "monitoring", version: int = 4, **rule: Any) -> Trail:
    """Begin a step when another version of the policy is in force than the pinned one."""
    text = policy_text(RULES | {action: RULES[action].model_copy(update=rule)}, version=version)
    trail.later = [*trail.later, *({text} - set(trail.later))]
    return trail.begin(index, policy_of(text).decide(action))


def with_step(at: int, **changes: Any) -> Trail:
    """A transfer in whose plan a step is another one."""
    trail = Trail().start().check_policy()
    built = deepcopy(trail).build().plan
    assert built is not None
    steps = list(built.steps)
    steps[at] = steps[at].model_copy(update=changes)
    return trail.build(steps=tuple(steps))


def told(trail: Trail, **changes: Any) -> Trail:
    """Replace fields of the last entry."""
    text, input_, output = trail.entries[-1]
    trail.entries[-1] = (canonical_json(json.loads(text) | changes), input_, output)
    return trail


def approved_of(trail: Trail, index: int) -> Trail:
    return trail.ask(index).decide(index, "bob", True, 1).decide(index, "carol", True, 2)


def moved(**changes: Any) -> dict[str, Any]:
    """The recorded result of the transfer, with changes."""
    trail = planned()
    return trail.result(trail.of_step(2)[0]) | changes


def late(trail: Trail, **by: float) -> Trail:
    trail.moment += timedelta(**by)
    return trail


def of_step(trail: Trail, kind: Any, actor: str, status: str, said: dict[str, Any], **changes: Any) -> Trail:
    _, fields = trail.of_step(2)
    return trail.record(kind, actor, status, trail.asked, said, **fields | changes)


def backdated(trail: Trail) -> Trail:
    """A decision dated before the expiry, recorded after an event three days later."""
    then = trail.moment
    late(trail, days=3).close("approval_reminder", 2)
    return setattr_(trail, moment=then).decide(2, "bob", True, 1)


def approved(trail: Trail) -> Trail:
    return trail.ask(2).decide(2, "bob", True, 1).decide(2, "carol", True, 2)


ANALYSIS = {"action_type": "transfer_funds", "risk_level": "high"}


def checked(analysis: dict[str, Any], status: str, decision: PolicyDecision, **fields: Any) -> Trail:
    fields = {"policy_id": decision.policy_id} | fields
    output = decision.model_dump(mode="json")
    trail = Trail().start().record("policy_checked", "planner", status, analysis, output, **fields)
    return setattr_(trail, policy_id=decision.policy_id)  # its document is in the bundle


LIES: dict[str, tuple[Callable[[], Trail], str]] = {
    "one approval where two are needed": (lambda: planned().ask(2).decide(2, "bob", True, 1).begin(2), "step"),
    "fewer are asked than the policy requires": (lambda: planned().ask(2, required=1), "approval"),
    "more approvals are counted than given": (lambda: planned().ask(2).decide(2, "bob", True, 2), "approval"),
    "no approver is asked, and a decision follows": (
        lambda: planned().record(
            "approval_decided", "bob", "approved", {}, {}, step_index=2, step_id="step_3", step_type="onchain_action"
        ),
        "approval",
    ),
    "it runs after a rejection": (lambda: planned().ask(2).decide(2, "bob", False, 0).begin(2), "step"),
    "it runs after expiry": (lambda: planned().ask(2).close("approval_expired", 2).begin(2), "step"),
    "decided at another time than recorded": (
        lambda: planned().ask(2).decide(2, "bob", True, 1, decided_at="2026-11-23T12:00:00.000Z"),
        "approval",
    ),
    "asked about another plan": (lambda: planned().ask(2, plan_hash="0" * 64), "approval"),
    "asked about another step": (lambda: planned().ask(2, step_hash="0" * 64), "approval"),
    "asked under another policy": (lambda: planned().ask(2, policy_id="policy-v9-000000000000"), "approval"),
    "asked about no step": (
        lambda: planned().record("approval_requested", "compliance", "pending", {}, {}, step_index=-1),
        "approval",
    ),
    "decided about another plan": (lambda: planned().ask(2).decide(2, "bob", True, 1, plan_hash="0" * 64), "approval"),
    "decided about another step": (lambda: planned().ask(2).decide(2, "bob", True, 1, step_hash="0" * 64), "approval"),
    "a rejection recorded as an approval": (
        lambda: planned().ask(2).decide(2, "bob", True, 1, approved=False),
        "approval",
    ),
    "another actor than the approver": (lambda: planned().ask(2).decide(2, "bob", True, 1, actor="carol"), "output"),
    "another step ran than the approved one": (swapped_plan, "step"),
    "an approval used for a second run": (
        lambda: approved(planned()).execute(2, {"error": "x"}, "failed").end("failed").retry().begin(2),
        "step",
    ),
    "handed in by another execution than began it": (
        lambda: approved(planned()).begin(2).end("failed").retry().finish(2, moved(run=2)),
        "step",
    ),
    "handed in by no execution": (lambda: approved(planned()).begin(2).finish(2, moved(run="1")), "step"),
    "handed in before, and that had failed": (
        lambda: (
            approved(planned())
            .begin(2)
            .end("failed")
            .retry()
            .finish(2, {"error": "expired"}, "failed")
            .end("failed")
            .retry()
            .finish(2, moved(run=1))
        ),
        "step",
    ),
    "a step is left out": (lambda: Trail().start().check_policy().build().begin(1), "step"),
    "a transfer runs twice": (lambda: transfer().begin(2), "step"),
    "a step that the plan has not": (
        lambda: transfer().record(
            "step_executed", "worker", "succeeded", {}, {}, step_index=3, step_id="step_4", step_type="onchain_action"
        ),
        "step",
    ),
    "a step of another type": (
        lambda: (
            Trail()
            .start()
            .check_policy()
            .build()
            .record("step_executed", "worker", "succeeded", {}, {}, step_index=0, step_id="step_1", step_type="x")
        ),
        "step",
    ),
    "a plan that asks for no approval": (lax_plan, "plan"),
    "a plan for another task": (lambda: Trail().start().check_policy().build(task_id="task_2"), "plan"),
    "a plan with a step twice": (
        lambda: Trail().start().check_policy().build(steps=(transfer().plan.steps[0],) * 2),
        "plan",
    ),  # type: ignore[union-attr]
    "a plan without steps": (lambda: Trail().start().check_policy().build(steps=()), "plan"),
    "a plan for a denied action": (lambda: Trail("self_destruct").start().check_policy().build(), "plan"),
    "a plan without a policy": (lambda: Trail().start().build(), "plan"),
    "another plan's hash": (
        lambda: (
            Trail()
            .start()
            .check_policy()
            .build()
            .record("step_executed", "worker", "succeeded", {}, {}, plan_hash="0" * 64)
        ),
        "plan",
    ),
    "a decision that the document does not make": (lambda: Trail().start().check_policy(approvals=1), "policy"),
    "allowed without a rule": (lambda: Trail("self_destruct").start().check_policy(allowed=True), "policy"),
    "decided for another action": (lambda: Trail().start().check_policy(action_type="monitoring"), "policy"),
    "a request of another task": (
        lambda: setattr_(Trail(), request=Trail().request | {"task_id": "task_2"}).start(),
        "task",
    ),
    "decided by the rule for something harmless": (
        lambda: checked(
            {"action_type": "monitoring", "risk_level": "low"}, "allowed", Trail().policy.decide("monitoring")
        ),
        "policy",
    ),
    "another policy than the one that decided": (
        lambda: checked(ANALYSIS, "allowed", Trail().decision(), policy_id="policy-v9-000000000000"),
        "policy",
    ),
    "a plan of another analysis": (
        lambda: Trail().start().check_policy().build(analysis=Analysis(action_type="monitoring", risk_level="low")),
        "plan",
    ),
    "a step neither succeeded nor failed": (lambda: planned().finish(1, {}, "skipped"), "text"),
    "a day is no time": (lambda: planned().ask(2, expires_at="2026-11-24"), "text"),
    "pinned to another policy later": (
        lambda: planned().record("step_executed", "worker", "succeeded", {}, {}, policy_id="policy-v9-000000000000"),
        "policy",
    ),
    "a step that saw another decision": (
        lambda: (
            Trail()
            .start()
            .check_policy()
            .build()
            .execute(0)
            .execute(1, Trail().decision().model_dump(mode="json") | {"pinned": True, "allowed": False})
        ),
        "policy",
    ),
    "marked as not pinned": (
        lambda: (
            Trail()
            .start()
            .check_policy()
            .build()
            .execute(0)
            .execute(1, Trail().decision().model_dump(mode="json") | {"pinned": False})
        ),
        "policy",
    ),
    "completed with steps missing": (lambda: planned().end("completed"), "end"),
    "an end that there is not": (lambda: transfer().end("forgotten"), "text"),
    "it goes on after its end": (lambda: transferred().ask(2), "end"),
    "a retry out of count": (lambda: setattr_(planned().end("failed"), run=3).retry(), "output"),
    "another end than recorded": (
        lambda: told(planned().end("failed"), status="cancelled"),
        "output",
    ),
    "another request than made": (
        lambda: setattr_(planned(), request=Trail(parameters={"amount": 1}).request).end("failed"),
        "input",
    ),
    "started by another": (lambda: Trail().record("task_started", "mallory", "pending", Trail().request, {}), "input"),
    # After an end no step begins, and a step that had not begun has no outcome.
    "begun after it was cancelled": (lambda: monitoring().end("cancelled", "alice").begin(0), "end"),
    "begun after it was denied": (lambda: approved(planned()).end("denied").begin(2), "end"),
    "begun after it failed": (lambda: approved(planned()).end("failed").begin(2), "end"),
    "carried out after it was cancelled": (lambda: approved(planned()).end("cancelled", "alice").finish(2), "end"),
    "carried out after it was denied": (lambda: monitoring().end("denied").finish(0), "end"),
    "failed, and never begun": (lambda: monitoring().finish(0, {"error": "x"}, "failed"), "step"),
    "refused, and it was begun": (lambda: approved(planned()).begin(2).refuse(2), "step"),
    "refused after it failed": (lambda: monitoring().execute(0, {"error": "x"}, "failed").refuse(0), "step"),
    "refused, not in a word": (lambda: monitoring().finish(0, {"error": "x", "begun": 0}, "failed"), "step"),
    "two outcomes after the end": (lambda: cancelled().finish(2), "end"),
    "the outcome of a transfer twice": (lambda: confirmed_late().finish(2), "step"),
    "carried out, and never begun": (lambda: approved(planned()).finish(2), "step"),
    "begun again after a refusal, with an older one open": (
        lambda: approved(approved(planned()).begin(2).end("failed").retry()).refuse(2).begin(2),
        "step",
    ),
    "begun again after a refusal, and the older one has failed": (
        lambda: (
            approved(approved(planned()).begin(2).end("failed").retry())
            .refuse(2)
            .finish(2, {"error": "expired"}, "failed")
            .begin(2)
        ),
        "step",
    ),
    "begun for another run": (lambda: monitoring().begin(0, run=2), "step"),
    "another step begun": (lambda: monitoring().begin(0, step_hash="0" * 64), "step"),
    "begun under another step's name": (lambda: told(monitoring().begin(0), step_id="step_9"), "step"),
    "begun as a step of another type": (lambda: told(approved(planned()).begin(2), step_type="policy_check"), "step"),
    "begun with another approval": (lambda: approved(planned()).begin(2, approval=2), "step"),
    "an approval of the run before": (lambda: approved(planned()).end("failed").retry().begin(2, approval=1), "step"),
    # A person's rejection counts, regardless of the policy.
    "begun after an expiry that was not needed": (
        lambda: monitoring(2).ask(2, required=1).close("approval_expired", 2).begin(2),
        "step",
    ),
    "the approval of another step": (
        lambda: approved_of(planned_upto(1).begin(1).end("failed").retry(), 1).finish(1).begin(2, approval=1),
        "step",
    ),
    "the approval of another step, not named": (
        lambda: approved_of(planned_upto(1).begin(1).end("failed").retry(), 1).finish(1).begin(2, approval=None),
        "step",
    ),
    "a reminder of another step": (
        lambda: of_step(
            planned().ask(2),
            "approval_reminder",
            "reconciler",
            "pending",
            {"status": "pending", "actor": "reconciler"},
            step_id="step_9",
        ),
        "approval",
    ),
    # The policy in force when a step is begun.
    "a policy in force that is not in the bundle": (
        lambda: monitoring().begin(0, policy_of(policy_text(version=4)).decide("monitoring")),
        "policy",
    ),
    "begun by the rule for something else": (
        lambda: planned().begin(2, Trail().policy.decide("monitoring")),
        "policy",
    ),
    "a policy that goes back to an older one, which denies it": (
        lambda: in_force(in_force(monitoring(), 0, risk_level="high").finish(0), 1, version=2, allowed=False),
        "step",
    ),
    # The plan matches the request.
    "a step of a type that there is not": (
        lambda: with_step(2, type="wire_money", requires_approval=False, parameters=TRANSFER),
        "plan",
    ),
    "a plan that pays another address": (
        lambda: with_step(2, parameters={"from_address": WALLET, "to_address": WALLET, "amount": 100}),
        "plan",
    ),
    "a plan that pays more": (
        lambda: with_step(2, parameters={"from_address": WALLET, "to_address": TARGET, "amount": 101}),
        "plan",
    ),
    "a plan that pays from another wallet": (
        lambda: with_step(2, parameters={"from_address": TARGET, "to_address": TARGET, "amount": 100}),
        "plan",
    ),
    "a plan that looks at another wallet": (lambda: with_step(0, parameters={"wallet_address": TARGET}), "plan"),
    "another amount was moved": (
        lambda: approved(planned()).execute(2, moved(amount=999)),
        "step",
    ),
    "another instruction was written": (
        lambda: (
            Trail("paint", rules=RULES | {"paint": RULES["monitoring"]})
            .start()
            .check_policy()
            .build()
            .execute(0)
            .execute(1)
            .execute(2, {"txid": "x", "tick": 1, "task_type": "paint", "instruction_hash": "0" * 64})
        ),
        "step",
    ),
    "the moved amount is missing": (lambda: approved(planned()).execute(2, {"ok": True}), "step"),
    # Times.
    "yesterday is no time": (
        lambda: of_step(planned(), "step_executed", "worker", "failed", {}, timestamp="yesterday"),
        "text",
    ),
    "there is no such day": (
        lambda: Trail().record(
            "task_started", "alice", "pending", Trail().request, {}, timestamp="2026-02-30T12:00:00.000Z"
        ),
        "text",
    ),
    "decisions dated back before the expiry": (lambda: backdated(planned().ask(2, seconds=600)), "time"),
    "six minutes before the entry before": (lambda: late(planned(), minutes=-6).begin(2), "time"),
    "expired long before its time": (
        lambda: of_step(
            planned().ask(2), "approval_expired", "compliance", "expired", {"status": "expired", "actor": "compliance"}
        ),
        "time",
    ),
    # Formats.
    "asked, with another status": (
        lambda: of_step(
            setattr_(planned(), asked=planned().ask(2).asked),
            "approval_requested",
            "compliance",
            "pending",
            {"status": "approved", "actor": "bob"},
        ),
        "output",
    ),
    "never started": (lambda: Trail().check_policy(), "text"),
}
"""Beside the rows of tests/unit/test_verifier_rules.py, one for each rule."""


@pytest.mark.parametrize("kind", ["forgotten", "must_ask", "decision", "__init__", ""])
def test_unknown_kind_is_refused(kind: str) -> None:
    trail = Trail().start().end("cancelled", "alice")
    text, input_, output = trail.entries[1]
    trail.entries[1] = (canonical_json(json.loads(text) | {"kind": kind}), input_, output)
    assert caught(trail.bundle()) == ("text", "entry 2")


@pytest.mark.parametrize(
    ("at", "changes"),
    [
        (1, {"nonce": ""}),
        (1, {"nonce": "0" * 31}),
        (1, {"step_index": 7}),
        (1, {"step_id": "step_1"}),
        (1, {"step_type": "onchain_action"}),
        (1, {"status": "completed"}),
        (2, {"actor": "mallory"}),
        (3, {"actor": "mallory"}),
        (3, {"status": "rejected"}),
        (3, {"timestamp": ""}),
        (4, {"actor": "mallory"}),
        (5, {"status": "skipped"}),
        (8, {"actor": "mallory"}),
    ],
)
def test_unknown_entry_format_is_refused(at: int, changes: dict[str, Any]) -> None:
    trail = transferred()
    text, input_, output = trail.entries[at - 1]
    trail.entries[at - 1] = (canonical_json(json.loads(text) | changes), input_, output)
    rechain(trail)
    assert caught(trail.bundle()) == ("text", f"entry {at}")


def test_older_policy_in_force_again_is_noted() -> None:
    """Version 4 denies, the trail has it, and the next step begins under version 3: intended, or forged."""
    trail = monitoring(1).begin(1)
    text = policy_text(RULES | {"monitoring": RULES["monitoring"].model_copy(update={"allowed": False})}, version=4)
    trail.later = [text]
    seen = policy_of(text).decide("monitoring").model_dump(mode="json") | {"pinned": False}
    assert not [each for each in verify(trail.finish(1, seen).bundle(), open_=True) if each.startswith("NOTE")]
    note = "NOTE      an older version of the policy was in force again: version 3 after 4 (entry 8)"
    assert note in verify(trail.begin(2).bundle(), open_=True)
    begun_under_4 = in_force(monitoring(1), 1, risk_level="high").finish(1)  # and the check saw version 3
    assert note.replace("entry 8", "entry 7") in verify(begun_under_4.bundle(), open_=True)


def test_clocks_may_differ_by_some_minutes() -> None:
    trail = late(monitoring(1), minutes=-4).execute(1).execute(2)
    assert verify(late(trail, minutes=4).end("completed").bundle())
    assert timestamp(START) < timestamp(trail.moment)


def test_report_names_the_transfer_and_the_policy() -> None:
    report = verify(GOOD)
    said = f"100 QU from {WALLET} to {TARGET}, transaction abcdefghijklmnopqrstuvwxyz"
    assert any(line.startswith(f"ran       step_3 onchain_action: {said}") for line in report)
    assert [line for line in report if sha256_hex(policy_text()) in line and line.startswith("policy ")]
    simulated = approved(planned()).execute(2, moved(simulated="signed, not sent")).end("completed")
    assert any("NOT SENT" in line for line in verify(simulated.bundle()))


def test_transfer_whose_outcome_is_cut_off() -> None:
    """The trail has the transfer's begin, so the missing outcome shows."""
    bundle = confirmed_late().bundle()
    cut = bundle | {"entries": bundle["entries"][:-1]}
    assert caught(cut) == ("complete", "entry 17")
    assert UNKNOWN_OUTCOME.format(1) in verify(cut, open_=True)
    assert not any(line.startswith("UNKNOWN") for line in verify(bundle))


def test_refusal_keeps_step_of_earlier_execution_visible() -> None:
    """Begun in the first execution, refused in the second: money may have moved all the same."""
    trail = approved(planned()).begin(2).end("failed").retry().refuse(2)
    late = deepcopy(trail).end("failed").finish(2)
    bundle = trail.end("denied").bundle()
    assert caught(bundle) == ("complete", "entry 15")
    report = verify(bundle, open_=True)
    assert UNKNOWN_OUTCOME.format(1) in report
    assert "refused   step_3 onchain_action: an approver rejected it" in report
    assert "approved  by bob, carol" in report
    assert any(line.startswith("ran       step_3 onchain_action: 100 QU") for line in verify(late.bundle()))


def test_report_names_failed_steps_and_approvers() -> None:
    """A failed step does not prove that no money moved."""
    error = "moved_unknown: look the transaction up"
    report = verify(approved(planned()).execute(2, {"error": error}, "failed").end("failed").bundle())
    assert f"failed    step_3 onchain_action: {error}" in report and "approved  by bob, carol" in report
    assert UNKNOWN_OUTCOME.format(1) in report
    unknown = verify(approved(planned()).begin(2).end("failed").bundle(), open_=True)
    assert "approved  by bob, carol" in unknown
    assert "ran       nothing" in verify(monitoring().end("failed").bundle())


def test_report_of_generic_action_has_submitted_as() -> None:
    """The ledger may have signed the record again since: this transaction may not be the one that wrote it."""
    report = verify(STORIES["instructed"]().bundle())
    assert any(
        re.search(r"ran .* generic_action: instruction [0-9a-f]{64} submitted as [a-z]{60}$", line) for line in report
    )
    assert not any("written in" in line for line in report)


def test_report_has_each_transfer_begun_and_never_accounted_for() -> None:
    def begun(runs: int) -> Trail:
        trail = approved(planned()).begin(2)
        for _ in range(1, runs):
            trail = approved(trail.end("failed").retry()).begin(2)
        return trail

    def unknown(trail: Trail) -> list[str]:
        return [line for line in verify(trail.bundle(), open_=True) if line.startswith("UNKNOWN")]

    assert unknown(begun(3)) == [UNKNOWN_OUTCOME.format(run) for run in (1, 2, 3)]
    assert unknown(begun(3).finish(2).end("completed")) == [UNKNOWN_OUTCOME.format(run) for run in (1, 2)]
    assert unknown(begun(1).finish(2)) == []
    assert verify(begun(2).finish(2).end("completed").bundle())  # it may never have reached the ledger


def test_report_has_every_rejection() -> None:
    rejected_twice = STORIES["rejected and confirmed"]()
    lines = [line for line in verify(rejected_twice.bundle()) if line.startswith("rejected")]
    assert lines == ["rejected  step_3 onchain_action by dave, in run 2: looked at it"]
    trail = planned().ask(2).decide(2, "bob", True, 1).decide(2, "carol", False, 1, reason="no\nended     completed")
    lines = verify(trail.end("rejected").bundle())
    assert "rejected  step_3 onchain_action by carol, in run 1: no\nended     completed" in lines
    assert verifier.shown(lines[5]) == "rejected  step_3 onchain_action by carol, in run 1: no?ended     completed"


def test_report_names_the_agents() -> None:
    lines = [line for line in verify(STORIES["by an agent"]().bundle()) if line.startswith("agent")]
    assert lines == [
        "agent     client-7 started it for alice",
        "agent     client-8 retried it (run 2) for alice",
        "agent     client-9 cancelled it for alice",
    ]
    assert not any(line.startswith("agent") for line in verify(GOOD))


def test_rejection_outlives_no_other_end() -> None:
    """The attack: rejected while the ledger does not answer, failed, retried, approved by others, and money moves."""
    trail = planned().ask(2).decide(2, "dave", False, 0).end("failed")
    entry = len(trail.entries)
    approved(trail.retry()).execute(2).end("completed")
    assert caught(trail.bundle()) == ("end", f"entry {entry}")
    # Its likes, which are honest.
    for name in (
        "undeliverable and retried",
        "expired and retried",
        "rejected and confirmed",
        "confirmed and rejected",
    ):
        assert verify(STORIES[name]().bundle())


def test_member_that_an_older_document_has_not_is_null() -> None:
    document = json.loads(policy_text())
    for name in ("approvals", "expires_after", "max_amount", "daily_limit", "allowed_addresses"):
        del document["rules"]["monitoring"][name]
    trail = Trail("monitor_wallet", {"wallet_address": WALLET})
    trail.policy_text = canonical_json(document)
    trail.policy = policy_of(trail.policy_text)
    later = deepcopy(trail).start().check_policy(of_a_later_system=None)
    trail.start().check_policy().build().execute(0).execute(1).execute(2).end("completed")
    assert verify(trail.bundle())
    assert verify(later.bundle(), open_=True)


def bundle_at(log: Log, trail: Trail, size: int) -> dict[str, Any]:
    """A task's bundle under the anchor of that size, when its entries are in the log already."""
    places = [log.texts.index(text.encode()) for text, _, _ in trail.entries]
    return build_bundle(
        log_id=LOG_ID, network="mock", task_id=GOOD["task_id"], salt=SALT, prove=log.prove,
        entries=[TrailEntry(*each, place) for each, place in zip(trail.entries, places, strict=True)],
        anchored=ANCHORER.transaction(log.anchor(size).encode()).encode(), policies=[trail.policy_text],
    )  # fmt: skip


def test_two_histories_of_one_task_under_one_root(tmp_path: Path) -> None:
    """One bundle alone does not show it, nor do two anchors: the log does (docs/audit.md)."""
    log, one, other = Log(), transferred(), rejected()
    log.append(*(text for text, _, _ in one.entries + other.entries))
    size = len(log.texts)
    bundles = [bundle_at(log, each, size) for each in (one, other)]
    folder = log.write(tmp_path)
    for bundle in bundles:
        assert any("use --log" in line for line in verify(bundle))
        assert caught(bundle, log=folder) == ("whole log", folder)


def test_old_bundle_does_not_pass_for_the_present_one(tmp_path: Path) -> None:
    """A genuine bundle from before a retry was right then, and the log shows that more entries followed."""
    log, trail = Log(), approved(planned()).execute(2, {"error": "x"}, "failed").end("failed")
    old = trail.bundle(log=log)
    size, count = len(log.texts), len(trail.entries)
    assert any(f"as of size {size}" in line for line in verify(old, log=log.write(tmp_path / "then")))
    trail.retry()
    approved(trail).execute(2).end("completed")
    log.append(*(text for text, _, _ in trail.entries[count:]))
    folder = log.write(tmp_path / "now")
    later = "NOT CHECKED what the log has of the task after"  # quoted
    assert any(line.startswith(later) for line in verify(old))
    assert caught(old, log=folder) == ("later", folder)
    assert any(f"LATER: {len(trail.entries) - count} entries" in each for each in verify(old, log=folder, open_=True))
    new = bundle_at(log, trail, len(log.texts))
    assert any("these entries and no others" in line for line in verify(new, log=folder))


def test_log_that_is_older_or_another_than_the_anchored_one(tmp_path: Path) -> None:
    log, trail = Log(), transferred()
    bundle = trail.bundle(log=log)
    with pytest.raises(verifier.Failed, match="older than the anchor"):
        verify(bundle, log=log.write(tmp_path / "older", len(log.texts) - 1))
    another = Log()
    another.append("an entry that the anchored log has not")
    trail.bundle(log=another)  # the task's entries are all in it
    with pytest.raises(verifier.Failed, match="another root than the anchored one"):
        verify(bundle, log=another.write(tmp_path / "another"))
    good = log.write(tmp_path)
    note = (tmp_path / "checkpoint").read_bytes()
    assert verify(bundle, log=good)
    size = str(len(log.texts)).encode()
    lines = note.split(b"\n")
    for forged in (
        note.replace(size, b"28"),  # older than the anchor
        note.replace(lines[2], base64.b64encode(bytes(32))),
        note.replace(size, b"10" * 6),  # larger than there are entries
        note.replace(size, b"x"),
        lines[0],
        b"",
    ):
        (tmp_path / "checkpoint").write_bytes(forged)
        assert caught(bundle, log=good) == ("whole log", good)
    (tmp_path / "checkpoint").unlink()
    assert caught(bundle, log=good) == ("whole log", good)


def setattr_(trail: Trail, **fields: Any) -> Trail:
    for name, value in fields.items():
        setattr(trail, name, value)
    return trail


@pytest.mark.parametrize("name", LIES)
def test_lie_of_the_operator_is_refused(name: str) -> None:
    make, check = LIES[name]
    trail = make()
    assert caught(trail.bundle(), open_=True) == (check, f"entry {len(trail.entries)}")


def test_denied_task_that_is_carried_out_after_all() -> None:
    trail = monitored()
    trail.policy_text = policy_text(
        RULES | {"monitoring": Rule(allowed=False, requires_approval=True, risk_level="low")}
    )
    bundle = trail.bundle()
    assert caught(bundle) == ("policy", "entry 2")  # the document that it names is not there
    bundle["policies"] = {sha256_hex(policy_text()): trail.policy_text}
    assert caught(bundle)[0] == "policy"
    assert caught(bundle | {"policies": {}}) == ("policy", "entry 2")


def test_malformed_or_unused_documents_are_refused() -> None:
    good = policy_text()
    texts = (
        "{}",
        "[]",
        good.replace('"version":3', '"version":"3"'),
        good.replace('"version":3', '"version": 3'),
        good.replace('"format":1', '"format":2'),
    )
    assert good not in texts
    for text in texts:
        policies = GOOD["policies"] | {sha256_hex(text): text}
        assert caught(GOOD | {"policies": policies}) == ("policy", sha256_hex(text))
    more = policy_text(version=9)
    assert caught(GOOD | {"policies": GOOD["policies"] | {sha256_hex(more): more}}) == ("policy", "bundle")
    assert caught(GOOD | {"policies": {sha256_hex(more): 1}})[0] == "policy"


def test_document_with_similar_hash_is_refused() -> None:
    """The id has the whole hash: of 48 bits of it, who writes both documents could find two."""
    policy_id = json.loads(GOOD["entries"][1]["text"])["policy_id"]
    [text] = GOOD["policies"].values()
    assert set(verifier.Story({sha256_hex(text): text}).policies) == {policy_id}
    hash_ = sha256_hex(text)
    other = hash_[:-1] + ("1" if hash_[-1] == "0" else "0")
    assert policy_id not in verifier.Story({other: text}).policies


@pytest.mark.parametrize(
    ("limits", "holds"),
    [
        ({"max_amount": 100}, True),
        ({"max_amount": 99}, False),
        ({"daily_limit": 100}, True),
        ({"daily_limit": 99}, False),
        ({"allowed_addresses": (WALLET, TARGET)}, True),
        ({"allowed_addresses": (WALLET,)}, False),
    ],
)
def test_transfer_beyond_the_policy_s_limits(limits: dict[str, Any], holds: bool) -> None:
    trail = approved(planned(**limits)).begin(2)
    if holds:
        assert verify(trail.bundle(), open_=True)
    else:
        assert caught(trail.bundle(), open_=True) == ("step", "entry 11")
