"""The simulated network on moto: its own properties, in addition to `test_chain` for every network."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any
from unittest.mock import patch

import boto3
import pytest
from botocore.client import BaseClient
from botocore.exceptions import ClientError, EndpointConnectionError
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from qaes.domain.errors import PermanentError, TransientError
from qubic import items as qubic_items
from qubic.network import mock
from qubic.network.faults import Faults
from qubic.network.mock import FIRST_TICK, MAX_TICKS_AHEAD, MockChain
from tests.support.chain import TICK_MILLISECONDS, Clock, Key, key
from tests.support.cloud import cloud

TABLE = "ChainTable"
ALICE, BOB, CAROL, DAVE = (key(name) for name in ("alice", "bob", "carol", "dave"))
GENESIS = {ALICE.identity: 1000, BOB.identity: 500, CAROL.identity: 1}  # Dave has nothing
SUPPLY = sum(GENESIS.values())


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def chain(clock: Clock) -> Iterator[MockChain]:
    with cloud(state_machine=False, policy=False):
        yield another(clock)


def another(clock: Clock, **options: Any) -> MockChain:
    """The network, as another function sees it."""
    options = {"genesis": GENESIS, "table": TABLE, "clock": clock, "tick_milliseconds": TICK_MILLISECONDS} | options
    return MockChain(**options)


def items(prefix: str = "") -> list[dict[str, Any]]:
    found = boto3.client("dynamodb").scan(TableName=TABLE, ConsistentRead=True)["Items"]
    return [item for item in found if item["pk"]["S"].startswith(prefix)]


def balances(chain: MockChain) -> list[int]:
    return [chain.balance(each.identity).balance for each in (ALICE, BOB, CAROL, DAVE)]


def supply() -> int:
    return sum(int(item["balance"]["N"]) for item in items("BALANCE#"))


@contextmanager
def failing(where: Callable[[str, int], str | None]) -> Iterator[list[str]]:
    """`where` decides for each call to DynamoDB (name, number from 0) whether it fails `before` or `after`."""
    calls: list[str] = []
    below = BaseClient._make_api_call

    def make_api_call(client: Any, operation: str, arguments: Any) -> Any:
        how = where(operation, len(calls))
        calls.append(operation)
        if how == "before":
            raise EndpointConnectionError(endpoint_url="test")
        answer = below(client, operation, arguments)
        if how == "after":
            raise EndpointConnectionError(endpoint_url="test")
        return answer

    with patch.object(BaseClient, "_make_api_call", make_api_call):
        yield calls


def failing_at(position: int, how: str) -> Any:
    return failing(lambda _, number: how if number == position else None)


@contextmanager
def meanwhile(operation: str, act: Callable[[], object]) -> Iterator[None]:
    """Call `act` right before the first `operation` on DynamoDB, so that earlier reads are out of date."""
    acted: list[bool] = []

    def before(name: str, number: int) -> None:
        if name == operation and not acted:
            acted.append(True)
            act()

    with failing(before):
        yield
    assert acted


def at_once(count: int, call: Callable[[int], Any]) -> list[Any]:
    start = threading.Barrier(count)

    def one(number: int) -> Any:
        start.wait()
        return call(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(one, range(count)))


# Genesis


def test_genesis_is_written_once_with_its_sum(chain: MockChain, clock: Clock) -> None:
    assert items() == []
    assert at_once(8, lambda _: another(clock).tick_info().tick) == [FIRST_TICK] * 8
    assert balances(chain) == [1000, 500, 1, 0]
    another(clock, genesis={DAVE.identity: 10**15}).tick_info()
    assert balances(chain) == [1000, 500, 1, 0]
    [state] = items("STATE")
    assert int(state["supply"]["N"]) == SUPPLY == supply()


def test_genesis_that_comes_too_late_changes_nothing(chain: MockChain, clock: Clock) -> None:
    def others() -> None:
        first = another(clock)
        first.broadcast(ALICE.signed(DAVE, 10, first.tick_info().tick + 1).encode())
        clock.ticks(2)
        assert balances(first) == [990, 500, 1, 10]

    with meanwhile("TransactWriteItems", others):
        assert chain.tick_info().tick == FIRST_TICK + 2
    assert balances(chain) == [990, 500, 1, 10]


@pytest.mark.parametrize(
    "genesis",
    [{"ALICE": 1}, {ALICE.identity: -1}, {key(str(number)).identity: 1 for number in range(mock.MAX_GENESIS + 1)}],
    ids=["no identity", "negative", "too many"],
)
def test_bad_genesis_is_refused(genesis: dict[str, int], clock: Clock) -> None:
    with pytest.raises(ValueError, match=r"identity|negative|at most"):
        another(clock, genesis=genesis)


def test_tick_s_duration_comes_from_the_environment(
    chain: MockChain, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUBIC_TICK_MILLISECONDS", "100")
    monkeypatch.setenv("CHAIN_TABLE", TABLE)
    tick = MockChain(genesis=GENESIS, clock=clock).tick_info().tick
    clock.ticks(1)
    assert MockChain(genesis=GENESIS, clock=clock).tick_info().tick == tick + 10


def test_new_tick_duration_holds_from_the_current_tick(chain: MockChain, clock: Clock) -> None:
    chain.tick_info()
    clock.ticks(7)
    faster = another(clock, tick_milliseconds=100)
    assert faster.tick_info().tick == FIRST_TICK + 7
    clock.ticks(1)
    assert faster.tick_info().tick == FIRST_TICK + 17


# Exactly once for any caller


def test_concurrent_callers_execute_a_transaction_once(chain: MockChain, clock: Clock) -> None:
    for number in range(5):
        tick = chain.tick_info().tick
        for each, amount in ((ALICE, 1), (BOB, 1), (CAROL, 0)):
            chain.broadcast(each.signed(DAVE, amount, tick + 1 + number % 2).encode())
        clock.ticks(4)
        seen = at_once(8, lambda _: balances(another(clock)))
        assert seen == [balances(chain)] * 8
    assert balances(chain) == [995, 495, 1, 10]
    assert supply() == SUPPLY
    assert len(items("TX#")) == 15
    assert chain.balance(DAVE.identity).number_of_incoming_transfers == 10


def test_broadcasts_of_one_source_at_once_leave_one_in_flight(chain: MockChain, clock: Clock) -> None:
    tick = chain.tick_info().tick
    sent = [ALICE.signed(BOB, 1, tick + 1 + number) for number in range(10)]
    at_once(10, lambda number: another(clock).broadcast(sent[number].encode()))
    clock.ticks(20)
    assert [chain.transaction(each.id) is not None for each in sent] == [False] * 9 + [True]
    assert chain.balance(ALICE.identity).balance == 999


def test_next_caller_completes_interrupted_execution(chain: MockChain, clock: Clock) -> None:
    """Each call to DynamoDB fails, before and after it took effect."""
    count = 0
    for how in ("before", "after"):
        for position in range(100):
            tick = chain.tick_info().tick
            before = balances(chain)
            sent = [ALICE.signed(DAVE, 1, tick + 1), BOB.signed(DAVE, 1, tick + 2)]
            for each in sent:
                chain.broadcast(each.encode())
            clock.ticks(4)
            with failing_at(position, how) as calls, suppress(TransientError):
                another(clock).last_processed_tick()
            assert balances(chain) == [before[0] - 1, before[1] - 1, before[2], before[3] + 2]
            assert supply() == SUPPLY
            if len(calls) <= position:
                break
            count += 1
    assert count >= 2 * 5  # state, close, pool, and a transaction for each


def test_broadcast_that_falls_over_can_be_handed_in_again(chain: MockChain, clock: Clock) -> None:
    for how in ("before", "after"):
        for position in range(20):
            sent = ALICE.signed(DAVE, 1, chain.tick_info().tick + 2)
            paid = chain.balance(ALICE.identity).number_of_outgoing_transfers
            with failing_at(position, how) as calls, suppress(TransientError):
                chain.broadcast(sent.encode())
            chain.broadcast(sent.encode())
            clock.ticks(3)
            with pytest.raises(PermanentError, match="Target tick"):
                chain.broadcast(sent.encode())
            assert chain.transaction(sent.id) is not None
            assert chain.balance(ALICE.identity).number_of_outgoing_transfers == paid + 1
            if len(calls) <= position:
                break
        else:
            pytest.fail("a broadcast takes more calls than that")


def test_broadcast_overtaken_by_tick_never_executes(chain: MockChain, clock: Clock) -> None:
    """The read shows a future tick, but at the write the tick was already reported as processed."""
    late = ALICE.signed(DAVE, 1, chain.tick_info().tick + 1)

    def time_passes() -> None:
        clock.ticks(5)
        assert another(clock).last_processed_tick().tick >= late.tick
        assert another(clock).transaction(late.id) is None

    with meanwhile("TransactWriteItems", time_passes):
        chain.broadcast(late.encode())
    clock.ticks(5)
    assert chain.transaction(late.id) is None
    assert chain.balance(ALICE.identity).balance == 1000


def test_due_transaction_is_not_replaced(chain: MockChain, clock: Clock) -> None:
    """While a later transaction comes in, the tick of the one that waits passes: both execute."""
    first = ALICE.signed(DAVE, 1, chain.tick_info().tick + 1)
    chain.broadcast(first.encode())
    second = ALICE.signed(DAVE, 1, first.tick + 10)

    def the_tick_passes() -> None:
        clock.ticks(2)
        with suppress(TransientError), failing(lambda name, _: "before" if name == "Query" else None):
            another(clock).last_processed_tick()  # closes the tick, and falls over

    with meanwhile("TransactWriteItems", the_tick_passes):
        chain.broadcast(second.encode())
    clock.ticks(20)
    assert chain.transaction(first.id)
    assert chain.transaction(second.id)


@pytest.mark.parametrize("taken", [False, True])
def test_later_transaction_in_between_keeps_its_place(chain: MockChain, clock: Clock, taken: bool) -> None:
    tick = chain.tick_info().tick
    if taken:
        chain.broadcast(ALICE.signed(BOB, 1, tick + 1).encode())
    earlier, later = ALICE.signed(DAVE, 1, tick + 2), ALICE.signed(DAVE, 1, tick + 3)
    with meanwhile("TransactWriteItems", lambda: another(clock).broadcast(later.encode())):
        chain.broadcast(earlier.encode())
    clock.ticks(5)
    assert chain.transaction(earlier.id) is None
    assert chain.transaction(later.id) is not None


def test_ticks_that_others_closed_are_not_opened_again(chain: MockChain, clock: Clock) -> None:
    chain.tick_info()
    clock.ticks(1)
    told: list[int] = []

    def others() -> None:
        clock.ticks(5)
        told.append(another(clock).tick_info().tick)
        clock.ticks(-5)

    with meanwhile("UpdateItem", others):
        assert chain.tick_info().tick == told[0]


def test_faults_begin_with_the_tick_in_which_they_are_written(chain: MockChain, clock: Clock) -> None:
    chain.tick_info()

    def others() -> None:
        clock.ticks(3)
        another(clock).tick_info()

    with meanwhile("UpdateItem", others):
        chain.set_faults(Faults(empty_ticks=5))
    assert chain.faults().empty_ticks == 5


def test_concurrently_executed_transaction_runs_once(chain: MockChain, clock: Clock) -> None:
    spent = ALICE.signed(DAVE, 1, chain.tick_info().tick + 1)
    chain.broadcast(spent.encode())
    clock.ticks(2)
    with meanwhile("TransactWriteItems", lambda: another(clock).tick_info()):
        chain.tick_info()
    assert balances(chain) == [999, 500, 1, 1]


def test_balance_that_changes_under_the_reader_is_read_again(chain: MockChain, clock: Clock) -> None:
    """No caller does that: the condition guards against a mistake in the order of execution."""
    spent = ALICE.signed(DAVE, 1000, chain.tick_info().tick + 1)
    chain.broadcast(spent.encode())
    clock.ticks(2)

    def change() -> None:
        boto3.client("dynamodb").update_item(
            TableName=TABLE,
            Key={"pk": {"S": f"BALANCE#{ALICE.identity}"}, "sk": {"S": "BALANCE"}},
            UpdateExpression="SET balance = :one",
            ExpressionAttributeValues={":one": {"N": "1"}},
        )

    with meanwhile("TransactWriteItems", change):
        found = chain.transaction(spent.id)
    assert found is not None
    assert not found.money_flew
    assert balances(chain) == [1, 500, 1, 0]


def test_clocks_that_differ_do_not_take_ticks_back(chain: MockChain, clock: Clock) -> None:
    slow = Clock(clock.moment)
    chain.tick_info()
    clock.ticks(30)
    tick = chain.tick_info().tick
    assert another(slow).tick_info().tick == tick
    slow.ticks(-1000)
    assert another(slow).last_processed_tick().tick == tick - 1


def test_transactions_in_one_tick_have_one_order(chain: MockChain, clock: Clock) -> None:
    """Carol's money comes from Alice in the same tick, or too late, by the ids alone."""
    seen = set()
    for payload in range(8):
        tick = chain.tick_info().tick + 2
        gift = ALICE.signed(CAROL, 100, tick, bytes([payload]))
        spent = CAROL.signed(BOB, 50, tick)
        order = [spent, gift] if payload % 2 else [gift, spent]
        before = chain.balance(CAROL.identity).balance
        for each in order:
            chain.broadcast(each.encode())
        clock.ticks(4)
        found = chain.transaction(spent.id)
        assert found is not None
        assert found.money_flew == (before >= 50 or gift.id < spent.id)
        seen.add(found.money_flew)
        emptied = CAROL.signed(ALICE, chain.balance(CAROL.identity).balance - 1, chain.tick_info().tick + 1)
        chain.broadcast(emptied.encode())
        clock.ticks(2)
    assert seen == {True, False}


