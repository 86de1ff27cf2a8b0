"""Count the consumption of a task, in a run of the deployed definition on moto: `python -m benchmarks.cost`.

A run has phases, which end where the task waits for a person or for the ledger. A stream delivers the writes of a phase
as one batch to each of its listeners. The anchor and the gateway's reading of the policy are counted separately: as a
whole, or shared by the tasks of a batch, which start within the seconds for which the gateway keeps the policy.
"""

from __future__ import annotations

import json
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from pathlib import Path
from typing import Any
from unittest.mock import patch

import boto3

from benchmarks.units import Units, metered
from gateway import known_policy
from qaes.adapters.logs import logger
from tests.support import template
from tests.support.api import Api
from tests.support.cloud import PARAMETERS, Cloud, cloud

BASELINE = Path(__file__).with_name("baseline.json")
"""Figures of the workflow with one state for each agent, counted by this program."""

SHARED_BY = 6
"""Number of tasks that share an anchor, and the gateway's copy of the policy, in the `_shared` figures.

They start in the window of one anchor, which is shorter than `known_policy.KEPT_SECONDS`.
"""
PRICES_OF = "2026-11, us-east-1, list prices"
TRANSITION, INVOCATION, API_REQUEST, EVENT = 25.00e-6, 0.20e-6, 3.50e-6, 1.00e-6
GB_SECOND = {"x86_64": 16.6667e-6, "arm64": 13.3334e-6}
WRITE_UNIT, READ_UNIT = 0.625e-6, 0.125e-6
LOG_GB, TRACE = 0.50, 5.00e-6
ALARM_MONTH, SECRET_MONTH, METRIC_MONTH = 0.10, 0.40, 0.30
MINUTES_A_MONTH = 30 * 24 * 60
SECONDS_A_CALL = 0.1
PLATFORM_LINES = {"platform.start": 155, "platform.report": 365}
"""Bytes of Lambda's own log lines for an invocation, at its system log level INFO."""
ACCESS_VALUE_BYTES = 24
"""Average bytes of a variable in API Gateway's access log."""

TASKS: dict[str, dict[str, Any]] = {
    "monitoring": {
        "task_type": "monitor_wallet", "description": "Watch the treasury wallet",
        "wallet_address": "0x1234567890abcdef", "parameters": {"alert_threshold": 500},
    },
    "transfer": {
        "task_type": "transfer_funds", "description": "Pay invoice 4711", "wallet_address": "0x1234567890abcdef",
        "parameters": {"to_address": "0xfedcba0987654321", "amount": 250},
    },
}  # fmt: skip
ANCHORING = "AuditLogTable"
"""Table whose stream belongs to the anchor."""


@dataclass
class Count:
    """Consumption of a task; `functions` counts the invocations of each function."""

    transitions: int = 0
    write_units: float = 0
    read_units: float = 0
    log_bytes: float = 0
    api_requests: int = 0
    events: int = 0
    functions: Counter[str] = field(default_factory=Counter)
    operations: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def invocations(self) -> float:
        """All invocations, including the authorizer's."""
        return sum(self.functions.values())

    @property
    def dollars(self) -> float:
        """Price of one task without logs and traces, with 100 ms for each call."""
        architecture = template.template()["Parameters"]["Architecture"]["Default"]
        gigabyte_seconds = sum(
            count * memory_of(name) / 1024 * SECONDS_A_CALL for name, count in self.functions.items()
        )
        return (
            self.transitions * TRANSITION
            + self.invocations * INVOCATION
            + gigabyte_seconds * GB_SECOND[architecture]
            + self.write_units * WRITE_UNIT
            + self.read_units * READ_UNIT
            + self.api_requests * API_REQUEST
            + self.events * EVENT
        )


