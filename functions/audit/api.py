"""HTTP API of the audit service: a task's trail and bundle, the proof of an entry, and the log. It is read-only."""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Annotated, Literal

from fastapi import Depends, Query
from starlette.exceptions import HTTPException

from audit import tile_routes
from audit.anchors import Anchor
from audit.evidence import find_matches, read_trail
from audit.log import Log
from audit.policy_stream import policy_entries
from audit.schemas import (
    AuditAnswer,
    Checkpoint,
    Consistency,
    Evidence,
    VerifyAnswer,
    anchor_answer,
    chain_state,
    log_entry,
    match_answer,
)
from audit.store import AuditStore, Outbox
from audit.tile_routes import READERS, Reader
from qaes.adapters import settings
from qaes.adapters.health import add_health
from qaes.adapters.http import Caller, Sha256, TaskId, create_app, make_handler, require
from qaes.adapters.ledger_client import LedgerClient
from qaes.adapters.logs import logger
from qaes.adapters.task_repository import TaskStore
from qaes.domain.bundle import Bundle, BundleWithPolicy, TrailEntry, build_bundle, policy_ids
from qaes.domain.errors import InvalidInputError, NotFoundError, PermanentError
from qaes.domain.ids import is_task_id
from qaes.domain.tiles import consistency_proof, inclusion_proof

MAX_SIZE = 2**53 - 1
MAX_PAGE = 1000
"""Maximum number of entries in one page of a trail: about 1.5 MB."""
MAX_ANSWER_BYTES = 5_500_000
"""Maximum size of a response. Lambda sends at most 6 MB, and escapes the quotes and line breaks of a text again."""
STATEMENT = {
    "mainnet": "Any node of the Qubic network can confirm these transactions independently of this system.",
    "mock": "The operator of this system runs the mock ledger: its transactions prove nothing to an outsider.",
}

BundleReader = Annotated[Caller, Depends(require("requester", "auditor"))]
"""A bundle reveals the content behind the hashes: only the task's requester, auditors and operators can read it."""

app = create_app("audit")


def _tables_answer() -> None:
    AuditStore().describe()
    Log().describe()
    Log().anchors.describe()


def _ledger_answers() -> None:
    LedgerClient().health()


add_health(app, "/audit/health", {"tables": _tables_answer, "ledger": _ledger_answers})


@app.get("/audit/verify/{hash}")
def verify(sent: Sha256, who: Reader) -> VerifyAnswer:
    """Find a hash in the trails that the caller can see, and return the proof of each match."""
    hash_ = sent.lower()
    if len(hash_) != 64 or not set(hash_) <= set("0123456789abcdef"):
        raise InvalidInputError("`hash` must have 64 hexadecimal digits", field="hash")
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
        evidence=Evidence(matches=[match_answer(each) for each in matches], more=more),
        network=network,
        statement=STATEMENT[network],
    )


@app.get("/audit/log/checkpoint")
def get_log_checkpoint(_who: Reader) -> Checkpoint:
    """Return the newest checkpoint of the log that is anchored on the ledger."""
    newest = Log().anchors.newest()
    if newest is None:
        raise NotFoundError("the log has no anchored checkpoint yet; try again later")
    return Checkpoint(
        log_id=settings.text("LOG_ID"),
        anchor=anchor_answer(newest),
        note=newest.note,
        verifier_key=newest.verifier_key,
        statement=STATEMENT[newest.network],
    )


@app.get("/audit/log/consistency")
def get_log_consistency(
    _who: Reader,
    first: Annotated[int, Query(alias="from", ge=1, le=MAX_SIZE, description="smaller size of the log")],
    second: Annotated[int, Query(alias="to", ge=1, le=MAX_SIZE, description="larger size of the log")],
) -> Consistency:
    """Return the proof that the log only grew between two sizes."""
    if first > second:
        raise InvalidInputError("`from` must not be larger than `to`", field="from")
    log = Log()
    if second > log.head().integrated:
        raise NotFoundError("the log is smaller than `to`", field="to")
    proof = consistency_proof(first, second, log.tile)
    return Consistency(log_id=settings.text("LOG_ID"), first=first, second=second, proof=[each.hex() for each in proof])


