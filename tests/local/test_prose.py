"""The prose check finds what it is for, and accepts plain English."""

from __future__ import annotations

import pytest

from local import prose

GOOD = """# What the verifier checks

Who may approve a transfer? Any approver except the requester. The recorder stores the entry, and
the state machine returns `what`. The approver who decides sees the plan.

| action | What changes |
| -- | -- |
| `under_way` | a table has no limit of length, so that this row may be longer than one hundred characters are |

- [What the verifier checks](#what-the-verifier-checks)
- [a line that is one link has no limit](https://example.com/a/very/long/address/that/cannot/be/wrapped/anywhere)
"""
BAD = {
    "headless subject": "Who has a token decides.",
    "headless subject after a colon": "It holds: What was signed is stored.",
    "whoever": "It is sent by whoever comes.",
    "whatever": "It ends, whatever happens.",
    "headless object": "The role of who asked counts.",
    "headless thing": "The table holds the hash of what was sent.",
    "headless complement": "The hash is what the ledger has.",
    "none": "The plan is stored if there is none.",
    "own": "The log is an API of its own.",
    "component that tells": "The verifier tells the network.",
    "component that looks": "The reconciler then looks at the index.",
    "passive tell": "The metric is told each minute.",
    "tell without object": "A number tells whether it ran.",
    "glossary": "The transfer is under way.",
}


def test_check_page_accepts_plain_english() -> None:
    assert prose.check_page("page.md", GOOD) == []


@pytest.mark.parametrize("text", BAD.values(), ids=BAD)
def test_check_page_reports_banned_construction(text: str) -> None:
    [finding] = prose.check_page("page.md", f"# Page\n\n{text}\n")
    assert (finding.path, finding.instead != "") == ("page.md", True)
    assert str(finding).startswith(f"page.md:{finding.line}: ")


def test_check_page_reports_the_line_of_a_wrapped_sentence() -> None:
    [finding] = prose.check_page("page.md", "# Page\n\nA line.\nIt is sent by\nwhoever comes.\n")[1:]
    assert (finding.line, finding.text) == (5, "whoever")


def test_check_page_reports_long_line_and_other_wrapping() -> None:
    findings = prose.check_page("page.md", f"# Page\n\n{'word ' * 30}\n")
    assert {finding.line for finding in findings} == {3}
    assert [finding.text for finding in findings] == ["150 characters", "not as mdformat writes it"]


def test_wrapped_keeps_tables_code_and_list_numbers() -> None:
    text = "1. one\n2. two\n\n| a | b |\n| -- | -- |\n| 1 | 2 |\n\n```bash\nmake  up\n```\n"
    assert prose.wrapped(text) == text


def test_check_test_names_reports_long_names() -> None:
    short, long = "t" * prose.TEST_NAME_LENGTH, "t" * (prose.TEST_NAME_LENGTH + 1)
    assert not list(prose.check_test_names([short] * 91 + [long] * 9))
    assert list(prose.check_test_names([short] * 89 + [long] * 11))


@pytest.mark.parametrize(
    "name", ["test_what_is_sent", "test_report_says_more", "test_view_of_what_is_sent", "test_it_ends"]
)
def test_check_test_names_reports_names_without_subject(name: str) -> None:
    assert not list(prose.check_test_names(["test_whole_item_is_read", "test_caller_who_retries_is_refused"]))
    assert [finding.text for finding in prose.check_test_names(["test_a", name])] == [name]


def test_check_links_reports_missing_file_and_heading() -> None:
    good = "# Page\n\n[b](glossary.md#glossary) [c](https://example.com/x)\n"
    assert not list(prose.check_links("docs/page.md", good))
    bad = "# Page\n\n[a](#other) [b](glossary.md#other) [c](missing.md)\n"
    findings = list(prose.check_links("docs/page.md", bad))
    assert [finding.text for finding in findings] == ["#other", "glossary.md#other", "missing.md"]


def test_check_decisions_reports_decision_without_row() -> None:
    [finding] = prose.check_decisions("| [1](0001-a.md) |", ["0001-a.md", "0002-b.md"])
    assert finding.text == "0002-b.md"


def test_every_page_that_is_left_out_exists() -> None:
    assert all((prose.ROOT / page).is_file() for page in prose.GENERATED)


def test_pages_are_checked() -> None:
    assert "docs/adr/0001-orchestrate-do-not-chain.md" in prose.pages()
