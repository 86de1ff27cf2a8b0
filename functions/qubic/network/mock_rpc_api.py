"""The mock network's RPC in the format of the public RPC, and the operator's simulated faults.

It rejects every request that the public RPC rejects, with the same status and code; docs/qubic.md lists the rules in a
table. Errors have the public format, `{"code", "message", "details"}` with gRPC's codes. Only the errors for missing
rights have this project's format. The fault routes exist in the local stage only.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Path, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from qaes.adapters import settings
from qaes.adapters.http import EVERY_ROLE, PROBLEM_ANSWER, require
from qaes.adapters.strict_input import StrictRoute
from qaes.domain.errors import (
    ForbiddenError,
    InvalidInputError,
    NotFoundError,
    PermanentError,
    QaesError,
    TransientError,
)
from qaes.domain.qubic.identity import encode_identity
from qaes.domain.qubic.transaction import decode
from qubic.network import chain, rules
from qubic.network.base import Included
from qubic.network.faults import Faults
from qubic.network.mock import MockChain

OPERATORS = require("operator")
DECIDING = require("operator", deciding=True)

INVALID_ARGUMENT, NOT_FOUND, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 3, 5, 12, 13, 14
"""gRPC's codes. "Not found" means a transaction only: the client then treats the transaction as absent."""

_DIGITS = "^[0-9]{1,20}$"


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RpcError(_Model):
    """An error in the public RPC's format; `code` is gRPC's."""

    code: int
    message: str
    details: list[dict[str, Any]] = Field(default_factory=list, max_length=0)


class TickInfoContent(_Model):
    tick: int
    duration: int = Field(description="duration of a tick in seconds")
    epoch: int
    initialTick: int


class TickInfoAnswer(_Model):
    """The current tick."""

    tickInfo: TickInfoContent


class _Request(BaseModel):
    """A request in protobuf's JSON format: unknown names and other types are rejected."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class BroadcastRequest(_Request):
    """A signed transaction."""

    encodedTransaction: str = Field(max_length=4096, description="bytes of the transaction in base64")


class BroadcastAnswer(_Model):
    """The accepted transaction. Acceptance does not mean that it will execute."""

    peersBroadcasted: int
    encodedTransaction: str
    transactionId: str


class BalanceContent(_Model):
    id: str
    balance: str = Field(pattern=_DIGITS)
    validForTick: int
    latestIncomingTransferTick: int
    latestOutgoingTransferTick: int
    incomingAmount: str = Field(pattern=_DIGITS)
    outgoingAmount: str = Field(pattern=_DIGITS)
    numberOfIncomingTransfers: int
    numberOfOutgoingTransfers: int


class BalanceAnswer(_Model):
    """Balance of an identity in QU."""

    balance: BalanceContent


class LastProcessedTickAnswer(_Model):
    """The newest tick whose transactions the network can return."""

    tickNumber: int
    epoch: int
    intervalInitialTick: int
    lastProcessedLogTick: int


class TransactionRequest(_Request):
    """A transaction's id."""

    hash: str = Field(max_length=128, description="60 letters a to z, including their checksum")


class TransactionContent(_Model):
    """A transaction in the tick that it names."""

    hash: str
    amount: str = Field(pattern=_DIGITS)
    source: str
    destination: str
    tickNumber: int
    timestamp: str = Field(pattern=_DIGITS, description="milliseconds since 1970")
    inputType: int
    inputSize: int
    inputData: str = Field(description="base64")
    signature: str = Field(description="base64")
    moneyFlew: bool = Field(description="false for amount 0 too; a transaction counts if it is in its tick")


class RpcTransactionAnswer(_Model):
    """The transaction."""

    transaction: TransactionContent


def _uint32(value: object) -> object:
    """Read a uint32 in protobuf's JSON: a whole number, or its digits."""
    if isinstance(value, str) and re.fullmatch("0|[1-9][0-9]{0,9}", value, re.ASCII):
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, str | bool | float):
        raise ValueError("invalid value for a uint32")  # noqa: TRY004 pydantic takes a ValueError alone
    return value


_Uint32Input = Annotated[int, Field(ge=0, le=rules.MAX_TICK)] | Annotated[str, Field(pattern="^(0|[1-9][0-9]{0,9})$")]
_Uint32 = Annotated[int, Field(ge=0, le=rules.MAX_TICK), BeforeValidator(_uint32, json_schema_input_type=_Uint32Input)]


class Range(_Request):
    """A range of whole numbers as digits: at most one lower and one upper bound, and at least two values."""

    gt: str | None = None
    gte: str | None = None
    lt: str | None = None
    lte: str | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> Range:
        if None not in (self.gt, self.gte):
            raise ValueError("oneof lower_bound is already set")
        if None not in (self.lt, self.lte):
            raise ValueError("oneof upper_bound is already set")
        return self


class Pagination(_Request):
    """A page: offset plus size is at most 10,000, size at most 1,000. A size of 0 means the default of 10."""

    offset: _Uint32 | None = None
    size: _Uint32 | None = None


