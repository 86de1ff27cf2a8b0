"""The log in the format of C2SP tlog-tiles: signed checkpoint, hash tiles and entry tiles.

Clients of transparency logs read these paths under the prefix `/log/`: with a token (`audit.api`), or without one
(`audit.public_log`) if the operator has made the log public.
"""

from __future__ import annotations

from dataclasses import dataclass

from audit.log import CorruptLogError, Log
from audit.store import AuditStore
from qaes.domain.errors import InvalidInputError, NotFoundError
from qaes.domain.merkle import HASH_BYTES
from qaes.domain.tiles import TILE_WIDTH, parse_tile_path, tile_width

IMMUTABLE = "max-age=31536000, immutable"
"""Cache lifetime of a tile: a path has level, index and width, so its content never changes."""
CHECKPOINT_SECONDS = 5
"""Maximum age of a cached checkpoint."""


def checkpoint(log: Log) -> str:
    """Return the signed note of the newest confirmed anchor. Raises NotFoundError before the first anchor."""
    newest = log.anchors.newest()
    if newest is None:
        raise NotFoundError("the log has no anchored checkpoint yet; try again later")
    return newest.note


def anchored_tile(log: Log, level: str, groups: tuple[str, ...]) -> bytes:
    """Return the hashes of a tile if the newest checkpoint covers them. Later hashes are not public yet."""
    place = _hash_tile_place(level, groups)
    newest = log.anchors.newest()
    if newest is None or tile_width(place.level, place.index, newest.size) < place.width:
        raise _no_such_tile()
    return _hashes(log, place)


def hash_tile(log: Log, level: str, groups: tuple[str, ...]) -> bytes:
    """Return the hashes of a tile. Raises NotFoundError for a malformed path or a width that the tile does not have."""
    return _hashes(log, _hash_tile_place(level, groups))


def entries_tile(log: Log, store: AuditStore, groups: tuple[str, ...]) -> bytes:
    """Return the texts of an entry tile, each with its length in two bytes before it. Raises as `hash_tile`.

    Raises
    ------
    CorruptLogError
        An entry of the log is not in the table.
    """
    _, index, width = _parse("/".join(("tile", "entries", *groups)))
    leaves = log.leaves(index * TILE_WIDTH, width)
    if len(leaves) < width:
        raise _no_such_tile()
    texts = store.texts([leaf.key for leaf in leaves])
    parts: list[bytes] = []
    for each in leaves:
        if each.key not in texts:
            raise CorruptLogError(f"entry {each.seq} of {each.task_id} is in the log but not in the table")
        text = texts[each.key].encode("utf-8")
        parts += [len(text).to_bytes(2, "big"), text]
    return b"".join(parts)


@dataclass(frozen=True)
class _Place:
    level: int
    index: int
    width: int


def _hash_tile_place(level: str, groups: tuple[str, ...]) -> _Place:
    found, index, width = _parse("/".join(("tile", level, *groups)))
    if not isinstance(found, int):
        raise _no_such_tile()
    return _Place(found, index, width)


def _hashes(log: Log, place: _Place) -> bytes:
    content = log.stored_tile(place.level, place.index)
    if len(content) < place.width * HASH_BYTES:
        raise _no_such_tile()
    return content[: place.width * HASH_BYTES]


def _no_such_tile() -> NotFoundError:
    return NotFoundError("this tile does not exist, or does not have this width yet", field="path")


def _parse(path: str) -> tuple[int | str, int, int]:
    try:
        return parse_tile_path(path)
    except InvalidInputError as error:
        raise NotFoundError("this tile does not exist", field="path") from error
