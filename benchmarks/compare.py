"""Comparison of two builds: the time of a task from its start to `completed`, in one run on one machine.

`python -m benchmarks.compare CHECKOUT` starts the local clouds of another checkout and of this one, and runs tasks on
both alternately, so that both have the same load. Compare the ratio, not the seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from local.environment import ROOT, Ports

ROUNDS, WARM_UP = 15, 2
TARGETS = {"monitoring": 0.6, "transfer": 0.7}
WALLET = "0x1234567890abcdef"
TASKS = {
    "monitoring": {"task_type": "monitor_wallet", "wallet_address": WALLET, "parameters": {"alert_threshold": 500}},
    "transfer": {
        "task_type": "transfer_funds",
        "wallet_address": WALLET,
        "parameters": {"amount": 1, "to_address": "0xfedcba0987654321"},
    },
}
POLL_SECONDS = 0.02


@dataclass
class Build:
    """A running build, and the duration of each of its tasks in seconds."""

    name: str
    requester: httpx.Client
    approver: httpx.Client
    seconds: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in TASKS})

    def run(self, kind: str) -> float:
        """Run one task of a kind, and approve it as soon as it waits. Return the seconds from start to `completed`."""
        begin = time.perf_counter()
        answer = self.requester.post("/task/start", json=TASKS[kind] | {"description": "how long does it take?"})
        task_id = str(answer.raise_for_status().json()["task_id"])
        approved, deadline = False, time.monotonic() + 120
        while (status := self.requester.get(f"/task/{task_id}").json()["status"]) != "completed":
            if status == "waiting_approval" and not approved:
                decision = {"approved": True, "reason": "measured"}
                self.approver.post(f"/task/{task_id}/approve", json=decision).raise_for_status()
                approved = True
            elif status not in {"pending", "planning", "executing", "waiting_approval"} or time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: the task is {status}")
            time.sleep(POLL_SECONDS)
        return time.perf_counter() - begin


@contextlib.contextmanager
def running(name: str, checkout: Path) -> Iterator[Build]:
    """Start the local cloud of a checkout on free ports, and stop it at the end."""
    ports = Ports.free()
    environment = os.environ | {"QAES_HTTP_PORT": str(ports.http), "QAES_PORT": str(ports.aws)}
    make = ["make", "-C", str(checkout)]
    subprocess.run([*make, "up"], env=environment, check=True, stdout=subprocess.DEVNULL)
    try:
        text = (checkout / ".local" / "tokens.env").read_text()
        tokens = dict(re.findall(r"^(?:export )?(\w+)=['\"]?([\w.-]+)['\"]?$", text, re.MULTILINE))
        with contextlib.ExitStack() as stack:
            clients = [
                stack.enter_context(
                    httpx.Client(
                        base_url=f"http://127.0.0.1:{ports.http}",
                        headers={"Authorization": f"Bearer {tokens[role]}"},
                        timeout=60,
                    )
                )
                for role in ("REQUESTER", "APPROVER")
            ]
            yield Build(name, *clients)
    finally:
        subprocess.run([*make, "down"], env=environment, check=True, stdout=subprocess.DEVNULL)


def measure(other: Path, rounds: int = ROUNDS) -> tuple[Build, Build]:
    """Run the tasks on both builds alternately, in random order."""
    with running("before", other) as before, running("now", ROOT) as now:
        for number in range(WARM_UP + rounds):
            turns = [(build, kind) for build in (before, now) for kind in TASKS]
            random.shuffle(turns)
            for build, kind in turns:
                seconds = build.run(kind)
                if number >= WARM_UP:
                    build.seconds[kind].append(seconds)
    return before, now


def report(before: Build, now: Build) -> dict[str, dict[str, float]]:
    """Return the medians in seconds and their ratio, by kind of task."""
    found = {}
    for kind, target in TARGETS.items():
        old, new = (statistics.median(build.seconds[kind]) for build in (before, now))
        found[kind] = {
            "before_seconds": round(old, 3),
            "now_seconds": round(new, 3),
            "ratio": round(new / old, 3),
            "target": target,
        }
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path, help="a folder with another version of the project")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    arguments = parser.parse_args()
    print(json.dumps(report(*measure(arguments.checkout.resolve(), arguments.rounds)), indent=2))
