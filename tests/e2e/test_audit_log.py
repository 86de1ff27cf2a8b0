"""The audit log on the local AWS: a bundle that a stranger verifies, and the log as its clients read it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from qaes.domain.merkle import root_of
from qaes.domain.note import parse_checkpoint, verify_note
from tests.e2e.conftest import MONITORING, ROOT, Api, fsck
from tests.support import tlog_client

OCTETS = {"Accept": "application/octet-stream"}


@pytest.fixture(scope="module")
def anchored(api: Api) -> str:
    """A transfer that was approved and made, all of it anchored."""
    task_id = api.start({
        "task_type": "transfer_funds", "description": "pay 3", "wallet_address": "0x1234567890abcdef",
        "parameters": {"to_address": "0xfedcba0987654321", "amount": 3},
    })  # fmt: skip
    api.wait(task_id, "waiting_approval")
    assert api.decide(task_id, approved=True).status_code == 200
    assert api.wait(task_id)["status"] == "completed"
    api.trail(task_id)
    return task_id


def test_every_entry_is_marked_as_anchored(api: Api, anchored: str) -> None:
    body = api("auditor", "GET", f"/audit/{anchored}").json()
    assert {entry["log_status"] for entry in body["logs"]} == {"anchored"}
    assert body["chain"]["verified"] is True
    leaf = body["logs"][2]["leaf"]
    found = api("requester", "GET", f"/audit/verify/{leaf}").json()
    assert found["verified"] is True, found


def test_stranger_verifies_the_bundle(api: Api, anchored: str, tmp_path: Path) -> None:
    answer = api("requester", "GET", f"/audit/{anchored}/bundle")
    assert answer.status_code == 200
    bundle = tmp_path / "bundle.json"
    bundle.write_bytes(answer.content)
    identity = api("auditor", "GET", "/audit/log/checkpoint").json()["anchor"]["source"]
    command = [sys.executable, "-I", str(ROOT / "verifier" / "verify_bundle.py"), str(bundle), "--log-id", "qaes"]
    found = subprocess.run(
        [*command, "--anchor-identity", identity], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert found.returncode == 0, found.stdout + found.stderr
    forged = json.loads(bundle.read_text())
    forged["entries"][0]["input"] = forged["entries"][0]["input"].replace("pay 3", "pay 4")
    bundle.write_text(json.dumps(forged))
    found = subprocess.run(
        [*command, "--anchor-identity", identity], capture_output=True, text=True, check=False, cwd=tmp_path
    )
    assert (found.returncode, "input" in found.stdout + found.stderr) == (1, True)


def test_clients_of_logs_read_checkpoint_and_tiles(api: Api, anchored: str) -> None:
    known = api("auditor", "GET", "/audit/log/checkpoint").json()
    answer = api("requester", "GET", "/log/checkpoint")
    assert answer.headers["content-type"].startswith("text/plain")
    said = parse_checkpoint(verify_note(answer.text, known["verifier_key"]))
    assert said.size <= 256, "this test reads one tile"
    width = f"000.p/{said.size}" if said.size < 256 else "000"
    tile = api("requester", "GET", f"/log/tile/0/{width}", **OCTETS).content
    assert root_of([tile[at : at + 32] for at in range(0, len(tile), 32)]) == said.root
    entries = api("auditor", "GET", f"/log/tile/entries/{width}", **OCTETS).content
    first = entries[2 : 2 + int.from_bytes(entries[:2], "big")]
    assert json.loads(first)["log_id"] == "qaes"
    assert api("requester", "GET", f"/log/tile/entries/{width}", **OCTETS).status_code == 403


def test_stock_client_reads_the_public_log(api: Api, anchored: str, waiting: Callable[..., str]) -> None:
    """No token, no Accept header: it verifies inclusion and consistency from the tiles alone."""
    prefix = f"{api.cloud.url}/public/log"
    key = api("auditor", "GET", "/audit/log/checkpoint").json()["verifier_key"]
    before = tlog_client.Log(tlog_client.over_http(prefix), key)
    assert before.origin == f"{api.cloud.outputs['ApiId']}.execute-api.us-east-1.amazonaws.com/v1/log"
    for entry in api("auditor", "GET", f"/audit/{anchored}").json()["logs"]:
        leaf, index = bytes.fromhex(entry["leaf"]), entry["index"]
        assert tlog_client.includes(leaf, index, before.size, before.inclusion(index), before.root)
    task_id = api.start(MONITORING)
    api.wait(task_id)
    api.trail(task_id)
    after = tlog_client.Log(tlog_client.over_http(prefix), key)
    assert after.size > before.size
    proof = after.consistency(before.size)
    assert tlog_client.extends(before.size, before.root, after.size, after.root, proof)


def test_public_log_has_no_entries_and_sets_cache_headers(api: Api, anchored: str) -> None:
    kept = {
        "/public/log/checkpoint": (200, "public, max-age=5"),
        "/public/log/tile/0/000.p/1": (200, "public, max-age=31536000, immutable"),
        "/public/log/tile/entries/000.p/1": (404, "no-store"),
        f"/public/audit/{anchored}": (404, "no-store"),
    }
    for path, expected in kept.items():
        answer = api(None, "GET", path)
        assert (answer.status_code, answer.headers["cache-control"]) == expected, path
    assert api(None, "GET", "/log/checkpoint").status_code == 401
    assert api(None, "GET", "/log/tile/0/000.p/1").status_code == 401


def test_entries_compressed_when_client_accepts_gzip(api: Api, anchored: str) -> None:
    answer = api("auditor", "GET", "/log/tile/entries/000.p/8", **OCTETS, Accept_Encoding="gzip")
    assert (answer.status_code, answer.headers["content-encoding"]) == (200, "gzip")
    plain = api("auditor", "GET", "/log/tile/entries/000.p/8", **OCTETS, Accept_Encoding="identity")
    assert "content-encoding" not in plain.headers
    assert plain.content == answer.content
    assert answer.headers["cache-control"] == plain.headers["cache-control"] == "private, max-age=31536000, immutable"


def test_fsck_finds_nothing(api: Api, anchored: str) -> None:
    found = fsck(api.cloud)
    assert found.returncode == 0, found.stdout + found.stderr
    assert "every invariant holds" in found.stdout


def test_entries_have_their_index_within_seconds(api: Api, waiting: Callable[..., str]) -> None:
    task_id = waiting(1)
    for _ in range(50):
        logs = api("auditor", "GET", f"/audit/{task_id}").json()["logs"]
        if logs and all(entry["index"] is not None for entry in logs):
            break
        time.sleep(0.2)
    assert all(entry["log_status"] != "recorded" for entry in logs)
