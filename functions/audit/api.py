"""The audit service over HTTP: a task's trail, and what proves an entry. It reads; the recorder alone writes."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends
from pydantic import BaseModel, ConfigDict, Field

from audit.evidence import CHECKS, Match, Trail, find_matches, read_trail
from audit.store import Anchor, AuditStore, Role, StoredEntry
from qaes.adapters import settings
from qaes.adapters.http import Caller, Sha256, TaskId, add_health, create_app, make_handler, require
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.task_store import TaskStore
from qaes.domain.audit import Check
from qaes.domain.errors import InvalidInputError, NotFoundError
from qaes.domain.ids import is_task_id

READERS = ("auditor", "approver", "operator")
"""Roles that may read every task's trail; a requester reads that of their own tasks."""
UNREADABLE = "unreadable"
"""Stands for what the text of an entry no longer says, because it was altered."""
STATEMENT = {
    "mock": "The mock ledger is run by the operator of this system: its transactions prove nothing to an outsider.",
}

Reader = Annotated[Caller, Depends(require("requester", *READERS))]

app = create_app("audit")


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LogEntry(_Answer):
    """An audit entry. `leaf` is the hash of `entry_text`, `prev` that of the entry before; `step_index` -1: no step."""

    id: str
    seq: int
    kind: str
    actor: str
    step_index: int
    step_type: str
    input_hash: str
    output_hash: str
    status: str
    timestamp: str
    qubic_txid: str | None = Field(description="the ledger's transaction that carries the leaf hash")
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
    anchored: int
    head: str | None
    broken: Broken | None


class AuditAnswer(_Answer):
    """A task's trail, oldest entry first; `qubic_txid` is the newest transaction."""

    task_id: str
    logs: list[LogEntry]
    qubic_txid: str | None
    chain: ChainState
    network: str
    statement: str


class MatchAnswer(_Answer):
    """An entry in which the hash occurs, as its leaf hash or as that of its input or output."""

    task_id: str
    seq: int
    role: Role
    entry_text: str | None
    leaf: str | None
    prev: str | None
    qubic_txid: str | None
    checks: dict[str, bool] = Field(description="; ".join(f"{name}: {meaning}" for name, meaning in CHECKS.items()))
    failed: list[str]
    reason: str | None = Field(description="what is wrong with the chain")


class Evidence(_Answer):
    """The newest entries in which the hash occurs; `more`: there are others."""

    matches: list[MatchAnswer]
    more: bool


class VerifyAnswer(_Answer):
    """`verified`: the hash occurs, and every check of every match holds."""

    hash: str
    verified: bool
    evidence: Evidence
    network: str
    statement: str


def _tables_answer() -> None:
    AuditStore().describe()


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


@app.get("/audit/{task_id}")
def get_audit(task_id: TaskId, who: Reader) -> AuditAnswer:
    """The trail of a task, and whether it holds."""
    if not is_task_id(task_id):
        raise NotFoundError("no such task", field="task_id")
    if not _may_see(who, task_id):
        raise NotFoundError("no such task", field="task_id")
    trail = read_trail(AuditStore(), task_id, log_id=settings.text("LOG_ID"))
    if not trail.entries and not trail.anchors:
        TaskStore().get_task(task_id)  # nothing on record: not yet, or there is no such task
    network = settings.text("QUBIC_NETWORK")
    newest = trail.anchors[max(trail.anchors)].txid if trail.anchors else None
    return AuditAnswer(
        task_id=task_id,
        logs=[_log(task_id, entry, trail.anchors.get(entry.seq)) for entry in trail.entries],
        qubic_txid=newest,
        chain=_chain(trail),
        network=network,
        statement=STATEMENT[network],
    )


handler = make_handler(app)


def _may_see(who: Caller, task_id: str) -> bool:
    if who.has(*READERS):
        return True
    try:
        return TaskStore().get_task(task_id).requester == who.subject
    except NotFoundError:
        return False


def _chain(trail: Trail) -> ChainState:
    broken = trail.broken
    return ChainState(
        verified=broken is None,
        entries=len(trail.entries),
        anchored=len(trail.anchors),
        head=trail.entries[-1].leaf if trail.entries else None,
        broken=Broken(seq=broken.seq, check=broken.check, message=broken.message) if broken else None,
    )


def _log(task_id: TaskId, stored: StoredEntry, anchor: Anchor | None) -> LogEntry:
    said = stored.parsed()
    return LogEntry(
        id=f"{task_id}:{stored.seq}",
        seq=stored.seq,
        kind=said.kind if said else UNREADABLE,
        actor=said.actor if said else "",
        step_index=said.step_index if said else -1,
        step_type=said.step_type if said else UNREADABLE,
        input_hash=said.input_hash if said else "",
        output_hash=said.output_hash if said else "",
        status=said.status if said else UNREADABLE,
        timestamp=said.timestamp if said else "",
        qubic_txid=anchor.txid if anchor else None,
        leaf=stored.leaf,
        prev=said.prev if said else "",
        entry_text=stored.text,
    )


def _match(match: Match) -> MatchAnswer:
    return MatchAnswer(
        task_id=match.pointer.task_id,
        seq=match.pointer.seq,
        role=match.pointer.role,
        entry_text=match.entry.text if match.entry else None,
        leaf=match.entry.leaf if match.entry else None,
        prev=match.parsed.prev if match.parsed else None,
        qubic_txid=match.anchor.txid if match.anchor else None,
        checks=match.checks,
        failed=[name for name, held in match.checks.items() if not held],
        reason=match.reason,
    )
