"""Wait until the services respond, and load every function that the first task needs.

Loading a function takes a second or more here, and the first task needs about fifteen functions in sequence. Each
returns from a warm-up at once (`qaes.adapters.handlers`). A warm-up writes nothing.
"""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from functools import partial
from typing import TYPE_CHECKING, Any

from local.environment import REGION, LocalCloudError

if TYPE_CHECKING:
    from local.cloud import Cloud

TIMEOUT_SECONDS = 60
COLD_SECONDS = 300
"""Maximum time to load a function on a busy machine."""

REPORT_SECONDS = 5
HEALTH_PATHS = (
    "/health",
    "/planner/health",
    "/agent-runtime/health",
    "/worker/health",
    "/audit/health",
    "/qubic/health",
)
AUTHORIZED_PATH = "/tasks?limit=1"
"""A read-only request that needs a token: it loads the authorizer and its keys."""

NOT_WARMED = frozenset({"AuditSweeperFunction", "AuthorizerFunction", "PublicLogFunction", "ReconcilerFunction"})
"""Functions that no task waits for, and the authorizer, which has no warm-up."""


def wait_until_ready(cloud: Cloud) -> None:
    """Load every function of a task, then return when every service is healthy.

    Raises
    ------
    LocalCloudError
        A service or a function does not respond in time. The text has its name and its response.
    """
    invoke = _client(cloud).invoke
    names = to_warm_up(cloud)
    cloud.progress(f"loading {len(names)} functions")
    _do_all(cloud, "loaded", {name: partial(_warm_up, invoke, name, cloud.resources[name]) for name in names})
    cloud.progress("waiting for the services to respond")
    # The keys of a stack's own user pool are at AWS's address, which the local cloud cannot reach.
    paths = HEALTH_PATHS if "JwtIssuer" in cloud.parameters else (*HEALTH_PATHS, AUTHORIZED_PATH)
    _do_all(cloud, "answered", {path: partial(_wait_for_answer, cloud, path) for path in paths})


def to_warm_up(cloud: Cloud) -> list[str]:
    """Return the logical ids of the functions to warm up."""
    return [name for name in cloud.resources if name.endswith("Function") and name not in NOT_WARMED]


def _client(cloud: Cloud) -> Any:
    import boto3
    from botocore.config import Config

    patient = Config(read_timeout=COLD_SECONDS, retries={"max_attempts": 0})
    return boto3.Session("test", "test", region_name=REGION).client(
        "lambda", endpoint_url=cloud.endpoint, config=patient
    )


def _do_all(cloud: Cloud, done_what: str, work: dict[str, Callable[[], None]]) -> None:
    """Run all work in parallel, one thread for each processor, and print the remaining work every few seconds."""
    pool = ThreadPoolExecutor(max(2, os.cpu_count() or 2))
    try:
        left = {pool.submit(do): name for name, do in work.items()}
        while left:
            done, _ = wait(left, REPORT_SECONDS, FIRST_EXCEPTION)
            for future in done:
                del left[future]
                future.result()
            if left:
                cloud.progress(
                    f"{len(work) - len(left)} of {len(work)} {done_what}; next is {next(iter(left.values()))}"
                )
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _warm_up(invoke: Callable[..., dict[str, Any]], name: str, physical: str) -> None:
    answer = invoke(FunctionName=physical, Payload=json.dumps({"warm_up": True}))
    if "FunctionError" in answer:
        raise LocalCloudError(f"{name} cannot be loaded: {answer['Payload'].read().decode()}")


def _wait_for_answer(cloud: Cloud, path: str) -> None:
    token = "stub" if cloud.auth_mode == "stub" else cloud.token("operator")
    deadline = time.monotonic() + TIMEOUT_SECONDS
    answer = "no answer"
    while time.monotonic() < deadline:
        request = urllib.request.Request(f"{cloud.url}{path}", headers={"Authorization": f"Bearer {token}"})
        try:
            with urllib.request.urlopen(request, timeout=30):
                return
        except urllib.error.HTTPError as error:
            answer = f"{error.code} {error.read().decode(errors='replace')}"
        except OSError as error:
            answer = str(error)
        time.sleep(0.2)
    raise LocalCloudError(f"{path} does not respond as expected: {answer}")
