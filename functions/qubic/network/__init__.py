"""The network behind the service: the interface `base.Chain`, implemented by the mock and by the RPC's client."""

from __future__ import annotations

from functools import cache

from qaes.adapters import settings
from qubic.network.base import Chain


def chain() -> Chain:
    """Create the chain of QUBIC_NETWORK."""
    network = settings.text("QUBIC_NETWORK")
    if network == "mock":
        from qubic.network.mock import MockChain
        from qubic.wallets import genesis

        return MockChain(genesis=genesis())
    if network == "mainnet":
        return _rpc(settings.text("QUBIC_RPC_URL"), network)
    raise settings.SettingsError(f"QUBIC_NETWORK must be mock or mainnet, not {network}")


@cache
def _rpc(url: str, network: str) -> Chain:
    # One instance for each process keeps its connections, and so saves TLS handshakes.
    from qubic.network.rpc_client import RpcChain

    return RpcChain(url, network=network)
