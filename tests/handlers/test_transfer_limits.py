"""Rolling limits of transfers: whom they count for, approvals beyond them, and the sums of the release before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import boto3
import pytest

from qaes.adapters import dynamo, suspensions
from qaes.domain.errors import PermanentError, ThrottledError, TransientError
from qaes.domain.suspensions import Suspension
from qubic.items import ChangedError, Items
from qubic.transactions.signing import Signing
from tests.handlers.test_spending import (
    EMPTY,
    IDENTITY,
    NOBODY,
    NOON,
    POOR,
    RICH,
    WINDOW,
    Ledger,
    late,
    policy,
    windows,
)
from tests.support import policies
from tests.support.api import set_environment
from tests.support.cloud import Cloud, cloud

TODAY, YESTERDAY = "2026-11-23", "2026-11-22"
HOUR = 3600
OVER = {"approvals": 1, "approvers": "finance"}
STOPPED = Suspension(by="olivia", at="2026-11-28T06:00:00.000Z", reason="the key leaked")


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    set_environment("LedgerFunction", monkeypatch)
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def ledger(aws: Cloud) -> Ledger:
    return Ledger(aws)


def limits(ledger: Ledger, *of_the_rule: dict[str, Any]) -> None:
    ledger.policy = policies.of_limits("transfer_funds", *of_the_rule)


def limit(per: str, maximum: int, over: Any = "deny", counts: str = "amount", seconds: int = HOUR) -> dict[str, Any]:
    return {"window_seconds": seconds, f"max_{counts}": maximum, "per": per, "over": over}


def sums() -> list[int]:
    """Return the sum of each window that has one."""
    found = [sum(int(total["N"]) for total in item["buckets"]["M"].values()) for item in windows()]
    return sorted(total for total in found if total)


# Whom a limit counts for


@pytest.mark.parametrize(
    ("per", "same", "other"),
    [
        ("action", {"source": POOR, "to": NOBODY, "requested_by": "bob"}, None),
        ("requester", {"source": POOR, "requested_by": "alice"}, {"requested_by": "bob"}),
        ("source", {"source": IDENTITY, "requested_by": "bob"}, {"source": POOR}),
        ("destination", {"source": POOR, "requested_by": "bob"}, {"to": NOBODY}),
        ("agent", {"requested_by": "bob", "agent": "bot"}, {"agent": "another bot"}),
        ("agent", {"agent": "bot"}, {"agent": ""}),
    ],
)
@pytest.mark.parametrize("counts", ["amount", "count"])
def test_limit_counts_per_value(
    ledger: Ledger, counts: str, per: str, same: dict[str, Any], other: dict[str, Any] | None
) -> None:
    limits(ledger, limit(per, 10 if counts == "amount" else 1, counts=counts))
    by = {"requested_by": "alice", "agent": "bot"}
    ledger.transfer("a", 10, **by)
    assert ledger.refusal("b", 10, **by | same) == "limit_exceeded"
    if other is not None:
        ledger.transfer("c", 10, **by | other)
    ledger.moment += timedelta(seconds=HOUR * 61 / 60)
    ledger.transfer("d", 10, **by | same)


def test_destination_is_one_by_all_its_addresses(ledger: Ledger) -> None:
    limits(ledger, limit("destination", 10))
    ledger.transfer("a", 10, source=POOR, to=RICH)
    assert ledger.refusal("b", 1, source=POOR, to=IDENTITY) == "limit_exceeded"


def test_limits_of_a_rule_count_together_or_not_at_all(ledger: Ledger) -> None:
    limits(ledger, limit("action", 100), limit("source", 30), limit("requester", 2, counts="count"))
    ledger.transfer("a", 20, requested_by="alice")
    assert sums() == [1, 20, 20]
    assert ledger.refusal("b", 20, requested_by="alice") == "limit_exceeded"
    assert sums() == [1, 20, 20]
    ledger.faults(drop=2)
    ledger.transfer("c", 10, requested_by="alice")
    assert sums() == [2, 30, 30]
    ledger.settle()
    assert ledger.state("c").state == "expired"
    assert sums() == [1, 20, 20]


def test_refusal_states_the_limit_and_its_usage(ledger: Ledger) -> None:
    limits(ledger, limit("source", 30))
    ledger.transfer("a", 20)
    with pytest.raises(PermanentError) as caught:
        ledger.transfer("b", 11)
    assert caught.value.message.startswith("`amount` 11 QU exceeds the limit of 30 QU")
    assert "20 QU used" in caught.value.message


def test_rule_without_limits_writes_no_window(ledger: Ledger) -> None:
    limits(ledger)
    ledger.transfer("a", 10)
    ledger.settle()
    assert windows() == []
    item = boto3.client("dynamodb").get_item(
        TableName="LedgerTable",
        Key={"pk": {"S": "SUBMISSION#mock#transfer:a"}, "sk": {"S": "SUBMISSION"}},
    )["Item"]
    assert not {"agent", "granted", "counted_in"} & item.keys()


# Beyond a limit


def test_approved_transfer_counts_beyond_the_limit(ledger: Ledger) -> None:
    limits(ledger, limit("source", 30, OVER))
    ledger.transfer("a", 30)
    assert ledger.refusal("b", 1) == "limit_exceeded"
    [key] = [share.key for share in ledger.state("a").counted_in]
    ledger.transfer("c", 50, granted=[key])
    assert sums() == [80]
    assert ledger.refusal("d", 1, granted=["another"]) == "limit_exceeded"


def test_approval_is_no_way_past_a_limit_that_denies(ledger: Ledger) -> None:
    limits(ledger, limit("source", 30))
    ledger.transfer("a", 30)
    key = ledger.state("a").counted_in[0].key
    assert ledger.refusal("b", 1, granted=[key]) == "limit_exceeded"


def test_approval_beyond_a_limit_holds_when_signed_again(ledger: Ledger) -> None:
    limits(ledger, limit("source", 30, OVER))
    ledger.transfer("first", 30)
    ledger.transfer("waits", 50, granted=[ledger.state("first").counted_in[0].key])
    ledger.aws.clock.pass_seconds(45)
    ledger.moment += timedelta(minutes=10)
    ledger.settle()
    assert (ledger.state("waits").attempt, ledger.state("waits").state) == (2, "confirmed")
    assert sums() == [80]


# The sums of the release before


def spent_before(day: str, amount: int, source: str = IDENTITY) -> None:
    """Write a day's sum as the release before counted it."""
    key = dynamo.key(f"SPENT#mock#{source}#{day}", "SPENT")
    boto3.client("dynamodb").put_item(TableName="LedgerTable", Item=key | {"spent": {"N": str(amount)}})


