"""Which lines of a function's log fail the end-to-end run."""

from __future__ import annotations

import json
import re

import pytest

from local.environment import ROOT
from tests.support.function_errors import EXPECTED, Expected, unexpected_errors


def line(level: str, message: str, **fields: str) -> str:
    return "GatewayLogs: " + json.dumps({"level": level, "message": message, **fields})


QUIET = [
    line("INFO", "GET /health: 200"),
    line("WARNING", "the network does not answer"),
    "GatewayLogs: START RequestId: 1",
    "GatewayLogs: REPORT RequestId: 1\tDuration: 3 ms",
    'GatewayLogs: {"_aws": {"CloudWatchMetrics": []}}',
    "GatewayLogs: ",
]


def test_unexpected_errors_leaves_out_quiet_lines() -> None:
    assert unexpected_errors(QUIET, ()) == []


@pytest.mark.parametrize(
    ("lines", "error"),
    [
        ([line("ERROR", "unexpected error")], "unexpected error"),
        ([line("CRITICAL", "broken", exception_name="KeyError")], "broken: KeyError"),
        (
            [
                "GatewayLogs: Traceback (most recent call last):",
                'GatewayLogs:   File "a.py"',
                "GatewayLogs: KeyError: 'a'",
            ],
            "KeyError: 'a'",
        ),
        (["GatewayLogs: Task timed out after 30.00 seconds"], "Task timed out after 30.00 seconds"),
        (['GatewayLogs: {"no": "level"}'], '{"no": "level"}'),
    ],
)
def test_unexpected_errors_reports_each_kind_of_error(lines: list[str], error: str) -> None:
    assert unexpected_errors([*QUIET, *lines], ()) == [f"GatewayLogs: {error}"]
    assert unexpected_errors(lines, [Expected(r"GatewayLogs: ", "a test")]) == []
    assert unexpected_errors(lines, [Expected(r"OtherLogs: ", "a test")]) != []


def test_expected_errors_have_reasons() -> None:
    assert all(each.reason.endswith(".") for each in EXPECTED)


def test_expected_texts_are_in_the_product() -> None:
    sources = "\n".join(
        path.read_text() for folder in ("functions", "layers") for path in (ROOT / folder).rglob("*.py")
    )
    texts = [text for each in EXPECTED for text in re.findall(r"[a-z0-9]+(?: [a-z0-9]+){2,}", each.error)]

    assert len(texts) >= len(EXPECTED) - 1
    assert [text for text in texts if text not in sources] == []
