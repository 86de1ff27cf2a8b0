"""The template's tables, functions and state machine on moto, in this process.

Tables are created from the template's own properties, the state machine from the deployed file, and a function's name
leads to the handler that the template names, called with the function's own environment. moto has no JSONata
evaluator, runs no function without Docker, and calls none for a queue or an event. This module fills only these gaps.
The tests control the mock network's clock: its ticks pass between two operations.
"""

from __future__ import annotations

import copy
import importlib
import io
import json
import logging
import os
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from typing import Any
from unittest.mock import patch

import boto3
import jsonata
from botocore import UNSIGNED
from botocore.client import BaseClient
from botocore.config import Config
from moto import mock_aws
from moto.awslambda_simple.models import LambdaSimpleBackend
from moto.core.base_backend import BackendDict
from moto.core.exceptions import JsonRESTError
from moto.core.responses import ActionResult, EmptyResult
from moto.stepfunctions.parser.asl.jsonata import jsonata as moto_jsonata
from moto.stepfunctions.responses import StepFunctionResponse

from qaes.adapters import clients
from tests.support import template
from tests.support.shortcuts import shortcuts
from tests.support.tracing import traced, untraced, untraced_threads

SEED = "qaestestseedthatsignsforthetestsandisworthnothingatallx"
PARAMETERS = {"Stage": "local", "ApprovalTimeoutSeconds": "60", "RetryIntervalSeconds": "1", "RetryMaxAttempts": "2"}
SNAPSHOT_SECONDS = 30
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": template.REGION,
    "AWS_REGION": template.REGION,
}


@dataclass
class Context:
    """The context of a Lambda function."""

    function_name: str = "test"
    memory_limit_in_mb: int = 512
    invoked_function_arn: str = "arn:aws:lambda:us-east-1:123456789012:function:test"
    aws_request_id: str = "00000000-0000-4000-8000-000000000000"
    seconds: int = 30

    def get_remaining_time_in_millis(self) -> int:
        return self.seconds * 1000


class TooManyRequestsError(JsonRESTError):
    """Lambda's response to too many concurrent invocations: the function has not run."""

    code = 429

    def __init__(self) -> None:
        super().__init__("TooManyRequestsException", "Rate Exceeded.")


def evaluate(expression: str) -> Any:
    """Evaluate JSONata for moto, which expects its own exception for an error."""
    try:
        return jsonata.Jsonata(expression).evaluate(None)
    except Exception as error:
        raise moto_jsonata.JSONataException("UNKNOWN", str(error)) from error


def call(function: str, event: Any, parameters: dict[str, str] | None = None) -> Any:
    """Call the template's handler of `function` with its own environment."""
    module, _, attribute = template.functions()[function].rpartition(".")
    with _environment(template.environment(function, PARAMETERS | (parameters or {}))):
        return getattr(importlib.import_module(module), attribute)(
            event, Context(function_name=function, seconds=template.timeout(function))
        )


# Without a separate handler, moto would log stopped executions to the terminal.
logging.getLogger("moto").addHandler(logging.NullHandler())

_environment_lock = threading.RLock()
DYNAMODB_LOCK = threading.Lock()
_committed: set[str] = set()
"""Tokens of the committed transactions."""
_make_api_call = untraced(BaseClient._make_api_call)


def _one_at_a_time(client: Any, operation: str, arguments: Any) -> Any:
    """Make each call to DynamoDB atomic among threads, because moto's transactions are not."""
    if client.meta.service_model.service_name != "dynamodb":
        return _make_api_call(client, operation, arguments)
    with DYNAMODB_LOCK:
        token = arguments.get("ClientRequestToken")
        if token in _committed:
            return {}  # as in DynamoDB, but not in moto
        answer = _make_api_call(client, operation, arguments)
        if token:
            _committed.add(token)
    time.sleep(0)  # another thread's call may now come first, as on AWS
    return answer


