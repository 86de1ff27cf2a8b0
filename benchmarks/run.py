"""`make bench`: measures, and writes docs/performance.md. It marks a missed target, but does not fail."""

# ruff: noqa: E501, RUF001 - the text of a report
from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks import compare, cost, growth, imports, latency, memory, replay, window
from benchmarks import primitives as qubic
from local.build import BUILD
from local.cloud import Cloud
from local.environment import ROOT, Progress
from qaes.domain.ids import now
from tests.support import template

REPORT = ROOT / "docs" / "performance.md"
FIGURES = REPORT.with_suffix(".json")
COST_ROWS: dict[str, tuple[str, tuple[int, int]]] = {
    "transitions": ("state transitions", (7, 9)),
    "invocations": ("invocations", (24, 32)),
    "invocations_shared": ("invocations, shared", (18, 26)),
    "write_units": ("write units", (130, 200)),
    "write_units_shared": ("write units, shared", (112, 180)),
    "read_units": ("read units", (60, 105)),
    "read_units_shared": ("read units, shared", (45, 90)),
    "usd_per_million": ("$ a million", (300, 400)),
    "usd_per_million_shared": ("$ a million, shared", (280, 375)),
    "log_bytes": ("log bytes", (10_240, 12_288)),
    "usd_logs_per_million": ("$ a million, logs", (21, 29)),
    "usd_traces_per_million": ("$ a million, traces", (29, 54)),
    "functions_on_path": ("functions on the critical path", (5, 9)),
}
"""Title and targets (monitoring, transfer) of each figure."""
LAYER_MEGABYTES = 60
COMPARISON = "The time of a task beside another build"


def mark(holds: bool) -> str:
    """Return the mark for a target."""
    return "✓" if holds else "✗"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Render a Markdown table."""
    names = list(head)
    lines = [names, ["---"] * len(names), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def import_times() -> str:
    """Return the section about the loading of each function."""
    rows = [
        (
            each.function,
            f"{each.uncompiled:.0f} ms",
            f"{each.now:.0f} ms",
            f"{each.now - each.module:.0f} ms",
            f"{each.ratio:.2f}×",
            f"≤ {each.limit}×",
            mark(each.ratio <= each.limit),
        )
        for each in imports.measure()
    ]
    head = ("function", "without byte code", "now", "of it AWS clients", "the rest", "target", "")
    return f"""## Loading a function

Each function is loaded in a fresh process with its environment. This includes its AWS clients, because Lambda provides a whole processor during
the load; in earlier releases, the first invocation created them. The target for the rest is a multiple of `{imports.BASELINE}` in the same run
(medians of {imports.ROUNDS}). "Without byte code" compiles the functions and the layer's packages, as Lambda did before the layer's build added
byte code. The functions' own code has no byte code on AWS, and compiles in 10 to 35 ms.

{table(head, rows)}"""


def costs() -> str:
    """Return the section about the cost of two tasks, and write it to docs/performance.json."""
    found, before = cost.report(), json.loads(cost.BASELINE.read_text())
    _write_figures(cost=found)
    head = (
        "",
        *(f"{name}, {build}" for name in cost.TASKS for build in ("before", "now")),
        *(f"target, {name}" for name in cost.TASKS),
    )
    rows = []
    for figure, (title, limits) in COST_ROWS.items():
        values = [str(build[name][figure]) for name in cost.TASKS for build in (before, found)]
        targets = [
            f"≤ {limit:,} {mark(found[name][figure] <= limit)}"
            for name, limit in zip(cost.TASKS, limits, strict=True)
        ]  # fmt: skip
        rows.append((title, *values, *targets))
    idle = found["idle_usd_per_month"]
    bill = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in idle.items())
    return f"""## Cost of a task

`python -m benchmarks.cost` counts a run of the deployed definition on moto by DynamoDB's rules: item sizes, before-images, indexes, transactions,
each key of a BatchGetItem. The count includes the API's requests (monitoring 2, transfer 4), the authorizer, the streams' batches and the end of
the execution, but not the mock network's table. "Before" is the workflow with one state for each agent. "Shared" means that six tasks share an
anchor and the gateway's copy of the policy: they start within 15 s, an anchor's window, and the gateway keeps its copy for 30 s. Prices:
{cost.PRICES_OF}; a call lasts {cost.SECONDS_A_CALL * 1000:.0f} ms with the function's memory. Logs and traces have separate rows.

{table(head, rows)}

