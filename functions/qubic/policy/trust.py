"""Which version of the policy to believe: the newest one in force whose document's hash the ledger has."""

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

_NEVER_IN_FORCE = "no such policy has come into force"
REFUSED_METRIC = "PolicyRefused"
LOOK_AGAIN_SECONDS = 60
"""How long a process relies on it that HEAD names the newest version that has been in force."""


class AlteredError(Exception):
    """What is stored of a version is not what the ledger has."""


@dataclass(frozen=True)
class _Good:
    """A version that is what the ledger has, by the transaction of that id."""

    policy: Policy
    txid: str


@dataclass(frozen=True)
class _Seen:
    """The newest version that this process has found good in force; until when it relies on HEAD at `revision`."""

    in_force: int = 0
    revision: int = 0
    until: float = 0


_verified: dict[tuple[str, str, int, str], _Good] = {}
"""The texts whose transaction this process has found on the chain, by table, network, version and hash."""
_seen: dict[tuple[str, str], _Seen] = {}
"""By table and network."""


class Trust(Versions):
    """Reads what is in force, and believes nothing that the ledger does not have.

    Parameters
    ----------
    submissions
        The service's submissions; their network is the policy's.
    table
        By default that of LEDGER_TABLE.
    """

    def __init__(self, submissions: Submissions, table: str | None = None) -> None:
        super().__init__(submissions.chain.network, table)
        self._submissions = submissions

    def in_force(self) -> Policy:
        """Return the policy in force.

        A version that is not what the ledger has is refused, and the last good one is in force.

        Raises
        ------
        TransientError
            No version is on the ledger yet, or none is as it is there; a newer one than HEAD's has been in force; the
            network, which this process has not asked of that version yet, does not answer.
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
        raise TransientError("no version of the policy is what the ledger has: nothing is allowed")

    def once_in_force(self, policy_id: str) -> Policy:
        """Return a version that is or was in force. Raises as `document`."""
        version, item = self._came_into_force(policy_id)
        with self._refusing(version):
            return self._of_that_id(policy_id, self._good(version, item))

    def _item_in_force(self, version: int) -> Item | None:
        """Read a version; one that this process has seen in force does not change, so any replica may answer."""
        seen = _seen.get((self._table, self.network), _Seen())
        return self._item(version, consistent=version > seen.in_force)

    def _begin(self) -> Head:
        """Bring the first version forward; what is in force then. A matter of the lifecycle."""
        raise NotImplementedError

    def _trusted_head(self) -> Head:
        """Read HEAD. Raises TransientError when it was rolled back: an older policy would be in force quietly."""
        for _ in attempts():
            seen = _seen.get((self._table, self.network), _Seen())  # before HEAD, which never goes back
            head = self._head()
            looked = head.revision == seen.revision and time.monotonic() < seen.until
            if looked and head.in_force >= seen.in_force:
                return head
            newer = self._newer(head, seen)
            if newer is None:
                self._remember(revision=head.revision, until=time.monotonic() + LOOK_AGAIN_SECONDS)
                return head
            if self._head() == head:  # nobody has put that version in force in between
                logger().error("policy rolled back", extra={"version": newer, "in_force": head.in_force})
                metrics.count_one(REFUSED_METRIC)
                raise TransientError(
                    f"version {newer} of the policy has been in force or handed in, and the table says that version "
                    f"{head.in_force} is the newest in force: nothing is allowed"
                )
        raise TransientError("others are changing the policy at the moment")

    def _newer(self, head: Head, seen: _Seen) -> int | None:
        """Find a version that came after HEAD's: it has been in force, or is on the ledger without HEAD's knowing."""
        if seen.in_force > head.in_force:
            return seen.in_force
        records = {record.version: record for record in self._records(version_sk(head.in_force + 1))}
        # An item may be missing, and its submission be there still: gaps and the next number are looked at, too.
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
        """Return the text of a version that is or was in force, and what anchors it.

        `{policy_id, version, text, hash, txid, tick, source, encoded}`; `encoded` is the signed transaction in base64.

        Raises
        ------
        NotFoundError
            No version of that id has come into force.
        PermanentError
            `policy_altered`: it is not what the ledger has.
        TransientError
            The network, which this process has not asked of that version yet, does not answer.
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
        """Read the version that an id names. Raises NotFoundError if none has come into force."""
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
        """Report a version that was altered, and refuse it for good."""
        try:
            yield
        except AlteredError as error:
            self._report(version, error)
            raise PermanentError("policy_altered", f"version {version} of the policy: {error}") from error

    def _good(self, version: int, item: Item | None, submission: Submission | None = None) -> _Good:
        """Return the version's policy; a `submission` that is given is checked, even if another was before.

        Raises
        ------
        AlteredError
            Its text is not the one that the ledger has.
        TransientError
            The network has to be asked, and does not tell.
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
            raise AlteredError("no transaction with it is confirmed")
        return submission

    def _check_included(self, transaction: Transaction) -> None:
        """Check that the network has it, whatever the table says. Raises as `_good`."""
        try:  # a node that is behind must not set the policy back
            is_included = self._submissions.is_included(transaction)
        except TransientError as error:
            raise TransientError(
                f"the network does not tell yet whether it has the policy's transaction: {error.message}"
            ) from error
        if not is_included:
            raise AlteredError("the network does not have its transaction")

    def _report(self, version: int, error: AlteredError) -> None:
        logger().error("policy refused", extra={"version": version, "reason": str(error)})
        metrics.count_one(REFUSED_METRIC)


def _own_identities() -> frozenset[str]:
    """The identities that policies are anchored by: the service's own, and those that it had before."""
    former = frozenset(each.strip() for each in settings.optional("QUBIC_FORMER_IDENTITIES").split(",") if each.strip())
    for identity in former:
        try:
            decode_identity(identity)
        except ValueError as error:
            raise settings.SettingsError(f"QUBIC_FORMER_IDENTITIES: {identity[:60]}: {error}") from None
    return former | {service_identity()}


def _check_anchor(hash_: str, submission: Submission) -> Transaction:
    """Check that its transaction is the service's own and has just this hash; return it. Raises AlteredError.

    A role that can write the table can add a transaction: only a signature of the expected identity counts.
    """
    try:
        transaction = decode(submission.encoded)
    except ValueError as error:
        raise AlteredError("its transaction cannot be read") from error
    if transaction.payload != bytes.fromhex(hash_) or transaction.input_type != INPUT_TYPES["policy"]:
        raise AlteredError("its text is not the one whose hash the ledger has")
    if transaction.id != submission.txid:
        raise AlteredError("its transaction is not the one that is confirmed")
    if encode_identity(transaction.source) not in _own_identities():
        raise AlteredError("its transaction is not the service's")
    if transaction.destination != transaction.source or transaction.amount:
        raise AlteredError("its transaction is no record of the service's: it goes to another, or moves money")
    if not transaction.is_signed_by_source():
        raise AlteredError("its transaction is not signed by its source")
    return transaction


def _policy_of_version(version: int, text: str) -> Policy:
    try:
        policy = policy_of(text)
    except ValueError as error:
        raise AlteredError("its text is no policy document") from error
    if policy.version != version:
        raise AlteredError("its text is that of another version")
    return policy


def submission_key(version: int) -> str:
    return f"policy:{version}"
