"""The local proxy as a browser uses it."""

from __future__ import annotations

from typing import Any

from local.cloud import Cloud
from tests.browser.conftest import Open, javascript

FETCH = """async ([path, options]) => {
  try { const answer = await fetch(path, options); return [answer.status, await answer.text()]; }
  catch (error) { return [0, String(error)]; }
}"""


def fetch(page: Any, path: str, **options: Any) -> tuple[int, str]:
    status, text = javascript(page, FETCH, [path, options])
    return status, text


def test_page_of_the_api_may_call_it(open_page: Open, local_cloud: Cloud) -> None:
    page = open_page("/openapi.json").page
    assert fetch(page, "/health")[0] == 200
    headers = {"Authorization": f"Bearer {local_cloud.token('requester')}", "Content-Type": "application/json"}
    task = '{"task_type": "monitor_wallet", "description": "watch", "wallet_address": "0x1234567890abcdef"}'
    status, text = fetch(page, "/task/start", method="POST", headers=headers, body=task)
    assert (status, "task_id" in text) == (202, True), text
    assert fetch(page, "/task/start", method="POST", body="x" * 11_000_000)[0] == 413


def test_page_of_another_origin_may_not_call_it(open_page: Open, local_cloud: Cloud) -> None:
    opened = open_page("/openapi.json")
    opened.page.goto("about:blank")
    status, error = fetch(opened.page, f"{local_cloud.url}/task/start", method="POST", body="{}")
    assert (status, "TypeError" in error) == (0, True)
    assert any("CORS" in complaint or "403" in complaint for complaint in opened.complaints)
