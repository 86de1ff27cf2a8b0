"""The task aggregate in DynamoDB: task, events, plan, step records, approvals.

Every change of a task is one transaction: the TASK item (guarded by its version), the EVENT items that tell
what happened (a transactional outbox, which the audit recorder drains), and the PLAN, STEP or APPROVAL that goes with
it. Each method reads, decides and writes; when somebody else wrote in between, it reads again. Called twice, it finds
that its change is there and changes nothing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from qaes.adapters import clients, settings
from qaes.domain.canonical import canonical_json, hash_of
from qaes.domain.errors import ConcurrentUpdateError, ConflictError, NotFoundError, UnavailableError
from qaes.domain.ids import now, parse_timestamp, timestamp
from qaes.domain.models import (
    TERMINAL,
    Analysis,
    Approval,
    Event,
    Outcome,
    Plan,
    Status,
    Step,
    StepRecord,
    Task,
)
from qaes.domain.policy import PolicyDecision

_ATTEMPTS = 8
_IDEMPOTENCY_SECONDS = 24 * 3600
_PREVIEW_SECONDS = 30 * 24 * 3600

Item = dict[str, Any]


@dataclass(frozen=True)
class Idempotency:
    """The caller's key, and the hash of what came with it."""

    subject: str
    key: str
    body_hash: str

    @property
    def pk(self) -> str:
        return "IDEMPOTENCY#" + hash_of([self.subject, self.key])


@dataclass(frozen=True)
class _Change:
    """What to write: fields of the task, events, and further writes of the same transaction."""

    task: dict[str, Any] = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    writes: tuple[Item, ...] = ()


