"""The gateway's routes on moto: starts, rejections, replays, decisions, and their writes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError

from audit.store import Outbox
from qaes import VERSION
from qaes.adapters import clients
from qaes.adapters.executions import Executions
from qaes.adapters.task_repository import TaskStore
from qaes.domain.errors import QaesError
from qaes.domain.ids import is_task_id, parse_timestamp
from qaes.domain.qubic.identity import encode_identity
from qubic.network.mock import FIRST_TICK
from qubic.wallets import demo_key
from tests.handlers.test_task_repository import new_task, planned, waiting
from tests.support.api import ALICE, BOB, CAROL, MALLORY, NOBODY, OLIVIA, Api, items, named, set_environment
from tests.support.cloud import Cloud, cloud

SOURCE, DESTINATION = "0x1234567890abcdef", "0xfedcba0987654321"
ZERO, CONTRACT = (encode_identity(bytes([number]) + bytes(31)) for number in (0, 1))
IDENTITY = "BZBQFLLBNCXEMGLOBHUVFTLUPLVCPQUASSILFABOFFBCADQSSUPNWLZBQEXK"
SOURCE_IDENTITY = demo_key(SOURCE).identity
MONITOR = {"task_type": "monitor_wallet", "description": "watch it", "wallet_address": SOURCE}
NOTE = {"task_type": "note", "description": "x"}
TRANSFER = {
    "task_type": "transfer_funds",
    "description": "pay the invoice",
    "wallet_address": SOURCE,
    "parameters": {"to_address": DESTINATION, "amount": 250},
}
YES = {"approved": True, "reason": "it is due"}
NO = {"approved": False, "reason": "it is not"}
UNKNOWN = "task_019ab000-0000-7000-8000-00000000dead"
DEMO = {"subject": "demo_user", "roles": "requester approver auditor operator", "auth_mode": "stub"}


@pytest.fixture
def aws(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """Tables, and no state machine: starting an execution fails."""
    set_environment("GatewayFunction", monkeypatch)
    with cloud(state_machine=False, policy=False) as it:
        yield it


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """All of the template, tasks being executed."""
    set_environment("GatewayFunction", monkeypatch)
    monkeypatch.setattr("agent_runtime.reconciler.GRACE_SECONDS", -1)
    with cloud() as it:
        yield it


@pytest.fixture
def api(aws: Cloud) -> Api:
    return Api(aws, "GatewayFunction")


@pytest.fixture
def live(running: Cloud) -> Api:
    return Api(running, "GatewayFunction")


@pytest.fixture
def store(aws: Cloud) -> TaskStore:
    return TaskStore("TasksTable")


def executions(aws: Cloud) -> list[str]:
    found = boto3.client("stepfunctions").list_executions(stateMachineArn=aws.machine_arn)["executions"]
    return [execution["name"] for execution in found]


def tasks() -> set[str]:
    return {item["pk"]["S"] for item in items("TasksTable") if item["sk"]["S"] == "TASK"}


def start(api: Api, body: Any = None, **caller: Any) -> str:
    """Start a task; returns its id."""
    answer = api("POST", "/task/start", body or TRANSFER, **caller)
    assert answer.status == 202
    task_id: str = answer.body["task_id"]
    return task_id


def start_waiting(api: Api) -> str:
    """A task of alice's whose execution waits for a decision."""
    task_id = start(api)
    api.aws.wait(task_id, "waiting_approval")
    return task_id


def out_of_order(monkeypatch: pytest.MonkeyPatch, method: str, error: Exception) -> None:
    """Let Step Functions not answer: moto always does."""

    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Executions, method, fail)


DOWN = EndpointConnectionError(endpoint_url="https://states.example")
BUSY = ClientError({"Error": {"Code": "ThrottlingException", "Message": "arn:aws:states"}}, "StartExecution")


# Starting


def test_start_responds_at_once_with_named_execution(live: Api) -> None:
    answer = live("POST", "/task/start", MONITOR)
    task_id = answer.body["task_id"]
    assert answer.status == 202
    assert answer.body == {"task_id": task_id, "status": "pending", "message": "The task has been accepted."}
    assert is_task_id(task_id)
    assert "idempotent-replay" not in answer.headers
    assert executions(live.aws) == [task_id]
    live.aws.wait(task_id, "completed")


def test_start_stores_request_with_token_subject(api: Api, store: TaskStore) -> None:
    body = {
        "task_type": "transfer_funds",
        "description": "  pay  ",
        "wallet_address": "0X1234567890ABCDEF",
        "parameters": {"to_address": IDENTITY, "amount": 1, "alert_threshold": None, "note": {"a": [1, None]}},
    }
    task = store.get_task(start(api, body))
    assert (task.requester, task.status, task.description) == ("alice", "pending", "pay")
    assert task.parameters == {
        "wallet_address": SOURCE, "to_address": IDENTITY, "amount": 1, "note": {"a": [1, None]},
    }  # fmt: skip
    assert task.created_at == task.updated_at


