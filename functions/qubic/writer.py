"""The writer: follows what was signed until its fate is known, without anybody's waiting for it.

A submission has one message in the queue, which comes back when its tick should have passed, until it is closed. Every
minute, whatever is open is looked at as well: a message may have been lost between the commit and the queue.
"""

from __future__ import annotations

import json
from math import ceil
from typing import Any

from aws_lambda_powertools.utilities.typing import LambdaContext

from qaes.adapters import clients, settings
from qaes.adapters.logs import logger
from qaes.domain.errors import LimitError, UnavailableError
from qubic.chain.base import Chain
from qubic.submissions import LEAD_TICKS, Submission, Submissions

MAX_DELAY_SECONDS = 60
"""Longest pause between two looks: ticks may stand still for an hour."""


def enqueue(submission: Submission, tick: int = 0, *, seen: int = 0, looks: int = 0) -> None:
    """Have the submission looked at when its tick should have passed.

    Parameters
    ----------
    tick
        The present tick; 0: it is not known, and the submission is for `LEAD_TICKS` from now.
    seen, looks
        Which tick it was at the last look, and how many looks there have been at that same one: then ticks do not
        come as they should, and the pauses become longer.
    """
    looks = looks + 1 if tick <= seen else 0
    until = (submission.tick + 2 - (tick or submission.tick - LEAD_TICKS)) * settings.number("QUBIC_TICK_MILLISECONDS")
    delay = min(MAX_DELAY_SECONDS, max(1, ceil(until / 1000), 2 ** min(looks - 2, 6) if looks > 2 else 1))
    message = {"key": submission.key, "network": submission.network, "seen": max(tick, seen), "looks": looks}
    clients.client("sqs").send_message(
        QueueUrl=settings.text("LEDGER_WRITER_QUEUE"), MessageBody=json.dumps(message), DelaySeconds=delay
    )


@logger().inject_lambda_context
def handler(event: dict[str, Any], _context: LambdaContext) -> dict[str, Any]:
    """Take a batch of the queue, give `{"batchItemFailures"}`; take a schedule's event, give `{"open": [keys]}`."""
    from qubic.service import policies, submissions

    it = submissions()
    if "Records" not in event:
        left = _follow_all(it)  # first: whatever is wrong with a policy must not keep the others waiting
        policies().settle()
        return {"open": left}
    failed = []
    for record in event["Records"]:
        try:
            _look(it, it.chain, json.loads(record["body"]))
        except Exception:  # noqa: BLE001 - whatever it is, it is logged, and delivered again
            logger().exception("could not follow", extra={"body": record["body"]})
            failed.append({"itemIdentifier": record["messageId"]})
    return {"batchItemFailures": failed}


def _look(it: Submissions, chain: Chain, message: dict[str, Any]) -> None:
    if message["network"] != chain.network:
        return  # of another network, which this stack was on before: nobody here can find out
    submission = it.get(message["key"])
    if submission is None:
        return
    seen, tick = int(message.get("seen", 0)), 0
    try:
        it.follow(submission.source)
        tick = chain.tick_info().tick
    except (UnavailableError, LimitError) as error:
        logger().warning("not followed", extra={"source": submission.source, "reason": error.message})
    submission = it.get(submission.key) or submission
    if submission.is_open:
        enqueue(submission, tick, seen=seen, looks=int(message.get("looks", 0)))


def _follow_all(it: Submissions) -> list[str]:
    left = []
    for identity in it.open_sources():
        try:
            it.follow(identity)
        except (UnavailableError, LimitError) as error:
            logger().warning("not followed", extra={"source": identity, "reason": error.message})
            left.append(identity)
    return left
