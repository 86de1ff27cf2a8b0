"""The ledger's operations for other services: functions that are invoked directly with the name of an operation.

A role that can invoke a function can use all of its operations. The ledger therefore has four functions, each with
its LEDGER_OPERATIONS: one reads; one moves money and records instructions for the worker; one writes the audit log's
anchors; and one signs for the API, which has no key: hashes from operators, and the policy that they approved.

`{"operation": NAME, ...}` returns `{"ok": true, "result": {...}}`, or `{"ok": false, "error": {"code", "message"}}` for
a permanent error or a full queue (`busy`). Errors that a repetition may solve are raised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters import settings, suspensions
from qaes.adapters.handlers import function
from qaes.adapters.logs import logger
from qaes.domain.errors import (
    ForbiddenError,
    InvalidInputError,
    LimitError,
    NotFoundError,
    PermanentError,
)
from qaes.domain.policy import TRANSFER_ACTION, ActionRequest, Policy, evaluate, refusal_over
from qaes.domain.qubic.identity import check_address
from qubic.spending import rule_for
from qubic.transactions.hashes import check_hash, hash_state, record_instruction, write_hash
from qubic.transactions.model import Submission, check_amount, check_reference
from qubic.transactions.submissions import Submissions
from qubic.wallets import Wallets, service_identity
from qubic.wiring import policies, submissions

Arguments = dict[str, Any]
Result = dict[str, Any]

_CODES = {
    "address": "invalid_address",
    "source": "invalid_address",
    "destination": "invalid_address",
    "amount": "invalid_amount",
}


@function
def handler(event: dict[str, Any], _context: LambdaContext) -> dict[str, Any]:
    """Perform the operation that the event names."""
    arguments = dict(event)
    operation = arguments.pop("operation", None)
    return _answer(operation, lambda: _perform(operation, arguments))


def _answer(operation: object, perform: Callable[[], Result]) -> dict[str, Any]:
    try:
        return {"ok": True, "result": perform()}
    except PermanentError as error:
        return _refused(operation, error.code, error.message)
    except InvalidInputError as error:
        return _refused(operation, _CODES.get(error.field or "", "invalid_input"), error.message)
    except ForbiddenError as error:
        return _refused(operation, "forbidden", error.message)
    except NotFoundError as error:
        return _refused(operation, "not_found", error.message)
    except LimitError as error:
        return _refused(operation, "busy", error.message, **error.details)


def _perform(operation: object, arguments: Arguments) -> Result:
    if not isinstance(operation, str) or operation not in _OPERATIONS or operation not in _operations_here():
        raise PermanentError("unknown_operation", "this ledger function does not have this operation")
    perform, names = _OPERATIONS[operation]
    arguments.pop("action_type", None)  # earlier callers send an action; only the effect determines the rule
    arguments = _DEFAULTS.get(operation, {}) | arguments
    if set(arguments) != names:
        raise InvalidInputError(f"{operation} takes {', '.join(sorted(names)) or 'nothing'}")
    ledger = submissions()
    return {"network": ledger.chain.network} | perform(ledger, arguments)


def _operations_here() -> list[str]:
    return settings.text("LEDGER_OPERATIONS").split(",")


def _refused(operation: object, code: str, message: str, **details: Any) -> dict[str, Any]:
    logger().info("refused", extra={"operation": operation, "code": code})
    return {"ok": False, "error": {"code": code, "message": message} | details}


def _policy(ledger: Submissions, arguments: Arguments) -> Result:
    """Return the policy in force and the caller's next input, which saves a second invocation.

    With `action`, the policy has only the parts for a decision on that action, and `suspended` has the suspensions of
    that action and of `*`. With `pinned` as well, the member of that name is the version with that id, reduced in the
    same way, unless that version is in force. With `address`, the result has `balance` as that operation returns it.
    With `transfer`, it has `transfer` as `check_transfer` returns it under this policy. An error in either does not
    affect the policy.
    """
    versions = policies()
    policy, action, pinned = versions.in_force(), arguments["action"], arguments["pinned"]
    if action is None and pinned is not None:
        raise InvalidInputError("`pinned` needs `action`: a version is returned as far as the action needs it")
    result = (policy if action is None else policy.reduced(str(action))).model_dump(mode="json")
    if action is not None:
        result |= _suspended(str(action))
    if pinned is not None and pinned != policy.policy_id:
        before = versions.once_in_force(str(pinned)).reduced(str(action))
        result["pinned"] = before.model_dump(mode="json")
        # An approval for a group of the pinned rule counts if its person is in the present group of that name as well.
        result["groups"] |= {name: policy.groups[name] for name in before.groups if name in policy.groups}
    if arguments["address"] is not None:
        result["balance"] = _answer("balance", lambda: _balance(ledger, arguments))
    if arguments["transfer"] is not None:
        result["transfer"] = _answer("check_transfer", lambda: _checked_transfer(ledger, policy, arguments["transfer"]))
    return result


def _policy_document(_ledger: Submissions, arguments: Arguments) -> Result:
    return policies().document(str(arguments["policy_id"]))


def _suspended(action: str | None = None) -> Result:
    found = suspensions.suspended(action, consistent=False)
    return {"suspended": {name: each.model_dump(mode="json") for name, each in found.items()}}


def _suspensions(_ledger: Submissions, _arguments: Arguments) -> Result:
    return _suspended()


def _policy_version(_ledger: Submissions, arguments: Arguments) -> Result:
    """Return a version of the policy, proposals included, and its status."""
    found, policy = policies().version(_version(arguments))
    return {"status": found.status, "policy": policy.model_dump(mode="json")}


def _limits_used(ledger: Submissions, arguments: Arguments) -> Result:
    """Return the usage of a transfer's limits, by their keys, under a version or the one in force (None)."""
    if not isinstance(arguments["parameters"], dict):
        raise InvalidInputError("the parameters must be an object", field="parameters")
    versions = policies()
    policy = versions.in_force() if arguments["version"] is None else versions.version(_version(arguments))[1]
    decision = evaluate(policy, ActionRequest(TRANSFER_ACTION, arguments["parameters"], **_caller(arguments)))
    used = ledger.spending.read(decision.limits) if ledger.sends_transfers else ()
    return {"used": {use.limit.key: use.used for use in used}}


