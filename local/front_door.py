"""The front door of the local cloud: one address for the API, and the issuer's keys.

It passes each request on to the API's stage on the local AWS, whose own address has an id in it that changes with
each deployment, and answers `/.well-known/jwks.json` itself. What begins with `/public/` goes to the public log's API.
With `AUTH_MODE=stub` it adds the header that API Gateway asks for before it calls the authorizer at all.
"""

from __future__ import annotations

import http.client
import json
import re
import threading
import uuid
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

KEYS_PATH = "/.well-known/jwks.json"
PUBLIC = "/public/"
STUB_CREDENTIAL = "Bearer stub"
MAX_BODY_BYTES = 10 * 1024 * 1024  # API Gateway's own limit
UPSTREAM_TIMEOUT_SECONDS = 60
_LINE_BREAK = re.compile(r"%0[ad]", re.IGNORECASE)
LOOPBACK_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})
# Headers that belong to one connection and not to the request (RFC 9110, 7.6.1), or that this proxy sets itself.
_NOT_PASSED_ON = frozenset({
    "connection", "content-length", "date", "host", "keep-alive", "proxy-authenticate", "proxy-authorization", "server",
    "te", "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip


def upstream_headers(headers: Mapping[str, str], *, stub: bool) -> dict[str, str]:
    """Return the headers to pass on; in stub mode with a credential, if there is none.

    A page on another site can make a browser send requests here. Such a request says where it comes from (`Origin`),
    and gets no credential.
    """
    passed = {name: value for name, value in headers.items() if name.lower() not in _NOT_PASSED_ON}
    names = {name.lower(): value for name, value in headers.items()}
    origin = names.get("origin")
    if stub and "authorization" not in names and (origin is None or is_loopback(urlsplit(origin).netloc)):
        passed["Authorization"] = STUB_CREDENTIAL
    return passed


def is_loopback(netloc: str) -> bool:
    """Whether a `host` or `host:port` names this machine's loopback interface."""
    host = netloc if netloc.endswith("]") or ":" not in netloc else netloc.rpartition(":")[0]
    return host.lower() in LOOPBACK_NAMES


class FrontDoor:
    """An HTTP server on 127.0.0.1, in threads of this process.

    Parameters
    ----------
    port : int
        Where it listens.
    aws_port : int
        Where the local AWS listens.
    key_set : dict
        The JWKS document that it publishes.
    stub : bool
        Whether to add a credential to requests that have none.
    """

    def __init__(self, port: int, aws_port: int, key_set: dict[str, Any], *, stub: bool) -> None:
        self.api_id: str | None = None  # known once the template is deployed; until then the answer is 503
        self.log_api_id: str | None = None  # of the public log, if the stack has one
        handler = type("Handler", (_Handler,), {"door": self})
        self._aws_port = aws_port
        self._keys = json.dumps(key_set).encode()
        self._stub = stub
        self._server = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        """Answer one request: status, headers, body."""
        if not is_loopback(headers.get("Host", "")):
            # Another name that leads here (DNS rebinding) is somebody else's page talking to this server.
            return _problem(421, "This server answers to localhost only.")
        if urlsplit(path).path == KEYS_PATH:
            return 200, [("Content-Type", "application/json")], self._keys
        if _LINE_BREAK.search(urlsplit(path).path):
            # The local AWS takes the path for another resource than the policy names, and answers 403 in its own words.
            return _problem(400, "The path has a line break in it.")
        if self.api_id is None:
            return _problem(503, "The template is not deployed yet.")
        passed_on, api_id = upstream_headers(headers, stub=self._stub), self.api_id
        if path.startswith(PUBLIC) and self.log_api_id is not None:
            api_id, path = self.log_api_id, path[len(PUBLIC) - 1 :]
            # To AWS "*/*" as a binary type is also what a client takes who does not say so; to the local AWS it is not.
            if "accept" not in {name.lower() for name in passed_on}:
                passed_on["Accept"] = "*/*"
        connection = http.client.HTTPConnection("127.0.0.1", self._aws_port, timeout=UPSTREAM_TIMEOUT_SECONDS)
        try:
            connection.request(method, f"/_aws/execute-api/{api_id}/v1{path}", body=body or None, headers=passed_on)
            response = connection.getresponse()
            content = response.read()
        except (OSError, http.client.HTTPException) as error:
            return _problem(502, f"The local AWS did not answer: {error!r}.")
        finally:
            connection.close()
        passed = [(k, v) for k, v in response.getheaders() if k.lower() not in _NOT_PASSED_ON]
        if response.status >= 400:
            return as_on_aws(response.status, passed, content, path)
        return response.status, passed, content


def as_on_aws(
    status: int, headers: list[tuple[str, str]], content: bytes, path: str
) -> tuple[int, list[tuple[str, str]], bytes]:
    """Say an error as API Gateway does where the local AWS has words of its own."""
    if status == 429 and b"ConcurrentInvocationLimitExceeded" in content:
        # Its bound on processes (LAMBDA_CONCURRENCY), in the words of Lambda.
        problem = _problem(status, "The local AWS runs as many functions as it may: try again.")
        return status, [*problem[1], ("Retry-After", "1")], problem[2]
    # A variable of gateway responses that it does not know.
    return status, headers, content.replace(b"$context.path", json.dumps(f"/v1{urlsplit(path).path}")[1:-1].encode())


def _problem(status: int, detail: str) -> tuple[int, list[tuple[str, str]], bytes]:
    problem = {"type": "about:blank", "title": http.client.responses[status], "status": status, "detail": detail}
    problem |= {"instance": "", "correlation_id": str(uuid.uuid4())}
    return status, [("Content-Type", "application/problem+json")], json.dumps(problem).encode()


class _Handler(BaseHTTPRequestHandler):
    door: FrontDoor
    protocol_version = "HTTP/1.1"

    def _answer(self) -> None:
        length = self.headers.get("Content-Length", "0")
        if "Transfer-Encoding" in self.headers or not length.isdecimal():
            status, headers, content = _problem(411, "Send the body with a Content-Length.")
            self.close_connection = True
        elif int(length) > MAX_BODY_BYTES:
            status, headers, content = _problem(413, f"The body is longer than {MAX_BODY_BYTES} bytes.")
            self.close_connection = True
        else:
            body = self.rfile.read(int(length))
            status, headers, content = self.door.answer(self.command, self.path, dict(self.headers.items()), body)
        self.send_response(status)
        for name, value in headers:
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def __getattr__(self, name: str) -> Callable[[], None]:
        """`do_GET` and the like: which methods there are is for API Gateway to say."""
        if re.fullmatch("do_[A-Z]+", name):
            return self._answer
        raise AttributeError(name)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the base class names it so
        """Say nothing: API Gateway and the services log each request."""
