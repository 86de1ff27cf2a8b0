"""The RPC of the mock network over HTTP: the application's own routes, behind a port of this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from qaes.adapters.http import create_app, make_handler
from qubic.network import mock_rpc_api as rpc
from qubic.network.base import Chain
from tests.support.api import OLIVIA, Api, set_environment
from tests.support.cloud import Cloud, Context
from tests.support.http_server import serve

FUNCTION = "QubicApiFunction"


def handler_of(network: Chain, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The handler of an application that has the RPC's routes alone, of `network`."""
    set_environment(FUNCTION, monkeypatch)
    monkeypatch.setenv("STAGE", "local")
    monkeypatch.setattr(rpc, "chain", lambda: network)
    app = create_app("qubic")
    rpc.add_rpc_routes(app)
    return make_handler(app)


@contextmanager
def served(network: Chain, monkeypatch: pytest.MonkeyPatch, **caller: Any) -> Iterator[str]:
    """Serve the RPC of `network`; every caller is an operator by default."""
    handler = handler_of(network, monkeypatch)
    api = Api(Cloud(), FUNCTION)

    def handle(method: str, path: str, body: bytes, headers: dict[str, str]) -> dict[str, Any]:
        event = api.event(method, path, body or None, **(OLIVIA | caller))
        answer: dict[str, Any] = handler(event, Context(function_name=FUNCTION))
        return answer

    with serve(handle) as url:
        yield url
