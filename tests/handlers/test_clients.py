"""A function makes its AWS clients while it is loaded: those that its permissions are for, and no others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import template
from tests.template.conftest import load_template

pytestmark = pytest.mark.xdist_group("clients")  # one process loads the functions for all
ROOT = Path(__file__).parents[2]
TEMPLATE = load_template()
SERVICES = {"dynamodb": "dynamodb", "lambda": "lambda", "states": "stepfunctions", "secretsmanager": "secretsmanager"}
SERVICES |= {"events": "events", "sqs": "sqs"}
LOADER = """
import importlib, json, os, sys
import boto3
import aws_lambda_powertools.logging, fastapi, mangum, pydantic
made = []
boto3.client = lambda name, **_: made.append(name)
for name, (handler, environment) in json.load(sys.stdin).items():
    sys.stdout.flush()
    if os.fork() == 0:
        os.environ.update(environment)
        importlib.import_module(handler.rpartition(".")[0])
        print(json.dumps([name, sorted(made)]), flush=True)
        os._exit(0)
    os.wait()
"""
"""Each function's module is loaded in a separate process, with the function's environment."""


def loaded(**more: str) -> dict[str, set[str]]:
    """Return the clients that each function makes by being loaded."""
    functions = {
        name: (handler, template.environment(name, {"Stage": "local"}) | more)
        for name, handler in template.functions().items()
    }
    path = os.pathsep.join(str(ROOT / each) for each in ("functions", "layers/core"))
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", LOADER],
        input=json.dumps(functions),
        env={"PATH": os.environ["PATH"], "PYTHONPATH": path, "AWS_DEFAULT_REGION": template.REGION},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return {name: set(made) for name, made in map(json.loads, done.stdout.splitlines())}


def permitted(function: str) -> set[str]:
    """Return the clients that a function's policy is for."""
    actions = [
        action
        for statement in TEMPLATE.statements(function)
        if statement["Effect"] == "Allow"
        for action in statement["Action"]
    ]
    return {SERVICES[action.partition(":")[0]] for action in actions}


@pytest.fixture(scope="module")
def in_lambda() -> dict[str, set[str]]:
    return loaded(AWS_LAMBDA_FUNCTION_NAME="function")


@pytest.mark.parametrize("function", template.functions())
def test_function_makes_its_clients_when_loaded(in_lambda: dict[str, Any], function: str) -> None:
    assert in_lambda[function] == permitted(function)


def test_no_client_is_made_when_loaded_outside_of_lambda() -> None:
    assert {name: made for name, made in loaded().items() if made} == {}
