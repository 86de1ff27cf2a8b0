"""SchnorrQ signatures as in Qubic: over FourQ, with KangarooTwelve as the hash.

Sources: Costello and Longa, "SchnorrQ: Schnorr signatures on FourQ" (Microsoft Research, 2016); the hash, the key
derivation and the published vectors from Qubic's documents. Signing is deterministic. **Not constant-time**: use it
only for an anchor key with a small balance, never for a treasury.
"""

from __future__ import annotations

from qaes.domain.qubic import SIGNATURE_BYTES, fourq
from qaes.domain.qubic.k12 import k12

SEED_LETTERS = 55


def subseed_of(seed: str) -> bytes:
    """Return the 32-byte subseed of a seed of 55 letters a to z. Raises ValueError for any other seed."""
    if len(seed) != SEED_LETTERS or not all("a" <= letter <= "z" for letter in seed):
        raise ValueError("a seed must have 55 letters a to z")  # never put the seed into a message
    return k12(bytes(ord(letter) - ord("a") for letter in seed))


def public_key_of(subseed: bytes) -> bytes:
    """Return the 32-byte public key of a subseed."""
    return fourq.encode(fourq.multiply(_number(k12(_sized(subseed, 32, "subseed"))) % fourq.N))


def sign(subseed: bytes, public_key: bytes, digest: bytes) -> bytes:
    """Return the 64-byte signature of a 32-byte digest."""
    _sized(digest, 32, "digest")
    _sized(public_key, 32, "public key")
    key = k12(_sized(subseed, 32, "subseed"), 64)
    r = _number(k12(key[32:] + digest, 64)[:32]) % fourq.N
    commitment = fourq.encode(fourq.multiply(r))
    s = (r - _number(key[:32]) * _challenge(commitment, public_key, digest)) % fourq.N
    return commitment + s.to_bytes(32, "little")


def verify(public_key: bytes, digest: bytes, signature: bytes) -> bool:
    """Return whether `signature` is valid for `public_key` and `digest`.

    It is also False for a wrong length, a malformed point, s >= N (a twin s + N would give the same transaction another
    id), and a public key of low order (for which anyone can sign).
    """
    if len(public_key) != 32 or len(digest) != 32 or len(signature) != SIGNATURE_BYTES:
        return False
    commitment, s = signature[:32], _number(signature[32:])
    if s >= fourq.N:
        return False
    try:
        key = fourq.decode(public_key)
        fourq.decode(commitment)
    except ValueError:
        return False
    if fourq.has_low_order(key):
        return False
    expected = fourq.multiply_add((s, fourq.G), (_challenge(commitment, public_key, digest), key))
    return fourq.encode(expected) == commitment


def _challenge(commitment: bytes, public_key: bytes, digest: bytes) -> int:
    return _number(k12(commitment + public_key + digest, 64)[:32]) % fourq.N


def _number(data: bytes) -> int:
    return int.from_bytes(data, "little")


def _sized(data: bytes, size: int, name: str) -> bytes:
    if len(data) != size:
        raise ValueError(f"the {name} must have {size} bytes")
    return data
