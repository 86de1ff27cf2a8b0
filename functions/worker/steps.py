"""The five step types: their reads, effects and results.

A step in READS only reads: the state RunStep runs it, or ExecuteAction if it needed an approval. A step in ACTS has
an effect, which happens once for each reference (task and step): only ExecuteAction runs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.transfers import result_of
from qaes.domain import planning
from qaes.domain.canonical import hash_of
from qaes.domain.errors import PermanentError
from qaes.domain.models import Plan, Step, Task, WalletBalance
from qaes.domain.qubic import OPEN_STATES
from qaes.domain.ruling import Ruling, rule
from qaes.domain.step_types import StepType
from qaes.domain.suspensions import Suspension
from qaes.domain.tasks.lifecycle import StepOutcome

Parameters = dict[str, Any]
Result = dict[str, Any]

SIMULATED = "signed, not sent: AllowTransfers is not set for this network"


@dataclass(frozen=True)
class Readings:
    """Data of the ledger from one call: the policy in force, and the wallet of a step that has one."""

    ruling: Ruling
    suspended: Mapping[str, Suspension]
    wallet: WalletBalance | PermanentError | None = None

    @property
    def balance(self) -> int:
        """Return the wallet's balance in QU. Raises the ledger's error, if that was its response."""
        if isinstance(self.wallet, PermanentError):
            raise self.wallet
        if self.wallet is None:
            raise PermanentError("no_wallet", "the task has no `wallet_address` to monitor")
        return self.wallet.balance


@dataclass(frozen=True)
class Effect:
    """Input of a step with an effect: `reference` identifies task and step, `run` the requesting execution."""

    reference: str
    ledger: LedgerClient
    requester: str
    run: int
    agent: str | None = None
    granted: tuple[str, ...] = ()


@dataclass(frozen=True)
class Submitted:
    """The effect is in flight. The step is finished when its outcome is known."""

    txid: str
    tick: int


# Steps that read


def check_balance(parameters: Parameters, readings: Readings) -> Result:
    """`{wallet_address}` → `{wallet_address, balance}` in QU."""
    return {"wallet_address": parameters["wallet_address"], "balance": readings.balance}


def policy_check(parameters: Parameters, readings: Readings) -> Result:
    """`{action_type, policy_id}` → the decision of the policy in force, and whether it is the pinned one."""
    decision = readings.ruling.recorded
    return decision.model_dump(mode="json") | {"pinned": decision.policy_id == parameters["policy_id"]}


def monitor_action(parameters: Parameters, readings: Readings) -> Result:
    """`{wallet_address, alert_threshold?}` → `{wallet_address, balance, alert_threshold, alert, message}`.

    `alert` is true when the balance is below the threshold; without a threshold it is false.
    """
    balance, threshold = readings.balance, parameters["alert_threshold"]
    alert = threshold is not None and balance < threshold
    if threshold is None:
        message = f"balance {balance} QU; no alert_threshold is set"
    else:
        message = f"balance {balance} QU is {'below' if alert else 'not below'} the threshold of {threshold} QU"
    return {
        "wallet_address": parameters["wallet_address"],
        "balance": balance,
        "alert_threshold": threshold,
        "alert": alert,
        "message": message,
    }


# Steps with an effect


def onchain_action(parameters: Parameters, effect: Effect) -> Result | Submitted:
    """`{from_address, to_address, amount}` → `{txid, tick, amount, from_address, to_address, network}`, or `Submitted`.

    `Submitted` until the ledger has confirmed the transfer. If transfers are not enabled on a real network, the result
    is `simulated`, without a wait.

    Raises
    ------
    PermanentError
        `insufficient_balance`, `invalid_address`, `daily_limit_exceeded`…, without effect; `expired` or
        `moved_nothing` when its tick passed without effect; `moved_unknown` when its outcome is unknown.
    """
    transfer = effect.ledger.transfer(
        reference=effect.reference,
        source=parameters["from_address"],
        destination=parameters["to_address"],
        amount=parameters["amount"],
        requester=effect.requester,
        agent=effect.agent,
        run=effect.run,
        granted=effect.granted,
    )
    state = transfer["state"]
    if state in OPEN_STATES:
        return Submitted(transfer["txid"], transfer["tick"])
    if state not in {"confirmed", "simulated"}:
        code, _, message = str(transfer["error"] or "").partition(": ")
        raise PermanentError(code or str(state), message or f"the transfer is {state}")
    result = result_of(parameters, transfer)
    return result | {"simulated": SIMULATED} if state == "simulated" else result


def generic_action(parameters: Parameters, effect: Effect) -> Result:
    """`{task_type, description, parameters}` → `{task_type, instruction_hash, txid, tick}`: a receipt without effect.

    The system cannot perform such an action itself. It writes the instruction's hash to the ledger. `txid` and `tick`
    belong to the submitted transaction. If its tick passes without it, the ledger signs another transaction:
    `GET /verify/{instruction_hash}` returns the confirmed one.
    """
    instruction = hash_of({"reference": effect.reference, "instruction": parameters})
    written = effect.ledger.record_instruction(instruction, reference=effect.reference, requester=effect.requester)
    return {
        "task_type": parameters["task_type"],
        "instruction_hash": instruction,
        "txid": written["txid"],
        "tick": written["tick"],
    }


READS: dict[StepType, Callable[[Parameters, Readings], Result]] = {
    "check_balance": check_balance,
    "policy_check": policy_check,
    "monitor_action": monitor_action,
}
ACTS: dict[StepType, Callable[[Parameters, Effect], Result | Submitted]] = {
    "onchain_action": onchain_action,
    "generic_action": generic_action,
}


def read(ledger: LedgerClient, task: Task, plan: Plan, step: Step) -> Readings:
    """Read the input of a step of READS, in one call of the ledger."""
    action, pinned = planning.action_type(task.task_type), plan.policy.policy_id
    address, wallet = step.parameters.get("wallet_address"), None
    if address is None:
        policies = ledger.policies(action, pinned=pinned)
    else:
        policies, wallet = ledger.policy_and_balance(address, action=action, pinned=pinned)
    return Readings(rule(task, policies.pinned, policies.current), policies.suspended, wallet)


def outcome_of(step: Step, readings: Readings) -> StepOutcome:
    """Return the outcome of a step of READS. A rejection by the ledger fails it."""
    try:
        return StepOutcome(result=READS[step.type](step.parameters, readings))
    except PermanentError as refusal:
        return StepOutcome(error=f"{refusal.code}: {refusal.message}")
