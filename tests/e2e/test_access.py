"""The rights of each role, and bad input that leaves nothing behind: over HTTP, through the deployed authorizer."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization

from local.tokens import AUDIENCE, Issuer
from tests.e2e.conftest import DESTINATION, MONITORING, SOURCE, Api, transfer

ABSENT = "task_019ab000-0000-7000-8000-00000000dead"


@pytest.fixture(scope="session")
def finished(api: Api) -> str:
    """A task of the requester's that has ended."""
    task_id = api.start(MONITORING)
    api.wait(task_id)
    return task_id


def _claims(issuer: Issuer, **changes: Any) -> dict[str, Any]:
    now = int(time.time())
    claims = {"iss": issuer.url, "aud": AUDIENCE, "sub": "mallory", "scope": "operator", "iat": now, "exp": now + 600}
    return {name: value for name, value in (claims | changes).items() if value is not None}


def _signed(issuer: Issuer, **changes: Any) -> str:
    return jwt.encode(_claims(issuer, **changes), issuer.key, algorithm="RS256", headers={"kid": issuer.key_id})


def _unsigned(issuer: Issuer) -> str:
    return jwt.encode(_claims(issuer), "", algorithm="none", headers={"kid": issuer.key_id})


def _signed_with_the_public_key(issuer: Issuer) -> str:
    import hashlib
    import hmac

    public = issuer.key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )

    def encode(part: Any) -> bytes:
        return base64.urlsafe_b64encode(part if isinstance(part, bytes) else json.dumps(part).encode()).rstrip(b"=")

    # By hand: PyJWT refuses to make such a token.
    text = encode({"alg": "HS256", "typ": "JWT", "kid": issuer.key_id}) + b"." + encode(_claims(issuer))
    return (text + b"." + encode(hmac.new(public, text, hashlib.sha256).digest())).decode()


FORGED: dict[str, Callable[[Issuer], str]] = {
    "not a token": lambda _: "abc.def.ghi",
    "unsigned": _unsigned,
    "HS256 with the public key": _signed_with_the_public_key,
    "another's key": lambda issuer: _signed(Issuer(issuer.url, Issuer.create(issuer.url).key)),
    "known key id, another's key": lambda issuer: jwt.encode(
        _claims(issuer), Issuer.create(issuer.url).key, algorithm="RS256", headers={"kid": issuer.key_id}
    ),
    "expired": lambda issuer: _signed(issuer, exp=int(time.time()) - 120),
    "not yet valid": lambda issuer: _signed(issuer, nbf=int(time.time()) + 120),
    "another issuer": lambda issuer: _signed(issuer, iss="https://elsewhere.example"),
    "another audience": lambda issuer: _signed(issuer, aud="somebody-else"),
    "no expiry": lambda issuer: _signed(issuer, exp=None),
    "no subject": lambda issuer: _signed(issuer, sub=None),
}


@pytest.mark.parametrize("what", FORGED)
def test_token_that_is_not_the_issuers_is_refused(api: Api, what: str) -> None:
    answer = api(None, "GET", f"/task/{ABSENT}", token=FORGED[what](api.cloud.issuer))
    assert answer.status_code == 401


def test_token_that_the_issuer_signed_is_taken(api: Api) -> None:
    """Without this acceptance the refusals above would prove nothing."""
    answer = api(None, "GET", f"/task/{ABSENT}", token=_signed(api.cloud.issuer))
    assert (answer.status_code, answer.json()["status"]) == (404, 404)


def test_without_a_token_there_is_nothing_to_see(api: Api, finished: str) -> None:
    for path in (f"/task/{finished}", f"/audit/{finished}", "/policy", f"/task/{finished}/status"):
        assert api(None, "GET", path).status_code == 401


@pytest.mark.parametrize(
    ("who", "method", "path", "body"),
    [
        ("auditor", "POST", "/task/start", dict(MONITORING)),
        ("approver", "POST", "/task/start", dict(MONITORING)),
        ("requester", "POST", "/task/{task}/approve", {"approved": True, "reason": "mine"}),
        ("auditor", "POST", "/task/{task}/approve", {"approved": True, "reason": "mine"}),
        ("requester", "POST", "/write", {"hash": "a" * 64, "metadata": {}}),
        ("auditor", "POST", "/write", {"hash": "a" * 64, "metadata": {}}),
    ],
)
def test_request_returns_403_without_the_role(
    api: Api, finished: str, who: str, method: str, path: str, body: dict[str, Any]
) -> None:
    answer = api(who, method, path.format(task=finished), body)
    assert (answer.status_code, answer.headers["Content-Type"]) == (403, "application/problem+json")


