"""generic_action: an action that this system cannot perform itself; it puts the instruction's hash on the ledger."""

from __future__ import annotations

from typing import Any

from qaes.domain.canonical import hash_of
from worker.steps.context import StepContext


def run(parameters: dict[str, Any], context: StepContext) -> dict[str, Any]:
    """`{task_type, description, parameters}` → `{task_type, instruction_hash, txid, tick}`: a receipt, no effect.

    The transaction is handed in; `GET /verify/{instruction_hash}` tells when the ledger has confirmed it.
    """
    instruction = hash_of({"reference": context.reference, "instruction": parameters})
    written = context.ledger.write(instruction, {"reference": context.reference})
    return {
        "task_type": parameters["task_type"],
        "instruction_hash": instruction,
        "txid": written["txid"],
        "tick": written["tick"],
    }
