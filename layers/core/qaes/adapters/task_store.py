"""The task aggregate in DynamoDB: task, events, plan, step records, approvals.

Every change of a task is one transaction: the TASK item (guarded by its version), one EVENT item that tells
what happened (a transactional outbox, which the audit recorder drains), and the PLAN, STEP or APPROVAL that goes with
it. Each method reads, decides and writes; when somebody else wrote in between, it reads again. Called twice, it finds
that its change is there and changes nothing.
"""

from __future__ import annotations

import json
import random
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from qaes.adapters import dynamo, metrics, settings
from qaes.adapters.shards import UNDER_WAY, status_keys
from qaes.adapters.task_items import Idempotency, Item, TaskItems, is_counter, plan_item, task_item
from qaes.domain.canonical import SALT_LETTERS, canonical_json, hash_of, salted_hash
from qaes.domain.compliance import REJECTED
from qaes.domain.errors import (
    ConflictError,
    ForbiddenError,
    LimitError,
    NotFoundError,
    ThrottledError,
    UnavailableError,
)
from qaes.domain.ids import now, parse_timestamp, timestamp
from qaes.domain.models import (
    RETRYABLE,
    TERMINAL,
    Analysis,
    Approval,
    ApprovalStatus,
    Decision,
    Event,
    EventKind,
    Outcome,
    Plan,
    Status,
    Step,
    StepRecord,
    Task,
    WalletBalance,
    by_agent,
)
from qaes.domain.policy import PolicyDecision
from qaes.domain.text import same_subject

MAX_RETRIES = 20
"""How often a task may be retried: its trail, and the bundle of it, stay small enough to be sent."""
_ATTEMPTS = 8


@dataclass(frozen=True)
class _Change:
    """What to write: fields of the task, events, and further writes of the same transaction."""

    task: dict[str, Any] = field(default_factory=dict)
    events: tuple[Event, ...] = ()
    writes: tuple[Item, ...] = ()


