"""Start the local cloud, leave it running in the background, and stop it again.

One process, the supervisor (`python -m local run`), runs everything. It holds a lock for its whole life, and the
operating system releases the lock at its end. The lock therefore shows reliably whether the cloud runs, which a
process id in a file could not.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from local.cloud import USER_FILES, AuthMode, Cloud
from local.environment import ROOT, WORK, LocalCloudError, Ports, Progress, locked, read_json
from local.interrupts import StopError, deferred_signals, ignore_signals, stop_on_signals
from local.runs import is_locked, remove_ended_runs
from local.terminal import inert
from local.tokens import LIFETIME_SECONDS, Issuer

NAME = "cloud"
DIRECTORY = WORK / NAME
STOP_TIMEOUT_SECONDS = 20
NOT_RUNNING = "The local cloud does not run. Start it with: make up"
TASK_ID = "task_[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
EXAMPLE = (
    '{"task_type": "monitor_wallet", "description": "watch it", "wallet_address": "0x1234567890abcdef", '
    '"parameters": {"alert_threshold": 500}}'
)


class Instance:
    """The local cloud that runs in the background.

    Parameters
    ----------
    directory : Path
        Directory of its lock and its state file.
    """

    def __init__(self, directory: Path = DIRECTORY) -> None:
        self.directory = directory
        self.log = directory / "supervisor.log"
        self._lock = directory / "lock"
        self._state = directory / "state.json"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Hold the supervisor's lock; raise LocalCloudError if another supervisor holds it."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._lock.open("a") as lock:
            for attempt in range(5):  # a program that tests the lock holds it for a moment
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.05 * attempt)
            else:
                raise LocalCloudError(self.describe())
            try:
                self.write({"pid": os.getpid()})
                yield
            finally:
                self._state.unlink(missing_ok=True)

    def runs(self) -> bool:
        """Return whether a supervisor runs."""
        return is_locked(self._lock)

    def forget_interrupted_run(self) -> bool:
        """Remove the files of a killed supervisor; return whether there were any. Only while no supervisor runs."""
        if not self._state.is_file():
            return False
        self._state.unlink()
        for name in USER_FILES:
            (self.directory.parent / name).unlink(missing_ok=True)
        return True

    def read(self) -> dict[str, Any]:
        """Return the supervisor's state: `pid`, and once it is ready `url`, `endpoint`, `auth_mode`."""
        return read_json(self._state)

    def write(self, state: dict[str, Any]) -> None:
        """Write the state in one step."""
        draft = self._state.with_suffix(".new")
        draft.write_text(json.dumps(state))
        draft.replace(self._state)

    def describe(self) -> str:
        """Return one line about the running supervisor."""
        state = self.read()
        if "url" not in state:
            return "The local cloud is starting. Wait until it runs (make status), or stop it (make down)."
        return f"The local cloud runs at {state['url']} (AUTH_MODE={state['auth_mode']}). Stop it with: make down"

    @property
    def is_ready(self) -> bool:
        """Return whether the local cloud runs and responds."""
        return self.runs() and "url" in self.read()


def run(mode: AuthMode, ports: Ports) -> None:
    """Run the local cloud in this process until a signal ends it."""
    stop_on_signals()
    instance = Instance()
    progress = Progress()
    try:
        with instance.held():
            cloud = Cloud(NAME, ports, mode, progress=progress)
            try:
                with cloud:
                    cloud.write_shell_files()
                    cloud.write_sam_files()
                    state = {"url": cloud.url, "endpoint": cloud.endpoint, "auth_mode": cloud.auth_mode}
                    print(f"\nThe local cloud runs, after {progress.seconds:.0f} s: {cloud.url}")
                    print(introduction(**state), flush=True)
                    instance.write({"pid": os.getpid(), **state})
                    while True:
                        signal.pause()
            finally:
                ignore_signals()
                for name in USER_FILES:
                    (WORK / name).unlink(missing_ok=True)
    except StopError as reason:
        print(f"stopped ({reason})", flush=True)


def introduction(url: str, endpoint: str, auth_mode: str) -> str:
    """Return instructions for the running local cloud."""
    who = '-H "Authorization: Bearer $REQUESTER" '
    first = "  source .local/tokens.env     # $REQUESTER $APPROVER $APPROVER2 $AUDITOR $OPERATOR $OPERATOR2"
    if auth_mode == "stub":
        who, first = "", "  A request without a token has the subject demo_user and every role (AUTH_MODE=stub)."
    hours = LIFETIME_SECONDS // 3600
    return f"""
{first}
  TASK=$(curl -s {url}/task/start {who}-H 'Content-Type: application/json' \\
    -d '{EXAMPLE}' | grep -o 'task_[0-9a-f-]*' | head -1)
  curl -s {url}/task/$TASK {who}

  {url}/docs   # the API documentation, for a browser
  source .local/aws.env        # configures aws and sam for the local AWS, {endpoint}
  make logs TASK=$TASK         # the services' log of one task; without TASK, of all tasks
  make down                    # stops it and deletes its data; tokens are valid for {hours} hours
"""


