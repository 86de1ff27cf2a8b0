"""The log's Merkle tree in tiles of 256 hashes, and the proofs computed from them.

Sources: C2SP tlog-tiles (tiles of height 8, paths); RFC 6962, sections 2.1.1 and 2.1.2 (content of a proof).

The tile (level, index) has the hashes of the complete subtrees of 256^level leaves, starting with number 256 * index.
The hashes of the subtrees between two levels are computed from it. A tile with fewer than 256 hashes is partial. It
only grows at its end, so each version of it is a prefix of the later versions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Literal

from qaes.domain.errors import InvalidInputError
from qaes.domain.merkle import EMPTY_ROOT, HASH_BYTES, ProofError, node_hash

TILE_HEIGHT = 8
TILE_WIDTH = 1 << TILE_HEIGHT
MAX_LEVEL = 63

ReadTile = Callable[[int, int, int], bytes]
"""(level, index, width) -> at least the first `width` hashes of that tile, concatenated."""

TileLevel = int | Literal["entries"]
"""A level of hashes, or `entries` for the tiles of the entries' texts."""

_PATH = re.compile(r"tile/(0|[1-9][0-9]?|entries)/((?:x[0-9]{3}/)*)([0-9]{3})(?:\.p/([1-9][0-9]{0,2}))?", re.ASCII)


