"""The transaction worker: tracks signed transactions asynchronously until they are final.

A submission has one message in the queue, which comes back when its tick should have passed, until it is closed. Every
minute, whatever is open is looked at as well: a message may have been lost between the commit and the queue.
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
"""A source is begun with so much time left: the network may answer slowly, and what is cut off is done once more."""


@function
def handler(event: dict[str, Any], context: LambdaContext) -> dict[str, Any]:
    """Take a batch of the queue, give `{"batchItemFailures"}`; take a schedule's event, give `{"open": [keys]}`."""
    it = submissions()
    if "Records" not in event:
        try:
            return {"open": _advance_all(it, context)}
        finally:
            policies().settle()  # last: whatever is wrong with a policy must not keep the others waiting
    failed: list[dict[str, str]] = []
    advanced: dict[str, int] = {}
    for record in event["Records"]:
        if not _has_time(context):
            failed.append({"itemIdentifier": record["messageId"]})
            continue
        try:
            _look(it, json.loads(record["body"]), advanced)
        except Exception:  # noqa: BLE001 - whatever it is, it is logged, and delivered again
            logger().exception("could not advance", extra={"body": record["body"]})
            failed.append({"itemIdentifier": record["messageId"]})
    return {"batchItemFailures": failed}


def _has_time(context: LambdaContext) -> bool:
    return context.get_remaining_time_in_millis() >= SECONDS_FOR_A_SOURCE * 1000


def _look(it: Submissions, message: dict[str, Any], advanced: dict[str, int]) -> None:
    """Look at a submission, and have it looked at again if it is open; `advanced`: sources, and the tick it was then.

    A source is advanced once for all messages of a batch.
    """
    if message["network"] != it.chain.network:
        return  # of another network, which this stack was on before: nobody here can find out
    submission = it.get(message["key"])
    if submission is None:
        return
    source = submission.source
    if source not in advanced:
        advanced[source] = 0
        wait_until_due(message)
        try:
            it.advance(source, seconds=ADVANCE_SECONDS)
            advanced[source] = it.chain.tick_info().tick
        except (TransientError, LimitError) as error:
            logger().warning("not advanced", extra={"source": source, "reason": error.message})
        submission = it.get(submission.key) or submission
    if submission.is_open:
        enqueue(submission, advanced[source], seen=int(message.get("seen", 0)), looks=int(message.get("looks", 0)))


def _advance_all(it: Submissions, context: LambdaContext) -> list[str]:
    """Follow every source that has something open, in any order; return those that are left."""
    identities = it.open_sources()
    random.shuffle(identities)  # none is always the last
    left = []
    for identity in identities:
        try:
            if not _has_time(context):
                left.append(identity)
                continue
            it.advance(identity, seconds=ADVANCE_SECONDS)
        except (TransientError, LimitError) as error:
            logger().warning("not advanced", extra={"source": identity, "reason": error.message})
            left.append(identity)
        except Exception:  # noqa: BLE001 whatever it is, it must not keep the others waiting
            logger().exception("not advanced", extra={"source": identity})
            metrics.count_one(STUCK_METRIC)
            left.append(identity)
    return left
