"""The services' log of a task: one short line for each state, without secrets."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from qaes.adapters.logs import MAX_LINE_BYTES, logger
from qaes.domain.models import Approval
from tests.support.cloud import Cloud, call
from tests.workflow.conftest import DESTINATION, SOURCE
from tests.workflow.test_paths import in_force, policy_of

ELSEWHERE = {"PolicyAllows?", "RunSteps", "RunFirstSteps", "TaskFailed?", "TaskFailed", "TaskEnded"}
"""States that run no function."""


class Lines(logging.Handler):
    """Keeps lines as they reach CloudWatch."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(logger().registered_handler.format(record))

    def of(self, task_id: str) -> list[dict[str, Any]]:
        return [json.loads(text) for text in self.texts if task_id in text]


@pytest.fixture
def lines(aws: Cloud) -> Iterator[Lines]:
    handler, level = Lines(), logger().log_level
    logger()._logger.addHandler(handler)
    logger().setLevel("INFO")
    yield handler
    logger().setLevel(level)
    logger()._logger.removeHandler(handler)


def check(lines: Lines, aws: Cloud, task_id: str) -> list[str]:
    """Return the outcome of each state of the execution's history, in order."""
    found = [line for line in lines.of(task_id) if "ms" in line]
    assert [line["message"].partition(":")[0] for line in found] == [
        state.replace("RunFirstStep", "RunStep") for state in aws.history(task_id) if state not in ELSEWHERE
    ]
    for line in found:
        assert line["correlation_id"] == task_id
    for text in lines.texts:
        if json.loads(text)["level"] == "INFO":
            assert len(text.encode()) <= MAX_LINE_BYTES, text
        for secret in (SOURCE, DESTINATION, "task_token", "TaskToken"):
            assert secret not in text
    return [line["message"] for line in found]


def test_completed_transfer_logs_each_state(
    aws: Cloud, lines: Lines, transfer: Callable[..., str], decide: Callable[..., Approval]
) -> None:
    task_id = transfer()
    decide(task_id, approved=True)
    aws.wait(task_id, "completed")
    aws.execution(task_id)
    found = check(lines, aws, task_id)
    plain = ["RunStep: succeeded"] * 2
    assert found == ["PlanTask: allowed", *plain, "AwaitApproval: pending", "ExecuteAction: submitted"]


def test_denied_task_logs_its_denial(
    aws: Cloud, lines: Lines, start: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    denied = policy_of(monitoring={"allowed": False, "requires_approval": False, "risk_level": "low"})
    in_force(monkeypatch, denied)
    task_id = start()
    aws.wait(task_id, "denied")
    aws.execution(task_id)
    found = check(lines, aws, task_id)
    assert found == ["PlanTask: denied"]


def test_rejected_task_logs_its_rejection(
    aws: Cloud, lines: Lines, transfer: Callable[..., str], decide: Callable[..., Approval]
) -> None:
    task_id = transfer()
    decide(task_id, approved=False)
    aws.wait(task_id, "rejected")
    aws.execution(task_id)
    assert check(lines, aws, task_id)[-2:] == ["AwaitApproval: pending", "EndTask: rejected"]


def test_state_that_raises_logs_the_kind_of_error(aws: Cloud, lines: Lines) -> None:
    task_id = "task_019ab000-0000-7000-8000-00000000dead"
    with pytest.raises(Exception, match="no such task"):
        call("PlanTaskFunction", {"task_id": task_id})
    assert [line["message"] for line in lines.of(task_id)] == ["PlanTask: NotFoundError"]
