"""The repository of tasks: each method reads a task, applies a rule of the domain, and writes the change.

A repeated call changes nothing.
"""

from __future__ import annotations

import secrets
from typing import Any

from qaes.adapters import dynamo, metrics
from qaes.adapters.task_items import Idempotency, task_item
from qaes.adapters.task_steps import TaskSteps
from qaes.domain.canonical import SALT_LETTERS, hash_of
from qaes.domain.errors import ConflictError, TransientError
from qaes.domain.ids import now
from qaes.domain.models import Analysis, Approval, Outcome, Plan, Status, Task, Terms, WalletBalance
from qaes.domain.policy import PolicyDecision
from qaes.domain.tasks import approvals, events, lifecycle
from qaes.domain.tasks.lifecycle import Change, History


class TaskStore(TaskSteps):
    """Starts, plans, runs and ends tasks, requests approvals and records decisions."""

    # Starting and planning

    def start_task(
        self, task: Task, idempotency: Idempotency | None = None, *, max_open: int | None = None
    ) -> tuple[Task, bool]:
        """Write a new task and its first event.

        Returns the task, and whether it already existed under the same idempotency key.

        Raises
        ------
        ConflictError
            The key was used with another request.
        LimitError
            The requester has `max_open` open tasks.
        """
        task = task.model_copy(update={"events": 1, "salt": _new_salt()})
        output, at = {"task_id": task.task_id, "idempotency_key": _key_hash(idempotency)}, task.created_at
        event = events.make(
            task, "task_started", task.requester, task.status, task.request(), output, at=at, input_of="request"
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
            raise TransientError("the task could not be written; try again") from error
        metrics.count(event)
        return task, False

    def plan_task(self, task: Task, plan: Plan) -> tuple[Task, Plan]:
        """Pin the plan's policy and store the plan once: `pending` → `executing`. The first plan stays."""
        changed, _ = self._apply(
            task.task_id, lambda newest: lifecycle.plan_task(newest, plan, now(), run=task.run), known=task
        )
        return changed, plan if changed.plan_id == plan.plan_id else self.plan_of(changed)

    def deny_task(self, task: Task, analysis: Analysis, decision: PolicyDecision, *, reason: str | None = None) -> Task:
        """Pin the policy that denies the task, and end the task, once."""

        def decide(newest: Task) -> Change:
            return lifecycle.deny_task(newest, analysis, decision, now(), run=task.run, reason=reason)

        return self._apply(task.task_id, decide, known=task)[0]

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
        terms: Terms | None = None,
    ) -> Approval:
        """Request an approval. The waiting task and the token are written together.

        Returns the approval: if it is already decided or expired, the caller must deliver it. Raises the same errors
        as `approvals.request`.
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
                terms=terms,
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
        """Commit a person's decision, once. The caller delivers the last required decision after that.

        Raises the same errors as `approvals.decide`, and ReplayedError if the decision was made earlier under the same
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
        """Record the reminder of an approval that expires soon, once. Return whether this call recorded it."""

        def decide(task: Task) -> Change:
            return approvals.remind(task, self._plan_if_any(task), self.approvals(task_id, of=task), now())

        return not self._apply(task_id, decide)[1].writes_nothing

    def expire(self, task_id: str) -> Approval | None:
        """Close an expired approval. Return it, so that the caller can resume the execution."""

        def decide(task: Task) -> Change:
            return approvals.expire(task, self._plan_if_any(task), self.approvals(task_id, of=task), now())

        return self._apply(task_id, decide)[1].approval

    # End of a task, and retry

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
        """Put a task into its terminal status, once. A terminal status stays.

        With `execution`, only if that is still the task's execution: an execution before a retry cannot end the task.
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
        """End a task at the request of a person or their `agent`. The caller stops its execution after that.

        Raises
        ------
        ConflictError
            The task has ended, or an approver has rejected it, so it ends as rejected.
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
        """Reopen a task that failed or expired. It continues at the step that did not succeed.

        The caller starts the execution after that. Raises the same errors as `lifecycle.retry_task`, LimitError as
        `start_task`, and ReplayedError as `decide`.
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
        """Read the approvals of this run, and the plan if there are approvals: the end of a task depends on them."""
        asked = self._asked_in_this_run(task)
        return History(plan=self.plan_of(task) if asked else None, asked=asked)


def decided_answer(task_id: str, approval: Approval) -> dict[str, Any]:
    """Return the response to a decision, also for its replay."""
    last = approval.decisions[-1]
    given = sum(decision.approved for decision in approval.decisions)
    message = f"The step has been {approval.status}."
    if approval.status == "pending":
        message = f"Approved {_progress(approval)}; the task still waits for approvals."
    return {
        "task_id": task_id,
        "approved": last.approved,
        "message": message,
        "approvals_required": approval.required,
        "approvals_given": given,
    }


def _progress(approval: Approval) -> str:
    """Return how many have approved of how many; of several groups, for each."""
    of_each = [(quorum.given(approval.decisions), quorum.approvals, quorum.approvers) for quorum in approval.quorums]
    if len(of_each) == 1:
        return "by {} of {}".format(*of_each[0])
    return ", ".join(f"by {given} of {needed} from {group or 'any approvers'}" for given, needed, group in of_each)


def lifecycle_answer(task_id: str, status: Status) -> dict[str, Any]:
    """Return the response to a cancellation or a retry, also for its replay."""
    message = "The task has been cancelled." if status == "cancelled" else "The task runs again, from where it stopped."
    return {"task_id": task_id, "status": status, "message": message}


def _approval_of(change: Change) -> Approval:
    if change.approval is None:
        raise ConflictError("no approval was requested")
    return change.approval


def _new_salt() -> str:
    return secrets.token_hex(SALT_LETTERS // 2)


def _key_hash(idempotency: Idempotency | None) -> str | None:
    """Return a hash of the caller's key, so that a reader of the table cannot use the key."""
    return hash_of([idempotency.subject, idempotency.key]) if idempotency else None
