"""Usage of the policy's rolling limits, counted in the DynamoDB transaction that stores a transfer's signature.

The windows are in the ledger's table (`qaes.adapters.limits`). A submission's `counted_in` has its counts. Releases
before rolling limits counted in SPENT#<network>#<identity>#<day>/SPENT, the sum of a day (UTC), and a submission of
these releases has the day as `counted_on`. These sums still count in the windows of 24 hours for each wallet.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from qaes.adapters.limits import Share, Windows
from qaes.adapters.logs import logger
from qaes.domain.errors import InvalidInputError, PermanentError
from qaes.domain.policy import TRANSFER_ACTION, ActionRequest, Decision, LimitUse, Policy, evaluate
from qaes.domain.policy.deciding import limit_key
from qaes.domain.policy.rules import DAY, Limit
from qaes.domain.qubic.identity import check_payable
from qubic.items import Item, Items, item_key


def rule_for(
    policy: Policy,
    *,
    source: str,
    destination: str,
    amount: int,
    input_type: int = 0,
    requester: str = "",
    agent: str | None = None,
) -> Decision:
    """Return the decision that allows a transaction with this effect. The effect determines the rule.

    | effect | rule |
    |---|---|
    | moves QU to another wallet: an amount above 0, input type 0 | `transfer_funds` |
    | records data: amount 0, from the service's identity to itself | none: it moves no money and is not a transfer |
    | any other effect, for example the call of a smart contract | none: rejected, because no rule covers it |

    Raises PermanentError: `not_allowed`, `invalid_address` for a smart contract or the zero address unless the rule
    allows them, or the code of the part of the rule that forbids the transfer at any time.
    """
    if input_type:
        raise PermanentError("not_allowed", f"policy {policy.policy_id} has no rule for input type {input_type}")
    parameters = {"wallet_address": source, "to_address": destination, "amount": amount}
    if not policy.pays_contracts:
        try:
            check_payable(destination, "destination")
        except InvalidInputError as error:
            raise PermanentError("invalid_address", error.message) from error
    decision = evaluate(policy, ActionRequest(TRANSFER_ACTION, parameters, requester, agent))
    if not decision.allowed:
        raise PermanentError(decision.code, decision.reason)
    return decision


class Spending(Windows):
    """The windows of one network's transfers.

    Parameters
    ----------
    items
        The ledger's table.
    """

    def __init__(self, items: Items, network: str, *, clock: Callable[[], datetime] | None = None) -> None:
        super().__init__(items.table, f"{network}#", clock=clock)
        self._items = items
        self._network = network

    def of_wallet(self, identity: str, amount: int) -> Share:
        """Return the counts of a transfer without `counted_in` in a wallet's window of 24 hours."""
        limit = Limit(window_seconds=DAY, max_amount=amount, per="source", over="deny")
        return Share(limit_key(TRANSFER_ACTION, "QU", limit, identity), DAY, 0, amount)

    def of_day(self, identity: str, day: str) -> int:
        """Return the amount in QU that an earlier release counted for a wallet on a day."""
        item = self._items.get(self._pk_of_day(identity, day), "SPENT")
        return int(item["spent"]["N"]) if item else 0

    def give_back_of_day(self, identity: str, amount: int, day: str) -> list[Item]:
        """Return the write that subtracts an amount that an earlier release counted. The sum never goes below 0."""
        if self.of_day(identity, day) < amount:
            logger().error(
                "the day's sum is less than a transfer that was counted on it", extra={"source": identity, "day": day}
            )
            return []
        return [
            {
                "Update": {
                    "TableName": self._items.table,
                    "Key": item_key(self._pk_of_day(identity, day), "SPENT"),
                    "UpdateExpression": "ADD spent :by",
                    "ConditionExpression": "spent >= :given",
                    "ExpressionAttributeValues": {":by": {"N": str(-amount)}, ":given": {"N": str(amount)}},
                }
            }
        ]

    def counts_day(self, day: str) -> bool:
        """Return whether the sum of a day counts in a window of 24 hours now."""
        return day in _days(self._clock())

    def _elsewhere(self, use: LimitUse, at: datetime, began: datetime | None) -> int:
        """Return the sums of today and yesterday: earlier releases did not store the time of a transfer in the day.

        Nothing is added to them any more. They are not read for a window that is older than two days.
        """
        if (use.per, use.counts, use.window_seconds) != ("source", "amount", DAY):
            return 0
        if began is not None and not set(_days(at)) & set(_days(began)):
            return 0
        return sum(self.of_day(use.value, day) for day in _days(at))

    def _pk_of_day(self, identity: str, day: str) -> str:
        return f"SPENT#{self._network}#{identity}#{day}"


def _days(at: datetime) -> tuple[str, str]:
    """Return the days of UTC in the 24 hours before a moment: `2026-11-23`, and the one before."""
    today = at.astimezone(UTC).date()
    return today.isoformat(), (today - timedelta(days=1)).isoformat()