Cost of an idle stack for a month, in dollars: {bill}."""


def _write_figures(**sections: Any) -> None:
    """Replace these sections of docs/performance.json."""
    kept = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    FIGURES.write_text(json.dumps(kept | sections, indent=2) + "\n")


def growths() -> str:
    """Return the section about the growth of costs, and write it to docs/performance.json."""
    (small, before), (large, after) = ((size, growth.measure(size)) for size in growth.SIZES)
    created, figures, rows = after[0], {}, []
    for name, units in after[1].items():
        less, ratio = before[1][name], growth.grown(before[1][name], units)
        counts = [each for pair in ((less.read, units.read), (less.written, units.written)) for each in pair]
        target = f"≤ {growth.MOST_GROWTH}× {mark(ratio <= growth.MOST_GROWTH)}"
        rows.append((name, *(f"{count:g}" for count in counts), f"{ratio:.2f}×", target))
        figures[name] = {"read_units": units.read, "write_units": units.written, "growth": round(ratio, 3)}
    _write_figures(growth=figures)
    head = (
        "",
        *(f"{kind} units at {size:,}" for kind in ("read", "write") for size in (small, large)),
        "growth",
        "target",
    )
    kinds = ", ".join(f"{count:,} {kind} items" for kind, count in created.items())
    still = " and ".join(f"{count} {status}" for status, count in growth.OPEN.items())
    return f"""## How costs grow with the number of tasks

`make bench ONLY=growth` sends the same requests and scheduled runs on moto to a stack with {small:,} past tasks and to a stack with {large:,}. The
tasks are created directly. {large:,} tasks are {kinds}, with all their keys in the table and in its six indexes. Every item that is read is
complete, and copied from a task that ran. The tasks have no other items (plans, steps, approvals, audit entries, batches, tiles), because no
operation below reads those of another task. The tasks cover {growth.DAYS} days and {growth.REQUESTERS:,} requesters. One requester has a tenth of them, and this requester's lists are
measured. At both sizes {still} tasks have not ended, and {growth.FRESH} changes are {growth.FRESH_SECONDS} seconds old: the reconciler reads each open task,
and the sweeper each new change. A page has 20 tasks. The list of running executions, one call of Step Functions for each 1,000, is not counted.

{table(head, rows)}

Two costs grow with the load, not with the history: the reconciler's run with the number of open tasks ({_each(after[1], "the reconciler's run", sum(growth.OPEN.values()))} read units for each), and
the sweeper's run with the changes of the last three minutes ({_each(after[1], "the sweeper's run", growth.FRESH)} for each).

A partition is limited to 1,000 write units a second. `by_status` has four shards for the transient statuses, enough for 2,000 tasks a second without
an approval. `by_day` has eight shards, enough for 8,000 changes a second. `by_kind` and the key `completed` are written once for each task, enough
for 1,000 tasks a second. One requester can start at most 25 to 35 tasks a second, because each start changes the requester's count of open tasks in
a transaction ([ADR 12](adr/0012-open-tasks-are-counted.md)). Further requests return 503 with `Retry-After`."""


def _each(found: growth.Measured, name: str, count: int) -> str:
    return f"{found[name].read / count:.1f}"


def windows() -> str:
    """Return the section about the windows of the sequencer and of the anchor."""
    kinds = ("BATCH", "HEAD", "TILE", "INDEX")
    rows = [
        (
            f"{each.rate:g}",
            f"{each.sequencer_window} s / {each.anchor_window} s",
            f"{each.batches:.2f}",
            f"{each.anchor_calls:.2f}",
            *(f"{each.written[kind]:.1f}" for kind in kinds),
            f"{sum(each.written.values()):.1f}",
            f"{each.read:.1f}",
        )
        for each in window.measure()
    ]
    head = ("tasks a second", "windows", "sequencer's calls", "anchor's calls", *kinds, "write units", "read units")
    return f"""## Savings of the log's windows

`make bench ONLY=window` measures one task on moto, as the average of {window.TASKS} tasks with {window.EVENTS} entries each. A window is the time that the sequencer waits for
further entries, and the anchor for further growth. The columns BATCH to INDEX are write units. The anchor's calls are those for the log's growth.

{table(head, rows)}"""


def replays() -> str:
    """Return the section about the replay of recorded requests, and write it to docs/performance.json."""
    found = replay.measure()
    _write_figures(
        replay={
            "requests": found.requests,
            "calls": found.calls,
            "cpu_seconds": round(found.cpu_seconds, 2),
            "deciding_seconds": round(found.deciding_seconds, 2),
            "longest_seconds": round(found.longest_seconds, 2),
            "read_units": found.read_units,
        }
    )
    most = replay.MOST_SECONDS
    row = (
        f"{found.requests:,}",
        found.calls,
        f"{found.cpu_seconds:.1f} s",
        f"{found.deciding_seconds:.2f} s",
        f"{found.longest_seconds:.1f} s",
        f"≤ {most} s {mark(found.longest_seconds <= most)}",
        f"{found.read_units:,.0f}",
    )
    return f"""## Replay of recorded requests

