"""Client of the ledger's functions. It has a short timeout and does not retry: the state machine retries."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from qaes.adapters import clients, settings
from qaes.domain.errors import LimitError, NotFoundError, PermanentError, TransientError
from qaes.domain.models import WalletBalance
from qaes.domain.policy import Policy
from qaes.domain.suspensions import Suspension

T = TypeVar("T")

CALL_SECONDS = 30
"""Maximum duration of a call, from the connection to the response. Start no call with less time left."""

_FUNCTIONS = {
    "transfer": "LEDGER_TRANSFER_FUNCTION",
    "record_instruction": "LEDGER_TRANSFER_FUNCTION",
    "write": "LEDGER_RECORD_FUNCTION",
    "settle_policy": "LEDGER_RECORD_FUNCTION",
    "submit_anchor": "LEDGER_ANCHOR_FUNCTION",
}
"""Environment variable with the function for each writing operation; LEDGER_FUNCTION has all reading operations."""


class CheckedTransfer(NamedTuple):
    """The ledger's report on a transfer before it is submitted.

    Attributes
    ----------
    balance
        Of the wallet that is to pay.
    refusal_now
        Which limit has no room at the moment; None: each has, or lets people approve the transfer.
    used
        Usage of each limit of the rule, by the limit's key.
    """

    balance: WalletBalance
    refusal_now: str | None
    used: Mapping[str, int]


class Policies(NamedTuple):
    """The policy in force and the pinned one, as the ledger has their documents; and the suspended actions' names."""

    current: Policy
    pinned: Policy
    suspended: dict[str, Suspension]


