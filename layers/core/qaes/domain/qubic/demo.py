"""Demo wallets: the mock network's identities for the older clients' `0x…` addresses.

A public rule derives their seeds. They serve for trials on the mock network, and have no value.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

from qaes.domain.qubic.identity import encode_identity, is_identity_shaped


def demo_seed(address: str) -> str:
    """Return the seed of a demo wallet; `address` is in lower case."""
    digest = hashlib.shake_256(b"qaes demo wallet, worth nothing: " + address.encode()).digest(55)
    return "".join(chr(ord("a") + byte % 26) for byte in digest)


def is_same_wallet(one: str, other: str) -> bool:
    """Return whether two checked addresses are one wallet on the mock network, regardless of their format."""
    if is_identity_shaped(one) == is_identity_shaped(other):
        return one == other
    return wallet_identity(one) == wallet_identity(other)


@lru_cache(256)
def wallet_identity(address: str) -> str:
    """Return the identity of a checked address; an older client's address has one on the mock network."""
    if not address.startswith(("0x", "0X")):
        return address
    from qaes.domain.qubic import schnorrq  # the curve is slow to import, and two formats are rare

    return encode_identity(schnorrq.public_key_of(schnorrq.subseed_of(demo_seed(address.lower()))))
