"""Metrics for operators and alarms: one for each outcome of an approval, and the age of open approvals."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from qaes.adapters import task_changes
from qaes.adapters.task_repository import TaskStore
from qaes.domain.ids import now, timestamp
from tests.handlers.test_task_repository import events, replace_approval, waiting
from tests.support.cloud import Cloud, cloud
from tests.support.template import resolve, template

Metric = tuple[str, float, str]


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    monkeypatch.setattr("agent_runtime.reconciler.GRACE_SECONDS", -1)
    # An execution is there and runs: the reconciler has nothing to start, and nothing to end.
    monkeypatch.setattr("qaes.adapters.executions.Executions.status", lambda *_: "RUNNING")
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def store(aws: Cloud) -> TaskStore:
    return TaskStore("TasksTable")


def metrics(output: str) -> list[Metric]:
    """Return (name, value, status) of each metric in the output (CloudWatch's embedded format)."""
    lines = [json.loads(line) for line in output.splitlines() if line.startswith('{"_aws"')]
    return [
        (metric["Name"], line[metric["Name"]][0], line.get("status", ""))
        for line in lines
        for group in line["_aws"]["CloudWatchMetrics"]
        for metric in group["Metrics"]
    ]


def test_every_approval_outcome_has_own_metric(store: TaskStore, capsys: pytest.CaptureFixture[str]) -> None:
    """Expiry is not rejection, nor is a decision that did not arrive: people and alarms must distinguish them."""

    def reject(task_id: str) -> None:
        store.decide(task_id, approved=False, subject="bob", reason="no")
        store.end_task(task_id, "rejected", actor="execution", reason="no")

    def approve(task_id: str) -> None:
        store.decide(task_id, approved=True, subject="bob", reason="yes")
        store.end_task(task_id, "completed", actor="execution", reason="")

    def undeliverable(task_id: str) -> None:
        store.decide(task_id, approved=True, subject="bob", reason="yes")
        store.end_task(task_id, "expired", actor="execution", reason="no decision was made in time")

    outcomes: dict[str, Any] = {
        "approved": approve,
        "rejected": reject,
        "expired": lambda task_id: store.end_task(task_id, "expired", actor="execution", reason="late"),
        "cancelled": lambda task_id: store.cancel(task_id, subject="alice", reason="no longer needed"),
        "undeliverable": undeliverable,
    }
    statuses, kinds, counted = {}, {}, {}
    for name, happen in outcomes.items():
        task_id, _ = waiting(store)
        capsys.readouterr()
        happen(task_id)
        statuses[name] = store.get_task(task_id).status
        kinds[name] = events(task_id)[-2]  # before task_ended
        counted[name] = [(metric, status) for metric, value, status in metrics(capsys.readouterr().out) if value == 1]
    assert statuses == {
        "approved": "completed",
        "rejected": "rejected",
        "expired": "expired",
        "cancelled": "cancelled",
        "undeliverable": "failed",
    }
    assert kinds == {
        "approved": "approval_decided",
        "rejected": "approval_decided",
        "expired": "approval_expired",
        "cancelled": "approval_cancelled",
        "undeliverable": "approval_undeliverable",
    }
    assert counted == {
        "approved": [("ApprovalDecided", "approved"), ("TaskEnded", "completed")],
        "rejected": [("ApprovalDecided", "rejected"), ("TaskEnded", "rejected")],
        "expired": [("ApprovalExpired", "expired"), ("TaskEnded", "expired")],
        "cancelled": [("ApprovalCancelled", "cancelled"), ("TaskEnded", "cancelled")],
        "undeliverable": [
            ("ApprovalDecided", "approved"),
            ("ApprovalUndeliverable", "undeliverable"),
            ("TaskEnded", "failed"),
        ],
    }


def ask(store: TaskStore, *, ago: float, left: float = 3600) -> str:
    """A task that has waited so long (seconds) for an approval."""
    task_id, _ = waiting(store)
    approval = store.open_approval(task_id)
    assert approval is not None
    moments = {"requested_at": now() - timedelta(seconds=ago), "expires_at": now() + timedelta(seconds=left)}
    older = approval.model_copy(
        update={name: task_changes.timestamp(moment) for name, moment in moments.items()}
        | {"reminded_at": timestamp(now())}
    )
    replace_approval(store, task_id, older)
    return task_id


def told(aws: Cloud, capsys: pytest.CaptureFixture[str]) -> dict[str, float]:
    capsys.readouterr()
    aws.invoke("ReconcilerFunction", {"detail-type": "Scheduled Event"})
    found = metrics(capsys.readouterr().out)
    return {name: value for name, value, _ in found if name in {"OpenApprovals", "OldestPendingApprovalAge"}}


def test_oldest_pending_approval_age_sent_each_minute(
    aws: Cloud, store: TaskStore, capsys: pytest.CaptureFixture[str]
) -> None:
    assert told(aws, capsys) == {"OpenApprovals": 0, "OldestPendingApprovalAge": 0}
    ask(store, ago=60)
    oldest = ask(store, ago=5000)
    ask(store, ago=300)
    found = told(aws, capsys)
    assert found["OpenApprovals"] == 3
    assert 5000 <= found["OldestPendingApprovalAge"] < 5060
    store.decide(oldest, approved=False, subject="bob", reason="no")
    found = told(aws, capsys)
    assert found["OpenApprovals"] == 2
    assert 300 <= found["OldestPendingApprovalAge"] < 360


def test_approval_closed_just_now_is_not_counted(
    aws: Cloud, store: TaskStore, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qaes.adapters.executions.Executions.deliver", lambda *_: True)
    ask(store, ago=90_000, left=-3600)
    assert told(aws, capsys) == {"OpenApprovals": 0, "OldestPendingApprovalAge": 0}


def test_ended_execution_sends_no_approval_metric(
    aws: Cloud, store: TaskStore, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(store, ago=5000)
    capsys.readouterr()
    aws.invoke("ReconcilerFunction", {"detail-type": "Step Functions Execution Status Change"})
    assert [name for name, _, _ in metrics(capsys.readouterr().out) if "Open" in name] == []


def test_alarms_use_published_metrics(aws: Cloud, store: TaskStore, capsys: pytest.CaptureFixture[str]) -> None:
    """Name, namespace and dimensions as in the log: an alarm on anything else is silent for ever."""
    task_id, _ = waiting(store)
    aws.invoke("ReconcilerFunction", {"detail-type": "Scheduled Event"})
    store.decide(task_id, approved=True, subject="bob", reason="yes")
    # In a handler, as it happens on AWS: it has the stack's namespace.
    aws.invoke("EndTaskFunction", {"task_id": task_id, "outcome": "expired"})
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line.startswith('{"_aws"')]
    logged = {
        (group["Namespace"], metric["Name"], frozenset((name, line[name]) for name in group["Dimensions"][0]))
        for line in lines
        for group in line["_aws"]["CloudWatchMetrics"]
        for metric in group["Metrics"]
    }
    wanted = {"OldestPendingApprovalAge", "ApprovalUndeliverable"}
    alarms = {
        (
            resolve(body["Properties"]["Namespace"]),
            body["Properties"]["MetricName"],
            frozenset((each["Name"], each["Value"]) for each in body["Properties"].get("Dimensions", [])),
        )
        for body in template()["Resources"].values()
        if body["Type"] == "AWS::CloudWatch::Alarm" and body["Properties"]["MetricName"] in wanted
    }
    assert len(alarms) == 2
    assert alarms <= logged
