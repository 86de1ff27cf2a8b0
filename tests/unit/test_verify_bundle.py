"""The offline verifier: it accepts the domain's bundles, computes the same values, and imports none of the product."""

from __future__ import annotations

import ast
import base64
import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from qaes.domain import merkle
from qaes.domain.bundle import Bundle, TrailEntry, build_bundle, policy_ids
from qaes.domain.canonical import canonical_json, sha256_hex
from qaes.domain.errors import InvalidInputError
from qaes.domain.merkle import ProofError
from qaes.domain.policy import policy_of
from qaes.domain.qubic import fourq, schnorrq, transaction
from qaes.domain.qubic.identity import encode_identity
from qaes.domain.qubic.k12 import k12
from qaes.domain.tiles import tile_path
from tests.support.bundles import (
    LOG_ID,
    RULES,
    SALT,
    STORIES,
    TASK_ID,
    Anchorer,
    Log,
    Trail,
    cancelled,
    denied,
    expired_and_retried,
    load_verifier,
    monitored,
    on_chain,
    policy_text,
    transfer,
    transferred,
)
from tests.unit.test_canonical import JSON

VERIFIER = Path(__file__).parents[2] / "verifier" / "verify_bundle.py"
verifier = load_verifier()
ANCHORER = Anchorer()
HEADERS: dict[str, str] = {}
"""Of the last request to `serving`."""


def verify(bundle: dict[str, Any], **options: Any) -> list[str]:
    options = {"log_id": LOG_ID, "anchor_identity": ANCHORER.identity} | options
    lines: list[str] = verifier.verify(canonical_json(bundle).encode(), **options)
    return lines


def fails(bundle: dict[str, Any], **options: Any) -> tuple[str, str]:
    with pytest.raises(verifier.Failed) as caught:
        verify(bundle, **options)
    return caught.value.check, caught.value.where


# Genuine bundles


@pytest.mark.parametrize("said", [{"request_hash": sha256_hex("another")}, Trail().request, {}])
def test_end_and_a_retry_name_the_request_by_its_hash(said: dict[str, Any]) -> None:
    ended = Trail().start().end("failed")
    assert verify(ended.bundle())
    assert fails(Trail().start().record("task_ended", "execution", "failed", said, {}).bundle()) == ("input", "entry 2")
    again = ended.record("task_retried", "alice", "pending", said, {"run": 2})
    assert fails(again.bundle()) == ("input", "entry 3")


def test_retrier_cannot_approve_the_task() -> None:
    def trail(retried_by: str) -> Trail:
        found = Trail().start().check_policy().build().execute(0).execute(1).end("failed").retry(retried_by)
        return found.ask(2).decide(2, "bob", True, 1).decide(2, "carol", True, 2)

    assert verify(trail("olivia").bundle(), open_=True)
    assert fails(trail("carol").bundle(), open_=True)[0] == "four eyes"


@pytest.mark.parametrize("name", STORIES)
def test_genuine_bundle_is_accepted(name: str) -> None:
    bundle = STORIES[name]().bundle()
    Bundle.model_validate(bundle)
    assert verify(bundle, task_id=TASK_ID)


def test_report_lists_checked_and_unchecked_claims() -> None:
    report = "\n".join(verify(transferred().bundle()))
    assert (
        "approved  by bob, carol" in report
        and "ran       step_1 check_balance" in report
        and "ended     completed" in report
    )
    assert "14, of which 14 are in the anchored log" in report
    assert "network: mock!" in report and "nothing to an outsider" in report
    assert "--rpc" in report and "--log" in report
    assert "network: mock!" not in "\n".join(verify(denied().bundle(network="mainnet")))


def test_open_task_accepted_with_open_option() -> None:
    bundle = transfer().bundle()
    assert fails(bundle) == ("complete", "entry 13")
    assert "ended     not yet, or its end was left out" in verify(bundle, open_=True)


