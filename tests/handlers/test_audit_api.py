"""The audit service's routes in API Gateway's format: rights, proofs, and the detection of tampering."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any

import boto3
import pytest

from audit.api import MAX_PAGE
from audit.evidence import CHECKS, MATCHES
from audit.store import AuditStore, Occurrence, StoredEntry
from qaes import VERSION
from qaes.adapters.task_repository import TaskStore
from qaes.domain import planning
from qaes.domain.audit import GENESIS
from qaes.domain.canonical import canonical_json, hash_of, salted_hash
from qaes.domain.errors import ConflictError
from qaes.domain.ids import new_plan_id, new_task_id
from qaes.domain.merkle import leaf_digest, leaf_hash, verify_consistency, verify_inclusion
from qaes.domain.note import parse_checkpoint, verify_note
from qaes.domain.policy import Rule, policy_of
from qaes.domain.tasks.lifecycle import MAX_RETRIES, StepOutcome
from tests.handlers.test_audit_recorder import (
    EVENTS,
    OTHER_HASH,
    SOME_HASH,
    add_events,
    entries,
    start_task,
    task_with,
)
from tests.handlers.test_task_repository import claim, new_task
from tests.support import template
from tests.support.bundles import policy_text
from tests.support.cloud import PARAMETERS, Cloud, Context, cloud, prepared
from tests.support.trail import ORIGIN, anchor, anchor_all, log, new_recorder, put_entries, sequence_all, store

Get = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    # FastAPI runs a route in a separate thread, which then calls the ledger's function: so the environment is set for
    # the whole test, not for one call.
    for name, value in template.environment("AuditApiFunction", PARAMETERS).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("POWERTOOLS_LOG_LEVEL", "ERROR")
    with cloud(state_machine=False) as it:
        yield it


def call_api(event: dict[str, Any]) -> dict[str, Any]:
    from audit import api

    answer: dict[str, Any] = api.handler(event, Context())
    return answer


def request(
    path: str,
    *,
    roles: str = "auditor",
    subject: str | None = "carol",
    headers: dict[str, str] | None = None,
    **query: Any,
) -> dict[str, Any]:
    """Call the API, and return API Gateway's answer as it is."""
    event = json.loads((EVENTS / "api_get.json").read_text())
    if headers is not None:
        event |= {"headers": headers, "multiValueHeaders": {name: [value] for name, value in headers.items()}}
    event |= {"path": path, "resource": path, "queryStringParameters": {k: str(v) for k, v in query.items()} or None}
    event["multiValueQueryStringParameters"] = {k: [str(v)] for k, v in query.items()} or None
    event["requestContext"] |= {"path": f"/v1{path}", "resourcePath": path}
    event["requestContext"]["authorizer"] = {"principalId": subject, "roles": roles} if subject else None
    return call_api(event)


@pytest.fixture
def get(aws: Cloud) -> Get:
    def send(path: str, **options: Any) -> tuple[int, dict[str, Any]]:
        answer = request(path, **options)
        return answer["statusCode"], json.loads(answer["body"])

    return send


@pytest.fixture
def recorded(aws: Cloud) -> str:
    """A task of alice's with four entries on record and anchored."""

    def record() -> str:
        task_id = task_with(4)
        new_recorder().drain(task_id)
        anchor_all(aws)
        return task_id

    return str(prepared(aws, "recorded", record))


def rewrite(task_id: str, seq: int, text: str, leaf: str) -> None:
    """Change an item as a person with write access to the table could."""
    change_entry(task_id, seq, text={"S": text}, leaf={"S": leaf})


def change_entry(task_id: str, seq: int, **attributes: Any) -> None:
    boto3.client("dynamodb").update_item(
        TableName="AuditEntriesTable",
        Key={"pk": {"S": task_id}, "sk": {"S": f"ENTRY#{seq:06d}"}},
        UpdateExpression="SET " + ", ".join(f"#{name} = :{name}" for name in attributes),
        ExpressionAttributeNames={f"#{name}": name for name in attributes},
        ExpressionAttributeValues={f":{name}": value for name, value in attributes.items()},
    )


def remove(task_id: str, seq: int) -> None:
    boto3.client("dynamodb").delete_item(
        TableName="AuditEntriesTable", Key={"pk": {"S": task_id}, "sk": {"S": f"ENTRY#{seq:06d}"}}
    )


def altered(entry: StoredEntry, **changes: Any) -> str:
    return canonical_json(json.loads(entry.text) | changes)


# Reading a trail