def _send_task_failure(self: StepFunctionResponse) -> ActionResult:
    """Fail a task as moto does, but keep the cause, which moto drops."""
    names = ("taskToken", "error", "cause")
    self.stepfunction_backend.send_task_failure(*(self._get_param(name) for name in names))
    return EmptyResult()


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set `variables` for a handler.

    Handlers share one process, and a handler may call another (the ledger's), whose variables then take precedence.
    The variables are set one by one: `patch.dict` would empty the environment for a moment, for other threads too.
    """
    with _environment_lock:
        variables = variables | {"POWERTOOLS_LOG_LEVEL": "WARNING"}
        before = {name: os.environ.get(name) for name in variables}
        os.environ.update(variables)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@dataclass
class Clock:
    """The mock network's current time, which only the tests advance."""

    moment: datetime = field(default_factory=lambda: datetime.now(UTC))

    def __call__(self) -> datetime:
        return self.moment

    def pass_seconds(self, seconds: float) -> None:
        self.moment += timedelta(seconds=seconds)


@dataclass
class Cloud:
    """moto with the template's resources.

    `faults` maps a function to a wrapper of its handler; `throttle` decides whether Lambda rejects an invocation.
    """

    clock: Clock = field(default_factory=Clock)

    machine_arn: str = ""
    invocations: Counter[str] = field(default_factory=Counter)
    faults: dict[str, Callable[[Any], None]] = field(default_factory=dict)
    throttle: Callable[[str, Any], bool] = lambda function, event: False
    parameters: dict[str, str] = field(default_factory=dict)
    closed: bool = False
    events: list[dict[str, Any]] = field(default_factory=list)
    """Undelivered events of the ledger's event bus; `published` also has the delivered ones."""
    published: list[dict[str, Any]] = field(default_factory=list)
    _stopped: threading.Event = field(default_factory=threading.Event)

    def stop_time(self) -> None:
        """Stop the ticks until `start_time`."""
        self._stopped.set()

    def start_time(self) -> None:
        """Let ticks pass in a separate thread."""
        self._stopped = stopped = threading.Event()

        def run() -> None:
            while not stopped.wait(0.02):
                try:
                    self.pass_ticks()
                except Exception:
                    if not self.closed:
                        logging.getLogger("tests").exception("ticks do not pass")

        threading.Thread(target=run, daemon=True).start()

    def invoke(self, function: str, event: Any) -> Any:
        self.invocations[function] += 1
        if fault := self.faults.get(function):
            fault(event)
        with _environment_lock:
            if self.closed:
                raise RuntimeError("the test that started this has ended")
            return call(function, event, self.parameters)

    def close(self) -> None:
        """Stop all executions in moto's threads, so that they do not disturb another test."""
        with _environment_lock:
            self.closed = True
        self._stopped.set()
        if self.machine_arn:
            step_functions = boto3.client("stepfunctions")
            running = step_functions.list_executions(stateMachineArn=self.machine_arn, statusFilter="RUNNING")
            for execution in running["executions"]:
                with suppress(Exception):  # it may end in the meantime
                    step_functions.stop_execution(executionArn=execution["executionArn"])

    def settle(self) -> None:
        """Let the awaited ticks pass, until no submission is in flight on the ledger."""
        for _ in range(200):
            if not self.pass_ticks():
                return
        raise AssertionError("the submissions on the ledger do not end")

    def pass_ticks(self) -> bool:
        """Let the next transaction of each source have its tick, and publish its end. Return False if none waits."""
        with _environment_lock:
            if self.closed:
                return False
            waiting = self._waiting_ticks()
            if waiting:
                from qubic.transactions.tracking import EXPIRY_MARGIN_TICKS

                # One tick further than the first named tick: later transactions have not been sent yet.
                self.clock.pass_seconds(max(0, min(waiting) + 2 - self._tick()))
                self.invoke("TransactionWorkerFunction", {})
                if min(waiting) in self._waiting_ticks():  # it is absent, and final after the margin
                    self.clock.pass_seconds(EXPIRY_MARGIN_TICKS)
                    self.invoke("TransactionWorkerFunction", {})
            self._deliver_events()
            return bool(waiting)

    def _tick(self) -> int:
        from qubic.network import chain

        with _environment(template.environment("LedgerFunction", PARAMETERS | self.parameters)):
            return chain().tick_info().tick

    def _deliver_events(self) -> None:
        """Deliver each event of the ledger's bus to the functions with a matching rule, as EventBridge does.

        If a function fails, the event is delivered again.
        """
        while self.events:
            entry = self.events[0]
            event = {
                "source": entry["Source"], "detail-type": entry["DetailType"], "detail": json.loads(entry["Detail"]),
            }  # fmt: skip
            for function, patterns in template.rule_listeners(entry["EventBusName"]).items():
                if any(template.matches(one, event) for one in patterns):
                    self.invoke(function, event)
            self.events.pop(0)

    def _waiting_ticks(self) -> list[int]:
        found = boto3.client("dynamodb").scan(
            TableName="LedgerTable",
            FilterExpression="sk = :submission AND #state IN (:signed, :broadcast)",
            ExpressionAttributeNames={"#state": "state"},
            ExpressionAttributeValues={
                ":submission": {"S": "SUBMISSION"},
                ":signed": {"S": "signed"},
                ":broadcast": {"S": "broadcast"},
            },
        )
        return [int(item["tick"]["N"]) for item in found["Items"]]

    def drain(self, task_id: str) -> Any:
        """Deliver the task's events to the recorder, as the tasks table's stream does."""
        return self.invoke("RecordEventsFunction", {"task_id": task_id})

    def wait(self, task_id: str, *statuses: str, seconds: float = 20) -> dict[str, Any]:
        """Wait until the task has one of `statuses`."""
        from qaes.adapters.task_repository import TaskStore

        deadline = time.monotonic() + seconds
        while True:
            task = TaskStore("TasksTable").get_task(task_id)
            if task.status in statuses:
                return task.model_dump()
            if time.monotonic() > deadline:
                raise AssertionError(
                    f"{task_id} is {task.status} ({task.reason}), not {statuses}: {self.history(task_id)}"
                )
            time.sleep(0.02)

    def execution(self, task_id: str, seconds: float = 20) -> dict[str, Any]:
        """Return the execution after its end."""
        arn = f"{self.machine_arn.replace(':stateMachine:', ':execution:')}:{task_id}"
        deadline = time.monotonic() + seconds
        while True:
            found = boto3.client("stepfunctions").describe_execution(executionArn=arn)
            if found["status"] != "RUNNING" or time.monotonic() > deadline:
                return dict(found)
            time.sleep(0.02)

    def history(self, task_id: str) -> list[str]:
        """Return the entered states, in order."""
        arn = f"{self.machine_arn.replace(':stateMachine:', ':execution:')}:{task_id}"
        events = boto3.client("stepfunctions").get_execution_history(executionArn=arn, maxResults=1000)["events"]
        return [event["stateEnteredEventDetails"]["name"] for event in events if "stateEnteredEventDetails" in event]


OWN_TABLES = {
    "DECISIONS_TABLE": "DecisionsTable",
    "CALLBACKS_TABLE": "CallbacksTable",
    "POLICY_TABLE": "PolicyTable",
    "LIMITS_TABLE": "LimitsTable",
}
"""Environment of a store that a test creates itself, outside the functions."""


def _every_variable() -> dict[str, str]:
    """Return all names in handlers' environments, without a value if it is not known yet.

    They exist from the beginning: a name that appears or disappears would break another thread that iterates over the
    environment, as botocore does for each client.
    """
    names = {name for function in template.functions() for name in template.environment(function, PARAMETERS)}
    return {name: os.environ.get(name, "") for name in names} | {"POWERTOOLS_LOG_LEVEL": "WARNING"}


def create_tables(*names: str) -> None:
    """Create the template's tables, or the given ones, with their logical ids as names."""
    dynamodb = boto3.client("dynamodb")
    for name, body in template.resources("AWS::DynamoDB::Table").items():
        if names and name not in names:
            continue
        properties = template.resolve(body["Properties"], PARAMETERS)
        keep = {"AttributeDefinitions", "KeySchema", "GlobalSecondaryIndexes", "BillingMode"}
        stream = properties.get("StreamSpecification")
        dynamodb.create_table(
            TableName=name,
            **{key: each for key, each in properties.items() if key in keep},
            **({"StreamSpecification": {"StreamEnabled": True, **stream}} if stream else {}),
        )


@contextmanager
def cloud(
    *, state_machine: bool = True, parameters: dict[str, str] | None = None, policy: bool = True
) -> Iterator[Cloud]:
    """Create a new moto AWS with the template's resources; with `policy`, the first policy is in force.

    With a state machine, ticks pass automatically; otherwise `settle` advances them.
    """
    from gateway import known_policy
    from qubic import wallets
    from qubic.network.mock import MockChain
    from qubic.policy import trust

    it = Cloud(parameters=parameters or {})
    wallets._key_of_secret.cache_clear()
    wallets._identity_of_the_ledger.cache_clear()
    trust._verified.clear()  # it belongs to deleted tables of the same name
    trust._seen.clear()
    known_policy.forget()

    @traced
    def invoke(
        backend: Any, function_name: str, qualifier: Any, body: Any, headers: Any, response_headers: Any
    ) -> bytes:
        name = function_name.rsplit(":", 1)[-1]
        event = json.loads(body or "null")
        if it.throttle(name, event):
            raise TooManyRequestsError
        try:
            return json.dumps(it.invoke(name, event)).encode()
        except Exception as error:  # noqa: BLE001 the runtime turns every error of a handler into this response
            response_headers["x-amz-function-error"] = "Unhandled"
            return json.dumps({"errorType": type(error).__name__, "errorMessage": str(error)}).encode()

    def api_call(client: Any, operation: str, arguments: Any) -> Any:
        answer = _one_at_a_time(client, operation, arguments)
        if operation == "PutEvents" and not answer["FailedEntryCount"]:
            it.events += arguments["Entries"]
            it.published += arguments["Entries"]
        return answer

    config: Any = {
        "stepfunctions": {"execute_state_machine": True},
        "lambda": {"use_docker": False},
        "core": {"reset_boto3_session": False},
    }
    with (
        patch.dict(os.environ, _every_variable() | CREDENTIALS | OWN_TABLES),
        mock_aws(config=config),
        untraced_threads("moto"),
        patch("boto3.DEFAULT_SESSION", _session()),
        patch("boto3.client", _client),
        patch.object(LambdaSimpleBackend, "invoke", invoke),
        shortcuts(),
        patch.object(moto_jsonata, "_eval_jsonata", evaluate),
        patch.object(StepFunctionResponse, "send_task_failure", _send_task_failure),
        patch.object(BaseClient, "_make_api_call", api_call),
        patch.dict(MockChain.__init__.__kwdefaults__, {"clock": it.clock}),
    ):
        clients.reset()
        _fill(it, state_machine=state_machine, policy=policy)
        try:
            if state_machine:
                it.start_time()
            yield it
        finally:
            it.close()
            clients.reset()


_clients: dict[tuple[str, str], Any] = {}


def _client(service_name: str, *, config: Any = None, **options: Any) -> Any:
    """Return the cached client of a service and configuration: its creation takes longer than most calls.

    moto does not read signature and user agent, so they are omitted to save time.
    """
    key = (service_name, repr((sorted(vars(config).items()) if config else None, sorted(options.items()))))
    if key not in _clients:
        merged = (config or Config()).merge(Config(user_agent="tests", signature_version=UNSIGNED))
        _clients[key] = _session().client(service_name, config=merged, **options)  # type: ignore[call-overload]
    return _clients[key]


@cache
def _session() -> boto3.Session:
    """Return one session for all tests: each new session would read botocore's models from the disk again."""
    return boto3.Session(
        CREDENTIALS["AWS_ACCESS_KEY_ID"], CREDENTIALS["AWS_SECRET_ACCESS_KEY"], region_name=template.REGION
    )


@dataclass(frozen=True)
class _Snapshot:
    """The state of a new cloud; `places` has the location of each of the `backends` in moto."""

    places: list[tuple[BackendDict[Any], str, str]]
    backends: list[Any]
    machine_arn: str
    moment: datetime
    made: float = field(default_factory=time.monotonic)

    @classmethod
    @untraced
    def of(cls, it: Cloud) -> _Snapshot:
        found = [
            ((services, account, region), backend)
            for services in BackendDict._instances
            if services.service_name != "sqs"  # SQS has locks, which cannot be copied
            for account, region, backend in services.iter_backends()
        ]
        places, backends = zip(*found, strict=True)
        return cls(list(places), copy.deepcopy(list(backends)), it.machine_arn, it.clock.moment)

    @property
    def is_new(self) -> bool:
        """Return whether its time is recent enough for the start of the mock network's clock."""
        return time.monotonic() - self.made < SNAPSHOT_SECONDS

    @untraced
    def restore(self, it: Cloud) -> None:
        it.machine_arn, it.clock.moment = self.machine_arn, self.moment
        # Copy all at once: one service's backend has references to another's.
        for (services, account, region), backend in zip(self.places, copy.deepcopy(self.backends), strict=True):
            dict.__setitem__(services[account], region, backend)


_snapshots: dict[tuple[Any, ...], _Snapshot] = {}
_prepared: dict[str, tuple[_Snapshot, Any]] = {}


def prepared(it: Cloud, name: str, prepare: Callable[[], Any]) -> Any:
    """Call `prepare` on a new cloud, or restore a copy of its earlier state; return its result.

    The copy has no messages of queues.
    """
    known = _prepared.get(name)
    if known and known[0].is_new:
        known[0].restore(it)
        return known[1]
    result = prepare()
    _prepared[name] = _Snapshot.of(it), result
    return result


def _fill(it: Cloud, *, state_machine: bool, policy: bool) -> None:
    """Create the template's resources, which takes half a second, or restore a copy from an earlier test."""
    key = (state_machine, policy, *sorted(it.parameters.items()))
    known = _snapshots.get(key)
    if known and known.is_new:
        known.restore(it)
        _create_queues()
    else:
        _create_queues()
        create_tables()
        _create_functions()
        for name in template.resources("AWS::Events::EventBus"):
            boto3.client("events").create_event_bus(Name=name)
        for name in template.resources("AWS::SecretsManager::Secret"):
            boto3.client("secretsmanager").create_secret(Name=name, SecretString=SEED)
        if state_machine:
            it.machine_arn = _create_state_machine(it.parameters)
        if policy:
            it.invoke("TransactionWorkerFunction", {})
            it.settle()
        _snapshots[key] = _Snapshot.of(it)
    if policy:
        _ask_for_the_identity(it)
        it.invocations.clear()


def _ask_for_the_identity(it: Cloud) -> None:
    """Return the identity once for each process, as the API does, also for tests without a separate environment."""
    from qubic import wallets

    with _environment(template.environment("QubicApiFunction", PARAMETERS | it.parameters)):
        wallets._identity_of_the_ledger()


def _create_queues() -> None:
    for name in template.resources("AWS::SQS::Queue"):
        boto3.client("sqs").create_queue(QueueName=name)


def _create_functions() -> None:
    role = _role("lambda.amazonaws.com")
    lambda_ = boto3.client("lambda")
    for name, handler in template.functions().items():
        lambda_.create_function(
            FunctionName=name, Runtime="python3.13", Role=role, Handler=handler, Code={"ZipFile": _EMPTY_ZIP}
        )


def _role(service: str) -> str:
    document = {
        "Version": "2012-10-17",
        "Statement": [{"Effect": "Allow", "Principal": {"Service": service}, "Action": "sts:AssumeRole"}],
    }
    role = boto3.client("iam").create_role(
        RoleName=service.split(".", maxsplit=1)[0], AssumeRolePolicyDocument=json.dumps(document)
    )
    return str(role["Role"]["Arn"])


def _create_state_machine(parameters: dict[str, str]) -> str:
    [name] = template.resources("AWS::Serverless::StateMachine")
    created = boto3.client("stepfunctions").create_state_machine(
        name=name,
        definition=json.dumps(template.definition(**(PARAMETERS | parameters))),
        roleArn=_role("states.amazonaws.com"),
    )
    return str(created["stateMachineArn"])


def _empty_zip() -> bytes:
    import zipfile

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("empty", "")
    return buffer.getvalue()


_EMPTY_ZIP = _empty_zip()
