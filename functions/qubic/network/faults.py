"""The mock network's state, and what goes wrong in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from qaes.domain.qubic.identity import encode_identity
from qaes.domain.qubic.transaction import Transaction

Counter = Literal["drop", "fail_after_accepting", "fail_requests"]


class Faults(BaseModel):
    """What goes wrong. Setting it replaces what was set before; reading it tells what is left."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    drop: int = Field(0, ge=0, le=10**6, description="the next broadcasts that are answered and reach no pool")
    delay: int = Field(0, ge=0, le=10**6, description="ticks by which broadcasts reach the pool late")
    empty_ticks: int = Field(0, ge=0, le=10**6, description="the next ticks that come out empty")
    paused: bool = Field(default=False, description="no tick follows the present one")
    jump: int = Field(0, ge=0, le=10**7, description="ticks to jump over, once; a new epoch begins after it")
    fail_after_accepting: int = Field(0, ge=0, le=10**6, description="the next broadcasts that are accepted and fail")
    fail_requests: int = Field(0, ge=0, le=10**6, description="the next calls that fail and do nothing")
    lag: int = Field(0, ge=0, le=10**6, description="ticks by which look-ups lag behind")


@dataclass(frozen=True)
class State:
    """The STATE item. `version` changes with all but `closed_tick` and the counters of faults.

    `closed_tick` is the last tick that has passed; the present one follows it. `skipped` are the ranges of ticks that a
    jump left out, as long as something may still wait for them.
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
        """The last tick that look-ups know."""
        return self.closed_tick - self.lag

    def tick_at(self, moment: int) -> int:
        """The tick by the clock, which may be behind that of another caller, who has closed later ones."""
        passed = 0 if self.paused else (moment - self.origin_time) // self.tick_milliseconds
        return self.origin_tick + passed

    def time_of(self, tick: int) -> int:
        return self.origin_time + (tick - self.origin_tick) * self.tick_milliseconds

    def comes_out_empty(self, tick: int) -> bool:
        return any(first <= tick <= last for first, last in (*self.skipped, (self.empty_from, self.empty_to)))


@dataclass(frozen=True)
class Place:
    """What waits in a source's place of the pool."""

    txid: str
    tick: int
    transaction: Transaction

    @property
    def source(self) -> str:
        return encode_identity(self.transaction.source)


def left_of(state: State) -> Faults:
    """What is left of the faults that were set."""
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
    """What of the state changes when these faults are set, and the ranges of ticks that are left out then."""
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
    # Nothing waits for a tick that is closed: whatever did was executed when the state was read.
    skipped = [each for each in state.skipped if each[1] > state.closed_tick]
    if faults.jump:
        changes |= {"epoch": state.epoch + 1, "initial_tick": tick}
        skipped.append((state.tick + 1, tick - 1))
    return changes, skipped
