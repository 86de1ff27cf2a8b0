"""The output of `make` on a fresh clone: it reports that nothing runs, without an installation."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from local.environment import ROOT

NOT_RUNNING = "The local cloud does not run. Start it with: make up"


@pytest.fixture
def make(tmp_path):
    folder = tmp_path / "a fresh clone"
    folder.mkdir()
    shutil.copy(ROOT / "Makefile", folder)

    def run(*arguments):
        done = subprocess.run(["make", *arguments], cwd=folder, capture_output=True, text=True, timeout=60, check=False)
        assert {path.name for path in folder.iterdir()} == {"Makefile"}, "nothing is installed"
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.mark.parametrize("target", ["status", "logs", "token", "fsck"])
def test_make_fails_on_a_fresh_clone_where_nothing_runs(make, target):
    code, output = make(target)
    assert code != 0
    assert NOT_RUNNING in output


def test_make_down_succeeds_on_a_fresh_clone(make):
    assert make("down") == (0, f"{NOT_RUNNING}\n")


def test_make_help_lists_the_commands(make):
    code, output = make()
    assert code == 0
    assert {"make up", "make down", "make demo"} <= {" ".join(line.split()[:2]) for line in output.splitlines()}


def test_make_up_names_missing_programs(make):
    code, output = make("up", "PYTHON=no-such-python")
    assert code != 0
    assert "no-such-python is not installed" in output
