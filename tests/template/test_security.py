"""Security requirements for the template: issuers of tokens, CORS, limits, and errors."""

from __future__ import annotations

import json
import re
import tomllib
from http import HTTPStatus
from pathlib import Path
from typing import Any

import pytest
from samtranslator.parser.parser import Parser
from samtranslator.translator.translator import Translator

from qaes.adapters.auth import ROLES
from qaes.adapters.http import PROBLEM, PROBLEM_SCHEMA
from qubic.operations import _OPERATIONS
from tests.support.template import environment, resolve
from tests.template.conftest import load_template
from tests.template.test_template import HOLDERS_OF_THE_SEED, LEDGER, QUBIC, allowed

ISSUER = {"JwtIssuer": "https://issuer.example", "JwtAudience": "qaes", "JwksUrl": "https://issuer.example/keys"}
ORIGIN = "https://console.example"
EXPOSED = {"Idempotent-Replay", "Retry-After", "X-Correlation-Id"}
# Every kind that API Gateway knows, with the status that it has by default, or that we give it.
GATEWAY_RESPONSES = {
    "ACCESS_DENIED": 403,
    "API_CONFIGURATION_ERROR": 503,
    "AUTHORIZER_CONFIGURATION_ERROR": 503,
    "AUTHORIZER_FAILURE": 503,
    "BAD_REQUEST_BODY": 400,
    "BAD_REQUEST_PARAMETERS": 400,
    "DEFAULT_4XX": 400,
    "DEFAULT_5XX": 503,
    "EXPIRED_TOKEN": 403,
    "INTEGRATION_FAILURE": 504,
    "INTEGRATION_TIMEOUT": 504,
    "INVALID_API_KEY": 403,
    "INVALID_SIGNATURE": 403,
    "MISSING_AUTHENTICATION_TOKEN": 404,
    "QUOTA_EXCEEDED": 429,
    "REQUEST_TOO_LARGE": 413,
    "RESOURCE_NOT_FOUND": 404,
    "THROTTLED": 429,
    "UNAUTHORIZED": 401,
    "UNSUPPORTED_MEDIA_TYPE": 415,
    "WAF_FILTERED": 403,
}
CONTEXT = {
    "$context.path": "/v1/task/task_019",
    "$context.requestId": "c6af9ac6-7b61-11e6-9a41-93e8deadbeef",
}


def holds(condition: Any, **parameters: str) -> bool:
    """Whether a condition of the template, or the name of one, is true for these parameters over the defaults."""
    return bool(resolve({"Fn::If": [condition, True, False]}, parameters))


def refusals(template: Any, **parameters: str) -> set[str]:
    """The rules that refuse these parameters over the defaults."""
    return {
        name
        for name, rule in template.document["Rules"].items()
        if holds(rule["RuleCondition"], **parameters)
        and not all(holds(each["Assert"], **parameters) for each in rule["Assertions"])
    }


def of_condition(template: Any, condition: str) -> dict[str, Any]:
    """Resources that are there under that condition."""
    return {name: body for name, body in template.resources.items() if body.get("Condition") == condition}


# Who issues the tokens


@pytest.mark.parametrize(
    ("parameters", "own"),
    [({}, True), ({"Stage": "prod"}, True), (ISSUER, False), ({"AuthMode": "stub", "Stage": "local"}, False)],
    ids=["dev", "prod", "issuer given", "stub"],
)
def test_without_an_issuer_the_stack_has_a_user_pool(template: Any, parameters: dict[str, str], own: bool) -> None:
    assert refusals(template, **parameters) == set()
    assert holds("HasOwnUserPool", **parameters) == own
    kinds = sorted(body["Type"] for body in of_condition(template, "HasOwnUserPool").values())
    assert kinds == ["AWS::Cognito::UserPool", "AWS::Cognito::UserPoolClient", *["AWS::Cognito::UserPoolGroup"] * 4]
    assert all(kind in kinds for kind in (body["Type"] for body in template.resources.values()) if "Cognito" in kind)


