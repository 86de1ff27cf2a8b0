"""The conformance kit: it passes both examples, and catches each broken handler for its own reason."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import boto3
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from moto import mock_aws
from moto.awslambda_simple.models import LambdaSimpleBackend

from dispatcher import handlers
from dispatcher.credentials import Bearer, Credential, Header
from dispatcher.handlers import HttpsHandler, LambdaHandler
from dispatcher.signatures import Signer, directory
from local.check_handler import __main__ as cli
from local.check_handler.callbacks import receiving
from local.check_handler.checks import CHECKS, Result, run_checks
from local.check_handler.target import KitError, Sample, Target, effects_of, read_sample
from local.environment import ROOT
from local.template import parse
from qaes.domain.policy.actions import HttpsHandler as PolicyHttpsHandler
from qaes.domain.policy.document import PolicyDocumentV2
from qaes.domain.policy.proposing import check_actions
from tests.dispatcher.test_signatures import PUBLIC_KEYS
from tests.support import http_server, sample_handlers
from tests.support.cloud import CREDENTIALS
from tests.support.sample_handlers import SampleHandler

pytestmark = pytest.mark.enable_socket

SIGNER = Signer(Ed25519PrivateKey.generate())
RAW_KEY = json.loads(directory([SIGNER.private_key.public_key()]))["keys"][0]["x"]
KEYS = {SIGNER.key_id: SIGNER.private_key.public_key()}
REFUND = read_sample(ROOT / "examples" / "refund_lambda")
INVOICE = read_sample(ROOT / "examples" / "invoice_https")


def failed(results: list[Result]) -> dict[str, str]:
    return {result.check.name: result.text for result in results if result.state == "failed"}


def skipped(results: list[Result]) -> set[str]:
    return {result.check.name for result in results if result.state == "skipped"}


def check(handler: SampleHandler, *, effects: bool = True, sample: Sample = REFUND) -> list[Result]:
    count = handler.effects.__getitem__ if effects else None
    with sample_handlers.serve(handler) as url:
        return list(run_checks(Target(HttpsHandler(url), sample, signer=SIGNER, effects=count)))


# The examples


@contextmanager
def example(name: str, **variables: str) -> Iterator[ModuleType]:
    """Load an example as Lambda does: with its table, from its template, in a separate AWS account."""
    folder = ROOT / "examples" / name
    properties = parse(folder / "template.yaml")["Resources"]["Ledger"]["Properties"]
    environment = CREDENTIALS | {"LEDGER_TABLE": "Ledger"} | variables
    with patch.dict(os.environ, environment), mock_aws(config={"lambda": {"use_docker": False}}):  # type: ignore[arg-type]
        boto3.client("dynamodb").create_table(TableName="Ledger", **properties)
        spec = importlib.util.spec_from_file_location(f"example_{name}", folder / "app.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module


def count_in(table: Any) -> Callable[[str], int]:
    return lambda reference: "Item" in table.get_item(Key={"reference": reference}, ConsistentRead=True)


@pytest.fixture
def refund() -> Iterator[ModuleType]:
    with example("refund_lambda") as module:

        def invoke(
            backend: Any, function_name: str, qualifier: Any, body: Any, headers: Any, response_headers: dict[str, str]
        ) -> bytes:
            assert function_name.endswith("qaes-action-refund")
            try:
                return json.dumps(module.handler(json.loads(body), None)).encode()
            except Exception as error:  # noqa: BLE001 as Lambda's runtime
                response_headers["x-amz-function-error"] = "Unhandled"
                return json.dumps({"errorType": type(error).__name__}).encode()

        handlers._lambda_client.cache_clear()
        with patch.object(LambdaSimpleBackend, "invoke", invoke):
            yield module
        handlers._lambda_client.cache_clear()


def test_example_refund_lambda_keeps_the_contract(refund: ModuleType) -> None:
    target = Target(LambdaHandler("qaes-action-refund"), REFUND, signer=SIGNER, effects=count_in(refund.TABLE))
    results = list(run_checks(target))
    assert failed(results) == {}
    assert skipped(results) == {"forged", "callback"}


@contextmanager
def invoice() -> Iterator[tuple[str, ModuleType]]:
    with example("invoice_https", DISPATCHER_KEYS=RAW_KEY, PUBLIC_URL="") as module:

        def gateway(method: str, path: str, body: bytes, headers: dict[str, str]) -> dict[str, Any]:
            event = {"httpMethod": method, "headers": headers, "body": body.decode(), "requestContext": {"path": path}}
            module.os.environ["PUBLIC_URL"] = f"http://{headers['Host']}{path}"
            return module.handler(event, None)  # type: ignore[no-any-return]

        with http_server.serve(gateway) as address:
            yield f"{address}/v1/invoice", module


def test_example_invoice_https_keeps_the_contract() -> None:
    with invoice() as (url, module):
        target = Target(HttpsHandler(url), INVOICE, signer=SIGNER, effects=count_in(module.TABLE))
        results = list(run_checks(target))
    assert failed(results) == {}
    assert skipped(results) == {"dry_run", "callback"}


def test_example_invoice_derives_its_url_from_api_gateway() -> None:
    url = "https://abc.execute-api.us-east-1.amazonaws.com/v1/invoice"
    with example("invoice_https", DISPATCHER_KEYS=RAW_KEY, PUBLIC_URL="") as module:
        request = Target(HttpsHandler(url), INVOICE, signer=SIGNER).request("query")
        own = {"Content-Type": "application/json", "Idempotency-Key": request.reference}
        event = {
            "httpMethod": "POST",
            "headers": SIGNER.headers("POST", url, own, request.body()),
            "body": request.body().decode(),
            "requestContext": {"domainName": "abc.execute-api.us-east-1.amazonaws.com", "path": "/v1/invoice"},
        }
        assert module.handler(event, None)["statusCode"] == 404
        event["requestContext"] = {"domainName": "other.example", "path": "/v1/invoice"}
        assert module.handler(event, None)["statusCode"] == 401


@pytest.mark.parametrize("name", ["refund_lambda", "invoice_https"])
def test_example_action_is_accepted_in_a_policy(name: str) -> None:
    content = json.loads((ROOT / "examples" / name / "action.json").read_text())
    ((action, definition),) = content["actions"].items()
    tier = {"max_amount": 10000, "approvals": 0}
    rule = {"allowed": True, "risk_level": "medium", "tiers": [tier], "limits": []}
    members = {"groups": {}, "actions": {action: definition}, "rules": {action: rule}}
    document = PolicyDocumentV2.write(members, version=2, proposed_by="oscar", based_on="policy-v1-" + "0" * 64)
    check_actions(document)
    assert set(document.actions) == {action}


# Handlers that break the contract

BROKEN: dict[type[SampleHandler], dict[str, str]] = {
    sample_handlers.IgnoresDeadline: {"late": "after its deadline is answered with done"},
    sample_handlers.RefusesWhatIsLate: {"late": "A query after the deadline is answered with refused"},
    sample_handlers.TrustsAnyone: {"forged": "no signature is answered with done"},
    sample_handlers.ForgetsToCheckTheBody: {"forged": "a body that was changed after the signature is answered"},
    sample_handlers.ComparesHashesOnly: {"conflict": "with other parameters is answered with done instead of 409"},
    sample_handlers.ActsInDryRun: {"dry_run": "After a dry run, a query is answered with done"},
    sample_handlers.ActsInDryRunWithoutRecord: {"dry_run": "show 1 effects instead of 0", "reordered": "2 effects"},
    sample_handlers.ChecksThenActs: {"concurrent": "the handler acted more than once"},
    sample_handlers.AbortsWithItsClient: {"timed_out": "After a lost answer, the handler's records show 2 effects"},
    sample_handlers.RefusesUnknownQueries: {"unknown_reference": "answered with refused"},
    sample_handlers.ActsForAnyAction: {"other_action": "another action is answered with done"},
    sample_handlers.ReturnsAnotherResult: {"executes": "does not match the action's `result` schema"},
    sample_handlers.RefusesDuplicates: {
        "duplicate": "The second of two equal requests is answered with refused",
        "concurrent": "One of 5 equal requests at once is answered with refused",
        "late": "A late duplicate of a finished request is answered with refused",
    },
}
BY_TIMING = {sample_handlers.RefusesDuplicates: {"timed_out"}}
"""Checks that a handler fails only if a lost request arrives after the query for it, which then repeats it."""


@pytest.mark.parametrize("broken", BROKEN, ids=lambda broken: broken.__name__)
def test_kit_catches_a_broken_handler_for_its_reason(broken: type[SampleHandler]) -> None:
    found = failed(check(broken(KEYS)))
    assert set(found) - BY_TIMING.get(broken, set()) == set(BROKEN[broken]), found
    for name, part in BROKEN[broken].items():
        assert part in found[name]


def test_kit_passes_a_handler_that_keeps_the_contract() -> None:
    results = check(SampleHandler(KEYS))
    assert failed(results) == {}
    assert [result.check for result in results] == list(CHECKS)


def test_kit_needs_effects_to_catch_hidden_errors() -> None:
    for broken in (sample_handlers.AbortsWithItsClient, sample_handlers.ActsInDryRunWithoutRecord):
        assert failed(check(broken(KEYS), effects=False)) == {}


def test_kit_reports_a_handler_that_cannot_be_called() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    target = Target(HttpsHandler(f"http://127.0.0.1:{port}/"), REFUND, signer=SIGNER)
    results = list(run_checks(target))
    assert [result.check.name for result in results] == ["executes"]
    assert "cannot be called" in results[0].text


class ChecksToken(SampleHandler):
    """Checks a credential, as most existing APIs, and no signature."""

    header = ("authorization", "Bearer t0ken")

    def is_genuine(self, url: str, headers: list[tuple[str, str]], body: bytes) -> bool:
        return self.header in {(name.lower(), value) for name, value in headers}


class ChecksApiKey(ChecksToken):
    header = ("x-api-key", "k")


@pytest.mark.parametrize(
    ("handler", "credential", "names"),
    [
        (ChecksToken, Bearer("t0ken"), set()),
        (ChecksApiKey, Header("X-Api-Key", "k"), set()),
        (sample_handlers.TrustsAnyone, Bearer("t0ken"), {"forged"}),
    ],
)
def test_kit_forges_the_credential_when_there_is_one(
    handler: type[SampleHandler], credential: Credential, names: set[str]
) -> None:
    sample = handler(KEYS)
    with sample_handlers.serve(sample) as url:
        assert set(failed(list(run_checks(Target(HttpsHandler(url, credential), REFUND, signer=SIGNER))))) == names


# Callbacks


HANDLER = PolicyHttpsHandler(type="https", url="https://handler.example/", public_keys=tuple(PUBLIC_KEYS))
CALLBACKS = Sample(REFUND.name, REFUND.action.model_copy(update={"handler": HANDLER}), REFUND.parameters)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def check_callbacks(handler: sample_handlers.Accepts) -> list[Result]:
    base = f"http://127.0.0.1:{free_port()}"
    handler.callback_base = base
    with (
        receiving(base, CALLBACKS) as receiver,
        sample_handlers.serve(handler) as url,
        patch("local.check_handler.callbacks.WAIT_SECONDS", 0.5),
    ):
        target = Target(HttpsHandler(url), CALLBACKS, signer=SIGNER, effects=handler.effects.__getitem__)
        target.wait_for_callback = receiver.wait
        return list(run_checks(target))


def test_kit_receives_signed_callbacks() -> None:
    handler = sample_handlers.Accepts(KEYS)
    results = check_callbacks(handler)
    assert failed(results) == {}
    assert skipped(results) == set()
    assert set(handler.statuses) == {204}


def test_kit_accepts_a_callback_once() -> None:
    handler = sample_handlers.CallsBackTwice(KEYS)
    assert failed(check_callbacks(handler)) == {}
    assert set(handler.statuses) == {204, 409}


def test_kit_queries_when_a_callback_does_not_verify() -> None:
    handler = sample_handlers.CallsBackForAnotherReference(KEYS)
    assert failed(check_callbacks(handler)) == {
        "callback": "The handler accepted a request, and no valid callback came."
    }
    assert set(handler.statuses) == {403}


def test_kit_compares_a_callback_with_a_query() -> None:
    assert "callback" in failed(check_callbacks(sample_handlers.CallsBackWithAnotherResult(KEYS)))


def test_kit_follows_an_accepted_request_by_query_without_callback() -> None:
    results = check(sample_handlers.Accepts(KEYS), sample=CALLBACKS)
    assert failed(results) == {}
    assert "callback" in skipped(results)


def test_kit_fails_when_accepted_has_no_public_keys() -> None:
    assert "no `public_keys`" in failed(check(sample_handlers.Accepts(KEYS)))["executes"]


@pytest.mark.parametrize(
    ("path", "status"), [("/", 404), ("/actions/x/result", 404), ("/actions/task_x.0.1/other", 404), ("/other", 404)]
)
def test_receiver_refuses_other_paths(path: str, status: int) -> None:
    base = f"http://127.0.0.1:{free_port()}"
    with receiving(base, CALLBACKS):
        assert sample_handlers.post(base + path, {}, b"{}") == status


# The command


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    monkeypatch.setattr(cli, "KEY_FILE", tmp_path / "folder" / "check-handler.key")
    for name in ("HANDLER", "ACTION", "EFFECTS", "CALLBACK", "CREDENTIAL"):
        monkeypatch.delenv(name, raising=False)

    def run(**variables: str) -> int:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        return cli.main([])

    return run


FOLDER = str(ROOT / "examples" / "refund_lambda")


def test_command_prints_its_key_directory_once_made(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert command() == 2
    first = capsys.readouterr().out
    assert command() == 2
    assert capsys.readouterr().out == first
    assert '{"keys":[{"crv":"Ed25519"' in first
    assert cli.KEY_FILE.stat().st_mode & 0o777 == 0o600


def test_command_reports_and_exits_with_zero(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    command()
    key = cli._key(cli.KEY_FILE)
    handler = SampleHandler({Signer(key).key_id: key.public_key()})
    capsys.readouterr()
    with sample_handlers.serve(handler) as url:
        assert command(HANDLER=url, ACTION=FOLDER) == 0
    printed = capsys.readouterr().out
    assert printed.count("✓") == len(CHECKS) - 1
    assert printed.count("\u2013") == 1
    assert "EFFECTS is not set" in printed
    assert printed.endswith("The handler keeps the contract.\n")


def test_command_exits_with_one_and_the_reason(command: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with sample_handlers.serve(sample_handlers.TrustsAnyone(KEYS)) as url:
        assert command(HANDLER=url, ACTION=FOLDER) == 1
    printed = capsys.readouterr().out
    assert "✗ A request that the dispatcher did not make has no effect" in printed
    assert "A request with no signature is answered with done." in printed


@pytest.mark.parametrize(
    "variables",
    [
        {"HANDLER": "https://10.0.0.1/"},
        {"HANDLER": "http://example.com/"},
        {"ACTION": "/nowhere"},
        {"CREDENTIAL": "token"},
        {"CREDENTIAL": '{"type":"bearer","password":"x"}'},
        {"CALLBACK": "https://example.com/"},
    ],
)
def test_command_exits_with_two_when_it_cannot_begin(
    command: Any, capsys: pytest.CaptureFixture[str], variables: dict[str, str]
) -> None:
    assert command(**({"HANDLER": "http://127.0.0.1:9/", "ACTION": FOLDER} | variables)) == 2
    assert "The kit cannot begin:" in capsys.readouterr().err


def changed(**members: Any) -> str:
    content = json.loads((ROOT / "examples" / "refund_lambda" / "action.json").read_text())
    content["actions"]["refund_customer"] |= members
    return json.dumps(content)


@pytest.mark.parametrize(
    ("action", "samples", "part"),
    [
        ("{}", "[]", "one member"),
        ('{"actions":{"a":{}}}', "[{}]", "two objects"),
        ('{"actions":{"a":{}}}', "[{},{}]", "actions.a.title"),
        (changed(result={"type": "x"}), "[{},{}]", "actions.refund_customer.result.type"),
        (changed(), "[{},{}]", "samples.json: 0.order_id"),
        (changed(), '[{"order_id":"123456","amount":1},{"order_id":"1","amount":1}]', "samples.json: 1.order_id"),
        (changed(), '[{"order_id":"123456","amount":1},{"order_id":"123456","amount":1}]', "two different"),
    ],
)
def test_action_folder_is_refused_with_the_fix(tmp_path: Path, action: str, samples: str, part: str) -> None:
    (tmp_path / "action.json").write_text(action)
    (tmp_path / "samples.json").write_text(samples)
    with pytest.raises(KitError, match=part):
        read_sample(tmp_path)


def test_effects_command_gets_the_reference_and_returns_a_number() -> None:
    assert effects_of(f"{sys.executable} -c 'import sys; print(len(sys.argv[1]))'")("abc") == 3
    with pytest.raises(KitError, match="must print a number"):
        effects_of("echo no")("abc")
