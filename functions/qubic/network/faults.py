"""State of the mock network, and its simulated faults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qaes.domain.qubic.identity import encode_identity
from qaes.domain.qubic.transaction import Transaction

Counter = Literal["drop", "fail_after_accepting", "fail_requests"]


class Faults(BaseModel):
    """Simulated faults. A write replaces all faults; a read returns the remaining ones."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    drop: int = Field(0, ge=0, le=10**6, description="number of broadcasts that are accepted but reach no pool")
    delay: int = Field(0, ge=0, le=10**6, description="delay of broadcasts to the pool, in ticks")
    empty_ticks: int = Field(0, ge=0, le=10**6, description="number of empty ticks that follow")
    paused: bool = Field(default=False, description="whether the current tick stays the last one")
    jump: int = Field(0, ge=0, le=10**7, description="number of ticks to skip once; a new epoch begins after them")
    fail_after_accepting: int = Field(0, ge=0, le=10**6, description="number of broadcasts to accept, then fail")
    fail_requests: int = Field(0, ge=0, le=10**6, description="number of calls that fail without an effect")
    lag: int = Field(0, ge=0, le=10**6, description="lag of look-ups behind the current tick, in ticks")


@dataclass(frozen=True)
class State:
    """The STATE item. Every change except `closed_tick` and the counters of faults increments `version`.

    `closed_tick` is the last tick that has passed; the current tick follows it. `skipped` has the ranges of ticks that
    a jump skipped, as long as a transaction may still wait for them.
    """

    supply: int
    version: int
    closed_tick: int
    origin_tick: int
    origin_time: int  # milliseconds since 1970
    tick_milliseconds: int
    paused: int
    epoch: int
    initial_tick: int
    empty_from: int
    empty_to: int
    delay: int
    lag: int
    drop: int
    fail_after_accepting: int
    fail_requests: int
    skipped: tuple[tuple[int, int], ...] = ()

    @property
    def tick(self) -> int:
        return self.closed_tick + 1

    @property
    def processed_tick(self) -> int:
        """The last tick that look-ups return."""
        return self.closed_tick - self.lag

    def tick_at(self, moment: int) -> int:
        """Return the tick at a time. It may be below `closed_tick`, which a caller with a faster clock advances."""
        passed = 0 if self.paused else (moment - self.origin_time) // self.tick_milliseconds
        return self.origin_tick + passed

    def time_of(self, tick: int) -> int:
        return self.origin_time + (tick - self.origin_tick) * self.tick_milliseconds

    def comes_out_empty(self, tick: int) -> bool:
        return any(first <= tick <= last for first, last in (*self.skipped, (self.empty_from, self.empty_to)))


@dataclass(frozen=True)
class Place:
    """A transaction in a source's place of the pool."""

    txid: str
    tick: int
    transaction: Transaction

    @property
    def source(self) -> str:
        return encode_identity(self.transaction.source)


def left_of(state: State) -> Faults:
    """Return the remaining faults."""
    return Faults(
        drop=state.drop,
        delay=state.delay,
        empty_ticks=max(0, state.empty_to - max(state.tick, state.empty_from - 1)),
        paused=bool(state.paused),
        fail_after_accepting=state.fail_after_accepting,
        fail_requests=state.fail_requests,
        lag=state.lag,
    )


def changes_for(faults: Faults, state: State, moment: int) -> tuple[dict[str, int], list[tuple[int, int]]]:
    """Return the changes of the state for new faults, and the ranges of ticks that the mock then skips."""
    tick = state.tick + faults.jump
    changes: dict[str, int] = {
        "delay": faults.delay,
        "lag": faults.lag,
        "drop": faults.drop,
        "fail_after_accepting": faults.fail_after_accepting,
        "fail_requests": faults.fail_requests,
        "empty_from": tick + 1,
        "empty_to": tick + faults.empty_ticks,
    }
    if faults.jump or faults.paused != bool(state.paused):
        changes |= {"origin_tick": tick, "origin_time": moment, "paused": int(faults.paused)}
    # No transaction waits for a closed tick: reading the state executed them.
    skipped = [ticks for ticks in state.skipped if ticks[1] > state.closed_tick]
    if faults.jump:
        changes |= {"epoch": state.epoch + 1, "initial_tick": tick}
        skipped.append((state.tick + 1, tick - 1))
    return changes, skipped
