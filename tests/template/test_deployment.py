"""Parameters and names of a deployment, and the remains after the deletion of a stack."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import source_from_cache
from pathlib import Path
from typing import Any

import pytest
from samcli.commands.deploy.auth_utils import auth_per_resource
from samcli.lib.providers.sam_stack_provider import SamLocalStackProvider

from tests.support.template import resolve

ROOT = Path(__file__).resolve().parents[2]
CONFIGURATION = tomllib.loads((ROOT / "samconfig.toml").read_text())

STATEFUL = {"AWS::DynamoDB::Table", "AWS::SecretsManager::Secret", "AWS::Cognito::UserPool"}


@pytest.mark.parametrize("stage", ["local", "dev", "staging", "prod"])
def test_stack_keeps_its_data_only_in_prod(template: Any, stage: str) -> None:
    """Only resources with data and the account's role outlive a prod stack; no resource outlives other stacks."""
    kept = {
        name: {resolve(body[policy], {"Stage": stage}) for policy in ("DeletionPolicy", "UpdateReplacePolicy")}
        for name, body in template.resources.items()
        if "DeletionPolicy" in body and name != "ApiGatewayLogsRole"
    }
    stateful = {name for name, body in template.resources.items() if body["Type"] in STATEFUL}
    assert stateful <= set(kept)
    keeping = {name for name, policies in kept.items() if policies == {"RetainExceptOnCreate", "Retain"}}
    deleting = {name for name, policies in kept.items() if policies == {"Delete"}}
    assert keeping | deleting == set(kept)
    assert keeping == (stateful if stage == "prod" else set())


def test_seed_of_a_mainnet_identity_is_kept_in_every_stage(template: Any) -> None:
    """The identity's balance is real money there."""
    for stage in ("dev", "staging", "prod"):
        parameters = {"Stage": stage, "QubicNetwork": "mainnet"}
        policies = [template.resources["QubicSeed"][name] for name in ("DeletionPolicy", "UpdateReplacePolicy")]
        assert resolve(policies, parameters) == ["RetainExceptOnCreate", "Retain"]


@pytest.mark.parametrize("stage", ["dev", "staging", "prod"])
def test_only_prod_protects_its_data_from_deletion(template: Any, stage: str) -> None:
    """A protected table or pool that the stack wants to delete makes the deletion of the stack fail."""
    for name, body in template.resources.items():
        for protection in ("DeletionProtection", "DeletionProtectionEnabled"):
            if protection in body.get("Properties", {}):
                protected = resolve(body["Properties"][protection], {"Stage": stage}) in {True, "ACTIVE"}
                retained = resolve(body["DeletionPolicy"], {"Stage": stage}) != "Delete"
                assert protected == retained == (stage == "prod"), name


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in SAM CLI itself
def test_guided_deploy_finds_no_function_without_authentication() -> None:
    """SAM CLI asks for each such function, and the default answer ends the deployment."""
    stacks, _ = SamLocalStackProvider.get_stacks(str(ROOT / "template.yaml"))
    checked = auth_per_resource(stacks)
    assert checked
    assert [name for name, authenticated in checked if not authenticated] == []


def overrides(environment: str, command: str) -> dict[str, str]:
    """Return the parameters that a section of samconfig.toml sets."""
    listed = CONFIGURATION[environment][command]["parameters"]["parameter_overrides"]
    return dict(each.split("=", 1) for each in listed)


@pytest.mark.parametrize("environment", ["dev", "staging", "prod"])
def test_samconfig_names_stack_and_stage(template: Any, environment: str) -> None:
    section = CONFIGURATION[environment]
    deploy, build = overrides(environment, "deploy"), overrides(environment, "build")
    assert section["global"]["parameters"]["stack_name"] == f"qaes-{environment}"
    assert section["deploy"]["parameters"]["s3_prefix"] == f"qaes-{environment}"
    assert deploy["Stage"] == environment
    assert build.items() <= deploy.items()
    for name, value in deploy.items():
        assert name in template.parameters
        assert value in map(str, template.parameters[name].get("AllowedValues", [value]))


@pytest.mark.parametrize("environment", ["dev", "staging"])
def test_samconfig_deploys_without_a_question(environment: str) -> None:
    assert CONFIGURATION[environment]["deploy"]["parameters"]["confirm_changeset"] is False


def test_samconfig_default_is_dev() -> None:
    default = dict(CONFIGURATION["default"])
    del default["validate"]
    assert default == CONFIGURATION["dev"]


def test_every_parameter_has_a_group_and_a_description(template: Any) -> None:
    groups = template.document["Metadata"]["AWS::CloudFormation::Interface"]["ParameterGroups"]
    grouped = [name for group in groups for name in group["Parameters"]]
    assert sorted(grouped) == sorted(template.parameters)
    for name, parameter in template.parameters.items():
        assert re.fullmatch(r"[A-Z].*[.]", parameter["Description"]), name


def test_layer_has_a_target_for_each_runtime_and_instruction_set(template: Any) -> None:
    layer = template.resources["CoreLayer"]["Metadata"]
    for parameter, option in (("PythonRuntime", "ContextPath"), ("Architecture", "WorkingDirectory")):
        for value in template.parameters[parameter]["AllowedValues"]:
            folder = ROOT / resolve(layer[option], {parameter: value})
            assert folder.name == value
            assert [each.name for each in folder.iterdir()] in (["Makefile"], ["platforms.txt"])


def test_layer_build_adds_unchecked_byte_code(tmp_path: Path) -> None:
    """A file in a layer has not the time of its source, so byte code that compares them would be compiled anew."""
    runtime = f"python3.{sys.version_info.minor}"
    shutil.copytree(ROOT / "layers/core", tmp_path / "core", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "bin").mkdir()
    # This test replaces pip: the layer gets one package that pip would compile to byte code.
    python = tmp_path / "bin" / runtime
    python.write_text(
        f"""#!/bin/sh
[ "$2" = pip ] || exec {sys.executable} "$@"
for option; do case "$option" in --target=*) target="${{option#--target=}}";; esac; done
mkdir -p "$target/package/__pycache__" && cd "$target/package" && echo "$@" > ../pip.txt
echo "A = 1" > __init__.py && touch __pycache__/__init__.cpython-31.pyc
"""
    )
    python.chmod(0o700)
    targets = tmp_path / "core/targets"
    subprocess.run(
        ["make", "--makefile", str(targets / runtime / "Makefile"), "build-CoreLayer"],
        cwd=targets / "arm64",
        env={"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "ARTIFACTS_DIR": str(tmp_path / "layer")},
        check=True,
        capture_output=True,
    )
    built = tmp_path / "layer/python"
    assert (
        f"--python-version=3.{sys.version_info.minor} --platform=manylinux_2_34_aarch64"
        in (built / "pip.txt").read_text()
    )
    codes = list(built.rglob("*.pyc"))
    assert {Path(source_from_cache(str(each))) for each in codes} == set(built.rglob("*.py"))
    unchecked = 1
    assert {int.from_bytes(each.read_bytes()[4:8], "little") for each in codes} == {unchecked}
