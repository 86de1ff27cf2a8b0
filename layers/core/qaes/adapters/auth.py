"""Who is calling? A signed token (JWT, RFC 7519) against the keys that its issuer publishes (JWKS, RFC 7517).

Imported by the authorizer, which every request waits for: nothing here needs boto3, FastAPI or pydantic.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import jwt

from qaes.domain.text import normal_subject

ALGORITHMS = ("RS256", "ES256")
"""Signatures only: neither `none`, nor a shared secret, for which the public key could be taken."""

ROLES = ("requester", "approver", "auditor", "operator")
LEEWAY_SECONDS = 60
COOLDOWN_SECONDS = 30
MAX_TOKEN_LENGTH = 8192


class InvalidTokenError(Exception):
    """The token does not prove who is calling; the text says why, for the log, without the token."""


class KeysUnavailableError(Exception):
    """The issuer's keys could not be had: whether the token is good is unknown."""


@dataclass(frozen=True)
class Identity:
    """Who is calling, and in which of `ROLES`."""

    subject: str
    roles: tuple[str, ...]


class _Keys(jwt.PyJWKClient):
    """The issuer's keys. What keeps them from being had is never the token's fault."""

    _refresh_failed_at = float("-inf")

    def get_signing_keys(self, refresh: bool = False) -> list[jwt.PyJWK]:
        """Return the keys; `refresh` when a key id is not among those that are kept."""
        # PyJWT waits after a fetch that succeeded: after one that failed, made-up key ids would each cause another.
        if refresh and time.monotonic() - self._refresh_failed_at < COOLDOWN_SECONDS:
            raise KeysUnavailableError("asked for in vain a moment ago")
        try:
            return super().get_signing_keys(refresh)
        except (jwt.PyJWTError, ValueError, OSError) as error:
            if refresh:
                self._refresh_failed_at = time.monotonic()
            raise KeysUnavailableError(type(error).__name__) from error


class TokenVerifier:
    """Verifies tokens of one issuer for one audience.

    Keys are kept for five minutes. A key id that is not among them causes one new fetch, and no other within half a
    minute: made-up key ids are not a way to have the issuer flooded.
    """

    def __init__(self, *, issuer: str, audience: str, jwks_url: str) -> None:
        self._issuer = issuer
        self._audience = audience
        self._keys = _Keys(jwks_url, timeout=3, lifespan=300, cooldown_duration=COOLDOWN_SECONDS)

    def verify(self, token: str) -> Identity:
        """Tell whom a token names.

        Raises
        ------
        InvalidTokenError
            Form, algorithm, key, signature, issuer, audience, time or subject is not right.
        KeysUnavailableError
            The issuer did not answer, or with something that holds no keys.
        """
        if len(token) > MAX_TOKEN_LENGTH:
            raise InvalidTokenError("too long")
        try:
            # The algorithm first: a token that cannot be accepted is not worth a fetch.
            if jwt.get_unverified_header(token).get("alg") not in ALGORITHMS:
                raise InvalidTokenError("algorithm")
            claims = jwt.decode(
                token,
                self._keys.get_signing_key_from_jwt(token),
                algorithms=list(ALGORITHMS),
                issuer=self._issuer,
                leeway=LEEWAY_SECONDS,
                options={"require": ["exp", "iss", "sub"], "verify_aud": False},
            )
        except (jwt.PyJWTError, ValueError, TypeError) as error:
            raise InvalidTokenError(type(error).__name__) from error
        if claims.get("token_use", "access") != "access":
            # Cognito's ID tokens have the client as their audience, and tell it who signed in: no key to the API.
            raise InvalidTokenError("token use")
        if not self._is_for_us(claims):
            raise InvalidTokenError("audience")
        return Identity(_subject(claims), _roles(claims))

    def _is_for_us(self, claims: dict[str, Any]) -> bool:
        if "aud" in claims:
            audience = claims["aud"]
            return self._audience in (audience if isinstance(audience, list) else [audience])
        # Cognito's access tokens have no audience, but the client that they were issued to.
        return claims.get("token_use") == "access" and claims.get("client_id") == self._audience


def _subject(claims: dict[str, Any]) -> str:
    """Return the subject in its one spelling, so that one person has one name here."""
    subject = claims["sub"]
    try:
        return normal_subject(subject)
    except (ValueError, TypeError) as error:
        raise InvalidTokenError("subject") from error


def _roles(claims: dict[str, Any]) -> tuple[str, ...]:
    """Find the known roles among the scopes and groups of a token."""
    scope, groups = claims.get("scope"), claims.get("cognito:groups")
    named = set(scope.split(" ")) if isinstance(scope, str) else set()
    if isinstance(groups, list):
        named.update(group for group in groups if isinstance(group, str))
    return tuple(role for role in ROLES if role in named)
