"""One local cloud for all: the template as it is deployed, IAM enforced, spoken to over HTTP as its users do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import boto3
import httpx
import pytest

from local.cloud import Cloud
from local.environment import REGION
from local.fsck import settled, show
from local.tokens import PEOPLE
from qaes.adapters import clients
from tests.support.function_errors import unexpected_errors

ROOT = Path(__file__).resolve().parents[2]
APPROVAL_SECONDS = 20
SOURCE, DESTINATION, EMPTY = "0x1234567890abcdef", "0xfedcba0987654321", "0xabcdef1234567890"
TERMINAL = {"completed", "denied", "rejected", "expired", "failed", "cancelled"}
MONITORING: Mapping[str, Any] = {
    "task_type": "monitor_wallet",
    "description": "watch the treasury",
    "wallet_address": SOURCE,
    "parameters": {"alert_threshold": 500},
}


def transfer(amount: int = 10, source: str = SOURCE) -> dict[str, Any]:
    """A transfer as a user asks for it."""
    return {
        "task_type": "transfer_funds",
        "description": f"pay {amount}",
        "wallet_address": source,
        "parameters": {"to_address": DESTINATION, "amount": amount},
    }


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Allow sockets: these tests use the local cloud's."""
    for item in items:
        if "/tests/e2e/" in str(item.path):
            item.add_marker(pytest.mark.e2e)


@dataclass
class Api:
    """The people of the local cloud, each with their token; stores every response for the test of secrecy."""

    cloud: Cloud
    http: httpx.Client
    answers: list[str] = field(default_factory=list)

    def __call__(
        self, who: str | None, method: str, path: str, body: Any = None, *, token: str | None = None, **headers: str
    ) -> httpx.Response:
        """Make a request as the person with role `who`, with another `token`, or (None) without a token."""
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        if token is not None or who is not None:
            given["Authorization"] = f"Bearer {token if token is not None else self.cloud.token(who or '')}"
        content = body if isinstance(body, bytes) else None if body is None else json.dumps(body).encode()
        if content is not None:
            given["Content-Type"] = "application/json"
        answer = self.http.request(method, path, content=content, headers=given)
        self.answers.append(f"{method} {path} {answer.status_code} {dict(answer.headers)} {answer.text}")
        return answer

    def start(self, task: Mapping[str, Any], **headers: str) -> str:
        answer = self("requester", "POST", "/task/start", dict(task), **headers)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["task_id"])

    def task(self, task_id: str) -> dict[str, Any]:
        answer = self("approver", "GET", f"/task/{task_id}")
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def wait(self, task_id: str, *statuses: str, seconds: float = 60) -> dict[str, Any]:
        """Wait for one of these statuses, by default for the end."""
        deadline = time.monotonic() + seconds
        while (task := self.task(task_id))["status"] not in (statuses or TERMINAL):
            assert time.monotonic() < deadline, task
            assert task["status"] not in TERMINAL, task
            time.sleep(0.2)
        return task

    def decide(self, task_id: str, *, approved: bool, reason: str = "checked", who: str = "approver") -> httpx.Response:
        return self(who, "POST", f"/task/{task_id}/approve", {"approved": approved, "reason": reason})

    def steps(self, task_id: str) -> list[dict[str, Any]]:
        return list(self("requester", "GET", f"/task/{task_id}/status").json()["steps"])

    def trail(self, task_id: str, seconds: float = 30) -> list[dict[str, Any]]:
        """The audit entries, once the last one is recorded and all have their ledger transaction."""
        deadline = time.monotonic() + seconds
        while True:
            logs = self("auditor", "GET", f"/audit/{task_id}").json().get("logs", [])
            if logs and logs[-1]["kind"] == "task_ended" and all(entry["qubic_txid"] for entry in logs):
                return list(logs)
            assert time.monotonic() < deadline, logs
            time.sleep(0.3)

    def invoke(self, function: str, event: Any) -> Any:
        """Invoke a function as the account's root would."""
        found = self.cloud.client("lambda").invoke(
            FunctionName=self.cloud.resources[function], Payload=json.dumps(event)
        )
        return json.loads(found["Payload"].read())

    def balance(self, address: str) -> int:
        return int(self.invoke("LedgerFunction", {"operation": "balance", "address": address})["result"]["balance"])

    def pay(self, reference: str, source: str, destination: str, amount: int) -> None:
        """Move money without a task, and wait until it has moved."""
        event = {"operation": "transfer", "reference": reference, "source": source, "destination": destination}
        event |= {"amount": amount, "run": 1}
        deadline = time.monotonic() + 60
        while self.invoke("LedgerTransferFunction", event)["result"]["state"] != "confirmed":
            assert time.monotonic() < deadline
            time.sleep(0.5)

    def history(self, task_id: str) -> list[dict[str, Any]]:
        arn = self.execution_arn(task_id)
        pages = self.cloud.client("stepfunctions").get_paginator("get_execution_history")
        return [event for page in pages.paginate(executionArn=arn) for event in page["events"]]

    def execution_arn(self, task_id: str) -> str:
        return f"{self.cloud.outputs['StateMachineArn'].replace(':stateMachine:', ':execution:')}:{task_id}"

    def items(self, table: str, **condition: Any) -> list[dict[str, Any]]:
        """Scan a table, named as in the template."""
        pages = self.cloud.client("dynamodb").get_paginator("scan")
        name = self.cloud.resources[table]
        return [item for page in pages.paginate(TableName=name, **condition) for item in page["Items"]]


