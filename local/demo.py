"""`make demo`: two tasks on a separate local cloud, shown and checked.

A monitoring task completes without a person. A transfer waits for an approval, which its requester cannot give and
another person gives. The demo then verifies its audit bundle offline. All printed values are read over HTTP, and every
statement is checked: the exit code is 0 only if all of them hold.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from typing import Any

from local.cloud import Cloud
from local.environment import ROOT, Progress
from local.interrupts import StopError, ignore_signals
from local.terminal import inert
from local.tokens import PEOPLE

SOURCE = "0x1234567890abcdef"
DESTINATION = "0xfedcba0987654321"
AMOUNT = 250
VERIFIER = ROOT / "verifier" / "verify_bundle.py"
LOG_ID = "qaes"
TASK_TIMEOUT_SECONDS = 90
TERMINAL = frozenset({"completed", "denied", "rejected", "expired", "failed", "cancelled"})
MONITORING = {
    "task_type": "monitor_wallet",
    "description": "Watch the treasury wallet, and report when it falls below 500 QU",
    "wallet_address": SOURCE,
    "parameters": {"alert_threshold": 500},
}
TRANSFER = {
    "task_type": "transfer_funds",
    "description": "Pay invoice 4711",
    "wallet_address": SOURCE,
    "parameters": {"to_address": DESTINATION, "amount": AMOUNT},
}


@dataclass(frozen=True)
class Answer:
    """An HTTP response: its status and its JSON body."""

    status: int
    body: dict[str, Any]


@dataclass
class Demo:
    """Calls the API as four people, prints the results, and counts the statements that do not hold."""

    cloud: Cloud
    failures: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._tokens = {role: self.cloud.token(role) for role in PEOPLE}

    def call(self, role: str, method: str, path: str, body: object = None) -> Answer:
        """Send one request as the person with this role."""
        request = urllib.request.Request(
            f"{self.cloud.url}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Authorization": f"Bearer {self._tokens[role]}", "Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return Answer(response.status, json.loads(response.read()))
        except urllib.error.HTTPError as error:
            text = error.read().decode(errors="replace")
            try:
                problem = json.loads(text)
            except ValueError:
                problem = {"detail": text}
            return Answer(error.code, problem)

    def check(self, statement: str, holds: bool, found: object = "") -> None:
        """Print a statement, marked with the result of its check."""
        print(f"  {'✓' if holds else '✗'} {statement}" + ("" if holds else inert(f"; found {found}")), flush=True)
        if not holds:
            self.failures.append(statement)

    def start(self, task: dict[str, Any]) -> str:
        """Start a task as the requester; return its id."""
        print(f"\n{PEOPLE['requester']} (requester) requests: {task['task_type']} — {task['description']}")
        answer = self.call("requester", "POST", "/task/start", task)
        self.check("the task is accepted", answer.status in {200, 201, 202} and "task_id" in answer.body, answer)
        return str(answer.body.get("task_id", ""))

    def wait(self, task_id: str, *wanted: str) -> str:
        """Poll until the task has one of these statuses or has ended; return its status."""
        deadline = time.monotonic() + TASK_TIMEOUT_SECONDS
        status = ""
        while time.monotonic() < deadline:
            found = str(self.call("requester", "GET", f"/task/{task_id}").body.get("status", ""))
            if found != status:
                print(f"    {found}", flush=True)
                status = found
            if status in TERMINAL or status in wanted:
                break
            time.sleep(0.2)
        return status

    def show_plan(self, task_id: str) -> None:
        """Print the plan that the policy allowed."""
        task = self.call("requester", "GET", f"/task/{task_id}").body
        answer = self.call("operator", "GET", f"/plan/{task.get('plan_id')}")
        plan = answer.body
        self.check("the plan is stored", answer.status == 200 and bool(plan.get("steps")), answer)
        print(f"  plan {plan.get('plan_id')}: {_short(plan.get('analysis'))}, policy {_short(plan.get('policy'))}")
        for number, step in enumerate(plan.get("steps", [])):
            approval = "needs approval" if step["requires_approval"] else "no approval"
            print(f"    {number}  {step['type']:<18} {approval:<15} {_short(step.get('parameters'))}")

    def show_question(self, task_id: str) -> None:
        """Print the approval request, and the hashes that the decision is bound to."""
        question = self.call("approver", "GET", f"/task/{task_id}").body.get("approval") or {}
        print(f"  approval requested for {question.get('step_type')} {_short(question.get('parameters'))}")
        print(
            f"    plan {question.get('plan_hash')}\n    step {question.get('step_hash')}"
            f"\n    until {question.get('expires_at')}"
        )
        self.check("the approver sees the amount", (question.get("parameters") or {}).get("amount") == AMOUNT, question)

    def show_steps(self, task_id: str) -> None:
        """Print each step with its result."""
        answer = self.call("requester", "GET", f"/task/{task_id}/status")
        steps = answer.body.get("steps", [])
        print("  steps")
        for number, step in enumerate(steps):
            print(f"    {number}  {step['status']:<12} {_short(step.get('result') or step.get('error'))}")
        self.check(
            "every step succeeded",
            bool(steps) and all(s["status"] in {"succeeded", "completed"} for s in steps),
            answer,
        )

    def show_audit(self, task_id: str) -> None:
        """Print each audit entry with its ledger transaction, and verify them all."""
        deadline = time.monotonic() + TASK_TIMEOUT_SECONDS
        while True:  # the stream records the state machine's last events a moment later
            answer = self.call("auditor", "GET", f"/audit/{task_id}")
            entries = answer.body.get("logs", [])
            whole = bool(entries) and entries[-1].get("kind", "task_ended") == "task_ended"
            if (whole and all(entry.get("qubic_txid") for entry in entries)) or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        print("  audit entries                                          on the ledger (mock)")
        for number, entry in enumerate(entries):
            # an entry without a step has its subject in both fields
            what = " ".join(dict.fromkeys(filter(None, [entry.get("kind"), entry["step_type"]])))
            print(f"    {number + 1:>2}  {what:<36} {entry['status']:<17} {_cut(entry.get('qubic_txid'))}")
        self.check(
            "every entry has a ledger transaction", bool(entries) and all(e.get("qubic_txid") for e in entries), answer
        )
        executed = [entry for entry in entries if entry.get("output_hash") and entry["step_index"] >= 0]
        self.check("each executed step has its output's hash", bool(executed), entries)
        if executed:
            self.verify(executed[-1]["output_hash"])

    def verify(self, digest: str) -> None:
        """Check that a recorded hash verifies, and that an unknown hash does not."""
        answer = self.call("auditor", "GET", f"/audit/verify/{digest}")
        self.check(f"/audit/verify/{digest[:16]}… verifies", answer.body.get("verified") is True, answer)
        other = self.call("auditor", "GET", f"/audit/verify/{'0' * 64}")
        self.check("a hash that was never recorded does not", other.body.get("verified") is not True, other)

    def verify_offline(self, task_id: str) -> None:
        """Verify the task's bundle with the verifier, which needs only Python; then again with one changed amount."""
        anchor = self.call("auditor", "GET", "/audit/log/checkpoint").body.get("anchor", {})
        identity = str(anchor.get("source"))
        answer = self.call("auditor", "GET", f"/audit/{task_id}/bundle")
        bundle = self.cloud.directory / "bundle.json"
        text = json.dumps(answer.body, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        print(f"  offline: verify_bundle.py bundle.json ({len(text) / 1024:.0f} KiB) --anchor-identity {identity}")
        for content, holds in ((text, True), (text.replace(f'amount\\":{AMOUNT}', f'amount\\":{AMOUNT - 100}'), False)):
            bundle.write_text(content)
            said = subprocess.run(
                [sys.executable, "-I", VERIFIER, bundle, "--log-id", LOG_ID, "--anchor-identity", identity],
                check=False,
                capture_output=True,
                text=True,
            )
            for line in (said.stdout + said.stderr).strip().splitlines():
                print(f"    {inert(line)}")
            what = "the bundle holds" if holds else f"with {AMOUNT - 100} QU instead of {AMOUNT}, it does not hold"
            self.check(what, (said.returncode == 0) is holds and (content == text) is holds, said)

    def balance(self, address: str) -> int | None:
        """Return a balance in QU from the ledger's function; no route of the API returns it."""
        answer = self.cloud.client("lambda").invoke(
            FunctionName=self.cloud.resources["LedgerFunction"],
            Payload=json.dumps({"operation": "balance", "address": address}),
        )
        balance = json.loads(answer["Payload"].read()).get("result", {}).get("balance")
        return balance if isinstance(balance, int) else None


def monitor(demo: Demo) -> None:
    """Run the task that needs no approval."""
    task_id = demo.start(MONITORING)
    status = demo.wait(task_id)
    demo.check("it completes by itself", status == "completed", status)
    demo.show_plan(task_id)
    demo.show_steps(task_id)
    demo.show_audit(task_id)


def transfer(demo: Demo) -> None:
    """Run the task that waits for a second person."""
    task_id = demo.start(TRANSFER)
    status = demo.wait(task_id, "waiting_approval")
    demo.check("it waits for an approval", status == "waiting_approval", status)
    demo.show_plan(task_id)
    demo.show_question(task_id)
    decision = {"approved": True, "reason": "invoice 4711 checked"}
    own = demo.call("requester", "POST", f"/task/{task_id}/approve", decision)
    demo.check(f"{PEOPLE['requester']} cannot approve their own task (403)", own.status == 403, own)
    other = demo.call("approver", "POST", f"/task/{task_id}/approve", decision)
    demo.check(f"{PEOPLE['approver']} (approver) approves it", other.status in {200, 202}, other)
    status = demo.wait(task_id)
    demo.check("it completes", status == "completed", status)
    demo.show_steps(task_id)
    demo.show_audit(task_id)
    demo.verify_offline(task_id)


def tell(cloud: Cloud) -> list[str]:
    """Run both tasks; return the statements that do not hold."""
    demo = Demo(cloud)
    before = {address: demo.balance(address) for address in (SOURCE, DESTINATION)}
    monitor(demo)
    transfer(demo)
    print(f"\nBalances ({AMOUNT} QU were sent)")
    for address, change in ((SOURCE, -AMOUNT), (DESTINATION, AMOUNT)):
        after = demo.balance(address)
        was = before[address]
        demo.check(f"{address}: {was} → {after} QU", None not in (was, after) and after == (was or 0) + change, after)
    print(
        "\nThe ledger here is a mock that runs on this machine. A hash on it shows how the audit trail works, but"
        "\nproves nothing to an outsider: the operator of the ledger could have written anything."
    )
    return demo.failures


def main() -> int:
    """Run the demo; return an exit code."""
    progress = Progress()
    cloud = Cloud(f"demo-{os.getpid()}", progress=progress)
    failures = ["the demo was interrupted"]
    try:
        with cloud:
            progress("running the demo")
            failures = tell(cloud)
            ignore_signals()
            if failures:
                (cloud.directory / "services.log").write_text("\n".join(cloud.service_logs()))
    except StopError as reason:
        print(f"\nInterrupted ({reason}). No process is left running.")
        cloud.remove_directory()
        return 130
    if failures:
        print(f"\nThe demo FAILED after {progress.seconds:.0f} s: {'; '.join(failures)}.")
        print(f"Its logs, until the next run: {cloud.directory}")
        return 1
    cloud.remove_directory()
    print(f"\nThe demo succeeded after {progress.seconds:.0f} s. No process is left running.")
    return 0


def _short(value: object, length: int = 110) -> str:
    text = inert(value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False))
    return text if len(text) <= length else f"{text[: length - 1]}…"


def _cut(txid: object) -> str:
    return f"{str(txid)[:24]}…" if txid else "–"
