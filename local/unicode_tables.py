"""Generate the Unicode tables of `qaes.domain.generated` from the `regex` package, which ships the character database.

`python -m local.unicode_tables` writes the file; a test compares it with the text that `table` returns. The functions
import the generated file instead of `regex`: it loads in a millisecond, and the layer has one dependency less.
"""

from __future__ import annotations

import sys
from pathlib import Path

OUTPUT = Path(__file__).parents[1] / "layers/core/qaes/domain/generated/unicode_tables.py"
PROPERTIES = {
    "DEFAULT_IGNORABLE": "Default_Ignorable_Code_Point",
    "EMOJI": "Emoji",
    "PICTOGRAPHIC": "Extended_Pictographic",
}
HEADER = '''"""Inclusive ranges of code points by Unicode property. `python -m local.unicode_tables` generates this file."""
'''


def ranges(property_: str) -> list[tuple[int, int]]:
    """Return the code points that have a Unicode property, as inclusive ranges."""
    import regex

    has_it = regex.compile(rf"\p{{{property_}}}")
    found: list[tuple[int, int]] = []
    for point in range(sys.maxunicode + 1):
        if has_it.match(chr(point)):
            if found and found[-1][1] == point - 1:
                found[-1] = (found[-1][0], point)
            else:
                found.append((point, point))
    return found


def table() -> str:
    """Return the text of the generated module."""
    parts = [HEADER]
    for name, property_ in PROPERTIES.items():
        lines = [f"    (0x{first:04X}, 0x{last:04X}),\n" for first, last in ranges(property_)]
        parts.append(f"\n{name} = (\n{''.join(lines)})\n")
    return "".join(parts)


if __name__ == "__main__":
    OUTPUT.write_text(table())