class TaskStore:
    """The repository of tasks. All reads are consistent, but for those of an index."""

    def __init__(self, table: str | None = None) -> None:
        self._table = table or settings.text("TASKS_TABLE")

    # Reading

    def get_task(self, task_id: str) -> Task:
        """Raises NotFoundError."""
        item = self._get(task_id, "TASK")
        if item is None:
            raise NotFoundError("no such task", field="task_id")
        return Task.model_validate_json(item["data"]["S"])

    def get_plan(self, plan_id: str) -> Plan:
        """Raises NotFoundError."""
        item = self._get(plan_id, "PLAN")
        if item is None:
            raise NotFoundError("no such plan", field="plan_id")
        return Plan.model_validate_json(item["data"]["S"])

    def plan_of(self, task: Task) -> Plan:
        """The plan of a task. Raises ConflictError when it has none yet."""
        if task.plan_id is None:
            raise ConflictError("the task has no plan", task_status=task.status)
        return self.get_plan(task.plan_id)

    def step(self, task_id: str, step_index: int) -> StepRecord | None:
        item = self._get(task_id, f"STEP#{step_index:03d}")
        return StepRecord.model_validate_json(item["data"]["S"]) if item else None

    def steps(self, task_id: str) -> list[StepRecord]:
        """The records of the steps that were begun, in order."""
        return [StepRecord.model_validate_json(item["data"]["S"]) for item in self._query(task_id, "STEP#")]

    def approvals(self, task_id: str) -> list[Approval]:
        """All approvals that were asked for, by step, then by round."""
        return [Approval.model_validate_json(item["data"]["S"]) for item in self._query(task_id, "APPROVAL#")]

    def latest_approval(self, task_id: str, step_index: int) -> Approval | None:
        items = self._query(task_id, f"APPROVAL#{step_index:03d}#")
        return Approval.model_validate_json(items[-1]["data"]["S"]) if items else None

    def open_approval(self, task_id: str) -> Approval | None:
        """The approval that a person is asked for now."""
        return next((each for each in self.approvals(task_id) if each.status == "pending"), None)

    def open_tasks(self, status: Status, older_than_seconds: int) -> list[Task]:
        """Tasks in that status that have not changed for so long, oldest first; an eventually consistent read."""
        limit = timestamp(now() - timedelta(seconds=older_than_seconds))
        pages = clients.client("dynamodb").get_paginator("query")
        found = pages.paginate(
            TableName=self._table,
            IndexName="by_status",
            KeyConditionExpression="status_key = :status",
            ExpressionAttributeValues={":status": {"S": status}},
        )
        tasks = [Task.model_validate_json(item["data"]["S"]) for page in found for item in page["Items"]]
        return [task for task in tasks if task.updated_at < limit]

    # Starting and planning

    def start_task(self, task: Task, idempotency: Idempotency | None = None) -> tuple[Task, bool]:
        """Write a new task and its first event.

        Returns the task, and whether it was there already under the same idempotency key.
        Raises ConflictError when the key was used with another body.
        """
        request = hash_of(task.request())
        event = Event(
            kind="task_started",
            actor=task.requester,
            status=task.status,
            input_hash=request,
            output_hash=hash_of({"task_id": task.task_id}),
            timestamp=task.created_at,
        )
        task = task.model_copy(update={"events": 1})
        writes = [self._put(_task_item(task), unless_exists=True), self._event(task.task_id, 1, event)]
        if idempotency is not None:
            writes.append(self._put_idempotency(idempotency, task.task_id))
        try:
            self._transact(writes)
        except ConcurrentUpdateError:
            if idempotency is None:
                raise
            return self._replayed(idempotency), True
        return task, False

    def begin_planning(self, task_id: str) -> Task:
        """`pending` → `planning`."""
        return self._change(task_id, lambda task: _Change({"status": "planning"}) if task.status == "pending" else None)

    def record_policy(self, task_id: str, analysis: Analysis, decision: PolicyDecision) -> Task:
        """Pin the policy's decision to the task, once; what was pinned first stays."""

        def change(task: Task) -> _Change | None:
            if task.policy_id is not None or task.status in TERMINAL:
                return None
            event = Event(
                kind="policy_checked",
                actor="planner",
                status="allowed" if decision.allowed else "denied",
                input_hash=hash_of(analysis.model_dump(mode="json")),
                output_hash=hash_of(decision.model_dump(mode="json")),
                policy_id=decision.policy_id,
                timestamp=timestamp(now()),
            )
            return _Change({"policy_id": decision.policy_id}, (event,))

        return self._change(task_id, change)

    def save_plan(self, task_id: str, plan: Plan) -> Plan:
        """Store the task's plan, once: a retry gets the plan that was stored first."""

        def change(task: Task) -> _Change | None:
            if task.plan_id is not None:
                return None
            _refuse_ended(task)
            event = Event(
                kind="plan_built",
                actor="planner",
                status="planned",
                input_hash=hash_of(task.request()),
                output_hash=plan.hash(),
                plan_hash=plan.hash(),
                policy_id=plan.policy.policy_id,
                timestamp=timestamp(now()),
            )
            fields = {
                "plan_id": plan.plan_id,
                "plan_hash": plan.hash(),
                "total_steps": len(plan.steps),
                "requires_approval": any(step.requires_approval for step in plan.steps),
            }
            return _Change(fields, (event,), (self._put(_plan_item(plan), unless_exists=True),))

        return self.plan_of(self._change(task_id, change))

    def save_preview_plan(self, plan: Plan) -> None:
        """Store a plan that is not executed; it goes after 30 days."""
        item = _plan_item(plan) | {"expires_at_epoch": {"N": str(int(time.time()) + _PREVIEW_SECONDS)}}
        self._transact([self._put(item, unless_exists=True)])

    def begin_execution(self, task_id: str) -> Task:
        """`planning` → `executing`."""

        def change(task: Task) -> _Change | None:
            _refuse_ended(task)
            return _Change({"status": "executing", "current_step": 0}) if task.status == "planning" else None

        return self._change(task_id, change)

    # Approvals

    def request_approval(self, task_id: str, step_index: int, step: Step, token: str, expires_in: int) -> Approval:
        """Ask for an approval: the item that says "waiting" and the one that holds the token are one write.

        Asked again while it is open (the state was retried), the newest token is the one that counts.
        """
        asked: list[Approval] = []

        def change(task: Task) -> _Change | None:
            _refuse_ended(task)
            plan = self.plan_of(task)
            latest = self.latest_approval(task_id, step_index)
            if latest is not None and latest.status == "pending":
                approval = latest.model_copy(update={"token": token})
                asked[:] = [approval]
                if latest.token == token:
                    return None
                return _Change({"status": "waiting_approval"}, (), (self._put_approval(task_id, approval, "pending"),))
            requested = now()
            approval = Approval(
                step_index=step_index,
                round=latest.round + 1 if latest else 1,
                status="pending",
                plan_hash=plan.hash(),
                step_hash=step.hash(),
                policy_id=plan.policy.policy_id,
                token=token,
                requested_at=timestamp(requested),
                expires_at=timestamp(requested + timedelta(seconds=expires_in)),
            )
            asked[:] = [approval]
            event = _approval_event(
                "approval_requested", "compliance", "pending", approval, step, approval.requested_at
            )
            return _Change(
                {"status": "waiting_approval", "current_step": step_index},
                (event,),
                (self._put_approval(task_id, approval, None),),
            )

        self._change(task_id, change)
        return asked[0]

    def decide(self, task_id: str, *, approved: bool, subject: str, reason: str) -> Approval:
        """Commit a person's decision: `pending` → `approved` or `rejected`, once. Delivering it comes after.

        Raises ConflictError when the task waits for no approval (any more), with the status it has.
        """
        decided: list[Approval] = []

        def change(task: Task) -> _Change | None:
            approval = self.open_approval(task_id)
            if task.status != "waiting_approval" or approval is None:
                raise ConflictError("the task does not wait for an approval", task_status=task.status)
            moment = now()
            if moment >= parse_timestamp(approval.expires_at):
                raise ConflictError("the approval has expired", task_status="expired")
            decision = approval.model_copy(
                update={
                    "status": "approved" if approved else "rejected",
                    "decided_by": subject,
                    "decided_at": timestamp(moment),
                    "reason": reason,
                }
            )
            decided[:] = [decision]
            step = self.plan_of(task).steps[approval.step_index]
            event = _approval_event("approval_decided", subject, decision.status, decision, step, timestamp(moment))
            return _Change(
                {"status": "executing"},
                (event.model_copy(update={"detail": reason}),),
                (self._put_approval(task_id, decision, "pending"),),
            )

        self._change(task_id, change)
        return decided[0]

    # Steps

    def claim_step(self, task_id: str, step_index: int, step: Step, approval: Approval | None) -> StepRecord:
        """Record the intent to run a step before it acts; its approval is consumed by that, once.

        Returns the record: `running` with the number of this attempt, or finished, when an attempt before has ended it.
        """
        claimed: list[StepRecord] = []

        def change(task: Task) -> _Change | None:
            record = self.step(task_id, step_index)
            if record is not None and record.status != "running":
                claimed[:] = [record]
                return None
            _refuse_ended(task)
            sk = f"STEP#{step_index:03d}"
            if record is not None:
                again = record.model_copy(update={"attempt": record.attempt + 1})
                claimed[:] = [again]
                return _Change(writes=(self._put_step(task_id, sk, again, running=record.attempt),))
            first = StepRecord(
                step_index=step_index,
                step_id=step.step_id,
                type=step.type,
                status="running",
                attempt=1,
                input_hash=hash_of(step.parameters),
                started_at=timestamp(now()),
            )
            claimed[:] = [first]
            writes = [self._put_step(task_id, sk, first, running=None)]
            if approval is not None:
                writes.append(self._consume_approval(task_id, approval))
            return _Change({"current_step": step_index}, (), tuple(writes))

        self._change(task_id, change)
        return claimed[0]

    def finish_step(
        self, task_id: str, running: StepRecord, *, result: dict[str, Any] | None, error: str | None
    ) -> StepRecord:
        """Record how a step ended, once, and tell it; whoever ends it first is believed."""
        ended: list[StepRecord] = []

        def change(task: Task) -> _Change | None:
            record = self.step(task_id, running.step_index)
            if record is not None and record.status != "running":
                ended[:] = [record]
                return None
            moment = now()
            output = result if error is None else {"error": error}
            final = (record or running).model_copy(
                update={
                    "status": "succeeded" if error is None else "failed",
                    "result": result,
                    "error": error,
                    "output_hash": hash_of(output),
                    "duration_ms": int((moment - parse_timestamp(running.started_at)).total_seconds() * 1000),
                }
            )
            ended[:] = [final]
            event = Event(
                kind="step_executed",
                actor="worker",
                status=final.status,
                input_hash=final.input_hash,
                output_hash=str(final.output_hash),
                step_index=final.step_index,
                step_id=final.step_id,
                step_type=final.type,
                plan_hash=task.plan_hash or "",
                policy_id=task.policy_id or "",
                timestamp=timestamp(moment),
                detail=error or "",
            )
            # A task that has ended in the meantime (cancelled, say) still gets the record of what was done.
            return _Change(
                events=(event,),
                writes=(self._put_step(task_id, f"STEP#{final.step_index:03d}", final, running=final.attempt),),
            )

        self._change(task_id, change)
        return ended[0]

    # Ending

    def end_task(self, task_id: str, outcome: Outcome, *, actor: str, reason: str, failed_step: str | None) -> Task:
        """Put a task into its terminal status, once. What is terminal stays."""

        def change(task: Task) -> _Change | None:
            if task.status in TERMINAL:
                return None
            return self._ending(task, outcome, actor, reason, failed_step)

        return self._change(task_id, change)

    def _ending(self, task: Task, outcome: Outcome, actor: str, reason: str, failed_step: str | None) -> _Change:
        moment = timestamp(now())
        events: list[Event] = []
        writes: list[Item] = []
        approval = self.approvals(task.task_id)[-1:] if outcome == "expired" else []
        if approval and approval[0].status == "pending":
            expired = approval[0].model_copy(update={"status": "expired"})
            step = self.plan_of(task).steps[expired.step_index]
            events.append(_approval_event("approval_expired", "compliance", "expired", expired, step, moment))
            writes.append(self._put_approval(task.task_id, expired, "pending"))
        elif approval and approval[0].status == "approved":
            # Decided in time, but the decision did not reach the execution: that is neither expiry nor rejection.
            outcome, reason = "failed", "the approval could not be delivered in time"
        elif approval and approval[0].status == "rejected":
            outcome, reason = "rejected", approval[0].reason or "rejected"
        final = {"status": outcome, "reason": reason or None, "failed_step": failed_step}
        events.append(
            Event(
                kind="task_ended",
                actor=actor,
                status=outcome,
                input_hash=hash_of(task.request()),
                output_hash=hash_of(final),
                plan_hash=task.plan_hash or "",
                policy_id=task.policy_id or "",
                timestamp=moment,
                detail=reason,
            )
        )
        return _Change(final, tuple(events), tuple(writes))

    # DynamoDB

    def _change(self, task_id: str, decide: Callable[[Task], _Change | None]) -> Task:
        for attempt in range(_ATTEMPTS):
            task = self.get_task(task_id)
            change = decide(task)
            if change is None:
                return task
            counters = {"version": task.version + 1, "events": task.events + len(change.events)}
            updated = task.model_copy(update=change.task | counters | {"updated_at": timestamp(now())})
            writes = [self._put_task(updated, before=task)]
            writes += [self._event(task_id, task.events + n, event) for n, event in enumerate(change.events, start=1)]
            try:
                self._transact([*writes, *change.writes])
            except ConcurrentUpdateError:
                if attempt == _ATTEMPTS - 1:
                    raise
                time.sleep(0.02 * 2**attempt)
                continue
            return updated
        raise AssertionError("unreachable")

    def _get(self, pk: str, sk: str) -> Item | None:
        found = clients.client("dynamodb").get_item(
            TableName=self._table, Key={"pk": {"S": pk}, "sk": {"S": sk}}, ConsistentRead=True
        )
        item: Item | None = found.get("Item")
        return item

    def _query(self, pk: str, prefix: str) -> list[Item]:
        pages = clients.client("dynamodb").get_paginator("query")
        found = pages.paginate(
            TableName=self._table,
            KeyConditionExpression="pk = :pk AND begins_with(sk, :prefix)",
            ExpressionAttributeValues={":pk": {"S": pk}, ":prefix": {"S": prefix}},
            ConsistentRead=True,
        )
        return [item for page in found for item in page["Items"]]

    def _transact(self, writes: list[Item]) -> None:
        from botocore.exceptions import ClientError

        try:
            clients.client("dynamodb").transact_write_items(TransactItems=writes)
        except ClientError as error:
            code = error.response["Error"]["Code"]
            reasons = {reason.get("Code") for reason in error.response.get("CancellationReasons", [])}
            lost = {"ConditionalCheckFailed", "TransactionConflict"} & reasons
            if code == "TransactionCanceledException" and lost:
                raise ConcurrentUpdateError("somebody else changed this in between") from error
            if code in {"ThrottlingException", "ProvisionedThroughputExceededException", "InternalServerError"}:
                raise UnavailableError("the table of tasks is busy") from error
            raise

    def _put(self, item: Item, *, unless_exists: bool) -> Item:
        put: Item = {"TableName": self._table, "Item": item}
        if unless_exists:
            put["ConditionExpression"] = "attribute_not_exists(pk)"
        return {"Put": put}

    def _put_task(self, task: Task, *, before: Task) -> Item:
        nobody_wrote_since = "version = :version"
        return {
            "Put": {
                "TableName": self._table,
                "Item": _task_item(task),
                "ConditionExpression": nobody_wrote_since,
                "ExpressionAttributeValues": {":version": {"N": str(before.version)}},
            }
        }

    def _event(self, task_id: str, number: int, event: Event) -> Item:
        attributes: Item = {
            name: {"N": str(value)} if isinstance(value, int) else {"S": value}
            for name, value in event.model_dump(mode="json").items()
        }
        key = {"pk": {"S": task_id}, "sk": {"S": f"EVENT#{number:06d}"}}
        return self._put(key | attributes, unless_exists=True)

    def _put_approval(self, task_id: str, approval: Approval, status_before: str | None) -> Item:
        item = {
            "pk": {"S": task_id},
            "sk": {"S": _approval_sk(approval)},
            "status": {"S": approval.status},
            "data": {"S": approval.model_dump_json()},
        }
        put = self._put(item, unless_exists=status_before is None)
        if status_before is not None:
            not_decided_yet = "#status = :before"
            put["Put"]["ConditionExpression"] = not_decided_yet
            put["Put"]["ExpressionAttributeNames"] = {"#status": "status"}
            put["Put"]["ExpressionAttributeValues"] = {":before": {"S": status_before}}
        return put

    def _consume_approval(self, task_id: str, approval: Approval) -> Item:
        approved_and_never_used = "#status = :approved AND attribute_not_exists(consumed_at)"
        return {
            "Update": {
                "TableName": self._table,
                "Key": {"pk": {"S": task_id}, "sk": {"S": _approval_sk(approval)}},
                "UpdateExpression": "SET consumed_at = :now",
                "ConditionExpression": approved_and_never_used,
                "ExpressionAttributeNames": {"#status": "status"},
                "ExpressionAttributeValues": {":approved": {"S": "approved"}, ":now": {"S": timestamp(now())}},
            }
        }

    def _put_step(self, task_id: str, sk: str, record: StepRecord, *, running: int | None) -> Item:
        """`running` is the attempt that the stored record must be in; None: there must be no record."""
        item = {
            "pk": {"S": task_id},
            "sk": {"S": sk},
            "status": {"S": record.status},
            "attempt": {"N": str(record.attempt)},
            "data": {"S": record.model_dump_json()},
        }
        put = self._put(item, unless_exists=running is None)
        if running is not None:
            still_ours = "#status = :running AND attempt = :attempt"
            put["Put"]["ConditionExpression"] = still_ours
            put["Put"]["ExpressionAttributeNames"] = {"#status": "status"}
            put["Put"]["ExpressionAttributeValues"] = {
                ":running": {"S": "running"},
                ":attempt": {"N": str(running)},
            }
        return put

    def _put_idempotency(self, idempotency: Idempotency, task_id: str) -> Item:
        seconds = int(time.time())
        item = {
            "pk": {"S": idempotency.pk},
            "sk": {"S": "IDEMPOTENCY"},
            "body_hash": {"S": idempotency.body_hash},
            "task_id": {"S": task_id},
            "expires_at_epoch": {"N": str(seconds + _IDEMPOTENCY_SECONDS)},
        }
        put = self._put(item, unless_exists=True)
        # DynamoDB deletes expired items late; until it does, the condition treats them as gone.
        put["Put"]["ConditionExpression"] += " OR expires_at_epoch < :now"
        put["Put"]["ExpressionAttributeValues"] = {":now": {"N": str(seconds)}}
        return put

    def _replayed(self, idempotency: Idempotency) -> Task:
        item = self._get(idempotency.pk, "IDEMPOTENCY")
        if item is None:
            raise ConcurrentUpdateError("the same request is being handled: try again")
        if item["body_hash"]["S"] != idempotency.body_hash:
            raise ConflictError("this Idempotency-Key was used with another request", field="Idempotency-Key")
        return self.get_task(item["task_id"]["S"])


