"""Cost and time of the replay of recorded requests: `make bench ONLY=replay`.

The requests are on moto in the same process, so most of the processor's time is moto's. The time of the decisions alone
is therefore measured beside it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from benchmarks.units import Units, metered
from qaes.adapters import clients
from qaes.adapters.logs import logger
from qaes.domain.ids import now
from qaes.domain.policy import DEFAULT_RULES, ActionRequest, Policy, PolicyDocumentV2, policy_of
from qaes.domain.policy.replaying import classify, judge
from tests.handlers.test_policy_format_2 import propose
from tests.support.api import CAROL, Api
from tests.support.cloud import cloud
from tests.support.recorded import record, transfer

PROPOSAL = {
    "groups": {},
    "rules": {
        "transfer_funds": {"allowed": True, "risk_level": "high", "tiers": [{"max_amount": 300, "approvals": 1}]},
    },
}
"""Version 1 without amounts above 300 QU."""
REMOVED = ["monitoring", "transaction"]
REQUESTS = 10_000
ONE_IN = 25
LIMIT = 500
MOST_SECONDS = 25
"""Target of the longest call: API Gateway waits for 29 seconds."""


@dataclass
class Replayed:
    """The replay of all recorded requests, over all of its calls."""

    requests: int
    calls: int
    longest_seconds: float
    cpu_seconds: float
    deciding_seconds: float
    read_units: float


def measure() -> Replayed:
    """Record the requests, and replay a proposal until there is no next page."""
    logger().setLevel("ERROR")
    with cloud(state_machine=False) as aws:
        clients.client("dynamodb")
        propose(Api(aws, "QubicApiFunction"), PROPOSAL, REMOVED)
        # Few requests are decided differently: if many were, the proposal would be wrong.
        at = now() - timedelta(days=1)
        record([transfer(number, 150 if number % ONE_IN else 350, at) for number in range(REQUESTS)])
        api, units = Api(aws, "PlannerApiFunction"), Units()
        requests, times, cursor, began = 0, [], None, time.process_time()
        with metered(units):
            while not times or cursor is not None:
                body: dict[str, Any] = {"days": 7, "limit": LIMIT, "cursor": cursor}
                event = api.event("POST", "/policy/versions/2/replay", body, **CAROL)
                started = time.perf_counter()
                answer = aws.invoke(api.function, event)
                times.append(time.perf_counter() - started)
                page = api.checked(answer).body
                requests, cursor = requests + page["requests"], page["next_cursor"]
        used = time.process_time() - began
    return Replayed(requests, len(times), max(times), used, _deciding(), units.read)


def _deciding() -> float:
    """Return the processor's time of the decisions alone: each request by two versions."""
    before = Policy(policy_id=f"policy-v1-{'0' * 64}", version=1, rules=dict(DEFAULT_RULES))
    document = PolicyDocumentV2.write(PROPOSAL, version=2, proposed_by="olivia", based_on=before.policy_id)
    after = policy_of(document.text())
    tasks = [transfer(number, 150 if number % ONE_IN else 350, now()) for number in range(REQUESTS)]
    began = time.process_time()
    for task in tasks:
        request = ActionRequest("transfer_funds", task.parameters, task.requester)
        classify(judge(before, request), judge(after, request))
    return time.process_time() - began
