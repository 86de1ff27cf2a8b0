"""Common behaviour of every function's handler.

`function` sets a correlation id for the log of each invocation, and returns from a warm-up at once. `state` is for
states of the state machine: it also logs one line with the task's id and the outcome of the state.

A warm-up is the event `{"warm_up": true}`. It loads the function, which creates its AWS clients, and has no other
effect. Only a role that can invoke the function can send it: API Gateway, streams and queues wrap their events.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters import clients, executions, logs
from qaes.domain.errors import StoppedError

Event = dict[str, Any]
Handler = Callable[[Event, LambdaContext], dict[str, Any]]
WARM_UP: Event = {"warm_up": True}
_OUTCOMES = ("verdict", "status", "state")


def function(handler: Handler) -> Handler:
    """Decorate a handler. The correlation id is Lambda's request id, unless the handler sets another.

    In Lambda, this also creates the function's AWS clients.
    """
    clients.prepare()

    @wraps(handler)
    def run(event: Event, context: LambdaContext) -> dict[str, Any]:
        if event == WARM_UP:
            return {"warm": True}
        with logs.invocation(getattr(context, "aws_request_id", None)):
            return handler(event, context)

    return run


def state(name: str) -> Callable[[Handler], Handler]:
    """Decorate the handler of a state.

    The log line is `<state>: <outcome>`. The outcome is the handler's noted `outcome`, or the result's `verdict`,
    `status` or `state`, or the class of the handler's exception.
    """

    def decorate(handler: Handler) -> Handler:
        @function
        @wraps(handler)
        def run(event: Event, context: LambdaContext) -> dict[str, Any]:
            task_id, step_index, started = event.get("task_id"), event.get("step_index"), time.perf_counter()
            with logs.invocation(task_id if isinstance(task_id, str) else None):
                logs.note(step_index=step_index if isinstance(step_index, int) else None)
                try:
                    answer = handler(event, context)
                except Exception as error:
                    if not logs.has_noted("outcome"):
                        logs.note(outcome=type(error).__name__)
                    raise
                else:
                    if not logs.has_noted("outcome"):
                        logs.note(outcome=next((str(answer[key]) for key in _OUTCOMES if key in answer), "done"))
                    return answer
                finally:
                    logs.report(name, int((time.perf_counter() - started) * 1000))

        return run

    return decorate


def token_state(name: str) -> Callable[[Handler], Handler]:
    """Decorate the handler of a state that waits for a response to its callback token (`task_token`).

    If the handler raises, the token is failed with the error, so the state machine sees the error's name at once. An
    error that stops the step is an outcome of the handler; every other error is also raised.
    """

    def decorate(handler: Handler) -> Handler:
        @state(name)
        @wraps(handler)
        def run(event: Event, context: LambdaContext) -> dict[str, Any]:
            try:
                return handler(event, context)
            except StoppedError as stopped:
                executions.fail(str(event["task_token"]), stopped)
                return {"status": type(stopped).__name__}
            except Exception as error:
                with suppress(Exception):  # if this fails, the function's own error has the same effect
                    executions.fail(str(event["task_token"]), error)
                raise

        return run

    return decorate
