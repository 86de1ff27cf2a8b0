"""The front door passes requests on as they are, but for the credential that stub mode adds."""

from __future__ import annotations

import http.client
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from local.cloud import Ports
from local.front_door import (
    KEYS_PATH,
    MAX_BODY_BYTES,
    STUB_CREDENTIAL,
    FrontDoor,
    as_on_aws,
    is_loopback,
    upstream_headers,
)

pytestmark = pytest.mark.enable_socket


class Upstream(BaseHTTPRequestHandler):
    """Says what it was asked."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0)).decode()
        said = {"path": self.path, "body": body, "authorization": self.headers["Authorization"]}
        answer = json.dumps(said | {"accept": self.headers["Accept"]}).encode()
        self.send_response(202)
        self.send_header("X-Correlation-Id", "abc")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    do_GET = do_QUERY = do_POST

    def log_message(self, *args):
        pass


@pytest.fixture
def aws_port():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Upstream)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture(params=[False, True], ids=["jwt", "stub"])
def stub(request):
    return request.param


@pytest.fixture
def door(aws_port, stub):
    port = Ports.free().http
    with FrontDoor(port, aws_port, {"keys": ["a key"]}, stub=stub) as door:
        door.api_id = "api1"
        door.port = port
        yield door


def ask(door, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", door.port, timeout=10)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    content = json.loads(response.read())
    connection.close()
    return response, content


def test_a_request_reaches_the_stage(door, stub):
    response, said = ask(door, "POST", "/task/start?a=b%20c", "body")
    assert (response.status, response.headers["X-Correlation-Id"]) == (202, "abc")
    assert (said["path"], said["body"]) == ("/_aws/execute-api/api1/v1/task/start?a=b%20c", "body")
    assert said["authorization"] == (STUB_CREDENTIAL if stub else None)


def test_the_public_log_is_an_api_of_its_own_and_takes_who_says_nothing_for_one_who_takes_bytes(door):
    assert ask(door, "GET", "/public/log/checkpoint")[1]["path"] == "/_aws/execute-api/api1/v1/public/log/checkpoint"
    door.log_api_id = "log1"
    said = ask(door, "GET", "/public/log/checkpoint")[1]
    assert (said["path"], said["accept"]) == ("/_aws/execute-api/log1/v1/log/checkpoint", "*/*")
    assert ask(door, "GET", "/public/log/checkpoint", headers={"accept": "text/plain"})[1]["accept"] == "text/plain"
    said = ask(door, "GET", "/log/checkpoint")[1]
    assert (said["path"], said["accept"]) == ("/_aws/execute-api/api1/v1/log/checkpoint", None)


def test_a_token_is_passed_on_in_either_mode(door):
    assert ask(door, "GET", "/tasks", headers={"Authorization": "Bearer x"})[1]["authorization"] == "Bearer x"


def test_a_page_of_another_site_gets_no_credential(door):
    assert ask(door, "POST", "/task/start", headers={"Origin": "https://evil.example"})[1]["authorization"] is None


def test_another_name_for_this_machine_is_refused(door):
    assert ask(door, "GET", "/health", headers={"Host": "evil.example:8000"})[0].status == 421


def test_the_keys_are_published(door):
    assert ask(door, "GET", KEYS_PATH)[1] == {"keys": ["a key"]}


def test_before_the_deployment_it_says_so(door):
    door.api_id = None
    assert ask(door, "GET", "/health")[0].status == 503


def test_a_local_aws_that_is_gone_is_a_bad_gateway(door):
    door._aws_port = Ports.free().aws
    assert ask(door, "GET", "/health")[0].status == 502


@pytest.mark.parametrize(
    ("headers", "status"),
    [({"Content-Length": str(MAX_BODY_BYTES + 1)}, 413), ({"Transfer-Encoding": "chunked"}, 411)],
)
def test_a_body_that_api_gateway_would_refuse(door, headers, status):
    assert ask(door, "POST", "/task/start", headers=headers)[0].status == status


def test_stub_leaves_a_lower_case_header_alone():
    assert upstream_headers({"authorization": "Bearer x", "host": "localhost"}, stub=True) == {
        "authorization": "Bearer x"
    }


def test_stub_serves_a_page_of_this_machine():
    assert upstream_headers({"Origin": "http://localhost:3000"}, stub=True)["Authorization"] == STUB_CREDENTIAL


@pytest.mark.parametrize(
    ("netloc", "expected"),
    [
        ("localhost:8000", True),
        ("127.0.0.1", True),
        ("[::1]:8000", True),
        ("LOCALHOST", True),
        ("", False),
        ("localhost.evil.example", False),
    ],
)
def test_which_names_are_this_machine(netloc, expected):
    assert is_loopback(netloc) is expected


@pytest.mark.parametrize("stub", [False], indirect=True)
def test_which_methods_there_are_is_for_the_api_to_say(door):
    connection = http.client.HTTPConnection("127.0.0.1", door.port)
    connection.request("QUERY", "/tasks", b"x")
    assert connection.getresponse().status == 202
    connection.close()


@pytest.mark.parametrize("stub", [False], indirect=True)
def test_a_line_break_is_refused_in_a_path_and_passed_on_in_a_query(door):
    assert door.answer("GET", "/policy%0Ax", {"Host": "localhost"}, b"")[0] == 400
    status, _, content = door.answer("GET", "/policy?action_type=%0A", {"Host": "localhost"}, b"")
    assert (status, json.loads(content)["path"].rpartition("/v1")[2]) == (202, "/policy?action_type=%0A")


def test_errors_of_the_local_aws_are_said_as_on_aws():
    assert as_on_aws(404, [("A", "b")], b'{"instance": "$context.path"}', '/a"b?c') == (
        404, [("A", "b")], b'{"instance": "/v1/a\\"b"}',
    )  # fmt: skip
    status, headers, content = as_on_aws(
        429, [], b'{"__type": "TooManyRequestsException", "Reason": "ConcurrentInvocationLimitExceeded"}', "/tasks"
    )
    assert (status, dict(headers)["Retry-After"], dict(headers)["Content-Type"]) == (
        429, "1", "application/problem+json",
    )  # fmt: skip
    assert json.loads(content)["status"] == 429
