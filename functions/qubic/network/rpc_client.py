"""Client for a Qubic network's public RPC (`/live/v1/…` and `/query/v1/…`).

The client verifies everything that can be verified: it reassembles a transaction's bytes from the response, and checks
their id and the source's signature. No decision uses `peersBroadcasted` or `moneyFlew`. Ticks, balances and the
absence of a transaction rest on the node's word alone.

A response that does not match the documentation raises TransientError; it never counts as "not executed". Only the
RPC's own error code for "not found" does.

Every request is within the rules of the services behind the RPC (table in docs/qubic.md): the query service rejects a
range of one tick, and pages beyond 10,000 hits.
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
import json
import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any, NoReturn, TypeVar

import urllib3
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from urllib3.util import Retry, Timeout, parse_url

from qaes.domain.errors import InvalidInputError, PermanentError, TransientError
from qaes.domain.qubic.identity import decode_identity, decode_transaction_id
from qaes.domain.qubic.transaction import Transaction, decode
from qubic.network.base import Balance, Included, ProcessedTick, SentList, TickInfo
from qubic.network.rules import MAX_TICK, check_ticks

MAX_ANSWER_BYTES = 1024 * 1024
CONNECT_SECONDS = 2.0
READ_SECONDS = 4.0
ATTEMPTS = 2
"""A call takes at most about 12 s: the calling function has 25 s, and its own caller 27 s."""
PAGE = 400
"""This many of the largest transactions fit in MAX_ANSWER_BYTES. The service accepts up to 1,000."""
MAX_LISTED = 2_000
"""Maximum number of transactions of one source in one call: each signature takes 6 ms. The service counts to 10,000."""
NOT_FOUND = 5
"""gRPC's code for "not found", which the RPC's errors carry."""

_BUSY = (429, 500, 502, 503, 504)
_DIGITS = re.compile(r"-?[0-9]{1,20}", re.ASCII)
_CHUNK = 64 * 1024


def _integer(value: object) -> object:
    """Read a number of the RPC: 64-bit numbers come as text, 32-bit numbers as JSON numbers."""
    if isinstance(value, str) and _DIGITS.fullmatch(value):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError("must be a whole number")


def _proto_integer(value: object) -> object:
    """Read a number that no decision uses or that the transaction's id proves: protobuf's JSON may omit a 0."""
    return 0 if value is None else _integer(value)


_Number = Annotated[int, BeforeValidator(_integer), Field(ge=0, lt=1 << 64)]
_TickNumber = Annotated[int, BeforeValidator(_integer), Field(ge=0, lt=1 << 32)]
_ProtoNumber = Annotated[int, BeforeValidator(_proto_integer), Field(ge=0, lt=1 << 64)]
_ProtoText = Annotated[str, BeforeValidator(lambda value: "" if value is None else value)]
_ProtoBool = Annotated[bool, BeforeValidator(lambda value: False if value is None else value)]


class _Answer(BaseModel):
    """The fields of a response that the client reads. A node may send more."""

    model_config = ConfigDict(frozen=True, strict=True)


class _Tick(_Answer):
    tick: _TickNumber
    epoch: _ProtoNumber = 0
    duration: _ProtoNumber = 0
    initial_tick: _ProtoNumber = Field(0, alias="initialTick")


class _TickInfo(_Answer):
    tick_info: _Tick = Field(alias="tickInfo")


class _Broadcast(_Answer):
    transaction_id: str = Field(alias="transactionId")


class _IdentityBalance(_Answer):
    id: str
    balance: _Number
    valid_for_tick: _TickNumber = Field(alias="validForTick")
    latest_incoming_transfer_tick: _ProtoNumber = Field(0, alias="latestIncomingTransferTick")
    latest_outgoing_transfer_tick: _TickNumber = Field(alias="latestOutgoingTransferTick")
    incoming_amount: _ProtoNumber = Field(0, alias="incomingAmount")
    outgoing_amount: _ProtoNumber = Field(0, alias="outgoingAmount")
    number_of_incoming_transfers: _ProtoNumber = Field(0, alias="numberOfIncomingTransfers")
    number_of_outgoing_transfers: _ProtoNumber = Field(0, alias="numberOfOutgoingTransfers")


class _Balance(_Answer):
    balance: _IdentityBalance


class _ProcessedTick(_Answer):
    tick_number: _TickNumber = Field(alias="tickNumber")
    epoch: _ProtoNumber = 0
    interval_initial_tick: _ProtoNumber = Field(0, alias="intervalInitialTick")


class _Transaction(_Answer):
    hash: str
    amount: _ProtoNumber = 0
    source: str
    destination: str
    tick_number: _TickNumber = Field(alias="tickNumber")
    timestamp: _ProtoNumber = 0
    input_type: _ProtoNumber = Field(0, alias="inputType")
    input_size: _ProtoNumber = Field(0, alias="inputSize")
    input_data: _ProtoText = Field("", alias="inputData")
    signature: str
    money_flew: _ProtoBool = Field(default=False, alias="moneyFlew")


class _Nested(_Answer):
    transaction: _Transaction


class _Hits(_Answer):
    total: _Number


class _Page(_Answer):
    valid_for_tick: _TickNumber = Field(alias="validForTick")
    hits: _Hits
    transactions: tuple[_Transaction, ...] = Field(strict=False)


class _Error(_Answer):
    code: int
    message: str


_Kind = TypeVar("_Kind", bound=_Answer)


class RpcChain:
    """The `Chain` behind a public RPC.

    A request without a response is sent `ATTEMPTS` times, with growing random pauses. This includes a broadcast,
    because the same bytes are always the same transaction. A call takes at most about 12 seconds.

    Parameters
    ----------
    url
            Address of the RPC, such as `https://rpc.qubic.org`. Plain http is allowed for a loopback address only.
        network
            Name of the network in responses.
        headers
            Headers of each request, for a node that requires authentication.

    Raises
    ------
    ValueError
        The address is malformed or not safe.
    """

    network: str

    def __init__(self, url: str, *, network: str = "mainnet", headers: Mapping[str, str] | None = None) -> None:
        self._url = _checked_url(url)
        self.network = network
        self._http = urllib3.PoolManager(
            headers={
                **(headers or {}),
                "Accept": "application/json",
                "Accept-Encoding": "identity",  # the size limit applies to the bytes on the wire
            },
            timeout=Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
            retries=Retry(
                total=ATTEMPTS - 1,
                redirect=0,
                allowed_methods=None,  # every request is safe to repeat
                status_forcelist=_BUSY,
                raise_on_status=False,
                respect_retry_after_header=False,  # a node must not control how long a function waits
                backoff_factor=0.2,
                backoff_max=2,
                backoff_jitter=0.2,
            ),
        )

    def tick_info(self) -> TickInfo:
        path = "/live/v1/tick-info"
        found = self._parsed(_TickInfo, path, self._answer("GET", path)).tick_info
        return TickInfo(found.tick, found.epoch, found.duration, found.initial_tick)

    def last_processed_tick(self) -> ProcessedTick:
        path = "/query/v1/getLastProcessedTick"
        found = self._parsed(_ProcessedTick, path, self._answer("GET", path))
        return ProcessedTick(found.tick_number, found.epoch, found.interval_initial_tick)

    def balance(self, identity: str) -> Balance:
        _check_identity(identity)
        path = f"/live/v1/balances/{identity}"
        found = self._parsed(_Balance, path, self._answer("GET", path)).balance
        if found.id != identity:
            _unusable(path, "the node's response is for another identity")
        return Balance(
            identity=identity,
            balance=found.balance,
            valid_for_tick=found.valid_for_tick,
            latest_incoming_transfer_tick=found.latest_incoming_transfer_tick,
            latest_outgoing_transfer_tick=found.latest_outgoing_transfer_tick,
            incoming_amount=found.incoming_amount,
            outgoing_amount=found.outgoing_amount,
            number_of_incoming_transfers=found.number_of_incoming_transfers,
            number_of_outgoing_transfers=found.number_of_outgoing_transfers,
        )

    def broadcast(self, encoded: bytes) -> str:
        try:
            txid = decode(encoded).id
        except ValueError as error:
            raise PermanentError("broadcast_refused", f"the transaction is malformed: {error}") from error
        path = "/live/v1/broadcast-transaction"
        status, body = self._ask("POST", path, {"encodedTransaction": base64.b64encode(encoded).decode()})
        if status == 400 and (error_ := _error(body)):
            raise PermanentError("broadcast_refused", f"the node rejects the transaction: {_printable(error_.message)}")
        # Any other 4xx status concerns the caller or the rate limit, not the transaction.
        if status != 200:
            _unusable(path, f"the node responded with status {status}")
        if self._parsed(_Broadcast, path, body).transaction_id != txid:
            _unusable(path, "the node's response is for another transaction")
        return txid

    def transaction(self, txid: str) -> Included | None:
        try:
            decode_transaction_id(txid)
        except ValueError:
            return None  # malformed, so no transaction has this id
        path = "/query/v1/getTransactionByHash"
        status, body = self._ask("POST", path, {"hash": txid})
        # A gateway's "Not Found" for an unknown path has the same code.
        if status == 404 and (error_ := _error(body)) and error_.code == NOT_FOUND and "transaction" in error_.message:
            return None
        if status != 200:
            _unusable(path, f"the node responded with status {status}")
        nested = isinstance(body, dict) and "transaction" in body
        found = self._parsed(_Nested, path, body).transaction if nested else self._parsed(_Transaction, path, body)
        return _included(path, found, txid)

    def sent(self, identity: str, first_tick: int, last_tick: int) -> SentList:
        _check_identity(identity)
        check_ticks(first_tick, last_tick)
        path = "/query/v1/getTransactionsForIdentity"
        found: dict[str, Included] = {}
        valid_for_tick = MAX_TICK
        for offset in range(0, MAX_LISTED, PAGE):
            page = self._page(path, identity, first_tick, last_tick, offset)
            valid_for_tick, total = min(valid_for_tick, page.valid_for_tick), page.hits.total
            if total > MAX_LISTED:
                _unusable(path, "the source has too many transactions in this range")
            found |= {each.hash: _included(path, each, each.hash) for each in page.transactions}
            if offset + PAGE >= total:
                break
        if len(found) != total:
            _unusable(path, f"the node counts {total} transactions but lists {len(found)}")
        sent = sorted(found.values(), key=lambda each: each.tick, reverse=True)
        return SentList(tuple(each for each in sent if first_tick <= each.tick <= last_tick), valid_for_tick)

    def _page(self, path: str, identity: str, first_tick: int, last_tick: int, offset: int) -> _Page:
        """Read a page of the ticks from `first_tick` - 1 to `last_tick` + 1, as far as these exist.

        The service rejects a range of one tick, and its documentation also excludes "size 0 or 1".
        """
        first, last = max(first_tick - 1, 0), min(last_tick + 1, MAX_TICK)
        question = {
            "identity": identity,
            "filters": {"source": identity},
            "ranges": {"tickNumber": {"gte": str(first), "lte": str(last)}},
            "pagination": {"offset": offset, "size": PAGE},
        }
        page = self._parsed(_Page, path, self._answer("POST", path, question))
        if len(page.transactions) > PAGE:
            _unusable(path, "the node returned more transactions than requested")
        if any(each.source != identity or not first <= each.tick_number <= last for each in page.transactions):
            _unusable(path, "the node returned a transaction that does not match the request")
        return page

    # HTTP

    def _answer(self, method: str, path: str, question: dict[str, Any] | None = None) -> Any:
        status, body = self._ask(method, path, question)
        if status != 200:
            _unusable(path, f"the node responded with status {status}")
        return body

    def _ask(self, method: str, path: str, question: dict[str, Any] | None = None) -> tuple[int, Any]:
        """Return the status and the JSON of the response."""
        sent = {"json": question} if question is not None else {}
        with _reaching(path):
            response = self._http.request(method, self._url + path, redirect=False, preload_content=False, **sent)
            try:
                data = _read(response, path)
            finally:
                response.close()  # do not read the rest
        try:
            return response.status, json.loads(data)
        except (ValueError, RecursionError) as error:
            raise TransientError(f"{_name(path)}: the response ({response.status}) is not JSON") from error

    def _parsed(self, kind: type[_Kind], path: str, body: Any) -> _Kind:
        try:
            return kind.model_validate(body)
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"]) or "the whole body"
            raise TransientError(f"{_name(path)}: the response does not match the documentation: {where}") from error


def _read(response: urllib3.BaseHTTPResponse, path: str) -> bytes:
    deadline = time.monotonic() + READ_SECONDS
    data = bytearray()
    while chunk := response.read1(_CHUNK, decode_content=False):
        data += chunk
        if len(data) > MAX_ANSWER_BYTES:
            _unusable(path, f"the response is larger than {MAX_ANSWER_BYTES} bytes")
        if time.monotonic() > deadline:
            _unusable(path, "the response takes too long")
    return bytes(data)


@contextmanager
def _reaching(path: str) -> Iterator[None]:
    try:
        yield
    except urllib3.exceptions.MaxRetryError as error:
        reason = type(error.reason or error).__name__
        raise TransientError(f"{_name(path)}: the node does not respond ({reason})") from error
    except urllib3.exceptions.HTTPError as error:
        raise TransientError(f"{_name(path)}: the response was cut off ({type(error).__name__})") from error


def _included(path: str, found: _Transaction, txid: str) -> Included:
    """Assemble a transaction from its fields. It must have the requested id."""
    try:
        transaction = Transaction(
            source=decode_identity(found.source),
            destination=decode_identity(found.destination),
            amount=found.amount,
            tick=found.tick_number,
            input_type=found.input_type,
            payload=base64.b64decode(found.input_data, validate=True),
            signature=base64.b64decode(found.signature, validate=True),
        )
        id_ = transaction.id
    except (ValueError, binascii.Error) as error:
        raise TransientError(f"{_name(path)}: the node returned a malformed transaction: {error}") from error
    if id_ != txid or found.input_size != len(transaction.payload):
        _unusable(path, "the node returned another transaction")
    if not transaction.is_signed_by_source():
        _unusable(path, "the node returned a transaction without its source's signature")
    return Included(transaction, timestamp=found.timestamp, money_flew=found.money_flew)


def _error(body: Any) -> _Error | None:
    try:
        return _Error.model_validate(body)
    except ValidationError:
        return None


def _printable(text: str) -> str:
    return "".join(letter if letter.isprintable() else "?" for letter in text[:200])


def _unusable(path: str, what: str) -> NoReturn:
    raise TransientError(f"{_name(path)}: {what}")


def _name(path: str) -> str:
    """Return the name of a call: `balances` for `/live/v1/balances/…`."""
    return path.split("/")[3]


def _check_identity(identity: str) -> None:
    try:
        decode_identity(identity)
    except ValueError as error:
        raise InvalidInputError(str(error), field="identity") from error


def _checked_url(url: str) -> str:
    try:
        parts = parse_url(url)
    except urllib3.exceptions.LocationParseError as error:
        raise ValueError("the RPC's address is not a URL") from error
    if parts.scheme not in {"http", "https"} or not parts.host:
        raise ValueError("the RPC's address must begin with https:// and name a host")
    if parts.auth or parts.query or parts.fragment:
        raise ValueError("the RPC's address must not have a user, a query or a fragment")
    if parts.scheme == "http" and not _is_loopback(parts.host):
        raise ValueError("the RPC's address must use https; plain http is for a loopback address only")
    return url.rstrip("/")


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
