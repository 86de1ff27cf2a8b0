# ruff: noqa: E501 - Markdown
"""The API's one document (OpenAPI 3.1), generated from the services' code, and the guide that is made of it.

`python -m local.openapi` writes functions/gateway/openapi.json and docs/api.md; with `--check` it only says whether they
are what the code says.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from typing import TYPE_CHECKING, Any

from local.environment import ROOT
from local.openapi_examples import EXAMPLES
from qaes import VERSION

if TYPE_CHECKING:
    from fastapi import FastAPI

SERVICES = {
    "gateway": "Tasks: start, list, see, decide, cancel, retry.",
    "planner": "Plans, without executing them.",
    "agent_runtime": "How far a task's execution is.",
    "audit": "The trail, and its verification.",
    "qubic": "The policy and the ledger.",
    "worker": "Runs the steps.",
}
DOCUMENT = "functions/gateway/openapi.json"
"""What the gateway serves; docs/openapi.json is a link to it."""
GUIDE = "docs/api.md"
PROBLEM = "application/problem+json"
JSON, OCTETS = "application/json", "application/octet-stream"
DESCRIPTION = (
    "Let AI agents and automations act with money and data: tasks are planned under a policy, approved by people, "
    "executed step by step and audited. Errors are problems (RFC 9457). Amounts are whole QU."
)
ERRORS = {
    "400": "The body is not JSON, or the request cannot be read.",
    "401": "No valid bearer token.",
    "403": "The caller's roles do not allow it, or it is the caller's own task, or one that they had run again; or only a person may do it, and an agent calls.",
    "404": "There is no such thing, or the caller may not see it.",
    "409": "The present state does not allow it; `task_status` says what it is.",
    "413": "The body is too large; or the bundle, to be sent.",
    "415": "The body is not application/json.",
    "422": "A field is not acceptable; `errors` names it.",
    "429": "Too many requests, or too many open tasks; `Retry-After` says when to come back.",
    "500": "The service failed; the correlation id finds the reason in its log.",
    "503": "A part of the service does not answer; `Retry-After` says when to come back.",
}

Document = dict[str, Any]


NOT_FOUND_WITHOUT_AN_ID = {"/plan/create", "/audit/log/checkpoint", "/audit/log/consistency", "/log/checkpoint"}
"""They name a task in the body, or the log that may not be there, or not so long, yet."""


def document() -> Document:
    """Merge the services' documents.

    Raises
    ------
    LookupError
        A route does not say who may call it, or has no example.
    ValueError
        Two services mean different things by one name.
    """
    paths: Document = {}
    schemas: Document = {"Problem": problem_schema()}
    for service in SERVICES:
        app: FastAPI = importlib.import_module(f"{service}.api").app
        found = app.openapi()
        for name, schema in found.get("components", {}).get("schemas", {}).items():
            if schemas.setdefault(name, schema) != schema:
                raise ValueError(f"{name} of {service} is not what another service calls {name}")
        for path, operations in found["paths"].items():
            paths[path] = {}
            for method, operation in operations.items():
                paths[path][method] = _operation(app, service, path, method, operation)
    _add_links(paths, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Qubic Autonomous Execution System",
            "version": VERSION,
            "description": DESCRIPTION,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/", "description": "the local cloud"}, {"url": "/v1", "description": "the stage on AWS"}],
        "security": [{"token": []}],
        "tags": [{"name": service, "description": text} for service, text in SERVICES.items()],
        "paths": dict(sorted(paths.items())),
        "components": {
            "schemas": dict(sorted(schemas.items())),
            "responses": {
                status: {
                    "description": text,
                    "content": {PROBLEM: {"schema": {"$ref": "#/components/schemas/Problem"}}},
                }
                for status, text in ERRORS.items()
            },
            "securitySchemes": {
                "token": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT", "description": "RS256 or ES256"}
            },
        },
    }


def problem_schema() -> Document:
    """Return the schema of every error."""
    from qaes.adapters.http import PROBLEM_SCHEMA

    return PROBLEM_SCHEMA | {"title": "Problem", "description": "An error (RFC 9457)."}


def _operation(app: FastAPI, service: str, path: str, method: str, operation: Document) -> Document:
    from fastapi.routing import APIRoute

    from qaes.adapters.http import is_deciding, roles_of

    [route] = [
        route
        for route in app.routes
        if isinstance(route, APIRoute) and route.path == path and method.upper() in (route.methods or ())
    ]
    roles = roles_of(route)
    name = route.operation_id or route.name
    done: Document = {"operationId": name, "tags": [service], "summary": route.name.replace("_", " ")}
    done["description"] = operation.get("description", "")
    if roles is None:
        done["security"] = []
    else:
        done["x-roles"] = list(roles)
        if is_deciding(route):
            done["x-deciding"] = True
            done["description"] += " For people alone: an agent's token gets 403."
        done["description"] += f"\n\nWho may: {', '.join(roles)}."
    for key in ("parameters", "requestBody"):
        if key in operation:
            done[key] = _plain(operation[key])
    responses = {status: answer for status, answer in operation["responses"].items() if status != "default"}
    for status in _errors(path, method, operation, secured=roles is not None):
        responses.setdefault(status, {"$ref": f"#/components/responses/{status}"})
    done["responses"] = dict(sorted(_plain(responses).items()))
    _add_examples(done, name)
    return done


def _errors(path: str, method: str, operation: Document, *, secured: bool) -> list[str]:
    """The errors that such an operation can answer with."""
    found = ["429", "500"]
    found += ["401", "403", "503"] if secured else []
    found += ["400", "413", "415", "422"] if "requestBody" in operation else []
    found += ["413"] if path.endswith("/bundle") else []
    found += ["422"] if operation.get("parameters") else []
    found += ["404"] if "{" in path or path in NOT_FOUND_WITHOUT_AN_ID else []
    names = {parameter["name"] for parameter in operation.get("parameters", [])}
    found += ["409"] if "Idempotency-Key" in names or (method == "post" and path.startswith("/policy")) else []
    return [*found, "400"] if secured else found


def _plain(value: Any) -> Any:
    """Leave out what says nothing: titles made of names, and null as a value of parameters that may be absent."""
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if not isinstance(value, dict):
        return value
    plain = {name: _plain(each) for name, each in value.items() if name != "title"}
    if plain.get("in") in {"query", "header"} and "anyOf" in plain["schema"]:
        [kind] = [each for each in plain["schema"]["anyOf"] if each != {"type": "null"}]
        plain["schema"] = kind | {name: each for name, each in plain["schema"].items() if name != "anyOf"}
    return plain


def _add_examples(operation: Document, name: str) -> None:
    if name not in EXAMPLES:
        raise LookupError(f"{name} has no example in local/openapi_examples.py")
    example = EXAMPLES[name]
    for parameter in operation.get("parameters", []):
        if parameter["name"] in example.get("parameters", {}):
            parameter["example"] = example["parameters"][parameter["name"]]
        elif parameter["required"]:
            raise LookupError(f"{name} has no example of {parameter['name']}")
    if "body" in example:
        operation["requestBody"]["content"]["application/json"]["example"] = example["body"]
    _, kind, content = success(operation)
    if kind != OCTETS:
        content["example"] = example["answer"]


def success(operation: Document) -> tuple[str, str, Document]:
    """Return status, media type and content of an operation's answer when all is well."""
    [(status, answer)] = [each for each in operation["responses"].items() if each[0].startswith("2")]
    [(kind, content)] = answer["content"].items()
    return status, kind, content


