"""Import time of each handler module, as a multiple of `import boto3; boto3.client("dynamodb")` in the same run."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
from pathlib import Path

from tests.support import template

ROOT = Path(__file__).resolve().parents[1]
BASELINE = "import boto3; boto3.client('dynamodb', region_name='us-east-1')"
LIMITS = {"authorizer": 1.0, "api": 2.3, "workflow": 1.6}
ROUNDS = 9


def kind(module: str) -> str:
    """Which of the three limits a handler's module is under."""
    if module.startswith("authorizer."):
        return "authorizer"
    return "api" if module.endswith(".api") else "workflow"


def milliseconds(statement: str) -> float:
    """One import in a fresh interpreter, bytecode cached, as Lambda's is."""
    program = f"import time; t = time.perf_counter(); {statement}; print((time.perf_counter() - t) * 1000)"
    path = os.pathsep.join(str(ROOT / each) for each in ("functions", "layers/core"))
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": path, "PYTHONPYCACHEPREFIX": str(ROOT / ".local/pycache")}
    environment |= {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}
    # A handler of the workflow has made its clients by the end of its first call: that counts, so it is counted here.
    out = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return float(out.stdout.strip().splitlines()[-1])


def measure() -> list[tuple[str, float, float, float]]:
    """Rows of (module, milliseconds, multiple of the baseline, limit), medians over interleaved rounds."""
    modules = sorted({handler.rpartition(".")[0] for handler in template.functions().values()})
    statements = {"": BASELINE} | {module: f"import {module}" for module in modules}
    times: dict[str, list[float]] = {name: [] for name in statements}
    for statement in statements.values():
        milliseconds(statement)
    for _ in range(ROUNDS):
        for name, statement in statements.items():
            times[name].append(milliseconds(statement))
    median = {name: statistics.median(values) for name, values in times.items()}
    return [(name, median[name], median[name] / median[""], LIMITS[kind(name)]) for name in modules]
