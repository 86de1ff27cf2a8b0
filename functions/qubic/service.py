"""The parts of the qubic service, put together for its functions."""

from __future__ import annotations

from qaes.adapters import settings
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.logs import logger
from qubic.chain import chain
from qubic.judge import check_allowed
from qubic.limits import Limits
from qubic.policies import Policies
from qubic.queue import enqueue
from qubic.settled import publish
from qubic.submissions import Submission, Submissions
from qubic.wallets import Wallets, holds_key


def submissions() -> Submissions:
    """Make the submissions to the chain of QUBIC_NETWORK, each followed by the writer."""
    network = chain()
    return Submissions(
        network,
        on_signed=enqueue,
        on_closed=_closed,
        check_transfer=_check_transfer,
        sends_transfers=network.network == "mock" or settings.optional("ALLOW_TRANSFERS") == "true",
    )


def policies() -> Policies:
    """Make the policy's store; without the key, versions are handed in by the function that signs for the API."""
    return Policies(submissions(), bring_forward=None if holds_key() else LedgerClient().settle_policy)


def _check_transfer(submission: Submission) -> None:
    """Check a transfer that waits to be sent against the policy in force, by its own terms."""
    check_allowed(
        policies().in_force(),
        Wallets(submission.network),
        destination=submission.destination,
        amount=submission.amount,
        input_type=submission.input_type,
    )


def _closed(submission: Submission) -> None:
    """What has to follow the end of a submission; called at least once."""
    if submission.kind == "policy" and submission.state == "confirmed":
        try:
            policies().settle()
        except Exception:  # noqa: BLE001 what is wrong with a policy is told, and must not keep the queue waiting
            logger().exception("policy not settled")  # the schedule tries it each minute
    if submission.kind == "transfer" and submission.moved_nothing:
        Limits().release(submission.metadata["reference"], attempt=submission.attempt)
    publish(submission)
