"""Faster versions of moto's and the ledger's primitives with the same results."""

from __future__ import annotations

import base64
import copy
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, lru_cache
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from moto.core import responses
from moto.core.serialize import BaseJSONSerializer
from moto.dynamodb import models as moto_dynamodb
from moto.dynamodb.models import DynamoDBBackend
from moto.dynamodb.models.dynamo_type import DynamoType
from moto.dynamodb.models.table import Table
from moto.stepfunctions.parser.asl.parse.asl_parser import AmazonStateLanguageParser
from moto.stepfunctions.parser.asl.parse.preprocessor import Preprocessor

from qaes.domain.qubic import fourq, identity, schnorrq, transaction
from qaes.domain.qubic.k12 import k12
from tests.support.tracing import untraced


def _remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a pure function that remembers its results: the tests use few keys, and each of them often.

    Coverage does not count its lines then. The tests of the function itself call the original.
    """
    return untraced(lru_cache(maxsize=10_000)(function))


_k12, _multiply_add = _remembered(k12), _remembered(fourq.multiply_add)
_method_names_from_class = cache(responses.method_names_from_class)
_syntax_tree = cache(lambda definition: _moto_parse(definition)[1])
_moto_parse = AmazonStateLanguageParser.parse
_moto_transact_write_items = DynamoDBBackend.transact_write_items


@contextmanager
def shortcuts() -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, shorter in (
            (DynamoDBBackend, "transact_write_items", _transact_write_items),
            (BaseJSONSerializer, "_serialize_type_structure", _serialize_type_structure),
            (AmazonStateLanguageParser, "parse", staticmethod(_parse)),
            (responses, "method_names_from_class", _method_names_from_class),
            (fourq, "multiply_add", _multiply_add),
            (identity, "k12", _k12),
            (schnorrq, "k12", _k12),
            (transaction, "k12", _k12),
        ):
            stack.enter_context(patch.object(owner, name, shorter))
        yield


def _parse(definition: str) -> tuple[Any, Any]:
    """Make the state machine of a definition whose syntax tree is known: to parse it takes longer than to run it."""
    tree = _syntax_tree(definition)
    return Preprocessor().visit(tree), tree


def _transact_write_items(backend: DynamoDBBackend, transact_items: list[dict[str, Any]]) -> None:
    """Run moto's transaction with fewer copies for its rollback.

    moto copies every item of a table, again for each item of a transaction: a third of the tests' time. Only items that
    an update changes in place need a copy; other items are added and removed as a whole.
    """
    updates = [each["Update"] for each in transact_items if "Update" in each]

    def deepcopy(value: Any) -> Any:
        if not isinstance(value, Table):
            return copy.deepcopy(value)
        kept = copy.copy(value)
        kept.items = defaultdict(
            dict, {each: found.copy() if isinstance(found, dict) else found for each, found in value.items.items()}
        )
        for key in (each["Key"] for each in updates if each["TableName"] == value.name):
            hash_value, range_value = backend.get_keys_value(value, key)
            if item := copy.deepcopy(value.get_item(hash_value, range_value)):
                if value.has_range_key:
                    kept.items[hash_value][range_value] = item
                else:
                    kept.items[hash_value] = item
        if value.stream_shard:
            kept.stream_shard = copy.copy(value.stream_shard)
            kept.stream_shard.items, kept.stream_shard.table = list(value.stream_shard.items), kept
        return kept

    with patch.object(moto_dynamodb, "copy", SimpleNamespace(deepcopy=deepcopy)):
        _moto_transact_write_items(backend, transact_items)


_serialize_structure = BaseJSONSerializer._serialize_type_structure


def _serialize_type_structure(self: BaseJSONSerializer, serialized: Any, value: Any, shape: Any, key: str) -> None:
    """Serialize as moto does, but without botocore's model for DynamoDB's typed values."""
    if shape.name == "AttributeValue":
        serialized[key] = _typed(value)
    else:
        _serialize_structure(self, serialized, value, shape, key)


def _typed(value: Any) -> dict[str, Any]:
    if isinstance(value, DynamoType):
        value = {value.type: value.value}
    [(kind, content)] = value.items()
    if kind == "M":
        return {kind: {name: _typed(each) for name, each in content.items()}}
    if kind == "L":
        return {kind: [_typed(each) for each in content]}
    if kind == "B":
        return {kind: _base64(content)}
    if kind in {"SS", "NS", "BS"}:
        return {kind: [_base64(each) if kind == "BS" else each for each in content]}
    return {kind: content}


def _base64(content: bytes | str) -> str:
    return base64.b64encode(content.encode() if isinstance(content, str) else content).decode()
