"""A signed act is on the ledger at most once, under any behaviour of the network and any crash."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import ANY

import boto3
import pytest

from qaes.domain.errors import InvalidInputError, LimitError, PermanentError, TransientError
from qaes.domain.qubic.transaction import Transaction, decode
from qubic import wallets
from qubic.network.base import ProcessedTick, SentList
from qubic.network.faults import Faults
from qubic.network.mock import MockChain
from qubic.transactions.model import Submission
from qubic.transactions.signing import LEAD_TICKS, MAX_TICKS_AHEAD
from qubic.transactions.submissions import Submissions
from qubic.transactions.tracking import EXPIRY_MARGIN_TICKS, MIN_LEAD_TICKS, REFUSED_METRIC
from tests.support.cloud import SEED, Cloud, cloud

SOURCE, DESTINATION, EMPTY = "0x1234567890abcdef", "0xfedcba0987654321", "0xabcdef1234567890"
HOUR = 3600


def digest(number: int) -> str:
    return f"{number:064x}"


class Ledger:
    """The submissions to a mock network, with all reported ends."""

    def __init__(self, it: Cloud) -> None:
        self.cloud = it
        self.chain = MockChain(genesis=wallets.genesis(), table="ChainTable", clock=it.clock, tick_milliseconds=1000)
        self.closed: list[Submission] = []
        self.signed: list[Submission] = []
        self.it = Submissions(self.chain, "LedgerTable", on_signed=self.signed.append, on_closed=self.closed.append)

    def write(self, number: int, **metadata: Any) -> Submission:
        return self.it.submit_record(
            f"hash:{digest(number)}", bytes.fromhex(digest(number)), kind="hash", metadata=metadata
        )

    def transfer(self, reference: str, amount: int, run: int = 1, source: str = SOURCE) -> Submission:
        return self.it.submit_transfer(reference, source=source, destination=DESTINATION, amount=amount, run=run)

    def state(self, key: str) -> str:
        found = self.it.get(key)
        assert found is not None
        return found.state

    def pass_ticks(self, ticks: float) -> None:
        self.cloud.clock.pass_seconds(ticks)

    def advance(self, identity: str | None = None) -> None:
        self.it.advance(identity or wallets.service_key().identity)

    def run(self, ticks: int, identity: str | None = None) -> None:
        """Let time pass, with a look at each tick, as the writer would."""
        for _ in range(ticks):
            self.pass_ticks(1)
            self.advance(identity)

    def on_chain(self, payload: bytes) -> list[Transaction]:
        found, _ = self.chain.transactions(wallets.service_key().identity)
        return [each.transaction for each in found if each.transaction.payload == payload]

    def balance(self, address: str) -> int:
        return self.chain.balance(wallets.Wallets("mock").identity(address)).balance


@pytest.fixture(scope="module")
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False, policy=False) as it, pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUBIC_SEED_SECRET", "QubicSeed")
        yield it


_number = iter(range(1, 10**6))


@pytest.fixture
def number() -> int:
    return next(_number) * 1000


@pytest.fixture
def ledger(aws: Cloud) -> Iterator[Ledger]:
    it = Ledger(aws)
    it.chain.set_faults(Faults())
    yield it
    it.chain.set_faults(Faults())
    for identity in it.it.open_sources():  # the next test finds the queues empty
        it.run(5 * LEAD_TICKS, identity)
    assert not it.it.open_sources()


def test_record_stored_with_id_and_tick_before_confirmation(ledger, number):
    tick = ledger.chain.tick_info().tick
    written = ledger.write(number, note="first")
    assert len(written.txid) == 60
    assert written.tick == tick + LEAD_TICKS
    transaction = decode(written.encoded)
    assert transaction.id == written.txid
    assert transaction.is_signed_by_source()
    assert (transaction.amount, transaction.source, transaction.payload) == (
        0, transaction.destination, bytes.fromhex(digest(number)),
    )  # fmt: skip
    assert ledger.state(written.key) == "broadcast"
    assert [each.key for each in ledger.signed] == [written.key]
    ledger.pass_ticks(LEAD_TICKS)
    ledger.advance()
    assert ledger.state(written.key) == "broadcast"  # its tick is the present one: it has not passed
    ledger.pass_ticks(1)
    ledger.advance()
    assert ledger.state(written.key) == "confirmed"
    assert [each.id for each in ledger.on_chain(transaction.payload)] == [written.txid]
    assert ledger.closed[-1].state == "confirmed"


def test_same_hash_is_one_transaction_whenever_it_is_written(ledger, number):
    first = ledger.write(number)
    assert ledger.write(number, other="remark").txid == first.txid
    ledger.run(LEAD_TICKS + 2)
    again = ledger.write(number)
    assert (again.txid, again.state) == (first.txid, "confirmed")
    assert len(ledger.on_chain(bytes.fromhex(digest(number)))) == 1


def test_at_the_same_time_too(ledger, number):
    with ThreadPoolExecutor(8) as pool:
        written = list(pool.map(lambda _: ledger.write(number), range(8)))
    assert len({each.txid for each in written}) == 1
    ledger.run(LEAD_TICKS + 2)
    assert len(ledger.on_chain(bytes.fromhex(digest(number)))) == 1


def test_under_one_key_nothing_else_can_be_written(ledger, number):
    ledger.it.submit_record(f"anchor:log:{number}", b"one", kind="anchor", metadata={})
    with pytest.raises(PermanentError, match="another record was written") as refused:
        ledger.it.submit_record(f"anchor:log:{number}", b"two", kind="anchor", metadata={})
    assert refused.value.code == "key_conflict"


def test_metadata_has_a_limit(ledger, number):
    with pytest.raises(InvalidInputError, match="4096"):
        ledger.write(number, long="x" * 5000)


def test_one_transaction_in_flight_and_each_keeps_its_id(ledger, number):
    written = [ledger.write(number + each) for each in range(4)]
    assert [each.tick - written[0].tick for each in written] == [0, LEAD_TICKS, 2 * LEAD_TICKS, 3 * LEAD_TICKS]
    seen: set[int] = set()
    for _ in range(5 * LEAD_TICKS):
        states = [ledger.state(each.key) for each in written]
        assert states.count("broadcast") <= 1
        seen.add(states.count("confirmed"))
        ledger.run(1)
    assert seen == {0, 1, 2, 3, 4}
    assert [ledger.it.get(each.key).txid for each in written] == [each.txid for each in written]
    assert [ledger.it.get(each.key).attempt for each in written] == [1] * 4


def test_full_queue_refuses_and_loses_nothing(ledger, number, monkeypatch):
    monkeypatch.setattr("qubic.transactions.submissions.MAX_OPEN", 4)
    monkeypatch.setattr("qubic.transactions.submissions.MAX_OPEN_HASHES", 3)
    for each in range(3):
        ledger.write(number + each)
    with pytest.raises(LimitError, match="queue is full"):
        ledger.write(number + 3)
    assert ledger.it.get(f"hash:{digest(number + 3)}") is None
    ledger.it.submit_record(f"anchor:log:{number}", b"root", kind="anchor", metadata={})  # finds a place all the same
    with pytest.raises(LimitError):
        ledger.it.submit_record(f"anchor:log:{number + 1}", b"root", kind="anchor", metadata={})


# Behaviour of the network


def test_lost_transaction_is_signed_for_later_tick(ledger, number):
    ledger.chain.set_faults(Faults(drop=1))
    first = ledger.write(number)
    # Sent once, and not again before its tick has passed: the network has lost it.
    ledger.pass_ticks(LEAD_TICKS + 1)
    ledger.advance()
    assert ledger.it.get(first.key).txid == first.txid  # not yet: another node may be behind
    ledger.pass_ticks(EXPIRY_MARGIN_TICKS)
    ledger.advance()
    second = ledger.it.get(first.key)
    assert second.attempt == 2
    assert second.tick > first.tick
    assert second.txid != first.txid
    ledger.run(LEAD_TICKS + 2)
    assert ledger.state(first.key) == "confirmed"
    assert [each.id for each in ledger.on_chain(first.payload)] == [second.txid]
    assert ledger.it.attempt(first.txid).state == "expired"
    assert ledger.it.attempt(second.txid).state == "confirmed"


def test_resend_before_tick_needs_no_second_signature(ledger, number):
    ledger.chain.set_faults(Faults(drop=1))
    first = ledger.write(number)
    ledger.run(LEAD_TICKS + 2)
    assert (ledger.state(first.key), ledger.it.get(first.key).attempt) == ("confirmed", 1)


def test_node_that_fails_after_accepting_has_accepted(ledger, number):
    ledger.chain.set_faults(Faults(fail_after_accepting=1))
    written = ledger.write(number)
    assert written.state == "signed"
    assert ledger.state(written.key) == "broadcast"  # it may be there
    ledger.run(LEAD_TICKS + 2)
    assert ledger.state(written.key) == "confirmed"
    assert len(ledger.on_chain(written.payload)) == 1


def test_nothing_stored_when_network_does_not_respond(ledger, number):
    ledger.chain.set_faults(Faults(fail_requests=1))
    with pytest.raises(TransientError):
        ledger.write(number)
    assert ledger.it.get(f"hash:{digest(number)}") is None


@pytest.mark.parametrize(
    "faults", [Faults(empty_ticks=40), Faults(delay=30), Faults(jump=500), Faults(lag=10)], ids=repr
)
def test_one_confirmed_transaction_after_any_failure(ledger, number, faults):
    written = [ledger.write(number + each) for each in range(2)]
    ledger.chain.set_faults(faults)
    for tick in range(90):
        ledger.run(1)
        if tick == 45:
            ledger.chain.set_faults(Faults())
    for each in written:
        assert ledger.state(each.key) == "confirmed"
        [found] = ledger.on_chain(each.payload)
        assert found.id == ledger.it.get(each.key).txid


def test_nothing_is_confirmed_before_look_ups_know_it(ledger, number):
    ledger.chain.set_faults(Faults(lag=10))
    written = ledger.write(number)
    ledger.run(LEAD_TICKS + 10)
    assert ledger.state(written.key) == "broadcast"
    ledger.run(2)
    assert (ledger.state(written.key), ledger.it.get(written.key).attempt) == ("confirmed", 1)


def test_pause_of_an_hour_is_waited_for(ledger, number):
    written = ledger.write(number)
    ledger.chain.set_faults(Faults(paused=True))
    for _ in range(60):
        ledger.run(1)
        ledger.pass_ticks(HOUR / 60)
    assert ledger.state(written.key) == "broadcast"
    ledger.chain.set_faults(Faults())
    ledger.run(LEAD_TICKS + 2)
    assert (ledger.state(written.key), ledger.it.get(written.key).attempt) == ("confirmed", 1)


def test_two_writers_at_once_do_no_harm(ledger, number):
    written = [ledger.write(number + each) for each in range(3)]
    ledger.chain.set_faults(Faults(drop=1))
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5 * LEAD_TICKS):
            ledger.pass_ticks(1)
            list(pool.map(lambda _: ledger.advance(), range(2)))
    for each in written:
        assert ledger.state(each.key) == "confirmed"
        assert len(ledger.on_chain(each.payload)) == 1


# Transfers


def identity_of(address: str) -> str:
    return wallets.Wallets("mock").identity(address)


def test_transfer_moves_money_only_after_its_tick(ledger, number):
    before = ledger.balance(SOURCE), ledger.balance(DESTINATION)
    moved = ledger.transfer(f"task{number}#step_3", 7)
    assert (ledger.balance(SOURCE), ledger.balance(DESTINATION)) == before
    ledger.run(LEAD_TICKS + 2, moved.source)
    assert ledger.state(moved.key) == "confirmed"
    assert (ledger.balance(SOURCE), ledger.balance(DESTINATION)) == (before[0] - 7, before[1] + 7)


def test_same_reference_moves_once_however_often_and_at_once(ledger, number):
    before = ledger.balance(SOURCE)
    with ThreadPoolExecutor(8) as pool:
        moved = list(pool.map(lambda _: ledger.transfer(f"task{number}", 5), range(8)))
    assert len({each.txid for each in moved}) == 1
    ledger.run(LEAD_TICKS + 2, moved[0].source)
    assert ledger.transfer(f"task{number}", 5, run=2).txid == moved[0].txid  # a confirmed transfer is never repeated
    assert ledger.balance(SOURCE) == before - 5


class Replicas(MockChain):
    """Two nodes behind one address: one knows how far the network is, the other one, which looks up, may be behind."""

    def last_processed_tick(self) -> ProcessedTick:
        found = super().last_processed_tick()
        return replace(found, tick=found.tick + self.faults().lag)


def behind(ledger: Ledger, ticks: int) -> Ledger:
    replicas = Ledger(ledger.cloud)
    replicas.chain = Replicas(
        genesis=wallets.genesis(), table="ChainTable", clock=ledger.cloud.clock, tick_milliseconds=1000
    )
    replicas.it = Submissions(replicas.chain, "LedgerTable")
    replicas.chain.set_faults(Faults(lag=ticks))
    return replicas


def test_record_not_repeated_when_node_is_behind(ledger, number):
    written = ledger.write(number)
    replicas = behind(ledger, 30)
    replicas.pass_ticks(LEAD_TICKS + EXPIRY_MARGIN_TICKS + 2)
    with pytest.raises(TransientError, match="behind"):
        replicas.advance()
    assert ledger.it.get(written.key) == replace(written, state="broadcast", version=2, updated_at=ANY)
    replicas.chain.set_faults(Faults())
    replicas.advance()
    assert (ledger.state(written.key), ledger.it.get(written.key).attempt) == ("confirmed", 1)
    assert len(ledger.on_chain(written.payload)) == 1


def test_lagging_node_does_not_expire_a_transfer(ledger, number):
    moved = ledger.transfer(f"task{number}", 3)
    replicas = behind(ledger, 30)
    replicas.pass_ticks(LEAD_TICKS + EXPIRY_MARGIN_TICKS + 2)
    with pytest.raises(TransientError, match="behind"):
        replicas.advance(moved.source)
    replicas.chain.set_faults(Faults())
    replicas.advance(moved.source)
    assert ledger.state(moved.key) == "confirmed"


def test_list_confirms_when_the_look_up_misses(ledger, number, monkeypatch):
    moved = ledger.transfer(f"task{number}", 3)
    monkeypatch.setattr(ledger.chain, "transaction", lambda txid: None)
    ledger.pass_ticks(LEAD_TICKS + EXPIRY_MARGIN_TICKS + 2)
    ledger.advance(moved.source)
    assert ledger.state(moved.key) == "confirmed"


@contextmanager
def nothing_is_found(ledger: Ledger) -> Iterator[None]:
    """Look-ups and lists come from a node that is behind, the balance from one that is not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ledger.chain, "transaction", lambda txid: None)
        patch.setattr(ledger.chain, "sent", lambda *_: SentList((), 2**31))
        yield


