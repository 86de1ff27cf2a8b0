"""Each function as it was built, in Lambda's container: does it answer its events as it should?"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from samcli.yamlhelper import yaml_parse

from local.build import BUILD
from local.relay import DESKTOP_HOST, bridge
from local.seed import NEW_TASK, PLAN, PLANNED_TASK
from tests.sam_local.conftest import FIRST, SamLocal
from tests.support import events, template

BODIES: dict[str, Callable[[dict[str, Any]], bool]] = {
    "agent_runtime/api_status": lambda it: (
        it["task_id"] == PLANNED_TASK
        and it["total_steps"] == 3
        and [step["status"] for step in it["steps"][:2]] == ["succeeded", "succeeded"]
    ),
    "audit/api_get": lambda it: it["task_id"] == NEW_TASK and it["logs"][0]["kind"] == "task_started",
    "audit/api_bundle": lambda it: it["task_id"] == NEW_TASK and len(it["salt"]) == 32,
    "audit/api_log_checkpoint": lambda it: it.get("log_id") == "qaes" or it["status"] == 404,
    "audit/api_log_consistency": lambda it: (it["first"], it["second"], it["proof"]) == (1, 1, []),
    "audit/api_verify": lambda it: it["verified"] is False and it["evidence"]["matches"] == [],
    "gateway/api_approve": lambda it: it["task_id"] == PLANNED_TASK and it["approved"] is True,
    "gateway/api_get_task": lambda it: it["task_id"] == PLANNED_TASK and it["requester"] == "alice",
    "gateway/api_start_monitoring": lambda it: it["task_id"].startswith("task_") and it["status"] == "pending",
    "gateway/api_start_transfer": lambda it: it["task_id"].startswith("task_") and it["status"] == "pending",
    "planner/api_create_plan": lambda it: it["analysis"]["action_type"] == "transfer_funds" and len(it["steps"]) == 3,
    "planner/api_get_plan": lambda it: it["plan_id"] == PLAN and len(it["plan_hash"]) == 64,
    "planner/api_decide": lambda it: (it["decision"], it["code"]) == ("await_approval", "allowed"),
    "planner/api_replay": lambda it: it["requests"] >= 1 and it["counts"]["unchanged"] == it["requests"],
    "planner/api_actions": lambda it: {"monitoring", "transfer_funds"} <= {each["action"] for each in it["actions"]},
    "qubic/api_policy": lambda it: it["network"] == "mock" and it["requires_approval"] is True,
    "qubic/api_policy_suspend": lambda it: (it["action"], it["status"]) == ("transaction", "suspended"),
    "qubic/api_policy_resume": lambda it: it["action"] == "transaction" and it["status"] != "suspended",
    "qubic/api_verify": lambda it: (
        it["state"] in {"broadcast", "confirmed"} and len(it["txid"]) == 60
    ),  # ledger_write's
    "qubic/api_write": lambda it: it["network"] == "mock" and len(it["txid"]) == 60,
}


@pytest.mark.parametrize("case", events.cases())
def test_function_answers_the_event(case: str, sam: SamLocal) -> None:
    done = sam.result(case)
    if case.startswith("authorizer/"):
        assert done.answer["principalId"] == "demo_user"
        assert done.answer["context"]["auth_mode"] == "stub"
    else:
        events.check(case, done.answer)
    if case.endswith("/api_health"):
        assert json.loads(done.answer["body"])["status"] == "healthy"
    elif "/api_" in case and case not in events.NOT_JSON:
        body = json.loads(done.answer["body"])
        assert BODIES[case](body), body
    assert f"Mounting {BUILD / events.function_of(case)} as /var/task" in done.log


def test_ledger_answers_with_the_id_of_its_policy(sam: SamLocal) -> None:
    policy = sam.result(FIRST).answer["result"]
    assert policy["policy_id"].startswith(f"policy-v{policy['version']}-")
    assert policy["rules"]["transfer_funds"]["requires_approval"] is True


def test_every_function_is_built_and_has_event() -> None:
    functions = set(template.functions())
    assert {events.function_of(case) for case in events.cases()} == functions


def test_sam_local_invokes_the_build(sam: SamLocal) -> None:
    built = yaml_parse((BUILD / "template.yaml").read_text())["Resources"]
    code = {name: body["Properties"]["CodeUri"] for name, body in built.items() if "CodeUri" in body["Properties"]}
    assert code == {name: name for name in template.functions()}
    assert built["CoreLayer"]["Properties"]["ContentUri"] == "CoreLayer"
    assert "CoreLayer is a local Layer in the template" in sam.result(FIRST).log


@contextmanager
def published(keys: dict[str, Any]) -> Iterator[str]:
    """Publish a key set where a container can read it; the proxy answers localhost only."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps(keys).encode())

        def log_message(self, *_: object) -> None:
            pass

    interface = bridge()
    with ThreadingHTTPServer((str(interface.ip) if interface else "127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True).start()
        try:
            yield f"http://{interface.ip if interface else DESKTOP_HOST}:{server.server_port}"
        finally:
            server.shutdown()


def test_authorizer_verifies_a_token(sam: SamLocal) -> None:
    """The authorizer runs with the layer's compiled packages, and fetches the keys."""
    event = events.load("authorizer/no_token")
    event["authorizationToken"] = f"Bearer {sam.cloud.token('approver')}"
    (sam.logs / "event.json").write_text(json.dumps(event))
    with published(sam.cloud.issuer.key_set()) as url:
        variables = {"AuthorizerFunction": {"AUTH_MODE": "jwt", "JWKS_URL": url}}
        variables["AuthorizerFunction"] |= {"JWT_ISSUER": sam.cloud.url, "JWT_AUDIENCE": "qaes-local"}
        (sam.logs / "variables.json").write_text(json.dumps(variables))
        given = ("--env-vars", str(sam.logs / "variables.json"), "--skip-pull-image")
        good = sam.invoke("AuthorizerFunction", sam.logs / "event.json", *given, name="jwt")
        bad = sam.invoke("AuthorizerFunction", events.path_of("authorizer/no_token"), *given, name="jwt_without_token")
    assert good.answer["principalId"] == "bob"
    assert good.answer["context"] == {"roles": "approver", "auth_mode": "jwt"}
    assert bad.answer["errorMessage"] == "Unauthorized"


def test_no_container_is_left(sam: SamLocal) -> None:
    for case in events.cases():
        sam.result(case)
    assert sam.containers(), "the server keeps them"
    sam.stop()
    assert sam.containers() == []
