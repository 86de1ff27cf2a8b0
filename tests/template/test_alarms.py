"""Every alarm reaches a person, and the runbook describes the response."""

from __future__ import annotations

import re
from typing import Any

import pytest

from tests.support import template

ALARMS = template.resources("AWS::CloudWatch::Alarm")
RUNBOOK = (template.ROOT / "docs" / "runbook.md").read_text()
TOPIC = "arn:aws:sns:us-east-1:123456789012:alarms"
EVENTS = {"ExecutionsFailedAlarm", "ForgedEventAlarm", "UnrecordedTransferAlarm", "UndeliverableApprovalAlarm"}
"""Alarms on something that happened once: that it did not happen again is no news."""


def paragraphs() -> dict[str, str]:
    """The runbook's text for each alarm."""
    parts = re.split(r"^### (\w+Alarm)$", RUNBOOK, flags=re.MULTILINE)
    texts = [re.split(r"^#+ ", text, flags=re.MULTILINE)[0] for text in parts[2::2]]
    return dict(zip(parts[1::2], texts, strict=True))


def test_runbook_has_a_paragraph_for_each_alarm() -> None:
    assert sorted(paragraphs()) == sorted(ALARMS)


@pytest.mark.parametrize("name", ALARMS)
def test_alarm_paragraph_has_cause_and_response(name: str) -> None:
    for part in ("- **Fires** ", "- **Means** ", "- **Do"):
        assert paragraphs()[name].count(part) == 1, part
    assert ALARMS[name]["Properties"]["AlarmDescription"].endswith(f" See docs/runbook.md#{name.lower()}")


@pytest.mark.parametrize("name", ALARMS)
def test_alarm_notifies_the_topic_that_is_given(name: str) -> None:
    def actions(**parameters: str) -> dict[str, Any]:
        resolved = template.resolve(ALARMS[name]["Properties"], parameters)
        return {each: resolved.get(each) for each in ("AlarmActions", "OKActions")}

    ok = None if name in EVENTS else [TOPIC]
    assert actions(AlarmTopicArn=TOPIC) == {"AlarmActions": [TOPIC], "OKActions": ok}
    nobody = "AWS::NoValue"
    assert actions() == {"AlarmActions": nobody, "OKActions": None if name in EVENTS else nobody}


@pytest.mark.parametrize(
    ("arn", "taken"),
    [(TOPIC, True), ("", True), ("alarms", False), (TOPIC.replace("sns", "sqs"), False), (f"{TOPIC} ", False)],
)
def test_alarm_topic_is_an_arn_of_sns(arn: str, taken: bool) -> None:
    pattern = template.template()["Parameters"]["AlarmTopicArn"]["AllowedPattern"]
    assert bool(re.fullmatch(pattern, arn)) is taken


def test_runbook_names_no_alarm_that_does_not_exist() -> None:
    assert set(re.findall(r"\b\w+Alarm\b", RUNBOOK)) <= set(ALARMS)
