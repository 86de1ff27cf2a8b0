"""Identification of the caller: verifies a signed token (JWT, RFC 7519) with its issuer's public keys (JWKS, RFC 7517).

The authorizer imports this module, and every request waits for it: do not import boto3, FastAPI or pydantic here.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import jwt

from qaes.domain.text import normal_subject

ALGORITHMS = ("RS256", "ES256")
"""Accepted signatures. `none` is excluded, and so are shared secrets, which could be confused with the public key."""

ROLES = ("requester", "approver", "auditor", "operator")
ROLE_CLAIMS = ("scope", "cognito:groups")
"""Default claims that name roles. A deployment can choose others."""
AGENT_ROLES = ("requester",)
"""The roles of an agent, regardless of its token's claims: an agent cannot take a person's decision."""
_CLIENT_CLAIMS = ("client_id", "azp", "cid", "appid")
"""Claims that name the client of a token: RFC 9068, OpenID Connect, Okta, Entra ID."""

LEEWAY_SECONDS = 60
"""Tolerance for an issuer's clock that is ahead."""
FRESH_SECONDS = 300
"""Age up to which keys are used without another fetch."""
STALE_SECONDS = 3600
"""Maximum age of the last valid keys while the issuer is unreachable: the limit for a withdrawn key in an outage."""
COOLDOWN_SECONDS = 30
"""Pause after a fetch, successful or not."""
FIRST_COOLDOWN_SECONDS = 5
"""The same pause while no keys are known: every request is rejected until then."""
MAX_TOKEN_LENGTH = 8192

logger = logging.getLogger("authorizer")


class InvalidTokenError(Exception):
    """The token does not identify the caller. The text has the reason for the log, without the token."""


class KeysUnavailableError(Exception):
    """The issuer's keys are unavailable, so the token cannot be checked."""


@dataclass(frozen=True)
class Identity:
    """The caller and their `ROLES`; `agent` is the calling client if it belongs to an agent."""

    subject: str
    roles: tuple[str, ...]
    agent: str | None = None


class _Keys(jwt.PyJWKClient):
    """The issuer's keys, or the last valid ones while the issuer is unreachable. An outage is never the token's fault.

    One fetch runs at a time. After a fetch, successful or not, the next one waits for the cool-down: neither invented
    key ids nor an outage cause a fetch for each request.
    """

    def __init__(self, url: str) -> None:
        super().__init__(url, timeout=3, cache_jwk_set=False)
        self._lock = threading.Lock()
        self._known: list[jwt.PyJWK] = []
        self._fetched_at = self._tried_at = float("-inf")

    def get_signing_key(self, kid: str) -> jwt.PyJWK:
        """Return the key with this id.

        Raises
        ------
        KeysUnavailableError
            The key is not among the last valid ones, or these are too old, and the issuer is unreachable.
        jwt.PyJWKClientError
            The issuer does not have this key.
        """
        with self._lock:
            if time.monotonic() - self._fetched_at > FRESH_SECONDS:
                self._refresh()
            key = self._find(kid)
            if key is None:
                self._refresh()
                key = self._find(kid)
            if key is not None:
                return key
            if self._tried_at > self._fetched_at:
                raise KeysUnavailableError("the issuer's keys are unavailable; try again later")
            raise jwt.PyJWKClientError("the issuer does not have this key")

    def _find(self, kid: str) -> jwt.PyJWK | None:
        usable = time.monotonic() - self._fetched_at <= STALE_SECONDS
        return self.match_kid(self._known, kid) if usable else None

    def _refresh(self) -> None:
        """Fetch the keys, except during the cool-down. Keep the known keys if the fetch fails."""
        cooldown = COOLDOWN_SECONDS if self._known else FIRST_COOLDOWN_SECONDS
        if time.monotonic() - self._tried_at < cooldown:
            return
        try:
            self._known = self.get_signing_keys()
        except (jwt.PyJWTError, ValueError, OSError) as error:
            self._tried_at = time.monotonic()
            logger.warning("the issuer's keys cannot be fetched: %s", type(error).__name__)
        else:
            self._fetched_at = self._tried_at = time.monotonic()


