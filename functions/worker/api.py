"""HTTP API of the worker: its health."""

from __future__ import annotations

from qaes.adapters.health import add_health, tasks_table_answers
from qaes.adapters.http import create_app, make_handler
from qaes.adapters.ledger_client import LedgerClient

app = create_app("worker")
handler = make_handler(app)
add_health(app, "/worker/health", {"tasks_table": tasks_table_answers, "ledger": lambda: LedgerClient().health()})