def test_entries_after_the_anchor_are_listed_as_worth_nothing() -> None:
    bundle = transferred().bundle(unanchored=2)
    assert [each["index"] is None for each in bundle["entries"]] == [False] * 12 + [True] * 2
    assert fails(bundle) == ("complete", "entry 13")
    report = "\n".join(verify(bundle, open_=True))
    assert "14, of which 12 are in the anchored log" in report
    assert "NOT ANCHORED YET, worth nothing so far: entry 14, task_ended" in report


def test_bundle_before_the_first_anchor_proves_nothing() -> None:
    trail = transferred()
    entries = [TrailEntry(*each, None) for each in trail.entries]
    bundle = build_bundle(
        log_id=LOG_ID, network="mock", task_id=TASK_ID, salt=SALT, entries=entries, anchored=None,
        prove=pytest.fail, policies=[trail.policy_text],
    )  # fmt: skip
    assert fails(bundle, open_=True) == ("anchor", "bundle")


def test_later_policy_that_a_step_saw_is_in_the_bundle_too() -> None:
    trail = Trail("monitor_wallet").start().check_policy().build().execute(0)
    text = policy_text(version=4)
    seen = policy_of(text).decide("monitoring").model_dump(mode="json") | {"pinned": False}
    trail.execute(1, seen)
    entries = [TrailEntry(*each, None) for each in trail.entries]
    assert policy_ids(entries) == {trail.policy_id, seen["policy_id"]}
    bundle = trail.bundle()
    assert fails(bundle, open_=True) == ("policy", "entry 7")
    bundle["policies"][sha256_hex(text)] = text
    assert verify(bundle, open_=True)


def test_bundle_is_made_of_an_anchor_and_of_nothing_else() -> None:
    sent = ANCHORER.transaction(b"something else").encode()
    for anchored in (b"", sent):
        with pytest.raises(ProofError) as caught:
            build_bundle(
                log_id=LOG_ID, network="mock", task_id=TASK_ID, salt=SALT, entries=[], anchored=anchored,
                prove=pytest.fail, policies=[],
            )  # fmt: skip
        assert caught.value.check == "payload"


def test_bundle_without_policy_check_needs_no_policy() -> None:
    assert policy_ids([TrailEntry(*each, None) for each in Trail().start().entries]) == set()
    assert verify(Trail().start().end("cancelled", "alice").bundle())


# The same results as the domain's


@given(JSON)
@example([1e16, 1e21, 1.5e-7, 1e-6, 123456789.5, 1e20, -0.0, 5e-324, 1.7976931348623157e308, 2.0**53 - 1])
def test_canonical_texts_are_the_same(value: Any) -> None:
    text = canonical_json(value)
    assert verifier.canonical(value) == text
    assert verifier.canonical(verifier.parse_canonical(text, "text", "here")) == text


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_numbers_are_written_the_same(number: float) -> None:
    assert verifier.ecmascript(number) == canonical_json(number)


@settings(deadline=None, max_examples=30)
@given(st.binary(max_size=8000), st.integers(0, 168))
def test_k12_is_the_same(message: bytes, size: int) -> None:
    assert verifier.k12(message, size) == k12(message, size)


@given(st.binary(min_size=32, max_size=32))
def test_letters_are_the_same(data: bytes) -> None:
    assert verifier.letters(data) == encode_identity(data)


@settings(deadline=None, max_examples=60)
@given(st.binary(min_size=32, max_size=32) | st.integers(1, 2**250).map(lambda n: fourq.encode(fourq.multiply(n))))
@example(bytes(32))
@example(b"\x01" + bytes(31))
@example(b"\x01" + bytes(30) + b"\x80")
@example(b"\xff" * 32)
def test_points_are_decoded_the_same(data: bytes) -> None:
    try:
        expected = fourq.affine(fourq.decode(data))
    except ValueError:
        expected = None
    assert verifier.decode_point(data) == expected


