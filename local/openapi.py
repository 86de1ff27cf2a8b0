# ruff: noqa: E501 - Markdown
"""The API's document (OpenAPI 3.1), generated from the services' code, and the guide, generated from the document.

`python -m local.openapi` writes functions/gateway/openapi.json and docs/api.md; with `--check` it only compares them
with the code.
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
    "gateway": "Tasks: start, list, read, decide, cancel, retry.",
    "planner": "Plans without execution.",
    "agent_runtime": "Progress of a task's execution.",
    "audit": "Audit trail, and its verification.",
    "qubic": "Policy and ledger.",
    "worker": "Execution of steps.",
}
DOCUMENT = "functions/gateway/openapi.json"
"""The file that the gateway serves; docs/openapi.json is a link to it."""
GUIDE = "docs/api.md"
PROBLEM = "application/problem+json"
JSON, OCTETS = "application/json", "application/octet-stream"
DESCRIPTION = (
    "AI agents and automations act with money and data: tasks are planned under a policy, approved by people, "
    "executed step by step and audited. Errors are problems (RFC 9457). Amounts are whole QU."
)
ERRORS = {
    "400": "The body is not JSON, or the request is malformed.",
    "401": "The request has no valid bearer token.",
    "403": "The caller's roles do not allow the operation; the caller started or retried the task; or an agent calls an operation for people only.",
    "404": "The item does not exist, or the caller cannot see it.",
    "409": "The current state does not allow the operation; `task_status` has the state.",
    "413": "The body of the request, or the bundle in the response, is too large.",
    "415": "The body is not application/json.",
    "422": "A field is invalid; `errors` names it.",
    "429": "Too many requests, or too many open tasks; `Retry-After` has the time to wait.",
    "500": "The service failed; search its log for the correlation id.",
    "503": "A part of the service does not respond; `Retry-After` has the time to wait.",
}

Document = dict[str, Any]


NOT_FOUND_WITHOUT_AN_ID = {
    "/plan/create",
    "/policy/decide",
    "/audit/log/checkpoint",
    "/audit/log/consistency",
    "/log/checkpoint",
}
"""Operations whose body names a task or a version, or whose log may be missing or shorter."""


def document() -> Document:
    """Merge the services' documents.

    Raises
    ------
    LookupError
        A route has no rule for its callers, or no example.
    ValueError
        Two services use one name for different schemas.
    """
    paths: Document = {}
    schemas: Document = {"Problem": problem_schema()}
    for service in SERVICES:
        app: FastAPI = importlib.import_module(f"{service}.api").app
        found = app.openapi()
        for name, schema in found.get("components", {}).get("schemas", {}).items():
            if schemas.setdefault(name, schema) != schema:
                raise ValueError(f"{name} of {service} differs from another service's {name}")
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
        "servers": [{"url": "/", "description": "local cloud"}, {"url": "/v1", "description": "stage on AWS"}],
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
            done["description"] += " For people only: an agent's token gets 403."
        done["description"] += f"\n\nRoles: {', '.join(roles)}."
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
    """Return the statuses of an operation's errors."""
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
    """Remove redundant parts: titles that repeat names, and null as a value of optional parameters."""
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
        requested = operation["requestBody"]["content"]["application/json"]
        requested["example"] = example["body"]
        if "also" in example:
            requested["schema"] |= {"examples": example["also"]}
    _, kind, content = success(operation)
    if kind != OCTETS:
        content["example"] = example["answer"]


def success(operation: Document) -> tuple[str, str, Document]:
    """Return status, media type and content of an operation's success response."""
    [(status, answer)] = [each for each in operation["responses"].items() if each[0].startswith("2")]
    [(kind, content)] = answer["content"].items()
    return status, kind, content


def _add_links(paths: Document, schemas: Document) -> None:
    """Add links from the response of a POST to the operations whose path has a field of that response."""
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
            if schema["properties"][name].get("type") == "string"  # a nullable field has no link
            for follower in followers.get(name, [])
        }
        if links:
            operation["responses"][status]["links"] = links


