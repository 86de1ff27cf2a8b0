"""The faster parts of the tests' cloud have the same results as moto."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import boto3
import pytest
from botocore.exceptions import ClientError
from moto.core.serialize import BaseJSONSerializer

from tests.support import shortcuts
from tests.support.api import items
from tests.support.cloud import cloud

ENTRIES, TASKS = "AuditEntriesTable", "TasksTable"


def item(name: str, **attributes: Any) -> dict[str, Any]:
    return {"pk": {"S": name}, "sk": {"S": "RECORD"}, **attributes}


def put(table: str, name: str, **attributes: Any) -> None:
    boto3.client("dynamodb").put_item(TableName=table, Item=item(name, **attributes))


def streamed() -> list[tuple[str, str]]:
    streams = boto3.client("dynamodbstreams")
    [stream] = streams.list_streams(TableName=ENTRIES)["Streams"]
    [shard] = streams.describe_stream(StreamArn=stream["StreamArn"])["StreamDescription"]["Shards"]
    iterator = streams.get_shard_iterator(
        StreamArn=stream["StreamArn"], ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON"
    )["ShardIterator"]
    records = streams.get_records(ShardIterator=iterator)["Records"]
    return [(each["eventName"], each["dynamodb"]["Keys"]["pk"]["S"]) for each in records]


def transaction(*, passes: bool) -> list[dict[str, Any]]:
    """A change of each kind, to two tables, and then a condition."""
    condition = "attribute_exists(pk)" if passes else "attribute_not_exists(pk)"
    update = "SET deep.deeper = :new, fresh = :new ADD number_ :one"
    values = {":new": {"S": "new"}, ":one": {"N": "1"}}
    changed = {"UpdateExpression": update, "ExpressionAttributeValues": values}
    made = {"UpdateExpression": "SET fresh = :new", "ExpressionAttributeValues": {":new": {"S": "new"}}}
    return [
        {"Put": {"TableName": ENTRIES, "Item": item("new")}},
        {"Put": {"TableName": ENTRIES, "Item": item("replaced", by={"S": "another"})}},
        {"Delete": {"TableName": ENTRIES, "Key": item("deleted")}},
        {"Update": {"TableName": ENTRIES, "Key": item("updated"), **changed}},
        {"Update": {"TableName": TASKS, "Key": item("updated"), **changed}},
        {"Update": {"TableName": TASKS, "Key": item("unknown"), **made}},
        {"ConditionCheck": {"TableName": TASKS, "Key": item("other"), "ConditionExpression": condition}},
    ]


@pytest.mark.parametrize("passes", [True, False])
def test_transaction_happens_as_a_whole_or_not_at_all(passes: bool) -> None:
    with cloud(state_machine=False, policy=False):
        for table in (ENTRIES, TASKS):
            for name in ("replaced", "deleted", "updated", "other"):
                put(table, name, deep={"M": {"deeper": {"S": "old"}}}, number_={"N": "1"})
        before, told = items(ENTRIES, TASKS), streamed()
        client = boto3.client("dynamodb")
        if passes:
            client.transact_write_items(TransactItems=transaction(passes=True))
            assert {each["pk"]["S"] for each in items(ENTRIES)} == {"new", "replaced", "updated", "other"}
            [updated] = [each for each in items(TASKS) if each["pk"]["S"] == "updated"]
            assert updated["deep"] == {"M": {"deeper": {"S": "new"}}}
            assert (updated["number_"], updated["fresh"]) == ({"N": "2"}, {"S": "new"})
            assert sorted(streamed()[len(told) :]) == [
                ("INSERT", "new"), ("MODIFY", "replaced"), ("MODIFY", "updated"), ("REMOVE", "deleted"),
            ]  # fmt: skip
        else:
            with pytest.raises(ClientError, match="ConditionalCheckFailed"):
                client.transact_write_items(TransactItems=transaction(passes=False))
            assert items(ENTRIES, TASKS) == before
            assert streamed() == told
            put(ENTRIES, "later")
            assert streamed() == [*told, ("INSERT", "later")]


def test_cloud_has_nothing_of_the_one_before() -> None:
    def found() -> Any:
        queues = boto3.client("sqs")
        url = queues.list_queues()["QueueUrls"][0]
        waiting = queues.get_queue_attributes(QueueUrl=url, AttributeNames=["ApproximateNumberOfMessages"])
        return (sorted(items(), key=str), streamed(), waiting["Attributes"], aws.clock.moment, aws.invocations)

    with cloud(state_machine=False) as aws:
        fresh = found()
    with cloud(state_machine=False) as aws:
        assert found() == fresh, "it is a copy"
        put(ENTRIES, "mine")
        [version, *_] = items("LedgerTable")
        boto3.client("dynamodb").update_item(
            TableName="LedgerTable",
            Key={name: version[name] for name in ("pk", "sk")},
            UpdateExpression="SET mine = :mine",
            ExpressionAttributeValues={":mine": {"S": "mine"}},
        )
        aws.clock.pass_seconds(100)
        boto3.client("sqs").send_message(QueueUrl=boto3.client("sqs").list_queues()["QueueUrls"][0], MessageBody="mine")
        assert found() != fresh
    with cloud(state_machine=False) as aws:
        assert found() == fresh


def test_value_serializer_matches_moto() -> None:
    item: dict[str, Any] = {
        "pk": {"S": "one"}, "sk": {"S": "é\u2028"}, "n": {"N": "-12.5"}, "b": {"B": b"\x00\xff"},
        "t": {"BOOL": False}, "z": {"NULL": True}, "e": {"S": ""}, "ss": {"SS": ["a", "b"]}, "ns": {"NS": ["1", "2"]},
        "bs": {"BS": [b"\x01"]}, "l": {"L": [{"S": "a"}, {"M": {"k": {"L": []}}}, {"B": b"x"}]}, "m": {"M": {}},
    }  # fmt: skip
    with cloud(state_machine=False, policy=False):
        client = boto3.client("dynamodb")
        client.put_item(TableName="TasksTable", Item=item)
        fast = client.get_item(TableName="TasksTable", Key={"pk": item["pk"], "sk": item["sk"]})["Item"]
        with patch.object(BaseJSONSerializer, "_serialize_type_structure", shortcuts._serialize_structure):
            slow = client.get_item(TableName="TasksTable", Key={"pk": item["pk"], "sk": item["sk"]})["Item"]
    for found in (fast, slow):
        for name in ("ss", "ns", "bs"):
            [(kind, values)] = found[name].items()
            found[name] = {kind: sorted(values)}
    assert fast == slow == item
