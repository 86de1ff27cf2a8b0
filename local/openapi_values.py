"""The values that the examples of the API document share."""

from __future__ import annotations

from local.seed import PLAN, PLANNED_TASK
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