def test_requests_of_older_clients_are_accepted(api: Api) -> None:
    taken = {
        "another word": {"task_type": "anything-else_2.0", "description": "x"},
        "nulls": {"task_type": "a", "description": "x" * 4000, "wallet_address": None, "parameters": None},
        "the wallet among the parameters": {**NOTE, "parameters": {"wallet_address": SOURCE}},
        "the wallet in both": MONITOR | {"parameters": {"wallet_address": SOURCE, "alert_threshold": 0}},
        "the largest amount": TRANSFER | {"parameters": {"to_address": IDENTITY, "amount": 10**15}},
        "32 KB": {**NOTE, "parameters": {"x": "y" * 32_000}},
    }
    for what, body in taken.items():
        assert api("POST", "/task/start", body).status == 202, what


def test_body_without_content_type_is_read_as_json(api: Api) -> None:
    event = api.event("POST", "/task/start", MONITOR)
    for headers in (event["headers"], event["multiValueHeaders"]):
        del headers["Content-Type"]
    assert api.aws.invoke("GatewayFunction", event)["statusCode"] == 202
    assert api("POST", "/task/start", json.dumps(MONITOR).encode()).status == 202
    assert api("POST", "/task/start", MONITOR, headers={"Content-Type": "text/html"}).status == 415


def transfer(amount: str) -> str:
    """A transfer's text with an amount as only text can have it."""
    return json.dumps(TRANSFER).replace("250", amount)


