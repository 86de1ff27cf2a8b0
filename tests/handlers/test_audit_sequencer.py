"""The sequencer on moto: every entry gets one index, under concurrent runs, any order and crashes."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import boto3
import pytest
from botocore.client import BaseClient

from audit.log import Batch, CorruptLogError, Head, Leaf, Log, Span
from audit.sequencer import BATCH
from benchmarks.units import WRITE_BYTES, item_size
from qaes.adapters import clients
from qaes.domain.merkle import EMPTY_ROOT, leaf_hash, root_of, verify_consistency, verify_inclusion
from qaes.domain.tiles import appended, consistency_proof, inclusion_proof, tree_root
from tests.handlers.test_audit_recorder import entries, start_task, task_with
from tests.support.cloud import Cloud, cloud
from tests.support.trail import deliver, entry_items, log, new_recorder, new_sequencer, put_entries, store


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        clients.client("dynamodb")
        yield it


def recorded(events: int) -> str:
    task_id = task_with(events)
    new_recorder().drain(task_id)
    return task_id


def leaves() -> list[tuple[str, int, bytes]]:
    """Return the log's entries in order."""
    return [(each.task_id, each.seq, each.hash) for batch in log().batches() for each in batch.leaves]


def check_log(count: int) -> None:
    """`count` entries, each once, each task's in order; head, tiles and indexes agree with the batches."""
    found, head = leaves(), log().head()
    assert len(found) == count
    assert len({(task, seq) for task, seq, _ in found}) == count
    for task in {task for task, _, _ in found}:
        numbers = [seq for each, seq, _ in found if each == task]
        assert numbers == list(range(1, len(numbers) + 1))
    hashes = [leaf for _, _, leaf in found]
    assert (head.size, head.root) == (count, root_of(hashes))
    assert (head.integrated, head.integrated_root) == (head.size, head.root)
    assert tree_root(count, log().tile) == head.root
    for index, (task, seq, leaf) in enumerate(found):
        indexed = log().indexes([(task, seq)])[task, seq]
        assert (indexed.index, indexed.leaf) == (index, leaf.hex())


def test_empty_log_has_a_head_and_a_root(aws: Cloud) -> None:
    assert log().head() == Head()
    assert log().head().root == EMPTY_ROOT
    assert deliver(aws, []) == []


def test_entries_get_their_places_and_each_can_be_proved(aws: Cloud) -> None:
    first, second = recorded(3), recorded(2)
    assert deliver(aws, entry_items(first)) == []
    root = log().head().root
    assert deliver(aws, entry_items(second)) == []
    check_log(5)
    head = log().head()
    for index, (_, _, leaf) in enumerate(leaves()):
        proof = inclusion_proof(index, 5, log().tile)
        verify_inclusion(leaf=leaf, index=index, size=5, proof=proof, root=head.root)
    proof = consistency_proof(3, 5, log().tile)
    verify_consistency(first=3, second=5, proof=proof, first_root=root, second_root=head.root)


def test_redelivered_entry_keeps_its_index(aws: Cloud) -> None:
    task_id = recorded(3)
    items = entry_items(task_id)
    assert deliver(aws, items[:2]) == []
    head = log().head()
    assert deliver(aws, items[:2]) == []
    assert log().head() == head
    assert deliver(aws, items + items) == []
    check_log(3)


def test_order_that_the_stream_did_not_keep_is_put_right(aws: Cloud) -> None:
    task_id = recorded(6)
    items = entry_items(task_id)
    assert deliver(aws, [items[4]]) == []
    check_log(5)
    assert deliver(aws, items[::-1]) == []
    check_log(6)


def test_more_entries_than_a_batch_has_go_into_several(aws: Cloud) -> None:
    task_id = put_entries(BATCH + 5)
    assert deliver(aws, entry_items(task_id)) == []
    assert [len(batch.leaves) for batch in log().batches()] == [BATCH, 5]
    check_log(BATCH + 5)


def test_fsck_has_the_entries_of_a_task_put_into_the_log(aws: Cloud) -> None:
    task_id = recorded(3)
    assert aws.invoke("SequencerFunction", {"task_ids": [task_id]}) == {"broken": []}
    check_log(3)


