"""The authorizer against an issuer's key set on a real HTTP server: whom it lets in, and how often it asks for keys."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa

from authorizer import app
from local.tokens import AUDIENCE, Issuer
from qaes.adapters.auth import KeysUnavailableError
from qaes.adapters.settings import SettingsError
from tests.support import events, template
from tests.support.cloud import call

API = "arn:aws:execute-api:us-east-1:123456789012:example/v1"
UNAUTHORIZED = "^Unauthorized$"
"""To the letter: any other text is a 500 to API Gateway."""


@dataclass
class KeyServer:
    """Publishes a key set on loopback and counts how often it is asked for it."""

    url: str
    status: int = 200
    body: bytes = b""
    delay: float = 0
    fetches: int = 0
    released: threading.Event = field(default_factory=threading.Event)

    def publish(self, *keys: dict[str, Any]) -> None:
        self.status, self.body = 200, json.dumps({"keys": keys}).encode()


class Clock:
    """Advances the clock for the age of keys, to avoid a wait of five minutes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._ahead, real = 0.0, time.monotonic
        monkeypatch.setattr(time, "monotonic", lambda: real() + self._ahead)

    def advance(self, seconds: float) -> None:
        self._ahead += seconds


@pytest.fixture(scope="module")
def issuer() -> Issuer:
    return Issuer.create("https://issuer.example")


@pytest.fixture
def keys(issuer: Issuer) -> Iterator[KeyServer]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.fetches += 1
            if state.delay:
                state.released.wait(state.delay)
                return
            self.send_response(state.status)
            self.send_header("Content-Length", str(len(state.body)))
            self.end_headers()
            self.wfile.write(state.body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        state = KeyServer(f"http://127.0.0.1:{server.server_address[1]}/keys")
        state.publish(*issuer.key_set()["keys"])
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        app._verifier.cache_clear()
        yield state
        app._verifier.cache_clear()
        state.released.set()
        server.shutdown()


Authorize = Callable[[str | None], dict[str, Any]]


@pytest.fixture
def authorize(keys: KeyServer, issuer: Issuer) -> Authorize:
    """Ask the template's authorizer about an `Authorization` header."""
    return asking(issuer, keys)


def asking(issuer: Issuer, keys: KeyServer, **parameters: str) -> Authorize:
    given = {"AuthMode": "jwt", "JwtIssuer": issuer.url, "JwtAudience": AUDIENCE, "JwksUrl": keys.url} | parameters

    def ask(header: str | None) -> dict[str, Any]:
        event = {"type": "TOKEN", "methodArn": f"{API}/GET/task/1", "authorizationToken": header}
        answer: dict[str, Any] = call("AuthorizerFunction", event, given)
        return answer

    return ask


def claims(**changes: Any) -> dict[str, Any]:
    """Alice's claims; times are seconds from now, and a change to None takes a claim away."""
    usual = {"iss": "https://issuer.example", "aud": AUDIENCE, "sub": "alice", "scope": "requester", "exp": 600}
    wanted = {name: value for name, value in (usual | changes).items() if value is not None}
    times = {name for name in ("exp", "nbf", "iat") if type(wanted.get(name)) is int}
    return wanted | {name: int(time.time()) + wanted[name] for name in times}


def signed(issuer: Issuer, headers: dict[str, Any] | None = None, **changes: Any) -> str:
    named = {"kid": issuer.key_id} if headers is None else headers
    return jwt.encode(claims(**changes), issuer.key, algorithm="RS256", headers=named)


def by_hand(header: Any, payload: Any, secret: bytes = b"") -> str:
    """A token that PyJWT refuses to make, signed with `secret` (HS256) or not at all."""
    parts = [part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, payload)]
    text = ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in parts)
    signature = hmac.new(secret, text.encode(), hashlib.sha256).digest() if secret else b""
    return f"{text}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def roles(answer: dict[str, Any]) -> str:
    found: str = answer["context"]["roles"]
    return found


# Who is let in


def test_signed_token_grants_stage_with_roles(authorize: Authorize, issuer: Issuer) -> None:
    assert authorize(f"Bearer {signed(issuer)}") == {
        "principalId": "alice",
        "policyDocument": {
            "Version": "2012-10-17",
            "Statement": [{"Action": "execute-api:Invoke", "Effect": "Allow", "Resource": f"{API}/*"}],
        },
        "context": {"roles": "requester", "auth_mode": "jwt"},
    }


