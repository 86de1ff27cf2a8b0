"""Hashes on the ledger: each is recorded once, as the payload of a transaction.

An operator's hash (`hash`) and the record of a task's instruction (`instruction`) are two kinds of record with
different input types, so neither can be presented as the other.
"""

from __future__ import annotations

import re
from typing import Any

from qaes.domain.errors import InvalidInputError
from qubic.transactions.model import Submission, check_metadata, check_reference
from qubic.transactions.submissions import Submissions

RESERVED = "reference"
"""Name in a record's metadata that is reserved for the service's own reference to task and step."""
_HASH = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)
_NOTHING = dict.fromkeys(("kind", "state", "txid", "tick", "timestamp", "source", "encoded", "error"))


def check_hash(hash_: object, field: str = "hash") -> str:
    """Return a SHA-256 as 64 lower-case hexadecimal digits. Raises InvalidInputError for any other text."""
    if not isinstance(hash_, str) or not _HASH.fullmatch(hash_):
        raise InvalidInputError("a hash must have 64 hexadecimal digits", field=field)
    return hash_.lower()


def check_remark(metadata: object) -> dict[str, Any]:
    """Return an operator's metadata for a hash. Raises InvalidInputError."""
    if not isinstance(metadata, dict):
        raise InvalidInputError("the metadata must be an object", field="metadata")
    if RESERVED in metadata:
        raise InvalidInputError(
            "`reference` is reserved for the record of a task's instruction", field="metadata.reference"
        )
    return check_metadata(metadata)


def write_hash(ledger: Submissions, hash_: object, metadata: object, *, written_by: str = "") -> Submission:
    """Sign, store and send the transaction that records a hash. A repetition returns the first transaction's state.

    Raises
    ------
    InvalidInputError
        The hash is malformed, or the metadata is not a JSON object, claims a task's reference, or has more than 4,096
        bytes of canonical JSON.
    LimitError
        The ledger's queue is full. Try again later.
    TransientError
        The ledger does not respond.
    """
    checked, remark = check_hash(hash_), check_remark(metadata)
    return ledger.submit_record(
        f"hash:{checked}", bytes.fromhex(checked), kind="hash", metadata=remark, requested_by=written_by
    )


def record_instruction(ledger: Submissions, hash_: object, reference: object, requester: str) -> Submission:
    """Record the hash of a task's instruction, once, with its own input type. Raises as `write_hash`."""
    checked, metadata = check_hash(hash_), {RESERVED: check_reference(reference)}
    return ledger.submit_record(
        f"instruction:{checked}", bytes.fromhex(checked), kind="instruction", metadata=metadata, requested_by=requester
    )


def hash_state(ledger: Submissions, hash_: str) -> dict[str, Any]:
    """Return whether the hash is on the ledger, and its `kind`; `verified` only if its transaction is confirmed.

    If the hash has two records, a confirmed one takes precedence, then the record of the instruction.
    """
    found = [record for kind in ("instruction", "hash") if (record := ledger.get(f"{kind}:{hash_}"))]
    if not found:
        return {"hash": hash_, "verified": False, "network": ledger.chain.network} | _NOTHING
    record = min(found, key=lambda each: each.state != "confirmed")
    return {"hash": hash_, "verified": record.state == "confirmed", "kind": record.kind} | record.answer()
