"""The function and the expected response of each file under `events/`."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.support import template

EVENTS = template.ROOT / "events"

_API = {
    "gateway": "GatewayFunction",
    "planner": "PlannerApiFunction",
    "agent_runtime": "AgentRuntimeApiFunction",
    "worker": "WorkerApiFunction",
    "audit": "AuditApiFunction",
    "qubic": "QubicApiFunction",
}
_FUNCTIONS = {
    "authorizer": "AuthorizerFunction",
    "planner/plan_task": "PlanTaskFunction",
    "agent_runtime/await_approval": "AwaitApprovalFunction",
    "agent_runtime/end_task": "EndTaskFunction",
    "agent_runtime/reconciler": "ReconcilerFunction",
    "worker/run_step": "RunStepFunction",
    "worker/execute_action": "ExecuteActionFunction",
    "worker/transfer_ended": "ExecuteActionFunction",
    "audit/record_task": "RecordEventsFunction",
    "audit/record_events": "RecordEventsFunction",
    "audit/sequence": "SequencerFunction",
    "audit/anchor": "AnchorFunction",
    "audit/public": "PublicLogFunction",
    "audit/sweep": "AuditSweeperFunction",
    "qubic/ledger": "LedgerFunction",
    "qubic/ledger_transfer": "LedgerTransferFunction",
    "qubic/ledger_transfer_state": "LedgerFunction",
    "qubic/ledger_write": "LedgerRecordFunction",
    "qubic/ledger_record_instruction": "LedgerTransferFunction",
    "qubic/ledger_submit_anchor": "LedgerAnchorFunction",
    "qubic/transaction_worker": "TransactionWorkerFunction",
}

# In the order of a task's life: a later event may need the writes of an earlier one.
_ORDER = (
    "qubic/ledger", "planner/plan", "worker/run_step_1", "worker/run_step_2", "agent_runtime/await",
    "worker/execute_action", "audit/record",
    "audit/sequence_task", "audit/sequence", "audit/anchor",
)  # fmt: skip


def function_of(case: str) -> str:
    """Return the logical id of the function for `service/case`, by the longest known prefix."""
    known = [prefix for prefix in _FUNCTIONS if case.startswith(prefix)]
    return _FUNCTIONS[max(known, key=len)] if known else _API[case.split("/", maxsplit=1)[0]]


def cases() -> list[str]:
    """Return every event as `service/case`, in an order in which all of them work on a seeded table."""
    found = [f"{path.parent.name}/{path.stem}" for path in EVENTS.glob("*/*.json")]
    rank = {prefix: number for number, prefix in enumerate(_ORDER)}
    return sorted(found, key=lambda case: (min((rank[p] for p in rank if case.startswith(p)), default=99), case))


def load(case: str) -> Any:
    return json.loads((EVENTS / f"{case}.json").read_text())


def path_of(case: str) -> Path:
    return EVENTS / f"{case}.json"


def check(case: str, answer: Any) -> None:
    """Return whether this is the expected response to the event."""
    service = case.split("/", maxsplit=1)[0]
    if (event := load(case)) and "httpMethod" in event:
        if case in _WHEN_ANCHORED and answer["statusCode"] == 404:
            return
        assert 200 <= answer["statusCode"] < 300, answer
        assert answer["body"] if case in NOT_JSON else isinstance(json.loads(answer["body"]), dict)
        return
    name = case.removeprefix(f"{service}/")
    known = next(prefix for prefix in sorted(_EXPECTED, key=len, reverse=True) if name.startswith(prefix))
    assert _EXPECTED[known](answer), answer


NOT_JSON = {
    "audit/api_signed_checkpoint", "audit/api_entries_tile", "audit/api_hash_tile", "audit/public_checkpoint",
    "audit/public_hash_tile",
}  # fmt: skip
_WHEN_ANCHORED = {
    "audit/api_log_checkpoint", "audit/api_signed_checkpoint", "audit/public_checkpoint", "audit/public_hash_tile",
}  # fmt: skip
"""Events that need a confirmed anchor, which takes some ticks."""

_EXPECTED: dict[str, Callable[[Any], bool]] = {
    "plan_task": lambda it: it["allowed"] is True and it["action"]["step_type"] == "onchain_action",
    "await_approval": lambda it: it["verdict"] == "pending" and "token" not in str(it),
    "end_task": lambda it: it["status"] == "failed",
    "reconciler": lambda it: isinstance(it["reconciled"], list),
    "run_step_1": lambda it: it == {"step_id": "step_1", "status": "succeeded", "attempt": 1},
    "run_step_2": lambda it: it == {"step_id": "step_2", "status": "succeeded", "attempt": 1},
    "execute_action": lambda it: it == {"status": "ApprovalNeededError"},  # it is not approved
    "record_task": lambda it: it["recorded"] >= 0,
    "record_events": lambda it: it["batchItemFailures"] == [],
    "sequence_task": lambda it: it == {"broken": []},
    "sequence_entries": lambda it: it == {"batchItemFailures": []},
    "sweep": lambda it: it["behind"] >= 0,
    "anchor": lambda it: it["sequence"] >= 0 and it["size"] > 0,
    "ledger": lambda it: it["ok"] is True,
    "transaction_worker_queue": lambda it: it == {"batchItemFailures": []},
    "transaction_worker_schedule": lambda it: it == {"open": []},
    "transfer_ended": lambda it: it["status"] in {None, "running", "failed"},
}
