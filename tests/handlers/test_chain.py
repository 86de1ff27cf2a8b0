"""Properties of every network, tested on the mock itself and on the mock through its RPC over HTTP."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qaes.domain.errors import InvalidInputError, PermanentError, TransientError
from qaes.domain.qubic.transaction import Transaction
from qubic.network.base import Chain, SentList
from qubic.network.faults import Faults
from qubic.network.mock import FIRST_EPOCH, FIRST_TICK, MockChain
from qubic.network.rpc_client import RpcChain
from tests.support.chain import TICK_MILLISECONDS, Clock, Key, key
from tests.support.cloud import cloud
from tests.support.rpc import served

ALICE, BOB, CAROL, DAVE = (key(name) for name in ("alice", "bob", "carol", "dave"))
GENESIS = {ALICE.identity: 1000, BOB.identity: 500, CAROL.identity: 1}  # Dave has nothing
EVER = 2**32 - 1


@dataclass
class Network:
    """A network with its clock; `mock` is the network behind it."""

    chain: Chain
    mock: MockChain
    clock: Clock

    def tick(self) -> int:
        return self.chain.tick_info().tick

    def send(self, source: Key, to: Key, amount: int = 1, ahead: int = 2, **fields: Any) -> Transaction:
        transaction = source.signed(to, amount, self.tick() + ahead, **fields)
        assert self.chain.broadcast(transaction.encode()) == transaction.id
        return transaction

    def send_some(self, source: Key, to: Key, count: int) -> list[Transaction]:
        """Send one after the other, each when the one before is included."""
        sent = []
        for number in range(count):
            sent.append(self.send(source, to, number, ahead=1))
            self.clock.ticks(2)
        return sent

    def included(self, *transactions: Transaction) -> list[bool]:
        return [self.chain.transaction(each.id) is not None for each in transactions]

    def balances(self) -> list[int]:
        return [self.chain.balance(each.identity).balance for each in (ALICE, BOB, CAROL, DAVE)]


@pytest.fixture(params=["direct", "rpc"])
def network(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Network]:
    clock = Clock()
    with cloud(state_machine=False, policy=False):
        mock = MockChain(genesis=GENESIS, table="ChainTable", clock=clock, tick_milliseconds=TICK_MILLISECONDS)
        if request.param == "direct":
            yield Network(mock, mock, clock)
        else:
            with served(mock, monkeypatch) as url:
                yield Network(RpcChain(url, network="mock"), mock, clock)


def sent_by(network: Network, of: Key, first: int = 0, last: int = EVER) -> list[Transaction]:
    return [each.transaction for each in network.chain.sent(of.identity, first, last).transactions]


# Ticks


def test_ticks_follow_the_clock(network: Network) -> None:
    assert network.chain.network == "mock"
    info = network.chain.tick_info()
    assert (info.tick, info.epoch, info.duration, info.initial_tick) == (FIRST_TICK, FIRST_EPOCH, 1, FIRST_TICK)
    network.clock.ticks(0.99)
    assert network.tick() == FIRST_TICK
    network.clock.ticks(0.02)
    assert network.tick() == FIRST_TICK + 1
    network.clock.ticks(41)
    assert network.tick() == FIRST_TICK + 42
    processed = network.chain.last_processed_tick()
    assert (processed.tick, processed.epoch, processed.interval_initial_tick) == (
        FIRST_TICK + 41,
        FIRST_EPOCH,
        FIRST_TICK,
    )


# In the named tick, or never


def test_transaction_is_included_in_its_tick(network: Network) -> None:
    sent = network.send(ALICE, DAVE, 10, ahead=3, payload=b"\x00paid", input_type=77)
    network.clock.ticks(3)
    assert network.chain.last_processed_tick().tick == sent.tick - 1
    assert network.chain.transaction(sent.id) is None
    network.clock.ticks(1)
    assert network.chain.last_processed_tick().tick == sent.tick
    found = network.chain.transaction(sent.id)
    assert found is not None
    assert found.transaction == sent
    assert (found.txid, found.tick, found.money_flew) == (sent.id, sent.tick, True)
    start = int(network.clock.moment.timestamp() * 1000)
    assert start - 2 * TICK_MILLISECONDS <= found.timestamp <= start
    assert network.balances() == [990, 500, 1, 10]


def test_hour_without_requests_changes_nothing(network: Network) -> None:
    sent = [network.send(ALICE, DAVE, 10), network.send(BOB, DAVE, 20)]
    network.clock.ticks(3600)
    assert network.balances() == [990, 480, 1, 30]
    assert network.included(*sent) == [True, True]


@pytest.mark.parametrize("ahead", [0, -1, -1000])
def test_broadcast_refused_when_its_tick_has_come(network: Network, ahead: int) -> None:
    assert "Target tick" in refused(network, ALICE.signed(DAVE, 1, network.tick() + ahead).encode())


def test_broadcast_far_ahead_is_accepted_and_never_executes(network: Network) -> None:
    sent = network.send(ALICE, DAVE, ahead=10**6)
    network.clock.ticks(20)
    assert network.included(sent) == [False]
    assert network.balances() == [1000, 500, 1, 0]


def test_same_bytes_can_be_handed_in_at_any_time(network: Network) -> None:
    sent = network.send(ALICE, DAVE, 10)
    for _ in range(2):
        assert network.chain.broadcast(sent.encode()) == sent.id
        network.clock.ticks(1)
    for _ in range(4):
        with pytest.raises(PermanentError, match="Target tick"):
            network.chain.broadcast(sent.encode())
        network.clock.ticks(1)
    assert network.included(sent) == [True]
    assert network.balances() == [990, 500, 1, 10]
    assert sent_by(network, ALICE) == [sent]


def test_one_transaction_per_source_is_in_flight(network: Network) -> None:
    """A later tick takes the place; the same tick and an earlier one do not get it."""
    replaced = network.send(ALICE, DAVE, 1, ahead=5)
    kept = network.send(ALICE, DAVE, 2, ahead=6)
    same_tick = network.send(ALICE, DAVE, 3, ahead=6)
    earlier = network.send(ALICE, DAVE, 4, ahead=4)
    another_source = network.send(BOB, DAVE, 5, ahead=5)
    network.clock.ticks(10)
    assert network.included(replaced, kept, same_tick, earlier, another_source) == [False, True, False, False, True]
    assert network.balances() == [998, 495, 1, 7]


def test_place_is_free_again(network: Network) -> None:
    first = network.send(ALICE, DAVE, ahead=2)
    network.clock.ticks(3)
    second = network.send(ALICE, DAVE, ahead=1)
    network.clock.ticks(3)
    assert network.included(first, second) == [True, True]


# Rejections


def refused(network: Network, encoded: bytes) -> str:
    with pytest.raises(PermanentError) as caught:
        network.chain.broadcast(encoded)
    assert caught.value.code == "broadcast_refused"
    network.clock.ticks(10)
    assert network.balances() == [1000, 500, 1, 0]
    assert sent_by(network, ALICE) == []
    return caught.value.message


def test_malformed_bytes_are_refused(network: Network) -> None:
    encoded = ALICE.signed(DAVE, 1, network.tick() + 2).encode()
    too_long = b"x" * 1025
    payload = encoded[:78] + len(too_long).to_bytes(2, "little") + too_long + encoded[80:]
    for each in (b"", encoded[:-1], encoded + b"\0", b"\xff" * 144, payload):
        assert "malformed" in refused(network, each)


def test_wrong_signature_is_refused(network: Network) -> None:
    signed = ALICE.signed(DAVE, 1, network.tick() + 2)
    for changed in (
        replace(signed, amount=2),
        replace(signed, source=BOB.public),
        replace(signed, signature=BOB.signed(DAVE, 1, signed.tick).signature),
        replace(signed, signature=bytes(64)),
    ):
        assert "signature" in refused(network, changed.encode())


def test_broadcast_without_a_balance_is_accepted_and_never_runs(network: Network) -> None:
    """The public RPC hands it to the nodes, which drop it."""
    sent = network.send(DAVE, DAVE, 0)
    network.clock.ticks(4)
    assert network.included(sent) == [False]


def test_broadcast_executes_once_its_source_has_a_balance(network: Network) -> None:
    network.send(ALICE, DAVE, 5, ahead=1)
    network.clock.ticks(2)
    sent = network.send(DAVE, BOB, 5)
    network.clock.ticks(4)
    assert network.included(sent) == [True]
    without = network.send(DAVE, BOB, 0)
    network.clock.ticks(4)
    assert network.included(without) == [False]


# Balances


def test_unpayable_transaction_included_without_effect(network: Network) -> None:
    sent = network.send(ALICE, DAVE, 1001)
    network.clock.ticks(4)
    found = network.chain.transaction(sent.id)
    assert found is not None
    assert not found.money_flew
    assert network.balances() == [1000, 500, 1, 0]
    assert network.chain.balance(ALICE.identity).number_of_outgoing_transfers == 0


def test_balance_is_checked_in_the_tick(network: Network) -> None:
    """Carol has nothing of it when she sends, and has it in the tick."""
    network.send(ALICE, CAROL, 100, ahead=2)
    sent = network.send(CAROL, DAVE, 101, ahead=3)
    network.clock.ticks(5)
    assert network.included(sent) == [True]
    assert network.balances() == [900, 500, 0, 101]


def test_everything_can_be_spent_and_no_more(network: Network) -> None:
    network.send(ALICE, DAVE, 1000, ahead=1)
    network.clock.ticks(2)
    assert network.balances() == [0, 500, 1, 1000]


def test_counters(network: Network) -> None:
    first = network.send(ALICE, BOB, 7, ahead=1)
    network.clock.ticks(2)
    second = network.send(ALICE, BOB, 8, ahead=1)
    network.send(BOB, BOB, 9, ahead=1)
    network.clock.ticks(2)
    network.send(ALICE, BOB, 0, ahead=1)
    network.clock.ticks(2)
    alice, bob = (network.chain.balance(each.identity) for each in (ALICE, BOB))
    assert alice.valid_for_tick == bob.valid_for_tick == network.tick() - 1
    assert (alice.balance, alice.outgoing_amount, alice.number_of_outgoing_transfers) == (985, 15, 2)
    assert (alice.latest_outgoing_transfer_tick, alice.latest_incoming_transfer_tick) == (second.tick, FIRST_TICK)
    # A genesis balance counts as incoming.
    assert (bob.balance, bob.incoming_amount, bob.number_of_incoming_transfers) == (515, 515, 3)
    assert (bob.latest_incoming_transfer_tick, bob.latest_outgoing_transfer_tick) == (second.tick, 0)
    assert (bob.outgoing_amount, bob.number_of_outgoing_transfers) == (0, 0)
    assert first.tick < second.tick
    nobody = network.chain.balance(DAVE.identity)
    assert (nobody.balance, nobody.incoming_amount, nobody.latest_incoming_transfer_tick) == (0, 0, 0)


@pytest.mark.parametrize("amount", [0, 1, 1000, 1001])
def test_transfer_to_oneself_moves_nothing(network: Network, amount: int) -> None:
    sent = network.send(ALICE, ALICE, amount, payload=b"a record")
    network.clock.ticks(4)
    found = network.chain.transaction(sent.id)
    assert found is not None
    assert found.transaction == sent
    assert not found.money_flew
    alice = network.chain.balance(ALICE.identity)
    assert (alice.balance, alice.incoming_amount, alice.outgoing_amount) == (1000, 1000, 0)
    assert sent_by(network, ALICE) == [sent]


# Look-ups


@pytest.mark.parametrize("identity", ["", "a" * 60, "A" * 60, "ALICE", ALICE.identity + "A", "A/../B"])
def test_malformed_identity_is_refused(network: Network, identity: str) -> None:
    for ask in (network.chain.balance, lambda it: network.chain.sent(it, 0, EVER)):
        with pytest.raises(InvalidInputError) as caught:
            ask(identity)
        assert caught.value.field == "identity"


@pytest.mark.parametrize("txid", ["", "a" * 60, "a" * 59, "A" * 60, ALICE.identity, "ü" * 60])
def test_malformed_transaction_id_is_not_found(network: Network, txid: str) -> None:
    assert network.chain.transaction(txid) is None


def test_sent_lists_a_sources_transactions_newest_first(network: Network) -> None:
    sent = []
    for number in range(5):
        sent.append(network.send(ALICE, BOB if number % 2 else ALICE, number, ahead=1))
        network.send(BOB, ALICE, 1, ahead=1)
        network.clock.ticks(2)
    waiting = network.send(ALICE, BOB)
    assert sent_by(network, ALICE) == sent[::-1]
    assert network.chain.sent(ALICE.identity, 0, EVER).valid_for_tick == network.tick() - 1
    assert network.chain.sent(DAVE.identity, 0, EVER) == SentList((), network.tick() - 1)
    assert sent_by(network, ALICE, sent[1].tick, sent[3].tick) == sent[3:0:-1]
    assert network.included(waiting) == [False]


def test_sent_lists_a_range_of_one_tick(network: Network) -> None:
    """The query service refuses such a range."""
    sent = network.send_some(ALICE, BOB, 3)
    for each in sent:
        assert sent_by(network, ALICE, each.tick, each.tick) == [each]
    assert sent_by(network, ALICE, 0, 0) == sent_by(network, ALICE, EVER, EVER) == []


def test_sent_lists_more_than_a_page(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qubic.network.rpc_client.PAGE", 2)
    sent = network.send_some(ALICE, BOB, 5)
    assert sent_by(network, ALICE) == sent[::-1]


@pytest.mark.parametrize(("first", "last"), [(5, 4), (-1, 4), (0, 2**32)])
def test_sent_refuses_malformed_range(network: Network, first: int, last: int) -> None:
    with pytest.raises(InvalidInputError) as caught:
        network.chain.sent(ALICE.identity, first, last)
    assert caught.value.field == "first_tick"


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    amount=st.integers(0, 10**15),
    input_type=st.integers(0, 2**16 - 1),
    payload=st.binary(max_size=1024),
    to=st.binary(min_size=32, max_size=32),
)
def test_any_transaction_comes_back_as_it_was_sent(
    network: Network, amount: int, input_type: int, payload: bytes, to: bytes
) -> None:
    sent = network.send(ALICE, Key(b"", to), min(amount, 1) if amount < 1000 else amount, payload=payload, ahead=1)
    network.clock.ticks(2)
    found = network.chain.transaction(sent.id)
    assert found is not None
    assert found.transaction.encode() == sent.encode()


# Visible failures


def test_network_that_does_not_answer(network: Network) -> None:
    network.mock.set_faults(Faults(fail_requests=1000))
    encoded = ALICE.signed(DAVE, 1, FIRST_TICK + 3).encode()
    for ask in (
        network.chain.tick_info,
        network.chain.last_processed_tick,
        lambda: network.chain.balance(ALICE.identity),
        lambda: network.chain.transaction(ALICE.signed(DAVE, 1, FIRST_TICK).id),
        lambda: sent_by(network, ALICE),
        lambda: network.chain.broadcast(encoded),
    ):
        with pytest.raises(TransientError):
            ask()
    network.mock.set_faults(Faults())
    network.clock.ticks(5)
    assert sent_by(network, ALICE) == []


def test_node_that_fails_after_accepting_has_accepted(network: Network) -> None:
    network.mock.set_faults(Faults(fail_after_accepting=1000))
    sent = ALICE.signed(DAVE, 1, network.tick() + 2)
    with pytest.raises(TransientError):
        network.chain.broadcast(sent.encode())
    network.clock.ticks(4)
    assert network.included(sent) == [True]


def test_dropped_transaction_is_accepted_but_not_included(network: Network) -> None:
    network.mock.set_faults(Faults(drop=1))
    sent = network.send(ALICE, DAVE)
    network.clock.ticks(4)
    assert network.included(sent) == [False]


def test_look_ups_lag(network: Network) -> None:
    network.mock.set_faults(Faults(lag=3))
    sent = network.send(ALICE, DAVE, ahead=1)
    network.clock.ticks(4)
    assert network.chain.last_processed_tick().tick == sent.tick - 1
    assert (network.included(sent), sent_by(network, ALICE)) == ([False], [])
    network.clock.ticks(1)
    assert network.chain.last_processed_tick().tick == sent.tick
    assert (network.included(sent), sent_by(network, ALICE)) == ([True], [sent])


def test_ticks_pause_and_jump(network: Network) -> None:
    network.mock.set_faults(Faults(paused=True))
    tick = network.tick()
    skipped = network.send(ALICE, DAVE, ahead=5)
    kept = network.send(BOB, DAVE, ahead=101)
    network.clock.ticks(3600)
    assert network.tick() == tick
    network.mock.set_faults(Faults(jump=100))
    info = network.chain.tick_info()
    assert (info.tick, info.epoch, info.initial_tick) == (tick + 100, FIRST_EPOCH + 1, tick + 100)
    network.clock.ticks(3)
    assert network.chain.last_processed_tick().interval_initial_tick == tick + 100
    assert network.included(skipped, kept) == [False, True]
