"""The audit service over HTTP: a task's trail and its bundle, what proves an entry, and the log. It only reads."""

from __future__ import annotations

import base64
import gzip
import json
import re
from functools import cache
from typing import Annotated, Any, Literal

from fastapi import Depends, Path, Query, Request, Response
from fastapi.responses import PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.exceptions import HTTPException

from audit import tlog
from audit.anchors import Anchor
from audit.evidence import CHECKS, LogStatus, Match, Trail, find_matches, read_trail
from audit.log import Log
from audit.store import AuditStore, Outbox, Role, StoredEntry
from qaes.adapters import settings
from qaes.adapters.http import Caller, Sha256, TaskId, add_health, create_app, make_handler, require
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.logs import logger
from qaes.adapters.task_store import TaskStore
from qaes.domain.audit import Check
from qaes.domain.bundle import Bundle, TrailEntry, build_bundle, policy_ids
from qaes.domain.errors import InvalidInputError, NotFoundError, RefusedError
from qaes.domain.ids import is_task_id
from qaes.domain.tiles import consistency_proof, inclusion_proof

READERS = ("auditor", "approver", "operator")
"""Roles that may read every task's trail; a requester reads that of their own tasks."""
MAX_SIZE = 2**53 - 1
MAX_PAGE = 1000
"""Most entries of a trail in one answer: some 1.5 MB."""
MAX_ANSWER_BYTES = 5_500_000
"""Lambda sends at most 6 MB, in which a text's quotes and line breaks are escaped once more."""
UNREADABLE = "unreadable"
"""Stands for what the text of an entry no longer says, because it was altered."""
STATEMENT = {
    "mainnet": "Transactions on the Qubic network can be looked up at any of its nodes, without this system.",
    "mock": "The mock ledger is run by the operator of this system: its transactions prove nothing to an outsider.",
}

Reader = Annotated[Caller, Depends(require("requester", *READERS))]
BundleReader = Annotated[Caller, Depends(require("requester", "auditor"))]
"""A bundle shows what the hashes hide: to who asked for the task, to auditors and operators."""
Auditor = Annotated[Caller, Depends(require("auditor"))]

app = create_app("audit")


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LogEntry(_Answer):
    """An audit entry. `leaf` is the hash of `entry_text`, `prev` that of the entry before; `step_index` -1: no step.

    `log_status` says how far it has come: recorded (in the table), sequenced (it has a place in the log), anchoring
    (an anchor over it is in flight), anchored (the ledger has confirmed one).
    """

    id: str
    seq: int
    kind: str
    actor: str
    agent: str | None = Field(description="the client of the agent that acted for `actor`; null when a person did")
    step_index: int
    step_type: str
    input_hash: str
    output_hash: str
    status: str
    timestamp: str
    log_status: LogStatus
    index: int | None = Field(description="the entry's place in the log, from 0")
    qubic_txid: str | None = Field(description="the transaction of the first confirmed anchor over the entry")
    leaf: str
    prev: str
    entry_text: str


class Broken(_Answer):
    """The first entry that does not hold, and what is wrong with it."""

    seq: int
    check: Check
    message: str


class ChainState(_Answer):
    """Whether every entry has its hash, names the one before, and none is missing; `head` is the newest leaf hash."""

    verified: bool
    entries: int
    sequenced: int
    anchored: int
    head: str | None
    broken: Broken | None


class AuditAnswer(_Answer):
    """A task's trail, oldest entry first; with `next_cursor`, unless these are the last.

    `qubic_txid` is the newest transaction. It and `chain` are about the whole trail.
    """

    task_id: str
    logs: list[LogEntry]
    next_cursor: str | None
    qubic_txid: str | None
    chain: ChainState
    network: str
    statement: str


class AnchorAnswer(_Answer):
    """A confirmed anchor: the log's size and root in `payload` (hex), which `transaction` (base64) carries."""

    sequence: int
    size: int
    root: str
    payload: str
    transaction: str
    txid: str
    tick: int
    source: str = Field(description="the identity that signed it")
    network: str
    confirmed_at: str


class Proof(_Answer):
    """An entry's place in the log, and the hashes that lead from its leaf hash to the anchor's root (RFC 6962)."""

    index: int
    size: int
    hashes: list[str]
    anchor: AnchorAnswer


