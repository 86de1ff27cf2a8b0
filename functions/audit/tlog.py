"""The log as C2SP's tlog-tiles has it: signed checkpoint, tiles of hashes, tiles of entries.

Existing clients of transparency logs read these paths under the prefix `/log/`: with a token (`audit.api`), and where
the operator has made the log public, without one (`audit.public_log`).
"""

from __future__ import annotations

from dataclasses import dataclass

from audit.log import CorruptLogError, Log
from audit.store import AuditStore
from qaes.domain.errors import InvalidInputError, NotFoundError
from qaes.domain.merkle import HASH_BYTES
from qaes.domain.tiles import TILE_WIDTH, parse_tile_path, tile_width

IMMUTABLE = "max-age=31536000, immutable"
"""How long a tile keeps: a path names level, index and width, and what it named once it names for ever."""
CHECKPOINT_SECONDS = 5
"""How old a checkpoint may be that a cache gives out."""


def checkpoint(log: Log) -> str:
    """The signed note of the newest confirmed anchor. Raises NotFoundError before the first."""
    newest = log.anchors.newest()
    if newest is None:
        raise NotFoundError("no checkpoint of the log has been anchored yet")
    return newest.note


def anchored_tile(log: Log, level: str, groups: tuple[str, ...]) -> bytes:
    """The hashes of a tile, as `hash_tile`, if the newest checkpoint has them: before that they are not published."""
    place = _hash_tile_place(level, groups)
    newest = log.anchors.newest()
    if newest is None or tile_width(place.level, place.index, newest.size) < place.width:
        raise _no_such_tile()
    return _hashes(log, place)


def hash_tile(log: Log, level: str, groups: tuple[str, ...]) -> bytes:
    """The hashes of a tile. Raises NotFoundError for what is not the path of one, or is wider than the tile."""
    return _hashes(log, _hash_tile_place(level, groups))


def entries_tile(log: Log, store: AuditStore, groups: tuple[str, ...]) -> bytes:
    """The texts of a tile's entries, each after its length in two bytes. Raises NotFoundError as `hash_tile`.

    Raises
    ------
    CorruptLogError
        The log has an entry that is not in the table.
    """
    _, index, width = _parse("/".join(("tile", "entries", *groups)))
    leaves = log.leaves(index * TILE_WIDTH, width)
    if len(leaves) < width:
        raise _no_such_tile()
    texts = store.texts([each.key for each in leaves])
    parts: list[bytes] = []
    for each in leaves:
        if each.key not in texts:
            raise CorruptLogError(f"entry {each.seq} of {each.task_id} is in the log and not in the table")
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
    return NotFoundError("there is no such tile, or it is not as wide yet", field="path")


def _parse(path: str) -> tuple[int | str, int, int]:
    try:
        return parse_tile_path(path)
    except InvalidInputError as error:
        raise NotFoundError("there is no such tile", field="path") from error
