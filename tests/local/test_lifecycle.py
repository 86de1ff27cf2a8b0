"""Up twice, down twice, and the files of an interrupted run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from local import lifecycle
from local.environment import ROOT, LocalCloudError, Ports
from local.lifecycle import Instance

pytestmark = [
    pytest.mark.enable_socket,
    # `up` leaves its supervisor running, which is its purpose
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]

SUPERVISOR = """
import signal, sys
from pathlib import Path
from local.interrupts import StopError, stop_on_signals
from local.lifecycle import Instance
stop_on_signals()
instance = Instance(Path(sys.argv[1]))
try:
    with instance.held():
        print("progress", flush=True)
        if sys.argv[2] == "fail":
            sys.exit("sam deploy failed")
        ready = {"url": "http://localhost:1", "endpoint": "http://127.0.0.1:2", "auth_mode": "jwt"}
        if sys.argv[2] != "starting":
            instance.write(instance.read() | ready)
        signal.pause()
except StopError:
    pass
"""


@pytest.fixture
def instance(tmp_path):
    instance = Instance(tmp_path / "cloud")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield instance
    for number, handler in handlers.items():
        signal.signal(number, handler)
    lifecycle.down(instance, say=lambda _: None)


def start(instance, how="run"):
    command = [sys.executable, "-c", SUPERVISOR, str(instance.directory), how]
    return lifecycle.up("jwt", Ports.free(), instance, command)


def test_up_waits_until_it_is_ready_and_shows_the_progress(instance, capsys):
    assert start(instance) == 0
    assert "progress" in capsys.readouterr().out
    assert instance.runs()


def test_second_up_explains_how_to_use_the_running_cloud(instance, capsys):
    start(instance)
    pid = instance.read()["pid"]
    capsys.readouterr()
    assert start(instance) == 0
    said = capsys.readouterr().out
    for part in ("runs at http://localhost:1", "make down", "tokens.env", "curl", "/docs", "make logs"):
        assert part in said
    assert instance.read()["pid"] == pid


def test_second_up_in_another_mode_names_the_fix(instance, capsys):
    start(instance)
    assert lifecycle.up("stub", Ports.free(), instance, ["false"]) == 1
    assert "make down first" in capsys.readouterr().out


def test_two_supervisors_cannot_run(instance):
    start(instance)
    with pytest.raises(LocalCloudError, match="runs at"), instance.held():
        pass


def test_failed_start_shows_why_and_leaves_nothing(instance, capsys):
    assert start(instance, "fail") == 1
    assert "sam deploy failed" in capsys.readouterr().out
    assert not instance.runs()
    assert instance.read() == {}


def test_leftovers_of_a_killed_run_are_cleaned_up(instance, capsys):
    start(instance)
    stale = instance.read()["pid"]
    os.kill(stale, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while instance.runs() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert instance.read()["pid"] == stale
    assert start(instance) == 0
    assert "removed" in capsys.readouterr().out
    assert instance.read()["pid"] != stale


def test_stale_process_id_of_other_program_is_not_killed(instance):
    instance.directory.mkdir()
    with subprocess.Popen(["sleep", "60"]) as other:
        (instance.directory / "state.json").write_text(json.dumps({"pid": other.pid}))
        said = []
        lifecycle.down(instance, say=said.append)
        assert other.poll() is None
        other.kill()
    assert "does not run" in said[0]
    assert "removed" in said[0]


def test_down_shows_progress_and_removes_everything(instance):
    start(instance)
    for folder in ("cloud", "demo-1", "e2e-2"):
        (instance.directory.parent / folder / "tmp").mkdir(parents=True)
        (instance.directory.parent / folder / "running").touch()
    said = []
    lifecycle.down(instance, say=said.append)
    lifecycle.down(instance, say=said.append)
    assert "stopping" in said[0]
    assert any("is stopped" in line for line in said)
    assert "does not run" in said[-1]
    assert [path.name for path in instance.directory.parent.iterdir()] == ["runs.lock"]


def test_down_removes_leftovers_of_earlier_run(instance):
    (instance.directory / "tmp").mkdir(parents=True)
    (instance.directory / "aws.log").touch()
    said = []
    lifecycle.down(instance, say=said.append)
    assert said == ["The local cloud does not run. The files of earlier runs were removed."]
    assert not instance.directory.exists()


def test_status_exit_code_shows_whether_it_runs(instance):
    assert lifecycle.status(instance) == (lifecycle.NOT_RUNNING, 1)
    start(instance)
    text, code = lifecycle.status(instance)
    assert ("http://localhost:1" in text, code) == (True, 0)
    lifecycle.down(instance, say=lambda _: None)
    assert lifecycle.status(instance)[1] == 1


@pytest.mark.parametrize("task", ["bogus", "task_1", "task_019ab000-0000-7000-8000-00000000000g", "*"])
def test_logs_fail_for_malformed_task_id(task):
    with pytest.raises(LocalCloudError, match="TASK must be"):
        lifecycle.logs(task)


def test_logs_without_a_running_cloud_are_an_error(instance):
    with pytest.raises(LocalCloudError, match="make up"):
        lifecycle.logs(path=instance.directory)


@pytest.mark.parametrize("command", ["up", "down", "status", "logs", "demo", "run"])
def test_ctrl_c_in_the_first_second_prints_no_traceback(tmp_path, command):
    (tmp_path / "argparse.py").write_text("print('importing', flush=True)\nimport time\ntime.sleep(60)\n")
    with subprocess.Popen(
        [sys.executable, "-m", "local", command],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=10)[0] == ""
    assert process.returncode == 130


UP = """
import sys
from pathlib import Path
from local import interrupts, lifecycle
from local.environment import Ports
interrupts.stop_on_signals()
sys.exit(lifecycle.up("jwt", Ports.free(), lifecycle.Instance(Path(sys.argv[1])), sys.argv[2:]))
"""


def test_ctrl_c_while_it_starts_leaves_nothing(instance, capsys):
    supervisor = [sys.executable, "-c", SUPERVISOR, str(instance.directory), "starting"]
    with subprocess.Popen(
        [sys.executable, "-c", UP, str(instance.directory), *supervisor], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "progress\n"
        assert lifecycle.status(instance)[1] == 1  # it starts, and does not answer yet
        assert lifecycle.up("jwt", Ports.free(), instance) == 1  # there are no tokens yet
        assert "is starting" in capsys.readouterr().out
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=10)[0]
    assert "No process is left running" in output
    assert process.returncode == 130
    assert not instance.runs()
    assert not instance.directory.exists()


def test_guarded_process_ends_with_its_parent(tmp_path):
    (tmp_path / "child.py").write_text(
        "import subprocess, time\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "print('started', flush=True)\n"
        "time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-m", "local.guard", "child"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        text=True,
    ) as guard:
        assert guard.stdout.readline() == "started\n"
        guard.stdin.close()
        assert guard.wait(10) == -signal.SIGKILL
        assert guard.stdout.read() == ""  # its end is closed in every process, so none is left