def test_issuer_is_given_as_a_whole_or_not_at_all(template: Any) -> None:
    for name, value in ISSUER.items():
        rest = {other: each for other, each in ISSUER.items() if other != name}
        assert refusals(template, **rest) & {"JwtNamesItsIssuer", "OwnPoolNeedsNoKeys"}, name
        assert refusals(template, **{name: value}) & {"JwtNamesItsIssuer", "OwnPoolNeedsNoKeys"}, name


def test_authorizer_trusts_given_issuer_or_own_pool() -> None:
    given = environment("AuthorizerFunction", ISSUER)
    assert {name: given[name] for name in ("JWT_ISSUER", "JWT_AUDIENCE", "JWKS_URL")} == {
        "JWT_ISSUER": ISSUER["JwtIssuer"],
        "JWT_AUDIENCE": ISSUER["JwtAudience"],
        "JWKS_URL": ISSUER["JwksUrl"],
    }
    own = environment("AuthorizerFunction")
    # An attribute of a resource is its name here; ProviderName is cognito-idp.<region>.amazonaws.com/<pool id>.
    assert own["JWT_ISSUER"] == "https://UserPool.ProviderName"
    assert own["JWT_AUDIENCE"] == "UserPoolClient"
    assert own["JWKS_URL"] == f"{own['JWT_ISSUER']}/.well-known/jwks.json"


def test_pool_has_a_group_for_each_role_and_no_other(template: Any) -> None:
    groups = template.of_type("AWS::Cognito::UserPoolGroup").values()
    assert sorted(group["GroupName"] for group in groups) == sorted(ROLES)
    assert all(group["UserPoolId"] == {"Ref": "UserPool"} for group in groups)
    assert not [group for group in groups if "RoleArn" in group]


def test_only_administrator_creates_users_with_strong_passwords(template: Any) -> None:
    pool = template.resources["UserPool"]["Properties"]
    assert pool["AdminCreateUserConfig"]["AllowAdminCreateUserOnly"] is True
    assert [each["Name"] for each in pool["AccountRecoverySetting"]["RecoveryMechanisms"]] == ["admin_only"]
    password = pool["Policies"]["PasswordPolicy"]
    assert password["MinimumLength"] >= 12
    assert all(password[f"Require{kind}"] for kind in ("Lowercase", "Uppercase", "Numbers", "Symbols"))


def test_client_has_no_secret_and_hides_existing_users(template: Any) -> None:
    client = template.resources["UserPoolClient"]["Properties"]
    assert client["GenerateSecret"] is False
    assert client["PreventUserExistenceErrors"] == "ENABLED"
    assert set(client["ExplicitAuthFlows"]) == {
        "ALLOW_USER_SRP_AUTH",
        "ALLOW_USER_PASSWORD_AUTH",
        "ALLOW_REFRESH_TOKEN_AUTH",
    }
    assert (client["AccessTokenValidity"], client["TokenValidityUnits"]["AccessToken"]) == (60, "minutes")


def test_pool_and_its_client_are_outputs(template: Any) -> None:
    outputs = template.document["Outputs"]
    assert outputs["UserPoolId"]["Value"] == {"Ref": "UserPool"}
    assert outputs["UserPoolClientId"]["Value"] == {"Ref": "UserPoolClient"}
    for name in ("UserPoolId", "UserPoolClientId"):
        assert outputs[name]["Condition"] == "HasOwnUserPool"


# Rights to the ledger's operations


def invokes(template: Any) -> dict[str, set[str]]:
    """Function of the ledger → who may invoke it."""
    found: dict[str, set[str]] = {name: set() for name in LEDGER}
    for name in template.functions:
        for action, resource in allowed(template, name):
            if action == "lambda:InvokeFunction" and resource["Fn::GetAtt"][0] in LEDGER:
                found[resource["Fn::GetAtt"][0]].add(name)
    return found


