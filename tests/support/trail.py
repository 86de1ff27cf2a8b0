"""A log in moto's tables: tasks with events, recorded, delivered to the sequencer as the stream would, anchored."""

from __future__ import annotations

import base64
import json
from typing import Any

import boto3

from audit.log import Log
from audit.policy_stream import PolicyOutbox
from audit.recorder import Recorder
from audit.sequencer import Sequencer
from audit.store import AuditStore, Outbox, lookup
from qaes.adapters.policy_events import event_item, put_event
from qaes.domain.audit import GENESIS, build_entry, entry_text
from qaes.domain.ids import new_task_id, now, timestamp
from qaes.domain.merkle import leaf_hash
from qaes.domain.models import Event
from qaes.domain.policy_events import next_event
from tests.support.cloud import Cloud

LOG_ID = "qaes"
ORIGIN = "Api.execute-api.us-east-1.amazonaws.com/v1/log"
"""Of the log's checkpoints, where the deployer names none."""


def new_recorder() -> Recorder:
    return Recorder(outbox(), store(), log_id=LOG_ID, policy_outbox=policy_outbox())


def new_sequencer() -> Sequencer:
    return Sequencer(log(), store(), log_id=LOG_ID)


def store() -> AuditStore:
    return AuditStore("AuditEntriesTable")


def policy_outbox() -> PolicyOutbox:
    return PolicyOutbox("PolicyTable")


def outbox() -> Outbox:
    return Outbox("TasksTable")


def log() -> Log:
    return Log("AuditLogTable", "AuditAnchorsTable")


def entry_items(*tasks: str) -> list[dict[str, Any]]:
    """The items of the tasks' entries, or of all, as they lie in the table."""
    pages = boto3.client("dynamodb").get_paginator("scan").paginate(TableName="AuditEntriesTable")
    found = [item for page in pages for item in page["Items"]]
    return [item for item in found if not tasks or item["pk"]["S"] in tasks]


def put_entries(count: int) -> str:
    """A task with so many entries on record, written at once: moto's transactions copy whole tables."""
    task_id, prev, client = new_task_id(), GENESIS, boto3.client("dynamodb")
    for seq in range(1, count + 1):
        event = Event(
            kind="step_executed", actor="worker", status="succeeded", input_hash="1" * 64, output_hash="2" * 64,
            timestamp=timestamp(now()),
        )  # fmt: skip
        entry = build_entry(event, log_id=LOG_ID, task_id=task_id, seq=seq, prev=prev)
        text = entry_text(entry)
        prev = leaf_hash(text)
        item = {"pk": {"S": task_id}, "sk": {"S": f"ENTRY#{seq:06d}"}, "text": {"S": text}} | lookup(prev, entry)
        client.put_item(TableName="AuditEntriesTable", Item=item)
    return task_id


def put_policy_event(kind: Any, actor: str = "olivia", **more: Any) -> dict[str, Any]:
    """Change the policy as its writers do; return the item of the event."""
    about = {"policy_id": f"policy-v2-{'a' * 64}"} if kind.startswith("policy_") else {"name": "transfer_funds"}
    event = next_event(policy_outbox().newest(), kind, actor=actor, **({"at": timestamp(now())} | about | more))
    boto3.client("dynamodb").put_item(**put_event("PolicyTable", event)["Put"])
    return event_item(event)


def forget_policy_events() -> None:
    """Delete the events of the policy, which the ledger writes: for tests that count the entries of tasks alone."""
    for event in policy_outbox().events_after():
        key = {name: event_item(event)[name] for name in ("pk", "sk")}
        boto3.client("dynamodb").delete_item(TableName="PolicyTable", Key=key)


def stream_of(items: list[dict[str, Any]]) -> dict[str, Any]:
    """The batch in which the stream delivers those items."""
    return {
        "Records": [
            {
                "eventName": "INSERT",
                "eventSource": "aws:dynamodb",
                "dynamodb": {
                    "Keys": {"pk": item["pk"], "sk": item["sk"]},
                    "NewImage": item,
                    "SequenceNumber": str(1000 + number),
                },
            }
            for number, item in enumerate(items)
        ]
    }


def json_of(event: Any) -> Any:
    """The event as Lambda hands it over: bytes in base64."""
    return json.loads(json.dumps(event, default=lambda value: base64.b64encode(value).decode()))


def deliver(aws: Cloud, items: list[dict[str, Any]]) -> list[str]:
    """Have the sequencer take those items; return the sequence numbers that it wants again."""
    answer = aws.invoke("SequencerFunction", json_of(stream_of(items)))
    return [each["itemIdentifier"] for each in answer["batchItemFailures"]]


def anchor(aws: Cloud) -> dict[str, Any]:
    answer: dict[str, Any] = aws.invoke("AnchorFunction", {"time": "2026-11-23T12:00:00Z"})
    return answer


def sequence_all(aws: Cloud) -> None:
    """Put all that is on record into the log."""
    assert deliver(aws, entry_items()) == []


def anchor_all(aws: Cloud) -> None:
    """Put all that is on record into the log, and have the ledger confirm an anchor over it."""
    sequence_all(aws)
    anchor(aws)
    aws.settle()
    assert anchor(aws)["state"] == "confirmed"
