"""Canonical texts of values (RFC 8785, JSON Canonicalization Scheme), and their SHA-256."""

from __future__ import annotations

import hashlib
from typing import Any

import rfc8785

from qaes.domain.errors import InvalidInputError

SALT_LETTERS = 32


def canonical_json(value: Any) -> str:
    """Return the RFC 8785 text of `value`.

    Raises
    ------
    InvalidInputError
        The value has no canonical text: an integer beyond 2^53 - 1, a float that is not finite, a lone surrogate,
        or a type that JSON does not have.
    """
    try:
        return rfc8785.dumps(value).decode("utf-8")
    except (rfc8785.CanonicalizationError, UnicodeError, RecursionError) as error:
        raise InvalidInputError(f"cannot be stored as JSON: {type(error).__name__}") from error


def sha256_hex(data: str | bytes) -> str:
    """Return the SHA-256 of bytes, or of the UTF-8 of a text, as 64 hexadecimal digits."""
    return hashlib.sha256(data.encode("utf-8") if isinstance(data, str) else data).hexdigest()


def hash_of(value: Any) -> str:
    """Return the SHA-256 of the canonical text of `value`, as 64 hexadecimal digits."""
    return sha256_hex(canonical_json(value))


def salted_hash(salt: str, value: Any) -> str:
    """Return `hash_of` the value together with a secret `salt`.

    The salt is 128 random bits of the task, as 32 hexadecimal digits. Without it, hashing guesses does not reveal the
    value; with it, anyone can check the hash.
    """
    if len(salt) != SALT_LETTERS or not set(salt) <= set("0123456789abcdef"):
        raise InvalidInputError(f"a salt must have {SALT_LETTERS} hexadecimal digits", field="salt")
    return hash_of({"salt": salt, "value": value})
