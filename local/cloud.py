"""Start an AWS on this machine, build and deploy the template to it, and start the proxy.

Nothing here can reach an AWS account: programs are started with made-up credentials, empty configuration files and an
endpoint on the loopback interface, and none of the caller's own `AWS_…` variables. Everything that is written lies in
the repository, under `.local` and `.aws-sam`.
"""

from __future__ import annotations

import compileall
import contextlib
import errno
import fcntl
import hashlib
import json
import os
import py_compile
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self, cast
from urllib.parse import urlsplit

import boto3

from local.gateway import complete
from local.proxy import KEYS_PATH, Proxy
from local.relay import DESKTOP_HOST, Relay, bridge
from local.tokens import AUDIENCE, PEOPLE, SECOND_PEOPLE, Issuer

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / ".local"
BUILD = ROOT / ".aws-sam" / "build"
REGION = "us-east-1"
STACK = "qaes-local"
AUTH_MODES = ("jwt", "stub")
PYTHONS = range(11, 15)  # minor versions that Lambda and the template's parameter PythonRuntime have
# A Lambda environment is a process of some 50 MB here: this bounds what a burst of tasks can take.
LAMBDA_CONCURRENCY = 32
TICK_MILLISECONDS = 100  # of the mock network: nobody wants to wait for real ones
# One caller here is a test that asks as fast as it can; how a stage is throttled is the template's tests' to say.
THROTTLING = {
    f"{routes}Throttling{limit}": "1000" for routes in ("Api", "Change", "Open") for limit in ("Rate", "Burst")
}
START_TIMEOUT_SECONDS = 60
COMMAND_TIMEOUT_SECONDS = 600
USER_FILES = ("tokens.env", "aws.env", "sam.toml", "sam-env.json", "issuer.json")
"""What tells a user's tools of the local cloud, in `.local`, for as long as it runs."""
HEALTH_PATHS = (
    "/health",
    "/planner/health",
    "/agent-runtime/health",
    "/worker/health",
    "/audit/health",
    "/qubic/health",
)

AuthMode = Literal["jwt", "stub"]


class LocalCloudError(Exception):
    """The local cloud cannot do what it was asked to; the text says why, and what to do about it."""


@dataclass(frozen=True)
class Ports:
    """Where to listen, and which environment variable changes that (`None`: nobody chose it)."""

    http: int
    aws: int
    http_variable: str | None = None
    aws_variable: str | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Ports:
        """Read QAES_HTTP_PORT (8000, the API) and QAES_PORT (4566, the local AWS)."""
        return cls(
            _port(environment, "QAES_HTTP_PORT", 8000),
            _port(environment, "QAES_PORT", 4566),
            "QAES_HTTP_PORT",
            "QAES_PORT",
        )

    @classmethod
    def free(cls) -> Ports:
        """Choose two ports that are free now."""
        with socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", 0))
            other.bind(("127.0.0.1", 0))
            return cls(one.getsockname()[1], other.getsockname()[1])

    def check(self) -> None:
        """Raise LocalCloudError, naming the port and the variable that changes it, if one of them cannot be used."""
        if self.http == self.aws:
            raise LocalCloudError(
                f"QAES_HTTP_PORT and QAES_PORT are both {self.http}; the API and the local AWS need a port each. "
                f"Choose another: QAES_PORT={self.http + 1 if self.http < 65535 else self.http - 1} make up"
            )
        for port, variable, what in (
            (self.http, self.http_variable, "API"),
            (self.aws, self.aws_variable, "local AWS"),
        ):
            if is_taken(port):
                advice = f" Choose another: {variable}={next_free(port)} make up" if variable else ""
                raise LocalCloudError(f"Port {port}, for the {what}, is taken by another program.{advice}")


def _port(environment: Mapping[str, str], variable: str, default: int) -> int:
    text = environment.get(variable) or str(default)
    if not text.isdecimal() or not 1 <= int(text) <= 65535:
        raise LocalCloudError(f"{variable} is a port from 1 to 65535, not {text!r}.")
    return int(text)


def is_taken(port: int) -> bool:
    """Whether a program listens on this port of `localhost`, which may mean 127.0.0.1 or ::1."""
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        try:
            with socket.socket(family) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind((host, port))
        except OSError as error:
            if error.errno in {errno.EADDRINUSE, errno.EACCES}:
                return True  # every other error: this machine has no such address, so nobody listens there
    return False


