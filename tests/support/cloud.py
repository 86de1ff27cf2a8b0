"""The template's tables, functions and state machine on moto, in this process.

Tables are created from the template's own properties, the state machine from the deployed file, and a function's name
leads to the handler that the template names, called with the function's own environment. moto carries no JSONata
evaluator and runs no function without Docker; these two seams are filled here, and nothing else.
"""

from __future__ import annotations

import hashlib
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
from typing import Any
from unittest.mock import patch

import boto3
import jsonata
from botocore.client import BaseClient
from moto import mock_aws
from moto.awslambda_simple.models import LambdaSimpleBackend
from moto.stepfunctions.parser.asl.jsonata import jsonata as moto_jsonata

from qaes.adapters import clients
from tests.support import template

PARAMETERS = {"Stage": "local", "ApprovalTimeoutSeconds": "60", "RetryIntervalSeconds": "1", "RetryMaxAttempts": "2"}
CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": template.REGION,
    "AWS_REGION": template.REGION,
}


@dataclass
class Context:
    """What a Lambda function gets as its context."""

    function_name: str = "test"
    memory_limit_in_mb: int = 512
    invoked_function_arn: str = "arn:aws:lambda:us-east-1:123456789012:function:test"
    aws_request_id: str = "00000000-0000-4000-8000-000000000000"

    def get_remaining_time_in_millis(self) -> int:
        return 30_000


def evaluate(expression: str) -> Any:
    """JSONata for moto, which expects its own exception for an error."""
    try:
        return jsonata.Jsonata(expression).evaluate(None)
    except Exception as error:
        raise moto_jsonata.JSONataException("UNKNOWN", str(error)) from error


def call(function: str, event: Any, parameters: dict[str, str] | None = None) -> Any:
    """Call the template's handler of `function` with its own environment."""
    module, _, attribute = template.functions()[function].rpartition(".")
    with _environment(template.environment(function, PARAMETERS | (parameters or {}))):
        return getattr(importlib.import_module(module), attribute)(event, Context(function_name=function))


# Without a handler of its own, what moto logs of an execution that is stopped with its test would go to the terminal.
logging.getLogger("moto").addHandler(logging.NullHandler())

_environment_lock = threading.RLock()
_dynamodb_lock = threading.Lock()
_make_api_call = BaseClient._make_api_call