def test_trail_has_the_inherited_fields_and_the_proofs(get: Get, recorded: str) -> None:
    status, body = get(f"/audit/{recorded}")
    assert status == 200
    assert (body["task_id"], body["network"], len(body["logs"])) == (recorded, "mock", 4)
    inherited = {
        "id": str, "step_index": int, "step_type": str, "input_hash": str, "output_hash": str, "status": str,
        "timestamp": str, "qubic_txid": str,
    }  # fmt: skip
    prev = GENESIS
    for number, each in enumerate(body["logs"], start=1):
        assert {name: type(each[name]) for name in inherited} == inherited
        assert each["seq"] == number
        assert each["leaf"] == leaf_hash(each["entry_text"])
        assert (each["prev"], len(each["qubic_txid"])) == (prev, 60)
        prev = each["leaf"]
    assert body["qubic_txid"] == body["logs"][-1]["qubic_txid"]
    assert body["chain"] == {
        "verified": True, "entries": 4, "sequenced": 4, "anchored": 4, "head": prev, "broken": None,
    }  # fmt: skip
    assert [log["index"] for log in body["logs"]] == [0, 1, 2, 3]
    assert "prove nothing to an outsider" in body["statement"]
    first, second = body["logs"][:2]
    assert (first["step_index"], first["step_type"], first["kind"]) == (-1, "task_started", "task_started")
    assert (second["step_index"], second["step_type"]) == (2, "check_balance")


def test_each_entry_shows_its_progress(get: Get, aws: Cloud, recorded: str) -> None:
    def statuses() -> list[tuple[str, bool]]:
        logs = get(f"/audit/{recorded}")[1]["logs"]
        return [(log["log_status"], log["qubic_txid"] is not None) for log in logs]

    add_events(recorded, 5, 5)
    new_recorder().drain(recorded)
    assert statuses() == [("anchored", True)] * 4 + [("recorded", False)]
    sequence_all(aws)
    assert statuses()[4] == ("sequenced", False)
    anchor(aws)
    assert statuses()[4] == ("anchoring", False)
    body = get(f"/audit/{recorded}")[1]
    assert (body["chain"]["verified"], body["chain"]["sequenced"], body["chain"]["anchored"]) == (True, 5, 4)
    assert body["qubic_txid"] == body["logs"][3]["qubic_txid"]
    aws.settle()
    anchor(aws)
    assert statuses()[4] == ("anchored", True)
    logs = get(f"/audit/{recorded}")[1]["logs"]
    assert logs[4]["qubic_txid"] != logs[3]["qubic_txid"]


def test_trail_is_empty_before_events_are_recorded(get: Get) -> None:
    task_id = start_task()
    status, body = get(f"/audit/{task_id}")
    assert (status, body["logs"], body["qubic_txid"]) == (200, [], None)
    assert body["chain"] == {
        "verified": True, "entries": 0, "sequenced": 0, "anchored": 0, "head": None, "broken": None,
    }  # fmt: skip


def test_trail_pages_have_chain_of_whole_trail(get: Get, recorded: str) -> None:
    whole = get(f"/audit/{recorded}")[1]
    assert whole["next_cursor"] is None
    found, cursor = [], {}
    for length in (3, 1):
        status, page = get(f"/audit/{recorded}", limit=3, **cursor)
        assert (status, len(page["logs"]), page["chain"], page["qubic_txid"]) == (
            200, length, whole["chain"], whole["qubic_txid"],
        )  # fmt: skip
        found += page["logs"]
        cursor = {"cursor": page["next_cursor"]}
    assert (found, cursor["cursor"]) == (whole["logs"], None)
    assert get(f"/audit/{recorded}", limit=4)[1]["next_cursor"] is None, "there is no empty last page"
    assert get(f"/audit/{recorded}", cursor=4)[1]["logs"] == []


@pytest.mark.parametrize(
    ("name", "value"),
    [("limit", 0), ("limit", MAX_PAGE + 1), ("limit", "x"), ("cursor", "0"), ("cursor", "-1"), ("cursor", "x"),
     ("cursor", "1e3"), ("cursor", "\u0661"), ("cursor", "1234567")],
)  # fmt: skip
def test_invalid_page_is_refused(get: Get, recorded: str, name: str, value: Any) -> None:
    status, body = get(f"/audit/{recorded}", **{name: value})
    assert (status, body["errors"][0]["field"]) == (422, name)


@pytest.mark.parametrize("roles", ["auditor", "operator", "approver", "requester auditor"])
def test_readers_of_every_trail(get: Get, recorded: str, roles: str) -> None:
    assert get(f"/audit/{recorded}", roles=roles)[0] == 200


def test_requester_reads_the_trails_of_their_own_tasks_only(get: Get, recorded: str) -> None:
    assert get(f"/audit/{recorded}", roles="requester", subject="alice")[0] == 200
    status, body = get(f"/audit/{recorded}", roles="requester", subject="bob")
    missing_status, missing = get(f"/audit/{new_task_id()}", roles="requester", subject="bob")
    assert (status, missing_status) == (404, 404)
    assert body["detail"] == missing["detail"]


