"""The log for clients of transparency logs (C2SP tlog-tiles): checkpoint, hash tiles and, for auditors, entries.

The local AWS knows no parameter for several segments of a path: the routes are listed, as deep as 256 * 10^6 entries
need, and 10^9 but for the last tile.
"""

from __future__ import annotations

import gzip
import re
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Path, Request, Response
from fastapi.responses import PlainTextResponse

from audit import tlog
from audit.log import Log
from audit.store import AuditStore
from qaes.adapters.http import PROBLEM_ANSWER, Caller, require
from qaes.adapters.strict_input import StrictRoute

READERS = ("auditor", "approver", "operator")
"""Roles that may read every task's trail; a requester reads that of their own tasks."""
Reader = Annotated[Caller, Depends(require("requester", *READERS))]
Auditor = Annotated[Caller, Depends(require("auditor"))]

router = APIRouter(route_class=StrictRoute, responses=PROBLEM_ANSWER)


class TileResponse(Response):
    """Hashes or entries, one after the other."""

    media_type = "application/octet-stream"


_OCTETS: dict[int | str, dict[str, Any]] = {
    200: {"content": {TileResponse.media_type: {"schema": {"type": "string", "format": "binary"}}}}
}
Group = Annotated[str, Path(max_length=8, description="of the tile's number, as `x001`, `067` or `067.p`; or a width")]
Level = Annotated[str, Path(max_length=2, description="of the tile, from 0")]


@router.get("/log/checkpoint", response_class=PlainTextResponse)
def get_signed_checkpoint(_who: Reader) -> str:
    """The newest anchored checkpoint as a signed note (C2SP tlog-checkpoint)."""
    return tlog.checkpoint(Log())


@router.get("/log/tile/entries/{a}", response_class=TileResponse, responses=_OCTETS)
def get_entries(_who: Auditor, request: Request, a: Group) -> Response:
    """The texts of 256 entries, each after its length in two bytes (C2SP tlog-tiles).

    Ask for it with `Accept: application/octet-stream`; otherwise API Gateway sends base64.
    """
    return _entries(request, (a,))


@router.get("/log/tile/entries/{a}/{b}", response_class=TileResponse, responses=_OCTETS)
def get_entries_2(_who: Auditor, request: Request, a: Group, b: Group) -> Response:
    """The same, of a tile from number 1000 on, or of the log's last tile: `/log/tile/entries/000.p/7`."""
    return _entries(request, (a, b))


@router.get("/log/tile/entries/{a}/{b}/{c}", response_class=TileResponse, include_in_schema=False)
def get_entries_3(_who: Auditor, request: Request, a: Group, b: Group, c: Group) -> Response:
    """The same, deeper."""
    return _entries(request, (a, b, c))


@router.get("/log/tile/entries/{a}/{b}/{c}/{d}", response_class=TileResponse, include_in_schema=False)
def get_entries_4(_who: Auditor, request: Request, a: Group, b: Group, c: Group, d: Group) -> Response:
    """The same, deeper."""
    return _entries(request, (a, b, c, d))


@router.get("/log/tile/{level}/{a}", response_class=TileResponse, responses=_OCTETS)
def get_tile(_who: Reader, level: Level, a: Group) -> Response:
    """256 hashes of 32 bytes (C2SP tlog-tiles).

    Ask for it with `Accept: application/octet-stream`; otherwise API Gateway sends base64.
    """
    return _tile(tlog.hash_tile(Log(), level, (a,)))


@router.get("/log/tile/{level}/{a}/{b}", response_class=TileResponse, responses=_OCTETS)
def get_tile_2(_who: Reader, level: Level, a: Group, b: Group) -> Response:
    """The same, of a tile from number 1000 on, or of a tile that is not full: `/log/tile/0/000.p/7`."""
    return _tile(tlog.hash_tile(Log(), level, (a, b)))


@router.get("/log/tile/{level}/{a}/{b}/{c}", response_class=TileResponse, include_in_schema=False)
def get_tile_3(_who: Reader, level: Level, a: Group, b: Group, c: Group) -> Response:
    """The same, deeper."""
    return _tile(tlog.hash_tile(Log(), level, (a, b, c)))


@router.get("/log/tile/{level}/{a}/{b}/{c}/{d}", response_class=TileResponse, include_in_schema=False)
def get_tile_4(_who: Reader, level: Level, a: Group, b: Group, c: Group, d: Group) -> Response:
    """The same, deeper."""
    return _tile(tlog.hash_tile(Log(), level, (a, b, c, d)))


def _tile(content: bytes) -> Response:
    """What cannot change; who has a token for it keeps it for themselves."""
    return TileResponse(content, headers={"cache-control": f"private, {tlog.IMMUTABLE}"})


def _entries(request: Request, groups: tuple[str, ...]) -> Response:
    answer = _tile(tlog.entries_tile(Log(), AuditStore(), groups))
    answer.headers["vary"] = "Accept-Encoding"
    # Only to a client that gets bytes at all: API Gateway would call base64 text gzip.
    takes_bytes = request.headers.get("accept", "").partition(",")[0].partition(";")[0].strip() == answer.media_type
    if takes_bytes and takes_gzip(request.headers.get("accept-encoding", "")):
        answer.body = gzip.compress(bytes(answer.body), 6, mtime=0)
        answer.headers["content-encoding"] = "gzip"
        answer.headers["content-length"] = str(len(answer.body))
    return answer


def takes_gzip(accept_encoding: str) -> bool:
    """Whether an Accept-Encoding names gzip, or everything, without forbidding it (RFC 9110, 12.5.3)."""
    weights = {}
    for each in accept_encoding.lower().split(","):
        coding, _, parameter = each.partition(";")
        weights[coding.strip()] = parameter.replace(" ", "")
    weight = weights.get("gzip", weights.get("*"))
    return weight is not None and re.fullmatch(r"q=0(\.0{0,3})?", weight) is None
