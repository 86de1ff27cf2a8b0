"""Writes of each function's role: the template has the rights of `tests.support.rights`, and no others."""

from __future__ import annotations

import pytest

from tests.support import template
from tests.support.rights import ITEMS, WRITES, rights_of


def test_rights_have_a_row_for_each_function() -> None:
    assert WRITES.keys() == template.resources("AWS::Serverless::Function").keys()


def test_rights_have_a_key_of_each_tables_items() -> None:
    assert ITEMS.keys() == template.resources("AWS::DynamoDB::Table").keys()


@pytest.mark.parametrize("function", template.resources("AWS::Serverless::Function"))
def test_role_has_the_rights_that_are_listed(function: str) -> None:
    assert rights_of(function) == WRITES[function]


def test_callback_tokens_alone_can_be_deleted() -> None:
    deleting = {table for rights in WRITES.values() for table, right in rights.items() if "delete" in right}
    assert deleting == {"CallbacksTable"}


def test_gateway_alone_writes_decisions() -> None:
    assert {function for function, rights in WRITES.items() if "DecisionsTable" in rights} == {"GatewayFunction"}


@pytest.mark.parametrize("function", [name for name in WRITES if name.endswith("ApiFunction")])
def test_api_that_only_reads_writes_no_task(function: str) -> None:
    assert "TasksTable" not in rights_of(function)
