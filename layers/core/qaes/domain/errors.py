"""What can go wrong, each with one meaning; turned into HTTP once, at the edge (`qaes.adapters.http`).

QaesError
├── InvalidInputError   the caller sent something that is not acceptable; `field` names it   (422)
├── ForbiddenError      the caller may not do this                                           (403)
├── NotFoundError       there is no such thing, or the caller may not know of it             (404)
├── ConflictError       it cannot be done in the present state                               (409)
├── LimitError          the caller has too much in flight: later                             (429)
├── PermanentError      an outside system said no, for good: never retry                     (422)
├── StoppedError        a step may not run, or has failed: the state machine knows each by its class
│   ├── StepDeniedError         a policy, a limit or the ledger does not let it run
│   ├── ApprovalNeededError     people must approve it first
│   ├── ApprovalRejectedError   an approver rejected it
│   ├── ApprovalExpiredError    nobody decided in time
│   └── StepFailedError         it has failed, which is on record
└── TransientError      an outside system did not answer: retry                              (503)
    └── ThrottledError      AWS refuses calls for now: retry for minutes                     (503)
"""

from __future__ import annotations

from typing import Any


class QaesError(Exception):
    """Base of all errors of this project; `message` is fit to be shown to a user."""

    def __init__(self, message: str, *, field: str | None = None, **details: Any) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.details = details


class InvalidInputError(QaesError):
    """The input is not acceptable; `field` is the dotted path of the part that is wrong."""


class ForbiddenError(QaesError):
    """The caller is known and may not do this."""


class NotFoundError(QaesError):
    """There is no such thing, or the caller may not know that there is."""


class ConflictError(QaesError):
    """The present state does not allow it; `details` may carry that state."""


class LimitError(QaesError):
    """The caller has as much in flight as is allowed: to be tried again when some of it has ended."""


class PermanentError(QaesError):
    """An outside system refused, and would refuse again; `code` is a stable word for the reason."""

    def __init__(self, code: str, message: str, **details: Any) -> None:
        super().__init__(message, **details)
        self.code = code


class StoppedError(QaesError):
    """A step may not run now, or has failed. Another attempt would meet the same: the state machine retries none."""


class StepDeniedError(StoppedError):
    """A policy, a limit or the ledger does not let the step run."""


class ApprovalNeededError(StoppedError):
    """People must approve the step before it runs."""


class ApprovalRejectedError(StoppedError):
    """An approver rejected the step."""


class ApprovalExpiredError(StoppedError):
    """Nobody decided on the step in time."""


class StepFailedError(StoppedError):
    """The step has failed, which is on record."""


class TransientError(QaesError):
    """An outside system could not be asked, or its answer was not received: the outcome is unknown."""


class ThrottledError(TransientError):
    """AWS refuses a call because there are too many: the state machine retries it by this name, for minutes."""
