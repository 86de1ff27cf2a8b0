"""K12, FourQ and SchnorrQ against the published vectors, and signatures that verification must refuse."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaes.domain.qubic import fourq, schnorrq
from qaes.domain.qubic.identity import encode_identity
from qaes.domain.qubic.k12 import MAX_BYTES, k12

SUBSEED = bytes.fromhex("4ac19e2bf0d3776519aabe31924f7dc2589b3d0e7411a65f84c9b16df72c038e")
DIGEST = bytes.fromhex("94e120a4d3f58c217a53eb9046d9f2c5b11288a9fe340d6ce5a771cf04b82e63")
SIGNATURE = bytes.fromhex(
    "357d47b1366f33eed311a4458ec7326d35728e9292328a9b7ff8d4ec0f7b0df9"
    "323f5d1cd01bd5a380a1a8e4f29ad3ae9c5d94e84f4181a61ca73030d6d11600"
)
PUBLIC_KEY = schnorrq.public_key_of(SUBSEED)
IDENTITIES = [
    ("a" * 55, "BZBQFLLBNCXEMGLOBHUVFTLUPLVCPQUASSILFABOFFBCADQSSUPNWLZBQEXK"),
    (
        "lmujdbtiimznvyamoyjumfeiglauqfzsznisydmqrdyuwqydjpjixat",
        "QJRRSSKMJRDKUDTYVNYGAMQPULKAMILQQYOWBEXUDEUWQUMNGDHQYLOAJMEB",
    ),
    (
        "wqbdupxgcaimwdsnchitjmsplzclkqokhadgehdxqogeeiovzvadstt",
        "SUZFFQSCVPHYYBDCQODEMFAOKRJDDDIRJFFIWFLRDDJQRPKMJNOCSSKHXHGK",
    ),
]


def pattern(size: int) -> bytes:
    """RFC 9861's ptn()."""
    return bytes(number % 251 for number in range(size))


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (b"", "1ac2d450fc3b4205d19da7bfca1b37513c0803577ac7167f06fe2ce1f0ef39e5"),
        (pattern(1), "2bda92450e8b147f8a7cb629e784a058efca7cf7d8218e02d345dfaa65244a1f"),
        (pattern(17), "6bf75fa2239198db4772e36478f8e19b0f371205f6a9a93a273f51df37122888"),
        (pattern(17**2), "0c315ebcdedbf61426de7dcf8fb725d1e74675d7f5327a5067f367b108ecb67c"),
        (pattern(8191), "1b577636f723643e990cc7d6a659837436fd6a103626600eb8301cd1dbe553d6"),
    ],
)
def test_k12_of_the_rfc(message: bytes, expected: str) -> None:
    assert k12(message).hex() == expected


def test_k12_continues_stream_beyond_one_block() -> None:
    # RFC 9861: the last 32 of 10,032 bytes for the empty message.
    out = k12(b"", 10_032)
    assert out[:32] == k12(b"")
    assert out[-32:].hex() == "e8dc563642f7228c84684c898405d3a834799158c079b12880277a1d28e2ff6d"


def test_k12_refuses_input_over_one_chunk() -> None:
    with pytest.raises(ValueError, match="8191"):
        k12(bytes(MAX_BYTES + 1))
    with pytest.raises(ValueError, match="negative"):
        k12(b"", -1)


def test_generator_is_on_the_curve_and_of_order_n() -> None:
    assert fourq.on_curve(*fourq.affine(fourq.G))
    assert fourq.equal(fourq.multiply(fourq.N), fourq.IDENTITY)
    assert not fourq.equal(fourq.multiply(fourq.N - 1), fourq.IDENTITY)
    assert not fourq.has_low_order(fourq.G)


scalars = st.integers(0, fourq.N - 1)


@settings(max_examples=25, deadline=None)
@given(scalars, scalars)
def test_multiplication_distributes_over_addition(a: int, b: int) -> None:
    left = fourq.multiply(a + b)
    assert fourq.equal(left, fourq.add(fourq.multiply(a), fourq.multiply(b)))
    assert fourq.equal(fourq.double(fourq.multiply(a)), fourq.multiply(2 * a))
    p = fourq.multiply(b)
    assert fourq.equal(fourq.multiply_add((a, fourq.G), (b, p)), fourq.add(fourq.multiply(a), fourq.multiply(b, p)))


@settings(max_examples=25, deadline=None)
@given(scalars)
def test_point_survives_its_encoding(a: int) -> None:
    p = fourq.multiply(a)
    encoded = fourq.encode(p)
    assert fourq.equal(fourq.decode(encoded), p)
    assert fourq.encode(fourq.decode(encoded)) == encoded


@settings(max_examples=50, deadline=None)
@given(st.binary(min_size=32, max_size=32))
def test_decoded_bytes_encode_to_the_same_bytes(data: bytes) -> None:
    try:
        p = fourq.decode(data)
    except ValueError:
        return
    assert fourq.on_curve(*fourq.affine(p))
    assert fourq.encode(p) == data


