"""The API's document matches the code, and its examples work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from local.openapi import DOCUMENT as FILE
from local.openapi import GUIDE, document, guide, text_of
from qaes.domain.policy.proposing import read_policy
from tests.openapi.conftest import DOCUMENT, OPERATIONS, Operation, routes
from tests.support import template
from tests.support.api import Answer, Api
from tests.support.cloud import Cloud


def conforms(value: Any, schema: dict[str, Any]) -> None:
    Draft202012Validator(schema | {"components": DOCUMENT["components"]}).validate(value)


def test_committed_document_matches_the_code() -> None:
    found = document()
    assert (template.ROOT / FILE).read_text() == text_of(found), "make openapi"
    assert (template.ROOT / "docs/openapi.json").samefile(template.ROOT / FILE), "one file, under two names"
    assert (template.ROOT / GUIDE).read_text() == guide(found), "make openapi"


def test_every_route_of_the_template_is_in_the_document() -> None:
    left_out = {"GET /openapi.json", "GET /docs"} | {
        route for route in routes() if "/tile/" in route and "{c}" in route
    }
    assert {f"{operation.method} {operation.path}" for operation in OPERATIONS} == set(routes()) - left_out


def test_operation_ids_are_unique() -> None:
    assert len({operation.id for operation in OPERATIONS}) == len(OPERATIONS)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.id)
def test_example_is_of_its_schema_and_works(operation: Operation, ask: Callable[..., Answer]) -> None:
    status, content = operation.answer
    if "example" in content:
        conforms(content["example"], content["schema"])
    answer = ask(operation, subject="olivia", roles="operator")
    assert answer.status == status, answer
    conforms(answer.body, content["schema"])
    if isinstance(content.get("example"), dict):
        assert set(content["example"]) == set(answer.body), "an example shows every field"


@pytest.mark.parametrize(
    "operation", [each for each in OPERATIONS if each.roles is not None], ids=lambda operation: operation.id
)
def test_errors_are_in_the_document(operation: Operation, ask: Callable[..., Answer]) -> None:
    for caller, status in (({"subject": None}, 401), ({"subject": "eve", "roles": ""}, 403)):
        answer = ask(operation, **caller)
        assert answer.status == status
        assert str(status) in operation.content["responses"]
        conforms(answer.body, DOCUMENT["components"]["schemas"]["Problem"])


def test_document_and_its_page_are_public(aws: Cloud) -> None:
    api = Api(aws, "GatewayFunction")
    event = api.event("GET", "/openapi.json", subject=None)
    answer = aws.invoke("GatewayFunction", event)
    assert (answer["statusCode"], answer["body"]) == (200, text_of(DOCUMENT))
    answer = aws.invoke("GatewayFunction", api.event("GET", "/docs", subject=None))
    headers = {name.lower(): value for name, value in answer["headers"].items()}
    assert answer["statusCode"] == 200
    assert headers["content-type"].startswith("text/html")
    assert headers["content-security-policy"].startswith("default-src 'none'")
    assert "<script" not in answer["body"]
    for operation in OPERATIONS:
        assert f'id="{operation.id}"' in answer["body"]


def test_route_without_a_rule_cannot_be_documented() -> None:
    program = (
        "import gateway.api\n"
        "gateway.api.app.get('/secret')(lambda: {})\n"
        "from local.openapi import document\n"
        "document()\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program],
        cwd=template.ROOT,
        env={"PYTHONPATH": "functions:layers/core:.", "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode != 0
    assert "/secret has no rule for its callers" in found.stderr


def test_proposals_have_an_example_of_each_format() -> None:
    requested = DOCUMENT["paths"]["/policy"]["post"]["requestBody"]["content"]["application/json"]
    [of_format_2] = requested["schema"]["examples"]
    for body in (requested["example"], of_format_2):
        conforms(body, requested["schema"])
    assert "actions" not in requested["example"]
    assert read_policy({name: of_format_2[name] for name in ("groups", "actions", "rules")}).format == 2
