"""Keys and tokens of the local issuer, which replaces the identity provider on AWS."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

AUDIENCE = "qaes-local"
LIFETIME_SECONDS = 12 * 3600
PEOPLE: Mapping[str, str] = {"requester": "alice", "approver": "bob", "auditor": "carol", "operator": "olivia"}
"""The person for each role: four people, so that another person can approve a task."""
SECOND_PEOPLE: Mapping[str, str] = {"approver": "brian", "operator": "oscar"}
"""The second person for each role whose decisions can need two people."""


class TokenRequestError(ValueError):
    """The requested token has an unknown role or no subject."""


@dataclass(frozen=True)
class Issuer:
    """Signs tokens with its own key, which is valid as long as the local cloud runs.

    Parameters
    ----------
    url : str
        The issuer's name in the tokens (claim `iss`); the proxy publishes its keys under it.
    key : RSAPrivateKey
        The signing key.
    """

    url: str
    key: rsa.RSAPrivateKey

    @classmethod
    def create(cls, url: str) -> Issuer:
        """Create an issuer with a new 2048-bit key."""
        return cls(url, rsa.generate_private_key(public_exponent=65537, key_size=2048))

    def export(self) -> str:
        """Return the issuer with its private key as JSON, for `restore`."""
        pem = self.key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        return json.dumps({"url": self.url, "key": pem.decode()})

    @classmethod
    def restore(cls, text: str) -> Issuer:
        """Return the issuer that `export` described."""
        description = json.loads(text)
        key = serialization.load_pem_private_key(description["key"].encode(), password=None)
        if not isinstance(key, rsa.RSAPrivateKey):
            raise TypeError("The local issuer signs with an RSA key.")
        return cls(description["url"], key)

    @property
    def key_id(self) -> str:
        """Id of the key in tokens and in the key set: 16 hexadecimal digits of its modulus' SHA-256."""
        return hashlib.sha256(str(self.key.public_key().public_numbers().n).encode()).hexdigest()[:16]

    def key_set(self) -> dict[str, Any]:
        """Return the JWKS document: `{"keys": [...]}` with the public key only."""
        public = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(self.key.public_key()))
        public.pop("key_ops", None)
        return {"keys": [public | {"kid": self.key_id, "use": "sig", "alg": "RS256"}]}

    def token(self, role: str, *, subject: str | None = None, now: float | None = None) -> str:
        """Return a signed token.

        Parameters
        ----------
        role : str
            One role, or several with spaces between them: the claim `scope`.
        subject : str, optional
            Subject of the token; by default the person of `PEOPLE` with that role.
        now : float, optional
            Time of issue in seconds since 1970; by default the current time.

        Raises
        ------
        KeyError
            There is no subject, and no person of `PEOPLE` has that role.
        """
        issued = int(time.time() if now is None else now)
        claims = {
            "iss": self.url,
            "aud": AUDIENCE,
            "sub": PEOPLE[role] if subject is None else subject,
            "scope": role,
            "iat": issued,
            "exp": issued + LIFETIME_SECONDS,
        }
        return jwt.encode(claims, self.key, algorithm="RS256", headers={"kid": self.key_id})

    def requested_token(self, role: str, subject: str = "") -> str:
        """Return a token for the roles and the subject of a user's command.

        Parameters
        ----------
        role : str
            One role, or several separated by spaces.
        subject : str, optional
            Subject of the token; for a single role, the person of `PEOPLE` by default.

        Raises
        ------
        TokenRequestError
            A role is unknown, or the subject is missing.
        """
        roles = role.split()
        if not roles or not set(roles) <= set(PEOPLE):
            raise TokenRequestError(f"ROLE must be one or more of {', '.join(PEOPLE)}, not {role!r}.")
        if not subject and len(roles) > 1:
            raise TokenRequestError("Several roles need a SUBJECT: make token ROLE='requester auditor' SUBJECT=dave")
        return self.token(" ".join(roles), subject=subject or None)
