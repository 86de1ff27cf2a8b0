"""A task of an agent, from its start to the bundle that a stranger accepts."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from audit.store import Outbox
from qaes.adapters.executions import Executions
from qaes.adapters.task_repository import TaskStore
from qaes.domain.models import Approval
from tests.handlers.test_task_repository import new_task
from tests.support.cloud import Cloud
from tests.workflow.conftest import verify_bundle


@pytest.mark.usefixtures("audit_environment")
def test_bundle_of_an_agent_s_task_verifies(aws: Cloud, decide: Callable[..., Approval]) -> None:
    task, _ = TaskStore("TasksTable").start_task(new_task().model_copy(update={"agent": "crm-agent"}))
    Executions(aws.machine_arn).start(task)
    decide(task.task_id, approved=True)
    aws.wait(task.task_id, "completed")
    aws.execution(task.task_id)
    requests = [
        json.loads(event.input)
        for event in Outbox("TasksTable").disclosed(task.task_id).values()
        if event.kind in {"task_started", "plan_built"}
    ]
    assert requests == [task.request()] * 2 and task.request()["agent"] == "crm-agent"
    verify_bundle(aws, task.task_id)