class MatchAnswer(_Answer):
    """An entry in which the hash occurs, as its leaf hash or as that of its input or output."""

    task_id: str
    seq: int
    role: Role
    entry_text: str | None
    leaf: str | None
    prev: str | None
    log_status: LogStatus
    qubic_txid: str | None
    proof: Proof | None
    checks: dict[str, bool] = Field(description="; ".join(f"{name}: {meaning}" for name, meaning in CHECKS.items()))
    failed: list[str]
    reason: str | None = Field(description="what is wrong with the chain")


class Evidence(_Answer):
    """The newest entries in which the hash occurs; `more`: there are others.

    Found in indexes, which are a moment behind: an entry that was recorded within the last seconds may be missing. It
    is not anchored yet, so it would not be verified either. Each check is made of the entry and the log themselves.
    """

    matches: list[MatchAnswer]
    more: bool


class VerifyAnswer(_Answer):
    """`verified`: the hash occurs, and every check of every match holds; so, never before it is anchored."""

    hash: str
    verified: bool
    evidence: Evidence
    network: str
    statement: str


class Checkpoint(_Answer):
    """The newest size of the log that the ledger has confirmed; `note` is the same, signed, for clients of logs."""

    log_id: str
    anchor: AnchorAnswer
    note: str
    verifier_key: str = Field(description="verifies `note`; to be had from elsewhere by who does not trust this server")
    statement: str


class Consistency(_Answer):
    """The hashes that prove that the log of one size begins with all of the log of the other (RFC 6962, 2.1.2)."""

    log_id: str
    first: int
    second: int
    proof: list[str]


def _tables_answer() -> None:
    AuditStore().describe()
    Log().describe()
    Log().anchors.describe()


def _ledger_answers() -> None:
    LedgerClient().health()


add_health(app, "/audit/health", {"tables": _tables_answer, "ledger": _ledger_answers})


@app.get("/audit/verify/{hash}")
def verify(sent: Sha256, who: Reader) -> VerifyAnswer:
    """Where a hash occurs in the trails that the caller may see, and what proves it."""
    hash_ = sent.lower()
    if len(hash_) != 64 or not set(hash_) <= set("0123456789abcdef"):
        raise InvalidInputError("a hash is 64 hexadecimal digits", field="hash")
    network = settings.text("QUBIC_NETWORK")
    matches, more = find_matches(
        hash_,
        store=AuditStore(),
        log=Log(),
        ledger=LedgerClient(),
        log_id=settings.text("LOG_ID"),
        visible=lambda task_id: _may_see(who, task_id),
    )
    return VerifyAnswer(
        hash=hash_,
        verified=bool(matches) and all(match.verified for match in matches),
        evidence=Evidence(matches=[_match(each) for each in matches], more=more),
        network=network,
        statement=STATEMENT[network],
    )


@app.get("/audit/log/checkpoint")
def get_log_checkpoint(_who: Reader) -> Checkpoint:
    """The newest checkpoint of the log that is anchored on the ledger."""
    newest = Log().anchors.newest()
    if newest is None:
        raise NotFoundError("no checkpoint of the log has been anchored yet")
    return Checkpoint(
        log_id=settings.text("LOG_ID"),
        anchor=_anchor_answer(newest),
        note=newest.note,
        verifier_key=newest.verifier_key,
        statement=STATEMENT[newest.network],
    )


@app.get("/audit/log/consistency")
def get_log_consistency(
    _who: Reader,
    first: Annotated[int, Query(alias="from", ge=1, le=MAX_SIZE, description="the smaller size of the log")],
    second: Annotated[int, Query(alias="to", ge=1, le=MAX_SIZE, description="the larger size")],
) -> Consistency:
    """What proves that the log has only grown between two sizes."""
    if first > second:
        raise InvalidInputError("the log of one size cannot begin with a larger one", field="from")
    log = Log()
    if second > log.head().integrated:
        raise NotFoundError("the log has not that size yet", field="to")
    proof = consistency_proof(first, second, log.tile)
    return Consistency(log_id=settings.text("LOG_ID"), first=first, second=second, proof=[each.hex() for each in proof])


