"""Changes of a proposed version to the policy in force, and the check that it names everything it drops."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from pydantic import BaseModel, ConfigDict, Field

from qaes.domain.errors import InvalidInputError
from qaes.domain.policy.actions import BUILT_IN, Action
from qaes.domain.policy.rules import ActionRule, Counts, Per, Rule, normalised

AnyRule = Rule | ActionRule


class Content(Protocol):
    """The part of a document or of a policy that versions are compared by; format 1 has rules only."""

    @property
    def rules(self) -> Mapping[str, Any]: ...


class _Changes(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class RuleChange(_Changes):
    """A rule of both documents, which differs."""

    before: AnyRule
    after: AnyRule


class ActionChange(_Changes):
    """A definition of an action, which differs."""

    before: Action
    after: Action


class ActionsDifference(_Changes):
    """The definitions of actions that a version adds, removes and changes."""

    added: dict[str, Action]
    removed: dict[str, Action]
    changed: dict[str, ActionChange]


class GroupChange(_Changes):
    """The subjects that enter and leave a group."""

    added: list[str]
    removed: list[str]


class GroupsDifference(_Changes):
    """The groups that a version adds, removes and changes."""

    added: dict[str, list[str]]
    removed: dict[str, list[str]]
    changed: dict[str, GroupChange]


class NewLimit(_Changes):
    """A limit whose windows start empty: the version in force does not count for it."""

    action: str
    unit: str
    counts: Counts
    per: Per
    window_seconds: int


class PolicyDifference(_Changes):
    """Changes of a version of the policy to the version that it is based on: rules by action type, and more."""

    added: dict[str, AnyRule]
    removed: dict[str, AnyRule] = Field(description="rules whose action types are denied from this version on")
    changed: dict[str, RuleChange]
    groups: GroupsDifference = Field(description="of format 2")
    actions: ActionsDifference = Field(description="of format 2")
    new_limits: list[NewLimit] = Field(description="limits whose windows start empty")


def difference(before: Content | None, after: Content) -> PolicyDifference:
    """Compare two versions, each a document or a policy; `before` is None for the first version."""
    old, new = ({} if before is None else before.rules), after.rules
    added, removed, changed = _compared(old, new)
    return PolicyDifference(
        added={name: new[name] for name in added},
        removed={name: old[name] for name in removed},
        changed={name: RuleChange(before=old[name], after=new[name]) for name in changed},
        groups=_groups_difference(_member(before, "groups"), _member(after, "groups")),
        actions=_actions_difference(_member(before, "actions"), _member(after, "actions")),
        new_limits=_new_limits(before, after),
    )


def check_removals(before: Content, after: Content, remove: Sequence[str]) -> None:
    """Check that `remove` names each rule, group and action that a new version drops, once, and nothing else.

    Raises
    ------
    InvalidInputError
        An item would be dropped silently; or a name appears twice, or drops nothing.
    """
    dropped = {
        kind: [name for name in _member(before, kind) if name not in _member(after, kind)]
        for kind in ("rules", "groups", "actions")
    }
    names = {name for dropped_names in dropped.values() for name in dropped_names}
    in_force = {name for kind in dropped for name in _member(before, kind)}
    wrong = {
        "names twice": [name for name in dict.fromkeys(remove) if remove.count(name) > 1],
        "has names that the policy in force does not have": [name for name in remove if name not in in_force],
        "has names that the proposal still contains": [
            name for name in remove if name in in_force and name not in names
        ],
        **{
            f"does not name these {kind}, which the proposal drops": [name for name in each if name not in remove]
            for kind, each in dropped.items()
        },
    }
    for problem, each in wrong.items():
        if each:
            raise InvalidInputError(f"`remove` {problem}: {', '.join(sorted(set(each)))}", field="remove")


def _member(content: Content | None, kind: str) -> Mapping[str, Any]:
    return getattr(content, kind, None) or {}


def _compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[str], list[str], list[str]]:
    """Return the names that are new, gone and different."""
    return (
        [name for name in after if name not in before],
        [name for name in before if name not in after],
        [name for name in after if name in before and before[name] != after[name]],
    )


def _groups_difference(before: Mapping[str, Iterable[str]], after: Mapping[str, Iterable[str]]) -> GroupsDifference:
    added, removed, changed = _compared(before, after)
    return GroupsDifference(
        added={name: list(after[name]) for name in added},
        removed={name: list(before[name]) for name in removed},
        changed={
            name: GroupChange(
                added=[subject for subject in after[name] if subject not in before[name]],
                removed=[subject for subject in before[name] if subject not in after[name]],
            )
            for name in changed
        },
    )


def _actions_difference(before: Mapping[str, Action], after: Mapping[str, Action]) -> ActionsDifference:
    added, removed, changed = _compared(before, after)
    return ActionsDifference(
        added={name: after[name] for name in added},
        removed={name: before[name] for name in removed},
        changed={name: ActionChange(before=before[name], after=after[name]) for name in changed},
    )


def _new_limits(before: Content | None, after: Content) -> list[NewLimit]:
    known = _limits(before)
    return [limit for limit in _limits(after) if limit not in known]


def _limits(content: Content | None) -> list[NewLimit]:
    actions = dict(BUILT_IN) | dict(_member(content, "actions"))
    rules = {
        name: normalised(name, rule) if isinstance(rule, Rule) else rule
        for name, rule in _member(content, "rules").items()
    }
    return [
        NewLimit(
            action=name,
            unit=(actions[name].unit if name in actions else None) or "",
            counts=limit.counts,
            per=limit.per,
            window_seconds=limit.window_seconds,
        )
        for name, rule in rules.items()
        for limit in rule.limits
    ]
