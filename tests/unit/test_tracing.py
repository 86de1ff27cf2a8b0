"""Coverage counts every line of the product that runs, and no other, even if a test removes the trace function."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from textwrap import dedent

import pytest

PRODUCT = """
def handle(call):
    before = 1
    answer = call(inner)
    if answer:
        after = 2
    else:
        never = 3
    return answer

def inner(fails=False):
    if fails:
        raise ValueError
    return 4

def uncalled():
    return 5
"""
MISSED = [7, 12, 16]
"""`never = 3`, `raise ValueError` and `return 5`: the lines that no case runs."""
AROUND = """
import json, sys, threading
from coverage import Coverage

coverage = Coverage(data_file=None, branch=True, include=["*/product.py"], config_file=False)
coverage.start()
import product
from tests.support.tracing import traced, untraced, untraced_threads
{case}
coverage.stop()
print(json.dumps(coverage.analysis2(product)[3]))
"""
CASES = {
    "in one thread": "product.handle(untraced(lambda call: traced(call)()))",
    "twice": "product.handle(untraced(lambda call: traced(call)() and traced(call)()))",
    "nested": "product.handle(untraced(lambda call: traced(product.handle)(untraced(lambda again: traced(again)()))))",
    "after an error": """
        def outside(call):
            raise KeyError
        def around(call):
            try:
                untraced(outside)(call)
            except KeyError:
                return traced(call)()
        product.handle(around)
    """,
    "in a thread of the package": """
        def outside():
            assert sys.gettrace() is None
            traced(product.handle)(lambda call: call())
            assert sys.gettrace() is None
            traced(product.handle)(lambda call: call())
        outside.__module__ = "moto.stepfunctions"
        with untraced_threads("moto"):
            thread = threading.Thread(target=outside)
            thread.start()
            thread.join()
    """,
    "in another thread": """
        with untraced_threads("moto"):
            thread = threading.Thread(target=product.handle, args=[lambda call: call()])
            thread.start()
            thread.join()
    """,
}


@pytest.mark.parametrize("case", CASES)
def test_tracing_misses_only_lines_that_did_not_run(case: str, tmp_path: Path) -> None:
    (tmp_path / "product.py").write_text(PRODUCT.removeprefix("\n"))
    script = AROUND.format(case=dedent(CASES[case]))
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    environment = os.environ | {"PYTHONPATH": path, "COVERAGE_CORE": "ctrace"}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout.splitlines()[-1]) == MISSED
