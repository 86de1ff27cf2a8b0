"""Responses of the audit API."""

from __future__ import annotations

import base64

from pydantic import BaseModel, ConfigDict, Field

from audit.anchors import Anchor
from audit.evidence import CHECKS, LogStatus, Match, Trail
from audit.store import HashRole, StoredEntry
from qaes.domain.audit import Check
from qaes.domain.ids import is_task_id

UNREADABLE = "unreadable"
"""Placeholder for a value that cannot be read, because the text of the entry was altered."""


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class LogEntry(_Answer):
    """An audit entry. `leaf` is the hash of `entry_text`, `prev` the previous entry's; `step_index` -1 means no step.

    `log_status` is the entry's progress: recorded (in the table), sequenced (it has a place in the log), anchoring
    (an anchor that covers it is in flight), anchored (the ledger has confirmed an anchor that covers it).
    """

    id: str
    seq: int
    kind: str
    actor: str
    agent: str | None = Field(description="client id of the agent that acted for `actor`; null if a person acted")
    step_index: int
    step_type: str
    input_hash: str
    output_hash: str
    status: str
    timestamp: str
    log_status: LogStatus
    index: int | None = Field(description="place of the entry in the log, from 0")
    qubic_txid: str | None = Field(description="transaction of the first confirmed anchor that covers the entry")
    leaf: str
    prev: str
    entry_text: str


class Broken(_Answer):
    """The first entry that does not hold, and the reason."""

    seq: int
    check: Check
    message: str


class ChainState(_Answer):
    """Whether every entry has its hash and names the previous one, without gaps; `head` is the newest leaf hash."""

    verified: bool
    entries: int
    sequenced: int
    anchored: int
    head: str | None
    broken: Broken | None


class AuditAnswer(_Answer):
    """A page of a task's trail, oldest entry first; `next_cursor` is null on the last page.

    `qubic_txid` (the newest transaction) and `chain` cover the whole trail.
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
    source: str = Field(description="identity that signed the transaction")
    network: str
    confirmed_at: str


class Proof(_Answer):
    """An entry's place in the log, and the hashes that lead from its leaf hash to the anchor's root (RFC 6962)."""

    index: int
    size: int
    hashes: list[str]
    anchor: AnchorAnswer


class MatchAnswer(_Answer):
    """An entry in which the hash occurs: as its leaf hash, or as the hash of its input or output."""

    task_id: str | None = Field(description="null: the entry is about no task")
    stream: str = Field(description="the task's id, or `policy`")
    seq: int
    role: HashRole
    entry_text: str | None
    leaf: str | None
    prev: str | None
    log_status: LogStatus
    qubic_txid: str | None
    proof: Proof | None
    checks: dict[str, bool] = Field(description="; ".join(f"{name}: {meaning}" for name, meaning in CHECKS.items()))
    failed: list[str]
    reason: str | None = Field(description="reason why the chain does not hold; null if it holds")


class Evidence(_Answer):
    """The newest entries in which the hash occurs; `more` is true if there are others.

    The indexes are eventually consistent: an entry of the last few seconds may be missing. Such an entry is not
    anchored yet, so it could not be verified. Each check reads the entry and the log themselves.
    """

    matches: list[MatchAnswer]
    more: bool


class VerifyAnswer(_Answer):
    """`verified` is true if the hash occurs and every check of every match holds, so only after anchoring."""

    hash: str
    verified: bool
    evidence: Evidence
    network: str
    statement: str


class Checkpoint(_Answer):
    """The newest size of the log that the ledger has confirmed; `note` is the signed checkpoint for log clients."""

    log_id: str
    anchor: AnchorAnswer
    note: str
    verifier_key: str = Field(description="key that verifies `note`; get it from a source that you trust")
    statement: str


class Consistency(_Answer):
    """Hashes that prove that the larger log begins with the whole smaller log (RFC 6962, 2.1.2)."""

    log_id: str
    first: int
    second: int
    proof: list[str]


def anchor_answer(anchor: Anchor) -> AnchorAnswer:
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
        anchor=anchor_answer(match.anchor),
    )


def chain_state(trail: Trail) -> ChainState:
    broken = trail.broken
    return ChainState(
        verified=broken is None,
        entries=len(trail.entries),
        sequenced=len(trail.indexes),
        anchored=len(trail.anchors),
        head=trail.entries[-1].leaf if trail.entries else None,
        broken=Broken(seq=broken.seq, check=broken.check, message=broken.message) if broken else None,
    )


def log_entry(task_id: str, stored: StoredEntry, trail: Trail, agent: str | None) -> LogEntry:
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


def match_answer(match: Match) -> MatchAnswer:
    return MatchAnswer(
        task_id=match.occurrence.task_id if is_task_id(match.occurrence.task_id) else None,
        stream=match.occurrence.task_id,
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
