"""Tasks with fixed ids for the events under `events/`.

`python -m local.seed` writes them to the tables of the local AWS. A second run changes nothing.
"""

from __future__ import annotations

from qaes.adapters.task_repository import TaskStore
from qaes.domain import planning
from qaes.domain.errors import NotFoundError
from qaes.domain.ids import now, timestamp
from qaes.domain.models import Plan, Task
from qaes.domain.policy import Policy

NEW_TASK = "task_019ab000-0000-7000-8000-000000000001"
"""A newly started task, for the planner's states."""
PLANNED_TASK = "task_019ab000-0000-7000-8000-000000000002"
"""A transfer with a stored plan whose first step comes next, for the agents and the worker."""
PLAN = "plan_019ab000-0000-7000-8000-000000000002"
PARAMETERS = {"wallet_address": "0x1234567890abcdef", "to_address": "0xfedcba0987654321", "amount": 1}


def seed(store: TaskStore, policy: Policy) -> None:
    """Write both tasks; `policy` is the policy in force, which the plan pins."""
    for task_id in (NEW_TASK, PLANNED_TASK):
        moment = timestamp(now())
        task = Task(
            task_id=task_id,
            status="pending",
            task_type="transfer_funds",
            description="an example for the events",
            parameters=PARAMETERS,
            requester="alice",
            created_at=moment,
            updated_at=moment,
        )
        try:
            store.get_task(task_id)  # an earlier run wrote it
        except NotFoundError:
            store.start_task(task)
    store.plan_task(store.get_task(PLANNED_TASK), _plan(policy))


def _plan(policy: Policy) -> Plan:
    analysis = planning.analyze("transfer_funds", policy)
    return planning.build_plan(
        plan_id=PLAN,
        task_id=PLANNED_TASK,
        created_at=timestamp(now()),
        task_type="transfer_funds",
        description="an example for the events",
        parameters=PARAMETERS,
        analysis=analysis,
        policy=policy.decide(analysis.action_type),
    )


if __name__ == "__main__":
    from qaes.adapters.ledger_client import LedgerClient

    seed(TaskStore(), LedgerClient().policy())
    print(f"seeded {NEW_TASK} and {PLANNED_TASK}")
