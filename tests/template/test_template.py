"""House rules of template.yaml."""

from __future__ import annotations

import importlib
import json
import re
import tomllib
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.template import environment
from tests.template.conftest import ROOT

NEEDS_EVERY_RESOURCE = ("logs:", "states:SendTaskSuccess", "states:SendTaskFailure")
"""Actions for which IAM knows no resource: the delivery of Step Functions' logs, and a task token's answer."""
HEALTH_ROUTES = {
    "/health",
    "/planner/health",
    "/agent-runtime/health",
    "/worker/health",
    "/audit/health",
    "/qubic/health",
}
OPEN_ROUTES = HEALTH_ROUTES | {"/", "/openapi.json", "/docs"}
ROUTES = {
    "GatewayFunction": {
        "POST /task/start",
        "GET /task/{task_id}",
        "GET /tasks",
        "POST /task/{task_id}/approve",
        "POST /task/{task_id}/cancel",
        "POST /task/{task_id}/retry",
        "GET /",
        "GET /openapi.json",
        "GET /docs",
        "GET /health",
    },
    "PlannerApiFunction": {
        "POST /plan/create",
        "GET /plan/{plan_id}",
        "POST /policy/decide",
        "POST /policy/versions/{version}/replay",
        "GET /actions",
        "GET /planner/health",
    },
    "AgentRuntimeApiFunction": {"GET /task/{task_id}/status", "GET /agent-runtime/health"},
    "WorkerApiFunction": {"GET /worker/health"},
    "AuditApiFunction": {
        "GET /audit/{task_id}",
        "GET /audit/{task_id}/bundle",
        "GET /audit/verify/{hash}",
        "GET /audit/log/checkpoint",
        "GET /audit/log/consistency",
        "GET /log/checkpoint",
        "GET /log/tile/entries/{a}",
        "GET /log/tile/entries/{a}/{b}",
        "GET /log/tile/entries/{a}/{b}/{c}",
        "GET /log/tile/entries/{a}/{b}/{c}/{d}",
        "GET /log/tile/{level}/{a}",
        "GET /log/tile/{level}/{a}/{b}",
        "GET /log/tile/{level}/{a}/{b}/{c}",
        "GET /log/tile/{level}/{a}/{b}/{c}/{d}",
        "GET /audit/health",
    },
    "PublicLogFunction": {
        "GET /log/checkpoint",
        "GET /log/tile/{level}/{a}",
        "GET /log/tile/{level}/{a}/{b}",
        "GET /log/tile/{level}/{a}/{b}/{c}",
        "GET /log/tile/{level}/{a}/{b}/{c}/{d}",
    },
    "QubicApiFunction": {
        "GET /policy",
        "POST /policy",
        "GET /policy/versions",
        "GET /policy/versions/{version}",
        "POST /policy/versions/{version}/approve",
        "POST /policy/versions/{version}/reject",
        "POST /policy/suspend",
        "POST /policy/resume",
        "POST /write",
        "GET /verify/{hash}",
        "GET /tx/{txid}",
        "GET /qubic/health",
        "GET /live/v1/tick-info",
        "POST /live/v1/broadcast-transaction",
        "GET /live/v1/balances/{id}",
        "GET /query/v1/getLastProcessedTick",
        "POST /query/v1/getTransactionByHash",
        "POST /query/v1/getTransactionsForIdentity",
        "GET /mock/faults",
        "PUT /mock/faults",
    },
}
READS_BY_POST = {"POST /query/v1/getTransactionByHash", "POST /query/v1/getTransactionsForIdentity"}
"""The public RPC's own shapes."""

CHANGES = {
    "dynamodb:UpdateItem",
    "dynamodb:DeleteItem",
    "dynamodb:BatchWriteItem",
    "dynamodb:PartiQLUpdate",
    "dynamodb:PartiQLDelete",
}
LEDGER = {"LedgerFunction", "LedgerTransferFunction", "LedgerAnchorFunction", "LedgerRecordFunction"}
"""Those that other functions invoke."""
HOLDERS_OF_THE_SEED = LEDGER | {"TransactionWorkerFunction"}
QUBIC = HOLDERS_OF_THE_SEED | {"QubicApiFunction"}
OWNERS = {
    "PreviewsTable": {"PlannerApiFunction"},
    "LimitsTable": {"PlannerApiFunction", "AwaitApprovalFunction", "RunStepFunction", "ExecuteActionFunction"},
    "LedgerTable": QUBIC,
    "PolicyTable": QUBIC
    | {"RunStepFunction", "ExecuteActionFunction", "RecordEventsFunction", "AuditSweeperFunction", "AuditApiFunction"},
    "ChainTable": QUBIC,
    "AuditEntriesTable": {
        "ExecuteActionFunction",
        "RecordEventsFunction",
        "SequencerFunction",
        "AuditSweeperFunction",
        "AuditApiFunction",
    },
    "AuditLogTable": {
        "SequencerFunction",
        "AnchorFunction",
        "AuditSweeperFunction",
        "AuditApiFunction",
        "PublicLogFunction",
    },
    "AuditAnchorsTable": {"AnchorFunction", "AuditApiFunction", "PublicLogFunction"},
}


