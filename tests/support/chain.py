"""Keys of test identities, and a clock that the test advances."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache

from qaes.domain.qubic import schnorrq
from qaes.domain.qubic.identity import encode_identity
from qaes.domain.qubic.transaction import Transaction

TICK_MILLISECONDS = 1000
START = datetime(2026, 3, 4, 12, tzinfo=UTC)


@dataclass(frozen=True)
class Key:
    """A seed's keys; the seed is a test's."""

    subseed: bytes
    public: bytes

    @property
    def identity(self) -> str:
        return encode_identity(self.public)

    def signed(self, to: Key, amount: int, tick: int, payload: bytes = b"", input_type: int = 0) -> Transaction:
        return Transaction(self.public, to.public, amount, tick, input_type, payload).sign(self.subseed)


@cache
def key(name: str) -> Key:
    letters = name.encode().hex().translate(str.maketrans("0123456789", "ghijklmnop"))
    subseed = schnorrq.subseed_of(letters.ljust(schnorrq.SEED_LETTERS, "z")[: schnorrq.SEED_LETTERS])
    return Key(subseed, schnorrq.public_key_of(subseed))


@dataclass
class Clock:
    """The current time, which the test advances."""

    moment: datetime = field(default=START)

    def __call__(self) -> datetime:
        return self.moment

    def ticks(self, count: float) -> None:
        self.moment += timedelta(milliseconds=count * TICK_MILLISECONDS)
