"""The Merkle tree of RFC 6962: hashes, roots, and the verification of proofs.

Sources: RFC 6962, section 2.1 (the hashes); RFC 9162, sections 2.1.3.2 and 2.1.4.2 (the verification, whose steps the
comments name). `qaes.domain.tiles` computes proofs; this module does not trust it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from qaes.domain.errors import QaesError

HASH_BYTES = 32
EMPTY_ROOT = hashlib.sha256(b"").digest()
"""Root of a tree without leaves."""


class ProofError(QaesError):
    """A proof, or its signature, does not hold; `check` is the failed check.

    `size` (no tree has this size), `index` (the tree does not have this leaf), `form` (malformed hashes), `short`,
    `long` (wrong number of hashes), `root` (another tree), `tile` (missing tile). For notes: `text`, `key`,
    `signature`; for anchors: `payload`.
    """

    def __init__(self, check: str, message: str) -> None:
        super().__init__(message, check=check)
        self.check = check


def leaf_digest(data: bytes) -> bytes:
    """Hash a zero byte and the data of a leaf.

    The zero byte ensures that no inner node has the hash of a leaf.
    """
    return hashlib.sha256(b"\x00" + data).digest()


def leaf_hash(text: str) -> str:
    """Hash the UTF-8 bytes of `text` as a leaf; 64 hexadecimal digits."""
    return leaf_digest(text.encode("utf-8")).hex()


def node_hash(left: bytes, right: bytes) -> bytes:
    """Hash a byte 1 and the two hashes of an inner node."""
    return hashlib.sha256(b"\x01" + left + right).digest()


def root_of(leaves: Sequence[bytes]) -> bytes:
    """Compute the root of a tree with these leaf hashes in memory."""
    if not leaves:
        return EMPTY_ROOT
    # The stack has subtrees of 2^n leaves from the left; two of the same size are merged at once.
    stack: list[tuple[int, bytes]] = []
    for leaf in leaves:
        size, hash_ = 1, leaf
        while stack and stack[-1][0] == size:
            hash_ = node_hash(stack.pop()[1], hash_)
            size *= 2
        stack.append((size, hash_))
    root = stack.pop()[1]
    while stack:
        root = node_hash(stack.pop()[1], root)
    return root


def verify_inclusion(*, leaf: bytes, index: int, size: int, proof: Sequence[bytes], root: bytes) -> None:
    """Check that the tree of `size` leaves with that root has the leaf hash `leaf` at `index` (from 0).

    Raises
    ------
    ProofError
        The tree does not have it, or the proof is for another place (RFC 9162, 2.1.3.2).
    """
    _check_size(size)
    if not 0 <= index < size:
        # 1. Compare leaf_index against tree_size.
        raise ProofError("index", f"a tree of size {size} does not have the leaf {index}")
    _check_form([leaf, root, *proof])
    # 2. Set fn to leaf_index and sn to tree_size - 1.
    fn, sn = index, size - 1
    # 3. Set r to hash.
    r = leaf
    # 4. For each value p in the inclusion_path:
    for p in proof:
        # a. If sn is 0, then stop the iteration and fail.
        if sn == 0:
            raise ProofError("long", "the inclusion proof is too long")
        # b. If LSB(fn) is set, or if fn is equal to sn:
        if fn & 1 or fn == sn:
            # i. Set r to HASH(0x01 || p || r).
            r = node_hash(p, r)
            # ii. If LSB(fn) is not set, right-shift both until LSB(fn) is set or fn is 0.
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            # Otherwise: set r to HASH(0x01 || r || p).
            r = node_hash(r, p)
        # c. Finally, right-shift both.
        fn, sn = fn >> 1, sn >> 1
    # 5. Compare sn to 0. Compare r against the root_hash.
    if sn != 0:
        raise ProofError("short", "the inclusion proof is too short")
    if r != root:
        raise ProofError("root", "the inclusion proof results in another root")


def verify_consistency(  # noqa: C901 - the steps of the RFC, one after the other
    *, first: int, second: int, proof: Sequence[bytes], first_root: bytes, second_root: bytes
) -> None:
    """Check that the tree of `second` leaves begins with all the leaves of the tree of `first`.

    Raises
    ------
    ProofError
        It does not, or the proof is for other sizes (RFC 9162, 2.1.4.2). Size 0 has no proof.
    """
    _check_size(first)
    if second < first:
        raise ProofError("size", f"a tree of size {second} cannot follow a tree of size {first}")
    _check_form([first_root, second_root, *proof])
    if first == second:
        if proof:
            raise ProofError("long", "the consistency proof between equal sizes must be empty")
        if first_root != second_root:
            raise ProofError("root", "the roots of equal sizes differ")
        return
    # 1. If consistency_path is an empty array, stop and fail.
    if not proof:
        raise ProofError("short", "the consistency proof is empty")
    # 2. If first is an exact power of 2, then prepend first_hash.
    path = [first_root, *proof] if first & (first - 1) == 0 else list(proof)
    # 3. Set fn to first - 1 and sn to second - 1.
    fn, sn = first - 1, second - 1
    # 4. If LSB(fn) is set, then right-shift both until LSB(fn) is not set.
    while fn & 1:
        fn, sn = fn >> 1, sn >> 1
    # 5. Set both fr and sr to the first value.
    fr = sr = path[0]
    # 6. For each subsequent value c:
    for c in path[1:]:
        # a. If sn is 0, then stop the iteration and fail.
        if sn == 0:
            raise ProofError("long", "the consistency proof is too long")
        # b. If LSB(fn) is set, or if fn is equal to sn:
        if fn & 1 or fn == sn:
            # i. and ii. Set fr and sr to HASH(0x01 || c || ...).
            fr, sr = node_hash(c, fr), node_hash(c, sr)
            # iii. If LSB(fn) is not set, right-shift both until LSB(fn) is set or fn is 0.
            while not fn & 1 and fn:
                fn, sn = fn >> 1, sn >> 1
        else:
            # Otherwise: set sr to HASH(0x01 || sr || c).
            sr = node_hash(sr, c)
        # c. Finally, right-shift both.
        fn, sn = fn >> 1, sn >> 1
    # 7. Compare fr, sr and sn.
    if sn != 0:
        raise ProofError("short", "the consistency proof is too short")
    if fr != first_root or sr != second_root:
        raise ProofError("root", "the consistency proof results in other roots")


def _check_size(size: int) -> None:
    if not 1 <= size < 1 << 64:
        raise ProofError("size", f"a tree of size {size} has no proofs")


def _check_form(hashes: Sequence[bytes]) -> None:
    if any(len(node) != HASH_BYTES for node in hashes):
        raise ProofError("form", f"a hash must have {HASH_BYTES} bytes")
