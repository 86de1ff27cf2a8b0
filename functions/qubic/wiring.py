"""The parts of the qubic service, put together for its functions."""

from __future__ import annotations

from qaes.adapters import settings
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.logs import logger
from qaes.domain.policy import PolicyDecision
from qubic.network import chain
from qubic.policy.lifecycle import Policies
from qubic.policy.suspending import Suspending
from qubic.spending import rule_for
from qubic.transactions.model import Submission
from qubic.transactions.queue import enqueue
from qubic.transactions.settled import publish
from qubic.transactions.submissions import Submissions
from qubic.wallets import Wallets, holds_key


def submissions() -> Submissions:
    """Make the submissions to the chain of QUBIC_NETWORK, each tracked by the transaction worker."""
    network = chain()
    return Submissions(
        network,
        on_signed=enqueue,
        on_closed=_closed,
        rule_for=_rule_for,
        sends_transfers=network.network == "mock" or settings.optional("ALLOW_TRANSFERS") == "true",
    )


def policies() -> Policies:
    """Make the policy's store; without the key, versions are handed in by the function that signs for the API."""
    return Policies(submissions(), advance_elsewhere=None if holds_key() else LedgerClient().settle_policy)


def suspending() -> Suspending:
    """Make the store of suspensions."""
    return Suspending(settings.text("QUBIC_NETWORK"))


def _rule_for(submission: Submission) -> PolicyDecision:
    """Return the rule of the policy in force that lets a transfer pass, by its own terms. Raises PermanentError.

    The address that its caller named counts as long as it is that of the wallet which the signed bytes pay.
    """
    named = submission.address
    pays_it = named and Wallets(submission.network).identity(named) == submission.destination
    return rule_for(
        policies().in_force(),
        destination=named if pays_it else submission.destination,
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
    publish(submission)