def test_balance_change_prevents_expiry(ledger, number):
    moved = ledger.transfer(f"task{number}", 3)
    ledger.pass_ticks(LEAD_TICKS + EXPIRY_MARGIN_TICKS + 2)
    with nothing_is_found(ledger), pytest.raises(TransientError, match="the balance shows"):
        ledger.advance(moved.source)
    ledger.advance(moved.source)
    assert ledger.state(moved.key) == "confirmed"


def test_balance_before_the_tick_proves_nothing(ledger, number, monkeypatch):
    ledger.chain.set_faults(Faults(empty_ticks=LEAD_TICKS + 3))
    moved = ledger.transfer(f"task{number}", 3)
    ledger.pass_ticks(LEAD_TICKS + EXPIRY_MARGIN_TICKS + 2)
    with monkeypatch.context() as patch:
        of_before = replace(ledger.chain.balance(moved.source), valid_for_tick=moved.tick - 1)
        patch.setattr(ledger.chain, "balance", lambda identity: of_before)
        with pytest.raises(TransientError, match="not known yet"):
            ledger.advance(moved.source)
    ledger.advance(moved.source)
    assert ledger.state(moved.key) == "expired"


def test_wallet_used_elsewhere_does_not_block_expiry(ledger, number):
    ledger.chain.set_faults(Faults(drop=1))
    moved = ledger.transfer(f"task{number}", 3)
    ledger.pass_ticks(LEAD_TICKS + 1)
    elsewhere(ledger, SOURCE, 1, moved.tick + 3)
    ledger.pass_ticks(EXPIRY_MARGIN_TICKS + 2)
    ledger.advance(moved.source)
    assert ledger.state(moved.key) == "expired"


