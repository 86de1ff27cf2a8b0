"""The folders of local clouds under `.local`: one for each, which nothing outlives.

A local cloud holds a lock in its folder for as long as it lives, which the operating system takes from it however it
ends. A folder whose lock is free is what an interrupted run has left, and is removed when the next one starts or
`make down` runs.
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
"""What is locked: by the local cloud itself, by the supervisor, and by `make up` until its supervisor is ready."""


@contextlib.contextmanager
def running(directory: Path) -> Iterator[None]:
    """Hold a local cloud's folder, which is created, inside of the `with` block."""
    with contextlib.ExitStack() as stack:
        with locked(directory.parent / "runs.lock"):
            directory.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((directory / LOCK).open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def remove_ended_runs(work: Path = WORK) -> list[str]:
    """Remove the folders of local clouds that do not run any more; return their names."""
    removed = []
    with locked(work / "runs.lock"):
        for directory in sorted(filter(_is_a_run, work.iterdir())):
            if not _runs(directory):
                shutil.rmtree(directory, ignore_errors=True)
                removed.append(directory.name)
    return removed


def _is_a_run(directory: Path) -> bool:
    # "aws.log": a folder of an earlier version, which had no such lock
    return directory.is_dir() and any((directory / name).is_file() for name in (*LOCKS, "aws.log"))


def _runs(directory: Path) -> bool:
    if any(is_locked(directory / name) for name in LOCKS):
        return True
    process = re.search(r"-(\d+)$", directory.name)
    return not (directory / LOCK).exists() and process is not None and _lives(int(process[1]))


def is_locked(path: Path) -> bool:
    """Whether a living process holds the lock of this file."""
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