def left_of_day(day: str) -> int:
    key = dynamo.key(f"SPENT#mock#{IDENTITY}#{day}", "SPENT")
    return int(boto3.client("dynamodb").get_item(TableName="LedgerTable", Key=key)["Item"]["spent"]["N"])


def as_before(reference: str, day: str = TODAY) -> None:
    """Make a submission one of the release before: it counts on a day."""
    boto3.client("dynamodb").update_item(
        TableName="LedgerTable",
        Key=dynamo.key(f"SUBMISSION#mock#transfer:{reference}", "SUBMISSION"),
        UpdateExpression="SET counted_on = :day",
        ExpressionAttributeValues={":day": {"S": day}},
    )


def test_sum_of_half_a_day_counts_after_the_upgrade(ledger: Ledger) -> None:
    spent_before(TODAY, 60)
    ledger.policy = policy(daily_limit=100)
    assert ledger.refusal("a", 41) == "daily_limit_exceeded"
    ledger.transfer("b", 40)
    assert ledger.spent() == 100
    for _ in range(11):  # no hour of the next day in which less counts than was sent in the 24 hours before
        ledger.moment += timedelta(hours=1)
        assert ledger.refusal(f"c{ledger.moment}", 1) == "daily_limit_exceeded"
    ledger.moment = NOON + timedelta(days=1)
    assert ledger.spent() == 100
    ledger.moment = NOON + timedelta(days=1, hours=12)
    assert ledger.spent() == 0


def test_sum_of_yesterday_counts_until_midnight(ledger: Ledger) -> None:
    spent_before(YESTERDAY, 60)
    ledger.policy = policy(daily_limit=100)
    ledger.moment = NOON + timedelta(hours=11, minutes=59)
    assert ledger.refusal("a", 41) == "daily_limit_exceeded"
    ledger.moment += timedelta(minutes=1)
    ledger.transfer("b", 100)


def test_sum_of_a_day_counts_for_no_other_window(ledger: Ledger) -> None:
    spent_before(TODAY, 60)
    limits(ledger, limit("source", 10), limit("requester", 10, seconds=86_400), limit("source", 1, counts="count"))
    ledger.transfer("a", 10)


def test_sums_of_days_are_not_read_two_days_later(ledger: Ledger) -> None:
    ledger.policy = policy(daily_limit=100)
    ledger.transfer("a", 10)
    ledger.moment += timedelta(days=2)
    spent_before("2026-11-25", 100)  # which no release writes any more
    assert ledger.spent() == 0


def test_transfer_of_the_release_before_gives_back_its_day(ledger: Ledger) -> None:
    limits(ledger)
    ledger.faults(drop=2)
    ledger.transfer("a", 60)
    spent_before(TODAY, 80)
    as_before("a")
    ledger.policy = policy(daily_limit=100)
    assert ledger.spent() == 80
    ledger.settle()
    assert (ledger.state("a").state, ledger.state("a").counted_on) == ("expired", "")
    assert (ledger.spent(), left_of_day(TODAY)) == (20, 20)


def test_transfer_of_the_release_before_is_signed_again(ledger: Ledger) -> None:
    """The day's sum already has the transfer: the window need not have room for it twice."""
    limits(ledger)
    late(ledger)
    spent_before(TODAY, 60)
    for reference in ("first", "waits"):
        as_before(reference)
    ledger.policy = policy(daily_limit=60)
    ledger.settle()
    waits = ledger.state("waits")
    assert (waits.attempt, waits.state, waits.counted_on) == (2, "confirmed", "")
    assert (ledger.spent(), left_of_day(TODAY)) == (60, 10)


