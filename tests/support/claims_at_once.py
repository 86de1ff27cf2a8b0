"""A process that claims the actions of tasks, for tests of the limits that they share.

`python -m tests.support.claims_at_once FIRST COUNT THREADS` starts that many tasks, claims the action of each, and
prints how many were claimed, refused by the limit, and neither.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

from qaes.adapters.intents import Intent
from qaes.adapters.task_repository import TaskStore
from qaes.domain import planning
from qaes.domain.errors import StepDeniedError, TransientError
from qaes.domain.ids import new_plan_id, new_task_id, now, timestamp
from qaes.domain.models import Plan, Task
from qaes.domain.policy import Policy
from qaes.domain.ruling import rule
from tests.support.policies import of_limits

AMOUNT, MAXIMUM = 10, 1000
LIMIT = {"window_seconds": 86_400, "max_amount": MAXIMUM, "per": "action", "over": "deny"}
POLICY = of_limits("transaction", LIMIT)


def planned(store: TaskStore, requester: str, policy: Policy = POLICY) -> tuple[Task, Plan]:
    """Start and plan a task that records an instruction about an amount."""
    moment = timestamp(now())
    task, _ = store.start_task(
        Task(
            task_id=new_task_id(),
            status="pending",
            task_type="transaction",
            description="a test",
            parameters={"amount": AMOUNT},
            requester=requester,
            created_at=moment,
            updated_at=moment,
        )
    )
    plan = planning.build_plan(
        plan_id=new_plan_id(),
        task_id=task.task_id,
        created_at=moment,
        task_type=task.task_type,
        description=task.description,
        parameters=task.parameters,
        analysis=planning.analyze(task.task_type, policy),
        policy=rule(task, policy, policy).pins,
    )
    return store.plan_task(task, plan)


def claim(store: TaskStore, task: Task, plan: Plan) -> str:
    """Claim the action with the state machine's retries of transient errors."""
    step_index, ruling = len(plan.steps) - 1, rule(task, POLICY, POLICY)
    intent = Intent(task, step_index, plan.steps[step_index], ruling)
    for _ in range(20):
        try:
            store.claim_step(task, plan, step_index, None, ruling.recorded, intent=intent)
        except StepDeniedError as error:
            return error.message.partition(":")[0]
        except TransientError:
            continue
        return "claimed"
    return "busy"


if __name__ == "__main__":
    first, count, threads = map(int, sys.argv[1:])
    store = TaskStore()
    tasks = [planned(store, f"requester {number}") for number in range(first, first + count)]
    with ThreadPoolExecutor(threads) as pool:
        ended = Counter(pool.map(lambda each: claim(store, *each), tasks))
    sys.stdout.write(f"{json.dumps(ended)}\n")
