"""The local proxy: one address for the API and the issuer's keys.

The proxy forwards each request to the API's stage on the local AWS, whose own address contains an id that changes with
each deployment. It answers `/.well-known/jwks.json` itself, and forwards `/public/…` to the public log's API. With
`AUTH_MODE=stub` it adds the header without which API Gateway does not call the authorizer. Like API Gateway, it reads
a whole request before it forwards it, and a whole response before it returns it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
import threading
import uuid
from collections.abc import Iterable
from http import HTTPStatus
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast
from urllib.parse import urlsplit

import httpx
from hypercorn.asyncio import serve
from hypercorn.config import Config
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

if TYPE_CHECKING:
    from hypercorn.typing import Framework

KEYS_PATH = "/.well-known/jwks.json"
PUBLIC = "/public/"
STUB_CREDENTIAL = "Bearer stub"
MAX_BODY_BYTES = 10 * 1024 * 1024  # API Gateway's own limit
MAX_DISCARDED_BYTES = 10 * MAX_BODY_BYTES
"""Maximum length to read of a body that is too large, so that clients that send before they read receive the 413."""

UPSTREAM_TIMEOUT_SECONDS = 60
IDLE_TIMEOUT_SECONDS = 120  # of a client's open connection
STOP_TIMEOUT_SECONDS = 2
_LOOPBACK = re.compile(r"(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?", re.IGNORECASE)
_LINE_BREAK = re.compile(rb"%0[ad]", re.IGNORECASE)
# Headers of one connection, not of the request (RFC 9110, 7.6.1), and headers that the proxy sets itself.
_NOT_FORWARDED = frozenset({
    "connection", "content-length", "date", "expect", "host", "http2-settings", "keep-alive", "proxy-authenticate",
    "proxy-authorization", "proxy-connection", "server", "te", "trailer", "transfer-encoding", "upgrade",
})  # fmt: skip
HeaderList = list[tuple[str, str]]


class BodyTooLargeError(Exception):
    """The request's body is larger than API Gateway accepts."""


def is_loopback(netloc: str) -> bool:
    """Return whether a `host` or `host:port` is this machine's loopback interface."""
    return _LOOPBACK.fullmatch(netloc) is not None


def forwarded(headers: Iterable[tuple[str, str]]) -> HeaderList:
    """Return the headers of the request itself, in order, including repeated headers."""
    return [(name, value) for name, value in headers if name.lower() not in _NOT_FORWARDED]


