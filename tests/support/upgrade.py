"""Changes between two templates that make an upgrade of a deployed stack fail or lose data.

Sources: CloudFormation's pages of AWS::DynamoDB::Table (one index is created or deleted in an update; "Update requires:
Replacement"), AWS::Cognito::UserPool and AWS::SecretsManager::Secret.
"""

from __future__ import annotations

from typing import Any

Template = dict[str, Any]

REPLACED_WITH: dict[str, tuple[str, ...]] = {
    "AWS::DynamoDB::Table": ("TableName", "KeySchema", "LocalSecondaryIndexes"),
    "AWS::Cognito::UserPool": ("AliasAttributes", "UsernameAttributes", "UsernameConfiguration"),
    "AWS::SecretsManager::Secret": ("Name", "GenerateSecretString"),
}
"""Resource types with data, and the properties whose change replaces the resource or its data."""
INDEX_CHANGES = 1
"""Most indexes of a table that CloudFormation creates or deletes in one update."""


def faults(old: Template, new: Template) -> list[str]:
    """Name each reason why a stack of `old` cannot become one of `new` in place; empty when it can."""
    found = [
        f"{name}: a release has this parameter, so a deployment may set it"
        for name in old.get("Parameters", {})
        if name not in new.get("Parameters", {})
    ]
    found += [
        f"{name}: a new parameter needs a default"
        for name, body in new.get("Parameters", {}).items()
        if name not in old.get("Parameters", {}) and "Default" not in body
    ]
    for name, body in old["Resources"].items():
        if body["Type"] in REPLACED_WITH:
            found += _resource_faults(name, body, new["Resources"].get(name))
    return found


def _resource_faults(name: str, old: dict[str, Any], new: dict[str, Any] | None) -> list[str]:
    if new is None or new["Type"] != old["Type"]:
        return [f"{name}: it holds data, and is gone"]
    before, after = old.get("Properties", {}), new.get("Properties", {})
    found = [
        f"{name}: a change of {each} replaces it"
        for each in REPLACED_WITH[old["Type"]]
        if before.get(each) != after.get(each)
    ]
    return found + _index_faults(name, _indexes(before), _indexes(after))


def _indexes(properties: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {each["IndexName"]: each for each in properties.get("GlobalSecondaryIndexes", [])}


def _index_faults(table: str, old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> list[str]:
    found = [
        f"{table}: index {name} has another {each}; make an index of another name"
        for name in sorted(old.keys() & new.keys())
        for each in ("KeySchema", "Projection")
        if old[name].get(each) != new[name].get(each)
    ]
    changed = sorted(old.keys() ^ new.keys())
    if len(changed) > INDEX_CHANGES:
        found.append(f"{table}: {len(changed)} indexes are created or deleted: {', '.join(changed)}")
    return found