def test_anothers_task_is_not_there_for_a_requester(api: Api, finished: str) -> None:
    mallory = api.cloud.token("requester", subject="mallory")
    for path in (f"/task/{finished}", f"/task/{finished}/status"):
        assert api(None, "GET", path, token=mallory).status_code == 404
        assert api("requester", "GET", path).status_code == 200


def test_requester_with_every_role_cannot_approve(api: Api, waiting: Callable[..., str]) -> None:
    alice = api.cloud.token("requester approver auditor operator", subject="alice")
    task_id = waiting()
    answer = api(None, "POST", f"/task/{task_id}/approve", {"approved": True, "reason": "I approve it"}, token=alice)
    assert answer.status_code == 403
    assert api.task(task_id)["status"] == "waiting_approval"
    api.decide(task_id, approved=False)


BAD: dict[str, tuple[Any, str]] = {
    "unknown field": ({**MONITORING, "sudo": True}, "sudo"),
    "no task type": ({"description": "x"}, "task_type"),
    "a task type that is no word": ({**MONITORING, "task_type": "a b"}, "task_type"),
    "empty description": ({**MONITORING, "description": " "}, "description"),
    "oversized description": ({**MONITORING, "description": "x" * 5000}, "description"),
    "description of another type": ({**MONITORING, "description": 7}, "description"),
    "parameters of another type": ({**MONITORING, "parameters": [1]}, "parameters"),
    "oversized parameters": ({**MONITORING, "parameters": {"x": "y" * 40_000}}, "parameters"),
    "negative amount": (transfer(-1), "parameters.amount"),
    "an amount of nothing": (transfer(0), "parameters.amount"),
    "an amount that is no whole number": (b'{"task_type":"transfer_funds","description":"x","wallet_address":"%s",'
                                          b'"parameters":{"to_address":"%s","amount":1.5}}'
                                          % (SOURCE.encode(), DESTINATION.encode()), "parameters.amount"),
    "an amount that is not finite": (b'{"task_type":"transfer_funds","description":"x","wallet_address":"%s",'
                                     b'"parameters":{"to_address":"%s","amount":NaN}}'
                                     % (SOURCE.encode(), DESTINATION.encode()), ""),
    "an amount with more digits than can be kept": (transfer(10**30), "parameters.amount"),
    "no amount": ({**transfer(1), "parameters": {"to_address": DESTINATION}}, "parameters.amount"),
    "a malformed wallet": ({**MONITORING, "wallet_address": "wallet"}, "wallet_address"),
    "an identity with a wrong checksum": ({**MONITORING, "wallet_address": "A" * 60}, "wallet_address"),
    "not JSON": (b"{not json", ""),
    "a list": ([], ""),
    "nothing": (b"", ""),
}  # fmt: skip


def test_bad_input_is_refused_with_its_field_and_leaves_nothing(api: Api) -> None:
    before = {item["pk"]["S"] for item in api.items("TasksTable")}
    for what, (body, named) in BAD.items():
        answer = api("requester", "POST", "/task/start", body)
        assert 400 <= answer.status_code < 500, what
        assert answer.headers["Content-Type"] == "application/problem+json", what
        problem = answer.json()
        assert {"type", "title", "status", "detail", "instance"} <= set(problem), what
        assert named in json.dumps([problem["detail"], problem.get("errors")]), (what, problem)
    assert {item["pk"]["S"] for item in api.items("TasksTable")} == before


@pytest.mark.parametrize("path", [f"/task/{ABSENT}", "/task/nonsense", "/plan/plan_nonsense", f"/task/{ABSENT}/status"])
def test_unknown_id_is_not_found(api: Api, path: str) -> None:
    answer = api("operator", "GET", path)
    assert (answer.status_code, answer.headers["Content-Type"]) == (404, "application/problem+json")


def test_unknown_route_is_refused(api: Api) -> None:
    assert api("operator", "GET", "/no/such/route").status_code in {403, 404}
    assert api("operator", "DELETE", f"/task/{ABSENT}").status_code in {403, 404, 405}
