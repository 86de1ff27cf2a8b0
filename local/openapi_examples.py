"""An example of each operation, by operation id. tests/openapi sends them and compares the responses."""

from __future__ import annotations

import json
from typing import Any

from local.environment import ROOT
from local.openapi_values import (
    COUNTS,
    DIFFERENCE,
    DOCUMENT,
    DROPPED,
    ENTRY,
    FAULTS,
    HASH,
    IDENTITY,
    KEY,
    LIMITED_RULE,
    MOMENT,
    NOTE,
    OTHER,
    PAYER,
    PAYLOAD,
    PLAN_ANSWER,
    POLICY_ID,
    POLICY_VERSION,
    PROPOSED,
    REPLAYED,
    REQUEST,
    RULE,
    SIGNED,
    SIGNED_CONTENT,
    SIGNED_ID,
    STATEMENT,
    STEPS,
    SUMMARY,
    SUSPENDED,
    TASK,
    TRANSFER,
    TRANSFER_DESCRIPTION,
    TXID,
    WALLET,
)
from local.seed import PLAN, PLANNED_TASK
from planner.replay import NOTE as REPLAY_NOTE
from qaes import VERSION


def _health(service: str) -> dict[str, Any]:
    return {"answer": {"status": "healthy", "service": service, "version": VERSION}}