def test_earlier_signature_checked_before_next_signature(ledger, number):
    """A node that did not know the first one had it signed anew; now the second one gets lost."""
    first = ledger.write(number)
    ledger.pass_ticks(LEAD_TICKS + EXPIRY_MARGIN_TICKS + 2)
    with nothing_is_found(ledger):
        ledger.chain.set_faults(Faults(drop=10**6))
        ledger.advance()
    second = ledger.it.get(first.key)
    assert second.attempt == 2
    ledger.pass_ticks(LEAD_TICKS + EXPIRY_MARGIN_TICKS + 2)
    ledger.advance()
    found = ledger.it.get(first.key)
    assert (found.state, found.txid, found.tick, found.encoded) == (
        "confirmed", first.txid, first.tick, first.encoded,
    )  # fmt: skip
    assert found.attempt == 2
    assert ledger.it.attempt(second.txid).state == "expired"
    assert ledger.it.attempt(first.txid).state == "confirmed"


def test_later_run_looks_an_expired_transfer_up_before_it_pays(ledger, number, monkeypatch):
    before = ledger.balance(SOURCE)
    first = ledger.transfer(f"task{number}", 5)
    ledger.pass_ticks(LEAD_TICKS + EXPIRY_MARGIN_TICKS + 2)
    with nothing_is_found(ledger), monkeypatch.context() as patch:
        at_first = replace(ledger.chain.balance(first.source), latest_outgoing_transfer_tick=0)
        patch.setattr(ledger.chain, "balance", lambda identity: at_first)
        ledger.advance(first.source)
    assert ledger.state(first.key) == "expired"  # every one of its nodes was wrong
    again = ledger.transfer(f"task{number}", 5, run=2)
    assert (again.state, again.txid, again.attempt) == ("confirmed", first.txid, 1)
    assert ledger.balance(SOURCE) == before - 5
    assert not ledger.it.open_sources()


