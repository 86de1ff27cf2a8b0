"""The prose of code files: its extraction, and the constructions that the prose check reports."""

from __future__ import annotations

import pytest

from local import code_prose, prose

PYTHON = '''"""A module."""

KEY = "two words"


def read(name: str) -> str:
    """Return a value.

    The `what` in code type is not prose.
    """
    # A comment of
    # two lines.  # noqa: S101
    raise ValueError(f"the name {name} is unknown here")
'''
BAD = {
    "docstring": 'def f() -> None:\n    """Return what was sent."""\n',
    "summary": '"""Why a transfer fails."""\n',
    "comment": "x = 1  # the worker tells the ledger\n",
    "message": 'raise ValueError("nobody can read the table")\n',
    "formatted message": 'raise ValueError(f"the table {name} says nothing")\n',
}


def test_python_prose_finds_docstrings_messages_and_comments() -> None:
    texts = {found.line: found.text for found in code_prose.of_file("a.py", PYTHON)}
    assert texts[1] == "A module."
    assert texts[7].startswith("Return a value.")
    assert "what" not in texts[7]
    assert texts[11] == "A comment of\ntwo lines.  "
    assert texts[13] == "the name ` is unknown here"
    assert 3 not in texts


def test_yaml_prose_finds_descriptions_and_comments() -> None:
    source = "A: # the table of tasks\n  B:\n    Description: !Sub The table of ${Name}\n    Value: not a text here\n"
    texts = {found.line: found.text for found in code_prose.of_file("template.yaml", source)}
    assert texts == {1: "the table of tasks", 3: "The table of ${Name}"}


def test_json_prose_finds_comments() -> None:
    [found] = code_prose.of_file(
        "a.asl.json", '{\n  "Comment": "Plans the task.",\n  "TimeoutSeconds": ${Seconds}\n}\n'
    )
    assert (found.line, found.text) == (2, "Plans the task.")


def test_make_prose_finds_comments_and_help() -> None:
    texts = [found.text for found in code_prose.of_file("Makefile", "# a comment\n\nup: ## Start the cloud\n")]
    assert texts == ["a comment", "Start the cloud"]


def test_python_prose_leaves_out_quoted_lines() -> None:
    source = 'a = "nobody can read it"  # quoted\nb = f"nobody can read {a}"  # quoted\nc = "people can read it"\n'
    assert [found.line for found in code_prose.of_file("a.py", source) if found.text.strip()] == [3]


@pytest.mark.parametrize("source", BAD.values(), ids=BAD)
def test_check_code_reports_construction(source: str) -> None:
    assert list(prose.check_code("a.py", source))


def test_check_code_accepts_plain_english() -> None:
    assert list(prose.check_code("a.py", PYTHON)) == []


def test_code_files_include_every_kind() -> None:
    files = prose.code_files()
    assert {"functions/gateway/api.py", "template.yaml", "Makefile", "statemachine/task_execution.asl.json"} <= {*files}
    assert not prose.NOT_PROSE & {*files}
