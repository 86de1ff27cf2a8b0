"""template.yaml for the tests: parsed, with references resolved to moto's resources."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

from local.template import parse

ROOT = Path(__file__).resolve().parents[2]
ACCOUNT, REGION = "123456789012", "us-east-1"
PSEUDO = {
    "AWS::AccountId": ACCOUNT,
    "AWS::Region": REGION,
    "AWS::Partition": "aws",
    "AWS::StackName": "qaes",
    "AWS::URLSuffix": "amazonaws.com",
}


@cache
def template() -> dict[str, Any]:
    return parse(ROOT / "template.yaml")


def resources(type_: str) -> dict[str, dict[str, Any]]:
    return {name: body for name, body in template()["Resources"].items() if body["Type"] == type_}


def arn(name: str) -> str:
    """The ARN that `!GetAtt name.Arn` stands for."""
    kind = template()["Resources"][name]["Type"]
    if kind == "AWS::Serverless::Function":
        return f"arn:aws:lambda:{REGION}:{ACCOUNT}:function:{name}"
    if kind == "AWS::Serverless::StateMachine":
        return f"arn:aws:states:{REGION}:{ACCOUNT}:stateMachine:{name}"
    if kind == "AWS::DynamoDB::Table":
        return f"arn:aws:dynamodb:{REGION}:{ACCOUNT}:table/{name}"
    return f"arn:aws:{kind.split('::')[1].lower()}:{REGION}:{ACCOUNT}:{name}"


def resolve(value: Any, parameters: dict[str, str] | None = None) -> Any:  # noqa: C901 one case for each function
    """`value` with Ref, GetAtt, Sub, If, Join and conditions replaced, for the given parameters over their defaults."""
    body, given = template(), parameters or {}

    def ref(name: str) -> Any:
        if name in given:
            return given[name]
        if name in body["Parameters"]:
            return str(body["Parameters"][name].get("Default", ""))
        if name in PSEUDO:
            return PSEUDO[name]
        kind = body["Resources"].get(name, {}).get("Type")
        if kind == "AWS::Serverless::StateMachine":
            return arn(name)
        if kind == "AWS::SQS::Queue":
            return f"https://sqs.{REGION}.amazonaws.com/{ACCOUNT}/{name}"
        return name

    def get(target: str) -> Any:
        name, _, attribute = target.partition(".")
        if attribute == "Id" and body["Resources"][name]["Type"] == "AWS::SecretsManager::Secret":
            return name  # an ARN on AWS; moto takes the name as well
        return arn(name) if attribute == "Arn" else f"{name}.{attribute}" if attribute else ref(name)

    def condition(test: Any) -> bool:
        if isinstance(test, str):
            return condition(body["Conditions"][test])
        [(kind, operands)] = test.items()
        if kind == "Condition":
            return condition(operands)
        if kind == "Fn::Equals":
            return bool(resolve(operands[0], given) == resolve(operands[1], given))
        if kind == "Fn::Not":
            return not condition(operands[0])
        results = [condition(each) for each in operands]
        return all(results) if kind == "Fn::And" else any(results)

    if isinstance(value, list):
        return [resolve(each, given) for each in value]
    if not isinstance(value, dict):
        return value
    if len(value) == 1:
        [(kind, operand)] = value.items()
        if kind == "Ref":
            return ref(operand)
        if kind == "Fn::GetAtt":
            return get(".".join(operand))
        if kind == "Fn::Sub":
            text, names = operand if isinstance(operand, list) else (operand, {})
            names = {name: resolve(each, given) for name, each in names.items()}
            return re.sub(r"\$\{([^}!]+)\}", lambda m: str(names.get(m[1]) or get(m[1])), text)
        if kind == "Fn::If":
            return resolve(operand[1] if condition(operand[0]) else operand[2], given)
        if kind == "Fn::Join":
            return operand[0].join(str(resolve(each, given)) for each in operand[1])
    return {name: resolve(each, given) for name, each in value.items()}


def functions() -> dict[str, str]:
    """Logical id → handler (`module.attribute`) of each function."""
    return {name: body["Properties"]["Handler"] for name, body in resources("AWS::Serverless::Function").items()}


def timeout(function: str) -> int:
    """Return the timeout of a function in seconds."""
    own = template()["Resources"][function]["Properties"]
    return int(own.get("Timeout", template()["Globals"]["Function"]["Timeout"]))


def environment(function: str, parameters: dict[str, str] | None = None) -> dict[str, str]:
    """The environment variables of a function, the template's global ones included."""
    globals_ = template().get("Globals", {}).get("Function", {}).get("Environment", {}).get("Variables", {})
    own = template()["Resources"][function]["Properties"].get("Environment", {}).get("Variables", {})
    variables = {name: str(resolve(each, parameters)) for name, each in (globals_ | own).items()}
    return {name: value for name, value in variables.items() if value != "AWS::NoValue"}


def definition(**parameters: str) -> dict[str, Any]:
    """The state machine's definition as deployed: the file, its substitutions filled in."""
    [machine] = resources("AWS::Serverless::StateMachine").values()
    text = (ROOT / machine["Properties"]["DefinitionUri"]).read_text()
    values = resolve(machine["Properties"]["DefinitionSubstitutions"], parameters)
    rendered: dict[str, Any] = json.loads(re.sub(r"\$\{(\w+)\}", lambda m: str(values[m[1]]), text))
    return rendered


def stream_listeners(table: str) -> dict[str, list[dict[str, Any]]]:
    """Which functions listen to a table's stream, each with the patterns of its filter (none: everything)."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, body in resources("AWS::Serverless::Function").items():
        for event in body["Properties"].get("Events", {}).values():
            if event["Type"] == "DynamoDB" and event["Properties"]["Stream"] == {"Fn::GetAtt": [table, "StreamArn"]}:
                filters = event["Properties"].get("FilterCriteria", {}).get("Filters", [])
                found[name] = [json.loads(each["Pattern"]) for each in filters] or [{}]
    return found


def rule_listeners(bus: str) -> dict[str, list[dict[str, Any]]]:
    """Which functions the rules of an event bus call, each with the patterns of its rules."""
    found: dict[str, list[dict[str, Any]]] = {}
    for name, body in resources("AWS::Serverless::Function").items():
        for event in body["Properties"].get("Events", {}).values():
            if event["Type"] == "EventBridgeRule" and event["Properties"].get("EventBusName") == {"Ref": bus}:
                found.setdefault(name, []).append(event["Properties"]["Pattern"])
    return found


def matches(pattern: dict[str, Any], record: dict[str, Any]) -> bool:
    """Whether the pattern of a filter or a rule lets an event through: values in lists, and prefixes."""
    for name, wanted in pattern.items():
        value = record.get(name)
        if isinstance(wanted, dict):
            if not isinstance(value, dict) or not matches(wanted, value):
                return False
        elif not any(
            str(value).startswith(each["prefix"]) if isinstance(each, dict) else value == each for each in wanted
        ):
            return False
    return True