def test_trail_refused_without_role_or_name(get: Get, recorded: str) -> None:
    assert get(f"/audit/{recorded}", roles="", subject="alice")[0] == 403
    assert get(f"/audit/{recorded}", subject=None)[0] == 401
    assert get(f"/audit/verify/{SOME_HASH}", roles="", subject="alice")[0] == 403
    assert get(f"/audit/verify/{'f' * 64}", roles="", subject="alice")[0] == 403
    assert get(f"/audit/verify/{SOME_HASH}", subject=None)[0] == 401


@pytest.mark.parametrize("task_id", ["nonsense", "task_1", "TASK", "plan_019ab000-0000-7000-8000-000000000001"])
def test_unknown_task_id_returns_404(get: Get, task_id: str) -> None:
    status, body = get(f"/audit/{task_id}")
    assert (status, body["status"]) == (404, 404)
    assert body["detail"]
    assert get(f"/audit/{new_task_id()}")[0] == 404


def test_tampered_trail_names_the_entry(get: Get, recorded: str) -> None:
    second = entries(recorded)[1]
    rewrite(recorded, 2, altered(second, status="failed"), second.leaf)
    status, body = get(f"/audit/{recorded}")
    assert (status, len(body["logs"])) == (200, 4)
    assert body["chain"]["verified"] is False
    assert (body["chain"]["broken"]["seq"], body["chain"]["broken"]["check"]) == (2, "leaf")


def test_unreadable_entry_is_shown_unchanged(get: Get, recorded: str) -> None:
    rewrite(recorded, 2, "{}", leaf_hash("{}"))
    status, body = get(f"/audit/{recorded}")
    assert status == 200
    assert (body["logs"][1]["status"], body["logs"][1]["entry_text"]) == ("unreadable", "{}")
    assert (body["chain"]["broken"]["seq"], body["chain"]["broken"]["check"]) == (2, "text")


@pytest.mark.parametrize("seq", [1, 3, 4])
def test_entry_that_was_taken_away_is_missed(get: Get, recorded: str, seq: int) -> None:
    remove(recorded, seq)
    broken = get(f"/audit/{recorded}")[1]["chain"]["broken"]
    assert (broken["seq"], broken["check"]) == (seq, "seq")


def test_trail_that_was_taken_away_as_a_whole_is_missed(get: Get, recorded: str) -> None:
    for seq in range(1, 5):
        remove(recorded, seq)
    status, body = get(f"/audit/{recorded}")
    assert (status, body["logs"], body["chain"]["verified"]) == (200, [], False)


def test_replaced_newest_entry_differs_from_log(get: Get, recorded: str) -> None:
    text = altered(entries(recorded)[3], status="failed")
    rewrite(recorded, 4, text, leaf_hash(text))
    broken = get(f"/audit/{recorded}")[1]["chain"]["broken"]
    assert (broken["seq"], broken["check"]) == (4, "index")


# Verifying a hash


def test_leaf_hash_is_verified_with_its_evidence(get: Get, recorded: str) -> None:
    third = entries(recorded)[2]
    status, body = get(f"/audit/verify/{third.leaf}")
    assert (status, body["hash"], body["verified"], body["network"]) == (200, third.leaf, True, "mock")
    assert "prove nothing to an outsider" in body["statement"]
    [match] = body["evidence"]["matches"]
    assert (match["task_id"], match["seq"], match["role"]) == (recorded, 3, "leaf")
    assert leaf_hash(match["entry_text"]) == match["leaf"] == third.leaf
    assert match["prev"] == entries(recorded)[1].leaf
    assert len(match["qubic_txid"]) == 60
    assert match["checks"] == dict.fromkeys(CHECKS, True)
    assert match["log_status"] == "anchored"
    proof = match["proof"]
    verify_inclusion(
        leaf=leaf_digest(match["entry_text"].encode()),
        index=proof["index"],
        size=proof["size"],
        proof=[bytes.fromhex(each) for each in proof["hashes"]],
        root=bytes.fromhex(proof["anchor"]["root"]),
    )
    assert (proof["index"], proof["size"], proof["anchor"]["txid"]) == (2, 4, match["qubic_txid"])
    assert (match["failed"], match["reason"], body["evidence"]["more"]) == ([], None, False)


def test_input_and_output_hash_verified_by_entries(get: Get, recorded: str) -> None:
    for hash_, role in ((SOME_HASH, "input"), (OTHER_HASH, "output")):
        status, body = get(f"/audit/verify/{hash_.upper()}")
        assert (status, body["verified"], body["hash"]) == (200, True, hash_)
        assert [(match["seq"], match["role"]) for match in body["evidence"]["matches"]] == [
            (4, role),
            (3, role),
            (2, role),
        ]


