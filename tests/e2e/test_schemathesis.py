"""schemathesis on the deployed API, with all its checks: requests made from the document, good and bad."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.e2e.conftest import Api

ROOT = Path(__file__).resolve().parents[2]


def test_generated_requests_find_nothing(api: Api) -> None:
    """`QAES_FUZZ=200 make fuzz` sends some 200 requests to each operation; in a normal run it is a few."""
    examples = os.environ.get("QAES_FUZZ", "6")
    command = [
        str(Path(sys.executable).with_name("st")),
        "--config-file", "tests/e2e/schemathesis.toml", "run", "docs/openapi.json",
        "--url", api.cloud.url, "--checks", "all", "--phases", "examples,fuzzing", "--max-examples", examples,
        "--seed", "1", "--request-timeout", "60", "--continue-on-failure", "--generation-database", "none",
        "--header", f"Authorization: Bearer {api.cloud.token('operator')}", "--no-color",
    ]  # fmt: skip
    found = subprocess.run(command, cwd=ROOT, env=api.cloud.environment, capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
    [generated] = re.findall(r"(\d+) generated", found.stdout)
    assert int(generated) > 21
