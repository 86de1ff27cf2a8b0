"""Calls of a service's function in API Gateway's format, and the checks that apply to each response."""

from __future__ import annotations

import asyncio
import base64
import copy
import importlib
import json
import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import pytest
from moto.backends import get_backend

from tests.support import events, template
from tests.support.cloud import DYNAMODB_LOCK, PARAMETERS, Cloud, Context
from tests.support.tracing import untraced

ALICE = {"subject": "alice", "roles": "requester"}
BOB = {"subject": "bob", "roles": "approver"}
CAROL = {"subject": "carol", "roles": "auditor"}
OLIVIA = {"subject": "olivia", "roles": "operator"}
MALLORY = {"subject": "mallory", "roles": "requester"}
NOBODY = {"subject": None}

PROBLEM = "application/problem+json"
_INSIDE = re.compile(r'arn:aws|Traceback|File "|site-packages|\.py\b|botocore|Exception|task_?token', re.IGNORECASE)
"""Internal details that no response may contain: names of resources, stack traces, task tokens."""


class Answer(NamedTuple):
    """A response; `body` is the parsed JSON or the raw content; header names are in lower case."""

    status: int
    body: Any
    headers: dict[str, str]


def set_environment(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a function's environment for the whole test, before the cloud is created: `Api.at_once` needs it."""
    for name, value in template.environment(function, PARAMETERS).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("POWERTOOLS_LOG_LEVEL", "WARNING")


@dataclass(frozen=True)
class Api:
    """The routes of one function of the template."""

    aws: Cloud
    function: str

    def __call__(self, method: str, path: str, body: Any = None, **caller: Any) -> Answer:
        """Call a route as alice, by default. Text and bytes are sent unchanged, any other body as JSON."""
        return self.checked(self.aws.invoke(self.function, self.event(method, path, body, **caller)))

    def at_once(self, requests: list[dict[str, Any]]) -> list[Answer]:
        """Send `requests` (the arguments of `event`) concurrently.

        The cloud runs one function at a time, so the handler is called directly in as many threads.
        """
        module, _, attribute = template.functions()[self.function].rpartition(".")
        handler = getattr(importlib.import_module(module), attribute)
        start = threading.Barrier(len(requests))

        def send(request: dict[str, Any]) -> dict[str, Any]:
            # Lambda's only thread has an event loop; a test's thread needs a new one.
            loop = asyncio.new_event_loop()
            asyncio.set_event_loop(loop)
            try:
                start.wait()
                answer: dict[str, Any] = handler(self.event(**request), Context(function_name=self.function))
            finally:
                asyncio.set_event_loop(None)
                loop.close()
            return answer

        with ThreadPoolExecutor(len(requests)) as pool:
            return [self.checked(answer) for answer in pool.map(send, requests)]

    @untraced
    def event(
        self,
        method: str,
        path: str,
        body: Any = None,
        *,
        subject: str | None = "alice",
        roles: str = "requester",
        auth_mode: str = "jwt",
        agent: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        """Return API Gateway's event; without a `subject` it has no authorizer's result."""
        resource, parameters = _match(self.function, method, path)
        event: dict[str, Any] = events.load("gateway/api_health")
        event |= {"httpMethod": method, "path": path, "resource": resource, "pathParameters": parameters}
        event["requestContext"] |= {"httpMethod": method, "path": f"/v1{path}", "resourcePath": resource}
        event["requestContext"]["authorizer"] = (
            {"principalId": subject, "roles": roles, "auth_mode": auth_mode} if subject is not None else None
        )
        if agent is not None:
            event["requestContext"]["authorizer"]["agent"] = agent
        event["headers"] = event["headers"] | {"Content-Type": "application/json"} | (headers or {})
        event["multiValueHeaders"] = {name: [value] for name, value in event["headers"].items()}
        if isinstance(body, bytes):
            return event | {"body": base64.b64encode(body).decode(), "isBase64Encoded": True}
        return event | {"body": body if body is None or isinstance(body, str) else json.dumps(body)}

    @untraced
    def checked(self, answer: dict[str, Any]) -> Answer:
        """Check the properties of every response."""
        text = json.dumps(answer)
        assert not _INSIDE.search(text), text
        assert not [token for token in _task_tokens() if token in text], text
        found = {name.lower(): value for name, value in (answer.get("headers") or {}).items()}
        for name, values in (answer.get("multiValueHeaders") or {}).items():
            found[name.lower()] = ", ".join(values)
        kept = (
            "private, max-age=31536000, immutable"
            if found["content-type"] == "application/octet-stream"
            else "no-store"
        )
        assert (found["x-content-type-options"], found["cache-control"]) == ("nosniff", kept)
        assert found["x-correlation-id"]
        if found["content-type"] == "application/octet-stream" or found["content-type"].startswith("text/plain"):
            assert answer["isBase64Encoded"] == (found["content-type"] == "application/octet-stream")
            return Answer(answer["statusCode"], answer["body"], found)
        body = json.loads(answer["body"])
        assert isinstance(body, dict)
        if answer["statusCode"] >= 400 and body.get("status") != "unhealthy":
            assert found["content-type"] == PROBLEM
            assert {"type", "title", "status", "detail", "instance", "correlation_id"} <= body.keys()
            assert (body["status"], bool(body["detail"])) == (answer["statusCode"], True)
        return Answer(answer["statusCode"], body, found)


Ask = Callable[..., Answer]


def named(answer: Answer) -> set[str]:
    """Return the fields that a problem names."""
    return {error["field"] for error in answer.body.get("errors", [])}


@untraced
def items(*tables: str) -> list[dict[str, Any]]:
    """Return every item of `tables`, by default of all tables of the template. A deleted table has no items.

    The items come from moto's memory: each response is checked against the tables, and a scan would be too slow.
    """
    names = tables or tuple(template.resources("AWS::DynamoDB::Table"))
    with DYNAMODB_LOCK:
        known = get_backend("dynamodb")[template.ACCOUNT][template.REGION].tables
        found = [item.to_json()["Attributes"] for name in names if name in known for item in known[name].all_items()]
        return copy.deepcopy(found)


def _task_tokens() -> list[str]:
    return [item["token"]["S"] for item in items("CallbacksTable")]


@cache
def _routes(function: str) -> list[tuple[str, str]]:
    """Return method and path of each route; routes without a parameter come first, as in API Gateway."""
    found = template.template()["Resources"][function]["Properties"]["Events"].values()
    routes = [(each["Properties"]["Method"], each["Properties"]["Path"]) for each in found if each["Type"] == "Api"]
    return sorted(routes, key=lambda route: route[1].count("{"))


def _match(function: str, method: str, path: str) -> tuple[str, dict[str, str] | None]:
    """Return the template's route for a path, and its parameters; a path without a route stays unchanged."""
    for known, route in _routes(function):
        found = re.fullmatch(re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", route), path)
        if found and known == method:
            return route, found.groupdict() or None
    return path, None
