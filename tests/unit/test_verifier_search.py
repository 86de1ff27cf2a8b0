"""Sequences of entries, up to a depth: the verifier accepts those that a small model accepts, and no others.

The model is written from docs/audit.md ("The life of a task") and shares nothing with the verifier. The search tries
every kind of entry next; the content of an entry follows from the entries before it. A sequence that both refuse is not
continued: the verifier reports the first entry that breaks a rule, so every longer sequence is refused too.

The verifier's story receives the entries one by one, without chain, anchor and signature, which do not depend on their
content. A sample of the sequences goes through the whole verifier as well.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, NamedTuple

import pytest

from qaes.domain.canonical import canonical_json, salted_hash, sha256_hex
from qaes.domain.ids import timestamp
from qaes.domain.merkle import leaf_hash
from qaes.domain.policy import Rule
from tests.support.bundles import LOG_ID, RULES, SALT, START, TASK_ID, Anchorer, Trail, load_verifier, not_enforced
from tests.support.sampling import SEED, WHOLE, sample
from tests.support.tracing import untraced

verifier = load_verifier()
ANCHORER = Anchorer()
SKIPS = 1_000
"""Seconds until an approval's expiry is recorded; the approval is open for 900."""

PEOPLE = ("bob", "carol", "olivia", "alice")
ENDS = ("completed", "denied", "rejected", "expired", "failed", "cancelled")
EVENTS = (
    "start", "policy", "plan", "ask", *(f"yes {who}" for who in PEOPLE), "no dave", "remind", "expire", "withdraw",
    "undeliverable", "begin", "succeed", "fail", "refuse", "retry alice", "retry olivia",
    *(f"end {status}" for status in ENDS),
)  # fmt: skip


class Model(NamedTuple):
    """The state that decides which entries may follow."""

    started: bool = False
    policy: bool = False
    plan: bool = False
    done: int = 0
    """Steps that have succeeded."""
    run: int = 1
    ended: str = ""
    asked: str = ""
    """The state of this run's newest approval: pending, approved, rejected, expired, cancelled, undeliverable."""
    about: int = -1
    """The step that it is about."""
    yes: tuple[str, ...] = ()
    used: bool = False
    rejected: bool = False
    """In this run."""
    begun_in: int = 0
    """The run that began the step whose outcome is not known, or 0."""
    over_in: int = 0
    """The run in which the step failed, or was refused."""
    askers: tuple[str, ...] = ("alice",)

    def attempted(self) -> bool:
        return self.run in (self.begun_in, self.over_in)

    def in_use(self) -> str:
        return "" if self.used else self.asked


class Life(NamedTuple):
    """A kind of task: how many steps it has, from which on a person is needed, and how many."""

    trail: Trail
    steps: int
    asks_from: int
    required: int


def follow(was: Model, event: str, life: Life) -> Model | None:  # noqa: C901 - a table
    """The state after an event; None if it may not follow."""
    what, _, which = event.partition(" ")
    if not was.started or what == "start":
        return was._replace(started=True) if what == "start" and not was.started else None
    if was.ended and what not in ("retry", "succeed", "fail"):
        return None
    now = was.done < life.steps and was.plan  # there is a step that could be done
    if what == "policy":
        return None if was.policy else was._replace(policy=True)
    if what == "plan":
        return was._replace(plan=True) if was.policy and not was.plan else None
    if what == "ask":
        open_ = was.in_use() in ("pending", "rejected", "expired", "cancelled", "undeliverable")
        enough = was.in_use() == "approved" and was.about == was.done and len(was.yes) >= life.required
        if not now or open_ or enough or was.rejected or was.attempted():
            return None
        return was._replace(asked="pending", about=was.done, yes=(), used=False)
    if what in ("yes", "no"):
        if was.in_use() != "pending" or which in was.yes or which in was.askers:
            return None
        if what == "no":
            return was._replace(asked="rejected", rejected=True)
        yes = (*was.yes, which)
        return was._replace(yes=yes, asked="approved" if len(yes) >= life.required else "pending")
    if what in ("remind", "expire", "withdraw"):
        closed = {"remind": "pending", "expire": "expired", "withdraw": "cancelled"}[what]
        return was._replace(asked=closed) if was.in_use() == "pending" else None
    if what == "undeliverable":
        return was._replace(asked="undeliverable") if was.in_use() == "approved" else None
    if what == "begin":
        mine = was.in_use() == "approved" and was.about == was.done
        lacks = was.done >= life.asks_from and not (mine and len(was.yes) >= life.required)
        if not now or was.attempted() or was.in_use() not in ("", "approved") or was.rejected or lacks:
            return None
        return was._replace(begun_in=was.run, used=True)
    if what == "succeed":
        return was._replace(done=was.done + 1, begun_in=0, over_in=0) if now and was.begun_in else None
    if what == "fail":
        over = max(was.over_in, was.begun_in)
        return was._replace(begun_in=0, over_in=over) if now and was.begun_in else None
    if what == "refuse":
        return was._replace(over_in=was.run) if now and not was.attempted() else None
    if what == "retry":
        if was.ended not in ("failed", "expired"):
            return None
        again = was._replace(ended="", run=was.run + 1, asked="", about=-1, yes=(), used=False, rejected=False)
        return again._replace(askers=(*was.askers, which))
    all_done = was.plan and was.done == life.steps
    if was.rejected and which != "rejected" and not (which == "completed" and all_done):
        return None
    led = {"completed": all_done, "denied": not all_done, "rejected": was.rejected}
    led |= {"expired": was.in_use() == "expired", "failed": True, "cancelled": True}
    return was._replace(ended=which) if led[which] else None


