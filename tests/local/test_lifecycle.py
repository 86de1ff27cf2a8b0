"""Up twice, down twice, and what an interrupted run leaves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from local import lifecycle
from local.cloud import ROOT, LocalCloudError, Ports
from local.lifecycle import Instance

pytestmark = [
    pytest.mark.enable_socket,
    # `up` leaves its supervisor running: that is what it is for
    pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning"),
]

SUPERVISOR = """
import signal, sys
from pathlib import Path
from local.lifecycle import Instance, StopError, stop_on_signals
stop_on_signals()
instance = Instance(Path(sys.argv[1]))
try:
    with instance.held():
        print("progress", flush=True)
        if sys.argv[2] == "fail":
            sys.exit("sam deploy failed")
        instance.write(instance.read() | {"url": "http://localhost:1", "auth_mode": "jwt"})
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


def test_a_second_up_says_that_it_runs_and_how_to_stop_it(instance, capsys):
    start(instance)
    pid = instance.read()["pid"]
    assert start(instance) == 0
    said = capsys.readouterr().out
    assert "already runs at http://localhost:1" in said
    assert "make down" in said
    assert instance.read()["pid"] == pid


def test_a_second_up_in_another_mode_does_not_pretend(instance):
    start(instance)
    assert lifecycle.up("stub", Ports.free(), instance, ["false"]) == 1


def test_two_supervisors_cannot_run(instance):
    start(instance)
    with pytest.raises(LocalCloudError, match="already runs"), instance.held():
        pass


def test_a_failed_start_shows_why_and_leaves_nothing(instance, capsys):
    assert start(instance, "fail") == 1
    assert "sam deploy failed" in capsys.readouterr().out
    assert not instance.runs()
    assert instance.read() == {}


def test_what_a_killed_run_left_is_cleaned_up(instance, capsys):
    start(instance)
    stale = instance.read()["pid"]
    os.kill(stale, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while instance.runs() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert instance.read()["pid"] == stale
    assert start(instance) == 0
    assert "cleaned up" in capsys.readouterr().out
    assert instance.read()["pid"] != stale


def test_a_stale_process_id_that_now_is_another_program_is_not_killed(instance):
    instance.directory.mkdir()
    with subprocess.Popen(["sleep", "60"]) as other:
        (instance.directory / "state.json").write_text(json.dumps({"pid": other.pid}))
        said = []
        lifecycle.down(instance, say=said.append)
        assert other.poll() is None
        other.kill()
    assert "does not run" in said[0]
    assert "cleaned up" in said[0]


def test_down_stops_it_and_down_again_says_that_nothing_runs(instance):
    start(instance)
    said = []
    lifecycle.down(instance, say=said.append)
    lifecycle.down(instance, say=said.append)
    assert "stopped" in said[0]
    assert "does not run" in said[1]
    assert lifecycle.status(instance).startswith("The local cloud does not run")


def test_what_the_guard_started_ends_with_its_parent(tmp_path):
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
