"""Folders of local clouds in `.local`: one for each, removed at its end.

A local cloud holds a lock in its folder for its whole life, and the operating system releases it at its end. A folder
whose lock is free belongs to an interrupted run. The next start or `make down` removes it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from local.environment import WORK, locked

LOCK = "running"
LOCKS = (LOCK, "lock", "starting")
"""Lock files: of the local cloud itself, of the supervisor, and of `make up` until its supervisor is ready."""


@contextlib.contextmanager
def running(directory: Path) -> Iterator[None]:
    """Create a local cloud's folder, and hold its lock inside the `with` block."""
    with contextlib.ExitStack() as stack:
        with locked(directory.parent / "runs.lock"):
            directory.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((directory / LOCK).open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_ended_runs(work: Path = WORK) -> list[str]:
    """Remove the folders of local clouds that have ended; return their names."""
    removed = []
    with locked(work / "runs.lock"):
        for directory in sorted(filter(_is_a_run, work.iterdir())):
            if not _runs(directory):
                shutil.rmtree(directory, ignore_errors=True)
                removed.append(directory.name)
    return removed


def _is_a_run(directory: Path) -> bool:
    # "aws.log" marks a folder of an earlier version without this lock
    return directory.is_dir() and any((directory / name).is_file() for name in (*LOCKS, "aws.log"))


def _runs(directory: Path) -> bool:
    if any(is_locked(directory / name) for name in LOCKS):
        return True
    process = re.search(r"-(\d+)$", directory.name)
    return not (directory / LOCK).exists() and process is not None and _lives(int(process[1]))


def is_locked(path: Path) -> bool:
    """Return whether a living process holds the lock of this file."""
    if not path.is_file():
        return False
    with path.open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def _lives(process: int) -> bool:
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