class LedgerClient:
    """Invokes the qubic service's functions. A caller has the names, and the rights, of only those that it needs.

    Every method raises PermanentError if the ledger rejects the request, LimitError if its queue is full,
    TransientError if it does not respond (ThrottledError if AWS throttles the call), and SettingsError if the
    environment names no function for the operation.

    Parameters
    ----------
    function_name
        Function for all operations. By default, the environment names the function for each operation.
    """

    def __init__(self, function_name: str | None = None) -> None:
        self._function_name = function_name

    def policy(self) -> Policy:
        """Return the policy in force."""
        return Policy.model_validate(self._call("policy"))

    def policies(self, action: str, *, pinned: str | None = None) -> Policies:
        """Return the policy in force and the version `pinned`, reduced to the parts for a decision on the action."""
        return _policies(self._call("policy", **_given(action=action, pinned=pinned)))

    def policy_and_balance(
        self, address: str, *, action: str | None = None, pinned: str | None = None
    ) -> tuple[Policies, WalletBalance | PermanentError]:
        """Return both policies and the result or error of `wallet_balance`, in one call."""
        answer = self._call("policy", address=address, **_given(action=action, pinned=pinned))
        return _policies(answer), _or_refusal(answer["balance"], _wallet_balance)

    def policy_and_check(
        self, *, action: str | None = None, pinned: str | None = None, **terms: Any
    ) -> tuple[Policies, CheckedTransfer | PermanentError]:
        """Return both policies and the result or error of `check_transfer` under the one in force, in one call."""
        answer = self._call("policy", transfer=terms, **_given(action=action, pinned=pinned))
        return _policies(answer), _or_refusal(answer["transfer"], _checked_transfer)

    def policy_version(self, version: int) -> tuple[str, Policy]:
        """Return the status of a version of the policy, proposals included, and the version.

        Raises NotFoundError if the version does not exist.
        """
        try:
            answer = self._call("policy_version", version=version)
        except PermanentError as error:
            if error.code == "not_found":
                raise NotFoundError(error.message, field="version") from error
            raise
        return str(answer["status"]), Policy.model_validate(answer["policy"])

    def suspensions(self) -> dict[str, Suspension]:
        """Return every suspended name with its suspension."""
        found = self._call("suspensions")["suspended"]
        return {name: Suspension.model_validate(value) for name, value in found.items()}

    def limits_used(
        self, parameters: Mapping[str, Any], *, requester: str, agent: str | None, version: int | None
    ) -> dict[str, int]:
        """Return the usage of a transfer's limits, by their keys, under a version or the one in force (None)."""
        terms = {"parameters": dict(parameters), "requester": requester, "agent": agent, "version": version}
        used: dict[str, int] = self._call("limits_used", **terms)["used"]
        return used

    def balance(self, address: str) -> int:
        """Return the balance of `address` in QU."""
        return self.wallet_balance(address).balance

    def wallet_balance(self, address: str) -> WalletBalance:
        """Return the balance of `address`, its available part, and the tick of these values."""
        return _wallet_balance(self._call("balance", address=address))

    def transfer(
        self,
        *,
        reference: str,
        source: str,
        destination: str,
        amount: int,
        requester: str,
        agent: str | None = None,
        run: int = 1,
        granted: Sequence[str] = (),
    ) -> dict[str, Any]:
        """Sign and submit a transfer of `amount` QU, once for each `reference`. Return its state, as `transfer_state`.

        The result means in flight, not completed. A repetition returns the same transfer. It is signed again only if it
        has expired and `run` is a later one. The ledger derives the policy's rule from the transfer.
        People have approved it over the limits whose keys are `granted`.
        """
        return self._call(
            "transfer",
            reference=reference,
            source=source,
            destination=destination,
            amount=amount,
            requester=requester,
            agent=agent,
            run=run,
            granted=list(granted),
        )

    def transfer_state(self, reference: str) -> dict[str, Any]:
        """Return `{state, txid, tick, error}`; `state` is signed, broadcast, confirmed, expired or failed."""
        return self._call("transfer_state", reference=reference)

    def check_transfer(
        self, *, source: str, destination: str, amount: int, requester: str = "", agent: str | None = None
    ) -> CheckedTransfer:
        """Return the balance of the source, and the usage of the rule's limits. Nothing is reserved.

        Raises PermanentError if the ledger would reject the transfer on any day: `not_allowed`, `over_max_amount`,
        `daily_limit_exceeded`, `address_not_allowed`, `no_key` or `invalid_address`. The balance is not checked.
        """
        return _checked_transfer(
            self._call(
                "check_transfer",
                source=source,
                destination=destination,
                amount=amount,
                requester=requester,
                agent=agent,
            )
        )

    def policy_document(self, policy_id: str) -> dict[str, Any]:
        """Return `{policy_id, version, text, hash, txid, tick, encoded}`: a version's text and its transaction."""
        return self._call("policy_document", policy_id=policy_id)

    def write(self, hash_: str, metadata: dict[str, Any], *, written_by: str) -> dict[str, Any]:
        """Record a hash for an operator, once: `{txid, hash, tick, timestamp, state, network}`.

        It is on the ledger if its state is `confirmed`. Raises LimitError if the ledger's queue is full.
        """
        return self._call("write", hash=hash_, metadata=metadata, written_by=written_by)

    def record_instruction(self, hash_: str, *, reference: str, requester: str) -> dict[str, Any]:
        """Record the hash of a task's instruction, once: `{txid, hash, tick, state}`, as `write`."""
        return self._call("record_instruction", hash=hash_, reference=reference, requester=requester)

    def settle_policy(self) -> None:
        """Submit the outstanding version of the policy, or put it in force if the ledger has it."""
        self._call("settle_policy")

    def identity(self) -> str:
        """Return the identity of the ledger's own key."""
        return str(self._call("identity")["identity"])

    def submit_anchor(self, *, log_id: str, sequence: int, payload: str) -> dict[str, Any]:
        """Record an anchor's payload (hex), once for each log and sequence number. Return `anchor_state`."""
        return self._call("submit_anchor", log_id=log_id, sequence=sequence, payload=payload)

    def anchor_state(self, *, log_id: str, sequence: int) -> dict[str, Any]:
        """Return `{state, txid, tick, source, encoded, network}` of an anchor; `encoded` is the transaction in base64.

        Raises PermanentError (`not_found`) if it was never submitted.
        """
        return self._call("anchor_state", log_id=log_id, sequence=sequence)

    def verify(self, hash_: str) -> dict[str, Any]:
        """Return `{hash, verified, kind, state, txid, tick, timestamp}`; `verified` if the transaction is confirmed.

        `kind` is `instruction` for the hash of a task's instruction, `hash` for a hash from an operator.
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
            raise TransientError("the ledger failed")
        return _result(answer)


def _result(answer: dict[str, Any]) -> dict[str, Any]:
    if not answer["ok"]:
        refusal = answer["error"]
        if refusal["code"] == "busy":
            raise LimitError(refusal["message"], max_open=refusal["max_open"])
        raise PermanentError(refusal["code"], refusal["message"])
    result: dict[str, Any] = answer["result"]
    return result


def _given(**arguments: str | None) -> dict[str, str]:
    return {name: value for name, value in arguments.items() if value is not None}


def _policies(answer: dict[str, Any]) -> Policies:
    """Read both policies; only one is sent if they are the same."""
    current = Policy.model_validate(answer)
    pinned = Policy.model_validate(answer["pinned"]) if "pinned" in answer else current
    suspended = {name: Suspension.model_validate(value) for name, value in answer.get("suspended", {}).items()}
    return Policies(current, pinned, suspended)


def _or_refusal(answer: dict[str, Any], read: Callable[[dict[str, Any]], T]) -> T | PermanentError:
    try:
        return read(_result(answer))
    except PermanentError as refusal:
        return refusal


def _checked_transfer(answer: dict[str, Any]) -> CheckedTransfer:
    return CheckedTransfer(_wallet_balance(answer["source"]), answer["refusal_today"], answer.get("used", {}))


def _wallet_balance(answer: dict[str, Any]) -> WalletBalance:
    return WalletBalance.model_validate({name: answer[name] for name in WalletBalance.model_fields})
