"""fsck on moto: a sound log has no findings, and each invariant that is broken is named."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import boto3
import pytest
from botocore.client import BaseClient

from audit.anchors import Anchor
from audit.fsck import INVARIANTS, Report, fsck
from audit.log import Batch, Leaf
from audit.sequencer import _over
from audit.store import Outbox
from local.fsck import repair, settled, show
from qaes.adapters import clients
from qaes.adapters.ledger_client import LedgerClient
from qaes.domain.tiles import appended, tree_root
from tests.handlers.test_audit_recorder import add_events, end_task, start_task, task_with
from tests.support.cloud import Cloud, cloud, prepared
from tests.support.trail import (
    anchor,
    anchor_all,
    deliver,
    entry_items,
    forget_policy_events,
    log,
    new_recorder,
    new_sequencer,
    outbox,
    policy_outbox,
    put_entries,
    put_policy_event,
    sequence_all,
    store,
)


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False, policy=False) as it:
        clients.client("dynamodb")
        clients.lambda_client()
        yield it


@pytest.fixture
def sound(aws: Cloud) -> str:
    """Two tasks with two anchors; the id of the first."""

    def record() -> str:
        found = []
        for events in (3, 2):
            found.append(task_with(events))
            new_recorder().drain(found[-1])
            anchor_all(aws)
        forget_policy_events()
        return found[0]

    return str(prepared(aws, "sound", record))


def check() -> Report:
    return fsck(
        store(), log(), LedgerClient("LedgerFunction"), log_id="qaes", outbox=outbox(), policy_outbox=policy_outbox()
    )


def found() -> set[str]:
    return {each.invariant for each in check().findings}


def change(table: str, pk: str, sk: str, **attributes: Any) -> None:
    boto3.client("dynamodb").update_item(
        TableName=table,
        Key={"pk": {"S": pk}, "sk": {"S": sk}},
        UpdateExpression="SET " + ", ".join(f"#{name} = :{name}" for name in attributes),
        ExpressionAttributeNames={f"#{name}": name for name in attributes},
        ExpressionAttributeValues={f":{name}": value for name, value in attributes.items()},
    )


def remove(table: str, pk: str, sk: str) -> None:
    boto3.client("dynamodb").delete_item(TableName=table, Key={"pk": {"S": pk}, "sk": {"S": sk}})


def unset(table: str, pk: str, sk: str, name: str) -> None:
    boto3.client("dynamodb").update_item(
        TableName=table,
        Key={"pk": {"S": pk}, "sk": {"S": sk}},
        UpdateExpression="REMOVE #name",
        ExpressionAttributeNames={"#name": name},
    )


def put_index(task_id: str, last: int, *, index: int, leaves: bytes) -> None:
    item = {"pk": {"S": task_id}, "sk": {"S": f"INDEX#{last:06d}"}, "index": {"N": str(index)}, "leaves": {"B": leaves}}
    boto3.client("dynamodb").put_item(TableName=LOG, Item=item)


def hashes(task_id: str) -> bytes:
    return b"".join(bytes.fromhex(entry.leaf) for entry in store().entries(task_id))


def swapped(leaves: bytes) -> bytes:
    return leaves[32:64] + leaves[:32] + leaves[64:]


def first_anchor() -> Anchor:
    return next(iter(log().anchors.all()))


def test_sound_log_has_no_findings(sound: str) -> None:
    report = check()
    assert report.findings == []
    assert (report.tasks, report.entries, report.size, report.anchors, report.anchored) == (2, 5, 5, 2, 5)
    assert "every invariant holds" in show(report)


def test_empty_log_is_sound(aws: Cloud) -> None:
    assert check().findings == []


def renamed(batch: Batch) -> str:
    return f"task_x 1 {len(batch.leaves)}"


def forge_decision(task_id: str) -> None:
    """An event after the last claims a person's decision, and the task counts it."""
    add_events(task_id, 4, 4)
    change(TASKS, task_id, "EVENT#000004", kind={"S": "approval_decided"})


TASKS, ENTRIES, LOG, NEWEST = "TasksTable", "AuditEntriesTable", "AuditLogTable", "SIZE#000000000005"
ANCHORS = "AuditAnchorsTable"