class TransactionsRequest(_Request):
    """A request for an identity's transactions. All values of `filters` and `exclude` are text, including numbers.

    `filters`: source, destination (up to five identities with commas between), amount, inputType, tickNumber.
    `exclude`: source, destination. `ranges`: amount, tickNumber, inputType, timestamp.
    """

    identity: str = Field(max_length=128)
    filters: dict[str, str] | None = None
    exclude: dict[str, str] | None = None
    ranges: dict[str, Range] | None = None
    pagination: Pagination | None = None


class Hits(_Model):
    """Total number of matches, and the range that this page contains."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)

    total: int
    from_: int = Field(alias="from")
    size: int


class TransactionsAnswer(_Model):
    """Transactions from and to an identity, the newest first."""

    validForTick: int
    hits: Hits
    transactions: list[TransactionContent]


class RpcRoute(StrictRoute):
    """A route whose errors have the RPC's format, except errors of authorization and of the media type."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def in_its_form(request: Request) -> Response:
            try:
                return await handle(request)
            except RequestValidationError as error:
                where = [".".join(str(part) for part in each["loc"][1:]) or "body" for each in error.errors()]
                reasons = [each["msg"] for each in error.errors()]
                text = "; ".join(f"{name}: {reason}" for name, reason in zip(where[:5], reasons[:5], strict=True))
                return _error(400, INVALID_ARGUMENT, f"proto: {text}")
            except rules.RuleError as error:
                return _error(400, INVALID_ARGUMENT, str(error))
            except _InternalError as error:
                return _error(500, INTERNAL, error.message)
            except HTTPException as error:
                if error.status_code != 400:
                    raise
                return _error(400, INVALID_ARGUMENT, error.detail)
            except ForbiddenError:
                raise
            except QaesError as error:
                return _domain_error(error)

        return in_its_form


class _InternalError(QaesError):
    """The public live service reports an internal error for this input, because its node connector rejects it."""


class _NotTheMockError(QaesError):
    """These routes belong to the mock network, but the stack uses another network."""


def _domain_error(error: QaesError) -> Response:
    if isinstance(error, InvalidInputError | PermanentError):
        named = f"{error.field}: " if error.field else ""
        return _error(400, INVALID_ARGUMENT, named + error.message)
    if isinstance(error, NotFoundError):
        return _error(404, NOT_FOUND, error.message)
    if isinstance(error, _NotTheMockError):
        return _error(404, UNIMPLEMENTED, error.message)
    if isinstance(error, TransientError):
        return _error(503, UNAVAILABLE, error.message)
    raise error


def _error(status: int, code: int, message: str) -> Response:
    return JSONResponse(RpcError(code=code, message=message or HTTPStatus(status).phrase).model_dump(), status)


def _mock() -> MockChain:
    found = chain() if settings.text("QUBIC_NETWORK") == "mock" else None
    if not isinstance(found, MockChain):
        raise _NotTheMockError("this stack does not use the mock network: call the network's own RPC")
    return found


def _switches() -> MockChain:
    if settings.optional("STAGE") != "local" or settings.text("QUBIC_NETWORK") != "mock":
        raise NotFoundError("simulated faults exist only on the mock network of the local stage")
    return _mock()


_ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": RpcError, "description": "The request is malformed, or the network rejects the transaction."},
    404: {"model": RpcError, "description": "The item does not exist, or the stack does not use the mock network."},
    500: {"model": RpcError, "description": "The public RPC reports an internal error for this input."},
    503: {"model": RpcError, "description": "The network does not respond."},
}
router = APIRouter(route_class=RpcRoute, responses=PROBLEM_ANSWER | _ERRORS)
_ELSEWHERE = PROBLEM_ANSWER["default"] | {
    "description": "The stage is not local, or the stack does not use the mock network."
}
switches = APIRouter(route_class=StrictRoute, responses=PROBLEM_ANSWER | {404: _ELSEWHERE})


def add_rpc_routes(app: FastAPI) -> None:
    """Add the routes of this module to the application itself, so that `app.routes` contains each of them."""
    app.router.routes.extend([*router.routes, *switches.routes])


@router.get("/live/v1/tick-info", operation_id="rpc_tick_info", dependencies=[Depends(EVERY_ROLE)])
def tick_info() -> TickInfoAnswer:
    """Return the current tick."""
    found = _mock().tick_info()
    return TickInfoAnswer(
        tickInfo=TickInfoContent(
            tick=found.tick, duration=found.duration, epoch=found.epoch, initialTick=found.initial_tick
        )
    )