`make bench ONLY=replay` replays a proposal over recorded requests, of which one in {replay.ONE_IN} is decided differently. The requests are on moto in the same process, so most of
the processor's time is moto's; the decisions alone, two for each request, are measured beside it. A call begins no batch after 15 seconds.

{table(("requests", "calls", "processor's time", "of it deciding", "longest call", "target", "read units"), [row])}"""


def latencies(cloud: Cloud) -> str:
    """Return the section about the latency of requests and tasks."""
    found = latency.measure(cloud)
    bare = found.p50("a bare function")
    rows = [
        (name, f"{found.p50(name):.0f} ms", f"{found.p95(name):.0f} ms", f"{found.p50(name) / bare:.1f}×")
        for name in found.requests
    ]
    return f"""## Requests and tasks on the local AWS

Warm requests through API Gateway and the authorizer, in sequence and interleaved ({latency.ROUNDS} of each). The local AWS runs every function as a
process on this machine, so compare the ratio to an empty function without an authorizer, not the milliseconds.

{table(("request", "p50", "p95", "p50 / bare p50"), rows)}

A monitoring task from `POST /task/start` to `completed`: median {statistics.median(found.tasks):.1f} s of {latency.TASKS}, which is {statistics.median(found.tasks) * 1000 / bare:.0f} bare requests."""


def comparison() -> str:
    """Return the comparison with another build, whose checkout is BEFORE."""
    other = Path(os.environ.get("BEFORE", "")).resolve()
    if other == ROOT or not (other / "template.yaml").is_file():
        sys.exit("Set BEFORE to a checkout of another version: make bench ONLY=compare BEFORE=/path/to/checkout")
    revision = ["git", "-C", str(other), "rev-parse", "--short", "HEAD"]
    name = subprocess.run(revision, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
    rows = [
        (
            kind,
            f"{found['before_seconds']:.2f} s",
            f"{found['now_seconds']:.2f} s",
            f"{found['ratio']:.0%}",
            f"≤ {found['target']:.0%}",
            mark(found["ratio"] <= found["target"]),
        )
        for kind, found in compare.report(*compare.measure(other)).items()
    ]
    return f"""## {COMPARISON}

`make bench ONLY=compare BEFORE=…` measures the time from `POST /task/start` to `completed` on two local clouds that run at the same time ("before" is revision `{name}`), alternately in
random order; medians of {compare.ROUNDS}. A transfer is approved as soon as it waits.

{table(("task", "before", "now", "now / before", "target", ""), rows)}"""


def sizes(cloud: Cloud) -> str:
    """Return the section about the layer's size and each function's peak memory."""
    layer = BUILD / "CoreLayer" / "python"
    packages = sorted(((_bytes(path) / 1e6, path.name) for path in layer.iterdir() if path.is_dir()), reverse=True)
    total = sum(_bytes(path) for path in layer.iterdir()) / 1e6
    compiled = sum(path.stat().st_size for path in layer.rglob("*.pyc")) / 1e6
    largest = ", ".join(f"{name} {size:.1f}" for size, name in packages[:6])
    common = template.template()["Globals"]["Function"]["MemorySize"]
    limits = {
        name: body["Properties"].get("MemorySize", common)
        for name, body in template.resources("AWS::Serverless::Function").items()
    }
    rows = []
    for name, limit in limits.items():
        used = memory.megabytes(cloud, name)
        rows.append((name, f"{used:.0f} MB", f"{limit} MB", mark(used <= limit)))
    return f"""## Size and memory

The unzipped layer has {total:.0f} MB (≤ {LAYER_MEGABYTES} MB {mark(total <= LAYER_MEGABYTES)}), including {compiled:.0f} MB of byte code. Its largest packages, in MB: {largest}.

The peak is the resident memory of a fresh process after {memory.CALLS} calls of the function's handler with its events, on the local AWS, with the built
code and layer. The authorizer's events have no token to verify.