def test_altered_entry_is_not_sequenced_and_blocks_none(aws: Cloud) -> None:
    bad, good = recorded(3), recorded(2)
    text = entries(bad)[1].text.replace("worker", "nobody")
    items = entry_items(bad)
    for leaf in (items[1]["leaf"]["S"], leaf_hash(text)):
        items[1] = items[1] | {"text": {"S": text}, "leaf": {"S": leaf}}
        boto3.client("dynamodb").put_item(TableName="AuditEntriesTable", Item=items[1])
        both = [*items, *entry_items(good)]
        failed = deliver(aws, both)
        # With its own hash, it is the one after it that names another.
        assert failed == (["1001", "1002"] if leaf != leaf_hash(text) else ["1002"])


@pytest.mark.parametrize(
    ("name", "value"), [("task_id", "task_x"), ("seq", 7), ("log_id", "another"), ("prev", "0" * 64)]
)
def test_entry_of_another_place_is_refused(aws: Cloud, name: str, value: Any) -> None:
    from qaes.domain.canonical import canonical_json

    task_id = recorded(2)
    items = entry_items(task_id)
    text = canonical_json(json.loads(items[1]["text"]["S"]) | {name: value})
    items[1] = items[1] | {"text": {"S": text}, "leaf": {"S": leaf_hash(text)}}
    assert deliver(aws, items) == ["1001"]
    check_log(1)


def test_missing_entry_blocks_later_entries(aws: Cloud) -> None:
    task_id = recorded(4)
    items = entry_items(task_id)
    boto3.client("dynamodb").delete_item(
        TableName="AuditEntriesTable", Key={"pk": items[1]["pk"], "sk": items[1]["sk"]}
    )
    assert deliver(aws, [items[0], items[3]]) == ["1001"]
    check_log(1)


def test_crash_after_the_commit_is_completed_by_the_next_run(aws: Cloud) -> None:
    task_id, other = recorded(3), recorded(2)
    with patch.object(type(log()), "widen_tile", side_effect=RuntimeError("crash")), pytest.raises(RuntimeError):
        deliver(aws, entry_items(task_id))
    assert (log().head().size, log().head().integrated) == (3, 0)
    assert deliver(aws, entry_items(other)) == []
    check_log(5)


def test_nothing_is_committed_on_a_head_that_has_moved(aws: Cloud) -> None:
    task_id, other = recorded(1), recorded(1)
    before = log().head()
    deliver(aws, entry_items(task_id))
    leaf = Leaf(other, 1, entries(other)[0].leaf)
    assert log().commit(before, Batch(0, (leaf,), root_of([leaf.hash]))) is False
    assert log().commit(Head(version=7), Batch(1, (leaf,), root_of([leaf.hash]))) is False
    check_log(1)


def test_tile_never_gets_narrower_and_an_index_never_another(aws: Cloud) -> None:
    task_id = recorded(2)
    deliver(aws, entry_items(task_id))
    wide = log().stored_tile(0, 0)
    log().widen_tile(0, 0, wide[:32])
    log().widen_tile(0, 0, b"x" * 64)
    assert log().stored_tile(0, 0) == wide
    [batch] = log().batches()
    with pytest.raises(CorruptLogError, match="1 to 2 have other indexes than the batch at 7"):
        log().record_indexes(Batch(7, batch.leaves, batch.root))
    another = tuple(replace(each, leaf="f" * 64) for each in batch.leaves)
    with pytest.raises(CorruptLogError, match="have other indexes"):
        log().record_indexes(Batch(0, another, batch.root))
    log().record_indexes(batch)
    check_log(2)


def test_batch_with_another_root_is_not_integrated(aws: Cloud) -> None:
    task_id = recorded(2)
    with patch.object(type(log()), "widen_tile", side_effect=RuntimeError("crash")), pytest.raises(RuntimeError):
        deliver(aws, entry_items(task_id))
    boto3.client("dynamodb").update_item(
        TableName="AuditLogTable",
        Key={"pk": {"S": "LOG"}, "sk": {"S": "BATCH#000000000000"}},
        UpdateExpression="SET root = :root",
        ExpressionAttributeValues={":root": {"B": b"x" * 32}},
    )
    with pytest.raises(CorruptLogError, match="root"):
        new_sequencer().integrate()


