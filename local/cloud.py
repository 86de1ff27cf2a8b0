"""Start a local AWS, build the template, deploy it there, and start the proxy.

This module cannot reach an AWS account: programs start with placeholder credentials, empty configuration files and an
endpoint on the loopback interface, without the caller's own `AWS_…` variables. All files are written to `.local` in
the repository.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, Self, cast

from local.build import FOLDER, PYTHONS, TEMPLATE, architecture, build, runtime
from local.environment import (
    REGION,
    ROOT,
    WORK,
    LocalCloudError,
    Ports,
    Progress,
    end_group,
    isolated_environment,
    locked,
    tail,
    write_private,
)
from local.gateway import complete
from local.readiness import wait_until_ready
from local.relay import DESKTOP_HOST, Relay, bridge
from local.runs import remove_ended_runs, running
from local.tokens import AUDIENCE, PEOPLE, SECOND_PEOPLE, Issuer

STACK = "qaes-local"
AUTH_MODES = ("jwt", "stub")
# A Lambda environment is a process of about 50 MB here: this limits the memory of a burst of tasks.
LAMBDA_CONCURRENCY = 32
TICK_MILLISECONDS = 100  # of the mock network, much shorter than real ticks
# A caller here is a fast test. The template's tests check the throttling of the stage.
THROTTLING = {
    f"{routes}Throttling{limit}": "1000" for routes in ("Api", "Change", "Open") for limit in ("Rate", "Burst")
}
WINDOWS = {"SequencerWindowSeconds": "1", "AnchorWindowSeconds": "1"}
"""A person waits for the proof here, and writes are free."""
START_TIMEOUT_SECONDS = 60
COMMAND_TIMEOUT_SECONDS = 600
USER_FILES = ("tokens.env", "aws.env", "sam.toml", "sam-env.json", "issuer.json")
"""Files in `.local` for other tools, as long as the local cloud runs."""
AuthMode = Literal["jwt", "stub"]


@dataclass
class Cloud:
    """The local cloud, as a context manager: it runs inside the `with` block.

    Parameters
    ----------
    name : str
        Name of its directory in `.local`.
    ports : Ports
        Ports to listen on.
    auth_mode : str
        `jwt`, or `stub` to accept requests without a token.
    parameters : Mapping
        Further template parameters, such as `{"ApprovalTimeoutSeconds": "5"}`.
    progress : Callable
        Receives a message for each step.
    """

    name: str
    ports: Ports = field(default_factory=Ports.free)
    auth_mode: AuthMode = "jwt"
    parameters: Mapping[str, str] = field(default_factory=dict)
    progress: Callable[[str], None] = field(default_factory=Progress)
    resources: Mapping[str, str] = field(default_factory=dict, init=False)
    """Physical names of the stack's resources, by their logical ids in the template."""
    outputs: Mapping[str, str] = field(default_factory=dict, init=False)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.auth_mode not in AUTH_MODES:
            raise LocalCloudError(f"AUTH_MODE must be jwt or stub, not {self.auth_mode!r}.")
        if sys.version_info.minor not in PYTHONS:
            found = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise LocalCloudError(
                f"Lambda supports Python 3.{PYTHONS[0]} to 3.{PYTHONS[-1]}, but this is {found}: use another Python."
            )
        self.issuer = Issuer.create(self.url)

    @property
    def url(self) -> str:
        """Base address of the API."""
        return f"http://localhost:{self.ports.http}"

    @property
    def endpoint(self) -> str:
        """Address of the local AWS."""
        return f"http://127.0.0.1:{self.ports.aws}"

    @property
    def directory(self) -> Path:
        """Directory of its files."""
        return WORK / self.name

    @property
    def environment(self) -> dict[str, str]:
        """Environment for programs that call it."""
        return isolated_environment(self.endpoint, self.directory)

    def token(self, role: str, subject: str | None = None) -> str:
        """Return a token for a role; see `Issuer.token`."""
        return self.issuer.token(role, subject=subject)

    def client(self, service: str) -> Any:
        """Return a boto3 client for the local AWS, as its root user."""
        import boto3  # slow to import, and `make status` does not need it

        return boto3.client(
            service,  # type: ignore[call-overload]
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id="test",
            aws_secret_access_key="test",  # noqa: S106 - the local AWS's root user
        )

    def __enter__(self) -> Self:
        self.ports.check()
        remove_ended_runs()
        try:
            self._stack.enter_context(running(self.directory))
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        from local.proxy import Proxy

        self.progress("starting the local AWS")
        self._stack.callback(self._remove_temporary_files)
        aws = self._stack.enter_context(self._aws())
        stub = self.auth_mode == "stub"
        origin = self.parameters.get("CorsAllowOrigin", "")
        proxy = self._stack.enter_context(
            Proxy(self.ports.http, self.ports.aws, self.issuer.key_set(), stub=stub, cors_origin=origin)
        )
        with locked(WORK / "build.lock"):  # another local cloud may share the build
            build(self._sam, self.progress)
            self._wait_for_aws(aws)
            self._deploy()
        proxy.log_api_id = self.outputs.get("PublicLogApiId")
        proxy.api_id = self.outputs["ApiId"]
        self._wait_until_ready()

    def _remove_temporary_files(self) -> None:
        self.progress("removing temporary files")
        shutil.rmtree(self.directory / "tmp", ignore_errors=True)

    @contextlib.contextmanager
    def _aws(self) -> Iterator[subprocess.Popen[bytes]]:
        environment = self.environment | {
            "BIND_HOST": "127.0.0.1",
            "GATEWAY_PORT": str(self.ports.aws),
            "LAMBDA_EXECUTOR": "local",
            "LAMBDA_ACCOUNT_CONCURRENCY": str(LAMBDA_CONCURRENCY),
            "AUTH": "true",
            "IOT_MTLS_ENABLED": "0",
            "PERSIST_STATE": "0",
            "S3_PERSIST": "0",
            "S3_DATA_DIR": str(self.directory / "tmp" / "s3"),
            "STATE_DIR": str(self.directory / "tmp" / "state"),
            "LOG_LEVEL": "INFO",
            "PYTHONUNBUFFERED": "1",
        }
        with (self.directory / "aws.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "local.guard", "local.emulator"],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                yield process
            finally:
                self.progress("stopping the local AWS")
                end_group(process, grace=0)  # it stores nothing

    def _wait_for_aws(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                break
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.endpoint}/_ministack/health", timeout=5):
                return
            time.sleep(0.1)
        raise LocalCloudError(f"The local AWS did not start.\n{tail(self.directory / 'aws.log')}")

    def _deploy(self) -> None:
        from local.proxy import KEYS_PATH

        self.progress("deploying template.yaml (sam deploy)")
        parameters: dict[str, str] = {
            "Stage": "local",
            "AuthMode": self.auth_mode,
            "PythonRuntime": runtime(),
            "Architecture": architecture(),
            "JwtIssuer": self.url,
            "JwtAudience": AUDIENCE,
            "JwksUrl": f"http://127.0.0.1:{self.ports.http}{KEYS_PATH}",
            "QubicTickMilliseconds": str(TICK_MILLISECONDS),
            "PublicLog": "true",
        }
        parameters |= THROTTLING | WINDOWS | dict(self.parameters)
        # sam takes an empty value only in quotes
        given = [f"{name}={value}" if value else f'{name}=""' for name, value in parameters.items()]
        self._sam("deploy", "--template-file", str(TEMPLATE), "--parameter-overrides", *given)
        formation = self.client("cloudformation")
        stack = formation.describe_stacks(StackName=STACK)["Stacks"][0]
        self.outputs = {output["OutputKey"]: output["OutputValue"] for output in stack["Outputs"]}
        pages = formation.get_paginator("list_stack_resources").paginate(StackName=STACK)
        self.resources = {
            item["LogicalResourceId"]: item["PhysicalResourceId"]
            for page in pages
            for item in page["StackResourceSummaries"]
        }
        template = formation.get_template(StackName=STACK, TemplateStage="Processed")["TemplateBody"]
        complete(self.client("apigateway"), self.outputs["ApiId"], template, parameters)
        if public := self.outputs.get("PublicLogApiId"):
            complete(self.client("apigateway"), public, template, parameters, "PublicLogApi")

    def _sam(self, command: str, *arguments: str) -> None:
        log = self.directory / f"sam-{command}.log"
        sam = str(Path(sys.executable).with_name("sam"))
        FOLDER.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sam, command, "--config-file", str(ROOT / "samconfig.toml"), "--config-env", "local", *arguments],
                cwd=FOLDER,  # sam always stores dependencies in .aws-sam of its working directory
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = process.wait(COMMAND_TIMEOUT_SECONDS)
            finally:
                end_group(process)
        if code != 0:
            raise LocalCloudError(f"sam {command} failed; its complete output: {log}\n{tail(log)}")

    def _wait_until_ready(self) -> None:
        try:
            wait_until_ready(self)
        except LocalCloudError as error:
            services = self.directory / "services.log"
            with contextlib.suppress(Exception):  # the local AWS itself may be broken
                services.write_text("\n".join(self.service_logs()))
            raise LocalCloudError(
                f"{error}\nLog of the local AWS: {self.directory / 'aws.log'}; log of the services: {services}"
            ) from None

    def service_logs(self, task_id: str = "", *, everything: bool = True) -> list[str]:
        """Return the services' log lines, oldest first.

        Parameters
        ----------
        task_id : str, optional
            Only the lines that name this task.
        everything : bool
            Include the platform's lines (START, END, REPORT) and the metrics.
        """
        client = self.client("logs")
        wanted = {"filterPattern": f'"{task_id}"'} if task_id else {}
        names = {physical: logical for logical, physical in self.resources.items()}
        events = []
        for groups in client.get_paginator("describe_log_groups").paginate():
            for group in groups["logGroups"]:
                name = group["logGroupName"]
                for page in client.get_paginator("filter_log_events").paginate(logGroupName=name, **wanted):
                    events += [
                        (_logged_at(event), names.get(name, name.rpartition("/")[2]), event["message"].rstrip())
                        for event in page["events"]
                        if everything or not _is_platform(event["message"])
                    ]
        return [f"{name}: {message}" for _, name, message in sorted(events, key=lambda event: event[0])]

    def remove_directory(self) -> None:
        """Delete its directory, including the logs."""
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def names(self) -> dict[str, str]:
        """Return the names of tables and functions, as in the environment of a function."""
        resources = {
            "TASKS_TABLE": "TasksTable",
            "DECISIONS_TABLE": "DecisionsTable",
            "CALLBACKS_TABLE": "CallbacksTable",
            "AUDIT_ENTRIES_TABLE": "AuditEntriesTable",
            "AUDIT_LOG_TABLE": "AuditLogTable",
            "AUDIT_ANCHORS_TABLE": "AuditAnchorsTable",
            "LEDGER_TABLE": "LedgerTable",
            "POLICY_TABLE": "PolicyTable",
            "LEDGER_FUNCTION": "LedgerFunction",
            "SEQUENCER_FUNCTION": "SequencerFunction",
            "RECORDER_FUNCTION": "RecordEventsFunction",
        }
        return {variable: self.resources[resource] for variable, resource in resources.items()}

    def write_shell_files(self) -> None:
        """Write `.local/tokens.env` and `.local/aws.env` for a shell to source, and the key for `make token`."""
        tokens = [f"export {role.upper()}={self.token(role)}" for role in PEOPLE]
        tokens += [f"export {role.upper()}2={self.token(role, subject)}" for role, subject in SECOND_PEOPLE.items()]
        write_private(WORK / "issuer.json", [self.issuer.export()])
        write_private(WORK / "tokens.env", ["# Tokens of the local cloud, for 12 hours.", *tokens])
        wanted = {name: value for name, value in self.environment.items() if name.startswith(("AWS_", "SAM_"))}
        wanted |= self.names | {"API_URL": self.url, "STATE_MACHINE_ARN": self.outputs["StateMachineArn"]}
        lines = [
            "# The local AWS, with credentials that are valid nowhere else.",
            "unset AWS_PROFILE AWS_SESSION_TOKEN",
        ]
        write_private(WORK / "aws.env", [*lines, *(f"export {name}='{value}'" for name, value in wanted.items())])

    def write_sam_files(self, directory: Path = WORK) -> Path:
        """Write the configuration of `sam local … --config-file` for functions on this local AWS; return the file.

        The second file, `sam-env.json`, has the functions' environment, and the address at which a container reaches
        the local AWS. That address accepts connections from now on.
        """
        if interface := bridge():
            address = self._stack.enter_context(Relay(interface, self.ports.aws)).address
        else:
            address = f"{DESKTOP_HOST}:{self.ports.aws}"
        names = {physical: name for name, physical in self.resources.items()}
        environments = {
            names[function["FunctionName"]]: function["Environment"]["Variables"]
            | {"AWS_ENDPOINT_URL": f"http://{address}"}
            for page in self.client("lambda").get_paginator("list_functions").paginate()
            for function in page["Functions"]
        }
        variables = directory / "sam-env.json"
        write_private(variables, [json.dumps(environments, indent=2)])
        configuration = directory / "sam.toml"
        parameters = [
            f"PythonRuntime={runtime()}",
            f"Architecture={architecture()}",
            "Stage=local",
            f"AuthMode={self.auth_mode}",
        ]
        lines = [
            "# For sam local invoke FUNCTION (or start-lambda) --config-file: the functions as `make up` built and",
            "# deployed them.",
            "version = 0.1",
        ]
        for command in ("local_invoke", "local_start_lambda"):
            lines += [
                f"[default.{command}.parameters]",
                f"parameter_overrides = {json.dumps(parameters)}",
                f"template_file = {json.dumps(str(TEMPLATE))}",
                f"env_vars = {json.dumps(str(variables))}",
                f"layer_cache_basedir = {json.dumps(str(WORK / 'sam-layers'))}",
            ]
        write_private(configuration, lines)
        return configuration


_PLATFORM = re.compile(r"(START|END|REPORT|INIT_START|XRAY)[ \t]|\{.*\"_aws\":")
"""A line of Lambda itself, or a metric in CloudWatch's embedded format."""


def _is_platform(message: str) -> bool:
    return _PLATFORM.match(message) is not None


def _logged_at(event: Mapping[str, Any]) -> float:
    """Return when the line was written: the local AWS only provides the end of its invocation."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        return datetime.fromisoformat(json.loads(event["message"])["timestamp"]).timestamp()
    return float(event["timestamp"]) / 1000


def auth_mode(environment: Mapping[str, str] = os.environ) -> AuthMode:
    """Read AUTH_MODE, `jwt` by default; `Cloud` rejects unknown values."""
    return cast("AuthMode", environment.get("AUTH_MODE") or "jwt")
