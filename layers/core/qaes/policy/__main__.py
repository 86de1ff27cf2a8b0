"""Check a policy file, and the decisions that it makes on the requests of a file of cases.

    python -m qaes.policy check policy.json cases.json

Exit status: 0 if every case is decided as expected, 1 if a case is not, 2 if a file cannot be used.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qaes.domain.errors import InvalidInputError
from qaes.domain.policy.cases import Case, Outcome, read_cases, run
from qaes.domain.policy.document import Policy, parse_strictly
from qaes.domain.policy.proposing import FUNCTION_PREFIX, read_policy


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m qaes.policy", description="Check a policy without AWS.")
    commands = parser.add_subparsers(dest="command", required=True)
    check = commands.add_parser("check", help="check a policy file, and the decisions that a file of cases expects")
    check.add_argument("policy", type=Path, help="a policy document, or the body of a proposal")
    check.add_argument("cases", type=Path, nargs="?", help="a file of cases; without it, only the policy is checked")
    check.add_argument("--function-prefix", default=FUNCTION_PREFIX, help="prefix of the names of Lambda handlers")
    chosen = parser.parse_args(arguments)
    try:
        policy = _read_policy(chosen.policy, chosen.function_prefix)
        cases = _read_cases(chosen.cases) if chosen.cases is not None else []
        outcomes = [run(policy, case) for case in cases]
    except _UnusableError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"{chosen.policy}: format {policy.format}, {_counted(policy)}")
    for outcome in outcomes:
        _report(outcome)
    failed = sum(not outcome.passed for outcome in outcomes)
    if outcomes:
        print(f"{len(outcomes)} cases: {len(outcomes) - failed} passed, {failed} failed")
    return 1 if failed else 0


class _UnusableError(Exception):
    """A file cannot be used; the message names the file and the field."""


def _read_policy(path: Path, prefix: str) -> Policy:
    try:
        return read_policy(parse_strictly(_text(path)), prefix)
    except InvalidInputError as error:
        raise _unusable(path, error) from error


def _read_cases(path: Path) -> list[Case]:
    try:
        return read_cases(parse_strictly(_text(path)))
    except InvalidInputError as error:
        raise _unusable(path, error) from error


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8")
    except OSError as error:
        raise _UnusableError(f"{path}: {error.strerror}") from error
    except UnicodeError as error:
        raise _UnusableError(f"{path}: is not UTF-8: {error}") from error


def _unusable(path: Path, error: InvalidInputError) -> _UnusableError:
    return _UnusableError(f"{path}: {error.field}: {error.message}" if error.field else f"{path}: {error.message}")


def _counted(policy: Policy) -> str:
    counts = {"rule": len(policy.rules), "action": len(policy.actions), "group": len(policy.groups)}
    return ", ".join(f"{count} {name}{'' if count == 1 else 's'}" for name, count in counts.items())


def _report(outcome: Outcome) -> None:
    print(f"{'ok  ' if outcome.passed else 'FAIL'}  {outcome.name}")
    for difference in outcome.differences:
        print(f"      {difference}")
    if outcome.differences:
        print(f"      decision: {outcome.reason}")


if __name__ == "__main__":
    sys.exit(main())
