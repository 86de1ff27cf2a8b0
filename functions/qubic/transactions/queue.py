"""The queue of open submissions: each has one message, which is due when the submission's tick should have passed."""

from __future__ import annotations

import json
import time
from typing import Any

from qaes.adapters import clients, settings
from qubic.transactions.model import Submission
from qubic.transactions.signing import LEAD_TICKS

MAX_DELAY_SECONDS = 60
"""Longest pause between two checks: the network may have no new ticks for an hour."""


def wait_until_due(message: dict[str, Any]) -> None:
    """Wait for the rest of a second: the queue's delays are whole seconds, so a message may be up to one early."""
    rest = float(message.get("due", 0)) - time.time()
    if 0 < rest < 1:
        time.sleep(rest)


def enqueue(submission: Submission, tick: int = 0, *, seen: int = 0, looks: int = 0) -> None:
    """Schedule a check of the submission for the time when its tick should have passed.

    Parameters
    ----------
    tick
        The current tick; 0 if unknown: then the submission's tick is assumed `LEAD_TICKS` ahead.
    seen, looks
        The tick at the last check, and the number of checks at that same tick. Without new ticks, the pauses become
        longer.
    """
    looks = looks + 1 if tick <= seen else 0
    until = (submission.tick + 2 - (tick or submission.tick - LEAD_TICKS)) * settings.number("QUBIC_TICK_MILLISECONDS")
    pause = min(MAX_DELAY_SECONDS, max(1, until / 1000, 2 ** min(looks - 2, 6) if looks > 2 else 1))
    message = {
        "key": submission.key,
        "network": submission.network,
        "seen": max(tick, seen),
        "looks": looks,
        "due": round(time.time() + pause, 3),
    }
    clients.client("sqs").send_message(
        QueueUrl=settings.text("TRANSACTION_WORKER_QUEUE"), MessageBody=json.dumps(message), DelaySeconds=int(pause)
    )