def test_unknown_hash_is_not_verified_and_has_no_match(get: Get, recorded: str) -> None:
    status, body = get(f"/audit/verify/{'f' * 64}")
    assert (status, body["verified"], body["evidence"]) == (200, False, {"matches": [], "more": False})


@pytest.mark.parametrize("hash_", ["ab", "g" * 64, "a" * 63, "a" * 65, "0x" + "a" * 62])
def test_malformed_hash_is_refused(get: Get, hash_: str) -> None:
    status, body = get(f"/audit/verify/{hash_}")
    assert (status, body["errors"][0]["field"]) == (422, "hash")


def test_verify_returns_newest_matches_and_more_flag(get: Get, aws: Cloud) -> None:
    task_id = task_with(MATCHES + 2)
    new_recorder().drain(task_id)
    anchor_all(aws)
    status, body = get(f"/audit/verify/{SOME_HASH}")
    assert (status, body["verified"], body["evidence"]["more"]) == (200, True, True)
    assert [match["seq"] for match in body["evidence"]["matches"]] == list(range(MATCHES + 2, 2, -1))


def test_requester_verifies_only_entries_of_own_trails(get: Get, recorded: str) -> None:
    leaf = entries(recorded)[0].leaf
    assert get(f"/audit/verify/{leaf}", roles="requester", subject="alice")[1]["verified"] is True
    status, body = get(f"/audit/verify/{leaf}", roles="requester", subject="bob")
    assert (status, body["verified"], body["evidence"]["matches"]) == (200, False, [])


def check_not_found(get: Get, hash_: str) -> None:
    status, body = get(f"/audit/verify/{hash_}")
    assert (status, body["verified"], body["evidence"]["matches"]) == (200, False, [])


def failing(get: Get, hash_: str) -> set[str]:
    status, body = get(f"/audit/verify/{hash_}")
    assert (status, body["verified"]) == (200, False)
    return set(body["evidence"]["matches"][0]["failed"])


def test_altered_text_is_caught(get: Get, recorded: str) -> None:
    second = entries(recorded)[1]
    rewrite(recorded, 2, altered(second, actor="mallory"), second.leaf)
    assert failing(get, second.leaf) == {"leaf", "chain", "included"}


def test_altered_text_with_its_own_hash_is_caught(get: Get, recorded: str) -> None:
    fourth = entries(recorded)[3]
    text = altered(fourth, actor="mallory")
    rewrite(recorded, 4, text, leaf_hash(text))
    assert failing(get, leaf_hash(text)) == {"chain", "sequenced", "included"}
    check_not_found(get, fourth.leaf)
    assert failing(get, SOME_HASH) == {"chain", "sequenced", "included"}


@pytest.mark.parametrize("role", ["input", "output"])
def test_entry_led_to_by_another_hash_is_caught(get: Get, recorded: str, role: str) -> None:
    change_entry(recorded, 2, **{role: {"B": bytes.fromhex("a" * 64)}})
    assert failing(get, "a" * 64) == {"occurs"}


def test_rewritten_chain_is_caught_by_the_proof(get: Get, recorded: str) -> None:
    """Entries, indexes and tiles are rewritten, each with its right hash; the anchored root is another."""
    client, prev, leaves = boto3.client("dynamodb"), GENESIS, b""
    for entry in entries(recorded):
        text = altered(entry, actor="mallory", prev=prev)
        prev = leaf_hash(text)
        leaves += bytes.fromhex(prev)
        rewrite(recorded, entry.seq, text, prev)
    index = {"pk": {"S": recorded}, "sk": {"S": "INDEX#000004"}, "index": {"N": "0"}, "leaves": {"B": leaves}}
    client.put_item(TableName="AuditLogTable", Item=index)
    tile = {"pk": {"S": "TILE#00#000000000000"}, "sk": {"S": "TILE"}, "width": {"N": "4"}, "hashes": {"B": leaves}}
    client.put_item(TableName="AuditLogTable", Item=tile)
    assert failing(get, prev) == {"included"}


def change_anchor(name: str, value: Any) -> None:
    boto3.client("dynamodb").update_item(
        TableName="AuditAnchorsTable",
        Key={"pk": {"S": "ANCHOR"}, "sk": {"S": "SIZE#000000000004"}},
        UpdateExpression="SET #name = :value",
        ExpressionAttributeNames={"#name": name},
        ExpressionAttributeValues={":value": value},
    )


