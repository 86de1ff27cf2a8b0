"""An example of each operation, by operation id. tests/openapi sends them and compares the responses."""

from __future__ import annotations

from typing import Any

from local.seed import PLAN, PLANNED_TASK
from planner.replay import NOTE as REPLAY_NOTE
from qaes import VERSION
from qaes.domain.policy import DEFAULT_RULES, Policy
from qaes.domain.policy.describing import describe_actions
from qaes.domain.policy.replaying import CHANGES

HASH = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08"
TXID = "qepeyezutyuvpavhngoaggqfoxikrrkzmhqfzygkjyzqpwgkcrrsvhzbklbe"
MOMENT = "2026-11-23T12:00:00.000Z"
POLICY_ID = "policy-v1-949c5e3405e9ec1bfed6e3aa5af387b51199dce905e56a0e3000ca9294058036"
WALLET, OTHER = "0x1234567890abcdef", "0xfedcba0987654321"
STATEMENT = "The operator of this system runs the mock ledger: its transactions prove nothing to an outsider."
RULE = {
    "allowed": True,
    "requires_approval": True,
    "risk_level": "high",
    "approvals": 1,
    "expires_after": None,
    "max_amount": None,
    "daily_limit": None,
    "allowed_addresses": None,
}
LIMITED_RULE = RULE | {"approvals": 2, "max_amount": 500, "daily_limit": 2000, "allowed_addresses": [OTHER]}
DROPPED = ["monitoring", "transaction"]
DIFFERENCE = {
    "added": {},
    "removed": {
        "monitoring": RULE | {"requires_approval": False, "risk_level": "low"},
        "transaction": RULE | {"risk_level": "medium"},
    },
    "changed": {"transfer_funds": {"before": RULE, "after": LIMITED_RULE}},
    "groups": {"added": {}, "removed": {}, "changed": {}},
    "actions": {"added": {}, "removed": {}, "changed": {}},
    "new_limits": [
        {"action": "transfer_funds", "unit": "QU", "counts": "amount", "per": "source", "window_seconds": 86400}
    ],
}
PROPOSED = {
    "version": 2,
    "policy_id": f"policy-v2-{HASH}",
    "status": "proposed",
    "hash": HASH,
    "based_on": POLICY_ID,
    "proposed_by": "olivia",
    "proposed_at": MOMENT,
    "approved_by": None,
    "approved_at": None,
    "rejected_by": None,
    "rejected_at": None,
    "reason": "",
    "in_force_at": None,
    "txid": None,
    "tick": None,
}
POLICY_VERSION = {"version": 2}
SUSPENDED = {
    "action": "transaction",
    "status": "suspended",
    "suspended_by": "olivia",
    "suspended_at": MOMENT,
    "reason": "instruction 4711 looks wrong",
    "resume_requested_by": None,
    "resume_requested_at": None,
}
DOCUMENT = f'{{"based_on":"{POLICY_ID}","format":1,"proposed_by":"olivia","rules":{{}},"version":2}}'
PAYLOAD = "5141455301" + "1f2e3d4c5b6a7988" + "0100000000000000" + HASH + "0" * 64 + "0" * 16
IDENTITY = "BAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAARMID"
ENTRY = '{"actor":"alice","input_hash":"' + HASH + '","kind":"task_started","v":1}'
NOTE = "qaes\n1\nn4bQgYhMfWWaL+qgxVrQFaO/TxsrC4Is0V1sFbDwCgg=\n\n— qaes Hy49TGp5iA==\n"
TRANSFER = {"wallet_address": WALLET, "to_address": OTHER, "amount": 1}
REQUEST = {
    "task_type": "transfer_funds",
    "description": "pay invoice 4711",
    "wallet_address": WALLET,
    "parameters": {"to_address": OTHER, "amount": 1},
}
SUMMARY = {
    "task_id": PLANNED_TASK,
    "status": "waiting_approval",
    "task_type": "transfer_funds",
    "description": "pay invoice 4711",
    "requester": "alice",
    "agent": None,
    "created_at": MOMENT,
    "updated_at": MOMENT,
    "requires_approval": True,
}
STEPS = [
    {
        "step_id": "step_1",
        "type": "check_balance",
        "requires_approval": False,
        "parameters": {"wallet_address": WALLET},
    },
    {
        "step_id": "step_2",
        "type": "policy_check",
        "requires_approval": False,
        "parameters": {"action_type": "transfer_funds", "policy_id": POLICY_ID},
    },
    {
        "step_id": "step_3",
        "type": "onchain_action",
        "requires_approval": True,
        "parameters": {"from_address": WALLET, "to_address": OTHER, "amount": 1},
    },
]
PLAN_ANSWER = {
    "plan_id": PLAN,
    "task_id": PLANNED_TASK,
    "created_at": MOMENT,
    "analysis": {"action_type": "transfer_funds", "risk_level": "high"},
    "policy": {"policy_id": POLICY_ID, "action_type": "transfer_funds"} | RULE,
    "steps": STEPS,
    "plan_hash": HASH,
}
TASK = {"task_id": PLANNED_TASK}
COUNTS: dict[str, int] = dict.fromkeys(CHANGES, 0)
REPLAYED = {
    "task_id": PLANNED_TASK,
    "task_type": "transfer_funds",
    "requester": "alice",
    "agent": None,
    "created_at": MOMENT,
    "change": "allow_to_deny",
    "before": {
        "allowed": True,
        "code": "allowed",
        "reason": "the rule requires 1 approval by any approver",
        "tier": 0,
        "approvals": 1,
        "approvers": None,
    },
    "after": {
        "allowed": False,
        "code": "over_max_amount",
        "reason": f"over max_amount: policy policy-v2-{HASH} lets a transfer move at most 500 QU",
        "tier": None,
        "approvals": 0,
        "approvers": None,
    },
}
TRANSFER_DESCRIPTION = next(
    each.model_dump(mode="json")
    for each in describe_actions(Policy(policy_id=POLICY_ID, version=1, rules=dict(DEFAULT_RULES)), requester="alice")
    if each.action == "transfer_funds"
)
KEY = {"Idempotency-Key": "invoice-4711"}

