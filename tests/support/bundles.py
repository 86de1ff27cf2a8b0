"""Tasks that the real domain code records, anchors and bundles, without AWS."""

from __future__ import annotations

import base64
import importlib.util
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

from qaes.domain import planning
from qaes.domain.anchor import ANCHOR_INPUT_TYPE, AnchorPayload, log_id_bytes
from qaes.domain.audit import GENESIS, build_entry, build_policy_entry, entry_text
from qaes.domain.bundle import PolicyTrailEntry, TrailEntry, build_bundle, policy_ids, policy_numbers
from qaes.domain.canonical import canonical_json, hash_of, salted_hash
from qaes.domain.ids import parse_timestamp, timestamp
from qaes.domain.merkle import leaf_digest, leaf_hash
from qaes.domain.models import Event, Plan, Step
from qaes.domain.policy import Policy, PolicyDecision, PolicyDocument, Rule, policy_of
from qaes.domain.policy_events import LEDGER, PolicyEvent, next_event
from qaes.domain.qubic import schnorrq
from qaes.domain.qubic.identity import encode_identity
from qaes.domain.qubic.transaction import Transaction, decode
from qaes.domain.tiles import appended, inclusion_proof, tile_path, tree_root
from tests.support.tracing import untraced

LOG_ID = "qaes-test"
TASK_ID = "task_019ab000-0000-7000-8000-000000000001"
PLAN_ID = "plan_019ab000-0000-7000-8000-000000000002"
TXID = "abcdefghijklmnopqrstuvwxyz" * 2 + "abcdefgh"
SALT = "0123456789abcdef0123456789abcdef"
START = parse_timestamp("2026-11-23T12:00:00.000Z")
RULES = {
    "monitoring": Rule(allowed=True, requires_approval=False, risk_level="low"),
    "transfer_funds": Rule(allowed=True, requires_approval=True, risk_level="high", approvals=2, expires_after=86_400),
}
WALLET, TARGET = "0x1234567890abcdef", "0xfedcba0987654321"
TRANSFER = {"wallet_address": WALLET, "to_address": TARGET, "amount": 100}


