"""The state machine's executions: one for each task, named by the task's id, and one for each retry of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from qaes.adapters import clients, settings
from qaes.adapters.callbacks import CallbacksTable
from qaes.adapters.logs import logger
from qaes.domain import compliance
from qaes.domain.errors import (
    ApprovalExpiredError,
    ApprovalRejectedError,
    QaesError,
    ThrottledError,
    TransientError,
)
from qaes.domain.models import Approval, Task


class Executions:
    """Starts, resumes and stops executions, and reads their status.

    Every method raises TransientError if Step Functions does not respond, ThrottledError if it throttles the call.
    """

    def __init__(self, state_machine_arn: str | None = None) -> None:
        self._arn = state_machine_arn or settings.text("STATE_MACHINE_ARN")

    def start(self, task: Task) -> None:
        """Start the task's execution. The name ensures that it starts once."""
        step_functions = clients.client("stepfunctions")
        try:
            with _asking():
                step_functions.start_execution(
                    stateMachineArn=self._arn, name=task.execution_name, input=json.dumps({"task_id": task.task_id})
                )
        except step_functions.exceptions.ExecutionAlreadyExists:
            logger().info("the execution was already started", extra={"task_id": task.task_id})

    def status(self, task: Task) -> str | None:
        """Return RUNNING, SUCCEEDED, FAILED, TIMED_OUT or ABORTED; None if the execution does not exist."""
        step_functions = clients.client("stepfunctions")
        try:
            with _asking():
                execution = step_functions.describe_execution(executionArn=self._execution(task))
        except step_functions.exceptions.ExecutionDoesNotExist:
            return None
        status: str = execution["status"]
        return status

    def running(self, has_time: Callable[[], bool]) -> set[str]:
        """List the names of the running executions, a thousand for each call, while there is time.

        The list is eventually consistent, and incomplete if time runs short. `status` is exact.
        """
        names: set[str] = set()
        arguments: dict[str, Any] = {"stateMachineArn": self._arn, "statusFilter": "RUNNING", "maxResults": 1000}
        while has_time():
            with _asking():
                page = clients.client("stepfunctions").list_executions(**arguments)
            names.update(execution["name"] for execution in page["executions"])
            if not page.get("nextToken"):
                break
            arguments["nextToken"] = page["nextToken"]
        return names

    def stop(self, task: Task, reason: str) -> None:
        """Stop the task's execution. An execution that never started or has ended is ignored."""
        step_functions = clients.client("stepfunctions")
        try:
            with _asking():
                step_functions.stop_execution(executionArn=self._execution(task), error="Cancelled", cause=reason)
        except step_functions.exceptions.ExecutionDoesNotExist:
            logger().info("no execution to stop", extra={"task_id": task.task_id})

    def _execution(self, task: Task) -> str:
        return f"{self._arn.replace(':stateMachine:', ':execution:')}:{task.execution_name}"

    @staticmethod
    def deliver(task_id: str, approval: Approval) -> bool:
        """Resume the execution that waits for this decision. Return False if it no longer waits.

        The message only resumes the execution and selects its branch: the execution reads the decision from the table.
        """
        token = CallbacksTable().token("APPROVAL", task_id, approval.step_index)
        if token is None:
            return False
        if approval.status == "approved":
            return answer(token, {"decision": approval.status})
        if approval.status == "rejected":
            return fail(token, ApprovalRejectedError(compliance.REJECTED))
        return fail(token, ApprovalExpiredError("no decision was made in time"))


@contextmanager
def _asking() -> Iterator[None]:
    """Convert AWS's temporary errors into this project's errors."""
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except BotoCoreError as error:
        raise TransientError(f"Step Functions did not respond ({type(error).__name__})") from error
    except ClientError as error:
        if clients.is_busy(error.response["Error"]["Code"]):
            raise ThrottledError("Step Functions is busy; try again") from error
        raise


def answer(token: str, output: dict[str, Any]) -> bool:
    """Continue the execution that waits for this callback token. Return False if none waits for it any more."""
    return _send("send_task_success", taskToken=token, output=json.dumps(output))


def fail(token: str, error: Exception) -> bool:
    """Fail the state that waits for this callback token with the error's class. Return False if none waits any more.

    The cause is the message of a QaesError. Other messages are for the log only.
    """
    cause = error.message if isinstance(error, QaesError) else ""
    return _send("send_task_failure", taskToken=token, error=type(error).__name__, cause=cause)


def _send(operation: str, **arguments: str) -> bool:
    step_functions = clients.client("stepfunctions")
    gone = (
        step_functions.exceptions.TaskTimedOut,
        step_functions.exceptions.TaskDoesNotExist,
        step_functions.exceptions.InvalidToken,
    )
    try:
        with _asking():
            getattr(step_functions, operation)(**arguments)
    except gone as error:
        logger().info("no execution waits for this token any more", extra={"reason": type(error).__name__})
        return False
    return True