def _add_links(paths: Document, schemas: Document) -> None:
    """Say where an answer leads: what a POST has made and names in a field, others take in their path by that name."""
    operations = [operation for path in dict(sorted(paths.items())).values() for operation in path.values()]
    followers: dict[str, list[str]] = {}
    for operation in operations:
        for parameter in operation.get("parameters", []):
            if parameter["in"] == "path":
                followers.setdefault(parameter["name"], []).append(operation["operationId"])
    makers = [paths[path]["post"] for path in paths if "post" in paths[path] and "{" not in path]
    for operation in makers:
        status, kind, content = success(operation)
        if kind != JSON:
            continue
        schema = content["schema"]
        schema = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
        links = {
            follower: {"operationId": follower, "parameters": {name: f"$response.body#/{name}"}}
            for name in schema.get("required", [])
            if schema["properties"][name].get("type") == "string"  # what may be null leads nowhere
            for follower in followers.get(name, [])
        }
        if links:
            operation["responses"][status]["links"] = links


def text_of(found: Document) -> str:
    """Return the document as it is committed."""
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


# The guide


INTRODUCTION = """# The API

Written by `make openapi` from the services' code; [openapi.json](openapi.json) is the same for programs, and the API serves both, at
`/openapi.json` and `/docs`. Each example below is tested: the request is sent, and what comes back has the answer's form and fields.

The base address is `http://localhost:8000` with `make up`, and the stack's output `ApiUrl` on AWS.

## A token

Each request carries `Authorization: Bearer …`, a JWT (RS256 or ES256) whose roles are in the claims that the parameter `RoleClaims` names, by default
`scope` and `cognito:groups`.

- `make up` writes one for each role: `source .local/tokens.env` gives `$REQUESTER`, `$APPROVER`, `$AUDITOR` and `$OPERATOR`,
  and `$APPROVER2` and `$OPERATOR2` for a second person. `make token ROLE=approver SUBJECT=dave` prints one for anybody else.
- On AWS, your issuer gives them (`JwtIssuer`, `JwtAudience`, `JwksUrl`), or the stack's own Cognito user pool, if you name no issuer:
  [deploy.md](deploy.md) has the commands.

No token, or one that is not the issuer's, has expired or is for somebody else: 401. A token
works for at most 60 seconds after it has expired. Clocks may differ by 60 seconds.

## The examples

The commands below use the tokens of `make up`, and the ids of a transfer that waits for its approval. These set them:

```bash
source .local/tokens.env
TASK=$(curl -s "http://localhost:8000/task/start" -H "Authorization: Bearer $REQUESTER" -H 'Content-Type: application/json' -d '{
  "task_type": "transfer_funds", "description": "pay the invoice", "wallet_address": "0x1234567890abcdef",
  "parameters": {"to_address": "0xfedcba0987654321", "amount": 1}}' | python3 -c 'import json, sys; print(json.load(sys.stdin)["task_id"])')
until curl -s "http://localhost:8000/task/$TASK" -H "Authorization: Bearer $APPROVER" | grep -q '"waiting_approval"'; do sleep 1; done
until curl -s "http://localhost:8000/audit/$TASK" -H "Authorization: Bearer $AUDITOR" \\
  | python3 -c 'import json, sys; sys.exit(not all(each["qubic_txid"] for each in json.load(sys.stdin)["logs"]))' 2> /dev/null
do sleep 1; done
PLAN=$(curl -s "http://localhost:8000/task/$TASK" -H "Authorization: Bearer $REQUESTER" \\
  | python3 -c 'import json, sys; print(json.load(sys.stdin)["plan_id"])')
HASH=$(curl -s "http://localhost:8000/audit/$TASK" -H "Authorization: Bearer $AUDITOR" \\
  | python3 -c 'import json, sys; print(json.load(sys.stdin)["logs"][0]["input_hash"])')
TXID=$(curl -s "http://localhost:8000/audit/$TASK" -H "Authorization: Bearer $AUDITOR" \\
  | python3 -c 'import json, sys; print(json.load(sys.stdin)["qubic_txid"])')
```

## Roles

| role | may |
|---|---|
| requester | start tasks and make plans; see, cancel and retry their own tasks |
| approver | see every task; approve or reject those that they did not request themselves |
| auditor | read every task, audit entry and proof |
| operator | all of those, write to the ledger, propose a policy, and approve one that another operator proposed |

A task that the caller may not see is 404, as one that is not there. Nobody decides on their own task, nor on one that they have retried, whatever
their roles. Agents are not people: a token that the issuer has given to one of the clients in `AgentClientIds` has the role requester alone, whatever it claims, and gets
403 from every operation that decides. What an agent has started, retried or cancelled says so, by its client's id (`agent`). A task is retried at most 20 times. A bundle shows what the trail's hashes hide: to who asked for the task, to auditors and operators.

## What a request may contain

A request has one meaning, or it is refused with 422 and the name of the field (the network's own routes answer 400, in the
public RPC's form). The caller's role is checked first.

- **Query**: only the parameters of the route, each once, not empty, at most 256 letters. A whole number has one spelling.
- **Headers**: `Idempotency-Key`, `Content-Type` and `Authorization` stand once.
- **Body**: JSON without repeated names, beyond-range numbers or unknown fields.
- **Text** (values, and names of parameters): no character that is invisible, reorders text or controls a terminal: controls
  but line break and tab, bidi controls and marks, zero-width and other default-ignorable characters, private use. Joiners are
  accepted where Arabic, Indic scripts and emoji need them, and variation selectors after emoji, CJK and Mongolian letters.
  Emoji tags (the flags of England, Scotland, Wales) are not, since they can spell hidden words.
- **Subjects** of tokens are compared in NFC without surrounding spaces. A token whose subject has a character that is not
  printed is refused with 401.

## The log, for its own kind of clients

Clients of transparency logs ([C2SP tlog-tiles](https://c2sp.org/tlog-tiles)) read the log under a prefix: `<prefix>/checkpoint`, and
`<prefix>/tile/<level>/<index>[.p/<width>]`. There are two.

- `ApiUrl` and `/log`: with a token; entries too (`/log/tile/entries/…`), for auditors. Ask for tiles with `Accept: application/octet-stream`: API Gateway sends
  base64 to who does not say so. Entries are compressed for who sends `Accept-Encoding: gzip`.
- The stack's output `PublicLogUrl` (locally `http://localhost:8000/public/log`): for everybody, without any header, where the operator has set `PublicLog=true`.
  Checkpoint and tiles of hashes, as far as they are anchored. A hash is over a text with 128 random bits, and says nothing about it.
  **Entries are not public**: they name people and tasks. So a client that only follows and proves (a monitor of the tree, a witness, who holds a leaf
  hash) has all it needs; one that reads every entry needs a token and the first prefix. `LogThrottlingRate` and `LogThrottlingBurst` are its limits.

A tile never changes and may be kept for ever, by everybody where it is public; a checkpoint for 5 seconds. The checkpoint's origin, and the name of its key, is the parameter
`LogOrigin`; without it, the first prefix without `https://`. The key is `verifier_key` of `GET /audit/log/checkpoint`; get it from elsewhere if
you do not trust the server.

## Once, and once only

`Idempotency-Key` on `start`, `approve`, `cancel` and `retry`: for 24 hours the same key and body take effect once, and get the same answer, with
`Idempotent-Replay: true` from the second time on. The same key with another body is 409.
"""


