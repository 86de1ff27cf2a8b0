"""The HTTP conventions of every service: strict JSON input, `application/problem+json` (RFC 9457) errors, the caller.

Only this module converts domain errors into responses. A response never repeats a received value, and a log never
contains a body or a token.
"""

from __future__ import annotations

import json
import logging
import time
import traceback
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any
from urllib.parse import quote

from aws_lambda_powertools.utilities.typing import LambdaContext
from fastapi import FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from mangum import Mangum
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from qaes.adapters import clients, logs, settings
from qaes.adapters.auth import AGENT_ROLES, ROLES
from qaes.adapters.handlers import function
from qaes.adapters.logs import logger
from qaes.adapters.strict_input import StrictRoute, dotted
from qaes.domain.errors import (
    ConflictError,
    ForbiddenError,
    InvalidInputError,
    LimitError,
    NotFoundError,
    PermanentError,
    QaesError,
    TransientError,
)
from qaes.domain.ids import PLAN_ID_PATTERN, TASK_ID_PATTERN, is_task_id

PROBLEM = "application/problem+json"
BASE_PATH = "/v1"

RETRY_AFTER_SECONDS = 1
_RETRY_AFTER = {429: 30, 503: RETRY_AFTER_SECONDS}

_STATUS: tuple[tuple[type[QaesError], int], ...] = (
    (InvalidInputError, 422),
    (ForbiddenError, 403),
    (NotFoundError, 404),
    (ConflictError, 409),
    (LimitError, 429),
    (PermanentError, 422),
    (TransientError, 503),
)
_HEADERS = {
    "x-content-type-options": "nosniff",
    "strict-transport-security": "max-age=31536000; includeSubDomains",
}
_EXPOSED_HEADERS = "Idempotent-Replay,Retry-After,X-Correlation-Id"
PROBLEM_SCHEMA = {
    "type": "object",
    "required": ["type", "title", "status", "detail", "instance", "correlation_id"],
    "properties": {
        "type": {"type": "string"},
        "title": {"type": "string"},
        "status": {"type": "integer"},
        "detail": {"type": "string"},
        "instance": {"type": "string"},
        "correlation_id": {"type": "string"},
        "errors": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["field", "message"],
                "properties": {"field": {"type": "string"}, "message": {"type": "string"}},
            },
        },
    },
}
PROBLEM_ANSWER: dict[int | str, dict[str, Any]] = {
    "default": {"description": "A problem (RFC 9457)", "content": {PROBLEM: {"schema": PROBLEM_SCHEMA}}}
}
"""The errors in every route's document."""


def create_app(service: str) -> FastAPI:
    """Create the FastAPI application of a service, with this project's errors, headers and JSON.

    It serves no documentation pages; `app.openapi()` is the document.
    """
    app = FastAPI(
        title=f"QAES {service}",
        openapi_url=None,
        redirect_slashes=False,
        # Older clients send JSON without a content type.
        strict_content_type=False,
        responses=PROBLEM_ANSWER,
    )
    app.state.service = service
    app.router.route_class = StrictRoute
    app.add_middleware(_Edge)
    app.exception_handler(QaesError)(_domain_error)
    app.exception_handler(RequestValidationError)(_validation_error)
    app.exception_handler(HTTPException)(_http_error)
    return app


def make_handler(app: FastAPI) -> Callable[[dict[str, Any], LambdaContext], dict[str, Any]]:
    """Create the Lambda handler of an application behind the REST API, with API Gateway's request id in its logs.

    The log has one line for each request: method, route, status, and the task's id if the request concerns a task.
    """
    logging.getLogger("mangum").setLevel(logging.WARNING)  # its own line for a request has the unchecked path
    mangum = Mangum(
        app, lifespan="off", api_gateway_base_path=BASE_PATH, text_mime_types=["text/", "application/json", PROBLEM]
    )

    @function
    def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
        with logs.invocation(event.get("requestContext", {}).get("requestId")):
            return mangum(event, context)  # type: ignore[arg-type]

    return handler


# The caller


