"""A task's bundle: the complete input of an offline verifier in one file (docs/audit.md, verifier/verify_bundle.py).

The verifier checks every value in it except `network`. The request, the plan, the approvals and the results are the
inputs and outputs of the entries, disclosed with the salt of their hashes. They occur nowhere else.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Literal

from qaes.domain.anchor import decode as decode_anchor
from qaes.domain.canonical import sha256_hex
from qaes.domain.ids import parse_timestamp, timestamp
from qaes.domain.merkle import ProofError
from qaes.domain.models import Model
from qaes.domain.policy_events import PolicyEvent
from qaes.domain.qubic import transaction

FORMAT: Final = "qaes-bundle-1"
FORMAT_WITH_POLICY: Final = "qaes-bundle-2"
CLOCK_SKEW = timedelta(seconds=300)
"""Maximum difference of two functions' clocks for the verifier (`SKEW`)."""

Prove = Callable[[int, int], Sequence[bytes]]
"""(index, size) -> the inclusion proof of that leaf in the tree of that size (`qaes.domain.tiles`)."""


@dataclass(frozen=True)
class TrailEntry:
    """A stored entry.

    Attributes
    ----------
    text
        The canonical text of the entry.
    input, output
        Canonical JSON of the values behind its salted `input_hash` and `output_hash`.
    index
        Its place in the log, from 0; None if it has no place yet.
    """

    text: str
    input: str
    output: str
    index: int | None


@dataclass(frozen=True)
class PolicyTrailEntry:
    """A stored entry of the policy's stream, and the salt of its two hashes."""

    entry: TrailEntry
    salt: str


class BundleEntry(Model):
    """An entry with its proof; `index` and `proof` are None if the anchor does not cover it."""

    text: str
    input: str
    output: str
    index: int | None
    proof: tuple[str, ...] | None


class BundlePolicyEntry(BundleEntry):
    """An entry of the policy's stream; `salt` belongs to its two hashes only."""

    salt: str


class BundleAnchor(Model):
    """The anchor's transaction on the ledger: its payload in hex, and all its bytes in base64."""

    payload: str
    transaction: str
    txid: str
    tick: int


class Bundle(Model):
    """The bundle file of a task, without entries of the policy's stream.

    `policies` maps the SHA-256 of a policy document to its text; `salt` is the task's.
    """

    format: Literal["qaes-bundle-1"] = FORMAT
    log_id: str
    network: Literal["mock", "mainnet"]
    task_id: str
    salt: str
    entries: tuple[BundleEntry, ...]
    anchor: BundleAnchor | None
    policies: dict[str, str]


class BundleWithPolicy(Model):
    """The file of a task: as format 1, with the entries of the policy's stream that the task depends on."""

    format: Literal["qaes-bundle-2"] = FORMAT_WITH_POLICY
    log_id: str
    network: Literal["mock", "mainnet"]
    task_id: str
    salt: str
    entries: tuple[BundleEntry, ...]
    anchor: BundleAnchor | None
    policies: dict[str, str]
    policy_entries: tuple[BundlePolicyEntry, ...]


def build_bundle(
    *,
    log_id: str,
    network: Literal["mock", "mainnet"],
    task_id: str,
    salt: str,
    entries: Sequence[TrailEntry],
    anchored: bytes | None,
    prove: Prove,
    policies: Iterable[str],
    policy_entries: Sequence[PolicyTrailEntry] = (),
) -> dict[str, Any]:
    """Build a bundle from the stored parts, unchanged: the verifier checks whether they hold.

    Parameters
    ----------
    log_id, network, task_id, salt
        Ids of the log, of its network and of the task, and the task's salt.
    entries
        The task's whole trail, from its first entry.
    anchored
        Bytes of the transaction of a confirmed anchor, usually the newest; None if no anchor is confirmed.
    prove
        Computes an inclusion proof; called for each entry that the anchor covers.
    policies
        Texts of the policy documents that `policy_ids` returns.
    policy_entries
        Entries of the policy's stream that `policy_numbers` returns. Without any, the bundle has format 1.

    Raises
    ------
    ProofError
        `anchored` is not a transaction with an anchor (`payload`).
    """
    anchor = size = None
    if anchored is not None:
        anchor, size = _anchor(anchored)
    bundle = Bundle(
        log_id=log_id,
        network=network,
        task_id=task_id,
        salt=salt,
        entries=tuple(_entry(entry, size, prove) for entry in entries),
        anchor=anchor,
        policies={sha256_hex(text): text for text in policies},
    ).model_dump(mode="json")
    if not policy_entries:
        return bundle
    of_the_policy = [
        _entry(policy_entry.entry, size, prove).model_dump(mode="json") | {"salt": policy_entry.salt}
        for policy_entry in policy_entries
    ]
    return bundle | {"format": FORMAT_WITH_POLICY, "policy_entries": of_the_policy}


def policy_numbers(
    events: Sequence[PolicyEvent], *, versions: Iterable[str], first: str, last: str | None
) -> list[int]:
    """Number the events of the policy that a task's record depends on.

    These are all events from the last one before the task began until it ended, and the proposal, the approval and
    the coming into force of each version that the task used.

    Parameters
    ----------
    events
        All events, in order.
    versions
        The `policy_ids` of the task's trail.
    first, last
        The times of the task's first and last entry; `last` is None while the task has not ended.
    """
    begins, ends = _shifted(first, -CLOCK_SKEW), _shifted(last, CLOCK_SKEW) if last else None
    later = [event.number for event in events if event.timestamp >= begins]
    # The state at the beginning is that after the last event before it.
    from_ = min(later, default=len(events) + 1) - 1
    # Clocks differ, so an event may look older than the one before it: none in between is left out.
    to = max((event.number for event in events if ends is None or event.timestamp <= ends), default=0)
    used = frozenset(versions)
    return [
        event.number
        for event in events
        if from_ <= event.number <= to or (event.policy_id in used and event.kind != "policy_rejected")
    ]


def _shifted(moment: str, by: timedelta) -> str:
    return timestamp(parse_timestamp(moment) + by)


def policy_ids(entries: Iterable[TrailEntry]) -> set[str]:
    """Return the policies of a task's trail: pinned by its plan, in force at a step's start, or reported by one."""
    found: set[str] = set()
    for entry in entries:
        event = json.loads(entry.text)
        found.add(event["policy_id"])
        sees = (
            event["kind"] == "step_executed" and event["step_type"] == "policy_check" and event["status"] == "succeeded"
        )
        if event["kind"] == "step_started" or sees:
            found.add(json.loads(entry.output)["policy_id"])
    return found - {""}


def _anchor(encoded: bytes) -> tuple[BundleAnchor, int]:
    try:
        sent = transaction.decode(encoded)
    except ValueError as error:
        raise ProofError("payload", f"the bytes are not a transaction: {error}") from error
    size = decode_anchor(sent.payload).size
    anchor = BundleAnchor(
        payload=sent.payload.hex(),
        transaction=base64.b64encode(encoded).decode(),
        txid=sent.id,
        tick=sent.tick,
    )
    return anchor, size


def _entry(entry: TrailEntry, size: int | None, prove: Prove) -> BundleEntry:
    index = proof = None
    if size is not None and entry.index is not None and entry.index < size:
        index, proof = entry.index, tuple(node.hex() for node in prove(entry.index, size))
    return BundleEntry(text=entry.text, input=entry.input, output=entry.output, index=index, proof=proof)
