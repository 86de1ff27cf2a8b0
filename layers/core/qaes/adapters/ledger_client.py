"""The one way to the ledger. It has a short timeout and no retries of its own: those are the state's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from qaes.adapters import clients, settings
from qaes.domain.errors import LimitError, PermanentError, TransientError
from qaes.domain.models import WalletBalance
from qaes.domain.policy import Policy

T = TypeVar("T")

CALL_SECONDS = 30
"""No call takes longer: to connect, and to wait for the ledger's function. Who has less time left begins none."""

_FUNCTIONS = {
    "transfer": "LEDGER_TRANSFER_FUNCTION",
    "record_instruction": "LEDGER_TRANSFER_FUNCTION",
    "write": "LEDGER_RECORD_FUNCTION",
    "settle_policy": "LEDGER_RECORD_FUNCTION",
    "submit_anchor": "LEDGER_ANCHOR_FUNCTION",
}
"""Which variable names the function that changes something; all that reads is LEDGER_FUNCTION's."""


class LedgerClient:
    """Asks the qubic service's functions: a caller has the names, and the rights, of those that it needs.

    Every method raises PermanentError when the ledger says no, LimitError when too much waits to be written,
    TransientError when it cannot be asked (ThrottledError while AWS throttles), and SettingsError when the
    environment names no function for it.

    Parameters
    ----------
    function_name
        Ask this function, whatever it is. By default the one that the environment names for the operation.
    """

    def __init__(self, function_name: str | None = None) -> None:
        self._function_name = function_name

    def policy(self) -> Policy:
        """The policy in force."""
        return Policy.model_validate(self._call("policy"))

    def policy_and_balance(self, address: str) -> tuple[Policy, WalletBalance | PermanentError]:
        """The policy in force, and the answer of `wallet_balance`, which may be a refusal: one call for both."""
        answer = self._call("policy", address=address)
        return Policy.model_validate(answer), _or_refusal(answer["balance"], _wallet_balance)

    def policy_and_check(
        self, *, source: str, destination: str, amount: int
    ) -> tuple[Policy, tuple[WalletBalance, str | None] | PermanentError]:
        """The policy in force, and the answer of `check_transfer` under it, which may be a refusal: one call."""
        terms = {"source": source, "destination": destination, "amount": amount}
        answer = self._call("policy", transfer=terms)
        return Policy.model_validate(answer), _or_refusal(answer["transfer"], _checked_transfer)

    def balance(self, address: str) -> int:
        """The balance of `address` in QU."""
        return self.wallet_balance(address).balance

    def wallet_balance(self, address: str) -> WalletBalance:
        """The balance of `address`, what of it is available, and the tick as of which that is."""
        return _wallet_balance(self._call("balance", address=address))

    def transfer(
        self, *, reference: str, source: str, destination: str, amount: int, requester: str, run: int = 1
    ) -> dict[str, Any]:
        """Sign and hand in a transfer of `amount` QU, once for each `reference`; its state, as `transfer_state`.

        It is under way when this answers, not made. Asked again, the same transfer answers; only when it has expired,
        and `run` is a later one than before, is it signed anew. The ledger derives the policy's rule from the transfer.
        """
        return self._call(
            "transfer",
            reference=reference,
            source=source,
            destination=destination,
            amount=amount,
            requester=requester,
            run=run,
        )

    def transfer_state(self, reference: str) -> dict[str, Any]:
        """`{state, txid, tick, error}` of a transfer; `state` is signed, broadcast, confirmed, expired or failed."""
        return self._call("transfer_state", reference=reference)

    def check_transfer(self, *, source: str, destination: str, amount: int) -> tuple[WalletBalance, str | None]:
        """Return the balance of the wallet that is to pay, and why the day's limit has no room now; reserve nothing.

        Raises PermanentError when the ledger would refuse the transfer on any day: `not_allowed`, `over_max_amount`,
        `daily_limit_exceeded`, `address_not_allowed`, `no_key` or `invalid_address`. The balance decides nothing here.
        """
        return _checked_transfer(self._call("check_transfer", source=source, destination=destination, amount=amount))

    def policy_document(self, policy_id: str) -> dict[str, Any]:
        """`{policy_id, version, text, hash, txid, tick, encoded}`: a version's canonical text, and what anchors it."""
        return self._call("policy_document", policy_id=policy_id)

    def write(self, hash_: str, metadata: dict[str, Any], *, written_by: str) -> dict[str, Any]:
        """Write a hash for an operator, once for ever: `{txid, hash, tick, timestamp, state, network}`.

        It is on the ledger when its state is `confirmed`. Raises LimitError when too much waits to be written.
        """
        return self._call("write", hash=hash_, metadata=metadata, written_by=written_by)

    def record_instruction(self, hash_: str, *, reference: str, requester: str) -> dict[str, Any]:
        """Write the hash of a task's instruction, once: `{txid, hash, tick, state}`, as `write`."""
        return self._call("record_instruction", hash=hash_, reference=reference, requester=requester)

    def settle_policy(self) -> None:
        """Have the version of the policy that is on its way handed in, or put in force if the ledger has it."""
        self._call("settle_policy")

    def identity(self) -> str:
        """The identity of the ledger's own key."""
        return str(self._call("identity")["identity"])

    def submit_anchor(self, *, log_id: str, sequence: int, payload: str) -> dict[str, Any]:
        """Write an anchor's payload (hex), once for each log and sequence number; its state, as `anchor_state`."""
        return self._call("submit_anchor", log_id=log_id, sequence=sequence, payload=payload)

    def anchor_state(self, *, log_id: str, sequence: int) -> dict[str, Any]:
        """`{state, txid, tick, source, encoded, network}` of an anchor; `encoded` is the signed transaction in base64.

        Raises PermanentError (`not_found`) when it was never submitted.
        """
        return self._call("anchor_state", log_id=log_id, sequence=sequence)

    def verify(self, hash_: str) -> dict[str, Any]:
        """`{hash, verified, kind, state, txid, tick, timestamp}`; `verified` only when its transaction is confirmed.

        `kind` is `instruction` for the record of a task's instruction, `hash` for what an operator wrote.
        """
        return self._call("verify", hash=hash_)

    def transaction(self, txid: str) -> dict[str, Any]:
        return self._call("transaction", txid=txid)

    def health(self) -> dict[str, Any]:
        return self._call("health")

    def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        function = self._function_name or settings.text(_FUNCTIONS.get(operation, "LEDGER_FUNCTION"))
        answer = clients.invoke(function, {"operation": operation, **arguments}, "the ledger")
        if not isinstance(answer, dict) or "ok" not in answer:
            raise TransientError("the ledger failed to answer")
        return _result(answer)


def _result(answer: dict[str, Any]) -> dict[str, Any]:
    if not answer["ok"]:
        refusal = answer["error"]
        if refusal["code"] == "busy":
            raise LimitError(refusal["message"], max_open=refusal["max_open"])
        raise PermanentError(refusal["code"], refusal["message"])
    result: dict[str, Any] = answer["result"]
    return result


def _or_refusal(answer: dict[str, Any], read: Callable[[dict[str, Any]], T]) -> T | PermanentError:
    try:
        return read(_result(answer))
    except PermanentError as refusal:
        return refusal


def _checked_transfer(answer: dict[str, Any]) -> tuple[WalletBalance, str | None]:
    return _wallet_balance(answer["source"]), answer["refusal_today"]


def _wallet_balance(answer: dict[str, Any]) -> WalletBalance:
    return WalletBalance.model_validate({name: answer[name] for name in WalletBalance.model_fields})
