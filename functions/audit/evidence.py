"""What proves an entry: its text, its place in the chain, its transaction on the ledger; each check by its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from audit.store import Anchor, AuditStore, Pointer, StoredEntry
from qaes.adapters.ledger_client import LedgerClient
from qaes.domain.audit import AuditEntry, BrokenChainError, verify_chain
from qaes.domain.merkle import leaf_hash

MATCHES = 10
"""Most matches in one answer; each costs the reading of a chain and a question to the ledger."""
LOOKED_AT = 200
"""Most pointers looked at for those that the caller may see."""
CHECKS = {
    "recorded": "the entry is in the table",
    "occurs": "the hash is the entry's leaf hash, or its text names it as that of its input or output",
    "leaf": "the entry's text has its leaf hash",
    "chain": "each entry from the task's first to this one names the one before it",
    "ledger": "the ledger has the leaf hash, in the transaction that is recorded here",
}
"""What is checked for a match."""


@dataclass(frozen=True)
class Trail:
    """A task's entries and anchors as stored; `broken` is the first thing that does not hold, None when all does."""

    entries: tuple[StoredEntry, ...]
    anchors: dict[int, Anchor]
    broken: BrokenChainError | None

    def holds_up_to(self, seq: int) -> bool:
        """Tell whether the chain holds from its beginning to that entry."""
        return seq <= len(self.entries) and (self.broken is None or self.broken.seq > seq)

    def entry(self, seq: int) -> StoredEntry | None:
        return next((entry for entry in self.entries if entry.seq == seq), None)


@dataclass(frozen=True)
class Match:
    """An entry in which a hash occurs; `checks` says what was checked and whether it held."""

    pointer: Pointer
    entry: StoredEntry | None
    parsed: AuditEntry | None
    anchor: Anchor | None
    checks: dict[str, bool]
    reason: str | None

    @property
    def verified(self) -> bool:
        return all(self.checks.values())


def read_trail(store: AuditStore, task_id: str, *, log_id: str) -> Trail:
    """Read a task's trail and check it. An empty one holds."""
    # Anchors first: an entry is there before its anchor, so where only the anchor is, the entry was taken away.
    anchors = store.anchors(task_id)
    entries = tuple(store.entries(task_id))
    return Trail(entries, anchors, _broken(entries, anchors, log_id, task_id))


def find_matches(
    hash_: str, *, store: AuditStore, ledger: LedgerClient, log_id: str, visible: Callable[[str], bool]
) -> tuple[list[Match], bool]:
    """Find the newest entries, of tasks that are `visible`, in which the hash occurs, and check each.

    Returns the matches, and whether there are more of them. Raises UnavailableError when the ledger cannot be asked:
    that is no answer, rather than a false one.
    """
    may_see = cache(visible)
    found: list[Pointer] = []
    more = False
    for looked_at, pointer in enumerate(store.pointers(hash_)):
        more = len(found) == MATCHES or looked_at == LOOKED_AT
        if more:
            break
        if may_see(pointer.task_id):
            found.append(pointer)
    trails = {task_id: read_trail(store, task_id, log_id=log_id) for task_id in {each.task_id for each in found}}
    on_ledger = cache(ledger.verify)
    return [_check(hash_, pointer, trails[pointer.task_id], on_ledger) for pointer in found], more


def _check(hash_: str, pointer: Pointer, trail: Trail, on_ledger: Callable[[str], dict[str, Any]]) -> Match:
    stored, anchor = trail.entry(pointer.seq), trail.anchors.get(pointer.seq)
    entry = stored.parsed() if stored else None
    checks = dict.fromkeys(CHECKS, False)
    if stored is not None:
        occurs = {
            "leaf": stored.leaf,
            "input": entry.input_hash if entry else None,
            "output": entry.output_hash if entry else None,
        }
        checks["recorded"] = True
        checks["occurs"] = occurs[pointer.role] == hash_
        checks["leaf"] = leaf_hash(stored.text) == stored.leaf
        checks["chain"] = trail.holds_up_to(pointer.seq)
        answer = on_ledger(stored.leaf)
        # The ledger's own record decides; the anchor kept here must agree with it.
        checks["ledger"] = answer["verified"] is True and (anchor is None or anchor.txid == answer["txid"])
    broken = trail.broken if trail.broken and trail.broken.seq <= pointer.seq else None
    return Match(pointer, stored, entry, anchor, checks, broken.message if broken else None)


def _broken(
    entries: tuple[StoredEntry, ...], anchors: dict[int, Anchor], log_id: str, task_id: str
) -> BrokenChainError | None:
    try:
        verify_chain([(entry.text, entry.leaf) for entry in entries], log_id=log_id, task_id=task_id)
    except BrokenChainError as error:
        return error
    for seq, anchor in sorted(anchors.items()):
        if seq > len(entries):
            return BrokenChainError(len(entries) + 1, "seq", f"it is missing: entry {seq} was anchored")
        if anchor.leaf != entries[seq - 1].leaf:
            return BrokenChainError(seq, "anchor", "another hash was anchored for it")
    return None
