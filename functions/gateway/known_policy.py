"""The gateway's copy of the policy in force, to reject requests at once that are invalid or can never be approved.

The policy is read through the ledger and cached for a moment, so a request may be checked by an earlier policy. The
planner decides by the policy in force, with the same texts.
"""

from __future__ import annotations

import time

from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.logs import logger
from qaes.domain import planning
from qaes.domain.errors import InvalidInputError, QaesError
from qaes.domain.models import Task
from qaes.domain.policy import Policy
from qaes.domain.requests import check_destination
from qaes.domain.ruling import TOO_FEW, refusal_by_people, rule

KEPT_SECONDS = 30

_known: list[tuple[float, Policy]] = []
"""The cached policy, and the end of its use."""


def policy_in_force() -> Policy | None:
    """Return the policy in force, as it was at most KEPT_SECONDS ago; None if the ledger does not return it."""
    if _known and time.monotonic() < _known[0][0]:
        return _known[0][1]
    try:
        policy = LedgerClient().policy()
    except QaesError as error:
        logger().warning("policy not read", extra={"error": type(error).__name__})
        return None  # the planner reads it again, and decides
    _known[:] = [(time.monotonic() + KEPT_SECONDS, policy)]
    return policy


def forget() -> None:
    """Forget the policy, so that the next request reads it."""
    _known.clear()


def check_request(policy: Policy, task: Task) -> None:
    """Check a task before it starts: its parameters, its destination, and that enough people can approve it.

    A task that the policy denies is started nevertheless, and ends as `denied`. Raises InvalidInputError.
    """
    if task.task_type in policy.actions:
        from qaes.domain.policy.schemas import check_parameters  # it takes a while to import

        check_parameters(policy, task.task_type, task.parameters)
    check_destination(policy, planning.action_type(task.task_type), task.parameters)
    if refusal := refusal_by_people(rule(task, policy, policy).tiers, policy.policy_id):
        raise InvalidInputError(refusal.removeprefix(f"{TOO_FEW}: "), field="task_type", code=TOO_FEW)
