"""The chain behind the service: `base.Chain` says what it does, `mock.MockChain` does it on DynamoDB."""

from __future__ import annotations

from qaes.adapters import settings
from qubic.chain.base import Chain


def chain() -> Chain:
    """The chain of QUBIC_NETWORK."""
    network = settings.text("QUBIC_NETWORK")
    if network != "mock":
        raise settings.SettingsError(f"QUBIC_NETWORK is {network}; this service has the mock alone")
    from qubic.chain.mock import MockChain

    return MockChain()
