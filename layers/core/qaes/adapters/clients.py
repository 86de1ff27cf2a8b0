"""AWS clients, made when first needed and once for each execution environment."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from botocore.config import Config

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
def client(name: Literal["dynamodb", "stepfunctions", "s3", "secretsmanager", "sqs", "events"]) -> Any:
    """The boto3 client of that service, with short timeouts and botocore's standard retries.

    DynamoDB's has none: `qaes.adapters.dynamo` repeats its calls.
    """
    import boto3

    attempts = 1 if name == "dynamodb" else 3
    return boto3.client(name, config=_config(retries={"mode": "standard", "total_max_attempts": attempts}, **_QUICK))


@cache
def lambda_client() -> Any:
    """For the ledger: one attempt, since a failure is the state's to retry."""
    import boto3

    return boto3.client("lambda", config=_config(retries={"max_attempts": 0}, connect_timeout=2, read_timeout=27))


def reset() -> None:
    """Forget all clients: for tests, whose AWS comes and goes."""
    client.cache_clear()
    lambda_client.cache_clear()
