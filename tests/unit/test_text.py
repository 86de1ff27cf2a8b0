"""Deceptive text is refused; ordinary text in any script, with emoji and line breaks, is accepted."""

# ruff: noqa: RUF001 - letters that look like others are what this is about
from __future__ import annotations

import json
import subprocess
import sys
import unicodedata

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st

from local.unicode_tables import OUTPUT, table
from qaes.domain.text import (
    SYSTEM_ACTORS,
    flaw_of,
    inert,
    is_blank,
    json_inert,
    normal_subject,
    same_subject,
    subject_note,
)

DECEPTIVE = {
    "bytes that are not UTF-8": "a\ufffdb",
    "a right-to-left override": "pay \u202e05\u202c QU",
    "an isolate": "\u2066x\u2069",
    "a right-to-left mark": "a\u200fb",
    "an Arabic letter mark": "a\u061cb",
    "a zero-width space": "\u200b",
    "a zero-width space between letters": "a\u200bb",
    "a word joiner": "a\u2060b",
    "a byte order mark": "\ufeffa",
    "a soft hyphen": "in\u00advoice",
    "a grapheme joiner": "a\u034fb",
    "a Hangul filler": "\u3164",
    "a halfwidth filler": "a\uffa0",
    "a NUL": "a\0b",
    "an escape sequence": "\x1b[2J",
    "a C1 control": "a\x9b2Jb",
    "a backspace": "500\x08\x08\x085",
    "a delete": "a\x7f",
    "a carriage return alone": "good\rbad",
    "a vertical tab": "a\x0bb",
    "a next line": "a\x85b",
    "a line separator": "a\u2028b",
    "a paragraph separator": "a\u2029b",
    "tags that spell a word": "\U0001f3f4\U000e0067\U000e0062\U000e007f",
    "hidden variation selectors": "a\ufe0f",
    "bytes in variation selectors": "😀\U000e0101\U000e0102",
    "two variation selectors": "❤\ufe0f\ufe0f",
    "a selector after a digit": "1\ufe0f00",
    "a joiner between Latin letters": "a\u200db",
    "a non-joiner between Latin letters": "a\u200cb",
    "a lone joiner": "\u200d",
    "a joiner after an emoji at the end": "👩\u200d",
    "a private-use character": "a\ue000",
    "a noncharacter": "a\ufdd0",
    "a surrogate": "a\ud800",
    "an annotation": "\ufff9a\ufffab\ufffb",
    "a musical control": "\U0001d173",
}
HONEST = {
    "lines": "first\nsecond\r\n\tthird\n",
    "Arabic": "ادفع الفاتورة رقم ٤٧١١",
    "Persian with a non-joiner": "می\u200cخواهم",
    "Persian with a mark before it": "نامهٔ\u200cای",
    "Hebrew": "שלם את החשבון 4711",
    "Devanagari": "चालान का भुगतान करें",
    "Devanagari with a joiner": "क्\u200dष",
    "Devanagari with a non-joiner": "क्\u200cष",
    "Bengali with a joiner before the virama": "র\u200d্যাব",
    "Sinhala": "ශ්\u200dරී",
    "Mongolian with a variant": "ᠠ\u180bᠪ",
    "Chinese": "支付发票四七一一",
    "a Japanese name with a variant": "葛\U000e0100城",
    "Korean": "송장 지불",
    "Thai": "ชำระใบแจ้งหนี้",
    "Greek": "πληρωμή",
    "decomposed": "re\u0301sume\u0301",
    "a family": "👩\u200d👩\u200d👧\u200d👦",
    "a skin tone": "👩🏽\u200d🚀",
    "a heart": "❤\ufe0f",
    "a heart on fire": "❤\ufe0f\u200d🔥",
    "a rainbow flag": "🏳\ufe0f\u200d🌈",
    "a keycap": "1\ufe0f\u20e3",
    "a country's flag": "🇨🇭",
    "signs": "©\ufe0f ™\ufe0f ✔\ufe0e €5 – “so” …",
}


@pytest.mark.parametrize("text", DECEPTIVE.values(), ids=DECEPTIVE)
def test_text_refused_and_shown_inert_when_deceptive(text: str) -> None:
    flaw = flaw_of(text)
    assert flaw is not None and "U+" in flaw and flaw.isprintable()
    shown = inert(text)
    assert flaw_of(shown, lines=False) is None
    assert not regex.search(r"[\p{Cc}\p{Bidi_Control}]", shown)


