"""Metrics in CloudWatch's embedded format: a line in the log, and no call."""

from __future__ import annotations

from qaes.domain.models import Event

NAMESPACE = "QAES"


def count(event: Event) -> None:
    """Count what happened to a task: a metric for each kind of event, `TaskEnded` say, by its status."""
    from aws_lambda_powertools.metrics import MetricUnit, single_metric

    name = "".join(word.capitalize() for word in event.kind.split("_"))
    with single_metric(name=name, unit=MetricUnit.Count, value=1, namespace=NAMESPACE) as metric:
        metric.add_dimension("status", event.status)


def count_one(name: str) -> None:
    """Count something that is not about a task, and that an alarm is made of."""
    from aws_lambda_powertools.metrics import MetricUnit, single_metric

    with single_metric(name=name, unit=MetricUnit.Count, value=1, namespace=NAMESPACE):
        pass
