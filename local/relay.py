"""Relay for the containers of `sam local invoke` to a server on the loopback interface.

On Linux, a container cannot reach the loopback interface: `sam local invoke --docker-network host` leaves it on
Docker's bridge. The relay therefore listens on this machine's address on that bridge. Docker Desktop does not need it:
there, `host.docker.internal` leads to the loopback interface.
"""

from __future__ import annotations

import contextlib
import fcntl
import socket
import socketserver
import struct
import sys
import threading
from ipaddress import IPv4Interface, IPv4Network, ip_address
from types import TracebackType
from typing import Self

BRIDGE = "docker0"
DESKTOP_HOST = "host.docker.internal"
_SIOCGIFADDR, _SIOCGIFNETMASK = 0x8915, 0x891B  # linux/sockios.h


def bridge(name: str = BRIDGE) -> IPv4Interface | None:
    """Return this machine's address on Docker's bridge, with the network; None if the bridge does not exist."""
    if sys.platform != "linux":
        return None
    request = struct.pack("256s", name.encode())
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            address, mask = (
                socket.inet_ntoa(fcntl.ioctl(probe, code, request)[20:24]) for code in (_SIOCGIFADDR, _SIOCGIFNETMASK)
            )
        except OSError:
            return None
    return IPv4Interface(f"{address}/{mask}")


class Relay:
    """Forwards connections from a network of this machine to a port of 127.0.0.1, as a context manager.

    Parameters
    ----------
    interface : IPv4Interface
        Address to listen on, with a free port, and the network whose connections are accepted.
    port : int
        Target port.
    """

    def __init__(self, interface: IPv4Interface, port: int) -> None:
        self._server = _Server(interface, port)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)

    @property
    def address(self) -> str:
        """Address of the relay as `host:port`."""
        host, port = self._server.socket.getsockname()
        return f"{host}:{port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False  # a client's open connection must not block the end of this process

    def __init__(self, interface: IPv4Interface, port: int) -> None:
        self.network: IPv4Network = interface.network
        self.target = ("127.0.0.1", port)
        super().__init__((str(interface.ip), 0), _Connection)

    def verify_request(self, request: object, client_address: tuple[str, int]) -> bool:  # noqa: ARG002 - as inherited
        """Accept connections from the network only: other machines can also address this machine on the bridge."""
        return ip_address(client_address[0]) in self.network

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore errors: either side may end a connection at any time, and the other side notices."""


class _Connection(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        with socket.create_connection(self.server.target) as target:
            back = threading.Thread(target=_pass, args=(target, self.request), daemon=True)
            back.start()
            _pass(self.request, target)
            back.join()


def _pass(source: socket.socket, target: socket.socket) -> None:
    """Forward all data, then the end of the data."""
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