@dataclass
class TaskCost:
    """The count of a task alone, of the parts that tasks share, and the functions on the critical path."""

    task: Count
    anchor: Count
    policy: Count
    on_path: list[str]

    def figures(self) -> dict[str, Any]:
        """Return the figures of docs/performance.json, in `_shared` with a sixth of the shared parts."""
        found: dict[str, Any] = {"transitions": self.task.transitions}
        for suffix, part in (("", 1.0), ("_shared", 1 / SHARED_BY)):
            found |= {
                f"invocations{suffix}": round(self._sum("invocations", part), 1),
                f"write_units{suffix}": round(self._sum("write_units", part), 1),
                f"read_units{suffix}": round(self._sum("read_units", part), 1),
                f"usd_per_million{suffix}": round(self._sum("dollars", part) * 1e6),
            }
        found["log_bytes"] = round(self._sum("log_bytes", 1 / SHARED_BY))
        found["usd_logs_per_million"] = round(found["log_bytes"] * LOG_GB / 1e9 * 1e6)
        found["usd_traces_per_million"] = round(self._traces() * TRACE * 1e6)
        return found | {"functions_on_path": len(self.on_path), "functions": self.on_path}

    def _sum(self, figure: str, part: float) -> float:
        """Return a figure of the task with this part of the shared counts."""
        shared = sum(getattr(each, figure) for each in (self.anchor, self.policy))
        return float(getattr(self.task, figure) + shared * part)

    def _traces(self) -> float:
        """Return the number of traces: of sampled requests and executions, and of batches and events.

        At this load, Lambda samples every batch, unless the function only passes traces through.
        """
        batches = sum(self.task.functions[name] + self.anchor.functions[name] / SHARED_BY for name in begin_traces())
        return (self.task.api_requests + 1) * sampled() + batches


def memory_of(function: str) -> int:
    """Return a function's memory in MB."""
    properties = template.template()["Resources"][function]["Properties"]
    return int(properties.get("MemorySize", template.template()["Globals"]["Function"]["MemorySize"]))


def begin_traces() -> list[str]:
    """Return the functions that begin a trace for an event of a stream, a queue or a schedule."""
    common = template.template()["Globals"]["Function"]["Tracing"]
    return [
        name
        for name, body in template.resources("AWS::Serverless::Function").items()
        if body["Properties"].get("Tracing", common) == "Active"
        and {event["Type"] for event in body["Properties"].get("Events", {}).values()} - {"Api"}
    ]


def sampled() -> float:
    """Return the traced fraction of requests and executions: all at this load, unless the template has a rule."""
    rules = template.resources("AWS::XRay::SamplingRule").values()
    rates = [float(template.resolve(rule["Properties"])["SamplingRule"]["FixedRate"]) for rule in rules]
    return min(rates, default=1.0)


def measure(name: str) -> TaskCost:
    """Run the task `name` of TASKS to its end, with a second person's approval if required, and count."""
    logger().setLevel("ERROR")
    with cloud() as aws:
        run = _Run(aws)
        aws.invoke("LedgerFunction", {"operation": "policy"})
        run.streams()  # earlier records do not count
        aws.invocations.clear()
        with metered(run.units), _captured() as written:
            run.gateway_reads_policy()
            policy = run.count(written())
            task_id = run.request("POST", "/task/start", TASKS[name])["task_id"]
            if name == "transfer":
                run.wait(task_id, "waiting_approval")
                run.deliver("TasksTable", "AuditEntriesTable")
                run.request("GET", f"/task/{task_id}", None, subject="bob", roles="approver")
                decision = {"approved": True, "reason": "invoice 4711 checked"}
                run.request("POST", f"/task/{task_id}/approve", decision, subject="bob", roles="approver")
            run.wait(task_id, "completed")
            with run.units.not_counted():
                aws.execution(task_id)
            on_path = sorted({*aws.invocations, "AuthorizerFunction"} - listeners_of("TasksTable", "AuditEntriesTable"))
            run.execution_ended(task_id)
            run.deliver("TasksTable", "AuditEntriesTable")
            run.request("GET", f"/task/{task_id}", None)
            task = run.count(written())
            run.anchor()
            anchor = _difference(run.count(written()), task)
            task = _difference(task, policy)
            task.transitions = len(aws.history(task_id))
            task.log_bytes += run.state_machine_log(task_id)
        return TaskCost(task, anchor, policy, on_path)


def listeners_of(*tables: str) -> set[str]:
    """Return the functions that listen to these tables' streams."""
    return {name for table in tables for name in template.stream_listeners(table)}


