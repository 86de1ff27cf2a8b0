"""Assembly of the qubic service's parts for its functions."""

from __future__ import annotations

from qaes.adapters import settings
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.logs import logger
from qaes.domain.policy import Decision
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
    """Create the submissions for the chain of QUBIC_NETWORK. The transaction worker tracks each of them."""
    network = chain()
    return Submissions(
        network,
        on_signed=enqueue,
        on_closed=_closed,
        rule_for=_rule_for,
        sends_transfers=network.network == "mock" or settings.optional("ALLOW_TRANSFERS") == "true",
    )


def policies() -> Policies:
    """Create the policy store. Without the key, the ledger's function that signs for the API submits versions."""
    return Policies(submissions(), advance_elsewhere=None if holds_key() else LedgerClient().settle_policy)


def suspending() -> Suspending:
    """Create the store of suspensions."""
    return Suspending(settings.text("QUBIC_NETWORK"))


def _rule_for(submission: Submission) -> Decision:
    """Return the rule of the policy in force that allows a transfer, based on its signed terms. Raises PermanentError.

    The rule applies to the caller's spelling of the address if it is the wallet that the signed bytes pay.
    """
    named = submission.address
    pays_it = named and Wallets(submission.network).identity(named) == submission.destination
    return rule_for(
        policies().in_force(),
        source=submission.source,
        destination=named if pays_it else submission.destination,
        amount=submission.amount,
        input_type=submission.input_type,
        requester=submission.requested_by,
        agent=submission.agent or None,
    )


def _closed(submission: Submission) -> None:
    """Do the follow-up work of a closed submission. Called at least once."""
    if submission.kind == "policy" and submission.state == "confirmed":
        try:
            policies().settle()
        except Exception:  # noqa: BLE001 a policy's error is logged, and must not block the queue
            logger().exception("the policy could not be settled")  # the schedule retries every minute
    publish(submission)
