"""onchain_action: hands a transfer to the ledger, once. What becomes of it is for `qaes.adapters.transfers` to ask."""

from __future__ import annotations

from typing import Any

from qaes.adapters.transfers import OPEN, result_of
from qaes.domain.errors import RefusedError
from worker.steps.context import StepContext, Submitted

SIMULATED = "signed, not sent: AllowTransfers is not set for this network"


def run(parameters: dict[str, Any], context: StepContext) -> dict[str, Any] | Submitted:
    """`{from_address, to_address, amount}` → `{txid, tick, amount, from_address, to_address, network}`, or `Submitted`.

    `Submitted` until it is confirmed. Where transfers are not allowed on a real network, the result says `simulated`,
    and there is nothing to wait for.

    Raises
    ------
    RefusedError
        `insufficient_balance`, `invalid_address`, `over_daily_limit`…, with nothing moved; `expired` or `moved_nothing`
        when its tick passed without moving anything; `moved_unknown` when that cannot be told.
    """
    transfer = context.ledger.transfer(
        reference=context.reference,
        source=parameters["from_address"],
        destination=parameters["to_address"],
        amount=parameters["amount"],
        requester=context.requester,
        run=context.run,
    )
    state = transfer["state"]
    if state in OPEN:
        return Submitted(transfer["txid"], transfer["tick"])
    if state not in {"confirmed", "simulated"}:
        code, _, message = str(transfer["error"] or "").partition(": ")
        raise RefusedError(code or str(state), message or f"the transfer is {state}")
    result = result_of(parameters, transfer)
    return result | {"simulated": SIMULATED} if state == "simulated" else result
