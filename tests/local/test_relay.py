"""The relay from a container to the loopback interface: its connections and its limits."""

from __future__ import annotations

import errno
import socket
import threading
from ipaddress import IPv4Interface

import pytest

from local.relay import Relay, bridge

pytestmark = pytest.mark.enable_socket


def everything(connection):
    return b"".join(iter(lambda: connection.recv(65536), b""))


@pytest.fixture
def echo():
    """A server that returns all received bytes at the end of its client's data."""

    def answer():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                connection.sendall(everything(connection)[::-1])

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
    thread.join(5)


def ask(address, text, source="127.0.0.1"):
    host, _, port = address.partition(":")
    with socket.create_connection((host, int(port)), timeout=5, source_address=(source, 0)) as connection:
        connection.sendall(text)
        connection.shutdown(socket.SHUT_WR)
        return everything(connection)


def test_relay_forwards_both_directions_and_closes(echo):
    with Relay(IPv4Interface("127.0.0.1/8"), echo) as relay:
        assert ask(relay.address, b"abc" * 100_000) == b"cba" * 100_000
        assert ask(relay.address, b"again") == b"niaga"


def test_relay_refuses_clients_outside_its_network(echo):
    with Relay(IPv4Interface("127.0.0.1/32"), echo) as relay:
        try:
            answer = ask(relay.address, b"abc", source="127.0.0.2")
        except OSError:  # where only 127.0.0.1 is an address, or the connection is reset
            answer = b""
    assert answer == b""


def test_relay_is_closed_afterwards(echo):
    with Relay(IPv4Interface("127.0.0.1/8"), echo) as relay:
        address = relay.address
    with pytest.raises(ConnectionRefusedError):
        ask(address, b"abc")


def test_relay_closes_connection_when_server_is_gone():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        relay = Relay(IPv4Interface("127.0.0.1/8"), closed.getsockname()[1])
        with relay:
            try:
                assert ask(relay.address, b"abc") == b""
            except OSError as error:  # the end shows at whichever call comes after it; a time-out is no end
                assert error.errno in {errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN}  # noqa: PT017


def test_without_docker_there_is_no_bridge():
    assert bridge("no-such-bridge") is None
