"""Signatures against the vectors of the RFCs, and against a second reading of RFC 9421 that shares no code."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from http_message_signatures import HTTPMessageSigner, MappingKeyResolver, algorithms

from dispatcher.signatures import (
    CALLBACK_COMPONENTS,
    REQUEST_COMPONENTS,
    Signer,
    directory,
    public_key,
    read_directory,
    thumbprint,
    verify_callback,
)
from qaes.domain.errors import ForbiddenError, InvalidInputError
from qaes.domain.policy.actions import PublicKey

URL = "https://handler.example/refund?tenant=7"
CALLBACK_URL = "https://qaes.example/actions/task_x.0.1/result"
BODY = b'{"reference":"task_x.0.1"}'
OWN = {"Content-Type": "application/json", "Idempotency-Key": "task_x.0.1"}
SIGNER = Signer(Ed25519PrivateKey.generate())

RFC_9421_KEY = b"""-----BEGIN PRIVATE KEY-----
MC4CAQAwBQYDK2VwBCIEIJ+DYvh6SEqVTm50DFtMDoQikTmiCqirVv9mWG9qfSnF
-----END PRIVATE KEY-----
"""


def base_of(method: str, url: str, headers: dict[str, str], signature_input: str) -> bytes:
    """Return the signature base of a request, by section 2.5 of RFC 9421."""
    fields = {name.lower(): value.strip() for name, value in headers.items()}
    authority, path = re.fullmatch(r"https?://([^/]+)(/[^?]*)(?:\?.*)?", url).groups()  # type: ignore[union-attr]
    derived = {"@method": method, "@target-uri": url, "@authority": authority, "@path": path}
    components = re.findall(r'"([^"]+)"', signature_input.partition(")")[0])
    lines = [f'"{name}": {derived[name] if name.startswith("@") else fields[name]}' for name in components]
    return "\n".join([*lines, f'"@signature-params": {signature_input}']).encode()


def parts(headers: dict[str, str]) -> tuple[str, bytes]:
    """Return the parameters and the bytes of the one signature."""
    label, _, parameters = headers["Signature-Input"].partition("=")
    value = headers["Signature"].removeprefix(f"{label}=:").removesuffix(":")
    return parameters, base64.b64decode(value)


# The dispatcher's requests


def test_library_signs_the_vector_of_rfc_9421() -> None:
    """Section B.2.6."""
    headers = {
        "Host": "example.com",
        "Date": "Tue, 20 Apr 2021 02:07:55 GMT",
        "Content-Type": "application/json",
        "Content-Length": "18",
    }
    url = "https://example.com/foo?param=Value&Pet=dog"
    message = SimpleNamespace(method="POST", url=url, headers=dict(headers))
    key: Any = load_pem_private_key(RFC_9421_KEY, None)
    resolver = MappingKeyResolver(public_keys={}, private_keys={"test-key-ed25519": key})
    HTTPMessageSigner(signature_algorithm=algorithms.ED25519, key_resolver=resolver).sign(
        message,
        key_id="test-key-ed25519",
        created=datetime.fromtimestamp(1618884473, UTC),
        label="sig-b26",
        include_alg=False,
        covered_component_ids=("date", "@method", "@path", "@authority", "content-type", "content-length"),
    )
    expected = "wqcAqbmYJ2ji2glfAMaRy4gruYYnx2nEFN2HN6jrnDnQCK1u02Gb04v9EDgwUPiu4A0w6vuQv5lIp5WPpBKRCw=="
    assert message.headers["Signature"] == f"sig-b26=:{expected}:"
    key.public_key().verify(
        base64.b64decode(expected), base_of("POST", url, headers, message.headers["Signature-Input"].partition("=")[2])
    )


def test_request_signature_verifies_by_a_second_implementation() -> None:
    now = datetime.now(UTC)
    headers = SIGNER.headers("POST", URL, OWN, BODY, now=now)
    parameters, signature = parts(headers)
    SIGNER.private_key.public_key().verify(signature, base_of("POST", URL, headers, parameters))
    covered = " ".join(f'"{name}"' for name in REQUEST_COMPONENTS)
    assert parameters.startswith(f"({covered});created={int(now.timestamp())}")
    assert f";expires={int(now.timestamp()) + 60}" in parameters
    assert f';keyid="{SIGNER.key_id}"' in parameters and ';alg="ed25519"' in parameters
    assert re.search(r';nonce="[A-Za-z0-9_-]{24}"', parameters)
    digest = base64.b64encode(hashlib.sha256(BODY).digest()).decode()
    assert headers["Content-Digest"] == f"sha-256=:{digest}:"
    for url, changed in ((URL + "0", headers), (URL, headers | {"Idempotency-Key": "other"})):
        with pytest.raises(InvalidSignature):
            SIGNER.private_key.public_key().verify(signature, base_of("POST", url, changed, parameters))


def test_every_request_has_a_new_nonce() -> None:
    assert len({parts(SIGNER.headers("POST", URL, OWN, BODY))[0] for _ in range(20)}) == 20


def test_private_key_is_not_in_the_signer_s_text() -> None:
    assert "private" not in repr(SIGNER)


# The directory


def test_thumbprint_is_the_vector_of_rfc_8037() -> None:
    key = public_key("11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo")
    assert thumbprint(key) == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"


def test_directory_lists_public_keys_by_their_thumbprints() -> None:
    keys = [Ed25519PrivateKey.generate().public_key() for _ in range(2)]
    text = directory(keys)
    assert read_directory(text) == {thumbprint(key): key for key in keys}
    assert [set(key) for key in json.loads(text)["keys"]] == [{"kty", "crv", "x", "kid", "use"}] * 2


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"keys":[{"crv":"Ed25519"}]}', '{"keys":[7]}', '{"keys":{}}x'])
def test_directory_is_refused_when_malformed(text: str) -> None:
    with pytest.raises(InvalidInputError):
        read_directory(text)


def test_directory_is_refused_when_an_id_belongs_to_another_key() -> None:
    text = directory([SIGNER.private_key.public_key()]).replace(SIGNER.key_id, "A" * 43)
    with pytest.raises(InvalidInputError, match="thumbprint"):
        read_directory(text)


@pytest.mark.parametrize("text", ["", "A", "A" * 42, "A" * 44, "A" * 43 + "=", "+" * 43, "é" * 43, "A" * 42 + "B"])
def test_public_key_is_refused_in_another_spelling(text: str) -> None:
    with pytest.raises(InvalidInputError):
        public_key(text)


# Callbacks of handlers

HANDLER_KEY = Ed25519PrivateKey.generate()
RAW_KEY = base64.b64encode(HANDLER_KEY.public_key().public_bytes_raw()).decode()
PUBLIC_KEYS = [PublicKey(keyid="handler-1", ed25519=RAW_KEY)]


def callback(
    *,
    method: str = "POST",
    url: str = CALLBACK_URL,
    body: bytes = BODY,
    key: Ed25519PrivateKey = HANDLER_KEY,
    components: tuple[str, ...] = CALLBACK_COMPONENTS,
    parameters: Callable[[], str] | None = None,
) -> list[tuple[str, str]]:
    """Sign a callback without the library."""
    digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
    headers = {"Content-Digest": f"sha-256=:{digest}:"}
    given = (parameters or partial(at, 0))()
    signature_input = f"({' '.join(chr(34) + name + chr(34) for name in components)});{given}"
    signature = base64.b64encode(key.sign(base_of(method, url, headers, signature_input))).decode()
    headers |= {"Signature-Input": f"sig1={signature_input}", "Signature": f"sig1=:{signature}:"}
    return list(headers.items())


def test_callback_signed_by_a_second_implementation_verifies() -> None:
    assert verify_callback("POST", CALLBACK_URL, callback(), BODY, PUBLIC_KEYS) == "handler-1"


def at(created: float, expires: float | None = 60, rest: str = ';nonce="n";keyid="handler-1";alg="ed25519"') -> str:
    now = datetime.now(UTC)
    end = "" if expires is None else f";expires={int((now + timedelta(seconds=expires)).timestamp())}"
    return f"created={int((now + timedelta(seconds=created)).timestamp())}{end}{rest}"


FORGED: dict[str, dict[str, Any]] = {
    "another key": {"key": Ed25519PrivateKey.generate()},
    "another reference": {"url": "https://qaes.example/actions/task_y.0.1/result"},
    "another host": {"url": "https://evil.example/actions/task_x.0.1/result"},
    "another method": {"method": "PUT"},
    "another body": {"body": b'{"status":"done"}'},
    "the method not covered": {"components": ("@target-uri", "content-digest")},
    "the URL not covered": {"components": ("@method", "content-digest")},
    "the path instead of the URL": {"components": ("@method", "@path", "content-digest")},
    "the body not covered": {"components": ("@method", "@target-uri")},
    "nothing covered": {"components": ()},
    "an old signature": {"parameters": partial(at, -400)},
    "an expired signature": {"parameters": partial(at, -120, -60)},
    "a signature of the future": {"parameters": partial(at, 120, 300)},
    "no expiry": {"parameters": partial(at, 0, None)},
    "no nonce": {"parameters": partial(at, 0, 60, ';keyid="handler-1"')},
    "no key id": {"parameters": partial(at, 0, 60, ';nonce="n"')},
    "an unknown key id": {"parameters": partial(at, 0, 60, ';nonce="n";keyid="handler-2"')},
    "another algorithm": {"parameters": partial(at, 0, 60, ';nonce="n";keyid="handler-1";alg="hmac-sha256"')},
    "a number as the nonce": {"parameters": partial(at, 0, 60, ';nonce=7;keyid="handler-1"')},
}
"""`at` is called when the case runs: at the end of a long test run, its future would be past."""


@pytest.mark.parametrize("case", FORGED)
def test_forged_callback_is_refused(case: str) -> None:
    with pytest.raises(ForbiddenError):
        verify_callback("POST", CALLBACK_URL, callback(**FORGED[case]), BODY, PUBLIC_KEYS)


@pytest.mark.parametrize(
    "change",
    [
        lambda headers: [],
        lambda headers: [pair for pair in headers if pair[0] != "Signature"],
        lambda headers: [pair for pair in headers if pair[0] != "Content-Digest"],
        lambda headers: [*headers, *headers],
        lambda headers: [*headers, ("Signature", "sig2=:AAAA:"), ("Signature-Input", 'sig2=();keyid="handler-1"')],
        lambda headers: [(name, value + "\x00") for name, value in headers],
        lambda headers: [(name, "(" * 50_000) for name, _ in headers],
        lambda headers: [(name, value.replace("sig1", "SIG1")) for name, value in headers],
    ],
)
def test_callback_with_malformed_headers_is_refused(change: Any) -> None:
    with pytest.raises(ForbiddenError):
        verify_callback("POST", CALLBACK_URL, change(callback()), BODY, PUBLIC_KEYS)


def test_callback_is_refused_when_the_action_has_no_keys() -> None:
    with pytest.raises(ForbiddenError):
        verify_callback("POST", CALLBACK_URL, callback(), BODY, [])
