"""One text for one value: RFC 8785 (JSON Canonicalization Scheme) and its SHA-256."""

from __future__ import annotations

import hashlib
from typing import Any

import rfc8785

from qaes.domain.errors import InvalidInputError


def canonical_json(value: Any) -> str:
    """The RFC 8785 text of `value`.

    Raises
    ------
    InvalidInputError
        The value has no canonical text: an integer beyond 2^53 - 1, a float that is not finite, a lone surrogate,
        or a type that JSON does not have.
    """
    try:
        return rfc8785.dumps(value).decode("utf-8")
    except (rfc8785.CanonicalizationError, UnicodeError, RecursionError) as error:
        raise InvalidInputError(f"cannot be kept as JSON: {type(error).__name__}") from error


def sha256_hex(data: str | bytes) -> str:
    """SHA-256 of bytes, or of the UTF-8 of a text, as 64 hex letters."""
    return hashlib.sha256(data.encode("utf-8") if isinstance(data, str) else data).hexdigest()


def hash_of(value: Any) -> str:
    """SHA-256 of the canonical text of `value`, as 64 hex letters."""
    return sha256_hex(canonical_json(value))
