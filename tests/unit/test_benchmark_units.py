"""The benchmark counts units as DynamoDB's documentation does; its figures stand and fall with that."""

from __future__ import annotations

import pytest

from benchmarks.units import Index, item_size, read_units, write_units

KEYS_ONLY = Index("by_status", ("status_key", "pk"), frozenset({"pk", "sk", "status_key"}))
EVERYTHING = Index("by_status", ("status_key", "pk"), None)


@pytest.mark.parametrize(
    ("item", "size"),
    [
        ({"pk": {"S": "abc"}}, 5),
        ({"ü": {"S": "€"}}, 2 + 3),
        ({"n": {"N": "0"}}, 1 + 1),
        ({"n": {"N": "1000"}}, 1 + 2),
        ({"n": {"N": "-12345"}}, 1 + 3 + 1 + 1),
        ({"b": {"B": b"1234"}}, 5),
        ({"t": {"BOOL": True}, "z": {"NULL": True}}, 4),
        ({"l": {"L": [{"S": "ab"}, {"N": "7"}]}}, 1 + 3 + (1 + 2) + (1 + 2)),
        ({"m": {"M": {"k": {"S": "v"}}}}, 1 + 3 + 1 + 2),
        ({"s": {"SS": ["ab", "c"]}}, 1 + 3),
    ],
)
def test_item_size_counts_names_and_values(item: dict[str, object], size: int) -> None:
    assert item_size(item) == size  # type: ignore[arg-type]


@pytest.mark.parametrize(("size", "units"), [(0, 1), (1024, 1), (1025, 2), (4096, 4)])
def test_write_units_round_up_to_whole_kilobytes(size: int, units: int) -> None:
    assert write_units(size) == units


def test_read_units_are_halved_when_eventually_consistent() -> None:
    assert (read_units(4097, consistent=True), read_units(4097, consistent=False)) == (2, 1)
    assert (read_units(0, consistent=True), read_units(0, consistent=False)) == (1, 0.5)


def test_index_costs_nothing_when_its_projection_is_unchanged() -> None:
    before = {"pk": {"S": "t"}, "sk": {"S": "TASK"}, "status_key": {"S": "open"}, "text": {"S": "a"}}
    after = before | {"text": {"S": "b"}}
    assert KEYS_ONLY.write_units(before, after) == 0
    assert EVERYTHING.write_units(before, after) == 1


def test_index_counts_delete_and_put_when_a_key_changes() -> None:
    before = {"pk": {"S": "t"}, "sk": {"S": "TASK"}, "status_key": {"S": "open"}, "text": {"S": "x" * 1500}}
    after = before | {"status_key": {"S": "done"}}
    assert KEYS_ONLY.write_units(before, after) == 2
    assert EVERYTHING.write_units(before, after) == 4


def test_index_counts_one_write_when_an_item_enters_or_leaves() -> None:
    item = {"pk": {"S": "t"}, "sk": {"S": "TASK"}, "status_key": {"S": "open"}}
    without = {"pk": {"S": "t"}, "sk": {"S": "TASK"}}
    assert KEYS_ONLY.write_units(None, item) == KEYS_ONLY.write_units(item, without) == 1
    assert KEYS_ONLY.write_units(None, without) == 0
