"""docs/add-a-step-type.md, followed in a copy of the repository: every block applied, every command run."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from local.environment import ROOT

PAGE = "docs/add-a-step-type.md"
BLOCK = re.compile(r"^((?:.+\n)+)\n```(\w+)\n((?:.*\n)*?)```$", re.MULTILINE)
"""A paragraph and the block after it."""


class Block(NamedTuple):
    """A block, its language, and the file that the paragraph before it names last."""

    language: str
    text: str
    file: str


def blocks() -> Iterator[Block]:
    for paragraph, language, text in BLOCK.findall((ROOT / PAGE).read_text()):
        files = re.findall(r"`([\w/.-]+/[\w.-]+\.\w+)`", paragraph)
        yield Block(language, text, files[-1] if files else "")


def applied(text: str, diff: str) -> str:
    """Apply hunks separated by `@@`: the lines of context and `-` become those of context and `+`, in one place."""
    for hunk in diff.split("@@\n"):
        lines = hunk.splitlines(keepends=True)
        assert {line[0] for line in lines} <= set(" +-"), hunk
        before = "".join(line[1:] for line in lines if line[0] != "+")
        after = "".join(line[1:] for line in lines if line[0] != "-")
        assert text.count(before) == 1, f"{text.count(before)} places have these lines:\n{before}"
        text = text.replace(before, after)
    return text


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The files of the repository, with its installed environment."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in listed.splitlines():
        if (ROOT / name).exists():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tmp_path / name, follow_symlinks=False)
    (tmp_path / ".venv").symlink_to(ROOT / ".venv")
    return tmp_path


def test_tutorial_adds_a_step_type_that_runs_and_verifies(copy: Path) -> None:
    done = []
    for block in blocks():
        file = copy / block.file
        if block.language == "bash":
            for command in block.text.splitlines():
                run = subprocess.run(["bash", "-c", command], cwd=copy, capture_output=True, text=True, check=False)
                assert run.returncode == 0, f"{command}\n{run.stdout}{run.stderr}"
                done.append(command)
        elif block.language == "diff":
            file.write_text(applied(file.read_text(), block.text))
            done.append(block.file)
        else:
            assert not file.exists()
            file.write_text(block.text)
            done.append(block.file)
    assert done == [
        "layers/core/qaes/domain/step_types.py",
        "layers/core/qaes/domain/policy/actions.py",
        "functions/worker/steps.py",
        "verifier/verify_bundle.py",
        "docs/audit.md",
        "tests/workflow/test_funding.py",
        "make openapi",
        "make check",
        ".venv/bin/python -m pytest -q tests/workflow/test_funding.py",
    ]