def test_token_of_the_local_issuer_is_taken(authorize: Authorize, issuer: Issuer) -> None:
    answer = authorize(f"Bearer {issuer.token('approver')}")
    assert (answer["principalId"], roles(answer)) == ("bob", "approver")


@pytest.mark.parametrize("spelling", ["Bearer {}", "bearer {}", "BEARER  {} "])
def test_scheme_is_read_in_any_case(authorize: Authorize, issuer: Issuer, spelling: str) -> None:
    assert authorize(spelling.format(signed(issuer)))["principalId"] == "alice"


def test_token_signed_with_an_elliptic_curve_is_taken(authorize: Authorize, keys: KeyServer) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    public = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
    keys.publish(public | {"kid": "curve", "use": "sig", "alg": "ES256"})
    token = jwt.encode(claims(), key, algorithm="ES256", headers={"kid": "curve"})
    assert authorize(f"Bearer {token}")["principalId"] == "alice"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"scope": "requester approver"}, "requester approver"),
        ({"scope": "operator  auditor requester"}, "requester auditor operator"),
        ({"scope": None, "cognito:groups": ["auditor"]}, "auditor"),
        ({"scope": "openid requester", "cognito:groups": ["approver", "staff"]}, "requester approver"),
        ({"scope": "admin root Operator operators"}, ""),
        ({"scope": None}, ""),
        ({"scope": ["operator"], "cognito:groups": {"operator": True}}, ""),
        ({"scope": "", "roles": ["operator"], "groups": ["operator"]}, ""),
        ({"scope": None, "cognito:groups": [1, None, {"operator": 1}, "requester"]}, "requester"),
        ({"scope": "operator\trequester"}, ""),
    ],
)
def test_roles_are_the_known_words_among_scopes_and_groups(
    authorize: Authorize, issuer: Issuer, changes: dict[str, Any], expected: str
) -> None:
    assert roles(authorize(f"Bearer {signed(issuer, **changes)}")) == expected


@pytest.mark.parametrize(
    ("claim", "value", "expected"),
    [
        ("roles", ["approver", "auditor"], "approver auditor"),
        ("groups", ["approver"], "approver"),
        ("https://qaes.example/roles", ["operator"], "operator"),
        ("roles", "approver", "approver"),
        ("roles", "no approver", ""),  # one name, not two
        ("roles", "approver,operator", ""),
        ("roles", [], ""),
        ("roles", [["operator"], {"operator": True}, "auditor", None, 1, True], "auditor"),
        ("roles", {"operator": True}, ""),
        ("roles", {"roles": ["operator"]}, ""),
        ("roles", [{"name": "operator"}], ""),
        ("roles", True, ""),
        ("roles", 7, ""),
        ("roles", None, ""),
        ("roles", ["Operator", "OPERATOR", " operator", "operator ", "operators", "\u043eperator"], ""),
        ("cognito:groups", ["operator"], ""),  # a claim that is not named names no role
    ],
    ids=str,
)
def test_roles_come_from_the_claims_that_are_named(
    issuer: Issuer, keys: KeyServer, claim: str, value: Any, expected: str
) -> None:
    authorize = asking(issuer, keys, RoleClaims="scope,roles,groups,https://qaes.example/roles")
    assert roles(authorize(f"Bearer {signed(issuer, scope='openid', **{claim: value})}")) == expected


def test_roles_of_several_claims_are_added_up(issuer: Issuer, keys: KeyServer) -> None:
    authorize = asking(issuer, keys, RoleClaims="roles,groups,scope")
    token = signed(issuer, scope="requester", roles=["auditor"], groups="approver")
    assert roles(authorize(f"Bearer {token}")) == "requester approver auditor"


# Agents

AGENTS = {"AgentClientIds": "crm-agent,https://agents.example/7"}


