"""Each event under `events/` gets the answer that it should from the handler in the template, on moto."""

from __future__ import annotations

from local.seed import seed
from qaes.adapters.task_repository import TaskStore
from qaes.domain.policy import Policy
from tests.support import events, template
from tests.support.cloud import call, cloud


def test_every_event_is_answered_and_every_function_has_one() -> None:
    answered = set()
    with cloud() as aws:
        policy = Policy.model_validate(call("LedgerFunction", {"operation": "policy"})["result"])
        seed(TaskStore("TasksTable"), policy)
        seed(TaskStore("TasksTable"), policy)
        for case in events.cases():
            function = events.function_of(case)
            if function == "AuthorizerFunction":
                answered.add(function)  # its events need a signed token: test_authorizer.py
                continue
            events.check(case, aws.invoke(function, events.load(case)))
            answered.add(function)
    assert answered == set(template.functions())
