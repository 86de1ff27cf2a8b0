"""`AUTH_MODE=stub`: the original's clients, which know of no tokens."""

from __future__ import annotations

import os

import httpx

from local.cloud import Cloud
from tests.e2e.conftest import Api, transfer
from tests.support.function_errors import unexpected_errors


def test_without_a_token_everyone_is_demo_user_with_every_role() -> None:
    name = f"e2e-stub-{os.getpid()}"
    cloud = Cloud(name, auth_mode="stub", progress=lambda _: None)
    with cloud, httpx.Client(base_url=cloud.url, timeout=60) as http:
        api = Api(cloud, http)
        answer = api(None, "POST", "/task/start", transfer(7))
        assert answer.status_code == 202
        assert set(answer.json()) == {"task_id", "status", "message"}
        task_id = answer.json()["task_id"]
        task = api.wait(task_id, "waiting_approval")
        assert task["requester"] == "demo_user"
        decision = api(None, "POST", f"/task/{task_id}/approve", {"approved": True, "reason": ""})
        assert (decision.status_code, decision.json()["approved"]) == (200, True)
        assert api.wait(task_id)["status"] == "completed"
        assert unexpected_errors(cloud.service_logs()) == []
    cloud.remove_directory()
