"""The local proxy forwards requests of any client unchanged, and adds stub mode's credential."""

from __future__ import annotations

import http.client
import json
import logging
import re
import shutil
import socket
import subprocess
import threading
import time
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest

from local.environment import LocalCloudError, Ports
from local.proxy import (
    KEYS_PATH,
    MAX_BODY_BYTES,
    STUB_CREDENTIAL,
    Proxy,
    as_on_aws,
    is_loopback,
)

pytestmark = pytest.mark.enable_socket

NODE, CURL = shutil.which("node"), shutil.which("curl")


class Upstream(BaseHTTPRequestHandler):
    """Echoes each request."""

    reached, release = threading.Event(), threading.Event()

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        received = {
            "method": self.command,
            "path": self.path,
            "body": body[:100].decode("latin-1"),
            "length": len(body),
            "headers": self.headers.items(),
            "authorization": self.headers["Authorization"],
            "accept": self.headers["Accept"],
        }
        if "never" in self.path:
            self.reached.set()
            self.release.wait(30)
            return
        if "slow" in self.path:
            time.sleep(0.3)
        answer = json.dumps(received).encode()
        self.send_response(202)
        self.send_header("X-Correlation-Id", "abc")
        self.send_header("Set-Cookie", "a=1")
        self.send_header("Set-Cookie", "b=2")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    do_GET = do_HEAD = do_QUERY = do_POST

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


@pytest.fixture
def start(aws_port):
    """Start a proxy in jwt or stub mode; every one of them has to stop in the end."""
    started = []

    def start(*, stub=False, cors_origin="", port=None):
        proxy = Proxy(Ports.free().http, port or aws_port, {"keys": ["a key"]}, stub=stub, cors_origin=cors_origin)
        proxy.api_id = "api1"
        started.append(proxy.__enter__())
        return proxy

    yield start
    for proxy in started:
        proxy.__exit__(None, None, None)
        assert not proxy._thread.is_alive()


@pytest.fixture
def proxy(start):
    return start()


def ask(proxy, method, path, body=None, headers=None):
    connection = http.client.HTTPConnection("127.0.0.1", proxy._port, timeout=10)
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, json.loads(content) if content else None


def raw(proxy, request):
    """Send bytes, and return all that comes until the proxy closes the connection."""
    with socket.create_connection(("127.0.0.1", proxy._port), timeout=10) as connection:
        connection.sendall(request)
        return b"".join(iter(lambda: connection.recv(65536), b""))


# Forwarded requests


@pytest.mark.parametrize("stub", [False, True], ids=["jwt", "stub"])
def test_request_reaches_the_stage(start, stub):
    response, received = ask(start(stub=stub), "POST", "/task/start?a=b%20c", "body")
    assert (response.status, response.headers["X-Correlation-Id"]) == (202, "abc")
    assert (received["path"], received["body"]) == ("/_aws/execute-api/api1/v1/task/start?a=b%20c", "body")
    assert received["authorization"] == (STUB_CREDENTIAL if stub else None)


@pytest.mark.parametrize("name", ["Authorization", "authorization", "AUTHORIZATION"])
@pytest.mark.parametrize("stub", [False, True], ids=["jwt", "stub"])
def test_token_is_forwarded_however_its_name_is_written(start, stub, name):
    assert ask(start(stub=stub), "GET", "/tasks", headers={name: "Bearer x"})[1]["authorization"] == "Bearer x"


@pytest.mark.parametrize(
    "path",
    ["/task/%2e%2e/x", "/a//b", "/t%C3%A4sk", "/a?q=%0A&q=%2F&empty=", "/a?b=a%26b", "/a;b=1/'!*"],
)
def test_target_is_forwarded_as_it_was_written(proxy, path):
    assert ask(proxy, "GET", path)[1]["path"] == f"/_aws/execute-api/api1/v1{path}"


def test_headers_of_a_connection_are_not_forwarded(proxy):
    sent = {"Connection": "keep-alive", "Keep-Alive": "timeout=5", "TE": "trailers", "X-Mine": "kept", "Expect": ""}
    received = {name.lower(): value for name, value in ask(proxy, "GET", "/tasks", headers=sent)[1]["headers"]}
    assert received["x-mine"] == "kept"
    assert not {"keep-alive", "te", "expect", "upgrade"} & received.keys()


def test_repeated_response_headers_are_kept(proxy):
    assert ask(proxy, "GET", "/tasks")[0].headers.get_all("Set-Cookie") == ["a=1", "b=2"]


@pytest.mark.parametrize("method", ["QUERY", "HEAD"])
def test_every_method_is_forwarded(proxy, method):
    assert ask(proxy, method, "/tasks")[0].status == 202


