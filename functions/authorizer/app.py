"""The authorizer of the API: a verified token becomes a caller with roles; in the local stage's stub mode, everyone."""

from __future__ import annotations

import logging
import os
from functools import cache
from typing import Any

from qaes.adapters import settings
from qaes.adapters.auth import ROLE_CLAIMS, ROLES, Identity, InvalidTokenError, TokenVerifier

# Not the services' logger: every request waits for this function, and Powertools takes longer to import than all of it.
logger = logging.getLogger("authorizer")
logger.setLevel(os.environ.get("POWERTOOLS_LOG_LEVEL", "INFO"))

STUB = Identity("demo_user", ROLES)


def handler(event: dict[str, Any], context: object) -> dict[str, Any]:
    """Answer API Gateway with a policy and the caller, `{principalId, context: {roles, auth_mode, agent?}}`.

    Raises
    ------
    Exception
        "Unauthorized", the one text that API Gateway turns into 401. The API's gateway responses turn any other
        exception, and an authorizer that Lambda throttles, into 503 with Retry-After.
    """
    mode = settings.text("AUTH_MODE")
    if mode == "stub":
        if settings.text("STAGE") != "local":
            raise settings.SettingsError("AUTH_MODE stub is for the local stage only")
        return _allow(STUB, mode, event["methodArn"])
    if mode != "jwt":
        raise settings.SettingsError("AUTH_MODE is neither jwt nor stub")
    try:
        identity = _verifier().verify(_bearer_token(event))
    except InvalidTokenError as error:
        logger.info("token refused: %s", error)
        raise Exception("Unauthorized") from None  # noqa: TRY002 - API Gateway knows it by its text
    return _allow(identity, mode, event["methodArn"])


@cache
def _verifier() -> TokenVerifier:
    return TokenVerifier(
        issuer=settings.text("JWT_ISSUER"),
        audience=settings.text("JWT_AUDIENCE"),
        jwks_url=settings.text("JWKS_URL"),
        agents=_listed("AGENT_CLIENT_IDS"),
        role_claims=_listed("ROLE_CLAIMS") or ROLE_CLAIMS,
    )


def _listed(name: str) -> tuple[str, ...]:
    """Read the texts of a setting that stand between commas."""
    texts = (text.strip() for text in (settings.optional(name) or "").split(","))
    return tuple(text for text in texts if text)


def _bearer_token(event: dict[str, Any]) -> str:
    scheme, _, token = str(event.get("authorizationToken") or "").strip().partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise InvalidTokenError("no bearer token")
    return token.strip()


def _allow(identity: Identity, mode: str, method_arn: str) -> dict[str, Any]:
    """Let the caller reach every route of the API's stage: which of them they may use, the services decide by role."""
    api, stage, *_ = method_arn.split("/")
    context = {"roles": " ".join(identity.roles), "auth_mode": mode}
    if identity.agent is not None:
        context["agent"] = identity.agent
    return {
        "principalId": identity.subject,
        "policyDocument": {
            "Version": "2012-10-17",
            "Statement": [{"Action": "execute-api:Invoke", "Effect": "Allow", "Resource": f"{api}/{stage}/*"}],
        },
        "context": context,
    }
