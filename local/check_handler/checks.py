"""The checks of the conformance kit. Each has a name, a sentence that the handler must keep, and a reason if not."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dispatcher.contract import ActionRequest
from dispatcher.credentials import Basic, Credential, Header
from dispatcher.handlers import HttpsHandler
from dispatcher.signatures import Signer
from local.check_handler.target import FlawError, NotApplicableError, Target, described

AT_ONCE = 5
LOST_FOR = (0.0, 1.0)
"""Seconds from a lost answer to the query: while the handler may still act, and later."""
PAST = timedelta(minutes=-5)

Run = Callable[[Target], None]


@dataclass(frozen=True)
class Check:
    """One property of a handler."""

    name: str
    promise: str
    run: Run


@dataclass(frozen=True)
class Result:
    """The result of one check; `text` is the reason of a failure or of a skip."""

    check: Check
    state: Literal["passed", "failed", "skipped"]
    text: str = ""


def run_checks(target: Target) -> Iterator[Result]:
    """Run every check, one after the other; after a handler that cannot execute, no others."""
    for check in CHECKS:
        try:
            check.run(target)
        except FlawError as flaw:
            yield Result(check, "failed", str(flaw))
            if check.run is executes:
                return
        except NotApplicableError as reason:
            yield Result(check, "skipped", str(reason))
        else:
            yield Result(check, "passed")


# The checks


def executes(target: Target) -> None:
    request = target.request()
    target.done(request)
    target.expect_effects(request, 1, "one request")


def unknown_reference(target: Target) -> None:
    request = target.request()
    for _ in range(2):  # the first query must not make the reference known
        outcome = target.answer(target.request("query", like=request))
        if outcome.kind != "not_found":
            raise FlawError(f"A query of a reference without a request is answered with {described(outcome)}.")
    target.expect_effects(request, 0, "a query")


def answers_query(target: Target) -> None:
    request = target.request()
    result = target.done(request)
    _expect_same(target, target.request("query", like=request), result, "A query after the execution")


def duplicate(target: Target) -> None:
    request = target.request()
    result = target.done(request)
    _expect_same(target, target.request(like=request), result, "The second of two equal requests")
    target.expect_effects(request, 1, "two equal requests")


def concurrent(target: Target) -> None:
    request = target.request()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        outcomes = list(threads.map(target.answer, [target.request(like=request) for _ in range(AT_ONCE)]))
    wrong = [outcome for outcome in outcomes if outcome.kind not in {"done", "accepted", "busy"}]
    if wrong:
        raise FlawError(f"One of {AT_ONCE} equal requests at once is answered with {described(wrong[0])}.")
    final = target.done(request)
    results = [outcome.result for outcome in outcomes if outcome.kind == "done"]
    if any(result != final for result in results):
        raise FlawError(f"{AT_ONCE} equal requests at once have different results: the handler acted more than once.")
    target.expect_effects(request, 1, f"{AT_ONCE} equal requests at once")


def timed_out(target: Target) -> None:
    for seconds in LOST_FOR:
        request = target.request()
        result = target.done(request, lost_for=seconds)
        _expect_same(target, target.request("query", like=request), result, "A query after a lost answer")
        target.expect_effects(request, 1, "a lost answer")


def conflict(target: Target) -> None:
    request = target.request()
    result = target.done(request)
    others = {
        "other parameters": target.request(like=request, parameters=target.sample.parameters[1]),
        "another step hash": target.request(like=request, step_hash="3" * 64),
        "another plan hash": target.request(like=request, plan_hash="3" * 64),
    }
    for name, other in others.items():
        outcome = target.answer(other)
        if outcome.kind != "conflict":
            raise FlawError(f"A known reference with {name} is answered with {described(outcome)} instead of 409.")
    _expect_same(target, target.request("query", like=request), result, "A query after a conflict")
    target.expect_effects(request, 1, "a conflict")


def late(target: Target) -> None:
    request = target.request(deadline=PAST)
    outcome = target.answer(request)
    if outcome.kind != "refused":
        raise FlawError(f"A request after its deadline is answered with {described(outcome)} instead of refused.")
    target.expect_unseen(request, "a request after its deadline")
    known = target.request()
    result = target.done(known)
    _expect_same(target, target.request("query", like=known, deadline=PAST), result, "A query after the deadline")
    again = target.answer(target.request(like=known, deadline=PAST))
    if again.kind != "done" or again.result != result:
        raise FlawError(f"A late duplicate of a finished request is answered with {described(again)} instead of done.")


def reordered(target: Target) -> None:
    request = target.request()
    target.answer(target.request("query", like=request))
    result = target.done(request)
    if target.sample.action.dry_run:
        outcome = target.answer(target.request("dry_run", like=request, parameters=target.sample.parameters[1]))
        if outcome.kind not in {"done", "refused", "busy"}:
            raise FlawError(f"A dry run with the reference of an execution is answered with {described(outcome)}.")
    _expect_same(target, target.request("query", like=request), result, "A query after requests in another order")
    target.expect_effects(request, 1, "requests in another order")


def dry_run(target: Target) -> None:
    if not target.sample.action.dry_run:
        raise NotApplicableError("the action has no `dry_run`")
    request = target.request("dry_run")
    outcome = target.answer(request)
    if outcome.kind != "done":
        raise FlawError(f"A dry run is answered with {described(outcome)} instead of done.")
    target.expect_unseen(request, "a dry run")
    target.done(target.request(like=request))


def other_action(target: Target) -> None:
    request = target.request(action="qaes_conformance_other")
    outcome = target.send(request)
    if outcome.kind in {"done", "accepted"}:
        raise FlawError(f"A request for another action is answered with {described(outcome)}.")
    target.expect_effects(request, 0, "a request for another action")


def forged(target: Target) -> None:
    forgeries = _FORGED_CREDENTIALS if _credential(target) else _FORGED_SIGNATURES
    for name, forge in forgeries.items():
        request = target.request()
        outcome = target.post(*forge(target, request))
        if outcome.kind in {"done", "accepted"}:
            raise FlawError(f"A request with {name} is answered with {described(outcome)}.")
        target.expect_unseen(request, f"a request with {name}")
    known = target.request()
    target.done(known)
    outcome = target.post(target.request("query", like=known).body(), _plain(known))
    if outcome.kind == "done":
        raise FlawError("A query without a signature or a credential is answered with the result.")


def callback(target: Target) -> None:
    if not target.sample.public_keys:
        raise NotApplicableError("the action has no `public_keys`")
    if target.wait_for_callback is None:
        raise NotApplicableError("CALLBACK is not set, so the handler has nowhere to send its callback")
    request = target.request()
    if target.answer(request).kind != "accepted":
        raise NotApplicableError("the handler finishes at once")
    outcome = target.wait_for_callback(request.reference)
    if outcome is None:
        raise FlawError("The handler accepted a request, and no valid callback came.")
    if outcome.kind == "done":
        _expect_same(target, target.request("query", like=request), outcome.result, "A query after the callback")


CHECKS = (
    Check("executes", "A valid request is done, and its result matches the schema", executes),
    Check("unknown_reference", "A query of an unknown reference is answered with not_found", unknown_reference),
    Check("answers_query", "A query after the execution returns the same result", answers_query),
    Check("duplicate", "A duplicate returns the first result and acts no more", duplicate),
    Check("concurrent", f"{AT_ONCE} equal requests at once act once", concurrent),
    Check("timed_out", "After a lost answer, a query finds the outcome, and the handler acts once", timed_out),
    Check("conflict", "A known reference with different content is answered with 409", conflict),
    Check("late", "After the deadline, nothing begins; finished work is still reported", late),
    Check("reordered", "Requests in another order change nothing", reordered),
    Check("dry_run", "A dry run has no effect and leaves no record", dry_run),
    Check("other_action", "A request for another action has no effect", other_action),
    Check("forged", "A request that the dispatcher did not make has no effect", forged),
    Check("callback", "A callback is signed, for its own reference, and agrees with a query", callback),
)


def _expect_same(target: Target, request: ActionRequest, result: object, name: str) -> None:
    outcome = target.answer(request)
    if outcome.kind != "done":
        raise FlawError(f"{name} is answered with {described(outcome)} instead of done.")
    if outcome.result != result:
        raise FlawError(f"{name} returns another result than the first answer: the handler acted twice.")


# Forgeries

Forge = Callable[[Target, ActionRequest], tuple[bytes, list[tuple[str, str]]]]


def _plain(request: ActionRequest) -> list[tuple[str, str]]:
    return [("Content-Type", "application/json"), ("Idempotency-Key", request.reference)]


def _signed(
    target: Target, request: ActionRequest, *, url: str = "", at: datetime | None = None, signer: Signer | None = None
) -> dict[str, str]:
    return (signer or target.signer).headers(
        "POST", url or str(target.url), dict(_plain(request)), request.body(), now=at
    )


def _by_another_key(target: Target, request: ActionRequest) -> tuple[bytes, list[tuple[str, str]]]:
    stranger = Signer(Ed25519PrivateKey.generate())
    headers = _signed(target, request, signer=stranger)
    claimed = headers["Signature-Input"].replace(stranger.key_id, target.signer.key_id)
    return request.body(), list((headers | {"Signature-Input": claimed}).items())


def _with_another_body(target: Target, request: ActionRequest) -> tuple[bytes, list[tuple[str, str]]]:
    other = target.request(like=request, parameters=target.sample.parameters[1])
    return other.body(), list(_signed(target, request).items())


def _with_another_body_and_digest(target: Target, request: ActionRequest) -> tuple[bytes, list[tuple[str, str]]]:
    other = target.request(like=request, parameters=target.sample.parameters[1])
    digest = _signed(target, other)["Content-Digest"]
    return other.body(), list((_signed(target, request) | {"Content-Digest": digest}).items())


def _unsigned(_target: Target, request: ActionRequest) -> tuple[bytes, list[tuple[str, str]]]:
    return request.body(), _plain(request)


_FORGED_SIGNATURES: dict[str, Forge] = {
    "no signature": _unsigned,
    "the signature of another key": _by_another_key,
    "a body that was changed after the signature": _with_another_body,
    "a body and a digest that were changed after the signature": _with_another_body_and_digest,
    "the signature for another URL": lambda target, request: (
        request.body(),
        list(_signed(target, request, url="https://other.example/").items()),
    ),
    "a signature that expired an hour ago": lambda target, request: (
        request.body(),
        list(_signed(target, request, at=datetime.now(UTC) - timedelta(hours=1)).items()),
    ),
}


def _credential(target: Target) -> Credential | None:
    if not isinstance(target.handler, HttpsHandler):
        raise NotApplicableError("IAM decides who invokes a Lambda function")
    return target.handler.credential


def _wrong_credential(target: Target, request: ActionRequest) -> tuple[bytes, list[tuple[str, str]]]:
    credential = _credential(target)
    pair = ("Authorization", "Bearer wrong")
    if isinstance(credential, Basic):
        pair = ("Authorization", "Basic " + base64.b64encode(b"wrong:wrong").decode())
    if isinstance(credential, Header):
        pair = (credential.name, "wrong")
    return request.body(), [*_plain(request), pair]


_FORGED_CREDENTIALS: dict[str, Forge] = {
    "no credential": _unsigned,
    "a wrong credential": _wrong_credential,
}
