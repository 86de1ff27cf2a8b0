"""Each event under `events/` gets the answer that it should from the handler in the template, on moto."""

from __future__ import annotations

import os

import pytest

from local.cloud import Cloud
from local.seed import NEW_TASK, seed
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


def test_seed_needs_no_names_but_those_of_the_local_cloud(monkeypatch: pytest.MonkeyPatch) -> None:
    with cloud():
        local = Cloud("seeded")
        local.resources = {name: name for name in template.template()["Resources"]}
        for variable in [name for name in os.environ if name.endswith(("_TABLE", "_FUNCTION"))]:
            monkeypatch.delenv(variable)
        for variable, name in local.names.items():
            monkeypatch.setenv(variable, name)
        seed(TaskStore(), Policy.model_validate(call("LedgerFunction", {"operation": "policy"})["result"]))
        assert TaskStore().get_task(NEW_TASK).status == "pending"
