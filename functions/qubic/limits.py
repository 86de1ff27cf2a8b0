"""What a wallet has spent of its daily limit: reserved before a transfer, once for each reference.

Items (pk / sk), all with the network's name:
RESERVATION#<network>#<reference>/RESERVATION  its terms, its day, and whether it is held or was released
SPENT#<network>#<identity>#<day>/SPENT         the sum of what was reserved for that day and not released; `holds`:
                                               the references whose transfer was not known to be signed yet

A day is one of UTC. What is asked for again on a later day counts on that day, too: the transfer may happen then.
Everything is counted, whether there is a limit or not: one that is set at noon has the morning's transfers in it.

What is held is given back when the transfer has moved nothing: it was refused, it ended so, or nobody has signed it for
an hour (its task was cancelled, say). Never while somebody may be about to sign it: whoever was let through to sign is
in the reservation's `signing`, and only a refusal of its own takes it out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, Literal

from qaes.adapters import settings
from qaes.adapters.logs import logger
from qaes.domain.errors import InvalidInputError, RefusedError, UnavailableError
from qaes.domain.ids import now
from qaes.domain.policy import Policy
from qubic.items import ChangedError, Item, Items, attempts, item_key
from qubic.judge import check_allowed
from qubic.submissions import Submission, Submissions, check_amount, check_reference
from qubic.wallets import Wallets

IDLE_SECONDS = 3600
"""What was not asked for again for so long is given back, if it was not signed. Far longer than a call can last."""
SIGNING_SECONDS = 30
"""Who was let through so long ago has signed, or never will: longer than a call of the ledger's function may take."""
MANY_HOLDS = 100
"""From so many on, those whose transfer was signed are taken from the list even when there is room."""


@dataclass(frozen=True)
class Reservation:
    """`amount` of what `source` (an identity) may send on `day` (`2026-11-23`), for the transfer's `attempt`.

    Attributes
    ----------
    asked_at
        When it was last asked for; seconds since 1970.
    signing
        Calls that were let through to sign the transfer, and were not refused since.
    """

    reference: str
    source: str
    amount: int
    day: str
    attempt: int
    state: Literal["held", "released"]
    asked_at: int
    signing: frozenset[str]
    version: int