class Writer:
    """Writes the entry of an event, in the state so far."""

    def __init__(self, life: Life) -> None:
        trail = life.trail
        assert trail.plan is not None
        self.trail, self.life, self.steps = trail, life, trail.plan.steps
        self.plan, self.plan_hash = trail.plan.model_dump(mode="json"), trail.plan.hash()
        self.plan_text = canonical_json(self.plan)
        self.decision, self.again = trail.decision().model_dump(mode="json"), trail.request_again()
        self.analysis = {"action_type": self.decision["action_type"], "risk_level": self.decision["risk_level"]}
        self.hashes = [step.hash() for step in self.steps]
        self.results = [trail.result(step) for step in self.steps]
        self.times = [timestamp(START + timedelta(seconds=at)) for at in range(20 * SKIPS)]

    def write(self, was: Model, event: str, clock: int, asked: dict[str, Any]) -> dict[str, Any]:
        what, _, which = event.partition(" ")
        kind, actor, status, input_, output = getattr(self, f"_{what}")(was, which, clock, asked)
        entry = {
            "kind": kind, "actor": actor, "status": status, "input": input_, "output": output, "task_id": TASK_ID,
            "step_index": -1, "step_id": "", "step_type": kind, "timestamp": self.times[clock], "where": "entry",
            "plan_hash": self.plan_hash if was.plan or what == "plan" else "",
            "policy_id": self.trail.policy.policy_id if was.policy or what == "policy" else "",
        }  # fmt: skip
        if kind.startswith(("approval_", "step_")):
            of_approval = kind.startswith("approval_") and what != "ask" and was.about >= 0
            at = min(was.about if of_approval else was.done, self.life.steps - 1)
            entry |= {"step_index": at, "step_id": self.steps[at].step_id, "step_type": self.steps[at].type}
        return entry

    def _start(self, *_: Any) -> tuple[Any, ...]:
        return "task_started", "alice", "pending", self.trail.request, {"task_id": TASK_ID, "idempotency_key": None}

    def _policy(self, *_: Any) -> tuple[Any, ...]:
        return "policy_checked", "planner", "allowed", self.analysis, self.decision

    def _plan(self, *_: Any) -> tuple[Any, ...]:
        return "plan_built", "planner", "planned", self.trail.request, self.plan

    def _ask(self, was: Model, _: str, clock: int, asked: dict[str, Any]) -> tuple[Any, ...]:
        at = min(was.done, self.life.steps - 1)
        new = {
            "plan_hash": self.plan_hash, "step_hash": self.hashes[at], "policy_id": self.trail.policy.policy_id,
            "round": asked.get("rounds", {}).get(at, 0) + 1, "required": self.life.required,
            "expires_at": self.times[clock + 900],
        }  # fmt: skip
        return "approval_requested", "compliance", "pending", new, {"status": "pending", "actor": "compliance"}

    def _decided(self, was: Model, who: str, clock: int, asked: dict[str, Any], *, yes: bool) -> tuple[Any, ...]:
        status = "approved" if yes else "rejected"
        said = {
            "status": status, "actor": who, "approved": yes, "reason": "", "decided_at": self.times[clock],
            "approvals": len(was.yes) + yes, "plan_hash": self.plan_hash, "idempotency_key": None,
            "step_hash": asked.get("input", {}).get("step_hash", ""),
        }  # fmt: skip
        return "approval_decided", who, status, asked.get("input", {}), said

    def _yes(self, was: Model, who: str, clock: int, asked: dict[str, Any]) -> tuple[Any, ...]:
        return self._decided(was, who, clock, asked, yes=True)

    def _no(self, was: Model, who: str, clock: int, asked: dict[str, Any]) -> tuple[Any, ...]:
        return self._decided(was, who, clock, asked, yes=False)

    def _closed(self, kind: str, actor: str, status: str, asked: dict[str, Any]) -> tuple[Any, ...]:
        return f"approval_{kind}", actor, status, asked.get("input", {}), {"status": status, "actor": actor}

    def _remind(self, _: Model, __: str, ___: int, asked: dict[str, Any]) -> tuple[Any, ...]:
        return self._closed("reminder", "reconciler", "pending", asked)

    def _expire(self, _: Model, __: str, ___: int, asked: dict[str, Any]) -> tuple[Any, ...]:
        return self._closed("expired", "compliance", "expired", asked)

    def _withdraw(self, _: Model, __: str, ___: int, asked: dict[str, Any]) -> tuple[Any, ...]:
        return self._closed("cancelled", "compliance", "cancelled", asked)

    def _undeliverable(self, _: Model, __: str, ___: int, asked: dict[str, Any]) -> tuple[Any, ...]:
        return self._closed("undeliverable", "execution", "undeliverable", asked)

    def _begin(self, was: Model, _: str, __: int, asked: dict[str, Any]) -> tuple[Any, ...]:
        at = min(was.done, self.life.steps - 1)
        mine = was.in_use() != "" and was.about == was.done
        said = {"step_hash": self.hashes[at], "run": was.run, "attempt": 1}
        said["approval"] = asked["input"]["round"] if mine else None
        return "step_started", "worker", "running", said, self.decision

    def _succeed(self, was: Model, *_: Any) -> tuple[Any, ...]:
        at = min(was.done, self.life.steps - 1)
        return "step_executed", "worker", "succeeded", self.steps[at].parameters, self.results[at]

    def _fail(self, was: Model, *_: Any) -> tuple[Any, ...]:
        at = min(was.done, self.life.steps - 1)
        return "step_executed", "worker", "failed", self.steps[at].parameters, {"error": "x"}

    def _refuse(self, was: Model, *_: Any) -> tuple[Any, ...]:
        at = min(was.done, self.life.steps - 1)
        return "step_executed", "worker", "failed", self.steps[at].parameters, {"error": "x", "begun": False}

    def _retry(self, was: Model, who: str, *_: Any) -> tuple[Any, ...]:
        output = {"run": was.run + 1, "idempotency_key": None}
        return "task_retried", who, "executing" if was.plan else "pending", self.again, output

    def _end(self, _: Model, status: str, *__: Any) -> tuple[Any, ...]:
        output = {"status": status, "reason": None, "failed_step": None, "idempotency_key": None}
        return "task_ended", "alice" if status == "cancelled" else "execution", status, self.again, output