@pytest.mark.parametrize("text", HONEST.values(), ids=HONEST)
def test_text_accepted_in_any_script(text: str) -> None:
    assert flaw_of(text) is None
    assert inert(text, lines=True) == text
    assert not is_blank(text)


def test_text_without_lines_refuses_them() -> None:
    for text in ("a\nb", "a\tb", "a\r\nb"):
        assert flaw_of(text, lines=False) is not None
        assert "\n" not in inert(text) and "\t" not in inert(text)


@pytest.mark.parametrize("text", ["", "  ", "\u00a0\u3000", "\n\t", "\u2800\u2800", "\u0301", "\u2003\u0301"])
def test_text_is_blank_when_nothing_is_seen(text: str) -> None:
    assert is_blank(text)


@given(st.text(st.characters()))
def test_inert_text_is_accepted_and_stays_itself(text: str) -> None:
    shown = inert(text)
    assert flaw_of(shown, lines=False) is None
    assert (shown == text) == (flaw_of(text, lines=False) is None)


@given(st.recursive(st.text(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5))
def test_json_inert_is_the_same_value(value: object) -> None:
    text = json_inert(json.dumps(value, ensure_ascii=False))
    assert json.loads(text) == value
    assert not regex.search(r"[\p{Default_Ignorable_Code_Point}\p{Bidi_Control}\x7f-\x9f]", text)


@given(st.characters(categories=["Cc", "Cf", "Mn", "Lo"]))
def test_no_ignorable_character_is_accepted_alone(letter: str) -> None:
    if regex.match(r"\p{Default_Ignorable_Code_Point}|\p{Bidi_Control}", letter):
        assert flaw_of(f"a{letter}b") is not None


def test_tables_match_the_character_database() -> None:
    assert OUTPUT.read_text() == table()


LOOK_ALIKES = (
    "bob ", " bob", "bob\ufe0f", "bo\u034fb", "bob\u200b", "\u2060bob", "bob\u3164", "bo\u00adb", "bob\u2800",
)  # fmt: skip


@pytest.mark.parametrize("look_alike", LOOK_ALIKES)
def test_subject_is_one_person_when_it_looks_the_same(look_alike: str) -> None:
    assert same_subject("bob", look_alike) and same_subject(look_alike, "bob")


def test_subjects_differ_by_letter_case_and_script() -> None:
    assert same_subject("jos\u00e9", "jose\u0301")
    for other in ("Bob", "b\u043eb", "bobby", "bob 2", "b ob"):
        assert not same_subject("bob", other)


def test_subject_is_normalised() -> None:
    assert normal_subject("  jose\u0301 ") == "jos\u00e9"
    assert normal_subject("auth0|5f7c8ec7c33c6c004bbafe82") == "auth0|5f7c8ec7c33c6c004bbafe82"
    assert normal_subject("Ольга Иванова") == "Ольга Иванова"


@pytest.mark.parametrize(
    "subject",
    ["", " ", "\u3000", "\u00a0bob", "bob\n", "bob\0", "bob\ufe0f", "b\u202eob", "\u200b", "\u3164", "❤\ufe0f",
     "می\u200cخ", "\u2800", "\u0301", "a\ud800", "a" * 257, "bo\u2009b", " execution ", *sorted(SYSTEM_ACTORS)],
)  # fmt: skip
def test_subject_refused_when_it_names_no_person(subject: str) -> None:
    with pytest.raises(ValueError, match="subject"):
        normal_subject(subject)


@given(st.text())
def test_normalised_subject_is_unchanged(text: str) -> None:
    try:
        subject = normal_subject(text)
    except ValueError:
        return
    assert normal_subject(subject) == subject == unicodedata.normalize("NFC", subject)
    assert same_subject(subject, text)


def test_subject_note_names_foreign_letters() -> None:
    assert subject_note("alice@example.com") is None
    note = subject_note("\u0430lice")
    assert note is not None and "U+0430 CYRILLIC SMALL LETTER A" in note and "mixes scripts (CYRILLIC, LATIN)" in note
    assert note.isascii()
    accent = subject_note("jos\u00e9")
    assert accent is not None and "mixes scripts" not in accent
    many = subject_note("Ольга Иванова")
    assert many is not None and "more" in many


def test_module_needs_the_standard_library_alone() -> None:
    """The authorizer imports it, and every request waits for the authorizer."""
    program = "import sys, qaes.domain.text; print([m for m in ('pydantic', 'regex', 'boto3') if m in sys.modules])"
    found = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": "layers/core"}, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "[]"