@app.get("/audit/{task_id}/bundle")
def get_bundle(task_id: TaskId, who: BundleReader) -> Bundle:
    """All that the offline verifier needs: entries, what their hashes are over, proofs, the anchor, the policy.

    413 when it is larger than an answer may be. The trail can be read by pages even so, but they have neither what the
    hashes are over nor proofs: such a task cannot be checked offline.
    """
    if not is_task_id(task_id):
        raise NotFoundError("no such task", field="task_id")
    task = TaskStore().get_task(task_id)
    if not who.has("auditor") and task.requester != who.subject:
        raise NotFoundError("no such task", field="task_id")
    log = Log()
    anchor = log.anchors.newest()
    entries = _disclosed(task_id, log)
    if not entries:
        raise NotFoundError("nothing of the task is on record yet", field="task_id")
    tile = cache(log.tile)
    bundle = build_bundle(
        log_id=settings.text("LOG_ID"),
        network=_network(anchor),
        task_id=task_id,
        salt=task.salt,
        entries=entries,
        anchored=anchor.encoded if anchor else None,
        prove=lambda index, size: inclusion_proof(index, size, tile),
        policies=_policies(entries),
    )
    found = Bundle.model_validate(bundle)
    if len(json.dumps(found.model_dump_json())) > MAX_ANSWER_BYTES:
        raise HTTPException(
            413,
            f"The bundle is larger than an answer may be. GET /audit/{task_id}?limit=100 has the entries by pages, "
            "without what their hashes are over and without proofs: the task cannot be checked offline.",
        )
    return found


@app.get("/audit/{task_id}")
def get_audit(
    task_id: TaskId,
    who: Reader,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
    cursor: Annotated[
        str | None,
        Query(
            max_length=6,
            description="`next_cursor` of the page before",
            json_schema_extra={"pattern": "^[1-9][0-9]{0,5}$"},
        ),
    ] = None,
) -> AuditAnswer:
    """The trail of a task, and whether it holds."""
    if cursor is not None and not re.fullmatch(r"[1-9][0-9]{0,5}", cursor, re.ASCII):
        raise InvalidInputError("not a cursor of this trail", field="cursor")
    if not is_task_id(task_id):
        raise NotFoundError("no such task", field="task_id")
    if not _may_see(who, task_id):
        raise NotFoundError("no such task", field="task_id")
    trail = read_trail(AuditStore(), Log(), task_id, log_id=settings.text("LOG_ID"))
    if not trail.entries and not trail.indexes:
        TaskStore().get_task(task_id)  # nothing on record: not yet, or there is no such task
    newest = trail.anchors[max(trail.anchors)] if trail.anchors else None
    agents = Outbox().agents(task_id)
    # A cursor is the number of the page's last entry: entries are only added, so no page changes.
    left = [entry for entry in trail.entries if entry.seq > int(cursor or 0)]
    page = left[:limit]
    return AuditAnswer(
        task_id=task_id,
        logs=[_log(task_id, entry, trail, agents.get(entry.seq)) for entry in page],
        next_cursor=str(page[-1].seq) if len(left) > limit else None,
        qubic_txid=newest.txid if newest else None,
        chain=_chain(trail),
        network=_network(newest),
        statement=STATEMENT[_network(newest)],
    )


# The log for clients of transparency logs (C2SP tlog-tiles). The local AWS knows no parameter for several segments of a
# path: the routes are listed, as deep as 256 * 10^6 entries need, and 10^9 but for the last tile.


class TileResponse(Response):
    """Hashes or entries, one after the other."""

    media_type = "application/octet-stream"


_OCTETS: dict[int | str, dict[str, Any]] = {
    200: {"content": {TileResponse.media_type: {"schema": {"type": "string", "format": "binary"}}}}
}
Group = Annotated[str, Path(max_length=8, description="of the tile's number, as `x001`, `067` or `067.p`; or a width")]
Level = Annotated[str, Path(max_length=2, description="of the tile, from 0")]


@app.get("/log/checkpoint", response_class=PlainTextResponse)
def get_signed_checkpoint(_who: Reader) -> str:
    """The newest anchored checkpoint as a signed note (C2SP tlog-checkpoint)."""
    return tlog.checkpoint(Log())


