"""The parts of the documentation that come from the template and from the state machine."""

from __future__ import annotations

import json
import re

import pytest

from local.reference import PARTS, parameters, state_machine, with_part
from tests.support.template import ROOT, definition, template

MACHINE = {
    "StartAt": "Plan",
    "States": {
        "Plan": {"Type": "Task", "Next": "Allowed?", "Catch": [{"ErrorEquals": ["States.ALL"], "Next": "Failed"}]},
        "Allowed?": {"Type": "Choice", "Choices": [{"Condition": "{% true %}", "Next": "Steps"}], "Default": "Failed"},
        "Steps": {
            "Type": "Map",
            "ItemProcessor": {"StartAt": "Step", "States": {"Step": {"Type": "Task", "End": True}}},
            "Catch": [{"ErrorEquals": ["Denied", "Rejected"], "Next": "Failed"}],
            "Next": "Wait",
        },
        "Wait": {"Type": "Task", "Resource": "arn:aws:states:::lambda:invoke.waitForTaskToken", "End": True},
        "Failed": {"Type": "Fail"},
    },
}


def test_state_machine_is_drawn_with_its_errors_and_waits() -> None:
    assert state_machine(MACHINE).splitlines() == [
        "```mermaid",
        "flowchart TD",
        "    start([start]) --> Plan",
        '    Plan["Plan"]',
        '    AllowedChoice{"Allowed?"}',
        '    subgraph Steps["Steps, one at a time"]',
        '        Step["Step"]',
        "    end",
        '    Wait["Wait<br/>waits"]',
        '    Failed(["Failed"])',
        "    Plan --> AllowedChoice",
        '    Plan -. "error" .-> Failed',
        "    AllowedChoice --> Steps",
        "    AllowedChoice --> Failed",
        "    Steps --> Wait",
        '    Steps -. "Denied<br/>Rejected" .-> Failed',
        "```",
    ]


def test_state_machine_drawing_names_every_state() -> None:
    states = set(re.findall(r'"(\w+\??)": \{\s*"(?:Comment|Type)"', json.dumps(definition())))
    page = (ROOT / PARTS["state machine"][0]).read_text()

    assert len(states) > 5
    assert {name for name in states if f'"{name}' not in page} == set()


def test_parameters_table_has_a_row_for_each_parameter() -> None:
    rows = [line.split(" | ")[0] for line in parameters(template()).splitlines()[2:]]

    assert rows == [f"| `{name}`" for name in template()["Parameters"]]


@pytest.mark.parametrize("name", PARTS)
def test_part_is_replaced_and_the_rest_of_the_page_kept(name: str) -> None:
    page = (ROOT / PARTS[name][0]).read_text()
    written = with_part(page, name, "text")

    assert f"<!-- begin: {name} -->\n\ntext\n\n<!-- end: {name} -->" in written
    assert with_part(written, name, PARTS[name][1]()) == page


def test_part_without_markers_is_an_error() -> None:
    with pytest.raises(LookupError, match="the page has no markers for the part parameters"):
        with_part("# A page\n", "parameters", "text")
