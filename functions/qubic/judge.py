"""Which rule of the policy judges a transaction: its effect names the rule, never the caller.

| effect | rule |
|---|---|
| moves QU to another wallet: an amount above 0, input type 0 | `transfer_funds` |
| writes a record: amount 0, from the service's identity to itself | none: it moves nothing, and is no transfer |
| anything else, a call of a smart contract for example | none: refused, because no rule covers it |
"""

from __future__ import annotations

from qaes.domain.errors import RefusedError
from qaes.domain.policy import TRANSFER_ACTION, Policy, PolicyDecision
from qubic.submissions import check_amount
from qubic.wallets import Wallets


def check_allowed(
    policy: Policy, wallets: Wallets, *, destination: str, amount: int, input_type: int = 0
) -> PolicyDecision:
    """Return the rule that allows a transfer with this effect.

    Raises
    ------
    RefusedError
        `not_allowed`: the rule forbids it, or no rule covers it; `over_max_amount`; `address_not_allowed`;
        `invalid_address`: the network does not know the address.
    InvalidInputError
        The amount or the address is not acceptable.
    """
    check_amount(amount)
    rule = policy.decide(TRANSFER_ACTION)
    if input_type:
        raise RefusedError("not_allowed", f"policy {policy.policy_id} has no rule for input type {input_type}")
    if not rule.allowed:
        raise RefusedError("not_allowed", f"policy {policy.policy_id} does not allow {TRANSFER_ACTION}")
    if rule.max_amount is not None and amount > rule.max_amount:
        raise RefusedError(
            "over_max_amount",
            f"over max_amount: policy {policy.policy_id} lets a transfer move at most {rule.max_amount} QU",
        )
    if rule.allowed_addresses is not None and not _is_among(wallets, destination, rule.allowed_addresses):
        raise RefusedError(
            "address_not_allowed",
            f"not among allowed_addresses: policy {policy.policy_id} does not let money go to that address",
        )
    return rule


def _is_among(wallets: Wallets, address: str, allowed: tuple[str, ...]) -> bool:
    """Tell whether an address belongs to the same wallet as one of `allowed`, however both are spelled."""
    wanted = wallets.identity(address, "destination")
    for other in allowed:
        try:
            if wallets.identity(other) == wanted:
                return True
        except RefusedError:
            continue  # an address that this network does not know is nobody's
    return False