@app.get("/log/tile/entries/{a}", response_class=TileResponse, responses=_OCTETS)
def get_entries(_who: Auditor, request: Request, a: Group) -> Response:
    """The texts of 256 entries, each after its length in two bytes (C2SP tlog-tiles).

    Ask for it with `Accept: application/octet-stream`; otherwise API Gateway sends base64.
    """
    return _entries(request, (a,))


@app.get("/log/tile/entries/{a}/{b}", response_class=TileResponse, responses=_OCTETS)
def get_entries_2(_who: Auditor, request: Request, a: Group, b: Group) -> Response:
    """The same, of a tile from number 1000 on, or of the log's last tile: `/log/tile/entries/000.p/7`."""
    return _entries(request, (a, b))


@app.get("/log/tile/entries/{a}/{b}/{c}", response_class=TileResponse, include_in_schema=False)
def get_entries_3(_who: Auditor, request: Request, a: Group, b: Group, c: Group) -> Response:
    """The same, deeper."""
    return _entries(request, (a, b, c))


@app.get("/log/tile/entries/{a}/{b}/{c}/{d}", response_class=TileResponse, include_in_schema=False)
def get_entries_4(_who: Auditor, request: Request, a: Group, b: Group, c: Group, d: Group) -> Response:
    """The same, deeper."""
    return _entries(request, (a, b, c, d))


@app.get("/log/tile/{level}/{a}", response_class=TileResponse, responses=_OCTETS)
def get_tile(_who: Reader, level: Level, a: Group) -> Response:
    """256 hashes of 32 bytes (C2SP tlog-tiles).

    Ask for it with `Accept: application/octet-stream`; otherwise API Gateway sends base64.
    """
    return _tile(tlog.hash_tile(Log(), level, (a,)))


@app.get("/log/tile/{level}/{a}/{b}", response_class=TileResponse, responses=_OCTETS)
def get_tile_2(_who: Reader, level: Level, a: Group, b: Group) -> Response:
    """The same, of a tile from number 1000 on, or of a tile that is not full: `/log/tile/0/000.p/7`."""
    return _tile(tlog.hash_tile(Log(), level, (a, b)))


@app.get("/log/tile/{level}/{a}/{b}/{c}", response_class=TileResponse, include_in_schema=False)
def get_tile_3(_who: Reader, level: Level, a: Group, b: Group, c: Group) -> Response:
    """The same, deeper."""
    return _tile(tlog.hash_tile(Log(), level, (a, b, c)))


@app.get("/log/tile/{level}/{a}/{b}/{c}/{d}", response_class=TileResponse, include_in_schema=False)
def get_tile_4(_who: Reader, level: Level, a: Group, b: Group, c: Group, d: Group) -> Response:
    """The same, deeper."""
    return _tile(tlog.hash_tile(Log(), level, (a, b, c, d)))


handler = make_handler(app)


def _tile(content: bytes) -> Response:
    """What cannot change; who has a token for it keeps it for themselves."""
    return TileResponse(content, headers={"cache-control": f"private, {tlog.IMMUTABLE}"})


def _entries(request: Request, groups: tuple[str, ...]) -> Response:
    answer = _tile(tlog.entries_tile(Log(), AuditStore(), groups))
    answer.headers["vary"] = "Accept-Encoding"
    # Only to a client that gets bytes at all: API Gateway would call base64 text gzip.
    takes_bytes = request.headers.get("accept", "").partition(",")[0].partition(";")[0].strip() == answer.media_type
    if takes_bytes and takes_gzip(request.headers.get("accept-encoding", "")):
        answer.body = gzip.compress(bytes(answer.body), 6, mtime=0)
        answer.headers["content-encoding"] = "gzip"
        answer.headers["content-length"] = str(len(answer.body))
    return answer


def takes_gzip(accept_encoding: str) -> bool:
    """Whether an Accept-Encoding names gzip, or everything, without forbidding it (RFC 9110, 12.5.3)."""
    weights = {}
    for each in accept_encoding.lower().split(","):
        coding, _, parameter = each.partition(";")
        weights[coding.strip()] = parameter.replace(" ", "")
    weight = weights.get("gzip", weights.get("*"))
    return weight is not None and re.fullmatch(r"q=0(\.0{0,3})?", weight) is None


def _may_see(who: Caller, task_id: str) -> bool:
    if who.has(*READERS):
        return True
    try:
        return TaskStore().get_task(task_id).requester == who.subject
    except NotFoundError:
        return False


