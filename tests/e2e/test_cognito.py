"""Deployed without an issuer, and with an origin: the stack's own user pool, and pages of that origin."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import jwt
import pytest

from local.cloud import Cloud
from tests.e2e.conftest import MONITORING, Api

ORIGIN = "https://console.example"
PASSWORD = "Correct-Horse-7-Battery"
PARAMETERS = {"JwtIssuer": "", "JwtAudience": "", "JwksUrl": "", "CorsAllowOrigin": ORIGIN}


class OwnIssuer(Cloud):
    """The local cloud, with users of the stack's user pool instead of tokens of the local issuer."""

    def user(self, *groups: str) -> tuple[str, dict[str, str]]:
        """Create a user in these groups as docs/deploy.md describes, and sign in: their id, and their tokens by use."""
        cognito, name = self.client("cognito-idp"), f"user-{uuid.uuid4().hex[:8]}"
        pool = {"UserPoolId": self.outputs["UserPoolId"]}
        # The password that Cognito would make up itself; the local AWS makes one up that its own policy refuses.
        cognito.admin_create_user(**pool, Username=name, TemporaryPassword=f"{PASSWORD}!", MessageAction="SUPPRESS")
        cognito.admin_set_user_password(**pool, Username=name, Password=PASSWORD, Permanent=True)
        for group in groups:
            cognito.admin_add_user_to_group(**pool, Username=name, GroupName=group)
        signed_in = cognito.initiate_auth(
            ClientId=self.outputs["UserPoolClientId"],
            AuthFlow="USER_PASSWORD_AUTH",
            AuthParameters={"USERNAME": name, "PASSWORD": PASSWORD},
        )["AuthenticationResult"]
        tokens = {"access": signed_in["AccessToken"], "id": signed_in["IdToken"]}
        return jwt.decode(tokens["access"], options={"verify_signature": False})["sub"], tokens


@pytest.fixture(scope="module")
def own() -> Iterator[Api]:
    cloud = OwnIssuer(f"e2e-cognito-{os.getpid()}", parameters=PARAMETERS, progress=lambda _: None)
    with cloud, httpx.Client(base_url=cloud.url, timeout=60) as http:
        _keys_from_here(cloud)
        yield Api(cloud, http)
    cloud.remove_directory()


def _keys_from_here(cloud: Cloud) -> None:
    """Check the authorizer's settings in the template, then let it fetch the same pool's keys from the local AWS."""
    functions, name, pool = cloud.client("lambda"), cloud.resources["AuthorizerFunction"], cloud.outputs["UserPoolId"]
    variables = functions.get_function_configuration(FunctionName=name)["Environment"]["Variables"]
    issuer = f"https://cognito-idp.us-east-1.amazonaws.com/{pool}"
    assert {key: variables[key] for key in ("JWT_ISSUER", "JWT_AUDIENCE", "JWKS_URL")} == {
        "JWT_ISSUER": issuer,
        "JWT_AUDIENCE": cloud.outputs["UserPoolClientId"],
        "JWKS_URL": f"{issuer}/.well-known/jwks.json",
    }
    # The address of AWS's Cognito, which a pool of the local AWS is not at: nothing else is changed.
    variables["JWKS_URL"] = f"{cloud.endpoint}/{pool}/.well-known/jwks.json"
    functions.update_function_configuration(FunctionName=name, Environment={"Variables": variables})


def test_pool_has_the_roles_as_groups(own: Api) -> None:
    groups = own.cloud.client("cognito-idp").list_groups(UserPoolId=own.cloud.outputs["UserPoolId"])["Groups"]
    assert {group["GroupName"] for group in groups} == {"requester", "approver", "auditor", "operator"}


def test_users_of_the_pool_have_their_groups_roles(own: Api) -> None:
    cloud: Any = own.cloud
    alice, her = cloud.user("requester")
    _, his = cloud.user("auditor")
    _, nobodys = cloud.user()
    started = own(None, "POST", "/task/start", dict(MONITORING), token=her["access"])
    assert started.status_code == 202, started.text
    task = own(None, "GET", f"/task/{started.json()['task_id']}", token=his["access"])
    assert (task.status_code, task.json()["requester"]) == (200, alice)
    for token in (his["access"], nobodys["access"]):
        assert own(None, "POST", "/task/start", dict(MONITORING), token=token).status_code == 403


def test_other_tokens_of_the_pool_are_refused(own: Api) -> None:
    cloud: Any = own.cloud
    _, tokens = cloud.user("operator")
    assert own(None, "GET", "/tasks", token=tokens["access"]).status_code == 200
    assert own(None, "GET", "/tasks", token=tokens["id"]).status_code == 401
    assert own(None, "GET", "/tasks", token=cloud.token("operator")).status_code == 401


def test_page_of_the_origin_may_ask_and_read(own: Api) -> None:
    # The local AWS imports no headers of a preflight's answer: tests/template checks SAM's output for them.
    assert own.http.options("/task/start", headers={"Origin": ORIGIN}).status_code == 200
    answer = own(None, "GET", "/health", Origin=ORIGIN)
    assert (answer.headers["Access-Control-Allow-Origin"], answer.headers["Vary"]) == (ORIGIN, "Origin")
    assert "X-Correlation-Id" in answer.headers["Access-Control-Expose-Headers"]