def test_only_execute_action_may_have_money_moved(template: Any) -> None:
    found = invokes(template)
    assert found["LedgerTransferFunction"] == {"ExecuteActionFunction"}
    assert found["LedgerAnchorFunction"] == {"AnchorFunction"}
    assert found["LedgerRecordFunction"] == {"QubicApiFunction"}
    assert "AnchorFunction" not in found["LedgerFunction"]
    # Nothing else invokes them: no route, no event, no state.
    assert not [name for name in LEDGER if "Events" in template.functions[name]]
    assert not any(name in str(template.state_machine) for name in LEDGER)


@pytest.mark.parametrize(
    ("variable", "function"),
    [
        ("LEDGER_FUNCTION", "LedgerFunction"),
        ("LEDGER_TRANSFER_FUNCTION", "LedgerTransferFunction"),
        ("LEDGER_ANCHOR_FUNCTION", "LedgerAnchorFunction"),
        ("LEDGER_RECORD_FUNCTION", "LedgerRecordFunction"),
    ],
)
def test_ledger_function_name_known_to_its_callers_only(template: Any, variable: str, function: str) -> None:
    named = {name: environment(name).get(variable) for name in template.functions}
    assert {name: each for name, each in named.items() if each} == dict.fromkeys(invokes(template)[function], function)


def test_each_operation_of_the_ledger_is_one_functions(template: Any) -> None:
    operations = {name: environment(name)["LEDGER_OPERATIONS"].split(",") for name in LEDGER}
    assert sorted(each for found in operations.values() for each in found) == sorted(_OPERATIONS)
    assert set(operations["LedgerTransferFunction"]) == {"transfer", "record_instruction"}
    assert operations["LedgerAnchorFunction"] == ["submit_anchor"]
    assert operations["LedgerRecordFunction"] == ["write", "settle_policy"]
    assert [name for name in template.functions if "LEDGER_OPERATIONS" in environment(name)] == [
        name for name in template.functions if name in LEDGER
    ]
    # A function that may advance a wallet's queue may meet a transfer that waits there.
    assert {name for name in template.functions if "ALLOW_TRANSFERS" in environment(name)} == HOLDERS_OF_THE_SEED


@pytest.mark.parametrize(("network", "users"), [("mock", QUBIC), ("mainnet", set())])
def test_mock_table_has_no_users_on_other_networks(template: Any, network: str, users: set[str]) -> None:
    found = {
        name
        for name, function in template.functions.items()
        if "table/ChainTable" in str(resolve(function.get("Policies", []), {"QubicNetwork": network}))
    }
    assert found == users


def reached_from_the_internet(template: Any) -> set[str]:
    """Functions that answer a request of an API: those with a route, and the authorizers."""
    routed = {
        name
        for name, function in template.functions.items()
        if any(event["Type"] in {"Api", "HttpApi"} for event in function.get("Events", {}).values())
        or "FunctionUrlConfig" in function
    }
    authorizers = {
        name
        for name in template.functions
        for body in template.resources.values()
        if body["Type"].startswith(("AWS::Serverless::Api", "AWS::ApiGateway", "AWS::Lambda::Url"))
        and {"Fn::GetAtt": [name, "Arn"]} in _values(body)
    }
    return routed | authorizers


def _values(body: Any) -> list[Any]:
    inner = body.values() if isinstance(body, dict) else body if isinstance(body, list) else ()
    return [body, *(value for each in inner for value in _values(each))]


def test_no_function_on_the_internet_holds_the_seed(template: Any) -> None:
    reached = reached_from_the_internet(template)
    assert {"QubicApiFunction", "GatewayFunction", "AuthorizerFunction", "PublicLogFunction"} <= reached
    for name in template.functions:
        variables = environment(name)
        named = {variable for variable, value in variables.items() if "QubicSeed" in value}
        actions = {
            action
            for action, resource in allowed(template, name)
            if "secretsmanager" in action and (resource == "*" or "QubicSeed" in str(resource))
        }
        assert bool(actions) == bool(named) == (name in HOLDERS_OF_THE_SEED), name
        assert name not in reached or not actions | named, name


