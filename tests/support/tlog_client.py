"""A client of transparency logs, written from C2SP's tlog-tiles, tlog-checkpoint and signed-note, and from RFC 6962 and
RFC 9162: it shares no code with the log that it reads. It sends neither a token nor an Accept header.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
from collections.abc import Callable
from urllib.parse import urlsplit

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

Fetch = Callable[[str], bytes]
"""Maps a path below the log's prefix to its content."""


def over_http(prefix: str) -> Fetch:
    """Fetch as Go's client does: no header but Host."""
    where = urlsplit(prefix)

    def fetch(path: str) -> bytes:
        connection = http.client.HTTPConnection(where.netloc, timeout=60)
        connection.putrequest("GET", f"{where.path}/{path}", skip_accept_encoding=True)
        connection.endheaders()
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if answer.status != 200:
            raise LookupError(f"{path}: {answer.status}")
        return content

    return fetch


class Log:
    """The log at one checkpoint."""

    def __init__(self, fetch: Fetch, verifier_key: str) -> None:
        self.fetched: list[str] = []
        self._fetch = fetch
        self._tiles: dict[str, bytes] = {}
        self.origin, self.size, self.root = opened(self._get("checkpoint").decode(), verifier_key)
        assert self.subtree(0, self.size) == self.root, "the tiles are not the checkpoint's"

    def _get(self, path: str) -> bytes:
        self.fetched.append(path)
        return self._fetch(path)

    def hash(self, level: int, number: int) -> bytes:
        """The hash of the complete subtree of 256^level leaves with that number."""
        index, at = divmod(number, 256)
        # Only the tiles that this checkpoint has: the last of a level may be partial.
        there = self.size // 256**level
        width = min(256, there - index * 256)
        path = f"tile/{level}/{written(index)}" + (f".p/{width}" if width < 256 else "")
        if path not in self._tiles:
            self._tiles[path] = self._get(path)
            assert len(self._tiles[path]) == width * 32, "a tile is its hashes and nothing else"
        return self._tiles[path][at * 32 : at * 32 + 32]

    def subtree(self, start: int, end: int) -> bytes:
        """MTH(D[start:end]) (RFC 6962, 2.1), from the tiles."""
        count = end - start
        level = 0
        while 256 ** (level + 1) <= count:
            level += 1
        if count == 256**level and start % count == 0:
            return self.hash(level, start // count)
        half = 1
        while half * 2 < count:
            half *= 2
        return node(self.subtree(start, start + half), self.subtree(start + half, end))

    def inclusion(self, index: int) -> list[bytes]:
        """PATH(index, D[size]) (RFC 6962, 2.1.1)."""

        def path(m: int, start: int, end: int) -> list[bytes]:
            if end - start == 1:
                return []
            half = 1
            while half * 2 < end - start:
                half *= 2
            if m < half:
                return [*path(m, start, start + half), self.subtree(start + half, end)]
            return [*path(m - half, start + half, end), self.subtree(start, start + half)]

        return path(index, 0, self.size)

    def consistency(self, first: int) -> list[bytes]:
        """PROOF(first, D[size]) (RFC 6962, 2.1.2)."""

        def proof(m: int, start: int, end: int, *, whole: bool) -> list[bytes]:
            if m == end - start:
                return [] if whole else [self.subtree(start, end)]
            half = 1
            while half * 2 < end - start:
                half *= 2
            if m <= half:
                return [*proof(m, start, start + half, whole=whole), self.subtree(start + half, end)]
            return [*proof(m - half, start + half, end, whole=False), self.subtree(start, start + half)]

        return proof(first, 0, self.size, whole=True)


def written(index: int) -> str:
    """An index in groups of three digits, all but the last after an `x`."""
    groups = [f"{index % 1000:03d}"]
    while index := index // 1000:
        groups.insert(0, f"x{index % 1000:03d}")
    return "/".join(groups)


def node(left: bytes, right: bytes) -> bytes:
    return hashlib.sha256(b"\x01" + left + right).digest()


def opened(note: str, verifier_key: str) -> tuple[str, int, bytes]:
    """Origin, size and root of a checkpoint that the key has signed."""
    name, key_id, encoded = verifier_key.split("+", 2)
    key = base64.b64decode(encoded)
    assert key[0] == 1, "Ed25519"
    assert hashlib.sha256(f"{name}\n".encode() + key).digest()[:4].hex() == key_id
    text, _, signatures = note.rpartition("\n\n")
    text += "\n"
    [signature] = [line.split(" ")[2] for line in signatures.splitlines() if line.startswith(f"— {name} ")]
    raw = base64.b64decode(signature)
    assert raw[:4].hex() == key_id
    Ed25519PublicKey.from_public_bytes(key[1:]).verify(raw[4:], text.encode())
    origin, size, root = text.splitlines()[:3]
    assert origin == name, "the log's own signature"
    return origin, int(size), base64.b64decode(root)


def includes(leaf: bytes, index: int, size: int, proof: list[bytes], root: bytes) -> bool:
    """RFC 9162, 2.1.3.2."""
    if index >= size:
        return False
    fn, sn, r = index, size - 1, leaf
    for p in proof:
        if sn == 0:
            return False
        if fn % 2 or fn == sn:
            r = node(p, r)
            while fn % 2 == 0 and fn != 0:
                fn, sn = fn >> 1, sn >> 1
        else:
            r = node(r, p)
        fn, sn = fn >> 1, sn >> 1
    return sn == 0 and r == root


def extends(first: int, first_root: bytes, second: int, second_root: bytes, proof: list[bytes]) -> bool:
    """RFC 9162, 2.1.4.2; for 0 < first < second."""
    if first & (first - 1) == 0:
        proof = [first_root, *proof]
    fn, sn = first - 1, second - 1
    while fn % 2:
        fn, sn = fn >> 1, sn >> 1
    fr = sr = proof[0]
    for c in proof[1:]:
        if sn == 0:
            return False
        if fn % 2 or fn == sn:
            fr, sr = node(c, fr), node(c, sr)
            while fn % 2 == 0 and fn != 0:
                fn, sn = fn >> 1, sn >> 1
        else:
            sr = node(sr, c)
        fn, sn = fn >> 1, sn >> 1
    return (fr, sr, sn) == (first_root, second_root, 0)
