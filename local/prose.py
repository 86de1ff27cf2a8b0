"""The prose check: plain English in Markdown and in code, 100 characters a line in Markdown, and short names of tests.

`python -m local.prose` prints each finding with its file, its line and a better wording, and exits with 1 if it finds
anything. `--write` wraps the pages with mdformat instead.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import mdformat
from markdown_it import MarkdownIt
from markdown_it.token import Token

from local import code_prose
from local.environment import ROOT

LINE_LENGTH = 100
TEST_NAME_LENGTH = 60
"""Bound of the 90th percentile."""
TEST_NAME_WORDS = re.compile(
    r"^test_(?:who|what|it|there)_|_(?:(?:some|any|every|no)body|tells?|told|says?|said|(?:who|what)ever)(?:_|$)"
    r"|_(?:and|by|for|in|not|of|on|than|to)_(?:who|what)_"
)
"""Words of names without a subject."""

GENERATED = {"docs/api.md", "docs/performance.md"}
"""Written by local/openapi.py and benchmarks/run.py, which do not wrap their lines."""

_COMPONENTS = (
    "agents?|alarms?|anchors?|API|APIs|authorizer|bundles?|checkpoints?|documents?|entry|entries|errors?|events?|"
    "executions?|fsck|functions?|gateway|index|indexes|Lambda|ledger|lines?|log|logs|messages?|metrics?|mock|network|"
    "nodes?|pages?|parameters?|plans?|planner|policy|policies|process|processes|programs?|proofs?|proxy|queues?|"
    "reconciler|recorder|records?|reports?|requests?|responses?|RPC|rules?|sequencer|services?|stack|stacks|"
    "state machine|states?|status|statuses|steps?|streams?|sweeper|system|tables?|tasks?|templates?|tests?|"
    "transactions?|transfers?|verifier|worker"
)
_VERBS = "tells?|told|says?|said|asks?|asked|brings?|brought|knows?|knew|looks?(?! like)|looked(?! like)"
_ADVERBS = "also|already|always|itself|never|only|still|then"
_LINKS = "and|are|be|but|does|is|not|or|that|was|were"
_PREPOSITIONS = "as|at|by|for|from|in|of|on|than|to|with"
_NAMES = {
    "under way": "in flight",
    "let through": "submitted",
    "under_way": "in_flight",
    "let_through": "submitted",
    "moved_nothing": "no_effect",
    "moved_unknown": "outcome_unknown",
    "over_daily_limit": "daily_limit_exceeded",
    "waiter": "callback token",
    "waiters": "callback tokens",
    "writer": "transaction worker",
    "RefusedError": "PermanentError",
    "UnavailableError": "TransientError",
    "TasksBehindInAudit": "AuditBacklog",
    "TransferNotOnRecord": "UnrecordedTransfer",
    "OldestOpenApproval": "OldestPendingApprovalAge",
    "front door": "proxy",
    "front_door": "proxy",
    "hammer": "load test",
    "the story": "the state machine",
}
"""The right and the left column of the glossary: a name in code type is checked with the code, not here."""


class Construction(NamedTuple):
    """A construction that the project does not use, and its replacement."""

    pattern: re.Pattern[str]
    instead: str


def _construction(pattern: str, instead: str) -> Construction:
    return Construction(re.compile(pattern), instead)


CONSTRUCTIONS = [
    _construction(r"(?:^|(?<=[.:;!?] ))[Ww]h(?:o|at)\b[^.?!]*(?:[.!]|$)", "name the person or thing: 'The approver …'"),
    _construction(r"\b[Ww]ho(?:m|se)?ever\b", "'any caller', 'the operator who …'"),
    _construction(r"\b[Ww]hat(?:so)?ever\b", "'any …', 'every …', 'regardless of …'"),
    _construction(rf"\b(?:{_PREPOSITIONS}) who\b", "name the person: 'the operator who …'"),
    _construction(rf"\b(?:{_PREPOSITIONS}|{_LINKS}) what\b", "name the thing: 'the amount that …'"),
    _construction(r"\b(?:is|are|was|were|has|have) none\b", "'no …', '… does not exist', 'without …'"),
    _construction(r"\bof (?:one's|its|their|his|her|your|our) own\b", "'its own …', 'a separate …'"),
    _construction(
        rf"\b(?:{_COMPONENTS}) (?:(?:{_ADVERBS}) )?(?:{_VERBS})\b",
        "a component reports, returns, requests, reads, delivers, stores or raises",
    ),
    _construction(r"\b(?:is|are|was|were|be|been) (?:told|said)\b", "'reported', 'stated'; name the actor"),
    _construction(r"\b[Tt]ells? (?:of|what|whether|that|how|which|when)\b", "'reports …', 'shows …'"),
    *(_construction(rf"(?i)\b{re.escape(name)}\b", f"'{new}'") for name, new in _NAMES.items()),
]


CODE_CONSTRUCTIONS = [
    *CONSTRUCTIONS[1 : -len(_NAMES)],
    _construction(r"\b[Ww]hat\b(?! to\b)", "name the thing: 'the amount that …'"),
    _construction(r"\b(?:[Tt]ell(?:s|ing)?|[Tt]old)\b", "'return', 'report', 'show'"),
    _construction(r"\b[Ss]a(?:ys?|id)\b", "'return', 'report', 'state', 'contain'"),
    _construction(r"\b(?:[Aa]ny|[Ee]very|[Ss]ome|[Nn]o)body\b", "'another caller', 'no caller', 'people'"),
    _construction(r"(?i)\b(?:under way|let through)\b", "'in flight', 'submitted'"),
]
"""The constructions for code. Its names are also words of other subjects, so the glossary is not checked there."""
SUMMARY = _construction(
    r"^(?:What|Who|Whose|Whom|How|Why|That|Told|Tell|It|Its)\b.*", "a verb, or the name of the thing"
)
"""The first words that a docstring does not have."""
CODE = (
    "functions",
    "layers",
    "local",
    "benchmarks",
    "tests",
    "template.yaml",
    "statemachine",
    "Makefile",
    ".github",
)
"""Folders and files whose prose is checked."""
NOT_PROSE = {
    "local/prose.py",
    "layers/core/qaes/domain/generated/unicode_tables.py",
    "tests/local/test_code_prose.py",
    "tests/local/test_prose.py",
    "tests/releases/0.2.0.yaml",
}
"""Files with the constructions themselves, generated files, and a released template."""


class Finding(NamedTuple):
    """One place that needs another text."""

    path: str
    line: int
    text: str
    instead: str

    def __str__(self) -> str:
        """Return the finding as one line for a terminal."""
        return f"{self.path}:{self.line}: {self.text!r}: {self.instead}"


def _parse(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable("table").parse(text)


def _text(token: Token) -> str:
    """Return the text of a paragraph, a heading or a cell, with code and links' addresses left out."""
    kinds = {"softbreak": "\n", "hardbreak": "\n", "code_inline": "`"}
    return "".join(kinds.get(child.type, child.content) for child in token.children or [])