def _version(arguments: Arguments) -> int:
    version = arguments["version"]
    if type(version) is not int:
        raise InvalidInputError("the version must be a whole number", field="version")
    return version


def _settle_policy(_ledger: Submissions, _arguments: Arguments) -> Result:
    policies().advance()
    return {}


def _identity(_ledger: Submissions, _arguments: Arguments) -> Result:
    return {"identity": service_identity()}


def _balance(ledger: Submissions, arguments: Arguments) -> Result:
    address = check_address(arguments["address"])
    balance, available = ledger.available(Wallets(ledger.chain.network).identity(address))
    return {
        "address": address,
        "balance": balance.balance,
        "available": available,
        "tick": balance.valid_for_tick,
    }


def _check_transfer(ledger: Submissions, arguments: Arguments) -> Result:
    return _checked_transfer(ledger, policies().in_force(), arguments)


def _checked_transfer(ledger: Submissions, policy: Policy, terms: Any) -> Result:
    if not isinstance(terms, dict) or set(_CALLER | terms) != _TERMS | set(_CALLER):
        raise InvalidInputError(f"a transfer must have {', '.join(sorted(_TERMS))}", field="transfer")
    wallets, amount = Wallets(ledger.chain.network), check_amount(terms["amount"])
    wallets.check_parties(terms["source"], terms["destination"])
    caller = _caller(_CALLER | terms)
    source = wallets.identity(terms["source"])
    rule = rule_for(policy, source=source, destination=terms["destination"], amount=amount, **caller)
    used = ledger.spending.read(rule.limits) if ledger.sends_transfers else ()
    refusal = next((each for use in used if (each := refusal_over(policy.policy_id, use.limit, used=use.used))), None)
    return {
        "source": _balance(ledger, {"address": terms["source"]}),
        "refusal_today": f"{refusal.code}: {refusal.message}" if refusal else None,
        "used": {use.limit.key: use.used for use in used},
    }


def _transfer(ledger: Submissions, arguments: Arguments) -> Result:
    terms = {name: arguments[name] for name in ("reference", "source", "destination", "amount")}
    _check_terms(arguments)
    caller = _caller(arguments)
    by = {"requested_by": caller["requester"], "agent": caller["agent"] or ""}
    if not ledger.sends_transfers:
        existing = ledger.get(f"transfer:{terms['reference']}")  # sent while the policy allowed it: report its state
        return (existing or ledger.simulate_transfer(**terms, **by)).answer()
    return ledger.submit_transfer(**terms, **by, run=arguments["run"], granted=_granted(arguments)).answer()


def _caller(arguments: Arguments) -> dict[str, Any]:
    requester, agent = arguments["requester"], arguments["agent"]
    return {"requester": str(requester), "agent": None if agent is None else str(agent)}