def policy_event(number: int) -> tuple[str, str, str]:
    """Change the policy twice, put that into the log; the key of the event with that number."""
    for kind in ("action_suspended", "resume_requested"):
        put_policy_event(kind)
    new_recorder().drain("policy")
    new_sequencer().sequence(("policy", entry) for entry in store().entries("policy"))
    return "PolicyTable", "EVENTS#policy", f"EVENT#{number:09d}"


BROKEN: dict[str, tuple[set[str], Callable[[str], Any]]] = {
    "event not recorded": ({"unrecorded"}, lambda task: add_events(task, 4, 4)),
    "event altered": ({"event"}, lambda task: change(TASKS, task, "EVENT#000002", actor={"S": "mallory"})),
    "decision gone": ({"decision"}, lambda task: remove("DecisionsTable", task, "DECISION#000001")),
    "event forged": ({"decision", "unrecorded"}, forge_decision),
    "event gone": ({"event"}, lambda task: remove(TASKS, task, "EVENT#000002")),
    "entry altered": ({"chain"}, lambda task: change(ENTRIES, task, "ENTRY#000002", text={"S": "{}"})),
    "entry with another hash": (
        {"chain", "index"},
        lambda task: change(ENTRIES, task, "ENTRY#000003", leaf={"S": "f" * 64}),
    ),
    "policy's event with another state": (
        {"policy", "event"},
        lambda _: change(*policy_event(2), output={"S": '{"suspended":{}}'}),
    ),
    "policy's event gone": ({"policy", "event"}, lambda _: remove(*policy_event(1))),
    "policy's last event gone": ({"event"}, lambda _: remove(*policy_event(2))),
    "entry gone": ({"chain", "index"}, lambda task: remove(ENTRIES, task, "ENTRY#000002")),
    "last entry gone": ({"index"}, lambda task: remove(ENTRIES, task, "ENTRY#000003")),
    "entry not found by its output": ({"lookup"}, lambda task: unset(ENTRIES, task, "ENTRY#000002", "output")),
    "entry found by another input": (
        {"lookup"},
        lambda task: change(ENTRIES, task, "ENTRY#000002", input={"B": b"x" * 32}),
    ),
    "index of no entry": ({"index"}, lambda task: put_index(task, 9, index=9, leaves=b"f" * 32)),
    "index of an entry too many": (
        {"index"},
        lambda task: put_index(task, 4, index=0, leaves=hashes(task) + b"f" * 32),
    ),
    "two indexes of an entry": ({"index"}, lambda task: put_index(task, 2, index=1, leaves=hashes(task)[32:64])),
    "two entries change places": ({"index"}, lambda task: put_index(task, 3, index=0, leaves=swapped(hashes(task)))),
    "index gone": ({"index"}, lambda task: remove(LOG, task, "INDEX#000003")),
    "another index": ({"index"}, lambda task: change(LOG, task, "INDEX#000003", index={"N": "2"})),
    "another leaf hash in an index": (
        {"index"},
        lambda task: change(LOG, task, "INDEX#000003", leaves={"B": hashes(task)[:64] + b"f" * 32}),
    ),
    "batch gone": (
        {"head", "tile", "anchor", "unsequenced", "index"},
        lambda _: remove(LOG, "LOG", "BATCH#000000000003"),
    ),
    "batch with other names": (
        {"index", "unsequenced"},
        lambda _: change(LOG, "LOG", "BATCH#000000000000", spans={"S": renamed(next(iter(log().batches())))}),
    ),
    "another root of a batch": ({"batch"}, lambda _: change(LOG, "LOG", "BATCH#000000000000", root={"B": b"x" * 32})),
    "another root of the head": ({"head"}, lambda _: change(LOG, "LOG", "HEAD", root={"B": b"x" * 32})),
    "not integrated": ({"head"}, lambda _: change(LOG, "LOG", "HEAD", integrated={"N": "3"})),
    "tile altered": ({"tile"}, lambda _: change(LOG, "TILE#00#000000000000", "TILE", hashes={"B": b"x" * 160})),
    "tile narrower": (
        {"tile"},
        lambda _: change(LOG, "TILE#00#000000000000", "TILE", hashes={"B": log().tile(0, 0, 2)}),
    ),
    "tile above the top": ({"tile"}, lambda _: log().widen_tile(1, 0, b"x" * 32)),
    "tile gone": ({"tile"}, lambda _: remove(LOG, "TILE#00#000000000000", "TILE")),
    "tile too many": ({"tile"}, lambda _: log().widen_tile(0, 1, b"x" * 32)),
    "another root of an anchor": (
        {"anchor", "note"},
        lambda _: change(ANCHORS, "ANCHOR", "SIZE#000000000003", root={"B": b"x" * 32}),
    ),
    "anchor gone": ({"anchor"}, lambda _: remove(ANCHORS, "ANCHOR", "SIZE#000000000003")),
    "anchor on another network": ({"anchor"}, lambda _: change(ANCHORS, "ANCHOR", NEWEST, network={"S": "mainnet"})),
    "newest anchor gone": ({"in flight"}, lambda _: remove(ANCHORS, "ANCHOR", NEWEST)),
    "payload of another": (
        {"anchor", "transaction", "in flight"},
        lambda _: change(ANCHORS, "ANCHOR", NEWEST, payload={"B": first_anchor().payload}),
    ),
    "another transaction": (
        {"transaction", "ledger"},
        lambda _: change(ANCHORS, "ANCHOR", NEWEST, txid={"S": "a" * 60}),
    ),
    "unreadable transaction": ({"transaction"}, lambda _: change(ANCHORS, "ANCHOR", NEWEST, encoded={"B": b"x"})),
    "note of another": ({"note"}, lambda _: change(ANCHORS, "ANCHOR", NEWEST, note={"S": first_anchor().note})),
    "note unsigned": ({"note"}, lambda _: change(ANCHORS, "ANCHOR", NEWEST, note={"S": "x"})),
    "no newest anchor": ({"in flight"}, lambda _: change(ANCHORS, "ANCHOR", "ANCHORING", sequence={"N": "7"})),
}