def load_verifier() -> ModuleType:
    """Load the verifier's file, which belongs to no package and is excluded from coverage."""
    path = Path(__file__).parents[2] / "verifier" / "verify_bundle.py"
    spec = importlib.util.spec_from_file_location("verify_bundle", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["verify_bundle"] = module
    spec.loader.exec_module(module)
    for owner, name in ((module, "verify"), (module, "main"), (module.Story, "tell")):
        setattr(owner, name, untraced(getattr(owner, name)))
    return module


@contextmanager
def not_enforced(verifier: ModuleType, number: str) -> Iterator[None]:
    """Disable one rule of docs/audit.md or docs/policy.md in the verifier."""
    enforced = verifier.need

    def need(holds: bool, rule: str, message: str, where: str = "bundle") -> None:
        enforced(holds or rule.split(maxsplit=1)[0] == number, rule, message, where)

    verifier.need = need  # type: ignore[attr-defined]
    try:
        yield
    finally:
        verifier.need = enforced  # type: ignore[attr-defined]


def policy_text(rules: dict[str, Rule] = RULES, version: int = 3) -> str:
    return PolicyDocument.write(rules, version=version, proposed_by="olivia").text()


class Anchorer:
    """Return the key that anchors a log."""

    def __init__(self, seed: str = "a" * 55) -> None:
        self.subseed = schnorrq.subseed_of(seed)
        self.public_key = schnorrq.public_key_of(self.subseed)
        self.identity = encode_identity(self.public_key)

    def transaction(self, payload: bytes, tick: int = 75_241_800, **changes: Any) -> Transaction:
        fields = {"source": self.public_key, "destination": self.public_key, "amount": 0, "tick": tick}
        fields |= {"input_type": ANCHOR_INPUT_TYPE, "payload": payload} | changes
        return Transaction(**fields).sign(self.subseed)


def on_chain(bundle: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Return a node's response about a bundle's transaction."""
    sent = decode(base64.b64decode(bundle["anchor"]["transaction"]))
    return {
        "hash": sent.id,
        "amount": "0",
        "source": encode_identity(sent.source),
        "destination": encode_identity(sent.destination),
        "tickNumber": sent.tick,
        "timestamp": "1764000000000",
        "inputType": sent.input_type,
        "inputSize": len(sent.payload),
        "inputData": base64.b64encode(sent.payload).decode(),
        "signature": base64.b64encode(sent.signature).decode(),
        "moneyFlew": False,
    } | changes


class Log:
    """The log in memory."""

    def __init__(self) -> None:
        self.texts: list[bytes] = []
        self.tiles: dict[tuple[int, int], bytes] = {}

    def append(self, *texts: str) -> list[int]:
        data = [text.encode() for text in texts]
        self.tiles |= appended(len(self.texts), [leaf_digest(each) for each in data], self.read)
        self.texts += data
        return list(range(len(self.texts) - len(data), len(self.texts)))

    def read(self, level: int, index: int, width: int) -> bytes:
        return self.tiles[level, index]

    def anchor(self, size: int | None = None, log_id: str = LOG_ID) -> AnchorPayload:
        size = size or len(self.texts)
        return AnchorPayload(log_id_bytes(log_id), size, tree_root(size, self.read))

    def prove(self, index: int, size: int) -> list[bytes]:
        return inclusion_proof(index, size, self.read)

    def files(self, size: int | None = None) -> dict[str, bytes]:
        """Return the log's files of this size for log clients (C2SP tlog-tiles): checkpoint and entries."""
        texts = self.texts[: size or len(self.texts)]
        root = base64.b64encode(self.anchor(len(texts)).root).decode()
        files = {"checkpoint": f"qaes-test\n{len(texts)}\n{root}\n\n\u2014 qaes-test AAAA\n".encode()}
        for at in range(0, len(texts), 256):
            tile = texts[at : at + 256]
            content = b"".join(len(text).to_bytes(2, "big") + text for text in tile)
            files[tile_path("entries", at // 256, len(tile))] = content
        return files

    def write(self, folder: Path, size: int | None = None) -> str:
        for name, content in self.files(size).items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)
        return str(folder)


class Trail:
    """A task's events in the services' format; each method records one event."""

    def __init__(
        self,
        task_type: str = "transfer_funds",
        parameters: dict[str, Any] | None = None,
        rules: dict[str, Rule] = RULES,
        log_id: str = LOG_ID,
        agent: str | None = None,
    ) -> None:
        self.log_id = log_id
        self.policy_text = policy_text(rules)
        self.policy = policy_of(self.policy_text)
        self.request = {
            "task_id": TASK_ID,
            "task_type": task_type,
            "description": "Zürich \u2013 pay the \U0001f9fe\x7f\x01",
            "parameters": parameters or TRANSFER,
            "requester": "alice",
        } | ({"agent": agent} if agent else {})
        self.plan: Plan | None = None
        self.policy_id = ""
        self.entries: list[tuple[str, str, str]] = []
        self.moment = START
        self.prev = GENESIS
        self.asked: dict[str, Any] = {}
        self.round: int | None = None
        """Round of the current approval."""
        self.run = 1
        self.later: list[str] = []
        """Documents of policies that came into force after the pinned one."""
        self.changes: list[PolicyEvent] = []
        """Events of the policy, in the log's stream `policy`."""

    def record(self, kind: Any, actor: str, status: str, input_: Any, output: Any, **fields: Any) -> Trail:
        self.moment += timedelta(seconds=1)
        fields = {
            "plan_hash": self.plan.hash() if self.plan else "",
            "policy_id": self.policy_id,
            "timestamp": timestamp(self.moment),
        } | fields
        event = Event(
            kind=kind,
            actor=actor,
            status=status,
            input_hash=salted_hash(SALT, input_),
            output_hash=salted_hash(SALT, output),
            **fields,
        )
        entry = build_entry(event, log_id=self.log_id, task_id=TASK_ID, seq=len(self.entries) + 1, prev=self.prev)
        text = entry_text(entry)
        self.prev = leaf_hash(text)
        self.entries.append((text, canonical_json(input_), canonical_json(output)))
        return self

    def change(self, kind: Any, actor: str = "olivia", *, seconds: float = 0, **more: Any) -> Trail:
        """Record a change of the policy, some seconds after the newest entry."""
        at = timestamp(self.moment + timedelta(seconds=seconds))
        about = {"policy_id": self.policy.policy_id} if kind.startswith("policy_") else {"name": "transfer_funds"}
        before = self.changes[-1] if self.changes else None
        self.changes.append(next_event(before, kind, actor=actor, at=at, **(about | more)))
        return self

    def enact(self, policy: Policy | None = None, *, seconds: float = -86_400) -> Trail:
        """Record that a version came into force, by default a day before the task."""
        about = {"policy_id": (policy or self.policy).policy_id}
        self.change("policy_proposed", seconds=seconds, **about)
        self.change("policy_approved", "oscar", seconds=seconds + 1, **about)
        return self.change("policy_in_force", LEDGER, seconds=seconds + 2, **about)

    def start(self) -> Trail:
        output = {"task_id": TASK_ID, "idempotency_key": None}
        return self.record("task_started", self.request["requester"], "pending", self.request, output)

    def decision(self) -> PolicyDecision:
        return self.policy.decide(planning.action_type(self.request["task_type"]))

    def check_policy(self, **fields: Any) -> Trail:
        decision = self.decision()
        analysis = planning.analyze(self.request["task_type"], self.policy).model_dump(mode="json")
        status = "allowed" if decision.allowed else "denied"
        self.policy_id = decision.policy_id
        output = decision.model_dump(mode="json") | fields
        return self.record("policy_checked", "planner", status, analysis, output)

    def build(self, **changes: Any) -> Trail:
        self.plan = planning.build_plan(
            plan_id=PLAN_ID,
            task_id=TASK_ID,
            created_at=timestamp(self.moment),
            task_type=self.request["task_type"],
            description=self.request["description"],
            parameters=self.request["parameters"],
            analysis=planning.analyze(self.request["task_type"], self.policy),
            policy=self.decision(),
        ).model_copy(update=changes)
        return self.record("plan_built", "planner", "planned", self.request, self.plan.model_dump(mode="json"))

    def of_step(self, index: int) -> tuple[Step, dict[str, Any]]:
        assert self.plan is not None
        step = self.plan.steps[index]
        return step, {"step_index": index, "step_id": step.step_id, "step_type": step.type}

    def ask(self, index: int, required: int = 2, seconds: int = 86_400, **changes: Any) -> Trail:
        step, fields = self.of_step(index)
        assert self.plan is not None
        self.asked = {
            "plan_hash": self.plan.hash(),
            "step_hash": step.hash(),
            "policy_id": self.policy_id,
            "round": self.asked.get("round", 0) + 1,
            "required": required,
            "expires_at": timestamp(self.moment + timedelta(seconds=1 + seconds)),
        } | changes
        self.round = self.asked["round"]
        said = {"status": "pending", "actor": "compliance"}
        return self.record("approval_requested", "compliance", "pending", self.asked, said, **fields)

    def decide(self, index: int, who: str, yes: bool, approvals: int, **changes: Any) -> Trail:
        _, fields = self.of_step(index)
        status = "approved" if yes else "rejected"
        said = {
            "status": status,
            "actor": who,
            "approved": yes,
            "reason": "looked at it",
            "decided_at": timestamp(self.moment + timedelta(seconds=1)),
            "approvals": approvals,
            "plan_hash": self.asked["plan_hash"],
            "step_hash": self.asked["step_hash"],
            "idempotency_key": None,
        } | changes
        return self.record("approval_decided", who, status, self.asked, said, **fields)

    def close(self, kind: str, index: int, actor: str = "compliance") -> Trail:
        _, fields = self.of_step(index)
        if kind in ("approval_reminder", "approval_undeliverable"):
            actor = "reconciler" if kind == "approval_reminder" else "execution"
        if kind == "approval_expired":
            self.moment = parse_timestamp(self.asked["expires_at"])
        status = "pending" if kind == "approval_reminder" else kind.removeprefix("approval_")
        return self.record(kind, actor, status, self.asked, {"status": status, "actor": actor}, **fields)

    def begin(self, index: int, current: PolicyDecision | None = None, **changes: Any) -> Trail:
        """Claim a step with the given approval, under the policy in force."""
        step, fields = self.of_step(index)
        said = {"step_hash": step.hash(), "run": self.run, "attempt": 1, "approval": self.round} | changes
        self.round = None
        decision = (current or self.decision()).model_dump(mode="json")
        return self.record("step_started", "worker", "running", said, decision, **fields)

    def finish(self, index: int, result: dict[str, Any] | None = None, status: str = "succeeded") -> Trail:
        step, fields = self.of_step(index)
        return self.record(
            "step_executed",
            "worker",
            status,
            step.parameters,
            self.result(step) if result is None else result,
            **fields,
        )

    def refuse(self, index: int, error: str = "an approver rejected it") -> Trail:
        """Record that a step is refused: this execution does not start it."""
        return self.finish(index, {"error": error, "begun": False}, "failed")

    def execute(self, index: int, result: dict[str, Any] | None = None, status: str = "succeeded") -> Trail:
        return self.begin(index).finish(index, result, status)

    def result(self, step: Step) -> dict[str, Any]:
        """Return the worker's result of a step."""
        sent = {"txid": TXID, "tick": 75_241_700}
        if step.type == "policy_check":
            return self.decision().model_dump(mode="json") | {"pinned": True}
        if step.type == "onchain_action":
            return sent | step.parameters | {"network": "mock"}
        if step.type == "generic_action":
            instruction = {"reference": f"{TASK_ID}#{step.step_id}", "instruction": step.parameters}
            return sent | {"task_type": self.request["task_type"], "instruction_hash": hash_of(instruction)}
        return {"ok": True, "balance": 1000, "rate": 0.1}

    def retry(self, who: str = "alice", **more: Any) -> Trail:
        self.run += 1
        self.round = None
        output = {"run": self.run, "idempotency_key": None} | more
        status = "executing" if self.plan else "pending"
        return self.record("task_retried", who, status, self.request_again(), output)

    def request_again(self) -> dict[str, Any]:
        return {"request_hash": hash_of(self.request)}

    def end(self, status: str, actor: str = "execution", **more: Any) -> Trail:
        output = {"status": status, "reason": None, "failed_step": None, "idempotency_key": None} | more
        return self.record("task_ended", actor, status, self.request_again(), output)

    def bundle(
        self,
        anchorer: Anchorer | None = None,
        *,
        log: Log | None = None,
        unanchored: int = 0,
        network: Any = "mock",
        payload: AnchorPayload | None = None,
    ) -> dict[str, Any]:
        """Sequence the entries among other entries, anchor all but the last `unanchored`, and build the bundle."""
        anchorer, log = anchorer or Anchorer(), log or Log()
        entries = []
        covered = len(self.entries) - unanchored
        policy_entries = self.policy_entries(log)
        for number, (text, input_, output) in enumerate(self.entries):
            if number == covered:
                payload = payload or log.anchor(log_id=self.log_id)
            log.append(f"another task's entry {number}")
            entries.append(TrailEntry(text, input_, output, log.append(text)[0]))
        log.append("and one after it")
        payload = payload or log.anchor(log_id=self.log_id)
        return build_bundle(
            log_id=self.log_id,
            network=network,
            task_id=TASK_ID,
            salt=SALT,
            entries=entries,
            anchored=anchorer.transaction(payload.encode()).encode(),
            prove=log.prove,
            policies=[self.policy_text, *self.later] if self.policy_id else [],
            policy_entries=policy_entries,
        )

    def policy_entries(self, log: Log) -> list[PolicyTrailEntry]:
        """Put the changes of the policy into the log; return the entries that the task's bundle contains."""
        if not self.changes:
            return []
        prev, found = GENESIS, {}
        for event in self.changes:
            text = entry_text(build_policy_entry(event, log_id=self.log_id, prev=prev))
            prev = leaf_hash(text)
            entry = TrailEntry(text, event.input, event.output, log.append(text)[0])
            found[event.number] = PolicyTrailEntry(entry, event.salt)
        times = [json.loads(text)["timestamp"] for text, _, _ in self.entries]
        used = policy_ids([TrailEntry(*each, None) for each in self.entries])
        numbers = policy_numbers(self.changes, versions=used, first=times[0], last=times[-1])
        return [found[number] for number in numbers]


def approved() -> Trail:
    """A transfer, approved by two people."""
    trail = Trail().start().check_policy().build().execute(0).execute(1).ask(2)
    return trail.decide(2, "bob", True, 1).close("approval_reminder", 2).decide(2, "carol", True, 2)


def transfer() -> Trail:
    """A transfer that was approved and confirmed."""
    return approved().execute(2)


def transferred() -> Trail:
    return transfer().end("completed")


def rejected() -> Trail:
    trail = Trail().start().check_policy().build().execute(0).execute(1).ask(2)
    return trail.decide(2, "bob", True, 1).decide(2, "carol", False, 1).end("rejected")


def denied() -> Trail:
    return Trail("self_destruct", {"now": True, "after": 1.5e-7}).start().check_policy().end("denied")


def monitored() -> Trail:
    trail = Trail("monitor_wallet", {"wallet_address": WALLET, "alert_threshold": 500})
    return trail.start().check_policy().build().execute(0).execute(1).execute(2).end("completed")


def expired_and_retried() -> Trail:
    """A task that expires, fails in a retry, and is approved and confirmed in the next one."""
    trail = Trail().start().check_policy().build().execute(0).execute(1).ask(2).close("approval_expired", 2)
    trail.end("expired").retry().ask(2).decide(2, "bob", True, 1).decide(2, "carol", True, 2)
    trail.execute(2, {"error": "insufficient_balance"}, "failed").end("failed").retry()
    return trail.ask(2).decide(2, "carol", True, 1).decide(2, "bob", True, 2).execute(2).end("completed")


def cancelled() -> Trail:
    """A task that is cancelled during a step, whose result comes later."""
    trail = Trail("monitor_wallet", {"wallet_address": WALLET}).start().check_policy().build().execute(0)
    return trail.begin(1).end("cancelled", "alice").finish(1)


def confirmed_late() -> Trail:
    """A transfer that is confirmed after its task failed, was retried, requested an approval and was cancelled."""
    trail = approved().begin(2).end("failed").retry().ask(2).close("approval_cancelled", 2)
    return trail.end("cancelled", "alice").finish(2)


def confirmed_while_asked() -> Trail:
    """A transfer of the earlier execution that is confirmed during a new request: the decision comes too late."""
    trail = approved().begin(2).end("failed").retry().ask(2).decide(2, "bob", True, 1).finish(2)
    return trail.decide(2, "carol", True, 2).end("completed")


def settled_by_a_retry() -> Trail:
    """A retry that finds the confirmed transfer of an earlier execution, and requests no new approval."""
    trail = approved().begin(2).end("failed").retry().end("failed").retry()
    return trail.finish(2, trail.result(trail.of_step(2)[0]) | {"run": 1}).end("completed")


def refused_and_retried() -> Trail:
    """A refused step was never started. A retry starts a step again that a worker lost."""
    trail = Trail("monitor_wallet", {"wallet_address": WALLET}).start().check_policy().build()
    trail.refuse(0).end("failed").retry().begin(0).end("failed").retry()
    return trail.execute(0).execute(1).execute(2).end("completed")


def under_a_stricter_policy() -> Trail:
    """The pinned policy requires no approval, the policy in force requires two."""
    trail = Trail("monitor_wallet", {"wallet_address": WALLET}).start().check_policy().build().execute(0).execute(1)
    rule = Rule(allowed=True, requires_approval=True, risk_level="low", approvals=2)
    trail.later = [policy_text(RULES | {"monitoring": rule}, version=4)]
    trail.ask(2, required=1).decide(2, "bob", True, 1)  # requested under a version between them
    trail.ask(2, required=2).decide(2, "carol", True, 1).decide(2, "bob", True, 2)
    return trail.begin(2, policy_of(trail.later[0]).decide("monitoring")).finish(2).end("completed")


def instructed() -> Trail:
    """An action that this system cannot perform: the ledger has the hash of the instruction."""
    rules = RULES | {"paint": Rule(allowed=True, requires_approval=True, risk_level="low")}
    trail = Trail("paint", {"colour": "green"}, rules).start().check_policy().build().execute(0)
    return trail.ask(1, required=1).decide(1, "bob", True, 1).execute(1).end("completed")


def undeliverable_and_retried() -> Trail:
    """An approval that did not reach the execution in time, which is no rejection."""
    trail = approved().close("approval_undeliverable", 2).end("failed").retry("olivia")
    return trail.ask(2).decide(2, "bob", True, 1).decide(2, "carol", True, 2).execute(2).end("completed")


def rejected_after_it_was_handed_in() -> Trail:
    """A transfer of the first run is confirmed during a new request, which one person rejects."""
    trail = approved().begin(2).end("failed").retry().ask(2).decide(2, "dave", False, 0)
    return trail.finish(2, trail.result(trail.of_step(2)[0]) | {"run": 1})


def rejected_and_confirmed() -> Trail:
    return rejected_after_it_was_handed_in().end("completed")


def confirmed_and_rejected() -> Trail:
    return rejected_after_it_was_handed_in().end("rejected")


def begun_and_lost() -> Trail:
    """A transfer that never reached the ledger, and that the retry starts again."""
    trail = approved().begin(2).end("failed").retry().ask(2)
    return trail.decide(2, "bob", True, 1).decide(2, "carol", True, 2).execute(2).end("completed")


def by_an_agent() -> Trail:
    """A program requests a task in a person's name; people decide."""
    trail = Trail(agent="client-7").start().check_policy().build().execute(0).execute(1).end("failed")
    trail.retry(agent="client-8").ask(2).decide(2, "bob", True, 1, agent=None).close("approval_cancelled", 2)
    return trail.end("cancelled", "alice", agent="client-9")


STORIES = {
    "transferred": transferred,
    "rejected": rejected,
    "denied": denied,
    "monitored": monitored,
    "expired and retried": expired_and_retried,
    "cancelled": cancelled,
    "confirmed late": confirmed_late,
    "confirmed while asked": confirmed_while_asked,
    "settled by a retry": settled_by_a_retry,
    "refused and retried": refused_and_retried,
    "under a stricter policy": under_a_stricter_policy,
    "instructed": instructed,
    "undeliverable and retried": undeliverable_and_retried,
    "rejected and confirmed": rejected_and_confirmed,
    "confirmed and rejected": confirmed_and_rejected,
    "begun and lost": begun_and_lost,
    "by an agent": by_an_agent,
}
