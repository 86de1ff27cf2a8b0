"""Metrics in CloudWatch's embedded format: a line in the log instead of a call."""

from __future__ import annotations

from qaes.adapters import settings
from qaes.domain.models import Event

NAMESPACE = "QAES"


def count(event: Event) -> None:
    """Count a task's event: one metric for each kind of event, for example `TaskEnded` by status."""
    from aws_lambda_powertools.metrics import MetricUnit, single_metric

    name = "".join(word.capitalize() for word in event.kind.split("_"))
    with single_metric(name=name, unit=MetricUnit.Count, value=1, namespace=namespace()) as metric:
        metric.add_dimension("status", event.status)


def count_one(name: str) -> None:
    """Count an occurrence that an alarm uses and that does not belong to a task."""
    from aws_lambda_powertools.metrics import MetricUnit, single_metric

    with single_metric(name=name, unit=MetricUnit.Count, value=1, namespace=namespace()):
        pass


def open_approvals(ages: list[float]) -> None:
    """Publish the number of open approvals and the age of the oldest from `ages` (seconds); 0 and 0 without any."""
    from aws_lambda_powertools.metrics import MetricUnit, single_metric

    oldest = max(ages, default=0)
    for name, unit, value in (
        ("OpenApprovals", MetricUnit.Count, len(ages)),
        ("OldestPendingApprovalAge", MetricUnit.Seconds, max(oldest, 0)),
    ):
        with single_metric(name=name, unit=unit, value=value, namespace=namespace()):
            pass


def namespace() -> str:
    """Return the namespace of this stack, so that metrics of two stacks in one account stay separate."""
    return settings.optional("METRICS_NAMESPACE") or NAMESPACE
