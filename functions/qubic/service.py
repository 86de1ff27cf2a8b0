"""The parts of the qubic service, put together for its functions."""

from __future__ import annotations

from qubic import limits, writer
from qubic.chain import chain
from qubic.policies import Policies
from qubic.submissions import Submission, Submissions


def submissions() -> Submissions:
    """Make the submissions to the chain of QUBIC_NETWORK, each followed by the writer."""
    return Submissions(chain(), on_signed=writer.enqueue, on_closed=_closed)


def policies() -> Policies:
    """Make the policy's store."""
    return Policies(submissions())


def _closed(submission: Submission) -> None:
    """What has to follow the end of a submission; called at least once."""
    if submission.kind == "policy" and submission.state == "confirmed":
        policies().settle()
    if submission.kind == "transfer" and submission.state != "confirmed" and "moved_unknown" not in submission.error:
        limits.release(submission.metadata["reference"], attempt=submission.attempt)
