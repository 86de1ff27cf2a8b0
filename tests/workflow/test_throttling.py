"""AWS throttles: a task waits and goes on, and ends as it would have ended without that."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.exceptions import ClientError
from moto.stepfunctions.parser.asl.component.common.retry import retrier_decl
from moto.stepfunctions.parser.asl.component.eval_component import EvalComponent

from qaes.adapters.executions import Executions, answer, fail
from qaes.domain.errors import ThrottledError
from tests.support.cloud import Cloud, template

TASKS = 60
REFUSALS = 3
"""More than the retries that a failing function gets in these tests."""
WAIT_SECONDS = 300


@pytest.fixture(autouse=True)
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A retry waits in virtual time; its length is noted."""
    noted: list[float] = []

    def sleep(seconds: float) -> None:
        noted.append(seconds)
        time.sleep(0)

    monkeypatch.setattr(retrier_decl, "time", SimpleNamespace(sleep=sleep))
    # For its log, moto describes the whole state in words, which takes longer than all else.
    monkeypatch.setattr(EvalComponent, "_log_failure_event_exception", lambda self, failure: None)
    return noted


class Throttle:
    """Lambda refuses the first invocations of each function for each task, and every seventh of the ledger."""

    def __init__(self) -> None:
        self.calls: Counter[tuple[str, ...]] = Counter()
        self.refused: set[str] = set()
        self._lock = threading.Lock()

    def __call__(self, function: str, event: Any) -> bool:
        if function == "LedgerWriterFunction":
            return False
        ledger = function.startswith("Ledger")
        place = (function, str(event.get("task_id")), str(event.get("step_index")))
        with self._lock:
            self.calls[place] += 1
            refuses = self.calls[place] % 7 == 1 if ledger else self.calls[place] <= REFUSALS
            if refuses:
                self.refused.add(function)
            return refuses


def test_60_tasks_end_as_they_should_when_lambda_throttles(
    aws: Cloud, start: Callable[..., str], decide: Callable[..., Any], waits: list[float]
) -> None:
    aws.throttle = throttle = Throttle()
    transfers = [start("transfer_funds", amount=10)]
    monitoring = [start()]
    denied = [start("transfer_funds", amount=5000)]
    denied += [start("delete_everything") for _ in range(TASKS - len(transfers) - len(monitoring) - len(denied))]
    for task_id in transfers:
        aws.wait(task_id, "waiting_approval", seconds=WAIT_SECONDS)
        decide(task_id, approved=True)
    for task_id in monitoring + transfers:
        aws.wait(task_id, "completed", seconds=WAIT_SECONDS)
    for task_id in denied:
        aws.wait(task_id, "denied", seconds=WAIT_SECONDS)
    machine = template.resources("AWS::Serverless::StateMachine")["TaskExecutionStateMachine"]
    substitutions = machine["Properties"]["DefinitionSubstitutions"]
    states = {name.removesuffix("Arn") for name in substitutions if name.endswith("FunctionArn")}
    assert throttle.refused >= states | {"LedgerFunction", "LedgerTransferFunction"}
    assert len(waits) > TASKS * REFUSALS


@pytest.mark.parametrize("code", ["ThrottlingException", "TooManyRequestsException"])
def test_step_functions_throttling_is_named_for_the_retrier(
    aws: Cloud, start: Callable[..., str], monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    task_id = start()
    task = SimpleNamespace(task_id=task_id, execution_name=task_id)
    busy = ClientError({"Error": {"Code": code, "Message": "Rate exceeded"}}, "Any")

    def refuse(*_: Any) -> None:
        raise busy

    executions: Any = Executions(aws.machine_arn)
    calls: list[Callable[[], object]] = [
        lambda: executions.start(task),
        lambda: executions.status(task),
        lambda: executions.running(lambda: True),
        lambda: executions.stop(task, "stop"),
        lambda: answer("token", {}),
        lambda: fail("token", ThrottledError("")),
    ]
    with monkeypatch.context() as patched:
        patched.setattr("botocore.client.BaseClient._make_api_call", refuse)
        for call in calls:
            with pytest.raises(ThrottledError):
                call()
