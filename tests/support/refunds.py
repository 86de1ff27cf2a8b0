"""Tasks under a policy of format 2, as they are recorded, anchored and bundled."""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any

from qaes.domain import planning
from qaes.domain.ids import timestamp
from qaes.domain.models import Analysis
from qaes.domain.policy import ActionRequest, Policy, PolicyDecision, PolicyDocumentV2, decide, evaluate, policy_of
from tests.support.bundles import PLAN_ID, TASK_ID, WALLET, Trail
from tests.support.policies import CONTENT

TEAM = {"finance": ["bob", "carol", "dora"], "cfo": ["erin", "bob"]}
ACTS = ("monitor_action", "onchain_action", "generic_action")
ORDER = {"order_id": "123456", "amount": 50_000}
SMALL = {"order_id": "123456", "amount": 500}
_TRANSFERS: dict[str, Any] = {
    "allowed": True,
    "risk_level": "high",
    "requesters": ["user:alice", "agent:client-7"],
    "destinations": None,
    "allow_derived": False,
    "smart_contracts": False,
    "tiers": [{"max_amount": 1_000, "approvals": 2, "approvers": "finance"}],
    "limits": [{"window_seconds": 86_400, "max_amount": 2_000, "per": "source", "over": "deny"}],
}


def content(rule: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """The content of a policy of format 2, with other members in the rule of the refund."""
    made = copy.deepcopy(CONTENT)
    made["groups"] = copy.deepcopy(TEAM)
    made["rules"]["transfer_funds"] = copy.deepcopy(_TRANSFERS)
    made["rules"]["monitoring"] = {"allowed": True, "risk_level": "low", "tiers": [{"approvals": 0}]}
    made["rules"]["refund_customer"] |= rule or {}
    return made | changes


def text_of(made: dict[str, Any], version: int = 3, proposed_by: str | None = "olivia") -> str:
    return PolicyDocumentV2.write(made, version=version, proposed_by=proposed_by).text()


class Refund(Trail):
    """A task of an operator's action, or another one, under a policy of format 2."""

    def __init__(
        self,
        parameters: dict[str, Any] | None = None,
        made: dict[str, Any] | None = None,
        *,
        task_type: str = "refund_customer",
        agent: str | None = None,
        enacted: bool = True,
    ) -> None:
        super().__init__(task_type, parameters or ORDER, agent=agent)
        self.policy_text = text_of(made or content())
        self.policy = policy_of(self.policy_text)
        if enacted:
            self.enact()

    def wanted(self) -> ActionRequest:
        request = self.request
        action = planning.action_type(request["task_type"])
        return ActionRequest(action, request["parameters"], request["requester"], request.get("agent"))

    def decision(self) -> PolicyDecision:
        return decide(self.policy, self.wanted())

    def analysis(self) -> Analysis:
        return Analysis(action_type=self.wanted().action, risk_level=self.decision().risk_level)

    def check_policy(self, **fields: Any) -> Refund:
        decision = self.decision()
        self.policy_id = decision.policy_id
        status = "allowed" if decision.allowed else "denied"
        output = decision.model_dump(mode="json") | fields
        self.record("policy_checked", "planner", status, self.analysis().model_dump(mode="json"), output)
        return self

    def build(self, **changes: Any) -> Refund:
        self.plan = planning.build_plan(
            plan_id=PLAN_ID,
            task_id=TASK_ID,
            created_at=timestamp(self.moment),
            task_type=self.request["task_type"],
            description=self.request["description"],
            parameters=self.request["parameters"],
            analysis=self.analysis(),
            policy=self.decision(),
        ).model_copy(update=changes)
        self.record("plan_built", "planner", "planned", self.request, self.plan.model_dump(mode="json"))
        return self

    def begin(self, index: int, current: Any = None, used: int = 0, **changes: Any) -> Refund:
        """Claim a step; an action's claim states the limits, of which each had this much used."""
        step, fields = self.of_step(index)
        said = {"step_hash": step.hash(), "run": self.run, "attempt": 1, "approval": self.round} | changes
        self.round = None
        policy: Policy = current or self.policy
        output = decide(policy, self.wanted()).model_dump(mode="json")
        if step.type in ACTS and policy.format == 2:
            names = ("key", "per", "value", "window_seconds", "counts", "add", "maximum")
            limits = evaluate(policy, self.wanted()).limits
            output["limits"] = [{name: getattr(each, name) for name in names} | {"used": used} for each in limits]
        self.record("step_started", "worker", "running", said, output, **fields)
        return self


def planned(parameters: dict[str, Any] | None = None, made: dict[str, Any] | None = None, **more: Any) -> Refund:
    """A task whose steps before the action are done."""
    trail = Refund(parameters, made, **more)
    trail.start().check_policy().build()  # type: ignore[attr-defined]
    assert trail.plan is not None
    for index in range(len(trail.plan.steps) - 1):
        trail.execute(index)
    return trail


def last_of(trail: Refund) -> int:
    assert trail.plan is not None
    return len(trail.plan.steps) - 1


def approve(trail: Refund, *people: str) -> Refund:
    """Have these people approve the action, as many as are required."""
    trail.ask(last_of(trail), required=len(people), seconds=14_000)
    for number, who in enumerate(people, start=1):
        trail.decide(last_of(trail), who, True, number)
    return trail


def refunded() -> Trail:
    """Approved by two of finance, and recorded."""
    trail = approve(planned(), "bob", "carol")
    return trail.execute(last_of(trail)).end("completed")


def refunded_at_once() -> Trail:
    """A refund that is too small to need an approval."""
    trail = planned(SMALL)
    return trail.execute(last_of(trail)).end("completed")


def paid() -> Trail:
    """A transfer by the policy of format 2, requested by an agent."""
    trail = planned({"wallet_address": WALLET, "to_address": "0xfedcba0987654321", "amount": 100},
                    task_type="transfer_funds", agent="client-7")  # fmt: skip
    return approve(trail, "dora", "bob").execute(last_of(trail)).end("completed")


def watched() -> Trail:
    trail = planned({"wallet_address": WALLET}, task_type="monitor_wallet")
    return trail.execute(last_of(trail)).end("completed")


def refused() -> Trail:
    """So much that no tier reaches it."""
    return Refund({"order_id": "123456", "amount": 900_000}).start().check_policy().end("denied")


def beyond_a_limit() -> Trail:
    """Beyond the count of an hour, which one of finance lets pass."""
    trail = approve(planned(SMALL), "carol")
    return trail.begin(last_of(trail), used=20).finish(last_of(trail)).end("completed")


def by_a_newer_version() -> Trail:
    """The version in force by the time of the action asks the other group, too."""
    tiers = [{"max_amount": 200_000, "approvals": 1, "approvers": "cfo"}]
    trail = planned()
    trail.later = [text_of(content({"tiers": tiers}), version=4)]
    newer = policy_of(trail.later[0])
    trail.enact(newer, seconds=1)
    trail.moment += timedelta(minutes=20)
    approve(trail, "carol", "dora").decide(last_of(trail), "erin", True, 3)
    return trail.begin(last_of(trail), newer).finish(last_of(trail)).end("completed")


def resumed_in_time() -> Trail:
    """Suspended while people decided, and resumed before the action."""
    trail = approve(planned(), "bob", "dora")
    trail.change("action_suspended", name="refund_customer", seconds=1)
    trail.change("resume_requested", "oscar", name="refund_customer", seconds=400)
    trail.change("action_resumed", "olivia", name="refund_customer", seconds=900)
    trail.moment += timedelta(minutes=20)
    return trail.execute(last_of(trail)).end("completed")


STORIES = {
    "refunded": refunded,
    "refunded at once": refunded_at_once,
    "paid": paid,
    "watched": watched,
    "refused": refused,
    "beyond a limit": beyond_a_limit,
    "by a newer version": by_a_newer_version,
    "resumed in time": resumed_in_time,
}
