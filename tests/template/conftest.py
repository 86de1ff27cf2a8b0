"""The template as data (short forms of intrinsics written out), and the state machine as it is deployed by default."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DEFINITION = ROOT / "statemachine" / "task_execution.asl.json"


class _Loader(yaml.SafeLoader):
    """YAML with CloudFormation's tags: `!Ref x` is `{"Ref": "x"}`, `!Sub x` is `{"Fn::Sub": "x"}`."""


def _intrinsic(loader: _Loader, suffix: str, node: yaml.Node) -> dict[str, Any]:
    value: Any
    if isinstance(node, yaml.ScalarNode):
        value = loader.construct_scalar(node)
    elif isinstance(node, yaml.SequenceNode):
        value = loader.construct_sequence(node, deep=True)
    else:
        assert isinstance(node, yaml.MappingNode)
        value = loader.construct_mapping(node, deep=True)
    if suffix == "GetAtt" and isinstance(value, str):
        value = value.split(".", 1)
    return {suffix if suffix in {"Ref", "Condition"} else f"Fn::{suffix}": value}


_Loader.add_multi_constructor("!", _intrinsic)


class Template:
    """The parsed template, with queries for the rules."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document
        self.parameters: dict[str, Any] = document["Parameters"]
        self.resources: dict[str, Any] = document["Resources"]
        self.functions = self.of_type("AWS::Serverless::Function")
        self.state_machine: dict[str, Any] = self.resources["TaskExecutionStateMachine"]["Properties"]

    def of_type(self, kind: str) -> dict[str, dict[str, Any]]:
        """Logical id → properties of the resources of that type."""
        return {
            name: resource.get("Properties", {})
            for name, resource in self.resources.items()
            if resource["Type"] == kind
        }

    def statements(self, name: str) -> list[dict[str, Any]]:
        """The IAM statements of a function or of the state machine, actions and resources as lists.

        Those under a condition, too.
        """
        policies = self.resources[name]["Properties"].get("Policies", [])
        return [
            statement | {"Action": _list(statement["Action"]), "Resource": _list(statement["Resource"])}
            for policy in policies
            for statement in (each["Fn::If"][1] if "Fn::If" in each else each for each in policy["Statement"])
        ]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def load_template() -> Template:
    return Template(yaml.load((ROOT / "template.yaml").read_text(), Loader=_Loader))  # noqa: S506 (a SafeLoader)


def render(template: Template) -> dict[str, Any]:
    """The definition with every substitution filled in: numbers by the parameters' defaults, ARNs by examples."""

    def value(match: re.Match[str]) -> str:
        substitution = template.state_machine["DefinitionSubstitutions"][match[1]]
        if isinstance(substitution, str):
            return substitution
        if "Ref" in substitution:
            return str(template.parameters[substitution["Ref"]]["Default"])
        return f"arn:aws:lambda:eu-west-1:123456789012:function:{substitution['Fn::GetAtt'][0]}"

    rendered: dict[str, Any] = json.loads(re.sub(r"\$\{(\w+)\}", value, DEFINITION.read_text()))
    return rendered


def states_of(machine: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Name → state, those inside of Maps too."""
    found: dict[str, dict[str, Any]] = {}
    for name, state in machine["States"].items():
        assert name not in found, f"two states are called {name}"
        found[name] = state
        if "ItemProcessor" in state:
            found |= states_of(state["ItemProcessor"])
    return found


@pytest.fixture(scope="session")
def template() -> Template:
    return load_template()


@pytest.fixture(scope="session")
def definition(template: Template) -> dict[str, Any]:
    return render(template)


@pytest.fixture(scope="session")
def states(definition: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return states_of(definition)
