"""Prose in code: docstrings, comments and messages of Python files, descriptions and comments of other files."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from itertools import groupby
from typing import NamedTuple

import yaml

_DESCRIPTIONS = {"Comment", "Description", "AlarmDescription", "comment", "description", "name"}
"""Keys whose values are prose in YAML and JSON files."""
_DIRECTIVE = re.compile(r"# *(?:noqa|ruff|type|fmt|pragma|mypy|quoted)\b[^#]*")
_CODE = re.compile(r"`[^`]*`|\b[A-Za-z_]+(?:\.[A-Za-z_]+)+\b")
_MINIMUM_WORDS = 3
"""Shorter string literals are keys and names, not sentences."""
_QUOTED = "# quoted"
"""Comment of a line whose string literals quote the text of another author or program."""


class Prose(NamedTuple):
    """A text in a code file; a `summary` is the first line of a docstring."""

    line: int
    text: str
    summary: bool = False


def is_checked(name: str) -> bool:
    """Return whether a file of this name has prose that `of_file` finds."""
    return name == "Makefile" or name.endswith((".py", ".yaml", ".yml", ".asl.json"))


def of_file(path: str, source: str) -> Iterator[Prose]:
    """Yield the prose of a file, by the kind of the file."""
    if path.endswith(".py"):
        return python_prose(source)
    if path.endswith((".yaml", ".yml")):
        return yaml_prose(source)
    return json_prose(source) if path.endswith(".json") else make_prose(source)


def python_prose(source: str) -> Iterator[Prose]:
    """Yield docstrings, messages (string literals with several words) and comments."""
    tree, lines = ast.parse(source), source.splitlines()
    docstrings: set[int] = set()
    for node in ast.walk(tree):
        for statement in _body(node):
            if isinstance(statement, ast.Expr) and _is_text(statement.value):
                docstrings.add(id(statement.value))
                yield Prose(statement.lineno, _plain(statement.value.value), summary=True)  # type: ignore[attr-defined]
    parts: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.expr) and lines[node.lineno - 1].endswith(_QUOTED):
            continue
        if isinstance(node, ast.JoinedStr):
            parts.update(map(id, node.values))
            yield from _message(node.lineno, "".join(part.value if _is_text(part) else "`" for part in node.values))  # type: ignore[attr-defined]
        elif _is_text(node) and id(node) not in docstrings | parts:
            yield from _message(node.lineno, node.value)  # type: ignore[attr-defined]
    yield from _comments(_python_comments(source))


def yaml_prose(source: str) -> Iterator[Prose]:
    """Yield descriptions and comments of a YAML file."""
    yield from _descriptions(yaml.compose(source, yaml.SafeLoader))
    lines = enumerate(source.splitlines(), start=1)
    yield from _comments((number, match[1]) for number, line in lines if (match := re.search(r"(?:^|\s)#\s(.*)", line)))


def json_prose(source: str) -> Iterator[Prose]:
    """Yield the comments of a state machine's definition, which need not be JSON before its substitutions."""
    for number, line in enumerate(source.splitlines(), start=1):
        if match := re.search(r'"Comment": "([^"]*)"', line):
            yield Prose(number, _plain(match[1]))


def make_prose(source: str) -> Iterator[Prose]:
    """Yield the comments of a Makefile, and the help texts of its targets."""
    lines = enumerate(source.splitlines(), start=1)
    yield from _comments((number, match[1]) for number, line in lines if (match := re.search(r"(?:^| )##? (.*)", line)))


def _body(node: ast.AST) -> list[ast.stmt]:
    body = getattr(node, "body", None)
    return body if isinstance(body, list) else []


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _message(line: int, text: str) -> Iterator[Prose]:
    if len(text.split()) >= _MINIMUM_WORDS:
        yield Prose(line, _plain(text))


def _plain(text: str) -> str:
    """Return a text without code in backticks and without section underlines."""
    return _CODE.sub("`", re.sub(r"(?m)^\s*-{3,}$", "", text))


def _python_comments(source: str) -> Iterator[tuple[int, str]]:
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], _DIRECTIVE.sub("", token.string).lstrip("# ")


def _comments(comments: Iterator[tuple[int, str]]) -> Iterator[Prose]:
    """Join the comments of consecutive lines."""
    numbered = enumerate(comments)
    for _, block in groupby(numbered, key=lambda item: item[1][0] - item[0]):
        lines = [line for _, line in block]
        yield Prose(lines[0][0], _plain("\n".join(text for _, text in lines)))


def _descriptions(node: yaml.Node | None) -> Iterator[Prose]:
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if key.value in _DESCRIPTIONS and isinstance(value, yaml.ScalarNode):
                yield from _message(value.start_mark.line + 1, value.value)
            yield from _descriptions(value)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            yield from _descriptions(item)