@pytest.mark.parametrize(
    "data",
    [
        bytes(31),
        bytes(33),
        fourq.P.to_bytes(16, "little") + bytes(16),  # y = p, another spelling of 0
        (1).to_bytes(16, "little") + fourq.P.to_bytes(16, "little"),
        (1 << 127).to_bytes(16, "little") + bytes(16),
        (1 | 1 << 255).to_bytes(32, "little"),  # the neutral element with a sign
    ],
)
def test_other_spellings_of_a_point_are_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="point"):
        fourq.decode(data)


@pytest.mark.parametrize(("seed", "identity"), IDENTITIES)
def test_published_identities(seed: str, identity: str) -> None:
    assert encode_identity(schnorrq.public_key_of(schnorrq.subseed_of(seed))) == identity


@pytest.mark.parametrize("seed", ["", "a" * 54, "a" * 56, "A" * 55, "a" * 54 + "1", "a" * 54 + "ä"])
def test_bad_seed_is_refused_and_not_shown(seed: str) -> None:
    with pytest.raises(ValueError, match="55 letters") as caught:
        schnorrq.subseed_of(seed)
    assert not seed or seed not in str(caught.value)


def test_published_signature() -> None:
    assert schnorrq.sign(SUBSEED, PUBLIC_KEY, DIGEST) == SIGNATURE
    assert schnorrq.verify(PUBLIC_KEY, DIGEST, SIGNATURE)


@settings(max_examples=15, deadline=None)
@given(st.binary(min_size=32, max_size=32), st.binary(min_size=32, max_size=32))
def test_signature_verifies(subseed: bytes, digest: bytes) -> None:
    public_key = schnorrq.public_key_of(subseed)
    assert schnorrq.verify(public_key, digest, schnorrq.sign(subseed, public_key, digest))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 8 * 128 - 1))
def test_one_flipped_bit_is_refused(bit: int) -> None:
    parts = bytearray(PUBLIC_KEY + DIGEST + SIGNATURE)
    parts[bit // 8] ^= 1 << bit % 8
    assert not schnorrq.verify(bytes(parts[:32]), bytes(parts[32:64]), bytes(parts[64:]))


def test_twin_signature_is_refused() -> None:
    s = int.from_bytes(SIGNATURE[32:], "little")
    twin = SIGNATURE[:32] + (s + fourq.N).to_bytes(32, "little")
    assert not schnorrq.verify(PUBLIC_KEY, DIGEST, twin)


def test_public_key_of_low_order_is_refused() -> None:
    # With the neutral element as the key, R = s G holds for any digest: any caller could sign.
    neutral = fourq.encode(fourq.IDENTITY)
    s = 12345
    forged = fourq.encode(fourq.multiply(s)) + s.to_bytes(32, "little")
    assert not schnorrq.verify(neutral, DIGEST, forged)
    minus_one = fourq.encode(fourq.point((0, 0), (fourq.P - 1, 0)))  # of order 2
    assert fourq.has_low_order(fourq.decode(minus_one))
    assert not schnorrq.verify(minus_one, DIGEST, forged)


def test_signature_with_low_order_key_is_rejected() -> None:
    """Where the challenge is a multiple of the key's order, s G + h A is s G: no private key is needed."""
    for y in range(2, 5):
        try:
            point = fourq.decode(bytes([y]) + bytes(31))
        except ValueError:
            continue
        key = fourq.encode(fourq.multiply(fourq.N, point))
        order = next(number for number in range(1, fourq.COFACTOR + 1) if is_neutral(number, fourq.decode(key)))
        assert fourq.COFACTOR % order == 0
        for s in range(1, 10_000):
            commitment = fourq.encode(fourq.multiply(s))
            challenge = int.from_bytes(k12(commitment + key + DIGEST, 64)[:32], "little") % fourq.N
            if challenge % order == 0:
                break
        else:
            pytest.fail("no signature was found")
        assert not schnorrq.verify(key, DIGEST, commitment + s.to_bytes(32, "little"))


def is_neutral(number: int, point: fourq.Point) -> bool:
    return fourq.equal(fourq.multiply(number, point), fourq.IDENTITY)


@pytest.mark.parametrize("s", [fourq.N, fourq.N + 1, 2**256 - 1])
def test_unreduced_s_is_refused(s: int) -> None:
    assert not schnorrq.verify(PUBLIC_KEY, DIGEST, SIGNATURE[:32] + s.to_bytes(32, "little"))


@pytest.mark.parametrize("cut", [(31, 32, 64), (33, 32, 64), (32, 31, 64), (32, 32, 63), (32, 32, 65)])
def test_another_length_is_refused(cut: tuple[int, int, int]) -> None:
    key, digest, signature = cut
    assert not schnorrq.verify((PUBLIC_KEY + b"\0")[:key], DIGEST[:digest], (SIGNATURE + b"\0")[:signature])


def test_signing_refuses_another_length() -> None:
    for arguments in ((SUBSEED[1:], PUBLIC_KEY, DIGEST), (SUBSEED, b"", DIGEST), (SUBSEED, PUBLIC_KEY, DIGEST[1:])):
        with pytest.raises(ValueError, match="32 bytes"):
            schnorrq.sign(*arguments)