class TokenVerifier:
    """Verifies tokens of one issuer for one audience.

    `agents` are the issuer's clients that are agents, and `role_claims` the claims that name roles. Keys are used for
    five minutes: after that, a key that the issuer withdrew is rejected. While the issuer is unreachable, the last
    valid keys are used for an hour. An unknown key id causes one fetch, at most every half minute.
    """

    def __init__(
        self,
        *,
        issuer: str,
        audience: str,
        jwks_url: str,
        agents: Collection[str] = (),
        role_claims: Sequence[str] = ROLE_CLAIMS,
    ) -> None:
        self._issuer = issuer
        self._audience = audience
        self._agents = frozenset(agents)
        self._role_claims = tuple(role_claims)
        self._keys = _Keys(jwks_url)

    def verify(self, token: str) -> Identity:
        """Return the identity in a token.

        Raises
        ------
        InvalidTokenError
            The form, algorithm, key, signature, issuer, audience, time, subject or client is invalid.
        KeysUnavailableError
            The issuer did not respond, or its response has no keys.
        """
        if len(token) > MAX_TOKEN_LENGTH:
            raise InvalidTokenError("too long")
        try:
            # Check the algorithm first: an unacceptable token must not cause a fetch.
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
        if int(claims["exp"]) <= time.time():  # without leeway: API Gateway caches the response for a minute
            raise InvalidTokenError("expired")
        if claims.get("token_use", "access") != "access":
            # Cognito's ID tokens name the client as their audience. They describe the user, and authorize no API call.
            raise InvalidTokenError("token use")
        agent = self._agent(claims)
        if not self._is_for_us(claims, agent):
            raise InvalidTokenError("audience")
        return Identity(_subject(claims), AGENT_ROLES if agent else _roles(claims, self._role_claims), agent)

    def _is_for_us(self, claims: dict[str, Any], agent: str | None) -> bool:
        if "aud" in claims:
            audience = claims["aud"]
            return self._audience in (audience if isinstance(audience, list) else [audience])
        # Cognito's access tokens name their client instead of an audience.
        return claims.get("token_use") == "access" and claims.get("client_id") in {self._audience, agent} - {None}

    def _agent(self, claims: dict[str, Any]) -> str | None:
        """Return the agent's client that the token was issued to.

        A client that is not text is rejected, because it could belong to an agent.
        """
        if not all(isinstance(claims.get(claim), str | None) for claim in ("client_id", "azp")):
            raise InvalidTokenError("client")
        named = (claims.get(claim) for claim in _CLIENT_CLAIMS)
        return next((client for client in named if isinstance(client, str) and client in self._agents), None)


def _subject(claims: dict[str, Any]) -> str:
    """Return the subject in its normal form, so that each person has one name."""
    subject = claims["sub"]
    try:
        return normal_subject(subject)
    except (ValueError, TypeError) as error:
        raise InvalidTokenError("subject") from error


def _roles(claims: dict[str, Any], role_claims: Sequence[str]) -> tuple[str, ...]:
    """Return the known roles in a token's role claims."""
    named = {name for claim in role_claims for name in _names(claim, claims.get(claim))}
    return tuple(role for role in ROLES if role in named)


def _names(claim: str, value: object) -> list[str]:
    """Return the names in a claim: the words of a scope, or the texts of any other claim.

    Only a scope is split at spaces (RFC 6749, section 3.3): a group called "no operator" is not two groups. Nested
    values and other types are ignored.
    """
    if claim == "scope":
        return value.split(" ") if isinstance(value, str) else []
    names = value if isinstance(value, list) else [value]
    return [name for name in names if isinstance(name, str)]
