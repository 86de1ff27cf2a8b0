"""The log for everybody, where the operator has made it public: its signed checkpoint and its tiles of hashes.

Clients of transparency logs (C2SP tlog-tiles) send no token. What they get here holds no personal data: a leaf hash is
over a text with 128 random bits, and nobody finds out from it what an entry says. The entries themselves name people
and tasks; they stay with the auditors (`audit.api`). Nothing is shown that is not anchored.

This function's role may read the tiles and the anchors, and nothing else.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Response
from fastapi.responses import PlainTextResponse

from audit import tlog
from audit.log import Log
from qaes.adapters.http import OPEN, create_app, make_handler

Part = Annotated[str, Path(max_length=8)]

app = create_app("public-log")


@app.get("/log/checkpoint", openapi_extra=OPEN)
def get_checkpoint() -> Response:
    """The newest anchored checkpoint as a signed note (C2SP tlog-checkpoint)."""
    return PlainTextResponse(
        tlog.checkpoint(Log()), headers={"cache-control": f"public, max-age={tlog.CHECKPOINT_SECONDS}"}
    )


@app.get("/log/tile/{level}/{a}", openapi_extra=OPEN)
def get_tile(level: Part, a: Part) -> Response:
    """256 hashes of 32 bytes."""
    return _tile(level, a)


@app.get("/log/tile/{level}/{a}/{b}", openapi_extra=OPEN)
def get_tile_2(level: Part, a: Part, b: Part) -> Response:
    """The same, of a tile from number 1000 on, or of a tile that is not full."""
    return _tile(level, a, b)


@app.get("/log/tile/{level}/{a}/{b}/{c}", openapi_extra=OPEN)
def get_tile_3(level: Part, a: Part, b: Part, c: Part) -> Response:
    """The same, deeper."""
    return _tile(level, a, b, c)


@app.get("/log/tile/{level}/{a}/{b}/{c}/{d}", openapi_extra=OPEN)
def get_tile_4(level: Part, a: Part, b: Part, c: Part, d: Part) -> Response:
    """The same, deeper."""
    return _tile(level, a, b, c, d)


handler = make_handler(app)


def _tile(level: str, *groups: str) -> Response:
    return Response(
        tlog.anchored_tile(Log(), level, groups),
        media_type="application/octet-stream",
        headers={"cache-control": f"public, {tlog.IMMUTABLE}"},
    )
