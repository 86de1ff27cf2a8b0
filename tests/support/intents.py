"""A process that records intents until their action is suspended, for tests of the race between the two.

`python -m tests.support.intents FIRST COUNT THREADS` records the intents of the tasks from FIRST on, each in the
transaction that the worker and the ledger use, and prints how many were refused.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor

from qaes.adapters import dynamo, suspensions

ACTION = "transfer_funds"
PAUSE_SECONDS = 0.005
"""Pause of each thread between two intents, so that they come both before and after the suspension."""


def record(number: int) -> bool:
    """Record one intent. Return whether it was refused because the action is suspended."""
    time.sleep(PAUSE_SECONDS)
    task_id = f"task_{number}"
    intent = {"Put": {"TableName": "LedgerTable", "Item": dynamo.key(f"INTENT#{task_id}", "INTENT")}}
    try:
        dynamo.transact([intent, suspensions.check(ACTION, task_id)])
    except dynamo.ConditionFailedError as error:
        if error.refused != (1,):
            raise
        return True
    return False


if __name__ == "__main__":
    first, count, threads = map(int, sys.argv[1:])
    with ThreadPoolExecutor(threads) as pool:
        sys.stdout.write(str(sum(pool.map(record, range(first, first + count)))))
