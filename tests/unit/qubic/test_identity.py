from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaes.domain.errors import InvalidInputError
from qaes.domain.qubic import identity as identities
from qaes.domain.qubic.identity import (
    check_address,
    check_payable,
    decode_identity,
    decode_transaction_id,
    encode_identity,
    encode_transaction_id,
    is_identity_shaped,
)

IDENTITY = "BZBQFLLBNCXEMGLOBHUVFTLUPLVCPQUASSILFABOFFBCADQSSUPNWLZBQEXK"
keys = st.binary(min_size=32, max_size=32)


@given(keys)
def test_round_trip(data: bytes) -> None:
    assert decode_identity(encode_identity(data)) == data
    assert decode_transaction_id(encode_transaction_id(data)) == data
    assert is_identity_shaped(encode_identity(data))
    assert check_address(encode_identity(data)) == encode_identity(data)


@given(st.integers(0, 59), st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
def test_one_wrong_letter_is_refused(position: int, letter: str) -> None:
    mistyped = IDENTITY[:position] + letter + IDENTITY[position + 1 :]
    if mistyped == IDENTITY:
        return
    with pytest.raises(ValueError, match="identity"):
        decode_identity(mistyped)
    with pytest.raises(InvalidInputError) as caught:
        check_address(mistyped, field="to_address")
    assert caught.value.field == "to_address"


@pytest.mark.parametrize("text", ["", "A" * 59, "A" * 61, IDENTITY.lower(), IDENTITY[:-1] + "1", IDENTITY + "\n"])
def test_malformed_identity_is_refused(text: str) -> None:
    assert not is_identity_shaped(text)
    with pytest.raises(ValueError, match="60 letters"):
        decode_identity(text)


def test_word_beyond_64_bits_is_refused() -> None:
    with pytest.raises(ValueError, match="range"):
        decode_identity("Z" * 60)


def test_transaction_id_is_in_small_letters() -> None:
    with pytest.raises(ValueError, match="a to z"):
        decode_transaction_id(IDENTITY)
    with pytest.raises(ValueError, match="32 bytes"):
        encode_identity(bytes(31))
    assert identities.is_transaction_id_shaped(IDENTITY.lower())
    assert not identities.is_transaction_id_shaped(IDENTITY)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        (IDENTITY, IDENTITY),
        ("0x1234567890abcdef", "0x1234567890abcdef"),
        ("0X1234567890ABCDEF", "0x1234567890abcdef"),
        ("0x" + "Ab" * 20, "0x" + "ab" * 20),
    ],
)
def test_addresses(address: str, expected: str) -> None:
    assert check_address(address) == expected


@pytest.mark.parametrize(
    "address",
    [
        None,
        5,
        "",
        "0x",
        "0x" + "a" * 15,
        "0x" + "a" * 41,
        "0x12345678 90abcdef",
        "0x1234567890abcdeg",
        "A" * 60,
        "wallet",
    ],
)
def test_malformed_address_is_refused(address: object) -> None:
    with pytest.raises(InvalidInputError):
        check_address(address)


def test_checking_an_address_loads_no_curve() -> None:
    code = "import sys, qaes.domain.qubic.identity; print(*[name for name in sys.modules if 'qubic.' in name])"
    layer = Path(identities.__file__).parents[3]
    out = subprocess.run([sys.executable, "-c", code], cwd=layer, capture_output=True, text=True, check=True)
    assert set(out.stdout.split()) == {"qaes.domain.qubic.identity", "qaes.domain.qubic.k12"}


ZERO = encode_identity(bytes(32))


def contract(number: int) -> str:
    return encode_identity(number.to_bytes(8, "little") + bytes(24))


@pytest.mark.parametrize("address", [ZERO, "0x" + "0" * 16, "0X" + "0" * 40])
def test_check_payable_refuses_the_zero_address(address: str) -> None:
    with pytest.raises(InvalidInputError, match=r"^to_address is the zero address: a transfer") as caught:
        check_payable(address, "parameters.to_address")
    assert caught.value.field == "parameters.to_address"


@pytest.mark.parametrize(
    ("address", "number"),
    [
        (contract(1), 1), (contract(4), 4), (contract(1023), 1023), (contract(1024), 1024),
        (contract(2**64 - 1), 2**64 - 1), (f"0x{1:016x}", 1), (f"0X{1023:040X}", 1023),
        ("B" + "A" * 55 + "RMID", 1),  # QX, as Qubic publishes it
    ],
)  # fmt: skip
def test_check_payable_refuses_a_contracts_address(address: str, number: int) -> None:
    with pytest.raises(InvalidInputError, match=f"^destination is the address of smart contract {number}:") as caught:
        check_payable(address, "destination")
    assert caught.value.field == "destination"


@given(keys.filter(lambda data: any(data[8:])))
def test_check_payable_takes_every_other_identity(data: bytes) -> None:
    assert check_payable(encode_identity(data)) == encode_identity(data)


@pytest.mark.parametrize("address", [IDENTITY, f"0x{1024:016x}", "0x1234567890abcdef"])
def test_check_payable_takes_a_wallet(address: str) -> None:
    assert check_payable(address) == address


@pytest.mark.parametrize("address", [None, 5, "", "0x12", IDENTITY[:-1] + "A"])
def test_check_payable_refuses_malformed_address(address: object) -> None:
    with pytest.raises(InvalidInputError):
        check_payable(address, "source")