BAD: dict[str, tuple[Any, int, set[str]]] = {
    "unknown field": ({**MONITOR, "sudo": True}, 422, {"sudo"}),
    "another requester": ({**MONITOR, "requester": "bob"}, 422, {"requester"}),
    "no task type": ({"description": "x"}, 422, {"task_type"}),
    "a task type that is no word": ({**MONITOR, "task_type": "a b"}, 422, {"task_type"}),
    "an empty task type": ({**MONITOR, "task_type": ""}, 422, {"task_type"}),
    "a task type with a line after it": ({**MONITOR, "task_type": "monitor_wallet\n"}, 422, {"task_type"}),
    "a task type too long": ({**MONITOR, "task_type": "x" * 65}, 422, {"task_type"}),
    "a task type of another type": ({**MONITOR, "task_type": 1}, 422, {"task_type"}),
    "no description": ({"task_type": "x"}, 422, {"description"}),
    "an empty description": ({**MONITOR, "description": ""}, 422, {"description"}),
    "a blank description": ({**MONITOR, "description": " \n"}, 422, {"description"}),
    "a description that shows nothing": ({**MONITOR, "description": "\u2800"}, 422, {"description"}),
    "a zero-width space alone": ({**MONITOR, "description": "\u200b"}, 422, {"description"}),
    "a reordered description": ({**MONITOR, "description": "pay \u202e05\u202c"}, 422, {"description"}),
    "a description with NUL": ({**MONITOR, "description": "pay\0"}, 422, {"description"}),
    "an escape sequence": ({**MONITOR, "description": "\x1b[2Jpay"}, 422, {"description"}),
    "hidden letters in a parameter": ({**MONITOR, "parameters": {"x": [{"y": "\xad"}]}}, 422, {"parameters.x.0.y"}),
    "hidden letters in a name": ({**MONITOR, "parameters": {"x": {"y\u200b": 1}}}, 422, {"parameters.x"}),
    "a name of two lines": ({**MONITOR, "parameters": {"a\nb": 1}}, 422, {"parameters"}),
    "an oversized description": ({**MONITOR, "description": "x" * 4001}, 422, {"description"}),
    "a description of another type": ({**MONITOR, "description": 7}, 422, {"description"}),
    "a description that is null": ({**MONITOR, "description": None}, 422, {"description"}),
    "several at once": ({"description": 7, "x": 1}, 422, {"task_type", "description", "x"}),
    "parameters of another type": ({**MONITOR, "parameters": [1]}, 422, {"parameters"}),
    "parameters as text": ({**MONITOR, "parameters": "{}"}, 422, {"parameters"}),
    "oversized parameters": ({**MONITOR, "parameters": {"x": "y" * 33_000}}, 422, {"parameters"}),
    "a malformed wallet": ({**MONITOR, "wallet_address": "wallet"}, 422, {"wallet_address"}),
    "a wallet too short": ({**MONITOR, "wallet_address": "0x12"}, 422, {"wallet_address"}),
    "an empty wallet": ({**MONITOR, "wallet_address": ""}, 422, {"wallet_address"}),
    "a wallet of another type": ({**MONITOR, "wallet_address": 7}, 422, {"wallet_address"}),
    "an identity with a wrong checksum": ({**MONITOR, "wallet_address": "A" * 60}, 422, {"wallet_address"}),
    "a wallet that contradicts the parameter": (
        {**MONITOR, "parameters": {"wallet_address": DESTINATION}}, 422, {"wallet_address"},
    ),
    "a malformed wallet among the parameters": (
        {"task_type": "monitor_wallet", "description": "x", "parameters": {"wallet_address": 7}},
        422, {"parameters.wallet_address"},
    ),
    "a malformed destination": (
        {**TRANSFER, "parameters": {"to_address": "0xnot", "amount": 1}}, 422, {"parameters.to_address"},
    ),
    "a burn as the source": ({**TRANSFER, "wallet_address": ZERO}, 422, {"parameters.wallet_address"}),
    "a smart contract as the source": ({**TRANSFER, "wallet_address": CONTRACT}, 422, {"parameters.wallet_address"}),
    "no destination": ({**TRANSFER, "parameters": {"amount": 1}}, 422, {"parameters.to_address"}),
    "a destination that is null": (
        {**TRANSFER, "parameters": {"to_address": None, "amount": 1}}, 422, {"parameters.to_address"},
    ),
    "no amount": ({**TRANSFER, "parameters": {"to_address": DESTINATION}}, 422, {"parameters.amount"}),
    "no wallet": ({**TRANSFER, "wallet_address": None}, 422, {"parameters.wallet_address"}),
    "a transfer without parameters": (
        {"task_type": "transfer_funds", "description": "x"}, 422, {"parameters.wallet_address"},
    ),
    "a destination that pays": (
        {**TRANSFER, "parameters": {"to_address": SOURCE, "amount": 1}}, 422, {"parameters.to_address"},
    ),
    "a destination that pays, its prefix in capitals": (
        {**TRANSFER, "parameters": {"to_address": "0X1234567890abcdef", "amount": 1}}, 422, {"parameters.to_address"},
    ),
    "a destination that pays, its digits in capitals": (
        {**TRANSFER, "parameters": {"to_address": "0x1234567890ABCDEF", "amount": 1}}, 422, {"parameters.to_address"},
    ),
    "a destination that pays, by its identity": (
        {**TRANSFER, "parameters": {"to_address": SOURCE_IDENTITY, "amount": 1}}, 422, {"parameters.to_address"},
    ),
    "a destination that pays, by its older address": (
        {**TRANSFER, "wallet_address": SOURCE_IDENTITY, "parameters": {"to_address": SOURCE, "amount": 1}},
        422, {"parameters.to_address"},
    ),
    "an identity that pays itself": (
        {**TRANSFER, "wallet_address": IDENTITY, "parameters": {"to_address": IDENTITY, "amount": 1}},
        422, {"parameters.to_address"},
    ),
    "nothing to monitor": ({"task_type": "monitor_wallet", "description": "x"}, 422, {"parameters.wallet_address"}),
    "nothing to monitor, by the action's name": (
        {"task_type": "monitoring", "description": "x", "parameters": {"alert_threshold": 5}},
        422, {"parameters.wallet_address"},
    ),
    "null to monitor": (
        {**MONITOR, "wallet_address": None, "parameters": {"wallet_address": None}},
        422, {"parameters.wallet_address"},
    ),
    "a negative amount": (transfer("-1"), 422, {"parameters.amount"}),
    "an amount of nothing": (transfer("0"), 422, {"parameters.amount"}),
    "half an amount": (transfer("1.5"), 422, {"parameters.amount"}),
    "an amount with a point": (transfer("1.0"), 422, {"parameters.amount"}),
    "an amount with an exponent": (transfer("1e3"), 422, {"parameters.amount"}),
    "an amount that is no number": (transfer("NaN"), 422, {"parameters.amount"}),
    "an amount without end": (transfer("Infinity"), 422, {"parameters.amount"}),
    "a debt without end": (transfer("-Infinity"), 422, {"parameters.amount"}),
    "an amount that overflows": (transfer("1e999"), 422, {"parameters.amount"}),
    "more than there is": (transfer(str(10**15 + 1)), 422, {"parameters.amount"}),
    "more than readers agree about": (transfer(str(2**53)), 422, {"parameters.amount"}),
    "an amount of many digits": (transfer("9" * 5000), 422, {"parameters.amount"}),
    "an amount as text": (transfer('"250"'), 422, {"parameters.amount"}),
    "an amount that is true": (transfer("true"), 422, {"parameters.amount"}),
    "a negative threshold": ({**MONITOR, "parameters": {"alert_threshold": -1}}, 422, {"parameters.alert_threshold"}),
    "a name that stands twice": (transfer('250, "amount": 1'), 422, {"parameters.amount"}),
    "an integer that is written as a float": (
        json.dumps({**MONITOR, "parameters": {"x": 250}}).replace("250", "1e20"), 422, {"parameters.x"},
    ),
    "a lone surrogate": ({**MONITOR, "parameters": {"x": "\ud800"}}, 422, {"parameters.x"}),
    "a lone surrogate in a name": ({**MONITOR, "parameters": {"\ud800": 1}}, 422, {"parameters"}),
    "a nesting too deep": (json.dumps(MONITOR)[:-1] + ', "parameters": {"x": ' + "[" * 40 + "]" * 40 + "}}",
                           422, {"parameters.x"}),
    "a nesting without end": ("[" * 100_000, 422, {"body"}),
    "a body beyond all bounds": ({**MONITOR, "description": "x" * 300_000}, 413, set()),
    "not JSON": ("{not json", 400, set()),
    "not UTF-8": (b'{"description": "\xff"}', 400, set()),
    "half of it": (json.dumps(MONITOR)[:-1], 400, set()),
    "no body": (None, 422, {"body"}),
    "an empty body": ("", 422, {"body"}),
    "null": ("null", 422, {"body"}),
    "a list": ([MONITOR], 422, {"body"}),
    "a text": ('"task"', 422, {"body"}),
}  # fmt: skip


