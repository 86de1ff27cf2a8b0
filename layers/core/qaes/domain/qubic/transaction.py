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
    """One transaction; `signature` is empty until it is signed.

    Attributes
    ----------
    source, destination
        Public keys, 32 bytes each.
    amount
        QU, 0 to 10^15.
    tick
        The one tick in which it executes, or never; uint32.
    input_type
        uint16.
    payload
        At most 1,024 bytes.

    Raises
    ------
    ValueError
        A field is out of its range.
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
            raise ValueError("a public key has 32 bytes")
        if not 0 <= self.amount <= MAX_QU:
            raise ValueError("the amount is 0 to 10^15")
        if not 0 <= self.tick < 1 << 32:
            raise ValueError("the tick is a uint32")
        if not 0 <= self.input_type < 1 << 16:
            raise ValueError("the input type is a uint16")
        if len(self.payload) > MAX_PAYLOAD:
            raise ValueError(f"the payload has at most {MAX_PAYLOAD} bytes")
        if len(self.signature) not in (0, SIGNATURE_BYTES):
            raise ValueError("a signature has 64 bytes")

    @property
    def unsigned(self) -> bytes:
        """Header and payload."""
        header = _HEADER.pack(self.source, self.destination, self.amount, self.tick, self.input_type, len(self.payload))
        return header + self.payload

    @property
    def digest(self) -> bytes:
        """The 32 bytes that are signed."""
        return k12(self.unsigned)

    def encode(self) -> bytes:
        """The bytes as sent. Raises ValueError when it is not signed."""
        if not self.signature:
            raise ValueError("the transaction is not signed")
        return self.unsigned + self.signature

    @property
    def id(self) -> str:
        """60 small letters, of all the bytes with the signature."""
        return encode_transaction_id(k12(self.encode()))

    def sign(self, subseed: bytes) -> Transaction:
        """The same, signed by `subseed`. The signature is deterministic, and so is the id."""
        from qaes.domain.qubic import schnorrq

        return replace(self, signature=schnorrq.sign(subseed, self.source, self.digest))

    def is_signed_by_source(self) -> bool:
        """Whether the signature is the source's."""
        from qaes.domain.qubic import schnorrq

        return schnorrq.verify(self.source, self.digest, self.signature)


def decode(data: bytes) -> Transaction:
    """The transaction of its bytes; the signature is not checked.

    Raises
    ------
    ValueError
        The bytes are cut, or more than the transaction's, or a field is out of its range.
    """
    if len(data) < _HEADER.size + SIGNATURE_BYTES:
        raise ValueError("the transaction is cut short")
    source, destination, amount, tick, input_type, size = _HEADER.unpack_from(data)
    if len(data) != _HEADER.size + size + SIGNATURE_BYTES:
        raise ValueError("the transaction's length is not the one that it names")
    payload = data[_HEADER.size : _HEADER.size + size]
    return Transaction(source, destination, amount, tick, input_type, payload, data[_HEADER.size + size :])
