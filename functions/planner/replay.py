"""Recorded requests, decided again by another version of the policy: `POST /policy/versions/{version}/replay`."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from itertools import islice
from typing import Annotated, Any, Literal

from fastapi import Depends, FastAPI, Path
from pydantic import BaseModel, ConfigDict, Field

from qaes.adapters import dynamo, settings
from qaes.adapters.decisions import DecisionsTable
from qaes.adapters.http import Caller, require
from qaes.adapters.ledger_client import LedgerClient
from qaes.domain import planning
from qaes.domain.ids import TASK_ID_PATTERN, first_task_id, now, timestamp
from qaes.domain.policy import ActionRequest, Decision, Policy
from qaes.domain.policy.replaying import CHANGES, Change, classify, judge

MAX_DAYS = 90
MAX_CHANGES = 500
MOST_REQUESTS = 10_000
"""Requests that one call decides again."""
TIME_SECONDS = 15.0
"""No batch begins later than this after the first. The cursor leads to the rest."""
NOTE = (
    "Each request is decided as if it were the only one: the usage of the limits' windows is ignored. So are the "
    "balances, suspensions and decisions of people."
)


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ReplayRequest(_Model):
    """The recorded requests to decide again: those of the last days, newest first."""

    days: int = Field(ge=1, le=MAX_DAYS, strict=True)
    limit: int = Field(100, ge=1, le=MAX_CHANGES, strict=True, description="maximum number of changes in the response")
    cursor: str | None = Field(None, pattern=TASK_ID_PATTERN, description="`next_cursor` of the previous response")


class ReplayedDecision(_Model):
    """A version's decision on the request."""

    allowed: bool
    code: str
    reason: str
    tier: int | None
    approvals: int
    approvers: str | None

    @classmethod
    def of(cls, decision: Decision) -> ReplayedDecision:
        """Return the representation of a decision."""
        return cls(
            allowed=decision.allowed,
            code=decision.code,
            reason=decision.reason,
            tier=decision.tier,
            approvals=decision.approvals,
            approvers=decision.approvers,
        )


class ReplayedRequest(_Model):
    """A recorded request that the two versions decide differently."""

    task_id: str
    task_type: str
    requester: str
    agent: str | None
    created_at: str
    change: Change
    before: ReplayedDecision
    after: ReplayedDecision


class ReplayAnswer(_Model):
    """The recorded requests, decided again by a version of the policy and by the one in force.

    The counts are of the requests that this call decided: add up the answers of all pages.
    """

    policy_id: str = Field(description="the version that decided again")
    compared_with: str = Field(description="the version in force; if it changes between two pages, begin again")
    since: str
    requests: int = Field(description="number of recorded requests that this call decided again")
    counts: dict[Change, int]
    changes: list[ReplayedRequest] = Field(description="newest first")
    next_cursor: str | None = Field(description="cursor to older requests; null on the last page")
    ignores_windows: Literal[True] = True
    note: str = NOTE


def replay_version(
    version: Annotated[int, Path(ge=1, lt=10**9)],
    body: ReplayRequest,
    _caller: Annotated[Caller, Depends(require("auditor"))],
) -> ReplayAnswer:
    """Decide the recorded requests of the last days again by a version of the policy. Auditors and operators only.

    The answer compares it with the version in force, and ignores the usage of the limits' windows. A call decides at
    most 10,000 requests and takes at most some 15 seconds; `next_cursor` leads to the others.
    """
    ledger = LedgerClient()
    _, after = ledger.policy_version(version)
    before = ledger.policy()
    since = now() - timedelta(days=body.days)
    counts, changes, cursor = _replay(before, after, first_task_id(since), body)
    return ReplayAnswer(
        policy_id=after.policy_id,
        compared_with=before.policy_id,
        since=timestamp(since),
        requests=sum(counts.values()),
        counts=counts,
        changes=changes,
        next_cursor=cursor,
    )


def add_replay_route(app: FastAPI) -> None:
    """Add this route to the service's application."""
    app.post("/policy/versions/{version}/replay")(replay_version)


def _replay(
    before: Policy, after: Policy, first: str, body: ReplayRequest
) -> tuple[dict[Change, int], list[ReplayedRequest], str | None]:
    """Decide requests again until they, the time or the room for changes end; the cursor leads on."""
    counts: dict[Change, int] = dict.fromkeys(CHANGES, 0)
    changes: list[ReplayedRequest] = []
    decided, end = 0, time.monotonic() + TIME_SECONDS
    left, table = _ids(first, body.cursor), DecisionsTable()
    while ids := list(islice(left, dynamo.BATCH_GET)):
        recorded = table.requests(ids)
        for task_id in ids:
            decided += 1
            if task_id in recorded:
                at, requested = recorded[task_id]
                old, new = (judge(policy, _request(requested)) for policy in (before, after))
                change = classify(old, new)
                counts[change] += 1
                if change != "unchanged":
                    changes.append(_replayed(requested, at, change, old, new))
            if len(changes) == body.limit or decided == MOST_REQUESTS:
                return counts, changes, task_id
        if time.monotonic() > end:
            return counts, changes, ids[-1]
    return counts, changes, None


def _request(requested: dict[str, Any]) -> ActionRequest:
    return ActionRequest(
        planning.action_type(requested["task_type"]),
        requested["parameters"],
        requested["requester"],
        requested.get("agent"),
    )


def _replayed(requested: dict[str, Any], at: str, change: Change, before: Decision, after: Decision) -> ReplayedRequest:
    return ReplayedRequest(
        task_id=requested["task_id"],
        task_type=requested["task_type"],
        requester=requested["requester"],
        agent=requested.get("agent"),
        created_at=at,
        change=change,
        before=ReplayedDecision.of(before),
        after=ReplayedDecision.of(after),
    )


def _ids(first: str, cursor: str | None) -> Iterator[str]:
    """Read the ids of tasks from the newest to `first`, those before the cursor."""
    last = "task_~" if cursor is None else cursor
    if last < first:
        return
    found = dynamo.items(
        TableName=settings.text("TASKS_TABLE"),
        IndexName="by_kind",
        KeyConditionExpression="sk = :kind AND task_id BETWEEN :first AND :last",
        ExpressionAttributeValues={":kind": {"S": "TASK"}, ":first": {"S": first}, ":last": {"S": last}},
        ScanIndexForward=False,
    )
    yield from (item["pk"]["S"] for item in found if item["pk"]["S"] != cursor)
