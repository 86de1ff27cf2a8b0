"""AWS clients, one of each: made when a Lambda function is loaded, and elsewhere when they are needed."""

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
    ("_TIMEOUT_SECONDS", "stepfunctions"),  # of a state that waits until its callback token is answered
    ("_QUEUE", "sqs"),
    ("_SECRET", "secretsmanager"),
    ("_SIGNING_KEY", "secretsmanager"),
    ("_BUS", "events"),
    ("_FUNCTION", "lambda"),
)
"""How the name of an environment variable ends that tells of a resource, and the client that reaches it."""

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
"""The codes with which AWS refuses or fails a call for the moment; the same call may succeed later."""


def is_busy(code: str) -> bool:
    """Return whether AWS's error code says that the same call may succeed later."""
    return code in BUSY


@cache
def client(name: Name) -> Any:
    """The boto3 client of that service, with short timeouts and botocore's standard retries.

    DynamoDB's has none: `qaes.adapters.dynamo` repeats its calls.
    """
    import boto3

    attempts = 1 if name == "dynamodb" else 3
    return boto3.client(name, config=_config(retries={"mode": "standard", "total_max_attempts": attempts}, **_QUICK))


@cache
def lambda_client() -> Any:
    """For `invoke`: one attempt, since a failure is the state's to retry."""
    import boto3

    return boto3.client("lambda", config=_config(retries={"max_attempts": 0}, connect_timeout=2, read_timeout=27))


def prepare(*names: Name) -> None:
    """Make the clients of a Lambda function while it is loaded: then it has a whole processor, and later a part of one.

    They are those of the resources that the function's environment variables tell of, and `names`. Outside of Lambda,
    nothing is made.
    """
    if "AWS_LAMBDA_FUNCTION_NAME" not in os.environ:
        return
    told = {name for ending, name in RESOURCES if any(variable.endswith(ending) for variable in os.environ)}
    for each in sorted({*told, *names}):
        lambda_client() if each == "lambda" else client(each)


def invoke(function: str, event: dict[str, Any], what: str) -> Any:
    """Invoke a function of this system, `what` it is, once; returns its answer.

    Raises
    ------
    TransientError
        The function did not answer, or has failed (ThrottledError while AWS throttles).
    """
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        response = lambda_client().invoke(FunctionName=function, Payload=json.dumps(event))
        answer = json.loads(response["Payload"].read())
    except ClientError as error:
        if is_busy(error.response["Error"]["Code"]):
            raise ThrottledError(f"{what} is busy: try again") from error
        raise TransientError(f"{what} did not answer ({type(error).__name__})") from error
    except (BotoCoreError, ValueError) as error:
        raise TransientError(f"{what} did not answer ({type(error).__name__})") from error
    if isinstance(answer, dict) and answer.get("errorType") == ThrottledError.__name__:
        raise ThrottledError(f"{what} is busy: try again")
    if response.get("FunctionError"):
        raise TransientError(f"{what} failed to answer")
    return answer


def reset() -> None:
    """Forget all clients: for tests, whose AWS comes and goes."""
    client.cache_clear()
    lambda_client.cache_clear()