def _granted(arguments: Arguments) -> Sequence[str]:
    granted = arguments["granted"]
    if not isinstance(granted, (list, tuple)) or not all(isinstance(key, str) for key in granted):
        raise InvalidInputError("`granted` is a list of the keys of limits", field="granted")
    return granted


def _check_terms(arguments: Arguments) -> None:
    check_reference(arguments["reference"])
    for name in ("amount", "run"):
        if type(arguments[name]) is not int:
            raise InvalidInputError(f"the {name} must be a whole number", field=name)


def _transfer_state(ledger: Submissions, arguments: Arguments) -> Result:
    return _existing(ledger, f"transfer:{arguments['reference']}").answer()


def _write(ledger: Submissions, arguments: Arguments) -> Result:
    written = write_hash(ledger, arguments["hash"], arguments["metadata"], written_by=str(arguments["written_by"]))
    return written.answer() | {"hash": written.payload.hex()}


def _record_instruction(ledger: Submissions, arguments: Arguments) -> Result:
    recorded = record_instruction(ledger, arguments["hash"], arguments["reference"], str(arguments["requester"]))
    return recorded.answer() | {"hash": recorded.payload.hex()}


def _submit_anchor(ledger: Submissions, arguments: Arguments) -> Result:
    try:
        payload = bytes.fromhex(arguments["payload"])
    except (TypeError, ValueError):
        raise InvalidInputError("the payload must be hexadecimal", field="payload") from None
    key, metadata = _anchor_key(arguments), {name: arguments[name] for name in ("log_id", "sequence")}
    return ledger.submit_record(key, payload, kind="anchor", metadata=metadata).answer()


def _anchor_state(ledger: Submissions, arguments: Arguments) -> Result:
    return _existing(ledger, _anchor_key(arguments)).answer()


def _anchor_key(arguments: Arguments) -> str:
    if type(arguments["sequence"]) is not int or arguments["sequence"] < 0:
        raise InvalidInputError("the sequence must be a whole number of at least 0", field="sequence")
    return f"anchor:{arguments['log_id']}:{arguments['sequence']}"


def _existing(ledger: Submissions, key: str) -> Submission:
    found = ledger.get(key)
    if found is None:
        raise NotFoundError("no transaction was submitted under this key")
    return found


def _verify(ledger: Submissions, arguments: Arguments) -> Result:
    return hash_state(ledger, check_hash(arguments["hash"]))


def _transaction(ledger: Submissions, arguments: Arguments) -> Result:
    found = ledger.attempt(str(arguments["txid"]))
    if found is None:
        raise NotFoundError("the transaction does not exist", field="txid")
    return found.answer()


def _health(ledger: Submissions, _arguments: Arguments) -> Result:
    policy = policies().in_force()
    return {"status": "healthy", "tick": ledger.chain.tick_info().tick, "policy_id": policy.policy_id}


_CALLER: Arguments = {"requester": "", "agent": None}
_DEFAULTS: dict[str, Arguments] = {
    "policy": {"action": None, "pinned": None, "address": None, "transfer": None},
    # Callers that name no person: only auditors and operators can read the record's metadata.
    "check_transfer": _CALLER,
    "limits_used": _CALLER | {"version": None},
    "transfer": _CALLER | {"granted": []},
    "record_instruction": {"requester": ""},
    "write": {"written_by": ""},
}
_TERMS = {"source", "destination", "amount"}
_OPERATIONS: dict[str, tuple[Callable[[Submissions, Arguments], Result], set[str]]] = {
    "policy": (_policy, {"action", "pinned", "address", "transfer"}),
    "policy_document": (_policy_document, {"policy_id"}),
    "suspensions": (_suspensions, set()),
    "policy_version": (_policy_version, {"version"}),
    "limits_used": (_limits_used, {"version", "parameters"} | set(_CALLER)),
    "settle_policy": (_settle_policy, set()),
    "identity": (_identity, set()),
    "balance": (_balance, {"address"}),
    "check_transfer": (_check_transfer, _TERMS | set(_CALLER)),
    "transfer": (_transfer, _TERMS | set(_CALLER) | {"reference", "run", "granted"}),
    "transfer_state": (_transfer_state, {"reference"}),
    "record_instruction": (_record_instruction, {"hash", "reference", "requester"}),
    "write": (_write, {"hash", "metadata", "written_by"}),
    "submit_anchor": (_submit_anchor, {"log_id", "sequence", "payload"}),
    "anchor_state": (_anchor_state, {"log_id", "sequence"}),
    "verify": (_verify, {"hash"}),
    "transaction": (_transaction, {"txid"}),
    "health": (_health, set()),
}
