"""The log as C2SP's tlog-tiles has it: signed checkpoint, tiles of hashes, tiles of entries.

Existing clients of transparency logs read these paths under the prefix `/log/`: with a token (`audit.api`), and where
the operator has made the log public, without one (`audit.public_log`).
"""

from __future__ import annotations

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
    newest = log.newest_anchor()
    if newest is None:
        raise NotFoundError("no checkpoint of the log has been anchored yet")
    return newest.note


def anchored_tile(log: Log, level: str, groups: tuple[str, ...]) -> bytes:
    """The hashes of a tile, as `hash_tile`, if the newest checkpoint has them: before that they are not published."""
    found, index, width = _parse("/".join(("tile", level, *groups)))
    newest = log.newest_anchor()
    if newest is None or not isinstance(found, int) or tile_width(found, index, newest.size) < width:
        raise NotFoundError("there is no such tile, or it is not as wide yet", field="path")
    return hash_tile(log, level, groups)


def hash_tile(log: Log, level: str, groups: tuple[str, ...]) -> bytes:
    """The hashes of a tile. Raises NotFoundError for what is not the path of one, or is wider than the tile."""
    found, index, width = _parse("/".join(("tile", level, *groups)))
    content = log.stored_tile(found, index) if isinstance(found, int) else b""
    if len(content) < width * HASH_BYTES:
        raise NotFoundError("there is no such tile, or it is not as wide yet", field="path")
    return content[: width * HASH_BYTES]


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
        raise NotFoundError("there is no such tile, or it is not as wide yet", field="path")
    texts = store.texts([each.key for each in leaves])
    parts: list[bytes] = []
    for each in leaves:
        if each.key not in texts:
            raise CorruptLogError(f"entry {each.seq} of {each.task_id} is in the log and not in the table")
        text = texts[each.key].encode("utf-8")
        parts += [len(text).to_bytes(2, "big"), text]
    return b"".join(parts)


def _parse(path: str) -> tuple[int | str, int, int]:
    try:
        return parse_tile_path(path)
    except InvalidInputError as error:
        raise NotFoundError("there is no such tile", field="path") from error
