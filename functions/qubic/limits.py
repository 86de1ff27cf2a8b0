"""What a wallet has spent of its daily limit: reserved before a transfer, once for each reference.

Items (pk / sk), all with the network's name:
RESERVATION#<network>#<reference>/RESERVATION  its terms, its day, and whether it is held or was released
SPENT#<network>#<identity>#<day>/SPENT         the sum of what was reserved for that day and not released

A day is one of UTC. What is asked for again on a later day counts on that day, too: the transfer may happen then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from qaes.adapters import settings
from qaes.adapters.logs import logger
from qaes.domain.errors import InvalidInputError, RefusedError, UnavailableError
from qaes.domain.ids import now
from qaes.domain.policy import MAX_QU, Policy
from qubic.items import ChangedError, Item, Items, attempts, item_key
from qubic.wallets import Wallets

if TYPE_CHECKING:
    from qubic.submissions import Submissions

MAX_REFERENCE_CHARACTERS = 256


@dataclass(frozen=True)
class Reservation:
    """`amount` of what `source` (an identity) may send on `day` (`2026-11-23`), for the transfer's `attempt`."""

    reference: str
    source: str
    amount: int
    day: str
    attempt: int
    state: Literal["held", "released"]
    version: int


class Limits:
    """The reservations on the network of QUBIC_NETWORK.

    Parameters
    ----------
    wallets
        Tells which addresses are one wallet's.
    table
        By default that of LEDGER_TABLE.
    """

    def __init__(self, wallets: Wallets | None = None, table: str | None = None) -> None:
        self._network = settings.text("QUBIC_NETWORK")
        self._items = Items(table or settings.text("LEDGER_TABLE"))
        self._wallets = wallets or Wallets(self._network)

    def reserve(
        self, reference: str, source: str, amount: int, limit: int, day: str, *, attempt: int = 1
    ) -> Reservation:
        """Hold `amount` of `source`'s `limit` for `day`, once for each reference.

        Parameters
        ----------
        reference
            What it is for. The same terms again hold nothing more, on the same day.
        source
            The wallet, by any of its addresses.
        limit
            In QU a day.
        attempt
            Which of the transfer's attempts it is for: what an earlier one gives back late is not this one's.

        Raises
        ------
        InvalidInputError
            The reference, the address or the amount is not acceptable.
        RefusedError
            `over_daily_limit`; `reference_conflict`: the reference stands for other terms.
        UnavailableError
            Others kept changing the same sum.
        """
        wallet = self._checked(reference, source, amount)
        for _ in attempts(20):
            before = self.get(reference)
            if before is not None and (before.source, before.amount) != (wallet, amount):
                raise RefusedError("reference_conflict", "this reference was used for another transfer")
            counted = before is not None and before.state == "held" and before.day >= day
            if counted and before is not None and before.attempt >= attempt:
                return before
            after = Reservation(
                reference=reference,
                source=wallet,
                amount=amount,
                day=before.day if counted and before else day,
                attempt=max(attempt, before.attempt if before else 1),
                state="held",
                version=(before.version if before else 0) + 1,
            )
            spent = 0 if counted else self.spent(source, day)
            if not counted and spent + amount > limit:
                if self.get(reference) != before:
                    continue  # a twin has reserved it in between
                raise RefusedError(
                    "over_daily_limit",
                    f"over daily_limit: a wallet may send {limit} QU a day, {spent} are spent or reserved",
                    spent=spent,
                    limit=limit,
                )
            try:
                self._items.write(self._put(after, before), *([] if counted else [self._spend(after, limit)]))
            except ChangedError:
                continue
            return after
        raise UnavailableError("others are spending from the same wallet at the moment")

    def release(self, reference: str, *, attempt: int | None = None) -> None:
        """Give back what a transfer that moved nothing had reserved: once, however often this is called.

        `attempt` is the one that moved nothing: what is reserved for a later one stays. Raises UnavailableError when
        others kept changing the same sum.
        """
        for _ in attempts(20):
            before = self.get(reference)
            if before is None or before.state == "released":
                return
            if attempt is not None and attempt < before.attempt:
                return
            after = replace(before, state="released", version=before.version + 1)
            try:
                self._items.write(self._put(after, before), self._give_back(before))
            except ChangedError:
                continue
            logger().info("reservation released", extra={"reference": reference})
            return
        raise UnavailableError("others are spending from the same wallet at the moment")

    def get(self, reference: str) -> Reservation | None:
        """Return the reservation under a reference."""
        item = self._items.get(f"RESERVATION#{self._network}#{reference}", "RESERVATION")
        if item is None:
            return None
        return Reservation(
            reference=reference,
            source=item["source"]["S"],
            amount=int(item["amount"]["N"]),
            day=item["day"]["S"],
            attempt=int(item["attempt"]["N"]),
            state=item["state"]["S"],
            version=int(item["version"]["N"]),
        )

    def spent(self, source: str, day: str) -> int:
        """Return what a wallet has spent or reserved of a day, in QU."""
        item = self._items.get(self._sum_key(self._wallets.identity(source, "source"), day), "SPENT")
        return int(item["spent"]["N"]) if item else 0

    def same_wallet(self, address: str, others: tuple[str, ...]) -> bool:
        """Tell whether an address is that of one of `others`, which may be spelled in another way."""
        wanted = self._wallets.identity(address, "destination")
        for other in others:
            try:
                if self._wallets.identity(other) == wanted:
                    return True
            except RefusedError:
                continue  # an address that this network does not know is nobody's
        return False

    def _checked(self, reference: object, source: str, amount: object) -> str:
        if not isinstance(reference, str) or not 0 < len(reference) <= MAX_REFERENCE_CHARACTERS:
            raise InvalidInputError(f"the reference has 1 to {MAX_REFERENCE_CHARACTERS} characters", field="reference")
        check_amount(amount)
        return self._wallets.identity(source, "source")

    # DynamoDB

    def _sum_key(self, identity: str, day: str) -> str:
        return f"SPENT#{self._network}#{identity}#{day}"

    def _put(self, after: Reservation, before: Reservation | None) -> Item:
        item = item_key(f"RESERVATION#{self._network}#{after.reference}", "RESERVATION") | {
            "source": {"S": after.source},
            "amount": {"N": str(after.amount)},
            "day": {"S": after.day},
            "attempt": {"N": str(after.attempt)},
            "state": {"S": after.state},
            "version": {"N": str(after.version)},
        }
        return self._items.put_after(item, before.version if before else 0)

    def _spend(self, reservation: Reservation, limit: int) -> Item:
        # Refused beforehand when the amount alone is over the limit, so that an absent sum has room for it.
        leaves_room = "attribute_not_exists(spent) OR spent <= :room"
        return self._change_sum(
            reservation, reservation.amount, leaves_room, {":room": {"N": str(limit - reservation.amount)}}
        )

    def _give_back(self, reservation: Reservation) -> Item:
        holds_it = "spent >= :held"
        return self._change_sum(reservation, -reservation.amount, holds_it, {":held": {"N": str(reservation.amount)}})

    def _change_sum(self, reservation: Reservation, by: int, condition: str, values: Item) -> Item:
        return {
            "Update": {
                "TableName": self._items.table,
                "Key": item_key(self._sum_key(reservation.source, reservation.day), "SPENT"),
                "UpdateExpression": "ADD spent :by",
                "ConditionExpression": condition,
                "ExpressionAttributeValues": values | {":by": {"N": str(by)}},
            }
        }