def check_prose(path: str, text: str) -> Iterator[Finding]:
    """Yield the constructions of a page that the project does not use."""
    heading = False
    for token in _parse(text):
        heading = token.type in {"heading_open", "th_open"} or (heading and token.type == "inline")
        names_heading = heading or [child.type for child in token.children or []] == ["link_open", "text", "link_close"]
        if token.type != "inline" or token.map is None:
            continue
        content = _text(token)
        flat = content.replace("\n", " ")
        for construction in CONSTRUCTIONS[1 if names_heading else 0 :]:
            for match in construction.pattern.finditer(flat):
                line = token.map[0] + content.count("\n", 0, match.start()) + 1
                yield Finding(path, line, match[0], construction.instead)


def check_code(path: str, text: str) -> Iterator[Finding]:
    """Yield the constructions in the prose of a code file that the project does not use."""
    for prose in code_prose.of_file(path, text):
        flat = prose.text.replace("\n", " ")
        for construction in (*CODE_CONSTRUCTIONS, *((SUMMARY,) if prose.summary else ())):
            for match in construction.pattern.finditer(flat):
                line = prose.line + prose.text.count("\n", 0, match.start())
                yield Finding(path, line, match[0][:40], construction.instead)


def check_lines(path: str, text: str) -> Iterator[Finding]:
    """Yield the lines that are too long, tables, code blocks and lines of one link aside."""
    free: set[int] = set()
    for token in _parse(text):
        if token.type in {"table_open", "fence", "code_block"} and token.map is not None:
            free.update(range(*token.map))
    for number, line in enumerate(text.splitlines()):
        one_link = re.fullmatch(r"[\s*-]*(\[[^]]*\]\(\S+\)|<?https?://\S+)[.,;:]?", line)
        if len(line) > LINE_LENGTH and number not in free and not one_link:
            yield Finding(path, number + 1, f"{len(line)} characters", f"at most {LINE_LENGTH}: make format")


def wrapped(text: str) -> str:
    """Return a page as mdformat writes it."""
    options = {"wrap": LINE_LENGTH, "number": True, "plugin": {"tables": {"compact_tables": True}}}
    return mdformat.text(text, options=options, extensions={"gfm", "tables"})


def check_format(path: str, text: str) -> Iterator[Finding]:
    """Yield the first line that mdformat would change."""
    lines, formatted = text.splitlines(), wrapped(text).splitlines()
    if lines != formatted:
        pairs = enumerate(zip(lines, formatted, strict=False), start=1)
        first = next((number for number, (old, new) in pairs if old != new), min(len(lines), len(formatted)) + 1)
        yield Finding(path, first, "not as mdformat writes it", "make format")


