"""The qubic service over HTTP: the policy, written hashes and the transactions that wrote them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Depends, Path, Query, Response
from pydantic import BaseModel, ConfigDict, Field

from qaes.adapters.http import OPEN, Sha256, create_app, make_handler, require
from qaes.domain.errors import NotFoundError, UnavailableError
from qaes.domain.policy import Policy, Rule
from qaes.domain.qubic.identity import is_transaction_id_shaped
from qubic.chain import chain
from qubic.chain.base import HashEntry, check_hash

app = create_app("qubic")
handler = make_handler(app)
EVERY_ROLE = require("requester", "approver", "auditor")


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    network: str = Field(description="the network that answers; nothing of `mock` is on the real one")


class RuleAnswer(_Answer):
    """The rule for one action type."""

    policy_id: str
    action_type: str
    allowed: bool
    requires_approval: bool
    rules: Rule


class PolicyAnswer(_Answer):
    """Every rule of the policy in force."""

    policy_id: str
    version: int
    rules: dict[str, Rule]


class WriteRequest(BaseModel):
    """A hash to write on the ledger."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hash: str = Field(pattern="^[0-9a-fA-F]{64}$", description="SHA-256, 64 hexadecimal digits")
    metadata: dict[str, Any] = Field(default_factory=dict, description="at most 4,096 bytes of canonical JSON")


class WriteAnswer(_Answer):
    """The transaction that wrote the hash: now, or when it was first written."""

    txid: str
    hash: str
    timestamp: str
    tick: int


class LedgerVerifyAnswer(_Answer):
    """Whether a transaction wrote the hash, and which."""

    hash: str
    verified: bool
    txid: str | None
    timestamp: str | None
    tick: int | None


class TransactionAnswer(_Answer):
    """A transaction; `encoded` is the signed bytes (base64), `block_height` its tick."""

    txid: str
    hash: str
    timestamp: str
    metadata: dict[str, Any]
    block_height: int
    encoded: str


class LedgerHealthy(_Answer):
    """The service and its table answer."""

    status: Literal["healthy"]
    service: str
    tick: int


class LedgerUnhealthy(_Answer):
    """The part that does not answer, named."""

    status: Literal["unhealthy"]
    service: str
    failing: list[str]
    detail: str


@app.get("/policy", dependencies=[Depends(EVERY_ROLE)])
def get_policy(
    action_type: Annotated[str | None, Query(min_length=1, max_length=128)] = None,
) -> RuleAnswer | PolicyAnswer:
    """The rule for an action type (without one it is denied), or every rule."""
    it = chain()
    policy: Policy = it.policy()
    if action_type is None:
        return PolicyAnswer(network=it.network, policy_id=policy.policy_id, version=policy.version, rules=policy.rules)
    decision = policy.decide(action_type)
    return RuleAnswer(
        network=it.network,
        policy_id=policy.policy_id,
        action_type=action_type,
        allowed=decision.allowed,
        requires_approval=decision.requires_approval,
        rules=decision.rule,
    )


@app.post("/write", dependencies=[Depends(require("operator"))])
def write(body: WriteRequest) -> WriteAnswer:
    """Write a hash on the ledger, once for ever: the second time answers with the first transaction. Operators only."""
    it = chain()
    [receipt] = it.write_hashes([HashEntry.checked(body.hash, body.metadata)])
    return WriteAnswer(
        network=it.network, txid=receipt.txid, hash=receipt.hash, timestamp=receipt.timestamp, tick=receipt.tick
    )


@app.get("/verify/{hash}", operation_id="verify_on_ledger", dependencies=[Depends(EVERY_ROLE)])
def verify(
    sent: Sha256,
) -> LedgerVerifyAnswer:
    """Whether a transaction of the ledger wrote the hash."""
    it = chain()
    hash_ = check_hash(sent)
    receipt = it.verify(hash_)
    return LedgerVerifyAnswer(
        network=it.network,
        hash=hash_,
        verified=receipt is not None,
        txid=receipt.txid if receipt else None,
        timestamp=receipt.timestamp if receipt else None,
        tick=receipt.tick if receipt else None,
    )


@app.get("/tx/{txid}", dependencies=[Depends(EVERY_ROLE)])
def get_transaction(txid: Annotated[str, Path(json_schema_extra={"pattern": "^[a-z]{60}$"})]) -> TransactionAnswer:
    """A transaction by its id."""
    if not is_transaction_id_shaped(txid):
        raise NotFoundError("no such transaction", field="txid")
    it = chain()
    found = it.transaction(txid)
    return TransactionAnswer(
        network=it.network,
        txid=found.txid,
        hash=found.hash,
        timestamp=found.timestamp,
        metadata=found.metadata,
        block_height=found.tick,
        encoded=found.encoded,
    )


@app.get("/qubic/health", responses={503: {"model": LedgerUnhealthy}}, operation_id="qubic_health", openapi_extra=OPEN)
def health(response: Response) -> LedgerHealthy | LedgerUnhealthy:
    """Healthy when the ledger's table answers."""
    it = chain()
    try:
        return LedgerHealthy(network=it.network, status="healthy", service="qubic", tick=it.health())
    except UnavailableError as error:
        response.status_code = 503
        return LedgerUnhealthy(
            network=it.network, status="unhealthy", service="qubic", failing=["ledger_table"], detail=error.message
        )
