"""monitor_action: compares a wallet's balance with a threshold and says what it saw."""

from __future__ import annotations

from typing import Any

from qaes.domain.errors import RefusedError
from worker.steps.context import StepContext


def run(parameters: dict[str, Any], context: StepContext) -> dict[str, Any]:
    """`{wallet_address, alert_threshold?}` → `{wallet_address, balance, alert_threshold, alert, message}`.

    `alert` is true when the balance is below the threshold; without a threshold it is false.
    """
    wallet, threshold = parameters["wallet_address"], parameters["alert_threshold"]
    if wallet is None:
        raise RefusedError("no_wallet", "there is no wallet_address to monitor")
    balance = context.ledger.balance(wallet)
    alert = threshold is not None and balance < threshold
    if threshold is None:
        message = f"balance {balance} QU; no alert_threshold was set"
    else:
        message = f"balance {balance} QU is {'below' if alert else 'not below'} the threshold of {threshold} QU"
    return {
        "wallet_address": wallet,
        "balance": balance,
        "alert_threshold": threshold,
        "alert": alert,
        "message": message,
    }