class _Tree:
    """The tree of `size` leaves. It reads each tile at most once."""

    def __init__(self, size: int, read_tile: ReadTile) -> None:
        if not 0 <= size < 1 << 64:
            raise ProofError("size", f"a tree cannot have the size {size}")
        self._size = size
        self._read = read_tile
        self._tiles: dict[tuple[int, int], bytes] = {}

    def hash(self, start: int, end: int) -> bytes:
        """Return MTH(D[start:end]); `start` is a valid start of a subtree of this size (RFC 6962, 2.1)."""
        count = end - start
        if count & (count - 1) == 0:
            return self._complete(start, count.bit_length() - 1)
        # k is the largest power of two smaller than n.
        k = 1 << (count - 1).bit_length() - 1
        return node_hash(self.hash(start, start + k), self.hash(start + k, end))

    def _complete(self, start: int, height: int) -> bytes:
        """Return the hash of the 2^height leaves from `start`, a multiple of 2^height."""
        level, above = divmod(height, TILE_HEIGHT)
        first = start >> level * TILE_HEIGHT
        tile = self._tile(level, first // TILE_WIDTH)
        at = first % TILE_WIDTH * HASH_BYTES
        row = [tile[n : n + HASH_BYTES] for n in range(at, at + (HASH_BYTES << above), HASH_BYTES)]
        while len(row) > 1:
            row = [node_hash(row[n], row[n + 1]) for n in range(0, len(row), 2)]
        return row[0]

    def _tile(self, level: int, index: int) -> bytes:
        if (level, index) not in self._tiles:
            width = tile_width(level, index, self._size)
            self._tiles[level, index] = _read(self._read, level, index, width)
        return self._tiles[level, index]


def tile_width(level: int, index: int, size: int) -> int:
    """Return the number of hashes of the tile in a log of `size` leaves; 0 if the tile does not exist."""
    return max(0, min(TILE_WIDTH, (size >> level * TILE_HEIGHT) - index * TILE_WIDTH))


def tree_root(size: int, read_tile: ReadTile) -> bytes:
    """Return the root of the tree of `size` leaves."""
    return _Tree(size, read_tile).hash(0, size) if size else EMPTY_ROOT


def inclusion_proof(index: int, size: int, read_tile: ReadTile) -> list[bytes]:
    """Return PATH(index, D[size]) of RFC 6962, section 2.1.1. Reads at most 2 * ceil(log256 size) tiles.

    Raises ProofError if the tree does not have this leaf.
    """
    if not 0 <= index < size:
        raise ProofError("index", f"a tree of size {size} does not have the leaf {index}")
    tree = _Tree(size, read_tile)
    proof: list[bytes] = []
    start, end = 0, size
    # From the root down: PATH(m, D[n]) is PATH(m, D[0:k]) : MTH(D[k:n]) for m < k, and
    # PATH(m - k, D[k:n]) : MTH(D[0:k]) for m >= k.
    while end - start > 1:
        middle = start + (1 << (end - start - 1).bit_length() - 1)
        if index < middle:
            proof.append(tree.hash(middle, end))
            end = middle
        else:
            proof.append(tree.hash(start, middle))
            start = middle
    return proof[::-1]


def consistency_proof(first: int, second: int, read_tile: ReadTile) -> list[bytes]:
    """Return PROOF(first, D[second]) of RFC 6962, section 2.1.2. Reads at most 2 * ceil(log256 second) tiles.

    Raises ProofError unless 1 <= first <= second.
    """
    if not 1 <= first <= second:
        raise ProofError("size", f"no consistency proof exists from size {first} to size {second}")
    tree = _Tree(second, read_tile)
    proof: list[bytes] = []
    start, end, known = 0, second, True
    # SUBPROOF(m, D[n], b): b is true if the subtree is the first tree itself, whose root the verifier has.
    while end != first:
        middle = start + (1 << (end - start - 1).bit_length() - 1)
        if first <= middle:
            proof.append(tree.hash(middle, end))
            end = middle
        else:
            proof.append(tree.hash(start, middle))
            start, known = middle, False
    if not known:
        proof.append(tree.hash(start, end))
    return proof[::-1]


def appended(size: int, leaves: Sequence[bytes], read_tile: ReadTile) -> dict[tuple[int, int], bytes]:
    """Return the changed tiles after leaf hashes are appended to a log of `size`.

    Returns
    -------
    dict
        (level, index) -> the whole content of each changed tile. At most one tile of each level is read.
    """
    changed: dict[tuple[int, int], bytes] = {}
    hashes, level, first = list(leaves), 0, size
    while hashes:
        index, width = divmod(first, TILE_WIDTH)
        content = _read(read_tile, level, index, width) if width else b""
        content += b"".join(hashes)
        full: list[bytes] = []
        for at in range(0, len(content), TILE_WIDTH * HASH_BYTES):
            tile = content[at : at + TILE_WIDTH * HASH_BYTES]
            changed[level, index + len(full)] = tile
            if len(tile) == TILE_WIDTH * HASH_BYTES:
                full.append(tile_root(tile))
        # The root of a full tile is one hash of the level above.
        hashes, level, first = full, level + 1, index
    return changed


def tile_root(tile: bytes) -> bytes:
    """Return the hash that represents a full tile in the level above."""
    row = [tile[at : at + HASH_BYTES] for at in range(0, len(tile), HASH_BYTES)]
    while len(row) > 1:
        row = [node_hash(row[n], row[n + 1]) for n in range(0, len(row), 2)]
    return row[0]


def _read(read_tile: ReadTile, level: int, index: int, width: int) -> bytes:
    content = read_tile(level, index, width)[: width * HASH_BYTES]
    if not content or len(content) != width * HASH_BYTES:
        raise ProofError("tile", f"tile {level}/{index} has fewer than {width} hashes")
    return content


def tile_path(level: TileLevel, index: int, width: int = TILE_WIDTH) -> str:
    """Return the path of a tile under the log's prefix: `tile/0/x001/x234/067.p/8` (C2SP tlog-tiles)."""
    if (level != "entries" and not 0 <= level <= MAX_LEVEL) or not 1 <= width <= TILE_WIDTH or index < 0:
        raise InvalidInputError("this tile does not exist", field="tile")
    digits = str(index)
    digits = digits.zfill((len(digits) + 2) // 3 * 3)
    groups = [digits[at : at + 3] for at in range(0, len(digits), 3)]
    path = "/".join([f"x{group}" for group in groups[:-1]] + groups[-1:])
    return f"tile/{level}/{path}" + (f".p/{width}" if width < TILE_WIDTH else "")


def parse_tile_path(path: str) -> tuple[TileLevel, int, int]:
    """Return (level, index, width) of a path in the format of `tile_path`. Raises InvalidInputError otherwise."""
    found = _PATH.fullmatch(path) if len(path) <= 80 else None
    if found is None:
        raise InvalidInputError("the text is not the path of a tile", field="path")
    level_, groups, last, width_ = found.groups()
    level: TileLevel = "entries" if level_ == "entries" else int(level_)
    index = int(groups.replace("x", "").replace("/", "") + last)
    width = int(width_) if width_ else TILE_WIDTH
    if index >= 1 << 64 or (width_ and width == TILE_WIDTH) or path != _path_or_none(level, index, width):
        raise InvalidInputError("the text is not the path of a tile", field="path")
    return level, index, width


def _path_or_none(level: TileLevel, index: int, width: int) -> str | None:
    try:
        return tile_path(level, index, width)
    except InvalidInputError:
        return None