def test_bad_input_rejected_with_field_without_write(api: Api) -> None:
    for what, (body, status, fields) in BAD.items():
        answer = api("POST", "/task/start", body)
        assert (answer.status, named(answer)) == (status, fields), (what, answer)
    assert items() == []


def test_refusal_does_not_repeat_the_input(api: Api) -> None:
    secret = "s3cret-value"
    for body in (
        {**MONITOR, "task_type": f"{secret} "},
        {**MONITOR, "wallet_address": secret},
        {**MONITOR, "parameters": secret},
        {**TRANSFER, "parameters": {"to_address": secret, "amount": secret}},
        f"{{{secret}",
    ):
        answer = api("POST", "/task/start", body)
        assert answer.status >= 400
        assert secret not in json.dumps(answer.body)


def test_recorded_only_action_is_marked_at_start(api: Api, store: TaskStore) -> None:
    answer = api("POST", "/task/start", NOTE)
    assert "recorded only" in answer.body["message"]
    shown = api("GET", f"/task/{answer.body['task_id']}").body
    assert shown["effect"] == "recorded only"
    performed = api("POST", "/task/start", MONITOR).body
    assert performed["message"] == "The task has been accepted."
    assert api("GET", f"/task/{performed['task_id']}").body["effect"] == "performed"


def test_requester_with_foreign_letters_is_flagged(api: Api, store: TaskStore) -> None:
    look_alike, _ = store.start_task(new_task("\u0430lice"))
    shown = api("GET", f"/task/{look_alike.task_id}", **BOB).body
    assert shown["requester"] == "\u0430lice"
    assert "U+0430 CYRILLIC SMALL LETTER A" in shown["requester_note"]
    task_id, _ = waiting(store)
    question = api("GET", f"/task/{task_id}", **BOB).body["approval"]
    assert (question["requester_note"], question["effect"]) == (None, "performed")


def test_text_of_any_script_and_lines_is_kept_to_the_letter(api: Api, store: TaskStore) -> None:
    description = "שלם את החשבון\nमैं क्\u200dष\tمی\u200cخواهم 👩🏽\u200d🚀 ❤\ufe0f"  # noqa: RUF001
    body = {**MONITOR, "description": description, "parameters": {"नाम": "a\r\nb"}}
    task = store.get_task(start(api, body))
    assert task.description == description
    assert task.parameters["नाम"] == "a\r\nb"
    event = api.event("GET", f"/task/{task.task_id}")
    raw = api.aws.invoke("GatewayFunction", event)["body"]
    assert json.loads(raw)["description"] == description


def test_text_from_before_the_rules_is_sent_inert(api: Api, store: TaskStore) -> None:
    hostile = "pay \u202e05\u202c \x9b2J\u200b\U000e0061"
    task, _ = store.start_task(new_task().model_copy(update={"description": hostile}))
    raw = api.aws.invoke("GatewayFunction", api.event("GET", f"/task/{task.task_id}"))["body"]
    assert json.loads(raw)["description"] == hostile
    assert not [letter for letter in hostile if letter not in "pay 052J" and letter in raw]
    assert "\\u202e05\\u202c \\u009b2J\\u200b\\udb40\\udc61" in raw


def test_start_returns_403_without_the_role(api: Api) -> None:
    for caller in (BOB, CAROL, ALICE | {"roles": ""}, ALICE | {"roles": "Requester admin"}):
        answer = api("POST", "/task/start", MONITOR, **caller)
        assert (answer.status, answer.body["detail"]) == (403, "this needs the role requester")
    assert items() == []


