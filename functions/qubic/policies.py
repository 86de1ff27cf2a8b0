"""The policy's versions, and which of them is in force: the newest one whose document's hash the ledger has.

    proposed → approved → anchoring → in_force → superseded
             → rejected

An operator proposes, another one approves; approving hands the hash of the document to the ledger, as the submission
`policy:<version>`. `settle` puts the version in force once that is confirmed. One version at a time is on its way, so
that none overtakes another. Version 1 has the default rules; whoever asks first submits it.

Items (pk / sk), pk being POLICY#<network>:
HEAD                which version is newest, on its way, in force; its revision guards every change of all the others
VERSION#<number>    `text`, the document, never changed; `record`, what became of it
"""

from __future__ import annotations

import base64
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Literal

from botocore.exceptions import BotoCoreError, ClientError
from pydantic import BaseModel, ConfigDict, Field

from qaes.adapters import metrics, settings
from qaes.adapters.logs import logger
from qaes.domain.canonical import sha256_hex
from qaes.domain.errors import (
    ConflictError,
    ForbiddenError,
    LimitError,
    NotFoundError,
    RefusedError,
    UnavailableError,
)
from qaes.domain.ids import now, timestamp
from qaes.domain.policy import (
    DEFAULT_RULES,
    Policy,
    PolicyDifference,
    PolicyDocument,
    Rule,
    check_enforceable,
    check_removals,
    difference,
    policy_id_of,
    policy_of,
    version_of,
)
from qaes.domain.qubic.identity import decode_identity, encode_identity
from qaes.domain.qubic.transaction import Transaction, decode
from qaes.domain.text import same_subject
from qubic.items import ChangedError, Item, Items, attempts, item_key
from qubic.submissions import INPUT_TYPES, Submission, Submissions
from qubic.wallets import service_identity

REFUSED_METRIC = "PolicyRefused"
LOOK_AGAIN_SECONDS = 60
"""How long a process relies on it that HEAD names the newest version that has been in force."""
_MAX_VERSION = 10**9 - 1

Status = Literal["proposed", "approved", "anchoring", "in_force", "superseded", "rejected"]


