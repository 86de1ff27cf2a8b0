"""The one way to the ledger. It has a short timeout and no retries of its own: those are the state's."""

from __future__ import annotations

import json
from typing import Any

from qaes.adapters import clients, settings
from qaes.domain.errors import RefusedError, UnavailableError
from qaes.domain.policy import Policy


class LedgerClient:
    """Asks the qubic service's function.

    Every method raises RefusedError when the ledger says no, and UnavailableError when it cannot be asked.
    """

    def __init__(self, function_name: str | None = None) -> None:
        self._function_name = function_name

    def policy(self) -> Policy:
        """The policy in force."""
        return Policy.model_validate(self._call("policy"))

    def balance(self, address: str) -> int:
        """The balance of `address` in QU."""
        return int(self._call("balance", address=address)["balance"])

    def transfer(self, *, reference: str, source: str, destination: str, amount: int) -> dict[str, Any]:
        """Move `amount` QU, once for each `reference`."""
        return self._call("transfer", reference=reference, source=source, destination=destination, amount=amount)

    def write_hashes(self, entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Write `{"hash", "metadata"}` each, once for each hash; transactions in the same order."""
        return list(self._call("write_hashes", entries=entries)["transactions"])

    def verify(self, hash_: str) -> dict[str, Any]:
        return self._call("verify", hash=hash_)

    def transaction(self, txid: str) -> dict[str, Any]:
        return self._call("transaction", txid=txid)

    def health(self) -> dict[str, Any]:
        return self._call("health")

    def _call(self, operation: str, **arguments: Any) -> dict[str, Any]:
        from botocore.exceptions import BotoCoreError, ClientError

        payload = json.dumps({"operation": operation, **arguments})
        try:
            response = clients.lambda_client().invoke(
                FunctionName=self._function_name or settings.text("LEDGER_FUNCTION"), Payload=payload
            )
            answer = json.loads(response["Payload"].read())
        except (BotoCoreError, ClientError, ValueError) as error:
            raise UnavailableError(f"the ledger did not answer ({type(error).__name__})") from error
        if response.get("FunctionError") or not isinstance(answer, dict) or "ok" not in answer:
            raise UnavailableError("the ledger failed to answer")
        if not answer["ok"]:
            raise RefusedError(answer["error"]["code"], answer["error"]["message"])
        result: dict[str, Any] = answer["result"]
        return result
