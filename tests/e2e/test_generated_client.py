"""A client that is generated from the API's document runs a transfer, without hand-written HTTP code."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.conftest import DESTINATION, SOURCE, Api

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "qaes_generated_client"


@pytest.fixture
def client(api: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Generate the client; give one for a role."""
    programs = Path(sys.executable).parent
    subprocess.run(
        [
            str(programs / "openapi-python-client"), "generate", "--path", str(ROOT / "docs" / "openapi.json"),
            "--meta", "none", "--output-path", str(tmp_path / PACKAGE),
        ],
        env=os.environ | {"PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"},
        check=True,
        capture_output=True,
    )  # fmt: skip
    monkeypatch.syspath_prepend(tmp_path)
    generated = importlib.import_module(PACKAGE)
    return lambda role: generated.AuthenticatedClient(base_url=api.cloud.url, token=api.cloud.token(role), timeout=60)


def _operation(tag: str, name: str) -> Any:
    return importlib.import_module(f"{PACKAGE}.api.{tag}.{name}")


def _wait(client: Any, task_id: str, wanted: str) -> Any:
    deadline = time.monotonic() + 60
    while (task := _operation("gateway", "get_task").sync(task_id, client=client)).status != wanted:
        assert time.monotonic() < deadline, task
        time.sleep(0.2)
    return task


def test_generated_client_starts_and_approves_task(client: Callable[[str], Any]) -> None:
    with client("requester") as alice, client("approver") as bob, client("auditor") as carol:
        models = importlib.import_module(f"{PACKAGE}.models")
        request = models.TaskRequest.from_dict(
            {
                "task_type": "transfer_funds",
                "description": "paid by a generated client",
                "wallet_address": SOURCE,
                "parameters": {"to_address": DESTINATION, "amount": 1},
            }
        )
        started = _operation("gateway", "start_task").sync(client=alice, body=request, idempotency_key="generated")
        task = _wait(alice, started.task_id, "waiting_approval")
        decision = models.DecisionRequest(approved=True, reason="checked", plan_hash=task.approval.plan_hash)
        refused = _operation("gateway", "decide").sync(started.task_id, client=alice, body=decision)
        assert isinstance(refused, models.Problem)
        assert refused.status == 403
        decided = _operation("gateway", "decide").sync(started.task_id, client=bob, body=decision)
        assert decided.approvals_given == 1
        _wait(alice, started.task_id, "completed")
        inbox = _operation("gateway", "get_tasks").sync(client=bob, status=models.GetTasksStatus("completed"))
        assert started.task_id in [each.task_id for each in inbox.tasks]
        trail = _operation("audit", "get_audit").sync(started.task_id, client=carol)
        assert trail.chain.verified
        assert any(entry.kind == "approval_decided" and entry.actor == "bob" for entry in trail.logs)
