"""The handler under test, and every way in which the kit calls it."""

from __future__ import annotations

import json
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import h11
from pydantic import ValidationError

from dispatcher.attempts import Sent, next_request
from dispatcher.contract import ActionRequest, Mode, NoAnswer, Outcome, Reference, Reply, Terms, classify
from dispatcher.credentials import Credential
from dispatcher.egress import Clock, Egress
from dispatcher.handlers import Caller, Handler, HttpsHandler, LambdaHandler, terms_of
from dispatcher.signatures import Signer
from qaes.domain.addresses import Url
from qaes.domain.errors import InvalidInputError
from qaes.domain.ids import new_task_id, timestamp
from qaes.domain.policy.actions import Action, PublicKey
from qaes.domain.policy.actions import LambdaHandler as PolicyLambdaHandler
from qaes.domain.policy.names import invalid_input
from qaes.domain.policy.schemas import check_schemas, check_value

FIRST_PAUSE = timedelta(seconds=0.2)
SETTLE_SECONDS = 60
"""A handler that is busy or has accepted a request must have finished by then."""
DEADLINE = timedelta(minutes=5)

Effects = Callable[[str], int]
"""Maps a reference to the number of its effects in the handler's own records."""


class KitError(Exception):
    """The kit cannot start; the message has the correction."""


class FlawError(Exception):
    """The handler violates the contract; the message has the violation."""


class NotApplicableError(Exception):
    """A check does not apply to this handler; the message has the reason."""


@dataclass(frozen=True)
class Sample:
    """The action under test as the policy defines it, and two different examples of its parameters."""

    name: str
    action: Action
    parameters: tuple[dict[str, Any], dict[str, Any]]

    @property
    def public_keys(self) -> tuple[PublicKey, ...]:
        """Return the keys with which the handler signs callbacks."""
        return () if isinstance(self.action.handler, PolicyLambdaHandler) else self.action.handler.public_keys

    @property
    def terms(self) -> Terms:
        """Return the terms by which answers are classified."""
        return terms_of(self.action.result, callbacks=bool(self.public_keys))


def read_sample(folder: Path) -> Sample:
    """Read `action.json`, the `actions` of a proposal with one action, and `samples.json` from a folder.

    Raises
    ------
    KitError
        A file is missing or incomplete.
    """
    try:
        ((name, definition),) = json.loads((folder / "action.json").read_text())["actions"].items()
        first, second = json.loads((folder / "samples.json").read_text())[:2]
    except OSError as error:
        raise KitError(f"{error.filename} cannot be read: ACTION must be a folder with both files") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KitError(
            f"{folder}: action.json must contain one member of `actions`, and samples.json two objects"
        ) from error
    try:
        action = Action.model_validate(definition)
        check_schemas(name, action)
    except ValidationError as error:
        flaw = invalid_input(error, f"actions.{name}")
        raise KitError(f"{folder}/action.json: {flaw.field}: {flaw.message}") from error
    except InvalidInputError as error:
        raise KitError(f"{folder}/action.json: {error.field}: {error.message}") from error
    for index, parameters in enumerate((first, second)):
        try:
            check_value(action.parameters, parameters, str(index))
        except InvalidInputError as error:
            raise KitError(f"{folder}/samples.json: {error.field}: {error.message}") from error
    if first == second:
        raise KitError(f"{folder}/samples.json must contain two different objects")
    return Sample(name, action, (first, second))


def handler_of(text: str, credential: Credential | None = None) -> Handler:
    """Return the handler that HANDLER names: a URL, or a Lambda function."""
    if "://" in text:
        return HttpsHandler(text, credential)
    return LambdaHandler(text)


def effects_of(command: str) -> Effects:
    """Return the counter that a command is: it gets the reference as its argument, and prints a number."""

    def count(reference: str) -> int:
        done = subprocess.run(f"{command} {reference}", shell=True, capture_output=True, text=True, check=False)  # noqa: S602 the operator's own command
        if done.returncode != 0 or not done.stdout.strip().isdecimal():
            raise KitError(f"EFFECTS must print a number; it printed {done.stdout or done.stderr!r}")
        return int(done.stdout)

    return count


class _DeafEgress(Egress):
    """Sends a request and closes the connection: the answer is lost."""

    def receive(self, parser: h11.Connection, connection: socket.socket, clock: Clock) -> Reply:  # noqa: ARG002
        return NoAnswer("the kit closed the connection")


