"""The stream of the policy on moto: recorded, put into the log, found, checked and bundled as a task's stream is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import boto3
import pytest

from audit import sweeper
from audit.recorder import Drained
from audit.sweeper import Sweeper
from audit.tlog import entries_tile
from qaes.adapters import clients
from qaes.adapters.policy_events import put_event
from qaes.domain.audit import verify_chain
from qaes.domain.canonical import salted_hash
from qaes.domain.ids import now
from qaes.domain.merkle import leaf_digest, verify_inclusion
from qaes.domain.policy_events import next_event
from tests.handlers.test_audit_fsck import check
from tests.handlers.test_audit_recorder import end_task, start_task
from tests.support.api import ALICE, CAROL, Api, set_environment
from tests.support.bundles import load_verifier
from tests.support.cloud import Cloud, cloud
from tests.support.trail import (
    LOG_ID,
    anchor_all,
    entry_items,
    json_of,
    log,
    new_recorder,
    outbox,
    policy_outbox,
    put_policy_event,
    sequence_all,
    store,
    stream_of,
)

STREAM = "policy"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    with cloud(state_machine=False, policy=False) as it:
        clients.client("dynamodb")
        clients.lambda_client()
        monkeypatch.setenv("RECORDER_FUNCTION", "RecordEventsFunction")
        monkeypatch.setenv("SEQUENCER_FUNCTION", "SequencerFunction")
        yield it


def record(aws: Cloud, *items: dict[str, Any]) -> Any:
    return aws.invoke("RecordEventsFunction", json_of(stream_of(list(items))))


def entries() -> list[dict[str, Any]]:
    found = list(store().entries(STREAM))
    verify_chain([(each.text, each.leaf) for each in found], log_id=LOG_ID, stream=STREAM)
    return [json.loads(each.text) for each in found]


def sweep(minutes: int = 2) -> list[str]:
    """The streams that a run hands over, to the recorder or to the sequencer."""
    one = Sweeper(
        outbox(),
        store(),
        log(),
        record=sweeper._record,
        sequence=sweeper._sequence,
        policy_outbox=policy_outbox(),
    )
    found = one.sweep(now() + timedelta(minutes=minutes))
    return found.to_record + found.to_sequence


def test_policy_event_recorded_as_entry_of_version_2(aws: Cloud) -> None:
    item = put_policy_event("policy_proposed", details={"reason": "lower limits"})
    assert record(aws, item) == {"batchItemFailures": []}
    [entry] = entries()
    assert (entry["v"], entry["stream"], entry["task_id"], entry["seq"]) == (2, STREAM, None, 1)
    assert (entry["kind"], entry["actor"], entry["status"]) == ("policy_proposed", "olivia", "proposed")
    assert (entry["step_index"], entry["step_id"], entry["step_type"]) == (-1, "", "policy_proposed")
    assert (entry["policy_id"], entry["plan_hash"]) == (item["policy_id"]["S"], "")
    for side in ("input", "output"):
        assert entry[f"{side}_hash"] == salted_hash(item["salt"]["S"], json.loads(item[side]["S"]))


def test_policy_event_recorded_once_when_delivered_twice(aws: Cloud) -> None:
    first, second = put_policy_event("action_suspended"), put_policy_event("resume_requested")
    record(aws, second)
    record(aws, first, second)
    assert [entry["kind"] for entry in entries()] == ["action_suspended", "resume_requested"]


def test_policy_event_recorded_once_when_drained_at_once(aws: Cloud) -> None:
    for _ in range(5):
        put_policy_event("action_suspended")
    with ThreadPoolExecutor(4) as pool:
        drained = list(pool.map(lambda _: new_recorder().drain(STREAM), range(4)))
    assert sum(each.recorded for each in drained) == len(entries()) == 5
    assert new_recorder().drain(STREAM) == Drained(0, 5)


def test_policy_event_beside_a_broken_task_is_recorded(aws: Cloud) -> None:
    gap = {"pk": {"S": start_task()}, "sk": {"S": "EVENT#000003"}}
    boto3.client("dynamodb").delete_item(TableName="TasksTable", Key={"pk": gap["pk"], "sk": {"S": "EVENT#000001"}})
    end_task(gap["pk"]["S"])
    answer = record(aws, gap, put_policy_event("action_suspended"))
    assert answer == {"batchItemFailures": [{"itemIdentifier": "1000"}]}
    assert len(entries()) == 1


def test_sweeper_records_lost_policy_event(aws: Cloud) -> None:
    put_policy_event("action_suspended")
    put_policy_event("resume_requested")
    assert sweep(minutes=0) == [], "it is left to the stream for a minute"
    assert sweep() == [STREAM]
    sequence_all(aws)
    assert sweep() == []
    assert [str(each) for each in check().findings] == []


def test_sweeper_sequences_lost_policy_entry(aws: Cloud) -> None:
    record(aws, put_policy_event("action_suspended"))
    assert sweep() == [STREAM]
    assert log().last_index(STREAM) is not None


def test_fsck_names_policy_event_without_entry(aws: Cloud) -> None:
    put_policy_event("action_suspended")
    report = check()
    assert [(each.invariant, each.where) for each in report.findings] == [("unrecorded", "policy 1")]
    assert report.unrecorded == [STREAM]


def test_sequencer_refuses_policy_entry_in_a_task(aws: Cloud) -> None:
    record(aws, put_policy_event("action_suspended"))
    [item] = entry_items(STREAM)
    moved = item | {"pk": {"S": start_task()}}
    boto3.client("dynamodb").put_item(TableName="AuditEntriesTable", Item=moved)
    answer = aws.invoke("SequencerFunction", json_of(stream_of([moved])))
    assert len(answer["batchItemFailures"]) == 1


def test_policy_event_refused_when_its_number_is_taken(aws: Cloud) -> None:
    put_policy_event("action_suspended")
    late = next_event(None, "action_suspended", actor="oscar", at="2026-11-23T12:00:00.000Z", name="*")
    with pytest.raises(Exception, match="ConditionalCheckFailed"):
        boto3.client("dynamodb").put_item(**put_event("PolicyTable", late)["Put"])


# Over the API


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    set_environment("AuditApiFunction", monkeypatch)
    with cloud(state_machine=False, policy=False) as it:
        clients.client("dynamodb")
        yield Api(it, "AuditApiFunction")


def bundle_of(api: Api, task_id: str, **caller: Any) -> dict[str, Any]:
    answer = api("GET", f"/audit/{task_id}/bundle", **caller)
    assert answer.status == 200, answer.body
    body: dict[str, Any] = answer.body
    return body


def test_bundle_has_format_1_when_the_policy_has_no_event(api: Api) -> None:
    task_id = start_task()
    new_recorder().drain(task_id)
    bundle = bundle_of(api, task_id)
    assert bundle["format"] == "qaes-bundle-1"
    assert "policy_entries" not in bundle


def test_bundle_has_the_policy_entries_with_proofs(api: Api) -> None:
    put_policy_event("action_suspended", details={"reason": "an incident"})
    task_id = start_task()
    for stream in (task_id, STREAM):
        new_recorder().drain(stream)
    anchor_all(api.aws)
    bundle = bundle_of(api, task_id)
    [sent] = bundle["policy_entries"]
    entry = json.loads(sent["text"])
    assert (bundle["format"], entry["kind"], json.loads(sent["input"])["reason"]) == (
        "qaes-bundle-2",
        "action_suspended",
        "an incident",
    )
    assert entry["input_hash"] == salted_hash(sent["salt"], json.loads(sent["input"]))
    root = log().anchors.newest().root  # type: ignore[union-attr]
    verify_inclusion(
        leaf=leaf_digest(sent["text"].encode()),
        index=sent["index"],
        size=len(entry_items()),
        proof=[bytes.fromhex(each) for each in sent["proof"]],
        root=root,
    )


def test_bundle_leaves_out_policy_events_not_yet_recorded(api: Api) -> None:
    put_policy_event("action_suspended")
    new_recorder().drain(STREAM)
    put_policy_event("resume_requested")
    task_id = start_task()
    new_recorder().drain(task_id)
    assert [json.loads(each["text"])["seq"] for each in bundle_of(api, task_id)["policy_entries"]] == [1]


def test_verifier_accepts_a_bundle_with_the_policys_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the API returns it, under the policy that the ledger has put in force."""
    set_environment("AuditApiFunction", monkeypatch)
    with cloud(state_machine=False) as aws:
        put_policy_event("action_suspended", name="refund_customer", details={"reason": "an incident"})
        task_id = start_task()
        end_task(task_id)
        for stream in (task_id, STREAM):
            new_recorder().drain(stream)
        anchor_all(aws)
        bundle = bundle_of(Api(aws, "AuditApiFunction"), task_id)
        newest = log().anchors.newest()
    assert newest is not None
    lines = load_verifier().verify(json.dumps(bundle).encode(), log_id=LOG_ID, anchor_identity=newest.source)
    assert "changes   of the policy: entries 1, 2, of which 2 are in the anchored log" in lines


@pytest.mark.parametrize(("caller", "matches"), [(CAROL, 1), (ALICE, 0)])
def test_policy_entry_found_by_its_hash(api: Api, caller: dict[str, str], matches: int) -> None:
    put_policy_event("action_suspended")
    new_recorder().drain(STREAM)
    anchor_all(api.aws)
    [item] = entry_items(STREAM)
    found = api("GET", f"/audit/verify/{item['leaf']['S']}", **caller).body["evidence"]["matches"]
    assert [(each["stream"], each["task_id"], each["failed"]) for each in found] == [(STREAM, None, [])] * matches


def test_log_serves_policy_entries_in_its_tiles(aws: Cloud) -> None:
    put_policy_event("action_suspended")
    new_recorder().drain(STREAM)
    sequence_all(aws)
    [leaf] = log().leaves(0, 1)
    text = entries_tile(log(), store(), ("000.p", "1"))[2:].decode()
    assert (leaf.key, text) == ((STREAM, 1), entry_items(STREAM)[0]["text"]["S"])