@pytest.mark.parametrize(
    "changes",
    [
        {"client_id": "crm-agent"},
        {"azp": "crm-agent"},
        {"azp": "crm-agent", "client_id": "a-portal"},
        {"client_id": "crm-agent", "azp": "a-portal"},
        {"cid": "crm-agent"},
        {"appid": "crm-agent"},
        {"azp": "crm-agent", "scope": None},
        {"azp": "crm-agent", "scope": "operator approver", "cognito:groups": ["operator"]},
        {"aud": None, "token_use": "access", "client_id": "crm-agent"},
    ],
    ids=str,
)
def test_agent_has_the_role_requester_alone(issuer: Issuer, keys: KeyServer, changes: dict[str, Any]) -> None:
    answer = asking(issuer, keys, **AGENTS)(f"Bearer {signed(issuer, **({'scope': 'operator'} | changes))}")
    assert answer["principalId"] == "alice"
    assert answer["context"] == {"roles": "requester", "auth_mode": "jwt", "agent": "crm-agent"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"client_id": "a-portal", "azp": "a-portal"},
        {"azp": "crm-agent-2"},
        {"azp": "CRM-agent"},
        {"azp": " crm-agent"},
        {"azp": ""},
        {"cid": 7, "appid": ["crm-agent"]},
        {"sub": "crm-agent"},
    ],
    ids=str,
)
def test_other_clients_are_people(issuer: Issuer, keys: KeyServer, changes: dict[str, Any]) -> None:
    answer = asking(issuer, keys, **AGENTS)(f"Bearer {signed(issuer, **({'scope': 'operator'} | changes))}")
    assert answer["context"] == {"roles": "operator", "auth_mode": "jwt"}


@pytest.mark.parametrize("claim", ["client_id", "azp"])
@pytest.mark.parametrize("value", [["crm-agent"], {"id": "crm-agent"}, 7, True, [], {}], ids=str)
def test_client_claim_that_is_not_text_is_refused(issuer: Issuer, keys: KeyServer, claim: str, value: Any) -> None:
    """An agent could own this token: the client is unknown."""
    token = signed(issuer, **{claim: value})
    with pytest.raises(Exception, match=UNAUTHORIZED):
        asking(issuer, keys, **AGENTS)(f"Bearer {token}")


@pytest.mark.parametrize("listed", ["", "another,and-another", " , ,"])
def test_without_agents_a_client_is_a_person(issuer: Issuer, keys: KeyServer, listed: str) -> None:
    answer = asking(issuer, keys, AgentClientIds=listed)(f"Bearer {signed(issuer, azp='crm-agent')}")
    assert "agent" not in answer["context"]


def test_foreign_client_of_the_pool_is_still_refused(issuer: Issuer, keys: KeyServer) -> None:
    token = signed(issuer, aud=None, token_use="access", client_id="somebody-else")
    with pytest.raises(Exception, match=UNAUTHORIZED):
        asking(issuer, keys, **AGENTS)(f"Bearer {token}")


@pytest.mark.parametrize(
    "changes",
    [
        {"aud": ["another", AUDIENCE]},
        {"aud": None, "token_use": "access", "client_id": AUDIENCE},
        {"exp": 30},
        {"nbf": 30},
        {"iat": 30},
    ],
    ids=["one audience of several", "Cognito's access token", "about to expire", "not valid yet", "issued just now"],
)
def test_token_accepted_within_a_minute_of_its_validity(
    authorize: Authorize, issuer: Issuer, changes: dict[str, Any]
) -> None:
    assert authorize(f"Bearer {signed(issuer, **changes)}")["principalId"] == "alice"


# Who is not


@pytest.mark.parametrize(
    "changes",
    [
        {"iss": "https://elsewhere.example"},
        {"iss": "https://issuer.example/"},
        {"iss": None},
        {"aud": "somebody-else"},
        {"aud": ["somebody-else"]},
        {"aud": []},
        {"aud": {AUDIENCE: True}},
        {"aud": None},
        {"aud": None, "token_use": "id", "client_id": AUDIENCE},
        {"aud": None, "token_use": "access", "client_id": "another"},
        {"aud": None, "client_id": AUDIENCE},
        {"token_use": "id"},
        {"aud": "somebody-else", "token_use": "access", "client_id": AUDIENCE},
        {"exp": -1},
        {"exp": -120},
        {"exp": "tomorrow"},
        {"exp": None},
        {"nbf": 600},
        {"iat": 600},
        {"sub": None},
        {"sub": ""},
        {"sub": 7},
        {"sub": "x" * 257},
        {"sub": "alice\nbob"},
        {"sub": "alice\u202e"},
        {"sub": " "},
        {"sub": "alice\ufe0f"},
        {"sub": "al\u034fice"},
        {"sub": "\u3164"},
        {"sub": "alice\u00a0"},
        {"sub": "alice\ud800"},
    ],
    ids=str,
)
def test_signed_token_with_wrong_claims_is_refused(
    authorize: Authorize, issuer: Issuer, changes: dict[str, Any]
) -> None:
    # By hand: PyJWT makes no token whose issuer or subject is not text.
    payload = json.dumps(claims(**changes)).encode()
    token = jwt.api_jws.encode(payload, issuer.key, algorithm="RS256", headers={"kid": issuer.key_id})
    with pytest.raises(Exception, match=UNAUTHORIZED):
        authorize(f"Bearer {token}")


