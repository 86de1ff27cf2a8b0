"""After an operator has suspended an action, no new intent of it exists: 200 at once, from several processes."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pytest

from local.environment import ROOT
from qaes.adapters import suspensions
from qaes.adapters.policy_events import events_after
from qubic.policy.suspending import Suspending
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
