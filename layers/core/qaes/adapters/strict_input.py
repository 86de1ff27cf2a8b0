"""Strict checks of every request: nothing in it can be read in two ways, or deceive a later reader.

A body is JSON without constructs that parsers read differently. A query has only the parameters of its route, each
once. Text has no character that `qaes.domain.text` rejects. These checks run after the check of the caller's role and
before any model.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator
from functools import wraps
from inspect import iscoroutinefunction
from typing import Any, TypeVar, get_args

from fastapi import Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from qaes.domain.errors import InvalidInputError
from qaes.domain.text import flaw_of, inert, json_inert

Endpoint = TypeVar("Endpoint", bound=Callable[..., object])

MAX_BODY_BYTES = 256 * 1024
MAX_DEPTH = 32
MAX_INTEGER = 2**53 - 1
"""JSON parsers disagree about larger integers (RFC 8259, section 6)."""
MAX_QUERY_VALUE = 256
"""Maximum length of a query parameter; a route may allow less."""

# JSON input


class _Unacceptable:
    """Placeholder in a parsed body for a value that JSON's grammar allows but this API rejects."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class StrictRoute(APIRoute):
    """Checks the caller, the query, the headers and the body, in this order, and runs the endpoint in the same thread.

    FastAPI runs a plain function in another thread, to serve other requests in the meantime. Lambda sends one request
    at a time, so the thread would only cost time.
    """

    def __init__(self, path: str, endpoint: Callable[..., object], **options: Any) -> None:
        super().__init__(path, endpoint if iscoroutinefunction(endpoint) else _in_this_thread(endpoint), **options)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        guards: list[Any] = [each.call for each in self.dependant.dependencies if hasattr(each.call, "roles")]
        query = {each.alias: each.field_info.annotation for each in _of(self.dependant, "query_params")}
        limit = getattr(self.endpoint, "max_body_bytes", MAX_BODY_BYTES)
        headers = (*_ONE_MEANING, *(each.alias for each in _of(self.dependant, "header_params")))

        async def strictly(request: Request) -> Response:
            for guard in guards:
                await guard(request)
            _check_query(request, query)
            _check_headers(request, headers)
            if self.body_field is not None:
                content_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
                if content_type != "application/json" and not content_type.endswith("+json"):
                    raise HTTPException(415, "The body must be application/json.")
                request = _StrictRequest(request.scope, request.receive)
                request.limit = limit
                await request.json()
            return _inert(await handle(request))

        return strictly


_ONE_MEANING = ("Authorization", "Content-Type")


def _of(dependant: Any, kind: str) -> list[Any]:
    """Return the parameters of a route and of its dependencies."""
    inner = [each for dependency in dependant.dependencies for each in _of(dependency, kind)]
    return [*getattr(dependant, kind), *inner]


def _check_query(request: Request, known: dict[str, Any]) -> None:
    """Raise RequestValidationError unless each parameter belongs to the route, occurs once and has one meaning."""
    flaws: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name not in known:
            flaws[name] = "is not a query parameter of this route"
        elif len(request.query_params.getlist(name)) > 1:
            flaws[name] = "occurs more than once"
        elif flaw := _flaw_of_value(value, known[name]):
            flaws[name] = flaw
    if flaws:
        raise RequestValidationError([{"loc": ("query", name), "msg": flaw} for name, flaw in flaws.items()])


def _flaw_of_value(value: str, annotation: Any) -> str | None:
    if not value:
        return "is empty: omit the parameter"
    if len(value) > MAX_QUERY_VALUE:
        return f"has more than {MAX_QUERY_VALUE} characters"
    if int in (annotation, *get_args(annotation)) and not re.fullmatch("-?(0|[1-9][0-9]*)", value):
        return "must be a whole number without extra zeros, signs or spaces"
    return flaw_of(value, lines=False)


def _check_headers(request: Request, names: tuple[str, ...]) -> None:
    """Raise RequestValidationError if a single-valued header occurs twice: Mangum would join the values."""
    sent = request.scope.get("aws.event", {}).get("multiValueHeaders") or {}
    counts = Counter(name.lower() for name, values in sent.items() for _ in values)
    repeated = [name for name in names if counts[name.lower()] > 1]
    if repeated:
        raise RequestValidationError([{"loc": ("header", name), "msg": "occurs more than once"} for name in repeated])


