"""Response headers of a service: security, and headers that a browser's page may read."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import events
from tests.support.cloud import call

ORIGIN = "https://console.example"


def answer(path: str, **parameters: str) -> tuple[int, dict[str, str]]:
    """Call the gateway without an authorizer's result; header names are in lower case."""
    event = events.load("gateway/api_health")
    event |= {"path": path, "resource": path}
    event["requestContext"] |= {"path": f"/v1{path}", "resourcePath": path, "authorizer": None}
    given: dict[str, Any] = call("GatewayFunction", event, parameters)
    found = {name.lower(): value for name, value in (given.get("headers") or {}).items()}
    found |= {name.lower(): ", ".join(values) for name, values in (given.get("multiValueHeaders") or {}).items()}
    return given["statusCode"], found


@pytest.mark.parametrize(("path", "status"), [("/tasks", 401), ("/no/such/route", 404)])
def test_security_headers_are_on_refusals_too(path: str, status: int) -> None:
    found_status, headers = answer(path)
    assert found_status == status
    assert (headers["x-content-type-options"], headers["cache-control"]) == ("nosniff", "no-store")
    assert headers["strict-transport-security"] == "max-age=31536000; includeSubDomains"


def test_without_an_origin_no_page_may_read() -> None:
    _, headers = answer("/tasks")
    assert not [name for name in headers if name.startswith("access-control-")]
    assert "vary" not in headers


@pytest.mark.parametrize("path", ["/tasks", "/no/such/route"])
def test_allowed_origin_can_read_headers(path: str) -> None:
    _, headers = answer(path, CorsAllowOrigin=ORIGIN)
    assert headers["access-control-allow-origin"] == ORIGIN
    assert headers["vary"] == "Origin"
    assert set(headers["access-control-expose-headers"].split(",")) == {
        "Idempotent-Replay",
        "Retry-After",
        "X-Correlation-Id",
    }
    assert "access-control-allow-credentials" not in headers
