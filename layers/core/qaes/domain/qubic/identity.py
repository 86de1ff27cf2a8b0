"""Encoding of 32 bytes as 60 letters with a checksum: identities in capitals, transaction ids in lower case.

Source: Qubic's integration documents. Four uint64 (little-endian), each as 14 letters of base 26, the least significant
first; then 18 bits of K12 of the 32 bytes as 4 letters.
"""

from __future__ import annotations

import re

from qaes.domain.errors import InvalidInputError
from qaes.domain.qubic.k12 import k12

MAX_CONTRACTS = 1024
"""qubic/core's MAX_NUMBER_OF_CONTRACTS."""
_A = ord("A")
_IDENTITY = re.compile(r"[A-Z]{60}", re.ASCII)
_TRANSACTION_ID = re.compile(r"[a-z]{60}", re.ASCII)
_LEGACY_ADDRESS = re.compile(r"0[xX][0-9a-fA-F]{16,40}", re.ASCII)


def _letters(value: int, count: int) -> str:
    letters = []
    for _ in range(count):
        value, letter = divmod(value, 26)
        letters.append(chr(_A + letter))
    return "".join(letters)


def encode_identity(data: bytes) -> str:
    """Return the identity (60 capitals) of 32 bytes."""
    if len(data) != 32:
        raise ValueError("an identity must encode 32 bytes")
    words = (int.from_bytes(data[at : at + 8], "little") for at in range(0, 32, 8))
    checksum = int.from_bytes(k12(data, 3), "little") & 0x3FFFF
    return "".join(_letters(word, 14) for word in words) + _letters(checksum, 4)


def decode_identity(identity: str) -> bytes:
    """Return the 32 bytes of an identity. Raises ValueError if its form or checksum is wrong."""
    if not is_identity_shaped(identity):
        raise ValueError("an identity must have 60 letters A to Z")
    data = bytearray()
    for at in range(0, 56, 14):
        value = 0
        for letter in reversed(identity[at : at + 14]):
            value = value * 26 + ord(letter) - _A
        if value >= 1 << 64:
            raise ValueError("the identity is out of range")
        data += value.to_bytes(8, "little")
    if encode_identity(bytes(data)) != identity:
        raise ValueError("the identity's checksum is wrong")
    return bytes(data)


def encode_transaction_id(data: bytes) -> str:
    """Return the transaction id (60 lower-case letters) of a 32-byte hash."""
    return encode_identity(data).lower()


def decode_transaction_id(txid: str) -> bytes:
    """Return the 32-byte hash of a transaction id. Raises ValueError if its form or checksum is wrong."""
    if not _TRANSACTION_ID.fullmatch(txid):
        raise ValueError("a transaction id must have 60 letters a to z")
    return decode_identity(txid.upper())


def is_identity_shaped(text: str) -> bool:
    """Return whether `text` has the form of an identity. The checksum is not checked."""
    return _IDENTITY.fullmatch(text) is not None


def is_transaction_id_shaped(text: str) -> bool:
    """Return whether `text` has the form of a transaction id. The checksum is not checked."""
    return _TRANSACTION_ID.fullmatch(text) is not None


def check_address(address: object, field: str = "address") -> str:
    """Return an address of the ledger in its normal form.

    Parameters
    ----------
    address
        A Qubic identity, or an address of the older clients: `0x` and 16 to 40 hexadecimal digits.
    field
        Field that the error names.

    Returns
    -------
    str
        The identity, or the older address in lower case.

    Raises
    ------
    InvalidInputError
        The address has neither form, or the identity's checksum is wrong.
    """
    if not isinstance(address, str):
        raise InvalidInputError("an address must be text", field=field)
    if _LEGACY_ADDRESS.fullmatch(address):
        return address.lower()
    if not is_identity_shaped(address):
        raise InvalidInputError(
            "an address must be an identity of 60 capital letters, or 0x and 16 to 40 hexadecimal digits", field=field
        )
    try:
        decode_identity(address)
    except ValueError as error:
        raise InvalidInputError(f"{error}: check the spelling", field=field) from error
    return address


def check_payable(address: object, field: str = "address") -> str:
    """Check an address of a transfer: only addresses that can have a key are accepted.

    A public key that is a small number belongs to the smart contract with that number. The zero address belongs to
    no one: a transfer to it burns the amount. In qubic/core the number is the first of four uint64, below 1,024; the
    other three are 0. An address whose other three are 0 cannot have a key, regardless of the first. The number of an
    older client's address is its value.

    Returns
    -------
    str
        As `check_address`.

    Raises
    ------
    InvalidInputError
        As `check_address`; or it is a smart contract's address, or the zero address.
    """
    address = check_address(address, field)
    name = field.removeprefix("parameters.")
    if is_identity_shaped(address):
        data = decode_identity(address)
        number = None if any(data[8:]) else int.from_bytes(data[:8], "little")
    else:
        number = int(address, 16) if int(address, 16) < MAX_CONTRACTS else None
    if number == 0:
        raise InvalidInputError(f"{name} is the zero address: a transfer to it burns the amount", field=field)
    if number is not None:
        raise InvalidInputError(
            f"{name} is the address of smart contract {number}: a transfer never comes from a contract, and goes to "
            "one only by a rule with `smart_contracts`",
            field=field,
        )
    return address
