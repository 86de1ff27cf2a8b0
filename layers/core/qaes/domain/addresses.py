"""Which URLs a handler can have, and which network addresses the dispatcher connects to.

A URL has one spelling here, so that two programs cannot read two hosts from it. Its host is a name or an address; a
name does not determine the destination of the connection, so the connected address decides (`check_address`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network

from qaes.domain.errors import InvalidInputError

MAX_URL_LENGTH = 2048
LOOPBACK_NAME = "localhost"
_LOCAL_SUFFIXES = ("localhost", "local", "internal", "home.arpa", "lan")

_URL = re.compile(
    r"(?P<scheme>https?)://(?P<host>\[[0-9a-f:.]+\]|[a-z0-9.-]+)(?::(?P<port>[1-9][0-9]{0,4}))?"
    r"(?P<target>(?:/(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-F]{2})*)?(?:\?(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-F]{2})*)?)"
)
_LABEL = re.compile(r"(?!-)[a-z0-9-]{1,63}(?<!-)")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")

_NAT64 = IPv6Network("64:ff9b::/96")
_GLOBAL_UNICAST = IPv6Network("2000::/3")
_REFUSED = tuple(
    map(
        ip_network,
        (
            # IANA's special-purpose registries, listed because older versions of Python know fewer of them.
            *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12"),
            *("192.0.0.0/24", "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15"),
            *("198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
            "168.63.129.16/32",  # the metadata service of Azure has an address that is public elsewhere
            *("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),  # Teredo, documentation, 6to4
        ),
    )
)


@dataclass(frozen=True)
class Url:
    """The parts of a URL. `target` is the request target, never empty; `host` has no brackets."""

    scheme: str
    host: str
    port: int
    target: str

    @property
    def authority(self) -> str:
        """Return the host, and the port unless it is the scheme's own: the value of the header Host."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _default_port(self.scheme) else f"{host}:{self.port}"

    def __str__(self) -> str:
        """Return the URL in the spelling that the request's signature covers."""
        return f"{self.scheme}://{self.authority}{self.target}"


def parse_url(text: str, *, allow_local: bool = False) -> Url:
    """Read the URL of a handler.

    Parameters
    ----------
    allow_local
        Also accept loopback hosts, plain http to them, and any port: for the stage `local` only.

    Raises
    ------
    InvalidInputError
        The URL is not acceptable; the message has the correction.
    """
    match = _URL.fullmatch(text) if len(text) <= MAX_URL_LENGTH else None
    if match is None:
        raise InvalidInputError(_advice(text), field="url")
    scheme, host = match["scheme"], match["host"].strip("[]")
    port = int(match["port"] or _default_port(scheme))
    target = match["target"] if match["target"].startswith("/") else "/" + match["target"]
    address = _literal(host)
    if address is None:
        _check_name(host, allow_local=allow_local)
    elif not is_acceptable(address, allow_local=allow_local):
        raise InvalidInputError(f"the host {host} is not a public address", field="url")
    is_local = host == LOOPBACK_NAME or (address is not None and address.is_loopback)
    if scheme == "http" and not (allow_local and is_local):
        raise InvalidInputError("the URL must begin with https://", field="url")
    if port > 65535 or not (port == 443 or port >= 1024 or (allow_local and is_local)):
        raise InvalidInputError("the port must be 443, or 1024 to 65535", field="url")
    return Url(scheme, host, port, target)


def is_acceptable(address: IPv4Address | IPv6Address, *, allow_local: bool = False) -> bool:
    """Return whether the dispatcher connects to an address: it is public, or loopback if that is allowed."""
    if isinstance(address, IPv6Address):
        if address.scope_id is not None:
            return False
        inner = address.ipv4_mapped or (_embedded(address) if address in _NAT64 else None)
        if inner is not None:
            return is_acceptable(inner, allow_local=allow_local)
    if address.is_loopback:
        return allow_local
    if isinstance(address, IPv6Address) and address not in _GLOBAL_UNICAST:
        return False
    return address.is_global and not any(
        address in network for network in _REFUSED if network.version == address.version
    )


def _embedded(address: IPv6Address) -> IPv4Address:
    return IPv4Address(int(address) & 0xFFFFFFFF)


def _default_port(scheme: str) -> int:
    return 443 if scheme == "https" else 80


def _literal(host: str) -> IPv4Address | IPv6Address | None:
    """Return the address that a host spells, None for a name.

    A host whose last label is a number is an address for every resolver, in decimal, octal or hexadecimal. Only the
    dotted decimal form is accepted.
    """
    if ":" in host or _NUMBER.fullmatch(host.rpartition(".")[2]):
        try:
            address = ip_address(host)
        except ValueError:
            raise InvalidInputError("write the host's address in its usual form", field="url") from None
        if str(address) != host:
            raise InvalidInputError(f"write the host's address as {address}", field="url")
        return address
    return None


def _check_name(host: str, *, allow_local: bool) -> None:
    if host == LOOPBACK_NAME and allow_local:
        return
    labels = host.split(".")
    if len(host) > 253 or len(labels) < 2 or not all(_LABEL.fullmatch(label) for label in labels):
        raise InvalidInputError("the host must be a complete domain name, such as actions.example.com", field="url")
    if any(host.endswith(f".{suffix}") for suffix in _LOCAL_SUFFIXES):
        raise InvalidInputError("the host must not be a name of a private network", field="url")


def _advice(text: str) -> str:
    """Return the error of a URL that is not in the normal form."""
    if len(text) > MAX_URL_LENGTH:
        return f"the URL must have at most {MAX_URL_LENGTH} characters"
    if not text.isascii():
        return "write the URL in ASCII: a domain name in its xn-- form, other characters percent-encoded"
    if "#" in text:
        return "the URL must not have a fragment"
    if "@" in text.partition("://")[2].partition("/")[0]:
        return "the URL must not contain a user name or a password: name a `credential` instead"
    return "the URL must be https://<host in lower case>[:port]/<path>, percent-encoded with capital letters"
