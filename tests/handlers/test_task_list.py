"""Lists while tasks change: each is on the pages once, whenever and in whichever direction its status changes."""

from __future__ import annotations

import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, get_args

import boto3
import pytest

from benchmarks.units import Units, metered
from qaes.adapters import clients, dynamo, shards
from qaes.adapters.task_items import task_item
from qaes.adapters.task_list import list_tasks
from qaes.domain.errors import TransientError
from qaes.domain.models import Status, Task
from tests.handlers.test_task_repository import new_task
from tests.support.api import set_environment
from tests.support.cloud import Cloud, cloud

STATUSES: tuple[Status, ...] = get_args(Status)


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    set_environment("GatewayFunction", monkeypatch)
    with cloud(state_machine=False, policy=False) as it:
        # A client of the test's own writes: the one that the list reads with is being watched.
        monkeypatch.setattr(sys.modules[__name__], "writer", boto3.client("dynamodb"))
        yield it


writer: Any = None


def put(task: Task) -> Task:
    """Write a task as it stands."""
    writer.put_item(TableName="TasksTable", Item=task_item(task))
    return task


def made(count: int, requester: str = "alice") -> list[Task]:
    """Tasks of every status, newest first."""
    tasks = sorted((new_task(requester) for _ in range(count)), key=lambda task: task.task_id, reverse=True)
    return [put(task.model_copy(update={"status": STATUSES[n % len(STATUSES)]})) for n, task in enumerate(tasks)]


@contextmanager
def between_calls(act: Callable[[], object]) -> Iterator[list[str]]:
    """Do something after each call that a list makes to DynamoDB; yields the names of the calls."""
    with answered(lambda _, answer: (act(), answer)[1]) as calls:
        yield calls


@contextmanager
def answered(change: Callable[[str, Any], Any]) -> Iterator[list[str]]:
    """Change the answers that the list's client gets; yields the names of the calls."""
    client: Any = clients.client("dynamodb")
    real, calls = client._make_api_call, []

    def call(name: str, arguments: Any) -> Any:
        answer = real(name, arguments)
        calls.append(name)
        return change(name, answer)

    client._make_api_call = call
    try:
        yield calls
    finally:
        del client._make_api_call


def pages(limit: int, status: Status | None = None, requester: str | None = None) -> list[Task]:
    """Every task of every page."""
    found, cursor, turns = [], None, 0
    while True:
        page = list_tasks(status=status, requester=requester, limit=limit, before=cursor)
        assert len(page.tasks) <= limit
        found += page.tasks
        cursor, turns = page.cursor, turns + 1
        assert turns < 100
        if cursor is None:
            return found


def mover(tasks: list[Task], step: Callable[[int], int]) -> Callable[[], None]:
    """Move each task from its status to another."""
    now = {task.task_id: task for task in tasks}

    def move() -> None:
        for task_id, task in now.items():
            status = STATUSES[step(STATUSES.index(task.status)) % len(STATUSES)]
            now[task_id] = put(task.model_copy(update={"status": status, "version": task.version + 1}))

    return move


DIRECTIONS: dict[str, Callable[[int], int]] = {
    "forward": lambda at: at + 1,
    "back": lambda at: at - 1,
    "two forward": lambda at: at + 2,
    "there and back": lambda at: at + 1 if at % 2 == 0 else at - 1,
}


@pytest.mark.parametrize("limit", [3, 12, 100])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_list_has_each_task_once_while_all_move(table: Cloud, direction: str, limit: int) -> None:
    tasks = made(12)
    with between_calls(mover(tasks, DIRECTIONS[direction])) as calls:
        found = pages(limit)
    assert [task.task_id for task in found] == [task.task_id for task in tasks]
    assert calls


@pytest.mark.parametrize("seed", range(5))
def test_list_has_each_task_once_while_some_move(table: Cloud, seed: int) -> None:
    chance = random.Random(seed)  # noqa: S311
    tasks = made(12)
    with between_calls(mover(tasks, lambda _: chance.randrange(len(STATUSES)))):
        found = pages(chance.choice([2, 4, 12, 13]))
    assert [task.task_id for task in found] == [task.task_id for task in tasks]


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("status", [None, "executing", "waiting_approval"])
def test_own_list_has_each_task_once_while_others_move(table: Cloud, direction: str, status: Status | None) -> None:
    still, moving = made(10), made(10)
    made(5, "mallory")
    with between_calls(mover(moving, DIRECTIONS[direction])):
        found = Counter(task.task_id for task in pages(7, status, "alice"))
    assert not [task_id for task_id, times in found.items() if times > 1]
    if status is None:
        assert set(found) == {task.task_id for task in still + moving}
    assert {task.task_id for task in still if status in (None, task.status)} <= set(found)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_inbox_has_a_waiting_task_once_while_others_move(table: Cloud, direction: str) -> None:
    still, moving = made(10), made(10)
    with between_calls(mover(moving, DIRECTIONS[direction])):
        found = Counter(task.task_id for task in pages(2, "waiting_approval"))
    assert not [task_id for task_id, times in found.items() if times > 1]
    assert {task.task_id for task in still if task.status == "waiting_approval"} <= set(found)


