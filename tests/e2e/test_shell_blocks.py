"""Every shell block of the README and the docs, pasted as it stands into an interactive bash and zsh.

An interactive zsh knows no comments, and both end here at the first command that fails (`set -e`). curl fails on an
HTTP error and connects to the ports of this test's own local cloud; both are settings of curl, not changes of the text.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from local.build import FOLDER
from local.environment import ROOT, Ports, isolated_environment
from tests.support.template import template

FIRST = "docs/quick-start.md"
"""Sets the variables that other pages use."""
PAGES = [str(path.relative_to(ROOT)) for path in (*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"))]
# docs/policy.md is last: it changes the approvals that a transfer needs.
PAGES.sort(key=lambda page: (page != FIRST, page == "docs/policy.md", page))
SHELLS = {"bash": ["bash", "--noprofile", "--norc", "-i"], "zsh": ["zsh", "-f", "-i"]}
BLOCK = re.compile(r"^( *)```(bash|sh|shell|zsh|console)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
COMMAND = re.compile(r"^ *(curl|make|python3?|aws|sam|jq|source|export|git) ", re.MULTILINE)
GUIDE_CHAPTER = re.compile(r"^### `(\w+ \S+)`$(?:.|\n)*?^(\d{3}):$", re.MULTILINE)
CARRIED = ("TASK", "HASH", "IDENTITY")
"""Variables that FIRST sets and other pages use."""

CURL_SETTINGS = {
    "failing": "fail-with-body\nshow-error",  # an HTTP error ends the shell
    "reporting": 'write-out = "\\nstatus: %{http_code}\\n"',
}
OTHERWISE = {
    "POST /task/{task_id}/cancel": "200 409: the task was approved and may have ended",
    "POST /task/{task_id}/retry": "409: the task did not fail",
    "GET /log/tile/entries/{a}": "404: a full tile needs 256 entries",
    "GET /log/tile/{level}/{a}": "404: a full tile needs 256 entries",
    "POST /policy/versions/{version}/approve": "403: the same operator proposed it",
    "POST /policy/versions/{version}/replay": "200 404: a later command of the page proposes the version",
    "POST /live/v1/broadcast-transaction": "200 400: the tick that the example names has passed",
    "POST /query/v1/getTransactionByHash": "200 404: the transaction may not be final yet",
}
"""Commands of docs/api.md that need another state: their status here. tests/openapi sends each in its state."""

NOT_RUN = {
    "make demo\n": "`.ci/run` runs both; each takes minutes",
    "sam build --config-env dev\n": "deploys to an AWS account; test_deploy runs it on the local AWS",
    "make openapi\nmake check\n": "test_tutorial runs it in a copy that has the new step type",
    "POOL=": "needs the stack qaes-dev; test_deploy runs it on the local AWS",
    ".venv/bin/sam local invoke": "needs Docker; tests/sam_local runs it",
}
"""The start of each block that is parsed and not run here, and why."""
OPTIONAL = ("aws", "jq")
"""Programs that a page names and that need not be installed: their blocks are skipped without them."""


def blocks(page: str) -> list[str]:
    """Return the shell blocks of a page."""
    return [textwrap.dedent(match[3]) for match in BLOCK.finditer((ROOT / page).read_text())]


PAGES_WITH_BLOCKS = [page for page in PAGES if blocks(page)]


def reason_not_run(block: str) -> str | None:
    """Return why a block is not run, if it is not."""
    return next((reason for start, reason in NOT_RUN.items() if block.startswith(start)), None)


@dataclass
class Session:
    """A copy of the repository with a separate local cloud, as a new user has it."""

    directory: Path
    environment: dict[str, str]
    carried: dict[str, str] = field(default_factory=dict)

    def shell(self, shell: str, lines: list[str], curl: str) -> str:
        """Paste lines into an interactive shell that ends at the first failure; return its output."""
        result = subprocess.run(
            SHELLS[shell],
            input="\n".join(["set -e", *lines, "echo blocks ran: $((40 + 2))", "exit 0", ""]),
            cwd=self.directory,
            env=self.environment | self.carried | {"CURL_HOME": str(self.directory / curl)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=400,
            start_new_session=True,
            check=False,
        )
        assert result.returncode == 0, result.stdout[-4000:]
        assert "blocks ran: 42" in result.stdout, result.stdout[-4000:]
        return result.stdout

    def paste(self, shell: str, page: str) -> None:
        """Paste a page's blocks into one shell."""
        lines = []
        for block in blocks(page):
            missing = [name for name in OPTIONAL if re.search(rf"\b{name} ", block) and not shutil.which(name)]
            if reason_not_run(block) is None and not missing:
                lines.append(block)
        lines += [f"printf 'carried %s=%s\\n' {name} \"${{{name}-}}\"" for name in CARRIED]
        printed = self.shell(shell, lines, "failing")
        if page == FIRST:
            self.carried = dict(re.findall(r"carried (\w+)=(\S+)$", printed, re.MULTILINE))
            assert set(self.carried) == set(CARRIED), printed[-4000:]


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    directory = tmp_path_factory.mktemp("new-user") / "qaes"
    left_out = (".git", ".venv", ".local", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis", "__pycache__")
    shutil.copytree(ROOT, directory, symlinks=True, ignore=shutil.ignore_patterns(*left_out))
    (directory / ".venv").symlink_to(ROOT / ".venv")
    if FOLDER.is_dir():  # the same code need not be built again
        shutil.copytree(FOLDER, directory / FOLDER.relative_to(ROOT))
    ports = Ports.free()
    for name, settings in CURL_SETTINGS.items():
        (directory / name).mkdir()
        (directory / name / ".curlrc").write_text(f'{settings}\nconnect-to = "localhost:8000:localhost:{ports.http}"\n')
    environment = isolated_environment(f"http://127.0.0.1:{ports.aws}", directory / ".local") | {
        "HOME": str(directory),
        "QAES_HTTP_PORT": str(ports.http),
        "QAES_PORT": str(ports.aws),
        "STACK": "qaes-local",
        "TERM": "dumb",
    }
    found = Session(directory, environment)

    def make(target: str) -> None:
        result = subprocess.run(
            ["make", target], cwd=directory, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr

    try:
        make("up")
        yield found
    finally:
        make("down")


def available(shell: str) -> str:
    """Return the shell, or skip the test."""
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed (Debian: apt install {shell})")
    return shell


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("page", PAGES_WITH_BLOCKS)
def test_shell_blocks_parse(page: str, shell: str) -> None:
    """Parse each block alone: a block that ends inside a quotation would swallow the next one."""
    for block in blocks(page):
        parsed = subprocess.run(
            [available(shell), "-n"], input=block, capture_output=True, text=True, timeout=30, check=False
        )
        assert parsed.returncode == 0, block + parsed.stderr
        assert not parsed.stderr, block + parsed.stderr


@pytest.mark.parametrize("page", PAGES_WITH_BLOCKS)
def test_shell_blocks_have_no_comments_or_placeholders(page: str) -> None:
    """An interactive zsh runs a comment as a command, and waits for the end of the quotation at an apostrophe in it."""
    for block in blocks(page):
        assert not re.search(r"(^|\s)#", block), block
        assert "…" not in block, block


@pytest.mark.parametrize("shell", SHELLS)
def test_api_guide_commands_get_the_documented_status(session: Session, shell: str) -> None:
    """Before docs/policy.md, which changes the policy that the guide's proposal is based on."""
    variables, *commands = blocks("docs/api.md")
    lines = [variables, f"export CURL_HOME={shlex.quote(str(session.directory / 'reporting'))}"]
    for number, command in enumerate(commands):
        lines += [f"echo command: $(({number} + 0))", command]
    printed = session.shell(available(shell), lines, "failing")
    statuses = dict(re.findall(r"^.*command: (\d+)$(?:.|\n)*?^status: (\d+)$", printed, re.MULTILINE))
    documented = GUIDE_CHAPTER.findall((ROOT / "docs/api.md").read_text())
    assert len(documented) == len(commands) == len(statuses), printed[-4000:]
    wrong = {
        operation: statuses[str(number)]
        for number, (operation, success) in enumerate(documented)
        if statuses[str(number)] not in OTHERWISE.get(operation, success).partition(":")[0].split()
    }
    assert wrong == {}, str(wrong)


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("page", [page for page in PAGES_WITH_BLOCKS if page != "docs/api.md"])
def test_shell_blocks_run_as_pasted(session: Session, page: str, shell: str) -> None:
    session.paste(available(shell), page)


def test_blocks_that_are_not_run_name_existing_files() -> None:
    every = [block for page in PAGES_WITH_BLOCKS for block in blocks(page)]
    skipped = [block for block in every if reason_not_run(block) is not None]
    assert len(skipped) == len(NOT_RUN)
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"^make ([\w-]+)", "".join(skipped), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for environment in re.findall(r"--config-env (\w+)", "".join(skipped)):
        assert f"[{environment}.deploy.parameters]" in (ROOT / "samconfig.toml").read_text()
    for output in re.findall(r"OutputKey=='(\w+)'", "".join(skipped)):
        assert output in template()["Outputs"], output
    for function in re.findall(r"sam local invoke (\w+)", "".join(skipped)):
        assert template()["Resources"][function]["Type"] == "AWS::Serverless::Function"
    for event in re.findall(r"-e (\S+)", "".join(skipped)):
        assert (ROOT / event).is_file(), event
    for group in re.findall(r"--group-name (\w+)", "".join(skipped)):
        groups = [
            body["Properties"]["GroupName"]
            for body in template()["Resources"].values()
            if body["Type"] == "AWS::Cognito::UserPoolGroup"
        ]
        assert group in groups


def test_every_shell_block_is_marked_as_one() -> None:
    """A fence without a language that holds commands would be pasted too, and not be tested."""
    for page in PAGES:
        for language, content in FENCE.findall((ROOT / page).read_text()):
            assert language or not COMMAND.search(content), content