class Proxy:
    """An HTTP server on the loopback interface, in a thread of this process.

    Parameters
    ----------
    port : int
        Port of the proxy.
    aws_port : int
        Port of the local AWS.
    key_set : dict
        The JWKS document to publish.
    stub : bool
        Whether to add a credential to requests without one.
    cors_origin : str
        Origin of pages that can call the API, in addition to pages of this machine; `*` allows every origin.
    """

    def __init__(self, port: int, aws_port: int, key_set: dict[str, Any], *, stub: bool, cors_origin: str = "") -> None:
        self.api_id: str | None = None  # set once the template is deployed; until then the response is 503
        self.log_api_id: str | None = None  # API of the public log, if the stack has it
        self._port = port
        self._aws_port = aws_port
        self._keys = json.dumps(key_set).encode()
        self._stub = stub
        self._cors_origin = cors_origin
        self._stopping = asyncio.Event()
        self._transport: httpx.AsyncHTTPTransport

    def __enter__(self) -> Self:
        self._sockets = listen(self._port)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)
        self._thread.join(STOP_TIMEOUT_SECONDS)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._serve())

    def _on_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Report errors, except the loss of a connection that is open at the end."""
        if not (self._stopping.is_set() and isinstance(context.get("exception"), asyncio.CancelledError)):
            loop.default_exception_handler(context)

    async def _serve(self) -> None:
        self._loop.set_exception_handler(self._on_error)
        config = Config()
        config.bind = [f"fd://{listener.detach()}" for listener in self._sockets]
        config.loglevel = "WARNING"
        config.include_server_header = False
        config.keep_alive_timeout = IDLE_TIMEOUT_SECONDS
        config.graceful_timeout = STOP_TIMEOUT_SECONDS / 4
        # A new connection for each request: the local AWS may close an idle connection at the moment of its reuse.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncHTTPTransport(limits=limits) as self._transport:
            await serve(cast("Framework", self), config, shutdown_trigger=self._stopping.wait)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request, as an ASGI application."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})  # the API has no WebSocket
        if scope["type"] != "http":
            return
        request = Request(scope, receive)
        try:
            response = self._own_answer(request) or await self._forward(request)
        except ClientDisconnect:
            return
        await response(scope, receive, send)

    def _own_answer(self, request: Request) -> Response | None:
        """Return the proxy's own response to a request that it does not forward."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        path: bytes = request.scope["raw_path"]
        if not is_loopback(host):
            # Another host name that leads here (DNS rebinding) means that another site's page calls this server.
            return problem(421, "This server accepts requests for localhost only.")
        if origin is not None and not self._is_allowed(origin):
            return problem(403, "Pages of this origin cannot call the API. Set CorsAllowOrigin to allow the origin.")
        if not path.startswith(b"/"):
            return problem(400, "The request target must be a path.")
        if path == KEYS_PATH.encode():
            return Response(self._keys, media_type="application/json")
        if _LINE_BREAK.search(path):
            # The local AWS would match another resource than the policy, and return its own 403.
            return problem(400, "The path contains a line break.")
        if self.api_id is None:
            return problem(503, "The template is not deployed yet.", [("Retry-After", "5")])
        return None

    def _is_allowed(self, origin: str) -> bool:
        allowed = self._cors_origin == "*" or (bool(origin) and origin == self._cors_origin)
        return allowed or is_loopback(urlsplit(origin).netloc)

    async def _forward(self, request: Request) -> Response:
        """Send the request to the API's stage, and return its response."""
        path, query = request.scope["raw_path"], request.scope["query_string"]
        headers, api_id = forwarded(request.headers.items()), self.api_id
        if self._stub and "authorization" not in request.headers:
            headers.append(("Authorization", STUB_CREDENTIAL))
        if path.startswith(PUBLIC.encode()) and self.log_api_id is not None:
            api_id, path = self.log_api_id, path[len(PUBLIC) - 1 :]
            # On AWS, the binary type "*/*" also matches clients without an Accept header; here it does not.
            if "accept" not in request.headers:
                headers.append(("Accept", "*/*"))
        try:
            body = await read_body(request)
        except BodyTooLargeError:
            return problem(413, f"The body is larger than {MAX_BODY_BYTES} bytes.", [("Connection", "close")])
        target = b"/_aws/execute-api/%s/v1%s" % (str(api_id).encode(), path + (b"?" + query if query else b""))
        upstream = httpx.Request(
            request.method,
            f"http://127.0.0.1:{self._aws_port}/",
            headers=headers,
            content=body or None,
            # Forward the URL exactly as received: a URL object would normalise its escapes.
            extensions={
                "target": target,
                "timeout": dict.fromkeys(("connect", "read", "write", "pool"), UPSTREAM_TIMEOUT_SECONDS),
            },
        )
        try:
            response = await self._transport.handle_async_request(upstream)
            content = b"".join([part async for part in response.aiter_raw()])
        except httpx.TransportError as error:
            return problem(502, f"The local AWS did not respond: {type(error).__name__}.")
        answer = as_on_aws(
            response.status_code, forwarded(response.headers.multi_items()), content, path.decode("latin-1")
        )
        if request.method == "HEAD":
            del answer.headers["content-length"]  # the length of GET's body is unknown
        return answer


def listen(port: int) -> list[socket.socket]:
    """Listen on all addresses of `localhost`: 127.0.0.1, and ::1 if this machine has it."""
    sockets = [socket.create_server(("127.0.0.1", port))]
    if socket.has_ipv6:
        # Skip a missing IPv6 loopback address; `Ports.check` has checked that the port is free.
        with contextlib.suppress(OSError):
            sockets.append(socket.create_server(("::1", port), family=socket.AF_INET6))
    return sockets


async def read_body(request: Request) -> bytes:
    """Read a request's body, with or without a Content-Length.

    Raises
    ------
    BodyTooLargeError
        It is larger than `MAX_BODY_BYTES`. The rest of the body is read up to `MAX_DISCARDED_BYTES`.
    """
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        size += len(part)
        if size <= MAX_BODY_BYTES:
            parts.append(part)
        else:
            parts.clear()
        if size > MAX_DISCARDED_BYTES:
            break
    if size > MAX_BODY_BYTES:
        raise BodyTooLargeError
    return b"".join(parts)


def as_on_aws(status: int, headers: HeaderList, content: bytes, path: str) -> Response:
    """Return the local AWS's response, with API Gateway's text for errors whose text differs."""
    if status == 429 and b"ConcurrentInvocationLimitExceeded" in content:
        # The local AWS's limit of processes (LAMBDA_CONCURRENCY), with Lambda's text.
        return problem(status, "The local AWS runs its maximum number of functions; try again.", [("Retry-After", "1")])
    if status >= 400:  # a variable of gateway responses that the local AWS does not support
        content = content.replace(b"$context.path", json.dumps(f"/v1{path}")[1:-1].encode())
    return _response(status, headers, content)


def problem(status: int, detail: str, headers: HeaderList | None = None) -> Response:
    """Return an error of the proxy itself in the API's format."""
    body = {"type": "about:blank", "title": HTTPStatus(status).phrase, "status": status, "detail": detail}
    body |= {"instance": "", "correlation_id": str(uuid.uuid4())}
    return _response(
        status, [("Content-Type", "application/problem+json"), *(headers or [])], json.dumps(body).encode()
    )


def _response(status: int, headers: HeaderList, content: bytes) -> Response:
    response = Response(content, status)
    response.raw_headers = [
        (b"content-length", str(len(content)).encode()),
        *((name.lower().encode("latin-1"), value.encode("latin-1")) for name, value in headers),
    ]
    return response