class _Run:
    """One measured run. It does the work of API Gateway, the streams and EventBridge."""

    def __init__(self, aws: Cloud) -> None:
        self.aws, self.units, self.requests = aws, Units(), 0
        self.api = Api(aws, "GatewayFunction")
        self._shards: dict[str, str] = {}
        self._callers: set[str] = set()
        self._events_before = len(aws.published)
        waiting_ticks = aws._waiting_ticks  # noqa: SLF001

        def not_counted() -> list[int]:
            with self.units.not_counted():  # the tests' own read of the ledger, which advances ticks
                return waiting_ticks()

        aws._waiting_ticks = not_counted  # type: ignore[method-assign]  # noqa: SLF001

    def request(self, method: str, path: str, body: Any, **caller: str) -> Any:
        self.requests += 1
        # API Gateway caches the authorizer's result for a minute: longer than a task with a prompt approver.
        if (name := json.dumps(caller, sort_keys=True)) not in self._callers:
            self._callers.add(name)
            self.aws.invocations["AuthorizerFunction"] += 1
        answer = self.aws.invoke("GatewayFunction", self.api.event(method, path, body, **caller))
        if answer["statusCode"] >= HTTPStatus.MULTIPLE_CHOICES:
            raise RuntimeError(f"{method} {path}: {answer}")
        return json.loads(answer["body"])

    def gateway_reads_policy(self) -> None:
        """Read the policy as the first start in KEPT_SECONDS does; the task's own start uses this copy."""
        with patch.dict(os.environ, template.environment("GatewayFunction", PARAMETERS)):
            if known_policy.policy_in_force() is None:
                raise RuntimeError("the gateway cannot read the policy")

    def wait(self, task_id: str, status: str) -> None:
        with self.units.not_counted():
            self.aws.wait(task_id, status)

    def streams(self, *tables: str) -> dict[str, list[dict[str, Any]]]:
        """Return the new records of each table's stream."""
        client, found = boto3.client("dynamodbstreams"), {}
        for table in tables or ("TasksTable", "AuditEntriesTable", ANCHORING):
            if table not in self._shards:
                [stream] = client.list_streams(TableName=table)["Streams"]
                shard = client.describe_stream(StreamArn=stream["StreamArn"])["StreamDescription"]["Shards"][0]
                self._shards[table] = client.get_shard_iterator(
                    StreamArn=stream["StreamArn"], ShardId=shard["ShardId"], ShardIteratorType="TRIM_HORIZON"
                )["ShardIterator"]
            answer = client.get_records(ShardIterator=self._shards[table])
            self._shards[table] = answer["NextShardIterator"]
            found[table] = json.loads(json.dumps(answer["Records"], default=str))
        return found

    def deliver(self, *tables: str) -> bool:
        """Deliver the new records of each table's stream as one batch; return whether there were any."""
        delivered = False
        for table in tables:
            records = self.streams(table)[table]
            for function, patterns in template.stream_listeners(table).items():
                if batch := [each for each in records if any(template.matches(one, each) for one in patterns)]:
                    failures = self.aws.invoke(function, {"Records": batch})
                    if (failures or {}).get("batchItemFailures"):
                        raise RuntimeError(f"{function}: {failures}")
                    delivered = True
        return delivered

    def execution_ended(self, task_id: str) -> None:
        """Send the event of the execution's end to the functions whose rule matches it."""
        detail = {"status": "SUCCEEDED", "name": task_id, "input": json.dumps({"task_id": task_id})}
        event = {"detail-type": "Step Functions Execution Status Change", "detail": detail}
        for name, body in template.resources("AWS::Serverless::Function").items():
            for each in body["Properties"].get("Events", {}).values():
                wanted = each["Properties"].get("Pattern", {}) if each["Type"] == "EventBridgeRule" else {}
                if "SUCCEEDED" in wanted.get("detail", {}).get("status", []):
                    self.aws.invoke(name, event)

    def anchor(self) -> None:
        """Anchor the log's growth, and confirm the anchor."""
        self.aws.stop_time()  # from here on, ticks pass and ledger events are delivered only between two deliveries
        for _ in range(10):
            delivered, ticks = self.deliver(ANCHORING), self.aws.pass_ticks()
            if not (delivered or ticks):
                return
        raise RuntimeError("the anchor is not confirmed")

    def count(self, log_bytes: int) -> Count:
        return Count(
            write_units=self.units.written,
            read_units=self.units.read,
            log_bytes=log_bytes + self._platform_bytes() + self.requests * _access_log_bytes(),
            api_requests=self.requests,
            events=len(self.aws.published) - self._events_before,
            functions=Counter(self.aws.invocations),
            operations=Counter(self.units.by_operation),
        )

    def _platform_bytes(self) -> int:
        each = sum(PLATFORM_LINES.values())
        return sum(
            count * each for name, count in self.aws.invocations.items() if _system_log_level(name) in {"INFO", "DEBUG"}
        )

    def state_machine_log(self, task_id: str) -> int:
        """Return the bytes that the state machine logs for the execution at its log level."""
        [machine] = template.resources("AWS::Serverless::StateMachine").values()
        if machine["Properties"]["Logging"]["Level"] != "ALL":
            return 0
        arn = f"{self.aws.machine_arn.replace(':stateMachine:', ':execution:')}:{task_id}"
        pages = boto3.client("stepfunctions").get_paginator("get_execution_history").paginate(executionArn=arn)
        keep = bool(machine["Properties"]["Logging"].get("IncludeExecutionData"))
        return sum(_history_line(event, keep) + len(arn) for page in pages for event in page["events"])


