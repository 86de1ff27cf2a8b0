"""Call a handler once, through Lambda or HTTPS, and return the outcome under the contract.

A call never repeats its request: `dispatcher.attempts` decides about repetition.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dispatcher.contract import (
    MAX_ANSWER_BYTES,
    ActionRequest,
    NoAnswer,
    NotSent,
    Outcome,
    Received,
    Reply,
    Terms,
    classify,
)
from dispatcher.credentials import Credential, CredentialError, Credentials
from dispatcher.egress import Egress
from dispatcher.signatures import Signer
from qaes.domain.errors import InvalidInputError
from qaes.domain.policy.schemas import check_schema, check_value

if TYPE_CHECKING:
    from mypy_boto3_lambda import LambdaClient

CONNECT_SECONDS = 2
MAX_TIMEOUT_SECONDS = 20


@dataclass(frozen=True)
class LambdaHandler:
    """A Lambda function; IAM authenticates the dispatcher."""

    function_name: str


@dataclass(frozen=True)
class HttpsHandler:
    """An HTTPS service; the dispatcher signs each request, and adds the action's credential."""

    url: str
    credential: Credential | None = None


Handler = LambdaHandler | HttpsHandler


class Caller:
    """Calls handlers.

    Parameters
    ----------
    egress, signer
        For HTTPS.
    lambda_client
        Returns a client for Lambda with that time limit in seconds (`lambda_client`).
    """

    def __init__(
        self, egress: Egress, signer: Signer, lambda_client: Callable[[int], LambdaClient] | None = None
    ) -> None:
        self._egress = egress
        self._signer = signer
        self._lambda_client = lambda_client or lambda_client_of
        self._credentials = Credentials(egress)

    def call(self, handler: Handler, request: ActionRequest, terms: Terms, *, timeout_seconds: int) -> Outcome:
        """Send one request, wait at most `timeout_seconds` for its answer, and classify the reply."""
        seconds = min(timeout_seconds, MAX_TIMEOUT_SECONDS)
        if isinstance(handler, LambdaHandler):
            reply = invoke(self._lambda_client(seconds), handler.function_name, request.body())
        else:
            reply = self.send(handler, request, seconds)
        return classify(request.mode, reply, terms)

    def send(self, handler: HttpsHandler, request: ActionRequest, seconds: float) -> Reply:
        """Send one signed request over HTTPS."""
        end = time.monotonic() + seconds
        body = request.body()
        try:
            url = self._egress.url(handler.url)
            credential = self._credentials.headers(handler.credential, seconds=seconds)
        except (InvalidInputError, CredentialError) as error:
            return NotSent(str(error))
        own = {"Content-Type": "application/json", "Idempotency-Key": request.reference}
        headers = [*self._signer.headers("POST", str(url), own, body).items(), *credential]
        reply = self._egress.post(url, headers, body, seconds=max(end - time.monotonic(), 0))
        if isinstance(reply, Received) and reply.status == 401:
            self._credentials.forget(handler.credential)
        return reply


def lambda_client_of(seconds: int) -> LambdaClient:
    """Return a client that waits `seconds` for an answer and sends each request once."""
    return _lambda_client(seconds)


@lru_cache(MAX_TIMEOUT_SECONDS)
def _lambda_client(seconds: int) -> LambdaClient:
    import boto3
    from botocore.config import Config

    # botocore repeats a request after a lost answer by default, which would execute an action twice.
    limits = Config(connect_timeout=CONNECT_SECONDS, read_timeout=seconds, retries={"total_max_attempts": 1})
    return boto3.client("lambda", config=limits)


def invoke(client: LambdaClient, function_name: str, body: bytes) -> Reply:
    """Invoke a Lambda function once."""
    from botocore import exceptions as aws

    not_sent = (
        aws.ConnectTimeoutError,
        aws.CredentialRetrievalError,
        aws.EndpointConnectionError,
        aws.NoCredentialsError,
        aws.NoRegionError,
        aws.ParamValidationError,
        aws.ProxyConnectionError,
        aws.SSLError,
    )
    try:
        response = client.invoke(FunctionName=function_name, Payload=body)
        payload = response["Payload"].read(MAX_ANSWER_BYTES + 1)
    except aws.ClientError as error:
        code, status = error.response["Error"]["Code"], error.response["ResponseMetadata"]["HTTPStatusCode"]
        # Lambda answers with 4xx before it runs a function: throttled, unknown, not allowed.
        return NotSent(f"Lambda refused: {code}") if 400 <= status < 500 else NoAnswer(f"Lambda failed: {code}")
    except not_sent as error:
        return NotSent(f"Lambda was not reached: {type(error).__name__}")
    except (aws.BotoCoreError, OSError) as error:
        return NoAnswer(f"no answer from Lambda: {type(error).__name__}")
    if response.get("FunctionError"):
        return NoAnswer(f"the function raised {_error_type(payload)}")
    return Received(payload)


def _error_type(payload: bytes) -> str:
    try:
        return str(json.loads(payload)["errorType"])
    except (ValueError, KeyError, TypeError):
        return "an error"


def terms_of(result_schema: dict[str, Any] | None, *, callbacks: bool = False) -> Terms:
    """Return the terms of an action with that JSON Schema for its result; None accepts any result.

    Raises
    ------
    InvalidInputError
        The schema is not one that a policy can contain.
    """
    if result_schema is None:
        return Terms(lambda _: None, callbacks)
    check_schema(result_schema, "result", closed=False)

    def flaw_of(result: Any) -> str | None:
        try:
            check_value(result_schema, result, "result")
        except InvalidInputError as error:
            return f"{error.field}: {error.message}"
        return None

    return Terms(flaw_of, callbacks)
