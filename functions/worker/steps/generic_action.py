"""generic_action: an action that this system cannot perform itself; it puts the instruction's hash on the ledger."""

from __future__ import annotations

from typing import Any

from qaes.domain.canonical import hash_of
from worker.steps.context import StepContext


def run(parameters: dict[str, Any], context: StepContext) -> dict[str, Any]:
    """`{task_type, description, parameters}` → `{task_type, instruction_hash, txid}`: a receipt, no effect."""
    instruction = hash_of({"reference": context.reference, "instruction": parameters})
    [transaction] = context.ledger.write_hashes([{"hash": instruction, "metadata": {"reference": context.reference}}])
    return {
        "task_type": parameters["task_type"],
        "instruction_hash": instruction,
        "txid": transaction["txid"],
    }