@pytest.mark.parametrize("subject", [" alice", "alice ", "  alice  "])
def test_subject_is_trimmed(authorize: Authorize, issuer: Issuer, subject: str) -> None:
    assert authorize(f"Bearer {signed(issuer, sub=subject)}")["principalId"] == "alice"


def test_subject_is_composed(authorize: Authorize, issuer: Issuer) -> None:
    assert authorize(f"Bearer {signed(issuer, sub='jose' + chr(0x301))}")["principalId"] == "jos\u00e9"


def public_pem(issuer: Issuer) -> bytes:
    return issuer.key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def other_key() -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(public_exponent=65537, key_size=2048)


def altered(token: str) -> str:
    """The same signature under claims with more roles."""
    header, _, signature = token.split(".")
    payload = base64.urlsafe_b64encode(json.dumps(claims(scope="operator")).encode()).rstrip(b"=").decode()
    return f"{header}.{payload}.{signature}"


FORGED: dict[str, Callable[[Issuer], str]] = {
    "alg none": lambda it: by_hand({"alg": "none", "kid": it.key_id}, claims()),
    "alg None": lambda it: by_hand({"alg": "None", "kid": it.key_id}, claims()),
    "no alg": lambda it: by_hand({"kid": it.key_id}, claims()),
    "alg of another type": lambda it: by_hand({"alg": ["RS256"], "kid": it.key_id}, claims()),
    "HS256 with the public key": lambda it: by_hand({"alg": "HS256", "kid": it.key_id}, claims(), public_pem(it)),
    "RS256 over an HMAC with the public key": lambda it: by_hand(
        {"alg": "RS256", "kid": it.key_id}, claims(), public_pem(it)
    ),
    "PS256": lambda it: jwt.encode(claims(), it.key, algorithm="PS256", headers={"kid": it.key_id}),
    "ES256 under an RSA key's id": lambda it: jwt.encode(
        claims(), ec.generate_private_key(ec.SECP256R1()), algorithm="ES256", headers={"kid": it.key_id}
    ),
    "another's key": lambda it: jwt.encode(claims(), other_key(), algorithm="RS256", headers={"kid": it.key_id}),
    "the token's own key": lambda it: signed(it, {"kid": "mine", "jwk": it.key_set()["keys"][0]}),
    "altered claims": lambda it: altered(signed(it)),
    "no signature": lambda it: signed(it).rpartition(".")[0] + ".",
    "no key id": lambda it: signed(it, {}),
    "key id of another type": lambda it: by_hand({"alg": "RS256", "kid": 7}, claims(), b"x"),
    "an extension that must be understood": lambda it: signed(it, {"kid": it.key_id, "crit": ["exp"], "exp": 1}),
}


@pytest.mark.parametrize("what", FORGED)
def test_token_that_the_issuer_did_not_sign_is_refused(authorize: Authorize, issuer: Issuer, what: str) -> None:
    with pytest.raises(Exception, match=UNAUTHORIZED):
        authorize(f"Bearer {FORGED[what](issuer)}")


@pytest.mark.parametrize(
    "header",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Basic YWxpY2U6c2VjcmV0",
        "Bearer abc",
        "Bearer a.b.c",
        "Bearer ...",
        "Bearer é.é.é",
        "Bearer one two",
        f"Bearer {'x' * 9000}",
        f"Bearer {by_hand(b'[]', claims())}",
        f"Bearer {by_hand(b'not JSON', claims())}",
        f"Bearer {by_hand({'alg': 'RS256', 'kid': 'k'}, b'[]')}",
        f"Bearer {by_hand(b'[' * 5000, {})}",
        f"Bearer {by_hand({'alg': 'RS256', 'kid': 'k'}, b'[' * 5000)}",
    ],
    ids=lambda header: str(header)[:24],
)
def test_malformed_token_refused_without_fetching_keys(
    authorize: Authorize, keys: KeyServer, header: str | None
) -> None:
    with pytest.raises(Exception, match=UNAUTHORIZED):
        authorize(header)
    assert keys.fetches == 0


