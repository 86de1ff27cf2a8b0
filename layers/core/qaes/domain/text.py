"""Rules for text that people read and decide by, and safe display of arbitrary text.

A character is rejected if it is invisible, reorders its surroundings or controls a terminal, unless a script or an
emoji needs it in its place. Guides: UTS 39, RFC 5892 appendix A (joiners), RFC 8264 (PRECIS). PRECIS' FreeformClass
does not fit: it rejects line breaks, and every emoji of several characters.

This module needs only the standard library: the authorizer imports it, and every request waits for the authorizer.
"""

from __future__ import annotations

import re
import sys
import unicodedata
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache

from qaes.domain.generated.unicode_tables import DEFAULT_IGNORABLE, EMOJI, PICTOGRAPHIC

MAX_SUBJECT_LENGTH = 256
SYSTEM_ACTORS = frozenset({"planner", "compliance", "worker", "execution", "reconciler", "ledger"})
"""Actors of the audit log that are parts of the system. No person may have such a name."""

_NONCHARACTERS = ((0xFDD0, 0xFDEF), *((plane << 16 | 0xFFFE, plane << 16 | 0xFFFF) for plane in range(17)))
_HIDDEN = (
    *DEFAULT_IGNORABLE,
    (0x7F, 0x9F),  # delete, and C1: some terminals treat U+009B as escape [
    (0x2028, 0x2029),  # line and paragraph separator
    (0xD800, 0xDFFF),  # surrogates
    (0xE000, 0xF8FF),  # private use: fonts display them in any form
    (0xFFF9, 0xFFFD),  # annotations, object replacement, replacement of bytes that are not UTF-8
    *_NONCHARACTERS,
    (0xF0000, 0xFFFFD),
    (0x100000, 0x10FFFD),
)


def _class_of(*ranges: tuple[int, int]) -> str:
    return "[" + "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges) + "]"


_ASCII_CONTROL = re.compile("[\x00-\x1f\x7f]")


@cache  # compiled for the first text outside ASCII: it takes ten milliseconds, and most requests do not need it
def _compiled(*ranges: tuple[int, int]) -> re.Pattern[str]:
    return re.compile(_class_of(*ranges))


def _suspects(text: str) -> re.Pattern[str]:
    """Return the pattern of the characters that are acceptable only in some places."""
    return _ASCII_CONTROL if text.isascii() else _compiled((0, 0x1F), *_HIDDEN)


def _is_in(letter: str, table: tuple[tuple[int, int], ...]) -> bool:
    at = bisect_right(table, (ord(letter), sys.maxunicode)) - 1 if letter else -1
    return at >= 0 and table[at][0] <= ord(letter) <= table[at][1]


_ZWNJ, _ZWJ, _KEYCAP, _BRAILLE_BLANK = "\u200c", "\u200d", "\u20e3", "\u2800"
_VIRAMA = 9
"""Canonical combining class of a virama."""


def flaw_of(text: str, *, lines: bool = True) -> str | None:
    """Return the reason why a text is rejected, with the character's code point; None if it is acceptable.

    Parameters
    ----------
    lines
        Whether the text may have several lines: line breaks (LF or CR LF) and tabs.
    """
    for found in _suspects(text).finditer(text):
        if not _is_in_place(text, found.start(), lines=lines):
            return f"contains {_named(found.group())}, which is invisible, reorders text or controls a terminal"
    return None


def is_blank(text: str) -> bool:
    """Return whether a reader would see nothing: spaces, marks without a letter, an empty Braille cell."""
    return all(unicodedata.category(letter)[0] in "ZCM" or letter == _BRAILLE_BLANK for letter in text)


def inert(text: str, *, lines: bool = False) -> str:
    r"""Return a text for a terminal or a log line, with each character that `flaw_of` rejects written as `\u{202E}`.

    With `lines`, line breaks and tabs stay unchanged. Use it for text that was stored before these rules, and for
    external text: a bundle, a log, a response of another system.
    """
    return _suspects(text).sub(
        lambda found: found.group() if _is_in_place(text, found.start(), lines=lines) else _escape(found.group()), text
    )


def json_inert(text: str) -> str:
    r"""Return the same JSON text with hidden characters written as `\uXXXX`. A parser reads the same value."""
    return _compiled(*_HIDDEN).sub(lambda found: _json_escape(found.group()), text)


def _escape(letter: str) -> str:
    return f"\\u{{{ord(letter):04X}}}"


def _json_escape(letter: str) -> str:
    data = letter.encode("utf-16-be", "surrogatepass").hex()
    return "".join(f"\\u{data[at : at + 4]}" for at in range(0, len(data), 4))


