"""Input rules of the public RPC's query service, with its messages, as pure functions.

Source: qubic/archive-query-service, folder v2 (`grpc/filters`, `grpc/pagination_validation.go`, `grpc/utils`,
`grpc/service.go`). docs/qubic.md lists the rules in a table. The mock's routes apply them, and every request of
`RpcChain` is within them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from qaes.domain.errors import InvalidInputError
from qaes.domain.qubic.identity import decode_identity, encode_identity

MAX_TICK = 2**32 - 1
MAX_PAGE = 1_000
DEFAULT_PAGE = 10
MAX_HITS = 10_000
"""Maximum sum of offset and size, and maximum of the reported count."""
MAX_FILTERS = 5
MAX_RANGES = 4
MAX_IDENTITIES = 5
_MAX_IDENTITIES_LENGTH = 5 * 60 + 5 + 4
_MAX_NUMBER_LENGTH = 20
_IDENTITIES = ("source", "destination")
_FILTER_BITS = {"amount": 64, "tickNumber": 32, "inputType": 32}
_RANGE_BITS = _FILTER_BITS | {"timestamp": 64}
FIELDS = (*_IDENTITIES, *_RANGE_BITS)
"""The fields of a transaction that a request can filter by."""
_EXCLUDE = "-exclude"
_WRAP = 1 << 64


class RuleError(Exception):
    """A request that the public RPC rejects; the text is the RPC's message."""


Bounds = Mapping[str, str]
"""`gt` or `gte`, `lt` or `lte`, and their values."""


@dataclass(frozen=True)
class Conditions:
    """The filters of a request for transactions, checked.

    Attributes
    ----------
    include, exclude
        A field's name, and the values to include or exclude.
    ranges
        A field's name, its lowest and its highest value, both included.
    """

    include: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    exclude: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    ranges: Mapping[str, tuple[int, int]] = field(default_factory=dict)

    def match(self, fields: Mapping[str, str]) -> bool:
        """Return whether a transaction with these fields matches the request."""
        return (
            all(_has(fields[name], values) for name, values in self.include.items())
            and not any(_has(fields[name], values) for name, values in self.exclude.items())
            and all(first <= int(fields[name]) <= last for name, (first, last) in self.ranges.items())
        )


def _has(value: str, values: tuple[str, ...]) -> bool:
    return any(value == each or (value.isdigit() and each.isdigit() and int(value) == int(each)) for each in values)


def check_ticks(first_tick: int, last_tick: int) -> None:
    """Check a range of ticks from this system's own code. Raises InvalidInputError."""
    if not 0 <= first_tick <= last_tick <= MAX_TICK:
        raise InvalidInputError("the ticks must satisfy 0 <= first_tick <= last_tick < 2^32", field="first_tick")


def check_digest(text: str, *, lower: bool) -> None:
    """Check an identity, or (`lower`) a transaction's hash, with its checksum. Raises RuleError."""
    upper = text.upper() if lower else text
    if reason := digest_error(text, lower=lower):
        raise RuleError(f"converting id to pubkey: {reason}")
    try:
        decode_identity(upper)
    except ValueError as error:
        raise RuleError(f"invalid {'hash' if lower else 'identity'} [{text}]") from error


def digest_error(text: str, *, lower: bool) -> str | None:
    """Return the reason why a text is not 60 letters of one case, or None. The checksum is not checked."""
    if not all(letter.isalpha() for letter in text):
        return "invalid ID format"
    if (length := len(text.encode())) != 60:
        return f"invalid ID length, expected 60, found {length}"
    return None if re.fullmatch("[a-z]*" if lower else "[A-Z]*", text, re.ASCII) else "invalid conversion"


def without_checksum(identity: str) -> str:
    """Return the identity whose balance the live service reads: it decodes 56 letters and ignores the checksum.

    Source: qubic/go-node-connector, `types/identity.go`. Raises RuleError unless the text has 60 capitals.
    """
    if reason := digest_error(identity, lower=False):
        raise RuleError(f"converting identity to public key: {reason}")
    data = bytearray()
    for at in range(0, 56, 14):
        word = 0
        for letter in reversed(identity[at : at + 14]):
            word = word * 26 + ord(letter) - ord("A")
        data += (word % _WRAP).to_bytes(8, "little")
    return encode_identity(bytes(data))


def check_conditions(
    filters: Mapping[str, str], exclude: Mapping[str, str], ranges: Mapping[str, Bounds]
) -> Conditions:
    """Check the filters and ranges of a request for transactions. Raises RuleError."""
    include = {name: value for name, value in filters.items() if not name.endswith(_EXCLUDE)}
    deprecated = {name.removesuffix(_EXCLUDE): value for name, value in filters.items() if name.endswith(_EXCLUDE)}
    if deprecated and exclude:
        raise RuleError("cannot use both -exclude filters postfix and exclude filters together")
    included = _checked_filters(include, "creating include filters")
    excluded = _checked_filters(deprecated or exclude, "creating exclude filters")
    for name in excluded:
        if name not in _IDENTITIES:
            raise RuleError(f"unsupported exclude filter [{name}]")
    checked = _checked_ranges(ranges)
    for name in (*checked, *excluded):
        if name in included:
            raise RuleError(f"conflicting filters: duplicate [{name}] filter")
    return Conditions(included, excluded, checked)


