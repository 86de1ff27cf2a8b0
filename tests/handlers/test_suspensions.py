"""The suspensions for the services: the check of an intent's transaction, and the reads."""

from __future__ import annotations

from collections.abc import Iterator

import boto3
import pytest

from qaes.adapters import dynamo, suspensions
from qaes.domain.policy_events import EVERY_ACTION
from qaes.domain.suspensions import Suspension, refusal
from tests.support.api import items
from tests.support.cloud import cloud

STOPPED = Suspension(by="olivia", at="2026-11-28T06:00:00.000Z", reason="the key leaked")
TASKS = [f"task_{number}" for number in range(64)]


@pytest.fixture(autouse=True)
def aws() -> Iterator[None]:
    with cloud(state_machine=False, policy=False):
        yield


def intend(action: str, task_id: str) -> None:
    """Write an intent as the worker and the ledger do: if its action is not suspended."""
    put = {"Put": {"TableName": "LedgerTable", "Item": dynamo.key(f"INTENT#{task_id}", action)}}
    dynamo.transact([put, suspensions.check(action, task_id)])


def intents() -> int:
    return sum(item["pk"]["S"].startswith("INTENT#") for item in items("LedgerTable"))


def test_check_holds_when_nothing_was_ever_suspended() -> None:
    intend("transfer_funds", "task_1")
    assert intents() == 1
    assert suspensions.suspended() == {}


@pytest.mark.parametrize(("name", "stopped"), [("transfer_funds", True), (EVERY_ACTION, True), ("monitoring", False)])
def test_check_fails_in_every_copy_for_the_suspended_name(name: str, stopped: bool) -> None:
    dynamo.transact(suspensions.puts({name: STOPPED}))
    for task_id in TASKS:  # 64 ids reach all 8 copies
        if stopped:
            with pytest.raises(dynamo.ConditionFailedError) as caught:
                intend("transfer_funds", task_id)
            assert caught.value.refused == (1,)
        else:
            intend("transfer_funds", task_id)
    assert intents() == (0 if stopped else len(TASKS))


def test_check_holds_again_when_the_action_is_resumed() -> None:
    dynamo.transact(suspensions.puts({"transfer_funds": STOPPED}))
    dynamo.transact(suspensions.puts({}))
    for task_id in TASKS:
        intend("transfer_funds", task_id)
    assert intents() == len(TASKS)


def test_check_is_distinguished_from_other_writes() -> None:
    assert suspensions.is_check(suspensions.check("transfer_funds", "task_1"))
    other = {"ConditionCheck": {"TableName": "ChainTable", "ExpressionAttributeNames": {"#open": "open"}}}
    assert not any(map(suspensions.is_check, [other, *suspensions.puts({})]))


def test_suspended_names_the_action_and_the_star_alone() -> None:
    request = STOPPED.model_copy(update={"resume_by": "oscar", "resume_at": "2026-11-28T06:01:00.000Z"})
    names = {"transfer_funds": STOPPED, EVERY_ACTION: request, "monitoring": STOPPED}
    dynamo.transact(suspensions.puts(names))
    assert suspensions.suspended() == names
    for task_id in TASKS:
        assert suspensions.suspended("transfer_funds", task_id) == {"transfer_funds": STOPPED, EVERY_ACTION: request}


def test_puts_write_every_copy_that_a_check_reads() -> None:
    dynamo.transact(suspensions.puts({}))
    found = boto3.client("dynamodb").scan(TableName="PolicyTable")["Items"]
    assert {item["pk"]["S"] for item in found} == {f"SUSPENSIONS#{copy}" for copy in range(suspensions.COPIES)}
    assert {suspensions.check("x", task_id)["ConditionCheck"]["Key"]["pk"]["S"] for task_id in TASKS} == {
        item["pk"]["S"] for item in found
    }


def test_refusal_names_suspension_actor_and_reason() -> None:
    at = "at 2026-11-28T06:00:00.000Z: the key leaked"
    assert refusal("pay", {}) is None
    assert refusal("pay", {"other": STOPPED}) is None
    assert refusal("pay", {"pay": STOPPED}) == f"suspended: olivia suspended `pay` {at}"
    assert refusal("pay", {EVERY_ACTION: STOPPED}) == f"suspended: olivia suspended every action {at}"
