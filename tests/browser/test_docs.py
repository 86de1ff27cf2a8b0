"""The page /docs as people see it: on a phone and on a desktop, light and dark, with a keyboard alone."""

from __future__ import annotations

import json
from itertools import pairwise

import pytest

from local.environment import ROOT
from tests.browser.conftest import DESKTOP, PHONE, Open, javascript

DOCUMENT = json.loads((ROOT / "docs" / "openapi.json").read_text())
OPERATIONS = [operation["operationId"] for path in DOCUMENT["paths"].values() for operation in path.values()]
EVERY_WINDOW = pytest.mark.parametrize(
    ("size", "scheme"),
    [(PHONE, "light"), (PHONE, "dark"), (DESKTOP, "light"), (DESKTOP, "dark")],
    ids=["phone", "phone, dark", "desktop", "desktop, dark"],
)
# WCAG 2.2, 1.4.3: the contrast of each text with its background; details are open, so that all text counts.
FAINT_TEXTS = """() => {
  const parts = (color) => color.match(/[\\d.]+/g).map(Number);
  const luminance = (color) => {
    const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const [r, g, b] = parts(color).map((v) => linear(v / 255));
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const color = getComputedStyle(e).backgroundColor;
      if (parts(color)[3] !== 0) return color;
    }
    throw new Error("nothing is behind it");
  };
  const found = [];
  document.querySelectorAll("details").forEach((each) => { each.open = true; });
  const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let read = 0;
  while (texts.nextNode()) {
    if (!texts.currentNode.data.trim()) continue;
    const element = texts.currentNode.parentElement;
    const [a, b] = [luminance(getComputedStyle(element).color), luminance(behind(element))];
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    read += 1;
    if (contrast < 4.5) found.push(`${element.tagName} ${texts.currentNode.data.slice(0, 40)} ${contrast.toFixed(2)}`);
  }
  return [read, found];
}"""


@EVERY_WINDOW
def test_page_is_readable(open_page: Open, size: tuple[int, int], scheme: str) -> None:
    page = open_page("/docs", size, scheme).page
    read, faint = javascript(page, FAINT_TEXTS)
    assert read > 20 * len(OPERATIONS)
    assert faint == []
    # With all its details open, nothing is wider than the window, nor than the box it is in.
    assert javascript(page, "document.documentElement.scrollWidth") <= size[0]
    cut = "[...document.querySelectorAll('body *')].filter((e) => e.scrollWidth > e.clientWidth + 1 && e.clientWidth)"
    assert javascript(page, f"{cut}.map((e) => e.tagName + ' ' + e.textContent.slice(0, 60))") == []
    assert javascript(page, "parseFloat(getComputedStyle(document.body).fontSize)") >= 16


def test_dark_is_dark(open_page: Open) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = (javascript(open_page("/docs", DESKTOP, scheme).page, background) for scheme in ("light", "dark"))
    assert (light, dark) == ("rgb(255, 255, 255)", "rgb(13, 17, 23)")


@EVERY_WINDOW
def test_browser_has_no_complaints_and_loads_nothing_else(open_page: Open, size: tuple[int, int], scheme: str) -> None:
    opened = open_page("/docs", size, scheme)
    opened.page.wait_for_load_state("networkidle")
    assert opened.complaints == []
    assert [url for url in opened.requests if not url.startswith("data:")] == [opened.page.url]


def test_script_that_came_into_the_page_would_not_run(open_page: Open) -> None:
    """The policy holds: not for a script in the page, nor for one or an image from elsewhere, nor for a form."""
    opened = open_page("/docs")
    javascript(
        opened.page,
        """() => {
          const add = (html) => document.body.append(document.createRange().createContextualFragment(html));
          add("<script>window.ran = true</script>");
          add("<script src='/docs'></script>");
          add("<img src='/health'>");
          add("<form action='/task/start' method=post><button>go</button></form>");
          document.querySelector("form button").click();
        }""",
    )
    opened.page.wait_for_timeout(300)
    assert javascript(opened.page, "window.ran") is None
    refused = [each for each in opened.complaints if "Content Security Policy" in each]
    assert len(refused) == 4, opened.complaints
    assert [url for url in opened.requests if not url.startswith("data:")] == [opened.page.url]


def test_headings_and_landmarks_are_those_of_a_document(open_page: Open) -> None:
    page = open_page("/docs").page
    levels = javascript(page, "[...document.querySelectorAll('h1,h2,h3,h4')].map((e) => Number(e.tagName[1]))")
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), "a level is left out"
    headings = "[...document.querySelectorAll('article > h3')].map((e) => e.parentElement.id)"
    assert sorted(javascript(page, headings)) == sorted(OPERATIONS)
    for landmark in ("header", "nav[aria-label]", "main"):
        assert page.locator(landmark).count() == 1, landmark
    assert javascript(page, "document.documentElement.lang") == "en"
    assert page.title() == DOCUMENT["info"]["title"]
    ids = javascript(page, "[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    targets = javascript(page, "[...document.querySelectorAll('a[href^=\"#\"]')].map((e) => e.hash.slice(1))")
    assert set(OPERATIONS) <= set(targets) <= set(ids)


def test_keyboard_is_enough(open_page: Open) -> None:
    """Tab moves the visible focus through the controls in page order; Enter follows a link and opens a section."""
    page = open_page("/docs").page
    usable = page.locator("a[href], summary").count()
    seen = []
    for _ in range(usable):
        page.keyboard.press("Tab")
        position, outline = javascript(
            page,
            """() => {
              const e = document.activeElement;
              const all = [...document.querySelectorAll("a[href], summary")];
              return [all.indexOf(e), getComputedStyle(e).outlineStyle];
            }""",
        )
        assert outline != "none", position
        seen.append(position)
    assert seen == list(range(usable))
    page.reload()
    page.locator("nav a").nth(1).focus()
    page.keyboard.press("Enter")
    assert page.url.endswith("#planner")
    page.locator("#create_plan summary").focus()
    page.keyboard.press("Enter")
    assert page.locator("#create_plan details").get_attribute("open") is not None


def test_document_for_programs_is_linked(open_page: Open) -> None:
    page = open_page("/docs").page
    page.get_by_role("link", name="openapi.json").click()
    page.wait_for_url("**/openapi.json")
    assert json.loads(page.locator("body").inner_text()) == DOCUMENT