def test_without_the_authorizers_word_nothing_but_health_answers(api: Api) -> None:
    for method, path, body in (
        ("POST", "/task/start", MONITOR),
        ("GET", f"/task/{UNKNOWN}", None),
        ("POST", f"/task/{UNKNOWN}/approve", YES),
    ):
        for caller in (NOBODY, {"subject": "", "roles": "operator"}):
            answer = api(method, path, body, **caller)
            assert (answer.status, answer.headers["www-authenticate"]) == (401, "Bearer")
    assert items() == []


def test_unknown_route_returns_a_problem(api: Api) -> None:
    for method, path, status in (
        ("GET", "/no/such/route", 404),
        ("POST", "/", 405),
        ("GET", "/task", 404),
        ("GET", "/task/", 404),
        ("GET", "/openapi.yaml", 404),
        ("GET", "/redoc", 404),
        ("POST", "/health", 405),
        ("DELETE", "/task/start", 405),
        ("PUT", f"/task/{UNKNOWN}/approve", 405),
        ("GET", f"/task/{UNKNOWN}/approve", 405),
    ):
        answer = api(method, path, **OLIVIA)
        assert (answer.status, answer.body["instance"]) == (status, path)


# Starting once


def test_replay_is_answered_with_the_task_of_the_first_time(live: Api) -> None:
    key = {"headers": {"Idempotency-Key": "invoice-7"}}
    first = live("POST", "/task/start", TRANSFER, **key)
    live.aws.wait(first.body["task_id"], "waiting_approval")
    # The same request in another spelling: the order of its fields, spaces, a null.
    again = {"parameters": TRANSFER["parameters"] | {"alert_threshold": None}} | {
        name: value for name, value in reversed(TRANSFER.items()) if name != "parameters"
    }
    second = live("POST", "/task/start", json.dumps(again, indent=3), **key)
    assert (second.status, second.headers["idempotent-replay"]) == (202, "true")
    assert second.body["task_id"] == first.body["task_id"]
    assert second.body["status"] == "waiting_approval"
    assert executions(live.aws) == [first.body["task_id"]]


def test_start_conflicts_when_key_has_another_body(api: Api) -> None:
    key = {"headers": {"Idempotency-Key": "k"}}
    task_id = start(api, MONITOR, **key)
    before = items()
    for body in (TRANSFER, {**MONITOR, "description": "something else"}, {**MONITOR, "wallet_address": DESTINATION}):
        answer = api("POST", "/task/start", body, **key)
        assert (answer.status, named(answer)) == (409, {"Idempotency-Key"})
    assert (tasks(), items()) == ({task_id}, before)


def test_key_is_its_callers_own(api: Api) -> None:
    key = {"headers": {"Idempotency-Key": "k"}}
    assert start(api, MONITOR, **key) != start(api, MONITOR, **key, **MALLORY)
    assert start(api, MONITOR) != start(api, MONITOR)


def test_malformed_idempotency_key_is_refused(api: Api) -> None:
    for key in ("", " ", "x" * 256, "with space", "é", "tab\tbed"):
        answer = api("POST", "/task/start", MONITOR, headers={"Idempotency-Key": key})
        assert (answer.status, named(answer)) == (422, {"Idempotency-Key"}), key
    assert items() == []


def test_twenty_starts_at_once_under_one_key_make_one_task(live: Api) -> None:
    request = {"method": "POST", "path": "/task/start", "body": TRANSFER, "headers": {"Idempotency-Key": "k"}}
    answers = live.at_once([request] * 20)
    assert [answer.status for answer in answers] == [202] * 20
    [task_id] = {answer.body["task_id"] for answer in answers}
    assert sum("idempotent-replay" not in answer.headers for answer in answers) == 1
    assert (tasks(), executions(live.aws)) == ({task_id}, [task_id])


def test_concurrent_starts_under_one_key_make_one_task(api: Api) -> None:
    requests = [
        {"method": "POST", "path": "/task/start", "body": MONITOR | {"description": f"number {number}"},
         "headers": {"Idempotency-Key": "k"}} for number in range(20)
    ]  # fmt: skip
    assert sorted(answer.status for answer in api.at_once(requests)) == [202] + [409] * 19
    assert len(tasks()) == 1


