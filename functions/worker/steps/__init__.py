"""One module for each step type. `RUN` has the function of each: from parameters to a result, or to `Submitted`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qaes.domain.models import StepType
from worker.steps import check_balance, generic_action, monitor_action, onchain_action, policy_check
from worker.steps.context import StepContext, Submitted

RUN: dict[StepType, Callable[[dict[str, Any], StepContext], dict[str, Any] | Submitted]] = {
    "check_balance": check_balance.run,
    "policy_check": policy_check.run,
    "monitor_action": monitor_action.run,
    "onchain_action": onchain_action.run,
    "generic_action": generic_action.run,
}

__all__ = ["RUN", "StepContext", "Submitted"]
