"""The policy: which actions are allowed, for whom, within which limits, and who must approve them.

A version of the policy is a document: one text, whose SHA-256 is written to the ledger (docs/policy.md). The policy
decides; a planner never does.

    names       names, texts and bounds
    rules       the rules of both formats, and the decision that a plan pins
    actions     the built-in actions, and those that a document defines
    document    the document, and the policy that it makes
    checks      consistency of the parts of a document
    schemas     JSON Schemas of parameters, and values by them (imports jsonschema-rs)
    proposing   a proposal, checked
    deciding    `evaluate`: a policy's decision on a request
    difference  the changes of a version
    describing  the actions as a caller sees them
    replaying   recorded requests, decided again by a proposal
"""

from qaes.domain.policy.deciding import (
    ActionRequest,
    Decision,
    LimitUse,
    Requirement,
    decide,
    eligible,
    evaluate,
    limit_words,
    pinned_form,
    refusal_over,
    requirement_over,
)
from qaes.domain.policy.difference import PolicyDifference, RuleChange, check_removals, difference
from qaes.domain.policy.document import (
    MAX_DOCUMENT_BYTES,
    Policy,
    PolicyDocument,
    PolicyDocumentV2,
    policy_of,
    read_document,
)
from qaes.domain.policy.names import (
    ACTION_TYPE_PATTERN,
    POLICY_ID_PATTERN,
    TRANSFER_ACTION,
    ActionType,
    policy_id_of,
    version_of,
)
from qaes.domain.policy.rules import (
    DEFAULT_RULES,
    DENIED,
    MAX_ADDRESSES,
    MAX_RULES,
    ActionRule,
    Address,
    PolicyDecision,
    RiskLevel,
    Rule,
    Rules,
    check_enforceable,
    normalised,
)

__all__ = [
    "ACTION_TYPE_PATTERN",
    "DEFAULT_RULES",
    "DENIED",
    "MAX_ADDRESSES",
    "MAX_DOCUMENT_BYTES",
    "MAX_RULES",
    "POLICY_ID_PATTERN",
    "TRANSFER_ACTION",
    "ActionRequest",
    "ActionRule",
    "ActionType",
    "Address",
    "Decision",
    "LimitUse",
    "Policy",
    "PolicyDecision",
    "PolicyDifference",
    "PolicyDocument",
    "PolicyDocumentV2",
    "Requirement",
    "RiskLevel",
    "Rule",
    "RuleChange",
    "Rules",
    "check_enforceable",
    "check_removals",
    "decide",
    "difference",
    "eligible",
    "evaluate",
    "limit_words",
    "normalised",
    "pinned_form",
    "policy_id_of",
    "policy_of",
    "read_document",
    "refusal_over",
    "requirement_over",
    "version_of",
]
