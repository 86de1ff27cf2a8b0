"""The changelog: every fragment reaches it, by the command that docs/releasing.md names."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from local import prose
from local.prose import ROOT


def test_towncrier_writes_every_fragment_into_the_changelog(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "changelog.d", tmp_path / "changelog.d")
    (tmp_path / "changelog.d" / "+example.fixed.md").write_text("An example\nof two lines ([docs](docs/policy.md)).\n")
    fragments = sorted((tmp_path / "changelog.d").glob("*.md"))
    sentences = [" ".join(fragment.read_text().split()) for fragment in fragments]
    for name in ("pyproject.toml", "CHANGELOG.md"):
        shutil.copy(ROOT / name, tmp_path)
    [command] = re.findall(r"`\.venv/bin/(towncrier [^`]+)`", (ROOT / "docs" / "releasing.md").read_text())
    program, *arguments = command.replace("VERSION", "9.9.9").split()

    subprocess.run([ROOT / ".venv" / "bin" / program, *arguments], cwd=tmp_path, check=True, capture_output=True)

    page = prose.wrapped((tmp_path / "CHANGELOG.md").read_text())
    chapter = re.split(r"^## ", page, flags=re.MULTILINE)[1]
    assert re.match(r"9\.9\.9 \(\d{4}-\d\d-\d\d\)\n", chapter)
    assert all(sentence in " ".join(chapter.split()) for sentence in sentences)
    assert prose.check_page("CHANGELOG.md", page) == []
    before = (ROOT / "CHANGELOG.md").read_text()
    assert page.endswith(before[before.index("\n## ") :])
    assert list((tmp_path / "changelog.d").glob("*.md")) == []


@pytest.mark.parametrize("name", ["+a.new.md", "a.added.md", "+a.added.txt", "+a.md", "README.md"])
def test_check_fragments_reports_name_without_type(name: str) -> None:
    [finding] = prose.check_fragments([name])

    assert (finding.path, "fixed" in finding.instead) == (f"changelog.d/{name}", True)


def test_check_fragments_accepts_every_type() -> None:
    types = ("added", "changed", "deprecated", "removed", "fixed", "security")

    assert list(prose.check_fragments([f"+some-words.{type_}.md" for type_ in types])) == []
