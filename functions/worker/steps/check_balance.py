"""check_balance: what does the wallet hold?"""

from __future__ import annotations

from typing import Any

from worker.steps.context import StepContext


def run(parameters: dict[str, Any], context: StepContext) -> dict[str, Any]:
    """`{wallet_address}` → `{wallet_address, balance}` in QU."""
    wallet = parameters["wallet_address"]
    return {"wallet_address": wallet, "balance": context.ledger.balance(wallet)}