# The pool


def test_tick_too_far_ahead_is_accepted_and_never_executes(chain: MockChain, clock: Clock) -> None:
    tick = chain.tick_info().tick
    far = ALICE.signed(BOB, 1, tick + MAX_TICKS_AHEAD + 1)
    near = BOB.signed(ALICE, 1, tick + MAX_TICKS_AHEAD)
    assert chain.broadcast(far.encode()) == far.id
    assert chain.broadcast(near.encode()) == near.id
    clock.ticks(MAX_TICKS_AHEAD + 5)
    assert chain.transaction(far.id) is None
    assert chain.transaction(near.id) is not None


# Faults


def sent(chain: MockChain, source: Key = ALICE, ahead: int = 3) -> str:
    return chain.broadcast(source.signed(DAVE, 1, chain.tick_info().tick + ahead).encode())


def test_drop(chain: MockChain, clock: Clock) -> None:
    chain.set_faults(Faults(drop=2))
    ids = [sent(chain, each) for each in (ALICE, BOB, CAROL)]
    assert chain.faults() == Faults()
    clock.ticks(5)
    assert [chain.transaction(each) is not None for each in ids] == [False, False, True]


def test_dropped_bytes_can_be_handed_in_again(chain: MockChain, clock: Clock) -> None:
    chain.set_faults(Faults(drop=1))
    encoded = ALICE.signed(DAVE, 1, chain.tick_info().tick + 3).encode()
    assert chain.broadcast(encoded) == chain.broadcast(encoded)
    clock.ticks(5)
    assert chain.balance(DAVE.identity).balance == 1


