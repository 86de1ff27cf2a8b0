"""The handler of the action `issue_invoice`: an HTTPS service that verifies the dispatcher's signature.

API Gateway and Lambda serve it here; the code fits any web framework that gives it the method, URL, headers and body.
"""

import base64
import hashlib
import json
import os
import uuid
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import boto3
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from http_message_signatures import HTTPMessageVerifier, InvalidSignature, MappingKeyResolver, algorithms

CONTENT = ("action", "parameters", "plan_hash", "step_hash")
TABLE = boto3.resource("dynamodb").Table(os.environ["LEDGER_TABLE"])
SIGNED = ("@method", "@target-uri", "content-digest", "idempotency-key")


def key_id(x: str) -> str:
    """Return the thumbprint of a key (RFC 8037): the `kid` in the dispatcher's key directory."""
    jwk = json.dumps({"crv": "Ed25519", "kty": "OKP", "x": x}, separators=(",", ":"))
    return base64.urlsafe_b64encode(hashlib.sha256(jwk.encode()).digest()).rstrip(b"=").decode()


def public_key(x: str) -> Ed25519PublicKey:
    return Ed25519PublicKey.from_public_bytes(base64.urlsafe_b64decode(x + "="))


KEYS = {key_id(x): public_key(x) for x in os.environ["DISPATCHER_KEYS"].split(",")}


def handler(event: dict, context: object) -> dict:
    """Answer one HTTP request of API Gateway."""
    url = os.environ["PUBLIC_URL"] or "https://{domainName}{path}".format(**event["requestContext"])
    request = SimpleNamespace(method=event["httpMethod"], url=url, headers=event["headers"])
    keys = MappingKeyResolver(public_keys=KEYS, private_keys={})
    verifier = HTTPMessageVerifier(signature_algorithm=algorithms.ED25519, key_resolver=keys)
    try:
        verifier.verify(
            request, max_age=timedelta(minutes=5), require_components=SIGNED, body=(event["body"] or "").encode()
        )
    except InvalidSignature:
        return {"statusCode": 401, "body": "{}"}
    status, answer = issue(json.loads(event["body"]))
    return {"statusCode": status, "headers": {"Content-Type": "application/json"}, "body": json.dumps(answer)}


def issue(request: dict) -> tuple[int, dict]:
    """Answer one request that the dispatcher signed."""
    if request["action"] != "issue_invoice" or request["mode"] == "dry_run":
        return refused("not_supported", "This handler issues invoices, and has no dry run.")
    content = hashlib.sha256(json.dumps([request[name] for name in CONTENT], sort_keys=True).encode()).hexdigest()
    invoice = find(request["reference"])
    if invoice is None and request["mode"] == "query":
        return 404, {"status": "not_found"}
    if invoice is None and datetime.now(UTC) >= datetime.fromisoformat(request["deadline"]):
        return refused("late", "The deadline of this request has passed.")
    if invoice is None:
        invoice = {"reference": request["reference"], "content": content, "invoice_id": f"INV-{uuid.uuid4()}"}
        try:  # the effect and its record are one conditional write: of two requests at once, one acts
            TABLE.put_item(
                Item=invoice | request["parameters"], ConditionExpression="attribute_not_exists(#r)",
                ExpressionAttributeNames={"#r": "reference"},
            )  # fmt: skip
        except TABLE.meta.client.exceptions.ConditionalCheckFailedException:
            invoice = find(request["reference"])
    if invoice["content"] != content:
        return 409, {"status": "conflict"}
    return 200, {"status": "done", "result": {"invoice_id": invoice["invoice_id"]}}


def find(reference: str) -> dict | None:
    return TABLE.get_item(Key={"reference": reference}, ConsistentRead=True).get("Item")


def refused(code: str, message: str) -> tuple[int, dict]:
    return 422, {"status": "refused", "error": {"code": code, "message": message}}
