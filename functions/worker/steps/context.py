"""What a step is given beside its parameters."""

from __future__ import annotations

from dataclasses import dataclass

from qaes.adapters.ledger_client import LedgerClient
from qaes.domain.policy import Policy


@dataclass(frozen=True)
class StepContext:
    """`reference` names (task, step): an effect under it happens once. `run` is the task's execution that asks."""

    reference: str
    ledger: LedgerClient
    policy: Policy
    requester: str
    run: int = 1


@dataclass(frozen=True)
class Submitted:
    """The effect is under way, and its outcome not known yet: the step is finished when it is."""

    txid: str
    tick: int