class PolicyVersion(BaseModel):
    """A version of the policy, and what became of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    version: int
    policy_id: str
    status: Status = Field(description="`approved`: on its way to the ledger; `anchoring`: handed in there")
    hash: str = Field(description="SHA-256 of the document's text")
    based_on: str | None = Field(None, description="the policy in force when it was proposed")
    proposed_by: str | None = Field(None, description="nobody proposed version 1")
    proposed_at: str
    approved_by: str | None = None
    approved_at: str | None = None
    rejected_by: str | None = None
    rejected_at: str | None = None
    reason: str = Field("", description="why it was rejected")
    in_force_at: str | None = None
    txid: str | None = Field(None, description="the transaction that has the hash, or shall have it")
    tick: int | None = None


@dataclass(frozen=True)
class _Head:
    """`approved` is the version on its way to the ledger, `in_force` the newest one that has arrived; 0 is none."""

    revision: int = 0
    newest: int = 0
    approved: int = 0
    in_force: int = 0


class _AlteredError(Exception):
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


class Policies:
    """The versions of the policy on one network.

    Parameters
    ----------
    submissions
        The service's submissions; their network is the policy's.
    table
        By default that of LEDGER_TABLE.
    bring_forward
        What to call, instead of signing here, to have a version handed in: for a function without the key.
    """

    def __init__(
        self, submissions: Submissions, table: str | None = None, *, bring_forward: Callable[[], None] | None = None
    ) -> None:
        self._submissions = submissions
        self._elsewhere = bring_forward
        self.network = submissions.chain.network
        self._table = table or settings.text("LEDGER_TABLE")
        self._items = Items(self._table)

    # What is in force

    def in_force(self) -> Policy:
        """Return the policy in force.

        A version that is not what the ledger has is refused, and the last good one is in force.

        Raises
        ------
        UnavailableError
            No version is on the ledger yet, or none is as it is there; a newer one than HEAD's has been in force; the
            network, which this process has not asked of that version yet, does not answer.
        """
        head = self._trusted_head()
        if not head.in_force:
            head = self._begin()
        for version in range(head.in_force, 0, -1):
            item = self._item(version)
            if version == head.in_force or (item is not None and _record(item).status == "superseded"):
                try:
                    policy = self._good(version, item).policy
                except _AlteredError as error:
                    self._report(version, error)
                else:
                    self._remember(in_force=version)
                    return policy
        raise UnavailableError("no version of the policy is what the ledger has: nothing is allowed")

    def _trusted_head(self) -> _Head:
        """Read HEAD. Raises UnavailableError when it was rolled back: an older policy would be in force quietly."""
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
                raise UnavailableError(
                    f"version {newer} of the policy has been in force or handed in, and the table says that version "
                    f"{head.in_force} is the newest in force: nothing is allowed"
                )
        raise UnavailableError("others are changing the policy at the moment")

    def _newer(self, head: _Head, seen: _Seen) -> int | None:
        """Find a version that came after HEAD's: it has been in force, or is on the ledger without HEAD's knowing."""
        if seen.in_force > head.in_force:
            return seen.in_force
        records = {record.version: record for record in self._records(_version_sk(head.in_force + 1))}
        # An item may be missing, and its submission be there still: gaps and the next number are looked at, too.
        for version in range(head.in_force + 1, max(records, default=head.in_force) + 2):
            status = records[version].status if version in records else None
            if status in {"in_force", "superseded"}:
                return version
            if version != head.approved and status != "rejected" and self._submissions.get(_submission_key(version)):
                return version
        return None

    def _remember(self, **changes: Any) -> None:
        place = (self._table, self.network)
        seen = _seen.get(place, _Seen())
        _seen[place] = replace(seen, **changes | {"in_force": max(seen.in_force, changes.get("in_force", 0))})

    def bring_forward(self) -> None:
        """Settle, by the function that holds the key; before the first version is in force, follow that one too.

        Raises as `settle`.
        """
        if self._elsewhere is not None:
            self._elsewhere()
            return
        self.settle()
        first = self._submissions.get(_submission_key(1)) if not self._head().in_force else None
        if first is not None:
            if first.is_open:
                self._submissions.follow(first.source)
            self.settle()

    def settle(self) -> None:
        """Bring the version that is on its way forward, and put it in force when the ledger has it.

        To be called by anybody, as often as one likes: when a submission of kind `policy` is confirmed, and from time
        to time. Raises UnavailableError when the ledger cannot take it now.
        """
        for _ in attempts():
            head = self._head()
            try:
                if not head.newest:
                    self._create_first(head)
                elif not head.approved:
                    return
                else:
                    self._settle(head)
                    return
            except ChangedError:
                continue
        raise UnavailableError("others are changing the policy at the moment")

    def _settle(self, head: _Head) -> None:
        """Take the step that is due with the version that is on its way. Raises ChangedError when others took it."""
        number = head.approved
        item = self._item(number)
        if item is None:
            raise UnavailableError(f"version {number} of the policy is missing")
        record = _record(item)
        submission = self._submissions.get(_submission_key(number))
        if submission is not None and submission.is_open:
            return
        try:
            if submission is None or (submission.state == "failed" and submission.error.startswith("no_key")):
                self._submit(record, _text(item))  # by the key that the service has now
                return
            if submission.state != "confirmed":
                raise _AlteredError(f"its transaction is {submission.state}: {submission.error}")  # noqa: TRY301
            self._good(number, item, submission)
        except _AlteredError as error:
            self._report(number, error)
            if number == 1:
                return  # nothing could take its place
            given_up = record.model_copy(
                update={"status": "rejected", "rejected_at": timestamp(now()), "reason": str(error)}
            )
            self._write(head, replace(head, approved=0), self._changed(given_up))
            return
        arrived = record.model_copy(
            update={
                "status": "in_force",
                "in_force_at": timestamp(now()),
                "txid": submission.txid,
                "tick": submission.tick,
            }
        )
        writes = [self._changed(arrived)]
        before = self._item(head.in_force) if head.in_force else None
        if before is not None:
            writes.append(self._changed(_record(before).model_copy(update={"status": "superseded"})))
        self._write(head, replace(head, approved=0, in_force=number), *writes)
        logger().info("policy in force", extra={"policy_id": arrived.policy_id, "txid": arrived.txid})

    def _begin(self) -> _Head:
        """Nothing is in force: bring version 1 forward. Raises UnavailableError while it is on its way."""
        self.bring_forward()
        head = self._head()
        if head.in_force:
            return head
        submission = self._submissions.get(_submission_key(1))
        if submission is not None and submission.is_open:
            raise UnavailableError(
                "the first version of the policy is not on the ledger yet: it is in force once it is confirmed there"
            )
        raise UnavailableError(
            "the first version of the policy was altered, or its transaction failed, and no other can take its place"
        )

    def _create_first(self, head: _Head) -> None:
        document = PolicyDocument.write(DEFAULT_RULES, version=1)
        moment = timestamp(now())
        first = _new_record(document, moment).model_copy(update={"status": "approved", "approved_at": moment})
        self._write(head, replace(head, newest=1, approved=1), self._put(first, document.text()))

    def _submit(self, record: PolicyVersion, text: str) -> None:
        """Hand the hash in. Raises _AlteredError unless the text is the one that was approved."""
        if sha256_hex(text) != record.hash:
            raise _AlteredError("its text is not what was approved")  # and would be anchored in its place
        try:
            self._submissions.submit_record(
                _submission_key(record.version),
                bytes.fromhex(record.hash),
                kind="policy",
                metadata={"policy_id": record.policy_id, "version": record.version},
            )
        except LimitError as error:
            raise UnavailableError(error.message) from error

    def _good(self, version: int, item: Item | None, submission: Submission | None = None) -> _Good:
        """Return the version's policy; a `submission` that is given is checked, even if another was before.

        Raises
        ------
        _AlteredError
            Its text is not the one that the ledger has.
        UnavailableError
            The network has to be asked, and does not tell.
        """
        if item is None:
            raise _AlteredError("it is missing")
        text = _text(item)
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
        submission = self._submissions.get(_submission_key(version))
        if submission is None or submission.state != "confirmed":
            raise _AlteredError("no transaction with it is confirmed")
        return submission

    def _check_included(self, transaction: Transaction) -> None:
        """Check that the network has it, whatever the table says. Raises as `_good`."""
        try:  # a node that is behind must not set the policy back
            is_included = self._submissions.is_included(transaction)
        except UnavailableError as error:
            raise UnavailableError(
                f"the network does not tell yet whether it has the policy's transaction: {error.message}"
            ) from error
        if not is_included:
            raise _AlteredError("the network does not have its transaction")

    def _report(self, version: int, error: _AlteredError) -> None:
        logger().error("policy refused", extra={"version": version, "reason": str(error)})
        metrics.count_one(REFUSED_METRIC)

    # Changing it

    def propose(
        self, rules: dict[str, Rule], *, subject: str, based_on: str | None = None, remove: Sequence[str] = ()
    ) -> PolicyVersion:
        """Write a new version down, for another operator to approve. The same proposal again is the same version.

        Parameters
        ----------
        rules
            All rules: what is not among them is denied.
        subject
            Who proposes.
        based_on
            The `policy_id` that was looked at; by default the one in force.
        remove
            The rules in force that the new version drops: each has to be named.

        Raises
        ------
        ConflictError
            `based_on` is not in force (any more), or a version is on its way to the ledger.
        InvalidInputError
            The document is not acceptable, or `remove` does not name just what it drops.
        """
        for _ in attempts():
            head = self._head()
            current = self.in_force()
            based_on = based_on or current.policy_id
            self._check_not_stale(head, based_on, current)
            newest = self._item(head.newest)
            document = PolicyDocument.write(
                rules, version=head.newest + 1, proposed_by=subject, based_on=current.policy_id
            )
            check_enforceable(rules)
            check_removals(current.rules, rules, remove)
            if newest is not None and _is_same_proposal(newest, document):
                return _record(newest)
            proposed = _new_record(document, timestamp(now()))
            try:
                self._write(head, replace(head, newest=document.version), self._put(proposed, document.text()))
            except ChangedError:
                continue
            logger().info("policy proposed", extra={"policy_id": proposed.policy_id, "subject": subject})
            return proposed
        raise UnavailableError("others are changing the policy at the moment")

    def approve(self, version: int, *, subject: str, four_eyes: bool) -> PolicyVersion:
        """Approve a proposal, and hand its hash to the ledger. Again by the same person: nothing more.

        Raises
        ------
        ForbiddenError
            It is the caller's own proposal, and `four_eyes` is on.
        ConflictError
            It was decided already, or has become stale: another version has come into force, or is on its way.
        NotFoundError
            There is no such version.
        """
        for _ in attempts():
            head = self._head()
            item = self._existing(version)
            record = _record(item)
            if four_eyes and record.proposed_by is not None and same_subject(record.proposed_by, subject):
                raise ForbiddenError("a policy is approved by somebody else than who proposed it")
            if record.approved_by == subject:
                self._settle_soon()
                return self.get(version)
            if record.status != "proposed":
                raise ConflictError(f"version {version} is {record.status}", policy_status=record.status)
            self._check_not_stale(head, record.based_on, self.in_force())
            if sha256_hex(_text(item)) != record.hash:
                raise ConflictError("the text is not what was proposed", field="version")
            approved = record.model_copy(
                update={"status": "approved", "approved_by": subject, "approved_at": timestamp(now())}
            )
            try:
                self._write(head, replace(head, approved=version), self._changed(approved))
            except ChangedError:
                continue
            logger().info("policy approved", extra={"policy_id": record.policy_id, "subject": subject})
            self._settle_soon()
            return self.get(version)
        raise UnavailableError("others are changing the policy at the moment")

    def reject(self, version: int, *, subject: str, reason: str = "") -> PolicyVersion:
        """Reject a proposal, or withdraw one's own. One that was rejected already stays so.

        Raises
        ------
        ConflictError
            It was approved: its hash is on its way to the ledger, or there.
        NotFoundError
            There is no such version.
        """
        for _ in attempts():
            head = self._head()
            record = _record(self._existing(version))
            if record.status == "rejected":
                return record
            if record.status != "proposed":
                raise ConflictError(f"version {version} is {record.status}", policy_status=record.status)
            rejected = record.model_copy(
                update={
                    "status": "rejected",
                    "rejected_by": subject,
                    "rejected_at": timestamp(now()),
                    "reason": reason,
                }
            )
            try:
                self._write(head, head, self._changed(rejected))
            except ChangedError:
                continue
            logger().info("policy rejected", extra={"policy_id": record.policy_id, "subject": subject})
            return rejected
        raise UnavailableError("others are changing the policy at the moment")

    def _check_not_stale(self, head: _Head, based_on: str | None, current: Policy) -> None:
        if head.approved:
            raise ConflictError(
                f"version {head.approved} was approved, and is on its way to the ledger", field="based_on"
            )
        if based_on != current.policy_id:
            raise ConflictError(
                f"{current.policy_id} is in force by now", field="based_on", policy_id=current.policy_id
            )

    def _settle_soon(self) -> None:
        """Submit what was approved; what fails here is the writer's to do."""
        try:
            self.bring_forward()
        except (UnavailableError, RefusedError, BotoCoreError, ClientError) as error:
            logger().warning("policy not submitted yet", extra={"error": type(error).__name__})

    # Reading

    def get(self, version: int) -> PolicyVersion:
        """Return what became of a version. Raises NotFoundError."""
        return self._shown(_record(self._existing(version)))

    def read(self, version: int) -> tuple[PolicyVersion, str]:
        """Return the same, and the document. Raises NotFoundError."""
        item = self._existing(version)
        return self._shown(_record(item)), _text(item)

    def difference(self, version: int) -> PolicyDifference | None:
        """Compare a version with the one that it is based on; None when one of the two texts cannot be read.

        Raises NotFoundError when there is no such version.
        """
        record, text = self.read(version)
        before = self._item(version_of(record.based_on) or 0) if record.based_on else None
        if record.based_on and before is None:
            return None
        try:
            rules = PolicyDocument.read(_text(before)).rules if before else {}
            return difference(rules, PolicyDocument.read(text).rules)
        except ValueError:
            return None

    def list(self, limit: int = 20, before: int | None = None) -> list[PolicyVersion]:
        """List versions, newest first; `before` leaves out that one and those that are newer."""
        newest = _version_sk(before - 1 if before is not None else _MAX_VERSION)
        return [self._shown(record) for record in self._records(_version_sk(0), newest, limit)]

    def _records(self, oldest: str, newest: str = "VERSION#~", limit: int | None = None) -> Iterator[PolicyVersion]:
        """Read what became of the versions between these keys, newest first."""
        found = self._items.query(
            KeyConditionExpression="pk = :pk AND sk BETWEEN :oldest AND :newest",
            ExpressionAttributeValues={
                ":pk": {"S": self._pk},
                ":oldest": {"S": oldest},
                ":newest": {"S": newest},
            },
            ExpressionAttributeNames={"#record": "record"},
            ProjectionExpression="#record",
            ScanIndexForward=False,
            **({"Limit": limit} if limit else {}),
        )
        return map(_record, islice(found, limit))

    def document(self, policy_id: str) -> dict[str, Any]:
        """Return the text of a version that is or was in force, and what anchors it.

        `{policy_id, version, text, hash, txid, tick, source, encoded}`; `encoded` is the signed transaction in base64.

        Raises
        ------
        NotFoundError
            No version of that id has come into force.
        RefusedError
            `policy_altered`: it is not what the ledger has.
        UnavailableError
            The network, which this process has not asked of that version yet, does not answer.
        """
        version = version_of(policy_id)
        item = self._item(version) if version else None
        if version is None or item is None or _record(item).status not in {"in_force", "superseded"}:
            raise NotFoundError("no such policy has come into force", field="policy_id")
        try:
            submission = self._confirmed(version)
            good = self._good(version, item, submission).policy
        except _AlteredError as error:
            self._report(version, error)
            raise RefusedError("policy_altered", f"version {version} of the policy: {error}") from error
        if good.policy_id != policy_id:
            raise NotFoundError("no such policy has come into force", field="policy_id")
        return {
            "policy_id": policy_id,
            "version": version,
            "text": _text(item),
            "hash": sha256_hex(_text(item)),
            "txid": submission.txid,
            "tick": submission.tick,
            "source": submission.source,
            "encoded": base64.b64encode(submission.encoded).decode(),
        }

    def _shown(self, record: PolicyVersion) -> PolicyVersion:
        if record.status != "approved":
            return record
        submission = self._submissions.get(_submission_key(record.version))
        if submission is None:
            return record
        return record.model_copy(update={"status": "anchoring", "txid": submission.txid, "tick": submission.tick})

    # DynamoDB

    @property
    def _pk(self) -> str:
        return f"POLICY#{self.network}"

    def _key(self, sk: str) -> Item:
        return item_key(self._pk, sk)

    def _head(self) -> _Head:
        item = self._items.get(self._pk, "HEAD")
        return _Head(**{name: int(item[name]["N"]) for name in asdict(_Head())}) if item else _Head()

    def _item(self, version: int) -> Item | None:
        return self._items.get(self._pk, _version_sk(version))

    def _existing(self, version: int) -> Item:
        item = self._item(version)
        if item is None:
            raise NotFoundError("no such version of the policy", field="version")
        return item

    def _put(self, record: PolicyVersion, text: str) -> Item:
        item = self._key(_version_sk(record.version)) | {
            "text": {"S": text},
            "record": {"S": record.model_dump_json()},
        }
        return self._items.put_new(item)

    def _changed(self, record: PolicyVersion) -> Item:
        return {
            "Update": {
                "TableName": self._table,
                "Key": self._key(_version_sk(record.version)),
                "UpdateExpression": "SET #record = :record",
                "ConditionExpression": "attribute_exists(pk)",
                "ExpressionAttributeNames": {"#record": "record"},
                "ExpressionAttributeValues": {":record": {"S": record.model_dump_json()}},
            }
        }

    def _write(self, before: _Head, after: _Head, *writes: Item) -> None:
        """All or nothing, if nobody else has changed anything since `before` was read; ChangedError otherwise."""
        after = replace(after, revision=before.revision + 1)
        head = self._key("HEAD") | {name: {"N": str(value)} for name, value in asdict(after).items()}
        self._items.write(self._items.put_after(head, before.revision, "revision"), *writes)


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
    """Check that its transaction is the service's own and has just this hash; return it. Raises _AlteredError.

    Who can write the table can write a transaction of their own there: it is the signature that counts, and whose.
    """
    try:
        transaction = decode(submission.encoded)
    except ValueError as error:
        raise _AlteredError("its transaction cannot be read") from error
    if transaction.payload != bytes.fromhex(hash_) or transaction.input_type != INPUT_TYPES["policy"]:
        raise _AlteredError("its text is not the one whose hash the ledger has")
    if transaction.id != submission.txid:
        raise _AlteredError("its transaction is not the one that is confirmed")
    if encode_identity(transaction.source) not in _own_identities():
        raise _AlteredError("its transaction is not the service's")
    if transaction.destination != transaction.source or transaction.amount:
        raise _AlteredError("its transaction is no record of the service's: it goes to another, or moves money")
    if not transaction.is_signed_by_source():
        raise _AlteredError("its transaction is not signed by its source")
    return transaction


def _policy_of_version(version: int, text: str) -> Policy:
    try:
        policy = policy_of(text)
    except ValueError as error:
        raise _AlteredError("its text is no policy document") from error
    if policy.version != version:
        raise _AlteredError("its text is that of another version")
    return policy


def _new_record(document: PolicyDocument, moment: str) -> PolicyVersion:
    hash_ = sha256_hex(document.text())
    return PolicyVersion(
        version=document.version,
        policy_id=policy_id_of(document.version, hash_),
        status="proposed",
        hash=hash_,
        based_on=document.based_on,
        proposed_by=document.proposed_by,
        proposed_at=moment,
    )


def _is_same_proposal(item: Item, document: PolicyDocument) -> bool:
    """Tell whether the newest version is this very proposal, still open: it was sent twice."""
    version = document.version - 1
    return _record(item).status == "proposed" and _text(item) == document.model_copy(update={"version": version}).text()


def _record(item: Item) -> PolicyVersion:
    return PolicyVersion.model_validate_json(item["record"]["S"])


def _text(item: Item) -> str:
    return str(item["text"]["S"])


def _version_sk(version: int) -> str:
    return f"VERSION#{version:09d}"


def _submission_key(version: int) -> str:
    return f"policy:{version}"
