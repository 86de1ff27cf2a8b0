"""Outcome of a step's transfer: from the ledger to the step's record and to the waiting execution.

Only the state ExecuteAction submits a transfer. All other callers read its outcome here, and move no money.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Any, NamedTuple

from qaes.adapters.callbacks import CallbacksTable
from qaes.adapters.executions import answer, fail
from qaes.adapters.ledger_client import CheckedTransfer, LedgerClient, Policies
from qaes.adapters.limits import LimitsTable
from qaes.adapters.task_repository import TaskStore
from qaes.domain import compliance, planning
from qaes.domain.errors import PermanentError, StepFailedError
from qaes.domain.ids import now, parse_timestamp
from qaes.domain.models import TERMINAL, Plan, Step, StepRecord, Task, WalletBalance
from qaes.domain.qubic import OPEN_STATES
from qaes.domain.ruling import Ruling, Usage
from qaes.domain.step_types import CONFIRMED_LATER
from qaes.domain.tasks.lifecycle import StepOutcome

LATE_SECONDS = 300
"""No transfer is submitted later than this after its task's end: longer than the worker and the ledger may take."""


class Settled(NamedTuple):
    """A step's current record, and the state of its transfer."""

    record: StepRecord
    in_flight: bool

    @property
    def submitted(self) -> bool:
        """Return whether the step's transfer was submitted and may move money, so it needs no new approval."""
        return self.in_flight or self.record.status == "succeeded"


def reference_of(task_id: str, step_id: str) -> str:
    """Return the ledger's reference for a step's effect."""
    return f"{task_id}#{step_id}"


def state_of(ledger: LedgerClient, task_id: str, step_id: str) -> dict[str, Any] | None:
    """Return `LedgerClient.transfer_state` of the step's transfer; None if it was never submitted."""
    try:
        return ledger.transfer_state(reference_of(task_id, step_id))
    except PermanentError as error:
        if error.code == "not_found":
            return None
        raise


class Funds(NamedTuple):
    """Balance of the wallet that pays a step, and the reason why it cannot; all empty without a transfer.

    `refusal_today` means that a limit has no room: an approved transfer may still run on another day. `used` is the
    used amount of each limit of the policy in force, by the limit's key.
    """

    balance: WalletBalance | None = None
    refusal: str | None = None
    refusal_today: str | None = None
    used: Mapping[str, int] = MappingProxyType({})


def funds_of(ledger: LedgerClient, step: Step, requester: str, agent: str | None) -> Funds:
    """Read whether the ledger would accept a transfer: its addresses, its source's key and balance, the policy.

    The compliance agent reads it before it requests an approval or allows the transfer; the planner reads it for a
    preview. If the balance cannot be read now, the function raises TransientError.
    """
    if step.type not in CONFIRMED_LATER:
        return Funds()
    try:
        return _funds(step, ledger.check_transfer(**_terms(step, requester, agent)))
    except PermanentError as error:
        return _funds(step, error)


def policies_and_funds(ledger: LedgerClient, task: Task, plan: Plan, step: Step) -> tuple[Policies, Funds]:
    """Read the policy in force and the pinned one, and the result of `funds_of` under the first, in one call."""
    names = {"action": planning.action_type(task.task_type), "pinned": plan.policy.policy_id}
    if step.type not in CONFIRMED_LATER:
        return ledger.policies(**names), Funds()
    policies, checked = ledger.policy_and_check(**names, **_terms(step, task.requester, task.agent))
    return policies, _funds(step, checked)


def usage_of(step: Step, ruling: Ruling, funds: Funds, counted: tuple[str, int] | None = None) -> Usage:
    """Return the usage of the limits of the policy in force, from the ledger for transfers, otherwise LimitsTable.

    The counts of the step `counted` (its task and index) in an earlier execution are excluded.
    """
    if step.type in CONFIRMED_LATER or not ruling.current.limits:
        return funds.used
    return LimitsTable().usage(ruling.current, counted)