def _history_line(event: dict[str, Any], keep_data: bool) -> int:
    body = json.loads(json.dumps(event, default=str))
    for details in body.values():
        if isinstance(details, dict) and not keep_data:
            for name in ("input", "output", "parameters", "inputDetails", "outputDetails"):
                details.pop(name, None)
    return len(json.dumps(body))


def _system_log_level(function: str) -> str:
    globals_ = template.template()["Globals"]["Function"].get("LoggingConfig", {})
    own = template.template()["Resources"][function]["Properties"].get("LoggingConfig", {})
    return str(template.resolve(globals_ | own).get("SystemLogLevel", "INFO"))


def _access_log_bytes() -> int:
    [*found] = (
        stage["AccessLogSetting"]["Format"]
        for stage in (body["Properties"] for body in template.resources("AWS::Serverless::Api").values())
        if "AccessLogSetting" in stage
    )
    return len(re.sub(r"\$context[.\w]+", "x" * ACCESS_VALUE_BYTES, found[0])) if found else 0


def _difference(whole: Count, part: Count) -> Count:
    return Count(
        write_units=whole.write_units - part.write_units,
        read_units=whole.read_units - part.read_units,
        log_bytes=whole.log_bytes - part.log_bytes,
        api_requests=whole.api_requests - part.api_requests,
        events=whole.events - part.events,
        functions=whole.functions - part.functions,
        operations=whole.operations - part.operations,
    )


@contextmanager
def _captured() -> Iterator[Any]:
    """Capture the handlers' log at level INFO; yield a function that returns the bytes so far."""
    logger().setLevel("INFO")
    sys.stdout.flush()
    kept = os.dup(1)
    with tempfile.TemporaryFile() as lines:
        os.dup2(lines.fileno(), 1)

        def size() -> int:
            sys.stdout.flush()
            return os.fstat(lines.fileno()).st_size

        try:
            yield size
        finally:
            sys.stdout.flush()
            os.dup2(kept, 1)
            os.close(kept)


def idle_dollars_a_month() -> dict[str, float]:
    """Return the cost of an unused stack: schedules, alarms, secrets and metrics."""
    architecture = template.template()["Parameters"]["Architecture"]["Default"]
    calls = dollars = 0.0
    for name, body in template.resources("AWS::Serverless::Function").items():
        for event in body["Properties"].get("Events", {}).values():
            if event["Type"] in {"Schedule", "ScheduleV2"}:
                expression = template.resolve(event["Properties"])
                runs = MINUTES_A_MONTH / _minutes(expression.get("Schedule") or expression["ScheduleExpression"])
                calls += runs
                dollars += runs * (INVOCATION + memory_of(name) / 1024 * SECONDS_A_CALL * GB_SECOND[architecture])
    alarms = [*template.resources("AWS::CloudWatch::Alarm").values()]
    metrics = {body["Properties"]["MetricName"] for body in alarms if "MetricName" in body["Properties"]}
    return {
        "scheduled_invocations": round(calls),
        "schedules": round(dollars, 2),
        "alarms": round(len(alarms) * ALARM_MONTH, 2),
        "secrets": round(len(template.resources("AWS::SecretsManager::Secret")) * SECRET_MONTH, 2),
        "metrics": round(len(metrics) * METRIC_MONTH, 2),
    }


def _minutes(schedule: str) -> float:
    number, unit = re.fullmatch(r"rate\((\d+) (\w+?)s?\)", schedule).groups()  # type: ignore[union-attr]
    return int(number) * {"minute": 1, "hour": 60, "day": 24 * 60}[unit]


def report() -> dict[str, Any]:
    """Return `cost` of docs/performance.json."""
    return {name: measure(name).figures() for name in TASKS} | {"idle_usd_per_month": idle_dollars_a_month()}


if __name__ == "__main__":
    if "--operations" in sys.argv:
        for name in TASKS:
            found = measure(name)
            for part, count in (("task", found.task), ("anchor", found.anchor), ("policy", found.policy)):
                print(f"{name}, {part}: {dict(count.functions)}")
                for (table, operation), units in sorted(count.operations.items(), key=lambda each: -each[1]):
                    print(f"  {units:6} {table} {operation}")
    else:
        print(json.dumps(report(), indent=2))
