"""Safe display of external text on the terminal: descriptions, reasons, results, log lines.

The programs of this folder run without the layer on their path. Only this module adds it.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "layers" / "core"))

from qaes.domain.text import inert

__all__ = ["inert"]
