"""HTTP API of the qubic service: the policy, recorded hashes and their transactions; on the mock, also the RPC.

This function is reachable from the internet, so it has no key: the ledger's function for records signs for it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import Depends, Path, Response
from pydantic import BaseModel, ConfigDict, Field

from qaes import VERSION
from qaes.adapters.http import EVERY_ROLE, NO_TOKEN, Caller, Sha256, create_app, make_handler, require
from qaes.adapters.ledger_client import LedgerClient
from qaes.domain.errors import NotFoundError, TransientError
from qaes.domain.qubic.identity import is_transaction_id_shaped
from qubic import policy_api, suspension_api
from qubic.network.mock_rpc_api import add_rpc_routes
from qubic.transactions.hashes import check_hash, check_remark, hash_state
from qubic.transactions.model import Kind, State
from qubic.wallets import service_identity
from qubic.wiring import policies, submissions

app = create_app("qubic")


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")

    network: str = Field(description="network that responds; transactions of `mock` are not on the real network")


class WriteRequest(BaseModel):
    """A hash to record on the ledger."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hash: str = Field(pattern="^[0-9a-fA-F]{64}$", description="SHA-256, 64 hexadecimal digits")
    metadata: dict[str, Any] = Field(
        default_factory=dict, description="additional data, at most 4,096 bytes of canonical JSON"
    )


class WriteAnswer(_Answer):
    """The transaction that records the hash. The service stores it, and tracks it until it is `confirmed`.

    `status` is `pending` until then. If its tick passes without it, the service signs another transaction for a later
    tick, and the id changes; `timestamp` is the time of the last change of state.
    """

    txid: str
    hash: str
    timestamp: str
    tick: int
    status: Literal["pending", "confirmed"]


class LedgerVerifyAnswer(_Answer):
    """Whether a confirmed transaction has recorded the hash, with its signed bytes in base64 as evidence.

    `state` is signed, broadcast (neither is final) or confirmed; null if the hash was never recorded.
    """

    hash: str
    verified: bool
    txid: str | None
    timestamp: str | None
    tick: int | None
    kind: Kind | None = Field(
        description="`instruction`: hash of a task's instruction; `hash`: recorded by an operator; null: never recorded"
    )
    state: State | None
    source: str | None
    encoded: str | None


class TransactionAnswer(_Answer):
    """A transaction of this service; `encoded` is the signed bytes (base64), `block_height` its named tick.

    States: confirmed (in that tick), failed (in that tick, but without an effect), expired (in no tick).
    """

    txid: str
    hash: str
    timestamp: str
    kind: Kind = Field(description="kind of the transaction; POST /write creates `hash` only")
    metadata: dict[str, Any] = Field(
        description="visible to auditors, operators and the task's requester; empty for other callers"
    )
    requested_by: str | None = Field(
        description="the task's requester, or the operator who recorded the hash; null for the system's own records, "
        "and for callers who cannot read the metadata"
    )
    block_height: int
    encoded: str = Field(description="signed bytes in base64; empty for a transfer that was not sent yet")
    state: State
    source: str
    destination: str
    amount: int


class LedgerHealthy(_Answer):
    """The network and the service's table respond, a policy is in force, and the signing wallet has a balance."""

    status: Literal["healthy"]
    service: str
    version: str = VERSION
    tick: int
    policy_id: str


class LedgerUnhealthy(_Answer):
    """The name of the failing part: `network`, `policy` or `wallet`."""

    status: Literal["unhealthy"]
    service: str
    version: str = VERSION
    failing: list[str]
    detail: str


policy_api.add_policy_routes(app)
suspension_api.add_suspension_routes(app)


@app.post("/write")
def write(body: WriteRequest, caller: Annotated[Caller, Depends(require("operator", deciding=True))]) -> WriteAnswer:
    """Record a hash on the ledger, once: a repetition returns the same transaction. Operators only."""
    written = LedgerClient().write(check_hash(body.hash), check_remark(body.metadata), written_by=caller.subject)
    return WriteAnswer(
        network=written["network"],
        txid=written["txid"],
        hash=written["hash"],
        timestamp=written["timestamp"],
        tick=written["tick"],
        status="confirmed" if written["state"] == "confirmed" else "pending",
    )


@app.get("/verify/{hash}", operation_id="verify_on_ledger", dependencies=[Depends(EVERY_ROLE)])
def verify(sent: Sha256) -> LedgerVerifyAnswer:
    """Return whether a confirmed transaction of the ledger recorded the hash."""
    found = hash_state(submissions(), check_hash(sent))
    return LedgerVerifyAnswer.model_validate({name: found[name] for name in LedgerVerifyAnswer.model_fields})


@app.get("/tx/{txid}")
def get_transaction(
    txid: Annotated[str, Path(json_schema_extra={"pattern": "^[a-z]{60}$"})],
    caller: Annotated[Caller, Depends(EVERY_ROLE)],
) -> TransactionAnswer:
    """Return a transaction that this service signed, by its id."""
    ledger = submissions()
    found = ledger.attempt(txid) if is_transaction_id_shaped(txid) else None
    if found is None:
        raise NotFoundError("no such transaction", field="txid")
    answer = found.answer()
    # A person with a task's reference could test guesses of its instruction against the hash.
    shows_metadata = caller.has("auditor") or caller.subject == found.requested_by
    return TransactionAnswer(
        network=ledger.chain.network,
        txid=txid,
        hash=found.payload.hex(),
        timestamp=answer["timestamp"],
        kind=found.kind,
        metadata=found.metadata if shows_metadata else {},
        requested_by=(found.requested_by or None) if shows_metadata else None,
        block_height=found.tick,
        encoded=answer["encoded"],
        state=found.state,
        source=found.source,
        destination=found.destination,
        amount=found.amount,
    )


@app.get(
    "/qubic/health", responses={503: {"model": LedgerUnhealthy}}, operation_id="qubic_health", openapi_extra=NO_TOKEN
)
def health(response: Response) -> LedgerHealthy | LedgerUnhealthy:
    """Return 200 if the network responds, a policy is in force, and the wallet that signs records has a balance."""
    ledger = submissions()
    failing = "network"
    try:
        tick = ledger.chain.tick_info().tick
        failing = "policy"
        policy = policies().in_force()
        failing = "wallet"
        balance = ledger.chain.balance(service_identity()).balance
        detail = "" if balance else "the service's wallet has no balance: the network drops its transactions"
    except TransientError as error:
        detail = error.message
    if not detail:
        return LedgerHealthy(
            network=ledger.chain.network, status="healthy", service="qubic", tick=tick, policy_id=policy.policy_id
        )
    response.status_code = 503
    return LedgerUnhealthy(
        network=ledger.chain.network, status="unhealthy", service="qubic", failing=[failing], detail=detail
    )


add_rpc_routes(app)

handler = make_handler(app)