@pytest.mark.parametrize("name", BROKEN)
def test_fsck_names_each_broken_invariant(sound: str, name: str) -> None:
    expected, break_it = BROKEN[name]
    break_it(sound)
    assert found() == expected


def test_every_invariant_is_broken_by_one_of_these(sound: str) -> None:
    named = set().union(*(expected for expected, _ in BROKEN.values()))
    assert set(INVARIANTS) - named == {"twice"}


def test_fsck_names_duplicate_entry(sound: str, aws: Cloud) -> None:
    """The log as a faulty sequencer would write it."""
    head, entry = log().head(), next(store().entries(sound))
    tiles = appended(5, [bytes.fromhex(entry.leaf)], log().tile)
    batch = Batch(5, (Leaf(sound, 1, entry.leaf),), tree_root(6, _over(tiles, log().tile)))
    assert log().commit(head, batch)
    assert "twice" in found()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {
        "TASKS_TABLE": TASKS,
        "AUDIT_ENTRIES_TABLE": ENTRIES,
        "AUDIT_LOG_TABLE": LOG,
        "AUDIT_ANCHORS_TABLE": ANCHORS,
    }
    names |= {"RECORDER_FUNCTION": "RecordEventsFunction", "SEQUENCER_FUNCTION": "SequencerFunction"}
    for name, value in (names | {"LEDGER_FUNCTION": "LedgerFunction"}).items():
        monkeypatch.setenv(name, value)


def test_fsck_repairs_through_recorder_and_sequencer(
    aws: Cloud, sound: str, environment: None, capsys: pytest.CaptureFixture[str]
) -> None:
    unsequenced, unrecorded = start_task(), start_task()
    new_recorder().drain(unsequenced)
    end_task(unrecorded)
    report = settled(0, log_id="qaes")
    assert ({each.invariant for each in report.findings}, report.unsequenced, report.unrecorded) == (
        {"unsequenced", "unrecorded"},
        [unsequenced],
        [unrecorded],
    )
    assert "unsequenced" in show(report) and "unrecorded" in show(report)
    after = repair(report, 0, log_id="qaes")
    assert after.findings == []
    assert capsys.readouterr().out.count("broken") == 2
    assert [entry.seq for entry in store().entries(unrecorded)] == [1, 2]


def test_fsck_finds_unrecorded_end_of_task(aws: Cloud) -> None:
    task_id = start_task()
    new_recorder().drain(task_id)
    end_task(task_id)
    sequence_all(aws)
    report = check()
    assert [(each.invariant, each.where) for each in report.findings] == [("unrecorded", f"{task_id} 2")]