@dataclass(frozen=True)
class Caller:
    """The caller, as verified by the authorizer; `four_eyes` is off only in the local stage's stub mode.

    `agent` is the calling client of an agent (`AgentClientIds`), or None if a person calls. An agent has only the
    roles of an agent, regardless of its token.
    """

    subject: str
    roles: frozenset[str]
    four_eyes: bool = True
    agent: str | None = None

    def __post_init__(self) -> None:
        if self.agent is not None:
            object.__setattr__(self, "roles", frozenset(AGENT_ROLES))

    def has(self, *roles: str) -> bool:
        """Return whether the caller has one of `roles`. An operator has all roles."""
        return "operator" in self.roles or not self.roles.isdisjoint(roles)

    def may_change(self, requester: str) -> bool:
        """Return whether this caller may cancel or retry a task of `requester`: its requester and operators may."""
        return "operator" in self.roles or self.subject == requester

    def may_see(self, requester: str) -> bool:
        """Return whether this caller may see `requester`'s task: approvers and auditors see all, others their own."""
        return self.has("approver", "auditor") or self.subject == requester


def caller(request: Request) -> Caller:
    """Return the caller. 401 if no authorizer has verified the request."""
    context = _event(request.scope).get("requestContext", {}).get("authorizer") or {}
    subject = context.get("principalId")
    if not isinstance(subject, str) or not subject:
        raise HTTPException(401, "Send a valid bearer token.", {"WWW-Authenticate": "Bearer"})
    roles = frozenset(str(context.get("roles", "")).split())
    agent = context.get("agent")
    four_eyes = context.get("auth_mode") != "stub"
    return Caller(subject, roles, four_eyes, agent=str(agent) if agent is not None else None)


def require(*roles: str, deciding: bool = False) -> Callable[[Request], Coroutine[Any, Any, Caller]]:
    """Return a dependency: the caller, who must have one of `roles`; otherwise 403.

    A `deciding` operation is for people: an agent gets 403, regardless of its roles. Every operation that makes a
    change is deciding, except those that tests/openapi/test_roles.py lists as open to agents.
    """

    async def one_of(request: Request) -> Caller:
        found = caller(request)
        if deciding and found.agent is not None:
            raise ForbiddenError("only a person can do this: the token was issued to an agent", agent=found.agent)
        if not found.has(*roles):
            raise ForbiddenError(f"this needs the role {' or '.join(roles)}")
        return found

    one_of.roles = roles  # type: ignore[attr-defined] # for the API's document, so that both always agree
    one_of.deciding = deciding  # type: ignore[attr-defined] # likewise
    return one_of


EVERY_ROLE = require("requester", "approver", "auditor")
"""The dependency of a route that every role may call."""

NO_TOKEN: dict[str, Any] = {"security": []}
"""`openapi_extra` of a route without authentication."""

# For the document only: a malformed id returns 404, like an unknown one.
TaskId = Annotated[str, Path(json_schema_extra={"pattern": TASK_ID_PATTERN})]
PlanId = Annotated[str, Path(json_schema_extra={"pattern": PLAN_ID_PATTERN})]
Sha256 = Annotated[str, Path(alias="hash", json_schema_extra={"pattern": "^[0-9a-fA-F]{64}$"})]


def roles_of(route: APIRoute) -> tuple[str, ...] | None:
    """Return the roles that allow a call of `route`, including the operator's; None if it needs no authentication.

    Raises
    ------
    LookupError
        The route has no `require`, and is not marked `NO_TOKEN`.
    """
    if route.openapi_extra == NO_TOKEN:
        return None
    for dependency in route.dependant.dependencies:
        roles: tuple[str, ...] | None = getattr(dependency.call, "roles", None)
        if roles is not None:
            return tuple(role for role in ROLES if role in roles or role == "operator")
    raise LookupError(f"{route.path} has no rule for its callers: add `require` or `NO_TOKEN`")


def is_deciding(route: APIRoute) -> bool:
    """Return whether `route` is for people only (`require(…, deciding=True)`)."""
    return any(getattr(dependency.call, "deciding", False) for dependency in route.dependant.dependencies)


# Errors


def _problem(
    scope: Scope, status: int, detail: str, *, headers: dict[str, str] | None = None, **members: object
) -> JSONResponse:
    event = _event(scope)
    body = members | {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": quote(scope["path"], safe="/:@!$&'()*+,;=~"),
        "correlation_id": event.get("requestContext", {}).get("requestId", ""),
    }
    return _Problem(body, status, headers, media_type=PROBLEM)


