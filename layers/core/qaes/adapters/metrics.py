"""Metrics in CloudWatch's embedded format: a line in the log, and no call."""

from __future__ import annotations

from qaes.adapters import settings
from qaes.domain.models import Event

NAMESPACE = "QAES"


def count(event: Event) -> None:
    """Count what happened to a task: a metric for each kind of event, `TaskEnded` say, by its status."""
    from aws_lambda_powertools.metrics import MetricUnit, single_metric

    name = "".join(word.capitalize() for word in event.kind.split("_"))
    with single_metric(name=name, unit=MetricUnit.Count, value=1, namespace=namespace()) as metric:
        metric.add_dimension("status", event.status)


def count_one(name: str) -> None:
    """Count something that is not about a task, and that an alarm is made of."""
    from aws_lambda_powertools.metrics import MetricUnit, single_metric

    with single_metric(name=name, unit=MetricUnit.Count, value=1, namespace=namespace()):
        pass


def open_approvals(ages: list[float]) -> None:
    """Tell how many approvals are open, and since when the oldest of `ages` (seconds); 0 and 0 when there are none."""
    from aws_lambda_powertools.metrics import MetricUnit, single_metric

    oldest = max(ages, default=0)
    for name, unit, value in (
        ("OpenApprovals", MetricUnit.Count, len(ages)),
        ("OldestPendingApprovalAge", MetricUnit.Seconds, max(oldest, 0)),
    ):
        with single_metric(name=name, unit=unit, value=value, namespace=namespace()):
            pass


def namespace() -> str:
    """A stack's own, so that two of them in one account are not added up."""
    return settings.optional("METRICS_NAMESPACE") or NAMESPACE