def test_delay(chain: MockChain, clock: Clock) -> None:
    chain.set_faults(Faults(delay=5))
    late, in_time = sent(chain, ALICE, ahead=5), sent(chain, BOB, ahead=6)
    clock.ticks(10)
    assert chain.transaction(late) is None
    assert chain.transaction(in_time) is not None
    assert chain.faults() == Faults(delay=5)


def test_empty_ticks(chain: MockChain, clock: Clock) -> None:
    chain.set_faults(Faults(empty_ticks=3))
    ids = [sent(chain, each, ahead) for each, ahead in ((ALICE, 1), (BOB, 3), (CAROL, 4))]
    assert chain.faults().empty_ticks == 3
    clock.ticks(2)
    assert chain.faults().empty_ticks == 1
    clock.ticks(8)
    assert [chain.transaction(each) is not None for each in ids] == [False, False, True]
    assert chain.faults() == Faults()
    assert supply() == SUPPLY


def test_paused(chain: MockChain, clock: Clock) -> None:
    id_ = sent(chain)
    clock.ticks(1)
    chain.set_faults(Faults(paused=True))
    tick = chain.tick_info().tick
    clock.ticks(3600)
    assert chain.tick_info().tick == tick
    assert chain.last_processed_tick().tick == tick - 1
    assert chain.transaction(id_) is None
    assert chain.faults().paused
    chain.set_faults(Faults())
    assert chain.tick_info().tick == tick
    clock.ticks(3)
    assert chain.tick_info().tick == tick + 3
    assert chain.transaction(id_) is not None


