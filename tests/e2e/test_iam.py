"""The calls that AWS must deny to each role, attempted with sessions of the deployed roles."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import boto3
import pytest
from botocore.exceptions import ClientError

from local.cloud import Cloud

KEY = {"pk": {"S": "task_x"}, "sk": {"S": "ENTRY#000001"}}
DENIED = {"AccessDenied", "AccessDeniedException"}


def _refused(call: Callable[..., Any], **arguments: Any) -> None:
    with pytest.raises(ClientError) as raised:
        call(**arguments)
    assert raised.value.response["Error"]["Code"] in DENIED, raised.value


MAY_INVOKE = {
    "LedgerFunction": {
        "GatewayFunction", "PlannerApiFunction", "PlanTaskFunction", "RunStepFunction", "AwaitApprovalFunction",
        "ReconcilerFunction", "ExecuteActionFunction",
        "WorkerApiFunction", "AuditApiFunction", "QubicApiFunction",
    },
    "LedgerTransferFunction": {"ExecuteActionFunction"},
    "LedgerAnchorFunction": {"AnchorFunction"},
    "LedgerRecordFunction": {"QubicApiFunction"},
}  # fmt: skip
SIGNERS = {*MAY_INVOKE, "TransactionWorkerFunction"}
QUBIC = SIGNERS | {"QubicApiFunction"}
WRITERS_OF_THE_TRAIL = {"RecordEventsFunction"}
FUNCTIONS = (
    "GatewayFunction", "PlannerApiFunction", "AgentRuntimeApiFunction", "WorkerApiFunction", "AuditApiFunction",
    "QubicApiFunction", "AuthorizerFunction", "PlanTaskFunction", "RunStepFunction", "AwaitApprovalFunction",
    "ExecuteActionFunction", "EndTaskFunction", "ReconcilerFunction", "RecordEventsFunction", "LedgerFunction",
    "SequencerFunction", "AnchorFunction", "TransactionWorkerFunction",
    "LedgerTransferFunction", "LedgerAnchorFunction", "LedgerRecordFunction",
    "AuditSweeperFunction", "PublicLogFunction",
)  # fmt: skip


def test_this_list_has_every_function_of_the_stack(local_cloud: Cloud) -> None:
    formation = local_cloud.client("cloudformation")
    pages = formation.get_paginator("list_stack_resources").paginate(StackName="qaes-local")
    found = {
        each["LogicalResourceId"]
        for page in pages
        for each in page["StackResourceSummaries"]
        if each["ResourceType"] == "AWS::Lambda::Function"
    }
    assert found == set(FUNCTIONS)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_no_role_can_change_or_delete_an_audit_entry(
    local_cloud: Cloud, session: Callable[[str], boto3.Session], function: str
) -> None:
    dynamodb = session(function).client("dynamodb", endpoint_url=local_cloud.endpoint)
    table = local_cloud.resources["AuditEntriesTable"]
    _refused(dynamodb.delete_item, TableName=table, Key=KEY)
    _refused(
        dynamodb.update_item,
        TableName=table,
        Key=KEY,
        UpdateExpression="SET #text = :forged",
        ExpressionAttributeNames={"#text": "text"},
        ExpressionAttributeValues={":forged": {"S": "forged"}},
    )
    _refused(dynamodb.batch_write_item, RequestItems={table: [{"DeleteRequest": {"Key": KEY}}]})
    _refused(dynamodb.delete_table, TableName=table)
    if function not in WRITERS_OF_THE_TRAIL:
        _refused(dynamodb.put_item, TableName=table, Item=KEY)


@pytest.mark.parametrize("function", sorted(set(FUNCTIONS) - QUBIC))
def test_only_the_qubic_service_touches_the_ledgers_tables(
    local_cloud: Cloud, session: Callable[[str], boto3.Session], function: str
) -> None:
    dynamodb = session(function).client("dynamodb", endpoint_url=local_cloud.endpoint)
    for name in ("LedgerTable", "ChainTable"):
        table = local_cloud.resources[name]
        _refused(dynamodb.get_item, TableName=table, Key=KEY)
        _refused(dynamodb.put_item, TableName=table, Item=KEY)
        _refused(dynamodb.scan, TableName=table)


@pytest.mark.parametrize("function", sorted(set(FUNCTIONS) - SIGNERS))
def test_only_the_ledgers_functions_have_the_key(
    local_cloud: Cloud, session: Callable[[str], boto3.Session], function: str
) -> None:
    """The API of the qubic service, which the internet reaches, is not among them."""
    secrets = session(function).client("secretsmanager", endpoint_url=local_cloud.endpoint)
    _refused(secrets.get_secret_value, SecretId=local_cloud.resources["QubicSeed"])
    queue = local_cloud.client("sqs").list_queues(QueueNamePrefix="qaes-local-TransactionWorkerQueue")["QueueUrls"][0]
    sqs = session(function).client("sqs", endpoint_url=local_cloud.endpoint)
    _refused(sqs.send_message, QueueUrl=queue, MessageBody="{}")
    events = session(function).client("events", endpoint_url=local_cloud.endpoint)
    bus = local_cloud.resources["LedgerBus"]
    _refused(events.put_events, Entries=[{"EventBusName": bus, "Source": "x", "DetailType": "x", "Detail": "{}"}])


@pytest.mark.parametrize("function", sorted(QUBIC))
def test_qubic_service_cannot_delete_or_change_its_key(
    local_cloud: Cloud, session: Callable[[str], boto3.Session], function: str
) -> None:
    dynamodb = session(function).client("dynamodb", endpoint_url=local_cloud.endpoint)
    for name in ("LedgerTable", "ChainTable"):
        _refused(dynamodb.delete_item, TableName=local_cloud.resources[name], Key=KEY)
    secrets = session(function).client("secretsmanager", endpoint_url=local_cloud.endpoint)
    _refused(secrets.put_secret_value, SecretId=local_cloud.resources["QubicSeed"], SecretString="x")
    if function in SIGNERS:
        assert secrets.get_secret_value(SecretId=local_cloud.resources["QubicSeed"])["SecretString"].isalpha()


@pytest.mark.parametrize("function", FUNCTIONS)
def test_each_role_invokes_only_its_ledger_functions(
    local_cloud: Cloud, session: Callable[[str], boto3.Session], function: str
) -> None:
    client = session(function).client("lambda", endpoint_url=local_cloud.endpoint)
    for ledger, callers in MAY_INVOKE.items():
        call = {"FunctionName": local_cloud.resources[ledger], "Payload": json.dumps({"operation": "none"})}
        if function not in callers:
            _refused(client.invoke, **call)
            continue
        answer = json.loads(client.invoke(**call)["Payload"].read())
        assert answer["error"]["code"] == "unknown_operation"


STARTERS = {"GatewayFunction", "ReconcilerFunction"}
WAKERS = STARTERS | {"ExecuteActionFunction", "AwaitApprovalFunction"}


@pytest.mark.parametrize("function", sorted(set(FUNCTIONS) - STARTERS))
def test_only_listed_roles_start_or_resume_executions(
    local_cloud: Cloud, session: Callable[[str], boto3.Session], function: str
) -> None:
    step_functions = session(function).client("stepfunctions", endpoint_url=local_cloud.endpoint)
    if function not in WAKERS:
        _refused(step_functions.send_task_success, taskToken="x", output="{}")
        _refused(step_functions.send_task_failure, taskToken="x", error="ApprovalRejectedError")
    _refused(
        step_functions.start_execution, stateMachineArn=local_cloud.outputs["StateMachineArn"], name="x", input="{}"
    )


@pytest.mark.parametrize("function", ["GatewayFunction", "PlannerApiFunction", "RunStepFunction"])
def test_only_audit_roles_read_the_trail(
    local_cloud: Cloud, session: Callable[[str], boto3.Session], function: str
) -> None:
    dynamodb = session(function).client("dynamodb", endpoint_url=local_cloud.endpoint)
    for table in ("AuditEntriesTable", "AuditLogTable"):
        _refused(dynamodb.get_item, TableName=local_cloud.resources[table], Key=KEY)


RECORDERS_CALLERS = {"ExecuteActionFunction", "AuditSweeperFunction"}


@pytest.mark.parametrize("function", sorted(set(FUNCTIONS) - RECORDERS_CALLERS))
def test_only_execute_action_and_the_sweeper_invoke_the_recorder(
    local_cloud: Cloud, session: Callable[[str], boto3.Session], function: str
) -> None:
    client = session(function).client("lambda", endpoint_url=local_cloud.endpoint)
    _refused(client.invoke, FunctionName=local_cloud.resources["RecordEventsFunction"], Payload='{"task_id": "x"}')


def test_role_may_still_do_its_work(local_cloud: Cloud, session: Callable[[str], boto3.Session]) -> None:
    """Without this permitted call the refusals above would prove nothing."""
    dynamodb = session("AuditApiFunction").client("dynamodb", endpoint_url=local_cloud.endpoint)
    found = dynamodb.query(
        TableName=local_cloud.resources["AuditEntriesTable"],
        KeyConditionExpression="pk = :pk",
        ExpressionAttributeValues={":pk": {"S": "task_x"}},
    )
    assert found["Items"] == []


@pytest.mark.parametrize("function", sorted(WRITERS_OF_THE_TRAIL))
def test_recorder_can_do_nothing_to_the_log(
    local_cloud: Cloud, session: Callable[[str], boto3.Session], function: str
) -> None:
    dynamodb = session(function).client("dynamodb", endpoint_url=local_cloud.endpoint)
    table = local_cloud.resources["AuditLogTable"]
    for pk in ("LOG", "HASH#x", "task_x"):
        key = {"pk": {"S": pk}, "sk": {"S": "INDEX#000001"}}
        _refused(dynamodb.put_item, TableName=table, Item=key)
        _refused(dynamodb.get_item, TableName=table, Key=key)
        _refused(dynamodb.transact_write_items, TransactItems=[{"Put": {"TableName": table, "Item": key}}])


@pytest.mark.parametrize(
    ("role", "value"), [("leaf", {"S": "f" * 64}), ("input", {"B": b"x"}), ("output", {"B": b"x"})]
)
def test_audit_api_alone_finds_entries_by_a_hash(
    local_cloud: Cloud, session: Callable[[str], boto3.Session], role: str, value: dict[str, Any]
) -> None:
    query: dict[str, Any] = {
        "TableName": local_cloud.resources["AuditEntriesTable"],
        "IndexName": f"by_{role}",
        "KeyConditionExpression": "#role = :hash",
        "ExpressionAttributeNames": {"#role": role},
        "ExpressionAttributeValues": {":hash": value},
    }
    for function in ("RecordEventsFunction", "SequencerFunction", "AuditSweeperFunction", "GatewayFunction"):
        _refused(session(function).client("dynamodb", endpoint_url=local_cloud.endpoint).query, **query)
    found = session("AuditApiFunction").client("dynamodb", endpoint_url=local_cloud.endpoint).query(**query)
    assert found["Items"] == []


@pytest.mark.parametrize("function", sorted(set(FUNCTIONS) - {"SequencerFunction"}))
def test_only_the_sequencer_advances_the_log(
    local_cloud: Cloud, session: Callable[[str], boto3.Session], function: str
) -> None:
    dynamodb = session(function).client("dynamodb", endpoint_url=local_cloud.endpoint)
    table = local_cloud.resources["AuditLogTable"]
    _refused(dynamodb.delete_item, TableName=table, Key=KEY)
    _refused(
        dynamodb.update_item,
        TableName=table,
        Key={"pk": {"S": "LOG"}, "sk": {"S": "HEAD"}},
        UpdateExpression="SET #size = :forged",
        ExpressionAttributeNames={"#size": "size"},
        ExpressionAttributeValues={":forged": {"N": "1"}},
    )


@pytest.mark.parametrize("function", sorted(set(FUNCTIONS) - {"AnchorFunction"}))
def test_only_the_anchor_signs_checkpoints(
    local_cloud: Cloud, session: Callable[[str], boto3.Session], function: str
) -> None:
    secrets = session(function).client("secretsmanager", endpoint_url=local_cloud.endpoint)
    _refused(secrets.get_secret_value, SecretId=local_cloud.resources["LogSigningKey"])
