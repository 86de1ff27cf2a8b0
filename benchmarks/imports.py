"""Load time of each function, as a multiple of `import boto3; boto3.client("dynamodb")` in the same run.

A function is loaded as in Lambda: in a fresh interpreter, with its environment and the AWS clients that its module
creates. It is loaded with the byte code that the build adds, and without.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support import template

ROOT = Path(__file__).resolve().parents[1]
BASELINE = "import boto3; boto3.client('dynamodb', region_name='us-east-1')"
LIMITS = {"authorizer": 1.0, "api": 2.3, "workflow": 1.6}
ROUNDS = 3
UNCOMPILED = """
import _frozen_importlib_external as machinery
cached = machinery.cache_from_source
def only_what_lambda_has_compiled(path, *arguments, **options):
    own = "/functions/" in path or "/layers/" in path or "site-packages" in path
    if own and not any(f"site-packages/{name}" in path for name in ("boto", "s3transfer", "dateutil", "urllib3")):
        raise NotImplementedError  # then Python compiles the source, and keeps nothing
    return cached(path, *arguments, **options)
machinery.cache_from_source = only_what_lambda_has_compiled
"""
"""Makes Python compile the functions and the layer's packages, as in a Lambda container without byte code."""


@dataclass
class Loaded:
    """A function's times in milliseconds, medians over interleaved rounds; `module` is without its clients."""

    function: str
    limit: float
    module: float
    now: float
    uncompiled: float
    baseline: float

    @property
    def ratio(self) -> float:
        """Time of the module without its clients, as a multiple of the baseline, which is mostly a client."""
        return self.module / self.baseline


def kind(module: str) -> str:
    """Return the kind of a handler's module, which determines its limit."""
    if module.startswith("authorizer."):
        return "authorizer"
    return "api" if module.endswith(".api") else "workflow"


def milliseconds(statement: str, environment: dict[str, str], before: str = "") -> float:
    """Time one import in a fresh interpreter, after the statements `before`, with cached byte code as in Lambda."""
    program = f"{before}\nimport time; t = time.perf_counter(); {statement}; print((time.perf_counter() - t) * 1000)"
    path = os.pathsep.join(str(ROOT / each) for each in ("functions", "layers/core"))
    own = {"PATH": os.environ["PATH"], "PYTHONPATH": path, "PYTHONPYCACHEPREFIX": str(ROOT / ".local/pycache")}
    own |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
    own |= {"AWS_DEFAULT_REGION": template.REGION}
    command = [sys.executable, "-c", program]
    out = subprocess.run(command, env=own | environment, capture_output=True, text=True, check=True)
    return float(out.stdout.strip().splitlines()[-1])


def measure() -> list[Loaded]:
    """Measure every function in interleaved rounds."""
    runs: dict[tuple[str, str], tuple[str, dict[str, str], str]] = {("", "baseline"): (BASELINE, {}, "")}
    modules: dict[str, str] = {}
    for name, handler in template.functions().items():
        modules[name] = handler.rpartition(".")[0]
        statement, own = f"import {modules[name]}", template.environment(name, {"Stage": "local"})
        in_lambda = own | {"AWS_LAMBDA_FUNCTION_NAME": name}
        runs[name, "module"] = (statement, own, "")
        runs[name, "now"] = (statement, in_lambda, "")
        runs[name, "uncompiled"] = (statement, in_lambda, UNCOMPILED)
    times: dict[tuple[str, str], list[float]] = {each: [] for each in runs}
    for number in range(ROUNDS + 1):
        for each, (statement, environment, before) in runs.items():
            taken = milliseconds(statement, environment, before)
            if number:
                times[each].append(taken)
    median = {each: statistics.median(values) for each, values in times.items()}
    return [
        Loaded(
            name,
            LIMITS[kind(module)],
            module=median[name, "module"],
            now=median[name, "now"],
            uncompiled=median[name, "uncompiled"],
            baseline=median["", "baseline"],
        )
        for name, module in modules.items()
    ]
