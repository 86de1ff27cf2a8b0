"""The health route of a service: whether every part that the service needs answers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from qaes import VERSION
from qaes.adapters import clients, dynamo, settings
from qaes.adapters.http import OPEN, RETRY_AFTER_SECONDS
from qaes.adapters.logs import logger


class Healthy(BaseModel):
    """Every part that the service needs answers."""

    status: Literal["healthy"]
    service: str
    version: str


class Unhealthy(BaseModel):
    """The parts that do not answer."""

    status: Literal["unhealthy"]
    service: str
    version: str
    failing: list[str]
    detail: str


def add_health(app: FastAPI, path: str, checks: dict[str, Callable[[], object]]) -> None:
    """`GET path`: healthy when none of `checks` raises; otherwise 503 with the names of those that did."""
    service: str = app.state.service

    def health() -> JSONResponse:
        failing: list[str] = []
        for name, check in checks.items():
            try:
                check()
            except Exception as error:  # noqa: BLE001 - whatever it is, the part is not healthy
                logger().warning("unhealthy", extra={"part": name, "error": type(error).__name__})
                failing.append(name)
        if not failing:
            return JSONResponse({"status": "healthy", "service": service, "version": VERSION})
        body = {
            "status": "unhealthy",
            "service": service,
            "version": VERSION,
            "failing": failing,
            "detail": f"does not answer: {', '.join(failing)}",
        }
        return JSONResponse(body, 503, {"Retry-After": str(RETRY_AFTER_SECONDS)})

    health.__doc__ = "Healthy when every part that the service needs answers; 503 names those that do not."
    app.add_api_route(
        path,
        health,
        methods=["GET"],
        operation_id=f"{service.replace('-', '_')}_health",
        openapi_extra=OPEN,
        responses={200: {"model": Healthy}, 503: {"model": Unhealthy}},
    )


def tasks_table_answers() -> None:
    """Check for `add_health`: the tasks table is there."""
    dynamo.call("describe_table", TableName=settings.text("TASKS_TABLE"))


def state_machine_answers() -> None:
    """Check for `add_health`: the state machine is there."""
    clients.client("stepfunctions").describe_state_machine(stateMachineArn=settings.text("STATE_MACHINE_ARN"))