PAYER = "UVWBFEZYKGFRJGPFHUTYFTZSLIWAAWGYUMHPMISXUETCLFEQAVNAQLNCCXEL"
"""Identity of the demo wallet on the mock network."""
SIGNED = (
    "Bt+xy+SLZNsdYzbHNuaQHdR3mxXDCm2lW+zUWBqJrFZa3Ot0hJo1HRK+QPrE5HVZeC8s0u0C355lpNmWVGTZMQUAAAAAAAAAZC0xAQAAAABNbCpO"
    "yxabE3qTVL6KVuQ6jFqDd4ct4o47XfiXTeBXr1AAADbcL/LpQu/acI1dLtW2eD0RlcaXDf5sb3zoUgMA"
)
SIGNED_ID = "ooreobznfxvkahywstjfmexihqhgcssvybgmjbxqfhnzomimdpluoyffathf"
SIGNED_CONTENT = {
    "hash": SIGNED_ID,
    "amount": "5",
    "source": PAYER,
    "destination": "GYRSDMQPBSLBWAYHZQACMVGKIOPCCRJXYLMLLMAZPEXNDKMIDKXCRQLBFNIK",
    "tickNumber": 20000100,
    "timestamp": "1763899300000",
    "inputType": 0,
    "inputSize": 0,
    "inputData": "",
    "signature": "TWwqTssWmxN6k1S+ilbkOoxag3eHLeKOO134l03gV69QAAA23C/y6ULv2nCNXS7Vtng9EZXGlw3+bG986FIDAA==",
    "moneyFlew": True,
}
FAULTS = {
    "drop": 0,
    "delay": 0,
    "empty_ticks": 0,
    "paused": False,
    "jump": 0,
    "fail_after_accepting": 0,
    "fail_requests": 0,
    "lag": 0,
}


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
