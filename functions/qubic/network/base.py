"""What the qubic service needs of a Qubic network: what its public RPC offers, and nothing else.

A transaction is in its named tick or nowhere. `broadcast` confirms nothing; `transaction` does, once
`last_processed_tick` has reached the named tick: what is absent then has never executed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from qaes.domain.qubic.transaction import Transaction


@dataclass(frozen=True)
class TickInfo:
    """The tick that the network is at. `duration` is that of a tick in seconds, as the RPC rounds it."""

    tick: int
    epoch: int
    duration: int
    initial_tick: int


@dataclass(frozen=True)
class ProcessedTick:
    """The newest tick whose transactions can be looked up."""

    tick: int
    epoch: int
    interval_initial_tick: int


@dataclass(frozen=True)
class Balance:
    """What an identity has, as of `valid_for_tick`. Amounts in QU; the numbers count transfers that moved something."""

    identity: str
    balance: int
    valid_for_tick: int
    latest_incoming_transfer_tick: int = 0
    latest_outgoing_transfer_tick: int = 0
    incoming_amount: int = 0
    outgoing_amount: int = 0
    number_of_incoming_transfers: int = 0
    number_of_outgoing_transfers: int = 0


@dataclass(frozen=True)
class Included:
    """A transaction that the network has in the tick that it names; `timestamp` in milliseconds since 1970.

    `money_flew` is what the RPC says, for show: it is false for amount 0, and nothing is decided by it.
    """

    transaction: Transaction
    timestamp: int
    money_flew: bool

    @property
    def txid(self) -> str:
        return self.transaction.id

    @property
    def tick(self) -> int:
        return self.transaction.tick


@dataclass(frozen=True)
class SentList:
    """All transactions of a source in a range of ticks, newest first, as of the tick `valid_for_tick`."""

    transactions: tuple[Included, ...]
    valid_for_tick: int


class Chain(Protocol):
    """A Qubic network.

    Every method raises TransientError when asking again may help (nothing is then known of what was asked), and
    PermanentError when the network says no for good.
    """

    network: str
    """Which network answers, `mock` or `mainnet`; shown with every answer."""

    def tick_info(self) -> TickInfo:
        """Tell the present tick."""

    def last_processed_tick(self) -> ProcessedTick:
        """Tell up to which tick transactions can be looked up."""

    def balance(self, identity: str) -> Balance:
        """Tell what an identity (60 capitals) has. Raises InvalidInputError for what is none."""

    def broadcast(self, encoded: bytes) -> str:
        """Hand in a signed transaction, as often as one likes; returns its id. Says nothing of whether it will execute.

        Raises PermanentError (`broadcast_refused`) when it is malformed, signed wrongly, or names a tick that has come.
        A transaction of a source without any balance is accepted, and never executes.
        """

    def transaction(self, txid: str) -> Included | None:
        """Look a transaction up; None when the network does not have it (yet).

        Its bytes were put together again from the answer, and have that id: neither the node nor the way can have
        changed them.
        """

    def sent(self, identity: str, first_tick: int, last_tick: int) -> SentList:
        """List every transaction from an identity in the ticks from `first_tick` to `last_tick`, both included.

        Raises TransientError when the list is incomplete, InvalidInputError for a malformed identity or range.
        """
