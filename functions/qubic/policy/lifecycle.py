"""Lifecycle of the policy's versions. The newest one whose document's hash is on the ledger is in force.

    proposed → approved → anchoring → in_force → superseded
             → rejected

An operator proposes a version, and another one approves it. The approval submits the hash of the document to the
ledger, as the submission `policy:<version>`. `settle` puts the version in force after the confirmation. Only one
version at a time is on its way, so no version overtakes another. Version 1 has the default rules; the first request
submits it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from qaes.adapters.logs import logger
from qaes.adapters.policy_events import newest_event
from qaes.domain.canonical import sha256_hex
from qaes.domain.errors import (
    ConflictError,
    ForbiddenError,
    LimitError,
    PermanentError,
    TransientError,
)
from qaes.domain.ids import now, timestamp
from qaes.domain.policy import (
    DEFAULT_RULES,
    Policy,
    PolicyDifference,
    PolicyDocument,
    PolicyDocumentV2,
    difference,
    policy_id_of,
    policy_of,
    proposing,
    read_document,
    version_of,
)
from qaes.domain.policy_events import LEDGER, STATUSES, PolicyEventKind
from qaes.domain.text import same_subject
from qubic.items import ChangedError, Item, attempts
from qubic.policy.trust import AlteredError, Trust, submission_key
from qubic.policy.versions import MAX_VERSION, Head, PolicyVersion, record_of, text_of, version_sk
from qubic.transactions.submissions import Submissions

AnyDocument = PolicyDocument | PolicyDocumentV2


class Policies(Trust):
    """Versions of the policy on one network.

    Parameters
    ----------
    submissions
        The service's submissions; their network is the policy's.
    table
        Name of the table; the default is LEDGER_TABLE.
    advance_elsewhere
        Called instead of signing here to submit a version: for a function without the key.
    """

    def __init__(
        self, submissions: Submissions, table: str | None = None, *, advance_elsewhere: Callable[[], None] | None = None
    ) -> None:
        super().__init__(submissions, table)
        self._elsewhere = advance_elsewhere

    # Versions on their way to the ledger

    def advance(self) -> None:
        """Settle through the function that holds the key. Before version 1 is in force, also advance it.

        Raises as `settle`.
        """
        if self._elsewhere is not None:
            self._elsewhere()
            return
        self.settle()
        first = self._submissions.get(submission_key(1)) if not self._head().in_force else None
        if first is not None:
            if first.is_open:
                self._submissions.advance(first.source)
            self.settle()

    def settle(self) -> None:
        """Advance the approved version, and put it in force when the ledger has it.

        Any caller can do this at any time: at the confirmation of a submission of kind `policy`, and on a schedule.
        Raises TransientError if the ledger cannot accept it now.
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
        raise TransientError("other callers are changing the policy at the moment; try again")

    def _settle(self, head: Head) -> None:
        """Advance the approved version by one step. Raises ChangedError if another caller did."""
        number = head.approved
        item = self._item(number)
        if item is None:
            raise TransientError(f"version {number} of the policy is missing")
        record = record_of(item)
        submission = self._submissions.get(submission_key(number))
        if submission is not None and submission.is_open:
            return
        try:
            if submission is None or (submission.state == "failed" and submission.error.startswith("no_key")):
                self._submit(record, text_of(item))  # with the service's current key
                return
            if submission.state != "confirmed":
                raise AlteredError(f"its transaction is {submission.state}: {submission.error}")  # noqa: TRY301
            self._good(number, item, submission)
        except AlteredError as error:
            self._report(number, error)
            if number == 1:
                return  # no version could replace it
            given_up = record.model_copy(
                update={"status": "rejected", "rejected_at": timestamp(now()), "reason": str(error)}
            )
            event = self._version_event("policy_rejected", given_up, LEDGER, reason=str(error))
            self._write(head, replace(head, approved=0), self._changed(given_up), event)
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
            writes.append(self._changed(record_of(before).model_copy(update={"status": "superseded"})))
        writes.append(self._version_event("policy_in_force", arrived, LEDGER, txid=arrived.txid, tick=arrived.tick))
        self._write(head, replace(head, approved=0, in_force=number), *writes)
        logger().info("policy in force", extra={"policy_id": arrived.policy_id, "txid": arrived.txid})

    def _begin(self) -> Head:
        """Advance version 1, because no version is in force. Raises TransientError until it is confirmed."""
        self.advance()
        head = self._head()
        if head.in_force:
            return head
        submission = self._submissions.get(submission_key(1))
        if submission is not None and submission.is_open:
            raise TransientError("version 1 of the policy is not confirmed on the ledger yet; try again later")
        raise TransientError(
            "version 1 of the policy was altered, or its transaction failed, and no version can replace it"
        )

    def _create_first(self, head: Head) -> None:
        document = PolicyDocument.write(DEFAULT_RULES, version=1)
        moment = timestamp(now())
        first = _new_record(document, moment).model_copy(update={"status": "approved", "approved_at": moment})
        self._write(head, replace(head, newest=1, approved=1), self._put(first, document.text()))

    def _submit(self, record: PolicyVersion, text: str) -> None:
        """Submit the hash. Raises AlteredError if the text differs from the approved one."""
        if sha256_hex(text) != record.hash:
            raise AlteredError("its text differs from the approved text")  # which would otherwise be anchored
        try:
            self._submissions.submit_record(
                submission_key(record.version),
                bytes.fromhex(record.hash),
                kind="policy",
                metadata={"policy_id": record.policy_id, "version": record.version},
            )
        except LimitError as error:
            raise TransientError(error.message) from error

    # Decisions

    def propose(
        self,
        rules: Mapping[str, Any],
        *,
        subject: str,
        based_on: str | None = None,
        remove: Sequence[str] = (),
        groups: Mapping[str, Any] | None = None,
        actions: Mapping[str, Any] | None = None,
        function_prefix: str = proposing.FUNCTION_PREFIX,
    ) -> PolicyVersion:
        """Store a new version for another operator to approve. A repeated proposal returns the same version.

        Parameters
        ----------
        rules, groups, actions
            The whole version. With `groups` or `actions`, even empty, it has format 2; with `rules` alone format 1.
        subject
            The proposing operator.
        based_on
            The `policy_id` of the version that the operator reviewed; by default the one in force.
        remove
            The rules, groups and actions in force that the new version drops: each has to be named.
        function_prefix
            Prefix of the functions that an action's handler can name.

        Raises
        ------
        ConflictError
            `based_on` is not in force (any more), or an approved version is on its way to the ledger.
        InvalidInputError
            The document is invalid, or `remove` does not name exactly the dropped items.
        """
        content = {"rules": rules, "groups": groups, "actions": actions}
        for _ in attempts():
            head = self._head()
            current = self.in_force()
            self._check_not_stale(head, based_on or current.policy_id, current)
            newest = self._item(head.newest)
            document = proposing.propose(
                current,
                content,
                version=head.newest + 1,
                proposed_by=subject,
                remove=remove,
                function_prefix=function_prefix,
            )
            if newest is not None and _is_same_proposal(newest, document):
                return record_of(newest)
            proposed = _new_record(document, timestamp(now()))
            event = self._version_event("policy_proposed", proposed, subject, based_on=proposed.based_on)
            try:
                self._write(head, replace(head, newest=document.version), self._put(proposed, document.text()), event)
            except ChangedError:
                continue
            logger().info("policy proposed", extra={"policy_id": proposed.policy_id, "subject": subject})
            return proposed
        raise TransientError("other callers are changing the policy at the moment; try again")

    def approve(self, version: int, *, subject: str, four_eyes: bool) -> PolicyVersion:
        """Approve a proposal, and submit its hash to the ledger. A repetition by the same person changes nothing.

        Raises
        ------
        ForbiddenError
            It is the caller's own proposal, and `four_eyes` is on.
        ConflictError
            It is already decided, or stale: another version is in force or on its way.
        NotFoundError
            The version does not exist.
        """
        for _ in attempts():
            head = self._head()
            item = self._existing(version)
            record = record_of(item)
            if four_eyes and record.proposed_by is not None and same_subject(record.proposed_by, subject):
                raise ForbiddenError("you cannot approve your own proposal; another operator must approve it")
            if record.approved_by == subject:
                self._settle_soon()
                return self.get(version)
            if record.status != "proposed":
                raise ConflictError(f"version {version} is {record.status}", policy_status=record.status)
            self._check_not_stale(head, record.based_on, self.in_force())
            if sha256_hex(text_of(item)) != record.hash:
                raise ConflictError("the text differs from the proposal", field="version")
            approved = record.model_copy(
                update={"status": "approved", "approved_by": subject, "approved_at": timestamp(now())}
            )
            event = self._version_event("policy_approved", approved, subject)
            try:
                self._write(head, replace(head, approved=version), self._changed(approved), event)
            except ChangedError:
                continue
            logger().info("policy approved", extra={"policy_id": record.policy_id, "subject": subject})
            self._settle_soon()
            return self.get(version)
        raise TransientError("other callers are changing the policy at the moment; try again")

    def reject(self, version: int, *, subject: str, reason: str = "") -> PolicyVersion:
        """Reject a proposal, or withdraw one's own. A repetition changes nothing.

        Raises
        ------
        ConflictError
            It was approved: its hash is on the ledger, or on its way.
        NotFoundError
            The version does not exist.
        """
        for _ in attempts():
            head = self._head()
            record = record_of(self._existing(version))
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
            event = self._version_event("policy_rejected", rejected, subject, reason=reason)
            try:
                self._write(head, head, self._changed(rejected), event)
            except ChangedError:
                continue
            logger().info("policy rejected", extra={"policy_id": record.policy_id, "subject": subject})
            return rejected
        raise TransientError("other callers are changing the policy at the moment; try again")

    def _version_event(self, kind: PolicyEventKind, record: PolicyVersion, actor: str, **details: Any) -> Item:
        """Return the write of a version's event, at the time of its new status."""
        at = getattr(record, f"{STATUSES[kind]}_at")
        newest = newest_event(self._policy_table)
        return self._event(kind, newest, actor=actor, at=at, policy_id=record.policy_id, **details)

    def _check_not_stale(self, head: Head, based_on: str | None, current: Policy) -> None:
        if head.approved:
            raise ConflictError(
                f"version {head.approved} was approved, and is on its way to the ledger; try again when it is in force",
                field="based_on",
            )
        if based_on != current.policy_id:
            raise ConflictError(
                f"{current.policy_id} is in force now; propose again on top of it",
                field="based_on",
                policy_id=current.policy_id,
            )

    def _settle_soon(self) -> None:
        """Submit the approved version. After a failure, the transaction worker does it."""
        try:
            self.advance()
        except (TransientError, PermanentError, BotoCoreError, ClientError) as error:
            logger().warning("the policy is not submitted yet", extra={"error": type(error).__name__})

    # Reading

    def get(self, version: int) -> PolicyVersion:
        """Return the record of a version. Raises NotFoundError."""
        return self._shown(record_of(self._existing(version)))

    def read(self, version: int) -> tuple[PolicyVersion, str]:
        """Return the record and the document of a version. Raises NotFoundError."""
        item = self._existing(version)
        return self._shown(record_of(item)), text_of(item)

    def version(self, version: int) -> tuple[PolicyVersion, Policy]:
        """Return a version in any status, and the policy of its document.

        Raises
        ------
        NotFoundError
            No such version exists.
        PermanentError
            `policy_altered`: its text is not the one that was proposed.
        """
        item = self._existing(version)
        record, text = record_of(item), text_of(item)
        if sha256_hex(text) != record.hash:
            raise PermanentError("policy_altered", f"version {version} of the policy: its text was altered")
        return self._shown(record), policy_of(text)

    def difference(self, version: int) -> PolicyDifference | None:
        """Compare a version with the one that it is based on; None if one of the texts cannot be read.

        Raises NotFoundError if the version does not exist.
        """
        record, text = self.read(version)
        before = self._item(version_of(record.based_on) or 0) if record.based_on else None
        if record.based_on and before is None:
            return None
        try:
            return difference(read_document(text_of(before)) if before else None, read_document(text))
        except ValueError:
            return None

    def list(self, limit: int = 20, before: int | None = None) -> list[PolicyVersion]:
        """List versions older than `before`, newest first."""
        newest = version_sk(before - 1 if before is not None else MAX_VERSION)
        return [self._shown(record) for record in self._records(version_sk(0), newest, limit)]

    def _shown(self, record: PolicyVersion) -> PolicyVersion:
        if record.status != "approved":
            return record
        submission = self._submissions.get(submission_key(record.version))
        if submission is None:
            return record
        return record.model_copy(update={"status": "anchoring", "txid": submission.txid, "tick": submission.tick})


def _new_record(document: AnyDocument, moment: str) -> PolicyVersion:
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


def _is_same_proposal(item: Item, document: AnyDocument) -> bool:
    """Return whether the newest version is this proposal, still open: a repeated request."""
    version = document.version - 1
    return (
        record_of(item).status == "proposed"
        and text_of(item) == document.model_copy(update={"version": version}).text()
    )
