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
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from functools import cached_property
from typing import Any

from qaes.adapters import dynamo, metrics, settings
from qaes.adapters.callbacks import CallbacksTable
from qaes.adapters.decisions import DecisionsTable
from qaes.adapters.shards import UNDER_WAY, status_keys
from qaes.adapters.task_items import Idempotency, Item, TaskItems, is_counter, plan_item, task_item
from qaes.domain.canonical import SALT_LETTERS, hash_of
from qaes.domain.errors import ConflictError, LimitError, NotFoundError, ThrottledError, UnavailableError
from qaes.domain.ids import now, parse_timestamp, timestamp
from qaes.domain.models import Analysis, Approval, Event, Outcome, Plan, Status, StepRecord, Task, WalletBalance
from qaes.domain.policy import PolicyDecision
from qaes.domain.tasks import approvals, events, lifecycle
from qaes.domain.tasks.decisions import Decided, Decisions, is_decision
from qaes.domain.tasks.lifecycle import Change, History, StepOutcome

_ATTEMPTS = 8
_TOKEN_SECONDS = 7 * 24 * 3600
"""How long the token of an approval is kept after the approval's time: a decision may be delivered late."""


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
        self._read: tuple[str, int, Decisions] | None = None
        """The decisions that belong to the version of the task that was read last: each decision makes another one."""

    @cached_property
    def _decisions(self) -> DecisionsTable:
        return DecisionsTable()

    @cached_property
    def _callbacks(self) -> CallbacksTable:
        return CallbacksTable()

    # Reading

    def get_task(self, task_id: str) -> Task:
        """Read a task; what people decided about it is read from their decisions. Raises NotFoundError."""
        item = self._get(task_id, "TASK")
        if item is None:
            raise NotFoundError("no such task", field="task_id")
        task, decisions = Task.model_validate_json(item["data"]["S"]), self._decisions.of(task_id)
        self._read = (task_id, task.version, decisions)
        return decisions.of_task(task)

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

    def records(self, task_id: str) -> dict[int, StepRecord]:
        """The records of the steps that were begun, by the step's index."""
        return {record.step_index: record for record in self.steps(task_id)}

    def approvals(self, task_id: str, *, of: Task | None = None) -> list[Approval]:
        """All approvals that were asked for, by step, then by round, each with the decisions that people made on it.

        With `of`, the decisions are those of that version of the task, which need not be read again.
        """
        return self._approvals(task_id, "APPROVAL#", of)

    def latest_approval(self, task_id: str, step_index: int, *, of: Task | None = None) -> Approval | None:
        found = self._approvals(task_id, f"APPROVAL#{step_index:03d}#", of)
        return found[-1] if found else None

    def open_approval(self, task_id: str, *, of: Task | None = None) -> Approval | None:
        """The approval that a person is asked for now."""
        return approvals.pending_of(self.approvals(task_id, of=of))

    def _approvals(self, task_id: str, prefix: str, of: Task | None) -> list[Approval]:
        asked = [Approval.model_validate_json(item["data"]["S"]) for item in self._query(task_id, prefix)]
        return self._decisions_on(task_id, of).of_approvals(asked) if asked else []

    def _decisions_on(self, task_id: str, of: Task | None) -> Decisions:
        if of is not None and self._read is not None and self._read[:2] == (of.task_id, of.version):
            return self._read[2]
        return self._decisions.of(task_id)

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
        output = {"task_id": task.task_id, "idempotency_key": _key_hash(idempotency)}
        event = events.make(
            task,
            "task_started",
            task.requester,
            task.status,
            task.request(),
            output,
            at=task.created_at,
            input_of="request",
        )
        counter = self._items.count_open(task.requester, 1, max_open)
        writes = [
            self._items.put(task_item(task), unless_exists=True),
            *self._events(task.task_id, 1, [event], salt=task.salt),
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

    def plan_task(self, task: Task, plan: Plan) -> tuple[Task, Plan]:
        """Pin the plan's policy and store the plan: `pending` → `executing`, once. The plan that was first stays."""
        changed, _ = self._apply(task.task_id, lambda newest: lifecycle.plan_task(newest, plan, now()), known=task)
        return changed, plan if changed.plan_id == plan.plan_id else self.plan_of(changed)

    def deny_task(self, task: Task, analysis: Analysis, decision: PolicyDecision) -> Task:
        """Pin the policy that does not allow the task, and end the task, once."""
        return self._apply(
            task.task_id, lambda newest: lifecycle.deny_task(newest, analysis, decision, now()), known=task
        )[0]

    # Approvals

    def request_approval(
        self,
        task: Task,
        plan: Plan,
        step_index: int,
        token: str,
        expires_in: int,
        *,
        required: int = 1,
        execution: str | None = None,
        balance: WalletBalance | None = None,
    ) -> Approval:
        """Ask for an approval: the item that says "waiting" and the one that holds the token are one write.

        Returns the approval as it is: one that was decided on before, or has expired, is to be delivered. Raises what
        `approvals.request` raises.
        """

        def decide(newest: Task) -> Change:
            latest = self.latest_approval(newest.task_id, step_index, of=newest)
            return approvals.request(
                newest,
                plan,
                step_index,
                latest,
                token=token,
                stored_token=self._callbacks.token("APPROVAL", newest.task_id, step_index) if latest else None,
                expires_in=expires_in,
                required=required,
                execution=execution,
                balance=balance,
                at=now(),
            )

        return _approval_of(self._apply(task.task_id, decide, known=task)[1])

    def decide(
        self,
        task_id: str,
        *,
        approved: bool,
        subject: str,
        reason: str,
        plan_hash: str | None = None,
        four_eyes: bool = True,
        known: Task | None = None,
        idempotency: Idempotency | None = None,
    ) -> Approval:
        """Commit a person's decision, once. Delivering it, when it was the last that was needed, comes after.

        Raises what `approvals.decide` raises, and ReplayedError when the decision was taken earlier under the same
        idempotency key.
        """

        def decide(task: Task) -> Change:
            return approvals.decide(
                task,
                self._plan_if_any(task),
                self.approvals(task_id, of=task),
                approved=approved,
                subject=subject,
                reason=reason,
                at=now(),
                plan_hash=plan_hash,
                four_eyes=four_eyes,
                key_hash=_key_hash(idempotency),
            )

        def answer(change: Change) -> dict[str, Any]:
            return decided_answer(task_id, _approval_of(change))

        return _approval_of(self._apply(task_id, decide, known=known, idempotency=idempotency, answer=answer)[1])

    def remind(self, task_id: str) -> bool:
        """Tell, once for each approval, that it will expire soon; returns whether it was told now."""

        def decide(task: Task) -> Change:
            return approvals.remind(task, self._plan_if_any(task), self.approvals(task_id, of=task), now())

        return not self._apply(task_id, decide)[1].writes_nothing

    def expire(self, task_id: str) -> Approval | None:
        """Close the approval whose time is over; returns it, so that the execution that waits for it can be woken."""

        def decide(task: Task) -> Change:
            return approvals.expire(task, self._plan_if_any(task), self.approvals(task_id, of=task), now())

        return self._apply(task_id, decide)[1].approval

    # Steps

    def run_step(
        self,
        task: Task,
        plan: Plan,
        step_index: int,
        outcome: StepOutcome,
        current: PolicyDecision,
        *,
        started: datetime,
    ) -> StepRecord:
        """Record a plain step from its beginning to its end; the last one, and one that failed, end the task.

        Returns the record; the one of an attempt before, if that has finished the step. Raises what
        `lifecycle.run_step` raises.
        """

        def decide(newest: Task) -> Change:
            # Only of a task that has ever waited for people there are approvals.
            asked = self._asked_in_this_run(newest) if newest.waiting_since else []
            history = History(plan, self.records(newest.task_id), asked)
            return lifecycle.run_step(newest, step_index, history, outcome, current, started=started, at=now())

        return _record_of(self._apply(task.task_id, decide, known=task)[1])

    def claim_step(
        self,
        task: Task,
        plan: Plan,
        step_index: int,
        approval: Approval | None,
        current: PolicyDecision,
        *,
        replaces: str | None = None,
    ) -> tuple[Task, StepRecord]:
        """Record the intent to run a step before it acts; its approval is consumed by that, once.

        Returns the task and the record: `running` with the number of this attempt, or finished, when an attempt before
        has ended it. Raises what `lifecycle.claim_step` raises.
        """

        def decide(newest: Task) -> Change:
            history = History(plan, self.records(newest.task_id))
            return lifecycle.claim_step(
                newest, step_index, history, approval, current, run=task.run, at=now(), replaces=replaces
            )

        changed, change = self._apply(task.task_id, decide, known=task)
        return changed, _record_of(change)

    def attempt_again(self, task: Task, plan: Plan, step_index: int) -> StepRecord:
        """Count another attempt of a step that this execution has claimed; returns its record."""

        def decide(newest: Task) -> Change:
            return lifecycle.attempt_again(newest, step_index, History(plan, self.records(newest.task_id)))

        return _record_of(self._apply(task.task_id, decide, known=task)[1])

    def finish_step(self, task_id: str, running: StepRecord, outcome: StepOutcome) -> StepRecord:
        """Record how a step ended, once, and end the task if it ends with that; whoever ends it first is believed."""

        def decide(newest: Task) -> Change:
            history = History(self.plan_of(newest), self.records(task_id), self._asked_in_this_run(newest))
            return lifecycle.finish_step(newest, running, history, outcome, now())

        return _record_of(self._apply(task_id, decide)[1])

    def refuse_step(self, task: Task, plan: Plan, step_index: int, before: StepRecord | None, error: str) -> StepRecord:
        """Record that a step may not run, which this execution has not begun, and end the task as failed.

        Raises what `lifecycle.refuse_step` raises.
        """

        def decide(newest: Task) -> Change:
            history = History(plan, self.records(newest.task_id), self._asked_in_this_run(newest))
            return lifecycle.refuse_step(newest, step_index, history, before, error, run=task.run, at=now())

        return _record_of(self._apply(task.task_id, decide)[1])

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

        def decide(task: Task) -> Change:
            if execution not in {None, task.execution_name}:
                return Change(writes_nothing=True)
            return lifecycle.end_task(
                task, outcome, self._end_of(task), actor=actor, reason=reason, failed_step=failed_step, at=now()
            )

        return self._apply(task_id, decide)[0]

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

        def decide(task: Task) -> Change:
            lifecycle.refuse_ended(task)
            history = self._end_of(task)
            lifecycle.refuse_rejected(task, history.asked)
            return lifecycle.end_task(
                task,
                "cancelled",
                history,
                actor=subject,
                reason=reason,
                at=now(),
                key_hash=_key_hash(idempotency),
                agent=agent,
            )

        return self._apply(
            task_id, decide, idempotency=idempotency, answer=lambda _: lifecycle_answer(task_id, "cancelled")
        )[0]

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

        Starting the execution comes after. Raises what `lifecycle.retry_task` raises, LimitError as `start_task`, and
        ReplayedError as `decide`.
        """

        def decide(task: Task) -> Change:
            key_hash = _key_hash(idempotency)
            return lifecycle.retry_task(
                task, self.approvals(task_id, of=task), subject=subject, at=now(), agent=agent, key_hash=key_hash
            )

        return self._apply(
            task_id,
            decide,
            idempotency=idempotency,
            answer=lambda change: lifecycle_answer(task_id, change.task["status"]),
            max_open=max_open,
        )[0]

    def _plan_if_any(self, task: Task) -> Plan | None:
        return self.plan_of(task) if task.plan_id else None

    def _end_of(self, task: Task) -> History:
        """Read what the end of a task depends on: the approvals of this run, and the plan if there are any."""
        asked = self._asked_in_this_run(task)
        return History(plan=self.plan_of(task) if asked else None, asked=asked)

    def _asked_in_this_run(self, task: Task) -> list[Approval]:
        return [approval for approval in self.approvals(task.task_id, of=task) if approval.run == task.run]

    # DynamoDB

    def _apply(
        self,
        task_id: str,
        decide: Callable[[Task], Change],
        *,
        known: Task | None = None,
        idempotency: Idempotency | None = None,
        answer: Callable[[Change], dict[str, Any]] | None = None,
        max_open: int | None = None,
    ) -> tuple[Task, Change]:
        """Write what is decided on the task as it is; when somebody has changed it since, decide again.

        Returns the task and the change. `known` is the task as it was read: the first decision is on that. Under the
        idempotency key the `answer` is kept.
        """
        for attempt in range(_ATTEMPTS):
            self._replay(idempotency)
            task = self.get_task(task_id) if known is None or attempt else known
            try:
                change = decide(task)
            except ConflictError:
                self._replay(idempotency)  # it may be the same request's twin that has changed the task just now
                raise
            if change.writes_nothing:
                return task, change
            counters = {"version": task.version + 1, "events": task.events + len(change.events)}
            updated = task.model_copy(update={**change.task, **counters, "updated_at": timestamp(now())})
            writes = [self._items.put_task(updated, before=task), *self._writes(task, change, max_open)]
            if idempotency is not None and answer is not None:
                writes.append(self._items.put_idempotency(idempotency, answer(change)))
            try:
                dynamo.transact(writes)
            except dynamo.ConditionFailedError as error:
                counter = next((write for write in writes if is_counter(write)), None)
                self._refuse_beyond(max_open, counter, writes, error)
                _pause(attempt)
                continue
            for event in change.events:
                metrics.count(event)
            return updated, change
        raise ThrottledError("others keep changing this task: try again")

    def _writes(self, task: Task, change: Change, max_open: int | None) -> list[Item]:
        """Return the items of a change beside the task's own."""
        writes: list[Item] = []
        if change.events:
            writes += self._events(task.task_id, task.events + 1, change.events)
        if change.plan is not None:
            writes.append(self._items.put(plan_item(change.plan), unless_exists=True))
        if change.step is not None:
            writes.append(
                self._items.put_step(task.task_id, _step_sk(change.step), change.step, before=change.step_before)
            )
        if change.approval is not None:
            writes.append(self._items.put_approval(task.task_id, change.approval, change.approval_before))
        if change.approval is not None and change.token is not None:
            left = parse_timestamp(change.approval.expires_at) - now()
            kept = int(left.total_seconds()) + _TOKEN_SECONDS
            step_index = change.approval.step_index
            writes.append(
                self._callbacks.put("APPROVAL", task.task_id, step_index, change.token, kept, run=change.approval.run)
            )
        if change.consumed is not None:
            writes.append(self._items.consume_approval(task.task_id, change.consumed))
        if change.ends:
            writes.append(self._items.count_open(task.requester, -1, None))
        if change.opens:
            writes.append(self._items.count_open(task.requester, 1, max_open))
        return writes

    def _events(self, task_id: str, first: int, happened: Sequence[Event], *, salt: str | None = None) -> list[Item]:
        """Put events into the outbox. An event that a person made is a decision, and the outbox only refers to it."""
        decided = {number: event for number, event in enumerate(happened, start=first) if is_decision(event)}
        outbox = [Decided(timestamp=event.timestamp) if is_decision(event) else event for event in happened]
        puts = [self._decisions.put(task_id, number, event, salt=salt) for number, event in decided.items()]
        return [self._items.put_events(task_id, first, outbox), *puts]

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


def _record_of(change: Change) -> StepRecord:
    if change.step is None:
        raise ConflictError("this step was never begun")
    return change.step


def _approval_of(change: Change) -> Approval:
    if change.approval is None:
        raise ConflictError("nobody was asked")
    return change.approval


def _new_salt() -> str:
    return secrets.token_hex(SALT_LETTERS // 2)


def _key_hash(idempotency: Idempotency | None) -> str | None:
    """What stands for the caller's key: nobody can use it from here."""
    return hash_of([idempotency.subject, idempotency.key]) if idempotency else None