def allowed(template: Any, name: str) -> Iterator[tuple[str, Any]]:
    """(action, resource) pairs that the function's own policy allows."""
    for statement in template.statements(name):
        if statement["Effect"] == "Allow":
            yield from ((action, resource) for action in statement["Action"] for resource in statement["Resource"])


def test_every_function_has_own_log_group_with_retention(template: Any) -> None:
    groups = {name: function["LoggingConfig"]["LogGroup"]["Ref"] for name, function in template.functions.items()}
    assert len(set(groups.values())) == len(groups)
    for group in groups.values():
        assert "RetentionInDays" in template.resources[group]["Properties"]


def test_every_log_group_is_kept_for_a_limited_time(template: Any) -> None:
    for name, group in template.of_type("AWS::Logs::LogGroup").items():
        assert group["RetentionInDays"] == {"Ref": "LogRetentionDays"}, name


def test_every_index_of_the_tasks_has_keys_only(template: Any) -> None:
    """A change of a task would write a whole task to any other."""
    indexes = template.resources["TasksTable"]["Properties"]["GlobalSecondaryIndexes"]
    assert indexes
    for index in indexes:
        assert index["Projection"] == {"ProjectionType": "KEYS_ONLY"}, index["IndexName"]


def test_functions_are_traced_and_share_one_build(template: Any) -> None:
    common = template.document["Globals"]["Function"]
    assert common["Tracing"] == "Active"
    assert common["CodeUri"] == "functions/"
    for name, function in template.functions.items():
        assert not {"CodeUri", "Layers", "Runtime"} & function.keys(), f"{name} departs from Globals"


def test_functions_start_no_trace_that_no_rule_samples(template: Any) -> None:
    """Lambda samples at its own rate if a stream, a queue or a schedule has no sampling decision."""
    for name, function in template.functions.items():
        sources = {event["Type"] for event in function.get("Events", {}).values()} - {"Api"}
        assert function.get("Tracing") == ("PassThrough" if sources else None), name


def test_traces_are_sampled_at_5_percent(template: Any) -> None:
    """Of this stack's APIs and executions, and of nothing else in the account; the local AWS has no such rules."""
    rules = template.of_type("AWS::XRay::SamplingRule")
    assert {template.resources[name]["Condition"] for name in rules} == {"SamplesTraces", "SamplesTracesOfPublicLog"}
    assert template.document["Conditions"]["SamplesTraces"]["Fn::And"] == [
        {"Fn::Not": [{"Fn::Equals": [{"Ref": "Stage"}, "local"]}]},
        {"Fn::Equals": [{"Ref": "ManageTraceSampling"}, "true"]},
    ]
    sampled = {name: rule["SamplingRule"] for name, rule in rules.items()}
    for name, rule in sampled.items():
        assert (rule["FixedRate"], rule["ReservoirSize"]) == (0.05, 0), name
        assert (rule["ResourceARN"], rule["ServiceName"]) != ("*", "*"), name
        prefix, api = rule["RuleName"]["Fn::Sub"].removesuffix("}").split("${")
        assert api in {"Api", "PublicLogApi"} and len(prefix) + len("a1b2c3d4e5") <= 32, name
    traced = {
        name
        for kind in ("AWS::Serverless::Api", "AWS::Serverless::StateMachine")
        for name, body in template.of_type(kind).items()
        if body.get("TracingEnabled") or body.get("Tracing", {}).get("Enabled")
    }
    places = {json.dumps([rule["ResourceARN"], rule["ServiceName"]]) for rule in sampled.values()}
    assert traced == {"Api", "PublicLogApi", "TaskExecutionStateMachine"}
    for name in traced:
        assert [place for place in places if f"${{{name}}}" in place or f'"{name}"' in place], name


