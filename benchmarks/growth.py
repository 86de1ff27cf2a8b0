"""Cost of requests and scheduled runs on a stack with many past tasks: `make bench ONLY=growth`.

The tasks are created directly, and then real requests are made to the deployed definition on moto. Units are counted
by DynamoDB's rules (`benchmarks.units`).
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from functools import partial
from http import HTTPStatus
from typing import Any
from unittest.mock import patch

from audit.log import Log, Swept
from benchmarks.background import Background, Keys, Made, attach
from benchmarks.cost import TASKS
from benchmarks.units import Units, metered
from qaes.adapters.executions import Executions
from qaes.adapters.logs import logger
from qaes.adapters.shards import day_key, status_key
from qaes.adapters.task_items import requester_and_status, task_item
from qaes.domain.ids import now, timestamp
from qaes.domain.merkle import HASH_BYTES
from qaes.domain.models import Status, Task
from tests.support.api import ALICE, BOB, Api
from tests.support.cloud import Cloud, _environment_lock, cloud

SIZES = (10**4, 10**6)
MOST_GROWTH = 1.1
"""Maximum ratio of an operation's cost at the larger size to its cost at the smaller size."""
DAYS = 30
"""The tasks were started within this many days, at even intervals."""
REQUESTERS = 1_000
"""Number of requesters. A tenth of all tasks is alice's."""
OPEN = {"waiting_approval": 50, "executing": 50}
"""Open tasks at each size. The number is constant, because each open task costs reads."""
FRESH = 100
FRESH_SECONDS = 90
"""Age of the FRESH newest changes at each size, which the sweeper reads."""
APPROVED = {"approved": True, "reason": "invoice 4711 checked"}
ENDED: tuple[Status, ...] = ("completed",) * 17 + ("failed", "denied", "cancelled")


Measured = dict[str, Units]
"""Consumption of each operation, by its name."""


class Past:
    """A stack's past tasks. At each size, the same few tasks are from the last minutes."""

    def __init__(self, size: int, model: Task) -> None:
        self.size, self._model = size, model
        self._event, self._index = f"EVENT#{model.events:06d}", f"INDEX#{model.events:06d}"
        self.end = now()
        self._begin = self.end - timedelta(days=DAYS)

    def attach(self) -> dict[str, int]:
        """Create the items; return the number of each kind."""
        tasks = Background("TasksTable", self._task)
        tasks.add(self._keys_of_tasks())
        tasks.add(self._keys_of_events())
        indexes = Background("AuditLogTable", self._index_item)
        indexes.add(({"pk": self._id(n), "sk": self._index}, str(n)) for n in range(self.size))
        attach("TasksTable", tasks)
        attach("AuditLogTable", indexes)
        return {"TASK": self.size, "EVENT": self.size, "INDEX": self.size}

    def _keys_of_tasks(self) -> Iterator[tuple[Keys, str]]:
        for n in range(self.size):
            task_id, status, requester = self._id(n), self._status(n), self._requester(n)
            yield {
                "pk": task_id, "sk": "TASK", "task_id": task_id,
                "status_key": status_key(status, task_id),
                "requester_key": requester,
                "requester_status_key": requester_and_status(requester, status),
            }, str(n)  # fmt: skip

    def _keys_of_events(self) -> Iterator[tuple[Keys, str]]:
        for n in range(self.size):
            yield self._event_keys(n), f"EVENT {n}"

    def _event_keys(self, n: int) -> Keys:
        moment, task_id = timestamp(self._moment(n)), self._id(n)
        return {"pk": task_id, "sk": self._event, "day": day_key(moment[:10], task_id), "timestamp": moment}

    def _id(self, n: int) -> str:
        """Return a UUIDv7 from the task's time and number."""
        milliseconds, digits = int(self._moment(n).timestamp() * 1000), f"{n:015x}"
        head = f"{milliseconds:012x}"
        return f"task_{head[:8]}-{head[8:]}-7{digits[:3]}-8{digits[3:6]}-{digits[6:]}000"

    def _moment(self, n: int) -> datetime:
        """Return evenly spread times; the last tasks were started a minute and a half ago."""
        if n >= self.size - FRESH:
            return self.end - timedelta(seconds=FRESH_SECONDS, milliseconds=self.size - n)
        return self._begin + (timedelta(days=DAYS) - timedelta(minutes=30)) * (n / self.size)

    def _status(self, n: int) -> Status:
        place = self.size - FRESH - n  # the open tasks are the last before the fresh ones
        if 0 < place <= OPEN["executing"]:
            return "executing"
        if 0 < place - OPEN["executing"] <= OPEN["waiting_approval"]:
            return "waiting_approval"
        return ENDED[n % len(ENDED)]

    def _requester(self, n: int) -> str:
        return "alice" if n % 10 == 0 else f"requester_{n % REQUESTERS}"

    def _task(self, given: str) -> Made:
        kind, _, number = given.rpartition(" ")
        n = int(number)
        if kind == "EVENT":
            return {name: {"S": value} for name, value in self._event_keys(n).items()} | {"kind": {"S": "task_ended"}}
        moment = timestamp(self._moment(n))
        fields = {
            "task_id": self._id(n), "status": self._status(n), "requester": self._requester(n), "created_at": moment,
            "updated_at": moment,
        }  # fmt: skip
        if fields["status"] == "waiting_approval":
            fields |= {"waiting_since": timestamp(self.end), "waiting_until": timestamp(self.end + timedelta(days=1))}
        return task_item(self._model.model_copy(update=fields))

    def _index_item(self, given: str) -> Made:
        leaves = base64.b64encode(bytes(HASH_BYTES * self._model.events)).decode()  # moto stores bytes unchanged
        return {
            "pk": {"S": self._id(int(given))}, "sk": {"S": self._index}, "index": {"N": given}, "leaves": {"B": leaves},
        }  # fmt: skip

    def open_executions(self) -> set[str]:
        """Return the names of the running executions."""
        return {self._id(self.size - FRESH - place) for place in range(1, sum(OPEN.values()) + 1)}


