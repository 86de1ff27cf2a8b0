"""Reservations against a daily limit: once for each transfer, never beyond the limit, however many ask at once."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest

from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.task_store import TaskStore
from qaes.domain.errors import InvalidInputError, RefusedError, UnavailableError
from qaes.domain.policy import DEFAULT_RULES, Policy, Rule
from qaes.domain.qubic.identity import encode_identity
from qubic import limits as module
from qubic import service
from qubic.chain.mock import Faults
from qubic.limits import Limits, day_of, release_refused, reserve_for
from qubic.submissions import Submissions
from qubic.wallets import DEMO_BALANCES, Wallets, demo_key, service_key
from tests.handlers.test_task_store import TRANSFER, waiting
from tests.support.api import set_environment
from tests.support.cloud import Cloud, cloud

RICH, POOR, EMPTY = DEMO_BALANCES
DAY, NEXT_DAY = "2026-11-23", "2026-11-24"
WALLETS = Wallets("mock")


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    set_environment("LedgerFunction", monkeypatch)
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def limits(aws: Cloud) -> Limits:
    return Limits()


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait()
        try:
            return call()
        except RefusedError as error:
            return error.code

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def test_the_sum_of_a_day_never_exceeds_the_limit(limits: Limits) -> None:
    limits.reserve("a", RICH, 60, 100, DAY)
    limits.reserve("b", RICH, 40, 100, DAY)
    with pytest.raises(RefusedError) as caught:
        limits.reserve("c", RICH, 1, 100, DAY)
    assert caught.value.code == "over_daily_limit"
    assert (caught.value.details["spent"], caught.value.details["limit"]) == (100, 100)
    assert limits.spent(RICH, DAY) == 100
    assert limits.get("c") is None
    # Another day and another wallet have their own.
    limits.reserve("c", RICH, 100, 100, NEXT_DAY)
    limits.reserve("d", POOR, 100, 100, DAY)


def test_an_amount_over_the_limit_is_refused_on_a_fresh_day(limits: Limits) -> None:
    with pytest.raises(RefusedError) as caught:
        limits.reserve("a", RICH, 101, 100, DAY)
    assert caught.value.code == "over_daily_limit"
    assert limits.spent(RICH, DAY) == 0


def test_the_same_reference_reserves_once(limits: Limits) -> None:
    first = limits.reserve("a", RICH, 60, 100, DAY)
    assert limits.reserve("a", RICH, 60, 100, DAY) == first
    # Even where the limit has become smaller: it was let through.
    assert limits.reserve("a", RICH, 60, 10, DAY) == first
    assert limits.spent(RICH, DAY) == 60


@pytest.mark.parametrize(("source", "amount"), [(RICH, 61), (POOR, 60)])
def test_other_terms_under_the_same_reference_are_refused(limits: Limits, source: str, amount: int) -> None:
    limits.reserve("a", RICH, 60, 1000, DAY)
    with pytest.raises(RefusedError) as caught:
        limits.reserve("a", source, amount, 1000, DAY)
    assert caught.value.code == "reference_conflict"
    assert (limits.spent(RICH, DAY), limits.spent(POOR, DAY)) == (60, 0)


def test_a_wallet_is_one_by_all_its_addresses(limits: Limits) -> None:
    identity = demo_key(RICH).identity
    limits.reserve("a", RICH, 60, 100, DAY)
    for address in (identity, RICH.upper().replace("X", "x")):
        with pytest.raises(RefusedError):
            limits.reserve("b", address, 41, 100, DAY)
    assert limits.reserve("a", identity, 60, 100, DAY).source == identity
    assert limits.spent(identity, DAY) == 60


def test_asked_for_on_a_later_day_it_counts_there(limits: Limits) -> None:
    limits.reserve("a", RICH, 60, 100, DAY)
    assert limits.reserve("a", RICH, 60, 100, NEXT_DAY).day == NEXT_DAY
    assert limits.spent(RICH, NEXT_DAY) == 60
    # A late echo of the day before changes nothing.
    assert limits.reserve("a", RICH, 60, 100, DAY).day == NEXT_DAY
    limits.reserve("b", RICH, 40, 100, NEXT_DAY)
    with pytest.raises(RefusedError):
        limits.reserve("c", RICH, 1, 100, NEXT_DAY)


def test_what_is_released_can_be_spent_again_and_is_released_once(limits: Limits) -> None:
    limits.reserve("a", RICH, 60, 100, DAY)
    limits.reserve("b", RICH, 40, 100, DAY)
    for _ in range(3):
        limits.release("a")
    assert limits.spent(RICH, DAY) == 40
    limits.reserve("c", RICH, 60, 100, DAY)
    with pytest.raises(RefusedError):
        limits.reserve("a", RICH, 60, 100, DAY)  # it needs a new one, and there is no room
    limits.release("c")
    assert limits.reserve("a", RICH, 60, 100, DAY).state == "held"
    assert limits.spent(RICH, DAY) == 100
    limits.release("nobody")
    limits.release("a")
    assert limits.spent(RICH, DAY) == 40


def test_what_an_earlier_attempt_gives_back_late_is_not_the_later_ones(limits: Limits) -> None:
    limits.reserve("a", RICH, 60, 100, DAY)
    assert limits.reserve("a", RICH, 60, 100, DAY, attempt=2).attempt == 2
    assert limits.spent(RICH, DAY) == 60
    limits.release("a", attempt=1)
    assert limits.spent(RICH, DAY) == 60
    limits.release("a", attempt=2)
    assert limits.spent(RICH, DAY) == 0


@pytest.mark.parametrize("amount", [0, -1, True, 1.0, "1", None, 10**15 + 1])
def test_an_amount_that_is_none(limits: Limits, amount: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        limits.reserve("a", RICH, amount, 100, DAY)
    assert caught.value.field == "amount"


@pytest.mark.parametrize(
    ("reference", "source", "field"),
    [("", RICH, "reference"), ("x" * 257, RICH, "reference"), (None, RICH, "reference"), ("a", "0x12", "source")],
    ids=["empty", "long", "none", "wallet"],
)
def test_what_is_no_reference_and_no_wallet(limits: Limits, reference: Any, source: str, field: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        limits.reserve(reference, source, 1, 100, DAY)
    assert caught.value.field == field


# At once


def test_twenty_race_for_a_limit_that_has_room_for_three(aws: Cloud) -> None:
    calls = [lambda n=n: Limits().reserve(f"task_{n}#step_3", RICH, 30, 100, DAY).reference for n in range(20)]
    found = at_once(calls)
    assert found.count("over_daily_limit") == 17
    held = [Limits().get(each) for each in found if each != "over_daily_limit"]
    assert [each.state for each in held if each] == ["held"] * 3
    assert Limits().spent(RICH, DAY) == 90


def test_the_same_reference_many_times_at_once(aws: Cloud) -> None:
    """The last one that fits: none of its twins may hear that there is no room."""
    found = at_once([lambda: Limits().reserve("a", RICH, 100, 100, DAY).amount] * 12)
    assert found == [100] * 12
    assert Limits().spent(RICH, DAY) == 100


def test_a_sum_that_was_set_back_does_not_keep_a_reservation_from_ending(limits: Limits) -> None:
    limits.reserve("a", RICH, 60, 100, DAY)
    key = {"pk": {"S": f"SPENT#mock#{WALLETS.identity(RICH)}#{DAY}"}, "sk": {"S": "SPENT"}}
    boto3.client("dynamodb").delete_item(TableName="LedgerTable", Key=key)
    limits.release("a")
    found = limits.get("a")
    assert found is not None and found.state == "released"
    assert limits.spent(RICH, DAY) == 0


def test_releases_at_once_give_back_once(aws: Cloud) -> None:
    Limits().reserve("a", RICH, 30, 100, DAY)
    Limits().reserve("b", RICH, 30, 100, DAY)
    at_once([lambda: Limits().release("a")] * 8)
    assert Limits().spent(RICH, DAY) == 30


# By the policy in force


def policy(**limits: Any) -> Policy:
    rule = Rule(allowed=True, requires_approval=True, risk_level="high", **limits)
    return Policy(policy_id="policy-v7-0123456789ab", version=7, rules=DEFAULT_RULES | {"transfer_funds": rule})


def terms(**changes: Any) -> dict[str, Any]:
    return {
        "reference": "task_1#step_3", "source": RICH, "destination": EMPTY, "amount": 50,
    } | changes  # fmt: skip


@pytest.mark.parametrize(
    ("limits_", "changes", "code"),
    [
        ({"max_amount": 49}, {}, "over_max_amount"),
        ({"daily_limit": 49}, {}, "over_daily_limit"),
        ({"allowed_addresses": (POOR,)}, {}, "address_not_allowed"),
    ],
)
def test_what_the_policy_does_not_allow_reserves_nothing(
    limits: Limits, limits_: dict[str, Any], changes: dict[str, Any], code: str
) -> None:
    with pytest.raises(RefusedError) as caught:
        reserve_for(policy(**limits_), WALLETS, terms(**changes))
    assert caught.value.code == code
    assert "policy-v7-0123456789ab" in caught.value.message
    assert limits.get("task_1#step_3") is None


@pytest.mark.parametrize("spelled", [EMPTY, EMPTY.upper().replace("X", "x"), demo_key(EMPTY).identity])
@pytest.mark.parametrize("allowed", [EMPTY, demo_key(EMPTY).identity])
def test_an_allowed_address_is_so_in_any_spelling(aws: Cloud, spelled: str, allowed: str) -> None:
    reserve_for(policy(allowed_addresses=(POOR, allowed)), WALLETS, terms(destination=spelled))


def test_an_address_that_the_network_does_not_know_is_nobodys(aws: Cloud) -> None:
    """On the real network the older addresses mean nothing: neither as a destination, nor as an allowed one."""
    wallets = Wallets("mainnet")
    identity, source = demo_key(EMPTY).identity, service_key().identity
    with pytest.raises(RefusedError) as caught:
        reserve_for(policy(allowed_addresses=(EMPTY,)), wallets, terms(source=source, destination=identity))
    assert caught.value.code == "address_not_allowed"
    with pytest.raises(RefusedError) as caught:
        reserve_for(policy(allowed_addresses=(EMPTY,)), wallets, terms(source=source))
    assert caught.value.code == "invalid_address"
    allowed = policy(allowed_addresses=(EMPTY, identity))
    reserve_for(allowed, wallets, terms(source=source, destination=identity))


def test_without_a_daily_limit_it_is_counted_and_a_limit_that_is_set_later_has_it_in(limits: Limits) -> None:
    reserve_for(policy(max_amount=50), WALLETS, terms(), clock=at(23))
    reserve_for(policy(max_amount=50), WALLETS, terms(reference="b"), clock=at(23))
    assert limits.spent(RICH, DAY) == 100
    with pytest.raises(RefusedError) as caught:
        reserve_for(policy(daily_limit=149), WALLETS, terms(reference="c"), clock=at(23))
    assert caught.value.code == "over_daily_limit"
    reserve_for(policy(daily_limit=150), WALLETS, terms(reference="c"), clock=at(23))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"destination": RICH}, InvalidInputError),
        ({"destination": demo_key(RICH).identity}, InvalidInputError),
        ({"destination": "0x12"}, InvalidInputError),
        ({"reference": "x" * 3000}, InvalidInputError),
        ({"reference": 7}, InvalidInputError),
        ({"source": encode_identity(bytes([7]) * 32)}, RefusedError),
        ({"destination": encode_identity(bytes(32))}, InvalidInputError),
        ({"destination": encode_identity(b"\1" + bytes(31))}, InvalidInputError),
    ],
    ids=[
        "itself",
        "itself, spelled otherwise",
        "no address",
        "long reference",
        "no reference",
        "no key",
        "a burn",
        "a contract",
    ],
)
def test_what_could_not_be_signed_reserves_nothing(aws: Cloud, changes: dict[str, Any], error: type) -> None:
    with pytest.raises(error):
        reserve_for(policy(daily_limit=100), WALLETS, terms(**changes), submissions=service.submissions())
    assert reservations() == []


def test_what_is_only_simulated_reserves_nothing(limits: Limits) -> None:
    reserve_for(policy(daily_limit=60), WALLETS, terms(), only_check=True)
    assert reservations() == []
    with pytest.raises(RefusedError):
        reserve_for(policy(max_amount=49), WALLETS, terms(), only_check=True)


def test_a_day_is_one_of_utc(limits: Limits) -> None:
    for hour, reference in ((0, "a"), (23, "b")):
        reserve_for(
            policy(daily_limit=100), WALLETS, terms(reference=reference),
            clock=lambda hour=hour: datetime(2026, 11, 23, hour, 59, 59, tzinfo=UTC),
        )  # fmt: skip
    assert limits.spent(RICH, DAY) == 100


def at(day: int) -> Callable[[], datetime]:
    return lambda: datetime(2026, 11, day, 12, tzinfo=UTC)


def test_a_transfer_that_was_signed_is_not_asked_about_again(limits: Limits) -> None:
    """Made on one day, asked about on the next, when nothing is left: it would be denied with its money gone."""
    it = service.submissions()
    reserve_for(policy(daily_limit=60), WALLETS, terms(), submissions=it, clock=at(23))
    it.submit_transfer("task_1#step_3", source=RICH, destination=EMPTY, amount=50)
    reserve_for(policy(daily_limit=60), WALLETS, terms(reference="another"), submissions=it, clock=at(24))
    reserve_for(policy(daily_limit=60), WALLETS, terms(), submissions=it, clock=at(24))
    assert limits.spent(RICH, NEXT_DAY) == 50


def test_a_later_run_of_an_expired_transfer_reserves_for_its_next_attempt(aws: Cloud, limits: Limits) -> None:
    it = service.submissions()
    it.chain.set_faults(Faults(drop=1))  # type: ignore[attr-defined]  # it is sent, and never gets there
    reserve_for(policy(daily_limit=60), WALLETS, terms(), submissions=it, clock=at(23))
    it.submit_transfer("task_1#step_3", source=RICH, destination=EMPTY, amount=50)
    aws.settle()
    expired = it.get("transfer:task_1#step_3")
    assert expired is not None
    assert expired.state == "expired"
    assert limits.spent(RICH, DAY) == 0  # given back by what follows its end
    reserve_for(policy(daily_limit=60), WALLETS, terms(), submissions=it, clock=at(23))
    limits.release("task_1#step_3", attempt=expired.attempt)  # told once more, late
    assert limits.spent(RICH, DAY) == 50


def test_what_may_have_moved_keeps_its_reservation_and_needs_no_other(
    aws: Cloud, limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    fate = ("failed", "moved_unknown: the wallet's key is used elsewhere, too")
    monkeypatch.setattr(Submissions, "_moved", lambda *_: fate)
    it = service.submissions()
    reserve_for(policy(daily_limit=60), WALLETS, terms(), submissions=it, clock=at(23))
    it.submit_transfer("task_1#step_3", source=RICH, destination=EMPTY, amount=50)
    aws.settle()
    assert limits.spent(RICH, DAY) == 50
    reserve_for(policy(daily_limit=60), WALLETS, terms(), submissions=it, clock=at(24))
    release_refused(WALLETS, terms(), submissions=it, call="x")
    assert (limits.spent(RICH, DAY), limits.spent(RICH, NEXT_DAY)) == (50, 0)
    again = it.submit_transfer("task_1#step_3", source=RICH, destination=EMPTY, amount=50, run=2)
    assert (again.state, again.attempt) == ("failed", 1)


# What nobody signs


def later(seconds: int) -> Callable[[], datetime]:
    return lambda: datetime(2026, 11, 23, 12, tzinfo=UTC) + timedelta(seconds=seconds)


def test_what_nobody_signed_for_an_hour_makes_room_for_others(limits: Limits) -> None:
    """The task was cancelled after the compliance agent had it reserved, say."""
    it = service.submissions()

    def ask(reference: str, seconds: int) -> None:
        reserve_for(policy(daily_limit=60), WALLETS, terms(reference=reference), submissions=it, clock=later(seconds))

    ask("a", 0)
    with pytest.raises(RefusedError):
        ask("b", 3599)
    ask("b", 3600)
    assert limits.spent(RICH, DAY) == 50
    with pytest.raises(RefusedError):
        ask("a", 3601)  # it has lost its place
    limits.release("b")
    ask("a", 3601)
    assert limits.spent(RICH, DAY) == 50


def test_what_is_asked_for_again_or_is_about_to_be_signed_keeps_its_place(limits: Limits) -> None:
    it = service.submissions()

    def ask(reference: str, seconds: int, **changes: Any) -> None:
        reserve_for(
            policy(daily_limit=60), WALLETS, terms(reference=reference), submissions=it, clock=later(seconds), **changes
        )

    ask("a", 0)
    ask("a", 3700)
    with pytest.raises(RefusedError):
        ask("b", 3800)
    ask("a", 3900, call="signs now")
    with pytest.raises(RefusedError):
        ask("b", 3900 + 3599)
    ask("b", 3900 + 3600)


def test_what_was_signed_keeps_its_place_however_old_it_is(limits: Limits) -> None:
    it = service.submissions()
    reserve_for(policy(daily_limit=60), WALLETS, terms(), submissions=it, clock=later(0))
    it.submit_transfer("task_1#step_3", source=RICH, destination=EMPTY, amount=50)
    for _ in range(2):
        with pytest.raises(RefusedError):
            reserve_for(
                policy(daily_limit=60), WALLETS, terms(reference="b"), submissions=it, clock=later(4 * 3600)
            )  # fmt: skip
        assert limits.spent(RICH, DAY) == 50
    assert holds() == []  # nobody looks at it again


def test_the_list_of_what_is_not_signed_yet_does_not_grow_for_ever(
    limits: Limits, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MANY_HOLDS", 2)
    it = service.submissions()
    for number in range(4):
        reserve_for(policy(), WALLETS, terms(reference=f"{number}", amount=1), submissions=it, clock=later(number))
        it.submit_transfer(f"{number}", source=RICH, destination=EMPTY, amount=1)
        assert len(holds()) <= 3
    assert limits.spent(RICH, DAY) == 4


def holds() -> list[str]:
    found = boto3.client("dynamodb").scan(TableName="LedgerTable")["Items"]
    return [each for item in found if "holds" in item for each in item["holds"]["SS"]]


def reservations() -> list[str]:
    found = boto3.client("dynamodb").scan(TableName="LedgerTable")["Items"]
    return [item["pk"]["S"] for item in found if item["pk"]["S"].startswith(("RESERVATION#", "SPENT#"))]


# Refused, while another call is about to sign


def test_a_refused_call_leaves_what_another_one_may_be_about_to_sign(limits: Limits) -> None:
    limits.reserve("a", RICH, 60, 100, DAY)
    limits.reserve("a", RICH, 60, 100, DAY, call="one")
    limits.release("a", refused="two")  # refused before it was let through
    limits.reserve("a", RICH, 60, 100, DAY, call="two")
    limits.release("a", refused="two")
    assert limits.spent(RICH, DAY) == 60
    limits.release("a", refused="one")
    assert limits.spent(RICH, DAY) == 0
    # The next one is let through anew.
    assert limits.reserve("a", RICH, 60, 100, DAY, call="three").signing == {"three"}
    assert limits.spent(RICH, DAY) == 60


def test_a_refused_call_gives_back_nothing_of_other_terms(limits: Limits) -> None:
    it = service.submissions()
    reserve_for(policy(), WALLETS, terms(), submissions=it, clock=at(23))
    for changes in ({"amount": 51}, {"source": POOR}, {"source": "0x12"}):
        release_refused(WALLETS, terms(**changes), submissions=it, call="x")
    assert limits.spent(RICH, DAY) == 50
    release_refused(WALLETS, terms(), submissions=it, call="x")
    assert limits.spent(RICH, DAY) == 0


# As the other services ask


def publish(aws: Cloud, **limits: Any) -> None:
    store = service.policies()
    store.propose(policy(**limits).rules, subject="olivia")
    store.approve(2, subject="oscar", four_eyes=True)
    aws.settle()


def test_the_ledgers_operation(aws: Cloud) -> None:
    publish(aws, max_amount=50, daily_limit=80)
    client = LedgerClient("LedgerTransferFunction")
    client.reserve(**terms())
    client.reserve(**terms())
    for changes, code in (
        ({"reference": "b", "amount": 51}, "over_max_amount"),
        ({"reference": "b", "amount": 31}, "over_daily_limit"),
        ({"amount": 49}, "reference_conflict"),
        ({"amount": True}, "invalid_amount"),
    ):
        with pytest.raises(RefusedError) as caught:
            client.reserve(**terms(**changes))
        assert caught.value.code == code
    [spent] = [
        item for item in boto3.client("dynamodb").scan(TableName="LedgerTable")["Items"]
        if item["pk"]["S"].startswith("SPENT#mock#")
    ]  # fmt: skip
    assert spent["spent"]["N"] == "50"


def approved_task(store: TaskStore) -> str:
    task_id, _ = waiting(store)
    store.decide(task_id, approved=True, subject="bob", reason="checked")
    return task_id


def test_the_compliance_agent_reserves_when_the_step_may_run(aws: Cloud) -> None:
    publish(aws, daily_limit=8)
    store = TaskStore("TasksTable")
    [unapproved, _], first, second = waiting(store), approved_task(store), approved_task(store)

    def verdict(task_id: str, step_index: int = 2) -> dict[str, Any]:
        event = {"task_id": task_id, "step_index": step_index}
        return dict(aws.invoke("CheckComplianceFunction", event))

    today = day_of(datetime.now(UTC))
    assert verdict(unapproved)["verdict"] == "await_approval"
    assert verdict(first, step_index=0)["verdict"] == "execute"
    assert Limits().spent(RICH, today) == 0
    for _ in range(2):  # asked twice, it is reserved once
        assert verdict(first)["verdict"] == "execute"
    assert Limits().spent(RICH, today) == TRANSFER["amount"] == 5
    held = Limits().get(f"{first}#step_3")
    assert held is not None
    assert held.state == "held"
    denied = verdict(second)
    assert denied["verdict"] == "denied"
    assert "daily_limit" in denied["reason"]
    assert service.policies().in_force().policy_id in denied["reason"]


def test_without_limits_the_compliance_agent_reserves_nothing(aws: Cloud) -> None:
    task_id = approved_task(TaskStore("TasksTable"))
    assert aws.invoke("CheckComplianceFunction", {"task_id": task_id, "step_index": 2})["verdict"] == "execute"
    assert Limits().get(f"{task_id}#step_3") is None


def test_a_ledger_that_does_not_answer_lets_nothing_run(aws: Cloud) -> None:
    publish(aws, daily_limit=8)
    task_id = approved_task(TaskStore("TasksTable"))

    def down(event: dict[str, Any]) -> None:
        if event["operation"] == "reserve":
            raise RuntimeError("down")

    aws.faults["LedgerTransferFunction"] = down
    with pytest.raises(UnavailableError):
        aws.invoke("CheckComplianceFunction", {"task_id": task_id, "step_index": 2})
