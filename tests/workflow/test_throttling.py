"""AWS throttles: a task waits and goes on, and ends as it would have ended without that."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import count
from types import SimpleNamespace
from typing import Any

import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError
from moto.stepfunctions.parser.asl.component.common.retry import retrier_decl
from moto.stepfunctions.parser.asl.component.eval_component import EvalComponent

from qaes.adapters.executions import Executions, answer, fail
from qaes.domain.errors import LimitError, ThrottledError
from qubic.transactions.submissions import Submissions
from tests.support.cloud import Cloud, _environment_lock, template

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
        if function == "TransactionWorkerFunction":
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


class EachCall:
    """The n-th attempt of a function is throttled at its n-th call of AWS, until an attempt has fewer calls."""

    def __init__(self, aws: Cloud, throttles: Callable[[str], bool]) -> None:
        self.throttled: Counter[str] = Counter()
        self._invoke, self._throttles = aws.invoke, throttles
        self._running: list[tuple[str, Iterator[int]]] = []
        self._lock = threading.RLock()
        self._thread = 0

    def invoke(self, function: str, event: Any) -> Any:
        with _environment_lock, self._lock:
            self._running.append((function, count(1)))
            self._thread = threading.get_ident()
            try:
                return self._invoke(function, event)
            finally:
                self._running.pop()

    def before(self, operation: str) -> None:
        if not self._running or threading.get_ident() != self._thread:
            return
        function, calls = self._running[-1]
        if self._throttles(function) and next(calls) > self.throttled[function]:
            self.throttled[function] += 1
            raise ClientError({"Error": {"Code": "ThrottlingException", "Message": "Rate exceeded"}}, operation)


def is_ledger(function: str) -> bool:
    return function in {"LedgerFunction", "LedgerTransferFunction"}


def is_state(function: str) -> bool:
    return not function.startswith("Ledger")


@pytest.mark.parametrize("throttles", [is_state, is_ledger])
def test_task_completes_when_each_call_is_throttled_once(
    aws: Cloud,
    start: Callable[..., str],
    decide: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    throttles: Callable[[str], bool],
) -> None:
    monkeypatch.setattr("qaes.adapters.dynamo.PATIENCE_SECONDS", 0)
    each, call = EachCall(aws, throttles), BaseClient._make_api_call

    def make_api_call(client: Any, operation: str, arguments: Any) -> Any:
        each.before(operation)
        return call(client, operation, arguments)

    monkeypatch.setattr(aws, "invoke", each.invoke)
    monkeypatch.setattr(BaseClient, "_make_api_call", make_api_call)
    task_id = start("transfer_funds", amount=10)
    decide(task_id, approved=True)
    aws.wait(task_id, "completed", seconds=60)
    assert aws.execution(task_id)["status"] == "SUCCEEDED"
    assert min(each.throttled.values()) > 3, "each function makes some calls"


def test_task_waits_while_the_ledger_has_too_much_to_write(
    aws: Cloud, start: Callable[..., str], decide: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = iter([0] * REFUSALS)
    check_queue = Submissions._check_queue

    def check(self: Submissions, *arguments: Any) -> None:
        if next(limits, None) == 0:
            raise LimitError("the ledger's queue is full; try again later", max_open=0)
        check_queue(self, *arguments)

    monkeypatch.setattr(Submissions, "_check_queue", check)
    task_id = start("transfer_funds", amount=10)
    decide(task_id, approved=True)
    aws.wait(task_id, "completed", seconds=60)
    assert next(limits, None) is None


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
