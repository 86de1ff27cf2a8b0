"""onchain_action: moves an amount on the ledger, once."""

from __future__ import annotations

from typing import Any

from worker.steps.context import StepContext


def run(parameters: dict[str, Any], context: StepContext) -> dict[str, Any]:
    """`{from_address, to_address, amount}` → `{txid, tick, amount, from_address, to_address}`.

    Raises RefusedError (`insufficient_balance`, `invalid_address`) with nothing moved.
    """
    transaction = context.ledger.transfer(
        reference=context.reference,
        source=parameters["from_address"],
        destination=parameters["to_address"],
        amount=parameters["amount"],
    )
    return {
        "txid": transaction["txid"],
        "tick": transaction["tick"],
        "amount": parameters["amount"],
        "from_address": parameters["from_address"],
        "to_address": parameters["to_address"],
    }