def test_public_log_has_a_separate_api(proxy):
    assert ask(proxy, "GET", "/public/log/checkpoint")[1]["path"] == "/_aws/execute-api/api1/v1/public/log/checkpoint"
    proxy.log_api_id = "log1"
    received = ask(proxy, "GET", "/public/log/checkpoint")[1]
    assert (received["path"], received["accept"]) == ("/_aws/execute-api/log1/v1/log/checkpoint", "*/*")
    assert ask(proxy, "GET", "/public/log/checkpoint", headers={"accept": "text/plain"})[1]["accept"] == "text/plain"
    received = ask(proxy, "GET", "/log/checkpoint")[1]
    assert (received["path"], received["accept"]) == ("/_aws/execute-api/api1/v1/log/checkpoint", None)


# Clients


@pytest.mark.skipif(NODE is None, reason="Node is not installed")
def test_node_fetch_is_answered(proxy):
    program = """
      const url = process.argv[1];
      const stream = new ReadableStream({ start(c) { c.enqueue(new TextEncoder().encode("chunked")); c.close(); } });
      const show = async (answer) => [answer.status, (await answer.json()).body];
      Promise.all([
        fetch(url + "/health").then(show),
        fetch(url + "/task/start", { method: "POST", body: "text" }).then(show),
        fetch(url + "/task/start", { method: "POST", body: stream, duplex: "half" }).then(show),
      ]).then((answers) => console.log(JSON.stringify(answers)));
    """
    done = subprocess.run(
        [NODE, "-e", program, f"http://localhost:{proxy._port}"], capture_output=True, text=True, timeout=60, check=True
    )
    assert json.loads(done.stdout) == [[202, ""], [202, "text"], [202, "chunked"]]


@pytest.mark.skipif(CURL is None, reason="curl is not installed")
def test_curl_is_answered(proxy, tmp_path):
    large = tmp_path / "large"
    large.write_bytes(b"x" * 2_000_000)  # curl waits for "100 Continue" before it sends so much

    def curl(*arguments):
        command = [CURL, "-s", "-w", "\n%{http_code}", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        content, _, status = done.stdout.rpartition("\n")
        return int(status), json.loads(content)

    url = f"http://localhost:{proxy._port}"
    assert curl(f"{url}/health")[0] == 202
    assert curl("--http2", f"{url}/health")[0] == 202
    assert curl("-6", "-g", f"http://[::1]:{proxy._port}/health")[0] == 202 if has_ipv6() else True
    assert curl("-T", str(large), "-X", "POST", f"{url}/task/start")[1]["length"] == 2_000_000
    chunked = curl("-H", "Transfer-Encoding: chunked", "-d", "parts", f"{url}/task/start")[1]
    assert (chunked["body"], chunked["length"]) == ("parts", 5)


def has_ipv6():
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def test_python_clients_are_answered(proxy):
    url = f"http://localhost:{proxy._port}/tasks"
    with urllib.request.urlopen(url, timeout=10) as answer:
        assert answer.status == 202
    assert httpx.post(url, content=iter([b"in ", b"chunks"])).json()["body"] == "in chunks"
    with httpx.Client(http1=True) as client:
        assert [client.get(url).status_code for _ in range(3)] == [202] * 3


def test_connection_is_kept_open_between_requests(proxy):
    connection = http.client.HTTPConnection("127.0.0.1", proxy._port, timeout=10)
    connection.connect()
    used = connection.sock
    for number in range(3):
        connection.request("POST", "/task/start", str(number))
        assert json.loads(connection.getresponse().read())["body"] == str(number)
        assert connection.sock is used
    connection.close()


def test_lower_case_headers_are_read(proxy):
    answer = raw(proxy, b"GET /tasks HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 202")


def test_vanished_clients_leave_no_traceback(proxy, capfd, caplog):
    for request in (
        b"GET /slow HTTP/1.1\r\nHost: localhost\r\n\r\n",  # gone before the answer
        b"POST /task/start HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\nten bytes.",  # in the body
        b"POST /task/start HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab",
        b"GET /tasks HTTP/1.1\r\nHo",
        b"",
    ):
        connection = socket.create_connection(("127.0.0.1", proxy._port), timeout=10)
        connection.sendall(request)
        # SO_LINGER 0: the connection is reset, as that of a process that was killed
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        connection.close()
    time.sleep(0.6)  # the slow answer comes after its client has gone
    assert ask(proxy, "GET", "/tasks")[0].status == 202
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err + caplog.text
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]


