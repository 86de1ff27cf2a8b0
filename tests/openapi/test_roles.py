"""Every route, by every role, on one's own and on another's task, from the API's document."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qaes.adapters.http import ROLES
from tests.openapi.conftest import OPERATIONS, Operation
from tests.support.api import Answer

SECURED = [operation for operation in OPERATIONS if operation.roles is not None]
ABOUT_A_TASK = {operation.id for operation in SECURED if "{task_id}" in operation.path or "{plan_id}" in operation.path}
SEES_ALL = {"approver", "auditor", "operator"}


def expected(operation: Operation, role: str, *, own: bool) -> int:
    """The rights by contract; the tasks are alice's."""
    if role not in (operation.roles or ()):
        return 403
    if operation.id == "decide" and own:
        return 403  # four eyes
    if operation.id in ABOUT_A_TASK and not own and role not in SEES_ALL:
        return 404
    return operation.answer[0]


def test_table_of_the_contract() -> None:
    """By hand, so that a change of a route's rule is noticed."""
    everybody = {"requester", "approver", "auditor", "operator"}
    requesters, approvers, operators = {"requester", "operator"}, {"approver", "operator"}, {"operator"}
    table = {
        "start_task": requesters, "get_task": everybody, "get_tasks": everybody, "decide": approvers,
        "cancel": requesters, "retry": requesters, "create_plan": requesters, "get_plan": everybody,
        "get_status": everybody, "get_audit": everybody, "verify": everybody, "get_policy": everybody,
        "get_bundle": {"requester", "auditor", "operator"}, "get_log_checkpoint": everybody,
        "get_log_consistency": everybody, "get_signed_checkpoint": everybody, "get_tile": everybody,
        "get_tile_2": everybody, "get_entries": {"auditor", "operator"}, "get_entries_2": {"auditor", "operator"},
        "write": operators, "verify_on_ledger": everybody, "get_transaction": everybody,
        "get_policy_versions": everybody, "get_policy_version": everybody, "propose_policy": operators,
        "approve_policy": operators, "reject_policy": operators,
        "suspend_action": operators, "resume_action": operators,
        "explain_decision": everybody, "get_actions": everybody, "replay_version": {"auditor", "operator"},
        "rpc_tick_info": everybody, "rpc_broadcast_transaction": operators, "rpc_balance": everybody,
        "rpc_last_processed_tick": everybody, "rpc_transaction": everybody, "rpc_transactions": everybody,
        "get_mock_faults": operators, "put_mock_faults": operators,
    }  # fmt: skip
    assert {operation.id: set(operation.roles or ()) for operation in SECURED} == table
    assert {operation.id for operation in OPERATIONS} - set(table) == {"get_about"} | {
        f"{service}_health" for service in ("gateway", "planner", "agent_runtime", "worker", "audit", "qubic")
    }


@pytest.mark.parametrize("own", [True, False], ids=["own", "other's"])
@pytest.mark.parametrize("operation", SECURED, ids=lambda operation: operation.id)
def test_operations_check_their_roles(operation: Operation, own: bool, ask: Callable[..., Answer]) -> None:
    for role in ROLES:
        answer = ask(operation, subject="alice" if own else "mallory", roles=role)
        assert answer.status == expected(operation, role, own=own), (role, answer)


AN_AGENT_MAY_CHANGE = {"start_task", "create_plan", "cancel", "retry"}
"""Every other operation that changes anything is for people: `require(…, deciding=True)`."""
READS_BY_POST = {"rpc_transaction", "rpc_transactions", "explain_decision", "replay_version"}


def test_changes_denied_to_agents_are_for_people() -> None:
    changing = {operation.id for operation in SECURED if operation.method != "GET"} - READS_BY_POST
    assert {operation.id for operation in SECURED if operation.deciding} == changing - AN_AGENT_MAY_CHANGE


@pytest.mark.parametrize("operation", SECURED, ids=lambda operation: operation.id)
def test_agent_with_every_role_gets_an_agents_rights(operation: Operation, ask: Callable[..., Answer]) -> None:
    answer = ask(operation, subject="alice", roles=" ".join(ROLES), agent="crm-agent")
    if operation.deciding:
        assert answer.status == 403 and answer.body["detail"].startswith("only a person can do this")
    else:
        assert answer.status == expected(operation, "requester", own=True), answer


def test_no_role_set_allows_decision_on_own_task(ask: Callable[..., Answer]) -> None:
    [decide] = [operation for operation in OPERATIONS if operation.id == "decide"]
    answer = ask(decide, subject="alice", roles=" ".join(ROLES))
    assert answer.status == 403
