"""What a step is given beside its parameters."""

from __future__ import annotations

from dataclasses import dataclass

from qaes.adapters.ledger_client import LedgerClient
from qaes.domain.policy import Policy


@dataclass(frozen=True)
class StepContext:
    """`reference` names (task, step): an effect under it happens once."""

    reference: str
    ledger: LedgerClient
    policy: Policy
