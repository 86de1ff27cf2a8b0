"""The audit service's routes, as API Gateway calls them: who may read, what is proved, and what tampering shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest

from audit.evidence import MATCHES
from audit.store import AuditStore, StoredEntry
from qaes.domain.audit import GENESIS
from qaes.domain.canonical import canonical_json
from qaes.domain.ids import new_task_id
from qaes.domain.merkle import leaf_hash
from tests.handlers.test_audit_recorder import (
    EVENTS,
    OTHER_HASH,
    SOME_HASH,
    add_events,
    entries,
    new_recorder,
    start_task,
    task_with,
)
from tests.support import template
from tests.support.cloud import PARAMETERS, Cloud, Context, cloud

Get = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    # FastAPI runs a route in a thread of its own, which then asks the ledger's function: so the environment is set for
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


@pytest.fixture
def get(aws: Cloud) -> Get:
    def send(path: str, *, roles: str = "auditor", subject: str | None = "carol") -> tuple[int, dict[str, Any]]:
        event = json.loads((EVENTS / "api_get.json").read_text())
        event |= {"path": path, "resource": path}
        event["requestContext"] |= {"path": f"/v1{path}", "resourcePath": path}
        event["requestContext"]["authorizer"] = {"principalId": subject, "roles": roles} if subject else None
        answer = call_api(event)
        return answer["statusCode"], json.loads(answer["body"])

    return send


@pytest.fixture
def recorded(aws: Cloud) -> str:
    """A task of alice's with four entries on record and anchored."""
    task_id = task_with(4)
    new_recorder().drain(task_id)
    return task_id


def rewrite(task_id: str, seq: int, text: str, leaf: str) -> None:
    """What somebody with the keys to the table could do."""
    boto3.client("dynamodb").put_item(
        TableName="AuditEntriesTable",
        Item={"pk": {"S": task_id}, "sk": {"S": f"ENTRY#{seq:06d}"}, "text": {"S": text}, "leaf": {"S": leaf}},
    )


def remove(task_id: str, seq: int) -> None:
    boto3.client("dynamodb").delete_item(
        TableName="AuditEntriesTable", Key={"pk": {"S": task_id}, "sk": {"S": f"ENTRY#{seq:06d}"}}
    )


def altered(entry: StoredEntry, **changes: Any) -> str:
    return canonical_json(json.loads(entry.text) | changes)


# Reading a trail


def test_a_trail_has_the_inherited_fields_and_the_proofs(get: Get, recorded: str) -> None:
    status, body = get(f"/audit/{recorded}")
    assert status == 200
    assert (body["task_id"], body["network"], len(body["logs"])) == (recorded, "mock", 4)
    inherited = {
        "id": str, "step_index": int, "step_type": str, "input_hash": str, "output_hash": str, "status": str,
        "timestamp": str, "qubic_txid": str,
    }  # fmt: skip
    prev = GENESIS
    for number, log in enumerate(body["logs"], start=1):
        assert {name: type(log[name]) for name in inherited} == inherited
        assert log["seq"] == number
        assert log["leaf"] == leaf_hash(log["entry_text"])
        assert (log["prev"], len(log["qubic_txid"])) == (prev, 60)
        prev = log["leaf"]
    assert body["qubic_txid"] == body["logs"][-1]["qubic_txid"]
    assert body["chain"] == {"verified": True, "entries": 4, "anchored": 4, "head": prev, "broken": None}
    assert "prove nothing to an outsider" in body["statement"]
    first, second = body["logs"][:2]
    assert (first["step_index"], first["step_type"], first["kind"]) == (-1, "task_started", "task_started")
    assert (second["step_index"], second["step_type"]) == (2, "check_balance")


