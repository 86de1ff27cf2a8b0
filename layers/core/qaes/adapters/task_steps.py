"""The steps of a task: how they are run, claimed and finished, each change with the events of it in one transaction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any

from qaes.adapters.intents import Intent
from qaes.adapters.task_changes import TaskChanges
from qaes.adapters.task_items import Item
from qaes.domain.errors import ConflictError
from qaes.domain.ids import now
from qaes.domain.models import Approval, Plan, StepRecord, Task
from qaes.domain.policy import PolicyDecision
from qaes.domain.ruling import Ruling, Usage
from qaes.domain.tasks import lifecycle
from qaes.domain.tasks.lifecycle import Change, History, StepOutcome


class TaskSteps(TaskChanges):
    """Runs, claims, finishes and refuses steps."""

    def run_step(
        self,
        task: Task,
        plan: Plan,
        step_index: int,
        outcome: StepOutcome,
        ruling: Ruling,
        *,
        started: datetime,
    ) -> StepRecord:
        """Record the start and the end of a plain step. The last step, and a failed step, end the task.

        The last step is the action, which counts in the limits of the policy in force if it succeeded. Returns the
        record, or the record of an earlier attempt that finished the step. Raises the same errors as
        `lifecycle.run_step` and `Intent.reserve`.
        """
        is_action = step_index == len(plan.steps) - 1
        intent = Intent(task, step_index, plan.steps[step_index], ruling) if is_action else None

        def decide(newest: Task) -> Change:
            # Only a task that has waited for people has approvals.
            asked = self._asked_in_this_run(newest) if newest.waiting_since else []
            history = History(plan, self.records(newest.task_id), asked)
            fields: dict[str, Any] = {"run": task.run, "started": started, "at": now()}

            def make(usage: Usage | None) -> Change:
                return lifecycle.run_step(newest, step_index, history, outcome, ruling, usage=usage, **fields)

            return intent.recorded_by(make, counts=outcome.error is None) if intent else make(None)

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
        intent: Intent | None = None,
    ) -> tuple[Task, StepRecord]:
        """Record the intent to run a step before it acts. This consumes its approval, once.

        Returns the task and the record: `running` with the number of this attempt, or finished by an earlier attempt.
        Raises the same errors as `lifecycle.claim_step` and `Intent.reserve`.
        """

        def decide(newest: Task) -> Change:
            history = History(plan, self.records(newest.task_id))
            fields: dict[str, Any] = {"run": task.run, "at": now(), "replaces": replaces}

            def make(usage: Usage | None) -> Change:
                limits = intent.ruling.limits(usage) if intent and usage is not None else None
                return lifecycle.claim_step(newest, step_index, history, approval, current, limits=limits, **fields)

            return intent.recorded_by(make) if intent else make(None)

        changed, change = self._apply(task.task_id, decide, known=task)
        return changed, _record_of(change)

    def attempt_again(self, task: Task, plan: Plan, step_index: int) -> StepRecord:
        """Count another attempt of a step that this execution has claimed. Return its record."""

        def decide(newest: Task) -> Change:
            return lifecycle.attempt_again(newest, step_index, History(plan, self.records(newest.task_id)))

        return _record_of(self._apply(task.task_id, decide, known=task)[1])

    def finish_step(
        self,
        task_id: str,
        running: StepRecord,
        outcome: StepOutcome,
        give_back: Callable[[], Sequence[Item]] = list,
    ) -> StepRecord:
        """Record the end of a step once, and end the task if that was its last step; the first record counts.

        `give_back` makes the writes that take a step that has done nothing out of the limits.
        """

        def decide(newest: Task) -> Change:
            history = History(self.plan_of(newest), self.records(task_id), self._asked_in_this_run(newest))
            change = lifecycle.finish_step(newest, running, history, outcome, now())
            return change if change.writes_nothing else replace(change, beside=give_back())

        return _record_of(self._apply(task_id, decide)[1])

    def refuse_step(self, task: Task, plan: Plan, step_index: int, before: StepRecord | None, error: str) -> None:
        """Record that a step must not run, which this execution has not started, and end the task as failed.

        Raises the same errors as `lifecycle.refuse_step`.
        """

        def decide(newest: Task) -> Change:
            history = History(plan, self.records(newest.task_id), self._asked_in_this_run(newest))
            return lifecycle.refuse_step(newest, step_index, history, before, error, run=task.run, at=now())

        self._apply(task.task_id, decide)

    def _asked_in_this_run(self, task: Task) -> list[Approval]:
        return [approval for approval in self.approvals(task.task_id, of=task) if approval.run == task.run]


def _record_of(change: Change) -> StepRecord:
    if change.step is None:
        raise ConflictError("this step was never started")
    return change.step
