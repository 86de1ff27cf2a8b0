"""A local cloud with the tasks of the events, and every event put to its function by `sam local`.

The first by `sam local invoke`, as a person would; the others by `sam local start-lambda`, which has the same
containers and needs a fraction of the time: each `invoke` reads the template, makes an image and starts a container.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from local.cloud import Cloud
from local.environment import ROOT, LocalCloudError, Ports, end_group, is_taken
from tests.support import events

AT_ONCE = 2  # each may start a container, and fills a processor
START_TIMEOUT_SECONDS = 60
FIRST = "qubic/ledger_policy"
"""Alone: it pulls Lambda's image and adds the layer, for which all others would wait."""
PULL_TIMEOUT_SECONDS = 900
TIMEOUT_SECONDS = 120


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/sam_local/" in item.path.as_posix():
            item.add_marker(pytest.mark.sam_local)


@dataclass(frozen=True)
class Invocation:
    """A function's answer, and all else that `sam local` printed."""

    answer: Any
    log: str


class SamLocal:
    """`sam local` on a local cloud."""

    def __init__(self, cloud: Cloud) -> None:
        self.cloud = cloud
        self.configuration = cloud.write_sam_files(cloud.directory)
        self.logs = cloud.directory / "invocations"
        self.logs.mkdir()
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._server = ExitStack()
        self._url = ""
        self._results: dict[str, Future[Invocation]] = {case: Future() for case in events.cases()}

    def invoke(
        self, function: str, event: Path, *arguments: str, name: str, timeout: float = TIMEOUT_SECONDS
    ) -> Invocation:
        """Run one function with one event. An exception in the function is an answer too: `errorMessage`."""
        name = name.replace("/", ".")
        log = self.logs / f"{name}.log"
        environment = self.cloud.environment
        # With one folder for all, sam's lock keeps the second of two waiting for an image that is there already.
        temporary = Path(environment["TMPDIR"], name)
        temporary.mkdir()
        with log.open("wb") as output:
            done = subprocess.run(
                [
                    *(sys.executable, "-m", "samcli", "local", "invoke", function, "--event", event),
                    *("--config-file", self.configuration, *arguments),
                    *shlex.split(os.environ.get("SAM_LOCAL_ARGS", "")),
                ],
                cwd=ROOT,
                env=environment | {"TMPDIR": str(temporary)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=output,
                timeout=timeout,
                check=False,
            )
        text = log.read_text(errors="replace")
        assert done.returncode == 0, text
        return Invocation(json.loads(done.stdout), text)

    def begin(self) -> None:
        """Put every event to its function, those that build on each other one after the other."""
        first = self.invoke(events.function_of(FIRST), events.path_of(FIRST), name=FIRST, timeout=PULL_TIMEOUT_SECONDS)
        self._results[FIRST].set_result(first)
        self._url = self._server.enter_context(self._serve())
        _seed(self.cloud)  # only now: the reconciler starts a task that is left alone for long
        cases = [case for case in self._results if case != FIRST]
        free = [case for case in cases if case.startswith(("authorizer/", "qubic/")) or case.endswith("_health")]
        life = [case for case in cases if case not in free and "/api_" not in case]
        seen = [case for case in cases if case not in free and case not in life]
        lived = self._pool.submit(self._run, life)
        for _, group in groupby(sorted(free, key=_service), key=_service):
            self._pool.submit(self._run, list(group))
        for _, group in groupby(sorted(seen, key=_service), key=_service):
            self._pool.submit(self._run, list(group), after=lived)

    @contextmanager
    def _serve(self) -> Iterator[str]:
        """Run `sam local start-lambda`, which keeps a container for each function; its address."""
        port = Ports.free().http
        with self._log.open("wb") as output:
            process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "samcli", "local", "start-lambda", "--port", str(port)),
                    *("--config-file", self.configuration, "--warm-containers", "LAZY", "--skip-pull-image"),
                    *shlex.split(os.environ.get("SAM_LOCAL_ARGS", "")),
                ],
                cwd=ROOT,
                env=self.cloud.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            deadline = time.monotonic() + START_TIMEOUT_SECONDS
            while not is_taken(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError(self._log.read_text(errors="replace"))
                time.sleep(0.1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()  # it takes its containers with it
            with suppress(subprocess.TimeoutExpired):
                process.wait(START_TIMEOUT_SECONDS)
            end_group(process)

    @property
    def _log(self) -> Path:
        return self.logs / "start-lambda.log"

    def _put(self, function: str, event: Path) -> Invocation:
        """Have the server run a function with an event."""
        request = urllib.request.Request(  # noqa: S310
            f"{self._url}/2015-03-31/functions/{function}/invocations", data=event.read_bytes()
        )
        with urllib.request.urlopen(request, timeout=TIMEOUT_SECONDS) as answer:  # noqa: S310
            return Invocation(json.loads(answer.read()), self._log.read_text(errors="replace"))

    def _run(self, cases: list[str], after: Future[None] | None = None) -> None:
        if after:
            after.result()
        for case in cases:
            try:
                done = self._put(events.function_of(case), events.path_of(case))
            except Exception as error:  # noqa: BLE001 raised where the result is asked for
                self._results[case].set_exception(error)
            else:
                self._results[case].set_result(done)

    def result(self, case: str) -> Invocation:
        """Wait for the response to an event, and return it."""
        return self._results[case].result()

    def close(self) -> None:
        """Wait for running events, start no more, and remove the container of an interrupted `sam`."""
        self.stop()
        if left := self.containers():
            subprocess.run(["docker", "rm", "--force", *left], capture_output=True, check=False)

    def stop(self) -> None:
        """Wait for running events, start no more, and end the server."""
        self._pool.shutdown(cancel_futures=True)
        self._server.close()

    def containers(self) -> list[str]:
        """The containers of these invocations that are still there."""
        ours = {
            found
            for log in self.logs.glob("*.log")
            for found in re.findall(r"SAM_CONTAINER_ID: (\w+)", log.read_text())
        }
        listed = subprocess.run(
            ["docker", "ps", "--all", "--quiet", "--no-trunc"], capture_output=True, text=True, check=True
        )
        return sorted(ours & set(listed.stdout.split()))


def _service(case: str) -> str:
    return case.split("/", maxsplit=1)[0]


def _seed(cloud: Cloud) -> None:
    subprocess.run(
        [sys.executable, "-m", "local.seed"],
        cwd=ROOT,
        env=cloud.environment | cloud.names | {"PYTHONPATH": os.pathsep.join(["layers/core", "."])},
        capture_output=True,
        check=True,
    )


@pytest.fixture(scope="session", autouse=True)
def _docker() -> None:
    """No test works without it, so one line reports that instead of one failure for each test."""
    reason = "is not installed"
    if shutil.which("docker"):
        done = subprocess.run(
            ["docker", "version", "--format", "{{.Server.Version}}"], capture_output=True, text=True, check=False
        )
        if done.returncode == 0:
            return
        reason = f"does not answer ({(done.stderr.strip().splitlines() or ['no reason given'])[-1]})"
    pytest.exit(f"make sam-local needs Docker, and Docker {reason}.", returncode=1)


@pytest.fixture(scope="session")
def sam(_docker: None) -> Iterator[SamLocal]:
    said: list[str] = []
    cloud = Cloud("sam-local", auth_mode="stub", progress=said.append)
    cloud.remove_directory()
    with ExitStack() as stack:
        try:
            stack.enter_context(cloud)
        except LocalCloudError as error:
            pytest.exit(f"The local cloud did not start, after {said}: {error}", returncode=1)
        sam = SamLocal(cloud)
        stack.callback(sam.close)
        try:
            sam.begin()
        except (AssertionError, subprocess.SubprocessError) as error:
            pytest.exit(f"sam local invoke does not run a function here: {error}", returncode=1)
        yield sam
