"""The limits of transfers: each counts once, with its signature, and never beyond a limit, however many request it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from qaes.adapters.task_repository import TaskStore
from qaes.domain.errors import InvalidInputError, PermanentError, TransientError
from qaes.domain.policy import DEFAULT_RULES, Policy, Rule
from qaes.domain.qubic.identity import encode_identity
from qubic import wiring
from qubic.network.base import SentList
from qubic.network.faults import Faults
from qubic.network.mock import MockChain
from qubic.spending import rule_for
from qubic.transactions.model import Submission
from qubic.transactions.signing import LEAD_TICKS
from qubic.transactions.submissions import Submissions
from qubic.wallets import DEMO_BALANCES, Wallets, demo_key
from tests.handlers.test_task_repository import waiting
from tests.support.api import set_environment
from tests.support.cloud import Cloud, cloud

RICH, POOR, EMPTY = DEMO_BALANCES
NOON = datetime(2026, 11, 23, 12, tzinfo=UTC)
WINDOW = timedelta(seconds=86_400 * 61 / 60)
"""After so long, nothing of a moment counts in a window of 24 hours."""
IDENTITY = demo_key(RICH).identity
NOBODY = encode_identity(bytes([7]) * 32)
"""An identity that is no contract's, and whose key is nowhere."""


class Ledger:
    """The service's own submissions, under a policy that a test sets, at a moment that it sets."""

    def __init__(self, aws: Cloud) -> None:
        self.aws = aws
        self.moment = NOON
        self.policy = policy(daily_limit=10**15)

    def submissions(self) -> Submissions:
        def rule(submission: Submission) -> Any:
            return rule_for(
                self.policy,
                source=submission.source,
                destination=submission.address,
                amount=submission.amount,
                requester=submission.requested_by,
                agent=submission.agent or None,
            )

        chain = MockChain(genesis={}, table="ChainTable", clock=self.aws.clock, tick_milliseconds=1000)
        return Submissions(chain, "LedgerTable", rule_for=rule, clock=lambda: self.moment)

    def transfer(
        self, reference: str, amount: int, source: str = RICH, run: int = 1, to: str = EMPTY, **by: Any
    ) -> Submission:
        """Submit a transfer; a busy queue is asked again, as the state machine does."""
        for _ in range(50):
            try:
                return self.submissions().submit_transfer(
                    reference, source=source, destination=to, amount=amount, run=run, **by
                )
            except TransientError:
                time.sleep(0.01)
        raise AssertionError("the queue stays busy")

    def refusal(self, *arguments: Any, **changes: Any) -> str:
        with pytest.raises(PermanentError) as caught:
            self.transfer(*arguments, **changes)
        return caught.value.code

    def spent(self, source: str = RICH) -> int:
        """Return the usage of a wallet's window of 24 hours."""
        identity = Wallets("mock").identity(source)
        rule = rule_for(policy(daily_limit=10**15), source=identity, destination=NOBODY, amount=1)
        return self.submissions().spending.read(rule.limits)[0].used

    def state(self, reference: str) -> Submission:
        found = self.submissions().get(f"transfer:{reference}")
        assert found is not None
        return found

    def settle(self) -> None:
        """Let the ticks pass until nothing is open."""
        for _ in range(40):
            it = self.submissions()
            if not it.open_sources():
                return
            self.aws.clock.pass_seconds(LEAD_TICKS + 6)
            for identity in it.open_sources():
                it.advance(identity)
        raise AssertionError("there is no end of it")

    def faults(self, **faults: int) -> None:
        self.submissions().chain.set_faults(Faults(**faults))  # type: ignore[attr-defined]


def policy(**limits: Any) -> Policy:
    rule = Rule(allowed=True, requires_approval=True, risk_level="high", **limits)
    return Policy(policy_id="policy-v7-0123456789ab", version=7, rules=DEFAULT_RULES | {"transfer_funds": rule})


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    set_environment("LedgerFunction", monkeypatch)
    with cloud(state_machine=False) as it:
        yield it


