from __future__ import annotations

import subprocess
import sys

from tests.support import template

PROGRAM = "from local.demo import _short; print(_short({'description': 'a\\u202eb\\x1b[2J'}), _short('x\\x9b\\u200b'))"


def test_demo_prints_text_of_others_inert() -> None:
    found = subprocess.run(
        [sys.executable, "-c", PROGRAM], cwd=template.ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == '{"description": "a\\u{202E}b\\u001b[2J"} x\\u{009B}\\u{200B}\n'
