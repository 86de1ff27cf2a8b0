"""A process that requests transfers, each from a different wallet, for tests of shared limits.

`python -m tests.support.transfers_at_once FIRST COUNT THREADS` submits the transfers from number FIRST on, and prints
how many were signed, refused by the limit, and neither.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

from qaes.domain.errors import PermanentError, TransientError
from qaes.domain.policy import Decision
from qubic.network.mock import MockChain
from qubic.spending import rule_for
from qubic.transactions.model import Submission
from qubic.transactions.submissions import Submissions
from qubic.wallets import demo_key
from tests.support.policies import of_limits

AMOUNT, MAXIMUM = 10, 1000
LIMIT = {"window_seconds": 86_400, "max_amount": MAXIMUM, "per": "action", "over": "deny"}
POLICY = of_limits("transfer_funds", LIMIT)
DESTINATION = "0xfedcba0987654321"


def wallet(number: int) -> str:
    """Return the address of the wallet that pays a transfer: five transfers of a process share one."""
    return f"0x{number // 5 + 1:08d}aaaaaaaa"


def chain(wallets: Iterable[str] = ()) -> MockChain:
    """Return the mock network; the first caller determines the wallets."""
    genesis = {demo_key(each).identity: 100 * AMOUNT for each in wallets}
    return MockChain(genesis=genesis, table="ChainTable", tick_milliseconds=1000)


def submissions() -> Submissions:
    """Return the submissions, under the policy with one limit."""

    def rule(wanted: Submission) -> Decision:
        terms = {"source": wanted.source, "destination": wanted.address, "amount": wanted.amount}
        return rule_for(POLICY, **terms, requester=wanted.requested_by)

    return Submissions(chain(), "LedgerTable", rule_for=rule)


def submit(it: Submissions, number: int) -> str:
    """Submit one transfer with the state machine's retries of transient errors."""
    for _ in range(20):
        try:
            it.submit_transfer(f"task_{number}#step", source=wallet(number), destination=DESTINATION, amount=AMOUNT)
        except PermanentError as error:
            return error.code
        except TransientError:
            continue
        return "signed"
    return "busy"


if __name__ == "__main__":
    first, count, threads = map(int, sys.argv[1:])
    it = submissions()
    with ThreadPoolExecutor(threads) as pool:
        ended = Counter(pool.map(lambda number: submit(it, number), range(first, first + count)))
    sys.stdout.write(f"{json.dumps(ended)}\n")