@pytest.fixture
def ledger(aws: Cloud) -> Ledger:
    return Ledger(aws)


def at_once(calls: list[Callable[[], Any]]) -> list[Any]:
    start = threading.Barrier(len(calls))

    def run(call: Callable[[], Any]) -> Any:
        start.wait()
        try:
            return call()
        except PermanentError as error:
            return error.code

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(run, calls))


def windows() -> list[dict[str, Any]]:
    items = boto3.client("dynamodb").scan(TableName="LedgerTable")["Items"]
    return [item for item in items if item["pk"]["S"].startswith("LIMIT#")]


# The limit


def test_sum_of_a_window_never_exceeds_the_limit(ledger: Ledger) -> None:
    ledger.policy = policy(daily_limit=100)
    ledger.transfer("a", 60)
    ledger.transfer("b", 40)
    assert ledger.refusal("c", 1) == "daily_limit_exceeded"
    assert "at most 100 QU" in ledger.state("c").error
    ledger.transfer("d", 100, source=POOR)  # another wallet has its own
    ledger.moment += WINDOW
    ledger.transfer("e", 100)
    assert (ledger.spent(), ledger.spent(POOR)) == (100, 0)


def test_window_rolls_over_midnight(ledger: Ledger) -> None:
    ledger.policy = policy(daily_limit=100)
    ledger.moment = datetime(2026, 11, 23, 23, 59, tzinfo=UTC)
    ledger.transfer("a", 100)
    ledger.moment += timedelta(minutes=2)
    assert ledger.refusal("b", 1) == "daily_limit_exceeded"
    ledger.moment += timedelta(hours=23, minutes=57)
    assert ledger.refusal("c", 1) == "daily_limit_exceeded"
    ledger.moment += timedelta(minutes=26)
    assert ledger.transfer("d", 100).state in {"signed", "broadcast"}


@pytest.mark.parametrize(
    ("limits", "code"),
    [
        ({"max_amount": 49}, "over_max_amount"),
        ({"daily_limit": 49}, "daily_limit_exceeded"),
        ({"allowed_addresses": (POOR,)}, "address_not_allowed"),
    ],
)
def test_transfer_beyond_the_policy_counts_nothing(ledger: Ledger, limits: dict[str, Any], code: str) -> None:
    ledger.policy = policy(**limits)
    assert ledger.refusal("a", 50) == code
    assert ledger.policy.policy_id in ledger.state("a").error
    assert windows() == []


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"to": RICH}, InvalidInputError),
        ({"to": IDENTITY}, InvalidInputError),
        ({"to": "0x12"}, InvalidInputError),
        ({"to": encode_identity(bytes(32))}, PermanentError),
        ({"to": encode_identity(b"\1" + bytes(31))}, PermanentError),
        ({"reference": "x" * 257}, InvalidInputError),
        ({"amount": 0}, InvalidInputError),
        ({"amount": 10**15 + 1}, InvalidInputError),
        ({"source": NOBODY}, PermanentError),
        ({"source": EMPTY, "to": RICH}, PermanentError),
    ],
)  # fmt: skip
def test_unsigned_transfer_counts_nothing(ledger: Ledger, changes: dict[str, Any], error: type) -> None:
    ledger.policy = policy(daily_limit=10**15)
    with pytest.raises(error):
        ledger.transfer(**{"reference": "a", "amount": 50} | changes)
    assert windows() == []


def test_repeated_transfer_counts_once(ledger: Ledger) -> None:
    ledger.policy = policy(daily_limit=60)
    first = ledger.transfer("a", 60)
    ledger.policy = policy(daily_limit=10)  # it was submitted before
    assert ledger.transfer("a", 60).txid == first.txid
    ledger.settle()
    assert ledger.spent() == 60
    ledger.moment += WINDOW
    assert ledger.transfer("a", 60).state == "confirmed"
    assert ledger.spent() == 0


