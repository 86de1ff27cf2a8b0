"""After an operator has suspended an action, no new intent of it exists: 200 at once, from several processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import boto3
import pytest

from local.environment import ROOT
from qaes.adapters import suspensions
from qaes.adapters.policy_events import events_after
from qaes.domain.policy_events import EVERY_ACTION
from qubic.policy.suspending import Suspending
from tests.support import suspended_at_once, transfers_at_once
from tests.support.cloud import SEED
from tests.support.dynamodb import dynamodb
from tests.support.intents import ACTION

pytestmark = pytest.mark.enable_socket
PROCESSES, INTENTS, THREADS = 4, 200, 10
BEFORE = 20
"""Intents that are recorded before the action is suspended."""


def recorded() -> int:
    """Count the intents, as they are now."""
    pages = boto3.client("dynamodb").get_paginator("scan")
    return sum(
        item["sk"]["S"] == "INTENT"
        for page in pages.paginate(TableName="LedgerTable", ConsistentRead=True)
        for item in page["Items"]
    )


def test_no_intent_is_recorded_after_suspend_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LEDGER_TABLE", "LedgerTable")
    monkeypatch.setenv("POLICY_TABLE", "PolicyTable")
    with dynamodb(tmp_path, "LedgerTable", "PolicyTable") as environment:
        share = INTENTS // PROCESSES
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.support.intents", str(number * share), str(share), str(THREADS)],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=subprocess.PIPE,
            )
            for number in range(PROCESSES)
        ]
        deadline = time.monotonic() + 60
        while recorded() < BEFORE and time.monotonic() < deadline:
            time.sleep(0.005)
        suspended = Suspending("mock").suspend(ACTION, subject="olivia", reason="an incident")
        at_once = recorded()
        refused = [int(process.communicate(timeout=60)[0]) for process in processes]

        assert [process.returncode for process in processes] == [0] * PROCESSES
        assert suspended.status == "suspended"
        assert BEFORE <= at_once < INTENTS
        assert recorded() == at_once
        assert sum(refused) == INTENTS - at_once
        assert suspensions.suspended().keys() == {ACTION}
        assert [event.kind for event in events_after("PolicyTable")] == ["action_suspended"]


TABLES = {
    "TASKS_TABLE": "TasksTable",
    "DECISIONS_TABLE": "DecisionsTable",
    "LIMITS_TABLE": "LimitsTable",
    "LEDGER_TABLE": "LedgerTable",
    "POLICY_TABLE": "PolicyTable",
}


def scanned(table: str) -> list[dict[str, Any]]:
    pages = boto3.client("dynamodb").get_paginator("scan").paginate(TableName=table, ConsistentRead=True)
    return [item for page in pages for item in page["Items"]]


def begun() -> tuple[int, int]:
    """Count the claims of actions and the signatures of transfers, as they are now."""
    claims = sum(item["sk"]["S"].startswith("STEP#") for item in scanned("TasksTable"))
    return claims, sum(item["sk"]["S"].startswith("ATTEMPT#") for item in scanned("LedgerTable"))


def statuses() -> Counter[tuple[str, str]]:
    """Count the tasks by status and code of their reason."""
    tasks = [json.loads(item["data"]["S"]) for item in scanned("TasksTable") if item["sk"]["S"] == "TASK"]
    return Counter((task["status"], str(task.get("reason") or "").partition(":")[0]) for task in tasks)


def test_no_claim_or_signature_after_suspend_returned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The transactions of ExecuteAction's claim and of the ledger's signature."""
    for name, table in TABLES.items():
        monkeypatch.setenv(name, table)
    with dynamodb(tmp_path, "ChainTable", *TABLES.values()) as environment:
        boto3.client("secretsmanager").create_secret(Name="seed", SecretString=SEED)
        transfers_at_once.chain({suspended_at_once.wallet(number) for number in range(INTENTS)}).tick_info()
        share = INTENTS // PROCESSES
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "tests.support.suspended_at_once", str(number * share), str(share), "4"],
                cwd=ROOT,
                env=os.environ | environment | {"QUBIC_SEED_SECRET": "seed"},
                stdout=subprocess.PIPE,
            )
            for number in range(PROCESSES)
        ]
        deadline = time.monotonic() + 120
        while min(begun()) < BEFORE // 2 and time.monotonic() < deadline:
            time.sleep(0.005)
        Suspending("mock").suspend(EVERY_ACTION, subject="olivia", reason="an incident")
        claims, signatures = at_once = begun()
        printed = [process.communicate(timeout=120)[0] for process in processes]

        assert [process.returncode for process in processes] == [0] * PROCESSES
        assert begun() == at_once
        assert min(at_once) >= BEFORE // 2 and max(at_once) < INTENTS // 2
        ended = sum((Counter(json.loads(text.splitlines()[-1])) for text in printed), Counter())
        assert ended == {
            "claim recorded": claims,
            "claim suspended": INTENTS // 2 - claims,
            "transfer recorded": signatures,
            "transfer suspended": INTENTS // 2 - signatures,
        }
        assert statuses()["denied", "suspended"] == INTENTS // 2 - claims
