"""The way out to handlers, against real servers on loopback: the SSRF matrix, TLS, sizes and time."""

from __future__ import annotations

import json
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from dispatcher.contract import MAX_ANSWER_BYTES, NoAnswer, NotSent, Received, Reply
from dispatcher.egress import Egress
from qaes.domain.addresses import parse_url
from qaes.domain.errors import InvalidInputError
from tests.support.tls import Authority, Server, answers, json_answer, serve

pytestmark = pytest.mark.enable_socket

HOST = "handler.example"
BODY = b'{"mode":"execute"}'
DONE = json_answer(b'{"status":"done"}')


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"))


def loopback(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
    """Look up every name on this machine."""
    return [(socket.AF_INET, "127.0.0.1")]


def local(authority: Authority, **options: Any) -> Egress:
    return Egress(**{"allow_local": True, "context": authority.client(), "resolve": loopback} | options)


def post(egress: Egress, server: Server | int, *, seconds: float = 5, host: str = HOST, path: str = "/refund") -> Reply:
    port = server if isinstance(server, int) else server.port
    return egress.post(egress.url(f"https://{host}:{port}{path}"), [("X-Test", "1")], BODY, seconds=seconds)


@pytest.fixture
def tls(authority: Authority) -> ssl.SSLContext:
    return authority.server(HOST)


# Bytes sent and received


def test_post_sends_one_request_and_returns_the_answer(authority: Authority, tls: ssl.SSLContext) -> None:
    with serve(answers(json_answer(b"{}", "429 Slow Down", "Retry-After: 7")), tls) as server:
        assert post(local(authority), server) == Received(b"{}", 429, "7")
    head, _, body = server.requests[0].partition(b"\r\n\r\n")
    lines = head.decode().split("\r\n")
    assert lines[0] == "POST /refund HTTP/1.1"
    assert {line.lower() for line in lines[1:]} == {
        *(f"host: {HOST}:{server.port}", f"content-length: {len(BODY)}", "connection: close", "x-test: 1"),
        *("accept: application/json", "accept-encoding: identity"),
    }
    assert body == BODY
    assert server.connections == 1


@pytest.mark.parametrize(
    "data",
    [
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n" + json_answer(b"{}"),
    ],
)
def test_post_reads_every_form_of_an_answer(authority: Authority, tls: ssl.SSLContext, data: bytes) -> None:
    with serve(answers(data), tls) as server:
        assert post(local(authority), server) == Received(b"{}", 200)


def test_post_reads_an_answer_in_small_parts(authority: Authority, tls: ssl.SSLContext) -> None:
    def slowly(connection: socket.socket, request: bytes) -> None:
        for byte in DONE:
            connection.sendall(bytes([byte]))

    with serve(slowly, tls) as server:
        assert post(local(authority), server) == Received(b'{"status":"done"}', 200)


INCOMPLETE = {
    "nothing": b"",
    "half a body": b"HTTP/1.1 200 OK\r\nContent-Length: 50\r\n\r\n{}",
    "no length, and TLS ends without its closing message": b"HTTP/1.1 200 OK\r\n\r\n{}",
    "another protocol": b"SSH-2.0-OpenSSH_9.6\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}",
    "a long header": b"HTTP/1.1 200 OK\r\nX: " + b"y" * 40_000,
    "many headers": b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 10_000,
}


@pytest.mark.parametrize("case", INCOMPLETE)
def test_no_answer_when_it_is_incomplete(authority: Authority, tls: ssl.SSLContext, case: str) -> None:
    with serve(answers(INCOMPLETE[case]), tls) as server:
        assert isinstance(post(local(authority), server), NoAnswer)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "data", [b"HTTP/1.1 200 OK\r\nContent-Length: 99999999\r\n\r\n", b"HTTP/1.1 200 OK\r\n\r\n"], ids=["length", "none"]
)
def test_no_answer_when_it_is_larger_than_allowed(authority: Authority, tls: ssl.SSLContext, data: bytes) -> None:
    sent = 0

    def flood(connection: socket.socket, request: bytes) -> None:
        nonlocal sent
        connection.sendall(data)
        for _ in range(160):
            connection.sendall(b" " * 64 * 1024)
            sent += 64 * 1024

    with serve(flood, tls) as server:
        assert post(local(authority), server) == NoAnswer(f"the answer is larger than {MAX_ANSWER_BYTES} bytes")
    assert sent < 10 * MAX_ANSWER_BYTES


def test_answer_of_the_largest_size_is_received(authority: Authority, tls: ssl.SSLContext) -> None:
    with serve(answers(json_answer(b" " * MAX_ANSWER_BYTES)), tls) as server:
        reply = post(local(authority), server)
    assert isinstance(reply, Received)
    assert len(reply.body) == MAX_ANSWER_BYTES