@pytest.mark.parametrize(("source", "amount"), [(RICH, 61), (POOR, 60)])
def test_other_terms_under_a_reference_count_nothing(ledger: Ledger, source: str, amount: int) -> None:
    ledger.transfer("a", 60)
    assert ledger.refusal("a", amount, source=source) == "reference_conflict"
    assert (ledger.spent(), ledger.spent(POOR)) == (60, 0)


def test_wallet_is_one_by_all_its_addresses(ledger: Ledger) -> None:
    ledger.policy = policy(daily_limit=100)
    ledger.transfer("a", 60)
    for number, address in enumerate((IDENTITY, RICH.upper().replace("X", "x"))):
        assert ledger.refusal(f"b{number}", 41, source=address) == "daily_limit_exceeded"
    assert ledger.transfer("a", 60, source=IDENTITY).source == IDENTITY
    assert ledger.spent(IDENTITY) == 60


def test_limit_starts_empty_when_it_is_new(ledger: Ledger) -> None:
    ledger.policy = policy(max_amount=50)
    ledger.transfer("a", 50)
    assert windows() == []
    ledger.policy = policy(daily_limit=50)
    ledger.transfer("b", 50)
    assert ledger.refusal("c", 1) == "daily_limit_exceeded"


def test_window_survives_versions_of_the_policy(ledger: Ledger) -> None:
    ledger.policy = policy(daily_limit=100)
    ledger.transfer("a", 60)
    ledger.policy = policy()
    ledger.transfer("b", 60)  # no limit counts it
    ledger.policy = policy(daily_limit=100, max_amount=50)
    assert ledger.refusal("c", 41) == "daily_limit_exceeded"
    ledger.policy = policy(daily_limit=110)
    assert ledger.transfer("d", 50).state == "signed"


@pytest.mark.parametrize(
    ("allowed", "spelled", "passes"),
    [
        (EMPTY, EMPTY, True),
        (EMPTY, EMPTY.upper().replace("X", "x"), True),
        (NOBODY, NOBODY, True),
        (demo_key(EMPTY).identity, EMPTY, False),
        (EMPTY, demo_key(EMPTY).identity, False),
    ],
    ids=["older address", "in capitals", "identity", "listed as identity", "paid by identity"],
)
def test_allowed_address_is_compared_in_one_spelling(ledger: Ledger, allowed: str, spelled: str, passes: bool) -> None:
    """As the compliance agent and the verifier compare them."""
    ledger.policy = policy(allowed_addresses=(POOR, allowed))
    if passes:
        ledger.transfer("a", 5, to=spelled)
        ledger.transfer("b", 5, to=spelled)  # it waits in the queue, and is judged once more
        ledger.settle()
        assert [ledger.state(each).state for each in ("a", "b")] == ["confirmed"] * 2
    else:
        assert ledger.refusal("a", 5, to=spelled) == "address_not_allowed"


# At once


def test_twenty_race_for_a_limit_that_has_room_for_three(ledger: Ledger) -> None:
    ledger.policy = policy(daily_limit=100)
    found = at_once([lambda n=n: ledger.transfer(f"task_{n}#step_3", 30).state for n in range(20)])
    assert (found.count("daily_limit_exceeded"), found.count("signed")) == (17, 3)
    assert ledger.spent() == 90
    ledger.settle()
    assert ledger.spent() == 90


def test_concurrent_calls_with_one_reference_count_once(ledger: Ledger) -> None:
    """The last one that fits: none of its twins may hear that there is no room."""
    ledger.policy = policy(daily_limit=100)
    found = at_once([lambda: ledger.transfer("a", 100).txid] * 12)
    assert len(set(found)) == 1
    assert ledger.spent() == 100


def test_sources_of_one_wallet_race_for_its_limit(ledger: Ledger) -> None:
    ledger.policy = policy(daily_limit=50)
    spelled = [RICH, IDENTITY, RICH.upper().replace("X", "x")]
    found = at_once([lambda n=n: ledger.transfer(f"{n}", 30, source=spelled[n % 3]).state for n in range(9)])
    assert (found.count("signed"), ledger.spent()) == (1, 30)


