"""The types of steps. `BUILT_IN` in `policy/actions.py` names the type that performs an action, and its parameters."""

from __future__ import annotations

from typing import Literal

StepType = Literal[
    "check_balance",
    "policy_check",
    "monitor_action",
    "onchain_action",
    "generic_action",
]

EFFECT_TYPES: frozenset[StepType] = frozenset({"onchain_action", "generic_action"})
"""Step types that change something outside the system: only the state ExecuteAction performs them."""

CONFIRMED_LATER: frozenset[StepType] = frozenset({"onchain_action"})
"""Step types whose outcome is known only after the effect was submitted: a transfer."""
