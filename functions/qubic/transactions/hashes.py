"""Hashes on the ledger: each written once for ever, by a transaction whose payload it is.

A hash that an operator writes (`hash`) and the record of a task's instruction (`instruction`) are two kinds of record,
with two input types: nobody can make the one look like the other.
"""

from __future__ import annotations

import re
from typing import Any

from qaes.domain.errors import InvalidInputError
from qubic.transactions.model import Submission, check_metadata, check_reference
from qubic.transactions.submissions import Submissions

RESERVED = "reference"
"""The name in a record's metadata under which the service itself names the task and the step."""
_HASH = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)
_NOTHING = dict.fromkeys(("kind", "state", "txid", "tick", "timestamp", "source", "encoded", "error"))


def check_hash(hash_: object, field: str = "hash") -> str:
    """A SHA-256 as 64 small hex letters. Raises InvalidInputError for anything but 64 hex letters."""
    if not isinstance(hash_, str) or not _HASH.fullmatch(hash_):
        raise InvalidInputError("a hash has 64 hexadecimal digits", field=field)
    return hash_.lower()


def check_remark(metadata: object) -> dict[str, Any]:
    """Return what an operator may write beside a hash. Raises InvalidInputError."""
    if not isinstance(metadata, dict):
        raise InvalidInputError("the metadata is an object", field="metadata")
    if RESERVED in metadata:
        raise InvalidInputError("only the record of a task's instruction has a reference", field="metadata.reference")
    return check_metadata(metadata)


def write_hash(it: Submissions, hash_: object, metadata: object, *, written_by: str = "") -> Submission:
    """Sign, store and send the transaction that writes a hash; the second time, the first one's state.

    Raises
    ------
    InvalidInputError
        The hash is none, or the metadata is no JSON object, claims a task's reference, or has more than 4,096 bytes of
        canonical JSON.
    LimitError
        Too much is waiting to be written: later.
    TransientError
        The ledger does not answer.
    """
    checked, remark = check_hash(hash_), check_remark(metadata)
    return it.submit_record(
        f"hash:{checked}", bytes.fromhex(checked), kind="hash", metadata=remark, requested_by=written_by
    )


def record_instruction(it: Submissions, hash_: object, reference: object, requester: str) -> Submission:
    """Write the hash of a task's instruction: once, under its own input type. Raises as `write_hash`."""
    checked, metadata = check_hash(hash_), {RESERVED: check_reference(reference)}
    return it.submit_record(
        f"instruction:{checked}", bytes.fromhex(checked), kind="instruction", metadata=metadata, requested_by=requester
    )


def hash_state(it: Submissions, hash_: str) -> dict[str, Any]:
    """Tell whether the hash is on the ledger, and as which `kind`: `verified` only when its transaction is confirmed.

    If there are two records, a confirmed one is reported first, and of two such that of the instruction.
    """
    found = [record for kind in ("instruction", "hash") if (record := it.get(f"{kind}:{hash_}"))]
    if not found:
        return {"hash": hash_, "verified": False, "network": it.chain.network} | _NOTHING
    record = min(found, key=lambda each: each.state != "confirmed")
    return {"hash": hash_, "verified": record.state == "confirmed", "kind": record.kind} | record.answer()