def _checked_filters(filters: Mapping[str, str], doing: str) -> dict[str, tuple[str, ...]]:
    try:
        found = {name: _values(name, value) for name, value in sorted(filters.items())}
        _check_values(found)
    except RuleError as error:
        raise RuleError(f"{doing}: {error}") from error
    return found


def _values(name: str, value: str) -> tuple[str, ...]:
    many = name in _IDENTITIES
    most = MAX_IDENTITIES if many else 1
    handling = f"handling filter [{name}]"
    if len(value.encode()) > (_MAX_IDENTITIES_LENGTH if many else _MAX_NUMBER_LENGTH):
        raise RuleError(f"{handling}: exceeds maximum length")
    if value.count(",") >= most:
        raise RuleError(f"{handling}: more than [{most}] values")
    values = tuple(each.strip() for each in value.split(","))
    if not all(values):
        raise RuleError(f"{handling}: {'splitting: contains empty value' if many else 'trimming: empty value'}")
    for number, each in enumerate(values):
        if each in values[:number]:
            raise RuleError(f"{handling}: splitting: contains duplicate value [{each}]")
    return values


def _check_values(filters: Mapping[str, tuple[str, ...]]) -> None:
    if len(filters) > MAX_FILTERS:
        raise RuleError(f"validating filters: too many filters ({len(filters)})")
    for name, values in filters.items():
        if name not in _IDENTITIES and name not in _FILTER_BITS:
            raise RuleError(f"validating filters: unsupported filter: [{name}]")
        for value in values:
            try:
                if name in _IDENTITIES:
                    check_digest(value, lower=False)
                else:
                    _unsigned(value, _FILTER_BITS[name])
            except RuleError as error:
                what = f"invalid digest [{value}]" if name in _IDENTITIES else "invalid numeric value"
                raise RuleError(f"validating filters: invalid [{name}] filter: {what}: {error}") from error


def _checked_ranges(ranges: Mapping[str, Bounds]) -> dict[str, tuple[int, int]]:
    if len(ranges) > MAX_RANGES:
        raise RuleError(f"invalid range: too many ranges ({len(ranges)})")
    found = {}
    for name, bounds in sorted(ranges.items()):
        if name not in _RANGE_BITS:
            raise RuleError(f"invalid range: unsupported range: [{name}]")
        try:
            found[name] = _checked_range(bounds, _RANGE_BITS[name])
        except RuleError as error:
            raise RuleError(f"invalid range: invalid {name} range: {error}") from error
    return found


def _checked_range(bounds: Bounds, bits: int) -> tuple[int, int]:
    """Return the lowest and the highest value. A range with both bounds must contain two values at least."""
    lowest, highest = 0, _WRAP - 1
    for name, text in bounds.items():
        try:
            value = _unsigned(text, bits)
        except RuleError as error:
            raise RuleError(f"invalid [{name}] value: {error}") from error
        if name in {"gt", "gte"}:
            lowest = (value + (name == "gt")) % _WRAP
        else:
            highest = (value - (name == "lt")) % _WRAP
    if not bounds:
        raise RuleError("invalid range: no bounds")
    if len(bounds) > 1 and lowest >= highest:
        raise RuleError(f"invalid range: [{lowest}:{highest}]")
    return lowest, highest


def _unsigned(text: str, bits: int) -> int:
    """Read digits as Go's strconv.ParseUint does."""
    if not re.fullmatch("[0-9]+", text, re.ASCII):
        raise RuleError(f'strconv.ParseUint: parsing "{text}": invalid syntax')
    if len(text.lstrip("0")) > 20 or int(text) >= 1 << bits:
        raise RuleError(f'strconv.ParseUint: parsing "{text}": value out of range')
    return int(text)


def check_page(offset: int, size: int) -> tuple[int, int]:
    """Return offset and size of a page; a size of 0 is the default. Raises RuleError."""
    if size > MAX_PAGE:
        raise RuleError(f"validating page size: page size [{size}] exceeds allowed maximum [{MAX_PAGE}]")
    size = size or DEFAULT_PAGE
    if offset > MAX_HITS:
        raise RuleError(f"validating page offset: offset [{offset}] exceeds maximum allowed [{MAX_HITS}]")
    if offset + size > MAX_HITS:
        raise RuleError(
            f"validating page offset: offset [{offset}] + size [{size}] exceeds maximum allowed [{MAX_HITS}]"
        )
    return offset, size