@pytest.mark.parametrize(
    ("name", "value", "failed"),
    [
        ("txid", {"S": "a" * 60}, {"signature", "ledger"}),
        ("source", {"S": "A" * 60}, {"signature"}),
        ("root", {"B": b"x" * 32}, {"payload"}),
        ("payload", {"B": b"x" * 93}, {"payload"}),
        ("tick", {"N": "7"}, {"payload"}),
        ("network", {"S": "mainnet"}, {"ledger"}),
        ("sequence", {"N": "7"}, {"ledger"}),
        ("encoded", {"B": b"x" * 100}, {"payload", "signature", "included"}),
    ],
)
def test_anchor_that_was_altered_is_caught(get: Get, recorded: str, name: str, value: Any, failed: set[str]) -> None:
    change_anchor(name, value)
    assert failing(get, entries(recorded)[0].leaf) == failed


def test_anchor_with_another_signature_is_caught(get: Get, recorded: str) -> None:
    [one] = log().anchors.all()
    change_anchor("encoded", {"B": one.encoded[:-1] + bytes([one.encoded[-1] ^ 1])})
    assert failing(get, entries(recorded)[0].leaf) == {"signature"}


def test_unanchored_entry_is_not_verified(get: Get, aws: Cloud) -> None:
    task_id = task_with(2)
    new_recorder().drain(task_id)
    leaf = entries(task_id)[0].leaf
    unanchored = {"included", "payload", "signature", "ledger"}
    assert failing(get, leaf) == {"sequenced", *unanchored}
    sequence_all(aws)
    anchor(aws)
    assert failing(get, leaf) == unanchored
    [match] = get(f"/audit/verify/{leaf}")[1]["evidence"]["matches"]
    assert (match["log_status"], match["proof"], match["qubic_txid"]) == ("anchoring", None, None)


def test_entry_that_was_taken_away_is_not_verified(get: Get, recorded: str) -> None:
    third = entries(recorded)[2]
    remove(recorded, 3)
    check_not_found(get, third.leaf)
    broken = get(f"/audit/{recorded}")[1]["chain"]["broken"]
    assert (broken["seq"], broken["check"]) == (3, "seq")


