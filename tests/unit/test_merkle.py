"""The tree of RFC 6962: known hashes, and proofs that must fail."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaes.domain.merkle import (
    EMPTY_ROOT,
    ProofError,
    leaf_digest,
    leaf_hash,
    node_hash,
    root_of,
    verify_consistency,
    verify_inclusion,
)

# The leaves and roots with which certificate-transparency and transparency-dev/merkle test themselves.
LEAVES = [
    bytes.fromhex(each)
    for each in (
        "", "00", "10", "2021", "3031", "40414243", "5051525354555657", "606162636465666768696a6b6c6d6e6f",
    )
]  # fmt: skip
ROOTS = [
    "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d",
    "fac54203e7cc696cf0dfcb42c92a1d9dbaf70ad9e621f4bd8d98662f00e3c125",
    "aeb6bcfe274b70a14fb067a5e5578264db0fa9b51af5e0ba159158f329e06e77",
    "d37ee418976dd95753c1c73862b9398fa2a2cf9b4ff0fdfe8b30cd95209614b7",
    "4e3bbb1f7b478dcfe71fb631631519a3bca12c9aefca1612bfce4c13a86264d4",
    "76e67dadbcdf1e10e1b74ddc608abd2f98dfb16fbce75277b5232a127f2087ef",
    "ddb89be403809e325750d3d263cd78929c2942b7942a34b77e122c9594a74c8c",
    "5dc9da79a70659a9ad559cb701ded9a2ab9d823aad2f4960cfe370eff4604328",
]


def mth(leaves: Sequence[bytes]) -> bytes:
    """MTH of RFC 6962, section 2.1, word for word."""
    if not leaves:
        return hashlib.sha256().digest()
    if len(leaves) == 1:
        return leaves[0]
    k = split(len(leaves))
    return node_hash(mth(leaves[:k]), mth(leaves[k:]))


def split(n: int) -> int:
    k = 1
    while k * 2 < n:
        k *= 2
    return k


def path(m: int, leaves: Sequence[bytes]) -> list[bytes]:
    """PATH of RFC 6962, section 2.1.1, word for word."""
    if len(leaves) == 1:
        return []
    k = split(len(leaves))
    if m < k:
        return [*path(m, leaves[:k]), mth(leaves[k:])]
    return [*path(m - k, leaves[k:]), mth(leaves[:k])]


def subproof(m: int, leaves: Sequence[bytes], complete: bool = True) -> list[bytes]:
    """SUBPROOF of RFC 6962, section 2.1.2, word for word."""
    if m == len(leaves):
        return [] if complete else [mth(leaves)]
    k = split(len(leaves))
    if m <= k:
        return [*subproof(m, leaves[:k], complete), mth(leaves[k:])]
    return [*subproof(m - k, leaves[k:], False), mth(leaves[:k])]


def made_up(count: int) -> list[bytes]:
    return [leaf_digest(number.to_bytes(4, "big")) for number in range(count)]


def test_known_roots() -> None:
    digests = [leaf_digest(leaf) for leaf in LEAVES]
    assert EMPTY_ROOT.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" == root_of([]).hex()
    assert [root_of(digests[: n + 1]).hex() for n in range(8)] == ROOTS


def test_leaf_is_never_a_node() -> None:
    left, right = made_up(2)
    assert leaf_digest(left + right) != node_hash(left, right) == hashlib.sha256(b"\x01" + left + right).digest()
    assert leaf_hash("a") == leaf_digest(b"a").hex()


@pytest.mark.parametrize("size", [*range(1, 35), 255, 256, 257])
def test_every_leaf_is_proved_and_no_other_place_is(size: int) -> None:
    leaves = made_up(size)
    root = root_of(leaves)
    assert root == mth(leaves)
    for index in range(size) if size < 64 else (0, 1, size // 2, size - 2, size - 1):
        proof = path(index, leaves)
        verify_inclusion(leaf=leaves[index], index=index, size=size, proof=proof, root=root)
        for other in (index - 1, index + 1, size, size + 1):
            with pytest.raises(ProofError):
                verify_inclusion(leaf=leaves[index], index=other, size=size, proof=proof, root=root)


@pytest.mark.parametrize("second", [*range(1, 35), 256, 257])
def test_every_beginning_is_proved(second: int) -> None:
    leaves = made_up(second)
    for first in range(1, second + 1) if second < 64 else (1, 2, 128, 200, 255, 256):
        proof = subproof(first, leaves)
        verify_consistency(
            first=first, second=second, proof=proof, first_root=mth(leaves[:first]), second_root=mth(leaves)
        )


def included(**changes: object) -> str:
    """The check that fails for leaf 3 of 7 with these changes."""
    leaves = made_up(7)
    arguments = {"leaf": leaves[3], "index": 3, "size": 7, "proof": path(3, leaves), "root": mth(leaves)}
    with pytest.raises(ProofError) as caught:
        verify_inclusion(**arguments | changes)  # type: ignore[arg-type]
    return caught.value.check


def test_inclusion_proof_error_is_named() -> None:
    leaves = made_up(7)
    proof, zeros = path(3, leaves), bytes(32)
    assert included(size=0) == included(size=-1) == included(size=1 << 64) == "size"
    assert included(index=7) == included(index=-1) == "index"
    assert included(proof=[]) == included(proof=proof[:-1]) == "short"
    assert included(proof=[*proof, zeros]) == "long"
    assert included(proof=[*proof[:-1], zeros]) == included(proof=proof[::-1]) == "root"
    assert included(leaf=leaves[2]) == included(root=zeros) == included(index=2) == "root"
    assert included(proof=[*proof[:-1], zeros[:31]]) == included(leaf=b"") == "form"


def consistent(**changes: object) -> str:
    leaves = made_up(7)
    arguments = {"first": 3, "second": 7, "proof": subproof(3, leaves)}
    arguments |= {"first_root": mth(leaves[:3]), "second_root": mth(leaves)}
    with pytest.raises(ProofError) as caught:
        verify_consistency(**arguments | changes)  # type: ignore[arg-type]
    return caught.value.check


def test_consistency_proof_error_is_named() -> None:
    leaves = made_up(7)
    proof, zeros = subproof(3, leaves), bytes(32)
    assert consistent(first=0) == consistent(first=8) == consistent(second=0) == "size"
    assert consistent(proof=[]) == consistent(proof=proof[:-1]) == "short"
    assert consistent(proof=[*proof, zeros]) == "long"
    assert consistent(first_root=zeros) == consistent(second_root=zeros) == "root"
    assert consistent(first=2) in {"long", "root"}
    assert consistent(proof=[zeros, *proof[1:]]) == "root"
    assert consistent(proof=[b"", *proof[1:]]) == "form"
    assert consistent(second=3, proof=[]) == "root"  # two roots of one size
    assert consistent(second=3, second_root=mth(leaves[:3])) == "long"


@settings(max_examples=60)
@given(st.integers(2, 40), st.data())
def test_flipped_bit_is_noticed(size: int, data: st.DataObject) -> None:
    leaves = made_up(size)
    index = data.draw(st.integers(0, size - 1))
    proof = path(index, leaves)
    at = data.draw(st.integers(0, len(proof) * 256 - 1))
    step, bit = divmod(at, 256)
    proof[step] = (int.from_bytes(proof[step], "big") ^ 1 << bit).to_bytes(32, "big")
    with pytest.raises(ProofError):
        verify_inclusion(leaf=leaves[index], index=index, size=size, proof=proof, root=mth(leaves))