def up(mode: AuthMode, ports: Ports, instance: Instance | None = None, command: list[str] | None = None) -> int:
    """Start the local cloud in the background, print its progress, and return an exit code."""
    instance = instance or Instance()
    if instance.runs():
        return _already(instance, mode)
    if instance.forget_interrupted_run():
        print("An earlier run was interrupted; its files were removed.")
    ports.check()
    instance.directory.mkdir(parents=True, exist_ok=True)
    process = None
    try:
        with locked(instance.directory / "starting"):
            if instance.runs():  # another `make up` was faster
                return _already(instance, mode)
            with deferred_signals(), instance.log.open("wb") as output:
                process = subprocess.Popen(
                    command or [sys.executable, "-m", "local", "run"],
                    cwd=ROOT,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            return _follow(process, instance)
    except StopError:
        print("Interrupted: stopping the local cloud", flush=True)
        if process is not None:
            process.terminate()
            process.wait()
        remove_ended_runs(instance.directory.parent)
        print("No process is left running.")
        return 130


def _already(instance: Instance, mode: AuthMode) -> int:
    """Print how to use the running local cloud; return 1 if it differs from the request."""
    state = instance.read()
    print(instance.describe())
    if "url" not in state:  # its tokens are not written yet
        return 1
    if state["auth_mode"] != mode:
        print(f"Its AUTH_MODE is not {mode}: run make down first.")
        return 1
    print(introduction(state["url"], state["endpoint"], state["auth_mode"]))
    return 0


def _follow(process: subprocess.Popen[bytes], instance: Instance) -> int:
    """Print the supervisor's output until it is ready or has ended; return an exit code."""
    with instance.log.open(encoding="utf-8", errors="replace") as log:
        while True:
            ended = process.poll() is not None
            ready = "url" in instance.read()
            sys.stdout.write(log.read())
            sys.stdout.flush()
            if ended or ready:
                return process.returncode if ended else 0
            time.sleep(0.1)


def down(instance: Instance | None = None, say: Callable[[str], None] = print) -> None:
    """Stop the local cloud, wait for its end, and remove its files and those of earlier runs."""
    instance = instance or Instance()
    if not instance.runs():
        interrupted = instance.forget_interrupted_run()
        left = remove_ended_runs(instance.directory.parent)
        say(
            "The local cloud does not run."
            + (" The files of earlier runs were removed." if interrupted or left else "")
        )
        return
    pid = instance.read().get("pid")
    progress = Progress(say)
    progress("stopping the local cloud")
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if isinstance(pid, int):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if not instance.runs():
                progress("removing its files")
                instance.forget_interrupted_run()
                remove_ended_runs(instance.directory.parent)
                progress("The local cloud is stopped.")
                return
            time.sleep(0.05)
        progress("the local cloud does not end: killing it")
    raise LocalCloudError(f"The local cloud (process {pid}) did not end. Kill the process.")


def status(instance: Instance | None = None) -> tuple[str, int]:
    """Return one line, and an exit code: 0 if the local cloud runs and responds."""
    instance = instance or Instance()
    if not instance.runs():
        return NOT_RUNNING, 1
    return instance.describe(), 0 if instance.is_ready else 1


def token(role: str, subject: str, path: Path = WORK / "issuer.json") -> str:
    """Return a token that the running local cloud accepts."""
    try:
        issuer = Issuer.restore(path.read_text())
    except FileNotFoundError:
        raise LocalCloudError(NOT_RUNNING) from None
    return issuer.requested_token(role, subject)


def logs(task_id: str = "", *, everything: bool = False, path: Path = DIRECTORY) -> None:
    """Print the services' log lines of the running cloud, oldest first.

    Parameters
    ----------
    task_id : str, optional
        Only the lines of this task.
    everything : bool
        Include the platform's lines and the metrics.
    """
    if task_id and not re.fullmatch(TASK_ID, task_id):
        raise LocalCloudError(f"TASK must be the id of a task (task_ and 36 characters), not {task_id!r}.")
    instance = Instance(path)
    if not instance.is_ready:
        raise LocalCloudError(status(instance)[0])
    cloud = Cloud(NAME, Ports(0, int(instance.read()["endpoint"].rpartition(":")[2])))
    lines = cloud.service_logs(task_id, everything=everything)
    if not lines:
        about = f" about {task_id}. GET /tasks lists the tasks" if task_id else ""
        raise LocalCloudError(f"The services have no log lines{about}.")
    for line in lines:
        print(inert(line))
