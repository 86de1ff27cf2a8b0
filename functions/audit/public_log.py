"""The public log, if the operator has enabled it: its signed checkpoint and its hash tiles, without a token.

Clients of transparency logs (C2SP tlog-tiles) send no token. The responses hold no personal data: a leaf hash covers
a text with 128 random bits, so it does not reveal the entry. The entries themselves name people and tasks; only
auditors can read them (`audit.api`). Hashes are published only after they are anchored.

This function's role can read the tiles and the anchors, and nothing else.
"""

from __future__ import annotations

from typing import Annotated

from fastapi import Path, Response
from fastapi.responses import PlainTextResponse

from audit import tlog
from audit.log import Log
from qaes.adapters.http import NO_TOKEN, create_app, make_handler

Part = Annotated[str, Path(max_length=8)]

app = create_app("public-log")


@app.get("/log/checkpoint", openapi_extra=NO_TOKEN)
def get_checkpoint() -> Response:
    """Return the newest anchored checkpoint as a signed note (C2SP tlog-checkpoint)."""
    return PlainTextResponse(
        tlog.checkpoint(Log()), headers={"cache-control": f"public, max-age={tlog.CHECKPOINT_SECONDS}"}
    )


@app.get("/log/tile/{level}/{a}", openapi_extra=NO_TOKEN)
def get_tile(level: Part, a: Part) -> Response:
    """Return 256 hashes of 32 bytes."""
    return _tile(level, a)


@app.get("/log/tile/{level}/{a}/{b}", openapi_extra=NO_TOKEN)
def get_tile_2(level: Part, a: Part, b: Part) -> Response:
    """Return a hash tile numbered 1000 or more, or one that is not full."""
    return _tile(level, a, b)


@app.get("/log/tile/{level}/{a}/{b}/{c}", openapi_extra=NO_TOKEN)
def get_tile_3(level: Part, a: Part, b: Part, c: Part) -> Response:
    """Return a hash tile whose number has three groups."""
    return _tile(level, a, b, c)


@app.get("/log/tile/{level}/{a}/{b}/{c}/{d}", openapi_extra=NO_TOKEN)
def get_tile_4(level: Part, a: Part, b: Part, c: Part, d: Part) -> Response:
    """Return a hash tile whose number has four groups."""
    return _tile(level, a, b, c, d)


handler = make_handler(app)


def _tile(level: str, *groups: str) -> Response:
    return Response(
        tlog.anchored_tile(Log(), level, groups),
        media_type="application/octet-stream",
        headers={"cache-control": f"public, {tlog.IMMUTABLE}"},
    )