# Transfers without effect


def test_expired_transfer_gives_back_once(ledger: Ledger) -> None:
    ledger.policy = policy(daily_limit=100)
    ledger.faults(drop=2)  # it is sent, once more when the other one is signed, and never gets there
    ledger.transfer("a", 60)
    ledger.transfer("b", 40)
    assert ledger.spent() == 100
    ledger.settle()
    assert ledger.state("a").state == "expired"
    at_once([lambda: ledger.submissions().advance(IDENTITY)] * 8)
    assert ledger.spent() == 40
    ledger.transfer("c", 60)
    assert ledger.refusal("a", 60, run=2) == "daily_limit_exceeded"


def test_closing_at_once_gives_back_once(ledger: Ledger) -> None:
    ledger.faults(drop=2)
    ledger.transfer("a", 30)
    ledger.transfer("b", 30)
    ledger.aws.clock.pass_seconds(LEAD_TICKS + 6)

    def advance() -> None:
        with suppress(TransientError):
            ledger.submissions().advance(IDENTITY)

    at_once([advance] * 6)
    ledger.settle()
    assert ledger.spent() == 30


def test_later_run_counts_for_its_own_attempt(ledger: Ledger) -> None:
    ledger.policy = policy(daily_limit=60)
    ledger.faults(drop=1)
    ledger.transfer("a", 50)
    ledger.settle()
    assert ledger.spent() == 0
    assert ledger.transfer("a", 50, run=2).attempt == 2
    ledger.settle()
    assert (ledger.spent(), ledger.state("a").state) == (50, "confirmed")


def test_transfer_that_could_not_be_paid_gives_back(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Submissions, "_moved", lambda *_: ("failed", "moved_nothing: the source could not pay it"))
    ledger.transfer("a", 50)
    ledger.settle()
    assert (ledger.state("a").state, ledger.spent()) == ("failed", 0)


def test_transfer_that_may_have_moved_keeps_counting(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Submissions, "_moved", lambda *_: ("failed", "moved_unknown: the key is used elsewhere"))
    ledger.transfer("a", 50)
    ledger.settle()
    again = ledger.transfer("a", 50, run=2)
    assert (again.state, again.attempt, ledger.spent()) == ("failed", 1, 50)


def test_late_confirmed_transfer_counts_once(ledger: Ledger) -> None:
    """The network reported it as absent; a later run checks again before it pays."""
    first, real = ledger.transfer("a", 50), MockChain.balance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MockChain, "transaction", lambda *_: None)
        patch.setattr(MockChain, "sent", lambda *_: SentList((), 2**31))
        patch.setattr(MockChain, "balance", lambda it, who: replace(real(it, who), latest_outgoing_transfer_tick=0))
        ledger.settle()
    assert (ledger.state("a").state, ledger.spent()) == ("expired", 0)
    ledger.policy = policy(daily_limit=50)
    ledger.transfer("b", 50)
    for _ in range(2):
        found = ledger.transfer("a", 50, run=2)
        assert (found.state, found.txid) == ("confirmed", first.txid)
        assert ledger.spent() == 100  # no limit undoes it
    assert ledger.refusal("c", 1) == "daily_limit_exceeded"


def test_sum_that_was_set_back_keeps_no_transfer_from_closing(ledger: Ledger) -> None:
    ledger.faults(drop=1)
    ledger.transfer("a", 60)
    assert windows()
    for item in windows():
        boto3.client("dynamodb").delete_item(
            TableName="LedgerTable", Key={name: item[name] for name in ("pk", "sk")}
        )  # fmt: skip
    ledger.settle()
    assert (ledger.state("a").state, ledger.spent()) == ("expired", 0)


# Signed again


def late(ledger: Ledger) -> None:
    """Sign a transfer that waits behind another one until its tick is too near to be sent for."""
    ledger.transfer("first", 10)
    ledger.transfer("waits", 50)
    ledger.aws.clock.pass_seconds(3 * LEAD_TICKS)