class ReplayedError(Exception):
    """Not an error but an answer: the request was taken earlier, under the same Idempotency-Key."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__("answered before")
        self.answer = answer


class TaskStore:
    """The repository of tasks. All reads are consistent, but for those of an index."""

    def __init__(self, table: str | None = None) -> None:
        self._table = table or settings.text("TASKS_TABLE")
        self._items = TaskItems(self._table)

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
        tasks = [Task.model_validate_json(item["data"]["S"]) for item in self._by_status(status)]
        return [task for task in tasks if task.status == status and task.updated_at < _ago(older_than_seconds)]

    def transfers_under_way(self, older_than_seconds: int) -> list[tuple[str, StepRecord]]:
        """(task id, record) of each step that was begun so long ago and waits for the ledger; its task may have ended.

        An eventually consistent read.
        """
        items = self._by_status(UNDER_WAY)
        found = [(item["pk"]["S"], StepRecord.model_validate_json(item["data"]["S"])) for item in items]
        return [(task_id, record) for task_id, record in found if record.started_at < _ago(older_than_seconds)]

    def _by_status(self, status: str) -> list[Item]:
        """Read the items that the index has in this status; it names them, in the order of their tasks' start."""
        keys = [
            {"pk": item["pk"], "sk": item["sk"]}
            for status_key in status_keys(status)
            for item in dynamo.items(
                TableName=self._table,
                IndexName="by_status",
                KeyConditionExpression="status_key = :status",
                ExpressionAttributeValues={":status": {"S": status_key}},
            )
        ]
        found = dynamo.get_many(self._table, keys, ConsistentRead=False)
        return sorted(found, key=lambda item: (item["pk"]["S"], item["sk"]["S"]))

    # Starting and planning

    def start_task(
        self, task: Task, idempotency: Idempotency | None = None, *, max_open: int | None = None
    ) -> tuple[Task, bool]:
        """Write a new task and its first event.

        Returns the task, and whether it was there already under the same idempotency key.

        Raises
        ------
        ConflictError
            The key was used with another body.
        LimitError
            The requester has `max_open` tasks that have not ended.
        """
        task = task.model_copy(update={"events": 1, "salt": _new_salt()})
        event = _event(
            task,
            "task_started",
            task.requester,
            task.status,
            task.request(),
            {"task_id": task.task_id, "idempotency_key": _key_hash(idempotency)},
            timestamp=task.created_at,
            input_of="request",
        )
        counter = self._items.count_open(task.requester, 1, max_open)
        writes = [
            self._items.put(task_item(task), unless_exists=True),
            self._items.put_events(task.task_id, 1, [event]),
            counter,
        ]
        if idempotency is not None:
            writes.append(self._items.put_idempotency(idempotency, {"task_id": task.task_id}))
        try:
            dynamo.transact(writes)
        except dynamo.ConditionFailedError as error:
            if idempotency is not None and (answer := self.answered(idempotency)) is not None:
                return self.get_task(answer["task_id"]), True
            self._refuse_beyond(max_open, counter, writes, error)
            raise UnavailableError("the task could not be written: try again") from error
        metrics.count(event)
        return task, False

    def answered(self, idempotency: Idempotency) -> dict[str, Any] | None:
        """Return what was answered under this key in the last 24 hours. Raises ConflictError for another request."""
        item = self._get(idempotency.pk, "IDEMPOTENCY")
        if item is None or int(item["expires_at_epoch"]["N"]) < time.time():
            return None
        if item["body_hash"]["S"] != idempotency.body_hash:
            raise ConflictError("this Idempotency-Key was used with another request", field="Idempotency-Key")
        answer: dict[str, Any] = json.loads(item["answer"]["S"])
        return answer

    def begin_planning(self, task_id: str) -> Task:
        """`pending` → `planning`."""
        return self._change(task_id, lambda task: _Change({"status": "planning"}) if task.status == "pending" else None)

    def record_policy(self, task_id: str, analysis: Analysis, decision: PolicyDecision) -> Task:
        """Pin the policy's decision to the task, once; what was pinned first stays."""

        def change(task: Task) -> _Change | None:
            if task.policy_id is not None or task.status in TERMINAL:
                return None
            event = _event(
                task,
                "policy_checked",
                "planner",
                "allowed" if decision.allowed else "denied",
                analysis.model_dump(mode="json"),
                decision.model_dump(mode="json"),
                policy_id=decision.policy_id,
            )
            return _Change({"policy_id": decision.policy_id}, (event,))

        return self._change(task_id, change)

    def save_plan(self, task_id: str, plan: Plan) -> Plan:
        """Store the task's plan, once: a retry gets the plan that was stored first."""

        def change(task: Task) -> _Change | None:
            if task.plan_id is not None:
                return None
            _refuse_ended(task)
            event = _event(
                task,
                "plan_built",
                "planner",
                "planned",
                task.request(),
                plan.model_dump(mode="json"),
                plan_hash=plan.hash(),
                policy_id=plan.policy.policy_id,
                input_of="request",
                output_of="plan",
            )
            fields = {
                "plan_id": plan.plan_id,
                "plan_hash": plan.hash(),
                "total_steps": len(plan.steps),
                "requires_approval": any(step.requires_approval for step in plan.steps),
            }
            return _Change(fields, (event,), (self._items.put(plan_item(plan), unless_exists=True),))

        return self.plan_of(self._change(task_id, change))

    def begin_execution(self, task_id: str) -> Task:
        """`planning` → `executing`."""

        def change(task: Task) -> _Change | None:
            _refuse_ended(task)
            return _Change({"status": "executing", "current_step": 0}) if task.status == "planning" else None

        return self._change(task_id, change)

    # Approvals

    def request_approval(
        self,
        task_id: str,
        step_index: int,
        step: Step,
        token: str,
        expires_in: int,
        *,
        required: int = 1,
        execution: str | None = None,
        balance: WalletBalance | None = None,
    ) -> Approval:
        """Ask for an approval: the item that says "waiting" and the one that holds the token are one write.

        Asked again in the same execution (the state was retried), the newest token is the one that counts. What was
        decided in between, or has expired, is returned as it is, and is to be delivered: nobody is asked twice, unless
        fewer have approved than are `required` by now (a policy that has become stricter).

        Raises ConflictError when the task has ended, or `execution` is not its execution (any more): a token of an
        execution before a retry wakes nobody, and never replaces the token of the present one.
        """
        asked: list[Approval] = []

        def change(task: Task) -> _Change | None:
            _refuse_ended(task)
            refuse_other_execution(task, execution)
            plan = self.plan_of(task)
            latest = self.latest_approval(task_id, step_index)
            if latest is not None and latest.run == task.run and not latest.is_too_little(required):
                approval = latest.model_copy(update={"token": token})
                asked[:] = [approval]
                if latest.token == token:
                    return None
                fields = {"status": "waiting_approval"} if latest.status == "pending" else {}
                return _Change(fields, (), (self._items.put_approval(task_id, approval, latest.status),))
            requested = now()
            approval = Approval(
                step_index=step_index,
                round=latest.round + 1 if latest else 1,
                run=task.run,
                status="pending",
                required=required,
                plan_hash=plan.hash(),
                step_hash=step.hash(),
                policy_id=plan.policy.policy_id,
                token=token,
                requested_at=timestamp(requested),
                expires_at=timestamp(requested + timedelta(seconds=expires_in)),
                balance=balance,
            )
            asked[:] = [approval]
            event = _approval_event(
                task, "approval_requested", "compliance", "pending", approval, step, approval.requested_at
            )
            return _Change(
                {
                    "status": "waiting_approval",
                    "current_step": step_index,
                    "waiting_since": approval.requested_at,
                    "waiting_until": approval.expires_at,
                },
                (event,),
                (self._items.put_approval(task_id, approval, None),),
            )

        self._change(task_id, change)
        return asked[0]

    def decide(
        self,
        task_id: str,
        *,
        approved: bool,
        subject: str,
        reason: str,
        plan_hash: str | None = None,
        four_eyes: bool = True,
        idempotency: Idempotency | None = None,
    ) -> Approval:
        """Commit a person's decision, once. Delivering it, when it was the last that was needed, comes after.

        A rejection ends the approval, and so does the last of the approvals that are required; each is another
        person's. Until then the task goes on waiting.

        Raises
        ------
        ConflictError
            The task waits for no approval (any more), with its status and who decided; this person has approved
            already; or `plan_hash` is not what would be approved.
        ForbiddenError
            With `four_eyes`: this person has started the task, or has retried it, in whatever run.
        ReplayedError
            The decision was taken earlier, under the same idempotency key.
        """
        decided: list[Approval] = []

        def change(task: Task) -> _Change | None:
            if four_eyes:
                _refuse_involved(task, subject)
            approval = self.open_approval(task_id)
            if task.status != "waiting_approval" or approval is None or approval.run != task.run:
                raise self._not_waiting(task)
            moment = now()
            if moment >= parse_timestamp(approval.expires_at):
                raise ConflictError("the approval has expired", task_status="expired")
            if plan_hash is not None and plan_hash != approval.plan_hash:
                raise ConflictError(
                    "the plan is not the one that was decided on", field="plan_hash", plan_hash=approval.plan_hash
                )
            if any(same_subject(each.subject, subject) for each in approval.decisions):
                raise ConflictError("this person has approved already", task_status=task.status, decided_by=subject)
            decisions = (
                *approval.decisions,
                Decision(subject=subject, approved=approved, reason=reason, decided_at=timestamp(moment)),
            )
            ends = not approved or len(decisions) >= approval.required
            status = ("approved" if approved else "rejected") if ends else "pending"
            decision = approval.model_copy(update={"status": status, "decisions": decisions})
            decided[:] = [decision]
            step = self.plan_of(task).steps[approval.step_index]
            event = _approval_event(
                task,
                "approval_decided",
                subject,
                "approved" if approved else "rejected",
                decision,
                step,
                timestamp(moment),
                idempotency,
            )
            return _Change(
                {"status": "executing", "waiting_until": None} if ends else {},
                (event,),
                (
                    self._items.put_approval(task_id, decision, "pending"),
                    *self._keep(idempotency, decided_answer(task_id, decision)),
                ),
            )

        self._change(task_id, change, idempotency)
        return decided[0]

    def _not_waiting(self, task: Task) -> ConflictError:
        last = self.approvals(task.task_id)[-1:]
        by = {"decided_by": last[0].decided_by, "decision": last[0].status} if last and last[0].decided_by else {}
        return ConflictError("the task does not wait for an approval", task_status=task.status, **by)

    def remind(self, task_id: str) -> bool:
        """Tell, once for each approval, that it will expire soon; returns whether it was told now."""
        told = False

        def change(task: Task) -> _Change | None:
            nonlocal told
            approval = self.open_approval(task_id)
            told = task.status == "waiting_approval" and approval is not None and approval.reminded_at is None
            if not told or approval is None:
                return None
            moment = timestamp(now())
            step = self.plan_of(task).steps[approval.step_index]
            event = _approval_event(task, "approval_reminder", "reconciler", "pending", approval, step, moment)
            reminded = approval.model_copy(update={"reminded_at": moment})
            return _Change({}, (event,), (self._items.put_approval(task_id, reminded, "pending"),))

        self._change(task_id, change)
        return told

    def expire(self, task_id: str) -> Approval | None:
        """Close the approval whose time is over; returns it, so that the execution that waits for it can be woken."""
        expired: list[Approval] = []

        def change(task: Task) -> _Change | None:
            expired.clear()
            approval = self.open_approval(task_id)
            if task.status != "waiting_approval" or approval is None or now() < parse_timestamp(approval.expires_at):
                return None
            writes, events = self._close(task, approval, "expired", timestamp(now()))
            expired[:] = [approval.model_copy(update={"status": "expired"})]
            return _Change({"status": "executing", "waiting_until": None}, tuple(events), tuple(writes))

        self._change(task_id, change)
        return expired[0] if expired else None

    def _close(
        self, task: Task, approval: Approval, status: ApprovalStatus, moment: str
    ) -> tuple[list[Item], list[Event]]:
        """Close an open approval that nobody will decide on any more."""
        closed = approval.model_copy(update={"status": status})
        step = self.plan_of(task).steps[approval.step_index]
        kind: EventKind = "approval_expired" if status == "expired" else "approval_cancelled"
        event = _approval_event(task, kind, "compliance", status, closed, step, moment)
        return [self._items.put_approval(task.task_id, closed, "pending")], [event]

    # Steps

    def claim_step(
        self,
        task_id: str,
        step_index: int,
        step: Step,
        approval: Approval | None,
        *,
        run: int,
        current: PolicyDecision,
        replaces: str | None = None,
    ) -> StepRecord:
        """Record the intent to run a step before it acts; its approval is consumed by that, once.

        Returns the record: `running` with the number of this attempt, or finished, when an attempt before has ended it.
        `run` is the execution for which it was decided, `current` what the policy in force said, which the event tells;
        to attempt it once more in one execution is not another decision, and no event. `replaces` is the transaction
        of an attempt that moved nothing.

        Raises ConflictError when the task has ended, or another execution of it has begun.
        """
        claimed: list[StepRecord] = []

        def change(task: Task) -> _Change | None:
            record = self.step(task_id, step_index)
            if record is not None and not record.may_run(task):
                claimed[:] = [record]
                return None
            _refuse_ended(task)
            _refuse_other_run(task, run)
            if record is not None and record.status == "running":
                begun = record.model_copy(update={"attempt": record.attempt + 1, "run": task.run})
            else:
                begun = _first_record(task, step_index, step, record).model_copy(update={"replaces": replaces})
            claimed[:] = [begun]
            writes = [self._items.put_step(task_id, _step_sk(begun), begun, before=record)]
            twin = record is not None and record.status == "running" and record.run == task.run
            if twin:  # whose claim was told, and has consumed the approval
                return _Change({"current_step": step_index}, (), tuple(writes))
            if approval is not None:
                writes.append(self._items.consume_approval(task_id, approval))
            event = _claim_event(task, begun, step, approval, current)
            return _Change({"current_step": step_index}, (event,), tuple(writes))

        self._change(task_id, change)
        return claimed[0]

    def finish_step(
        self, task_id: str, running: StepRecord, *, result: dict[str, Any] | None, error: str | None
    ) -> StepRecord:
        """Record how a step ended, once, and tell it; whoever ends it first is believed.

        An execution that has claimed the step since `running` was read is not told by one before it how it ended: then
        the record stays as it is.
        """
        ended: list[StepRecord] = []

        def change(task: Task) -> _Change | None:
            record = self.step(task_id, running.step_index)
            if record is not None and (record.status != "running" or record.run != running.run):
                ended[:] = [record]
                return None
            final, event = self._finished(task, record or running, result, error)
            ended[:] = [final]
            # A task that has ended in the meantime (cancelled, say) still gets the record of what was done.
            put = self._items.put_step(task_id, _step_sk(final), final, before=record or running)
            return _Change(events=(event,), writes=(put,))

        self._change(task_id, change)
        return ended[0]

    def refuse_step(
        self, task_id: str, step_index: int, step: Step, before: StepRecord | None, error: str, *, run: int
    ) -> StepRecord:
        """Record that a step may not run: this execution has not begun it, which the event says.

        Raises
        ------
        UnavailableError
            Another attempt has begun since `before` was read: that one is not overruled.
        ConflictError
            The task has ended, or another execution of it than `run` has begun, which may yet run the step.
        """
        refused: list[StepRecord] = []

        def change(task: Task) -> _Change | None:
            record = self.step(task_id, step_index)
            if record != before:
                raise UnavailableError("another attempt is at work on this step")
            _refuse_ended(task)
            _refuse_other_run(task, run)
            never_begun = _first_record(task, step_index, step, record)
            final, event = self._finished(task, never_begun, None, error, begun=False)
            refused[:] = [final]
            put = self._items.put_step(task_id, _step_sk(final), final, before=record)
            return _Change({"current_step": step_index}, (event,), (put,))

        self._change(task_id, change)
        return refused[0]

    def _finished(
        self, task: Task, record: StepRecord, result: dict[str, Any] | None, error: str | None, *, begun: bool = True
    ) -> tuple[StepRecord, Event]:
        moment = now()
        output = result if error is None else {"error": error} | ({} if begun else {"begun": False})
        final = record.model_copy(
            update={
                "status": "succeeded" if error is None else "failed",
                "result": result,
                "error": error,
                "output_hash": hash_of(output),
                "duration_ms": int((moment - parse_timestamp(record.started_at)).total_seconds() * 1000),
            }
        )
        event = _event(
            task,
            "step_executed",
            "worker",
            final.status,
            self.plan_of(task).steps[final.step_index].parameters,
            output,
            step_index=final.step_index,
            step_id=final.step_id,
            step_type=final.type,
            timestamp=timestamp(moment),
            input_of="parameters",
        )
        return final, event

    # Waiting for the ledger

    def put_waiter(self, task_id: str, step_index: int, token: str, expires_in: int, *, run: int) -> None:
        """Keep the token of the state that waits for a step's confirmation; the newest of a run is the one that counts.

        It goes when it was used (`forget_waiter`), or after `expires_in` seconds, when the state has given up. Raises
        ConflictError when a later run than `run` waits: its token is not replaced.
        """
        step_functions_waits = _waiter_key(task_id, step_index) | {
            "token": {"S": token},
            "run": {"N": str(run)},
            "expires_at_epoch": {"N": str(int(time.time()) + expires_in)},
        }
        no_later_run_waits = "attribute_not_exists(#run) OR #run <= :run"
        try:
            dynamo.call(
                "put_item",
                TableName=self._table,
                Item=step_functions_waits,
                ConditionExpression=no_later_run_waits,
                ExpressionAttributeNames={"#run": "run"},
                ExpressionAttributeValues={":run": {"N": str(run)}},
            )
        except dynamo.ConditionFailedError as error:
            raise ConflictError("another execution of the task has begun") from error

    def waiter(self, task_id: str, step_index: int) -> str | None:
        """Return the token of the state that waits for a step's confirmation."""
        item = self._get(task_id, f"WAITER#{step_index:03d}")
        return item["token"]["S"] if item else None

    def forget_waiter(self, task_id: str, step_index: int, token: str) -> None:
        """Delete a token that was used; one that has come since then stays."""
        with suppress(dynamo.ConditionFailedError):
            dynamo.call(
                "delete_item",
                TableName=self._table,
                Key=_waiter_key(task_id, step_index),
                ConditionExpression="#token = :token",
                ExpressionAttributeNames={"#token": "token"},
                ExpressionAttributeValues={":token": {"S": token}},
            )

    # Ending, and taking an end back

    def end_task(
        self,
        task_id: str,
        outcome: Outcome,
        *,
        actor: str,
        reason: str,
        failed_step: str | None = None,
        execution: str | None = None,
    ) -> Task:
        """Put a task into its terminal status, once. What is terminal stays.

        With `execution`, only if that is (still) the task's execution: one that ended before a retry has no say.
        """

        def change(task: Task) -> _Change | None:
            if task.status in TERMINAL or execution not in {None, task.execution_name}:
                return None
            return self._ending(task, outcome, actor, reason, failed_step)

        return self._change(task_id, change)

    def cancel(
        self,
        task_id: str,
        *,
        subject: str,
        reason: str,
        agent: str | None = None,
        idempotency: Idempotency | None = None,
    ) -> Task:
        """End a task because somebody wants it, or their `agent`. Stopping its execution comes after.

        Raises
        ------
        ConflictError
            It has ended already; or an approver has rejected it, and it ends as that.
        ReplayedError
            As in `decide`.
        """

        def change(task: Task) -> _Change | None:
            _refuse_ended(task)
            if (rejected := _rejected(self._asked_in_this_run(task))) is not None:
                raise _rejected_already(task, rejected)
            ending = self._ending(task, "cancelled", subject, reason, None, idempotency, agent)
            kept = self._keep(idempotency, lifecycle_answer(task_id, "cancelled"))
            return _Change(ending.task, ending.events, (*ending.writes, *kept))

        return self._change(task_id, change, idempotency)

    def retry(
        self,
        task_id: str,
        *,
        subject: str,
        agent: str | None = None,
        max_open: int | None = None,
        idempotency: Idempotency | None = None,
    ) -> Task:
        """Take back the end of a task that failed or expired: it goes on at the step that did not succeed.

        A task without a plan is `pending` again, one with a plan `executing`. Starting the execution comes after.

        Raises
        ------
        ConflictError
            The task has not ended, or in a way that no retry takes back, or has been retried `MAX_RETRIES` times; or an
            approver has rejected it, in whatever run.
        LimitError, ReplayedError
            As in `start_task` and `decide`.
        """

        def change(task: Task) -> _Change | None:
            if task.status not in RETRYABLE:
                raise ConflictError("only a task that failed or expired can be retried", task_status=task.status)
            # A rejected task ends as that. Those of the time when it could end otherwise are not retried either.
            if (rejected := _rejected(self.approvals(task_id))) is not None:
                raise _rejected_already(task, rejected)
            if task.run > MAX_RETRIES:
                raise ConflictError(
                    f"a task is retried at most {MAX_RETRIES} times: start another", task_status=task.status
                )
            status: Status = "executing" if task.plan_id else "pending"
            fields = {
                "status": status, "run": task.run + 1, "retriers": tuple(dict.fromkeys((*task.retriers, subject))),
                "reason": None, "failed_step": None, "waiting_until": None,
            }  # fmt: skip
            event = _event(
                task,
                "task_retried",
                subject,
                status,
                _request_again(task),
                {"run": task.run + 1, "idempotency_key": _key_hash(idempotency), **by_agent(agent)},
            )
            kept = self._keep(idempotency, lifecycle_answer(task_id, status))
            return _Change(fields, (event,), (self._items.count_open(task.requester, 1, max_open), *kept))

        return self._change(task_id, change, idempotency, max_open)

    def _ending(
        self,
        task: Task,
        outcome: Outcome,
        actor: str,
        reason: str,
        failed_step: str | None,
        idempotency: Idempotency | None = None,
        agent: str | None = None,
    ) -> _Change:
        moment = timestamp(now())
        events: list[Event] = []
        writes: list[Item] = [self._items.count_open(task.requester, -1, None)]
        asked = self._asked_in_this_run(task)
        last, rejected = asked[-1] if asked else None, _rejected(asked)
        if rejected is not None:
            # Whatever else has gone wrong since, and whoever ends it: nobody passes over a no.
            outcome, reason, failed_step = "rejected", rejected.reason or REJECTED, None
        elif last is not None and last.status == "pending":
            closed, told = self._close(task, last, "expired" if outcome == "expired" else "cancelled", moment)
            writes += closed
            events += told
        elif last is not None and outcome == "expired" and last.status == "approved":
            # Decided in time, but the decision did not reach the execution: that is neither expiry nor rejection.
            outcome, reason = "failed", "the approval could not be delivered in time"
            step = self.plan_of(task).steps[last.step_index]
            events.append(_approval_event(task, "approval_undeliverable", actor, "undeliverable", last, step, moment))
        final = {"status": outcome, "reason": reason or None, "failed_step": failed_step}
        events.append(
            _event(
                task,
                "task_ended",
                actor,
                outcome,
                _request_again(task),
                final | {"idempotency_key": _key_hash(idempotency), **by_agent(agent)},
                timestamp=moment,
            )
        )
        return _Change(final | {"waiting_until": None}, tuple(events), tuple(writes))

    def _asked_in_this_run(self, task: Task) -> list[Approval]:
        return [approval for approval in self.approvals(task.task_id) if approval.run == task.run]

    # DynamoDB

    def _change(
        self,
        task_id: str,
        decide: Callable[[Task], _Change | None],
        idempotency: Idempotency | None = None,
        max_open: int | None = None,
    ) -> Task:
        for attempt in range(_ATTEMPTS):
            self._replay(idempotency)
            task = self.get_task(task_id)
            try:
                change = decide(task)
            except ConflictError:
                self._replay(idempotency)  # it may be the same request's twin that has changed the task just now
                raise
            if change is None:
                return task
            counters = {"version": task.version + 1, "events": task.events + len(change.events)}
            updated = task.model_copy(update=change.task | counters | {"updated_at": timestamp(now())})
            writes = [self._items.put_task(updated, before=task)]
            if change.events:
                writes.append(self._items.put_events(task_id, task.events + 1, change.events))
            writes += change.writes
            try:
                dynamo.transact(writes)
            except dynamo.ConditionFailedError as error:
                counter = next((write for write in change.writes if is_counter(write)), None)
                self._refuse_beyond(max_open, counter, writes, error)
                _pause(attempt)
                continue
            for event in change.events:
                metrics.count(event)
            return updated
        raise ThrottledError("others keep changing this task: try again")

    def _get(self, pk: str, sk: str) -> Item | None:
        return dynamo.get(self._table, pk, sk)

    def _query(self, pk: str, prefix: str) -> list[Item]:
        found = dynamo.items(
            TableName=self._table,
            KeyConditionExpression="pk = :pk AND begins_with(sk, :prefix)",
            ExpressionAttributeValues={":pk": {"S": pk}, ":prefix": {"S": prefix}},
            ConsistentRead=True,
        )
        return list(found)

    def _refuse_beyond(
        self, limit: int | None, counter: Item | None, writes: list[Item], error: dynamo.ConditionFailedError
    ) -> None:
        """Raise LimitError if it was the counter's condition that did not hold."""
        if limit is not None and counter is not None and writes.index(counter) in error.refused:
            raise LimitError(f"no more than {limit} open tasks at a time", max_open_tasks=limit) from error

    def _replay(self, idempotency: Idempotency | None) -> None:
        if idempotency is not None and (answer := self.answered(idempotency)) is not None:
            raise ReplayedError(answer)

    def _keep(self, idempotency: Idempotency | None, answer: dict[str, Any]) -> tuple[Item, ...]:
        return () if idempotency is None else (self._items.put_idempotency(idempotency, answer),)


