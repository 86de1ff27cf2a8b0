"""A task's bundle: all that an offline verifier needs, in one file (docs/audit.md, verifier/verify_bundle.py).

There is no value in it that the verifier does not check, but for `network`: the request, the plan,
the approvals and the results are the inputs and outputs of the entries, disclosed together with the salt of their
hashes, and stand nowhere else.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from qaes.domain.anchor import decode as decode_anchor
from qaes.domain.canonical import sha256_hex
from qaes.domain.merkle import ProofError
from qaes.domain.models import Model
from qaes.domain.qubic import transaction

FORMAT: Final = "qaes-bundle-1"

Prove = Callable[[int, int], Sequence[bytes]]
"""(index, size) -> the inclusion proof of that leaf in the tree of that size (`qaes.domain.tiles`)."""


@dataclass(frozen=True)
class TrailEntry:
    """An entry as it is stored.

    Attributes
    ----------
    text
        The canonical text of the entry.
    input, output
        The canonical JSON of what its `input_hash` and `output_hash` are the salted hashes of.
    index
        Its place in the log, from 0; None when it has none yet.
    """

    text: str
    input: str
    output: str
    index: int | None


class BundleEntry(Model):
    """An entry with its proof; `index` and `proof` are None when the anchor does not cover it."""

    text: str
    input: str
    output: str
    index: int | None
    proof: tuple[str, ...] | None


class BundleAnchor(Model):
    """The transaction on the ledger: hex of its payload, base64 of all its bytes."""

    payload: str
    transaction: str
    txid: str
    tick: int


class Bundle(Model):
    """The file; `policies` are documents by the SHA-256 of their texts, `salt` is the task's."""

    format: Literal["qaes-bundle-1"] = FORMAT
    log_id: str
    network: Literal["mock", "mainnet"]
    task_id: str
    salt: str
    entries: tuple[BundleEntry, ...]
    anchor: BundleAnchor | None
    policies: dict[str, str]


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
) -> dict[str, Any]:
    """Put a bundle together, from the stored parts as they are: whether they hold is for the verifier to find.

    Parameters
    ----------
    log_id, network, task_id, salt
        Of the log, of its anchors, of the task.
    entries
        The task's whole trail, from its first entry.
    anchored
        The bytes of the transaction of the newest confirmed anchor, or of any other; None when there is none yet.
    prove
        Makes an inclusion proof; called for each entry that the anchor covers.
    policies
        The texts of the policy documents that `policy_ids` names.

    Raises
    ------
    ProofError
        `anchored` is no transaction with an anchor (`payload`).
    """
    anchor = size = None
    if anchored is not None:
        anchor, size = _anchor(anchored)
    bundle = Bundle(
        log_id=log_id,
        network=network,
        task_id=task_id,
        salt=salt,
        entries=tuple(_entry(each, size, prove) for each in entries),
        anchor=anchor,
        policies={sha256_hex(text): text for text in policies},
    )
    return bundle.model_dump(mode="json")


def policy_ids(entries: Iterable[TrailEntry]) -> set[str]:
    """Which policies a task's trail refers to: pinned by its plan, in force when a step was begun, or seen by one."""
    found: set[str] = set()
    for entry in entries:
        said = json.loads(entry.text)
        found.add(said["policy_id"])
        sees = said["kind"] == "step_executed" and said["step_type"] == "policy_check" and said["status"] == "succeeded"
        if said["kind"] == "step_started" or sees:
            found.add(json.loads(entry.output)["policy_id"])
    return found - {""}


def _anchor(encoded: bytes) -> tuple[BundleAnchor, int]:
    try:
        sent = transaction.decode(encoded)
    except ValueError as error:
        raise ProofError("payload", f"not a transaction: {error}") from error
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
        index, proof = entry.index, tuple(each.hex() for each in prove(entry.index, size))
    return BundleEntry(text=entry.text, input=entry.input, output=entry.output, index=index, proof=proof)