def anchors(text: str) -> set[str]:
    """Return the anchors of a page, as GitHub makes them from its headings."""
    tokens = _parse(text)
    headings = [token.children or [] for before, token in pairwise(tokens) if before.type == "heading_open"]
    titles = ("".join(child.content for child in children) for children in headings)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def check_links(path: str, text: str) -> Iterator[Finding]:
    """Yield the links within the repository that lead to no file, or to no heading of a page."""
    for token in _parse(text):
        for child in token.children or []:
            link = str(child.attrGet("href") or "")
            if child.type != "link_open" or re.match(r"\w+:", link):
                continue
            target, _, anchor = link.partition("#")
            folder = (
                ROOT if path.startswith("changelog.d/") else (ROOT / path).parent
            )  # a fragment becomes CHANGELOG.md
            file = folder / target
            exists = not target or file.exists()
            if exists and anchor:
                exists = anchor in anchors(file.read_text() if target else text)
            if not exists:
                yield Finding(path, token.map[0] + 1 if token.map else 1, link, "a file, and one of its headings")


def check_decisions(index: str, names: list[str]) -> Iterator[Finding]:
    """Yield the decisions that their index does not list."""
    for name in names:
        if f"]({name})" not in index:
            yield Finding("docs/adr/README.md", 1, name, "a row: number, decision in one sentence, status")


def check_fragments(names: list[str]) -> Iterator[Finding]:
    """Yield the fragments of the changelog whose name has no type, which towncrier would leave out."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["towncrier"]
    types = [kind["directory"] for kind in settings["type"]]
    for name in names:
        if not re.fullmatch(rf"(\+[\w-]+|\d+)\.({'|'.join(types)})\.md", name):
            yield Finding(f"changelog.d/{name}", 1, name, f"+<words>.<type>.md with a type of {', '.join(types)}")


def check_test_names(names: list[str]) -> Iterator[Finding]:
    """Yield the names without a subject, and one finding if the 90th percentile of the lengths is above the bound."""
    for name in names:
        if TEST_NAME_WORDS.search(name):
            yield Finding("tests", 1, name, "name the unit and its behaviour: test_<unit>_<expected behaviour>")
    lengths = sorted(map(len, names))
    percentile = lengths[len(lengths) * 9 // 10] if lengths else 0
    if percentile > TEST_NAME_LENGTH:
        text = f"{percentile} characters at the 90th percentile of test names"
        yield Finding("tests", 1, text, f"at most {TEST_NAME_LENGTH}: test_<unit>_<expected behaviour>")


def check_page(path: str, text: str) -> list[Finding]:
    """Return all findings of a page."""
    checks = (check_prose, check_lines, check_format, check_links)
    return sorted((finding for check in checks for finding in check(path, text)), key=lambda finding: finding.line)


def pages() -> list[str]:
    """Return the pages that are checked."""
    every = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "changelog.d").glob("*.md")]
    return sorted({str(path.relative_to(ROOT)) for path in every} - GENERATED)


def code_files() -> list[str]:
    """Return the code files whose prose is checked."""
    files = (path for name in CODE for path in ([ROOT / name] if (ROOT / name).is_file() else (ROOT / name).rglob("*")))
    names = {str(path.relative_to(ROOT)) for path in files if path.is_file() and code_prose.is_checked(path.name)}
    return sorted(name for name in names - NOT_PROSE if "/openapi.json" not in name)


def test_names() -> list[str]:
    """Return the names of the test functions."""
    trees = (ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("test_*.py"))
    functions = (node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return [function.name for function in functions if function.name.startswith("test_")]


def main() -> None:
    """Check the pages and the names, or wrap the pages with `--write`."""
    parser = argparse.ArgumentParser(prog="python -m local.prose", description=__doc__)
    parser.add_argument("--write", action="store_true", help="wrap the pages")
    parser.add_argument("pages", nargs="*", help="pages to check; all pages by default")
    arguments = parser.parse_args()
    texts = {name: (ROOT / name).read_text() for name in arguments.pages or pages()}
    if arguments.write:
        for name, text in texts.items():
            (ROOT / name).write_text(wrapped(text))
        return
    findings = [finding for name, text in texts.items() for finding in check_page(name, text)]
    if not arguments.pages:
        for name in sorted(GENERATED):
            text = (ROOT / name).read_text()
            findings += [*check_prose(name, text), *check_links(name, text)]
        decisions = sorted(path.name for path in (ROOT / "docs" / "adr").glob("[0-9]*.md"))
        findings += check_decisions((ROOT / "docs" / "adr" / "README.md").read_text(), decisions)
        findings += check_fragments(sorted(path.name for path in (ROOT / "changelog.d").iterdir()))
        findings += check_test_names(test_names())
        findings += [finding for name in code_files() for finding in check_code(name, (ROOT / name).read_text())]
    print(*findings, sep="\n", end="\n" if findings else "")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
