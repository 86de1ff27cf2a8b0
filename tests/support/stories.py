"""A check that the offline verifier accepts all records of the system."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import boto3
from boto3.dynamodb.types import TypeDeserializer

from audit.policy_stream import PolicyOutbox
from audit.store import Outbox
from qaes.domain.audit import GENESIS, build_policy_entry, entry_text
from qaes.domain.canonical import sha256_hex
from qaes.domain.merkle import leaf_hash
from tests.support.bundles import load_verifier, not_enforced
from tests.support.tracing import untraced


@untraced
def check_every_story(network: str = "mock") -> int:
    """Verify every task's events from the tables; return the number of tasks.

    Raises AssertionError when it refuses an event, with the task's events up to it.
    """
    verifier = load_verifier()
    documents = {sha256_hex(item["text"]): item["text"] for item in scan("LedgerTable") if "VERSION#" in item["sk"]}
    events: dict[str, list[dict[str, Any]]] = {}
    for task_id in {item["pk"] for item in scan("TasksTable") if item["sk"].startswith("EVENT#")}:
        told_of = sorted(Outbox("TasksTable").disclosed(task_id).items())
        events[task_id] = [event.model_dump(mode="json") for _, event in told_of]
    with_changes = policy_stream(verifier)
    for task_id, told in events.items():
        story = verifier.Story(documents, network, with_changes() if with_changes else None)
        for number, event in enumerate(told):
            sides = {side: verifier.parse(event[side], side, fractions=True) for side in ("input", "output")}
            of_no_step = {} if event["step_type"] else {"step_type": event["kind"]}
            entry = event | sides | of_no_step | {"task_id": task_id, "where": f"entry {number + 1}"}
            try:
                with not_enforced(verifier, "R28"):  # a test moves one function's clock, and back
                    story.tell(entry, event["output"])
            except verifier.Failed as failed:
                kinds = [f"{each['kind']}:{each['status']}" for each in told[: number + 1]]
                raise AssertionError(f"{failed} after {kinds}, with {entry}") from failed
    return len(events)


def policy_stream(verifier: ModuleType) -> Callable[[], Any] | None:
    """Return the changes of the policy in a bundle's format; None without changes."""
    sent, prev = [], GENESIS
    for event in PolicyOutbox("PolicyTable").events_after():
        text = entry_text(build_policy_entry(event, log_id="qaes", prev=prev))
        prev = leaf_hash(text)
        sent.append({"text": text, "input": event.input, "output": event.output, "salt": event.salt})
    return (lambda: verifier.PolicyStream({"policy_entries": sent}, "qaes")) if sent else None


def scan(table: str) -> list[dict[str, Any]]:
    read, pages = TypeDeserializer().deserialize, boto3.client("dynamodb").get_paginator("scan")
    items = [item for page in pages.paginate(TableName=table) for item in page["Items"]]
    return [{name: read(value) for name, value in item.items()} for item in items]