def audit_environment(cloud: Cloud) -> dict[str, str]:
    """Environment in which `local.fsck` finds the audit, as in `.local/aws.env`."""
    return cloud.environment | cloud.names


def fsck(cloud: Cloud) -> subprocess.CompletedProcess[str]:
    """Check the audit log, all of it, as `make fsck` does."""
    return subprocess.run(
        [sys.executable, "-m", "local.fsck", "--settle", "60"],
        cwd=ROOT,
        env=audit_environment(cloud) | {"PYTHONPATH": "functions:layers/core:."},
        capture_output=True,
        text=True,
        check=False,
    )


_checked_at: dict[str, int] = {}
"""Number of items in the tables at the last fsck without findings."""


@pytest.fixture(autouse=True)
def nothing_is_broken(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test fsck finds nothing in the log, if anything was added; the ledger is asked at the end."""
    yield
    if "local_cloud" not in request.fixturenames:
        return
    cloud: Cloud = request.getfixturevalue("local_cloud")
    dynamodb = cloud.client("dynamodb")

    def items() -> dict[str, int]:
        tables = (cloud.resources[name] for name in ("TasksTable", "AuditEntriesTable", "AuditLogTable"))
        return {table: dynamodb.describe_table(TableName=table)["Table"]["ItemCount"] for table in tables}

    if items() == _checked_at:
        return
    with pytest.MonkeyPatch.context() as patch:
        for name, value in audit_environment(cloud).items():
            patch.setenv(name, value)
        clients.reset()
        report = settled(60, log_id="qaes", ask_ledger=False)
    clients.reset()
    assert report.findings == [], show(report)
    _checked_at.update(items())


@pytest.fixture(scope="session")
def local_cloud() -> Iterator[Cloud]:
    cloud = Cloud(
        f"e2e-{os.getpid()}",
        parameters={
            "ApprovalTimeoutSeconds": str(APPROVAL_SECONDS),
            "OpenThrottlingRate": "5",  # the default, for test_limits; the local cloud has more
            "OpenThrottlingBurst": "10",
        },
        progress=lambda _: None,
    )
    with cloud:
        yield cloud
        checked = fsck(cloud)
        assert checked.returncode == 0, checked.stdout + checked.stderr
        assert unexpected_errors(cloud.service_logs()) == []
    cloud.remove_directory()


@pytest.fixture(scope="session")
def api(local_cloud: Cloud) -> Iterator[Api]:
    assert set(PEOPLE) == {"requester", "approver", "auditor", "operator"}
    with httpx.Client(base_url=local_cloud.url, timeout=60) as http:
        yield Api(local_cloud, http)


@pytest.fixture(scope="session")
def nobody_decides(api: Api) -> str:
    """A transfer that waits from the first test on, for an approval that never comes."""
    return api.start(transfer(1))


@pytest.fixture
def waiting(api: Api) -> Callable[..., str]:
    """Start a transfer and wait until it waits for a person."""

    def start(amount: int = 10, source: str = SOURCE) -> str:
        task_id = api.start(transfer(amount, source))
        api.wait(task_id, "waiting_approval")
        return task_id

    return start


@pytest.fixture(scope="session")
def session(local_cloud: Cloud) -> Callable[[str], boto3.Session]:
    """A function's own role, assumed; for that its trust policy lets this account's root in, which changes no right."""
    sessions: dict[str, boto3.Session] = {}

    def assume(function: str) -> boto3.Session:
        if function not in sessions:
            found = local_cloud.client("lambda").get_function_configuration(
                FunctionName=local_cloud.resources[function]
            )
            arn = found["Role"]
            trust = {
                "Version": "2012-10-17",
                "Statement": [
                    {"Effect": "Allow", "Principal": {"Service": "lambda.amazonaws.com"}, "Action": "sts:AssumeRole"},
                    {"Effect": "Allow", "Principal": {"AWS": "*"}, "Action": "sts:AssumeRole"},
                ],
            }
            local_cloud.client("iam").update_assume_role_policy(
                RoleName=arn.rpartition("/")[2], PolicyDocument=json.dumps(trust)
            )
            given = local_cloud.client("sts").assume_role(RoleArn=arn, RoleSessionName="test")["Credentials"]
            sessions[function] = boto3.Session(
                given["AccessKeyId"], given["SecretAccessKey"], given["SessionToken"], region_name=REGION
            )
        return sessions[function]

    return assume
