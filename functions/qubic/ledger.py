"""The ledger for the other services: one function, invoked directly, that does the named operation.

`{"operation": NAME, ...}` gives `{"ok": true, "result": {...}}`, or `{"ok": false, "error": {"code", "message"}}` when
the ledger refuses and would refuse again. What may go well at another time raises.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters.logs import logger
from qaes.domain.errors import InvalidInputError, NotFoundError, RefusedError
from qaes.domain.qubic.identity import check_address
from qubic.chain import chain
from qubic.chain.base import Chain, HashEntry, check_hash

Arguments = dict[str, Any]
Result = dict[str, Any]

MAX_ENTRIES = 500
_CODES = {
    "address": "invalid_address",
    "source": "invalid_address",
    "destination": "invalid_address",
    "amount": "invalid_amount",
}


@logger().inject_lambda_context
def handler(event: dict[str, Any], _context: LambdaContext) -> dict[str, Any]:
    """Do the operation that the event names."""
    arguments = dict(event)
    operation = arguments.pop("operation", None)
    try:
        return {"ok": True, "result": _perform(chain(), operation, arguments)}
    except RefusedError as error:
        return _refused(operation, error.code, error.message)
    except InvalidInputError as error:
        return _refused(operation, _CODES.get(error.field or "", "invalid_input"), error.message)
    except NotFoundError as error:
        return _refused(operation, "not_found", error.message)


def _perform(it: Chain, operation: object, arguments: Arguments) -> Result:
    if not isinstance(operation, str) or operation not in _OPERATIONS:
        raise RefusedError("unknown_operation", "the ledger has no such operation")
    perform, names = _OPERATIONS[operation]
    if set(arguments) != names:
        raise InvalidInputError(f"{operation} takes {', '.join(sorted(names)) or 'nothing'}")
    return {"network": it.network} | perform(it, arguments)


def _refused(operation: object, code: str, message: str) -> dict[str, Any]:
    logger().info("refused", extra={"operation": operation, "code": code})
    return {"ok": False, "error": {"code": code, "message": message}}


def _policy(it: Chain, _arguments: Arguments) -> Result:
    return it.policy().model_dump(mode="json")


def _balance(it: Chain, arguments: Arguments) -> Result:
    address = check_address(arguments["address"])
    return {"address": address, "balance": it.balance(address)}


def _transfer(it: Chain, arguments: Arguments) -> Result:
    return asdict(it.transfer(**arguments))


def _write_hashes(it: Chain, arguments: Arguments) -> Result:
    sent = arguments["entries"]
    if not isinstance(sent, list) or len(sent) > MAX_ENTRIES:
        raise InvalidInputError(f"the entries are a list of at most {MAX_ENTRIES}", field="entries")
    entries = []
    for number, each in enumerate(sent):
        if not isinstance(each, dict) or set(each) != {"hash", "metadata"}:
            raise InvalidInputError("an entry has hash and metadata", field=f"entries.{number}")
        entries.append(HashEntry.checked(each["hash"], each["metadata"], f"entries.{number}."))
    return {"transactions": [asdict(receipt) for receipt in it.write_hashes(entries)]}


def _verify(it: Chain, arguments: Arguments) -> Result:
    hash_ = check_hash(arguments["hash"])
    receipt = it.verify(hash_)
    return {
        "hash": hash_,
        "verified": receipt is not None,
        "txid": receipt.txid if receipt else None,
        "timestamp": receipt.timestamp if receipt else None,
        "tick": receipt.tick if receipt else None,
    }


def _transaction(it: Chain, arguments: Arguments) -> Result:
    return asdict(it.transaction(str(arguments["txid"])))


def _health(it: Chain, _arguments: Arguments) -> Result:
    return {"status": "healthy", "tick": it.health()}


_OPERATIONS: dict[str, tuple[Callable[[Chain, Arguments], Result], set[str]]] = {
    "policy": (_policy, set()),
    "balance": (_balance, {"address"}),
    "transfer": (_transfer, {"reference", "source", "destination", "amount"}),
    "write_hashes": (_write_hashes, {"entries"}),
    "verify": (_verify, {"hash"}),
    "transaction": (_transaction, {"txid"}),
    "health": (_health, set()),
}
