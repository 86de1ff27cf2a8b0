"""HTTP message signatures (RFC 9421) with Ed25519: of the dispatcher's requests, and of handlers' callbacks.

The library `http-message-signatures` builds and checks the signatures. This module defines the content that a
signature must cover, its maximum age, and the accepted keys.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from http_message_signatures import (
    HTTPMessageSigner,
    HTTPMessageVerifier,
    MappingKeyResolver,
    algorithms,
)

from qaes.domain.canonical import canonical_json
from qaes.domain.errors import ForbiddenError, InvalidInputError
from qaes.domain.policy.actions import PublicKey

LABEL = "qaes"
KEY_BYTES = 32
DIRECTORY_PATH = "/.well-known/http-message-signatures-directory"
DIRECTORY_TYPE = "application/http-message-signatures-directory+json"
LIFETIME = timedelta(seconds=60)
"""A handler can refuse a request that is older; the dispatcher signs each one anew."""
MAX_CALLBACK_AGE = timedelta(seconds=300)
CLOCK_SKEW = timedelta(seconds=30)
REQUEST_COMPONENTS = ("@method", "@target-uri", "content-digest", "content-type", "idempotency-key")
CALLBACK_COMPONENTS = ("@method", "@target-uri", "content-digest")


@dataclass
class _Message:
    """A request as the library reads and changes it."""

    method: str
    url: str
    headers: Any


class _Lines(list[tuple[str, str]]):
    """Header lines with the method that the library needs; a repeated header keeps each of its lines."""

    def items(self) -> list[tuple[str, str]]:
        return list(self)


@dataclass(frozen=True)
class Signer:
    """Signs requests with one private key. `key_id` is the key's thumbprint (RFC 8037), as in the directory."""

    private_key: Ed25519PrivateKey = field(repr=False)

    @property
    def key_id(self) -> str:
        """Return the thumbprint of the public key."""
        return thumbprint(self.private_key.public_key())

    def headers(
        self, method: str, url: str, headers: Mapping[str, str], body: bytes, *, now: datetime | None = None
    ) -> dict[str, str]:
        """Return `headers` with Content-Digest, Signature-Input and Signature.

        `headers` must contain Content-Type and Idempotency-Key, which the signature covers.
        """
        created = now or datetime.now(UTC)
        message = _Message(method, url, dict(headers))
        signer = HTTPMessageSigner(
            signature_algorithm=algorithms.ED25519,
            key_resolver=MappingKeyResolver(public_keys={}, private_keys={self.key_id: self.private_key}),
        )
        signer.sign(
            message,
            key_id=self.key_id,
            created=created,
            expires=created + LIFETIME,
            nonce=secrets.token_urlsafe(18),
            label=LABEL,
            covered_component_ids=REQUEST_COMPONENTS,
            body=body,
        )
        return dict(message.headers)


def directory(keys: Sequence[Ed25519PublicKey]) -> str:
    """Return the document of `DIRECTORY_PATH`: the keys that the dispatcher signs with, as a JWK set."""
    return canonical_json({"keys": [{**_jwk(key), "kid": thumbprint(key), "use": "sig"} for key in keys]})


def read_directory(text: str) -> dict[str, Ed25519PublicKey]:
    """Return the keys of a directory by their ids; keys of other kinds are left out.

    Raises
    ------
    InvalidInputError
        The text is not a directory, or an id is not the thumbprint of its key.
    """
    try:
        members = [key for key in json.loads(text)["keys"] if key.get("crv") == "Ed25519"]
        keys = {str(key["kid"]): public_key(key["x"]) for key in members}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise InvalidInputError("this is not a directory of keys", field="keys") from None
    if any(key_id != thumbprint(key) for key_id, key in keys.items()):
        raise InvalidInputError("a `kid` is not the thumbprint of its key", field="keys")
    return keys


def verify_callback(
    method: str, url: str, headers: Sequence[tuple[str, str]], body: bytes, public_keys: Sequence[PublicKey]
) -> str:
    """Return the id of the key that signed a handler's callback.

    Parameters
    ----------
    url
        The URL of the reference, as the service publishes it: never as the request names it.
    public_keys
        The action's `public_keys`.

    Raises
    ------
    ForbiddenError
        No signature, one by another key, one that is too old, or one that does not cover `CALLBACK_COMPONENTS`.
    """
    keys = {key.keyid: Ed25519PublicKey.from_public_bytes(base64.b64decode(key.ed25519)) for key in public_keys}
    return verify(_Message(method, url, _Lines(headers)), body, keys, CALLBACK_COMPONENTS)


def verify(message: Any, body: bytes, keys: Mapping[str, Ed25519PublicKey], components: Sequence[str]) -> str:
    """Return the id of the key that signed a message, which covers `components` and is recent."""
    verifier = HTTPMessageVerifier(
        signature_algorithm=algorithms.ED25519,
        key_resolver=MappingKeyResolver(public_keys=keys, private_keys={}),
    )
    verifier.max_clock_skew = CLOCK_SKEW
    refusal = ForbiddenError("The signature is missing, too old or does not verify.")
    try:
        results = verifier.verify(message, max_age=MAX_CALLBACK_AGE, require_components=components, body=body)
    except Exception as error:  # the headers are hostile: no failure of the library may pass for a signature
        raise refusal from error
    parameters = results[0].parameters
    if "expires" not in parameters or not parameters.get("nonce"):
        raise refusal
    return str(parameters["keyid"])


def public_key(text: str) -> Ed25519PublicKey:
    """Read a raw Ed25519 key in base64url without padding (43 characters).

    Raises
    ------
    InvalidInputError
        The text is not the one spelling of such a key.
    """
    try:
        raw = base64.urlsafe_b64decode(text + "=")
    except (ValueError, binascii.Error):
        raw = b""
    if len(raw) != KEY_BYTES or _base64url(raw) != text:
        raise InvalidInputError(f"a key must be {KEY_BYTES} bytes in base64url, without padding", field="ed25519")
    return Ed25519PublicKey.from_public_bytes(raw)


def thumbprint(key: Ed25519PublicKey) -> str:
    """Return the SHA-256 thumbprint of a key (RFC 7638, RFC 8037), in base64url."""
    return _base64url(hashlib.sha256(canonical_json(_jwk(key)).encode()).digest())


def _jwk(key: Ed25519PublicKey) -> dict[str, str]:
    return {"crv": "Ed25519", "kty": "OKP", "x": _base64url(key.public_bytes_raw())}


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