def test_earlier_transfer_without_effect_is_kept_apart(ledger, number):
    balance = ledger.balance(SOURCE)
    ledger.chain.set_faults(Faults(drop=1))
    first = ledger.transfer(f"task{number}", balance)
    elsewhere(ledger, SOURCE, 1, first.tick - 5)
    ledger.pass_ticks(LEAD_TICKS - 4)
    ledger.run(6, first.source)
    assert ledger.it.get(first.key).error.startswith("moved_nothing")
    pay(ledger, wallets.service_key(), wallets.demo_key(SOURCE), 1)
    for run in (2, 3):
        ledger.chain.set_faults(Faults(empty_ticks=LEAD_TICKS + 3))
        ledger.transfer(f"task{number}", balance, run=run)
        ledger.run(LEAD_TICKS + EXPIRY_MARGIN_TICKS + 2, first.source)
        assert (ledger.state(first.key), ledger.it.get(first.key).attempt) == ("expired", run)


# Turns


def test_unsent_transfer_after_its_tick_is_signed_again(ledger, number):
    before = ledger.balance(SOURCE)
    first, second = ledger.transfer(f"task{number}", 1), ledger.transfer(f"task{number + 1}", 2)
    ledger.pass_ticks(2 * LEAD_TICKS + 2)  # without a check in between
    ledger.advance(first.source)
    assert ledger.state(first.key) == "confirmed"
    later = ledger.it.get(second.key)
    assert (later.state, later.attempt) == ("broadcast", 2)
    assert later.tick > second.tick
    ledger.run(LEAD_TICKS + 2, first.source)
    assert ledger.state(second.key) == "confirmed"
    assert ledger.balance(SOURCE) == before - 3


