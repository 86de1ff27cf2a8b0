"""What became of a step's transfer: the way from the ledger to the step's record, and to who waits for it.

Only the state ExecuteAction submits a transfer. Everything else reads what became of it here, and moves nothing.
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
"""So long after its task's end nobody hands a transfer in any more: longer than the worker and the ledger may take."""


class Settled(NamedTuple):
    """A step's record, as it is now, and whether the transfer that it is about is under way."""

    record: StepRecord
    in_flight: bool

    @property
    def submitted(self) -> bool:
        """Whether the step's transfer was handed in and may have moved something, or will: nobody is asked again."""
        return self.in_flight or self.record.status == "succeeded"


def reference_of(task_id: str, step_id: str) -> str:
    """What the ledger knows a step's effect by."""
    return f"{task_id}#{step_id}"


def state_of(ledger: LedgerClient, task_id: str, step_id: str) -> dict[str, Any] | None:
    """How the step's transfer stands, as `LedgerClient.transfer_state`; None when none was handed in."""
    try:
        return ledger.transfer_state(reference_of(task_id, step_id))
    except PermanentError as error:
        if error.code == "not_found":
            return None
        raise


class Funds(NamedTuple):
    """The balance of the wallet that is to pay a step, and why it cannot; all empty for a step that is no transfer.

    `refusal_today` is for want of room in a limit: what is approved today may be made on another day. `used` is what
    each limit of the policy in force has used, by the limit's key.
    """

    balance: WalletBalance | None = None
    refusal: str | None = None
    refusal_today: str | None = None
    used: Mapping[str, int] = MappingProxyType({})


def funds_of(ledger: LedgerClient, step: Step, requester: str, agent: str | None) -> Funds:
    """Read whether the ledger would take a transfer: its addresses, its source's key and balance, the policy.

    The compliance agent reads it before it asks a person or has the transfer submitted, the planner for a preview. A
    balance that cannot be read now raises TransientError: it is neither enough nor too little.
    """
    if step.type not in CONFIRMED_LATER:
        return Funds()
    try:
        return _funds(step, ledger.check_transfer(**_terms(step, requester, agent)))
    except PermanentError as error:
        return _funds(step, error)


def policies_and_funds(ledger: LedgerClient, task: Task, plan: Plan, step: Step) -> tuple[Policies, Funds]:
    """Read the policy in force and the pinned one, and what `funds_of` returns under the first: one call."""
    names = {"action": planning.action_type(task.task_type), "pinned": plan.policy.policy_id}
    if step.type not in CONFIRMED_LATER:
        return ledger.policies(**names), Funds()
    policies, checked = ledger.policy_and_check(**names, **_terms(step, task.requester, task.agent))
    return policies, _funds(step, checked)


def usage_of(step: Step, ruling: Ruling, funds: Funds, counted: tuple[str, int] | None = None) -> Usage:
    """Return what the limits of the policy in force have used: the ledger counts transfers, LimitsTable all else.

    What the step `counted` (its task and index) in an earlier execution is left out.
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
    """Whether the ledger has the step's transfer, confirmed or under way: then it needs no funds any more."""
    state = state_of(ledger, task_id, step_id)
    return state is not None and state["state"] in OPEN_STATES | {"confirmed"}


def settle(store: TaskStore, ledger: LedgerClient, task: Task, record: StepRecord) -> Settled:
    """Put the end of a step's transfer on record, if it has one: once, whatever has become of the task.

    A record that is finished stays as it is, and the ledger is not asked. While the transfer is under way nothing is
    written, nor for the end of an earlier attempt: this one has not reached the ledger then, or never will.
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
            result["run"] = record.run  # the execution that handed it in, under what was approved then
        return Settled(store.finish_step(task.task_id, record, StepOutcome(result=result)), in_flight=False)
    if state is not None and state["txid"] != record.replaces:
        error = str(state["error"] or f"the transfer is {state['state']}")
        return Settled(store.finish_step(task.task_id, record, StepOutcome(error=error)), in_flight=False)
    if task.status in TERMINAL and now() - parse_timestamp(task.updated_at) > timedelta(seconds=LATE_SECONDS):
        error = str(state["error"]) if state is not None else "not_submitted: the task ended before"
        return Settled(store.finish_step(task.task_id, record, StepOutcome(error=error)), in_flight=False)
    return Settled(record, in_flight=False)


def settle_and_tell(store: TaskStore, ledger: LedgerClient, task: Task, record: StepRecord) -> StepRecord:
    """Put the end of a step's transfer on record, which ends its task, and wake the execution that waits for it."""
    settled = settle(store, ledger, task, record)
    tell(task, settled.record)
    return settled.record


def tell(task: Task, record: StepRecord) -> bool:
    """Wake the execution that waits for a step that is finished; False when none waits.

    The record is believed, not what is sent. The token is of no use afterwards.
    """
    if record.status == "running":
        return False
    callbacks = CallbacksTable()
    # An execution that is about to try anew is not failed by the attempt before, whose end may be told again.
    failed = record.run if record.status == "failed" else None
    token = callbacks.token("ACTION", task.task_id, record.step_index, failed=failed)
    if token is None:
        return False
    # Whatever `task` says: it may have been retried since it was read, and then the token is the new execution's. One
    # whose task has ended finds that out by itself.
    if record.status == "failed":
        woken = fail(token, StepFailedError(record.error or ""))
    else:
        woken = answer(token, {"status": record.status})
    callbacks.forget("ACTION", task.task_id, record.step_index, token)
    return woken


def result_of(parameters: dict[str, Any], transfer: dict[str, Any]) -> dict[str, Any]:
    """Tell what a transfer has done, by its state on the ledger."""
    return {
        "txid": transfer["txid"],
        "tick": transfer["tick"],
        "amount": parameters["amount"],
        "from_address": parameters["from_address"],
        "to_address": parameters["to_address"],
        "network": transfer["network"],
    }
