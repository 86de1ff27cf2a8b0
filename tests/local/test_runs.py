"""The folders of local clouds: locked while one runs, and removed after any end."""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pytest

from local.environment import ROOT
from local.runs import remove_ended_runs, running


def folder(work, name, *files):
    directory = work / name
    (directory / "tmp" / "layer").mkdir(parents=True)
    for file in files:
        (directory / file).touch()
    return directory


def test_remove_ended_runs_spares_a_run_that_lives(tmp_path):
    with running(tmp_path / "cloud"):
        assert remove_ended_runs(tmp_path) == []
        assert (tmp_path / "cloud").is_dir()
    assert remove_ended_runs(tmp_path) == ["cloud"]
    assert not (tmp_path / "cloud").exists()


@pytest.mark.parametrize("files", [["running"], ["lock"], ["starting"], ["aws.log"]])
def test_remove_ended_runs_removes_leftovers(tmp_path, files):
    folder(tmp_path, "demo-999999999", *files)
    assert remove_ended_runs(tmp_path) == ["demo-999999999"]


def test_remove_ended_runs_spares_other_folders(tmp_path):
    for name in ("sam", "sam-layers", "hypothesis"):
        folder(tmp_path, name)
    (tmp_path / "tokens.env").touch()
    assert remove_ended_runs(tmp_path) == []
    assert (tmp_path / "sam" / "tmp" / "layer").is_dir()


def test_remove_ended_runs_spares_an_earlier_version_at_work(tmp_path):
    folder(tmp_path, f"e2e-{os.getpid()}", "aws.log")
    assert remove_ended_runs(tmp_path) == []


def test_remove_ended_runs_removes_leftovers_of_killed_run(tmp_path):
    program = (
        "import pathlib, sys, time\nfrom local.runs import running\n"
        "with running(pathlib.Path(sys.argv[1])):\n    print('runs', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "cloud")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "runs\n"
        assert remove_ended_runs(tmp_path) == []
        process.kill()
    deadline = time.monotonic() + 10
    while not remove_ended_runs(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not (tmp_path / "cloud").exists()