def test_jump(chain: MockChain, clock: Clock) -> None:
    tick = chain.tick_info().tick
    now, skipped, after = sent(chain, CAROL, 1), sent(chain, ALICE, 500), sent(chain, BOB, 1002)
    clock.ticks(1)
    chain.set_faults(Faults(jump=1000))
    assert chain.faults() == Faults()
    info = chain.tick_info()
    assert (info.tick, info.initial_tick, info.epoch) == (tick + 1001, tick + 1001, mock.FIRST_EPOCH + 1)
    clock.ticks(5)
    assert [chain.transaction(each) is not None for each in (now, skipped, after)] == [True, False, True]
    assert supply() == SUPPLY


def test_jump_in_a_pause(chain: MockChain, clock: Clock) -> None:
    chain.set_faults(Faults(paused=True))
    tick = chain.tick_info().tick
    chain.set_faults(Faults(paused=True, jump=100))
    clock.ticks(50)
    assert chain.tick_info().tick == tick + 100


def test_fail_after_accepting(chain: MockChain, clock: Clock) -> None:
    chain.set_faults(Faults(fail_after_accepting=1))
    accepted = ALICE.signed(DAVE, 1, chain.tick_info().tick + 3)
    with pytest.raises(TransientError):
        chain.broadcast(accepted.encode())
    assert chain.broadcast(accepted.encode()) == accepted.id
    clock.ticks(5)
    assert chain.transaction(accepted.id) is not None
    assert chain.balance(DAVE.identity).balance == 1


