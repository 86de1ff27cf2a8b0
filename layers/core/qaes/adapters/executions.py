"""The executions of the state machine: one for each task, under the task's id, and one for each retry of it."""

from __future__ import annotations

import json
from typing import Any

from qaes.adapters import clients, settings
from qaes.adapters.logs import logger
from qaes.domain.models import Approval, Task


class Executions:
    """Starts an execution, asks for its status, resumes it with a decision, and stops it."""

    def __init__(self, state_machine_arn: str | None = None) -> None:
        self._arn = state_machine_arn or settings.text("STATE_MACHINE_ARN")

    def start(self, task: Task) -> None:
        """Start the task's execution; the name makes it once."""
        step_functions = clients.client("stepfunctions")
        try:
            step_functions.start_execution(
                stateMachineArn=self._arn, name=task.execution_name, input=json.dumps({"task_id": task.task_id})
            )
        except step_functions.exceptions.ExecutionAlreadyExists:
            logger().info("the execution had been started already", extra={"task_id": task.task_id})

    def status(self, task: Task) -> str | None:
        """RUNNING, SUCCEEDED, FAILED, TIMED_OUT or ABORTED; None when there is no execution."""
        step_functions = clients.client("stepfunctions")
        try:
            found = step_functions.describe_execution(executionArn=self._execution(task))
        except step_functions.exceptions.ExecutionDoesNotExist:
            return None
        status: str = found["status"]
        return status

    def stop(self, task: Task, reason: str) -> None:
        """Stop the task's execution; one that was never started, or has ended, needs no stopping."""
        step_functions = clients.client("stepfunctions")
        try:
            step_functions.stop_execution(executionArn=self._execution(task), error="Cancelled", cause=reason)
        except step_functions.exceptions.ExecutionDoesNotExist:
            logger().info("no execution to stop", extra={"task_id": task.task_id})

    def _execution(self, task: Task) -> str:
        return f"{self._arn.replace(':stateMachine:', ':execution:')}:{task.execution_name}"

    @staticmethod
    def deliver(approval: Approval) -> bool:
        """Resume the execution that waits for this decision; False when it no longer waits (delivered, or too late).

        The execution reads the decision from the table: what is sent only wakes it.
        """
        return wake(approval.token, {"decision": approval.status})


def wake(token: str, output: dict[str, Any]) -> bool:
    """Let the execution go on that waits under this task token; False when nobody waits under it any more."""
    step_functions = clients.client("stepfunctions")
    gone = (
        step_functions.exceptions.TaskTimedOut,
        step_functions.exceptions.TaskDoesNotExist,
        step_functions.exceptions.InvalidToken,
    )
    try:
        step_functions.send_task_success(taskToken=token, output=json.dumps(output))
    except gone as error:
        logger().info("nobody waits for this any more", extra={"reason": type(error).__name__})
        return False
    return True