@pytest.mark.parametrize("status", ["301 Moved", "302 Found", "307 Temporary Redirect", "308 Permanent Redirect"])
def test_redirect_is_not_followed(authority: Authority, tls: ssl.SSLContext, status: str) -> None:
    with serve(answers(DONE)) as other:
        location = f"Location: http://127.0.0.1:{other.port}/latest/meta-data/"
        with serve(answers(json_answer(b"", status, location)), tls) as server:
            assert post(local(authority), server) == Received(b"", int(status[:3]))
    assert other.connections == 0


def test_environment_s_proxy_is_not_used(
    authority: Authority, tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serve(answers(DONE)) as proxy, serve(answers(DONE), tls) as server:
        for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        assert isinstance(post(local(authority), server), Received)
    assert proxy.connections == 0


@pytest.mark.parametrize("header", [("X", "a\r\nHost: b"), ("X\r\nY", "a"), ("X", "a\x00"), ("Host", "b")])
def test_nothing_is_sent_when_a_header_is_malformed(
    authority: Authority, tls: ssl.SSLContext, header: tuple[str, str]
) -> None:
    with serve(answers(DONE), tls) as server:
        egress = local(authority)
        reply = egress.post(egress.url(f"https://{HOST}:{server.port}/"), [header], BODY, seconds=5)
    assert isinstance(reply, NotSent)
    assert server.connections == 0


# Time


@pytest.mark.parametrize("data", [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n", b""])
def test_slow_answer_ends_at_the_total_time(authority: Authority, tls: ssl.SSLContext, data: bytes) -> None:
    def drip(connection: socket.socket, request: bytes) -> None:
        connection.sendall(data)
        while not server.stopped.wait(0.05):
            connection.sendall(b"x" if b"Length" in data else b"X: y\r\n" if data else b"HTTP/1.1 100 Continue\r\n\r\n")

    with serve(drip, tls) as server:
        begin = time.monotonic()
        reply = post(local(authority), server, seconds=0.6)
        assert time.monotonic() - begin < 2
    assert reply == NoAnswer("no complete answer within 0.6 s")


def test_silent_handshake_ends_as_not_sent(authority: Authority) -> None:
    with serve(lambda connection, request: server.stopped.wait(5) and None, reads=False) as server:  # type: ignore[func-returns-value]
        begin = time.monotonic()
        assert isinstance(post(local(authority), server, seconds=0.5), NotSent)
        assert time.monotonic() - begin < 2


def test_server_that_reads_nothing_ends_at_the_total_time(authority: Authority, tls: ssl.SSLContext) -> None:
    with serve(lambda connection, request: server.stopped.wait(5) and None, tls, reads=False) as server:  # type: ignore[func-returns-value]
        egress = local(authority)
        url = egress.url(f"https://{HOST}:{server.port}/")
        begin = time.monotonic()
        reply = egress.post(url, [], b"x" * 30_000_000, seconds=0.8)
        assert time.monotonic() - begin < 3
    assert isinstance(reply, NoAnswer)


def test_slow_name_lookup_ends_as_not_sent(authority: Authority) -> None:
    release = threading.Event()

    def slow(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
        release.wait(10)
        return loopback(host, port)

    begin = time.monotonic()
    assert isinstance(post(local(authority, resolve=slow), 8443, seconds=0.3), NotSent)
    assert time.monotonic() - begin < 2
    release.set()


# Nothing was sent


def test_refused_connection_is_not_sent(authority: Authority) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    assert isinstance(post(local(authority), port), NotSent)


def test_unknown_name_is_not_sent(authority: Authority) -> None:
    def unknown(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    assert isinstance(post(local(authority, resolve=unknown), 8443), NotSent)
    assert isinstance(post(local(authority, resolve=lambda host, port: []), 8443), NotSent)


def certificates(authority: Authority, folder: Path) -> Iterator[tuple[str, ssl.SSLContext]]:
    yield "another host", authority.server("other.example")
    yield "expired", authority.server(HOST, ends=timedelta(days=-1))
    yield "another authority", Authority(folder).server(HOST)
    yield "a part of the host", authority.server("example")


def test_certificate_that_does_not_verify_is_not_sent(authority: Authority, tmp_path: Path) -> None:
    for case, tls in certificates(authority, tmp_path):
        with serve(answers(DONE), tls) as server:
            reply = post(local(authority), server)
        assert isinstance(reply, NotSent), case
        assert "certificate" in reply.reason, case
        assert server.requests == [], case


def test_plain_http_behind_https_url_is_not_sent(authority: Authority) -> None:
    with serve(answers(DONE), reads=False) as server:
        assert isinstance(post(local(authority), server), NotSent)


def test_default_context_verifies_certificates(tls: ssl.SSLContext) -> None:
    with serve(answers(DONE), tls) as server:
        reply = post(Egress(allow_local=True, resolve=loopback), server)
    assert isinstance(reply, NotSent)
    assert server.requests == []


# The connected address


def test_name_that_leads_to_a_local_address_is_not_sent(authority: Authority, tls: ssl.SSLContext) -> None:
    with serve(answers(DONE), tls) as server:
        reply = post(local(authority, allow_local=False), server)
    assert isinstance(reply, NotSent)
    assert "not public" in reply.reason
    assert server.connections == 0


@pytest.mark.parametrize("address", ["10.0.0.1", "169.254.169.254", "fd00:ec2::254", "::ffff:10.0.0.1", "fe80::1%lo"])
def test_one_private_address_refuses_the_name(authority: Authority, tls: ssl.SSLContext, address: str) -> None:
    """A name with a good and a bad address is an attempt to get through."""

    def both(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
        return [*loopback(host, port), (socket.AF_INET6 if ":" in address else socket.AF_INET, address)]

    with serve(answers(DONE), tls) as server:
        assert isinstance(post(local(authority, resolve=both), server), NotSent)
    assert server.connections == 0


def test_name_is_looked_up_once_and_connected_as_checked(authority: Authority) -> None:
    """A name that changes between check and connection cannot change the connection."""
    found = iter([["93.184.216.34"], ["127.0.0.1"]])
    connected = []

    def rebinding(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
        return [(socket.AF_INET, address) for address in next(found)]

    def connect(family: socket.AddressFamily, address: str, port: int, seconds: float) -> socket.socket:
        connected.append(address)
        raise ConnectionRefusedError

    egress = Egress(context=authority.client(), resolve=rebinding, connect=connect)
    assert isinstance(post(egress, 8443), NotSent)
    assert connected == ["93.184.216.34"]
    assert next(found) == ["127.0.0.1"]


@pytest.mark.parametrize("tls_on", [True, False])
def test_connected_socket_is_checked_before_it_carries_a_byte(
    authority: Authority, tls: ssl.SSLContext, *, tls_on: bool
) -> None:
    """The network itself may lead a public address to this machine."""
    received: list[bytes] = []

    def listen(connection: socket.socket, request: bytes) -> None:
        received.append(connection.recv(1))

    with serve(listen, reads=False) as server:

        def elsewhere(family: socket.AddressFamily, address: str, port: int, seconds: float) -> socket.socket:
            return socket.create_connection(("127.0.0.1", server.port), seconds)

        egress = Egress(
            context=authority.client(),
            resolve=lambda host, port: [(socket.AF_INET, "93.184.216.34")],
            connect=elsewhere,
        )
        reply = post(egress, 8443)
        assert isinstance(reply, NotSent)
        assert "not public" in reply.reason
        for _ in range(100):
            if received:
                break
            time.sleep(0.02)
    assert received == [b""]


def test_next_address_is_used_when_the_first_is_closed(authority: Authority, tls: ssl.SSLContext) -> None:
    def two(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
        return [(socket.AF_INET6, "::1"), (socket.AF_INET, "127.0.0.1")]

    with serve(answers(DONE), tls) as server:
        assert isinstance(post(local(authority, resolve=two), server), Received)


def test_silent_address_leaves_time_for_the_next(authority: Authority, tls: ssl.SSLContext) -> None:
    def connect(family: socket.AddressFamily, address: str, port: int, seconds: float) -> socket.socket:
        if address == "127.0.0.2":
            time.sleep(seconds)
            raise TimeoutError
        return socket.create_connection((address, port), seconds)

    def two(host: str, port: int) -> list[tuple[socket.AddressFamily, str]]:
        return [(socket.AF_INET, "127.0.0.2"), (socket.AF_INET, "127.0.0.1")]

    with serve(answers(DONE), tls) as server:
        reply = post(local(authority, resolve=two, connect=connect), server, seconds=1)
    assert isinstance(reply, Received)


# The stage local


def test_plain_http_reaches_loopback_only_when_local(authority: Authority) -> None:
    with serve(answers(DONE)) as server:
        egress = Egress(allow_local=True)
        for host in ("localhost", "127.0.0.1"):
            reply = egress.post(egress.url(f"http://{host}:{server.port}/"), [], BODY, seconds=5)
            assert isinstance(reply, Received), host
        with pytest.raises(InvalidInputError):
            Egress().url(f"http://127.0.0.1:{server.port}/")
        url = parse_url(f"http://127.0.0.1:{server.port}/", allow_local=True)
        assert isinstance(Egress().post(url, [], BODY, seconds=5), NotSent)
        assert server.connections == 2


def test_ipv6_loopback_is_reached_when_local() -> None:
    with serve(answers(DONE), family=socket.AF_INET6) as server:
        egress = Egress(allow_local=True)
        reply = egress.post(egress.url(f"http://[::1]:{server.port}/"), [], BODY, seconds=5)
    assert isinstance(reply, Received)
    assert json.loads(reply.body) == {"status": "done"}
    assert f"host: [::1]:{server.port}".encode() in server.requests[0].lower()


@pytest.mark.parametrize(
    "host", ["2130706433", "0x7f000001", "017700000001", "127.1", "0177.0.0.1", "user@127.0.0.1", "127。0。0。1"]
)
def test_other_spelling_of_loopback_is_refused_even_when_local(host: str) -> None:
    with serve(answers(DONE)) as server, pytest.raises(InvalidInputError):
        Egress(allow_local=True).url(f"http://{host}:{server.port}/")
    assert server.connections == 0
