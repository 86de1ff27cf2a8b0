"""The network behind the service: `base.Chain` says what it does; the mock is simulated, mainnet is asked."""

from __future__ import annotations

from qaes.adapters import settings
from qubic.chain.base import Chain


def chain() -> Chain:
    """Make the chain of QUBIC_NETWORK."""
    network = settings.text("QUBIC_NETWORK")
    if network == "mock":
        from qubic.chain.mock import MockChain
        from qubic.wallets import genesis

        return MockChain(genesis=genesis())
    if network == "mainnet":
        from qubic.chain.rpc import RpcChain

        return RpcChain(settings.text("QUBIC_RPC_URL"), network=network)
    raise settings.SettingsError(f"QUBIC_NETWORK is mock or mainnet, not {network}")
