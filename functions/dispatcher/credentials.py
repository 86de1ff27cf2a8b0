"""The credential that most existing APIs check, as headers. The values come from the caller, and are never logged."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from urllib.parse import quote_plus, urlencode

from pydantic import BaseModel, Field, ValidationError

from dispatcher.contract import Received
from dispatcher.egress import Egress
from qaes.domain.errors import InvalidInputError

_NAME = re.compile(r"[A-Za-z0-9-]{1,64}")
_VALUE = re.compile(r"[!-~](?:[ -~]{0,8200}[!-~])?")
_RESERVED = re.compile(
    r"accept(-.*)?|connection|content-.*|expect|host|idempotency-key|proxy-.*|signature(-input)?|te|trailer|"
    r"transfer-encoding|upgrade",
    re.IGNORECASE,
)
_SPARE_SECONDS = 30
"""A token counts as expired so long before its end."""
_DEFAULT_SECONDS = 60


class CredentialError(Exception):
    """The credential is not available, so no request leaves."""


@dataclass(frozen=True)
class Bearer:
    """A fixed token."""

    token: str = field(repr=False)


@dataclass(frozen=True)
class Basic:
    """A user name and a password."""

    user: str
    password: str = field(repr=False)


@dataclass(frozen=True)
class Header:
    """A separate header, such as X-Api-Key."""

    name: str
    value: str = field(repr=False)


@dataclass(frozen=True)
class OAuth2:
    """OAuth 2.0 client credentials (RFC 6749, section 4.4): a token from `token_url`, kept until it expires."""

    token_url: str
    client_id: str
    client_secret: str = field(repr=False)
    scope: str = ""


Credential = Bearer | Basic | Header | OAuth2


class Credentials:
    """Turns credentials into headers; it keeps the tokens that it obtained.

    Parameters
    ----------
    egress
        The way to a token's issuer, under the same rules as to a handler.
    """

    def __init__(self, egress: Egress, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._egress = egress
        self._clock = clock
        self._tokens: dict[OAuth2, tuple[str, float]] = {}

    def headers(self, credential: Credential | None, *, seconds: float) -> list[tuple[str, str]]:
        """Return the headers of a credential.

        Raises
        ------
        CredentialError
            The issuer gives no token, or the credential does not fit into a header.
        """
        if credential is None:
            return []
        if isinstance(credential, Header):
            if not _NAME.fullmatch(credential.name) or _RESERVED.fullmatch(credential.name):
                raise CredentialError("the credential's header has a name that is not allowed")
            return [(credential.name, _checked(credential.value))]
        if isinstance(credential, Basic):
            return [("Authorization", _basic(credential.user, credential.password))]
        token = credential.token if isinstance(credential, Bearer) else self._token(credential, seconds)
        return [("Authorization", _checked(f"Bearer {token}"))]

    def forget(self, credential: Credential | None) -> None:
        """Obtain a new token for the next request: the handler refused this one."""
        if isinstance(credential, OAuth2):
            self._tokens.pop(credential, None)

    def _token(self, credential: OAuth2, seconds: float) -> str:
        kept = self._tokens.get(credential)
        if kept is not None and self._clock() < kept[1]:
            return kept[0]
        form = {"grant_type": "client_credentials", **({"scope": credential.scope} if credential.scope else {})}
        # RFC 6749, section 2.3.1: both parts are form-encoded before they are joined.
        secret = _basic(quote_plus(credential.client_id), quote_plus(credential.client_secret))
        headers = [("Content-Type", "application/x-www-form-urlencoded"), ("Authorization", secret)]
        try:
            url = self._egress.url(credential.token_url)
        except InvalidInputError as error:
            raise CredentialError(f"the token's issuer cannot be called: {error.message}") from error
        reply = self._egress.post(url, headers, urlencode(form).encode(), seconds=seconds)
        if not isinstance(reply, Received) or reply.status != 200:
            raise CredentialError("the token's issuer gave no token")
        token, lifetime = _token_of(reply.body)
        until = self._clock() + lifetime - _SPARE_SECONDS
        self._tokens[credential] = (token, until)
        return token


class _TokenAnswer(BaseModel):
    """An issuer's answer (RFC 6749, section 5.1)."""

    access_token: str = Field(pattern=r"^[!-~]{1,8192}$")
    token_type: str = Field(pattern=r"(?i)^bearer$")
    expires_in: float = Field(_DEFAULT_SECONDS, ge=0, le=86_400)


def _token_of(body: bytes) -> tuple[str, float]:
    try:
        answer = _TokenAnswer.model_validate_json(body)
    except ValidationError:
        raise CredentialError("the token's issuer gave no token") from None
    return answer.access_token, answer.expires_in


def _basic(user: str, password: str) -> str:
    if ":" in user:
        raise CredentialError("the credential's user name must not contain a colon")
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def _checked(value: str) -> str:
    if not _VALUE.fullmatch(value):
        raise CredentialError("the credential has a character that no header may contain")
    return value
