"""The public log: an independent client of transparency logs reads it without a token, and cannot read more."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import pytest

from qaes.adapters import clients
from tests.handlers.test_audit_recorder import EVENTS, entries, task_with
from tests.support import tlog_client
from tests.support.cloud import Cloud, cloud
from tests.support.trail import ORIGIN, anchor_all, log, new_recorder, put_entries, sequence_all


@pytest.fixture
def aws() -> Iterator[Cloud]:
    with cloud(state_machine=False) as it:
        yield it


def ask(aws: Cloud, path: str) -> tuple[int, dict[str, str], bytes]:
    """Call it as API Gateway does for a client that sends only a path."""
    event: dict[str, Any] = json.loads((EVENTS / "api_get.json").read_text())
    event |= {"path": path, "resource": path, "headers": {}, "multiValueHeaders": {}}
    event["requestContext"] |= {"path": f"/v1{path}", "resourcePath": path}
    event["requestContext"].pop("authorizer", None)
    answer = aws.invoke("PublicLogFunction", event)
    body = base64.b64decode(answer["body"]) if answer["isBase64Encoded"] else answer["body"].encode()
    return answer["statusCode"], {name.lower(): value for name, value in answer["headers"].items()}, body


def read(aws: Cloud) -> tlog_client.Log:
    def fetch(path: str) -> bytes:
        status, _, content = ask(aws, f"/log/{path}")
        assert status == 200, path
        return content

    newest = log().anchors.newest()
    assert newest is not None
    return tlog_client.Log(fetch, newest.verifier_key)


def recorded(aws: Cloud, count: int) -> str:
    task_id = task_with(count)
    new_recorder().drain(task_id)
    anchor_all(aws)
    return task_id


def test_client_verifies_proofs_from_tiles_only(aws: Cloud) -> None:
    task_id = recorded(aws, 3)
    before = read(aws)
    assert (before.origin, before.size) == (ORIGIN, 3)
    put_entries(300)
    sequence_all(aws)
    anchor_all(aws)
    after = read(aws)
    assert after.size == 303
    for entry in entries(task_id):
        leaf, index = bytes.fromhex(entry.leaf), entry.seq - 1
        assert tlog_client.includes(leaf, index, after.size, after.inclusion(index), after.root)
        assert not tlog_client.includes(leaf, index + 1, after.size, after.inclusion(index + 1), after.root)
    proof = after.consistency(before.size)
    assert tlog_client.extends(before.size, before.root, after.size, after.root, proof)
    assert not tlog_client.extends(before.size, b"x" * 32, after.size, after.root, proof)
    assert {"tile/0/000", "tile/0/001.p/47", "tile/1/000.p/1"} <= set(after.fetched)


def test_only_immutable_responses_are_cacheable(aws: Cloud) -> None:
    recorded(aws, 3)
    for path, kept, kind in (
        ("/log/checkpoint", "public, max-age=5", "text/plain; charset=utf-8"),
        ("/log/tile/0/000.p/3", "public, max-age=31536000, immutable", "application/octet-stream"),
        ("/log/tile/0/000", "no-store", "application/problem+json"),
    ):
        headers = ask(aws, path)[1]
        assert (headers["cache-control"], headers["content-type"]) == (kept, kind)


def test_unanchored_tiles_are_not_published(aws: Cloud) -> None:
    assert ask(aws, "/log/checkpoint")[0] == 404
    put_entries(2)
    sequence_all(aws)
    assert ask(aws, "/log/tile/0/000.p/2")[0] == 404
    anchor_all(aws)
    assert ask(aws, "/log/tile/0/000.p/2")[0] == 200
    put_entries(1)
    sequence_all(aws)
    assert ask(aws, "/log/tile/0/000.p/3")[0] == 404
    assert ask(aws, "/log/tile/0/000.p/2")[0] == 200, "the checkpoint's own tile stays"


@pytest.mark.parametrize(
    "path",
    [
        "/log/tile/entries/000.p/3", "/log/tile/entries/000", "/log/tile/entries/x001/000", "/log/tile/0/0",
        "/log/tile/x/000.p/3", "/log/tile/0/000.p/0", "/log/tile/64/000", "/log/tile/0/x001/x000/x000/000",
        "/audit/log/checkpoint", "/audit/health", "/log/tile", "/log",
    ],
)  # fmt: skip
def test_other_paths_return_404(aws: Cloud, path: str) -> None:
    recorded(aws, 3)
    assert ask(aws, path)[0] == 404


def test_public_log_reads_no_item_with_a_task(aws: Cloud) -> None:
    """Return the reads that its policy permits: tiles and anchors."""
    recorded(aws, 3)
    seen: list[str] = []

    def spy(arguments: dict[str, Any]) -> None:
        key = arguments.get("Key", {}).get("pk") or arguments["ExpressionAttributeValues"][":pk"]
        seen.append(key["S"].partition("#")[0])

    meta = clients.client("dynamodb").meta.events
    meta.register("before-parameter-build.dynamodb", lambda params, **_: spy(params), unique_id="spy")
    try:
        read(aws)
    finally:
        meta.unregister("before-parameter-build.dynamodb", unique_id="spy")
    assert set(seen) == {"TILE", "ANCHOR"}