def test_signed_again_in_a_full_window_it_counts_once(ledger: Ledger) -> None:
    ledger.policy = policy(daily_limit=60)
    late(ledger)
    ledger.settle()
    assert (ledger.state("waits").attempt, ledger.state("waits").state, ledger.spent()) == (2, "confirmed", 60)


def test_signed_again_it_counts_from_then_on(ledger: Ledger) -> None:
    late(ledger)
    ledger.moment += timedelta(hours=12)
    ledger.settle()
    assert ledger.spent() == 60
    ledger.moment += WINDOW - timedelta(hours=12)
    assert ledger.spent() == 50
    assert (ledger.state("waits").attempt, ledger.state("waits").state) == (2, "confirmed")


def test_signed_again_without_room_it_expires(ledger: Ledger) -> None:
    late(ledger)
    ledger.policy = policy(daily_limit=59)
    ledger.settle()
    waits = ledger.state("waits")
    assert (waits.state, waits.error.partition(":")[0]) == ("expired", "expired")
    assert "daily_limit" in waits.error
    assert ledger.spent() == 10


# Refused, while another call signs


def refuse(*_: Any) -> None:
    raise PermanentError("insufficient_balance", "the source's balance is too small")


def test_refusal_is_final_for_its_run(ledger: Ledger) -> None:
    """The denial ends the step, so a concurrent signature after it would not be recorded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Submissions, "_check_balance", refuse)
        assert ledger.refusal("a", 50) == "insufficient_balance"
    again = ledger.transfer("a", 50)
    assert (again.state, again.txid, again.no_effect) == ("failed", "", True)
    assert again.error.startswith("insufficient_balance: ")
    assert ledger.transfer("a", 50, run=2).state == "signed"
    ledger.settle()
    assert (ledger.state("a").state, ledger.spent()) == ("confirmed", 50)


def test_twin_is_not_refused_once_the_other_has_signed(ledger: Ledger) -> None:
    real, other = Submissions._store_refusal, []

    def meanwhile(it: Submissions, *arguments: Any) -> None:
        patch.undo()
        other.append(ledger.transfer("a", 50))
        real(it, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Submissions, "_check_balance", refuse)
        patch.setattr(Submissions, "_store_refusal", meanwhile)
        assert ledger.transfer("a", 50).txid == other[0].txid
    assert ledger.spent() == 50


def test_twin_does_not_sign_once_the_other_was_refused(ledger: Ledger) -> None:
    real = Submissions._sign

    def meanwhile(it: Submissions, *arguments: Any) -> Submission:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Submissions, "_check_balance", refuse)
            assert ledger.refusal("a", 50) == "insufficient_balance"
        return real(it, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Submissions, "_sign", meanwhile)
        assert ledger.transfer("a", 50).state == "failed"
    assert windows() == []


def test_refusal_does_not_hide_earlier_signature(ledger: Ledger) -> None:
    """The first run's transfer was given up, the second run's was refused: the third still finds the first one's."""
    first, real = ledger.transfer("a", 50), MockChain.balance
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MockChain, "transaction", lambda *_: None)
        patch.setattr(MockChain, "sent", lambda *_: SentList((), 2**31))
        patch.setattr(MockChain, "balance", lambda it, who: replace(real(it, who), latest_outgoing_transfer_tick=0))
        ledger.settle()
        patch.setattr(Submissions, "_check_balance", refuse)
        assert ledger.refusal("a", 50, run=2) == "insufficient_balance"
        expired = ledger.submissions().attempt(first.txid)
        assert expired is not None
        assert (expired.state, expired.encoded) == ("expired", first.encoded)
    found = ledger.transfer("a", 50, run=3)
    assert (found.state, found.txid, ledger.spent()) == ("confirmed", first.txid, 50)


