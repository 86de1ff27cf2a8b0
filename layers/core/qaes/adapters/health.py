"""The health route of a service: checks every dependency of the service."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from qaes import VERSION
from qaes.adapters import clients, dynamo, settings
from qaes.adapters.http import NO_TOKEN, RETRY_AFTER_SECONDS
from qaes.adapters.logs import logger


class Healthy(BaseModel):
    """Every dependency of the service responds."""

    status: Literal["healthy"]
    service: str
    version: str


class Unhealthy(BaseModel):
    """The dependencies that do not respond."""

    status: Literal["unhealthy"]
    service: str
    version: str
    failing: list[str]
    detail: str


def add_health(app: FastAPI, path: str, checks: dict[str, Callable[[], object]]) -> None:
    """Add `GET path`: 200 if no check raises, otherwise 503 with the names of the failed checks."""
    service: str = app.state.service

    def health() -> JSONResponse:
        failing: list[str] = []
        for name, check in checks.items():
            try:
                check()
            except Exception as error:  # noqa: BLE001 - any error means that the dependency is not healthy
                logger().warning("unhealthy", extra={"part": name, "error": type(error).__name__})
                failing.append(name)
        if not failing:
            return JSONResponse({"status": "healthy", "service": service, "version": VERSION})
        body = {
            "status": "unhealthy",
            "service": service,
            "version": VERSION,
            "failing": failing,
            "detail": f"no response from: {', '.join(failing)}",
        }
        return JSONResponse(body, 503, {"Retry-After": str(RETRY_AFTER_SECONDS)})

    health.__doc__ = "Return 200 if every dependency of the service responds; 503 names the dependencies that do not."
    app.add_api_route(
        path,
        health,
        methods=["GET"],
        operation_id=f"{service.replace('-', '_')}_health",
        openapi_extra=NO_TOKEN,
        responses={200: {"model": Healthy}, 503: {"model": Unhealthy}},
    )


def tasks_table_answers() -> None:
    """Check for `add_health` that the tasks table exists."""
    dynamo.call("describe_table", TableName=settings.text("TASKS_TABLE"))


def state_machine_answers() -> None:
    """Check for `add_health` that the state machine exists."""
    clients.client("stepfunctions").describe_state_machine(stateMachineArn=settings.text("STATE_MACHINE_ARN"))