def decided_answer(task_id: str, approval: Approval) -> dict[str, Any]:
    """Return the answer to a decision, now and when it is replayed."""
    last = approval.decisions[-1]
    given = sum(each.approved for each in approval.decisions)
    message = f"The step has been {approval.status}."
    if approval.status == "pending":
        message = f"Approved by {given} of {approval.required}; the task goes on waiting."
    return {
        "task_id": task_id,
        "approved": last.approved,
        "message": message,
        "approvals_required": approval.required,
        "approvals_given": given,
    }


def lifecycle_answer(task_id: str, status: Status) -> dict[str, Any]:
    """Return the answer to a cancellation or a retry, now and when it is replayed."""
    message = "The task has been cancelled." if status == "cancelled" else "The task runs again, from where it stopped."
    return {"task_id": task_id, "status": status, "message": message}


def _ago(seconds: int) -> str:
    return timestamp(now() - timedelta(seconds=seconds))


def _pause(attempt: int) -> None:
    # Jitter: those who met once do not meet again.
    time.sleep(random.uniform(0.5, 1.5) * 0.02 * 2**attempt)  # noqa: S311 - not for secrets


def _step_sk(record: StepRecord) -> str:
    return f"STEP#{record.step_index:03d}"


def _waiter_key(task_id: str, step_index: int) -> Item:
    return {"pk": {"S": task_id}, "sk": {"S": f"WAITER#{step_index:03d}"}}