def test_fsck_finds_missing_last_event(aws: Cloud) -> None:
    task_id = start_task()
    end_task(task_id)
    remove(TASKS, task_id, "EVENT#000002")
    assert found() == {"event", "unrecorded"}


def test_event_that_comes_in_during_the_scan_is_no_finding(aws: Cloud, sound: str) -> None:
    """A scan is no snapshot: it shows the task as it is after the event, and the events as they were before."""
    there = outbox().tasks

    def torn(_: Outbox) -> Iterator[tuple[str, int, int | None]]:
        for task_id, last, said in there():
            yield task_id, last - (task_id == sound), said

    with patch.object(Outbox, "tasks", torn):
        assert found() == set()


@pytest.mark.parametrize("read", ["last_event", "events_said"])
def test_event_during_second_read_is_no_finding(
    aws: Cloud, sound: str, read: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, look = outbox().tasks, getattr(Outbox, read)

    def torn(_: Outbox) -> Iterator[tuple[str, int, int | None]]:
        yield from ((task_id, last, last + 1) for task_id, last, _ in there() if task_id == sound)

    def and_one_more(self: Outbox, task_id: str) -> Any:
        answer = look(self, task_id)
        if coming:
            number = coming.pop()
            add_events(task_id, number, number)
        return answer

    coming = [5, 4]
    monkeypatch.setattr(Outbox, "tasks", torn)
    monkeypatch.setattr(Outbox, read, and_one_more)
    assert "event" not in found()
    assert coming != [5, 4], "it was not looked at again"


@pytest.mark.parametrize("count", [2, 4])
def test_fsck_names_wrong_event_count(aws: Cloud, sound: str, count: int) -> None:
    stored = boto3.client("dynamodb").get_item(TableName=TASKS, Key={"pk": {"S": sound}, "sk": {"S": "TASK"}})
    data = json.loads(stored["Item"]["data"]["S"]) | {"events": count}
    change(TASKS, sound, "TASK", data={"S": json.dumps(data)})
    told = [str(each) for each in check().findings if each.invariant == "event"]
    assert told == [f"event: {sound} {count}: the task counts {count} events, but its last event is 3"]


def test_task_that_was_erased_is_no_finding(aws: Cloud, sound: str) -> None:
    client = boto3.client("dynamodb")
    for item in client.scan(TableName=TASKS)["Items"]:
        if item["pk"]["S"] == sound:
            client.delete_item(TableName=TASKS, Key={"pk": item["pk"], "sk": item["sk"]})
    report = check()
    assert (report.findings, report.erased) == ([], 1)
    assert "1 tasks are erased" in show(report)


def test_fsck_counts_findings_beyond_the_limit(aws: Cloud, sound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("audit.fsck.MOST_FINDINGS", 1)
    remove(LOG, sound, "INDEX#000003")
    report = check()
    assert (len(report.findings), report.not_shown) == (1, 2)
    assert "3 findings" in show(report)


def test_tiles_of_every_level_are_compared(aws: Cloud) -> None:
    put_entries(600)
    sequence_all(aws)
    looked_at = fsck(store(), log(), None, log_id="qaes")
    assert looked_at.findings == []
    assert (looked_at.size, looked_at.tiles) == (600, 4)
    change(LOG, "TILE#01#000000000000", "TILE", hashes={"B": b"x" * 64})
    assert "tile" in {each.invariant for each in fsck(store(), log(), None, log_id="qaes").findings}


def test_fsck_reads_pages_instead_of_entries(aws: Cloud) -> None:
    """A few requests for a task, however many entries it has, and a few for 256 places."""
    for _ in range(2):
        new_recorder().drain(task_with(40))
    sequence_all(aws)
    call, reads = BaseClient._make_api_call, []

    def counting(client: Any, operation: str, arguments: Any) -> Any:
        reads.append(operation)
        return call(client, operation, arguments)

    with patch.object(BaseClient, "_make_api_call", counting):
        assert check().findings == []
    assert len(reads) < 25, reads


def test_anchor_in_flight_is_no_finding(aws: Cloud, sound: str) -> None:
    task_id = task_with(2)
    new_recorder().drain(task_id)
    sequence_all(aws)
    anchor(aws)
    assert check().findings == []
    assert deliver(aws, entry_items()) == []
