"""Execution environments of the local AWS share one unpacked copy of each layer and each package."""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path

import pytest
from ministack.core import lambda_runtime
from ministack.services import lambda_svc

from local import emulator

pytestmark = [
    pytest.mark.enable_socket,
    # ministack does not close the pipes of the environments that it ends
    pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]

HANDLER = (
    "import library\n\ndef handler(event, context):\n    return [library.NAME, library.__file__, __file__, event]\n"
)


def archive(**files):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as packed:
        for name, content in files.items():
            packed.writestr(name.replace("__", "/") + ".py", content)
    return buffer.getvalue()


LAYER, CODE = archive(python__library="NAME = 'shared'"), archive(app=HANDLER)


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Start execution environments; each invokes its function once."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(lambda_runtime, "zipfile", zipfile)
    monkeypatch.setattr(lambda_svc, "_resolve_layer_zip", lambda reference: LAYER)
    emulator.share_unpacked_archives()
    workers = []

    def start(name, code=CODE):
        config = {
            "FunctionName": name,
            "FunctionArn": f"arn:aws:lambda:us-east-1:000000000000:function:{name}",
            "Handler": "app.handler",
            "Runtime": "python3.11",
            "Layers": [{"Arn": "arn:aws:lambda:us-east-1:000000000000:layer:core:1"}],
        }
        worker = lambda_runtime.Worker(name, config, code)
        workers.append(worker)
        answer = worker.invoke("hello", "request")
        assert answer["status"] == "ok", answer
        return worker, answer["result"]

    yield start
    lambda_runtime.kill_workers(workers)


def test_environments_share_one_unpacked_copy(start, tmp_path):
    results = [start(name)[1] for name in ("one", "two", "three")]
    assert [result[0] for result in results] == ["shared"] * 3
    copies = {Path(result[index]).resolve() for result in results for index in (1, 2)}
    assert len(copies) == 2  # of library.py and app.py
    assert len(list((tmp_path / "unpacked").iterdir())) == 2
    assert not list(tmp_path.rglob("*.zip"))


def test_other_code_gets_its_own_copy(start):
    assert start("one")[1][3] == "hello"
    assert start("two", archive(app="def handler(event, context):\n    return 'other'\n"))[1] == "other"


def test_end_of_an_environment_leaves_the_copy_to_others(start, tmp_path):
    first, _ = start("one")
    second, before = start("two")
    lambda_runtime.kill_workers([first])
    assert Path(before[1]).is_file()
    assert second.invoke("again", "request")["result"][3] == "again"
    assert start("three")[1][0] == "shared"


def test_archive_that_leaves_its_directory_is_refused(start, tmp_path, monkeypatch):
    outside = io.BytesIO()
    with zipfile.ZipFile(outside, "w") as packed:
        packed.writestr("../../outside.py", "")
    monkeypatch.setattr(lambda_svc, "_resolve_layer_zip", lambda reference: outside.getvalue())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="escapes"):
            start("one")
    assert not (tmp_path.parent / "outside.py").exists()


@pytest.mark.parametrize(
    ("raises", "name"),
    [
        ("ValueError('a\\nb: c')", "ValueError"),
        ("library.BusyError('the ledger is busy: try again')", "BusyError"),
        ("KeyError()", "KeyError"),
    ],
)
def test_error_is_named_by_the_exceptions_class(start, monkeypatch, raises, name):
    monkeypatch.setattr(lambda_svc, "_execute_function_warm", lambda_svc._execute_function_warm)
    monkeypatch.setattr(lambda_runtime.Worker, "invoke", lambda_runtime.Worker.invoke)
    emulator.name_errors_as_lambda_does()
    layer = archive(python__library="class BusyError(Exception): ...\n")
    monkeypatch.setattr(lambda_svc, "_resolve_layer_zip", lambda reference: layer)
    code = f"import library\n\ndef handler(event, context):\n    try:\n        1 / 0\n    except ZeroDivisionError as error:\n        raise {raises} from error\n"  # fmt: skip  # noqa: E501
    worker, _ = start("one", archive(app="def handler(event, context):\n    return 1\n"))
    failing = lambda_runtime.Worker("two", worker.config | {"FunctionName": "two"}, archive(app=code))
    monkeypatch.setattr(lambda_svc, "acquire_worker", lambda *_, **__: (failing, None))
    function = {"config": failing.config, "code_zip": archive(app=code)}
    answer = lambda_svc._execute_function_warm(function, {}, "request")
    assert (answer["error"], answer["body"]["errorType"]) == (True, name)
    lambda_runtime.kill_workers([failing])


def test_no_exception_names_no_error():
    assert emulator.exception_name("") is None
    assert emulator.exception_name("Task timed out after 3.00 seconds") is None
