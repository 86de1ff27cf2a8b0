"""Environment of the local cloud's programs: ports, environment variables and files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".local"
REGION = "us-east-1"


class LocalCloudError(Exception):
    """The local cloud cannot fulfil a request; the text has the reason and a remedy."""


@dataclass(frozen=True)
class Ports:
    """Ports to listen on, and the environment variable that changes each (`None`: chosen automatically)."""

    http: int
    aws: int
    http_variable: str | None = None
    aws_variable: str | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Ports:
        """Read QAES_HTTP_PORT (8000, the API) and QAES_PORT (4566, the local AWS)."""
        return cls(
            _port(environment, "QAES_HTTP_PORT", 8000),
            _port(environment, "QAES_PORT", 4566),
            "QAES_HTTP_PORT",
            "QAES_PORT",
        )

    @classmethod
    def free(cls) -> Ports:
        """Choose two ports that are free now."""
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            return cls(one.getsockname()[1], other.getsockname()[1])

    def check(self) -> None:
        """Raise LocalCloudError if a port cannot be used. The error names the port and its environment variable."""
        if self.http == self.aws:
            raise LocalCloudError(
                f"QAES_HTTP_PORT and QAES_PORT are both {self.http}; the API and the local AWS need different ports. "
                f"Choose another: QAES_PORT={self.http + 1 if self.http < 65535 else self.http - 1} make up"
            )
        for port, variable, what in (
            (self.http, self.http_variable, "API"),
            (self.aws, self.aws_variable, "local AWS"),
        ):
            if is_taken(port):
                advice = f" Choose another: {variable}={next_free(port)} make up" if variable else ""
                raise LocalCloudError(f"Port {port}, for the {what}, is taken by another program.{advice}")


def _port(environment: Mapping[str, str], variable: str, default: int) -> int:
    text = environment.get(variable) or str(default)
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise LocalCloudError(f"{variable} must be a port from 1 to 65535, not {text!r}.")
    return int(text)


def is_taken(port: int) -> bool:
    """Return whether a program listens on this port of `localhost`, which can mean 127.0.0.1 or ::1."""
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        except OSError as error:
            if error.errno in {errno.EADDRINUSE, errno.EACCES}:
                return True  # any other error: this machine does not have the address, so the port is free
    return False


def next_free(port: int) -> int:
    """Return a free port near this one."""
    near = (number for number in range(port + 1, min(port + 200, 65536)) if not is_taken(number))
    return next(near, None) or Ports.free().http


def isolated_environment(endpoint: str, directory: Path, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment for programs of the local cloud.

    Parameters
    ----------
    endpoint : str
        Address of the local AWS.
    directory : Path
        Directory that the programs can write to, with the empty AWS configuration.
    base : Mapping
        The caller's environment. Its variables for AWS or for another Python are omitted.

    Raises
    ------
    LocalCloudError
        The endpoint is not on the loopback interface, so it could be a real account.
    """
    if urlsplit(endpoint).hostname not in {"127.0.0.1", "localhost", "::1"}:
        raise LocalCloudError(f"AWS_ENDPOINT_URL must be on the loopback interface, but {endpoint} is not.")
    empty = directory / "aws"
    empty.mkdir(parents=True, exist_ok=True)
    for name in ("config", "credentials"):
        (empty / name).write_text("")
    foreign = ("AWS_", "SAM_", "LAMBDA_", "MINISTACK_", "LOCALSTACK_", "PYTHON", "VIRTUAL_ENV")
    environment = {name: value for name, value in base.items() if not name.startswith(foreign)}
    no_proxy = ",".join(filter(None, [base.get("NO_PROXY") or base.get("no_proxy"), "localhost", "127.0.0.1"]))
    temporary = directory / "tmp"
    temporary.mkdir(exist_ok=True)
    return environment | {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_REGION": REGION,
        "AWS_CONFIG_FILE": str(empty / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(empty / "credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "SAM_CLI_TELEMETRY": "0",
        "SAM_CLI_POLL_DELAY": "0.2",  # sam polls a stack every 5 s by default, but deployments are faster here
        "__SAM_CLI_APP_DIR": str(directory / "sam"),
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "TMPDIR": str(temporary),
        # sam searches the path for the interpreter of the template's runtime
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), base.get("PATH", os.defpath)]),
    }


class Progress:
    """Prints each step with the seconds since the start."""

    def __init__(self, write: Callable[[str], None] | None = None) -> None:
        self._start = time.monotonic()
        self._write = write or (lambda line: print(line, flush=True))

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def __call__(self, text: str) -> None:
        self._write(f"[{self.seconds:5.1f} s] {text}")


def end_group(process: subprocess.Popen[bytes], grace: float = 1) -> None:
    """End a process and its children; it must lead its own session, and gets `grace` seconds to end."""
    with contextlib.suppress(ProcessLookupError):
        if grace and process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(grace)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def write_private(path: Path, lines: list[str]) -> None:
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text("\n".join([*lines, ""]))


def tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent or incomplete file is an empty object."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