class Limits:
    """The reservations on the network of QUBIC_NETWORK.

    Parameters
    ----------
    wallets
        Tells which addresses are one wallet's.
    table
        By default that of LEDGER_TABLE.
    submissions
        Tell which transfers were signed: without them, nothing is given back for want of a signature.
    """

    def __init__(
        self,
        wallets: Wallets | None = None,
        table: str | None = None,
        *,
        submissions: Submissions | None = None,
        clock: Callable[[], datetime] = now,
    ) -> None:
        self._network = settings.text("QUBIC_NETWORK")
        self._items = Items(table or settings.text("LEDGER_TABLE"))
        self._wallets = wallets or Wallets(self._network)
        self._submissions = submissions
        self._clock = clock

    def reserve(
        self,
        reference: str,
        source: str,
        amount: int,
        limit: int | None,
        day: str,
        *,
        attempt: int = 1,
        call: str | None = None,
    ) -> Reservation:
        """Hold `amount` of `source`'s `limit` for `day`, once for each reference.

        Parameters
        ----------
        reference
            What it is for. The same terms again hold nothing more, on the same day.
        source
            The wallet, by any of its addresses.
        limit
            In QU a day; without one, the amount is only counted.
        attempt
            Which of the transfer's attempts it is for: what an earlier one gives back late is not this one's.
        call
            Who is going to sign the transfer now, if somebody is.

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
        caller = frozenset() if call is None else frozenset({call})
        looked_for_idle = False
        for _ in attempts(20):
            before = self.get(reference)
            if before is not None and (before.source, before.amount) != (wallet, amount):
                raise RefusedError("reference_conflict", "this reference was used for another transfer")
            counted = before is not None and before.state == "held" and before.day >= day
            same_attempt = before is not None and before.state == "held" and before.attempt >= attempt
            if counted and same_attempt and before is not None and caller <= before.signing and not self._idle(before):
                return before
            after = Reservation(
                reference=reference,
                source=wallet,
                amount=amount,
                day=before.day if counted and before else day,
                attempt=max(attempt, before.attempt if before else 1),
                state="held",
                asked_at=int(self._clock().timestamp()),
                signing=caller | (before.signing if same_attempt and before else frozenset()),
                version=(before.version if before else 0) + 1,
            )
            holds: frozenset[str] = frozenset()
            if not counted:
                spent, holds = self._sum(wallet, day)
                if limit is not None and spent + amount > limit:
                    if self.get(reference) != before:
                        continue  # a twin has reserved it in between
                    if not looked_for_idle and self._give_back_idle(wallet, day, holds):
                        looked_for_idle = True
                        continue
                    raise _over_daily_limit(spent, limit)
            try:
                self._items.write(self._put(after, before), *([] if counted else [self._spend(after, limit)]))
            except ChangedError:
                continue
            if len(holds) >= MANY_HOLDS:
                self._give_back_idle(wallet, day, holds)
            return after
        raise UnavailableError("others are spending from the same wallet at the moment")

    def release(self, reference: str, *, attempt: int | None = None, refused: str | None = None) -> None:
        """Give back what a transfer that moved nothing had reserved: once, however often this is called.

        Parameters
        ----------
        attempt
            The one that moved nothing: what is reserved for a later one stays.
        refused
            The call that was not let through, or not after all: another one may be about to sign the same transfer, and
            then the reservation stays for it.

        Raises
        ------
        UnavailableError
            Others kept changing the same sum.
        """
        for _ in attempts(20):
            before = self.get(reference)
            if before is None or before.state == "released":
                return
            if attempt is not None and attempt < before.attempt:
                return
            left = before.signing - {refused}
            try:
                if refused is None or not left:
                    self._release(before)
                elif left != before.signing:
                    self._items.write(self._put(replace(before, signing=left, version=before.version + 1), before))
            except ChangedError:
                continue
            return
        raise UnavailableError("others are spending from the same wallet at the moment")

    def _release(self, before: Reservation) -> None:
        after = replace(before, state="released", signing=frozenset(), version=before.version + 1)
        try:
            self._items.write(self._put(after, before), self._give_back(before))
        except ChangedError:
            if self._sum(before.source, before.day)[0] >= before.amount:
                raise
            # The sum was set back: there is nothing to give back, however often it is tried.
            self._items.write(self._put(after, before))
            logger().error("spent was less than what was held", extra={"reference": before.reference})
        logger().info("reservation released", extra={"reference": before.reference})

    def _idle(self, reservation: Reservation) -> bool:
        return reservation.asked_at + IDLE_SECONDS <= self._clock().timestamp()

    def _give_back_idle(self, wallet: str, day: str, holds: frozenset[str]) -> bool:
        """Give back what was held for transfers that nobody has signed for long; False when there was nothing.

        A call that was let through lasts for seconds: after an hour it has signed, or never will. Who asks anew
        changes the reservation, and then it is not given back.
        """
        if self._submissions is None:
            return False
        found, done = False, set()
        for reference in holds:
            held = self.get(reference)
            transfer = self._submissions.get(f"transfer:{reference}")
            if held is None or held.state != "held" or held.day != day:
                done.add(reference)
            elif transfer is not None and not transfer.moved_nothing:
                done.add(reference)  # from now on it counts for ever
            elif transfer is not None and transfer.attempt >= held.attempt:
                continue  # whoever closes it gives it back
            elif self._idle(held):
                try:
                    self._release(held)
                except ChangedError:
                    continue  # somebody asks for it just now
                found = True
        if done:
            with suppress(ChangedError):  # others spend at the moment: the next one strikes them
                self._items.write(self._strike(wallet, day, done))
        return found

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
            asked_at=int(item["asked_at"]["N"]),
            signing=frozenset(item["signing"]["SS"]) if "signing" in item else frozenset(),
            version=int(item["version"]["N"]),
        )

    def check_room(self, source: str, amount: int, limit: int | None, day: str) -> None:
        """Raise RefusedError as `reserve` would for want of room that day; reserve nothing."""
        if limit is not None and (spent := self.spent(source, day)) + amount > limit:
            raise _over_daily_limit(spent, limit)

    def spent(self, source: str, day: str) -> int:
        """Return what a wallet has spent or reserved of a day, in QU."""
        return self._sum(self._wallets.identity(source, "source"), day)[0]

    def _sum(self, wallet: str, day: str) -> tuple[int, frozenset[str]]:
        item = self._items.get(self._sum_key(wallet, day), "SPENT") or {}
        return int(item["spent"]["N"]) if item else 0, frozenset(item["holds"]["SS"] if "holds" in item else ())

    def _checked(self, reference: object, source: str, amount: object) -> str:
        check_reference(reference)
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
            "asked_at": {"N": str(after.asked_at)},
            "version": {"N": str(after.version)},
        }
        if after.signing:  # DynamoDB knows no empty set
            item["signing"] = {"SS": sorted(after.signing)}
        return self._items.put_after(item, before.version if before else 0)

    def _spend(self, reservation: Reservation, limit: int | None) -> Item:
        values = {":by": {"N": str(reservation.amount)}, ":reference": {"SS": [reservation.reference]}}
        changed = self._change_sum(reservation, "ADD spent :by, holds :reference", values)
        if limit is not None:
            # Refused beforehand when the amount alone is over the limit, so that an absent sum has room for it.
            leaves_room = "attribute_not_exists(spent) OR spent <= :room"
            changed["Update"]["ConditionExpression"] = leaves_room
            values[":room"] = {"N": str(limit - reservation.amount)}
        return changed

    def _give_back(self, reservation: Reservation) -> Item:
        holds_it = "spent >= :held"
        values = {
            ":by": {"N": str(-reservation.amount)},
            ":held": {"N": str(reservation.amount)},
            ":reference": {"SS": [reservation.reference]},
        }
        changed = self._change_sum(reservation, "ADD spent :by DELETE holds :reference", values)
        changed["Update"]["ConditionExpression"] = holds_it
        return changed

    def _change_sum(self, reservation: Reservation, expression: str, values: Item) -> Item:
        return {
            "Update": {
                "TableName": self._items.table,
                "Key": item_key(self._sum_key(reservation.source, reservation.day), "SPENT"),
                "UpdateExpression": expression,
                "ExpressionAttributeValues": values,
            }
        }

    def _strike(self, wallet: str, day: str, references: set[str]) -> Item:
        return {
            "Update": {
                "TableName": self._items.table,
                "Key": item_key(self._sum_key(wallet, day), "SPENT"),
                "UpdateExpression": "DELETE holds :references",
                "ExpressionAttributeValues": {":references": {"SS": sorted(references)}},
            }
        }


def _over_daily_limit(spent: int, limit: int) -> RefusedError:
    text = f"over daily_limit: a wallet may send {limit} QU a day, {spent} are spent or reserved"
    return RefusedError("over_daily_limit", text, spent=spent, limit=limit)


def check_for(
    policy: Policy, wallets: Wallets, arguments: dict[str, Any], *, counts: bool, clock: Callable[[], datetime] = now
) -> str | None:
    """Return why `reserve_for` would refuse a transfer today, for want of room; None if it would not.

    Nothing is reserved. What nobody asked for again for an hour counts as spent.

    Parameters
    ----------
    arguments
        `{source, destination, amount}`.
    counts
        Whether the network's transfers are counted at all.

    Raises
    ------
    RefusedError, InvalidInputError
        As `reserve_for`, when another day changes nothing.
    """
    amount = check_amount(arguments["amount"])
    rule = check_allowed(policy, wallets, destination=arguments["destination"], amount=amount)
    wallets.check_parties(arguments["source"], arguments["destination"])
    if counts:
        try:
            with _naming(policy):
                Limits(wallets).check_room(arguments["source"], amount, rule.daily_limit, day_of(clock()))
        except RefusedError as error:
            return error.message
    return None


@contextmanager
def _naming(policy: Policy) -> Iterator[None]:
    """Name the policy in a refusal for want of room."""
    try:
        yield
    except RefusedError as error:
        raise RefusedError(error.code, f"{error.message} (policy {policy.policy_id})", **error.details) from error


def reserve_for(
    policy: Policy,
    wallets: Wallets,
    arguments: dict[str, Any],
    *,
    submissions: Submissions | None = None,
    call: str | None = None,
    only_check: bool = False,
    clock: Callable[[], datetime] = now,
) -> None:
    """Reserve what a transfer will spend, if the policy allows it: operation `reserve` of the ledger.

    `arguments`: `{reference, source, destination, amount}`.

    Parameters
    ----------
    policy
        The one in force: its rule for the transfer's effect decides. Without a daily limit, the amount is counted.
    submissions
        Tell whether the transfer was signed before: then it was let through, and is not asked to fit into another day.
    call
        Who is going to sign it now, if somebody is.
    only_check
        Nothing is going to be sent: reserve nothing.

    Raises
    ------
    RefusedError
        `not_allowed`, `over_max_amount`, `address_not_allowed`, `over_daily_limit` or `reference_conflict`; `no_key`;
        or the address is none of this network's.
    InvalidInputError
        An argument is not acceptable; source and destination are one wallet.
    """
    limits = Limits(wallets, submissions=submissions, clock=clock)
    reference, amount = check_reference(arguments["reference"]), check_amount(arguments["amount"])
    rule = check_allowed(policy, wallets, destination=arguments["destination"], amount=amount)
    wallets.check_parties(arguments["source"], arguments["destination"])  # what could not be signed holds nothing
    if only_check:
        return
    transfer = submissions.get(f"transfer:{reference}") if submissions else None
    if transfer is not None and not transfer.moved_nothing:
        return
    with _naming(policy):
        limits.reserve(
            reference,
            arguments["source"],
            amount,
            rule.daily_limit,
            day_of(clock()),
            attempt=(transfer.attempt if transfer else 0) + 1,
            call=call,
        )


def release_refused(wallets: Wallets, arguments: dict[str, Any], *, submissions: Submissions, call: str) -> None:
    """Give back what was reserved for a transfer that `call` asked for and that was refused: it will not be spent.

    What was signed stays, and so does what another call may be about to sign, or what is held for other terms.
    """
    reference = arguments["reference"]
    transfer = submissions.get(f"transfer:{reference}")
    if transfer is not None and not transfer.moved_nothing:
        return
    limits = Limits(wallets)
    held = limits.get(reference)
    try:
        terms = (wallets.identity(arguments["source"], "source"), arguments["amount"])
    except (InvalidInputError, RefusedError):
        return  # nothing is held for what is no wallet
    if held is None or (held.source, held.amount) != terms:
        return
    limits.release(reference, attempt=(transfer.attempt if transfer else 0) + 1, refused=call)


def is_being_signed(wallets: Wallets, reference: str, *, submissions: Submissions, call: str) -> bool:
    """Tell whether another call than `call` was let through to sign this transfer just now, and has not yet."""
    held = Limits(wallets).get(reference)
    if held is None or held.state != "held" or not held.signing - {call}:
        return False
    # `asked_at` is when the newest of them was let through. One that is refused before changes nothing in it.
    if held.asked_at + SIGNING_SECONDS <= now().timestamp():
        return False
    signed = submissions.get(f"transfer:{reference}")
    return signed is None or signed.attempt < held.attempt


def count_found(wallets: Wallets, transfer: Submission, *, clock: Callable[[], datetime] = now) -> None:
    """Count a transfer that was given up as expired, with its reservation, and was found in its tick after all."""
    reference, limits = transfer.metadata["reference"], Limits(wallets, clock=clock)
    before = limits.get(reference)
    if before is not None and before.state == "released":
        limits.reserve(reference, transfer.source, transfer.amount, None, day_of(clock()), attempt=transfer.attempt)


def day_of(moment: datetime) -> str:
    """Return the day of UTC: `2026-11-23`."""
    return moment.astimezone(UTC).date().isoformat()
