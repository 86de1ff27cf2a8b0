"""Every row of the contract's table, for Lambda (no status) and for HTTPS."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from dispatcher.contract import (
    MAX_ANSWER_BYTES,
    MAX_DRY_RUN_BYTES,
    ActionRequest,
    NoAnswer,
    NotSent,
    Outcome,
    Received,
    Reference,
    Reply,
    Terms,
    classify,
    fold_message,
)
from dispatcher.handlers import terms_of
from qaes.domain.errors import InvalidInputError
from qaes.domain.ids import new_task_id
from qaes.domain.text import flaw_of

SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["refund_id"],
    "additionalProperties": False,
    "properties": {"refund_id": {"type": "string"}},
}
TERMS = terms_of(SCHEMA)
CALLBACKS = terms_of(SCHEMA, callbacks=True)
RESULT = {"refund_id": "r-1"}
REFUSED = {"status": "refused", "error": {"code": "no_order", "message": "There is no such order."}}


def answer(value: object, status: int | None = None, retry_after: str | None = None) -> Received:
    return Received(json.dumps(value).encode(), status, retry_after)


def kind(mode: Any, reply: Reply, terms: Terms = TERMS) -> str:
    return classify(mode, reply, terms).kind


ROWS: list[tuple[str, str, Reply, Terms, str]] = [
    ("done", "execute", answer({"status": "done", "result": RESULT}), TERMS, "done"),
    ("done, HTTPS", "execute", answer({"status": "done", "result": RESULT}, 200), TERMS, "done"),
    ("done, to a query", "query", answer({"status": "done", "result": RESULT}, 200), TERMS, "done"),
    ("accepted", "execute", answer({"status": "accepted"}, 202), CALLBACKS, "accepted"),
    ("accepted, to a query", "query", answer({"status": "accepted"}, 202), CALLBACKS, "accepted"),
    ("accepted without keys", "execute", answer({"status": "accepted"}, 202), TERMS, "unknown"),
    ("accepted dry run", "dry_run", answer({"status": "accepted"}, 202), CALLBACKS, "unknown"),
    ("refused", "execute", answer(REFUSED), TERMS, "refused"),
    ("refused, HTTPS", "execute", answer(REFUSED, 422), TERMS, "refused"),
    ("busy", "execute", answer({"status": "busy", "retry_after": 5}), TERMS, "busy"),
    ("busy, 429", "execute", answer({"status": "busy", "retry_after": 5}, 429), TERMS, "busy"),
    ("busy, 503", "query", answer({"status": "busy"}, 503, "5"), TERMS, "busy"),
    ("429 of a proxy", "execute", Received(b"slow down", 429), TERMS, "busy"),
    ("503 of a proxy", "execute", Received(b"", 503, "10"), TERMS, "busy"),
    ("503 without Retry-After", "execute", Received(b"", 503), TERMS, "unknown"),
    ("busy, 503 without Retry-After", "execute", answer({"status": "busy"}, 503), TERMS, "unknown"),
    ("not_found", "query", answer({"status": "not_found"}), TERMS, "not_found"),
    ("not_found, HTTPS", "query", answer({"status": "not_found"}, 404), TERMS, "not_found"),
    ("404 of a proxy", "query", Received(b"<h1>Not Found</h1>", 404), TERMS, "unknown"),
    ("not_found to execute", "execute", answer({"status": "not_found"}, 404), TERMS, "unknown"),
    ("not_found to a dry run", "dry_run", answer({"status": "not_found"}), TERMS, "unknown"),
    ("conflict", "execute", answer({"status": "conflict"}), TERMS, "conflict"),
    ("409", "execute", Received(b"", 409), TERMS, "conflict"),
    ("409 with a body", "execute", answer({"status": "conflict"}, 409), TERMS, "conflict"),
    ("not sent", "execute", NotSent("no such name"), TERMS, "not_sent"),
    ("no answer", "execute", NoAnswer("reset"), TERMS, "unknown"),
    ("422 of a framework", "execute", answer({"detail": []}, 422), TERMS, "unknown"),
    ("redirect", "execute", Received(b"", 302), TERMS, "unknown"),
    ("500", "execute", Received(b"oops", 500), TERMS, "unknown"),
    ("401", "execute", answer({"message": "no"}, 401), TERMS, "unknown"),
    ("contradiction", "execute", answer({"status": "refused", "error": {}}, 200), TERMS, "unknown"),
    ("contradiction 2", "execute", answer({"status": "done", "result": RESULT}, 500), TERMS, "unknown"),
    ("contradiction 3", "execute", answer({"status": "done", "result": RESULT}, 409), TERMS, "unknown"),
    ("another word", "execute", answer({"status": "ok"}), TERMS, "unknown"),
    ("status of another type", "execute", answer({"status": ["done"]}), TERMS, "unknown"),
    ("no JSON", "execute", Received(b"done"), TERMS, "unknown"),
    ("no object", "execute", answer(["done"]), TERMS, "unknown"),
    ("null", "execute", Received(b"null"), TERMS, "unknown"),
    ("a name twice", "execute", Received(b'{"status":"refused","status":"done"}'), TERMS, "unknown"),
    ("deep", "execute", Received(b"[" * 200_000), TERMS, "unknown"),
    ("not UTF-8", "execute", Received(b'{"status": "\xff"}'), TERMS, "unknown"),
    ("too large", "execute", Received(b" " * MAX_ANSWER_BYTES + b"{}"), TERMS, "unknown"),
    ("wrong result", "execute", answer({"status": "done", "result": {"refund_id": 1}}), TERMS, "unknown"),
    ("no result", "execute", answer({"status": "done"}), TERMS, "unknown"),
    ("result beyond JSON", "execute", answer({"status": "done", "result": {"refund_id": 2**60}}), TERMS, "unknown"),
    ("not a number", "execute", Received(b'{"status":"done","result":NaN}'), TERMS, "unknown"),
    ("lone surrogate", "execute", Received(b'{"status":"done","result":{"refund_id":"\\ud800"}}'), TERMS, "unknown"),
]


@pytest.mark.parametrize(("mode", "reply", "terms", "expected"), [r[1:] for r in ROWS], ids=[r[0] for r in ROWS])
def test_classify_returns_the_kind_of_the_table(mode: Any, reply: Reply, terms: Terms, expected: str) -> None:
    assert kind(mode, reply, terms) == expected


@given(
    st.sampled_from(["execute", "dry_run", "query"]),
    st.binary(max_size=200)
    | st.from_regex(rb'\{"status": ?"(done|busy|accepted|x)"(, "result": [0-9])?\}', fullmatch=True),
    st.none() | st.integers(100, 599),
    st.none() | st.text(max_size=12),
)
def test_classify_never_raises(mode: Any, body: bytes, status: int | None, retry_after: str | None) -> None:
    assert isinstance(classify(mode, Received(body, status, retry_after), TERMS), Outcome)


def test_outcome_of_refusal_keeps_code_and_message() -> None:
    outcome = classify("execute", answer(REFUSED), TERMS)
    assert (outcome.code, outcome.message) == ("no_order", "There is no such order.")


@pytest.mark.parametrize("error", [None, "no", {"code": 7, "message": 7}, {"code": "a b\n", "message": []}])
def test_refusal_has_defaults_when_its_error_is_malformed(error: object) -> None:
    outcome = classify("execute", answer({"status": "refused", "error": error}, 422), TERMS)
    assert (outcome.kind, outcome.code) == ("refused", "unspecified")
    assert outcome.message == "The handler gave no message."


@pytest.mark.parametrize(
    ("value", "header", "expected"),
    [
        (5, None, 5),
        (None, "7", 7),
        (0, None, 1),
        (10**9, None, 3600),
        (True, "9", 9),
        ("5", None, None),
        (None, "Wed, 21 Oct 2026 07:28:00 GMT", None),
        (None, "9" * 30, None),
        (-4, None, 1),
    ],
)
def test_retry_after_is_bounded(value: object, header: str | None, expected: int | None) -> None:
    reply = answer({"status": "busy", "retry_after": value}, 429, header)
    assert classify("execute", reply, TERMS).retry_after == expected


def test_dry_run_answer_is_limited_and_has_its_own_shape() -> None:
    def outcome(length: int) -> str:
        return kind("dry_run", answer({"status": "done", "result": {"note": "x" * length}}))

    overhead = len('{"note":""}')
    assert outcome(MAX_DRY_RUN_BYTES - overhead) == "done"
    assert outcome(MAX_DRY_RUN_BYTES - overhead + 1) == "unknown"


def test_flaw_of_result_never_quotes_the_value() -> None:
    outcome = classify("execute", answer({"status": "done", "result": {"refund_id": {"secret": "s3cr3t"}}}), TERMS)
    assert "result.refund_id:" in outcome.reason
    assert "s3cr3t" not in outcome.reason


# Messages


@given(st.text(max_size=3000))
def test_message_is_short_inert_and_on_one_line(text: str) -> None:
    folded = fold_message(text)
    assert len(folded) <= 500
    assert flaw_of(folded, lines=False) is None


def test_message_shows_hidden_characters_as_escapes() -> None:
    assert fold_message("pay \u202eEVE\u202c\x1b[2J\nnow") == "pay \\u{202E}EVE\\u{202C}\\u{001B}[2J now"


def test_message_is_cut_when_escapes_make_it_longer() -> None:
    assert fold_message("\u202e" * 400).endswith("…")


# Requests and references


def request(**changes: Any) -> ActionRequest:
    task_id = new_task_id()
    members = {
        "reference": str(Reference(task_id, 0, 1)),
        "mode": "execute",
        "task_id": task_id,
        "step_id": "step_1",
        "action": "refund_customer",
        "policy_id": "policy-v2",
        "parameters": {"order_id": "123456", "amount": 1},
        "requester": "alice",
        "plan_hash": "0" * 64,
        "step_hash": "1" * 64,
        "deadline": "2026-11-28T12:00:00.000Z",
    }
    return ActionRequest.model_validate(members | changes)


def test_reference_round_trips() -> None:
    reference = Reference(new_task_id(), 19, 3)
    assert Reference.parse(str(reference)) == reference


@pytest.mark.parametrize("text", ["", "task_1.0.1", "{}.00.1", "{}.0.0", "{}.0.1 ", "{}.0.1\n", "{}.-1.1", "{}.0"])
def test_reference_is_refused_in_another_spelling(text: str) -> None:
    with pytest.raises(InvalidInputError):
        Reference.parse(text.format(new_task_id()))


def test_request_body_is_the_same_for_the_same_request() -> None:
    one = request()
    assert one.body() == ActionRequest.model_validate_json(one.body()).body()
    assert set(json.loads(one.body())) == {
        *("reference", "mode", "task_id", "step_id", "action", "policy_id", "parameters", "requester", "agent"),
        *("approvals", "plan_hash", "step_hash", "deadline"),
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"mode": "run"},
        {"plan_hash": "x"},
        {"deadline": "tomorrow"},
        {"reference": "r"},
        {"action": "a b"},
        {"extra": 1},
    ],
)
def test_request_is_refused_when_malformed(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        request(**changes)