def test_transaction_too_close_to_its_tick_is_not_sent(ledger, number):
    first, second = ledger.transfer(f"task{number}", 1), ledger.transfer(f"task{number + 1}", 2)
    ledger.pass_ticks(2 * LEAD_TICKS - MIN_LEAD_TICKS)
    assert ledger.it.get(second.key).tick - ledger.chain.tick_info().tick == MIN_LEAD_TICKS
    ledger.pass_ticks(1)
    ledger.advance(first.source)
    assert (ledger.state(first.key), ledger.state(second.key)) == ("confirmed", "broadcast")
    assert ledger.it.get(second.key).attempt == 2
    ledger.run(2 * LEAD_TICKS, first.source)
    assert ledger.state(second.key) == "confirmed"


def test_unsent_transfer_bytes_are_not_disclosed(ledger, number):
    first, second = ledger.transfer(f"task{number}", 1), ledger.transfer(f"task{number + 1}", 2)
    assert ledger.it.get(second.key).answer()["encoded"] == ""
    assert ledger.it.get(first.key).answer()["encoded"] != ""  # on its way: no secret any more
    simulated = ledger.it.simulate_transfer(f"task{number}", source=SOURCE, destination=DESTINATION, amount=1)
    assert simulated.answer()["encoded"] == ""


def test_broadcast_is_recorded_before_sending(ledger, number, monkeypatch):
    seen = []
    broadcast = ledger.chain.broadcast

    def watched(encoded: bytes) -> str:
        seen.append(ledger.state(f"hash:{digest(number)}"))
        return broadcast(encoded)

    monkeypatch.setattr(ledger.chain, "broadcast", watched)
    ledger.write(number)
    assert seen == ["broadcast"]


def test_queue_advances_when_look_ups_lag(ledger, number):
    ledger.chain.set_faults(Faults(lag=LEAD_TICKS + 5))
    written = [ledger.write(number + each) for each in range(4)]
    ledger.run(14 * LEAD_TICKS)
    assert [ledger.state(each.key) for each in written] == ["confirmed"] * 4
    assert [len(ledger.on_chain(each.payload)) for each in written] == [1] * 4


def test_following_ends_in_time_and_goes_on_the_next_time(ledger, number):
    written = [ledger.write(number + each) for each in range(3)]
    ledger.pass_ticks(LEAD_TICKS + 1)
    ledger.it.advance(written[0].source, seconds=0)
    assert [ledger.state(each.key) for each in written] == ["confirmed", "signed", "signed"]
    ledger.run(3 * LEAD_TICKS)
    assert [ledger.state(each.key) for each in written] == ["confirmed"] * 3


def test_varying_ticks_cause_no_repeated_signatures(ledger, number, monkeypatch):
    first, second = ledger.write(number), ledger.write(number + 1)
    ledger.pass_ticks(2 * LEAD_TICKS + 2)
    monkeypatch.setattr(
        ledger.it, "_send", lambda submission: submission.key == first.key
    )  # late, regardless of its tick
    with pytest.raises(TransientError, match="late again"):
        ledger.advance()
    assert ledger.it.get(second.key).attempt <= 3


def test_stale_queue_reader_sends_nothing_out_of_turn(ledger, number, monkeypatch):
    moved = [ledger.transfer(f"task{number}-{each}", 1) for each in range(3)]
    ledger.pass_ticks(2 * LEAD_TICKS - 1)
    for _ in range(2):  # the first one is confirmed and gone, the second one is late
        ledger.it.advance(moved[0].source, seconds=0)
    twin, get, met = Submissions(ledger.chain, "LedgerTable"), ledger.it.get, []

    def met_by_a_twin(key: str) -> Submission | None:
        if not met:
            met.append(key)
            twin.advance(moved[0].source)
        return get(key)

    with monkeypatch.context() as patch:
        patch.setattr(ledger.it, "get", met_by_a_twin)
        ledger.advance(moved[0].source)
    assert met == [moved[1].key]
    assert [ledger.state(each.key) for each in moved].count("broadcast") == 1
    ledger.run(5 * LEAD_TICKS, moved[0].source)
    assert [ledger.state(each.key) for each in moved] == ["confirmed"] * 3


def test_promised_amount_stays_promised_when_turn_is_late(ledger, number):
    pay(ledger, wallets.service_key(), wallets.demo_key(EMPTY), 50)
    balance = ledger.balance(EMPTY)
    moved = [
        ledger.transfer(f"task{number}-{part}", amount, source=EMPTY) for part, amount in enumerate((1, balance - 1))
    ]
    ledger.pass_ticks(2 * LEAD_TICKS + 3)  # without tracking
    with pytest.raises(PermanentError) as refused:
        ledger.transfer(f"task{number}-2", 1, source=EMPTY)
    assert refused.value.code == "insufficient_balance"
    ledger.run(4 * LEAD_TICKS, moved[0].source)
    assert [ledger.state(each.key) for each in moved] == ["confirmed"] * 2
    pay(ledger, wallets.demo_key(DESTINATION), wallets.demo_key(EMPTY), balance)


