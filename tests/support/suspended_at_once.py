"""A process that claims actions and signs transfers until they are suspended, for tests of the race between the two.

`python -m tests.support.suspended_at_once FIRST COUNT THREADS` plans a task for every second number and claims its
action as ExecuteAction does, submits a transfer for the others, and prints how many ended in which way. Each intent is
attempted until it is recorded or refused for good.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

from qaes.adapters.intents import Intent
from qaes.adapters.task_repository import TaskStore
from qaes.domain.errors import PermanentError, StepDeniedError, TransientError
from qaes.domain.models import Plan, Task
from qaes.domain.policy import Decision
from qaes.domain.ruling import rule
from qubic.spending import rule_for
from qubic.transactions.model import Submission
from qubic.transactions.submissions import Submissions
from tests.support import claims_at_once, policies, transfers_at_once

CLAIMS, TRANSFERS = policies.of_limits("transaction"), policies.of_limits("transfer_funds")
PAUSE_SECONDS = 0.05
"""Pause of each thread between two intents, so that they come both before and after the suspension."""
ATTEMPTS = 200


def claim(store: TaskStore, task: Task, plan: Plan) -> str:
    """Claim the action; a refusal ends the task as the state machine's EndTask does."""
    step_index, ruling = len(plan.steps) - 1, rule(task, CLAIMS, CLAIMS)
    intent = Intent(task, step_index, plan.steps[step_index], ruling)
    for _ in range(ATTEMPTS):
        try:
            store.claim_step(task, plan, step_index, None, ruling.recorded, intent=intent)
        except StepDeniedError as error:
            store.end_task(task.task_id, "denied", actor="execution", reason=error.message)
            return error.message.partition(":")[0]
        except TransientError:
            continue
        return "recorded"
    return "busy"


def submit(it: Submissions, number: int) -> str:
    """Submit a transfer from the number's own wallet."""
    terms = {"source": wallet(number), "destination": transfers_at_once.DESTINATION, "amount": 1}
    for _ in range(ATTEMPTS):
        with suppress(TransientError):
            try:
                it.submit_transfer(f"task_{number}#step", **terms)
            except PermanentError as error:
                return error.code
            return "recorded"
    return "busy"


def wallet(number: int) -> str:
    """Return the address of the wallet that pays a transfer: two transfers share one."""
    return f"0x{number // 4 + 1:08d}bbbbbbbb"


def submissions() -> Submissions:
    """Return the submissions, under a policy without limits."""

    def allowed(wanted: Submission) -> Decision:
        terms = {"source": wanted.source, "destination": wanted.address, "amount": wanted.amount}
        return rule_for(TRANSFERS, **terms, requester=wanted.requested_by)

    return Submissions(transfers_at_once.chain(), "LedgerTable", rule_for=allowed)


def main() -> None:
    """Record the intents, and print how they ended by kind."""
    first, count, threads = map(int, sys.argv[1:])
    store, ledger, numbers = TaskStore(), submissions(), range(first, first + count)
    planned = {number: claims_at_once.planned(store, f"requester {number}", CLAIMS) for number in numbers[::2]}

    def record(number: int) -> str:
        time.sleep(PAUSE_SECONDS)
        if number in planned:
            return f"claim {claim(store, *planned[number])}"
        return f"transfer {submit(ledger, number)}"

    with ThreadPoolExecutor(threads) as pool:
        ended = Counter(pool.map(record, numbers))
    sys.stdout.write(f"{json.dumps(ended)}\n")


if __name__ == "__main__":
    main()