def test_a_trail_whose_newest_entries_are_not_anchored_yet(get: Get, aws: Cloud, recorded: str) -> None:
    def down(event: Any) -> None:
        raise RuntimeError("down")

    add_events(recorded, 5, 5)
    aws.faults["LedgerFunction"] = down
    with pytest.raises(Exception, match="ledger"):
        new_recorder().drain(recorded)
    status, body = get(f"/audit/{recorded}")
    assert status == 200
    assert (body["chain"]["verified"], body["chain"]["entries"], body["chain"]["anchored"]) == (True, 5, 4)
    assert body["logs"][4]["qubic_txid"] is None
    assert body["qubic_txid"] == body["logs"][3]["qubic_txid"]


def test_a_task_whose_events_are_not_on_record_yet_has_an_empty_trail(get: Get) -> None:
    task_id = start_task()
    status, body = get(f"/audit/{task_id}")
    assert (status, body["logs"], body["qubic_txid"]) == (200, [], None)
    assert body["chain"] == {"verified": True, "entries": 0, "anchored": 0, "head": None, "broken": None}


@pytest.mark.parametrize("roles", ["auditor", "operator", "approver", "requester auditor"])
def test_who_reads_every_trail(get: Get, recorded: str, roles: str) -> None:
    assert get(f"/audit/{recorded}", roles=roles)[0] == 200


def test_a_requester_reads_the_trails_of_their_own_tasks_only(get: Get, recorded: str) -> None:
    assert get(f"/audit/{recorded}", roles="requester", subject="alice")[0] == 200
    status, body = get(f"/audit/{recorded}", roles="requester", subject="bob")
    missing_status, missing = get(f"/audit/{new_task_id()}", roles="requester", subject="bob")
    assert (status, missing_status) == (404, 404)
    assert body["detail"] == missing["detail"]


def test_nobody_reads_without_a_role_or_a_name(get: Get, recorded: str) -> None:
    assert get(f"/audit/{recorded}", roles="", subject="alice")[0] == 403
    assert get(f"/audit/{recorded}", subject=None)[0] == 401
    assert get(f"/audit/verify/{SOME_HASH}", roles="", subject="alice")[0] == 403
    assert get(f"/audit/verify/{'f' * 64}", roles="", subject="alice")[0] == 403
    assert get(f"/audit/verify/{SOME_HASH}", subject=None)[0] == 401


@pytest.mark.parametrize("task_id", ["nonsense", "task_1", "TASK", "plan_019ab000-0000-7000-8000-000000000001"])
def test_what_is_no_task_is_not_found(get: Get, task_id: str) -> None:
    status, body = get(f"/audit/{task_id}")
    assert (status, body["status"]) == (404, 404)
    assert body["detail"]
    assert get(f"/audit/{new_task_id()}")[0] == 404


def test_a_trail_that_was_tampered_with_says_where(get: Get, recorded: str) -> None:
    second = entries(recorded)[1]
    rewrite(recorded, 2, altered(second, status="failed"), second.leaf)
    status, body = get(f"/audit/{recorded}")
    assert (status, len(body["logs"])) == (200, 4)
    assert body["chain"]["verified"] is False
    assert (body["chain"]["broken"]["seq"], body["chain"]["broken"]["check"]) == (2, "leaf")


def test_a_text_that_is_no_entry_any_more_is_shown_as_it_is(get: Get, recorded: str) -> None:
    rewrite(recorded, 2, "{}", leaf_hash("{}"))
    status, body = get(f"/audit/{recorded}")
    assert status == 200
    assert (body["logs"][1]["status"], body["logs"][1]["entry_text"]) == ("unreadable", "{}")
    assert (body["chain"]["broken"]["seq"], body["chain"]["broken"]["check"]) == (2, "text")


@pytest.mark.parametrize("seq", [1, 3, 4])
def test_an_entry_that_was_taken_away_is_missed(get: Get, recorded: str, seq: int) -> None:
    remove(recorded, seq)
    broken = get(f"/audit/{recorded}")[1]["chain"]["broken"]
    assert (broken["seq"], broken["check"]) == (seq, "seq")


def test_a_trail_that_was_taken_away_as_a_whole_is_missed(get: Get, recorded: str) -> None:
    for seq in range(1, 5):
        remove(recorded, seq)
    status, body = get(f"/audit/{recorded}")
    assert (status, body["logs"], body["chain"]["verified"]) == (200, [], False)


