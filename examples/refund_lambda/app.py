"""The handler of the action `refund_customer`: a Lambda function whose table is the ledger of its refunds."""

import hashlib
import json
import os
import uuid
from datetime import UTC, datetime

import boto3

CONTENT = ("action", "parameters", "plan_hash", "step_hash")
TABLE = boto3.resource("dynamodb").Table(os.environ["LEDGER_TABLE"])


def handler(request: dict, context: object) -> dict:
    """Answer one request of the dispatcher."""
    if request["action"] != "refund_customer":
        return refused("unknown_action", "This handler refunds customers only.")
    if request["mode"] == "dry_run":
        return {"status": "done", "result": {"would_refund": request["parameters"]["amount"]}}
    content = hashlib.sha256(json.dumps([request[name] for name in CONTENT], sort_keys=True).encode()).hexdigest()
    refund = find(request["reference"])
    if refund is None and request["mode"] == "query":
        return {"status": "not_found"}
    if refund is None and datetime.now(UTC) >= datetime.fromisoformat(request["deadline"]):
        return refused("late", "The deadline of this request has passed.")
    if refund is None:
        refund = {"reference": request["reference"], "content": content, "refund_id": str(uuid.uuid4())}
        try:  # the effect and its record are one conditional write: of two requests at once, one acts
            TABLE.put_item(
                Item=refund | request["parameters"], ConditionExpression="attribute_not_exists(#r)",
                ExpressionAttributeNames={"#r": "reference"},
            )  # fmt: skip
        except TABLE.meta.client.exceptions.ConditionalCheckFailedException:
            refund = find(request["reference"])
    if refund["content"] != content:
        return {"status": "conflict"}
    return {"status": "done", "result": {"refund_id": refund["refund_id"]}}


def find(reference: str) -> dict | None:
    return TABLE.get_item(Key={"reference": reference}, ConsistentRead=True).get("Item")


def refused(code: str, message: str) -> dict:
    return {"status": "refused", "error": {"code": code, "message": message}}
