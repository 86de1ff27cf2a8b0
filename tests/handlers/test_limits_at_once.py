"""One window and 200 requests at once, from 8 processes: the sum reaches the limit and never exceeds it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import boto3
import pytest

from local.environment import ROOT
from tests.support import claims_at_once, transfers_at_once
from tests.support.cloud import SEED
from tests.support.dynamodb import dynamodb

pytestmark = pytest.mark.enable_socket
PROCESSES, REQUESTS = 8, 200


def run(program: str, environment: dict[str, str], *arguments: int) -> Counter[str]:
    """Run the requests, an equal part in each process; return how they ended."""
    share = REQUESTS // PROCESSES
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", program, *map(str, (number * share, share, *arguments))],
            cwd=ROOT,
            env=os.environ | environment,
            stdout=subprocess.PIPE,
        )
        for number in range(PROCESSES)
    ]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES
    return sum((Counter(json.loads(text.splitlines()[-1])) for text in printed), Counter())


def sums(table: str) -> list[int]:
    """Return the sum of each window."""
    items = boto3.client("dynamodb").scan(TableName=table, ConsistentRead=True)["Items"]
    windows = [item for item in items if item["sk"]["S"] == "LIMIT"]
    return [sum(int(total["N"]) for total in window["buckets"]["M"].values()) for window in windows]


def test_transfers_reach_the_limit_and_never_exceed_it(tmp_path: Path) -> None:
    tables = {"POLICY_TABLE": "PolicyTable", "QUBIC_SEED_SECRET": "seed"}
    with dynamodb(tmp_path, "LedgerTable", "ChainTable", "PolicyTable") as environment:
        boto3.client("secretsmanager").create_secret(Name="seed", SecretString=SEED)
        transfers_at_once.chain({transfers_at_once.wallet(number) for number in range(REQUESTS)}).tick_info()
        ended = run("tests.support.transfers_at_once", environment | tables, 2)

        fits = transfers_at_once.MAXIMUM // transfers_at_once.AMOUNT
        assert ended == {"signed": fits, "limit_exceeded": REQUESTS - fits}
        assert sums("LedgerTable") == [transfers_at_once.MAXIMUM]


def test_claims_reach_the_limit_and_never_exceed_it(tmp_path: Path) -> None:
    tables = {
        "TASKS_TABLE": "TasksTable",
        "DECISIONS_TABLE": "DecisionsTable",
        "LIMITS_TABLE": "LimitsTable",
        "POLICY_TABLE": "PolicyTable",
    }
    with dynamodb(tmp_path, *tables.values()) as environment:
        ended = run("tests.support.claims_at_once", environment | tables, 2)

        fits = claims_at_once.MAXIMUM // claims_at_once.AMOUNT
        assert ended == {"claimed": fits, "limit_exceeded": REQUESTS - fits}
        assert sums("LimitsTable") == [claims_at_once.MAXIMUM]
