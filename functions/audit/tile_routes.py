"""Routes for clients of transparency logs (C2SP tlog-tiles): checkpoint, hash tiles and, for auditors, entry tiles.

The local AWS does not support a path parameter that spans several segments. The routes therefore list each depth:
enough for 256 * 10^6 entries, and for 10^9 entries apart from the last tile.
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
"""Roles that can read every task's trail. A requester can read only their tasks' trails."""
Reader = Annotated[Caller, Depends(require("requester", *READERS))]
Auditor = Annotated[Caller, Depends(require("auditor"))]

router = APIRouter(route_class=StrictRoute, responses=PROBLEM_ANSWER)


class TileResponse(Response):
    """Concatenated hashes or entries."""

    media_type = "application/octet-stream"


_OCTETS: dict[int | str, dict[str, Any]] = {
    200: {"content": {TileResponse.media_type: {"schema": {"type": "string", "format": "binary"}}}}
}
Group = Annotated[
    str, Path(max_length=8, description="a part of the tile's number, such as `x001`, `067` or `067.p`; or a width")
]
Level = Annotated[str, Path(max_length=2, description="level of the tile, from 0")]


@router.get("/log/checkpoint", response_class=PlainTextResponse)
def get_signed_checkpoint(_who: Reader) -> str:
    """Return the newest anchored checkpoint as a signed note (C2SP tlog-checkpoint)."""
    return tlog.checkpoint(Log())


@router.get("/log/tile/entries/{a}", response_class=TileResponse, responses=_OCTETS)
def get_entries(_who: Auditor, request: Request, a: Group) -> Response:
    """Return the texts of 256 entries, each with its length in two bytes before it (C2SP tlog-tiles).

    Send `Accept: application/octet-stream`; otherwise API Gateway sends base64.
    """
    return _entries(request, (a,))


@router.get("/log/tile/entries/{a}/{b}", response_class=TileResponse, responses=_OCTETS)
def get_entries_2(_who: Auditor, request: Request, a: Group, b: Group) -> Response:
    """Return an entry tile numbered 1000 or more, or the log's last one: `/log/tile/entries/000.p/7`."""
    return _entries(request, (a, b))


@router.get("/log/tile/entries/{a}/{b}/{c}", response_class=TileResponse, include_in_schema=False)
def get_entries_3(_who: Auditor, request: Request, a: Group, b: Group, c: Group) -> Response:
    """Return an entry tile whose number has three groups."""
    return _entries(request, (a, b, c))


@router.get("/log/tile/entries/{a}/{b}/{c}/{d}", response_class=TileResponse, include_in_schema=False)
def get_entries_4(_who: Auditor, request: Request, a: Group, b: Group, c: Group, d: Group) -> Response:
    """Return an entry tile whose number has four groups."""
    return _entries(request, (a, b, c, d))


@router.get("/log/tile/{level}/{a}", response_class=TileResponse, responses=_OCTETS)
def get_tile(_who: Reader, level: Level, a: Group) -> Response:
    """Return 256 hashes of 32 bytes (C2SP tlog-tiles).

    Send `Accept: application/octet-stream`; otherwise API Gateway sends base64.
    """
    return _tile(tlog.hash_tile(Log(), level, (a,)))


@router.get("/log/tile/{level}/{a}/{b}", response_class=TileResponse, responses=_OCTETS)
def get_tile_2(_who: Reader, level: Level, a: Group, b: Group) -> Response:
    """Return a hash tile numbered 1000 or more, or one that is not full: `/log/tile/0/000.p/7`."""
    return _tile(tlog.hash_tile(Log(), level, (a, b)))


@router.get("/log/tile/{level}/{a}/{b}/{c}", response_class=TileResponse, include_in_schema=False)
def get_tile_3(_who: Reader, level: Level, a: Group, b: Group, c: Group) -> Response:
    """Return a hash tile whose number has three groups."""
    return _tile(tlog.hash_tile(Log(), level, (a, b, c)))


@router.get("/log/tile/{level}/{a}/{b}/{c}/{d}", response_class=TileResponse, include_in_schema=False)
def get_tile_4(_who: Reader, level: Level, a: Group, b: Group, c: Group, d: Group) -> Response:
    """Return a hash tile whose number has four groups."""
    return _tile(tlog.hash_tile(Log(), level, (a, b, c, d)))


def _tile(content: bytes) -> Response:
    """Return a tile that clients may cache for ever; shared caches must not store it, because it needs a token."""
    return TileResponse(content, headers={"cache-control": f"private, {tlog.IMMUTABLE}"})


def _entries(request: Request, groups: tuple[str, ...]) -> Response:
    answer = _tile(tlog.entries_tile(Log(), AuditStore(), groups))
    answer.headers["vary"] = "Accept-Encoding"
    # Compress only for clients that receive bytes: API Gateway would label base64 text as gzip.
    takes_bytes = request.headers.get("accept", "").partition(",")[0].partition(";")[0].strip() == answer.media_type
    if takes_bytes and takes_gzip(request.headers.get("accept-encoding", "")):
        answer.body = gzip.compress(bytes(answer.body), 6, mtime=0)
        answer.headers["content-encoding"] = "gzip"
        answer.headers["content-length"] = str(len(answer.body))
    return answer


def takes_gzip(accept_encoding: str) -> bool:
    """Return whether an Accept-Encoding accepts gzip (RFC 9110, 12.5.3)."""
    weights = {}
    for element in accept_encoding.lower().split(","):
        coding, _, parameter = element.partition(";")
        weights[coding.strip()] = parameter.replace(" ", "")
    weight = weights.get("gzip", weights.get("*"))
    return weight is not None and re.fullmatch(r"q=0(\.0{0,3})?", weight) is None