EXAMPLES: dict[str, dict[str, Any]] = {
    "start_task": {
        "parameters": KEY,
        "body": REQUEST,
        "answer": {"task_id": PLANNED_TASK, "status": "pending", "message": "The task has been accepted."},
    },
    "get_tasks": {
        "parameters": {"status": "waiting_approval", "limit": 20},
        "answer": {"tasks": [SUMMARY | {"waiting_until": MOMENT}], "next_cursor": None},
    },
    "get_task": {
        "parameters": TASK,
        "answer": SUMMARY
        | {
            "plan_id": PLAN,
            "current_step": 2,
            "requester_note": None,
            "effect": "performed",
            "error": None,
            "approval": {
                "step_index": 2,
                "step_id": "step_3",
                "step_type": "onchain_action",
                "parameters": STEPS[2]["parameters"],
                "action_type": "transfer_funds",
                "effect": "performed",
                "risk_level": "high",
                "requester": "alice",
                "requester_note": None,
                "plan_hash": HASH,
                "step_hash": HASH,
                "policy_id": POLICY_ID,
                "rule": RULE,
                "approvals_required": 1,
                "tier": None,
                "approvers": None,
                "quorums": [{"approvals": 1, "approvers": None}],
                "amount": 1,
                "unit": "QU",
                "decisions": [],
                "requested_at": MOMENT,
                "expires_at": MOMENT,
                "balance": {"balance": 1000, "available": 1000, "tick": 20000100},
            },
        },
    },
    "decide": {
        "parameters": TASK | KEY,
        "body": {"approved": True, "reason": "invoice 4711 checked"},
        "answer": {
            "task_id": PLANNED_TASK,
            "approved": True,
            "message": "The step has been approved.",
            "approvals_required": 1,
            "approvals_given": 1,
        },
    },
    "cancel": {
        "parameters": TASK | KEY,
        "body": {"reason": "the invoice was wrong"},
        "answer": {"task_id": PLANNED_TASK, "status": "cancelled", "message": "The task has been cancelled."},
    },
    "retry": {
        "parameters": TASK | KEY,
        "answer": {
            "task_id": PLANNED_TASK,
            "status": "executing",
            "message": "The task runs again, from where it stopped.",
        },
    },
    "create_plan": {
        "body": REQUEST,
        "answer": PLAN_ANSWER
        | {
            "task_id": None,
            "verdict": {
                "allowed": True,
                "verdict": "execute",
                "step_id": None,
                "reason": "no approval is needed",
                "approvals": 0,
            },
        },
    },
    "get_plan": {"parameters": {"plan_id": PLAN}, "answer": PLAN_ANSWER},
    "get_status": {
        "parameters": TASK,
        "answer": {
            "task_id": PLANNED_TASK,
            "status": "executing",
            "current_step": 0,
            "total_steps": 1,
            "steps": [
                {
                    "step_id": "step_1",
                    "type": "check_balance",
                    "status": "succeeded",
                    "result": {"balance": 1000, "wallet_address": WALLET},
                    "error": None,
                    "requires_approval": False,
                    "attempt": 1,
                    "duration_ms": 12,
                    "effect": "performed",
                }
            ],
            "requires_approval": False,
            "reason": None,
        },
    },
    "get_audit": {
        "parameters": TASK,
        "answer": {
            "task_id": PLANNED_TASK,
            "logs": [],
            "next_cursor": None,
            "qubic_txid": None,
            "chain": {"verified": True, "entries": 0, "sequenced": 0, "anchored": 0, "head": None, "broken": None},
            "network": "mock",
            "statement": STATEMENT,
        },
    },
    "verify": {
        "parameters": {"hash": HASH},
        "answer": {
            "hash": HASH,
            "verified": False,
            "evidence": {"matches": [], "more": False},
            "network": "mock",
            "statement": STATEMENT,
        },
    },
    "get_bundle": {
        "parameters": TASK,
        "answer": {
            "format": "qaes-bundle-1",
            "log_id": "qaes",
            "network": "mock",
            "task_id": PLANNED_TASK,
            "salt": "6f1e0d4c8b7a99d2e3f4051627384950",
            "entries": [
                {
                    "text": ENTRY,
                    "input": '{"description":"pay invoice 4711"}',
                    "output": '{"idempotency_key":null,"task_id":"' + PLANNED_TASK + '"}',
                    "index": 0,
                    "proof": [],
                }
            ],
            "anchor": {"payload": PAYLOAD, "transaction": "AAAA", "txid": TXID, "tick": 48239423},
            "policies": {HASH: '{"format":1,"rules":{},"version":1}'},
        },
    },
    "get_log_checkpoint": {
        "answer": {
            "log_id": "qaes",
            "anchor": {
                "sequence": 0,
                "size": 1,
                "root": HASH,
                "payload": PAYLOAD,
                "transaction": "AAAA",
                "txid": TXID,
                "tick": 48239423,
                "source": IDENTITY,
                "network": "mock",
                "confirmed_at": MOMENT,
            },
            "note": NOTE,
            "verifier_key": "qaes+1f2e3d4c+AUk5sWmGQmVcYk0JvnSGyYGZ1iNcDMs0n4rR1tYPp0aQ",
            "statement": STATEMENT,
        }
    },
    "get_log_consistency": {
        "parameters": {"from": 1, "to": 1},
        "answer": {"log_id": "qaes", "first": 1, "second": 1, "proof": []},
    },
    "get_signed_checkpoint": {"answer": NOTE},
    "get_tile": {"parameters": {"level": "0", "a": "000"}},
    "get_tile_2": {"parameters": {"level": "0", "a": "000.p", "b": "1"}},
    "get_entries": {"parameters": {"a": "000"}},
    "get_entries_2": {"parameters": {"a": "000.p", "b": "1"}},
    "get_policy": {
        "parameters": {"action_type": "transfer_funds"},
        "answer": {
            "network": "mock",
            "policy_id": POLICY_ID,
            "action_type": "transfer_funds",
            "allowed": True,
            "requires_approval": True,
            "rules": RULE,
            "effect": "performed",
            "suspended": [],
        },
    },
    "suspend_action": {
        "body": {"action": "transaction", "reason": "instruction 4711 looks wrong"},
        "answer": SUSPENDED | {"network": "mock"},
    },
    "resume_action": {
        "body": {"action": "transaction"},
        "answer": SUSPENDED
        | {"network": "mock", "status": "resume_requested"}
        | {"resume_requested_by": "oscar", "resume_requested_at": MOMENT},
    },
    "explain_decision": {
        "body": {"action": "transfer_funds", "parameters": TRANSFER},
        "answer": {
            "policy_id": POLICY_ID,
            "version": 1,
            "status": "in_force",
            "action": "transfer_funds",
            "requester": "alice",
            "agent": None,
            "decision": "await_approval",
            "code": "allowed",
            "reason": "the rule requires 1 approval by any approver",
            "risk_level": "high",
            "tier": 0,
            "approvals": [{"approvals": 1, "approvers": None, "eligible": None}],
            "signature": False,
            "expires_after": None,
            "escalate_after": None,
            "escalate_to": None,
            "amount": 1,
            "unit": "QU",
            "destination": OTHER,
            "source": WALLET,
            "limits": [],
            "suspended": False,
        },
    },
    "replay_version": {
        "parameters": POLICY_VERSION,
        "body": {"days": 7},
        "answer": {
            "policy_id": f"policy-v2-{HASH}",
            "compared_with": POLICY_ID,
            "since": MOMENT,
            "requests": 12,
            "counts": COUNTS | {"unchanged": 11, "allow_to_deny": 1},
            "changes": [REPLAYED],
            "next_cursor": None,
            "ignores_windows": True,
            "note": REPLAY_NOTE,
        },
    },
    "get_actions": {
        "answer": {"policy_id": POLICY_ID, "version": 1, "suspended": [], "actions": [TRANSFER_DESCRIPTION]},
    },
    "propose_policy": {
        "body": {"based_on": POLICY_ID, "rules": {"transfer_funds": LIMITED_RULE}, "remove": DROPPED},
        "also": [{"based_on": POLICY_ID} | json.loads((ROOT / "examples" / "policy" / "policy.json").read_text())],
        "answer": PROPOSED | {"network": "mock", "difference": DIFFERENCE},
    },
    "get_policy_versions": {
        "parameters": {"limit": 20},
        "answer": {"network": "mock", "versions": [PROPOSED], "next_before": None},
    },
    "get_policy_version": {
        "parameters": POLICY_VERSION,
        "answer": PROPOSED | {"network": "mock", "difference": DIFFERENCE, "text": DOCUMENT},
    },
    "approve_policy": {
        "parameters": POLICY_VERSION,
        "answer": PROPOSED
        | {"network": "mock", "status": "anchoring", "approved_by": "oscar", "approved_at": MOMENT}
        | {"txid": TXID, "tick": 48239423},
    },
    "reject_policy": {
        "parameters": POLICY_VERSION,
        "body": {"reason": "the limit is too high"},
        "answer": PROPOSED
        | {"network": "mock", "status": "rejected", "rejected_by": "oscar", "rejected_at": MOMENT}
        | {"reason": "the limit is too high"},
    },
    "write": {
        "body": {"hash": HASH, "metadata": {"invoice": "4711"}},
        "answer": {"network": "mock", "txid": TXID, "hash": HASH, "timestamp": MOMENT, "tick": 48239423}
        | {"status": "pending"},
    },
    "verify_on_ledger": {
        "parameters": {"hash": HASH},
        "answer": {
            "network": "mock",
            "hash": HASH,
            "verified": True,
            "txid": TXID,
            "timestamp": MOMENT,
            "tick": 48239423,
            "kind": "hash",
            "state": "confirmed",
            "source": PAYER,
            "encoded": SIGNED,
        },
    },
    "get_transaction": {
        "parameters": {"txid": TXID},
        "answer": {
            "network": "mock",
            "txid": TXID,
            "hash": HASH,
            "timestamp": MOMENT,
            "kind": "hash",
            "metadata": {},
            "requested_by": None,
            "block_height": 48239423,
            "encoded": SIGNED,
            "state": "confirmed",
            "source": PAYER,
            "destination": PAYER,
            "amount": 0,
        },
    },
    "rpc_tick_info": {
        "answer": {"tickInfo": {"tick": 20000100, "duration": 1, "epoch": 1, "initialTick": 20000000}},
    },
    "rpc_broadcast_transaction": {
        "body": {"encodedTransaction": SIGNED},
        "answer": {"peersBroadcasted": 1, "encodedTransaction": SIGNED, "transactionId": SIGNED_ID},
    },
    "rpc_balance": {
        "parameters": {"id": PAYER},
        "answer": {
            "balance": {
                "id": PAYER,
                "balance": "995",
                "validForTick": 20000101,
                "latestIncomingTransferTick": 20000000,
                "latestOutgoingTransferTick": 20000100,
                "incomingAmount": "1000",
                "outgoingAmount": "5",
                "numberOfIncomingTransfers": 1,
                "numberOfOutgoingTransfers": 1,
            }
        },
    },
    "rpc_last_processed_tick": {
        "answer": {
            "tickNumber": 20000101,
            "epoch": 1,
            "intervalInitialTick": 20000000,
            "lastProcessedLogTick": 20000101,
        },
    },
    "rpc_transaction": {"body": {"hash": SIGNED_ID}, "answer": {"transaction": SIGNED_CONTENT}},
    "rpc_transactions": {
        "body": {
            "identity": PAYER,
            "filters": {"source": PAYER},
            "ranges": {"tickNumber": {"gte": "20000000", "lte": "20000200"}},
            "pagination": {"offset": 0, "size": 10},
        },
        "answer": {
            "validForTick": 20000101,
            "hits": {"total": 1, "from": 0, "size": 10},
            "transactions": [SIGNED_CONTENT],
        },
    },
    "get_mock_faults": {"answer": FAULTS},
    "put_mock_faults": {"body": {"empty_ticks": 20}, "answer": FAULTS | {"empty_ticks": 20}},
    "get_about": {
        "answer": {
            "service": "Qubic Autonomous Execution System",
            "version": VERSION,
            "description": (
                "Runs tasks of agents under a policy, with approvals and an audit trail that anyone can verify."
            ),
            "documentation": "/docs",
            "openapi": "/openapi.json",
            "health": "/health",
        }
    },
    "gateway_health": _health("gateway"),
    "planner_health": _health("planner"),
    "agent_runtime_health": _health("agent-runtime"),
    "worker_health": _health("worker"),
    "audit_health": _health("audit"),
    "qubic_health": {
        "answer": {
            "network": "mock",
            "status": "healthy",
            "service": "qubic",
            "version": VERSION,
            "tick": 48239423,
            "policy_id": POLICY_ID,
        }
    },
}
