"""A browser, and one local cloud whose pages it opens (`make browser`)."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import pytest

from local.cloud import Cloud

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",  # or root, as in a container, cannot start it; it opens nothing but the pages of this repository
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
PHONE, DESKTOP = (390, 844), (1280, 800)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "/tests/browser/" in item.path.as_posix():
            item.add_marker(pytest.mark.browser)
            if CHROMIUM is None:
                item.add_marker(pytest.mark.skip(reason="there is no chromium here (Debian: apt install chromium)"))


@pytest.fixture(scope="session")
def local_cloud() -> Iterator[Cloud]:
    cloud = Cloud(f"browser-{os.getpid()}", progress=lambda _: None)
    with cloud:
        yield cloud
    cloud.remove_directory()


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        it = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, headless=True)
        yield it
        it.close()


@dataclass
class Opened:
    """A page as it was opened, with all that the browser complained about."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)  # that were answered
    headers: dict[str, str] = field(default_factory=dict)


Open = Callable[..., Opened]


@pytest.fixture
def open_page(browser: Browser, local_cloud: Cloud) -> Iterator[Open]:
    """Open a path of the API in a new window, of a phone's width or a desktop's, light or dark."""
    with ExitStack() as windows:

        def open_it(path: str, size: tuple[int, int] = DESKTOP, scheme: Literal["light", "dark"] = "light") -> Opened:
            width, height = size
            context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
            windows.callback(context.close)
            opened = Opened(context.new_page())
            opened.page.on("console", lambda message: opened.complaints.append(f"{message.type}: {message.text}"))
            opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
            opened.page.on("requestfailed", lambda request: opened.complaints.append(f"failed: {request.url}"))
            opened.page.on("requestfinished", lambda request: opened.requests.append(request.url))
            answer = opened.page.goto(f"{local_cloud.url}{path}")
            assert answer is not None
            assert answer.status == 200
            opened.headers = dict(answer.headers)
            return opened

        yield open_it


def javascript(page: Page, program: str, *arguments: Any) -> Any:
    """Evaluate in the page; the browser's own tools are not bound by the page's policy."""
    return page.evaluate(program, *arguments)
