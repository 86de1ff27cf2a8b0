"""`make bench`: measures, and writes docs/performance.md. A target that is missed is marked; it fails nothing."""

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

from benchmarks import compare, cost, growth, imports, latency, memory, window
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
    """Whether a target is met."""
    return "✓" if holds else "✗"


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> str:
    """Render a Markdown table."""
    names = list(head)
    lines = [names, ["---"] * len(names), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def import_times() -> str:
    """What loading each function takes."""
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

In a fresh process with the function's environment. The AWS clients are made here too, where Lambda gives a whole processor; before, the first
invocation made them. The rest has a target as a multiple of `{imports.BASELINE}` in the same run (medians of {imports.ROUNDS}).
"Without byte code" compiles the functions and the layer's packages anew, as Lambda did before the layer's build added byte code. The functions' own code, which has
none on AWS, compiles in 10 to 35 ms.

{table(head, rows)}"""


def costs() -> str:
    """What two tasks cost, before the workflow was simplified and now; also writes docs/performance.json."""
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
    return f"""## What a task costs

Counted by `python -m benchmarks.cost` in a run of the deployed definition on moto, by DynamoDB's own rules: item sizes, before-images, indexes, transactions, each key of a BatchGetItem.
The count includes the API's requests (monitoring 2, transfer 4), the authorizer, the streams' batches and the end of the execution. It leaves out the mock network's
own table. "Before" is the workflow with one state for each agent. "Shared" means that six tasks share an anchor. Prices: {cost.PRICES_OF}; a call lasts {cost.SECONDS_A_CALL * 1000:.0f} ms with the function's
memory. Dollars are before logs and traces, which have rows of their own.

{table(head, rows)}

An idle stack costs by the month, in dollars: {bill}."""


def _write_figures(**sections: Any) -> None:
    """Replace these sections of docs/performance.json."""
    kept = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    FIGURES.write_text(json.dumps(kept | sections, indent=2) + "\n")


def growths() -> str:
    """What requests and scheduled runs cost after few tasks and after many; also writes docs/performance.json."""
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

By `make bench ONLY=growth`: the same requests and scheduled runs, on moto, when the stack has had {small:,} tasks and when it has had {large:,}. The tasks are
created directly. At {large:,} tasks these are {kinds}, with all their keys in the table and in its six indexes; what is read is a whole
item, copied from a task that has really run. They have no other items (plans, steps, approvals, audit entries, batches, tiles), which none of the operations below
reads of another task. They spread over {growth.DAYS} days and {growth.REQUESTERS:,} requesters; a tenth is one requester's, whose lists are measured. At both sizes {still} tasks have
not ended, and {growth.FRESH} changes are {growth.FRESH_SECONDS} seconds old: the reconciler reads each open task, and the sweeper each new change. A page has 20 tasks. The list of running
executions, one call of Step Functions for each 1,000 of them, is not counted.

{table(head, rows)}

What grows with the load, not with the history: the reconciler's run with the tasks that are open ({_each(after[1], "the reconciler's run", sum(growth.OPEN.values()))} read units for each), and
the sweeper's with the changes of the last three minutes ({_each(after[1], "the sweeper's run", growth.FRESH)} for each).

Limits of one partition, at 1,000 write units a second: `by_status` has four shards for the statuses that a task passes through, so 2,000 tasks a second without
an approval; `by_day` has eight, so 8,000 changes a second; `by_kind` and the key `completed` are written once for each task, so 1,000 tasks a second. One requester starts
at most 25 to 35 tasks a second, because each start changes the requester's count of open tasks in a transaction ([ADR 12](adr/0012-open-tasks-are-counted.md)); more are
answered 503 with `Retry-After`."""


def _each(found: growth.Measured, name: str, count: int) -> str:
    return f"{found[name].read / count:.1f}"


def windows() -> str:
    """What the windows of the sequencer and of the anchor save."""
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
    return f"""## What the log's windows save

By `make bench ONLY=window`, on moto, for each task, of {window.TASKS} with {window.EVENTS} entries each: the sequencer waits so long for further entries, and the anchor so long for
further growth. The columns BATCH to INDEX are write units. The anchor's calls are those of the log's growth alone.

{table(head, rows)}"""


def latencies(cloud: Cloud) -> str:
    """What requests and tasks take."""
    found = latency.measure(cloud)
    bare = found.p50("a bare function")
    rows = [
        (name, f"{found.p50(name):.0f} ms", f"{found.p95(name):.0f} ms", f"{found.p50(name) / bare:.1f}×")
        for name in found.requests
    ]
    return f"""## Requests and tasks on the local AWS

Warm, through API Gateway and the authorizer, one after the other and interleaved ({latency.ROUNDS} of each). The local AWS runs every function as a
process on this machine: the ratio to a function that does nothing (without an authorizer) says more than the milliseconds.

{table(("request", "p50", "p95", "p50 / bare p50"), rows)}

From `POST /task/start` to `completed`, a monitoring task: median {statistics.median(found.tasks):.1f} s of {latency.TASKS}, which is {statistics.median(found.tasks) * 1000 / bare:.0f} bare requests."""


def comparison() -> str:
    """What tasks take beside another build, whose checkout is BEFORE."""
    other = Path(os.environ.get("BEFORE", "")).resolve()
    if other == ROOT or not (other / "template.yaml").is_file():
        sys.exit("BEFORE=… names a checkout of another version: make bench ONLY=compare BEFORE=/path/to/it")
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

By `make bench ONLY=compare BEFORE=…`: from `POST /task/start` to `completed`, on two local clouds that run at the same time ("before" is revision `{name}`), by turns in an order
by chance; medians of {compare.ROUNDS}. A transfer is approved as soon as it waits.

{table(("task", "before", "now", "now / before", "target", ""), rows)}"""


def sizes(cloud: Cloud) -> str:
    """The layer's size and each function's peak memory."""
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

The layer, unzipped: {total:.0f} MB (≤ {LAYER_MEGABYTES} MB {mark(total <= LAYER_MEGABYTES)}), {compiled:.0f} MB of it byte code. Its largest packages, in MB: {largest}.

Peak resident memory of a fresh process that has called the function's handler {memory.CALLS} times with its events, built code and layer, against
the local AWS. The authorizer's events hold no token to verify.

{table(("function", "peak", "MemorySize", ""), rows)}"""


def primitives() -> str:
    """The Qubic primitives."""
    rows = []
    for name, (milliseconds, ratio) in qubic.measure().items():
        limit = qubic.LIMITS.get(name)
        target = (f"≤ {limit:.0f}×", mark(ratio <= limit)) if limit else ("", "")
        rows.append((name, f"{milliseconds:.2f} ms", f"{ratio:.1f}×", *target))
    return f"""## Qubic primitives

In pure Python, as multiples of a SHA-256 over 1 MiB in the same run (median of {qubic.ROUNDS}).

{table(("", "time", "ratio", "target", ""), rows)}"""


def audit_log() -> str:
    """What the audit log does under load, and what its proofs cost."""
    proofs = _hammer("--proofs-only")
    steady = _hammer("--rate", "30", "--tasks", "100", "--sizes")
    at_once = _hammer("--tasks", "100", "--median", "0", "--sizes")
    return f"""## The audit log

By `make hammer` on a local AWS of its own, which runs every function as a process on this machine; each entry's proof is verified, and
fsck finds nothing. Times count from the event's being written in the tasks table. First 30 events a second, as 1.5 tasks a second would make; then as many as
this machine takes, which measures how fast the queue is worked off.

{steady}

{at_once}

A proof is made of the tiles, and verified, in memory:

{proofs}"""


def _hammer(*arguments: str) -> str:
    hammer = [sys.executable, "-m", "benchmarks.hammer", *arguments]
    done = subprocess.run(hammer, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return "\n".join(line for line in done.stdout.splitlines() if line.startswith("|"))


def _bytes(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(each.stat().st_size for each in path.rglob("*") if each.is_file())


def _section(title: str) -> str | None:
    """Return a section of the report as it is now, with the line that ends it."""
    found = re.search(rf"## {title}\n.*?\n(?=\n## )", REPORT.read_text(), flags=re.DOTALL)
    return found[0] if found else None


def sizes_alone() -> str:
    """Return the section of `sizes`, from a local AWS of its own."""
    with Cloud(f"bench-{os.getpid()}") as cloud:
        _seed(cloud)
        section = sizes(cloud)
    cloud.remove_directory()
    return section


SECTIONS: dict[str, tuple[str, Callable[[], str]]] = {
    "compare": (COMPARISON, comparison),
    "imports": ("Loading a function", import_times),
    "cost": ("What a task costs", costs),
    "window": ("What the log's windows save", windows),
    "growth": ("How costs grow with the number of tasks", growths),
    "memory": ("Size and memory", sizes_alone),
}
"""The sections that can be measured alone, by their names on the command line: title, and what measures it."""


def main() -> None:
    """Measure everything, then write the report in one go; with an argument, replace that section of SECTIONS alone."""
    progress = Progress()
    if sys.argv[1:]:
        [only] = sys.argv[1:]
        title, section = SECTIONS[only]
        before = _section(title)
        if before is None:
            sys.exit(f"{REPORT.relative_to(ROOT)} has no section `{title}` yet: run make bench")
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
    with Cloud(f"bench-{os.getpid()}", progress=progress) as cloud:
        progress("requests and tasks")
        parts.insert(4, latencies(cloud))
        progress("size and memory")
        _seed(cloud)
        parts.insert(5, sizes(cloud))
    cloud.remove_directory()
    progress("the audit log under load")
    parts.insert(5, audit_log())
    if (compared := _section(COMPARISON)) is not None:  # it needs another checkout: what was measured last stays
        parts.insert(5, compared.rstrip())
    head = f"""# Performance

Written by `make bench` on {now():%Y-%m-%d}, with {os.cpu_count()} cores and Python {platform.python_version()}. Absolute times are this machine's; ratios within the run
are what to compare.
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