def _inert(response: Response) -> Response:
    r"""Write hidden characters of a JSON response as `\uXXXX`: stored text may be older than the rules for text."""
    kind = response.headers.get("content-type", "")
    body = bytes(response.body)
    if kind.partition(";")[0].endswith("json") and not body.isascii():
        response.body = json_inert(body.decode()).encode()
        response.headers["content-length"] = str(len(response.body))
    return response


def _in_this_thread(endpoint: Callable[..., object]) -> Callable[..., Coroutine[Any, Any, object]]:
    @wraps(endpoint)
    async def run(*arguments: object, **named: object) -> object:
        return endpoint(*arguments, **named)

    return run


class _StrictRequest(Request):
    limit = MAX_BODY_BYTES

    async def json(self) -> object:
        if not hasattr(self, "_parsed"):
            self._parsed = parse_json(await self.body(), self.limit)
        return self._parsed


def accepts_bytes(limit: int) -> Callable[[Endpoint], Endpoint]:
    """Let an endpoint accept a body of up to `limit` bytes instead of MAX_BODY_BYTES."""

    def decorate(endpoint: Endpoint) -> Endpoint:
        endpoint.max_body_bytes = limit  # type: ignore[attr-defined] # StrictRoute reads it
        return endpoint

    return decorate


def parse_json(body: bytes, limit: int = MAX_BODY_BYTES) -> object:
    """Parse a JSON text (RFC 8259) without ambiguous constructs. Return None for an empty body.

    Raises
    ------
    HTTPException
        413 if it is longer than `limit` bytes, 400 if it is not JSON in UTF-8.
    InvalidInputError
        The body has an integer above 2^53 - 1, a number that is not finite, a duplicate name, deceptive text (a name
        must not have line breaks either), or more than `MAX_DEPTH` levels; `field` names the place.
    """
    if len(body) > limit:
        raise HTTPException(413, f"The body is larger than {limit} bytes.")
    if not body:
        return None
    try:
        value = json.loads(
            body.decode("utf-8"),
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=lambda _: _Unacceptable("a number must be finite"),
        )
    except ValueError as error:
        raise HTTPException(400, "The body is not JSON.") from error
    except RecursionError as error:
        raise InvalidInputError(f"must have at most {MAX_DEPTH} levels", field="body") from error
    for path, reason in _unacceptable(value):
        raise InvalidInputError(reason, field=dotted(path))
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        found[name] = _Unacceptable("the name occurs twice") if name in found else value
    return found


def _integer(text: str) -> int | _Unacceptable:
    # int() is slow for thousands of digits, and Python rejects more than 4,300.
    value = int(text) if len(text) <= 17 else MAX_INTEGER + 1
    return value if abs(value) <= MAX_INTEGER else _Unacceptable("an integer must be at most 2^53 - 1")


def _float(text: str) -> float | _Unacceptable:
    value = float(text)
    if abs(value) == float("inf"):
        return _Unacceptable("a number must be finite")
    # 1e20 is the integer 100000000000000000000 in canonical JSON, and parsers read it as an integer.
    if value.is_integer() and abs(value) > MAX_INTEGER:
        return _Unacceptable("a number without a fraction must be at most 2^53 - 1")
    return value


def _unacceptable(value: object) -> Iterator[tuple[tuple[object, ...], str]]:
    """Yield the path and the reason of each unacceptable value."""
    left: list[tuple[tuple[object, ...], object]] = [((), value)]
    while left:
        path, each = left.pop()
        if isinstance(each, _Unacceptable):
            yield path, each.reason
        elif isinstance(each, str) and (flaw := flaw_of(each)):
            yield path, flaw
        elif isinstance(each, dict | list) and len(path) >= MAX_DEPTH:
            yield path[:2], f"must have at most {MAX_DEPTH} levels"
        elif isinstance(each, dict):
            for name, inner in each.items():
                if flaw := flaw_of(name, lines=False):
                    yield path, f"a name in it {flaw}"
                left.append(((*path, name), inner))
        elif isinstance(each, list):
            left.extend(((*path, index), inner) for index, inner in enumerate(each))


def dotted(path: tuple[object, ...]) -> str:
    """Return the path of a value in a body or a query, safe to display."""
    return inert(".".join(str(part) for part in path)[:256]) or "body"