def test_proxy_stops_without_a_traceback_when_requests_are_open(aws_port, capfd, caplog):
    with Proxy(Ports.free().http, aws_port, {}, stub=False) as proxy:
        proxy.api_id = "api1"
        connection = socket.create_connection(("127.0.0.1", proxy._port), timeout=10)
        connection.sendall(b"GET /never HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert Upstream.reached.wait(10)
    assert not proxy._thread.is_alive()
    Upstream.release.set()
    connection.close()
    captured = capfd.readouterr()
    assert "Traceback" not in captured.out + captured.err + caplog.text


# Rejected requests


def test_other_host_name_is_refused(proxy):
    for name in ("Host", "host"):
        assert ask(proxy, "GET", "/health", headers={name: "evil.example:8000"})[0].status == 421
    assert raw(proxy, b"GET /tasks HTTP/1.0\r\nConnection: close\r\n\r\n").startswith(b"HTTP/1.1 421")


@pytest.mark.parametrize("stub", [False, True], ids=["jwt", "stub"])
@pytest.mark.parametrize("origin", ["https://evil.example", "null", "https://localhost.evil.example", ""])
def test_page_of_another_origin_is_refused(start, stub, origin):
    response, body = ask(start(stub=stub), "POST", "/task/start", headers={"origin": origin})
    assert (response.status, response.headers["Content-Type"]) == (403, "application/problem+json")
    assert "CorsAllowOrigin" in body["detail"]


@pytest.mark.parametrize(
    ("cors_origin", "origin"),
    [
        ("", "http://localhost:3000"),
        ("", "http://127.0.0.1"),
        ("https://a.example", "https://a.example"),
        ("*", "https://b.example"),
    ],
)
def test_page_of_an_allowed_origin_is_served(start, cors_origin, origin):
    received = ask(start(stub=True, cors_origin=cors_origin), "GET", "/tasks", headers={"Origin": origin})[1]
    assert received["authorization"] == STUB_CREDENTIAL


def test_line_break_is_refused_in_a_path(proxy):
    assert ask(proxy, "GET", "/policy%0Ax")[0].status == 400


@pytest.mark.parametrize("target", [b"*", b"http://localhost/tasks", b"tasks"])
def test_malformed_target_is_refused(proxy, target):
    answer = raw(proxy, b"OPTIONS %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n" % target)
    assert answer.startswith(b"HTTP/1.1 400")


@pytest.mark.parametrize("chunked", [False, True], ids=["content-length", "chunked"])
@pytest.mark.parametrize(("length", "status"), [(MAX_BODY_BYTES, 202), (MAX_BODY_BYTES + 1, 413)])
def test_body_is_refused_where_api_gateway_refuses_it(proxy, chunked, length, status):
    body = iter([b"x" * (length // 2), b"x" * (length - length // 2)]) if chunked else b"x" * length
    answer = httpx.post(f"http://localhost:{proxy._port}/task/start", content=body, timeout=30)
    assert answer.status_code == status
    if status == 202:
        assert answer.json()["length"] == length


def test_proxy_answers_503_before_the_deployment(proxy):
    proxy.api_id = None
    response, _ = ask(proxy, "GET", "/health")
    assert (response.status, response.headers["Retry-After"]) == (503, "5")


def test_proxy_answers_502_when_the_local_aws_is_gone(start):
    assert ask(start(port=Ports.free().aws), "GET", "/health")[0].status == 502


def test_taken_port_is_an_error_when_the_proxy_starts(proxy, aws_port):
    with pytest.raises(OSError, match="in use"), Proxy(proxy._port, aws_port, {}, stub=False):
        pass


def test_keys_are_published(proxy):
    assert ask(proxy, "GET", f"{KEYS_PATH}?a=b")[1] == {"keys": ["a key"]}


# Details


@pytest.mark.parametrize(
    ("netloc", "expected"),
    [
        ("localhost:8000", True),
        ("127.0.0.1", True),
        ("[::1]:8000", True),
        ("LOCALHOST", True),
        ("", False),
        ("localhost.evil.example", False),
        ("localhost:8000@evil.example", False),
    ],
)
def test_is_loopback_accepts_local_names(netloc, expected):
    assert is_loopback(netloc) is expected


def test_errors_of_the_local_aws_read_as_on_aws():
    answer = as_on_aws(404, [("A", "b")], b'{"instance": "$context.path"}', '/a"b')
    assert (answer.status_code, answer.headers["a"], answer.body) == (404, "b", b'{"instance": "/v1/a\\"b"}')
    busy = b'{"__type": "TooManyRequestsException", "Reason": "ConcurrentInvocationLimitExceeded"}'
    answer = as_on_aws(429, [], busy, "/tasks")
    assert (answer.status_code, answer.headers["retry-after"]) == (429, "1")
    assert answer.headers["content-type"] == "application/problem+json"
    assert json.loads(answer.body)["status"] == 429


def test_equal_ports_are_refused_with_a_clear_error():
    with pytest.raises(LocalCloudError, match=re.escape("QAES_HTTP_PORT and QAES_PORT are both 9000")):
        Ports.from_environment({"QAES_HTTP_PORT": "9000", "QAES_PORT": "9000"}).check()