def _refuse_ended(task: Task) -> None:
    if task.status in TERMINAL:
        raise ConflictError(f"the task has ended: {task.status}", task_status=task.status)


def _task_item(task: Task) -> Item:
    return {
        "pk": {"S": task.task_id},
        "sk": {"S": "TASK"},
        "task_id": {"S": task.task_id},
        "status_key": {"S": task.status},
        "requester_key": {"S": task.requester},
        "version": {"N": str(task.version)},
        "data": {"S": json.dumps(task.model_dump(mode="json"), ensure_ascii=False, separators=(",", ":"))},
    }


def _plan_item(plan: Plan) -> Item:
    text = canonical_json(plan.model_dump(mode="json"))
    return {"pk": {"S": plan.plan_id}, "sk": {"S": "PLAN"}, "data": {"S": text}}


def _approval_sk(approval: Approval) -> str:
    return f"APPROVAL#{approval.step_index:03d}#{approval.round:02d}"


def _approval_event(kind: Any, actor: str, status: str, approval: Approval, step: Step, moment: str) -> Event:
    return Event(
        kind=kind,
        actor=actor,
        status=status,
        input_hash=approval.step_hash,
        output_hash=hash_of({"status": status, "actor": actor, "reason": approval.reason or ""}),
        step_index=approval.step_index,
        step_id=step.step_id,
        step_type=step.type,
        plan_hash=approval.plan_hash,
        policy_id=approval.policy_id,
        timestamp=moment,
    )
