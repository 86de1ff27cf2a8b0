"""Signed notes and checkpoints: published ones are read and made to the letter, altered ones are refused."""

from __future__ import annotations

import base64

import pytest

from qaes.domain.errors import InvalidInputError
from qaes.domain.merkle import ProofError
from qaes.domain.note import (
    Checkpoint,
    checkpoint_text,
    key_hash,
    parse_checkpoint,
    public_key_of,
    sign_note,
    verifier_key,
    verify_note,
)

# The example in the documentation of golang.org/x/mod/sumdb/note.
NAME = "PeterNeumann"
SEED = base64.b64decode("AYEKFALVFGyNhPJEMzD1QIDr+Y7hfZx09iUvxdXHKDFz")[1:]
KEY = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW"
TEXT = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n"  # quoted
SIGNATURE = "x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM="
NOTE = f"{TEXT}\n— PeterNeumann {SIGNATURE}\n"
ROOT = bytes(range(32))


def fails(note: str, key: str = KEY) -> str:
    with pytest.raises(ProofError) as caught:
        verify_note(note, key)
    return caught.value.check


def test_published_note() -> None:
    assert sign_note(TEXT, NAME, SEED) == NOTE
    assert verifier_key(NAME, public_key_of(SEED)) == KEY
    assert verify_note(NOTE, KEY) == TEXT


def test_lines_of_other_keys_are_passed_over() -> None:
    other = sign_note(TEXT, NAME, bytes(32)).removeprefix(TEXT + "\n")
    unknown = f"— unknown {SIGNATURE}\n— {NAME} AAAAAAAA\n"
    assert verify_note(f"{TEXT}\n{other}— {NAME} {SIGNATURE}\n{unknown}", KEY) == TEXT
    assert fails(f"{TEXT}\n{other}{unknown}") == "signature"


def test_text_may_have_empty_lines() -> None:
    text = "a\n\nb\n"
    assert verify_note(sign_note(text, NAME, SEED), KEY) == text


@pytest.mark.parametrize(
    "note",
    [
        "", "\n", TEXT, TEXT + "\n", "\n\n— a b\n", NOTE[:-1], NOTE + "\n", NOTE.replace("—", "-"), NOTE + "more\n",
        NOTE.replace("\n\n", "\n"), NOTE.replace("you", "y\to", 1), NOTE.replace("you", "y\ud800", 1),
        NOTE.replace("JnAM=", "JnAN="), NOTE.replace("JnAM=\n", "JnAM\n"), NOTE + f"— a b {SIGNATURE}\n",
        NOTE + "— a AAAAAA==\n", "x" * 70_000 + NOTE,
    ],
)  # fmt: skip
def test_malformed_note_is_refused(note: str) -> None:
    assert fails(note) == "text"


@pytest.mark.parametrize(
    "key",
    [
        "", "PeterNeumann", KEY[:-4], KEY.replace("c74f", "c74e"), KEY.replace("Peter", "Pater"),
        KEY.replace("c74f20a3", "C74F20A3"), KEY.replace("+ARp", "+AhoA"), "a b" + KEY,
    ],
)  # fmt: skip
def test_malformed_key_is_refused(key: str) -> None:
    assert fails(NOTE, key) == "key"


def test_signature_that_does_not_hold_is_refused() -> None:
    assert fails(NOTE.replace("think", "thank")) == "signature"
    assert fails(NOTE.replace("JkuBS", "JkuBT")) == "signature"
    assert fails(NOTE + f"— {NAME} {SIGNATURE}\n") == "signature"  # twice the same is not one
    short = base64.b64encode(base64.b64decode(SIGNATURE)[:-1]).decode()
    assert fails(f"{TEXT}\n— {NAME} {short}\n") == "signature"
    # s + L, the twin of an Ed25519 signature.
    raw = base64.b64decode(SIGNATURE)
    order = 2**252 + 27742317777372353535851937790883648493
    twin = raw[:36] + (int.from_bytes(raw[36:], "little") + order).to_bytes(32, "little")
    assert fails(f"{TEXT}\n— {NAME} {base64.b64encode(twin).decode()}\n") == "signature"


@pytest.mark.parametrize("text", ["", "a", "a\tb\n", "\ud800\n"])
def test_malformed_text_is_not_signed(text: str) -> None:
    with pytest.raises(InvalidInputError):
        sign_note(text, NAME, SEED)


@pytest.mark.parametrize("name", ["", "a b", "a+b", "a\n", "a\u2003b"])
def test_malformed_name_does_not_sign(name: str) -> None:
    with pytest.raises(InvalidInputError):
        sign_note(TEXT, name, SEED)


def test_seeds_and_keys_have_32_bytes() -> None:
    for call in (lambda: sign_note(TEXT, NAME, SEED[:-1]), lambda: verifier_key(NAME, SEED[:-1])):
        with pytest.raises(InvalidInputError):
            call()


def test_checkpoint_of_the_specification() -> None:
    # The example of c2sp.org/tlog-checkpoint: form and key id (its key is not published).
    root = base64.b64decode("CsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=")
    text = "example.com/behind-the-sofa\n20852163\nCsUYapGGPo4dkMgIAUqom/Xajj7h2fB2MPA3j2jxq2I=\n"
    assert checkpoint_text("example.com/behind-the-sofa", 20_852_163, root) == text
    assert parse_checkpoint(text) == Checkpoint("example.com/behind-the-sofa", 20_852_163, root)
    assert parse_checkpoint(text + "an extension\n").size == 20_852_163


def test_checkpoint_is_signed_and_read() -> None:
    key = verifier_key("qaes.example/log", public_key_of(SEED))
    note = sign_note(checkpoint_text("qaes.example/log", 7, ROOT), "qaes.example/log", SEED)
    assert parse_checkpoint(verify_note(note, key)) == Checkpoint("qaes.example/log", 7, ROOT)
    assert key_hash("qaes.example/log", public_key_of(SEED)).hex() in key


@pytest.mark.parametrize(
    "text",
    ["", "a\n1\n", "a\n1\nAAAA\n", "\n1\nAAAA\n", "a\n01\nROOT\n", "a\n-1\nROOT\n", "a\n1\nROOT", "a\n1\nROOT\n\n",
     "a\n18446744073709551616\nROOT\n", "a\n1 \nROOT\n", "a\n\u0661\nROOT\n"],
)  # fmt: skip
def test_malformed_checkpoint_is_refused(text: str) -> None:
    with pytest.raises(ProofError):
        parse_checkpoint(text.replace("ROOT", base64.b64encode(ROOT).decode()))


def test_invalid_checkpoint_is_not_written() -> None:
    for origin, size, root in (("", 1, ROOT), ("a\nb", 1, ROOT), ("a", -1, ROOT), ("a", 1 << 64, ROOT), ("a", 1, b"")):
        with pytest.raises(InvalidInputError):
            checkpoint_text(origin, size, root)
