"""The tests that docs/testing.md names are there."""

from __future__ import annotations

import ast
import re

from tests.template.conftest import ROOT


def test_every_test_that_is_named_exists() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs" / "testing.md").read_text())
    assert len(named) > 20
    missing = [
        f"{path}::{name}"
        for path, name in named
        if name
        not in {
            each.name for each in ast.walk(ast.parse((ROOT / path).read_text())) if isinstance(each, ast.FunctionDef)
        }
    ]
    assert missing == []
