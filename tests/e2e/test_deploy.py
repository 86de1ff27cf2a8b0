"""The documented deployment: `sam deploy` with samconfig.toml's dev section, guided and not, and `sam delete`."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import jwt
import pytest

from local.build import BUILD, architecture
from local.cloud import Cloud
from local.environment import ROOT
from tests.e2e.test_shell_blocks import SHELLS, blocks

STACK = "qaes-dev"
LISTINGS = {
    "dynamodb": ("list_tables", "TableNames", None),
    "secretsmanager": ("list_secrets", "SecretList", "ARN"),
    "logs": ("describe_log_groups", "logGroups", "logGroupName"),
    "s3": ("list_buckets", "Buckets", "Name"),
    "sqs": ("list_queues", "QueueUrls", None),
    "lambda": ("list_functions", "Functions", "FunctionName"),
    "iam": ("list_roles", "Roles", "RoleName"),
    "stepfunctions": ("list_state_machines", "stateMachines", "name"),
    "apigateway": ("get_rest_apis", "items", "id"),
    "cloudwatch": ("describe_alarms", "MetricAlarms", "AlarmName"),
}


def inventory(cloud: Cloud) -> dict[str, set[str]]:
    """Return the account's resources, by service."""
    found: dict[str, set[str]] = {}
    for service, (operation, member, key) in LISTINGS.items():
        client = cloud.client(service)
        pages = client.get_paginator(operation).paginate()
        found[service] = {item[key] if key else item for page in pages for item in page.get(member, [])}
    pools = cloud.client("cognito-idp").list_user_pools(MaxResults=60)["UserPools"]
    found["cognito-idp"] = {pool["Id"] for pool in pools}
    return found


class Deployment:
    """Runs `sam` as documented, with a copy of samconfig.toml that names this machine's Python and instruction set.

    The local AWS knows no X-Ray.
    """

    def __init__(self, cloud: Cloud, directory: Path) -> None:
        self.cloud, self.config = cloud, directory / "samconfig.toml"
        documented = (ROOT / "samconfig.toml").read_text()
        own = f"PythonRuntime=python3.{sys.version_info.minor}"
        own += f'", "Architecture={architecture()}", "ManageTraceSampling=false'
        given = 'PythonRuntime=python3.13", "Architecture=arm64'
        assert given in documented
        self.config.write_text(documented.replace(given, own))
        self.before = inventory(cloud)

    def sam(self, *arguments: str, answers: str = "") -> str:
        """Run sam with these answers on its standard input; return its output."""
        result = subprocess.run(
            [Path(sys.executable).with_name("sam"), *arguments, "--config-file", self.config, "--config-env", "dev"],
            input=answers,
            cwd=ROOT,
            env=self.cloud.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-5000:]
        return result.stdout

    def left(self) -> dict[str, set[str]]:
        """Return the resources that the account has now and did not have before."""
        now = inventory(self.cloud)
        return {service: new for service, names in now.items() if (new := names - self.before[service])}


@pytest.fixture(scope="module")
def deployment(local_cloud: Cloud, tmp_path_factory: pytest.TempPathFactory) -> Deployment:
    return Deployment(local_cloud, tmp_path_factory.mktemp("deployment"))


def test_guided_deploy_succeeds_with_the_default_answers(deployment: Deployment) -> None:
    printed = deployment.sam("deploy", "--guided", "--template-file", str(BUILD / "template.yaml"), answers="\n" * 200)
    assert f"Stack Name [{STACK}]" in printed
    assert "has no authentication" not in printed
    [stack] = deployment.cloud.client("cloudformation").describe_stacks(StackName=STACK)["Stacks"]
    assert stack["StackStatus"] == "CREATE_COMPLETE"
    assert {"ParameterKey": "Stage", "ParameterValue": "dev"} in stack["Parameters"]


def test_deploy_runs_without_questions(deployment: Deployment) -> None:
    printed = deployment.sam("deploy", "--template-file", str(BUILD / "template.yaml"))
    assert f"stack - {STACK}" in printed


@pytest.mark.parametrize("shell", SHELLS)
def test_readme_makes_a_user_and_a_token(deployment: Deployment, shell: str) -> None:
    """The commands of docs/deploy.md, pasted into an interactive shell."""
    for program in (shell, "aws"):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    [block] = [block for block in blocks("docs/deploy.md") if block.startswith("POOL=")]
    result = subprocess.run(
        SHELLS[shell],
        input=f"set -e\n{block}\nprintf 'pool %s token %s\\n' $POOL $TOKEN\nexit 0\n",
        env=deployment.cloud.environment | {"TERM": "dumb"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        start_new_session=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout
    printed = re.search(r"pool (\S+) token (eyJ\S+)$", result.stdout, re.MULTILINE)
    assert printed, result.stdout
    pool, token = printed.groups()
    deployment.cloud.client("cognito-idp").admin_delete_user(UserPoolId=pool, Username="alice")
    assert jwt.decode(token, options={"verify_signature": False})["cognito:groups"] == ["requester"]


def test_delete_of_a_dev_stack_leaves_no_data(deployment: Deployment) -> None:
    assert {"dynamodb", "secretsmanager", "cognito-idp", "logs"} <= set(deployment.left())
    deployment.sam("delete", "--no-prompts")
    left = deployment.left()
    [role] = left.pop("iam")  # the account's API Gateway setting still names it
    assert role.startswith(f"{STACK}-ApiGatewayLogsRole-")
    assert left == {}