def _first_record(task: Task, step_index: int, step: Step, before: StepRecord | None) -> StepRecord:
    return StepRecord(
        step_index=step_index,
        step_id=step.step_id,
        type=step.type,
        status="running",
        attempt=before.attempt + 1 if before else 1,
        run=task.run,
        input_hash=hash_of(step.parameters),
        started_at=timestamp(now()),
    )


def _refuse_ended(task: Task) -> None:
    if task.status in TERMINAL:
        raise ConflictError(f"the task has ended: {task.status}", task_status=task.status)


def _refuse_involved(task: Task, subject: str) -> None:
    """Raise ForbiddenError if this person has started the task, or has retried it in any run."""
    if same_subject(subject, task.requester):
        raise ForbiddenError("you cannot decide on a task that you started")
    if any(same_subject(subject, retrier) for retrier in task.retriers):
        raise ForbiddenError("you cannot decide on a task that you retried")


def refuse_other_execution(task: Task, execution: str | None) -> None:
    """Raise ConflictError unless `execution` is the task's; None is one from before executions gave their name."""
    if execution not in {None, task.execution_name}:
        raise ConflictError("another execution of the task has begun", task_status=task.status)


def _refuse_other_run(task: Task, run: int) -> None:
    if task.run != run:
        raise ConflictError("another execution of the task has begun", task_status=task.status)


