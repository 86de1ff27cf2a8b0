"""A DynamoDB for several processes: the local AWS as a separate process, with the template's tables."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from local.environment import ROOT, Ports
from qaes.adapters import clients
from tests.support.cloud import CREDENTIALS, create_tables

START_SECONDS = 60


@contextlib.contextmanager
def dynamodb(directory: Path, *tables: str) -> Iterator[dict[str, str]]:
    """Start it with these tables; yield the environment to reach it from this process and others.

    Unlike moto's, its transactions are atomic among processes. It ends with this process in any case.
    """
    port = Ports.free().aws
    environment = {
        **CREDENTIALS,
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "BIND_HOST": "127.0.0.1",
        "GATEWAY_PORT": str(port),
        "IOT_MTLS_ENABLED": "0",
        "PERSIST_STATE": "0",
        "STATE_DIR": str(directory),
        "S3_DATA_DIR": str(directory),
        "PYTHONPATH": os.pathsep.join(["functions", "layers/core", "."]),
    }
    with (directory / "aws.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "local.guard", "ministack"],
            cwd=ROOT,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            _wait(environment["AWS_ENDPOINT_URL"], process)
            with patch.dict(os.environ, environment):
                clients.reset()
                create_tables(*tables)
                yield environment
        finally:
            clients.reset()
            process.stdin.close()  # type: ignore[union-attr] # a pipe
            process.wait(10)


def _wait(endpoint: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{endpoint}/_ministack/health", timeout=5):  # noqa: S310 loopback
            return
        time.sleep(0.1)
    raise AssertionError("the local AWS did not start")