class _Problem(JSONResponse):
    def render(self, content: object) -> bytes:
        return json.dumps(content).encode()  # ASCII: every character of a message is harmless


def _event(scope: Scope) -> dict[str, Any]:
    """Return API Gateway's event, which Mangum keeps in the scope."""
    event: dict[str, Any] = scope.get("aws.event", {})
    return event


async def _domain_error(request: Request, error: QaesError) -> Response:
    status = next((number for type_, number in _STATUS if isinstance(error, type_)), 500)
    if status == 500:
        return _unexpected(request.scope, error)
    members: dict[str, object] = dict(error.details)
    if error.field is not None:
        members["errors"] = [{"field": error.field, "message": error.message}]
    if isinstance(error, PermanentError):
        members["code"] = error.code
    headers = {"Retry-After": str(_RETRY_AFTER[status])} if status in _RETRY_AFTER else None
    return _problem(request.scope, status, error.message, headers=headers, **members)


async def _validation_error(request: Request, error: RequestValidationError) -> Response:
    errors = []
    for each in error.errors():
        where, *path = each["loc"]
        errors.append({"field": dotted(tuple(path)) if any(path) else str(where), "message": each["msg"]})
    detail = "; ".join(f"{each['field']}: {each['message']}" for each in errors[:5])
    return _problem(request.scope, 422, detail, errors=errors[:50])


async def _http_error(request: Request, error: HTTPException) -> Response:
    detail = {404: "This route does not exist.", 405: "The route does not have this method."}
    text = detail.get(error.status_code, error.detail)
    return _problem(request.scope, error.status_code, text, headers=dict(error.headers or {}))


def _unexpected(scope: Scope, error: Exception) -> Response:
    """Return 500, or 503 if AWS did not respond. The log has the location; the error's text may contain input."""
    from botocore.exceptions import BotoCoreError, ClientError

    logger().error(
        "unexpected error",
        extra={"error": type(error).__name__, "where": traceback.format_tb(error.__traceback__)[-5:]},
    )
    code = error.response.get("Error", {}).get("Code", "") if isinstance(error, ClientError) else ""
    if isinstance(error, BotoCoreError) or clients.is_busy(code):
        retry = {"Retry-After": str(RETRY_AFTER_SECONDS)}
        return _problem(scope, 503, "A part of the service does not respond; try again.", headers=retry)
    return _problem(scope, 500, "The service failed. Search its log for the correlation id.")


class _Edge:
    """The outermost layer: headers for every response, and a response to every error."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        correlation_id = _event(scope).get("requestContext", {}).get("requestId")
        started, status = time.perf_counter(), 500
        origin = settings.optional("CORS_ALLOW_ORIGIN")

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.update(_HEADERS)
                headers.setdefault("cache-control", "no-store")  # only immutable responses override this
                if headers.get("content-type") == "application/octet-stream":
                    # Lambda returns bytes as base64. A client that does not accept octets gets base64: another length.
                    del headers["content-length"]
                if correlation_id:
                    headers["x-correlation-id"] = correlation_id
                if origin:  # API Gateway handles the preflight request; this header is for the others
                    headers["access-control-allow-origin"] = origin
                    headers["access-control-expose-headers"] = _EXPOSED_HEADERS
                    headers.add_vary_header("Origin")
            await send(message)

        try:
            await self.app(scope, receive, send_with_headers)
        except Exception as error:  # noqa: BLE001 - the outermost layer: no caller can catch it
            await _unexpected(scope, error)(scope, receive, send_with_headers)
        finally:
            _report(scope, status, int((time.perf_counter() - started) * 1000))


def _report(scope: Scope, status: int, milliseconds: int) -> None:
    """Log the outcome of a request: its route as in the document, and no input except ids."""
    route = getattr(scope.get("route"), "path", "no route")
    task_id = str(scope.get("path_params", {}).get("task_id", ""))
    logs.note(outcome=status, task_id=task_id if is_task_id(task_id) else None)
    logs.report(f"{scope['method'][:10]} {route}", milliseconds)