def test_interrupted_call_counts_its_signature(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    real = Submissions._sign

    def cut_off(*arguments: Any) -> None:
        real(*arguments)
        raise ClientError({"Error": {"Code": "RequestTimeout"}}, "TransactWriteItems")

    with monkeypatch.context() as patch:
        patch.setattr(Submissions, "_sign", cut_off)
        with pytest.raises(ClientError):
            ledger.transfer("a", 50)
    assert ledger.transfer("a", 50).state in {"signed", "broadcast"}
    ledger.settle()
    assert (ledger.state("a").state, ledger.spent()) == ("confirmed", 50)


# Calls of other services


def publish(aws: Cloud, **limits: Any) -> None:
    store = wiring.policies()
    store.propose(policy(**limits).rules, subject="olivia")
    store.approve(2, subject="oscar", four_eyes=True)
    aws.settle()


def approved_task(store: TaskStore) -> str:
    task_id, _ = waiting(store)
    store.decide(task_id, approved=True, subject="bob", reason="checked")
    return task_id


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """The answers to callback tokens."""
    answers: list[dict[str, str]] = []
    monkeypatch.setattr("qaes.adapters.executions._send", lambda _, **said: answers.append(said) or True)
    return answers


def run_first_steps(aws: Cloud, task_id: str) -> str:
    for step_index in (0, 1):
        aws.invoke("RunStepFunction", {"task_id": task_id, "step_index": step_index})
    return task_id


def outcome(aws: Cloud, task_id: str, function: str = "AwaitApprovalFunction") -> str:
    """The compliance agent's verdict, or the worker's word, on the action."""
    answer = aws.invoke(function, {"task_id": task_id, "task_token": "a token"})
    return str(answer.get("verdict") or answer["status"])


def test_compliance_denies_transfer_over_the_daily_limit(aws: Cloud, sent: list[dict[str, str]]) -> None:
    publish(aws, daily_limit=8)
    store = TaskStore("TasksTable")
    tasks = [waiting(store)[0], approved_task(store), approved_task(store)]
    unapproved, first, second = (run_first_steps(aws, task_id) for task_id in tasks)
    assert outcome(aws, unapproved) == "pending"
    for task_id in (first, second):
        assert outcome(aws, task_id) == "execute"
    for _ in range(2):  # submitted twice, it counts once
        assert outcome(aws, first, "ExecuteActionFunction") == "submitted"
    assert outcome(aws, first) == "execute"  # it is its own
    for function in ("AwaitApprovalFunction", "ExecuteActionFunction"):
        assert outcome(aws, second, function) == "StepDeniedError"
        assert "daily_limit" in sent[-1]["cause"]
        assert wiring.policies().in_force().policy_id in sent[-1]["cause"]
    assert store.step(second, 2) is None
    assert outcome(aws, unapproved) == "pending"  # it may be made on another day


def test_compliance_agent_only_reads_the_ledger(aws: Cloud, sent: list[dict[str, str]]) -> None:
    publish(aws, daily_limit=8)
    task_id = run_first_steps(aws, approved_task(TaskStore("TasksTable")))
    aws.invocations.clear()
    assert outcome(aws, task_id) == "execute"
    assert aws.invocations == {"AwaitApprovalFunction": 1, "LedgerFunction": 1}
    assert windows() == []


def test_ledger_that_does_not_answer_lets_nothing_run(aws: Cloud, sent: list[dict[str, str]]) -> None:
    publish(aws, daily_limit=8)
    task_id = run_first_steps(aws, approved_task(TaskStore("TasksTable")))
    aws.faults["LedgerFunction"] = lambda event: 1 / 0  # type: ignore[assignment]
    for function in ("AwaitApprovalFunction", "ExecuteActionFunction"):
        with pytest.raises(TransientError):
            outcome(aws, task_id, function)


def test_simulated_transfer_counts_nothing(ledger: Ledger) -> None:
    ledger.policy = policy(daily_limit=60)
    terms = {"source": RICH, "destination": EMPTY, "amount": 50}
    for _ in range(2):
        assert ledger.submissions().simulate_transfer("a", **terms).state == "simulated"
    ledger.policy = policy(max_amount=49)
    with pytest.raises(PermanentError):
        ledger.submissions().simulate_transfer("a", **terms)
    assert windows() == []