def test_fail_requests(chain: MockChain, clock: Clock) -> None:
    refused = ALICE.signed(DAVE, 1, chain.tick_info().tick + 3)
    chain.set_faults(Faults(fail_requests=6))
    for call in (
        chain.tick_info,
        chain.last_processed_tick,
        lambda: chain.balance(ALICE.identity),
        lambda: chain.transaction(refused.id),
        lambda: chain.sent(ALICE.identity, 0, 2**32 - 1),
        lambda: chain.broadcast(refused.encode()),
    ):
        with pytest.raises(TransientError, match="does not respond"):
            call()
    assert chain.faults() == Faults()
    clock.ticks(5)
    assert chain.transaction(refused.id) is None


def test_lag(chain: MockChain, clock: Clock) -> None:
    id_ = sent(chain)
    chain.set_faults(Faults(lag=4))
    clock.ticks(6)
    tick = chain.tick_info().tick
    assert chain.last_processed_tick().tick == tick - 5
    assert chain.transaction(id_) is None
    assert chain.sent(ALICE.identity, 0, tick).transactions == ()
    assert chain.balance(DAVE.identity).balance == 1  # executed, and visible in the balance, which does not lag
    clock.ticks(2)
    assert chain.transaction(id_) is not None
    assert len(chain.sent(ALICE.identity, 0, tick).transactions) == 1


def test_faults_are_consumed_once_each_by_many(chain: MockChain, clock: Clock) -> None:
    chain.set_faults(Faults(fail_requests=5))

    def call(_: int) -> bool:
        try:
            another(clock).tick_info()
        except TransientError:
            return False
        return True

    assert sorted(at_once(12, call)) == [False] * 5 + [True] * 7


def test_new_setting_ends_the_one_before(chain: MockChain, clock: Clock) -> None:
    chain.set_faults(Faults(drop=9, delay=9, empty_ticks=9, lag=9, fail_after_accepting=9, fail_requests=9))
    chain.set_faults(Faults())
    assert chain.faults() == Faults()
    id_ = sent(chain)
    clock.ticks(5)
    assert chain.transaction(id_) is not None


# The table


def test_missing_table_is_unavailable(chain: MockChain, clock: Clock) -> None:
    boto3.client("dynamodb").delete_table(TableName=TABLE)
    with pytest.raises(TransientError, match="ResourceNotFound"):
        chain.tick_info()


