from __future__ import annotations

import hashlib
import json
import random
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaes.domain.canonical import canonical_json, hash_of, sha256_hex
from qaes.domain.errors import InvalidInputError
from qaes.domain.ids import is_plan_id, is_task_id, new_plan_id, new_task_id, now, parse_timestamp, timestamp

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(min_value=-(2**53) + 1, max_value=2**53 - 1)
    # A float of 2^53 or more is written like an integer, and would not be read back as a float.
    | st.floats(min_value=-(2**53) + 1, max_value=2**53 - 1)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner)
    ),
    max_leaves=12,
)


@given(JSON)
def test_text_is_a_fixed_point(value: Any) -> None:
    text = canonical_json(value)
    assert canonical_json(json.loads(text)) == text


@given(st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), st.integers(0, 9)), st.randoms())
def test_order_of_keys_does_not_matter(value: dict[str, int], rng: random.Random) -> None:
    items = list(value.items())
    rng.shuffle(items)
    assert hash_of(dict(items)) == hash_of(value)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"b": 1, "a": [True, None]}, '{"a":[true,null],"b":1}'),
        (1.0, "1"),
        (-0.0, "0"),
        (1e21, "1e+21"),
        ("é\n", '"é\\n"'),
        # RFC 8785, section 3.2.3: keys are sorted by UTF-16 code units.
        ({"\ufb33": 1, "\U0001f600": 2}, '{"\U0001f600":2,"\ufb33":1}'),
    ],
)
def test_texts_of_rfc_8785(value: Any, text: str) -> None:
    assert canonical_json(value) == text


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 2**53 + 1, -(2**53) - 1, "\ud800", {1, 2}, b"x"])
def test_value_without_canonical_text_is_refused(value: Any) -> None:
    with pytest.raises(InvalidInputError):
        canonical_json(value)


def test_sha256() -> None:
    assert sha256_hex("a") == sha256_hex(b"a") == hashlib.sha256(b"a").hexdigest()


def test_ids_are_uuids_of_version_7_in_order_of_time() -> None:
    first = new_task_id()
    time.sleep(0.002)
    second = new_task_id()
    assert first < second and is_task_id(first) and not is_plan_id(first) and is_plan_id(new_plan_id())
    assert not is_task_id("task_1") and not is_task_id(first + "\n")


def test_timestamps_have_milliseconds_and_a_z() -> None:
    moment = now()
    text = timestamp(moment)
    assert text.endswith("Z") and len(text) == 24
    assert abs((parse_timestamp(text) - moment).total_seconds()) < 0.001
