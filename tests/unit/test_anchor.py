"""The 93 bytes on the ledger."""

from __future__ import annotations

import contextlib
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaes.domain.anchor import ANCHOR_INPUT_TYPE, FIRST, PAYLOAD_BYTES, AnchorPayload, decode, log_id_bytes
from qaes.domain.canonical import hash_of, salted_hash
from qaes.domain.errors import InvalidInputError
from qaes.domain.merkle import ProofError

ROOT = bytes(range(32))
ANCHOR = AnchorPayload(log_id_bytes("qaes"), 258, ROOT)


def test_layout_byte_by_byte() -> None:
    second = ANCHOR.next(size=70_000, root=ROOT[::-1])
    assert ANCHOR_INPUT_TYPE == 0x5141 and PAYLOAD_BYTES == 93
    assert second.encode() == (
        b"QAES\x01"
        + hashlib.sha256(b"qaes").digest()[:8]
        + b"\x70\x11\x01\x00\x00\x00\x00\x00"
        + ROOT[::-1]
        + hashlib.sha256(ANCHOR.encode()).digest()
        + b"\x01\x00\x00\x00\x00\x00\x00\x00"
    )
    assert ANCHOR.encode()[53:] == bytes(40)
    assert second.previous == ANCHOR.digest


def test_anchor_is_read_back() -> None:
    assert decode(ANCHOR.encode()) == ANCHOR


@given(st.binary(max_size=100) | st.binary(min_size=93, max_size=93).map(lambda data: b"QAES\x01" + data[5:]))
def test_bytes_that_are_read_are_written_the_same(data: bytes) -> None:
    with contextlib.suppress(ProofError):
        assert decode(data).encode() == data


def test_malformed_anchor_is_refused() -> None:
    good = ANCHOR.encode()
    for bad in (
        b"",
        good[:-1],
        good + b"\0",
        b"QAEZ" + good[4:],
        good[:4] + b"\x02" + good[5:],
        good[:13] + bytes(8) + good[21:],  # an empty log
        good[:-8] + b"\x01" + bytes(7),  # not the first, and nothing before it
        good[:53] + ROOT + good[85:],  # the first, with one before it
    ):
        with pytest.raises(ProofError):
            decode(bad)


@pytest.mark.parametrize(
    "fields", [{"log_id": b""}, {"root": b""}, {"previous": b""}, {"size": 0}, {"size": 1 << 64}, {"sequence": -1}]
)
def test_anchor_payload_refuses_invalid_fields(fields: dict[str, int]) -> None:
    with pytest.raises(ProofError):
        AnchorPayload(**({"log_id": bytes(8), "size": 1, "root": ROOT} | fields))


@pytest.mark.parametrize("size", [258, 257])
def test_log_that_has_not_grown_is_not_anchored_again(size: int) -> None:
    with pytest.raises(ProofError):
        ANCHOR.next(size=size, root=ROOT)


def test_first_anchor_has_no_predecessor() -> None:
    assert ANCHOR.previous == FIRST == bytes(32) and ANCHOR.sequence == 0


def test_salted_hash_is_that_of_both() -> None:
    salt = "0123456789abcdef" * 2
    assert salted_hash(salt, {"b": 1}) == hash_of({"value": {"b": 1}, "salt": salt}) != hash_of({"b": 1})
    assert salted_hash(salt, 1) != salted_hash("f" * 32, 1)
    for bad in ("", salt[:-1], salt.upper(), salt[:-1] + "\u0660"):
        with pytest.raises(InvalidInputError) as caught:
            salted_hash(bad, 1)
        assert caught.value.field == "salt"