def test_a_newest_entry_that_was_replaced_is_not_the_one_that_was_anchored(get: Get, recorded: str) -> None:
    text = altered(entries(recorded)[3], status="failed")
    rewrite(recorded, 4, text, leaf_hash(text))
    broken = get(f"/audit/{recorded}")[1]["chain"]["broken"]
    assert (broken["seq"], broken["check"]) == (4, "anchor")


# Verifying a hash


def test_a_leaf_hash_is_verified_with_its_evidence(get: Get, recorded: str) -> None:
    third = entries(recorded)[2]
    status, body = get(f"/audit/verify/{third.leaf}")
    assert (status, body["hash"], body["verified"], body["network"]) == (200, third.leaf, True, "mock")
    assert "prove nothing to an outsider" in body["statement"]
    [match] = body["evidence"]["matches"]
    assert (match["task_id"], match["seq"], match["role"]) == (recorded, 3, "leaf")
    assert leaf_hash(match["entry_text"]) == match["leaf"] == third.leaf
    assert match["prev"] == entries(recorded)[1].leaf
    assert len(match["qubic_txid"]) == 60
    assert match["checks"] == dict.fromkeys(["recorded", "occurs", "leaf", "chain", "ledger"], True)
    assert (match["failed"], match["reason"], body["evidence"]["more"]) == ([], None, False)


def test_the_hash_of_an_input_or_output_is_verified_through_its_entries(get: Get, recorded: str) -> None:
    for hash_, role in ((SOME_HASH, "input"), (OTHER_HASH, "output")):
        status, body = get(f"/audit/verify/{hash_.upper()}")
        assert (status, body["verified"], body["hash"]) == (200, True, hash_)
        assert [(match["seq"], match["role"]) for match in body["evidence"]["matches"]] == [
            (4, role),
            (3, role),
            (2, role),
        ]


def test_an_unknown_hash_is_not_verified_and_there_is_nothing_to_show(get: Get, recorded: str) -> None:
    status, body = get(f"/audit/verify/{'f' * 64}")
    assert (status, body["verified"], body["evidence"]) == (200, False, {"matches": [], "more": False})


@pytest.mark.parametrize("hash_", ["ab", "g" * 64, "a" * 63, "a" * 65, "0x" + "a" * 62])
def test_what_is_no_hash_is_refused(get: Get, hash_: str) -> None:
    status, body = get(f"/audit/verify/{hash_}")
    assert (status, body["errors"][0]["field"]) == (422, "hash")


def test_an_answer_has_the_newest_matches_and_says_that_there_are_more(get: Get, aws: Cloud) -> None:
    task_id = task_with(MATCHES + 2)
    new_recorder().drain(task_id)
    status, body = get(f"/audit/verify/{SOME_HASH}")
    assert (status, body["verified"], body["evidence"]["more"]) == (200, True, True)
    assert [match["seq"] for match in body["evidence"]["matches"]] == list(range(MATCHES + 2, 2, -1))


def test_a_requester_verifies_what_is_in_their_own_trails_only(get: Get, recorded: str) -> None:
    leaf = entries(recorded)[0].leaf
    assert get(f"/audit/verify/{leaf}", roles="requester", subject="alice")[1]["verified"] is True
    status, body = get(f"/audit/verify/{leaf}", roles="requester", subject="bob")
    assert (status, body["verified"], body["evidence"]["matches"]) == (200, False, [])


def failing(get: Get, hash_: str) -> set[str]:
    status, body = get(f"/audit/verify/{hash_}")
    assert (status, body["verified"]) == (200, False)
    return set(body["evidence"]["matches"][0]["failed"])


def test_an_altered_text_is_caught(get: Get, recorded: str) -> None:
    second = entries(recorded)[1]
    rewrite(recorded, 2, altered(second, actor="mallory"), second.leaf)
    assert failing(get, second.leaf) == {"leaf", "chain"}


