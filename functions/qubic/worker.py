"""The transaction worker: tracks signed transactions asynchronously until they are final.

Each submission has one message in the queue, which becomes visible when the transaction's tick should have passed,
until the submission is closed. A schedule also checks all open submissions every minute, because a message may have
been lost between the commit and the queue.
"""

from __future__ import annotations

import json
import random
from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters import metrics
from qaes.adapters.handlers import function
from qaes.adapters.logs import logger
from qaes.domain.errors import LimitError, TransientError
from qubic.transactions.queue import enqueue, wait_until_due
from qubic.transactions.submissions import Submissions
from qubic.transactions.tracking import ADVANCE_SECONDS
from qubic.wiring import policies, submissions

STUCK_METRIC = "LedgerStuck"
SECONDS_FOR_A_SOURCE = 18
"""Minimum time left to start a source: the network may be slow, and interrupted work is repeated."""


@function
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Process a queue's batch, return `{"batchItemFailures"}`; or a schedule's event, return `{"open": [keys]}`."""
    ledger = submissions()
    if "Records" not in event:
        try:
            return {"open": _advance_all(ledger, context)}
        finally:
            policies().settle()  # last: a policy's error must not block the sources
    failed: list[dict[str, str]] = []
    advanced: dict[str, int] = {}
    for record in event["Records"]:
        if not _has_time(context):
            failed.append({"itemIdentifier": record["messageId"]})
            continue
        try:
            _check_message(ledger, json.loads(record["body"]), advanced)
        except Exception:  # noqa: BLE001 - log any error; the queue delivers the message again
            logger().exception("the submission could not be advanced", extra={"body": record["body"]})
            failed.append({"itemIdentifier": record["messageId"]})
    return {"batchItemFailures": failed}


def _has_time(context: LambdaContext) -> bool:
    return context.get_remaining_time_in_millis() >= SECONDS_FOR_A_SOURCE * 1000


def _check_message(ledger: Submissions, message: dict[str, Any], advanced: dict[str, int]) -> None:
    """Advance a submission's source, and enqueue the submission again if it is open.

    `advanced` has the sources of this batch that were advanced, and the tick at that time. Each is advanced once.
    """
    if message["network"] != ledger.chain.network:
        return  # from a network that this stack used before: it cannot be reached from here
    submission = ledger.get(message["key"])
    if submission is None:
        return
    source = submission.source
    if source not in advanced:
        advanced[source] = 0
        wait_until_due(message)
        try:
            ledger.advance(source, seconds=ADVANCE_SECONDS)
            advanced[source] = ledger.chain.tick_info().tick
        except (TransientError, LimitError) as error:
            logger().warning("the source could not be advanced", extra={"source": source, "reason": error.message})
        submission = ledger.get(submission.key) or submission
    if submission.is_open:
        enqueue(submission, advanced[source], seen=int(message.get("seen", 0)), looks=int(message.get("looks", 0)))


def _advance_all(ledger: Submissions, context: LambdaContext) -> list[str]:
    """Advance every source with open submissions, in random order. Return the sources that are left."""
    identities = ledger.open_sources()
    random.shuffle(identities)  # so that no source is always the last
    left = []
    for identity in identities:
        try:
            if not _has_time(context):
                left.append(identity)
                continue
            ledger.advance(identity, seconds=ADVANCE_SECONDS)
        except (TransientError, LimitError) as error:
            logger().warning("the source could not be advanced", extra={"source": identity, "reason": error.message})
            left.append(identity)
        except Exception:  # noqa: BLE001 one source's error must not block the others
            logger().exception("the source could not be advanced", extra={"source": identity})
            metrics.count_one(STUCK_METRIC)
            left.append(identity)
    return left
