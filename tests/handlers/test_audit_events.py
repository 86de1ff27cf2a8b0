"""The recorded events of a task: actors, hashes and reasons, without a value that can be guessed."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from audit.store import Outbox
from qaes.adapters.task_items import Idempotency
from qaes.adapters.task_repository import TaskStore
from qaes.domain.canonical import canonical_json, hash_of, salted_hash
from qaes.domain.models import Event
from tests.handlers.test_task_repository import new_task, planned, waiting
from tests.support.cloud import Cloud, cloud

KEY = Idempotency(subject="alice", key="my key", body_hash="0" * 64)
KEY_HASH = hash_of(["alice", "my key"])


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def store(aws: Cloud) -> TaskStore:
    return TaskStore("TasksTable")


def events(task_id: str) -> list[Event]:
    return list(Outbox("TasksTable").disclosed(task_id).values())


def last(task_id: str, kind: str) -> tuple[Event, dict[str, Any], dict[str, Any]]:
    event = [each for each in events(task_id) if each.kind == kind][-1]
    return event, json.loads(event.input), json.loads(event.output)


def check_hashes(store: TaskStore, task_id: str) -> None:
    """Each hash covers the disclosed value with the task's salt, not the value alone."""
    task = store.get_task(task_id)
    assert len(bytes.fromhex(task.salt)) == 16
    for event in events(task_id):
        for text, hash_ in ((event.input, event.input_hash), (event.output, event.output_hash)):
            value = json.loads(text)
            assert canonical_json(value) == text
            assert hash_ == salted_hash(task.salt, value)
            assert hash_ != hash_of(value)


def test_start_event_names_requester_request_and_key(store: TaskStore) -> None:
    task, _ = store.start_task(new_task(), KEY)
    event, request, answer = last(task.task_id, "task_started")
    assert (event.actor, request) == (task.requester, task.request())
    assert answer == {"task_id": task.task_id, "idempotency_key": KEY_HASH}
    assert "my key" not in str(events(task.task_id))
    check_hashes(store, task.task_id)


def test_two_tasks_have_two_salts_and_so_other_hashes(store: TaskStore) -> None:
    first, second = (store.start_task(new_task())[0] for _ in range(2))
    assert store.get_task(first.task_id).salt != store.get_task(second.task_id).salt


def test_planning_event_has_decision_and_plan(store: TaskStore) -> None:
    task_id, plan = planned(store)
    built, request, disclosed = last(task_id, "plan_built")
    assert (disclosed, request) == (plan.model_dump(mode="json"), store.get_task(task_id).request())
    assert built.plan_hash == hash_of(disclosed)
    check_hashes(store, task_id)


@pytest.mark.parametrize("approved", [True, False])
def test_decision_event_names_approver_reason_and_step(store: TaskStore, approved: bool) -> None:
    task_id, plan = waiting(store)
    key = Idempotency(subject="bob", key="k", body_hash="1" * 64)
    store.decide(task_id, approved=approved, subject="bob", reason="too much", idempotency=key)
    approval = store.approvals(task_id)[-1]
    _, asked, _ = last(task_id, "approval_requested")
    event, about, said = last(task_id, "approval_decided")
    hashes = {"plan_hash": plan.hash(), "step_hash": plan.steps[approval.step_index].hash()}
    assert asked == about
    assert about.items() >= (hashes | {"required": 1, "round": 1, "policy_id": approval.policy_id}).items()
    assert said.items() >= (hashes | {"approved": approved, "reason": "too much", "actor": "bob"}).items()
    assert (said["idempotency_key"], said["approvals"]) == (hash_of(["bob", "k"]), int(approved))
    assert (event.actor, event.status) == ("bob", "approved" if approved else "rejected")
    check_hashes(store, task_id)


def test_end_cancel_and_retry_events_name_actor_and_reason(store: TaskStore) -> None:
    task_id, _ = planned(store)
    store.end_task(task_id, "failed", actor="execution", reason="no funds", failed_step="step_1")
    _, _, ended = last(task_id, "task_ended")
    assert ended == {"status": "failed", "reason": "no funds", "failed_step": "step_1", "idempotency_key": None}
    store.retry(task_id, subject="alice", idempotency=KEY)
    event, _, retried = last(task_id, "task_retried")
    assert (event.actor, retried) == ("alice", {"run": 2, "idempotency_key": KEY_HASH})
    store.cancel(task_id, subject="olivia", reason="changed my mind")
    event, _, cancelled = last(task_id, "task_ended")
    assert (event.actor, cancelled["status"], cancelled["reason"]) == ("olivia", "cancelled", "changed my mind")
    check_hashes(store, task_id)
