"""Calls of handlers through Lambda's API and HTTPS, over real connections, and the credentials that go with them."""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Callable
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dispatcher import handlers
from dispatcher.contract import ActionRequest, Outcome
from dispatcher.credentials import Basic, Bearer, Credential, Credentials, Header, OAuth2
from dispatcher.egress import Egress
from dispatcher.handlers import Caller, HttpsHandler, LambdaHandler, lambda_client_of, terms_of
from dispatcher.signatures import Signer
from qaes.domain.errors import InvalidInputError
from tests.dispatcher.test_contract import TERMS, request
from tests.support.tls import Script, Server, answers, json_answer, serve

pytestmark = pytest.mark.enable_socket

DONE = json_answer(b'{"status":"done","result":{"refund_id":"r-1"}}')
REQUEST: ActionRequest = request()


def caller(egress: Egress | None = None) -> Caller:
    return Caller(egress or Egress(allow_local=True), Signer(Ed25519PrivateKey.generate()))


# HTTPS


def call(server: Server, credential: Credential | None = None, *, seconds: int = 5) -> Outcome:
    handler = HttpsHandler(f"http://127.0.0.1:{server.port}/refund", credential)
    return caller().call(handler, REQUEST, TERMS, timeout_seconds=seconds)


def headers_of(request: bytes) -> dict[str, str]:
    lines = request.partition(b"\r\n\r\n")[0].decode().split("\r\n")[1:]
    return {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def test_https_call_sends_a_signed_request_and_returns_done() -> None:
    with serve(answers(DONE)) as server:
        outcome = call(server)
    assert (outcome.kind, outcome.result) == ("done", {"refund_id": "r-1"})
    assert server.requests[0].partition(b"\r\n\r\n")[2] == REQUEST.body()
    headers = headers_of(server.requests[0])
    assert headers["idempotency-key"] == REQUEST.reference
    assert headers["content-type"] == "application/json"
    assert {"signature", "signature-input", "content-digest"} <= set(headers)
    assert "authorization" not in headers


def test_https_call_is_not_sent_when_the_url_is_refused() -> None:
    for url in ("https://10.0.0.1/", "http://example.com/", "https://user:pw@example.com/"):
        assert caller().call(HttpsHandler(url), REQUEST, TERMS, timeout_seconds=5).kind == "not_sent"


def test_https_call_is_sent_once_when_its_answer_is_lost() -> None:
    with serve(answers(b"")) as server:
        assert call(server).kind == "unknown"
        time.sleep(0.1)
        assert server.connections == 1


def test_https_call_ends_at_the_action_s_timeout() -> None:
    with serve(lambda connection, request: time.sleep(3)) as server:
        begin = time.monotonic()
        assert call(server, seconds=1).kind == "unknown"
        assert time.monotonic() - begin < 2.5


def test_two_answers_count_as_the_first() -> None:
    with serve(answers(DONE + json_answer(b'{"status":"refused"}', "422 No"))) as server:
        assert call(server).kind == "done"


# Credentials


@pytest.mark.parametrize(
    ("credential", "name", "value"),
    [
        (Bearer("t0ken"), "authorization", "Bearer t0ken"),
        (Basic("user", "pä:ss"), "authorization", "Basic " + base64.b64encode("user:pä:ss".encode()).decode()),
        (Header("X-Api-Key", "k 1"), "x-api-key", "k 1"),
    ],
)
def test_credential_is_sent_beside_the_signature(credential: Credential, name: str, value: str) -> None:
    with serve(answers(DONE)) as server:
        assert call(server, credential).kind == "done"
    assert headers_of(server.requests[0])[name] == value
    assert "signature" in headers_of(server.requests[0])


@pytest.mark.parametrize(
    "credential",
    [
        Bearer("a\r\nX: b"),
        Bearer(""),
        Bearer("é"),
        Basic("a:b", "c"),
        Header("X-Key", "a\nb"),
        Header("X Key", "a"),
        *(
            Header(name, "a")
            for name in ("Host", "Content-Length", "signature", "Idempotency-Key", "Transfer-Encoding")
        ),
    ],
)
def test_credential_that_fits_no_header_sends_nothing(credential: Credential) -> None:
    with serve(answers(DONE)) as server:
        outcome = call(server, credential)
    assert outcome.kind == "not_sent"
    assert server.connections == 0


def test_secrets_are_not_in_texts() -> None:
    for credential in (Bearer("s3cr3t"), Basic("u", "s3cr3t"), Header("X", "s3cr3t"), OAuth2("u", "i", "s3cr3t")):
        assert "s3cr3t" not in repr(HttpsHandler("https://a.example/", credential))


def issuer(token: bytes) -> Script:
    return answers(json_answer(token))


def test_oauth2_token_is_kept_until_it_expires() -> None:
    now = 0.0
    with serve(issuer(b'{"access_token":"t1","token_type":"Bearer","expires_in":100}')) as server:
        credentials = Credentials(Egress(allow_local=True), clock=lambda: now)
        credential = OAuth2(f"http://127.0.0.1:{server.port}/token", "id:1", "s e", "pay")
        expected = [("Authorization", "Bearer t1")]
        assert credentials.headers(credential, seconds=5) == expected
        now = 69.0
        assert credentials.headers(credential, seconds=5) == expected
        assert server.connections == 1
        now = 70.0
        credentials.headers(credential, seconds=5)
        assert server.connections == 2
        credentials.forget(credential)
        credentials.headers(credential, seconds=5)
        assert server.connections == 3
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    assert body == b"grant_type=client_credentials&scope=pay"
    assert headers_of(head)["authorization"] == "Basic " + base64.b64encode(b"id%3A1:s+e").decode()


@pytest.mark.parametrize(
    "answer",
    [
        json_answer(b'{"error":"invalid_client"}', "401 No"),
        json_answer(b"{}"),
        json_answer(b'{"access_token":"a b","token_type":"Bearer"}'),
        json_answer(b'{"access_token":"t","token_type":"mac"}'),
        json_answer(b'{"access_token":"t","token_type":"Bearer","expires_in":-5}'),
        json_answer(b"", "302 Found", "Location: http://127.0.0.1/"),
        b"",
    ],
)
def test_oauth2_without_a_token_sends_nothing_to_the_handler(answer: bytes) -> None:
    with serve(answers(answer)) as server, serve(answers(DONE)) as handler:
        outcome = call(handler, OAuth2(f"http://127.0.0.1:{server.port}/token", "id", "secret"))
    assert outcome.kind == "not_sent"
    assert handler.connections == 0


def test_oauth2_issuer_is_under_the_egress_rules() -> None:
    with serve(answers(DONE)) as handler:
        assert call(handler, OAuth2("https://169.254.169.254/token", "id", "secret")).kind == "not_sent"
    assert handler.connections == 0


def test_oauth2_token_is_replaced_after_401() -> None:
    with serve(issuer(b'{"access_token":"t","token_type":"Bearer"}')) as server:
        with serve(answers(json_answer(b"", "401 No"))) as handler:
            both = HttpsHandler(
                f"http://127.0.0.1:{handler.port}/", OAuth2(f"http://127.0.0.1:{server.port}/", "id", "secret")
            )
            one = caller()
            assert [one.call(both, REQUEST, TERMS, timeout_seconds=5).kind for _ in range(2)] == ["unknown"] * 2
        assert server.connections == 2


# Lambda


@pytest.fixture
def invoke(monkeypatch: pytest.MonkeyPatch) -> Callable[[Script], tuple[Outcome, Server]]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")

    def run(script: Script, *, seconds: int = 5) -> tuple[Outcome, Server]:
        with serve(script) as server:
            monkeypatch.setenv("AWS_ENDPOINT_URL_LAMBDA", f"http://127.0.0.1:{server.port}")
            handlers._lambda_client.cache_clear()
            outcome = caller().call(LambdaHandler("qaes-action-refund"), REQUEST, TERMS, timeout_seconds=seconds)
            time.sleep(0.05)
            return outcome, server

    return run


def aws_error(code: str, status: str) -> bytes:
    return json_answer(json.dumps({"Message": "no"}).encode(), status, f"x-amzn-ErrorType: {code}")


LAMBDA_ANSWERS: dict[str, tuple[bytes, str]] = {
    "done": (DONE, "done"),
    "refused": (json_answer(b'{"status":"refused","error":{"code":"late","message":"late"}}'), "refused"),
    "conflict": (json_answer(b'{"status":"conflict"}'), "conflict"),
    "busy": (json_answer(b'{"status":"busy","retry_after":3}'), "busy"),
    "accepted": (json_answer(b'{"status":"accepted"}'), "unknown"),
    "raises": (json_answer(b'{"errorType":"KeyError"}', "200 OK", "X-Amz-Function-Error: Unhandled"), "unknown"),
    "raises, with an answer": (json_answer(DONE[-40:], "200 OK", "X-Amz-Function-Error: Unhandled"), "unknown"),
    "no answer": (json_answer(b"null"), "unknown"),
    "too large": (json_answer(b'"' + b"x" * (1024 * 1024 + 1) + b'"'), "unknown"),
    "throttled": (aws_error("TooManyRequestsException", "429 Too Many"), "not_sent"),
    "no such function": (aws_error("ResourceNotFoundException", "404 Not Found"), "not_sent"),
    "not allowed": (aws_error("AccessDeniedException", "403 Forbidden"), "not_sent"),
    "failure of Lambda": (aws_error("ServiceException", "500 Error"), "unknown"),
    "bad gateway": (json_answer(b"<html>", "502 Bad Gateway"), "unknown"),
    "half an answer": (b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{", "unknown"),
    "reset": (b"", "unknown"),
}


@pytest.mark.parametrize("case", LAMBDA_ANSWERS)
def test_lambda_is_invoked_once_and_its_answer_classified(invoke: Any, case: str) -> None:
    data, kind = LAMBDA_ANSWERS[case]
    outcome, server = invoke(answers(data))
    assert outcome.kind == kind, outcome
    assert server.connections == 1
    assert json.loads(server.requests[0].partition(b"\r\n\r\n")[2]) == json.loads(REQUEST.body())


def test_lambda_that_hangs_is_unknown_and_invoked_once(invoke: Any) -> None:
    outcome, server = invoke(lambda connection, request: time.sleep(2.5), seconds=1)
    assert outcome.kind == "unknown"
    assert server.connections == 1


def test_lambda_that_cannot_be_reached_is_not_sent(monkeypatch: pytest.MonkeyPatch, invoke: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setenv("AWS_ENDPOINT_URL_LAMBDA", f"http://127.0.0.1:{port}")
    handlers._lambda_client.cache_clear()
    outcome = caller().call(LambdaHandler("qaes-action-refund"), REQUEST, TERMS, timeout_seconds=5)
    assert outcome.kind == "not_sent"


def test_lambda_client_sends_each_request_once(invoke: Any) -> None:
    handlers._lambda_client.cache_clear()
    config = lambda_client_of(7).meta.config
    assert (config.read_timeout, config.retries["total_max_attempts"]) == (7, 1)


# Schemas


def test_schema_is_refused_when_no_policy_can_contain_it() -> None:
    for schema in ({"type": "strin"}, {"$ref": "https://example.com/schema.json"}, {"type": "string", "pattern": "("}):
        with pytest.raises(InvalidInputError) as caught:
            terms_of(schema)
        assert str(caught.value.field).startswith("result")


def test_action_without_a_result_schema_accepts_any_result() -> None:
    assert terms_of(None).flaw_of_result({"any": "thing"}) is None


def test_catastrophic_pattern_takes_linear_time() -> None:
    terms = terms_of({"type": "object", "properties": {"a": {"type": "string", "pattern": "^(a+)+$"}}})
    begin = time.monotonic()
    assert terms.flaw_of_result({"a": "a" * 100_000 + "b"}) is not None
    assert time.monotonic() - begin < 2