def _terms(step: Step, requester: str, agent: str | None) -> dict[str, Any]:
    to, amount = step.parameters["to_address"], step.parameters["amount"]
    source = step.parameters["from_address"]
    return {"source": source, "destination": to, "amount": amount, "requester": requester, "agent": agent}


def _funds(step: Step, checked: CheckedTransfer | PermanentError) -> Funds:
    if isinstance(checked, PermanentError):
        return Funds(refusal=f"{checked.code}: {checked.message}")
    refusal = compliance.refusal_by_balance(step, checked.balance)
    return Funds(checked.balance, refusal, checked.refusal_now, checked.used)


def is_submitted(ledger: LedgerClient, task_id: str, step_id: str) -> bool:
    """Return whether the ledger has the step's transfer, confirmed or in flight: then it needs no funds any more."""
    state = state_of(ledger, task_id, step_id)
    return state is not None and state["state"] in OPEN_STATES | {"confirmed"}


def settle(store: TaskStore, ledger: LedgerClient, task: Task, record: StepRecord) -> Settled:
    """Record the end of a step's transfer, once, regardless of the task's status.

    A finished record stays, without a call to the ledger. While the transfer is in flight, nothing is written. The end
    of an earlier attempt does not count: the current attempt has not reached the ledger then, or never will.
    """
    if record.status != "running":
        return Settled(record, in_flight=False)
    state = state_of(ledger, task.task_id, record.step_id)
    if state is not None and state["state"] in OPEN_STATES:
        return Settled(record, in_flight=True)
    if state is not None and state["state"] == "confirmed":
        parameters = store.plan_of(task).steps[record.step_index].parameters
        result = result_of(parameters, state)
        if record.run < task.run:
            result["run"] = record.run  # the execution that submitted it, with its approval
        return Settled(store.finish_step(task.task_id, record, StepOutcome(result=result)), in_flight=False)
    if state is not None and state["txid"] != record.replaces:
        error = str(state["error"] or f"the transfer is {state['state']}")
        return Settled(store.finish_step(task.task_id, record, StepOutcome(error=error)), in_flight=False)
    if task.status in TERMINAL and now() - parse_timestamp(task.updated_at) > timedelta(seconds=LATE_SECONDS):
        error = str(state["error"]) if state is not None else "not_submitted: the task ended before the transfer"
        return Settled(store.finish_step(task.task_id, record, StepOutcome(error=error)), in_flight=False)
    return Settled(record, in_flight=False)


def settle_and_tell(store: TaskStore, ledger: LedgerClient, task: Task, record: StepRecord) -> StepRecord:
    """Record the end of a step's transfer, which ends its task, and resume the waiting execution."""
    settled = settle(store, ledger, task, record)
    tell(task, settled.record)
    return settled.record


def tell(task: Task, record: StepRecord) -> bool:
    """Resume the execution that waits for a finished step. Return False if none waits.

    The execution reads the record, not the message. The token cannot be used again.
    """
    if record.status == "running":
        return False
    callbacks = CallbacksTable()
    # The end of an earlier attempt, which may be reported again, must not fail an execution that starts a new one.
    failed = record.run if record.status == "failed" else None
    token = callbacks.token("ACTION", task.task_id, record.step_index, failed=failed)
    if token is None:
        return False
    # `task` may have been retried since the read; then the token belongs to the new execution. An execution whose task
    # has ended detects that itself.
    if record.status == "failed":
        woken = fail(token, StepFailedError(record.error or ""))
    else:
        woken = answer(token, {"status": record.status})
    callbacks.forget("ACTION", task.task_id, record.step_index, token)
    return woken


def result_of(parameters: dict[str, Any], transfer: dict[str, Any]) -> dict[str, Any]:
    """Return the outcome of a transfer, by its state on the ledger."""
    return {
        "txid": transfer["txid"],
        "tick": transfer["tick"],
        "amount": parameters["amount"],
        "from_address": parameters["from_address"],
        "to_address": parameters["to_address"],
        "network": transfer["network"],
    }
