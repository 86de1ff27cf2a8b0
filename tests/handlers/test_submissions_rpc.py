"""Submissions to a network that is asked through its public RPC, whose rules the mock's routes apply."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from qaes.domain.errors import PermanentError
from qaes.domain.qubic.transaction import Transaction
from qubic import wallets
from qubic.network.faults import Faults
from qubic.network.mock import MockChain
from qubic.network.rpc_client import RpcChain
from qubic.transactions.model import Submission
from qubic.transactions.signing import LEAD_TICKS
from qubic.transactions.submissions import Submissions
from qubic.transactions.tracking import EXPIRY_MARGIN_TICKS, REFUSED_METRIC
from tests.support.cloud import Cloud, cloud
from tests.support.rpc import served

SOURCE, DESTINATION = "0x1234567890abcdef", "0xabcdef1234567890"


class Ledger:
    """Submissions through the RPC; `mock` is the network behind it."""

    def __init__(self, it: Cloud, mock: MockChain, url: str) -> None:
        self.cloud = it
        self.mock = mock
        self.it = Submissions(RpcChain(url, network="mock"), "LedgerTable")
        self.source = wallets.demo_key(SOURCE).identity

    def transfer(self, reference: str, amount: int = 1) -> Submission:
        return self.it.submit_transfer(reference, source=SOURCE, destination=DESTINATION, amount=amount)

    def state(self, submission: Submission) -> str:
        found = self.it.get(submission.key)
        assert found is not None
        return found.state

    def run(self, ticks: int) -> None:
        """Let time pass, with a look at the end, as the schedule has it."""
        self.cloud.clock.pass_seconds(ticks)
        for identity in self.it.open_sources():
            self.it.advance(identity)

    def received(self) -> int:
        return self.mock.balance(wallets.demo_key(DESTINATION).identity).balance - 500


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    with cloud(state_machine=False, policy=False) as it:
        monkeypatch.setenv("QUBIC_SEED_SECRET", "QubicSeed")
        mock = MockChain(genesis=wallets.genesis(), table="ChainTable", clock=it.clock, tick_milliseconds=1000)
        with served(mock, monkeypatch) as url:
            yield Ledger(it, mock, url)


def test_transfer_expires_and_its_queue_goes_on(ledger: Ledger) -> None:
    """The query service refuses a range of one tick: a client that requests one never learns that it has passed."""
    ledger.mock.set_faults(Faults(drop=10**6))
    missed = ledger.transfer("task-1:step_3")
    ledger.run(LEAD_TICKS + 1)
    ledger.mock.set_faults(Faults())
    next_ = ledger.transfer("task-2:step_3", 2)
    assert (ledger.state(missed), ledger.state(next_)) == ("broadcast", "signed")
    ledger.run(EXPIRY_MARGIN_TICKS)
    assert (ledger.state(missed), ledger.state(next_)) == ("expired", "broadcast")
    ledger.run(2 * LEAD_TICKS)
    assert (ledger.state(next_), ledger.received()) == ("confirmed", 2)
    assert ledger.it.open_sources() == []


def test_record_is_signed_again_when_its_tick_is_missed(ledger: Ledger) -> None:
    ledger.mock.set_faults(Faults(drop=10**6))
    written = ledger.it.submit_record("hash:" + "a" * 64, b"\xaa" * 32, kind="hash", metadata={})
    ledger.run(LEAD_TICKS + 1)
    ledger.mock.set_faults(Faults())
    ledger.run(EXPIRY_MARGIN_TICKS)
    ledger.run(LEAD_TICKS + 1)
    ledger.run(1)
    assert ledger.state(written) == "confirmed"


def test_wallet_used_elsewhere_expires_when_lists_explain_it(ledger: Ledger) -> None:
    """The newest outgoing transfer is looked up in a range of its one tick."""
    ledger.mock.set_faults(Faults(drop=10**6))
    missed = ledger.transfer("task-1:step_3")
    ledger.cloud.clock.pass_seconds(LEAD_TICKS)
    ledger.mock.set_faults(Faults())
    key = wallets.demo_key(SOURCE)
    tick = ledger.mock.tick_info().tick + 1
    other = Transaction(key.public_key, wallets.demo_key(DESTINATION).public_key, 7, tick).sign(key.subseed)
    ledger.mock.broadcast(other.encode())
    ledger.run(EXPIRY_MARGIN_TICKS + 2)
    assert (ledger.state(missed), ledger.received()) == ("expired", 7)


def test_thousands_of_incoming_transfers_hide_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the wallet's outgoing transfers are listed: any sender could fill the list of incoming ones."""
    monkeypatch.setattr("qubic.network.rpc_client.MAX_LISTED", 1)
    monkeypatch.setattr("qubic.network.rpc_client.PAGE", 1)
    ledger.mock.set_faults(Faults(drop=1))
    missed = ledger.transfer("task-1:step_3")
    for number in (1, 2, 3):
        tick = ledger.mock.tick_info().tick
        sender, public = wallets.service_key(), wallets.demo_key(SOURCE).public_key
        ledger.mock.broadcast(Transaction(sender.public_key, public, number, tick + 1).sign(sender.subseed).encode())
        ledger.cloud.clock.pass_seconds(2)
    ledger.mock.set_faults(Faults(drop=10**6))
    ledger.run(LEAD_TICKS)
    ledger.run(EXPIRY_MARGIN_TICKS)
    assert ledger.state(missed) == "expired"


def test_broadcast_that_comes_too_late_is_no_alarm(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    """The live service refuses it with 400, as it refuses a wrong signature."""
    counted: list[str] = []
    monkeypatch.setattr("qubic.transactions.tracking.metrics.count_one", counted.append)
    sent = ledger.transfer("task-1:step_3")
    broadcast = ledger.mock.broadcast

    def late(encoded: bytes) -> str:
        ledger.cloud.clock.pass_seconds(LEAD_TICKS)
        return broadcast(encoded)

    monkeypatch.setattr(ledger.mock, "broadcast", late)
    ledger.it.advance(ledger.source)
    assert counted == []
    monkeypatch.setattr(ledger.mock, "broadcast", broadcast)
    ledger.run(1)
    assert ledger.state(sent) == "confirmed"

    def refuse(_: bytes) -> str:
        raise PermanentError("broadcast_refused", "the signature is not the source's")

    monkeypatch.setattr(ledger.mock, "broadcast", refuse)
    ledger.transfer("task-2:step_3")
    assert counted == [REFUSED_METRIC]
