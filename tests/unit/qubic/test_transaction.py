from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qaes.domain.qubic import MAX_QU, schnorrq
from qaes.domain.qubic.transaction import Transaction, decode

SUBSEED = schnorrq.subseed_of("a" * 55)
KEY = schnorrq.public_key_of(SUBSEED)
PUBLISHED = Transaction(KEY, KEY, 0, 75241800, 0x5141, bytes(range(72))).sign(SUBSEED)

keys = st.binary(min_size=32, max_size=32)
transactions = st.builds(
    Transaction,
    source=keys,
    destination=keys,
    amount=st.integers(0, MAX_QU),
    tick=st.integers(0, 2**32 - 1),
    input_type=st.integers(0, 2**16 - 1),
    payload=st.binary(max_size=1024),
    signature=st.binary(min_size=64, max_size=64),
)


def test_published_transaction() -> None:
    assert len(PUBLISHED.encode()) == 216
    assert PUBLISHED.id == "obtjubkjxnpudcivzqiwyubwmoydjtbndcxczmhvrclheivapcabszxcddeb"
    assert PUBLISHED.is_signed_by_source()


@settings(deadline=None)
@given(transactions)
def test_round_trip(transaction: Transaction) -> None:
    assert decode(transaction.encode()) == transaction


@given(
    st.binary(min_size=64, max_size=64),
    st.integers(-2, MAX_QU + 2),
    st.binary(min_size=6, max_size=6),
    st.binary(max_size=1100),
)
def test_decoded_bytes_encode_to_the_same_bytes(keys: bytes, amount: int, numbers: bytes, payload: bytes) -> None:
    """There is one spelling of a transaction, and so one id."""
    amount_ = amount.to_bytes(8, "little", signed=True)
    data = keys + amount_ + numbers + len(payload).to_bytes(2, "little") + payload + bytes(64)
    try:
        found = decode(data)
    except ValueError:
        return
    assert found.encode() == data
    assert 0 <= amount <= MAX_QU
    assert len(payload) <= 1024


@settings(max_examples=15, deadline=None)
@given(transactions)
def test_signature_belongs_to_the_source(transaction: Transaction) -> None:
    signed = replace(transaction, source=KEY).sign(SUBSEED)
    assert decode(signed.encode()).is_signed_by_source()
    assert not replace(transaction, source=KEY).is_signed_by_source()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 216 * 8 - 1))
def test_one_flipped_bit_is_refused(bit: int) -> None:
    data = bytearray(PUBLISHED.encode())
    data[bit // 8] ^= 1 << bit % 8
    try:
        changed = decode(bytes(data))
    except ValueError:
        return
    assert not changed.is_signed_by_source()
    assert changed.id != PUBLISHED.id


@pytest.mark.parametrize("data", [b"", bytes(143), PUBLISHED.encode()[:-1], PUBLISHED.encode() + b"\0"])
def test_another_length_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="transaction"):
        decode(data)


@pytest.mark.parametrize(
    "change",
    [
        {"source": bytes(31)},
        {"destination": bytes(33)},
        {"amount": -1},
        {"amount": MAX_QU + 1},
        {"tick": 2**32},
        {"tick": -1},
        {"input_type": 2**16},
        {"payload": bytes(1025)},
        {"signature": bytes(63)},
    ],
)
def test_field_out_of_range_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"bytes|amount|uint"):
        replace(PUBLISHED, **change)  # type: ignore[arg-type]


def test_unsigned_transaction_has_no_bytes_and_no_id() -> None:
    unsigned = Transaction(KEY, KEY, 0, 1)
    assert not unsigned.is_signed_by_source()
    with pytest.raises(ValueError, match="not signed"):
        unsigned.encode()
