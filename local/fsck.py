"""Check the whole audit log: `python -m local.fsck [--repair]`, in the environment that `.local/aws.env` sets.

Exit status 0: every invariant holds. Entries in flight first get some seconds to complete. With `--repair`, the program
invokes the recorder for unrecorded events and the sequencer for unsequenced entries. It repairs nothing else.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from audit.fsck import INVARIANTS, Report, fsck
from audit.log import Log
from audit.store import AuditStore, Outbox
from qaes.adapters import clients, settings
from qaes.adapters.ledger_client import LedgerClient

IN_FLIGHT = {"unrecorded", "unsequenced", "head", "index", "tile", "in flight", "anchor"}
"""Invariants that may not hold for a moment while the log is written."""


def settled(seconds: float, *, log_id: str, ask_ledger: bool = True) -> Report:
    """Check until everything holds, a permanent finding exists, or the time is over."""
    deadline = time.monotonic() + seconds
    while True:
        ledger = LedgerClient() if ask_ledger else None
        report = fsck(AuditStore(), Log(), ledger, log_id=log_id, outbox=Outbox())
        found = {finding.invariant for finding in report.findings}
        if not found or found - IN_FLIGHT or time.monotonic() > deadline:
            return report
        time.sleep(1)


def repair(report: Report, seconds: float, *, log_id: str) -> Report:
    """Invoke the recorder, then the sequencer, for missing entries; return the report after that."""
    if report.unrecorded:
        for task_id in report.unrecorded:
            _invoke("RECORDER_FUNCTION", {"task_id": task_id})
        report = settled(seconds, log_id=log_id)
    if report.unsequenced:
        for task_id in report.unsequenced:
            _invoke("SEQUENCER_FUNCTION", {"task_ids": [task_id]})
        report = settled(seconds, log_id=log_id)
    return report


def _invoke(function: str, event: dict[str, Any]) -> None:
    answer = clients.lambda_client().invoke(FunctionName=settings.text(function), Payload=json.dumps(event))
    print(f"{json.dumps(event)}: {answer['Payload'].read().decode()}")


def show(report: Report) -> str:
    """Return the report as text."""
    seen = f"{report.entries} entries of {report.tasks} tasks, {report.size} in the log, {report.tiles} tiles"
    lines = [f"{seen}, {report.anchors} anchors up to {report.anchored}"]
    if report.erased:
        lines.append(f"{report.erased} tasks are erased: only their entries are left")
    lines += [f"{finding}\n    (invariant: {INVARIANTS[finding.invariant]})" for finding in report.findings]
    if report.not_shown:
        lines.append(f"and {report.not_shown} more, not shown")
    lines.append(f"{len(report.findings) + report.not_shown} findings" if report.findings else "every invariant holds")
    return "\n".join(lines)


def main() -> int:
    """Run the command of the command line; return an exit code."""
    parser = argparse.ArgumentParser(prog="python -m local.fsck", description="Check the audit log.")
    parser.add_argument("--repair", action="store_true", help="record missing entries and add them to the log")
    parser.add_argument("--settle", type=float, default=20, help="seconds for entries in flight to complete (20)")
    arguments = parser.parse_args()
    log_id = settings.optional("LOG_ID") or "qaes"
    report = settled(arguments.settle, log_id=log_id)
    if arguments.repair:
        report = repair(report, arguments.settle, log_id=log_id)
    print(show(report))
    return 1 if report.findings else 0


if __name__ == "__main__":
    sys.exit(main())
