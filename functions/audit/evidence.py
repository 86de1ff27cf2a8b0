"""Evidence for an entry: its text, its place in the chain and in the log, and its anchor. Each check has a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

from audit.anchors import Anchor, Anchoring
from audit.log import CorruptLogError, Indexed, Log
from audit.store import AuditStore, Occurrence, StoredEntry
from qaes.adapters.ledger_client import LedgerClient
from qaes.domain.anchor import AnchorPayload, decode, failed_checks, log_id_bytes
from qaes.domain.audit import AuditEntry, BrokenChainError, verify_chain
from qaes.domain.errors import PermanentError
from qaes.domain.merkle import ProofError, leaf_digest, leaf_hash, verify_inclusion
from qaes.domain.qubic import transaction
from qaes.domain.tiles import inclusion_proof

LogStatus = Literal["recorded", "sequenced", "anchoring", "anchored"]
"""Progress of an entry: stored in the table; sequenced with a place in the log; covered by an anchor in flight;
covered by a confirmed anchor."""

MATCHES = 10
"""Maximum number of matches in a response. Each match costs the reading of a chain and of a proof."""
LOOKED_AT = 200
"""Maximum number of occurrences that are read in the search for those that the caller can see."""
CHECKS = {
    "recorded": "the entry is in the table",
    "occurs": "the hash is the entry's leaf hash, or its text has it as the hash of its input or output",
    "leaf": "the entry's text has its leaf hash",
    "chain": "each entry from the task's first to this one names the entry before it",
    "sequenced": "the log has a place for the entry, under this leaf hash",
    "included": "the inclusion proof leads from the entry's text, at its place, to the anchored root",
    "payload": "the anchor's transaction carries this log's size and root, and nothing else",
    "signature": "the transaction has this id, and its source has signed it",
    "ledger": "the ledger has confirmed this transaction for this anchor, on this network",
}
"""Checks of a match."""


@dataclass(frozen=True)
class Trail:
    """A task's stored entries, and their places in the log.

    Attributes
    ----------
    entries
        In order of their numbers.
    indexes, anchors
        By the entry's number; the anchor is the first confirmed one that covers the entry.
    in_flight
        The anchor that is pending, if there is one.
    broken
        The first broken link of the chain, or None.
    """

    entries: tuple[StoredEntry, ...]
    indexes: dict[int, Indexed]
    anchors: dict[int, Anchor]
    in_flight: Anchoring | None
    broken: BrokenChainError | None

    def holds_up_to(self, seq: int) -> bool:
        """Return whether the chain holds from the first entry to this one."""
        return seq <= len(self.entries) and (self.broken is None or self.broken.seq > seq)

    def entry(self, seq: int) -> StoredEntry | None:
        return next((entry for entry in self.entries if entry.seq == seq), None)

    def status(self, seq: int) -> LogStatus:
        """Return the progress of an entry."""
        if seq not in self.indexes:
            return "recorded"
        if seq in self.anchors:
            return "anchored"
        covered = self.in_flight is not None and self.indexes[seq].index < self.in_flight.size
        return "anchoring" if covered else "sequenced"


@dataclass(frozen=True)
class Match:
    """An entry in which a hash occurs, with its proof; `checks` has the result of each check."""

    occurrence: Occurrence
    entry: StoredEntry | None
    parsed: AuditEntry | None
    index: int | None
    anchor: Anchor | None
    proof: list[bytes] | None
    status: LogStatus
    checks: dict[str, bool]
    reason: str | None

    @property
    def verified(self) -> bool:
        return all(self.checks.values())


def read_trail(store: AuditStore, log: Log, task_id: str, *, log_id: str) -> Trail:
    """Read a task's trail and check it. An empty trail holds."""
    # Read the indexes first: an entry is written before its index, so an index without an entry means a deleted entry.
    indexes = log.task_indexes(task_id)
    entries = tuple(store.entries(task_id))
    newest = log.anchors.anchoring() if indexes else None
    in_flight = newest if newest is not None and newest.state == "pending" else None
    return Trail(
        entries, indexes, _anchors(log, indexes), in_flight, _broken(entries, indexes, log_id=log_id, task_id=task_id)
    )


def _anchors(log: Log, indexes: dict[int, Indexed]) -> dict[int, Anchor]:
    """Find the first anchor over each entry. A task's entries are close together, and most share an anchor."""
    found: dict[int, Anchor] = {}
    anchor: Anchor | None = None
    for each in sorted(indexes.values(), key=lambda indexed: indexed.index):
        if anchor is None or each.index >= anchor.size:
            anchor = log.anchors.of(each.index)
            if anchor is None:
                break
        found[each.seq] = anchor
    return found