{table(("function", "peak", "MemorySize", ""), rows)}"""


def primitives() -> str:
    """Return the section about the Qubic primitives."""
    rows = []
    for name, (milliseconds, ratio) in qubic.measure().items():
        limit = qubic.LIMITS.get(name)
        target = (f"≤ {limit:.0f}×", mark(ratio <= limit)) if limit else ("", "")
        rows.append((name, f"{milliseconds:.2f} ms", f"{ratio:.1f}×", *target))
    return f"""## Qubic primitives

Times in pure Python, as multiples of a SHA-256 over 1 MiB in the same run (median of {qubic.ROUNDS}).

{table(("", "time", "ratio", "target", ""), rows)}"""


def audit_log() -> str:
    """Return the section about the audit log under load, and the cost of its proofs."""
    proofs = _load_test("--proofs-only")
    steady = _load_test("--rate", "30", "--tasks", "100", "--sizes")
    at_once = _load_test("--tasks", "100", "--median", "0", "--sizes")
    return f"""## The audit log

`make load-test` uses a separate local AWS, which runs every function as a process on this machine. Each entry's proof is verified, and
fsck reports no finding. Times start when the event is written to the tasks table. The first run has 30 events a second, the load of 1.5 tasks a second;
the second run has as many as this machine accepts, which measures the throughput.

{steady}

{at_once}

A proof is computed from the tiles and verified, in memory:

{proofs}"""


def _load_test(*arguments: str) -> str:
    command = [sys.executable, "-m", "benchmarks.load_test", *arguments]
    done = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return "\n".join(line for line in done.stdout.splitlines() if line.startswith("|"))


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


def _section(title: str) -> str | None:
    """Return a section of the current report, with the line that ends it."""
    found = re.search(rf"## {title}\n.*?\n(?=\n## )", REPORT.read_text(), flags=re.DOTALL)
    return found[0] if found else None


def sizes_alone() -> str:
    """Return the section of `sizes`, from a separate local AWS."""
    with Cloud(f"bench-{os.getpid()}") as cloud:
        _seed(cloud)
        section = sizes(cloud)
    cloud.remove_directory()
    return section


SECTIONS: dict[str, tuple[str, Callable[[], str]]] = {
    "compare": (COMPARISON, comparison),
    "imports": ("Loading a function", import_times),
    "cost": ("Cost of a task", costs),
    "window": ("Savings of the log's windows", windows),
    "growth": ("How costs grow with the number of tasks", growths),
    "replay": ("Replay of recorded requests", replays),
    "memory": ("Size and memory", sizes_alone),
}
"""Sections that can be measured separately, by their names on the command line: title and function."""


def main() -> None:
    """Measure everything, then write the report at once; with an argument, replace only that section of SECTIONS."""
    progress = Progress()
    if sys.argv[1:]:
        [only] = sys.argv[1:]
        title, section = SECTIONS[only]
        before = _section(title)
        if before is None:
            sys.exit(f"{REPORT.relative_to(ROOT)} has no section `{title}` yet. Run make bench")
        REPORT.write_text(REPORT.read_text().replace(before, section() + "\n"))
        return
    progress("Qubic primitives")
    parts = [primitives()]
    progress("import times")
    parts.insert(0, import_times())
    progress("costs")
    parts.insert(1, costs())
    progress("the log's windows")
    parts.insert(2, windows())
    progress("how costs grow")
    parts.insert(3, growths())
    progress("replays")
    parts.insert(4, replays())
    with Cloud(f"bench-{os.getpid()}", progress=progress) as cloud:
        progress("requests and tasks")
        parts.insert(5, latencies(cloud))
        progress("size and memory")
        _seed(cloud)
        parts.insert(6, sizes(cloud))
    cloud.remove_directory()
    progress("the audit log under load")
    parts.insert(6, audit_log())
    if (compared := _section(COMPARISON)) is not None:  # it needs another checkout: keep the last measurement
        parts.insert(6, compared.rstrip())
    head = f"""# Performance

Written by `make bench` on {now():%Y-%m-%d}, with {os.cpu_count()} cores and Python {platform.python_version()}. Absolute times
depend on this machine; compare the ratios within the run.
"""
    REPORT.write_text("\n\n".join([head.rstrip(), *parts]) + "\n")
    progress(f"written: {REPORT.relative_to(ROOT)}")


def _seed(cloud: Cloud) -> None:
    """Write the tasks that the events name."""
    paths = os.pathsep.join(str(ROOT / each) for each in ("functions", "layers/core"))
    environment = cloud.environment | cloud.names | {"PYTHONPATH": paths}
    subprocess.run(
        [sys.executable, "-m", "local.seed"], cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL
    )


if __name__ == "__main__":
    main()
