"""The chain of audit entries, without AWS: an altered, missing or moved entry is found, and named."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qaes.domain.audit import GENESIS, AuditEntry, BrokenChainError, build_entry, entry_text, parse_entry, verify_chain
from qaes.domain.canonical import canonical_json
from qaes.domain.errors import InvalidInputError
from qaes.domain.merkle import leaf_hash
from qaes.domain.models import Event

LOG, TASK = "qaes-test", "task_019ab000-0000-7000-8000-000000000001"
EVENT = Event(
    kind="task_started",
    actor="alice",
    status="pending",
    input_hash="a" * 64,
    output_hash="b" * 64,
    timestamp="2026-11-23T12:00:00.000Z",
)
STEP = EVENT.model_copy(
    update={"kind": "step_executed", "step_index": 0, "step_id": "step_0", "step_type": "check_balance"}
)
FIELDS = {
    "v", "log_id", "task_id", "seq", "step_index", "step_id", "step_type", "kind", "actor", "status",
    "input_hash", "output_hash", "plan_hash", "policy_id", "nonce", "prev", "timestamp",
}  # fmt: skip


def entry(seq: int = 1, prev: str = GENESIS, event: Event = EVENT) -> AuditEntry:
    return build_entry(event, log_id=LOG, task_id=TASK, seq=seq, prev=prev)


def links(length: int = 4) -> list[tuple[str, str]]:
    made: list[tuple[str, str]] = []
    for seq in range(1, length + 1):
        text = entry_text(entry(seq, made[-1][1] if made else GENESIS, EVENT if seq == 1 else STEP))
        made.append((text, leaf_hash(text)))
    return made


def altered(text: str, **changes: Any) -> str:
    return canonical_json(json.loads(text) | changes)


def broken(chain: list[tuple[str, str]], log_id: str = LOG, task_id: str = TASK) -> tuple[int, str]:
    with pytest.raises(BrokenChainError) as caught:
        verify_chain(chain, log_id=log_id, stream=task_id)
    return caught.value.seq, caught.value.check


def test_entry_has_just_these_fields_in_canonical_order() -> None:
    text = entry_text(entry())
    assert set(json.loads(text)) == FIELDS
    assert text == json.dumps(json.loads(text), sort_keys=True, separators=(",", ":"))


def test_leaf_hash_is_that_of_rfc_6962() -> None:
    assert leaf_hash("") == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert leaf_hash("ä") == hashlib.sha256(b"\x00" + "ä".encode()).hexdigest()


def test_event_without_a_step_has_its_kind_as_type() -> None:
    assert (entry().step_index, entry().step_type) == (-1, "task_started")
    assert (entry(event=STEP).step_index, entry(event=STEP).step_type) == (0, "check_balance")


def test_two_entries_of_one_event_are_indistinguishable() -> None:
    assert leaf_hash(entry_text(entry())) != leaf_hash(entry_text(entry()))


def test_stored_text_is_read_back_and_nothing_else_is() -> None:
    text = entry_text(entry())
    assert entry_text(parse_entry(text)) == text
    for other in (
        "",
        "{}",
        "[]",
        "null",
        text + " ",
        altered(text, v=2),
        altered(text, seq="1"),
        altered(text, more=1),
    ):
        with pytest.raises(InvalidInputError):
            parse_entry(other)
    with pytest.raises(InvalidInputError):
        parse_entry(json.dumps(json.loads(text), sort_keys=True))


def test_chain_holds_and_ends_in_its_last_hash() -> None:
    chain = links()
    assert verify_chain(chain, log_id=LOG, stream=TASK) == chain[-1][1]
    assert verify_chain([], log_id=LOG, stream=TASK) == GENESIS


def test_beginning_of_a_chain_holds() -> None:
    chain = links()
    assert verify_chain(chain[:2], log_id=LOG, stream=TASK) == chain[1][1]


def test_altered_text_is_found_where_it_is() -> None:
    chain = links()
    chain[1] = (altered(chain[1][0], status="failed"), chain[1][1])
    assert broken(chain) == (2, "leaf")


def test_altered_text_with_own_hash_breaks_chain() -> None:
    chain = links()
    text = altered(chain[1][0], status="failed")
    chain[1] = (text, leaf_hash(text))
    assert broken(chain) == (3, "prev")


def test_missing_entry_is_a_gap() -> None:
    chain = links()
    assert broken(chain[:1] + chain[2:]) == (2, "seq")
    assert broken(chain[1:]) == (1, "seq")


def test_chain_of_another_task_or_log_is_refused() -> None:
    assert broken(links(), log_id="another") == (1, "log")
    assert broken(links(), task_id="task_019ab000-0000-7000-8000-000000000002") == (1, "log")


def test_malformed_entry_is_named() -> None:
    chain = links()
    chain[2] = ("{}", leaf_hash("{}"))
    assert broken(chain) == (3, "text")


@given(st.data())
def test_no_single_change_goes_unnoticed(data: st.DataObject) -> None:
    """Changing any field of any entry changes the chain's head."""
    chain = links()
    head = chain[-1][1]
    at = data.draw(st.integers(0, len(chain) - 1))
    name = data.draw(st.sampled_from(sorted(FIELDS)))
    value = data.draw(st.text() | st.integers(-1, 2**31))
    text, leaf = chain[at]
    if json.loads(text)[name] == value:
        return
    changed = altered(text, **{name: value})
    for recorded in (leaf, leaf_hash(changed)):
        forged = [*chain[:at], (changed, recorded), *chain[at + 1 :]]
        try:
            found, wrong = verify_chain(forged, log_id=LOG, stream=TASK), None
        except BrokenChainError as error:
            found, wrong = None, error.seq
        assert found != head
        assert wrong in {None, at + 1, at + 2}


@given(st.permutations(range(4)))
def test_order_matters(order: list[int]) -> None:
    chain = links()
    moved = [chain[n] for n in order]
    if moved != chain:
        assert broken(moved)[1] == "seq"
