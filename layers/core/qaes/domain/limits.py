"""The limits of a rule: the check of a transfer, and the arithmetic of rolling windows.

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
"""Number of buckets that are together as long as their window."""
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def bucket_at(moment: datetime, window_seconds: int) -> int:
    """Return the number of a moment's bucket; the buckets of all windows are counted from 1970."""
    return (moment - _EPOCH) * BUCKETS // timedelta(seconds=window_seconds)


def counts(bucket: int, newest: int) -> bool:
    """Return whether a bucket counts while the current time is in the bucket `newest`.

    A bucket after `newest` counts too, because another function's clock may be ahead.
    """
    return bucket >= newest - BUCKETS


def used(buckets: Mapping[int, int], newest: int) -> int:
    """Return the sum of the buckets that count."""
    return sum(total for bucket, total in buckets.items() if counts(bucket, newest))


def refusal_by_limits(rule: PolicyDecision, *, destination: object, amount: object) -> PermanentError | None:
    """Return the limit of the rule that a transfer exceeds on any day; None if it exceeds none.

    `destination` is an address. Its normal form is compared with the allowed ones, as in the verifier.

    Returns
    -------
    PermanentError
        `over_max_amount`, `daily_limit_exceeded`, `address_not_allowed`; `invalid_amount`: the rule has limits, but the
        amount is not a whole number from 1.
    """
    if not rule.limits_transfers:
        return None
    policy = f"policy {rule.policy_id}"
    if type(amount) is not int or amount < 1:
        return PermanentError(
            "invalid_amount", f"{policy} has limits, so the amount must be a whole number of at least 1"
        )
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