def test_reconciler_hears_of_executions_that_failed(template: Any) -> None:
    """A success is EndTask's own word; one without it is left to the next minute's run."""
    pattern = template.functions["ReconcilerFunction"]["Events"]["ExecutionEnded"]["Properties"]["Pattern"]
    assert set(pattern["detail"]["status"]) == {"FAILED", "TIMED_OUT", "ABORTED"}
    [schedule] = [
        event["Properties"]["Schedule"]
        for event in template.functions["ReconcilerFunction"]["Events"].values()
        if event["Type"] == "Schedule"
    ]
    assert schedule == "rate(1 minute)"


def test_state_machine_logs_failures_without_their_data(template: Any) -> None:
    logging = template.state_machine["Logging"]
    assert (logging["Level"], logging["IncludeExecutionData"]) == ("ERROR", False)


def test_stages_on_aws_run_on_arm64(template: Any) -> None:
    assert template.parameters["Architecture"]["Default"] == "arm64"
    sections = tomllib.loads((ROOT / "samconfig.toml").read_text())
    for stage in ("default", "dev", "staging", "prod"):
        for command in ("build", "deploy"):
            given = sections[stage][command]["parameters"]["parameter_overrides"]
            assert "Architecture=arm64" in given, (stage, command)


def test_every_handler_can_be_imported(template: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_DEFAULT_REGION", "eu-west-1")
    for name, function in template.functions.items():
        module, _, attribute = function["Handler"].rpartition(".")
        assert callable(getattr(importlib.import_module(module), attribute, None)), f"{name}: {function['Handler']}"


def test_function_ends_before_its_state_does(template: Any) -> None:
    common = template.document["Globals"]["Function"]["Timeout"]
    called = {
        value["Fn::GetAtt"][0]
        for value in template.state_machine["DefinitionSubstitutions"].values()
        if "Fn::GetAtt" in value
    }
    assert called
    for name in called:
        # ExecuteAction waits for the ledger's confirmation, which takes longer than its function.
        parameter = "ConfirmationTimeoutSeconds" if name == "ExecuteActionFunction" else "TaskTimeoutSeconds"
        limits = template.parameters[parameter]
        shortest_state = limits["Default" if name == "ExecuteActionFunction" else "MinValue"]
        assert template.functions[name].get("Timeout", common) < shortest_state, name


def test_routes_are_those_of_the_contract(template: Any) -> None:
    for name, function in template.functions.items():
        events = [event["Properties"] for event in function.get("Events", {}).values() if event["Type"] == "Api"]
        assert {f"{event['Method']} {event['Path']}" for event in events} == ROUTES.get(name, set()), name


def test_only_health_and_the_documentation_are_open(template: Any) -> None:
    assert template.resources["Api"]["Properties"]["Auth"]["DefaultAuthorizer"] == "TokenAuthorizer"
    for name, function in template.functions.items():
        for event in function.get("Events", {}).values():
            if event["Type"] == "Api" and name != "PublicLogFunction":
                assert event["Properties"]["RestApiId"] == {"Ref": "Api"}
                is_open = event["Properties"].get("Auth", {}).get("Authorizer") == "NONE"
                assert is_open == (event["Properties"]["Path"] in OPEN_ROUTES), event["Properties"]["Path"]


def test_log_is_public_only_when_enabled_and_has_no_entries(template: Any) -> None:
    assert template.parameters["PublicLog"]["Default"] == "false"
    for name in ("PublicLogApi", "PublicLogFunction", "PublicLogLogs"):
        assert template.resources[name]["Condition"] == "LogIsPublic"
    assert template.document["Conditions"]["LogIsPublic"] == {"Fn::Equals": [{"Ref": "PublicLog"}, "true"]}
    for event in template.functions["PublicLogFunction"]["Events"].values():
        assert event["Properties"]["RestApiId"] == {"Ref": "PublicLogApi"}
    assert not [route for route in ROUTES["PublicLogFunction"] if "entries" in route]


def test_public_log_cannot_read_names_of_tasks(template: Any) -> None:
    tiles, anchors = template.statements("PublicLogFunction")
    assert list(allowed(template, "PublicLogFunction")) == [
        ("dynamodb:GetItem", {"Fn::GetAtt": ["AuditLogTable", "Arn"]}),
        ("dynamodb:Query", {"Fn::GetAtt": ["AuditAnchorsTable", "Arn"]}),
    ]
    assert tiles["Condition"] == {"ForAllValues:StringLike": {"dynamodb:LeadingKeys": ["TILE#*"]}}
    assert "Condition" not in anchors


def test_public_log_treats_every_client_as_binary(template: Any) -> None:
    assert template.resources["PublicLogApi"]["Properties"]["BinaryMediaTypes"] == ["*/*"]
    # There it would break the preflight, to which SAM cannot give a contentHandling.
    assert "*/*" not in template.resources["Api"]["Properties"]["BinaryMediaTypes"]


def test_two_stacks_logs_have_two_origins(template: Any) -> None:
    given, named, own = template.functions["AnchorFunction"]["Environment"]["Variables"]["LOG_ORIGIN"]["Fn::If"]
    assert (given, named) == ("HasLogOrigin", {"Ref": "LogOrigin"})
    assert own == {"Fn::Sub": "${Api}.execute-api.${AWS::Region}.${AWS::URLSuffix}/v1/log"}


@pytest.mark.parametrize(
    ("origin", "taken"),
    [
        ("", True), ("log.example.com", True), ("log.example.com/qaes", True), ("localhost:8000/public/log", True),
        ("https://log.example.com", False), ("log.example.com/", False), ("a b", False), ("a+b", False),
        ("a\nb", False),
    ],
)  # fmt: skip
def test_origin_is_an_address_without_its_scheme(template: Any, origin: str, taken: bool) -> None:
    parameter = template.parameters["LogOrigin"]
    assert bool(re.fullmatch(parameter["AllowedPattern"], origin)) == taken
    assert parameter["MaxLength"] <= 255


@pytest.mark.parametrize("name", ["Api", "PublicLogApi"])
def test_api_is_throttled_and_logged(template: Any, name: str) -> None:
    api = template.resources[name]["Properties"]
    for settings in api["MethodSettings"]:
        assert {"ThrottlingRateLimit", "ThrottlingBurstLimit"} <= settings.keys()
        assert settings["DataTraceEnabled"] is False
        assert (settings["MetricsEnabled"], settings["LoggingLevel"]) == (True, "ERROR")
    assert "authorizationToken" not in api["AccessLogSetting"]["Format"]


def test_public_log_limits_stay_below_account_limits(template: Any) -> None:
    """The log's limits apply to each route: any client can send this many requests at the operator's cost."""
    function, api = template.functions["PublicLogFunction"], template.resources["PublicLogApi"]["Properties"]
    [settings] = api["MethodSettings"]
    assert (settings["ResourcePath"], limits_of(settings)) == ("/*", "Log")
    routes = [each["Properties"]["Path"] for each in function["Events"].values()]
    assert len(routes) * int(template.parameters["LogThrottlingRate"]["Default"]) <= 50
    assert len(routes) * int(template.parameters["LogThrottlingBurst"]["Default"]) <= 100


def limits_of(settings: dict[str, Any]) -> str:
    """`Api`, `Change`, `Open` or `Log`: by which parameters it is limited."""
    [kind] = {
        str(settings[name]["Ref"]).removesuffix(f"Throttling{name.removeprefix('Throttling').removesuffix('Limit')}")
        for name in ("ThrottlingRateLimit", "ThrottlingBurstLimit")
    }
    return kind


def test_writing_and_open_routes_have_own_limits(template: Any) -> None:
    """A flood of one route, or of requests without a token, does not affect the others."""
    routes = {route for routes in ROUTES.values() for route in routes}
    wanted = {route: "Change" for route in routes - READS_BY_POST if not route.startswith("GET ")}
    wanted |= {f"GET {path}": "Open" for path in OPEN_ROUTES}
    first, *others = template.resources["Api"]["Properties"]["MethodSettings"]
    assert (first["ResourcePath"], first["HttpMethod"], limits_of(first)) == ("/*", "*", "Api")
    found = {}
    for settings in others:
        path = settings["ResourcePath"]
        is_root = path == "/"
        assert is_root or (path.startswith("/~1") and "/" not in path[1:]), "CloudFormation takes ~1 for each /"
        found[f"{settings['HttpMethod']} {path[not is_root :].replace('~1', '/')}"] = limits_of(settings)
    assert found == wanted


def test_limits_of_single_routes_are_tighter_by_default(template: Any) -> None:
    def default(kind: str, limit: str) -> int:
        return int(template.parameters[f"{kind}Throttling{limit}"]["Default"])

    for limit in ("Rate", "Burst"):
        assert default("Open", limit) < default("Change", limit) < default("Api", limit)


def test_alarm_fires_on_old_approval_or_missing_metric(template: Any) -> None:
    alarm = template.resources["OldestPendingApprovalAlarm"]["Properties"]
    assert alarm["Threshold"] == {"Ref": "ApprovalAlarmSeconds"}
    assert alarm["TreatMissingData"] == "breaching", "a silent reconciler must raise the alarm"
    defaults = {
        name: int(template.parameters[name]["Default"]) for name in ("ApprovalAlarmSeconds", "ApprovalTimeoutSeconds")
    }
    assert defaults["ApprovalAlarmSeconds"] < defaults["ApprovalTimeoutSeconds"]


def test_no_policy_names_every_resource(template: Any) -> None:
    for name in [*template.functions, "TaskExecutionStateMachine"]:
        for action, resource in allowed(template, name):
            assert not action.endswith("*"), f"{name}: {action}"
            if resource == "*":
                assert action.startswith(NEEDS_EVERY_RESOURCE), f"{name}: {action} on every resource"


SOURCE = (ROOT / "template.yaml").read_text()
RESOURCES = dict(re.findall(r"^  (\w+):(.*\n(?:    .*\n|\n)*)", SOURCE.split("\nResources:\n")[1], re.MULTILINE))
"""The text of each resource by its name, in the order of the file."""


def test_actions_name_the_call_that_needs_them() -> None:
    services = ("dynamodb:", "lambda:", "states:", "logs:", "sqs:", "secretsmanager:")
    grants = [
        text for text in RESOURCES.values() if "AWS::DynamoDB::Table" not in text
    ]  # a table's own policy only denies
    lines = [line for text in grants for line in text.splitlines()]
    actions = [line for line in lines if line.strip().startswith(tuple(f"- {each}" for each in services))]

    assert len(actions) > 100
    assert [line for line in actions if " # " not in line] == []


def test_contents_list_the_sections_and_their_functions() -> None:
    contents = re.findall(r"^#   (\S.*)$", SOURCE.split("\nMetadata:")[0], re.MULTILINE)
    sections = re.split(r"^  # === (.+?) =*$", SOURCE, flags=re.MULTILINE)[1:]
    listed = {
        title: re.findall(r"^  (\w+)Function:$", text, re.MULTILINE)
        for title, text in zip(sections[::2], sections[1::2], strict=True)
    }

    assert contents == [f"{title}: {', '.join(names)}" if names else title for title, names in listed.items()]


def test_functions_are_followed_by_their_log_group(template: Any) -> None:
    names = list(RESOURCES)
    configured = {name: template.resources[name]["Properties"]["LoggingConfig"] for name in template.functions}

    assert {name: config["LogGroup"]["Ref"] for name, config in configured.items()} == {
        name: names[names.index(name) + 1] for name in template.functions
    }


def test_only_the_recorder_puts_audit_entries(template: Any) -> None:
    entries = {"Fn::GetAtt": ["AuditEntriesTable", "Arn"]}
    writers = {name for name in template.functions if ("dynamodb:PutItem", entries) in list(allowed(template, name))}
    assert writers == {"RecordEventsFunction"}


def test_recorder_only_reads_but_for_the_put_of_an_entry(template: Any) -> None:
    entries, tasks = ({"Fn::GetAtt": [table, "Arn"]} for table in ("AuditEntriesTable", "TasksTable"))
    name = "RecordEventsFunction"
    assert all("Condition" not in each for each in template.statements(name))
    assert sorted(map(str, allowed(template, name))) == sorted(
        [str((f"dynamodb:{read}", table)) for read in ("GetItem", "Query") for table in (entries, tasks)]
        + [str(("dynamodb:PutItem", entries)), str(("dynamodb:GetItem", {"Fn::GetAtt": ["DecisionsTable", "Arn"]}))]
        + [str(("dynamodb:Query", {"Fn::GetAtt": ["PolicyTable", "Arn"]}))]
    )


def test_execute_action_reads_single_entries_and_writes_none(template: Any) -> None:
    entries = {"Fn::GetAtt": ["AuditEntriesTable", "Arn"]}
    actions = [action for action, resource in allowed(template, "ExecuteActionFunction") if resource == entries]
    assert actions == ["dynamodb:GetItem"]


def test_only_audit_api_queries_the_hash_indexes(template: Any) -> None:
    indexes = template.resources["AuditEntriesTable"]["Properties"]["GlobalSecondaryIndexes"]
    assert [index["IndexName"] for index in indexes] == ["by_leaf", "by_input", "by_output"]
    arns = [{"Fn::Sub": f"${{AuditEntriesTable.Arn}}/index/{index['IndexName']}"} for index in indexes]
    for name in template.functions:
        queried = [each for each in allowed(template, name) if "AuditEntriesTable.Arn}/index" in str(each)]
        assert queried == ([("dynamodb:Query", arn) for arn in arns] if name == "AuditApiFunction" else []), name
    for index in indexes:
        assert index["Projection"] == {"ProjectionType": "KEYS_ONLY"}, "a hash of 64 digits would cost another unit"


def table_policy(template: Any, table: str) -> list[dict[str, Any]]:
    """Actions that a table's policy denies to everyone, even administrators; the local AWS ignores such policies."""
    policy = template.resources[table]["Properties"]["ResourcePolicy"]["PolicyDocument"]["Statement"]
    assert all((each["Effect"], each["Principal"], each["Resource"]) == ("Deny", "*", "*") for each in policy)
    return list(policy)


AUDITS_ROLES = {
    "RecordEventsFunction": "recorder",
    "SequencerFunction": "sequencer",
    "AnchorFunction": "anchor",
    "AuditSweeperFunction": "sweeper",
}


def arn_of_roles(name: str) -> dict[str, str]:
    return {"Fn::Sub": f"arn:${{AWS::Partition}}:iam::${{AWS::AccountId}}:role/${{AWS::StackName}}/{name}/*"}


def test_audit_writers_are_identified_by_role_path(template: Any) -> None:
    """A table's policy cannot refer to a role that refers to the table, so both use the path."""
    paths = {name: each["RolePath"]["Fn::Sub"] for name, each in template.functions.items() if "RolePath" in each}
    known = AUDITS_ROLES | {"GatewayFunction": "gateway", "QubicApiFunction": "policy"}
    known |= dict.fromkeys(HOLDERS_OF_THE_SEED, "ledger")
    assert paths == {function: f"/${{AWS::StackName}}/{name}/" for function, name in known.items()}
    for name in template.functions:
        puts = {str(resource) for action, resource in allowed(template, name) if action == "dynamodb:PutItem"}
        writes_the_audit = any("'Audit" in each for each in puts)
        assert writes_the_audit == (name in AUDITS_ROLES), name


def test_only_recorder_can_put_entries(template: Any) -> None:
    _, put = table_policy(template, "AuditEntriesTable")
    assert set(put["Action"]) == {"dynamodb:PutItem", "dynamodb:PartiQLInsert"}
    assert put["Condition"] == {"ArnNotLike": {"aws:PrincipalArn": arn_of_roles("recorder")}}


def test_log_written_by_audit_roles_in_own_partitions(template: Any) -> None:
    delete, put, update, *partitions = table_policy(template, "AuditLogTable")
    assert set(delete["Action"]) == CHANGES - {"dynamodb:UpdateItem"} | {"dynamodb:PartiQLInsert"}
    assert "Condition" not in delete
    roles = [arn_of_roles(name) for name in ("sequencer", "sweeper")]
    assert (put["Action"], put["Condition"]) == (["dynamodb:PutItem"], {"ArnNotLike": {"aws:PrincipalArn": roles}})
    only_sequencer = {"ArnNotLike": {"aws:PrincipalArn": arn_of_roles("sequencer")}}
    assert (update["Action"], update["Condition"]) == (["dynamodb:UpdateItem"], only_sequencer)
    keys = {"sequencer": ["LOG", "TILE#*", "task_*", "policy"], "sweeper": ["SWEEP"]}
    for each, (name, leading) in zip(partitions, keys.items(), strict=True):
        assert set(each["Action"]) == {"dynamodb:PutItem", "dynamodb:UpdateItem"}
        assert each["Condition"] == {
            "ArnLike": {"aws:PrincipalArn": arn_of_roles(name)},
            "ForAnyValue:StringNotLike": {"dynamodb:LeadingKeys": leading},
        }


def test_decisions_are_put_by_the_gateways_role_alone(template: Any) -> None:
    changes, put = table_policy(template, "DecisionsTable")
    assert set(changes["Action"]) == CHANGES and "Condition" not in changes
    assert set(put["Action"]) == {"dynamodb:PutItem", "dynamodb:PartiQLInsert"}
    assert put["Condition"] == {"ArnNotLike": {"aws:PrincipalArn": arn_of_roles("gateway")}}


def test_policy_table_lets_the_api_alone_suspend(template: Any) -> None:
    changes, put, partitions = table_policy(template, "PolicyTable")
    assert set(changes["Action"]) == CHANGES and "Condition" not in changes
    assert set(put["Action"]) == set(partitions["Action"]) == {"dynamodb:PutItem", "dynamodb:PartiQLInsert"}
    roles = [arn_of_roles(name) for name in ("policy", "ledger")]
    assert put["Condition"] == {"ArnNotLike": {"aws:PrincipalArn": roles}}
    assert partitions["Condition"] == {
        "ArnLike": {"aws:PrincipalArn": arn_of_roles("ledger")},
        "ForAnyValue:StringNotLike": {"dynamodb:LeadingKeys": ["EVENTS#*"]},
    }


def test_anchors_are_put_by_the_anchors_role_alone(template: Any) -> None:
    changes, put = table_policy(template, "AuditAnchorsTable")
    assert set(changes["Action"]) == CHANGES and "Condition" not in changes
    assert set(put["Action"]) == {"dynamodb:PutItem", "dynamodb:PartiQLInsert"}
    assert put["Condition"] == {"ArnNotLike": {"aws:PrincipalArn": arn_of_roles("anchor")}}
    log = [action for action, resource in allowed(template, "AnchorFunction") if "'AuditLogTable'" in str(resource)]
    assert log == ["dynamodb:GetItem"]


def test_no_role_changes_audit_entries(template: Any) -> None:
    entries = {"Fn::GetAtt": ["AuditEntriesTable", "Arn"]}
    everyone, _ = table_policy(template, "AuditEntriesTable")
    assert (everyone["Effect"], everyone["Principal"], set(everyone["Action"])) == ("Deny", "*", CHANGES)
    assert "Condition" not in everyone
    for name in OWNERS["AuditEntriesTable"]:
        denied = [each for each in template.statements(name) if each["Effect"] == "Deny"]
        assert [(set(each["Action"]), each["Resource"]) for each in denied] == [(CHANGES, [entries])], name


def test_table_has_one_owner(template: Any) -> None:
    for table, owners in OWNERS.items():
        users = {name for name in template.functions if f"'{table}'" in str(list(allowed(template, name)))}
        assert users == owners, table


def test_only_ledger_reads_its_seed_and_no_role_changes_it(template: Any) -> None:
    for name in template.functions:
        secrets = [pair for pair in allowed(template, name) if "QubicSeed" in str(pair)]
        assert secrets == (
            [("secretsmanager:GetSecretValue", {"Fn::GetAtt": ["QubicSeed", "Id"]})]
            if name in HOLDERS_OF_THE_SEED
            else []
        ), name


def test_tables_are_encrypted_and_recoverable(template: Any) -> None:
    for name, table in template.of_type("AWS::DynamoDB::Table").items():
        assert table["SSESpecification"] == {"SSEEnabled": True}, name
        assert table["PointInTimeRecoverySpecification"] == {"PointInTimeRecoveryEnabled": True}, name
        assert table["BillingMode"] == "PAY_PER_REQUEST", name


def test_stub_is_refused_outside_the_local_stage(template: Any) -> None:
    rule = template.document["Rules"]["StubOnlyInLocalStage"]
    assert rule["RuleCondition"] == {"Fn::Equals": [{"Ref": "AuthMode"}, "stub"]}
    [assertion] = rule["Assertions"]
    assert assertion["Assert"] == {"Fn::Equals": [{"Ref": "Stage"}, "local"]}
    assert template.parameters["AuthMode"]["Default"] == "jwt"


@pytest.mark.parametrize("source", ["NewEvents", "ChangesOfThePolicy"])
def test_events_that_cannot_be_recorded_are_not_lost(template: Any, source: str) -> None:
    stream = template.functions["RecordEventsFunction"]["Events"][source]["Properties"]
    assert stream["FunctionResponseTypes"] == ["ReportBatchItemFailures"]
    assert stream["BisectBatchOnFunctionError"] is True
    assert stream["MaximumRetryAttempts"] > 0
    assert stream["DestinationConfig"]["OnFailure"]["Destination"] == {"Fn::GetAtt": ["UnrecordedEventsQueue", "Arn"]}


def test_every_parameter_is_used(template: Any) -> None:
    used = str({key: template.document[key] for key in ("Rules", "Conditions", "Globals", "Resources")})
    unused = [name for name in template.parameters if f"{{'Ref': '{name}'}}" not in used]
    assert unused == []


def test_sequencer_is_single_and_loses_nothing(template: Any) -> None:
    stream = template.functions["SequencerFunction"]["Events"]["NewEntries"]["Properties"]
    assert stream["Stream"] == {"Fn::GetAtt": ["AuditEntriesTable", "StreamArn"]}
    batch = ("BatchSize", "MaximumBatchingWindowInSeconds", "ParallelizationFactor")
    assert [stream[name] for name in batch] == [256, {"Ref": "SequencerWindowSeconds"}, 1]
    assert stream["FunctionResponseTypes"] == ["ReportBatchItemFailures"]
    assert stream["BisectBatchOnFunctionError"] is True
    lost = stream["DestinationConfig"]["OnFailure"]["Destination"]
    assert lost == {"Fn::GetAtt": ["UnsequencedEntriesQueue", "Arn"]}


def test_anchor_runs_on_growth_on_confirmation_and_by_itself(template: Any) -> None:
    events = template.functions["AnchorFunction"]["Events"]
    streams = {each["Properties"]["Stream"]["Fn::GetAtt"][0] for each in events.values() if each["Type"] == "DynamoDB"}
    assert streams == {"AuditLogTable"}
    window = {"Ref": "AnchorWindowSeconds"}
    assert events["LogHasGrown"]["Properties"]["MaximumBatchingWindowInSeconds"] == window
    assert [each for each in events.values() if each["Type"] == "Schedule"]
    assert listeners(template) == {"AnchorFunction": ["anchor_settled"], "ExecuteActionFunction": ["transfer_settled"]}


def listeners(template: Any) -> dict[str, list[str]]:
    """The functions that the rules of the ledger's bus call, and by which events."""
    rules = {name: bus_rules(function) for name, function in template.functions.items()}
    assert all(rule["Pattern"]["source"] == ["qaes.qubic"] for found in rules.values() for rule in found)
    return {
        name: [kind for rule in found for kind in rule["Pattern"]["detail-type"]]
        for name, found in rules.items()
        if found
    }


def bus_rules(function: dict[str, Any]) -> list[dict[str, Any]]:
    events = [
        event["Properties"] for event in function.get("Events", {}).values() if event["Type"] == "EventBridgeRule"
    ]
    return [event for event in events if event.get("EventBusName") == {"Ref": "LedgerBus"}]


def test_only_closers_of_submissions_publish_ends(template: Any) -> None:
    publish = ("events:PutEvents", {"Fn::GetAtt": ["LedgerBus", "Arn"]})
    found = {name: [each for each in allowed(template, name) if each[0] == publish[0]] for name in template.functions}
    assert {name: each for name, each in found.items() if each} == {key: [publish] for key in HOLDERS_OF_THE_SEED}
    assert {name for name in template.functions if "LEDGER_BUS" in environment(name)} == HOLDERS_OF_THE_SEED


def test_events_of_the_ledger_are_not_lost(template: Any) -> None:
    """Undeliverable events of EventBridge and failed events of functions go to a queue with an alarm."""
    queue = {"Fn::GetAtt": ["UndeliveredQueue", "Arn"]}
    for name in listeners(template):
        assert [rule["DeadLetterConfig"]["Arn"] for rule in bus_rules(template.functions[name])] == [queue]
    ended = template.functions["ExecuteActionFunction"]["EventInvokeConfig"]
    assert ended["DestinationConfig"]["OnFailure"]["Destination"] == queue
    assert ended["MaximumRetryAttempts"] > 0
    # The anchor's next run does the same work, so its failed events are not kept.
    assert template.functions["AnchorFunction"]["EventInvokeConfig"]["MaximumRetryAttempts"] == 0
    [statement] = template.resources["UndeliveredQueuePolicy"]["Properties"]["PolicyDocument"]["Statement"]
    assert statement["Condition"]["ArnEquals"]["aws:SourceArn"] == [
        {"Fn::GetAtt": ["ExecuteActionFunctionTransferSettled", "Arn"]},
        {"Fn::GetAtt": ["AnchorFunctionAnchorSettled", "Arn"]},
    ]
    assert template.resources["UndeliveredAlarm"]["Properties"]["Threshold"] == 1


def test_no_function_reads_the_ledgers_stream(template: Any) -> None:
    assert "StreamSpecification" not in template.resources["LedgerTable"]["Properties"]


def test_only_the_anchor_reads_the_key_of_the_logs_checkpoints(template: Any) -> None:
    read_key = ("secretsmanager:GetSecretValue", {"Fn::GetAtt": ["LogSigningKey", "Id"]})
    assert {name for name in template.functions if read_key in list(allowed(template, name))} == {"AnchorFunction"}


def test_function_that_sends_to_its_own_queue_may_recurse(template: Any) -> None:
    """Lambda stops a message that a function has sent to the queue that invokes it, after 16 times."""
    recurse = set()
    for name, function in template.functions.items():
        queues = [
            event["Properties"]["Queue"] for event in function.get("Events", {}).values() if event["Type"] == "SQS"
        ]
        sends_to = function.get("Environment", {}).get("Variables", {}).values()
        if any({"Ref": queue["Fn::GetAtt"][0]} in sends_to for queue in queues):
            recurse.add(name)
    assert recurse == {"TransactionWorkerFunction"}
    assert {name for name, each in template.functions.items() if each.get("RecursiveLoop") == "Allow"} == recurse