def test_transfer_of_the_release_before_expires_days_later(ledger: Ledger) -> None:
    """The day no longer counts, so the window must have room for the transfer."""
    limits(ledger)
    late(ledger)
    spent_before(TODAY, 60)
    as_before("waits")
    ledger.moment += timedelta(days=3)
    ledger.policy = policy(daily_limit=50)
    ledger.transfer("b", 10)
    ledger.settle()
    assert (ledger.state("waits").state, ledger.spent(), left_of_day(TODAY)) == ("expired", 10, 10)


def test_given_up_transfer_of_the_release_before_counts(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The release before gave it back, and nothing states where it counted: it is found in its tick after all."""
    limits(ledger)
    first = ledger.transfer("a", 50)
    boto3.client("dynamodb").update_item(
        TableName="LedgerTable",
        Key=dynamo.key("SUBMISSION#mock#transfer:a", "SUBMISSION"),
        UpdateExpression="SET #state = :expired",
        ExpressionAttributeNames={"#state": "state"},
        ExpressionAttributeValues={":expired": {"S": "expired"}},
    )
    ledger.aws.clock.pass_seconds(40)
    found = ledger.transfer("a", 50, run=2)
    assert (found.state, found.txid, ledger.spent()) == ("confirmed", first.txid, 50)


# Suspended


@pytest.mark.parametrize("name", ["transfer_funds", "*"])
def test_nothing_is_signed_while_transfers_are_suspended(ledger: Ledger, name: str) -> None:
    dynamo.transact(suspensions.puts({name: STOPPED}))
    with pytest.raises(PermanentError, match=r"olivia suspended .* the key leaked") as caught:
        ledger.transfer("a", 10)
    assert caught.value.code == "suspended"
    assert windows() == []
    dynamo.transact(suspensions.puts({}))
    assert ledger.transfer("a", 10).state == "failed"  # in this run
    ledger.transfer("a", 10, run=2)
    ledger.settle()
    assert ledger.state("a").state == "confirmed"


def test_records_are_signed_while_every_action_is_suspended(ledger: Ledger) -> None:
    dynamo.transact(suspensions.puts({"*": STOPPED}))
    it = ledger.submissions()
    assert it.submit_record("hash:1", bytes(32), kind="hash", metadata={}).txid


def test_waiting_transfer_is_not_signed_again_when_suspended(ledger: Ledger) -> None:
    late(ledger)
    dynamo.transact(suspensions.puts({"transfer_funds": STOPPED}))
    ledger.settle()
    waits = ledger.state("waits")
    assert (waits.state, ledger.spent()) == ("expired", 10)
    assert "olivia suspended" in waits.error


# At the same moment


def test_busy_window_is_read_again_without_a_new_signature(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    limits(ledger, limit("action", 100))
    write, signed = Items.write, []

    def others_first(it: Items, *writes: Any) -> None:
        """Another transfer is stored between the reading of the window and the transaction."""
        if len(signed) < 3 and any("LIMIT#" in str(each) for each in writes):
            signed.append([each for each in writes if "TXID#" in str(each)])
            monkeypatch.setattr(Items, "write", write)
            ledger.transfer(f"b{len(signed)}", 10, source=POOR)
            monkeypatch.setattr(Items, "write", others_first)
        write(it, *writes)

    monkeypatch.setattr(Items, "write", others_first)
    ledger.transfer("a", 10)
    assert len({str(each) for each in signed}) == 1
    assert sums() == [40]


def test_window_that_stays_busy_is_retriable(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    limits(ledger, limit("action", 100))
    monkeypatch.setattr(dynamo, "PATIENCE_SECONDS", 0.2)
    calls = []

    def busy(it: Items, *writes: Any) -> None:
        calls.append(writes)
        raise ChangedError((len(writes) - 1,))

    monkeypatch.setattr(Items, "write", busy)
    began = time.monotonic()
    with pytest.raises(ThrottledError, match="same limits"):
        ledger.submissions().submit_transfer("a", source=RICH, destination=EMPTY, amount=10)
    assert time.monotonic() - began < 2
    assert len(calls) > 1
    assert issubclass(ThrottledError, TransientError)


def test_signature_that_was_not_sent_counts_once(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process ends between the transaction and the broadcast; the transaction worker sends it."""
    limits(ledger, limit("source", 100))
    with monkeypatch.context() as patch:
        patch.setattr(Signing, "_on_signed", lambda *_: None, raising=False)
        patch.setattr("qubic.transactions.submissions.Submissions._send_soon", lambda *_, **__: None)
        ledger.transfer("a", 40)
    assert (ledger.state("a").state, sums()) == ("signed", [40])
    ledger.transfer("a", 40)
    ledger.settle()
    assert (ledger.state("a").state, sums()) == ("confirmed", [40])
    ledger.moment += WINDOW
    assert ledger.spent() == 0