def text_of(found: Document) -> str:
    """Return the committed form of the document."""
    return json.dumps(found, indent=2, ensure_ascii=False) + "\n"


# The guide


INTRODUCTION = """# The API

`make openapi` generates this page from the services' code. [openapi.json](openapi.json) has the same content for programs, and the API serves
both, at `/docs` and `/openapi.json`. The tests send each request below, and compare the response with its example.

The base address is `http://localhost:8000` with `make up`, and the stack's output `ApiUrl` on AWS.

## Tokens

Each request carries `Authorization: Bearer …`, a JWT (RS256 or ES256). Its roles are in the claims that the parameter `RoleClaims` names, by
default `scope` and `cognito:groups`.

- `make up` writes a token for each role: `source .local/tokens.env` sets `$REQUESTER`, `$APPROVER`, `$AUDITOR` and `$OPERATOR`, and
  `$APPROVER2` and `$OPERATOR2` for a second person. `make token ROLE=approver SUBJECT=dave` prints a token for another person.
- On AWS, your issuer creates the tokens (`JwtIssuer`, `JwtAudience`, `JwksUrl`). Without an issuer, the stack has its own Cognito user pool:
  [deploy.md](deploy.md) has the commands.

The status is 401 if the token is missing, expired, or has another issuer or audience. A token works for at most 60 seconds after it has
expired. Clocks may differ by 60 seconds.

## Examples

The commands below use the tokens of `make up`, and the ids of a transfer that waits for its approval. These commands set the ids:

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

| role | rights |
|---|---|
| requester | start tasks and create plans; read, cancel and retry their own tasks |
| approver | read every task; approve or reject the tasks of other requesters |
| auditor | read every task, audit entry and proof |
| operator | all of these; record hashes on the ledger; propose a policy, and approve another operator's proposal |

A task that the caller cannot see returns 404, like an unknown one. A person cannot decide on a task that they started or retried, regardless of
their roles. An agent cannot decide at all: a token of a client in `AgentClientIds` has only the role requester, regardless of its claims, and
gets 403 from every operation that is for people only. The client's id (`agent`) is recorded with each start, retry and cancellation by an
agent. A task can be retried at most 20 times. A bundle reveals the content behind the hashes of the trail, so only the task's requester,
auditors and operators can read it.

## Accepted input

A request that can be read in two ways is rejected with 422 and the name of the field. The network's own routes return 400 in the public RPC's
format. The API checks the caller's role first.

- **Query**: only the parameters of the route, each once, not empty, with at most 256 characters. A whole number has no sign, leading zeros or spaces.
- **Headers**: `Idempotency-Key`, `Content-Type` and `Authorization` occur once.
- **Body**: JSON without repeated names, unknown fields, or numbers out of range.
- **Text** (values, and names of parameters): no character that is invisible, reorders text or controls a terminal. These are control
  characters except line break and tab, bidirectional controls and marks, zero-width and other default-ignorable characters, and private-use
  characters. Joiners are accepted where Arabic, Indic scripts and emoji need them, and variation selectors after emoji, CJK and Mongolian
  letters. Emoji tags (the flags of England, Scotland, Wales) are rejected, because they can spell hidden words.
- **Subjects** of tokens are compared in NFC without surrounding spaces. A subject with a character that is not printable is rejected with 401.

## The log for clients of transparency logs

Clients of transparency logs ([C2SP tlog-tiles](https://c2sp.org/tlog-tiles)) read the log under a prefix: `<prefix>/checkpoint`, and
`<prefix>/tile/<level>/<index>[.p/<width>]`. There are two prefixes:

- `ApiUrl` and `/log`, with a token. Auditors can also read entries (`/log/tile/entries/…`). Request tiles with
  `Accept: application/octet-stream`; otherwise API Gateway sends base64. Entries are compressed if the request has `Accept-Encoding: gzip`.
- The stack's output `PublicLogUrl` (locally `http://localhost:8000/public/log`), without any header, if the operator has set `PublicLog=true`.
  It has the checkpoint and the hash tiles, as far as they are anchored. A hash covers a text with 128 random bits, so it does not reveal the
  text. **Entries are not public**: they name people and tasks. This prefix is sufficient for a monitor of the tree, for a witness, and for a
  verifier with a leaf hash. A client that reads every entry needs a token and the first prefix. `LogThrottlingRate` and `LogThrottlingBurst`
  limit the requests.

A tile never changes: clients may cache it for ever, and the public tiles may also be in shared caches. A checkpoint may be cached for 5 seconds.
The checkpoint's origin, which is also the name of its key, is the parameter `LogOrigin`; the default is the first prefix without `https://`. The
key is `verifier_key` of `GET /audit/log/checkpoint`. Get it from another source if you do not trust the server.

## Idempotency

`Idempotency-Key` applies to `start`, `approve`, `cancel` and `retry`. For 24 hours, requests with the same key and body take effect once and
return the same response, from the second time on with `Idempotent-Replay: true`. The same key with another body returns 409.
"""


