"""Demo wallets: the identities that the mock network gives to the older clients' `0x…` addresses.

Anybody can derive their seeds from the rule here. They are for trying things out on the mock, and worth nothing.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

from qaes.domain.qubic.identity import encode_identity, is_identity_shaped


def demo_seed(address: str) -> str:
    """Return the seed of a demo wallet, `address` being in lower case."""
    digest = hashlib.shake_256(b"qaes demo wallet, worth nothing: " + address.encode()).digest(55)
    return "".join(chr(ord("a") + byte % 26) for byte in digest)


def is_same_wallet(one: str, other: str) -> bool:
    """Whether two checked addresses are one wallet on the mock network, however each is spelled."""
    if is_identity_shaped(one) == is_identity_shaped(other):
        return one == other
    return wallet_identity(one) == wallet_identity(other)


@lru_cache(256)
def wallet_identity(address: str) -> str:
    """Return the identity of a checked address: itself, or that of the older clients' address on the mock."""
    if not address.startswith(("0x", "0X")):
        return address
    from qaes.domain.qubic import schnorrq  # a curve is much to import, and two spellings are rare

    return encode_identity(schnorrq.public_key_of(schnorrq.subseed_of(demo_seed(address.lower()))))
