"""People's decisions about a task, which only the gateway records: request, approvals, retries, cancellation.

The engine's items (TASK, APPROVAL) have copies of them, which other roles can write. Code that acts on a task reads it
through `of_task` and `of_approvals`, which use only the engine's own values of these items.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from qaes.domain.models import Approval, ApprovalStatus, Decision, Event, Model, Task

_REQUEST = ("task_id", "task_type", "description", "parameters", "requester", "agent")


class Decided(Model):
    """Placeholder in the outbox for a person's event: the decision with the same number is its body."""

    timestamp: str


def is_decision(event: Event) -> bool:
    """Return whether the event is a person's, which only the gateway can record."""
    if event.kind == "task_ended":
        return event.status == "cancelled"
    return event.kind in {"task_started", "approval_decided", "task_retried"}


@dataclass(frozen=True)
class Decisions:
    """A task's decisions by the numbers of their events, and the salt of the task's hashes."""

    salt: str
    events: Mapping[int, Event]

    @cached_property
    def request(self) -> dict[str, Any]:
        """The request as the gateway accepted it."""
        request: dict[str, Any] = json.loads(self.events[1].input)
        return request

    @property
    def retriers(self) -> tuple[str, ...]:
        """All people who retried the task, in any run."""
        return tuple(dict.fromkeys(event.actor for event in self._of_kind("task_retried").values()))

    @property
    def run(self) -> int:
        """The number of the task's execution."""
        return 1 + len(self._of_kind("task_retried"))

    def of_task(self, task: Task) -> Task:
        """Return the task with all decided values from the decisions instead of its item."""
        fields = {name: self.request.get(name) for name in _REQUEST}
        fields |= {"salt": self.salt, "run": self.run, "retriers": self.retriers}
        if self._of_kind("task_ended"):
            fields["status"] = "cancelled"
        return task.model_copy(update=fields)

    def of_approvals(self, approvals: Sequence[Approval]) -> list[Approval]:
        """Return the approvals with their decisions, and the status that follows from them."""
        return [self._of_approval(approval) for approval in approvals]

    def _of_approval(self, approval: Approval) -> Approval:
        found = [event for number, event in self._of_kind("approval_decided").items() if self._is_on(approval, number)]
        said = [json.loads(event.output) for event in found]
        decisions = tuple(
            Decision(
                subject=event.actor,
                approved=answer["approved"],
                reason=answer["reason"],
                decided_at=answer["decided_at"],
            )
            for event, answer in zip(found, said, strict=True)
        )
        required = max([approval.required, *(json.loads(event.input)["required"] for event in found)])
        approval = approval.model_copy(update={"decisions": decisions, "required": required})
        status: ApprovalStatus = "pending" if approval.status in {"approved", "rejected"} else approval.status
        if any(not decision.approved for decision in decisions):
            status = "rejected"
        elif decisions and approval.is_met:
            status = "approved"
        return approval.model_copy(update={"status": status})

    def _is_on(self, approval: Approval, number: int) -> bool:
        """Return whether the decision with this number belongs to this approval: step, round, run and shown values."""
        event = self.events[number]
        asked = json.loads(event.input)
        run = 1 + sum(retried < number for retried in self._of_kind("task_retried"))
        shown = ("round", "plan_hash", "step_hash", "policy_id", "expires_at")
        same = all(asked[name] == getattr(approval, name) for name in shown)
        return same and (event.step_index, run) == (approval.step_index, approval.run)

    def _of_kind(self, kind: str) -> dict[int, Event]:
        return {number: event for number, event in sorted(self.events.items()) if event.kind == kind}