def _rejected(approvals: list[Approval]) -> Approval | None:
    return next((approval for approval in approvals if approval.status == "rejected"), None)


def _rejected_already(task: Task, rejected: Approval) -> ConflictError:
    return ConflictError(
        "an approver has rejected the task: start another one",
        task_status=task.status,
        decided_by=rejected.decided_by,
        decision="rejected",
    )


def _new_salt() -> str:
    return secrets.token_hex(SALT_LETTERS // 2)


def _key_hash(idempotency: Idempotency | None) -> str | None:
    """What stands for the caller's key: nobody can use it from here."""
    return hash_of([idempotency.subject, idempotency.key]) if idempotency else None


def _request_again(task: Task) -> dict[str, Any]:
    """The request, by its hash: it stands in the trail's first entry, and an end and a retry may be many."""
    return {"request_hash": hash_of(task.request())}


def _event(task: Task, kind: EventKind, actor: str, status: str, input_: Any, output: Any, **more: Any) -> Event:
    """The event for what came in and what came out, by their salted hashes."""
    of_the_task = {"plan_hash": task.plan_hash or "", "policy_id": task.policy_id or "", "timestamp": timestamp(now())}
    return Event(
        kind=kind,
        actor=actor,
        status=status,
        input_hash=salted_hash(task.salt, input_),
        output_hash=salted_hash(task.salt, output),
        input=canonical_json(input_),
        output=canonical_json(output),
        **(of_the_task | more),
    )


def _claim_event(
    task: Task, begun: StepRecord, step: Step, approval: Approval | None, current: PolicyDecision
) -> Event:
    """What was decided when a step was begun: which step, with whose approval; and by the policy in force."""
    claim = {
        "step_hash": step.hash(),
        "run": begun.run,
        "attempt": begun.attempt,
        "approval": approval.round if approval else None,
    }
    return _event(
        task,
        "step_started",
        "worker",
        begun.status,
        claim,
        current.model_dump(mode="json"),
        step_index=begun.step_index,
        step_id=begun.step_id,
        step_type=begun.type,
    )


def _approval_event(
    task: Task,
    kind: EventKind,
    actor: str,
    status: str,
    approval: Approval,
    step: Step,
    moment: str,
    idempotency: Idempotency | None = None,
) -> Event:
    """What people were asked goes in: the plan and the step by their hashes. What was said to it comes out."""
    asked = {
        "plan_hash": approval.plan_hash,
        "step_hash": approval.step_hash,
        "policy_id": approval.policy_id,
        "round": approval.round,
        "required": approval.required,
        "expires_at": approval.expires_at,
    }
    said: dict[str, Any] = {"status": status, "actor": actor}
    if kind == "approval_decided":
        said |= {
            "approved": approval.decisions[-1].approved,
            "reason": approval.decisions[-1].reason,
            "decided_at": approval.decisions[-1].decided_at,
            "approvals": sum(each.approved for each in approval.decisions),
            "plan_hash": approval.plan_hash,
            "step_hash": approval.step_hash,
            "idempotency_key": _key_hash(idempotency),
        }
    return _event(
        task,
        kind,
        actor,
        status,
        asked,
        said,
        step_index=approval.step_index,
        step_id=step.step_id,
        step_type=step.type,
        plan_hash=approval.plan_hash,
        policy_id=approval.policy_id,
        timestamp=moment,
    )