def _network(anchor: Anchor | None) -> Literal["mock", "mainnet"]:
    """The network of an anchor; before there is one, that on which it will be."""
    network = anchor.network if anchor else settings.text("QUBIC_NETWORK")
    return "mainnet" if network == "mainnet" else "mock"


def _disclosed(task_id: str, log: Log) -> list[TrailEntry]:
    """The entries of a task, each with what its hashes are over."""
    indexes = log.task_indexes(task_id)
    events = Outbox().disclosed(task_id)
    entries: list[TrailEntry] = []
    for stored in AuditStore().entries(task_id):
        event, indexed = events.get(stored.seq), indexes.get(stored.seq)
        entries.append(
            TrailEntry(
                text=stored.text,
                input=event.input if event else "",
                output=event.output if event else "",
                index=indexed.index if indexed else None,
            )
        )
    return entries


def _policies(entries: list[TrailEntry]) -> list[str]:
    """The texts of the policies that a trail refers to; one that is not there is for the verifier to miss."""
    try:
        ids = policy_ids(entries)
    except (ValueError, KeyError, TypeError):
        return []  # an entry was altered: the verifier says which
    found: list[str] = []
    for policy_id in sorted(ids):
        try:
            found.append(str(LedgerClient().policy_document(policy_id)["text"]))
        except RefusedError as error:
            logger().warning("no policy document", extra={"policy_id": policy_id, "code": error.code})
    return found


def _anchor_answer(anchor: Anchor) -> AnchorAnswer:
    return AnchorAnswer(
        sequence=anchor.sequence,
        size=anchor.size,
        root=anchor.root.hex(),
        payload=anchor.payload.hex(),
        transaction=base64.b64encode(anchor.encoded).decode(),
        txid=anchor.txid,
        tick=anchor.tick,
        source=anchor.source,
        network=anchor.network,
        confirmed_at=anchor.confirmed_at,
    )


def _proof(match: Match) -> Proof | None:
    if match.anchor is None or match.index is None or match.proof is None:
        return None
    return Proof(
        index=match.index,
        size=match.anchor.size,
        hashes=[each.hex() for each in match.proof],
        anchor=_anchor_answer(match.anchor),
    )


def _chain(trail: Trail) -> ChainState:
    broken = trail.broken
    return ChainState(
        verified=broken is None,
        entries=len(trail.entries),
        sequenced=len(trail.indexes),
        anchored=len(trail.anchors),
        head=trail.entries[-1].leaf if trail.entries else None,
        broken=Broken(seq=broken.seq, check=broken.check, message=broken.message) if broken else None,
    )


def _log(task_id: TaskId, stored: StoredEntry, trail: Trail, agent: str | None) -> LogEntry:
    said = stored.parsed()
    indexed, anchor = trail.indexes.get(stored.seq), trail.anchors.get(stored.seq)
    return LogEntry(
        id=f"{task_id}:{stored.seq}",
        seq=stored.seq,
        kind=said.kind if said else UNREADABLE,
        actor=said.actor if said else "",
        agent=agent,
        step_index=said.step_index if said else -1,
        step_type=said.step_type if said else UNREADABLE,
        input_hash=said.input_hash if said else "",
        output_hash=said.output_hash if said else "",
        status=said.status if said else UNREADABLE,
        timestamp=said.timestamp if said else "",
        log_status=trail.status(stored.seq),
        index=indexed.index if indexed else None,
        qubic_txid=anchor.txid if anchor else None,
        leaf=stored.leaf,
        prev=said.prev if said else "",
        entry_text=stored.text,
    )


def _match(match: Match) -> MatchAnswer:
    return MatchAnswer(
        task_id=match.occurrence.task_id,
        seq=match.occurrence.seq,
        role=match.occurrence.role,
        entry_text=match.entry.text if match.entry else None,
        leaf=match.entry.leaf if match.entry else None,
        prev=match.parsed.prev if match.parsed else None,
        log_status=match.status,
        qubic_txid=match.anchor.txid if match.anchor else None,
        proof=_proof(match),
        checks=match.checks,
        failed=[name for name, held in match.checks.items() if not held],
        reason=match.reason,
    )