def find_matches(
    hash_: str,
    *,
    store: AuditStore,
    log: Log,
    ledger: LedgerClient,
    log_id: str,
    visible: Callable[[str], bool],
) -> tuple[list[Match], bool]:
    """Find the newest entries with this hash in the `visible` tasks, and check each.

    Returns the matches, and whether there are more. Raises TransientError if the ledger does not respond, because
    a match without the ledger's check would look false.
    """
    may_see = cache(visible)
    found: list[Occurrence] = []
    more = False
    for looked_at, occurrence in enumerate(store.occurrences(hash_)):
        more = len(found) == MATCHES or looked_at == LOOKED_AT
        if more:
            break
        if may_see(occurrence.task_id):
            found.append(occurrence)
    trails = {task_id: read_trail(store, log, task_id, log_id=log_id) for task_id in {each.task_id for each in found}}
    check_anchor = cache(lambda anchor: _check_anchor(anchor, ledger, log_id))
    return [_check(hash_, occurrence, trails[occurrence.task_id], log, check_anchor) for occurrence in found], more


def _check(
    hash_: str,
    occurrence: Occurrence,
    trail: Trail,
    log: Log,
    check_anchor: Callable[[Anchor], tuple[AnchorPayload | None, dict[str, bool]]],
) -> Match:
    stored, indexed = trail.entry(occurrence.seq), trail.indexes.get(occurrence.seq)
    entry = stored.parsed() if stored else None
    anchor, proof = trail.anchors.get(occurrence.seq), None
    checks = dict.fromkeys(CHECKS, False)
    if stored is not None:
        occurs = {
            "leaf": stored.leaf,
            "input": entry.input_hash if entry else None,
            "output": entry.output_hash if entry else None,
        }
        checks["recorded"] = True
        checks["occurs"] = occurs[occurrence.role] == hash_
        checks["leaf"] = leaf_hash(stored.text) == stored.leaf
        checks["chain"] = trail.holds_up_to(occurrence.seq)
        checks["sequenced"] = indexed is not None and indexed.leaf == stored.leaf
    if stored is not None and indexed is not None and anchor is not None:
        payload, anchor_checks = check_anchor(anchor)
        checks |= anchor_checks
        proof = _proof(log, indexed.index, anchor.size)
        # The root comes from the transaction's bytes, not from another stored attribute.
        checks["included"] = payload is not None and _is_included(stored.text, indexed.index, payload, proof)
    broken = trail.broken if trail.broken and trail.broken.seq <= occurrence.seq else None
    return Match(
        occurrence=occurrence,
        entry=stored,
        parsed=entry,
        index=indexed.index if indexed else None,
        anchor=anchor,
        proof=proof,
        status=trail.status(occurrence.seq),
        checks=checks,
        reason=broken.message if broken else None,
    )


def _check_anchor(anchor: Anchor, ledger: LedgerClient, log_id: str) -> tuple[AnchorPayload | None, dict[str, bool]]:
    """Check an anchor by its transaction's bytes. Return the decoded payload, if any, and the checks."""
    checks = {"payload": False, "signature": False, "ledger": _is_on_ledger(anchor, ledger, log_id)}
    try:
        found = transaction.decode(anchor.encoded)
        payload = decode(found.payload)
    except (ValueError, ProofError):
        return None, checks
    failed = failed_checks(found, anchor.payload, txid=anchor.txid, tick=anchor.tick, source=anchor.source)
    checks["signature"] = not {"signature", "txid", "source"} & set(failed)
    of_this_log = (payload.log_id, payload.size, payload.root) == (log_id_bytes(log_id), anchor.size, anchor.root)
    checks["payload"] = of_this_log and not set(failed) - {"signature", "txid", "source"}
    return payload, checks


def _is_on_ledger(anchor: Anchor, ledger: LedgerClient, log_id: str) -> bool:
    """Return whether the ledger has this anchor. The ledger's own record decides, and the stored one must match it."""
    try:
        answer = ledger.anchor_state(log_id=log_id, sequence=anchor.sequence)
    except PermanentError:
        return False
    return (answer["state"], answer["txid"], answer["network"]) == ("confirmed", anchor.txid, anchor.network)


def _proof(log: Log, index: int, size: int) -> list[bytes] | None:
    try:
        return inclusion_proof(index, size, log.tile)
    except (CorruptLogError, ProofError):
        return None


def _is_included(text: str, index: int, payload: AnchorPayload, proof: list[bytes] | None) -> bool:
    if proof is None:
        return False
    try:
        leaf = leaf_digest(text.encode("utf-8"))
        verify_inclusion(leaf=leaf, index=index, size=payload.size, proof=proof, root=payload.root)
    except ProofError:
        return False
    return True


def _broken(
    entries: tuple[StoredEntry, ...], indexes: dict[int, Indexed], *, log_id: str, task_id: str
) -> BrokenChainError | None:
    try:
        verify_chain([(entry.text, entry.leaf) for entry in entries], log_id=log_id, stream=task_id)
    except BrokenChainError as error:
        return error
    for seq, indexed in sorted(indexes.items()):
        if seq > len(entries):
            return BrokenChainError(len(entries) + 1, "seq", f"it is missing: the log has entry {seq}")
        if indexed.leaf != entries[seq - 1].leaf:
            return BrokenChainError(seq, "index", "the log has another hash for it")
    return None