def test_stale_index_proves_no_entry(get: Get, recorded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The index still has a deleted entry: the entry itself decides."""
    third = entries(recorded)[2]
    stale = [Occurrence(recorded, 3, "leaf")]
    remove(recorded, 3)
    monkeypatch.setattr(AuditStore, "occurrences", lambda _store, _hash: iter(stale))
    assert {"recorded", "occurs", "leaf"} < failing(get, third.leaf)


def test_index_behind_the_newest_entry_shows_the_others(
    get: Get, recorded: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new entry may be missing, but every match is verified."""
    there = AuditStore.occurrences
    monkeypatch.setattr(AuditStore, "occurrences", lambda store_, hash_: islice(there(store_, hash_), 1, None))
    status, body = get(f"/audit/verify/{SOME_HASH}")
    assert (status, body["verified"]) == (200, True)
    assert [match["seq"] for match in body["evidence"]["matches"]] == [3, 2]


def test_entry_before_it_that_was_taken_away_breaks_its_chain(get: Get, recorded: str) -> None:
    third = entries(recorded)[2]
    remove(recorded, 1)
    assert failing(get, third.leaf) == {"chain"}


def test_entry_before_the_broken_one_still_holds(get: Get, recorded: str) -> None:
    first, _, third, _ = entries(recorded)
    rewrite(recorded, 3, altered(third, actor="mallory"), third.leaf)
    assert get(f"/audit/verify/{first.leaf}")[1]["verified"] is True


def test_ledger_that_cannot_be_asked_is_no_answer(get: Get, aws: Cloud, recorded: str) -> None:
    def down(event: Any) -> None:
        raise RuntimeError("down")

    aws.faults["LedgerFunction"] = down
    assert get(f"/audit/verify/{entries(recorded)[0].leaf}")[0] == 503


# The bundle


def bundle_of(get: Get, task_id: str, **options: Any) -> dict[str, Any]:
    status, body = get(f"/audit/{task_id}/bundle", **options)
    assert status == 200, body
    return body


def test_bundle_discloses_the_hashed_values(get: Get, aws: Cloud) -> None:
    task_id = start_task()
    TaskStore("TasksTable").end_task(task_id, "failed", actor="execution", reason="no budget", failed_step=None)
    new_recorder().drain(task_id)
    anchor_all(aws)
    bundle = bundle_of(get, task_id)
    salt = TaskStore("TasksTable").get_task(task_id).salt
    assert (bundle["task_id"], bundle["salt"], bundle["network"]) == (task_id, salt, "mock")
    for each in bundle["entries"]:
        said = json.loads(each["text"])
        for name in ("input", "output"):
            assert said[f"{name}_hash"] == salted_hash(salt, json.loads(each[name]))
            assert canonical_json(json.loads(each[name])) == each[name]
    ended = json.loads(bundle["entries"][1]["output"])
    assert (ended["status"], ended["reason"]) == ("failed", "no budget")
    assert json.loads(bundle["entries"][0]["input"])["requester"] == "alice"
    [anchored] = log().anchors.all()
    assert bundle["anchor"]["transaction"] == base64.b64encode(anchored.encoded).decode()
    assert [each["index"] for each in bundle["entries"]] == [0, 1]


def test_requester_gets_the_bundle_at_the_retry_limit(get: Get, aws: Cloud) -> None:
    """The largest request with the most escapes, and retries that fail at the step with all of it."""
    store = TaskStore("TasksTable")
    task = new_task().model_copy(update={"task_type": "salaries", "parameters": {"note": '"' * 16_000}})
    policy = policy_of(policy_text({"salaries": Rule(allowed=True, requires_approval=False, risk_level="low")}))
    analysis, decision = planning.analyze("salaries", policy), policy.decide("salaries")
    task, _ = store.start_task(task)
    plan = planning.build_plan(
        plan_id=new_plan_id(), task_id=task.task_id, created_at=task.created_at, task_type="salaries",
        description=task.description, parameters=task.parameters, analysis=analysis, policy=decision,
    )  # fmt: skip
    store.plan_task(task, plan)
    for run in range(1, MAX_RETRIES + 2):
        running = claim(store, task.task_id, plan, 1, None, run=run, current=decision)
        store.finish_step(task.task_id, running, StepOutcome(result=None, error="no"))
        store.end_task(task.task_id, "failed", actor="execution", reason="r" * 2000, failed_step="step_2")
        if store.get_task(task.task_id).run <= MAX_RETRIES:
            store.retry(task.task_id, subject="alice")
    with pytest.raises(ConflictError, match="at most 20 times"):
        store.retry(task.task_id, subject="alice")
    new_recorder().drain(task.task_id)
    anchor_all(aws)
    answer = request(f"/audit/{task.task_id}/bundle")
    assert answer["statusCode"] == 200
    assert len(json.dumps(answer)) < 6 * 2**20
    bundle = json.loads(answer["body"])
    again = [json.loads(each["input"]) for each in bundle["entries"] if '"kind":"task_ended"' in each["text"]]
    assert again == [{"request_hash": hash_of(task.request())}] * (MAX_RETRIES + 1)


def test_too_large_bundle_response_names_trail(get: Get, recorded: str, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(json.dumps(request(f"/audit/{recorded}/bundle")["body"]))
    for most, status in ((size, 200), (size - 1, 413)):
        monkeypatch.setattr("audit.api.MAX_ANSWER_BYTES", most)
        found, body = get(f"/audit/{recorded}/bundle")
        assert found == status
    assert f"/audit/{recorded}?limit=" in body["detail"] and "cannot be checked offline" in body["detail"]


def test_bundle_before_the_anchor_has_no_proofs(get: Get, aws: Cloud) -> None:
    task_id = task_with(2)
    assert get(f"/audit/{task_id}/bundle")[0] == 404
    new_recorder().drain(task_id)
    sequence_all(aws)
    bundle = bundle_of(get, task_id)
    assert (bundle["anchor"], [each["proof"] for each in bundle["entries"]]) == (None, [None, None])


def test_bundle_is_for_auditors_and_the_requester(get: Get, recorded: str) -> None:
    path = f"/audit/{recorded}/bundle"
    assert get(path, roles="requester", subject="alice")[0] == 200
    assert get(path, roles="operator", subject="olivia")[0] == 200
    assert get(path, roles="approver", subject="bob")[0] == 403
    assert get(path, subject=None)[0] == 401
    status, body = get(path, roles="requester", subject="mallory")
    missing_status, missing = get(f"/audit/{new_task_id()}/bundle", roles="requester", subject="mallory")
    assert (status, missing_status, body["detail"]) == (404, 404, missing["detail"])
    # The approver's role can read every trail, but not the content behind its hashes.
    assert get(path, roles="requester approver", subject="bob")[0] == 404
    assert get("/audit/nonsense/bundle")[0] == 404


def test_nothing_but_the_bundle_shows_the_salt(get: Get, recorded: str) -> None:
    salt = TaskStore("TasksTable").get_task(recorded).salt
    assert len(salt) == 32
    assert salt in request(f"/audit/{recorded}/bundle")["body"]
    leaf = entries(recorded)[0].leaf
    for path in (f"/audit/{recorded}", f"/audit/verify/{leaf}", "/audit/log/checkpoint", "/log/checkpoint"):
        assert salt not in request(path)["body"]
    assert salt not in "".join(entry.text for entry in entries(recorded))


def test_altered_trail_still_has_bundle(get: Get, recorded: str) -> None:
    rewrite(recorded, 2, "{}", leaf_hash("{}"))
    assert bundle_of(get, recorded)["entries"][1]["text"] == "{}"


# The log


def test_before_the_first_anchor_there_is_no_checkpoint(get: Get) -> None:
    for path in ("/audit/log/checkpoint", "/log/checkpoint"):
        status, body = get(path)
        assert (status, body["detail"]) == (404, "the log has no anchored checkpoint yet; try again later")


def test_checkpoint_is_that_of_the_newest_anchor(get: Get, recorded: str) -> None:
    status, body = get("/audit/log/checkpoint", roles="requester", subject="mallory")
    assert status == 200
    assert (body["log_id"], body["anchor"]["size"], body["anchor"]["sequence"]) == ("qaes", 4, 0)
    answer = request("/log/checkpoint", roles="requester", subject="mallory")
    headers = {name.lower(): value for name, value in answer["headers"].items()}
    assert (answer["statusCode"], answer["isBase64Encoded"], answer["body"]) == (200, False, body["note"])
    assert headers["content-type"].startswith("text/plain")
    said = parse_checkpoint(verify_note(answer["body"], body["verifier_key"]))
    assert (said.origin, said.size, said.root.hex()) == (ORIGIN, 4, body["anchor"]["root"])


def test_log_of_one_size_begins_with_that_of_another(get: Get, aws: Cloud, recorded: str) -> None:
    second = task_with(3)
    new_recorder().drain(second)
    anchor_all(aws)
    roots = {each.size: each.root for each in log().anchors.all()}
    status, body = get("/audit/log/consistency", roles="requester", **{"from": 4, "to": 7})
    assert (status, body["first"], body["second"]) == (200, 4, 7)
    proof = [bytes.fromhex(each) for each in body["proof"]]
    verify_consistency(first=4, second=7, proof=proof, first_root=roots[4], second_root=roots[7])


@pytest.mark.parametrize(
    ("first", "second", "status", "field"),
    [(0, 4, 422, "from"), (3, 2, 422, "from"), (1, 5, 404, "to"), ("x", 4, 422, "from"), (1, -1, 422, "to")],
)
def test_sizes_without_a_proof_are_refused(
    get: Get, recorded: str, first: Any, second: Any, status: int, field: str
) -> None:
    found, body = get("/audit/log/consistency", **{"from": first, "to": second})
    assert (found, body["errors"][0]["field"]) == (status, field)


def octets(path: str, **options: Any) -> bytes:
    answer = request(path, **options)
    assert (answer["statusCode"], answer["isBase64Encoded"]) == (200, True), answer
    headers = {name.lower(): value for name, value in answer["headers"].items()}
    assert headers["content-type"] == "application/octet-stream"
    return base64.b64decode(answer["body"])


def test_tiles_are_those_of_the_log(get: Get, recorded: str) -> None:
    leaves = b"".join(bytes.fromhex(entry.leaf) for entry in entries(recorded))
    assert octets("/log/tile/0/000.p/4", roles="requester", subject="mallory") == leaves
    assert octets("/log/tile/0/000.p/2") == leaves[:64]
    content, texts = octets("/log/tile/entries/000.p/4"), []
    while content:
        size = int.from_bytes(content[:2], "big")
        texts.append(content[2 : 2 + size].decode())
        content = content[2 + size :]
    assert texts == [entry.text for entry in entries(recorded)]


@pytest.mark.parametrize(
    ("accept", "encoding", "compressed"),
    [
        ("application/octet-stream", "gzip", True), ("application/octet-stream, */*", "br;q=1, GZIP ; q=0.5", True),
        ("application/octet-stream", "*", True), ("application/octet-stream", "gzip;q=0", False),
        ("application/octet-stream", "gzip;q=0.00, *", False), ("application/octet-stream", "identity", False),
        ("application/octet-stream", None, False), ("*/*", "gzip", False), (None, "gzip", False),
    ],
)  # fmt: skip
def test_entries_compressed_when_client_accepts_gzip(
    get: Get, recorded: str, accept: str | None, encoding: str | None, compressed: bool
) -> None:
    sent = {name: value for name, value in {"Accept": accept, "Accept-Encoding": encoding}.items() if value}
    answer = request("/log/tile/entries/000.p/4", headers=sent)
    headers = {name.lower(): value for name, value in answer["headers"].items()}
    assert (headers["vary"], headers.get("content-encoding")) == ("Accept-Encoding", "gzip" if compressed else None)
    content = base64.b64decode(answer["body"])
    plain = octets("/log/tile/entries/000.p/4")
    assert (gzip.decompress(content) if compressed else content) == plain


def test_tile_may_be_cached_privately_only(get: Get, recorded: str) -> None:
    def kept(path: str) -> str:
        return {name.lower(): value for name, value in request(path)["headers"].items()}["cache-control"]

    for path in ("/log/tile/0/000.p/4", "/log/tile/entries/000.p/4"):
        assert kept(path) == "private, max-age=31536000, immutable"
    for path in ("/log/tile/0/000", "/log/checkpoint", f"/audit/{recorded}"):
        assert kept(path) == "no-store"


def test_full_and_deep_tiles(get: Get, aws: Cloud) -> None:
    put_entries(258)
    sequence_all(aws)
    assert len(octets("/log/tile/0/000")) == 256 * 32
    assert len(octets("/log/tile/0/001.p/2")) == 64
    assert len(octets("/log/tile/1/000.p/1")) == 32
    assert octets("/log/tile/entries/000").count(b'{"actor"') == 256
    assert octets("/log/tile/entries/001.p/2").count(b'{"actor"') == 2
    for index, path in ((1000, "/log/tile/0/x001/000"), (1_000_000, "/log/tile/0/x001/x000/000")):
        log().widen_tile(0, index, b"x" * 256 * 32)
        assert octets(path) == b"x" * 256 * 32
        assert octets(f"{path}.p/3") == b"x" * 96 if index == 1000 else True
    log().widen_tile(0, 1_000_001, b"y" * 96)
    assert octets("/log/tile/0/x001/x000/001.p/3") == b"y" * 96


@pytest.mark.parametrize(
    "path",
    [
        "0/000", "0/000.p/5", "0/001.p/1", "1/000.p/1", "0/000.p/0", "0/000.p/256", "0/0", "x/000", "64/000.p/1",
        "0/x000/000.p/1", "0/x000/x000/000.p/1", "entries/000.p/5", "entries/000", "entries/001.p/1",
        "entries/x001/000", "entries/x001/x000/000", "entries/x001/x000/000.p/1", "entries/x", "-1/000",
    ],
)  # fmt: skip
def test_malformed_tile_path_returns_404(get: Get, recorded: str, path: str) -> None:
    status, body = get(f"/log/tile/{path}")
    assert (status, body["errors"][0]["field"]) == (404, "path")


def test_entries_are_for_auditors_hashes_for_every_role(get: Get, recorded: str) -> None:
    for path in ("entries/000.p/4", "entries/x001/000", "entries/x001/x000/000", "entries/x001/x000/000.p/1"):
        for roles in ("requester", "approver"):
            assert get(f"/log/tile/{path}", roles=roles)[0] == 403, path
    for path in ("0/000.p/4", "0/000", "0/x001/x000/000", "0/x001/x000/000.p/1"):
        assert get(f"/log/tile/{path}", roles="")[0] == 403, path
        assert get(f"/log/tile/{path}", subject=None)[0] == 401, path
    assert request("/log/tile/entries/000.p/4", roles="operator")["statusCode"] == 200


def test_tile_missing_when_entry_is_only_in_log(get: Get, recorded: str) -> None:
    remove(recorded, 2)
    assert get("/log/tile/entries/000.p/4")[0] == 500


# Health and the sample events


def test_health_names_the_part_that_fails(get: Get, aws: Cloud) -> None:
    assert get("/audit/health", subject=None) == (200, {"status": "healthy", "service": "audit", "version": VERSION})

    def down(event: Any) -> None:
        raise RuntimeError("down")

    aws.faults["LedgerFunction"] = down
    status, body = get("/audit/health", subject=None)
    assert (status, body["status"], body["failing"]) == (503, "unhealthy", ["ledger"])


@pytest.mark.parametrize(("name", "status"), [("api_get", 404), ("api_verify", 200), ("api_health", 200)])
def test_sample_events_are_taken(aws: Cloud, name: str, status: int) -> None:
    answer = call_api(json.loads((EVENTS / f"{name}.json").read_text()))
    assert answer["statusCode"] == status
    json.loads(answer["body"])


def test_occurrences_list_a_hash_newest_first(aws: Cloud, recorded: str) -> None:
    assert list(store().occurrences(entries(recorded)[0].leaf)) == [Occurrence(recorded, 1, "leaf")]
    newer = task_with(3)
    new_recorder().drain(newer)
    for seq in (2, 3):
        change_entry(newer, seq, output={"B": bytes.fromhex(SOME_HASH)})
    places = [(each.task_id, each.seq, each.role) for each in store().occurrences(SOME_HASH)]
    assert places == [(newer, seq, role) for seq in (3, 2) for role in ("output", "input")] + [
        (recorded, seq, "input") for seq in (4, 3, 2)
    ]