@router.post(
    "/live/v1/broadcast-transaction", operation_id="rpc_broadcast_transaction", dependencies=[Depends(DECIDING)]
)
def broadcast_transaction(body: BroadcastRequest) -> BroadcastAnswer:
    """Send a signed transaction. The response does not confirm it. Operators only."""
    mock = _mock()
    sent = body.encodedTransaction
    try:
        encoded = base64.b64decode(sent, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInputError("illegal base64 data", field="encodedTransaction") from error
    try:
        decode(encoded)
    except ValueError as error:
        raise _InternalError(f"the transaction is malformed: {error}") from error
    txid = mock.broadcast(encoded)
    return BroadcastAnswer(peersBroadcasted=1, encodedTransaction=sent, transactionId=txid)


@router.get("/live/v1/balances/{id}", operation_id="rpc_balance", dependencies=[Depends(EVERY_ROLE)])
def balance(
    identity: Annotated[str, Path(alias="id", json_schema_extra={"pattern": "^[A-Z]{60}$"})],
) -> BalanceAnswer:
    """Return the balance of an identity. Like the public RPC, the mock does not check the identity's checksum."""
    mock = _mock()
    try:
        found = mock.balance(rules.without_checksum(identity))
    except rules.RuleError as error:
        raise _InternalError(f"getting identity info from node {error}") from error
    return BalanceAnswer(
        balance=BalanceContent(
            id=identity,
            balance=str(found.balance),
            validForTick=found.valid_for_tick,
            latestIncomingTransferTick=found.latest_incoming_transfer_tick,
            latestOutgoingTransferTick=found.latest_outgoing_transfer_tick,
            incomingAmount=str(found.incoming_amount),
            outgoingAmount=str(found.outgoing_amount),
            numberOfIncomingTransfers=found.number_of_incoming_transfers,
            numberOfOutgoingTransfers=found.number_of_outgoing_transfers,
        )
    )


@router.get(
    "/query/v1/getLastProcessedTick", operation_id="rpc_last_processed_tick", dependencies=[Depends(EVERY_ROLE)]
)
def last_processed_tick() -> LastProcessedTickAnswer:
    """Return the newest tick whose transactions the network can return."""
    found = _mock().last_processed_tick()
    return LastProcessedTickAnswer(
        tickNumber=found.tick,
        epoch=found.epoch,
        intervalInitialTick=found.interval_initial_tick,
        lastProcessedLogTick=found.tick,
    )


@router.post("/query/v1/getTransactionByHash", operation_id="rpc_transaction", dependencies=[Depends(EVERY_ROLE)])
def transaction_by_hash(body: TransactionRequest) -> RpcTransactionAnswer:
    """Return a transaction by its hash."""
    mock = _mock()
    _check_id(body.hash, lower=True)
    found = mock.transaction(body.hash)
    if found is None:
        raise NotFoundError("transaction not found")
    return RpcTransactionAnswer(transaction=_content(found))


@router.post(
    "/query/v1/getTransactionsForIdentity", operation_id="rpc_transactions", dependencies=[Depends(EVERY_ROLE)]
)
def transactions_for_identity(body: TransactionsRequest) -> TransactionsAnswer:
    """List the transactions from and to an identity, newest first."""
    mock = _mock()
    identity = body.identity
    _check_id(identity, lower=False)
    ranges = {name: each.model_dump(exclude_none=True) for name, each in (body.ranges or {}).items()}
    conditions = rules.check_conditions(body.filters or {}, body.exclude or {}, ranges)
    page = body.pagination or Pagination()
    try:
        offset, size = rules.check_page(page.offset or 0, page.size or 0)
    except rules.RuleError as error:
        raise rules.RuleError(f"invalid pagination: {error}") from error
    first, last = conditions.ranges.get("tickNumber", (0, rules.MAX_TICK))
    listed, valid_for_tick = mock.transactions(identity, first, min(last, rules.MAX_TICK))
    found = [each for each in listed if conditions.match(_fields(each))]
    return TransactionsAnswer(
        validForTick=valid_for_tick,
        hits=Hits(total=min(len(found), rules.MAX_HITS), from_=offset, size=size),
        transactions=[_content(each) for each in found[offset : offset + size]],
    )


def _check_id(text: str, *, lower: bool) -> None:
    try:
        rules.check_digest(text, lower=lower)
    except rules.RuleError as error:
        raise rules.RuleError(f"invalid id format: {error}") from error


def _fields(found: Included) -> dict[str, str]:
    content = _content(found)
    return {name: str(getattr(content, name)) for name in rules.FIELDS}


def _content(found: Included) -> TransactionContent:
    transaction = found.transaction
    return TransactionContent(
        hash=found.txid,
        amount=str(transaction.amount),
        source=encode_identity(transaction.source),
        destination=encode_identity(transaction.destination),
        tickNumber=transaction.tick,
        timestamp=str(found.timestamp),
        inputType=transaction.input_type,
        inputSize=len(transaction.payload),
        inputData=base64.b64encode(transaction.payload).decode(),
        signature=base64.b64encode(transaction.signature).decode(),
        moneyFlew=found.money_flew,
    )


@switches.get("/mock/faults", operation_id="get_mock_faults", dependencies=[Depends(OPERATORS)])
def get_faults() -> Faults:
    """Return the remaining simulated faults. Operators only, in the local stage only."""
    return _switches().faults()


@switches.put("/mock/faults", operation_id="put_mock_faults", dependencies=[Depends(DECIDING)])
def put_faults(body: Faults) -> Faults:
    """Replace the simulated faults of the mock network. Operators only, in the local stage only."""
    mock = _switches()
    mock.set_faults(body)
    return mock.faults()
