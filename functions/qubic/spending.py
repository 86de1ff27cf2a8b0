"""A wallet's spending against its daily limit, counted in the transaction that stores a transfer's signature.

Item (pk / sk): SPENT#<network>#<identity>#<day>/SPENT. `spent` is the sum of the transfers that were signed on that day
(UTC) and have moved their amount or still may. Every transfer counts, even without a limit, so a limit that is set at
noon includes the morning's transfers. A submission's `counted_on` is the day on which it counts; empty if it does not.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime

from qaes.adapters.logs import logger
from qaes.domain.errors import PermanentError
from qaes.domain.ids import now
from qaes.domain.limits import refusal_by_daily_limit, refusal_by_limits
from qaes.domain.policy import TRANSFER_ACTION, Policy, PolicyDecision
from qubic.items import Item, Items, item_key


def rule_for(policy: Policy, *, destination: str, amount: int, input_type: int = 0) -> PolicyDecision:
    """Return the rule that allows a transaction with this effect. The effect determines the rule, never the caller.

    | effect | rule |
    |---|---|
    | moves QU to another wallet: an amount above 0, input type 0 | `transfer_funds` |
    | records data: amount 0, from the service's identity to itself | none: it moves no money and is not a transfer |
    | any other effect, for example the call of a smart contract | none: rejected, because no rule covers it |

    Raises PermanentError: `not_allowed`, or the limit that the transfer exceeds on any day.
    """
    rule = policy.decide(TRANSFER_ACTION)
    if input_type:
        raise PermanentError("not_allowed", f"policy {policy.policy_id} has no rule for input type {input_type}")
    if not rule.allowed:
        raise PermanentError("not_allowed", f"policy {policy.policy_id} does not allow {TRANSFER_ACTION}")
    if refusal := refusal_by_limits(rule, destination=destination, amount=amount):
        raise refusal
    return rule


class Spending:
    """The daily sums of the wallets of one network.

    Parameters
    ----------
    items
        The ledger's table.
    clock
        Returns the current time, whose UTC day is today.
    """

    def __init__(self, items: Items, network: str, *, clock: Callable[[], datetime] | None = None) -> None:
        self._items = items
        self._network = network
        self._clock = clock or now

    def today(self) -> str:
        """Return the current day in UTC: `2026-11-23`."""
        return self._clock().astimezone(UTC).date().isoformat()

    def spent(self, identity: str, day: str) -> int:
        """Return the amount that a wallet has spent on a day, in QU."""
        item = self._items.get(self._pk(identity, day), "SPENT")
        return int(item["spent"]["N"]) if item else 0

    def refusal_today(self, rule: PolicyDecision, identity: str, amount: int) -> PermanentError | None:
        """Return the error if the amount exceeds the rest of today's limit, otherwise None."""
        if rule.daily_limit is None:
            return None
        return refusal_by_daily_limit(rule, amount=amount, spent=self.spent(identity, self.today()))

    def add(self, identity: str, amount: int, day: str, limit: int | None = None) -> Item:
        """Return a write that adds a transfer's amount to a day's sum, on the condition that `limit` has room for it.

        `limit` is at least `amount`, so a day without a sum has room.
        """
        change = self._change(identity, amount, day)
        if limit is not None:
            leaves_room = "attribute_not_exists(spent) OR spent <= :room"
            change["Update"]["ConditionExpression"] = leaves_room
            change["Update"]["ExpressionAttributeValues"][":room"] = {"N": str(limit - amount)}
        return change

    def give_back(self, identity: str, amount: int, day: str) -> list[Item]:
        """Return a write that subtracts from a day's sum the amount that `add` added. The sum never goes below 0.

        A restored table may have lost the sum: then there is nothing to subtract.
        """
        if self.spent(identity, day) < amount:
            logger().error(
                "the day's sum is less than a transfer that was counted on it", extra={"source": identity, "day": day}
            )
            return []
        change = self._change(identity, -amount, day)
        change["Update"]["ConditionExpression"] = "spent >= :given"
        change["Update"]["ExpressionAttributeValues"][":given"] = {"N": str(amount)}
        return [change]

    def _change(self, identity: str, by: int, day: str) -> Item:
        return {
            "Update": {
                "TableName": self._items.table,
                "Key": item_key(self._pk(identity, day), "SPENT"),
                "UpdateExpression": "ADD spent :by",
                "ExpressionAttributeValues": {":by": {"N": str(by)}},
            }
        }

    def _pk(self, identity: str, day: str) -> str:
        return f"SPENT#{self._network}#{identity}#{day}"
