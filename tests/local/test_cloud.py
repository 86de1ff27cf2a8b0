"""Rejections of the local cloud, and its isolation from the caller's AWS."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import tomllib
from ipaddress import IPv4Interface
from pathlib import Path

import pytest

from local import build
from local.build import BUILD, TEMPLATE, architecture, fingerprint
from local.cloud import USER_FILES, Cloud, _is_platform
from local.environment import ROOT, WORK, LocalCloudError, Ports, is_taken, isolated_environment

pytestmark = pytest.mark.enable_socket


@pytest.fixture
def listener():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server


def test_taken_port_is_named_with_the_variable_that_changes_it(listener):
    port = listener.getsockname()[1]
    ports = Ports.from_environment({"QAES_HTTP_PORT": str(port), "QAES_PORT": str(Ports.free().aws)})
    with pytest.raises(LocalCloudError) as raised:
        ports.check()
    assert f"Port {port}" in str(raised.value)
    assert "QAES_HTTP_PORT=" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_port_of_the_local_aws_has_its_own_variable(listener):
    port = listener.getsockname()[1]
    ports = Ports.from_environment({"QAES_HTTP_PORT": str(Ports.free().http), "QAES_PORT": str(port)})
    with pytest.raises(LocalCloudError, match=f"Port {port}.*QAES_PORT="):
        ports.check()


def test_port_is_free_again_without_listener(listener):
    port = listener.getsockname()[1]
    assert is_taken(port)
    listener.close()
    assert not is_taken(port)


@pytest.mark.parametrize("text", ["0", "65536", "http", "-1", "8000 "])
def test_malformed_port_is_refused(text):
    with pytest.raises(LocalCloudError, match="QAES_HTTP_PORT"):
        Ports.from_environment({"QAES_HTTP_PORT": text})


def test_unknown_auth_mode_is_refused():
    with pytest.raises(LocalCloudError, match="AUTH_MODE"):
        Cloud("test", Ports(1, 2), "none")


@pytest.mark.parametrize(
    "endpoint", ["https://sts.amazonaws.com", "http://10.0.0.1:4566", "http://127.0.0.1.example.com"]
)
def test_endpoint_that_is_not_on_loopback_is_refused(endpoint, tmp_path):
    with pytest.raises(LocalCloudError, match="loopback"):
        isolated_environment(endpoint, tmp_path, {})


def test_callers_aws_does_not_get_in(tmp_path):
    caller = {
        "AWS_PROFILE": "prod",
        "AWS_SESSION_TOKEN": "secret",
        "AWS_ACCESS_KEY_ID": "AKIAREAL",
        "AWS_ENDPOINT_URL_S3": "https://s3.amazonaws.com",
        "AWS_CONFIG_FILE": "/home/me/.aws/config",
        "PYTHONPATH": "/elsewhere",
        "HOME": "/home/me",
        "PATH": "/usr/bin",
    }
    environment = isolated_environment("http://127.0.0.1:4566", tmp_path, caller)
    assert environment["AWS_ACCESS_KEY_ID"] == "test"
    assert environment["HOME"] == "/home/me"
    assert not {"AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL_S3", "PYTHONPATH"} & environment.keys()
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        assert Path(environment[name]).is_relative_to(tmp_path)
        assert Path(environment[name]).read_text() == ""


def test_proxy_is_not_asked_for_the_loopback_interface(tmp_path):
    environment = isolated_environment("http://localhost:4566", tmp_path, {"NO_PROXY": "corp.example"})
    assert environment["NO_PROXY"] == environment["no_proxy"] == "corp.example,localhost,127.0.0.1"


def test_build_is_repeated_when_its_sources_change(tmp_path):
    for folder in ("functions/worker", "layers/core", "statemachine"):
        (tmp_path / folder).mkdir(parents=True)
    for name in ("template.yaml", "samconfig.toml", "functions/worker/app.py", "layers/core/requirements.txt"):
        (tmp_path / name).write_text("one")
    before = fingerprint(tmp_path, "python3.11")
    (tmp_path / "functions/worker/app.pyc").write_text("byte code")
    assert fingerprint(tmp_path, "python3.11") == before
    assert fingerprint(tmp_path, "python3.12") != before
    (tmp_path / "functions/worker/app.py").write_text("two")
    assert fingerprint(tmp_path, "python3.11") != before


@pytest.mark.parametrize(("found", "reached_at"), [(None, "host.docker.internal:2"), ("127.0.0.1/8", "127.0.0.1:")])
def test_sam_local_gets_function_environment_and_address(tmp_path, monkeypatch, found, reached_at):
    class Lambda:
        def get_paginator(self, operation):
            assert operation == "list_functions"
            return self

        def paginate(self):
            variables = {"TASKS_TABLE": "qaes-local-TasksTable-1"}
            yield {"Functions": [{"FunctionName": "qaes-local-Gateway-1", "Environment": {"Variables": variables}}]}

    cloud = Cloud("test", Ports(1, 2), "stub")
    cloud.resources = {"GatewayFunction": "qaes-local-Gateway-1", "TasksTable": "qaes-local-TasksTable-1"}
    monkeypatch.setattr(Cloud, "client", lambda self, service: Lambda())
    monkeypatch.setattr("local.cloud.bridge", lambda: IPv4Interface(found) if found else None)
    with contextlib.closing(cloud._stack):
        configuration = cloud.write_sam_files(tmp_path)
    given = tomllib.loads(configuration.read_text())["default"]["local_invoke"]["parameters"]
    assert f"PythonRuntime=python3.{sys.version_info.minor}" in given["parameter_overrides"]
    assert {f"Architecture={architecture()}", "Stage=local", "AuthMode=stub"} <= set(given["parameter_overrides"])
    assert Path(given["layer_cache_basedir"]).is_relative_to(WORK)
    assert given["template_file"] == str(TEMPLATE)
    variables = json.loads(Path(given["env_vars"]).read_text())["GatewayFunction"]
    assert variables.pop("AWS_ENDPOINT_URL").startswith(f"http://{reached_at}")
    assert variables == {"TASKS_TABLE": "qaes-local-TasksTable-1"}
    assert {path.name for path in tmp_path.iterdir()} <= set(USER_FILES)


def test_build_leaves_the_folders_of_sam_build_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "BUILD", tmp_path / "build")
    calls = []

    def sam(*arguments):
        calls.append(arguments)
        (tmp_path / "build" / "GatewayFunction").mkdir(parents=True)
        (tmp_path / "build" / "GatewayFunction" / "app.py").write_text("A = 1")

    for _ in range(2):  # the second one finds nothing to build
        build.build(sam, lambda _: None)
    [(command, *options)] = calls
    assert command == "build"
    assert options[options.index("--build-dir") + 1] == str(tmp_path / "build")
    for option in ("--build-dir", "--cache-dir"):
        assert not Path(options[options.index(option) + 1]).is_relative_to(ROOT / ".aws-sam")
    assert BUILD.is_relative_to(WORK)
    assert TEMPLATE.parent == BUILD
    assert list((tmp_path / "build").rglob("*.pyc"))


def test_byte_code_is_made_once_for_equal_code(tmp_path, monkeypatch):
    for name, source in (("One", "A = 1"), ("Other", "A = 1"), ("Third", "A = 3"), ("CoreLayer", "A = 3")):
        (tmp_path / name / "service").mkdir(parents=True)
        (tmp_path / name / "service" / "app.py").write_text(source)
    compiled = []
    original = build.compileall.compile_dir
    monkeypatch.setattr(
        build.compileall,
        "compile_dir",
        lambda folder, **options: (compiled.append(folder), original(folder, **options)),
    )
    build.compile_sources(tmp_path)
    assert [folder.name for folder in compiled] == ["One", "Third"]
    codes = [next((tmp_path / name).rglob("*.pyc")) for name in ("One", "Other", "Third")]
    assert [path.relative_to(tmp_path).parts[1:] for path in codes] == [codes[0].relative_to(tmp_path).parts[1:]] * 3
    one, other, third = (path.read_bytes() for path in codes)
    assert one == other != third


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("START RequestId: 1 Version: $LATEST", True),
        ("END RequestId: 1", True),
        ("REPORT RequestId: 1\tDuration: 2 ms", True),
        ('{"_aws":{"Timestamp":1},"TaskEnded":[1.0]}', True),
        ('{"level":"INFO","message":"START of a task"}', False),
        ("STARTED by a person", False),
    ],
)
def test_is_platform_separates_lambda_and_service_lines(message, expected):
    assert _is_platform(message) is expected
