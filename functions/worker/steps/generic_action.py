"""generic_action: an action that this system cannot perform itself; it puts the instruction's hash on the ledger."""

from __future__ import annotations

from typing import Any

from qaes.domain.canonical import hash_of
from worker.steps.context import StepContext


def run(parameters: dict[str, Any], context: StepContext) -> dict[str, Any]:
    """`{task_type, description, parameters}` → `{task_type, instruction_hash, txid, tick}`: a receipt, no effect.

    `txid` and `tick` are those of the transaction that was submitted. If its tick passes without it, the ledger signs
    another: `GET /verify/{instruction_hash}` returns the one that is confirmed.
    """
    instruction = hash_of({"reference": context.reference, "instruction": parameters})
    written = context.ledger.record_instruction(instruction, reference=context.reference, requester=context.requester)
    return {
        "task_type": parameters["task_type"],
        "instruction_hash": instruction,
        "txid": written["txid"],
        "tick": written["tick"],
    }
