"""One line for each request, with any outcome; and a warm-up, which changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from botocore.client import BaseClient

from qaes.adapters.handlers import WARM_UP
from qaes.adapters.logs import MAX_LINE_BYTES
from qaes.adapters.task_repository import TaskStore
from tests.handlers.test_gateway import MONITOR, TRANSFER, YES
from tests.handlers.test_task_repository import waiting
from tests.support import template
from tests.support.api import ALICE, BOB, NOBODY, Api, set_environment
from tests.support.cloud import Cloud, cloud
from tests.workflow.test_logs import Lines, lines

__all__ = ["lines"]


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    set_environment("GatewayFunction", monkeypatch)
    with cloud(state_machine=False, policy=False) as it:
        yield it


@pytest.fixture
def api(aws: Cloud) -> Api:
    return Api(aws, "GatewayFunction")


def last(lines: Lines) -> dict[str, Any]:
    text = next(text for text in reversed(lines.texts) if '"ms"' in text)
    assert len(text.encode()) <= MAX_LINE_BYTES
    return dict(json.loads(text))


def test_request_logs_one_line_with_the_task(api: Api, lines: Lines) -> None:
    answer = api("POST", "/task/start", MONITOR, **ALICE)
    line = last(lines)
    assert (line["message"], line["task_id"]) == ("POST /task/start: 202", answer.body["task_id"])
    assert line["correlation_id"] == answer.headers["x-correlation-id"]
    api("GET", f"/task/{answer.body['task_id']}", **ALICE)
    line = last(lines)
    assert (line["message"], line["task_id"]) == ("GET /task/{task_id}: 200", answer.body["task_id"])


def test_decision_is_logged(api: Api, lines: Lines) -> None:
    task_id, _ = waiting(TaskStore())
    api("POST", f"/task/{task_id}/approve", YES, **BOB)
    line = last(lines)
    assert (line["message"], line["decision"], line["approval"]) == (
        "POST /task/{task_id}/approve: 200", "approved", "approved",
    )  # fmt: skip
    assert line["task_id"] == task_id


@pytest.mark.parametrize(
    ("method", "path", "body", "caller", "message"),
    [
        ("POST", "/task/start", {"task_type": "secret_word"}, ALICE, "POST /task/start: 422"),
        ("POST", "/task/start", TRANSFER, BOB, "POST /task/start: 403"),
        ("GET", "/tasks", None, NOBODY, "GET /tasks: 401"),
        ("GET", "/task/secret_word", None, ALICE, "GET /task/{task_id}: 404"),
        ("GET", "/secret_word", None, ALICE, "GET no route: 404"),
    ],
)
def test_refused_request_is_logged_without_its_content(
    api: Api, lines: Lines, method: str, path: str, body: Any, caller: dict[str, Any], message: str
) -> None:
    api(method, path, body, **caller)
    assert last(lines)["message"] == message
    for secret in ("secret_word", "0x1234567890abcdef", "pay the invoice", "Bearer"):
        assert secret not in "".join(lines.texts)


def test_log_line_has_no_fields_of_another_request(api: Api, lines: Lines) -> None:
    api("POST", "/task/start", MONITOR, **ALICE)
    api("GET", "/tasks", None, **ALICE)
    assert "task_id" not in last(lines)


FUNCTIONS = [name for name in template.functions() if name != "AuthorizerFunction"]
"""The authorizer has no handler of the layer's: it must start fast, and any request with a token warms it."""


def test_warm_up_calls_nothing(aws: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(client: BaseClient, operation: str, arguments: Any) -> None:
        raise AssertionError(f"a warm-up calls {operation}")

    with monkeypatch.context() as patch:
        patch.setattr(BaseClient, "_make_api_call", refuse)
        for name in FUNCTIONS:
            assert aws.invoke(name, WARM_UP) == {"warm": True}, name


@pytest.mark.parametrize("event", [{"warm_up": False}, {"warm_up": True, "task_id": "x"}, {"warm_up": 1.5}])
def test_other_events_are_no_warm_up(aws: Cloud, event: dict[str, Any]) -> None:
    with pytest.raises(Exception):  # noqa: B017, PT011 - whatever the handler makes of it
        aws.invoke("PlanTaskFunction", event)
