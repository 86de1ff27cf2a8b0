"""The JSON Schemas of operators' actions: the subset that a document may contain, and values checked by them.

The subset is JSON Schema 2020-12 with closed objects and local references. It has no recursion, and a bounded size with
every reference expanded, so that a check takes time in proportion to the value. Patterns run on a linear-time engine,
and `format` is a note for readers. Only this module imports jsonschema-rs (30 ms), where it checks a schema or a value.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from qaes.domain.canonical import canonical_json
from qaes.domain.errors import InvalidInputError
from qaes.domain.policy.actions import Action, action_of
from qaes.domain.policy.document import Policy
from qaes.domain.policy.names import MAX_INTEGER

if TYPE_CHECKING:
    from jsonschema_rs import Draft202012Validator, ValidationError

DIALECT = "https://json-schema.org/draft/2020-12/schema"
MAX_SCHEMA_BYTES = 16 * 1024
MAX_EXPANDED = 1000
"""Subschemas of one schema, with each reference expanded."""
MAX_CHAIN = 32
"""References that lead through each other."""
MAX_PATTERNS = 50
_PATTERN_BYTES = 1024 * 1024
"""Of one compiled pattern."""

_NOTES = {"$schema", "$comment", "title", "description", "default", "examples", "deprecated", "format"}
_VALUES = {"type", "enum", "const", "$ref"}
_NUMBERS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
_TEXTS = {"minLength", "maxLength", "pattern"}
_ARRAYS = {"items", "prefixItems", "minItems", "maxItems", "uniqueItems"}
_OBJECTS = {"properties", "required", "additionalProperties", "minProperties", "maxProperties", "$defs"}
_CHOICES = {"anyOf", "oneOf", "allOf"}
KEYWORDS = _NOTES | _VALUES | _NUMBERS | _TEXTS | _ARRAYS | _OBJECTS | _CHOICES

Schema = Mapping[str, Any]


def check_schemas(name: str, action: Action) -> None:
    """Check an action's schemas, and that its pointers lead to members of the required kind.

    Raises
    ------
    InvalidInputError
        `field` is a path in the document, such as `actions.refund_customer.amount`.
    """
    path = f"actions.{name}"
    check_schema(action.parameters, f"{path}.parameters", closed=True)
    if action.parameters.get("type") != "object":
        raise InvalidInputError("must have the type `object`", field=f"{path}.parameters.type")
    if action.result is not None:
        check_schema(action.result, f"{path}.result", closed=False)
    if action.amount is not None:
        _check_amount(_required_member(action.parameters, action.amount, f"{path}.amount"), f"{path}.amount")
    if action.destination is not None:
        field = f"{path}.destination"
        _check_destination(_required_member(action.parameters, action.destination, field), field)
    for index, pointer in enumerate(action.sensitive):
        field = f"{path}.sensitive.{index}"
        if any(_is_inside(other, pointer) for other in (action.amount, action.destination) if other is not None):
            raise InvalidInputError("must not contain the amount or the destination", field=field)
        if not any(_leads_somewhere(schema, pointer) for schema in (action.parameters, action.result or {})):
            raise InvalidInputError("points to no member of the parameters or the result", field=field)


def check_parameters(policy: Policy, action: str, parameters: Mapping[str, Any], field: str = "parameters") -> None:
    """Check the parameters of an operator's action by its schema. Built-in actions have their own checks.

    Raises
    ------
    InvalidInputError
        `field` names the parameter.
    """
    definition = policy.actions.get(action_of(action))
    if definition is not None:
        check_value(definition.parameters, parameters, field)


def check_value(schema: Schema, value: Any, field: str) -> None:
    """Check a value by a schema of the subset. Raises InvalidInputError; its `field` begins with `field`."""
    for path, inner in _numbers(value, field):
        if isinstance(inner, float) and inner.is_integer():
            raise InvalidInputError("must be written without a fraction or an exponent", field=path)
        if isinstance(inner, int) and abs(inner) > MAX_INTEGER:
            raise InvalidInputError("must not be beyond 2^53 - 1", field=path)
    error = _first_error(_validator(json.dumps(schema, sort_keys=True)), value)
    if error is not None:
        raise _invalid(error, field)


# The subset


def check_schema(schema: object, path: str, *, closed: bool) -> None:
    """Check that a schema is one of the subset; with `closed`, that its objects admit no unknown members.

    Raises InvalidInputError, whose `field` is the path of the part that is wrong.
    """
    if not isinstance(schema, Mapping):
        raise InvalidInputError("a schema is an object", field=path)
    size = len(canonical_json(schema).encode())
    if size > MAX_SCHEMA_BYTES:
        raise InvalidInputError(f"has {size} bytes, more than {MAX_SCHEMA_BYTES}", field=path)
    parts = list(_subschemas(schema, path))
    for place, inner in parts:
        _check_keywords(inner, place, closed=False, is_root=inner is schema)
    _check_valid(schema, path)
    for place, inner in parts:
        _check_keywords(inner, place, closed=closed, is_root=inner is schema)
    if sum("pattern" in inner for _, inner in parts) > MAX_PATTERNS:
        raise InvalidInputError(f"has more than {MAX_PATTERNS} patterns", field=path)
    _check_references(schema, path)
    _compile(schema, path)


def _subschemas(schema: object, path: str) -> Iterator[tuple[str, Schema]]:
    """Yield each schema inside a schema with its path, itself first."""
    left: list[tuple[str, object]] = [(path, schema)]
    while left:
        place, each = left.pop()
        if not isinstance(each, Mapping):
            raise InvalidInputError("must be a schema: an object", field=place)
        yield place, each
        left.extend(_children(each, place))


def _children(schema: Schema, path: str) -> Iterator[tuple[str, object]]:
    for keyword in ("properties", "$defs"):
        members = schema.get(keyword, {})
        if not isinstance(members, Mapping):
            raise InvalidInputError("must be an object", field=f"{path}.{keyword}")
        yield from ((f"{path}.{keyword}.{name}", inner) for name, inner in members.items())
    for keyword in ("prefixItems", *sorted(_CHOICES)):
        members = schema.get(keyword, [])
        if not isinstance(members, list):
            raise InvalidInputError("must be a list", field=f"{path}.{keyword}")
        yield from ((f"{path}.{keyword}.{index}", inner) for index, inner in enumerate(members))
    for keyword in ("items", "additionalProperties"):
        if keyword in schema and not isinstance(schema[keyword], bool):
            yield f"{path}.{keyword}", schema[keyword]


def _check_keywords(schema: Schema, path: str, *, closed: bool, is_root: bool) -> None:
    for keyword in schema:
        if keyword not in KEYWORDS or (keyword in {"$schema", "$defs"} and not is_root):
            text = "is outside the subset of JSON Schema that a policy uses"
            raise InvalidInputError(text, field=f"{path}.{keyword}")
    if schema.get("$schema", DIALECT) != DIALECT:
        raise InvalidInputError(f"must be {DIALECT}", field=f"{path}.$schema")
    if closed:
        for keyword, text in _openings(schema):
            raise InvalidInputError(text, field=f"{path}.{keyword}".rstrip("."))


def _openings(schema: Schema) -> Iterator[tuple[str, str]]:
    """Yield each keyword by which a schema admits undescribed values, and the correction."""
    type_ = schema.get("type", [])
    types = type_ if isinstance(type_, list) else [type_]
    if not schema.keys() & (_VALUES | _CHOICES):
        yield "", "needs a `type`, an `enum` or a `const`: it would admit any value"
    if "type" not in schema and schema.keys() & _OBJECTS - {"$defs"}:
        yield "type", "must be `object`"
    if "object" in types:
        if schema.get("additionalProperties") is not False:
            yield "additionalProperties", "must be false: the object would admit unknown members"
        for index, name in enumerate(schema.get("required", ())):
            if name not in schema.get("properties", {}):
                yield f"required.{index}", "has no schema in `properties`"
    if "array" in types and schema.get("items", True) is True:
        yield "items", "must be a schema: the array would admit any value"


def _check_references(schema: Schema, path: str) -> None:
    """Check that references lead to `$defs`, never in a circle, and that the expanded schema is small."""
    sizes: dict[str, int | None] = {}
    definitions = schema.get("$defs", {})

    def size_of(part: Schema, place: str) -> int:
        total = 0
        for inner_place, inner in _subschemas({name: part[name] for name in part if name != "$defs"}, place):
            total += 1
            if "$ref" in inner:
                total += size_of_definition(inner["$ref"], f"{inner_place}.$ref")
            if total > MAX_EXPANDED:
                raise InvalidInputError(f"has more than {MAX_EXPANDED} parts with its references expanded", field=path)
        return total

    def size_of_definition(reference: object, place: str) -> int:
        name = _definition_of(reference, definitions, place)
        if name in sizes:
            known = sizes[name]
            if known is None:
                raise InvalidInputError("refers to itself: a schema must not be recursive", field=place)
            return known
        if list(sizes.values()).count(None) == MAX_CHAIN:
            raise InvalidInputError(f"leads through more than {MAX_CHAIN} references", field=place)
        sizes[name] = None
        size = sizes[name] = size_of(definitions[name], f"{path}.$defs.{name}")
        return size

    size_of(schema, path)
    for name in definitions:
        size_of_definition(f"#/$defs/{name}", f"{path}.$defs.{name}")


def _definition_of(reference: object, definitions: Mapping[str, Any], place: str) -> str:
    name = reference.removeprefix("#/$defs/") if isinstance(reference, str) else ""
    if reference != f"#/$defs/{name}" or name not in definitions:
        raise InvalidInputError("must be `#/$defs/<name>`, with a name in `$defs`", field=place)
    return name


def _check_valid(schema: Schema, path: str) -> None:
    """Check a schema by the schema of JSON Schema 2020-12."""
    error = _first_error(_validator(json.dumps({"$ref": DIALECT})), schema)
    if error is not None:
        place = ".".join([path, *(str(part) for part in error.instance_path)])
        raise InvalidInputError("is not valid JSON Schema 2020-12", field=place)


def _compile(schema: Schema, path: str) -> None:
    import jsonschema_rs

    try:
        _validator(json.dumps(schema, sort_keys=True))
    except jsonschema_rs.ValidationError as error:
        place = ".".join([path, *(str(part) for part in error.instance_path)])
        is_pattern = place.endswith(".pattern")
        text = "is not a pattern of the linear-time engine, which has no look-around and no back-references"
        raise InvalidInputError(text if is_pattern else "is not valid JSON Schema 2020-12", field=place) from error


@lru_cache(256)
def _validator(schema: str) -> Draft202012Validator:
    """Compile a schema, given as its text."""
    import jsonschema_rs

    return jsonschema_rs.Draft202012Validator(
        json.loads(schema),
        validate_formats=False,
        mask="the value",
        offline=True,
        pattern_options=jsonschema_rs.RegexOptions(size_limit=_PATTERN_BYTES, dfa_size_limit=_PATTERN_BYTES),
    )


# Pointers


def _parts(pointer: str) -> list[str]:
    return [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]


def _required_member(schema: Any, pointer: str, field: str) -> Schema:
    """Return the schema that a pointer leads to, through required members of plain objects only."""
    for part in _parts(pointer):
        if schema.get("type") != "object" or schema.keys() & (_CHOICES | {"$ref"}):
            raise InvalidInputError("must lead through plain objects: no array, choice or reference", field=field)
        if part not in schema.get("properties", {}):
            raise InvalidInputError(f"points to nothing: `properties` has no `{part}`", field=field)
        if part not in schema.get("required", ()):
            raise InvalidInputError(f"`{part}` must be in `required`", field=field)
        schema = schema["properties"][part]
    result: Schema = schema
    return result


def _check_amount(schema: Schema, field: str) -> None:
    least, most = schema.get("minimum"), schema.get("maximum")
    if schema.get("type") != "integer" or schema.keys() & (_CHOICES | {"$ref"}):
        raise InvalidInputError("must point to a plain `integer`", field=field)
    if type(least) is not int or least < 1:
        raise InvalidInputError("must point to an integer with a `minimum` of at least 1", field=field)
    if type(most) is not int or most > MAX_INTEGER:
        raise InvalidInputError("must point to an integer with a `maximum` of at most 2^53 - 1", field=field)


def _check_destination(schema: Schema, field: str) -> None:
    if schema.get("type") != "string" or schema.keys() & (_CHOICES | {"$ref"}):
        raise InvalidInputError("must point to a plain `string`", field=field)
    if "enum" not in schema and not is_anchored(schema.get("pattern", "")):
        text = "must point to a string with an `enum`, or with a `pattern` from ^ to $ without an outer |"
        raise InvalidInputError(text, field=field)


def is_anchored(pattern: str) -> bool:
    """Return whether a pattern covers the whole text: from ^ to $, without a choice around them and without flags."""
    plain = re.sub(r"\\.", "x", pattern)
    # The engine reads `^?` as an optional anchor, and the class `[](]` as one of the characters `]` and `(`.
    bare = re.sub(r"\[[^\]]*\]", "", plain)
    if re.search(r"^\^[?*+{]|\[\^?\]", plain) or re.search(r"\(\?(?!:)", bare):
        return False
    while (inner := re.sub(r"\([^()]*\)", "", bare)) != bare:
        bare = inner
    return bare.startswith("^") and bare.endswith("$") and not set("|()") & set(bare)


def _is_inside(pointer: str, outer: str) -> bool:
    return pointer == outer or pointer.startswith(f"{outer}/")


def _leads_somewhere(schema: Any, pointer: str) -> bool:
    for part in _parts(pointer):
        if not isinstance(schema, Mapping) or part not in schema.get("properties", {}):
            return False
        schema = schema["properties"][part]
    return True


# Values


def _numbers(value: object, field: str) -> Iterator[tuple[str, object]]:
    left: list[tuple[str, object]] = [(field, value)]
    while left:
        path, each = left.pop()
        if isinstance(each, Mapping):
            left.extend((f"{path}.{name}", inner) for name, inner in each.items())
        elif isinstance(each, list | tuple):
            left.extend((f"{path}.{index}", inner) for index, inner in enumerate(each))
        elif isinstance(each, int | float) and not isinstance(each, bool):
            yield path, each


def _first_error(validator: Draft202012Validator, value: object) -> ValidationError | None:
    """Return the first error of a value; `iter_errors` would make all of them at once, with each choice's own."""
    import jsonschema_rs

    try:
        validator.validate(value)
    except jsonschema_rs.ValidationError as error:
        return error
    return None


def _invalid(error: ValidationError, field: str) -> InvalidInputError:
    path: list[object] = [field, *error.instance_path]
    kind, message = error.kind.name, error.message
    if kind == "required":
        path.append(error.kind.as_dict()["property"])
        message = "is required"
    elif kind == "additionalProperties":
        path.append(_first(error.kind.as_dict()["unexpected"]))
        message = "the action has no such parameter"
    return InvalidInputError(message, field=".".join(str(part) for part in path)[:256])


def _first(names: Iterable[str]) -> str:
    return min(names)
