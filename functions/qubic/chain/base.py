"""What the qubic service needs of a chain."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Protocol

from qaes.domain.canonical import canonical_json
from qaes.domain.errors import InvalidInputError
from qaes.domain.policy import Policy
from qaes.domain.qubic.transaction import MAX_AMOUNT

MAX_METADATA_BYTES = 4096
MAX_REFERENCE_CHARACTERS = 256
_HASH = re.compile(r"[0-9a-fA-F]{64}", re.ASCII)


def check_hash(hash_: object, field: str = "hash") -> str:
    """A SHA-256 as 64 small hex letters. Raises InvalidInputError for anything but 64 hex letters."""
    if not isinstance(hash_, str) or not _HASH.fullmatch(hash_):
        raise InvalidInputError("a hash has 64 hexadecimal digits", field=field)
    return hash_.lower()


def check_amount(amount: object, field: str = "amount") -> int:
    """An amount to move in QU, 1 to 10^15. Raises InvalidInputError for another, and for what is no int (or a bool)."""
    if isinstance(amount, bool) or not isinstance(amount, int) or not 0 < amount <= MAX_AMOUNT:
        raise InvalidInputError("the amount is a whole number from 1 to 10^15", field=field)
    return amount


def check_reference(reference: object, field: str = "reference") -> str:
    """What a transfer is known by: 1 to 256 characters. Raises InvalidInputError for anything else."""
    if not isinstance(reference, str) or not 0 < len(reference) <= MAX_REFERENCE_CHARACTERS:
        raise InvalidInputError(f"the reference has 1 to {MAX_REFERENCE_CHARACTERS} characters", field=field)
    return reference


@dataclass(frozen=True)
class HashEntry:
    """A SHA-256 (64 small hex letters) to write, and what is said about it (a JSON object)."""

    hash: str
    metadata: dict[str, Any]

    @classmethod
    def checked(cls, hash_: object, metadata: object, at: str = "") -> HashEntry:
        """An entry of what a caller sent; `at` is the path to it, for the errors' field.

        Raises
        ------
        InvalidInputError
            The hash is none, or the metadata is no JSON object or has more than 4,096 bytes of canonical JSON.
        """
        hash_ = check_hash(hash_, f"{at}hash")
        if not isinstance(metadata, dict):
            raise InvalidInputError("the metadata is an object", field=f"{at}metadata")
        try:
            size = len(canonical_json(metadata).encode())
        except InvalidInputError as error:
            raise InvalidInputError(error.message, field=f"{at}metadata") from error
        if size > MAX_METADATA_BYTES:
            raise InvalidInputError(f"the metadata has at most {MAX_METADATA_BYTES} bytes", field=f"{at}metadata")
        return cls(hash_, metadata)


@dataclass(frozen=True)
class Receipt:
    """The transaction that wrote a hash."""

    txid: str
    hash: str
    timestamp: str
    tick: int


@dataclass(frozen=True)
class TransactionRecord(Receipt):
    """A transaction, with what was said about its hash and its bytes (base64) as signed."""

    metadata: dict[str, Any]
    encoded: str


@dataclass(frozen=True)
class Transfer:
    """A transfer that was made; the balances are those right after it. `replayed`: it had been made before."""

    txid: str
    tick: int
    source_balance: int
    destination_balance: int
    replayed: bool


class Chain(Protocol):
    """A ledger: its policy, balances, transfers and written hashes.

    Methods raise InvalidInputError and RefusedError for what is refused for good, NotFoundError for what is not there,
    and UnavailableError when asking again may help.
    """

    network: str
    """Which network answers; shown with every answer."""

    def policy(self) -> Policy:
        """The policy in force."""

    def balance(self, address: str) -> int:
        """The balance in QU; 0 for an unknown address."""

    def transfer(self, *, reference: str, source: str, destination: str, amount: int) -> Transfer:
        """Move `amount` QU, once for each `reference`."""

    def write_hashes(self, entries: list[HashEntry]) -> list[Receipt]:
        """Write each hash, once for ever; receipts in the same order."""

    def verify(self, hash_: str) -> Receipt | None:
        """The transaction that wrote the hash, if one did."""

    def transaction(self, txid: str) -> TransactionRecord:
        """Raises NotFoundError."""

    def health(self) -> int:
        """The present tick, once the chain has shown that it answers. Raises UnavailableError when it does not."""