class Target:
    """A handler, and the action that it performs.

    Parameters
    ----------
    effects
        Counts the effects of a reference; without it, only the answers are compared.
    context
        The TLS settings, if not the system's.
    """

    def __init__(
        self,
        handler: Handler,
        sample: Sample,
        *,
        signer: Signer,
        effects: Effects | None = None,
        context: ssl.SSLContext | None = None,
    ) -> None:
        self.handler = handler
        self.sample = sample
        self.terms = sample.terms
        self.timeout_seconds = sample.action.timeout_seconds
        self.signer = signer
        # A handler under test often runs on this machine; other private addresses stay refused.
        self.egress = Egress(allow_local=True, context=context)
        self._caller = Caller(self.egress, signer)
        self._deaf_caller = Caller(_DeafEgress(allow_local=True, context=context), signer)
        self._effects = effects
        self.wait_for_callback: Callable[[str], Outcome | None] | None = None

    @property
    def url(self) -> Url:
        """Return the URL of an HTTPS handler."""
        if not isinstance(self.handler, HttpsHandler):
            raise NotApplicableError("IAM decides who invokes a Lambda function")
        return self.egress.url(self.handler.url)

    # Requests

    def request(
        self,
        mode: Mode = "execute",
        *,
        number: int = 0,
        like: ActionRequest | None = None,
        deadline: timedelta = DEADLINE,
        **changes: Any,
    ) -> ActionRequest:
        """Return a request with a new reference, or with everything of `like` but its deadline."""
        task_id = new_task_id()
        members: dict[str, Any] = {
            "reference": str(Reference(task_id, 0, 1)),
            "task_id": task_id,
            "step_id": "step_1",
            "action": self.sample.name,
            "policy_id": "policy-v1-" + "0" * 64,
            "parameters": self.sample.parameters[number],
            "requester": "conformance-kit",
            "plan_hash": "1" * 64,
            "step_hash": "2" * 64,
        }
        if like is not None:
            members = like.model_dump()
        changed = {"mode": mode, "deadline": timestamp(datetime.now(UTC) + deadline), **changes}
        return ActionRequest.model_validate(members | changed)

    # Calls

    def send(self, request: ActionRequest) -> Outcome:
        """Send a request once, and return the meaning of its answer."""
        return self._caller.call(self.handler, request, self.terms, timeout_seconds=self.timeout_seconds)

    def answer(self, request: ActionRequest) -> Outcome:
        """Send a request once; an answer outside the contract is a flaw."""
        outcome = self.send(request)
        if outcome.kind == "unknown":
            raise FlawError(f"The answer to {request.mode} is outside the contract: {outcome.reason}.")
        if outcome.kind == "not_sent":
            raise FlawError(f"The handler cannot be called: {outcome.reason}.")
        return outcome

    def lose(self, request: ActionRequest) -> None:
        """Send a request, and do not wait for its answer."""
        if isinstance(self.handler, LambdaHandler):
            threading.Thread(target=self.send, args=(request,), daemon=True).start()
            time.sleep(0.05)
        else:
            outcome = self._deaf_caller.call(self.handler, request, self.terms, timeout_seconds=self.timeout_seconds)
            if outcome.kind == "not_sent":
                raise FlawError(f"The handler cannot be called: {outcome.reason}.")

    def finish(self, request: ActionRequest, *, lost_for: float | None = None) -> Outcome:
        """Run an attempt to its end, as the dispatcher does: query before any repetition.

        With `lost_for`, the answer to the first request does not arrive, and the query follows after these seconds.
        """
        history: list[Sent] = []
        begin = datetime.now(UTC)
        if lost_for is not None:
            self.lose(request)
            time.sleep(lost_for)
            history.append(Sent("execute", begin - FIRST_PAUSE, None))
        while True:
            step = next_request(
                history,
                now=datetime.now(UTC),
                deadline=begin + DEADLINE,
                give_up_at=begin + timedelta(seconds=SETTLE_SECONDS),
                first_pause=FIRST_PAUSE,
            )
            if step.action == "ended" and history[-1].outcome is not None:
                return history[-1].outcome
            if step.action == "give_up":
                raise FlawError(f"The handler has not finished within {SETTLE_SECONDS} seconds.")
            if step.until is not None:
                time.sleep(max((step.until - datetime.now(UTC)).total_seconds(), 0))
                continue
            mode: Any = step.action
            at = datetime.now(UTC)
            outcome = self.answer(self.request(mode, like=request))
            if outcome.kind == "accepted" and self.wait_for_callback is not None:
                outcome = self.wait_for_callback(request.reference) or outcome
            history.append(Sent(mode, at, outcome))

    def post(self, body: bytes, headers: list[tuple[str, str]]) -> Outcome:
        """Send a request that the kit forged, with these headers and no others."""
        reply = self.egress.post(self.url, headers, body, seconds=self.timeout_seconds)
        return classify("execute", reply, self.terms)

    # Expectations

    def done(self, request: ActionRequest, *, lost_for: float | None = None) -> Any:
        """Run an attempt to its end, expect `done`, and return the result."""
        outcome = self.finish(request, lost_for=lost_for)
        if outcome.kind != "done":
            raise FlawError(f"A valid request was answered with {described(outcome)} instead of done.")
        return outcome.result

    def expect_unseen(self, request: ActionRequest, after: str) -> None:
        """Expect that the handler has no record of a reference, and no effect of it."""
        outcome = self.answer(self.request("query", like=request))
        if outcome.kind not in {"not_found", "refused"}:
            raise FlawError(f"After {after}, a query is answered with {described(outcome)}: the handler acted.")
        self.expect_effects(request, 0, after)

    def expect_effects(self, request: ActionRequest, count: int, after: str) -> None:
        """Expect that many effects of a reference, if the kit can count them."""
        if self._effects is None:
            return
        found = self._effects(request.reference)
        if found != count:
            raise FlawError(f"After {after}, the handler's records show {found} effects instead of {count}.")


def described(outcome: Outcome) -> str:
    """Return an outcome in words."""
    if outcome.kind == "refused":
        return f"refused ({outcome.code}: {outcome.message})"
    if outcome.kind == "unknown":
        return f"an answer outside the contract ({outcome.reason})"
    return outcome.kind
