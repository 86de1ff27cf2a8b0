"""The events of the policy: each change of the policy, with the state of the policy after it.

The writer of a change reads the newest event, builds the next one from it, and writes it in the transaction of the
change, under the condition that no event has its number (`qaes.adapters.policy_events`). So the events are numbered
without gaps, and each state follows from the state before. The audit's recorder turns each event into the entry with
the same number in the stream `policy` of the log (docs/audit.md).
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from typing import Any, Final, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from qaes.domain.canonical import canonical_json
from qaes.domain.errors import ConflictError, InvalidInputError

STREAM: Final = "policy"
"""The name of the policy's stream in the log."""
LEDGER: Final = "ledger"
"""The actor of a change that no person made: a version came into force, or was rejected because it was altered."""
EVERY_ACTION: Final = "*"
"""The name whose suspension suspends every action."""

PolicyEventKind = Literal[
    "policy_proposed",
    "policy_approved",
    "policy_rejected",
    "policy_in_force",
    "action_suspended",
    "resume_requested",
    "action_resumed",
]
POLICY_EVENT_KINDS: frozenset[str] = frozenset(get_args(PolicyEventKind))
SUSPENSION_KINDS: frozenset[str] = frozenset({"action_suspended", "resume_requested", "action_resumed"})
"""Kinds of the events that are about an action's name; the others are about a version of the policy."""
STATUSES: Mapping[PolicyEventKind, str] = {
    "policy_proposed": "proposed",
    "policy_approved": "approved",
    "policy_rejected": "rejected",
    "policy_in_force": "in_force",
    "action_suspended": "suspended",
    "resume_requested": "requested",
    "action_resumed": "resumed",
}


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Suspension(_Frozen):
    """One name's suspension: the number of the event that began it, and the operator who asked to end it, if any."""

    event: int
    resume_requested_by: str | None = None


class PolicyState(_Frozen):
    """The state after an event: the version in force (None before the first), and the suspended names."""

    in_force: str | None = None
    suspended: dict[str, Suspension] = {}


class PolicyEvent(_Frozen):
    """A change of the policy.

    Attributes
    ----------
    number
        1, 2, 3 ... in the stream.
    actor
        The person's subject, or LEDGER.
    policy_id
        The version that the change is about; empty if it is about a suspension.
    salt
        Random, for the hashes over `input` and `output`: a bundle discloses it with the texts, and only for this event.
    input
        Canonical JSON of the request: `policy_id` or `name`, and further members.
    output
        Canonical JSON of the state after the event.
    """

    number: int = Field(ge=1)
    kind: PolicyEventKind
    actor: str = Field(min_length=1)
    status: str
    timestamp: str
    policy_id: str
    salt: str = Field(pattern=r"^[0-9a-f]{32}$", repr=False)
    input: str
    output: str

    @property
    def state(self) -> PolicyState:
        """The state after the event."""
        return PolicyState.model_validate_json(self.output)


def next_event(
    before: PolicyEvent | None,
    kind: PolicyEventKind,
    *,
    actor: str,
    at: str,
    policy_id: str = "",
    name: str = "",
    in_force: str | None = None,
    details: Mapping[str, Any] | None = None,
) -> PolicyEvent:
    """Build the event that follows `before`.

    Parameters
    ----------
    before
        The newest event, None before the first.
    actor
        The person's subject; LEDGER if no person made the change.
    policy_id, name
        The version that a `policy_...` event is about; the action or EVERY_ACTION that any other event is about.
    in_force
        Only for the first event: the version that was in force before it, or None.
    details
        Further members of the input, such as `reason`, or `txid` and `tick` of the transaction that anchors a version.

    Raises
    ------
    InvalidInputError
        The kind needs the other one of `policy_id` and `name`.
    ConflictError
        A resume is requested, or granted, for a name that is not suspended, or without a request to resume it.
    """
    about_action = kind in SUSPENSION_KINDS
    if bool(name) != about_action or bool(policy_id) == about_action:
        raise InvalidInputError(f"`{kind}` needs {'a name' if about_action else 'a policy_id'}, and nothing else")
    number = before.number + 1 if before else 1
    subject = {"name": name} if about_action else {"policy_id": policy_id}
    state = _after(before.state if before else PolicyState(in_force=in_force), kind, actor, number, policy_id or name)
    return PolicyEvent(
        number=number,
        kind=kind,
        actor=actor,
        status=STATUSES[kind],
        timestamp=at,
        policy_id=policy_id,
        salt=secrets.token_hex(16),
        input=canonical_json({**(details or {}), **subject}),
        output=canonical_json(state.model_dump(mode="json")),
    )


def _after(state: PolicyState, kind: PolicyEventKind, actor: str, number: int, about: str) -> PolicyState:
    if kind == "policy_in_force":
        return state.model_copy(update={"in_force": about})
    if kind not in SUSPENSION_KINDS:
        return state
    suspended = dict(state.suspended)
    if kind == "action_suspended":
        # A pending request to resume ends: it was about the suspension before.
        suspended[about] = Suspension(event=number)
    elif about not in suspended:
        raise ConflictError(f"`{about}` is not suspended")
    elif kind == "resume_requested":
        suspended[about] = suspended[about].model_copy(update={"resume_requested_by": actor})
    elif suspended.pop(about).resume_requested_by is None:
        raise ConflictError(f"no operator has requested to resume `{about}`")
    return state.model_copy(update={"suspended": suspended})


def follows(before: PolicyEvent | None, event: PolicyEvent) -> bool:
    """Return whether the number and the state of `event` follow from the event before it."""
    # The version in force before the first event is on record only in that event.
    state = PolicyState(in_force=event.state.in_force) if before is None else before.state
    try:
        about = json.loads(event.input)["name" if event.kind in SUSPENSION_KINDS else "policy_id"]
        expected = _after(state, event.kind, event.actor, event.number, about)
    except (ConflictError, ValueError, KeyError, TypeError):
        return False
    return event.number == (before.number + 1 if before else 1) and event.state == expected
