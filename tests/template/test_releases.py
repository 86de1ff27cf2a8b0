"""A deployed release becomes the next one in place: templates differ by no more than an update can change."""

from __future__ import annotations

import copy
import tomllib
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from local.template import parse
from qaes import VERSION
from tests.support.template import ROOT, template
from tests.support.upgrade import faults

RELEASES = ROOT / "tests" / "releases"
INDEX = {
    "IndexName": "by_day",
    "KeySchema": [{"AttributeName": "day", "KeyType": "HASH"}],
    "Projection": {"ProjectionType": "KEYS_ONLY"},
}
RELEASED: dict[str, Any] = {
    "Parameters": {"Stage": {"Type": "String"}},
    "Resources": {
        "Table": {
            "Type": "AWS::DynamoDB::Table",
            "Properties": {
                "KeySchema": [{"AttributeName": "pk", "KeyType": "HASH"}],
                "GlobalSecondaryIndexes": [INDEX, INDEX | {"IndexName": "by_kind"}],
            },
        },
        "Secret": {
            "Type": "AWS::SecretsManager::Secret",
            "Properties": {"GenerateSecretString": {"PasswordLength": 55}},
        },
        "Pool": {"Type": "AWS::Cognito::UserPool", "Properties": {"UsernameAttributes": ["email"]}},
        "Function": {"Type": "AWS::Serverless::Function", "Properties": {"Handler": "app.handler"}},
    },
}


def _version(path: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in path.stem.split("."))


def _releases() -> list[Path]:
    return sorted(RELEASES.glob("*.yaml"), key=_version)


def test_releases_end_with_the_version_of_the_project() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]

    assert _releases()[-1].stem == version == VERSION
    assert f"\n## {version} " in (ROOT / "CHANGELOG.md").read_text()


def test_templates_upgrade_in_place_from_release_to_release() -> None:
    templates = [*(parse(path) for path in _releases()), template()]

    assert [faults(old, new) for old, new in pairwise(templates)] == [[]] * len(_releases())


INDEXES: list[dict[str, Any]] = RELEASED["Resources"]["Table"]["Properties"]["GlobalSecondaryIndexes"]
SOME: dict[str, Any] = {"Type": "String"}


def _changed(path: str, value: Any) -> dict[str, Any]:
    """Return RELEASED with another value at `path`, whose parts are keys; None deletes it."""
    new = copy.deepcopy(RELEASED)
    *parents, last = path.split("/")
    place = new
    for key in parents:
        place = place[key]
    if value is None:
        del place[last]
    else:
        place[last] = value
    return new


def _indexes(*indexes: dict[str, Any]) -> dict[str, Any]:
    return _changed("Resources/Table/Properties/GlobalSecondaryIndexes", list(indexes))


@pytest.mark.parametrize(
    "new",
    [
        pytest.param(RELEASED, id="nothing"),
        pytest.param(_indexes(*INDEXES, INDEX | {"IndexName": "by_status"}), id="one index more"),
        pytest.param(_indexes(INDEX), id="one index less"),
        pytest.param(_changed("Parameters/Owner", SOME | {"Default": ""}), id="a parameter with a default"),
        pytest.param(_changed("Resources/Function", None), id="no function"),
    ],
)
def test_upgrade_accepts_changes_in_place(new: dict[str, Any]) -> None:
    assert faults(RELEASED, new) == []


@pytest.mark.parametrize(
    ("new", "fault"),
    [
        (
            _indexes(*INDEXES, *(INDEX | {"IndexName": name} for name in ("by_status", "by_leaf"))),
            "Table: 2 indexes are created or deleted: by_leaf, by_status",
        ),
        (
            _indexes(INDEX | {"IndexName": "by_hour"}, INDEXES[1]),
            "Table: 2 indexes are created or deleted: by_day, by_hour",
        ),
        (
            _indexes(INDEX | {"Projection": {"ProjectionType": "ALL"}}, INDEXES[1]),
            "Table: index by_day has another Projection; make an index of another name",
        ),
        (
            _indexes(INDEX, INDEXES[1] | {"KeySchema": [{"AttributeName": "sk", "KeyType": "HASH"}]}),
            "Table: index by_kind has another KeySchema; make an index of another name",
        ),
        (
            _changed("Resources/Table/Properties/KeySchema", [{"AttributeName": "id", "KeyType": "HASH"}]),
            "Table: a change of KeySchema replaces it",
        ),
        (_changed("Resources/Table/Properties/TableName", "tasks"), "Table: a change of TableName replaces it"),
        (_changed("Resources/Table", None), "Table: it holds data, and is gone"),
        (_changed("Resources/Table/Type", "AWS::DynamoDB::GlobalTable"), "Table: it holds data, and is gone"),
        (
            _changed("Resources/Secret/Properties/GenerateSecretString", {"PasswordLength": 32}),
            "Secret: a change of GenerateSecretString replaces it",
        ),
        (
            _changed("Resources/Pool/Properties/UsernameAttributes", ["phone_number"]),
            "Pool: a change of UsernameAttributes replaces it",
        ),
        (_changed("Parameters/Owner", SOME), "Owner: a new parameter needs a default"),
        (_changed("Parameters/Stage", None), "Stage: a release has this parameter, so a deployment may set it"),
    ],
)
def test_upgrade_refuses_failure_or_data_loss(new: dict[str, Any], fault: str) -> None:
    assert faults(RELEASED, new) == [fault]