def _one_at_a_time(client: Any, operation: str, arguments: Any) -> Any:
    """moto's transactions are not atomic among threads, DynamoDB's are: each call to it is made so."""
    if client.meta.service_model.service_name != "dynamodb":
        return _make_api_call(client, operation, arguments)
    with _dynamodb_lock:
        return _make_api_call(client, operation, arguments)


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Set `variables` for a handler.

    Handlers share one process, and one may call another (the ledger's): the inner one's variables go on top. Variable
    by variable: `patch.dict` empties the environment for a moment, in which the test's own thread would find nothing.
    """
    with _environment_lock:
        variables = variables | {"POWERTOOLS_LOG_LEVEL": "ERROR"}
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
class Cloud:
    """moto with the template's resources; `faults` maps a function to what stands in front of its handler."""

    machine_arn: str = ""
    invocations: Counter[str] = field(default_factory=Counter)
    faults: dict[str, Callable[[Any], None]] = field(default_factory=dict)
    parameters: dict[str, str] = field(default_factory=dict)
    closed: bool = False

    def invoke(self, function: str, event: Any) -> Any:
        self.invocations[function] += 1
        if fault := self.faults.get(function):
            fault(event)
        with _environment_lock:
            if self.closed:
                raise RuntimeError("the test that started this has ended")
            return call(function, event, self.parameters)

    def close(self) -> None:
        """Let no execution go on in moto's threads, in the midst of another test."""
        with _environment_lock:
            self.closed = True
        if self.machine_arn:
            step_functions = boto3.client("stepfunctions")
            running = step_functions.list_executions(stateMachineArn=self.machine_arn, statusFilter="RUNNING")
            for execution in running["executions"]:
                with suppress(Exception):  # it may end on its own meanwhile
                    step_functions.stop_execution(executionArn=execution["executionArn"])

    def drain(self, task_id: str) -> Any:
        """What the tasks table's stream would do."""
        return self.invoke("RecordAuditFunction", {"task_id": task_id})

    def wait(self, task_id: str, *statuses: str, seconds: float = 20) -> dict[str, Any]:
        """Wait until the task's own record has one of `statuses`."""
        from qaes.adapters.task_store import TaskStore

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
        """The execution once it has ended."""
        arn = f"{self.machine_arn.replace(':stateMachine:', ':execution:')}:{task_id}"
        deadline = time.monotonic() + seconds
        while True:
            found = boto3.client("stepfunctions").describe_execution(executionArn=arn)
            if found["status"] != "RUNNING" or time.monotonic() > deadline:
                return dict(found)
            time.sleep(0.02)

    def history(self, task_id: str) -> list[str]:
        """The states that were entered, in order."""
        arn = f"{self.machine_arn.replace(':stateMachine:', ':execution:')}:{task_id}"
        events = boto3.client("stepfunctions").get_execution_history(executionArn=arn, maxResults=1000)["events"]
        return [event["stateEnteredEventDetails"]["name"] for event in events if "stateEnteredEventDetails" in event]


def _every_variable() -> dict[str, str]:
    """All names that handlers' environments have, without a value if they have none yet.

    They are there from the beginning: a name that comes or goes breaks whoever walks through the environment at that
    moment in another thread, as botocore does for each client.
    """
    names = {name for function in template.functions() for name in template.environment(function, PARAMETERS)}
    return {name: os.environ.get(name, "") for name in names} | {"POWERTOOLS_LOG_LEVEL": "ERROR"}


def _create_tables() -> None:
    dynamodb = boto3.client("dynamodb")
    for name, body in template.resources("AWS::DynamoDB::Table").items():
        properties = template.resolve(body["Properties"], PARAMETERS)
        keep = {"AttributeDefinitions", "KeySchema", "GlobalSecondaryIndexes", "BillingMode"}
        stream = properties.get("StreamSpecification")
        dynamodb.create_table(
            TableName=name,
            **{key: each for key, each in properties.items() if key in keep},
            **({"StreamSpecification": {"StreamEnabled": True, **stream}} if stream else {}),
        )


def _create_secrets() -> None:
    for name, body in template.resources("AWS::SecretsManager::Secret").items():
        how = body["Properties"]["GenerateSecretString"]
        letters = "".join(chr(ord("a") + byte % 26) for byte in hashlib.shake_256(name.encode()).digest(how["PasswordLength"]))
        boto3.client("secretsmanager").create_secret(Name=name, SecretString=letters)


@contextmanager
def cloud(*, state_machine: bool = True, parameters: dict[str, str] | None = None) -> Iterator[Cloud]:
    """A fresh AWS of moto's with the template's resources in it."""
    it = Cloud(parameters=parameters or {})

    def invoke(
        backend: Any, function_name: str, qualifier: Any, body: Any, headers: Any, response_headers: Any
    ) -> bytes:
        name = function_name.rsplit(":", 1)[-1]
        try:
            return json.dumps(it.invoke(name, json.loads(body or "null"))).encode()
        except Exception as error:  # noqa: BLE001 the runtime turns whatever a handler raises into this answer
            response_headers["x-amz-function-error"] = "Unhandled"
            return json.dumps({"errorType": type(error).__name__, "errorMessage": str(error)}).encode()

    config: Any = {"stepfunctions": {"execute_state_machine": True}, "lambda": {"use_docker": False}}
    with (
        patch.dict(os.environ, _every_variable() | CREDENTIALS),
        mock_aws(config=config),
        patch.object(LambdaSimpleBackend, "invoke", invoke),
        patch.object(moto_jsonata, "_eval_jsonata", evaluate),
        patch.object(BaseClient, "_make_api_call", _one_at_a_time),
    ):
        clients.reset()
        _create_tables()
        _create_secrets()
        _create_functions()
        if state_machine:
            it.machine_arn = _create_state_machine(it.parameters)
        try:
            yield it
        finally:
            it.close()
            clients.reset()


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