def next_free(port: int) -> int:
    """Return a free port near this one."""
    near = (number for number in range(port + 1, min(port + 200, 65536)) if not is_taken(number))
    return next(near, None) or Ports.free().http


def isolated_environment(endpoint: str, directory: Path, base: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Return the environment for programs of the local cloud.

    Parameters
    ----------
    endpoint : str
        Address of the local AWS.
    directory : Path
        Where the programs may write; it gets the empty AWS configuration.
    base : Mapping
        The caller's environment; what speaks of AWS or of another Python in it is left out.

    Raises
    ------
    LocalCloudError
        If the endpoint is not on the loopback interface: it could be a real account.
    """
    if urlsplit(endpoint).hostname not in {"127.0.0.1", "localhost", "::1"}:
        raise LocalCloudError(f"AWS_ENDPOINT_URL has to be on the loopback interface, and {endpoint} is not.")
    empty = directory / "aws"
    empty.mkdir(parents=True, exist_ok=True)
    for name in ("config", "credentials"):
        (empty / name).write_text("")
    foreign = ("AWS_", "SAM_", "LAMBDA_", "MINISTACK_", "LOCALSTACK_", "PYTHON", "VIRTUAL_ENV")
    environment = {name: value for name, value in base.items() if not name.startswith(foreign)}
    no_proxy = ",".join(filter(None, [base.get("NO_PROXY") or base.get("no_proxy"), "localhost", "127.0.0.1"]))
    temporary = directory / "tmp"
    temporary.mkdir(exist_ok=True)
    return environment | {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": REGION,
        "AWS_REGION": REGION,
        "AWS_CONFIG_FILE": str(empty / "config"),
        "AWS_SHARED_CREDENTIALS_FILE": str(empty / "credentials"),
        "AWS_EC2_METADATA_DISABLED": "true",
        "SAM_CLI_TELEMETRY": "0",
        "__SAM_CLI_APP_DIR": str(directory / "sam"),
        "NO_PROXY": no_proxy,
        "no_proxy": no_proxy,
        "TMPDIR": str(temporary),
        # sam looks for the interpreter of the template's runtime on the path
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), base.get("PATH", os.defpath)]),
    }


class Progress:
    """Prints what is being done, with the seconds since the start."""

    def __init__(self, write: Callable[[str], None] | None = None) -> None:
        self._start = time.monotonic()
        self._write = write or (lambda line: print(line, flush=True))

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def __call__(self, text: str) -> None:
        self._write(f"[{self.seconds:5.1f} s] {text}")


@dataclass
class Cloud:
    """The local cloud, as a context manager: it runs inside of the `with` block.

    Parameters
    ----------
    name : str
        Its directory below `.local`.
    ports : Ports
        Where to listen.
    auth_mode : str
        `jwt`, or `stub` to take requests without a token.
    parameters : Mapping
        Further template parameters, such as `{"ApprovalTimeoutSeconds": "5"}`.
    progress : Callable
        Told what is being done.
    """

    name: str
    ports: Ports = field(default_factory=Ports.free)
    auth_mode: AuthMode = "jwt"
    parameters: Mapping[str, str] = field(default_factory=dict)
    progress: Callable[[str], None] = field(default_factory=Progress)
    resources: Mapping[str, str] = field(default_factory=dict, init=False)
    """Physical names of the stack's resources, by their names in the template."""
    outputs: Mapping[str, str] = field(default_factory=dict, init=False)
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.auth_mode not in AUTH_MODES:
            raise LocalCloudError(f"AUTH_MODE is jwt or stub, not {self.auth_mode!r}.")
        if sys.version_info.minor not in PYTHONS:
            found = f"{sys.version_info.major}.{sys.version_info.minor}"
            raise LocalCloudError(f"Lambda has Python 3.{PYTHONS[0]} to 3.{PYTHONS[-1]}; this is {found}.")
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
        """Where it writes."""
        return WORK / self.name

    @property
    def environment(self) -> dict[str, str]:
        """Environment for programs that talk to it."""
        return isolated_environment(self.endpoint, self.directory)

    def token(self, role: str, subject: str | None = None) -> str:
        """Return a token for a role; see `Issuer.token`."""
        return self.issuer.token(role, subject=subject)

    def client(self, service: str) -> Any:
        """Return a boto3 client for the local AWS, as its root user."""
        return boto3.client(
            service,  # type: ignore[call-overload]
            endpoint_url=self.endpoint,
            region_name=REGION,
            aws_access_key_id="test",
            aws_secret_access_key="test",  # noqa: S106 - what the local AWS takes for its root user
        )

    def __enter__(self) -> Self:
        self.ports.check()
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _start(self) -> None:
        self.progress("starting the local AWS")
        self._stack.callback(shutil.rmtree, self.directory / "tmp", ignore_errors=True)
        aws = self._stack.enter_context(self._aws())
        stub = self.auth_mode == "stub"
        origin = self.parameters.get("CorsAllowOrigin", "")
        proxy = self._stack.enter_context(
            Proxy(self.ports.http, self.ports.aws, self.issuer.key_set(), stub=stub, cors_origin=origin)
        )
        with _locked(WORK / "build.lock"):  # another local cloud may share the build
            self._build()
            self._wait_for_aws(aws)
            self._deploy()
        proxy.log_api_id = self.outputs.get("PublicLogApiId")
        proxy.api_id = self.outputs["ApiId"]
        self._wait_for_health()

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
                [sys.executable, "-m", "local.guard", "ministack"],
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
                end_group(process)

    def _wait_for_aws(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                break
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{self.endpoint}/_ministack/health", timeout=5):
                return
            time.sleep(0.1)
        raise LocalCloudError(f"The local AWS did not start.\n{_tail(self.directory / 'aws.log')}")

    def _build(self) -> None:
        runtime = f"python3.{sys.version_info.minor}"
        stamp = BUILD / ".fingerprint"  # sam empties the folder, so no other build can be taken for this one
        wanted = fingerprint(ROOT, runtime)
        if stamp.is_file() and stamp.read_text() == wanted:
            return
        self.progress("building functions and layer (sam build)")
        self._sam("build", "--parameter-overrides", f"PythonRuntime={runtime}", "Stage=local", "AuthMode=stub")
        compile_sources(BUILD)
        stamp.write_text(wanted)

    def _deploy(self) -> None:
        self.progress("deploying template.yaml (sam deploy)")
        parameters: dict[str, str] = {
            "Stage": "local",
            "AuthMode": self.auth_mode,
            "PythonRuntime": f"python3.{sys.version_info.minor}",
            "JwtIssuer": self.url,
            "JwtAudience": AUDIENCE,
            "JwksUrl": f"http://127.0.0.1:{self.ports.http}{KEYS_PATH}",
            "QubicTickMilliseconds": str(TICK_MILLISECONDS),
            "PublicLog": "true",
        }
        parameters |= THROTTLING | dict(self.parameters)
        # sam takes an empty value only in quotes
        given = [f"{name}={value}" if value else f'{name}=""' for name, value in parameters.items()]
        self._sam("deploy", "--parameter-overrides", *given)
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
        with log.open("wb") as output:
            process = subprocess.Popen(
                [sam, command, "--config-env", "local", *arguments],
                cwd=ROOT,
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
            raise LocalCloudError(f"sam {command} failed; all of its output: {log}\n{_tail(log)}")

    def _wait_for_health(self) -> None:
        self.progress("waiting for the services to answer")
        with ThreadPoolExecutor(len(HEALTH_PATHS)) as pool:
            list(pool.map(self._check_health, HEALTH_PATHS))

    def _check_health(self, path: str) -> None:
        token = "stub" if self.auth_mode == "stub" else self.token("operator")
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        answer = "no answer"
        while time.monotonic() < deadline:
            request = urllib.request.Request(f"{self.url}{path}", headers={"Authorization": f"Bearer {token}"})
            try:
                with urllib.request.urlopen(request, timeout=30):
                    return
            except urllib.error.HTTPError as error:
                answer = f"{error.code} {error.read().decode(errors='replace')}"
            except OSError as error:
                answer = str(error)
            time.sleep(0.5)
        services = self.directory / "services.log"
        with contextlib.suppress(Exception):  # the local AWS may be what does not work
            services.write_text("\n".join(self.service_logs()))
        raise LocalCloudError(
            f"{path} is not healthy: {answer}\n"
            f"What the local AWS logged: {self.directory / 'aws.log'}, and the services: {services}"
        )

    def service_logs(self, task_id: str | None = None) -> list[str]:
        """Return what the services have logged, oldest first; all of it, or the lines that name a task."""
        client = self.client("logs")
        wanted = {"filterPattern": f'"{task_id}"'} if task_id else {}
        events = []
        for groups in client.get_paginator("describe_log_groups").paginate():
            for group in groups["logGroups"]:
                name = group["logGroupName"]
                for page in client.get_paginator("filter_log_events").paginate(logGroupName=name, **wanted):
                    events += [
                        (event["timestamp"], name.rpartition("/")[2], event["message"]) for event in page["events"]
                    ]
        return [f"{name}: {message.rstrip()}" for _, name, message in sorted(events)]

    def remove_directory(self) -> None:
        """Delete what it wrote; logs included."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def write_shell_files(self) -> None:
        """Write `.local/tokens.env` and `.local/aws.env`, to be sourced in a shell, and the key for `make token`."""
        tokens = [f"export {role.upper()}={self.token(role)}" for role in PEOPLE]
        tokens += [f"export {role.upper()}2={self.token(role, subject)}" for role, subject in SECOND_PEOPLE.items()]
        _write_private(WORK / "issuer.json", [self.issuer.export()])
        _write_private(WORK / "tokens.env", ["# Tokens of the local cloud, for 12 hours.", *tokens])
        wanted = {name: value for name, value in self.environment.items() if name.startswith(("AWS_", "SAM_"))} | {
            "API_URL": self.url,
            "STATE_MACHINE_ARN": self.outputs["StateMachineArn"],
            "TASKS_TABLE": self.resources["TasksTable"],
            "AUDIT_ENTRIES_TABLE": self.resources["AuditEntriesTable"],
            "AUDIT_LOG_TABLE": self.resources["AuditLogTable"],
            "LEDGER_TABLE": self.resources["LedgerTable"],
            "LEDGER_FUNCTION": self.resources["LedgerFunction"],
            "SEQUENCER_FUNCTION": self.resources["SequencerFunction"],
            "RECORDER_FUNCTION": self.resources["RecordAuditFunction"],
        }
        lines = [
            "# The local AWS, with credentials that are good for nothing else.",
            "unset AWS_PROFILE AWS_SESSION_TOKEN",
        ]
        _write_private(WORK / "aws.env", [*lines, *(f"export {name}='{value}'" for name, value in wanted.items())])

    def write_sam_files(self, directory: Path = WORK) -> Path:
        """Let `sam local … --config-file` run functions on this local AWS; return the configuration file.

        It comes with `sam-env.json`: what the functions have in their environment here, and the address at which a
        container reaches the local AWS. That way is open from now on.
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
        _write_private(variables, [json.dumps(environments, indent=2)])
        configuration = directory / "sam.toml"
        parameters = [f"PythonRuntime=python3.{sys.version_info.minor}", "Stage=local", f"AuthMode={self.auth_mode}"]
        lines = [
            "# For sam local invoke FUNCTION (or start-lambda) --config-file: the functions as `make up` has built and",
            "# deployed them.",
            "version = 0.1",
        ]
        for command in ("local_invoke", "local_start_lambda"):
            lines += [
                f"[default.{command}.parameters]",
                f"parameter_overrides = {json.dumps(parameters)}",
                f"env_vars = {json.dumps(str(variables))}",
                f"layer_cache_basedir = {json.dumps(str(WORK / 'sam-layers'))}",
            ]
        _write_private(configuration, lines)
        return configuration


def fingerprint(root: Path, runtime: str) -> str:
    """Return a SHA-256 over all that a build depends on."""
    digest = hashlib.sha256(runtime.encode())
    files = [root / "template.yaml", root / "samconfig.toml"]
    for folder in ("functions", "layers/core", "statemachine"):
        files += [path for path in (root / folder).rglob("*") if path.is_file() and path.suffix != ".pyc"]
    for path in sorted(files):
        content = path.read_bytes()
        digest.update(f"\n{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def compile_sources(directory: Path) -> None:
    """Add byte code that needs no look at the source.

    The local AWS unpacks layer and code anew for each environment, where they would be compiled anew.
    """
    for folder in filter(Path.is_dir, directory.iterdir()):
        # The same path in every function's folder leaves equal code equal, and so uploaded once.
        compileall.compile_dir(
            folder,
            quiet=2,
            workers=0,
            stripdir=str(folder),
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )


def end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started, gently first; it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        if process.poll() is None:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_private(path: Path, lines: list[str]) -> None:
    path.touch(mode=0o600)
    path.chmod(0o600)
    path.write_text("\n".join([*lines, ""]))


def _tail(log: Path, lines: int = 15) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])


def auth_mode(environment: Mapping[str, str] = os.environ) -> AuthMode:
    """Read AUTH_MODE, `jwt` by default; `Cloud` refuses what it does not know."""
    return cast("AuthMode", environment.get("AUTH_MODE") or "jwt")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; an absent or half-written file is an empty one."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
