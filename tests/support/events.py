"""Which function each file under `events/` is for, and what its answer must show."""

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
    "planner/analyze_task": "AnalyzeTaskFunction",
    "planner/check_policy": "CheckPolicyFunction",
    "planner/build_plan": "BuildPlanFunction",
    "agent_runtime/validate_plan": "ValidatePlanFunction",
    "agent_runtime/check_compliance": "CheckComplianceFunction",
    "agent_runtime/request_approval": "RequestApprovalFunction",
    "agent_runtime/end_task": "EndTaskFunction",
    "agent_runtime/reconciler": "ReconcilerFunction",
    "worker/execute_step": "ExecuteStepFunction",
    "worker/await_confirmation": "AwaitConfirmationFunction",
    "worker/transfer_ended": "TransferEndedFunction",
    "audit/record_audit": "RecordAuditFunction",
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
    "qubic/writer": "LedgerWriterFunction",
}

# In the order of a task's life: a later one may need what an earlier one wrote.
_ORDER = (
    "qubic/ledger", "planner/analyze", "planner/check", "planner/build", "agent_runtime/validate",
    "agent_runtime/check", "worker/execute", "agent_runtime/request", "audit/record",
    "audit/sequence_task", "audit/sequence", "audit/anchor",
)  # fmt: skip


def function_of(case: str) -> str:
    """The logical id of the function for `service/case`; the longest prefix that is known."""
    known = [prefix for prefix in _FUNCTIONS if case.startswith(prefix)]
    return _FUNCTIONS[max(known, key=len)] if known else _API[case.split("/", maxsplit=1)[0]]


def cases() -> list[str]:
    """Every event as `service/case`, in an order in which all of them work on a seeded table."""
    found = [f"{path.parent.name}/{path.stem}" for path in EVENTS.glob("*/*.json")]
    rank = {prefix: number for number, prefix in enumerate(_ORDER)}
    return sorted(found, key=lambda case: (min((rank[p] for p in rank if case.startswith(p)), default=99), case))


def load(case: str) -> Any:
    return json.loads((EVENTS / f"{case}.json").read_text())


def path_of(case: str) -> Path:
    return EVENTS / f"{case}.json"


def check(case: str, answer: Any) -> None:
    """Is this what that event must be answered with?"""
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
"""Found only when the ledger has confirmed an anchor, which takes some ticks."""

_EXPECTED: dict[str, Callable[[Any], bool]] = {
    "analyze_task": lambda it: it == {"analysis": {"action_type": "transfer_funds", "risk_level": "high"}},
    "check_policy": lambda it: it["policy"]["requires_approval"] is True,
    "build_plan": lambda it: it["plan_id"].startswith("plan_") and len(it["plan_hash"]) == 64,
    "validate_plan": lambda it: [step["step_index"] for step in it["steps"]] == [0, 1, 2],
    "check_compliance": lambda it: it["verdict"] == "execute",
    "request_approval": lambda it: it["status"] == "pending" and "token" not in str(it),
    "end_task": lambda it: it["status"] == "failed",
    "reconciler": lambda it: isinstance(it["reconciled"], list),
    "execute_step": lambda it: it["status"] == "succeeded" and it["step_id"] == "step_1",
    "execute_step_submit": lambda it: it["status"] == "failed" and it["step_id"] == "step_3",  # nobody has approved it
    "record_audit": lambda it: it["recorded"] >= 0,
    "record_events": lambda it: it["batchItemFailures"] == [],
    "sequence_task": lambda it: it == {"broken": []},
    "sequence_entries": lambda it: it == {"batchItemFailures": []},
    "sweep": lambda it: it["behind"] >= 0,
    "anchor": lambda it: it["sequence"] >= 0 and it["size"] > 0,
    "ledger": lambda it: it["ok"] is True,
    "writer_queue": lambda it: it == {"batchItemFailures": []},
    "writer_schedule": lambda it: it == {"open": []},
    "await_confirmation": lambda it: it == {"state": "failed"},
    "transfer_ended": lambda it: it["status"] in {None, "running", "failed"},
}
