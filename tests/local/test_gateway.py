"""Parts of an API that the local AWS leaves out, and the local code that adds them."""

from __future__ import annotations

from typing import Any

import pytest

from local.gateway import complete, header
from tests.template.test_security import ORIGIN, deployed


class Recorder:
    """Writes down the calls that API Gateway's client would make."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        self.calls: list[tuple[str, dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        def call(**arguments: Any) -> dict[str, Any]:
            self.calls.append((name, arguments))
            return {"id": "d1", "methodSettings": self.settings}

        return call


@pytest.mark.parametrize(("origin", "cors"), [("", False), (ORIGIN, True)])
def test_gateway_responses_are_set_before_deployment(monkeypatch: pytest.MonkeyPatch, origin: str, cors: bool) -> None:
    template = {"Resources": deployed(monkeypatch)}
    limits = {"throttlingRateLimit": 5.0, "throttlingBurstLimit": 10}
    gateway = Recorder({"*/*": limits, "/~1task~1start/POST": limits})
    complete(gateway, "api", template, {"CorsAllowOrigin": origin})
    names = [name for name, _ in gateway.calls]
    assert names[-3:] == ["get_stage", "create_deployment", "update_stage"]
    responses = {call["responseType"]: call for name, call in gateway.calls if name == "put_gateway_response"}
    assert set(responses) >= {"UNAUTHORIZED", "THROTTLED", "DEFAULT_4XX", "DEFAULT_5XX"}
    assert responses["UNAUTHORIZED"]["statusCode"] == "401"
    headers = responses["UNAUTHORIZED"]["responseParameters"]
    assert headers["gatewayresponse.header.Content-Type"] == "'application/problem+json'"
    assert headers.get("gatewayresponse.header.Access-Control-Allow-Origin") == (f"'{ORIGIN}'" if cors else None)
    assert gateway.calls[-1][1]["patchOperations"] == [
        {"op": "replace", "path": "/deploymentId", "value": "d1"},
        {"op": "replace", "path": "/~1task~1start/POST/throttling/rateLimit", "value": "5.0"},
        {"op": "replace", "path": "/~1task~1start/POST/throttling/burstLimit", "value": "10"},
    ]


def test_header_rejected_when_unsupported() -> None:
    with pytest.raises(ValueError, match="does not support"):
        header({"Fn::GetAtt": ["Api", "Arn"]}, {})
