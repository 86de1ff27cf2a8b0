"""Permitted writes of each function's role, table by table: the list for the template and the deployed roles.

A right is a write of DynamoDB, `put`, `update` or `delete`. Behind a colon stands the only partition, or the pattern of
partitions, in which the role has the right.
"""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from tests.support import template

Rights = dict[str, frozenset[str]]

ACTIONS = {
    "dynamodb:PutItem": "put",
    "dynamodb:UpdateItem": "update",
    "dynamodb:DeleteItem": "delete",
    "dynamodb:BatchWriteItem": "batch",
    "dynamodb:PartiQLInsert": "put by PartiQL",
    "dynamodb:PartiQLUpdate": "update by PartiQL",
    "dynamodb:PartiQLDelete": "delete by PartiQL",
}
"""The writes of DynamoDB; a transaction needs the right of each write in it."""

PUT, UPDATE, DELETE = (frozenset({right}) for right in ("put", "update", "delete"))
ENGINE = {"TasksTable": PUT | UPDATE}
"""Puts TASK, EVENT, PLAN, STEP and APPROVAL; updates the count of open tasks, and consumes approvals."""
SIGNER = {"LedgerTable": PUT | UPDATE, "ChainTable": PUT | UPDATE, "PolicyTable": frozenset({"put:EVENTS#*"})}

WRITES: dict[str, Rights] = {
    "AuthorizerFunction": {},
    "GatewayFunction": ENGINE | {"DecisionsTable": PUT},
    "PlannerApiFunction": {"PreviewsTable": PUT},
    "PlanTaskFunction": ENGINE,
    "AgentRuntimeApiFunction": {},
    "AwaitApprovalFunction": ENGINE | {"CallbacksTable": PUT},
    "EndTaskFunction": ENGINE,
    "ReconcilerFunction": ENGINE | {"CallbacksTable": DELETE},
    "RunStepFunction": ENGINE | {"LimitsTable": PUT},
    "ExecuteActionFunction": ENGINE | {"CallbacksTable": PUT | DELETE, "LimitsTable": PUT},
    "WorkerApiFunction": {},
    "RecordEventsFunction": {"AuditEntriesTable": PUT},
    "SequencerFunction": {"AuditLogTable": PUT | UPDATE},
    "AnchorFunction": {"AuditAnchorsTable": PUT},
    "AuditSweeperFunction": {"AuditLogTable": frozenset({"put:SWEEP"})},
    "AuditApiFunction": {},
    "PublicLogFunction": {},
    "LedgerFunction": SIGNER,
    "LedgerTransferFunction": SIGNER,
    "LedgerAnchorFunction": SIGNER,
    "LedgerRecordFunction": SIGNER,
    "TransactionWorkerFunction": SIGNER,
    "QubicApiFunction": {
        "LedgerTable": frozenset({"put:POLICY#*", "update:POLICY#*"}),
        "PolicyTable": PUT,
        "ChainTable": PUT | UPDATE,  # the mock network's own API
    },
}

ITEMS: dict[str, tuple[tuple[str, str], ...]] = {
    "TasksTable": (
        ("task_x", "TASK"),
        ("task_x", "EVENT#000001"),
        ("task_x", "STEP#002"),
        ("task_x", "APPROVAL#002#01"),
        ("plan_x", "PLAN"),
        ("IDEMPOTENCY#x", "IDEMPOTENCY"),
        ("REQUESTER#x", "OPEN"),
    ),
    "DecisionsTable": (("task_x", "DECISION#000001"),),
    "CallbacksTable": (("task_x", "APPROVAL#002"), ("task_x", "ACTION#002")),
    "PreviewsTable": (("plan_x", "PLAN"),),
    "LimitsTable": (("LIMIT#x", "LIMIT"), ("task_x", "RESERVED#002")),
    "AuditEntriesTable": (("task_x", "ENTRY#000001"),),
    "AuditLogTable": (
        ("LOG", "HEAD"),
        ("LOG", "BATCH#000000000000"),
        ("TILE#00#000000000000", "TILE"),
        ("task_x", "INDEX#000001"),
        ("policy", "INDEX#000001"),
        ("SWEEP", "SWEPT"),
    ),
    "AuditAnchorsTable": (("ANCHOR", "ANCHORING"), ("ANCHOR", "SIZE#000000000001")),
    "LedgerTable": (
        ("SUBMISSION#transfer:x", "SUBMISSION"),
        ("ATTEMPT#x", "ATTEMPT"),
        ("SOURCE#x", "SOURCE"),
        ("LIMIT#x", "LIMIT"),
        ("SPENT#x", "SPENT"),
        ("POLICY#x", "HEAD"),
        ("POLICY#x", "VERSION#000001"),
    ),
    "PolicyTable": (("SUSPENSIONS#0", "SUSPENSIONS"), ("EVENTS#policy", "EVENT#000001")),
    "ChainTable": (("TX#x", "TX"),),
}
"""A key of each kind of item, table by table."""


def may(function: str, right: str, table: str, partition: str) -> bool:
    """Return whether the list lets the function's role make this write."""
    granted = [each.partition(":") for each in WRITES[function].get(table, ())]
    return any(name == right and (not only or fnmatchcase(partition, only)) for name, _, only in granted)


def is_partial(function: str, right: str, table: str) -> bool:
    """Return whether the right is to some partitions alone, which the local AWS does not evaluate."""
    return any(each.startswith(f"{right}:") for each in WRITES[function].get(table, ()))


def rights_of(function: str) -> Rights:
    """Return the writes that the template permits to a function's role, table by table."""
    found: dict[str, set[str]] = {}
    for statement in _statements(function):
        if statement["Effect"] != "Allow":
            continue
        for action in _list(statement["Action"]):
            right = ACTIONS.get(action)
            if right is None and "*" in action and action.startswith(("*", "dynamodb:")):
                right = action
            if right is None:
                continue
            for table in _tables(statement["Resource"]):
                found.setdefault(table, set()).update(f"{right}{where}" for where in _partitions(statement))
    return {table: frozenset(rights) for table, rights in found.items()}


def _statements(function: str) -> Iterator[dict[str, Any]]:
    for policy in template.template()["Resources"][function]["Properties"].get("Policies", []):
        if isinstance(policy, str) or "Statement" not in policy.get("Fn::If", [None, policy])[1]:
            raise AssertionError(f"{function}: {policy} grants rights that are not written out")
        for statement in policy.get("Fn::If", [None, policy])[1]["Statement"]:
            yield statement.get("Fn::If", [None, statement])[1]


def _tables(resources: Any) -> list[str]:
    tables = []
    for resource in _list(resources):
        arn = template.resolve(resource.get("Fn::If", [None, resource])[1] if isinstance(resource, dict) else resource)
        tables.append("*" if arn == "*" else arn.rpartition(":table/")[2] if ":table/" in arn else arn)
    return tables


def _partitions(statement: dict[str, Any]) -> list[str]:
    keys = [
        key
        for condition in statement.get("Condition", {}).values()
        for key in _list(condition.get("dynamodb:LeadingKeys", []))
    ]
    return [f":{key}" for key in keys] or [""]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
