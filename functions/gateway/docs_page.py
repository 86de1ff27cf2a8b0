# ruff: noqa: E501 - HTML
"""HTML page of the API's document, without scripts and external resources."""

from __future__ import annotations

import json
import re
from functools import cache
from html import escape
from pathlib import Path
from typing import Any

Document = dict[str, Any]

STYLE = """
:root{color-scheme:light dark}
body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#1b1f24;background:#fff}
h1{line-height:1.2}h2{margin-top:3rem;border-bottom:1px solid #d0d7de}article{margin:2rem 0;padding:0 0 .5rem}
h3{font-size:1.05rem;margin-bottom:.2rem}h3 b{display:inline-block;min-width:3.2rem}h4{font-size:1rem;font-weight:600;margin:1rem 0 .3rem}
code,pre{font:13px/1.45 ui-monospace,monospace}code{overflow-wrap:anywhere}
pre{background:#f6f8fa;padding:.8rem;margin:0;border-radius:6px;white-space:pre-wrap;overflow-wrap:anywhere}
table{border-collapse:collapse;width:100%}
td,th{text-align:left;vertical-align:top;font-weight:400;padding:.25rem .8rem .25rem 0;border-bottom:1px solid #eaeef2}
th{width:9rem}a{color:#0550ae}summary{cursor:pointer;margin:.4rem 0}.role{color:#57606a}nav a{margin-right:1rem}
ul{padding-left:1.2rem}:focus-visible{outline:2px solid #0550ae;outline-offset:2px}
@media(prefers-color-scheme:dark){body{background:#0d1117;color:#e6edf3}pre{background:#161b22}a{color:#58a6ff}
h2,td,th{border-color:#30363d}.role{color:#8b949e}:focus-visible{outline-color:#58a6ff}}
"""


@cache
def page(file: Path) -> str:
    """Render the document in the file, once for each process."""
    return html_of(json.loads(file.read_text()))


def html_of(found: Document) -> str:
    """Render a document."""
    sections = [*(tag["name"] for tag in found["tags"]), "schemas"]
    errors = found["components"]["responses"]
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">',
        f'<title>{escape(found["info"]["title"])}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body>',
        f"<header><h1>{escape(found['info']['title'])}</h1><p>{escape(found['info']['description'])}</p>",
        '<p><a href="openapi.json">openapi.json</a>, the document for programs.</p></header><nav aria-label="Services">',
        *(f'<a href="#{name}">{_words(name)}</a>' for name in sections),
        "</nav><main>",
    ]
    for tag in found["tags"]:
        operations = [
            (path, method, operation)
            for path, methods in found["paths"].items()
            for method, operation in methods.items()
            if tag["name"] in operation["tags"]
        ]
        parts.append(
            f'<section id="{tag["name"]}"><h2>{_words(tag["name"])}</h2><p>{_text(tag["description"])}</p><ul>'
        )
        parts += [
            f'<li><a href="#{escape(operation["operationId"])}"><code>{method.upper()} {escape(path)}</code></a></li>'
            for path, method, operation in operations
        ]
        parts.append("</ul>")
        parts += [_article(path, method, operation, errors) for path, method, operation in operations]
        parts.append("</section>")
    parts.append('<section id="schemas"><h2>Schemas</h2>')
    for name, schema in found["components"]["schemas"].items():
        parts.append(
            f'<details id="{escape(name)}"><summary><code>{escape(name)}</code></summary>{_json(schema)}</details>'
        )
    parts.append("</section></main></body></html>\n")
    return "\n".join(parts)


def _article(path: str, method: str, operation: Document, errors: Document) -> str:
    summary, _, roles = operation["description"].partition("\n\nRoles: ")
    parts = [
        f'<article id="{escape(operation["operationId"])}"><h3><b>{method.upper()}</b> <code>{escape(path)}</code></h3>'
    ]
    parts.append(
        f"<p>{_text(summary)}</p><p class=role>{escape((roles and f'Roles: {roles}') or 'No token needed.')}</p>"
    )
    if parameters := operation.get("parameters"):
        rows = "".join(
            f"<tr><th scope=row><code>{escape(parameter['name'])}</code></th><td>{escape(parameter['in'])}"
            f"{', required' if parameter['required'] else ''}</td><td>{_text(parameter.get('description', ''))}</td></tr>"
            for parameter in parameters
        )
        parts.append(f"<h4>Parameters</h4><table>{rows}</table>")
    if body := operation.get("requestBody"):
        content = body["content"]["application/json"]
        parts.append(f"<h4>Request</h4>{_json(content['example'])}" if "example" in content else "")
    [(status, answer)] = [item for item in operation["responses"].items() if item[0].startswith("2")]
    [(kind, content)] = answer["content"].items()
    parts.append(f"<h4>Answer {status}</h4>{_answer(kind, content)}")
    rows = "".join(
        f"<tr><th scope=row>{status}</th><td>{_text(errors.get(status, answer)['description'])}</td></tr>"
        for status, answer in operation["responses"].items()
        if not status.startswith("2")
    )
    parts.append(f"<details><summary>Errors</summary><table>{rows}</table></details></article>")
    return "\n".join(parts)


def _words(name: str) -> str:
    return escape(name.replace("_", " ").capitalize())


def _text(text: str) -> str:
    """Return plain text as HTML, with text in backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _answer(kind: str, content: Document) -> str:
    """Return the response's example, with a placeholder for bytes."""
    if kind == "application/json":
        return _json(content["example"])
    return f"<pre>{escape(str(content.get('example', f'({kind})')))}</pre>"


def _json(value: Any) -> str:
    return f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre>"
