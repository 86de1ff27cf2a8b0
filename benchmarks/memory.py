"""Peak memory of each function: its built code and layer, in a fresh process, on its events, against the local AWS.

With the arguments HANDLER FUNCTION EVENT…, this file is that process: it prints its peak resident set in MB (Linux).
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from local.cloud import Cloud

ROOT = Path(__file__).resolve().parents[1]
CALLS = 20


@dataclass
class Context:
    """The attributes of Lambda's context that handlers use."""

    function_name: str
    memory_limit_in_mb: int = 512
    invoked_function_arn: str = "arn:aws:lambda:us-east-1:000000000000:function:benchmark"
    aws_request_id: str = "00000000-0000-4000-8000-000000000000"

    def get_remaining_time_in_millis(self) -> int:
        """Return more time than any call needs."""
        return 60_000


def megabytes(cloud: Cloud, function: str) -> float:
    """Return the peak resident memory of `function`, with Python and the AWS SDK."""
    from local.build import BUILD
    from tests.support import events, template

    configuration = cloud.client("lambda").get_function_configuration(FunctionName=cloud.resources[function])
    paths = [BUILD / function, BUILD / "CoreLayer" / "python"]
    environment = {name: value for name, value in cloud.environment.items() if name.startswith(("AWS_", "PATH"))}
    environment |= configuration["Environment"]["Variables"]
    environment |= {"AWS_ENDPOINT_URL": cloud.endpoint, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    cases = [str(events.path_of(case)) for case in events.cases() if events.function_of(case) == function]
    handler = template.functions()[function]
    out = subprocess.run(
        [sys.executable, "-P", str(Path(__file__)), handler, function, *cases],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return float(out.stdout.strip().splitlines()[-1])


def main() -> None:
    """Call a handler with each of its events, at least `CALLS` times in total."""
    _, handler, function, *paths = sys.argv
    module, _, attribute = handler.rpartition(".")
    call = getattr(importlib.import_module(module), attribute)
    cases = [json.loads(Path(path).read_text()) for path in paths]
    for number in range(max(CALLS, len(cases))):
        with contextlib.suppress(Exception):  # a used event is rejected, which needs memory too
            call(cases[number % len(cases)], Context(function))
    print(f"\n{_peak_megabytes():.1f}")


def _peak_megabytes() -> float:
    # Not getrusage: its maximum includes the parent process.
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) / 1024


if __name__ == "__main__":
    main()
