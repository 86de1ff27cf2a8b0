"""The generated parts of the documentation, from the template and from the state machine's definition.

`python -m local.reference` writes them between their markers. With `--check` it changes nothing, and fails if a part is
not up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from local.environment import ROOT
from local.prose import wrapped
from local.template import parse

DEFINITION = ROOT / "statemachine" / "task_execution.asl.json"
_SUBSTITUTION = re.compile(r"(?<=: )\$\{\w+\}")
"""A number of the definition that the template substitutes."""

State = dict[str, Any]


def parameters(body: dict[str, Any]) -> str:
    """Return a table of the template's parameters."""
    lines = ["| parameter | default | meaning |", "| -- | -- | -- |"]
    for name, parameter in body["Parameters"].items():
        default = str(parameter.get("Default", ""))
        shown = f"`{default}`" if default else ""
        description = " ".join(str(parameter["Description"]).split()).replace("|", "\\|")
        lines.append(f"| `{name}` | {shown} | {description} |")
    return "\n".join(lines)


def state_machine(definition: dict[str, Any]) -> str:
    """Return a Mermaid chart of a definition; a dotted arrow is the branch of an error."""
    lines = ["flowchart TD", f"    start([start]) --> {_id(definition['StartAt'])}"]
    lines += _states(definition["States"], "    ")
    return "\n".join(["```mermaid", *lines, "```"])


def _states(states: dict[str, State], indent: str) -> Iterator[str]:
    for name, state in states.items():
        yield from _node(name, state, indent)
    for name, state in states.items():
        yield from _arrows(name, state, indent)


def _node(name: str, state: State, indent: str) -> Iterator[str]:
    if state["Type"] == "Map":
        yield f'{indent}subgraph {_id(name)}["{name}, one at a time"]'
        yield from _states(state["ItemProcessor"]["States"], indent + "    ")
        yield f"{indent}end"
        return
    left, right = {"Choice": ("{", "}"), "Fail": ("([", "])"), "Succeed": ("([", "])")}.get(state["Type"], ("[", "]"))
    waits = "<br/>waits" if str(state.get("Resource", "")).endswith(".waitForTaskToken") else ""
    yield f'{indent}{_id(name)}{left}"{name}{waits}"{right}'


def _arrows(name: str, state: State, indent: str) -> Iterator[str]:
    targets = [choice["Next"] for choice in state.get("Choices", [])]
    targets += [state[key] for key in ("Default", "Next") if key in state]
    for target in dict.fromkeys(targets):
        yield f"{indent}{_id(name)} --> {_id(target)}"
    caught: dict[str, list[str]] = {}
    for catch in state.get("Catch", []):
        caught.setdefault(catch["Next"], []).extend(catch["ErrorEquals"])
    for target, errors in caught.items():
        shown = "error" if "States.ALL" in errors else "<br/>".join(errors)
        yield f'{indent}{_id(name)} -. "{shown}" .-> {_id(target)}'


def _id(name: str) -> str:
    return re.sub(r"\W", "", name.replace("?", "Choice"))


def _definition() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(_SUBSTITUTION.sub("0", DEFINITION.read_text()))
    return parsed


PARTS: dict[str, tuple[str, Callable[[], str]]] = {
    "parameters": ("docs/configuration.md", lambda: parameters(parse(ROOT / "template.yaml"))),
    "state machine": ("docs/architecture.md", lambda: state_machine(_definition())),
}
"""The page of each part, and its text."""


def with_part(page: str, name: str, text: str) -> str:
    """Return a page with this text between the part's markers.

    Raises
    ------
    LookupError
        The page does not have these markers.
    """
    begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->\n"
    if begin not in page or end not in page:
        raise LookupError(f"the page has no markers for the part {name}")
    before, _, rest = page.partition(begin)
    return wrapped(f"{before}{begin}\n{text}\n\n{end}{rest.partition(end)[2]}")


def main() -> None:
    """Write the parts, or check them with `--check`."""
    parser = argparse.ArgumentParser(prog="python -m local.reference", description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, and fail if a part is not up to date")
    check = parser.parse_args().check
    old = []
    for name, (path, make) in PARTS.items():
        page = (ROOT / path).read_text()
        written = with_part(page, name, make())
        if page == written:
            continue
        old.append(f"{path}: the part '{name}' is not up to date: run make openapi")
        if not check:
            (ROOT / path).write_text(written)
    if check and old:
        print(*old, sep="\n", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