@pytest.mark.parametrize("seed", range(3))
def test_sequencers_at_the_same_time_give_each_entry_one_index(aws: Cloud, seed: int) -> None:
    tasks = [recorded(4) for _ in range(5)]
    items, chance = entry_items(*tasks), random.Random(seed)  # noqa: S311
    ready, workers = threading.Barrier(3), 3

    def run(number: int) -> None:
        mine = random.Random(seed * 10 + number).sample(items, len(items))  # noqa: S311
        ready.wait()
        for at in range(0, len(mine), 5):
            wanted = [(item["pk"]["S"], entry) for item in mine[at : at + 5] for entry in [as_entry(item)]]
            assert new_sequencer().sequence(wanted) == {}

    call = BaseClient._make_api_call

    def unevenly(client: Any, operation: str, arguments: Any) -> Any:
        threading.Event().wait(chance.random() / 300)
        return call(client, operation, arguments)

    with patch.object(BaseClient, "_make_api_call", unevenly), ThreadPoolExecutor(workers) as pool:
        for each in [pool.submit(run, number) for number in range(workers)]:
            each.result()
    check_log(20)


def as_entry(item: dict[str, Any]) -> Any:
    from audit.store import entry_of

    return entry_of(item)


def index_items(task_id: str) -> list[tuple[str, int]]:
    """(sort key, number of leaf hashes) of each INDEX item of the task."""
    found = boto3.client("dynamodb").query(
        TableName="AuditLogTable",
        KeyConditionExpression="pk = :pk",
        ExpressionAttributeValues={":pk": {"S": task_id}},
    )
    return [(item["sk"]["S"], len(item["leaves"]["B"]) // 32) for item in found["Items"]]


def test_index_is_one_item_for_each_task_and_batch(aws: Cloud) -> None:
    first, second = recorded(5), recorded(3)
    items = entry_items(first)
    deliver(aws, items[:2])
    deliver(aws, [items[3], *entry_items(second), items[2], items[4]])
    check_log(8)
    assert index_items(first) == [("INDEX#000002", 2), ("INDEX#000005", 3)]
    assert index_items(second) == [("INDEX#000003", 3)]


def test_index_found_by_any_number_of_its_task(aws: Cloud) -> None:
    task_id, other = recorded(7), recorded(2)
    items = entry_items(task_id)
    for part in (items[:3], entry_items(other), items[3:4], items[4:]):
        deliver(aws, part)
    expected = {1: 0, 2: 1, 3: 2, 4: 5, 5: 6, 6: 7, 7: 8}
    for seq, index in expected.items():
        assert log().indexes([(task_id, seq)])[task_id, seq].index == index
    asked = [(task_id, 2), (other, 1), (task_id, 9), (task_id, 6), ("task_x", 1)]
    assert {each: found.index for each, found in log().indexes(asked).items()} == {
        (task_id, 2): 1, (other, 1): 3, (task_id, 6): 7,
    }  # fmt: skip


def test_index_of_a_batch_not_in_order_is_several_items(aws: Cloud) -> None:
    """No batch of this sequencer; a reader understands it all the same."""
    leaves = tuple(Leaf(task, seq, f"{seq}" * 64) for task, seq in (("a", 1), ("b", 1), ("a", 2), ("a", 3), ("b", 3)))
    log().record_indexes(Batch(0, leaves, EMPTY_ROOT))
    assert {seq: each.index for seq, each in log().task_indexes("a").items()} == {1: 0, 2: 2, 3: 3}
    assert {seq: each.index for seq, each in log().task_indexes("b").items()} == {1: 1, 3: 4}
    assert log().indexes([("b", 2)]) == {}


@pytest.mark.parametrize("leaves", [b"", b"x" * 31, b"x" * 96])
def test_index_with_other_leaves_than_it_counts_is_refused(aws: Cloud, leaves: bytes) -> None:
    item = {"pk": {"S": "task_x"}, "sk": {"S": "INDEX#000002"}, "index": {"N": "0"}, "leaves": {"B": leaves}}
    boto3.client("dynamodb").put_item(TableName="AuditLogTable", Item=item)
    with pytest.raises(CorruptLogError, match="task_x up to 2"):
        log().last_index("task_x")


def batch_item() -> dict[str, Any]:
    found = boto3.client("dynamodb").get_item(
        TableName="AuditLogTable", Key={"pk": {"S": "LOG"}, "sk": {"S": "BATCH#000000000000"}}
    )
    return dict(found["Item"])


def test_batch_of_a_task_with_twelve_entries_takes_one_kilobyte(aws: Cloud) -> None:
    deliver(aws, entry_items(recorded(12)))
    assert item_size(batch_item()) <= WRITE_BYTES


@pytest.mark.parametrize(
    "altered",
    [
        {"leaves": {"B": b"x" * 95}},
        {"leaves": {"B": b"x" * 128}},
        {"spans": {"S": "task_x 1 2"}},
        {"spans": {"S": "task_x 1 4"}},
        {"spans": {"S": "task_x 1 4\ntask_y 1 -1"}},
        {"spans": {"S": "task_x 1 1\ntask_x 2 2"}},
        {"size": {"N": "4"}},
    ],
)
def test_batch_with_other_leaves_than_it_counts_is_refused(aws: Cloud, altered: dict[str, Any]) -> None:
    deliver(aws, entry_items(recorded(3)))
    boto3.client("dynamodb").put_item(TableName="AuditLogTable", Item=batch_item() | altered)
    with pytest.raises(CorruptLogError, match="the batch at 0"):
        log().batch(0)


def test_sequencing_again_after_a_crash_between_two_indexes(aws: Cloud) -> None:
    """A task's indexes are there, another's of the same batch are not: the next run writes them, and no entry twice."""
    tasks = [recorded(2) for _ in range(12)]
    written, record = [], Log._record_span

    def crash_after_five(self: Log, span: Span) -> None:
        if len(written) == 5:
            raise RuntimeError("crash")
        written.append(span)
        record(self, span)

    with patch.object(Log, "_record_span", crash_after_five), pytest.raises(RuntimeError):
        deliver(aws, entry_items(*tasks))
    assert (log().head().size, log().head().integrated) == (24, 0)
    assert deliver(aws, entry_items(*tasks)) == []
    check_log(24)


def test_indexes_are_returned_for_many_entries(aws: Cloud) -> None:
    task_id = put_entries(120)
    deliver(aws, entry_items(task_id))
    found = log().indexes([(task_id, seq) for seq in range(1, 130)])
    assert len(found) == 120
    assert log().task_indexes(task_id)[120].index == 119
    last = log().last_index(task_id)
    assert last is not None and last.seq == 120
    assert log().last_index(start_task()) is None


# Proofs from tiles


def test_proof_needs_few_reads(aws: Cloud) -> None:
    """At most 2 * ceil(log256 n) + 2 of the table, the index and the anchor included."""
    size = 3 * 256 + 7
    hashes = [leaf_hash(str(number)) for number in range(size)]
    raw = [bytes.fromhex(each) for each in hashes]
    for (level, index), content in appended(0, raw, log().tile).items():
        log().widen_tile(level, index, content)
    root, call, reads = root_of(raw), BaseClient._make_api_call, [0]

    def counting(client: Any, operation: str, arguments: Any) -> Any:
        reads[0] += operation in {"GetItem", "Query", "BatchGetItem"}
        return call(client, operation, arguments)

    levels = 2
    with patch.object(BaseClient, "_make_api_call", counting):
        for index in (0, 255, 256, 511, 700, size - 1):
            reads[0] = 0
            proof = inclusion_proof(index, size, log().tile)
            assert reads[0] <= 2 * levels, index
            verify_inclusion(leaf=raw[index], index=index, size=size, proof=proof, root=root)
        for first in (1, 255, 256, 300, 512, 768, size - 1):
            reads[0] = 0
            proof = consistency_proof(first, size, log().tile)
            assert 0 < reads[0] <= 2 * levels, first
            verify_consistency(first=first, second=size, proof=proof, first_root=root_of(raw[:first]), second_root=root)


def test_store_is_only_read(aws: Cloud) -> None:
    task_id = recorded(2)
    before = entries(task_id)
    deliver(aws, entry_items(task_id))
    assert list(store().entries(task_id)) == before