@settings(deadline=None, max_examples=20)
@given(st.binary(min_size=32, max_size=32), st.integers(0, 512 * 2))
def test_signatures_are_judged_the_same(digest: bytes, at: int) -> None:
    signature = schnorrq.sign(ANCHORER.subseed, ANCHORER.public_key, digest)
    assert verifier.is_signed(ANCHORER.public_key, digest, signature)
    if at < 512:
        flipped = (int.from_bytes(signature, "little") ^ 1 << at).to_bytes(64, "little")
        judged = verifier.is_signed(ANCHORER.public_key, digest, flipped)
        assert judged is schnorrq.verify(ANCHORER.public_key, digest, flipped) is False


def test_key_of_low_order_signs_nothing() -> None:
    # The neutral element as key: with s = r any commitment would do.
    key = fourq.encode(fourq.IDENTITY)
    forged = fourq.encode(fourq.multiply(5)) + (5).to_bytes(32, "little")
    assert verifier.is_signed(key, bytes(32), forged) is schnorrq.verify(key, bytes(32), forged) is False


def test_the_published_transaction() -> None:
    # Two independent implementations agree on it (docs/qubic.md).
    sent = ANCHORER.transaction(bytes(range(72))).encode()
    txid = "obtjubkjxnpudcivzqiwyubwmoydjtbndcxczmhvrclheivapcabszxcddeb"
    verifier.check_transaction({"bytes": sent, "txid": txid})
    assert transaction.decode(sent).id == txid


@given(st.integers(1, 300), st.data())
def test_proofs_are_judged_the_same(size: int, data: st.DataObject) -> None:
    log = Log()
    log.append(*(str(number) for number in range(size)))
    index = data.draw(st.integers(0, size - 1))
    proof = data.draw(st.sampled_from([log.prove(index, size), [], [bytes(32)] * 3, log.prove(0, size)[:-1]]))
    leaf, root = merkle.leaf_hash(str(index)), log.anchor().root
    arguments = {"leaf": bytes.fromhex(leaf), "index": data.draw(st.integers(0, size)), "size": size, "proof": proof}
    try:
        merkle.verify_inclusion(**arguments, root=root)
        ours = True
    except ProofError:
        ours = False
    try:
        theirs = verifier.root_by(**arguments, where="here") == root
    except verifier.Failed:
        theirs = False
    assert ours is theirs


# JSON


@pytest.mark.parametrize(
    "text",
    ['{"a":1,"a":1}', "NaN", "Infinity", "-Infinity", '"\\ud800"', '"\\udc00\\ud800"', "1.0", "1e0", "-0.0", "1E400",
     "", "{", "[1,]", "01", "nul", "'a'", "9007199254740993", "1" * 5000, "[" * 100_000],
)  # fmt: skip
def test_lenient_json_is_refused(text: str) -> None:
    with pytest.raises(verifier.Failed) as caught:
        verifier.parse(text, "here", fractions=False)
    assert caught.value.check == "json"


@pytest.mark.parametrize(
    "text",
    ["1.0", "-0", "-0.0", "0.10", "1e3", "1E21", "1e21", "9007199254740993", '{"b":1,"a":1}', '{"a": 1}', " 1", "1\n",
     '"\\u0061"', '"\\/"', '"\\u001F"', '"\\u00e9"', '{"\ufb33":1,"\U0001f600":2}', "0.0000001",
     "10000000000000000000000"],
)  # fmt: skip
def test_texts_that_are_not_canonical_are_refused(text: str) -> None:
    with pytest.raises(verifier.Failed) as caught:
        verifier.parse_canonical(text, "R7 text", "here")
    assert caught.value.check == "text"


@pytest.mark.parametrize("value", [2**53 + 1, float("nan"), "\ud800"])
def test_value_without_canonical_text_is_not_recorded(value: Any) -> None:
    with pytest.raises(InvalidInputError):
        Trail(parameters={"value": value}).start()


