"""Latency of requests and tasks on the local AWS, compared with an empty function behind the same API Gateway."""

from __future__ import annotations

import io
import json
import statistics
import time
import zipfile
from dataclasses import dataclass
from typing import Any

import httpx

from local.cloud import Cloud
from local.environment import REGION

ROUNDS, WARM_UP, TASKS = 25, 3, 5
ACCOUNT = "000000000000"
CODE = 'def handler(event, context):\n    return {"statusCode": 200, "body": "{}"}\n'
NOTE = {"task_type": "note", "description": "denied by the policy: no step competes with the measurement"}
MONITORING = {
    "task_type": "monitor_wallet",
    "description": "how long does it take?",
    "wallet_address": "0x1234567890abcdef",
    "parameters": {"alert_threshold": 500},
}


@dataclass(frozen=True)
class Latency:
    """Milliseconds by request, and seconds from start to `completed` for each task."""

    requests: dict[str, list[float]]
    tasks: list[float]

    def p50(self, name: str) -> float:
        return statistics.median(self.requests[name])

    def p95(self, name: str) -> float:
        return statistics.quantiles(self.requests[name], n=20)[-1]


def bare_api(cloud: Cloud) -> str:
    """Deploy an empty function with a separate API; return its path."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("bare.py", CODE)
    lambda_, gateway = cloud.client("lambda"), cloud.client("apigateway")
    like = lambda_.get_function_configuration(FunctionName=cloud.resources["WorkerApiFunction"])
    function = lambda_.create_function(
        FunctionName="bare",
        Runtime=like["Runtime"],
        Role=like["Role"],
        Handler="bare.handler",
        MemorySize=like["MemorySize"],
        Code={"ZipFile": buffer.getvalue()},
    )
    lambda_.add_permission(
        FunctionName="bare", StatementId="api", Action="lambda:InvokeFunction", Principal="apigateway.amazonaws.com"
    )
    api = gateway.create_rest_api(name="bare")["id"]
    root = gateway.get_resources(restApiId=api)["items"][0]["id"]
    resource = gateway.create_resource(restApiId=api, parentId=root, pathPart="bare")["id"]
    gateway.put_method(restApiId=api, resourceId=resource, httpMethod="GET", authorizationType="NONE")
    gateway.put_integration(
        restApiId=api,
        resourceId=resource,
        httpMethod="GET",
        type="AWS_PROXY",
        integrationHttpMethod="POST",
        uri=f"arn:aws:apigateway:{REGION}:lambda:path/2015-03-31/functions/{function['FunctionArn']}/invocations",
    )
    gateway.create_deployment(restApiId=api, stageName="v1")
    return f"/_aws/execute-api/{api}/v1/bare"


def measure(cloud: Cloud) -> Latency:
    """Interleave the requests, so that each kind has the same load; then run tasks in sequence."""
    api = f"/_aws/execute-api/{cloud.outputs['ApiId']}/v1"
    headers = {"Authorization": f"Bearer {cloud.token('requester')}", "Content-Type": "application/json"}
    with httpx.Client(base_url=cloud.endpoint, headers=headers, timeout=60) as http:
        bare = bare_api(cloud)
        known = _start(http, api, NOTE)
        calls: dict[str, Any] = {
            "a bare function": lambda: http.get(bare),
            "GET /task/{task_id}": lambda: http.get(f"{api}/task/{known}"),
            "POST /task/start": lambda: http.post(f"{api}/task/start", content=json.dumps(NOTE)),
        }
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(WARM_UP + ROUNDS):
            for name, call in calls.items():
                begin = time.perf_counter()
                answer = call()
                milliseconds = (time.perf_counter() - begin) * 1000
                answer.raise_for_status()
                if number >= WARM_UP:
                    times[name].append(milliseconds)
            # Started tasks end before the next round, so they do not compete with it.
            _wait(http, api, answer.json()["task_id"], "denied")
        return Latency(times, [_until_completed(http, api) for _ in range(TASKS)])


def _start(http: httpx.Client, api: str, task: dict[str, Any]) -> str:
    answer = http.post(f"{api}/task/start", content=json.dumps(task))
    answer.raise_for_status()
    return str(answer.json()["task_id"])


def _until_completed(http: httpx.Client, api: str) -> float:
    begin = time.perf_counter()
    _wait(http, api, _start(http, api, MONITORING), "completed")
    return time.perf_counter() - begin


def _wait(http: httpx.Client, api: str, task_id: str, wanted: str) -> None:
    deadline = time.monotonic() + 120
    while (status := http.get(f"{api}/task/{task_id}").json()["status"]) != wanted:
        if status not in {"pending", "executing"} or time.monotonic() > deadline:
            raise RuntimeError(f"the task is {status}")
        time.sleep(0.1)
