"""The hash of a leaf as RFC 6962 has it."""

from __future__ import annotations

import hashlib


def leaf_hash(text: str) -> str:
    """Hash a zero byte and the UTF-8 of `text` with SHA-256; 64 hex letters (RFC 6962, section 2.1).

    The zero byte keeps a leaf from ever being taken for an inner node of a tree.
    """
    return hashlib.sha256(b"\x00" + text.encode("utf-8")).hexdigest()
