"""Agents start tasks and decide nothing; their acts are recorded with their client's id."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from typing import Any

import pytest

from audit.store import Outbox
from qaes.adapters import dynamo
from qaes.adapters.http import Caller
from qaes.adapters.task_repository import TaskStore
from qaes.domain.canonical import hash_of, salted_hash
from tests.handlers.test_gateway import NO, TRANSFER, YES, start
from tests.handlers.test_task_repository import events, planned, waiting
from tests.support.api import ALICE, BOB, CAROL, MALLORY, OLIVIA, Api, items, set_environment
from tests.support.cloud import Cloud, cloud

AGENT = {"subject": "alice", "roles": "requester", "agent": "crm-agent"}
EVERY_ROLE = "requester approver auditor operator"


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    for function in ("GatewayFunction", "AuditApiFunction", "QubicApiFunction"):
        set_environment(function, monkeypatch)
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def api(aws: Cloud) -> Api:
    return Api(aws, "GatewayFunction")


@pytest.fixture
def store(aws: Cloud) -> TaskStore:
    return TaskStore("TasksTable")


def told(task_id: str) -> list[tuple[str, Any, Any]]:
    return [
        (event.kind, json.loads(event.input), json.loads(event.output))
        for event in Outbox("TasksTable").disclosed(task_id).values()
    ]


def test_agent_never_exceeds_an_agents_roles() -> None:
    everything = frozenset(EVERY_ROLE.split())
    assert Caller("alice", everything, agent="crm-agent").roles == {"requester"}
    assert Caller("alice", everything, agent="").roles == {"requester"}
    assert Caller("alice", everything).roles == everything


def test_task_started_by_an_agent_names_it(api: Api, store: TaskStore) -> None:
    task_id = start(api, **AGENT)
    task = store.get_task(task_id)
    assert (task.requester, task.agent) == ("alice", "crm-agent")
    kind, asked, _ = told(task_id)[0]
    assert (kind, asked) == ("task_started", task.request())
    assert asked["agent"] == "crm-agent"
    for caller in (AGENT, ALICE, BOB, CAROL, OLIVIA):
        assert api("GET", f"/task/{task_id}", **caller).body["agent"] == "crm-agent"
        [listed] = api("GET", "/tasks", **caller).body["tasks"]
        assert listed["agent"] == "crm-agent"


def test_person_s_task_has_the_hashes_that_it_always_had(api: Api, store: TaskStore) -> None:
    task_id = start(api)
    task = store.get_task(task_id)
    members = {"task_id", "task_type", "description", "parameters", "requester"}
    assert set(task.request()) == members
    [(_, event)] = Outbox("TasksTable").events_after(task_id, 0)
    assert event.input_hash == salted_hash(task.salt, {name: getattr(task, name) for name in members})
    assert api("GET", f"/task/{task_id}").body["agent"] is None
    assert store.cancel(task_id, subject="alice", reason="").status == "cancelled"
    _, request, output = told(task_id)[-1]
    assert request == {"request_hash": hash_of({name: getattr(task, name) for name in members})}
    assert set(output) == {"status", "reason", "failed_step", "idempotency_key"}


def test_agents_retry_and_cancellation_name_it(api: Api, store: TaskStore) -> None:
    task_id, _ = planned(store)
    store.end_task(task_id, "failed", actor="test", reason="so")
    assert api("POST", f"/task/{task_id}/retry", **AGENT).status == 202
    assert api("POST", f"/task/{task_id}/cancel", **AGENT).status == 200
    agents = [(kind, output.get("agent")) for kind, _, output in told(task_id) if kind.startswith("task_")]
    assert agents == [
        ("task_started", None), ("task_ended", None), ("task_retried", "crm-agent"), ("task_ended", "crm-agent"),
    ]  # fmt: skip
    assert store.get_task(task_id).agent is None, "a person has asked for the task"


def test_trail_names_the_agent_of_each_entry(aws: Cloud, api: Api, store: TaskStore) -> None:
    task_id = start(api, **AGENT)
    api("POST", f"/task/{task_id}/cancel")
    aws.drain(task_id)
    audit = Api(aws, "AuditApiFunction")
    for caller in (AGENT, BOB, CAROL):
        logs = audit("GET", f"/audit/{task_id}", **caller).body["logs"]
        assert [(log["kind"], log["actor"], log["agent"]) for log in logs] == [
            ("task_started", "alice", "crm-agent"), ("task_ended", "alice", None),
        ]  # fmt: skip
    [first, _] = audit("GET", f"/audit/{task_id}/bundle").body["entries"]
    assert json.loads(first["input"])["agent"] == "crm-agent"


@pytest.mark.parametrize("altered", ["not JSON", "[]", '"crm-agent"', '{"agent": ["x"]}', "[" * 9000])
def test_trail_is_read_though_an_event_was_altered(aws: Cloud, api: Api, store: TaskStore, altered: str) -> None:
    task_id = start(api, **AGENT)
    assert api("POST", f"/task/{task_id}/cancel", **AGENT).status == 200
    aws.drain(task_id)
    dynamo.transact(
        [
            {
                "Update": {
                    "TableName": "DecisionsTable",
                    "Key": {"pk": {"S": task_id}, "sk": {"S": "DECISION#000002"}},
                    "UpdateExpression": "SET texts = :altered",
                    "ExpressionAttributeValues": {":altered": {"B": zlib.compress(f"{altered}\n{altered}".encode())}},
                }
            }
        ]
    )
    answer = Api(aws, "AuditApiFunction")("GET", f"/audit/{task_id}", **CAROL)
    assert answer.status == 200
    assert [log["agent"] for log in answer.body["logs"]] == ["crm-agent", None]


@pytest.mark.parametrize("subject", ["bob", "alice"])
@pytest.mark.parametrize("roles", ["approver", "operator", EVERY_ROLE, "requester"])
def test_agent_with_an_approver_s_token_decides_nothing(api: Api, store: TaskStore, subject: str, roles: str) -> None:
    task_id, _ = waiting(store)
    for body in (YES, NO):
        answer = api("POST", f"/task/{task_id}/approve", body, subject=subject, roles=roles, agent="crm-agent")
        assert (answer.status, answer.body["agent"]) == (403, "crm-agent")
        assert answer.body["detail"] == "only a person can do this: the token was issued to an agent"
    assert "approval_decided" not in events(task_id)


def test_agent_touches_no_policy(aws: Cloud) -> None:
    qubic = Api(aws, "QubicApiFunction")
    before = items("LedgerTable", "PolicyTable")
    agent = {"subject": "olivia", "roles": EVERY_ROLE, "agent": "crm-agent"}
    policy_id = qubic("GET", "/policy", **OLIVIA).body["policy_id"]
    for method, path, body in (
        ("POST", "/policy", {"based_on": policy_id, "rules": {}}),
        ("POST", "/policy/versions/2/approve", None),
        ("POST", "/policy/versions/2/reject", {"reason": "x"}),
        ("POST", "/policy/suspend", {"action": "*", "reason": "x"}),
        ("POST", "/policy/resume", {"action": "*"}),
        ("POST", "/write", {"hash": "a" * 64}),
    ):
        answer = qubic(method, path, body, **agent)
        assert (answer.status, answer.body["agent"]) == (403, "crm-agent"), path
    assert items("LedgerTable", "PolicyTable") == before


def test_agent_sees_and_changes_its_own_tasks_alone(api: Api, store: TaskStore) -> None:
    other = start(api, **MALLORY)
    agent = AGENT | {"roles": EVERY_ROLE}
    assert api("GET", f"/task/{other}", **agent).status == 404
    assert api("POST", f"/task/{other}/cancel", **agent).status == 404
    assert api("POST", f"/task/{other}/retry", **agent).status == 404
    assert api("GET", "/tasks", **agent).body["tasks"] == []
    assert store.get_task(other).status == "pending"


def test_decide_returns_403_to_the_person_an_agent_acts_for(api: Api, store: TaskStore) -> None:
    task_id = start(api, **AGENT)
    for roles in ("approver", EVERY_ROLE):
        assert api("POST", f"/task/{task_id}/approve", YES, subject="alice", roles=roles).status == 403


def test_body_cannot_name_an_agent(api: Api) -> None:
    answer = api("POST", "/task/start", TRANSFER | {"agent": "crm-agent"})
    assert answer.status == 422
