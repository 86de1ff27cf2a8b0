"""The anchor's payload on the ledger: the log's size and root, chained to the previous anchor.

93 bytes. Numbers are little-endian, as in the Qubic transaction that carries them:

| offset | bytes | field |
|---|---|---|
| 0 | 4 | `QAES` |
| 4 | 1 | version, 1 |
| 5 | 8 | log id: the first 8 bytes of SHA-256 of the log's name |
| 13 | 8 | size of the log, uint64 |
| 21 | 32 | root of the log at that size |
| 53 | 32 | SHA-256 of the previous anchor's payload; zeros in the first |
| 85 | 8 | sequence, uint64: 0 for the first anchor |

Source: this project's own format, docs/audit.md.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

from qaes.domain.merkle import HASH_BYTES, ProofError
from qaes.domain.qubic.identity import encode_identity
from qaes.domain.qubic.transaction import Transaction

ANCHOR_INPUT_TYPE = 0x5141
"""Input type of the transaction. It has no meaning in the Qubic protocol."""
MAGIC = b"QAES"
VERSION = 1
LOG_ID_BYTES = 8
FIRST = bytes(HASH_BYTES)
"""`previous` of the first anchor."""
_LAYOUT = struct.Struct("<4sB8sQ32s32sQ")
PAYLOAD_BYTES = _LAYOUT.size


def log_id_bytes(name: str) -> bytes:
    """Return the 8 bytes that identify a log in its anchors."""
    return hashlib.sha256(name.encode("utf-8")).digest()[:LOG_ID_BYTES]


@dataclass(frozen=True)
class AnchorPayload:
    """One anchor of the log.

    Attributes
    ----------
    log_id
        `log_id_bytes` of the log's name.
    size, root
        Size and root of the whole log; the size is at least 1.
    previous
        `digest` of the previous anchor; FIRST if `sequence` is 0.
    sequence
        Number of earlier anchors.

    Raises
    ------
    ProofError
        A field is out of its range (`payload`).
    """

    log_id: bytes
    size: int
    root: bytes
    previous: bytes = FIRST
    sequence: int = 0

    def __post_init__(self) -> None:
        sizes = (len(self.log_id), len(self.root), len(self.previous))
        if sizes != (LOG_ID_BYTES, HASH_BYTES, HASH_BYTES):
            raise ProofError("payload", "a field of the anchor has the wrong length")
        if not 1 <= self.size < 1 << 64 or not 0 <= self.sequence < 1 << 64:
            raise ProofError("payload", "a number of the anchor is out of range")
        if (self.sequence == 0) != (self.previous == FIRST):
            raise ProofError("payload", "exactly the first anchor must have no previous anchor")

    def encode(self) -> bytes:
        """Return the 93 bytes of the payload."""
        return _LAYOUT.pack(MAGIC, VERSION, self.log_id, self.size, self.root, self.previous, self.sequence)

    @property
    def digest(self) -> bytes:
        """Return the SHA-256 of the payload, which the next anchor contains."""
        return hashlib.sha256(self.encode()).digest()

    def next(self, *, size: int, root: bytes) -> AnchorPayload:
        """Return the anchor after this one. Raises ProofError if the log has not grown."""
        if size <= self.size:
            raise ProofError("payload", "the log has not grown since the last anchor")
        return AnchorPayload(self.log_id, size, root, self.digest, self.sequence + 1)


def decode(payload: bytes) -> AnchorPayload:
    """Decode 93 bytes. Raises ProofError (`payload`) if they are not an anchor."""
    if len(payload) != PAYLOAD_BYTES:
        raise ProofError("payload", f"an anchor must have {PAYLOAD_BYTES} bytes")
    magic, version, log_id, size, root, previous, sequence = _LAYOUT.unpack(payload)
    if (magic, version) != (MAGIC, VERSION):
        raise ProofError("payload", "the bytes are not an anchor of this version")
    return AnchorPayload(log_id, size, root, previous, sequence)


def failed_checks(found: Transaction, payload: bytes, *, txid: str, tick: int, source: str) -> list[str]:
    """Return the names of the transaction's parts that do not match the anchor with this payload."""
    held = {
        "payload": found.payload == payload,
        "input type": found.input_type == ANCHOR_INPUT_TYPE,
        "amount": found.amount == 0,
        "source": encode_identity(found.source) == source,
        "destination": found.destination == found.source,
        "tick": found.tick == tick,
        "txid": found.id == txid,
        "signature": found.is_signed_by_source(),
    }
    return [name for name, holds in held.items() if not holds]
