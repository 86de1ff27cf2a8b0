"""The log's checkpoint as a signed note, the format of existing clients of transparency logs.

Sources: C2SP signed-note (text, signature lines, keys) and tlog-checkpoint (the text); RFC 8032 (Ed25519). The package
`cryptography` is imported only when a note is signed or verified.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qaes.domain.errors import InvalidInputError
from qaes.domain.merkle import HASH_BYTES, ProofError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

ED25519 = 0x01
"""Type of the signature, in a verifier key and in the hash that identifies a key."""
SEED_BYTES = 32
_SIGNATURE_BYTES = 64
_MAX_BYTES = 64 * 1024
_NAME = re.compile(r"[^\s+\x00-\x1f\x7f]+")
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,19}", re.ASCII)
_KEY_HASH = re.compile(r"[0-9a-f]{8}", re.ASCII)


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint: the log `origin` has `size` leaves under `root`."""

    origin: str
    size: int
    root: bytes


def checkpoint_text(origin: str, size: int, root: bytes) -> str:
    """Return the three lines of a checkpoint: origin, size in decimal, root in base64 (tlog-checkpoint)."""
    if not origin or not _is_text(origin) or "\n" in origin:
        raise InvalidInputError("the origin must be one line", field="origin")
    if not 0 <= size < 1 << 64 or len(root) != HASH_BYTES:
        raise InvalidInputError("a checkpoint must have a size of at least 0 and a root of 32 bytes", field="size")
    return f"{origin}\n{size}\n{base64.b64encode(root).decode()}\n"


def parse_checkpoint(text: str) -> Checkpoint:
    """Parse a checkpoint's text; ignore the extension lines after the third. Raises ProofError."""
    lines = text.split("\n")
    if len(lines) < 4 or lines[-1] or not all(lines[:-1]):
        raise ProofError("text", "a checkpoint must have three lines")
    origin, size, root = lines[:3]
    root_ = _decoded(root)
    if not _DECIMAL.fullmatch(size) or int(size) >= 1 << 64 or root_ is None or len(root_) != HASH_BYTES:
        raise ProofError("text", "a checkpoint must have a size in decimal and a root of 32 bytes")
    return Checkpoint(origin, int(size), root_)


def public_key_of(private_key_seed: bytes) -> bytes:
    """Return the 32-byte public key of an Ed25519 seed."""
    return _private(private_key_seed).public_key().public_bytes_raw()


def key_hash(name: str, public_key: bytes) -> bytes:
    """Return the 4 bytes that identify a key in a signature line."""
    return hashlib.sha256(name.encode() + b"\n" + bytes([ED25519]) + public_key).digest()[:4]


def verifier_key(name: str, public_key: bytes) -> str:
    """Return the key text for a client's configuration: name, hash and key."""
    _check_name(name)
    if len(public_key) != 32:
        raise InvalidInputError("an Ed25519 key must have 32 bytes", field="public_key")
    encoded = base64.b64encode(bytes([ED25519]) + public_key).decode()
    return f"{name}+{key_hash(name, public_key).hex()}+{encoded}"


def sign_note(text: str, name: str, private_key_seed: bytes) -> str:
    """Return the note: `text`, an empty line, and the line with the signature of the text."""
    _check_name(name)
    if not text.endswith("\n") or not _is_text(text):
        raise InvalidInputError("a note's text must be lines without control characters", field="text")
    private = _private(private_key_seed)
    signature = key_hash(name, private.public_key().public_bytes_raw()) + private.sign(text.encode())
    return f"{text}\n— {name} {base64.b64encode(signature).decode()}\n"


def verify_note(note: str, key: str) -> str:
    """Return the text of a note that this key signed. Signature lines of other keys are ignored.

    Raises
    ------
    ProofError
        The note (`text`) or the key (`key`) is malformed, or the key's signature is missing or wrong
        (`signature`).
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    name, hash_, public_key = _parse_key(key)
    text, lines = _split(note)
    found = False
    for line in lines:
        signer, signature = _parse_line(line)
        if signer != name or signature[:4] != hash_:
            continue
        if found or len(signature) != 4 + _SIGNATURE_BYTES:
            raise ProofError("signature", f"the note must have one signature of {name}")
        try:
            Ed25519PublicKey.from_public_bytes(public_key).verify(signature[4:], text.encode())
        except (InvalidSignature, ValueError) as error:
            raise ProofError("signature", f"the signature is not from {name}") from error
        found = True
    if not found:
        raise ProofError("signature", f"{name} has not signed the note")
    return text


def _split(note: str) -> tuple[str, list[str]]:
    if not _is_text(note) or len(note.encode()) > _MAX_BYTES or not note.endswith("\n"):
        raise ProofError("text", "the text is not a note")
    text, separator, signatures = note.rpartition("\n\n")
    if not separator or not text or not signatures:
        raise ProofError("text", "a note must have a text, an empty line and signatures")
    return text + "\n", signatures[:-1].split("\n")


def _parse_line(line: str) -> tuple[str, bytes]:
    parts = line.split(" ")
    signature = _decoded(parts[2]) if len(parts) == 3 and parts[0] == "—" else None
    if signature is None or not _NAME.fullmatch(parts[1]) or len(signature) < 5:
        raise ProofError("text", "a signature line of the note is malformed")
    return parts[1], signature


def _parse_key(key: str) -> tuple[str, bytes, bytes]:
    name, hash_, encoded = [*key.split("+", 2), "", ""][:3]
    data = _decoded(encoded)
    if not _NAME.fullmatch(name) or not _KEY_HASH.fullmatch(hash_) or data is None or len(data) != 33:
        raise ProofError("key", "the text is not a verifier key")
    if data[0] != ED25519 or key_hash(name, data[1:]).hex() != hash_:
        raise ProofError("key", "the key is not an Ed25519 key, or does not match its hash")
    return name, bytes.fromhex(hash_), data[1:]


def _private(seed: bytes) -> Ed25519PrivateKey:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    if len(seed) != SEED_BYTES:
        raise InvalidInputError(f"a seed must have {SEED_BYTES} bytes", field="private_key_seed")
    return Ed25519PrivateKey.from_private_bytes(seed)


def _check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise InvalidInputError("a key's name must not be empty or contain a space or a plus", field="name")


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeError:
        return False
    return all(letter == "\n" or letter >= " " for letter in text)


def _decoded(text: str) -> bytes | None:
    """Decode canonical base64, or return None."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return None
    return data if base64.b64encode(data).decode() == text else None