def _named(letter: str) -> str:
    name = unicodedata.name(letter, "")
    return f"U+{ord(letter):04X}" + (f" ({name.lower()})" if name else "")


def _is_in_place(text: str, at: int, *, lines: bool) -> bool:
    """Return whether a suspect character has a legitimate use in its place."""
    letter, before, after = text[at], text[at - 1 : at], text[at + 1 : at + 2]
    if letter in "\n\t\r":
        # A lone carriage return makes a terminal overwrite the line.
        return lines and (letter != "\r" or after == "\n")
    if letter == _ZWNJ:
        return _is_virama(before) or (_is_arabic(_base_before(text, at)) and _is_arabic(after))
    if letter == _ZWJ:
        return _is_virama(before) or (before.isalpha() and _is_virama(after)) or _joins_emoji(text, at)
    if letter in "\ufe0e\ufe0f":
        # After a digit it belongs to a keycap emoji, or hides in a number.
        return _is_in(before, EMOJI) and (before > "9" or after == _KEYCAP)
    if "\ufe00" <= letter <= "\ufe02" or "\U000e0100" <= letter <= "\U000e01ef":
        return unicodedata.name(before, "").startswith("CJK ") if before else False
    if "\u180b" <= letter <= "\u180f":
        return "\u1820" <= before <= "\u18aa"  # variants of Mongolian letters
    return False


def _is_virama(letter: str) -> bool:
    return letter != "" and unicodedata.combining(letter) == _VIRAMA


def _is_arabic(letter: str) -> bool:
    """Return whether a letter belongs to a joined script such as Arabic, where joiners change the visible form."""
    return letter != "" and unicodedata.bidirectional(letter) == "AL" and letter.isalpha()


def _base_before(text: str, at: int) -> str:
    while at > 0 and unicodedata.category(text[at - 1]) == "Mn" and text[at - 1] not in "\ufe0e\ufe0f":
        at -= 1
    return text[at - 1 : at]


def _joins_emoji(text: str, at: int) -> bool:
    before, after = text[at - 1 : at], text[at + 1 : at + 2]
    if before == "\ufe0f":
        begins = _is_in_place(text, at - 1, lines=False)
    else:
        begins = "\U0001f3fb" <= before <= "\U0001f3ff" or _is_in(before, PICTOGRAPHIC)
    return begins and _is_in(after, PICTOGRAPHIC)


# Subjects


def normal_subject(subject: str) -> str:
    """Return a token's subject in its normal form: NFC, without surrounding spaces.

    Raises
    ------
    ValueError
        The subject is empty, too long or the name of a part of the system, or has a character that is not printable:
        such subjects may look the same.
    """
    normal = unicodedata.normalize("NFC", subject).strip(" ")
    # `isprintable` rejects every space but U+0020, and accepts variation selectors and fillers.
    if not normal.isprintable() or _suspects(normal).search(normal) or is_blank(normal):
        raise ValueError("the subject must have printable characters only, and at least one")
    if len(normal) > MAX_SUBJECT_LENGTH:
        raise ValueError("the subject is too long")
    if normal in SYSTEM_ACTORS:
        raise ValueError("the subject must not be the name of a part of the system")
    return normal


def same_subject(one: str, other: str) -> bool:
    """Return whether two subjects belong to one person, so that the four-eyes rule rejects the second.

    Subjects are compared in NFC, without surrounding spaces, ignorable characters and Braille blanks: a subject that
    was recorded before subjects were normalised is the same person's. A look-alike letter of another script makes
    another subject.
    """
    return _comparable(one) == _comparable(other)


def _comparable(subject: str) -> str:
    visible = "".join(
        letter for letter in subject if letter != _BRAILLE_BLANK and not _is_in(letter, DEFAULT_IGNORABLE)
    )
    return unicodedata.normalize("NFC", visible).strip()


def subject_note(subject: str) -> str | None:
    """Return a warning for a reader if the subject has letters outside ASCII, which may look like others, or None."""
    foreign = list(dict.fromkeys(letter for letter in subject if not " " <= letter <= "~"))
    if not foreign:
        return None
    scripts = sorted(set(_scripts(subject)))
    mixed = f"mixes scripts ({', '.join(scripts)}); " if len(scripts) > 1 else ""
    shown = ", ".join(f"U+{ord(letter):04X} {unicodedata.name(letter, 'unnamed')}" for letter in foreign[:5])
    more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
    return f"This subject {mixed}has letters outside ASCII, which may look like others: {shown}{more}."


def _scripts(text: str) -> Iterator[str]:
    """Yield each letter's script, the first word of its Unicode name: the standard library has no script property."""
    for letter in text:
        if letter.isalpha():
            yield unicodedata.name(letter, "UNNAMED").split()[0]
