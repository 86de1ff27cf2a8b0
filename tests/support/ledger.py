"""A replacement of the ledger's functions for tests of its responses: anchors with real signatures.

The tests of the whole system use the real ledger.
"""

from __future__ import annotations

import base64
from dataclasses import dataclass, field
from typing import Any

from qaes.domain.anchor import ANCHOR_INPUT_TYPE
from qaes.domain.qubic.identity import encode_identity
from qaes.domain.qubic.schnorrq import public_key_of
from qaes.domain.qubic.transaction import Transaction
from tests.support.cloud import Cloud

SUBSEED = bytes(range(32))


@dataclass
class Ledger:
    """Responds to `submit_anchor` and `anchor_state` as the ledger does; the test confirms the anchors."""

    confirms_at_once: bool = True
    submitted: dict[tuple[str, int], Transaction] = field(default_factory=dict)
    confirmed: set[tuple[str, int]] = field(default_factory=set)
    network: str = "mock"
    tick: int = 1000
    falsify: dict[str, Any] = field(default_factory=dict)
    """Fields of a response that a test falsifies."""

    def install(self, aws: Cloud) -> Ledger:
        real = aws.invoke

        def invoke(function: str, event: Any) -> Any:
            if function not in {"LedgerFunction", "LedgerAnchorFunction"}:
                return real(function, event)
            aws.invocations[function] += 1
            if fault := aws.faults.get(function):
                fault(event)
            return self(event)

        aws.invoke = invoke  # type: ignore[method-assign]
        return self

    def confirm(self) -> None:
        """Confirm all submissions."""
        self.confirmed |= set(self.submitted)

    def __call__(self, event: dict[str, Any]) -> dict[str, Any]:
        if event["operation"] == "health":
            return {"ok": True, "result": {"status": "healthy"}}
        key = (event["log_id"], event["sequence"])
        if event["operation"] == "submit_anchor":
            payload = bytes.fromhex(event["payload"])
            if key not in self.submitted:
                self.tick += 15
                source = public_key_of(SUBSEED)
                unsigned = Transaction(source, source, 0, self.tick, ANCHOR_INPUT_TYPE, payload)
                self.submitted[key] = unsigned.sign(SUBSEED)
                if self.confirms_at_once:
                    self.confirmed.add(key)
            elif self.submitted[key].payload != payload:
                return {"ok": False, "error": {"code": "key_conflict", "message": "another payload"}}
        if key not in self.submitted:
            return {
                "ok": False,
                "error": {"code": "not_found", "message": "no transaction was submitted under this key"},
            }
        signed = self.submitted[key]
        answer = {
            "network": self.network,
            "state": "confirmed" if key in self.confirmed else "broadcast",
            "txid": signed.id,
            "tick": signed.tick,
            "timestamp": "2026-11-23T12:00:00.000Z",
            "source": encode_identity(signed.source),
            "encoded": base64.b64encode(signed.encode()).decode(),
            "error": None,
        }
        return {"ok": True, "result": answer | self.falsify}
