"""`python -m qaes.policy check`, the example in examples/policy, and its README's commands."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from local.environment import ROOT
from qaes.domain.policy import DEFAULT_RULES, PolicyDocument
from qaes.policy.__main__ import main
from tests.support.policies import CONTENT, document

EXAMPLE = ROOT / "examples" / "policy"
POLICY, CASES = EXAMPLE / "policy.json", EXAMPLE / "cases.json"


def write(path: Path, value: Any) -> str:
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


def case(expect: dict[str, Any], **members: Any) -> list[dict[str, Any]]:
    request = {"action": "refund_customer", "parameters": {"order_id": "123456", "amount": 50_000}}
    return [{"name": "a refund", "request": request, "expect": expect} | members]


def run(tmp_path: Path, policy: Any, cases: Any) -> int:
    return main(["check", write(tmp_path / "policy.json", policy), write(tmp_path / "cases.json", cases)])


def shell(command: str, directory: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", command],
        cwd=directory,
        env={"PATH": os.environ["PATH"]} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_command_of_the_readme_passes_as_written() -> None:
    [command] = re.findall(r"```bash\n(.*?)```", (EXAMPLE / "README.md").read_text(), re.DOTALL)
    result = shell(command, ROOT, {})
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.splitlines()[-1] == f"{len(json.loads(CASES.read_text()))} cases: 9 passed, 0 failed"


def test_command_of_the_workflow_passes_as_written(tmp_path: Path) -> None:
    """In a repository that holds the two files, with this one checked out beside them."""
    steps = yaml.safe_load((EXAMPLE / "workflow.yml").read_text())["jobs"]["check"]["steps"]
    checkout, check = steps[1]["with"], steps[-1]
    for name in ("policy.json", "cases.json"):
        shutil.copy(EXAMPLE / name, tmp_path)
    (tmp_path / checkout["path"]).symlink_to(ROOT)
    for step in steps:
        for path in re.findall(r"-r (\S+)", step.get("run", "")):
            assert (tmp_path / path).is_file()
    python = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    assert shell(check["run"], tmp_path, check["env"] | python).returncode == 0
    (tmp_path / "cases.json").write_text(json.dumps(case({"allowed": False, "code": "allowed"})))
    assert shell(check["run"], tmp_path, check["env"] | python).returncode == 1


@pytest.mark.parametrize("index", range(9))
def test_each_case_of_the_example_can_fail(index: int, tmp_path: Path) -> None:
    cases = json.loads(CASES.read_text())
    cases[index]["expect"]["allowed"] ^= True
    assert run(tmp_path, POLICY.read_text(), cases) == 1


@pytest.mark.parametrize(
    ("expect", "status"),
    [
        ({"allowed": True}, 0),
        ({"allowed": True, "tier": 1, "approvals": 2, "approvers": "finance", "expires_after": 14400}, 0),
        ({"allowed": True, "code": "allowed"}, 0),
        ({"allowed": False}, 1),
        ({"allowed": True, "approvals": 1}, 1),
        ({"allowed": True, "approvers": None}, 1),
        ({"allowed": True, "expires_after": None}, 1),
    ],
)
def test_exit_status_follows_the_expectation(expect: dict[str, Any], status: int, tmp_path: Path) -> None:
    assert run(tmp_path, CONTENT, case(expect)) == status


def test_failed_case_is_named_with_its_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, CONTENT, case({"allowed": True, "approvals": 1})) == 1
    printed = capsys.readouterr().out
    assert "FAIL  a refund" in printed
    assert "`approvals` is 2, and the case expects 1" in printed
    assert "requires 2 approvals by the group `finance`" in printed
    assert printed.endswith("1 cases: 0 passed, 1 failed\n")


def test_usage_that_no_limit_counts_fails_the_case(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    usage = [{"per": "agent", "counts": "count", "window_seconds": 3600, "used": 1}]
    assert run(tmp_path, CONTENT, case({"allowed": True}, used=usage)) == 1
    assert "no limit counts the count per agent in 3600 s" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("policy", "cases", "message"),
    [
        (CONTENT | {"more": 1}, case({"allowed": True}), "policy.json: more: the format has no such member"),
        ({"rules": {}, "more": 1}, case({"allowed": True}), "policy.json: more: format 1 has no such member"),
        (CONTENT | {"actions": {}}, case({"allowed": True}), "policy.json: rules.refund_customer: no action"),
        ("{", case({"allowed": True}), "policy.json: is not JSON"),
        ('{"rules": {}, "rules": {}}', case({"allowed": True}), "policy.json: the name `rules` appears twice"),
        ('{"groups": {}, "version": 1.0, "rules": {}}', case({"allowed": True}), "version: `1.0` is not an integer"),
        ("[]", case({"allowed": True}), "policy.json: a policy must be an object"),
        (CONTENT, [], "cases.json: List should have at least 1 item"),
        (CONTENT, "{", "cases.json: is not JSON"),
        (CONTENT, case({}), "cases.json: 0.expect.allowed: Field required"),
        (CONTENT, '[{"name": "a", "request": {"parameters": {"amount": 1e2}}}]', "0.request.parameters.amount: `1e2`"),
        (CONTENT, case({"allowed": True, "more": 1}), "cases.json: 0.expect.more: the format has no such member"),
        (CONTENT, case({"allowed": True}) * 2, "cases.json: 1.name: another case has the name `a refund`"),
    ],
)
def test_file_that_cannot_be_used_ends_with_2(
    policy: Any, cases: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path, policy, cases) == 2
    assert message in capsys.readouterr().err


def test_missing_file_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path / "none.json")]) == 2
    assert capsys.readouterr().err.endswith("none.json: No such file or directory\n")


def test_schemas_of_the_policy_are_checked_without_cases(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path / "policy.json", CONTENT)
    assert main(["check", path]) == 0
    assert main(["check", path, "--function-prefix", "acme-"]) == 2
    assert "actions.refund_customer.handler.function_name: must begin with `acme-`" in capsys.readouterr().err


def test_command_reads_documents_of_both_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = PolicyDocument.write(DEFAULT_RULES, version=3).text()
    second = document().text()
    for text, counted in ((first, "format 1, 3 rules, 0 actions, 0 groups"), (second, "format 2, 1 rule, 1 action")):
        assert main(["check", write(tmp_path / "policy.json", text)]) == 0
        assert counted in capsys.readouterr().out
