"""Qubic transactions: encoding, digest, signature, id.

Source: Qubic's documents. Little-endian, no padding: source 32, destination 32, amount int64, tick uint32, input type
uint16, input size uint16, payload, signature 64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace

from qaes.domain.qubic import MAX_QU, SIGNATURE_BYTES
from qaes.domain.qubic.identity import encode_transaction_id
from qaes.domain.qubic.k12 import k12

MAX_PAYLOAD = 1024
_HEADER = struct.Struct("<32s32sqIHH")


@dataclass(frozen=True)
class Transaction:
    """A transaction; `signature` is empty until it is signed.

    Attributes
    ----------
    source, destination
        Public keys, 32 bytes each.
    amount
        In QU, 0 to 10^15.
    tick
        The only tick in which it can execute; uint32.
    input_type
        uint16.
    payload
        At most 1,024 bytes.

    Raises
    ------
    ValueError
        A field is out of range.
    """

    source: bytes
    destination: bytes
    amount: int
    tick: int
    input_type: int = 0
    payload: bytes = b""
    signature: bytes = b""

    def __post_init__(self) -> None:
        if len(self.source) != 32 or len(self.destination) != 32:
            raise ValueError("a public key must have 32 bytes")
        if not 0 <= self.amount <= MAX_QU:
            raise ValueError("the amount must be 0 to 10^15")
        if not 0 <= self.tick < 1 << 32:
            raise ValueError("the tick must be a uint32")
        if not 0 <= self.input_type < 1 << 16:
            raise ValueError("the input type must be a uint16")
        if len(self.payload) > MAX_PAYLOAD:
            raise ValueError(f"the payload must have at most {MAX_PAYLOAD} bytes")
        if len(self.signature) not in (0, SIGNATURE_BYTES):
            raise ValueError("a signature must have 64 bytes")

    @property
    def unsigned(self) -> bytes:
        """Return header and payload."""
        header = _HEADER.pack(self.source, self.destination, self.amount, self.tick, self.input_type, len(self.payload))
        return header + self.payload

    @property
    def digest(self) -> bytes:
        """Return the 32 bytes that are signed."""
        return k12(self.unsigned)

    def encode(self) -> bytes:
        """Return the bytes as sent. Raises ValueError if the transaction is not signed."""
        if not self.signature:
            raise ValueError("the transaction is not signed")
        return self.unsigned + self.signature

    @property
    def id(self) -> str:
        """Return the id: 60 lower-case letters, the hash of all bytes including the signature."""
        return encode_transaction_id(k12(self.encode()))

    def sign(self, subseed: bytes) -> Transaction:
        """Return the transaction signed with `subseed`. The signature and the id are deterministic."""
        from qaes.domain.qubic import schnorrq

        return replace(self, signature=schnorrq.sign(subseed, self.source, self.digest))

    def is_signed_by_source(self) -> bool:
        """Return whether the source has signed the transaction."""
        from qaes.domain.qubic import schnorrq

        return schnorrq.verify(self.source, self.digest, self.signature)


def decode(data: bytes) -> Transaction:
    """Decode a transaction; the signature is not checked.

    Raises
    ------
    ValueError
        The bytes are too short or too long, or a field is out of range.
    """
    if len(data) < _HEADER.size + SIGNATURE_BYTES:
        raise ValueError("the transaction is cut short")
    source, destination, amount, tick, input_type, size = _HEADER.unpack_from(data)
    if len(data) != _HEADER.size + size + SIGNATURE_BYTES:
        raise ValueError("the transaction's length does not match its input size")
    payload = data[_HEADER.size : _HEADER.size + size]
    return Transaction(source, destination, amount, tick, input_type, payload, data[_HEADER.size + size :])