def test_service_wallet_keeps_balance_and_queue_room(ledger, number, monkeypatch):
    service = wallets.service_key().identity
    with pytest.raises(PermanentError) as refused:
        ledger.transfer(f"task{number}", ledger.balance(service), source=service)
    assert refused.value.code == "insufficient_balance"
    monkeypatch.setattr("qubic.transactions.submissions.MAX_OPEN_HASHES", 2)
    for part in range(2):
        ledger.transfer(f"task{number}-{part}", 1, source=service)
    with pytest.raises(LimitError):
        ledger.transfer(f"task{number}-2", 1, source=service)
    ledger.it.submit_record(f"policy:{number}", b"text", kind="policy", metadata={})
    for part in range(3):
        ledger.transfer(f"task{number}-{part + 3}", 1)  # other wallets have separate queues
    ledger.run(5 * LEAD_TICKS)


def test_waiting_transfer_not_sent_when_transfers_disabled(ledger, number):
    before = ledger.balance(SOURCE)
    sent, waits = ledger.transfer(f"task{number}", 1), ledger.transfer(f"task{number + 1}", 2)
    closed: list[Submission] = []
    it = Submissions(ledger.chain, "LedgerTable", on_closed=closed.append, sends_transfers=False)
    ledger.pass_ticks(LEAD_TICKS + 1)
    it.advance(sent.source)
    assert [ledger.state(each.key) for each in (sent, waits)] == ["confirmed", "expired"]
    assert "no longer enabled" in ledger.it.get(waits.key).error
    assert [each.key for each in closed] == [sent.key, waits.key]
    ledger.run(3 * LEAD_TICKS, sent.source)
    assert ledger.balance(SOURCE) == before - 1


def test_place_that_another_wallet_has_taken_over_is_given_up(ledger, number, monkeypatch):
    """The key was replaced; who found that ended before the place was out of the queue."""
    ledger.chain.set_faults(Faults(drop=1))
    first = ledger.write(number)
    ledger.pass_ticks(LEAD_TICKS + EXPIRY_MARGIN_TICKS + 2)
    replace_the_service_key(monkeypatch)
    pay(ledger, wallets.demo_key(SOURCE), wallets.demo_key(EMPTY), 1)
    ledger.it.advance(first.source, seconds=0)
    assert [place.key for place in ledger.it._source(first.source).open] == [first.key]
    again = ledger.write(number)
    ledger.advance(first.source)
    assert not ledger.it._source(first.source).open
    ledger.run(LEAD_TICKS + 2, again.source)
    assert (ledger.state(first.key), ledger.it.get(first.key).txid) == ("confirmed", again.txid)


def test_tick_that_cannot_be_true_is_not_believed(ledger, number, monkeypatch):
    with monkeypatch.context() as patch:
        wrong = replace(ledger.chain.tick_info(), tick=ledger.chain.tick_info().tick + MAX_TICKS_AHEAD + 10)
        patch.setattr(ledger.chain, "tick_info", lambda: wrong)
        with pytest.raises(TransientError, match="current tick"):
            ledger.write(number)
    tick = ledger.chain.tick_info().tick
    assert ledger.write(number).tick < tick + 20 * LEAD_TICKS


def test_empty_wallet_is_reported_without_new_signatures(ledger, number, monkeypatch, capsys):
    poor = wallets.key_of_seed("p" * 55)
    monkeypatch.setattr("qubic.transactions.submissions.service_key", lambda: poor)
    monkeypatch.setattr("qubic.wallets.service_key", lambda: poor)
    written = ledger.write(number)
    assert REFUSED_METRIC not in capsys.readouterr().out  # the RPC takes it, and the nodes drop it
    ledger.pass_ticks(LEAD_TICKS + EXPIRY_MARGIN_TICKS + 2)
    with pytest.raises(TransientError, match="has no balance"):
        ledger.advance(poor.identity)
    assert ledger.it.get(written.key).attempt == 1
    assert REFUSED_METRIC in capsys.readouterr().out
    rich = wallets.demo_key(SOURCE)
    pay(ledger, rich, poor, 1)
    ledger.run(LEAD_TICKS + 2, poor.identity)
    assert ledger.state(written.key) == "confirmed"


def replace_the_service_key(monkeypatch: pytest.MonkeyPatch) -> None:
    other = wallets.demo_key(EMPTY)
    monkeypatch.setattr("qubic.transactions.submissions.service_key", lambda: other)
    monkeypatch.setattr("qubic.wallets.service_key", lambda: other)


def test_record_signed_with_new_key_when_key_was_replaced(ledger, number, monkeypatch):
    ledger.chain.set_faults(Faults(drop=1))
    first = ledger.write(number)
    ledger.pass_ticks(LEAD_TICKS + EXPIRY_MARGIN_TICKS + 2)
    replace_the_service_key(monkeypatch)
    ledger.advance(first.source)
    assert ledger.it.get(first.key).error.startswith("no_key")
    again = ledger.write(number)
    assert again.source != first.source
    ledger.run(LEAD_TICKS + 2, again.source)
    found = ledger.it.get(first.key)
    assert (found.state, found.attempt, found.txid) == ("confirmed", 2, again.txid)