def reserve_for(
    policy: Policy,
    wallets: Wallets,
    arguments: dict[str, Any],
    *,
    submissions: Submissions | None = None,
    clock: Callable[[], datetime] = now,
) -> None:
    """Reserve what a transfer will spend, if the policy allows it: operation `reserve` of the ledger.

    `arguments`: `{reference, source, destination, amount, action_type}`. Where the rule has no daily limit, nothing is
    reserved.

    Parameters
    ----------
    policy
        The one in force: its rule for `action_type` decides.
    submissions
        Tell whether the transfer was signed before: then it was let through, and is not asked to fit into another day.

    Raises
    ------
    RefusedError
        `not_allowed`, `over_max_amount`, `address_not_allowed`, `over_daily_limit` or `reference_conflict`; or the
        address is none of this network's.
    InvalidInputError
        An argument is not acceptable.
    """
    limits = Limits(wallets)
    rule = policy.decide(str(arguments["action_type"]))
    amount = check_amount(arguments["amount"])
    if not rule.allowed:
        raise RefusedError("not_allowed", f"policy {policy.policy_id} does not allow {rule.action_type}")
    if rule.max_amount is not None and amount > rule.max_amount:
        raise RefusedError(
            "over_max_amount",
            f"over max_amount: policy {policy.policy_id} lets a transfer move at most {rule.max_amount} QU",
        )
    if rule.allowed_addresses is not None and not limits.same_wallet(arguments["destination"], rule.allowed_addresses):
        raise RefusedError(
            "address_not_allowed",
            f"not among allowed_addresses: policy {policy.policy_id} does not let money go to that address",
        )
    if rule.daily_limit is None:
        return
    reference, source = str(arguments["reference"]), arguments["source"]
    attempt = 1
    transfer = submissions.get(f"transfer:{reference}") if submissions else None
    if transfer is not None:
        if transfer.state not in {"expired", "failed"}:
            return
        attempt = transfer.attempt + 1
    try:
        limits.reserve(reference, source, amount, rule.daily_limit, day_of(clock()), attempt=attempt)
    except RefusedError as error:
        raise RefusedError(error.code, f"{error.message} (policy {policy.policy_id})", **error.details) from error


def release(reference: str, *, attempt: int | None = None) -> None:
    """Give back what a transfer that moved nothing had reserved, as `Limits.release`."""
    Limits().release(reference, attempt=attempt)


def day_of(moment: datetime) -> str:
    """Return the day of UTC: `2026-11-23`."""
    return moment.astimezone(UTC).date().isoformat()


def check_amount(amount: object) -> int:
    """Return an amount in QU. Raises InvalidInputError."""
    if isinstance(amount, bool) or not isinstance(amount, int) or not 0 < amount <= MAX_QU:
        raise InvalidInputError("the amount is a whole number from 1 to 10^15", field="amount")
    return amount