def test_unstarted_execution_is_accepted_and_reconciled(live: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    for error in (DOWN, BUSY):
        with monkeypatch.context() as patch:
            out_of_order(patch, "start", error)
            started.append(start(live, MONITOR, headers={"Idempotency-Key": type(error).__name__}))
            assert start(live, MONITOR, headers={"Idempotency-Key": type(error).__name__}) == started[-1]
    assert executions(live.aws) == []
    answer = live.aws.invoke("ReconcilerFunction", {"detail-type": "Scheduled Event"})
    assert sorted(answer["reconciled"]) == sorted(started)
    for task_id in started:
        live.aws.wait(task_id, "completed")


@pytest.mark.parametrize("error", [DOWN, BUSY])
def test_gateway_returns_503_without_details_when_table_is_down(
    api: Api, store: TaskStore, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    task_id, _ = waiting(store)

    def fail(**_: Any) -> None:
        raise error

    for operation in ("transact_write_items", "get_item"):
        monkeypatch.setattr(clients.client("dynamodb"), operation, fail)
    for method, path, body in (
        ("POST", "/task/start", MONITOR),
        ("GET", f"/task/{task_id}", None),
        ("POST", f"/task/{task_id}/approve", YES),
    ):
        answer = api(method, path, body, **OLIVIA)
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert tasks() == {task_id}


def test_unexpected_error_returns_500_without_details(
    api: Api, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    for error in (RuntimeError("s3cret"), QaesError("s3cret")):

        def fail(*_: Any, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(TaskStore, "start_task", fail)
        answer = api("POST", "/task/start", MONITOR)
        assert answer.status == 500
        assert "s3cret" not in json.dumps(answer.body)
    # The error's text may contain input; the log has the location.
    assert "s3cret" not in caplog.text + "".join(capsys.readouterr())


def test_start_that_cannot_be_written_is_not_accepted(api: Api) -> None:
    boto3.client("dynamodb").delete_table(TableName="TasksTable")
    answer = api("POST", "/task/start", MONITOR)
    assert answer.status == 500
    assert "correlation id" in answer.body["detail"]


# Reading


def test_task_is_shown_with_the_inherited_fields(live: Api) -> None:
    task_id = start(live, MONITOR)
    live.aws.wait(task_id, "completed")
    status, body, _ = live("GET", f"/task/{task_id}")
    assert status == 200
    inherited = {
        "task_id": str, "status": str, "created_at": str, "updated_at": str, "plan_id": str, "current_step": int,
        "requires_approval": bool,
    }  # fmt: skip
    assert {name: type(body[name]) for name in inherited} == inherited
    assert (body["task_id"], body["status"], body["requester"]) == (task_id, "completed", "alice")
    assert (body["task_type"], body["description"]) == (MONITOR["task_type"], MONITOR["description"])
    assert parse_timestamp(body["created_at"]) <= parse_timestamp(body["updated_at"])
    assert (body["requires_approval"], body["approval"], body["error"]) == (False, None, None)


def test_task_that_was_just_accepted_has_no_plan_yet(api: Api) -> None:
    body = api("GET", f"/task/{start(api)}").body
    assert (body["status"], body["plan_id"], body["current_step"]) == ("pending", None, None)
    assert (body["requires_approval"], body["approval"], body["error"]) == (False, None, None)


def test_approval_request_shows_step_and_hashes(live: Api) -> None:
    task_id = start_waiting(live)
    body = live("GET", f"/task/{task_id}", **BOB).body
    plan = TaskStore("TasksTable").get_plan(body["plan_id"])
    approval = body["approval"]
    assert (body["status"], body["requires_approval"], body["current_step"]) == ("waiting_approval", True, 2)
    assert approval["parameters"] == {"from_address": SOURCE, "to_address": DESTINATION, "amount": 250}
    assert (approval["plan_hash"], approval["step_hash"]) == (plan.hash(), plan.steps[2].hash())
    assert (approval["step_index"], approval["step_id"], approval["step_type"]) == (2, "step_3", "onchain_action")
    assert (approval["action_type"], approval["risk_level"]) == ("transfer_funds", "high")
    assert (approval["requester"], approval["policy_id"]) == ("alice", plan.policy.policy_id)
    waits = parse_timestamp(approval["expires_at"]) - parse_timestamp(approval["requested_at"])
    assert waits.total_seconds() == 60
    assert (approval["balance"]["balance"], approval["balance"]["available"]) == (1000, 1000)
    assert approval["balance"]["tick"] >= FIRST_TICK


def test_ended_task_has_its_reason_and_step(api: Api, store: TaskStore) -> None:
    endings: tuple[tuple[Any, str, str | None, dict[str, Any] | None], ...] = (
        ("completed", "", None, None),
        ("failed", "no_wallet: none", "step_2", {"step_id": "step_2", "reason": "no_wallet: none"}),
        ("denied", "not allowed", None, {"step_id": None, "reason": "not allowed"}),
        ("rejected", "too much", None, {"step_id": None, "reason": "too much"}),
        ("expired", "", None, {"step_id": None, "reason": "expired"}),
    )
    for outcome, reason, step, error in endings:
        task_id, _ = waiting(store) if outcome in {"rejected", "expired"} else planned(store)
        if outcome == "rejected":
            store.decide(task_id, approved=False, subject="bob", reason=reason)
        store.end_task(task_id, outcome, actor="execution", reason=reason, failed_step=step)
        body = api("GET", f"/task/{task_id}").body
        assert (body["status"], body["error"], body["approval"]) == (outcome, error, None)


def test_requester_sees_other_tasks_as_missing(api: Api) -> None:
    task_id = start(api)
    for caller in (ALICE, BOB, CAROL, OLIVIA, MALLORY | {"roles": "requester auditor"}):
        assert api("GET", f"/task/{task_id}", **caller).status == 200
    hidden, missing = api("GET", f"/task/{task_id}", **MALLORY), api("GET", f"/task/{UNKNOWN}", **MALLORY)
    assert (hidden.status, hidden.body["detail"]) == (missing.status, missing.body["detail"]) == (404, "no such task")
    assert api("GET", f"/task/{task_id}", subject="alice", roles="").status == 403


def test_malformed_task_id_returns_404_without_a_read(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TaskStore, "get_task", lambda *_: pytest.fail("it was looked for"))
    for task_id in (
        "nonsense", "task_", "TASK", "1", UNKNOWN.upper(), f"{UNKNOWN}x", UNKNOWN.replace("task", "plan"), "task_%00",
        "..", "task_00000000-0000-4000-8000-000000000000", "IDEMPOTENCY", "x" * 3000,
    ):  # fmt: skip
        assert api("GET", f"/task/{task_id}", **OLIVIA).status == 404, task_id
        assert api("POST", f"/task/{task_id}/approve", YES, **OLIVIA).status == 404, task_id


# Deciding


def decided(task_id: str) -> list[dict[str, Any]]:
    """The events of a decision, as the audit recorder will find them."""
    events = Outbox("TasksTable").disclosed(task_id).values()
    return [event.model_dump(mode="json") for event in events if event.kind == "approval_decided"]


def test_approval_lets_the_transfer_run(live: Api) -> None:
    task_id = start_waiting(live)
    answer = live("POST", f"/task/{task_id}/approve", YES, **BOB)
    assert (answer.status, answer.body) == (
        200,
        {
            "task_id": task_id,
            "approved": True,
            "message": "The step has been approved.",
            "approvals_required": 1,
            "approvals_given": 1,
        },
    )
    live.aws.wait(task_id, "completed")
    [event] = decided(task_id)
    said = json.loads(event["output"])
    assert (event["actor"], event["status"], said["reason"]) == ("bob", "approved", YES["reason"])


def test_rejection_ends_the_task_with_its_reason(live: Api) -> None:
    task_id = start_waiting(live)
    answer = live("POST", f"/task/{task_id}/approve", NO, **BOB)
    assert (answer.status, answer.body["approved"]) == (200, False)
    live.aws.wait(task_id, "rejected")
    assert live("GET", f"/task/{task_id}").body["error"] == {"step_id": None, "reason": NO["reason"]}


def test_second_decision_returns_409(live: Api) -> None:
    task_id = start_waiting(live)
    assert live("POST", f"/task/{task_id}/approve", YES, **BOB).status == 200
    for caller, body in ((BOB, YES), (OLIVIA, NO)):
        answer = live("POST", f"/task/{task_id}/approve", body, **caller)
        assert answer.status == 409
        assert answer.body["task_status"] in {"executing", "completed"}
    live.aws.wait(task_id, "completed")
    assert len(decided(task_id)) == 1


def test_decide_returns_status_when_task_does_not_wait(api: Api, store: TaskStore) -> None:
    task, _ = store.start_task(new_task())
    executing, _ = planned(store)
    over, _ = waiting(store)
    store.end_task(over, "expired", actor="execution", reason="", failed_step=None)
    late, _ = waiting(store, expires_in=-1)
    before = items("TasksTable")
    for task_id, status in (
        (task.task_id, "pending"), (executing, "executing"), (over, "expired"), (late, "expired"),
    ):  # fmt: skip
        answer = api("POST", f"/task/{task_id}/approve", YES, **BOB)
        assert (answer.status, answer.body["task_status"]) == (409, status)
    assert items("TasksTable") == before


def test_requester_cannot_decide_with_any_role(api: Api, store: TaskStore) -> None:
    task_id, _ = waiting(store)
    before = items("TasksTable")
    for roles in ("approver", "requester approver", "requester approver auditor operator", "operator"):
        for body in (YES, NO):
            answer = api("POST", f"/task/{task_id}/approve", body, subject="alice", roles=roles)
            assert (answer.status, answer.body["detail"]) == (403, "you cannot decide on a task that you started")
    assert items("TasksTable") == before


def test_decide_returns_403_without_the_approver_role(api: Api, store: TaskStore) -> None:
    task_id, _ = waiting(store)
    before = items("TasksTable")
    for caller in (ALICE, MALLORY, CAROL, BOB | {"roles": ""}):
        answer = api("POST", f"/task/{task_id}/approve", YES, **caller)
        assert (answer.status, answer.body["detail"]) == (403, "this needs the role approver")
    assert items("TasksTable") == before


def test_only_user_can_decide_own_task_in_stub_mode(live: Api) -> None:
    task_id = start(live, **DEMO)
    live.aws.wait(task_id, "waiting_approval")
    assert live("POST", f"/task/{task_id}/approve", YES, **DEMO).status == 200
    live.aws.wait(task_id, "completed")


BAD_DECISIONS: dict[str, tuple[Any, int, set[str]]] = {
    "no reason": ({"approved": True}, 422, {"reason"}),
    "no decision": ({"reason": "x"}, 422, {"approved"}),
    "neither": ({}, 422, {"approved", "reason"}),
    "an unknown field": (YES | {"approver": "carol"}, 422, {"approver"}),
    "another step": (YES | {"step_index": 1}, 422, {"step_index"}),
    "other parameters than were asked about": (YES | {"parameters": {"amount": 1}}, 422, {"parameters"}),
    "a decision as text": (YES | {"approved": "true"}, 422, {"approved"}),
    "a decision as a number": (YES | {"approved": 1}, 422, {"approved"}),
    "a decision that is null": (YES | {"approved": None}, 422, {"approved"}),
    "a reason of another type": (YES | {"reason": 7}, 422, {"reason"}),
    "an oversized reason": (YES | {"reason": "x" * 2001}, 422, {"reason"}),
    "a decision that stands twice": ('{"approved": false, "approved": true, "reason": "x"}', 422, {"approved"}),
    "not JSON": ("approved=true", 400, set()),
    "no body": (None, 422, {"body"}),
    "a list": ([YES], 422, {"body"}),
}


def test_bad_decision_rejected_with_field_without_effect(api: Api, store: TaskStore) -> None:
    task_id, _ = waiting(store)
    before = items("TasksTable")
    for what, (body, status, fields) in BAD_DECISIONS.items():
        answer = api("POST", f"/task/{task_id}/approve", body, **BOB)
        assert (answer.status, named(answer)) == (status, fields), (what, answer)
    assert items("TasksTable") == before


def test_get_never_decides(api: Api, store: TaskStore) -> None:
    task_id, _ = waiting(store)
    assert api("GET", f"/task/{task_id}/approve", **BOB).status == 405
    assert store.get_task(task_id).status == "waiting_approval"


def test_of_ten_opposite_decisions_at_once_exactly_one_wins(live: Api) -> None:
    task_id = start_waiting(live)
    answers = live.at_once(
        [
            {"method": "POST", "path": f"/task/{task_id}/approve", "body": (YES, NO)[number % 2],
             "subject": f"approver-{number}", "roles": "approver"}
            for number in range(10)
        ]
    )  # fmt: skip
    assert sorted(answer.status for answer in answers) == [200] + [409] * 9
    [winner] = [number for number, answer in enumerate(answers) if answer.status == 200]
    assert all(answer.body["task_status"] for answer in answers if answer.status == 409)
    live.aws.wait(task_id, "rejected" if winner % 2 else "completed")
    [event] = decided(task_id)
    assert (event["actor"], event["status"]) == (f"approver-{winner}", "rejected" if winner % 2 else "approved")


def test_undelivered_decision_stands_and_is_delivered(live: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    task_id = start_waiting(live)
    with monkeypatch.context() as patch:
        out_of_order(patch, "deliver", DOWN)
        answer = live("POST", f"/task/{task_id}/approve", YES, **BOB)
        assert (answer.status, answer.body["approved"]) == (200, True)
        assert live("POST", f"/task/{task_id}/approve", NO, **OLIVIA).status == 409
    assert (len(decided(task_id)), live("GET", f"/task/{task_id}").body["status"]) == (1, "executing")
    assert live.aws.invoke("ReconcilerFunction", {"detail-type": "Scheduled Event"}) == {"reconciled": [task_id]}
    live.aws.wait(task_id, "completed")


def test_decision_is_recorded_when_execution_is_gone(api: Api, store: TaskStore) -> None:
    """The execution is gone, but its task is open: the token resumes nothing, and the approver gets no error."""
    task_id, _ = waiting(store)
    assert api("POST", f"/task/{task_id}/approve", YES, **BOB).status == 200
    assert len(decided(task_id)) == 1


# Health


def test_health_is_public(live: Api) -> None:
    answer = live("GET", "/health", **NOBODY)
    assert (answer.status, answer.body) == (200, {"status": "healthy", "service": "gateway", "version": VERSION})


def test_health_names_only_missing_dependencies(api: Api) -> None:
    answer = api("GET", "/health", **NOBODY)
    assert (answer.status, answer.body["failing"]) == (503, ["state_machine"])
    boto3.client("dynamodb").delete_table(TableName="TasksTable")
    answer = api("GET", "/health", **NOBODY)
    assert (answer.status, answer.headers["retry-after"]) == (503, "1")
    assert answer.body == {
        "status": "unhealthy",
        "service": "gateway",
        "version": VERSION,
        "failing": ["tasks_table", "state_machine"],
        "detail": "no response from: tasks_table, state_machine",
    }