def test_restored_key_signs_waiting_records(ledger, number, monkeypatch):
    ledger.chain.set_faults(Faults(drop=1))
    first = ledger.write(number)
    ledger.pass_ticks(LEAD_TICKS + EXPIRY_MARGIN_TICKS + 2)
    with monkeypatch.context() as away:
        replace_the_service_key(away)
        ledger.advance(first.source)
    assert ledger.it.get(first.key).error.startswith("no_key")
    again = ledger.write(number)
    assert (again.source, again.attempt) == (first.source, 2)
    ledger.run(LEAD_TICKS + 2)
    assert ledger.state(first.key) == "confirmed"


def test_records_of_the_former_key_stay_written(ledger, number, monkeypatch):
    first = ledger.write(number)
    ledger.run(LEAD_TICKS + 2)
    replace_the_service_key(monkeypatch)
    again = ledger.write(number)
    assert (again.state, again.txid) == ("confirmed", first.txid)


def test_reference_stands_for_one_transfer(ledger, number):
    ledger.transfer(f"task{number}", 5)
    with pytest.raises(PermanentError) as refused:
        ledger.transfer(f"task{number}", 6)
    assert refused.value.code == "reference_conflict"


def test_expired_transfer_is_signed_again_in_later_run_only(ledger, number):
    before = ledger.balance(SOURCE)
    ledger.chain.set_faults(Faults(empty_ticks=LEAD_TICKS + 3))
    first = ledger.transfer(f"task{number}", 5)
    ledger.run(LEAD_TICKS + EXPIRY_MARGIN_TICKS + 2, first.source)
    gone = ledger.it.get(first.key)
    assert (gone.state, gone.attempt) == ("expired", 1)
    assert "nothing was moved" in gone.error
    assert ledger.balance(SOURCE) == before
    assert ledger.transfer(f"task{number}", 5).state == "expired"  # the same run asks again: the same answer
    again = ledger.transfer(f"task{number}", 5, run=2)
    assert (again.state, again.attempt) == ("signed", 2)
    ledger.run(LEAD_TICKS + 2, first.source)
    assert ledger.state(first.key) == "confirmed"
    assert ledger.balance(SOURCE) == before - 5


def test_transfer_above_balance_rejected_without_signature(ledger, number):
    with pytest.raises(PermanentError) as refused:
        ledger.transfer(f"task{number}", ledger.balance(SOURCE) + 1)
    assert refused.value.code == "insufficient_balance"
    refused = ledger.it.get(f"transfer:task{number}")
    assert (refused.state, refused.txid, refused.attempt) == ("failed", "", 0)