def measure(size: int, more: dict[str, Callable[[], Any]] | None = None) -> tuple[dict[str, int], Measured]:
    """Create `size` tasks; return the number of items of each kind, and the consumption of each operation.

    `more` has further operations by their names.
    """
    logger().setLevel("ERROR")
    past = Past(size, _model())
    with cloud() as aws:
        created = past.attach()
        call = partial(_call, aws)
        Log("AuditLogTable").record_swept(Swept(timestamp(past.end - timedelta(minutes=5)), {}, {}))
        waiting = call("POST", "/task/start", TASKS["transfer"], **ALICE)["task_id"]
        aws.wait(waiting, "waiting_approval")
        aws.stop_time()
        operations: dict[str, Callable[[], Any]] = {
            "GET /task/{task_id}": partial(call, "GET", f"/task/{waiting}", **BOB)
        }
        for who, caller in (("all tasks", BOB), ("a requester's own", ALICE)):
            for status in (None, "completed", "executing", "waiting_approval"):
                name = f"GET /tasks, {who}, {status or 'every status'}"
                operations[name] = partial(call, "GET", "/tasks", status=status, **caller)
        operations |= {
            "the reconciler's run": lambda: aws.invoke("ReconcilerFunction", {}),
            "the sweeper's run": lambda: aws.invoke("AuditSweeperFunction", {}),
            "POST /task/{task_id}/approve": partial(call, "POST", f"/task/{waiting}/approve", APPROVED, **BOB),
            "POST /task/start": partial(call, "POST", "/task/start", TASKS["monitoring"], **ALICE),
        }
        running = past.open_executions()
        with patch.object(Executions, "running", lambda *_: running):
            return created, {name: _units(operation) for name, operation in (operations | (more or {})).items()}


def _model() -> Task:
    """Run the task that the others are copies of."""
    with cloud() as aws:
        task_id = _call(aws, "POST", "/task/start", TASKS["monitoring"], **ALICE)["task_id"]
        return Task.model_validate(aws.wait(task_id, "completed"))


def _call(aws: Cloud, method: str, path: str, body: Any = None, *, status: str | None = None, **caller: str) -> Any:
    api = Api(aws, "GatewayFunction")
    event = api.event(method, path, body, **caller)
    if status:
        event |= {"queryStringParameters": {"status": status}}
        event |= {"multiValueQueryStringParameters": {"status": [status]}}
    answer = api.checked(aws.invoke("GatewayFunction", event))
    if answer.status >= HTTPStatus.MULTIPLE_CHOICES:
        raise RuntimeError(f"{method} {path}: {answer}")
    return answer.body


def _units(operation: Callable[[], Any]) -> Units:
    """Count one operation. Functions that it starts wait for the lock that every function of moto takes."""
    units = Units()
    with _environment_lock, metered(units):
        operation()
    return units


def grown(before: Units, after: Units) -> float:
    """Return the growth of the consumption, the larger of read and write units."""
    pairs = ((before.read, after.read), (before.written, after.written))
    return max(more / less if less else float(more > 0) + 1 for less, more in pairs)
