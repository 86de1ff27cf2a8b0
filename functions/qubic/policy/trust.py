"""Check of the policy's versions: the newest one in force whose document's hash is on the ledger counts."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from qaes.adapters import metrics, settings
from qaes.adapters.logs import logger
from qaes.domain.canonical import sha256_hex
from qaes.domain.errors import (
    NotFoundError,
    PermanentError,
    TransientError,
)
from qaes.domain.policy import (
    Policy,
    policy_of,
    version_of,
)
from qaes.domain.qubic.identity import decode_identity, encode_identity
from qaes.domain.qubic.transaction import Transaction, decode
from qubic.items import Item, attempts
from qubic.policy.versions import Head, Versions, record_of, text_of, version_sk
from qubic.transactions.model import INPUT_TYPES, Submission
from qubic.transactions.submissions import Submissions
from qubic.wallets import service_identity

_NEVER_IN_FORCE = "no policy with this id has been in force"
REFUSED_METRIC = "PolicyRefused"
LOOK_AGAIN_SECONDS = 60
"""Time that a process relies on HEAD's newest version without a search for later ones."""


class AlteredError(Exception):
    """A stored version differs from the ledger's."""


@dataclass(frozen=True)
class _Good:
    """A version that matches the ledger's transaction with this id."""

    policy: Policy
    txid: str


@dataclass(frozen=True)
class _Seen:
    """The newest version that this process has verified in force, and the end of its reliance on HEAD at `revision`."""

    in_force: int = 0
    revision: int = 0
    until: float = 0


_verified: dict[tuple[str, str, int, str], _Good] = {}
"""Texts whose transaction this process has found on the chain, by table, network, version and hash."""
_seen: dict[tuple[str, str], _Seen] = {}
"""Newest verified version, by table and network."""


class Trust(Versions):
    """Reads the policy in force, and accepts only versions that the ledger has.

    Parameters
    ----------
    submissions
        The service's submissions; their network is the policy's.
    table
        Name of the table; the default is LEDGER_TABLE.
    """

    def __init__(self, submissions: Submissions, table: str | None = None) -> None:
        super().__init__(submissions.chain.network, table)
        self._submissions = submissions

    def in_force(self) -> Policy:
        """Return the policy in force.

        A version that differs from the ledger's is rejected, and the last valid one is in force.

        Raises
        ------
        TransientError
            No version is on the ledger yet, or no version matches the ledger's; a newer one than HEAD's has been in
            force; or the network does not respond, and this process has not verified the version yet.
        """
        head = self._trusted_head()
        if not head.in_force:
            head = self._begin()
        for version in range(head.in_force, 0, -1):
            item = self._item_in_force(version)
            if version == head.in_force or (item is not None and record_of(item).status == "superseded"):
                try:
                    policy = self._good(version, item).policy
                except AlteredError as error:
                    self._report(version, error)
                else:
                    self._remember(in_force=version)
                    return policy
        raise TransientError("no version of the policy matches the ledger's, so every action is denied")

    def once_in_force(self, policy_id: str) -> Policy:
        """Return a version that is or was in force. Raises as `document`."""
        version, item = self._came_into_force(policy_id)
        with self._refusing(version):
            return self._of_that_id(policy_id, self._good(version, item))

    def _item_in_force(self, version: int) -> Item | None:
        """Read a version. A version in force never changes, so an eventually consistent read is sufficient."""
        seen = _seen.get((self._table, self.network), _Seen())
        return self._item(version, consistent=version > seen.in_force)

    def _begin(self) -> Head:
        """Advance version 1, and return the policy in force after that. The lifecycle implements this."""
        raise NotImplementedError

    def _trusted_head(self) -> Head:
        """Read HEAD. Raises TransientError if it was rolled back: an older policy would be in force unnoticed."""
        for _ in attempts():
            seen = _seen.get((self._table, self.network), _Seen())  # read before HEAD, which never decreases
            head = self._head()
            looked = head.revision == seen.revision and time.monotonic() < seen.until
            if looked and head.in_force >= seen.in_force:
                return head
            newer = self._newer(head, seen)
            if newer is None:
                self._remember(revision=head.revision, until=time.monotonic() + LOOK_AGAIN_SECONDS)
                return head
            if self._head() == head:  # no caller has put that version in force in between
                logger().error("the policy was rolled back", extra={"version": newer, "in_force": head.in_force})
                metrics.count_one(REFUSED_METRIC)
                raise TransientError(
                    f"version {newer} of the policy has been in force or submitted, but the newest in the table is "
                    f"version {head.in_force}, so every action is denied"
                )
        raise TransientError("other callers are changing the policy at the moment; try again")

    def _newer(self, head: Head, seen: _Seen) -> int | None:
        """Return a version after HEAD's that has been in force, or that is on the ledger without an entry in HEAD."""
        if seen.in_force > head.in_force:
            return seen.in_force
        records = {record.version: record for record in self._records(version_sk(head.in_force + 1))}
        # An item may be missing while its submission still exists: check gaps and the next number too.
        for version in range(head.in_force + 1, max(records, default=head.in_force) + 2):
            status = records[version].status if version in records else None
            if status in {"in_force", "superseded"}:
                return version
            if version != head.approved and status != "rejected" and self._submissions.get(submission_key(version)):
                return version
        return None

    def _remember(self, **changes: Any) -> None:
        place = (self._table, self.network)
        seen = _seen.get(place, _Seen())
        _seen[place] = replace(seen, **changes | {"in_force": max(seen.in_force, changes.get("in_force", 0))})

    def document(self, policy_id: str) -> dict[str, Any]:
        """Return the text of a version that is or was in force, and the transaction that anchors it.

        `{policy_id, version, text, hash, txid, tick, source, encoded}`; `encoded` is the signed transaction in base64.

        Raises
        ------
        NotFoundError
            No version with this id has been in force.
        PermanentError
            `policy_altered`: it differs from the ledger's version.
        TransientError
            The network does not respond, and this process has not verified the version yet.
        """
        version, item = self._came_into_force(policy_id)
        with self._refusing(version):
            submission = self._confirmed(version)
            self._of_that_id(policy_id, self._good(version, item, submission))
        return {
            "policy_id": policy_id,
            "version": version,
            "text": text_of(item),
            "hash": sha256_hex(text_of(item)),
            "txid": submission.txid,
            "tick": submission.tick,
            "source": submission.source,
            "encoded": base64.b64encode(submission.encoded).decode(),
        }

    def _came_into_force(self, policy_id: str) -> tuple[int, Item]:
        """Read the version with this id. Raises NotFoundError if it has never been in force."""
        version = version_of(policy_id)
        item = self._item_in_force(version) if version else None
        if version is None or item is None or record_of(item).status not in {"in_force", "superseded"}:
            raise NotFoundError(_NEVER_IN_FORCE, field="policy_id")
        return version, item

    def _of_that_id(self, policy_id: str, good: _Good) -> Policy:
        if good.policy.policy_id != policy_id:
            raise NotFoundError(_NEVER_IN_FORCE, field="policy_id")
        return good.policy

    @contextmanager
    def _refusing(self, version: int) -> Iterator[None]:
        """Report an altered version, and reject it permanently."""
        try:
            yield
        except AlteredError as error:
            self._report(version, error)
            raise PermanentError("policy_altered", f"version {version} of the policy: {error}") from error

    def _good(self, version: int, item: Item | None, submission: Submission | None = None) -> _Good:
        """Return the version's policy. A given `submission` is always checked.

        Raises
        ------
        AlteredError
            Its text differs from the ledger's.
        TransientError
            The network does not respond.
        """
        if item is None:
            raise AlteredError("it is missing")
        text = text_of(item)
        hash_ = sha256_hex(text)
        known = (self._table, self.network, version, hash_)
        good = _verified.get(known)
        if good is None or submission is not None:
            transaction = _check_anchor(hash_, submission or self._confirmed(version))
            if good is None or good.txid != transaction.id:
                good = _Good(_policy_of_version(version, text), transaction.id)
                self._check_included(transaction)
                _verified[known] = good
        return good

    def _confirmed(self, version: int) -> Submission:
        submission = self._submissions.get(submission_key(version))
        if submission is None or submission.state != "confirmed":
            raise AlteredError("no transaction with its hash is confirmed")
        return submission

    def _check_included(self, transaction: Transaction) -> None:
        """Check that the network has it, regardless of the table. Raises as `_good`."""
        try:  # a node that is behind must not roll back the policy
            is_included = self._submissions.is_included(transaction)
        except TransientError as error:
            raise TransientError(f"the network cannot confirm the policy's transaction yet: {error.message}") from error
        if not is_included:
            raise AlteredError("the network does not have its transaction")

    def _report(self, version: int, error: AlteredError) -> None:
        logger().error("policy refused", extra={"version": version, "reason": str(error)})
        metrics.count_one(REFUSED_METRIC)


