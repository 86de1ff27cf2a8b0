"""A role of the engine forges a person's decision: no money moves, and no entry records the decision."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import boto3
import pytest

from audit.store import AuditStore
from qaes.adapters.executions import answer
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.task_repository import TaskStore
from qaes.domain.models import Task
from tests.handlers.test_audit_api import request
from tests.support.api import set_environment
from tests.support.bundles import load_verifier
from tests.support.cloud import Cloud, cloud
from tests.support.forgery import approval_of_bob, event_of_bob, reference_to_nothing, task_that_goes_on
from tests.support.tokens import approval_token
from tests.support.trail import LOG_ID, anchor_all
from tests.workflow.conftest import DESTINATION, SOURCE, begin


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """As in the other tests of the workflow, but that the trail is forged here."""
    for function in ("QubicApiFunction", "AuditApiFunction"):
        set_environment(function, monkeypatch)
    with cloud() as it:
        yield it


@pytest.fixture
def task_id(aws: Cloud) -> str:
    waiting = begin(aws, "transfer_funds")
    aws.wait(waiting, "waiting_approval")
    aws.drain(waiting)
    return waiting


def put(item: dict[str, Any]) -> None:
    boto3.client("dynamodb").put_item(TableName="TasksTable", Item=item)


def forge_approval(task: Task, **changes: Any) -> None:
    [approval] = TaskStore("TasksTable").approvals(task.task_id)
    put(approval_of_bob(task, approval, **changes))


def balance(wallet: str) -> int:
    return LedgerClient("LedgerFunction").balance(wallet)


def recorded(task_id: str) -> list[str]:
    return [json.loads(entry.text)["kind"] for entry in AuditStore("AuditEntriesTable").entries(task_id)]


def wake(aws: Cloud, task_id: str) -> None:
    """Resume the execution and act for it, with the rights of the roles that can take part in the forgery."""
    token = approval_token(task_id)
    assert token is not None
    answer(token, {"decision": "approved"})
    aws.execution(task_id, seconds=5)
    aws.invoke("ReconcilerFunction", {"detail-type": "Scheduled Event"})


def verify(aws: Cloud, task_id: str) -> None:
    """The trail up to the forgery verifies, as that of a task that has not ended."""
    aws.stop_time()
    anchor_all(aws)
    identity = json.loads(request("/audit/log/checkpoint")["body"])["anchor"]["source"]
    body = request(f"/audit/{task_id}/bundle")["body"].encode()
    load_verifier().verify(body, log_id=LOG_ID, anchor_identity=identity, task_id=task_id, open_=True)


FORGERIES: dict[str, Callable[[Task], Any]] = {
    "an event": lambda task: put(event_of_bob(task)),
    "an event that refers to a decision": lambda task: put(reference_to_nothing(task)),
    "a retry": lambda task: put(event_of_bob(task, "task_retried")),
    "an approval": forge_approval,
    "an approval of one person": lambda task: forge_approval(task, required=1),
    "a task that goes on": lambda task: put(task_that_goes_on(task)),
    "another person's task": lambda task: put(task_that_goes_on(task, requester="mallory", run=2)),
}


@pytest.mark.parametrize("forgery", [*FORGERIES, "all of them"])
def test_forged_approval_moves_no_money(aws: Cloud, task_id: str, forgery: str) -> None:
    before = recorded(task_id)
    task = TaskStore("TasksTable").get_task(task_id)
    if forgery == "all of them":
        forge_approval(task)
        put(event_of_bob(task))
        put(task_that_goes_on(task, events=task.events + 1, version=task.version + 1, requester="mallory"))
    else:
        FORGERIES[forgery](task)
    wake(aws, task_id)
    assert (balance(SOURCE), balance(DESTINATION)) == (1000, 0)
    if "event" in forgery or "retry" in forgery or forgery == "all of them":
        with pytest.raises(Exception, match="the gateway recorded none"):
            aws.drain(task_id)
        assert recorded(task_id) == before, "nothing is recorded on top"
    else:
        aws.drain(task_id)
        assert "approval_decided" not in recorded(task_id)
    verify(aws, task_id)


def test_genuine_approval_overrides_forged_copies(aws: Cloud, task_id: str) -> None:
    store = TaskStore("TasksTable")
    genuine = store.decide(task_id, approved=False, subject="bob", reason="no")
    task = store.get_task(task_id)
    forge_approval(task)
    put(task_that_goes_on(task, retriers=("mallory",), requester="mallory", parameters={"amount": 999}))
    assert store.approvals(task_id) == [genuine]
    read = store.get_task(task_id)
    assert (read.requester, read.retriers, read.parameters) == (task.requester, (), task.parameters)
    assert (read.salt, read.run) == (task.salt, 1)
    forge_approval(task)
    answer(str(approval_token(task_id)), {"decision": "approved"})
    aws.wait(task_id, "rejected")
    assert balance(DESTINATION) == 0


def test_cancelled_task_stays_cancelled_with_forged_item(aws: Cloud, task_id: str) -> None:
    store = TaskStore("TasksTable")
    store.decide(task_id, approved=True, subject="bob", reason="yes")
    task = store.get_task(task_id)
    store.cancel(task_id, subject="alice", reason="changed my mind")
    put(task_that_goes_on(task, version=task.version + 5))
    assert store.get_task(task_id).status == "cancelled"
    answer(str(approval_token(task_id)), {"decision": "approved"})
    aws.execution(task_id, seconds=5)
    assert balance(DESTINATION) == 0


def test_forged_event_is_refused_loudly(aws: Cloud, task_id: str, capsys: pytest.CaptureFixture[str]) -> None:
    task = TaskStore("TasksTable").get_task(task_id)
    put(event_of_bob(task))
    keys = {"pk": {"S": task_id}, "sk": {"S": f"EVENT#{task.events + 1:06d}"}}
    record = {"eventName": "INSERT", "dynamodb": {"Keys": keys, "SequenceNumber": "1"}}
    assert aws.invoke("RecordEventsFunction", {"Records": [record]}) == {"batchItemFailures": [{"itemIdentifier": "1"}]}
    assert '"ForgedEvent":[1' in capsys.readouterr().out.replace(" ", "")
