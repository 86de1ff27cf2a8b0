"""Start the local cloud, leave it running in the background, and stop it again.

One process, the supervisor (`python -m local run`), holds everything. It holds a lock for as long as it lives, which
the operating system takes from it however it ends; so whether the cloud runs is never a guess from a process id in a
file.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from local.cloud import ROOT, USER_FILES, WORK, AuthMode, Cloud, LocalCloudError, Ports, Progress, read_json
from local.tokens import LIFETIME_SECONDS, Issuer

NAME = "cloud"
DIRECTORY = WORK / NAME
STOP_TIMEOUT_SECONDS = 20
EXAMPLE = (
    '{"task_type": "monitor_wallet", "description": "watch it", "wallet_address": "0x1234567890abcdef", '
    '"parameters": {"alert_threshold": 500}}'
)


class StopError(BaseException):
    """A signal asked this process to end; not an Exception, so that nothing on the way swallows it."""


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    ignore_signals()
    raise StopError(signal.Signals(signum).name)


def ignore_signals() -> None:
    """From here on this process is cleaning up, and a second Ctrl-C does not interrupt that."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)


def stop_on_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP raise StopError in this process, once."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _stop)


class Instance:
    """What is known of the local cloud that runs in the background.

    Parameters
    ----------
    directory : Path
        Where it keeps its lock and what it says of itself.
    """

    def __init__(self, directory: Path = DIRECTORY) -> None:
        self.directory = directory
        self.log = directory / "supervisor.log"
        self._lock = directory / "lock"
        self._state = directory / "state.json"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Be the one supervisor; raise LocalCloudError if there is one."""
        self.directory.mkdir(parents=True, exist_ok=True)
        with self._lock.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LocalCloudError(self.describe()) from None
            try:
                self.write({"pid": os.getpid()})
                yield
            finally:
                self._state.unlink(missing_ok=True)

    def runs(self) -> bool:
        """Whether a supervisor lives."""
        if not self._lock.is_file():
            return False
        with self._lock.open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
        return False

    def forget_interrupted_run(self) -> bool:
        """Remove what a supervisor that was killed has left; whether there was any. Only while none runs."""
        if not self._state.is_file():
            return False
        self._state.unlink()
        for name in USER_FILES:
            (self.directory.parent / name).unlink(missing_ok=True)
        return True

    def read(self) -> dict[str, Any]:
        """Return what the supervisor says of itself: `pid`, and once it is ready `url`, `endpoint`, `auth_mode`."""
        return read_json(self._state)

    def write(self, state: dict[str, Any]) -> None:
        """Say it, in one step."""
        draft = self._state.with_suffix(".new")
        draft.write_text(json.dumps(state))
        draft.replace(self._state)

    def describe(self) -> str:
        """Return one line on the supervisor that runs."""
        state = self.read()
        if "url" not in state:
            return "The local cloud is starting. Stop it: make down"
        return f"The local cloud already runs at {state['url']} (AUTH_MODE={state['auth_mode']}). Stop it: make down"


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
                    print(introduction(cloud, progress.seconds), flush=True)
                    instance.write(
                        {"pid": os.getpid(), "url": cloud.url, "endpoint": cloud.endpoint, "auth_mode": cloud.auth_mode}
                    )
                    while True:
                        signal.pause()
            finally:
                ignore_signals()
                for name in USER_FILES:
                    (WORK / name).unlink(missing_ok=True)
    except StopError as reason:
        print(f"stopped ({reason})", flush=True)


def introduction(cloud: Cloud, seconds: float) -> str:
    """Return how to call it."""
    who = '-H "Authorization: Bearer $REQUESTER" '
    first = "  source .local/tokens.env     # $REQUESTER $APPROVER $APPROVER2 $AUDITOR $OPERATOR $OPERATOR2"
    if cloud.auth_mode == "stub":
        who, first = "", "  No token needed: who sends none is demo_user, with every role (AUTH_MODE=stub)."
    hours = LIFETIME_SECONDS // 3600
    return f"""
The local cloud runs, after {seconds:.0f} s: {cloud.url}

{first}
  curl -s {cloud.url}/task/start {who}-H 'Content-Type: application/json' \\
    -d '{EXAMPLE}'
  curl -s {cloud.url}/task/$TASK {who}

  source .local/aws.env        # lets aws and sam talk to the local AWS, {cloud.endpoint}
  make logs                    # what the services log; TASK=task_… for one task
  make down                    # stops it, and forgets everything; tokens are good for {hours} hours
"""


def up(mode: AuthMode, ports: Ports, instance: Instance | None = None, command: list[str] | None = None) -> int:
    """Start the local cloud in the background, print its progress, return an exit code."""
    instance = instance or Instance()
    if instance.runs():
        print(instance.describe())
        return int(instance.read().get("auth_mode", mode) != mode)
    if instance.forget_interrupted_run():
        print("An earlier run was interrupted; what it left is cleaned up.")
    ports.check()
    stop_on_signals()
    instance.directory.mkdir(parents=True, exist_ok=True)
    with instance.log.open("wb") as output:
        process = subprocess.Popen(
            command or [sys.executable, "-m", "local", "run"],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        with instance.log.open(encoding="utf-8", errors="replace") as log:
            while True:
                ended = process.poll() is not None
                ready = "url" in instance.read()
                sys.stdout.write(log.read())
                sys.stdout.flush()
                if ended or ready:
                    return process.returncode if ended else 0
                time.sleep(0.1)
    except StopError:
        process.terminate()
        process.wait()
        print("interrupted; nothing is left running")
        return 130


def down(instance: Instance | None = None, say: Callable[[str], None] = print) -> None:
    """Stop the local cloud and wait until it has ended."""
    instance = instance or Instance()
    if not instance.runs():
        left = instance.forget_interrupted_run()
        say(
            "The local cloud does not run."
            + (" An earlier run was interrupted; what it left is cleaned up." if left else "")
        )
        return
    pid = instance.read().get("pid")
    for signum in (signal.SIGTERM, signal.SIGKILL):
        if isinstance(pid, int):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)
        deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if not instance.runs():
                instance.forget_interrupted_run()
                say("The local cloud is stopped.")
                return
            time.sleep(0.05)
    raise LocalCloudError(f"The local cloud (process {pid}) did not end.")


def status(instance: Instance | None = None) -> str:
    """Return one line."""
    instance = instance or Instance()
    return instance.describe() if instance.runs() else "The local cloud does not run. Start it: make up"


def token(role: str, subject: str, path: Path = WORK / "issuer.json") -> str:
    """Return a token that the running local cloud accepts."""
    try:
        issuer = Issuer.restore(path.read_text())
    except FileNotFoundError:
        raise LocalCloudError("The local cloud does not run. Start it: make up") from None
    return issuer.requested_token(role, subject)


def logs(task_id: str | None, path: Path = DIRECTORY) -> None:
    """Print what the services of the running cloud have logged, oldest first."""
    state = Instance(path).read()
    if "endpoint" not in state:
        raise LocalCloudError(status(Instance(path)))
    cloud = Cloud(NAME, Ports(0, int(state["endpoint"].rpartition(":")[2])))
    for line in cloud.service_logs(task_id):
        print(line)