def test_no_function_on_the_internet_signs_through_the_table(template: Any) -> None:
    """The ledger signs the content of a submission's item again: this function may write only the policy's."""
    [statement] = [each for each in template.statements("QubicApiFunction") if each.get("Sid") == "ChangeThePolicy"]
    assert statement["Condition"] == {"ForAllValues:StringLike": {"dynamodb:LeadingKeys": ["POLICY#*"]}}
    table = {"Fn::GetAtt": ["LedgerTable", "Arn"]}
    for name in reached_from_the_internet(template):
        for each in template.statements(name):
            changes = {"dynamodb:PutItem", "dynamodb:UpdateItem", "dynamodb:DeleteItem"} & set(each["Action"])
            assert each == statement or not changes or table not in each["Resource"], name


def test_threat_model_lists_every_function_with_the_seed() -> None:
    text = (Path(__file__).parents[2] / "docs" / "threat-model.md").read_text()
    [functions] = re.findall(r"^\*\*Functions that hold the seed\*\*[^\n]*\n\n((?:[- ] .*\n)+)", text, re.MULTILINE)
    assert set(re.findall(r"`(\w+Function)`", functions)) == HOLDERS_OF_THE_SEED


def test_qubic_service_has_no_right_that_it_does_not_use(template: Any) -> None:
    table = {"Fn::GetAtt": ["LedgerTable", "Arn"]}
    for name in QUBIC:
        rights = {action.removeprefix("dynamodb:") for action, resource in allowed(template, name) if resource == table}
        assert rights == {"GetItem", "PutItem", "UpdateItem", "Query"}, name


# Limits


def test_firewall_has_aws_rules_and_limit_per_address(template: Any) -> None:
    rules = {rule["Name"]: rule for rule in template.resources["WebAcl"]["Properties"]["Rules"]}
    managed = {
        rule["Statement"]["ManagedRuleGroupStatement"]["Name"]: rule
        for rule in rules.values()
        if "ManagedRuleGroupStatement" in rule["Statement"]
    }
    assert set(managed) == {
        "AWSManagedRulesAmazonIpReputationList",
        "AWSManagedRulesKnownBadInputsRuleSet",
        "AWSManagedRulesCommonRuleSet",
    }
    assert all(rule["OverrideAction"] == {"None": {}} for rule in managed.values())
    assert rules["OneAddress"]["Action"] == {"Block": {}}
    assert rules["OneAddress"]["Statement"]["RateBasedStatement"]["Limit"] == {"Ref": "WafRateLimit"}
    assert len({rule["Priority"] for rule in rules.values()}) == len(rules)


def test_firewall_protects_stage_when_enabled(template: Any) -> None:
    assert set(of_condition(template, "HasWaf")) == {"WebAcl", "WebAclAssociation", "WafLogging", "WafLogs"}
    association = template.resources["WebAclAssociation"]["Properties"]
    assert association["WebACLArn"] == {"Fn::GetAtt": ["WebAcl", "Arn"]}
    assert association["ResourceArn"]["Fn::Sub"].endswith("/restapis/${Api}/stages/${Api.Stage}")
    assert set(of_condition(template, "PublicLogHasWaf")) == {"PublicLogWebAclAssociation"}
    public = template.resources["PublicLogWebAclAssociation"]["Properties"]["ResourceArn"]["Fn::Sub"]
    assert public.endswith("/restapis/${PublicLogApi}/stages/${PublicLogApi.Stage}")
    assert holds("PublicLogHasWaf", EnableWaf="true", PublicLog="true")
    assert not holds("PublicLogHasWaf", EnableWaf="true")
    assert not holds("PublicLogHasWaf", PublicLog="true")
    assert not holds("HasWaf")
    assert holds("HasWaf", EnableWaf="true")
    config = tomllib.loads((Path(__file__).parents[2] / "samconfig.toml").read_text())
    assert "EnableWaf=true" in config["prod"]["deploy"]["parameters"]["parameter_overrides"]


