"""HTTP API of suspensions: one operator suspends an action at once, and two resume it."""

from __future__ import annotations

from typing import Annotated, Self

from fastapi import Depends, FastAPI
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, field_validator

from qaes.adapters.http import Caller, require
from qaes.domain.errors import InvalidInputError, TransientError
from qaes.domain.policy import ACTION_TYPE_PATTERN, DEFAULT_RULES
from qaes.domain.policy.actions import TASK_TYPES
from qaes.domain.policy_events import EVERY_ACTION
from qaes.domain.text import is_blank
from qubic.policy.suspending import Status, Suspended, Suspending

Operator = Annotated[Caller, Depends(require("operator", deciding=True))]


class SuspendedAction(BaseModel):
    """An action, or `*` for every action, and its suspension."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    action: str
    status: Status = Field(description="`active`: not suspended; `resume_requested`: still suspended")
    suspended_by: str | None
    suspended_at: str | None
    reason: str | None = Field(description="reason of the suspension")
    resume_requested_by: str | None
    resume_requested_at: str | None = Field(description="a request counts for one day")

    @classmethod
    def of(cls, found: Suspended) -> Self:
        """Return the representation of a stored suspension."""
        stored = found.suspension
        return cls(
            action=found.name,
            status=found.status,
            suspended_by=stored.by if stored else None,
            suspended_at=stored.at if stored else None,
            reason=stored.reason if stored else None,
            resume_requested_by=stored.resume_by if stored else None,
            resume_requested_at=stored.resume_at if stored else None,
        )


class SuspensionAnswer(SuspendedAction):
    """An action after it was suspended or resumed."""

    network: str


ActionName = Annotated[
    str,
    Field(pattern=rf"^\*$|{ACTION_TYPE_PATTERN}", description="the name of an action's rule, or `*` for every action"),
]


class SuspendRequest(BaseModel):
    """The action to suspend, and the reason."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    action: ActionName
    reason: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=500)]

    @field_validator("reason")
    @classmethod
    def _shows_something(cls, reason: str) -> str:
        if is_blank(reason):
            raise ValueError("has no visible character")
        return reason


class ResumeRequest(BaseModel):
    """The suspended action to resume."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    action: ActionName


def suspending() -> Suspending:
    """Create the store of suspensions."""
    from qubic import wiring

    return wiring.suspending()


def suspend_action(body: SuspendRequest, caller: Operator) -> SuspensionAnswer:
    """Suspend an action, or every action (`*`), at once. Operators only; one is enough.

    After the response, no step of the action starts: no intent is recorded, and no transfer is signed. A step that has
    not started ends as `denied`, with the code `suspended`. An effect in flight continues, and its outcome is recorded.
    A repetition changes nothing, but ends a request to resume.
    """
    store = suspending()
    _check_known(store, body.action)
    return _suspension_answer(store, store.suspend(body.action, subject=caller.subject, reason=body.reason))


def resume_action(body: ResumeRequest, caller: Operator) -> SuspensionAnswer:
    """Resume a suspended action. Operators only; two are needed.

    The first call requests it (`resume_requested`), and another operator's call within one day completes it
    (`active`). The operator who suspended the action can be one of the two. A repetition by the same operator changes
    nothing. To reject a request, suspend the action again. `*` and an action's name are resumed separately.
    """
    store = suspending()
    _check_known(store, body.action)
    return _suspension_answer(store, store.resume(body.action, subject=caller.subject, four_eyes=caller.four_eyes))


def _suspension_answer(store: Suspending, found: Suspended) -> SuspensionAnswer:
    return SuspensionAnswer(network=store.network, **dict(SuspendedAction.of(found)))


def _check_known(store: Suspending, name: str) -> None:
    """Check that the name is an action's, if the policy can be read: an emergency must not wait for the ledger.

    Raises InvalidInputError for a name that is neither built in, nor in the policy in force, nor suspended.
    """
    if name in TASK_TYPES:
        raise InvalidInputError(f"is a type of task, whose action is `{TASK_TYPES[name]}`", field="action")
    if name == EVERY_ACTION or name in DEFAULT_RULES:
        return
    from qubic import wiring

    try:
        known = wiring.policies().in_force().rules
    except TransientError:
        return
    if name not in known and all(each.name != name for each in store.suspended()):
        text = "the policy in force has no rule with this name, so it already denies the action"
        raise InvalidInputError(f"{text}: `GET /policy` has the names", field="action")


def add_suspension_routes(app: FastAPI) -> None:
    """Add these routes to the service's application."""
    app.post("/policy/suspend")(suspend_action)
    app.post("/policy/resume")(resume_action)