def test_constant_concurrent_changes_end_in_unavailable(
    chain: MockChain, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain.tick_info()
    clock.ticks(2)
    monkeypatch.setattr(qubic_items.time, "sleep", lambda seconds: None)
    error = ClientError({"Error": {"Code": "ConditionalCheckFailedException"}}, "UpdateItem")

    def changed(operation: str, number: int) -> None:
        if operation == "UpdateItem":
            raise error

    with failing(changed), pytest.raises(TransientError, match="keep changing"):
        chain.tick_info()


# Any sequence of all this


class Network(RuleBasedStateMachine):
    """Two views of one network, and their invariants under any calls and failures.

    The model has the facts that a caller can observe: an included transaction stays included; a transaction that was
    absent when its tick had been processed stays absent; a transaction executes in its own tick only, and once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.cloud = cloud(state_machine=False, policy=False)
        self.cloud.__enter__()
        self.clock = Clock()
        self.views = [another(self.clock), another(self.clock)]
        self.sent: dict[str, Any] = {}
        self.fate: dict[str, bool] = {}
        self.latest = 0

    def teardown(self) -> None:
        self.cloud.__exit__(None, None, None)

    @initialize()
    def begin(self) -> None:
        self.views[0].tick_info()

    @rule(
        view=st.sampled_from([0, 1]),
        source=st.sampled_from([ALICE, BOB, CAROL]),
        to=st.sampled_from([ALICE, BOB, CAROL, DAVE]),
        amount=st.sampled_from([0, 1, 400, 900, 10**15]),
        ahead=st.integers(-2, 6),
    )
    def broadcast(self, view: int, source: Key, to: Key, amount: int, ahead: int) -> None:
        with suppress(TransientError):
            transaction = source.signed(to, amount, self.views[view].tick_info().tick + ahead)
            self.sent[transaction.id] = transaction
            with suppress(mock.PermanentError):  # who has spent everything
                assert self.views[view].broadcast(transaction.encode()) == transaction.id

    @rule(view=st.sampled_from([0, 1]), data=st.data())
    def again(self, view: int, data: st.DataObject) -> None:
        if self.sent:
            transaction = self.sent[data.draw(st.sampled_from(sorted(self.sent)))]
            with suppress(TransientError, mock.PermanentError):
                self.views[view].broadcast(transaction.encode())

    @rule(count=st.sampled_from([0.3, 1, 2, 7]))
    def wait(self, count: float) -> None:
        self.clock.ticks(count)

    @rule(
        view=st.sampled_from([0, 1]),
        faults=st.builds(
            Faults,
            drop=st.integers(0, 1),
            delay=st.integers(0, 3),
            empty_ticks=st.integers(0, 3),
            paused=st.booleans(),
            jump=st.sampled_from([0, 0, 1, 4]),
            fail_after_accepting=st.integers(0, 1),
            fail_requests=st.integers(0, 1),
            lag=st.integers(0, 2),
        ),
    )
    def set_faults(self, view: int, faults: Faults) -> None:
        self.views[view].set_faults(faults)

    @rule(view=st.sampled_from([0, 1]), number=st.integers(0, 6), how=st.sampled_from(["before", "after"]))
    def fall_over(self, view: int, number: int, how: str) -> None:
        with failing_at(number, how), suppress(TransientError):
            self.views[view].last_processed_tick()

    @invariant()
    def nothing_told_is_taken_back(self) -> None:
        view = self.views[1]
        with suppress(TransientError):
            tick = view.tick_info().tick
            assert tick >= self.latest
            self.latest = tick
        with suppress(TransientError):
            processed = view.last_processed_tick().tick
            for txid, transaction in self.sent.items():
                if transaction.tick > processed:
                    continue
                found = view.transaction(txid)
                if found is not None:
                    assert found.transaction == transaction
                assert self.fate.setdefault(txid, found is not None) == (found is not None)

    @invariant()
    def money_is_neither_made_nor_lost(self) -> None:
        if found := items("BALANCE#"):
            values = [{name: int(value["N"]) for name, value in item.items() if "N" in value} for item in found]
            assert sum(each["balance"] for each in values) == SUPPLY
            for each in values:
                assert each["balance"] >= 0
                assert each["balance"] == each.get("incoming_amount", 0) - each.get("outgoing_amount", 0)


def test_any_sequence() -> None:
    run_state_machine_as_test(
        Network,
        settings=settings(
            max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
