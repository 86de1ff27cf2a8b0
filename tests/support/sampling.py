"""Which part of a large set a run of the tests tries: another one for each QAES_SEED; with QAES_FUZZ all of it."""

from __future__ import annotations

import os
import random
from typing import Any

SEED = int(os.environ.get("QAES_SEED", "1"))
WHOLE = bool(os.environ.get("QAES_FUZZ"))


def sample(items: list[Any], count: int, salt: str = "") -> list[Any]:
    """Return `count` of the items, chosen by the seed and `salt`; in `make fuzz` all of them, in their order."""
    if WHOLE or count >= len(items):
        return items
    return random.Random(f"{SEED} {salt}").sample(items, count)  # noqa: S311 - a sample that is the same each time