@app.get("/audit/{task_id}/bundle")
def get_bundle(task_id: TaskId, who: BundleReader) -> Bundle | BundleWithPolicy:
    """Return the input of the offline verifier: entries, the content behind their hashes, proofs, anchor and policy.

    A bundle with entries of the policy's stream (proposals, approvals, suspensions) has format 2.

    The status is 413 if the bundle is larger than a response can be. The pages of the trail still return the
    entries, but without the content behind their hashes and without proofs: such a task cannot be checked offline.
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
        raise NotFoundError("the task has no audit entries yet; try again later", field="task_id")
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
        policy_entries=policy_entries(entries, log, AuditStore()),
    )
    found = (BundleWithPolicy if "policy_entries" in bundle else Bundle).model_validate(bundle)
    if len(json.dumps(found.model_dump_json())) > MAX_ANSWER_BYTES:
        raise HTTPException(
            413,
            f"The bundle is larger than a response can be. GET /audit/{task_id}?limit=100 returns the entries in "
            "pages, without the content behind their hashes and without proofs: the task cannot be checked offline.",
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
            description="`next_cursor` of the previous page",
            json_schema_extra={"pattern": "^[1-9][0-9]{0,5}$"},
        ),
    ] = None,
) -> AuditAnswer:
    """Return the trail of a task, and whether its chain of hashes holds."""
    if cursor is not None and not re.fullmatch(r"[1-9][0-9]{0,5}", cursor, re.ASCII):
        raise InvalidInputError("`cursor` is not a `next_cursor` of this trail", field="cursor")
    if not is_task_id(task_id):
        raise NotFoundError("no such task", field="task_id")
    if not _may_see(who, task_id):
        raise NotFoundError("no such task", field="task_id")
    trail = read_trail(AuditStore(), Log(), task_id, log_id=settings.text("LOG_ID"))
    if not trail.entries and not trail.indexes:
        TaskStore().get_task(task_id)  # raises NotFoundError if the task does not exist
    newest = trail.anchors[max(trail.anchors)] if trail.anchors else None
    agents = Outbox().agents(task_id)
    # A cursor is the number of the page's last entry: entries are only added, so a page never changes.
    left = [entry for entry in trail.entries if entry.seq > int(cursor or 0)]
    page = left[:limit]
    return AuditAnswer(
        task_id=task_id,
        logs=[log_entry(task_id, entry, trail, agents.get(entry.seq)) for entry in page],
        next_cursor=str(page[-1].seq) if len(left) > limit else None,
        qubic_txid=newest.txid if newest else None,
        chain=chain_state(trail),
        network=_network(newest),
        statement=STATEMENT[_network(newest)],
    )


app.router.routes.extend(tile_routes.router.routes)  # as routes of this app, so that its checks see each of them
handler = make_handler(app)


def _may_see(who: Caller, task_id: str) -> bool:
    if who.has(*READERS):
        return True
    try:
        return TaskStore().get_task(task_id).requester == who.subject
    except NotFoundError:
        return False


def _network(anchor: Anchor | None) -> Literal["mock", "mainnet"]:
    """Return the network of an anchor, or the network of the next anchor if there is no anchor yet."""
    network = anchor.network if anchor else settings.text("QUBIC_NETWORK")
    return "mainnet" if network == "mainnet" else "mock"


def _disclosed(task_id: str, log: Log) -> list[TrailEntry]:
    """Return the entries of a task, each with the content behind its hashes."""
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
    """Return the texts of the policies that a trail refers to. The verifier reports a missing text."""
    try:
        ids = policy_ids(entries)
    except (ValueError, KeyError, TypeError):
        return []  # an entry was altered: the verifier names it
    found: list[str] = []
    for policy_id in sorted(ids):
        try:
            found.append(str(LedgerClient().policy_document(policy_id)["text"]))
        except PermanentError as error:
            logger().warning("no policy document", extra={"policy_id": policy_id, "code": error.code})
    return found
