"""One change of a task, as one transaction.

The transaction has the TASK item (guarded by its version), one EVENT item (a transactional outbox, which the audit
recorder drains), and the PLAN, STEP, APPROVAL, decision or callback token that belongs to the change.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from typing import Any

from qaes.adapters import dynamo, metrics
from qaes.adapters.callbacks import Callback
from qaes.adapters.intents import refuse_suspended
from qaes.adapters.task_items import Idempotency, Item, is_counter, plan_item
from qaes.adapters.task_queries import TaskQueries
from qaes.domain.errors import ConflictError, LimitError, ThrottledError
from qaes.domain.ids import now, parse_timestamp, timestamp
from qaes.domain.models import Event, StepRecord, Task
from qaes.domain.tasks.decisions import Decided, is_decision
from qaes.domain.tasks.lifecycle import Change

_ATTEMPTS = 8
_TOKEN_SECONDS = 7 * 24 * 3600
"""Retention of an approval's token after the approval has expired: a decision may be delivered late."""


class ReplayedError(Exception):
    """A replay of an accepted request with the same Idempotency-Key. The edge returns the earlier response."""

    def __init__(self, answer: dict[str, Any]) -> None:
        super().__init__("answered before")
        self.answer = answer


class TaskChanges(TaskQueries):
    """Writes changes of tasks. If a task has changed meanwhile, the change is decided again."""

    def answered(self, idempotency: Idempotency) -> dict[str, Any] | None:
        """Return the response to this key in the last 24 hours. Raises ConflictError for another request."""
        item = self._get(idempotency.pk, "IDEMPOTENCY")
        if item is None or int(item["expires_at_epoch"]["N"]) < time.time():
            return None
        if item["body_hash"]["S"] != idempotency.body_hash:
            raise ConflictError(
                "this Idempotency-Key was used with another request; use a new key", field="Idempotency-Key"
            )
        answer: dict[str, Any] = json.loads(item["answer"]["S"])
        return answer

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
        """Decide on a change of the task and write it. If the task has changed since the read, decide again.

        Returns the task and the change. `known` is the task from an earlier read, for the first attempt. The `answer`
        is stored under the idempotency key.
        """
        for attempt in range(_ATTEMPTS):
            self._replay(idempotency)
            task = self.get_task(task_id) if known is None or attempt else known
            try:
                change = decide(task)
            except ConflictError:
                self._replay(idempotency)  # a concurrent copy of the request may have changed the task
                raise
            if change.writes_nothing:
                return task, change
            counters = {"version": task.version + 1, "events": task.events + len(change.events)}
            updated = task.model_copy(update={**change.task, **counters, "updated_at": timestamp(now())})
            writes = [self._items.put_task(updated, before=task), *self._writes(task, change, max_open)]
            writes += [dict(write) for write in change.beside]
            if idempotency is not None and answer is not None:
                writes.append(self._items.put_idempotency(idempotency, answer(change)))
            try:
                dynamo.transact(writes)
            except dynamo.ConditionFailedError as error:
                counter = next((write for write in writes if is_counter(write)), None)
                self._refuse_beyond(max_open, counter, writes, error)
                refuse_suspended(task_id, writes, error.refused)
                _pause(attempt)
                continue
            for event in change.events:
                metrics.count(event)
            return updated, change
        raise ThrottledError("other callers keep changing this task; try again")

    def _writes(self, task: Task, change: Change, max_open: int | None) -> list[Item]:
        """Return the items of a change, except the task's own."""
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
            callback = Callback("APPROVAL", task.task_id, step_index, change.token, kept, change.approval.run)
            writes.append(self._callbacks.put(callback))
        if change.consumed is not None:
            writes.append(self._items.consume_approval(task.task_id, change.consumed))
        if change.ends:
            writes.append(self._items.count_open(task.requester, -1, None))
        if change.opens:
            writes.append(self._items.count_open(task.requester, 1, max_open))
        return writes

    def _events(self, task_id: str, first: int, happened: Sequence[Event], *, salt: str | None = None) -> list[Item]:
        """Put events into the outbox. A person's event is a decision, and the outbox only refers to it."""
        decided = {number: event for number, event in enumerate(happened, start=first) if is_decision(event)}
        outbox = [Decided(timestamp=event.timestamp) if is_decision(event) else event for event in happened]
        puts = [self._decisions.put(task_id, number, event, salt=salt) for number, event in decided.items()]
        return [self._items.put_events(task_id, first, outbox), *puts]

    def _refuse_beyond(
        self, limit: int | None, counter: Item | None, writes: list[Item], error: dynamo.ConditionFailedError
    ) -> None:
        """Raise LimitError if the counter's condition does not hold."""
        if limit is not None and counter is not None and writes.index(counter) in error.refused:
            raise LimitError(
                f"you have {limit} open tasks, the maximum; try again when one has ended", max_open_tasks=limit
            ) from error

    def _replay(self, idempotency: Idempotency | None) -> None:
        if idempotency is not None and (answer := self.answered(idempotency)) is not None:
            raise ReplayedError(answer)


def _pause(attempt: int) -> None:
    # Jitter separates callers that conflicted once.
    time.sleep(random.uniform(0.5, 1.5) * 0.02 * 2**attempt)  # noqa: S311 - not for secrets


def _step_sk(record: StepRecord) -> str:
    return f"STEP#{record.step_index:03d}"
