"""Hashes on the ledger: each written once for ever, by a transaction whose payload it is."""

from __future__ import annotations

import re
from typing import Any

from qaes.domain.errors import InvalidInputError
from qubic.submissions import Submission, Submissions

_HASH = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)


def check_hash(hash_: object, field: str = "hash") -> str:
    """A SHA-256 as 64 small hex letters. Raises InvalidInputError for anything but 64 hex letters."""
    if not isinstance(hash_, str) or not _HASH.fullmatch(hash_):
        raise InvalidInputError("a hash has 64 hexadecimal digits", field=field)
    return hash_.lower()


def write_hash(it: Submissions, hash_: object, metadata: object) -> Submission:
    """Sign, store and send the transaction that writes a hash; the second time, the first one's state.

    Raises
    ------
    InvalidInputError
        The hash is none, or the metadata is no JSON object or has more than 4,096 bytes of canonical JSON.
    LimitError
        Too much is waiting to be written: later.
    UnavailableError
        The ledger does not answer.
    """
    checked = check_hash(hash_)
    if not isinstance(metadata, dict):
        raise InvalidInputError("the metadata is an object", field="metadata")
    return it.submit_record(f"hash:{checked}", bytes.fromhex(checked), kind="hash", metadata=metadata)


def hash_state(it: Submissions, hash_: str) -> dict[str, Any]:
    """Tell whether the hash is on the ledger: `verified` only when its transaction is confirmed."""
    found = it.get(f"hash:{hash_}")
    if found is None:
        nothing = dict.fromkeys(("state", "txid", "tick", "timestamp", "source", "encoded", "error"))
        return {"hash": hash_, "verified": False, "network": it.chain.network} | nothing
    return {"hash": hash_, "verified": found.state == "confirmed"} | found.answer()
