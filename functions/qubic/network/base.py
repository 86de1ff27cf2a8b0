"""The part of a Qubic network's public RPC that the qubic service uses.

A transaction executes in its named tick or never. `broadcast` confirms nothing. `transaction` confirms it once
`last_processed_tick` has reached the named tick: a transaction that is absent then has never executed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from qaes.domain.qubic.transaction import Transaction


@dataclass(frozen=True)
class TickInfo:
    """The current tick of the network. `duration` is the duration of a tick in seconds, as the RPC rounds it."""

    tick: int
    epoch: int
    duration: int
    initial_tick: int


@dataclass(frozen=True)
class ProcessedTick:
    """The newest tick whose transactions the network can return."""

    tick: int
    epoch: int
    interval_initial_tick: int


@dataclass(frozen=True)
class Balance:
    """Balance of an identity at `valid_for_tick`, in QU. The counters include only transfers that moved an amount."""

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
    """A transaction that the network has included in its named tick; `timestamp` in milliseconds since 1970.

    `money_flew` is the RPC's field, for information only: it is false for amount 0, and no decision uses it.
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

    Every method raises TransientError if a repetition may help (the outcome of the call is then unknown), and
    PermanentError if the network rejects the request permanently.
    """

    network: str
    """The network that responds, `mock` or `mainnet`. Every API response contains it."""

    def tick_info(self) -> TickInfo:
        """Return the current tick."""

    def last_processed_tick(self) -> ProcessedTick:
        """Return the newest tick whose transactions the network can return."""

    def balance(self, identity: str) -> Balance:
        """Return the balance of an identity (60 capitals). Raises InvalidInputError for a malformed identity."""

    def broadcast(self, encoded: bytes) -> str:
        """Send a signed transaction and return its id. Safe to repeat. The result does not mean that it will execute.

        Raises PermanentError (`broadcast_refused`) if it is malformed, has a wrong signature, or names a tick that has
        passed. The network accepts a transaction of a source without a balance, but never executes it.
        """

    def transaction(self, txid: str) -> Included | None:
        """Return a transaction, or None if the network does not have it (yet).

        The bytes are reassembled from the response and checked against the id, so neither the node nor the connection
        can change them.
        """

    def sent(self, identity: str, first_tick: int, last_tick: int) -> SentList:
        """List every transaction from an identity in the ticks from `first_tick` to `last_tick`, both included.

        Raises TransientError if the list is incomplete, InvalidInputError for a malformed identity or range.
        """