def test_in_flight_amount_counts_as_spent(ledger, number):
    balance = ledger.balance(EMPTY)
    for part in range(2):
        ledger.transfer(f"task{number}-{part}", balance // 2, source=EMPTY)
    with pytest.raises(PermanentError) as refused:
        ledger.transfer(f"task{number}-2", balance // 2, source=EMPTY)
    assert refused.value.code == "insufficient_balance"
    ledger.run(3 * LEAD_TICKS, identity_of(EMPTY))
    assert ledger.balance(EMPTY) == balance - 2 * (balance // 2)


def test_executed_transfer_does_not_count_twice(ledger, number):
    pay(ledger, wallets.service_key(), wallets.demo_key(EMPTY), 100)
    balance = ledger.balance(EMPTY)
    ledger.transfer(f"task{number}", balance - 10, source=EMPTY)
    ledger.pass_ticks(LEAD_TICKS + 1)  # it is in its tick, but was not checked
    moved = ledger.transfer(f"task{number}-2", 10, source=EMPTY)
    ledger.run(2 * LEAD_TICKS, moved.source)
    assert (ledger.state(moved.key), ledger.balance(EMPTY)) == ("confirmed", 0)


def test_simulation_refuses_insufficient_balance(ledger, number):
    terms = {"source": SOURCE, "destination": DESTINATION}
    assert ledger.it.simulate_transfer(f"task{number}", amount=1, **terms).state == "simulated"
    with pytest.raises(PermanentError) as refused:
        ledger.it.simulate_transfer(f"task{number}", amount=ledger.balance(SOURCE) + 1, **terms)
    assert refused.value.code == "insufficient_balance"
    with pytest.raises(InvalidInputError):
        ledger.it.simulate_transfer(f"task{number}", source=SOURCE, destination=SOURCE, amount=1)
    assert ledger.it.get(f"transfer:task{number}") is None


def test_concurrent_transfers_spend_only_the_balance(ledger, number):
    balance = ledger.balance(SOURCE)
    share = balance // 3

    def one(part: int) -> str:
        try:
            return ledger.transfer(f"task{number}-{part}", share).state
        except PermanentError as error:
            return error.code

    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(one, range(6)))
    assert sorted(outcomes) == ["insufficient_balance"] * 3 + ["signed"] * 3
    ledger.run(5 * LEAD_TICKS, identity_of(SOURCE))
    assert ledger.balance(SOURCE) == balance - 3 * share
    pay(ledger, wallets.demo_key(DESTINATION), wallets.demo_key(SOURCE), 3 * share)  # for the tests that follow


def pay(ledger: Ledger, source: wallets.Key, destination: wallets.Key, amount: int) -> None:
    tick = ledger.chain.tick_info().tick + 5
    transaction = Transaction(source.public_key, destination.public_key, amount, tick).sign(source.subseed)
    ledger.chain.broadcast(transaction.encode())
    ledger.pass_ticks(7)


def elsewhere(ledger: Ledger, address: str, amount: int, tick: int) -> None:
    """The wallet's owner signs something with another program."""
    key = wallets.demo_key(address)
    transaction = Transaction(key.public_key, wallets.service_key().public_key, amount, tick).sign(key.subseed)
    ledger.chain.broadcast(transaction.encode())


def test_transfer_failed_when_included_without_effect(ledger, number):
    """The wallet was emptied elsewhere, between signing and its tick."""
    balance = ledger.balance(SOURCE)
    ledger.chain.set_faults(Faults(drop=1))
    moved = ledger.transfer(f"task{number}", balance)
    elsewhere(ledger, SOURCE, 1, moved.tick - 5)
    ledger.pass_ticks(LEAD_TICKS - 4)  # the other one is in its tick, before this one is sent again
    ledger.run(6, moved.source)
    gone = ledger.it.get(moved.key)
    assert gone.state == "failed"
    assert gone.error.startswith("moved_nothing")
    assert ledger.balance(SOURCE) == balance - 1
    again = ledger.transfer(f"task{number}", balance)
    assert again.txid == moved.txid  # not in the same run
    with pytest.raises(PermanentError):  # and in a later one, only if it can be paid
        ledger.transfer(f"task{number}", balance, run=2)


def test_transfer_not_repeated_when_effect_is_unknown(ledger, number):
    moved = ledger.transfer(f"task{number}", 1)
    ledger.pass_ticks(LEAD_TICKS + 1)
    elsewhere(ledger, SOURCE, 1, moved.tick + 3)
    ledger.pass_ticks(5)
    ledger.advance(moved.source)
    assert ledger.it.get(moved.key).error.startswith("moved_unknown")
    assert ledger.transfer(f"task{number}", 1, run=2).txid == moved.txid


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"source": "0x12"}, InvalidInputError),
        ({"destination": "A" * 60}, InvalidInputError),
        ({"destination": SOURCE}, InvalidInputError),
        ({"amount": 0}, InvalidInputError),
        ({"amount": 10**15 + 1}, InvalidInputError),
        ({"reference": ""}, InvalidInputError),
        ({"reference": "x" * 257}, InvalidInputError),
        (
            {"source": "BAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAARMID"},
            (PermanentError, InvalidInputError),
        ),
    ],
)
def test_bad_terms_are_refused_with_nothing_signed(ledger, number, arguments, error):
    given = {"reference": f"task{number}", "source": SOURCE, "destination": DESTINATION, "amount": 1} | arguments
    with pytest.raises(error):
        ledger.it.submit_transfer(given.pop("reference"), **given)
    assert not ledger.it.open_sources()


def test_wallet_without_key_cannot_pay(ledger, number):
    stranger = wallets.key_of_seed("z" * 55).identity
    with pytest.raises(PermanentError) as refused:
        ledger.transfer(f"task{number}", 1, source=stranger)
    assert refused.value.code == "no_key"


def test_identity_and_its_older_address_are_the_same_wallet(ledger):
    it = wallets.Wallets("mock")
    assert it.key(SOURCE) == it.key(it.identity(SOURCE))


def test_real_network_rejects_old_addresses_and_demo_keys():
    it = wallets.Wallets("mainnet")
    with pytest.raises(PermanentError) as refused:
        it.identity(SOURCE)
    assert refused.value.code == "invalid_address"
    with pytest.raises(PermanentError) as refused:
        it.key(identity_of(SOURCE))
    assert refused.value.code == "no_key"


# The seed


def test_seed_is_never_shown(ledger, number, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    written = ledger.write(number)
    assert SEED not in caplog.text + capsys.readouterr().out + repr(wallets.service_key()) + json.dumps(
        written.answer()
    )
    assert wallets.service_key().subseed.hex() not in repr(wallets.service_key())


def test_malformed_seed_is_refused_without_showing_it(aws):
    wallets._key_of_secret.cache_clear()
    boto3.client("secretsmanager").put_secret_value(SecretId="QubicSeed", SecretString="Not a seed, but secret")
    try:
        with pytest.raises(RuntimeError, match="must have 55 letters") as refused:
            wallets.service_key()
        assert "Not a seed" not in repr(refused.value)
        assert refused.value.__cause__ is None
    finally:
        boto3.client("secretsmanager").put_secret_value(SecretId="QubicSeed", SecretString=SEED)
        wallets._key_of_secret.cache_clear()


# Networks


class Elsewhere(MockChain):
    network = "mainnet"


def test_confirmation_is_not_valid_on_another_network(ledger, number):
    written = ledger.write(number)
    ledger.run(LEAD_TICKS + 2)
    elsewhere = Elsewhere(
        genesis=wallets.genesis(), table="ChainTable", clock=ledger.cloud.clock, tick_milliseconds=1000
    )
    other = Submissions(elsewhere, "LedgerTable")
    assert other.get(written.key) is None
    assert other.attempt(written.txid) is None