class Told(NamedTuple):
    """A sequence that both accept, with the states of the model and the verifier after it."""

    model: Model
    story: dict[str, Any]
    clock: int
    asked: dict[str, Any]
    entries: tuple[dict[str, Any], ...]


def life(name: str) -> Life:
    """Return a generic action, which needs two people, or a monitored wallet, which needs no approval."""
    if name == "paint":
        rule = Rule(allowed=True, requires_approval=True, risk_level="low", approvals=2)
        trail = Trail("paint", {"colour": "green"}, RULES | {"paint": rule})
        return Life(trail.start().check_policy().build(), 2, 1, 2)
    return Life(Trail("monitor_wallet", {"threshold": 1}).start().check_policy().build(), 2, 9, 1)


def new_story(of: Life) -> Any:
    return verifier.Story({sha256_hex(of.trail.policy_text): of.trail.policy_text}, "mock")


def told_by(story: Any, writer: Writer, before: Told, event: str) -> tuple[Told | None, str]:
    """Let the verifier judge one more entry; return its new state, or None and the reason."""
    clock = before.clock + (SKIPS if event == "expire" else 1)
    entry = writer.write(before.model, event, clock, before.asked)
    story.__dict__ = before.story.copy()
    try:
        story.tell(entry, writer.plan_text if event == "plan" else "")
    except verifier.Failed as failed:
        return None, str(failed)
    asked = before.asked
    if event == "ask":
        rounds = asked.get("rounds", {}) | {entry["step_index"]: entry["input"]["round"]}
        asked = {"input": entry["input"], "rounds": rounds}
    return Told(before.model, story.__dict__, clock, asked, (*before.entries, entry)), ""