def test_an_altered_text_with_its_own_hash_is_caught(get: Get, recorded: str) -> None:
    fourth = entries(recorded)[3]
    text = altered(fourth, actor="mallory")
    rewrite(recorded, 4, text, leaf_hash(text))
    assert failing(get, fourth.leaf) == {"occurs", "chain", "ledger"}


def test_a_chain_written_anew_is_caught_by_the_ledger(get: Get, recorded: str) -> None:
    client, prev = boto3.client("dynamodb"), GENESIS
    for entry in entries(recorded):
        text = altered(entry, actor="mallory", prev=prev)
        prev = leaf_hash(text)
        rewrite(recorded, entry.seq, text, prev)
        for item in (
            {"pk": {"S": f"HASH#{prev}"}, "sk": {"S": f"{recorded}#{entry.seq:06d}#leaf"}},
            {"pk": {"S": recorded}, "sk": {"S": f"ANCHOR#{entry.seq:06d}"}, "leaf": {"S": prev}}
            | {"txid": {"S": "a" * 60}, "tick": {"N": "1"}, "network": {"S": "mock"}},
        ):
            client.put_item(TableName="AuditLogTable", Item=item)
    assert failing(get, prev) == {"ledger"}


def test_an_entry_that_was_taken_away_is_not_verified(get: Get, recorded: str) -> None:
    third = entries(recorded)[2]
    remove(recorded, 3)
    assert "recorded" in failing(get, third.leaf)


def test_an_entry_before_it_that_was_taken_away_breaks_its_chain(get: Get, recorded: str) -> None:
    third = entries(recorded)[2]
    remove(recorded, 1)
    assert failing(get, third.leaf) == {"chain"}


def test_an_entry_before_the_broken_one_still_holds(get: Get, recorded: str) -> None:
    first, _, third, _ = entries(recorded)
    rewrite(recorded, 3, altered(third, actor="mallory"), third.leaf)
    assert get(f"/audit/verify/{first.leaf}")[1]["verified"] is True


def test_an_anchor_that_names_another_transaction_is_caught(get: Get, recorded: str) -> None:
    boto3.client("dynamodb").update_item(
        TableName="AuditLogTable",
        Key={"pk": {"S": recorded}, "sk": {"S": "ANCHOR#000001"}},
        UpdateExpression="SET txid = :txid",
        ExpressionAttributeValues={":txid": {"S": "a" * 60}},
    )
    assert failing(get, entries(recorded)[0].leaf) == {"ledger"}


def test_a_ledger_that_cannot_be_asked_is_no_answer(get: Get, aws: Cloud, recorded: str) -> None:
    def down(event: Any) -> None:
        raise RuntimeError("down")

    aws.faults["LedgerFunction"] = down
    assert get(f"/audit/verify/{entries(recorded)[0].leaf}")[0] == 503


# Health and the sample events


def test_health_names_the_part_that_fails(get: Get, aws: Cloud) -> None:
    assert get("/audit/health", subject=None) == (200, {"status": "healthy", "service": "audit"})

    def down(event: Any) -> None:
        raise RuntimeError("down")

    aws.faults["LedgerFunction"] = down
    status, body = get("/audit/health", subject=None)
    assert (status, body["status"], body["failing"]) == (503, "unhealthy", ["ledger"])


@pytest.mark.parametrize(("name", "status"), [("api_get", 404), ("api_verify", 200), ("api_health", 200)])
def test_the_sample_events_are_taken(aws: Cloud, name: str, status: int) -> None:
    answer = call_api(json.loads((EVENTS / f"{name}.json").read_text()))
    assert answer["statusCode"] == status
    json.loads(answer["body"])


def test_a_pointer_says_where_a_hash_occurs(aws: Cloud, recorded: str) -> None:
    [pointer] = AuditStore("AuditEntriesTable", "AuditLogTable").pointers(entries(recorded)[0].leaf)
    assert (pointer.task_id, pointer.seq, pointer.role) == (recorded, 1, "leaf")
