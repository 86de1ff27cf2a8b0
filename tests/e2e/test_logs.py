"""The lines of `make logs` for a task on the local cloud, and functions that are loaded before the first task."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from local.readiness import NOT_WARMED, to_warm_up
from qaes.adapters.logs import MAX_LINE_BYTES
from tests.e2e.conftest import DESTINATION, SOURCE, Api


def logged(api: Api, task_id: str) -> list[dict[str, Any]]:
    """The services' lines about a task, in the order in which they were written."""
    found = []
    for line in api.cloud.service_logs(task_id, everything=False):
        text = line.partition(": ")[2]
        found.append(json.loads(text))
        if found[-1]["level"] == "INFO":
            assert len(text.encode()) <= MAX_LINE_BYTES, text
        for secret in (SOURCE, DESTINATION, "Bearer", api.cloud.token("requester")[:20]):
            assert secret not in text
    return found


def test_logs_show_each_state_of_a_completed_transfer(api: Api, waiting: Callable[..., str]) -> None:
    task_id = waiting(1)
    api.decide(task_id, approved=True)
    api.wait(task_id, "completed")
    messages = [line["message"] for line in logged(api, task_id)]
    for message in (
        "POST /task/start: 202",
        "PlanTask: allowed",
        "RunStep: succeeded",
        "AwaitApproval: pending",
        "POST /task/{task_id}/approve: 200",
        "ExecuteAction: submitted",
    ):
        assert message in messages, messages
    [decision] = [line for line in logged(api, task_id) if "decision" in line]
    assert (decision["decision"], decision["task_id"]) == ("approved", task_id)
    shown, everything = (api.cloud.service_logs(everything=each) for each in (False, True))
    assert not [line for line in shown if re.search(r": (START|END|REPORT) ", line)]
    assert len(everything) > len(shown)


def test_logs_show_the_denial_of_a_denied_task(api: Api) -> None:
    task_id = api.start({"task_type": "launch_rocket", "description": "to the moon"})
    api.wait(task_id, "denied")
    messages = [line["message"] for line in logged(api, task_id) if not line["message"].startswith("GET ")]
    assert messages[:2] == ["POST /task/start: 202", "PlanTask: denied"]


def test_functions_are_loaded_before_the_first_task(api: Api) -> None:
    assert api.cloud.resources.keys() >= NOT_WARMED
    log = (api.cloud.directory / "aws.log").read_text()
    spawned = [line for line in log.splitlines() if "Lambda worker spawned" in line]
    for name in to_warm_up(api.cloud):
        assert any(api.cloud.resources[name] in line for line in spawned), name


def test_layer_and_code_are_unpacked_once(api: Api) -> None:
    unpacked = list((api.cloud.directory / "tmp" / "unpacked").iterdir())
    assert len(unpacked) == 2
    environments = list((api.cloud.directory / "tmp").glob("ministack-lambda-*"))
    assert environments
    assert not [path for folder in environments for path in folder.rglob("*.zip")]
