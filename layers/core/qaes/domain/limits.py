"""The limits of a rule: whether they let a transfer pass, and the arithmetic of their rolling windows.

A window has 60 buckets, each with a number and a sum. The newest 61 buckets cover at least the seconds of the window,
so a limit never admits more than the exact rolling sum would.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta

from qaes.domain.errors import InvalidInputError, PermanentError
from qaes.domain.policy import PolicyDecision
from qaes.domain.qubic.identity import check_address

BUCKETS = 60
"""How many buckets are as long as their window."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def bucket_at(moment: datetime, window_seconds: int) -> int:
    """Return the number of the bucket that a moment is in; buckets of all windows are counted from 1970."""
    return (moment - _EPOCH) * BUCKETS // timedelta(seconds=window_seconds)


def counts(bucket: int, newest: int) -> bool:
    """Return whether a bucket counts while the present moment is in the bucket `newest`.

    A bucket after `newest` counts too: the clock of another writer is ahead.
    """
    return bucket >= newest - BUCKETS


def used(buckets: Mapping[int, int], newest: int) -> int:
    """Return the sum of the buckets that count."""
    return sum(total for bucket, total in buckets.items() if counts(bucket, newest))


def refusal_by_limits(rule: PolicyDecision, *, destination: object, amount: object) -> PermanentError | None:
    """Return which limit of the rule a transfer is beyond on any day; None when it is within all of them.

    `destination` is an address. It is compared in its one spelling with the allowed ones, as the verifier does.

    Returns
    -------
    PermanentError
        `over_max_amount`, `daily_limit_exceeded`, `address_not_allowed`; `invalid_amount`: there are limits, and the
        amount is not a whole number from 1.
    """
    if not rule.limits_transfers:
        return None
    policy = f"policy {rule.policy_id}"
    if type(amount) is not int or amount < 1:
        return PermanentError("invalid_amount", f"{policy} has limits, and the amount is no whole number")
    if rule.max_amount is not None and amount > rule.max_amount:
        text = f"over max_amount: {policy} lets a transfer move at most {rule.max_amount} QU"
        return PermanentError("over_max_amount", text)
    if refusal := refusal_by_daily_limit(rule, amount=amount, spent=0):
        return refusal
    if rule.allowed_addresses is not None and not _is_among(destination, rule.allowed_addresses):
        text = f"not among allowed_addresses: {policy} does not let money go to that address"
        return PermanentError("address_not_allowed", text)
    return None


def refusal_by_daily_limit(rule: PolicyDecision, *, amount: int, spent: int) -> PermanentError | None:
    """Return `daily_limit_exceeded` if a wallet that has sent `spent` QU in 24 hours may not send `amount` more."""
    if rule.daily_limit is None or spent + amount <= rule.daily_limit:
        return None
    text = f"over daily_limit: policy {rule.policy_id} lets a wallet send at most {rule.daily_limit} QU in 24 hours"
    if spent:
        text += f", and {spent} QU are used"
    return PermanentError("daily_limit_exceeded", text, spent=spent, limit=rule.daily_limit)


def _is_among(address: object, allowed: tuple[str, ...]) -> bool:
    try:
        return check_address(address) in allowed
    except InvalidInputError:
        return False
