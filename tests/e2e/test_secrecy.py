"""No token and no key appears in any readable place after all earlier tests."""

from __future__ import annotations

import json
import re

from tests.e2e.conftest import Api

A_JWT = re.compile(r"eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.")


def test_no_task_token_is_in_a_log_an_answer_or_an_execution(api: Api) -> None:
    waited = api.items("CallbacksTable")
    tokens = {item["token"]["S"] for item in waited}
    tasks = {item["pk"]["S"] for item in waited}
    assert tokens
    logs = "\n".join(api.cloud.service_logs())
    assert any(task in logs for task in tasks), "the services log"
    answers = "\n".join(api.answers)
    # The token is in the input of the one invocation that stores it, and nowhere else.
    executions = "\n".join(
        json.dumps({name: each for name, each in event.items() if not name.startswith("taskScheduled")}, default=str)
        for task in tasks
        for event in api.history(task)
    )
    entries = json.dumps(api.items("AuditEntriesTable"), default=repr)  # hashes are bytes
    for token in tokens:
        for place, text in {"logs": logs, "answers": answers, "executions": executions, "entries": entries}.items():
            assert token not in text, place


def test_no_jwt_is_in_a_log_or_an_answer(api: Api) -> None:
    assert A_JWT.search(api.cloud.token("operator")), "the pattern matches a token"
    assert not A_JWT.search("\n".join(api.cloud.service_logs()))
    assert not A_JWT.search("\n".join(api.answers))


def test_no_answer_shows_a_stack_or_a_resource_of_the_account(api: Api) -> None:
    for answer in api.answers:
        assert "Traceback" not in answer
        assert "arn:aws" not in answer


def test_no_answer_was_an_error_of_ours(api: Api) -> None:
    assert [answer for answer in api.answers if re.search(r"^\w+ \S+ 5\d\d", answer)] == []