def test_firewalls_log_has_no_tokens(template: Any) -> None:
    logging = template.resources["WafLogging"]["Properties"]
    assert logging["RedactedFields"] == [{"SingleHeader": {"Name": "authorization"}}]
    # WAF demands the prefix.
    assert template.resources["WafLogs"]["Properties"]["LogGroupName"]["Fn::Sub"].startswith("aws-waf-logs-")


# CORS


def test_no_page_reads_the_api_unless_an_origin_is_named(template: Any) -> None:
    cors = template.resources["Api"]["Properties"]["Cors"]
    assert resolve(cors["AllowOrigin"]) == "AWS::NoValue"
    assert resolve(cors["AllowOrigin"], {"CorsAllowOrigin": ORIGIN}) == f"'{ORIGIN}'"
    assert set(cors["AllowHeaders"].strip("'").split(",")) == {"Authorization", "Content-Type", "Idempotency-Key"}
    assert "AllowCredentials" not in cors
    assert template.resources["Api"]["Properties"]["Auth"]["AddDefaultAuthorizerToCorsPreflight"] is False
    for name in template.functions:
        assert environment(name, {"CorsAllowOrigin": ORIGIN})["CORS_ALLOW_ORIGIN"] == ORIGIN
        assert environment(name)["CORS_ALLOW_ORIGIN"] == ""