VARIABLES = {"task_id": "$TASK", "plan_id": "$PLAN", "hash": "$HASH", "txid": "$TXID"}
"""What the guide's first commands set, for the parameters of paths."""


def guide(found: Document) -> str:
    """Render the document as Markdown, each operation with an example."""
    parts = [INTRODUCTION]
    for tag in found["tags"]:
        parts.append(f"## {tag['name'].replace('_', ' ').capitalize()}\n\n{tag['description']}\n")
        for path, operations in found["paths"].items():
            for method, operation in operations.items():
                if tag["name"] in operation["tags"]:
                    parts.append(_chapter(path, method, operation))
    rows = "\n".join(f"| {status} | {text} |" for status, text in ERRORS.items())
    parts.append(
        "## Errors\n\nEvery error is `application/problem+json` (RFC 9457): `type`, `title`, `status`, `detail`, `instance`, and a\n"
        "`correlation_id` that is in the logs. `errors` names each field that is wrong; `task_status`, `decided_by` and `code` say more where\n"
        f"they are known.\n\n| status | when |\n|---|---|\n{rows}\n"
    )
    return "\n".join(parts)


def _chapter(path: str, method: str, operation: Document) -> str:
    summary, _, roles = operation["description"].partition("\n\nWho may: ")
    url, query, headers = path, [], []
    for each in operation.get("parameters", []):
        if "example" in each:
            if each["in"] == "path":
                value = VARIABLES.get(each["name"], each["example"])
                url = url.replace(f"{{{each['name']}}}", str(value))
            elif each["in"] == "query":
                query.append(f"{each['name']}={each['example']}")
            else:
                # A key is for one request: another task's has another key.
                value = f"{path.rpartition('/')[2]}-$TASK" if "{task_id}" in path else each["example"]
                headers.append(f'  -H "{each["name"]}: {value}"')
    url = f'"http://localhost:8000{url}{"?" + "&".join(query) if query else ""}"'
    if roles:
        headers.insert(0, f'  -H "Authorization: Bearer ${roles.split(",")[0].rstrip(".").upper()}"')
    lines = [f"curl -s {'' if method == 'get' else f'-X {method.upper()} '}{url}", *headers]
    example = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
    if example is not None:
        lines += ["  -H 'Content-Type: application/json'", f"  -d '{json.dumps(example)}'"]
    status, kind, content = success(operation)
    command = " \\\n".join(lines)
    who = f"Who may: {roles}" if roles else "Open to everybody."
    return (
        f"### `{method.upper()} {path}`\n\n{summary} {who}\n\n```bash\n{command}\n```\n\n"
        f"{status}:\n\n```{'json' if kind == JSON else 'text'}\n{_example(kind, content)}\n```\n"
    )


def _example(kind: str, content: Document) -> str:
    """The answer's example as text; bytes are said to be such."""
    if kind == JSON:
        return json.dumps(content["example"], indent=2, ensure_ascii=False)
    return f"({kind})" if kind == OCTETS else str(content["example"])


def main() -> int:
    """Write the files, or compare them; return an exit code."""
    parser = argparse.ArgumentParser(prog="python -m local.openapi", description="The API's OpenAPI document.")
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    found = document()
    wanted = {DOCUMENT: text_of(found), GUIDE: guide(found)}
    stale = [name for name, text in wanted.items() if not (ROOT / name).is_file() or (ROOT / name).read_text() != text]
    if check and stale:
        print(f"not what the code says: {', '.join(stale)}; make openapi writes them", file=sys.stderr)
        return 1
    for name in stale:
        (ROOT / name).write_text(wanted[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
