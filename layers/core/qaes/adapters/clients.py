"""AWS clients, one for each service: created when a Lambda function is loaded, otherwise at the first use."""

from __future__ import annotations

import json
import os
from functools import cache
from typing import TYPE_CHECKING, Any, Literal

from qaes.domain.errors import ThrottledError, TransientError

if TYPE_CHECKING:
    from botocore.config import Config

Name = Literal["dynamodb", "events", "s3", "secretsmanager", "sqs", "stepfunctions"]

RESOURCES: tuple[tuple[str, Name | Literal["lambda"]], ...] = (
    ("_TABLE", "dynamodb"),
    ("STATE_MACHINE_ARN", "stepfunctions"),
    ("_TIMEOUT_SECONDS", "stepfunctions"),  # timeout of a state that waits for its callback token
    ("_QUEUE", "sqs"),
    ("_SECRET", "secretsmanager"),
    ("_SIGNING_KEY", "secretsmanager"),
    ("_BUS", "events"),
    ("_FUNCTION", "lambda"),
)
"""Suffix of an environment variable's name that refers to a resource, and the client for that resource."""

_QUICK = {"connect_timeout": 2, "read_timeout": 10}


def _config(**options: Any) -> Config:
    from botocore.config import Config

    return Config(**options)


BUSY = frozenset(
    {
        "InternalFailure",
        "InternalServerError",
        "InternalServerException",
        "ProvisionedThroughputExceededException",
        "RequestLimitExceeded",
        "ServiceException",
        "ServiceUnavailable",
        "ServiceUnavailableException",
        "Throttling",
        "ThrottledException",
        "ThrottlingException",
        "TooManyRequestsException",
    }
)
"""Error codes of temporary failures: the same call may succeed later."""


def is_busy(code: str) -> bool:
    """Return whether AWS's error code means that the same call may succeed later."""
    return code in BUSY


@cache
def client(name: Name) -> Any:
    """Return the boto3 client of a service, with short timeouts and botocore's standard retries.

    DynamoDB's client does not retry: `qaes.adapters.dynamo` does.
    """
    import boto3

    attempts = 1 if name == "dynamodb" else 3
    return boto3.client(name, config=_config(retries={"mode": "standard", "total_max_attempts": attempts}, **_QUICK))


@cache
def lambda_client() -> Any:
    """Return the Lambda client for `invoke`, with one attempt: the state machine retries."""
    import boto3

    return boto3.client("lambda", config=_config(retries={"max_attempts": 0}, connect_timeout=2, read_timeout=27))


def prepare(*names: Name) -> None:
    """Create the clients of a Lambda function while it is loaded, when it has a whole processor.

    The function's environment variables and `names` determine the clients. Outside Lambda, nothing is created.
    """
    if "AWS_LAMBDA_FUNCTION_NAME" not in os.environ:
        return
    told = {name for ending, name in RESOURCES if any(variable.endswith(ending) for variable in os.environ)}
    for service in sorted({*told, *names}):
        lambda_client() if service == "lambda" else client(service)


def invoke(function: str, event: dict[str, Any], what: str) -> Any:
    """Invoke a function of this system once and return its result; `what` describes it in errors.

    Raises
    ------
    TransientError
        The function did not respond, or failed (ThrottledError if AWS throttles the call).
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        response = lambda_client().invoke(FunctionName=function, Payload=json.dumps(event))
        answer = json.loads(response["Payload"].read())
    except ClientError as error:
        if is_busy(error.response["Error"]["Code"]):
            raise ThrottledError(f"{what} is busy; try again") from error
        raise TransientError(f"{what} did not respond ({type(error).__name__})") from error
    except (BotoCoreError, ValueError) as error:
        raise TransientError(f"{what} did not respond ({type(error).__name__})") from error
    if isinstance(answer, dict) and answer.get("errorType") == ThrottledError.__name__:
        raise ThrottledError(f"{what} is busy; try again")
    if response.get("FunctionError"):
        raise TransientError(f"{what} failed")
    return answer


def reset() -> None:
    """Discard all clients: for tests, which start and stop their AWS."""
    client.cache_clear()
    lambda_client.cache_clear()