def test_list_costs_one_query_and_one_read_of_its_page(table: Cloud) -> None:
    made(30)
    with between_calls(lambda: None) as calls:
        list_tasks(status=None, requester=None, limit=20, before=None)
    assert calls == ["Query", "BatchGetItem"]


@pytest.mark.parametrize("requester", [None, "alice"])
def test_list_by_status_reads_no_history(table: Cloud, requester: str | None) -> None:
    """However many tasks of other statuses, of the requester's or of others, there are: a page costs the same."""
    tasks = [task for task in made(60) if task.status == "cancelled"]
    read: list[int] = []

    def evaluated(name: str, answer: Any) -> Any:
        if name == "Query":
            read.append(answer["ScannedCount"])
        return answer

    with answered(evaluated) as calls:
        page = list_tasks(status="cancelled", requester=requester, limit=3, before=None)
    assert [task.task_id for task in page.tasks] == [task.task_id for task in tasks[:3]]
    assert (calls, read, page.cursor) == (["Query", "BatchGetItem"], [4], tasks[2].task_id)


@pytest.mark.parametrize("status", ["pending", "executing"])
def test_list_by_status_merges_shards_newest_first(table: Cloud, status: Status) -> None:
    tasks = [task for task in made(200) if task.status == status]
    assert len({shards.status_key(status, task.task_id) for task in tasks}) == shards.STATUS_SHARDS
    for limit in (1, 3, 7, len(tasks), 100):
        assert [task.task_id for task in pages(limit, status)] == [task.task_id for task in tasks]


@pytest.mark.parametrize(
    ("status", "requester", "keys"), [("executing", None, 4), ("waiting_approval", None, 1), ("executing", "alice", 1)]
)
def test_list_page_costs_at_most_a_tenth_more_than_one_key(
    table: Cloud, status: Status, requester: str | None, keys: int
) -> None:
    """A page of twenty tasks, by DynamoDB's units: a whole unit for each task, half of one for each query."""
    for _ in range(100):
        put(new_task("alice").model_copy(update={"status": status}))
    units = Units()
    with metered(units):
        assert len(list_tasks(status=status, requester=requester, limit=20, before=None).tasks) == 20
    assert units.read == 20 + keys * 0.5 <= 1.1 * (20 + 0.5)


@pytest.mark.parametrize("requester", [None, "alice"])
def test_list_by_status_omits_a_task_that_has_just_left(table: Cloud, requester: str | None) -> None:
    tasks = [task for task in made(50) if task.status == "waiting_approval"]

    def decided(name: str, answer: Any) -> Any:
        if name == "Query":  # the index still names it
            put(tasks[0].model_copy(update={"status": "executing", "version": tasks[0].version + 1}))
        return answer

    with answered(decided):
        page = list_tasks(status="waiting_approval", requester=requester, limit=2, before=None)
    assert ([task.task_id for task in page.tasks], page.cursor) == ([tasks[1].task_id], tasks[1].task_id)
    assert [task.task_id for task in pages(2, "waiting_approval", requester)] == [task.task_id for task in tasks[1:]]


def test_list_by_status_keeps_requesters_apart(table: Cloud) -> None:
    """A subject may end as the key of another's does."""
    put(new_task("alice").model_copy(update={"status": "completed"}))
    other = put(new_task("alice#completed").model_copy(update={"status": "pending"}))
    assert pages(5, "pending", "alice") == pages(5, "completed", "alice#completed") == []
    assert [task.task_id for task in pages(5, "pending", "alice#completed")] == [other.task_id]


def test_list_is_unavailable_when_a_page_is_never_read_whole(table: Cloud, monkeypatch: pytest.MonkeyPatch) -> None:
    made(3)
    monkeypatch.setattr(dynamo, "PATIENCE_SECONDS", 0.2)
    monkeypatch.setattr("time.sleep", lambda _: None)

    def unprocessed(name: str, answer: Any) -> Any:
        if name != "BatchGetItem":
            return answer
        items = answer["Responses"]["TasksTable"]
        keys = [{"pk": item["pk"], "sk": item["sk"]} for item in items[1:]]
        left = {"TasksTable": {"Keys": keys}} if keys else {}
        return answer | {"Responses": {"TasksTable": items[:1]}, "UnprocessedKeys": left}

    with answered(unprocessed):
        assert len(pages(3)) == 3, "unread items are read again"

    def nothing_read(name: str, answer: Any) -> Any:
        if name != "BatchGetItem":
            return answer
        keys = [{"pk": item["pk"], "sk": item["sk"]} for item in answer["Responses"]["TasksTable"]]
        return answer | {"Responses": {}, "UnprocessedKeys": {"TasksTable": {"Keys": keys}}}

    with answered(nothing_read), pytest.raises(TransientError):
        list_tasks(status=None, requester=None, limit=30, before=None)
