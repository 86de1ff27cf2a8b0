"""The errors of this project, each with one meaning. Only `qaes.adapters.http` converts them to HTTP.

QaesError
├── InvalidInputError   the input is not acceptable; `field` names the wrong part            (422)
├── ForbiddenError      the caller may not do this                                           (403)
├── NotFoundError       the item does not exist, or is hidden from the caller                (404)
├── ConflictError       the current state does not allow this                                (409)
├── LimitError          too much is in flight for the caller: try again later                (429)
├── PermanentError      an outside system rejected the request: do not retry                 (422)
├── StoppedError        a step must not run, or has failed; the state machine uses the class
│   ├── StepDeniedError         a policy, a limit or the ledger does not allow the step
│   ├── ApprovalNeededError     people must approve the step first
│   ├── ApprovalRejectedError   an approver rejected the step
│   ├── ApprovalExpiredError    no decision was made in time
│   └── StepFailedError         the step has failed, and its failure is recorded
└── TransientError      an outside system did not respond: retry                             (503)
    └── ThrottledError      AWS throttles the call: retry for minutes                        (503)
"""

from __future__ import annotations

from typing import Any


class QaesError(Exception):
    """Base of all errors of this project; `message` may be shown to users."""

    def __init__(self, message: str, *, field: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.details = details


class InvalidInputError(QaesError):
    """The input is not acceptable; `field` is the dotted path of the wrong part."""


class ForbiddenError(QaesError):
    """The caller is authenticated, but may not do this."""


class NotFoundError(QaesError):
    """The item does not exist, or is hidden from the caller."""


class ConflictError(QaesError):
    """The current state does not allow this; `details` may contain that state."""


class LimitError(QaesError):
    """The caller has the maximum in flight. Try again after some of it has ended."""


class PermanentError(QaesError):
    """An outside system rejected the request, and would reject it again; `code` is a stable word for the reason."""

    def __init__(self, code: str, message: str, **details: Any) -> None:
        super().__init__(message, **details)
        self.code = code


class StoppedError(QaesError):
    """A step must not run now, or has failed. A retry would not help, so the state machine never retries it."""


class StepDeniedError(StoppedError):
    """A policy, a limit or the ledger does not allow the step."""


class ApprovalNeededError(StoppedError):
    """People must approve the step before it runs."""


class ApprovalRejectedError(StoppedError):
    """An approver rejected the step."""


class ApprovalExpiredError(StoppedError):
    """No decision on the step was made in time."""


class StepFailedError(StoppedError):
    """The step has failed, and its failure is recorded."""


class TransientError(QaesError):
    """An outside system did not respond, or its response was lost: the outcome is unknown."""


class ThrottledError(TransientError):
    """AWS throttles a call. The state machine matches this name, and retries for minutes."""
