"""schemathesis on the deployed API: requests made from the document, good and bad, single ones and along its links."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import Api

ROOT = Path(__file__).resolve().parents[2]
REPORT = ROOT / ".local" / "schemathesis"
EXAMPLES = int(os.environ.get("QAES_FUZZ", "6"))
SEED = int(os.environ.get("QAES_SEED", "1"))
ALWAYS = ("start_task", "decide", "propose_policy", "write", "get_tasks")
"""The operations of which every run tries the edges; of the others, a run tries a sample."""
PART = 3
MANY = 500
"""So many requests to an operation, and the walks that go with them, make 10,000 requests in all (`make fuzz`)."""


@pytest.fixture(scope="module")
def generated() -> list[int]:
    return []


def run(api: Api, *arguments: str) -> str:
    """Run schemathesis, which must find nothing; its log is .local/schemathesis-*.log."""
    command = [
        str(Path(sys.executable).with_name("st")),
        "--config-file", "tests/e2e/schemathesis.toml", "run", "docs/openapi.json",
        "--url", api.cloud.url, "--seed", str(SEED), "--workers", "2",
        "--request-timeout", "60", "--continue-on-failure", "--generation-database", "none", "--no-color",
        *arguments,
    ]  # fmt: skip
    people = {f"QAES_{role.upper()}": api.cloud.token(role) for role in ("operator", "approver")}
    log = REPORT.with_name(
        f"schemathesis-{arguments[1].replace(',', '-')}{'-tasks' if '--exclude-operation-id' in arguments else ''}.log"
    )
    log.parent.mkdir(exist_ok=True)
    with log.open("w") as output:
        code = subprocess.run(
            command, cwd=ROOT, env=api.cloud.environment | people, stdout=output, stderr=output, check=False
        ).returncode
    found = log.read_text()
    assert code == 0, found[-8000:]
    for phase in arguments[1].split(","):
        assert f"✅  {phase.capitalize()}" in found
    return found


def number_of(found: str) -> int:
    [number] = re.findall(r"(\d+) generated", found)
    return int(number)


def sample() -> list[str]:
    """Return the operations whose edges this run tries: a third by the seed; in `make fuzz` all of them."""
    document = json.loads((ROOT / "docs" / "openapi.json").read_text())
    others = sorted(
        operation["operationId"]
        for path in document["paths"].values()
        for operation in path.values()
        if isinstance(operation, dict) and operation.get("operationId", ALWAYS[0]) not in ALWAYS
    )
    chosen = others if EXAMPLES >= MANY else random.Random(SEED).sample(others, len(others) // PART)  # noqa: S311
    return [*ALWAYS, *chosen]


def test_generated_requests_find_nothing(api: Api, generated: list[int]) -> None:
    """Every operation by its example; the sample also at the edges of its schema, and with generated values."""
    run(api, "--phases", "examples", "--max-examples", str(EXAMPLES))
    included = [argument for name in sample() for argument in ("--include-operation-id", name)]
    edges = ("--phases", "coverage,fuzzing", "--max-examples", str(EXAMPLES))
    generated.append(number_of(run(api, *edges, *included)))
    assert generated[0] > 150


def test_walks_along_the_links_find_nothing(api: Api, generated: list[int]) -> None:
    """Later requests find the objects that earlier requests created: a task by its id, a plan, a transaction."""
    # The tool begins walks with POST /write alone, where it may: it takes a wallet_address for the id of a thing
    # that would have to be made first. Without it, walks begin with a task or a plan.
    walks = ("--phases", "stateful", "--max-examples", str(max(EXAMPLES * 7 // 10, 15)))
    found = run(api, *walks, "--exclude-operation-id", "write")
    [links] = re.findall(r"API Links: +(\d+) covered", found)
    assert int(links) >= 4
    generated += [number_of(found), number_of(run(api, *walks))]
    if EXAMPLES >= MANY and len(generated) == 3:
        assert sum(generated) >= 10_000, generated