def _own_identities() -> frozenset[str]:
    """Return the identities that can anchor policies: the service's current and former ones."""
    former = frozenset(each.strip() for each in settings.optional("QUBIC_FORMER_IDENTITIES").split(",") if each.strip())
    for identity in former:
        try:
            decode_identity(identity)
        except ValueError as error:
            raise settings.SettingsError(f"QUBIC_FORMER_IDENTITIES: {identity[:60]}: {error}") from None
    return former | {service_identity()}


def _check_anchor(hash_: str, submission: Submission) -> Transaction:
    """Check that its transaction is the service's own and has exactly this hash; return it. Raises AlteredError.

    A role that can write the table could add a transaction, so only a signature of the expected identity counts.
    """
    try:
        transaction = decode(submission.encoded)
    except ValueError as error:
        raise AlteredError("its transaction cannot be read") from error
    if transaction.payload != bytes.fromhex(hash_) or transaction.input_type != INPUT_TYPES["policy"]:
        raise AlteredError("the ledger has another hash than its text's")
    if transaction.id != submission.txid:
        raise AlteredError("its transaction differs from the confirmed one")
    if encode_identity(transaction.source) not in _own_identities():
        raise AlteredError("its transaction is not from the service's identity")
    if transaction.destination != transaction.source or transaction.amount:
        raise AlteredError("its transaction is not a record: it has another destination, or moves money")
    if not transaction.is_signed_by_source():
        raise AlteredError("its transaction is not signed by its source")
    return transaction


def _policy_of_version(version: int, text: str) -> Policy:
    try:
        policy = policy_of(text)
    except ValueError as error:
        raise AlteredError("its text is not a policy document") from error
    if policy.version != version:
        raise AlteredError("its text belongs to another version")
    return policy


def submission_key(version: int) -> str:
    return f"policy:{version}"