def test_refused_token_is_not_in_the_logs(
    authorize: Authorize, issuer: Issuer, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.DEBUG)
    caplog.set_level(logging.DEBUG, logger="authorizer")
    tokens = [make(issuer) for make in FORGED.values()] + [signed(issuer, sub="s3cret" * 50), signed(issuer, exp=-3600)]
    for token in tokens:
        with pytest.raises(Exception, match=UNAUTHORIZED) as refusal:
            authorize(f"Bearer {token}")
        # Lambda logs a handler's exception, which must not have a secret in its chain.
        assert refusal.value.__suppress_context__ and refusal.value.__cause__ is None
    authorize(f"Bearer {signed(issuer)}")
    written = caplog.text + "".join(capsys.readouterr())
    assert written.count("token refused") == len(tokens)
    parts = {part for token in [*tokens, signed(issuer)] for part in token.split(".") if part}
    assert not [part for part in parts if part in written]
    assert "alice" not in written and "s3cret" not in written and issuer.key_id not in written


# The issuer's keys


def test_keys_fetched_once_until_they_are_old(
    authorize: Authorize, keys: KeyServer, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    for _ in range(5):
        authorize(f"Bearer {signed(issuer)}")
    assert keys.fetches == 1
    clock.advance(301)
    authorize(f"Bearer {signed(issuer)}")
    assert keys.fetches == 2


def test_unknown_key_id_is_asked_for_once_and_refused(
    authorize: Authorize, keys: KeyServer, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    authorize(f"Bearer {signed(issuer)}")
    clock.advance(31)
    with pytest.raises(Exception, match=UNAUTHORIZED):
        authorize(f"Bearer {signed(issuer, {'kid': 'unknown'})}")
    assert keys.fetches == 2


def test_flood_of_made_up_key_ids_is_no_flood_of_fetches(
    authorize: Authorize, keys: KeyServer, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    authorize(f"Bearer {signed(issuer)}")
    clock.advance(31)

    def knock(number: int) -> str:
        with pytest.raises(Exception, match=UNAUTHORIZED) as refusal:
            authorize(f"Bearer {by_hand({'alg': 'RS256', 'kid': f'k{number}'}, claims(), b'x')}")
        return str(refusal.value)

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(knock, range(100))) == {"Unauthorized"}
    assert keys.fetches == 2
    assert authorize(f"Bearer {signed(issuer)}")["principalId"] == "alice"


def test_forged_key_ids_do_not_flood_an_unavailable_issuer(
    authorize: Authorize, keys: KeyServer, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    authorize(f"Bearer {signed(issuer)}")
    clock.advance(31)
    keys.status = 503
    for number in range(20):
        with pytest.raises(KeysUnavailableError):
            authorize(f"Bearer {by_hand({'alg': 'RS256', 'kid': f'k{number}'}, claims(), b'x')}")
        assert authorize(f"Bearer {signed(issuer)}")["principalId"] == "alice"
    assert keys.fetches == 2
    keys.status = 200
    clock.advance(31)
    with pytest.raises(Exception, match=UNAUTHORIZED):
        authorize(f"Bearer {signed(issuer, {'kid': 'unknown'})}")
    assert keys.fetches == 3


def test_keys_are_rotated_while_tokens_of_both_are_taken(
    authorize: Authorize, keys: KeyServer, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, successor = Clock(monkeypatch), Issuer.create(issuer.url)
    old, new = f"Bearer {signed(issuer)}", f"Bearer {signed(successor)}"
    authorize(old)
    keys.publish(*issuer.key_set()["keys"], *successor.key_set()["keys"])
    clock.advance(31)
    for token in (old, new, old, new):
        assert authorize(token)["principalId"] == "alice"
    assert keys.fetches == 2
    keys.publish(*successor.key_set()["keys"])
    clock.advance(301)
    assert authorize(new)["principalId"] == "alice"
    with pytest.raises(Exception, match=UNAUTHORIZED):
        authorize(old)


def test_key_for_encryption_signs_nothing(authorize: Authorize, keys: KeyServer, issuer: Issuer) -> None:
    [key] = issuer.key_set()["keys"]
    keys.publish(key | {"use": "enc"}, Issuer.create(issuer.url).key_set()["keys"][0])
    with pytest.raises(Exception, match=UNAUTHORIZED):
        authorize(f"Bearer {signed(issuer)}")


def test_key_of_an_unknown_kind_does_not_hide_the_others(authorize: Authorize, keys: KeyServer, issuer: Issuer) -> None:
    keys.publish({"kty": "new", "kid": "new"}, *issuer.key_set()["keys"])
    assert authorize(f"Bearer {signed(issuer)}")["principalId"] == "alice"


BROKEN: dict[str, tuple[int, bytes]] = {
    "an error": (500, b"{}"),
    "a redirect": (302, b"{}"),
    "not JSON": (200, b"<html>maintenance</html>"),
    "not UTF-8": (200, b"\xff\xfe\xfd"),
    "nothing": (200, b""),
    "no object": (200, b"[]"),
    "no keys": (200, b"{}"),
    "an empty set": (200, b'{"keys": []}'),
    "no set": (200, b'{"keys": 7}'),
    "unusable keys": (200, b'{"keys": [{"kty": "RSA"}, 7]}'),
}


@pytest.mark.parametrize("what", BROKEN)
def test_keys_that_cannot_be_had_are_not_the_callers_fault(
    authorize: Authorize, keys: KeyServer, issuer: Issuer, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """503, not 401: the token may be good. Once the keys are there again, it is."""
    clock = Clock(monkeypatch)
    good = keys.body
    keys.status, keys.body = BROKEN[what]
    with pytest.raises(KeysUnavailableError) as error:
        authorize(f"Bearer {signed(issuer)}")
    assert "Unauthorized" not in str(error.value)
    keys.status, keys.body = 200, good
    clock.advance(6)
    assert authorize(f"Bearer {signed(issuer)}")["principalId"] == "alice"


def test_keys_without_an_id_are_ignored(authorize: Authorize, keys: KeyServer, issuer: Issuer) -> None:
    [key] = issuer.key_set()["keys"]
    keys.publish({name: value for name, value in key.items() if name != "kid"})
    for headers in ({}, {"kid": issuer.key_id}):
        with pytest.raises(KeysUnavailableError):
            authorize(f"Bearer {signed(issuer, headers)}")


def test_last_good_keys_count_for_an_hour_in_an_outage(
    authorize: Authorize, keys: KeyServer, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    authorize(f"Bearer {signed(issuer)}")
    keys.status = 503
    for _ in range(11):
        clock.advance(300)
        assert authorize(f"Bearer {signed(issuer)}")["principalId"] == "alice"
    clock.advance(301)
    with pytest.raises(KeysUnavailableError):
        authorize(f"Bearer {signed(issuer)}")
    keys.status = 200
    clock.advance(31)
    assert authorize(f"Bearer {signed(issuer)}")["principalId"] == "alice"


def test_outage_causes_one_fetch_in_each_cooldown(
    authorize: Authorize, keys: KeyServer, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    authorize(f"Bearer {signed(issuer)}")
    keys.status = 503
    clock.advance(301)

    def ask(_: int) -> str:
        principal: str = authorize(f"Bearer {signed(issuer)}")["principalId"]
        return principal

    for fetches in (2, 3):
        with ThreadPoolExecutor(8) as pool:
            assert set(pool.map(ask, range(40))) == {"alice"}
        assert keys.fetches == fetches
        clock.advance(31)


def test_issuer_that_was_never_reached_is_not_flooded(
    authorize: Authorize, keys: KeyServer, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    keys.status = 503
    for fetches in (1, 2):
        for _ in range(20):
            with pytest.raises(KeysUnavailableError):
                authorize(f"Bearer {signed(issuer)}")
        assert keys.fetches == fetches
        clock.advance(6)


def test_key_that_was_withdrawn_before_an_outage_is_refused(
    authorize: Authorize, keys: KeyServer, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, successor = Clock(monkeypatch), Issuer.create(issuer.url)
    authorize(f"Bearer {signed(issuer)}")
    keys.publish(*successor.key_set()["keys"])
    clock.advance(301)
    assert authorize(f"Bearer {signed(successor)}")["principalId"] == "alice"
    keys.status = 503
    clock.advance(1800)
    with pytest.raises(KeysUnavailableError):  # the issuer might have published it again
        authorize(f"Bearer {signed(issuer)}")
    assert authorize(f"Bearer {signed(successor)}")["principalId"] == "alice"


def test_authorizer_times_out_a_slow_issuer(authorize: Authorize, keys: KeyServer, issuer: Issuer) -> None:
    authorize(f"Bearer {signed(issuer)}")
    verifier = app._verifier()
    assert verifier._keys.timeout <= 3  # the function itself has 10 s
    app._verifier.cache_clear()
    keys.delay = 20
    begun = time.monotonic()
    with pytest.raises(KeysUnavailableError):
        authorize(f"Bearer {signed(issuer)}")
    assert time.monotonic() - begun < 5


def test_issuer_that_closes_connections_is_unavailable(issuer: Issuer, authorize: Authorize, keys: KeyServer) -> None:
    keys.body += b" " * 10
    send = BaseHTTPRequestHandler.send_header

    def promise_more(self: BaseHTTPRequestHandler, name: str, value: str) -> None:
        send(self, name, str(int(value) + 5) if name == "Content-Length" else value)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BaseHTTPRequestHandler, "send_header", promise_more)
        with pytest.raises(KeysUnavailableError):
            authorize(f"Bearer {signed(issuer)}")


def test_issuer_of_which_there_is_no_trace_is_down(issuer: Issuer, keys: KeyServer) -> None:
    # Port 9 (discard) of loopback has no listener.
    parameters = {
        "AuthMode": "jwt", "JwtIssuer": issuer.url, "JwtAudience": AUDIENCE, "JwksUrl": "http://127.0.0.1:9/keys",
    }  # fmt: skip
    event = events.load("authorizer/no_token") | {"authorizationToken": f"Bearer {signed(issuer)}"}
    with pytest.raises(KeysUnavailableError):
        call("AuthorizerFunction", event, parameters)
    assert keys.fetches == 0


# The pool that the stack makes when no issuer is given


def test_pool_access_token_has_groups_as_roles(
    keys: KeyServer, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = template.environment("AuthorizerFunction")
    monkeypatch.setattr(template, "environment", lambda *_: own | {"JWKS_URL": keys.url})
    token = signed(
        issuer,
        iss=own["JWT_ISSUER"],
        aud=None,
        client_id=own["JWT_AUDIENCE"],
        token_use="access",
        scope="aws.cognito.signin.user.admin",
        **{"cognito:groups": ["approver", "requester"]},
    )
    answer = call("AuthorizerFunction", events.load("authorizer/no_token") | {"authorizationToken": f"Bearer {token}"})
    assert (answer["principalId"], roles(answer)) == ("alice", "requester approver")


# Without tokens, and without settings


@pytest.mark.parametrize("case", ["stub", "no_token"])
def test_in_stub_mode_everyone_is_demo_user_with_every_role(case: str) -> None:
    answer = call("AuthorizerFunction", events.load(f"authorizer/{case}"), {"AuthMode": "stub", "Stage": "local"})
    assert answer["principalId"] == "demo_user"
    assert answer["context"] == {"roles": "requester approver auditor operator", "auth_mode": "stub"}
    [statement] = answer["policyDocument"]["Statement"]
    assert (statement["Effect"], statement["Resource"]) == ("Allow", f"{API}/*")


@pytest.mark.parametrize(
    "parameters",
    [
        {"AuthMode": "stub", "Stage": "dev"},
        {"AuthMode": "stub", "Stage": "prod"},
        {"AuthMode": "none"},
        {"AuthMode": ""},
        {"AuthMode": "jwt", "JwtIssuer": "i", "JwtAudience": "", "JwksUrl": "https://issuer.example"},
        {"AuthMode": "jwt", "JwtIssuer": "i", "JwtAudience": "a", "JwksUrl": ""},
    ],
    ids=str,
)
def test_missing_or_unsafe_setting_refuses_every_token(parameters: dict[str, str], issuer: Issuer) -> None:
    event = events.load("authorizer/stub") | {"authorizationToken": f"Bearer {signed(issuer)}"}
    app._verifier.cache_clear()
    with pytest.raises(SettingsError):
        call("AuthorizerFunction", event, parameters)