VARIABLES = {"task_id": "$TASK", "plan_id": "$PLAN", "hash": "$HASH", "txid": "$TXID"}
"""Variables of the guide's first commands, for the parameters of paths."""


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
        "`correlation_id` that is in the logs. `errors` names each invalid field; `task_status`, `decided_by` and `code` are present if\n"
        "they are known.\n\n"
        "A `code` is a stable word for the reason, such as `limit_exceeded`: [policy.md](policy.md#how-a-request-is-decided) lists those of\n"
        "the policy, and [qubic.md](qubic.md#which-transfers-are-refused) those of the ledger. The `error` of a task or step has the reason in\n"
        "words, and begins with the code and a colon if a window, a schema, a suspension or the ledger caused it. After a denial by the policy\n"
        "alone, `POST /policy/decide` returns the code.\n\n"
        f"| status | when |\n|---|---|\n{rows}\n"
    )
    return "\n".join(parts)


def _chapter(path: str, method: str, operation: Document) -> str:
    summary, _, roles = operation["description"].partition("\n\nRoles: ")
    url, query, headers = path, [], []
    for each in operation.get("parameters", []):
        if "example" in each:
            if each["in"] == "path":
                value = VARIABLES.get(each["name"], each["example"])
                url = url.replace(f"{{{each['name']}}}", str(value))
            elif each["in"] == "query":
                query.append(f"{each['name']}={each['example']}")
            else:
                # Each request has its own key, so another task has another key.
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
    who = f"Roles: {roles}" if roles else "No token needed."
    return (
        f"### `{method.upper()} {path}`\n\n{summary} {who}\n\n```bash\n{command}\n```\n\n"
        f"{status}:\n\n```{'json' if kind == JSON else 'text'}\n{_example(kind, content)}\n```\n"
    )


def _example(kind: str, content: Document) -> str:
    """Return the response's example as text, with a placeholder for bytes."""
    if kind == JSON:
        return json.dumps(content["example"], indent=2, ensure_ascii=False)
    return f"({kind})" if kind == OCTETS else str(content["example"])


def main() -> int:
    """Write the files or compare them; return an exit code."""
    parser = argparse.ArgumentParser(prog="python -m local.openapi", description="The API's OpenAPI document.")
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    found = document()
    wanted = {DOCUMENT: text_of(found), GUIDE: guide(found)}
    stale = [name for name, text in wanted.items() if not (ROOT / name).is_file() or (ROOT / name).read_text() != text]
    if check and stale:
        print(f"not up to date: {', '.join(stale)}. Run make openapi", file=sys.stderr)
        return 1
    for name in stale:
        (ROOT / name).write_text(wanted[name])
    return 0


if __name__ == "__main__":
    sys.exit(main())