def test_white_space_between_members_is_ignored() -> None:
    data = json.dumps(denied().bundle(), indent=2).encode()
    assert verifier.verify(data, log_id=LOG_ID, anchor_identity=ANCHORER.identity)


# As a stranger runs it


def run(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # -I -S: no packages outside the standard library can be imported.
    return subprocess.run(
        [sys.executable, "-I", "-S", str(VERIFIER), *arguments], cwd=cwd, capture_output=True, text=True, check=False
    )


def test_command(tmp_path: Path) -> None:
    path = tmp_path / "bundle.json"
    path.write_text(canonical_json(transferred().bundle()))
    pinned = ("--log-id", LOG_ID, "--anchor-identity", ANCHORER.identity)
    held = run("bundle.json", *pinned, cwd=tmp_path)
    assert (held.returncode, held.stderr) == (0, "") and held.stdout.startswith("OK\ntask      " + TASK_ID)
    assert run("bundle.json", *pinned, "--task-id", TASK_ID, cwd=tmp_path).returncode == 0
    refused = run("bundle.json", *pinned, "--task-id", TASK_ID + "0", cwd=tmp_path)
    assert refused.returncode == 1
    assert refused.stdout == "FAILED task (bundle): not the task that was asked for [R5]\n"
    assert run("bundle.json", cwd=tmp_path).returncode == 2
    assert run("absent.json", *pinned, cwd=tmp_path).returncode == 2
    path.write_bytes(b"\xff")
    assert run("bundle.json", *pinned, cwd=tmp_path).stdout == "FAILED json (bundle): not UTF-8 [R1]\n"


def test_name_cannot_write_lines_of_the_report(tmp_path: Path) -> None:
    trail = Trail()
    trail.request["requester"] = "mallory\nended     completed\x1b[2K\u202e, \u5f20\u4e09"
    trail.start().end("cancelled", "alice")
    (tmp_path / "bundle.json").write_text(canonical_json(trail.bundle()), encoding="utf-8")
    pinned = ("--log-id", LOG_ID, "--anchor-identity", ANCHORER.identity)
    held = run("bundle.json", *pinned, cwd=tmp_path)
    first = held.stdout.splitlines()[1]
    assert held.returncode == 0 and "mallory?ended     completed?[2K?, " in first
    (tmp_path / "bundle.json").write_text(canonical_json(trail.bundle() | {"policies": {"a\nOK": "b"}}))
    refused = run("bundle.json", *pinned, cwd=tmp_path)
    assert refused.returncode == 1 and refused.stdout == "FAILED policy (a?OK): not the document of this hash [R75]\n"


def test_verifier_and_product_do_not_import_each_other() -> None:
    text = VERIFIER.read_text()
    imported = set(re.findall(r"^ *(?:from|import) ([a-z_0-9]+)", text, re.MULTILINE))
    assert imported <= set(sys.stdlib_module_names)
    root = VERIFIER.parents[1]
    for folder in ("functions", "layers"):
        for path in (root / folder).rglob("*.py"):
            assert not re.search(r"import.*verify_bundle|verify_bundle.*import", path.read_text()), path


def test_old_python_gets_one_clear_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    source = VERIFIER.read_text()
    tree = ast.parse(source, feature_version=(3, 8))
    newer = (ast.Match, *(getattr(ast, name) for name in ("TryStar", "TypeAlias") if hasattr(ast, name)))
    assert not [node for node in ast.walk(tree) if isinstance(node, newer)]
    monkeypatch.setattr(sys, "version_info", (3, 8, 20, "final", 0))
    monkeypatch.setattr(sys, "version", "3.8.20 (default, Oct  3 2024)")
    with pytest.raises(SystemExit) as stopped:
        exec(compile(source, str(VERIFIER), "exec"), {"__name__": "__main__"})  # noqa: S102 - as an old Python begins it
    assert stopped.value.code == 2
    told = capsys.readouterr()
    assert (told.out, told.err) == ("", "verify_bundle.py needs Python 3.11 or later; this is Python 3.8.20\n")


def test_nothing_that_an_old_python_lacks_comes_before_its_line() -> None:
    body = ast.parse(VERIFIER.read_text()).body
    guard = next(number for number, node in enumerate(body) if isinstance(node, ast.If))
    assert all(isinstance(node, ast.Expr | ast.Import | ast.ImportFrom) for node in body[:guard])


@pytest.mark.parametrize(
    ("body", "line"),
    [
        (
            '{"title":"Not Found","status":404,"detail":"no such task","request_id":"x"}',
            'an error response of the API, not a bundle: {"detail":"no such task","status":404} [R3]',
        ),
        (
            '{"message":"Unauthorized"}',
            'an error response of the API, not a bundle: {"message":"Unauthorized"} [R3]',
        ),
        (
            '{"detail":[{"msg":"bad\\u001b[2K"}],"status":422}',
            'an error response of the API, not a bundle: {"detail":[{"msg":"bad\\u001b[2K"}],"status":422} [R3]',
        ),
    ],
)
def test_error_response_is_named_as_one(
    body: str, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bundle.json").write_text(body)
    arguments = [str(tmp_path / "bundle.json"), "--log-id", LOG_ID, "--anchor-identity", ANCHORER.identity]
    assert verifier.main(arguments) == 1
    assert capsys.readouterr().out == f"FAILED format (bundle): {line}\n"


@pytest.mark.parametrize("levels", [240, 251, 600, 700, 800, 900, 5_000, 200_000])
@pytest.mark.parametrize("shape", ["[", '{"a":'])
@pytest.mark.parametrize("place", ["file", "input", "output", "text", "policy"])
def test_deep_nesting_gets_one_line(
    levels: int, shape: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = shape * levels + "1" + {"[": "]"}.get(shape, "}") * levels
    bundle = denied().bundle()
    if place == "policy":
        bundle["policies"] = {sha256_hex(deep): deep}
    elif place != "file":
        bundle["entries"][1][place] = deep
    (tmp_path / "bundle.json").write_text(deep if place == "file" else json.dumps(bundle))
    arguments = [str(tmp_path / "bundle.json"), "--log-id", LOG_ID, "--anchor-identity", ANCHORER.identity]
    assert verifier.main(arguments) == 1
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("FAILED ")
    if levels > 250:
        assert line.endswith("nested more than 250 levels deep [R2]")


def test_deepest_request_that_the_system_accepts_is_verified() -> None:
    """Beyond 200 levels the system cannot read its own records (pydantic); the verifier allows some more."""
    value: Any = 1
    for _ in range(200):
        value = {"a": value}
    trail = Trail("paint", {"deep": value}, RULES | {"paint": RULES["monitoring"]}).start().check_policy().build()
    assert verify(trail.execute(0).execute(1).end("completed").bundle())


# Over the network


@contextmanager
def serving(answers: dict[str, tuple[int, bytes]]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            HEADERS.clear()
            HEADERS.update(self.headers.items())
            status, body = answers.get(self.path, (404, b""))
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert set(sent) == {"hash"}
            self.do_GET()

        def log_message(self, *_: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def looked_up(bundle: dict[str, Any], status: int, body: Any) -> list[str]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    with serving({"/query/v1/getTransactionByHash": (status, data)}) as url:
        return verify(bundle, rpc=url)


def test_transaction_is_looked_up() -> None:
    bundle = transferred().bundle()
    for body in (on_chain(bundle), {"transaction": on_chain(bundle)}):
        report = "\n".join(looked_up(bundle, 200, body))
        assert "--rpc" not in report


def test_anchor_refused_when_node_lacks_the_transaction() -> None:
    bundle = transferred().bundle()
    other = base64.b64encode(bytes(64)).decode()
    bodies: list[tuple[int, Any]] = [
        (404, {"code": 5, "message": "not found"}), (500, b""), (200, b"no json"), (200, []), (200, {}), (200, None),
        (200, {"transaction": None}), (200, on_chain(bundle, hash="a" * 60)), (200, on_chain(bundle, tickNumber=1)),
        (200, on_chain(bundle, signature=other)), (200, on_chain(bundle, inputData=other)),
        (200, on_chain(bundle, source="A" * 60)), (200, on_chain(bundle, amount="1")), (200, b"[" * 100_000),
        (200, on_chain(bundle, inputType=0)), (200, on_chain(bundle, tickNumber=float(75_241_800) + 0.5)),
        (200, json.dumps(on_chain(bundle, tickNumber=0)).replace('"tickNumber": 0', '"tickNumber": 1e400').encode()),
    ]  # fmt: skip
    for status, body in bodies:
        with pytest.raises(verifier.Failed) as caught:
            looked_up(bundle, status, body)
        assert caught.value.check == "rpc", body
    assert fails(bundle, rpc="http://127.0.0.1:1")[0] == "rpc"


def test_whole_log_is_read_from_a_folder_or_over_http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = Log()
    log.append(*(f"entry {number} of another task" for number in range(700)))
    bundle = monitored().bundle(log=log)
    tiles = log.files()
    log.write(tmp_path)
    assert "--log" not in "\n".join(verify(bundle, log=str(tmp_path)))
    with serving({f"/log/{name}": (200, content) for name, content in tiles.items()}) as url:
        assert verify(bundle, log=f"{url}/log/")
    assert "Authorization" not in HEADERS
    monkeypatch.setenv("LOG_TOKEN", "abc")
    with serving({f"/log/{name}": (200, content) for name, content in tiles.items()}) as url:
        assert verify(bundle, log=f"{url}/log")
    assert HEADERS["Authorization"] == "Bearer abc"
    (tmp_path / "tile/entries/001").write_bytes(tiles["tile/entries/001"][:-1] + b"?")
    assert fails(bundle, log=str(tmp_path))[0] == "whole log"
    (tmp_path / "tile/entries/001").unlink()
    assert fails(bundle, log=str(tmp_path))[0] == "whole log"


def test_full_tile_serves_an_anchor_that_saw_it_partial(tmp_path: Path) -> None:
    log = Log()
    bundle = denied().bundle(log=log)
    log.append(*(f"entry {number} of another task" for number in range(249)))
    assert len(log.texts) == 256
    assert verify(bundle, log=log.write(tmp_path))


@pytest.mark.parametrize("index", [0, 999, 1000, 1_234_067])
def test_tiles_have_the_same_paths(index: int, tmp_path: Path) -> None:
    for count in (256, 8):
        path = tmp_path / str(count) / tile_path("entries", index, count)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x")
        assert verifier.read_tile(str(tmp_path / str(count)), index, count) == b"x"


def test_retry_that_was_left_out_is_found_in_the_log(tmp_path: Path) -> None:
    log = Log()
    whole = expired_and_retried().bundle(log=log)
    cut = whole | {"entries": whole["entries"][:10]}
    assert "ended     expired" in verify(cut)  # nothing in the bundle itself shows it
    assert verify(whole, log=log.write(tmp_path))
    assert fails(cut, log=str(tmp_path))[0] == "later"


def test_unreadable_log_differs_from_missing_log() -> None:
    bundle = monitored().bundle()
    with serving({"/log/checkpoint": (403, b"no")}) as url, pytest.raises(verifier.Failed, match="403"):
        verify(bundle, log=f"{url}/log")


def test_result_that_came_in_after_the_end_is_in_order() -> None:
    assert verify(cancelled().bundle())
    assert RULES["monitoring"].allowed
