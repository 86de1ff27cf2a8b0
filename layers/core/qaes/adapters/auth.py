"""Who is calling? A signed token (JWT, RFC 7519) against the keys that its issuer publishes (JWKS, RFC 7517).

Imported by the authorizer, which every request waits for: nothing here needs boto3, FastAPI or pydantic.
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
"""Signatures only: neither `none`, nor a shared secret, for which the public key could be taken."""

ROLES = ("requester", "approver", "auditor", "operator")
ROLE_CLAIMS = ("scope", "cognito:groups")
"""The claims that name roles, where a deployment does not choose others."""
AGENT_ROLES = ("requester",)
"""The roles of an agent, whatever its token claims: agents are not people, and decide nothing."""
_CLIENT_CLAIMS = ("client_id", "azp", "cid", "appid")
"""Where issuers name the client that a token was issued to: RFC 9068, OpenID Connect, Okta, Entra ID."""

LEEWAY_SECONDS = 60
"""How far the clock of an issuer may be ahead."""
FRESH_SECONDS = 300
"""How long keys count without being fetched again."""
STALE_SECONDS = 3600
"""How long the last good keys count while the issuer cannot be reached: the bound for a withdrawn key in an outage."""
COOLDOWN_SECONDS = 30
"""The pause after a fetch, successful or not."""
FIRST_COOLDOWN_SECONDS = 5
"""The same while there are no keys at all: every request is refused until there are."""
MAX_TOKEN_LENGTH = 8192

logger = logging.getLogger("authorizer")


class InvalidTokenError(Exception):
    """The token does not prove who is calling; the text says why, for the log, without the token."""


class KeysUnavailableError(Exception):
    """The issuer's keys could not be had: whether the token is good is unknown."""


@dataclass(frozen=True)
class Identity:
    """Who is calling, and in which of `ROLES`; `agent` is the client that calls, if it is an agent's."""

    subject: str
    roles: tuple[str, ...]
    agent: str | None = None


class _Keys(jwt.PyJWKClient):
    """The issuer's keys; while the issuer cannot be reached, the last good ones. An outage is never the token's fault.

    One fetch runs at a time. After a fetch, successful or not, none begins until the cool-down is over: neither made-up
    key ids nor an outage cause one fetch for each request.
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
            The key is not among the last good ones, or these are too old, and the issuer cannot be asked.
        jwt.PyJWKClientError
            The issuer has no such key.
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
                raise KeysUnavailableError("the issuer could not be asked")
            raise jwt.PyJWKClientError("the issuer has no such key")

    def _find(self, kid: str) -> jwt.PyJWK | None:
        usable = time.monotonic() - self._fetched_at <= STALE_SECONDS
        return self.match_kid(self._known, kid) if usable else None

    def _refresh(self) -> None:
        """Fetch the keys, unless that was tried a moment ago. What is known stays if they cannot be had."""
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

    `agents` are the issuer's clients that are agents, `role_claims` the claims that name roles. Keys are fresh for five
    minutes: a key that the issuer withdraws is refused after that. While the issuer cannot be reached, the last good
    keys count for an hour. A key id that is not among them causes one new fetch, and no other within half a minute.
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
        """Tell whom a token names.

        Raises
        ------
        InvalidTokenError
            Form, algorithm, key, signature, issuer, audience, time, subject or client is not right.
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
        if int(claims["exp"]) <= time.time():  # without leeway: API Gateway keeps this answer for a minute
            raise InvalidTokenError("expired")
        if claims.get("token_use", "access") != "access":
            # Cognito's ID tokens have the client as their audience, and tell it who signed in: no key to the API.
            raise InvalidTokenError("token use")
        agent = self._agent(claims)
        if not self._is_for_us(claims, agent):
            raise InvalidTokenError("audience")
        return Identity(_subject(claims), AGENT_ROLES if agent else _roles(claims, self._role_claims), agent)

    def _is_for_us(self, claims: dict[str, Any], agent: str | None) -> bool:
        if "aud" in claims:
            audience = claims["aud"]
            return self._audience in (audience if isinstance(audience, list) else [audience])
        # Cognito's access tokens have no audience, but the client that they were issued to.
        return claims.get("token_use") == "access" and claims.get("client_id") in {self._audience, agent} - {None}

    def _agent(self, claims: dict[str, Any]) -> str | None:
        """Find the agent's client that the token was issued to.

        A client that is no text is refused: nobody could say whether it is an agent's.
        """
        if not all(isinstance(claims.get(claim), str | None) for claim in ("client_id", "azp")):
            raise InvalidTokenError("client")
        named = (claims.get(claim) for claim in _CLIENT_CLAIMS)
        return next((client for client in named if isinstance(client, str) and client in self._agents), None)


def _subject(claims: dict[str, Any]) -> str:
    """Return the subject in its one spelling, so that one person has one name here."""
    subject = claims["sub"]
    try:
        return normal_subject(subject)
    except (ValueError, TypeError) as error:
        raise InvalidTokenError("subject") from error


def _roles(claims: dict[str, Any], role_claims: Sequence[str]) -> tuple[str, ...]:
    """Find the known roles among the names in a token's role claims."""
    named = {name for claim in role_claims for name in _names(claim, claims.get(claim))}
    return tuple(role for role in ROLES if role in named)


def _names(claim: str, value: object) -> list[str]:
    """Read the names in a claim: the words of a scope; of any other claim the texts of a list, or the one text.

    Only a scope is split at spaces (RFC 6749, section 3.3): a group called "no operator" is not two groups. Whatever
    is nested deeper, or is of another type, names nothing.
    """
    if claim == "scope":
        return value.split(" ") if isinstance(value, str) else []
    names = value if isinstance(value, list) else [value]
    return [name for name in names if isinstance(name, str)]
