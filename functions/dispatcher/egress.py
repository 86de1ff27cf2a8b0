"""Send one HTTPS request to a handler, to public addresses only, within one time limit.

The socket is opened here and h11 speaks HTTP on it, so that nothing is hidden from the checks: the address is checked
before the connection and again on the connected socket, which carries the request. There are no redirects, no proxies,
no retries and no kept connections. Each step before the first byte of the request ends as `NotSent`, each one after it
as `NoAnswer`.
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from queue import Empty, SimpleQueue

import h11

from dispatcher.contract import MAX_ANSWER_BYTES, NoAnswer, NotSent, Received, Reply
from qaes.domain.addresses import Url, is_acceptable, parse_url

MAX_HEADER_BYTES = 32 * 1024
MAX_ADDRESSES = 4
_CHUNK = 64 * 1024

Headers = Sequence[tuple[str, str]]
Resolve = Callable[[str, int], list[tuple[socket.AddressFamily, str]]]
"""A host and a port → the addresses of the host."""
Connect = Callable[[socket.AddressFamily, str, int, float], socket.socket]
"""Family, address, port and seconds → a connected socket."""


class _EgressError(Exception):
    """The request did not leave; the message gives the reason."""


class Clock:
    """The remaining time of a call."""

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds

    def left(self) -> float:
        """Return the remaining seconds. Raises TimeoutError at the end."""
        seconds = self._end - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        return seconds


class Egress:
    """The dispatcher's only way out.

    Parameters
    ----------
    allow_local
        Allow loopback addresses, and plain http to them: for the stage `local` only.
    context
        The TLS settings; by default, certificates are verified against the system's authorities.
    resolve, connect
        Look up a name, open a connection: by default, the system's.
    """

    def __init__(
        self,
        *,
        allow_local: bool = False,
        context: ssl.SSLContext | None = None,
        resolve: Resolve | None = None,
        connect: Connect | None = None,
    ) -> None:
        self.allow_local = allow_local
        self._context = context or ssl.create_default_context()
        # Some builds of Python set it: an answer that is cut off would then look complete.
        self._context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
        self._resolve = resolve or _look_up
        self._connect = connect or _open

    def url(self, text: str) -> Url:
        """Return the parts of a URL that this egress may call; raises InvalidInputError."""
        return parse_url(text, allow_local=self.allow_local)

    def post(self, url: Url, headers: Headers, body: bytes, *, seconds: float) -> Reply:
        """Send a POST request. All of it, from the look-up of the name to the last byte, takes at most `seconds`."""
        clock = Clock(seconds)
        try:
            parser, request = _request(url, headers, body)
            connection = self._open_checked(url, clock)
        except TimeoutError:
            return NotSent(f"no connection to {url.host} within {seconds:g} s")
        except (OSError, h11.LocalProtocolError, _EgressError) as error:
            return NotSent(f"no connection to {url.host}: {_reason(error)}")
        with connection:
            try:
                _send(connection, request, clock)
                return self.receive(parser, connection, clock)
            except TimeoutError:
                return NoAnswer(f"no complete answer within {seconds:g} s")
            except (OSError, h11.RemoteProtocolError) as error:
                return NoAnswer(f"no complete answer: {_reason(error)}")

    def receive(self, parser: h11.Connection, connection: socket.socket, clock: Clock) -> Reply:
        """Read the answer to the request that was sent on a connection."""
        response: h11.Response | None = None
        body = bytearray()
        while True:
            event = parser.next_event()
            if event is h11.NEED_DATA:
                connection.settimeout(clock.left())
                parser.receive_data(connection.recv(_CHUNK))
            elif isinstance(event, h11.Response):
                response = event
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > MAX_ANSWER_BYTES:
                    return NoAnswer(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")
            elif isinstance(event, h11.EndOfMessage) and response is not None:
                return _received(response, bytes(body))

    def _open_checked(self, url: Url, clock: Clock) -> socket.socket:
        """Connect to the host, check the connected address, and complete the TLS handshake."""
        addresses = self._acceptable_addresses(url, clock)
        failure: Exception = _EgressError("the name has no address")
        for count, (family, address) in enumerate(addresses):
            share = clock.left() / (len(addresses) - count)  # the next address gets its turn if this one is silent
            try:
                raw = self._connect(family, address, url.port, share)
            except OSError as error:
                failure = error
                continue
            try:
                self._check(str(raw.getpeername()[0]))
                raw.settimeout(clock.left())
                if url.scheme == "http":
                    return raw
                return self._context.wrap_socket(raw, server_hostname=url.host, suppress_ragged_eofs=False)
            except BaseException:
                raw.close()
                raise
        raise failure

    def _acceptable_addresses(self, url: Url, clock: Clock) -> list[tuple[socket.AddressFamily, str]]:
        """Look up the host once. One address that is not acceptable makes the whole answer suspect."""
        answers: SimpleQueue[list[tuple[socket.AddressFamily, str]] | OSError] = SimpleQueue()

        def look_up() -> None:
            try:
                answers.put(self._resolve(url.host, url.port))
            except (OSError, UnicodeError) as error:
                answers.put(OSError(str(error)))

        # The system's look-up has no time limit, so it runs in a thread that may outlive this call.
        threading.Thread(target=look_up, daemon=True).start()
        try:
            found = answers.get(timeout=clock.left())
        except Empty:
            raise TimeoutError from None
        if isinstance(found, OSError):
            raise found
        for _, address in found:
            self._check(address)
        return found[:MAX_ADDRESSES]

    def _check(self, address: str) -> None:
        if not is_acceptable(ip_address(address), allow_local=self.allow_local):
            raise _EgressError("the name leads to an address that is not public")


def _look_up(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [(family, str(address[0])) for family, _, _, _, address in found]


def _open(family: socket.AddressFamily, address: str, port: int, seconds: float) -> socket.socket:
    connection = socket.socket(family, socket.SOCK_STREAM)
    try:
        connection.settimeout(seconds)
        connection.connect((address, port))
    except BaseException:
        connection.close()
        raise
    return connection


def _request(url: Url, headers: Headers, body: bytes) -> tuple[h11.Connection, bytes]:
    """Return the bytes of a request, and the parser of its answer. h11 refuses a header that would end early."""
    parser = h11.Connection(h11.CLIENT, max_incomplete_event_size=MAX_HEADER_BYTES)
    own = [("Host", url.authority), ("Content-Length", str(len(body))), ("Connection", "close")]
    own += [("Accept", "application/json"), ("Accept-Encoding", "identity")]
    request = h11.Request(method="POST", target=url.target, headers=[*own, *headers])
    parts = (parser.send(request), parser.send(h11.Data(data=body)), parser.send(h11.EndOfMessage()))
    return parser, b"".join(part or b"" for part in parts)


def _send(connection: socket.socket, data: bytes, clock: Clock) -> None:
    left = memoryview(data)
    while left:
        connection.settimeout(clock.left())
        left = left[connection.send(left) :]


def _received(response: h11.Response, body: bytes) -> Received:
    retry_after = [value for name, value in response.headers if name == b"retry-after"]
    return Received(body, response.status_code, retry_after[0].decode("ascii", "replace") if retry_after else None)


def _reason(error: Exception) -> str:
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"the certificate is not valid: {error.verify_message}"
    return str(error) or type(error).__name__