def deployed(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the resources of CloudFormation that SAM creates from the template."""
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    document = load_template().document
    document["Globals"]["Function"]["CodeUri"] = "s3://bucket/key"
    document["Resources"]["CoreLayer"]["Properties"]["ContentUri"] = "s3://bucket/key"
    document["Resources"]["TaskExecutionStateMachine"]["Properties"]["DefinitionUri"] = "s3://bucket/key"
    found: dict[str, Any] = Translator({}, Parser()).translate(document, {})["Resources"]
    return found


def test_preflight_needs_no_token_and_lists_methods(monkeypatch: pytest.MonkeyPatch) -> None:
    resources = deployed(monkeypatch)
    paths = resources["Api"]["Properties"]["Body"]["paths"]
    for path, methods in paths.items():
        preflight = methods["options"]
        assert not preflight.get("security"), path
        answer = preflight["x-amazon-apigateway-integration"]["responses"]["default"]["responseParameters"]
        named = answer["method.response.header.Access-Control-Allow-Methods"].strip("'").split(",")
        assert sorted(named) == sorted(method.upper() for method in methods), path
        assert resolve(answer["method.response.header.Access-Control-Allow-Origin"]) == "AWS::NoValue"
    assert len(paths) > 15


def test_api_has_no_second_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """By itself, SAM makes a stage named Stage too, through which the same functions are reached without them."""
    resources = deployed(monkeypatch).values()
    stages = [body["Properties"] for body in resources if body["Type"] == "AWS::ApiGateway::Stage"]
    found = {stage["RestApiId"]["Ref"]: stage["StageName"] for stage in stages}
    assert (found, len(stages)) == ({"Api": "v1", "PublicLogApi": "v1"}, 2)
    deployments = [body["Properties"] for body in resources if body["Type"] == "AWS::ApiGateway::Deployment"]
    assert len(deployments) == 2
    assert not [each for each in deployments if "StageName" in each]


def test_new_origin_causes_a_deployment(template: Any) -> None:
    """Or a new value of the parameter would never reach the stage: SAM compares the template, not its parameters."""
    for name in ("Api", "PublicLogApi"):
        assert template.resources[name]["Properties"]["AlwaysDeploy"] is True


def test_publicly_anchored_log_needs_its_own_name(template: Any) -> None:
    assert refusals(template, QubicNetwork="mainnet") == {"MainnetNamesItsLog"}
    assert refusals(template, QubicNetwork="mainnet", LogId="acme-payments") == set()
    assert refusals(template) == set()


def test_every_origin_is_never_allowed_in_prod(template: Any) -> None:
    assert refusals(template, Stage="prod", CorsAllowOrigin="*", **ISSUER) == {"NotEveryOriginInProd"}
    assert refusals(template, Stage="prod", CorsAllowOrigin=ORIGIN, **ISSUER) == set()
    assert refusals(template, Stage="dev", CorsAllowOrigin="*", **ISSUER) == set()


@pytest.mark.parametrize(
    ("origin", "taken"),
    [
        ("", True),
        ("*", True),
        (ORIGIN, True),
        ("https://console.example:8443", True),
        ("http://localhost:3000", True),
        ("http://console.example", False),
        ("https://console.example/", False),
        ("https://*.example", False),
        ("https://a.example,https://b.example", False),
        ("https://a.example' x '", False),
        ("null", False),
    ],
)
def test_origin_has_the_form_of_one(template: Any, origin: str, taken: bool) -> None:
    pattern = template.parameters["CorsAllowOrigin"]["AllowedPattern"]
    assert bool(re.search(pattern, origin)) == taken


# The gateway's own responses


def headers_of(response: dict[str, Any], **parameters: str) -> dict[str, str]:
    """The headers of a gateway response, without the quotes of their literals."""
    given = resolve(response["ResponseParameters"]["Headers"], parameters)
    found = {name: value for name, value in given.items() if value != "AWS::NoValue"}
    assert all(re.fullmatch("'[^']*'", value) for value in found.values()), found
    return {name: value[1:-1] for name, value in found.items()}


@pytest.fixture(scope="module")
def responses(template: Any) -> dict[str, Any]:
    found: dict[str, Any] = template.resources["Api"]["Properties"]["GatewayResponses"]
    assert template.resources["PublicLogApi"]["Properties"]["GatewayResponses"] == found
    return found


def test_every_kind_of_gateway_response_is_defined(responses: dict[str, Any]) -> None:
    assert {name: int(response["StatusCode"]) for name, response in responses.items()} == GATEWAY_RESPONSES


@pytest.mark.parametrize("kind", GATEWAY_RESPONSES)
def test_gateway_response_is_a_problem_with_every_member(responses: dict[str, Any], kind: str) -> None:
    [(content_type, body)] = responses[kind]["ResponseTemplates"].items()
    assert content_type == "application/json"  # the only template, which API Gateway always uses
    assert set(re.findall(r"\$[\w.]+", body)) == set(CONTEXT)
    problem = json.loads(re.sub(r"\$[\w.]+", lambda variable: CONTEXT[variable[0]], body))
    assert set(problem) == set(PROBLEM_SCHEMA["required"])
    status = GATEWAY_RESPONSES[kind]
    # 3.11 and 3.12 have 413's older name.
    title = "Content Too Large" if status == 413 else HTTPStatus(status).phrase
    assert (problem["type"], problem["title"], problem["status"]) == ("about:blank", title, status)
    assert problem["instance"] == CONTEXT["$context.path"]
    assert problem["correlation_id"] == CONTEXT["$context.requestId"]
    assert problem["detail"].endswith((".", "try again."))


@pytest.mark.parametrize("kind", GATEWAY_RESPONSES)
def test_gateway_response_has_the_headers_of_the_services(responses: dict[str, Any], kind: str) -> None:
    plain = headers_of(responses[kind])
    assert plain["Content-Type"] == PROBLEM
    assert (plain["X-Content-Type-Options"], plain["Cache-Control"]) == ("nosniff", "no-store")
    assert plain["Strict-Transport-Security"].startswith("max-age=31536000")
    assert not [name for name in plain if name.startswith("Access-Control-") or name == "Vary"]
    assert ("WWW-Authenticate" in plain) == (kind == "UNAUTHORIZED")
    assert ("Retry-After" in plain) == (kind == "THROTTLED" or GATEWAY_RESPONSES[kind] >= 500)
    cors = headers_of(responses[kind], CorsAllowOrigin=ORIGIN)
    assert (cors["Access-Control-Allow-Origin"], cors["Vary"]) == (ORIGIN, "Origin")
    assert set(cors["Access-Control-Expose-Headers"].split(",")) == EXPOSED
