"""Previews: plans that are not executed. They have their own table, so the planner's API cannot write to tasks."""

from __future__ import annotations

import time

from qaes.adapters import dynamo, settings
from qaes.adapters.task_items import plan_item
from qaes.domain.models import Plan

SECONDS_KEPT = 30 * 24 * 3600


def save(plan: Plan) -> None:
    """Store a preview for 30 days. Its id is new, so no other preview has it."""
    item = plan_item(plan) | {"expires_at_epoch": {"N": str(int(time.time()) + SECONDS_KEPT)}}
    dynamo.transact([{"Put": {"TableName": _table(), "Item": item, "ConditionExpression": "attribute_not_exists(pk)"}}])


def get(plan_id: str) -> Plan | None:
    """Read a preview."""
    item = dynamo.get(_table(), plan_id, "PLAN")
    return Plan.model_validate_json(item["data"]["S"]) if item else None


def table_answers() -> None:
    """Raise an error unless the table exists."""
    dynamo.call("describe_table", TableName=_table())


def _table() -> str:
    return settings.text("PREVIEWS_TABLE")