def search(of: Life, prefix: tuple[str, ...], depth: int, width: int) -> Iterator[tuple[tuple[str, ...], Told]]:
    """Compare both on each event after each sequence that both accept; the sequences, shortest first.

    Of each length, `width` sequences are continued.
    """
    writer, story = Writer(of), new_story(of)
    told = Told(Model(), story.__dict__, 0, {}, ())
    for event in prefix:
        accepted, why = told_by(story, writer, told, event)
        model = follow(told.model, event, of)
        assert accepted is not None and model is not None, f"{event}: {why}"
        told = accepted._replace(model=model)
    level = [(prefix, told)]
    for at in range(depth):
        following = []
        for path, before in level:
            for event in EVENTS:
                accepted, why = told_by(story, writer, before, event)
                model = follow(before.model, event, of)
                sequence = (*path, event)
                assert (accepted is None) == (model is None), f"{sequence}: model {model}, verifier {why or 'accepts'}"
                if accepted is not None and model is not None:
                    following.append((sequence, accepted._replace(model=model)))
                    yield following[-1]
        level = sample(following, width, f"{prefix} {at}")


def bundle_of(of: Life, told: Told) -> dict[str, Any]:
    """The sequence in a log, anchored."""
    trail, prev = Trail(), "0" * 64
    trail.policy_text, trail.policy_id = of.trail.policy_text, told.entries[-1]["policy_id"]
    for seq, entry in enumerate(told.entries, start=1):
        said = {name: value for name, value in entry.items() if name not in ("input", "output", "where")}
        said |= {f"{side}_hash": salted_hash(SALT, entry[side]) for side in ("input", "output")}
        text = canonical_json(said | {"v": 1, "log_id": LOG_ID, "seq": seq, "prev": prev, "nonce": f"{seq:032x}"})
        prev = leaf_hash(text)
        trail.entries.append((text, canonical_json(entry["input"]), canonical_json(entry["output"])))
    return trail.bundle(ANCHORER)


def verify(bundle: dict[str, Any]) -> None:
    verifier.verify(canonical_json(bundle).encode(), log_id=LOG_ID, anchor_identity=ANCHORER.identity, open_=True)


DEEPER = 1 if WHOLE else 0
WIDTH = 1_500
"""Number of sequences of each length that `make test` continues, by QAES_SEED: all, up to eight entries."""
BEFORE_THE_ACTION = ("start", "policy", "plan", "begin", "succeed")
SEARCHES = [("paint", (), 11), ("monitor", (), 10), ("paint", BEFORE_THE_ACTION, 8)]
"""In `make fuzz` 160,000 sequences that both accept, of these lengths alone, and 3.6 million comparisons."""


@pytest.mark.parametrize(("name", "prefix", "depth"), SEARCHES)
@untraced
def test_verifier_accepts_the_same_sequences_as_the_model(name: str, prefix: tuple[str, ...], depth: int) -> None:
    of, chosen, kinds = life(name), random.Random(SEED), set()  # noqa: S311 - a sample that is the same each time
    count, verified, writer, story = 0, [], Writer(of), new_story(of)
    for sequence, told in search(of, prefix, depth + DEEPER, WIDTH):
        count += 1
        kinds.add(sequence[-1].split()[0])
        if chosen.random() < 0.0005:
            verified.append(told)
    assert kinds >= {event.split()[0] for event in EVENTS} - set(prefix) - {"plan"}
    assert count > 10_000
    assert verified
    for told in verified[:20]:
        verify(bundle_of(of, told))
        event = chosen.choice([event for event in EVENTS if follow(told.model, event, of) is None])
        entry = writer.write(told.model, event, told.clock + 1, told.asked)
        assert told_by(story, writer, told, event)[0] is None
        if event != "plan":  # whose second one is another text
            with pytest.raises(verifier.Failed):
                verify(bundle_of(of, told._replace(entries=(*told.entries, entry))))


NOTICED = (
    "R29", "R30", "R35", "R36", "R40", "R42", "R43", "R46", "R49", "R51", "R55", "R56", "R62", "R63", "R70", "R73",
    "R74", "R88",
)  # fmt: skip
"""The rules about the order of entries. The others are about the content of an entry, which is not searched here."""


@pytest.mark.parametrize("rule", NOTICED)
@untraced
def test_search_notices_a_rule_that_is_not_enforced(rule: str) -> None:
    with not_enforced(verifier, rule):
        difference = None
        for name, prefix, _ in SEARCHES:
            try:
                for _ in search(life(name), prefix, 6, 1_000_000):
                    pass
            except (AssertionError, LookupError) as error:
                difference = error
    assert difference is not None, f"nothing in six entries shows {rule}"
