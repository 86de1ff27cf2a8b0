"""Responses of the deployed API's gateway itself: the limits of routes, and errors in the common format."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from tests.e2e.conftest import Api

PROBLEM = "application/problem+json"


def is_problem(answer: httpx.Response, status: int) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["Content-Type"] == PROBLEM
    assert answer.headers["Cache-Control"] == "no-store"
    problem = answer.json()
    assert (problem["type"], problem["status"]) == ("about:blank", status)
    assert problem["instance"] == f"/v1{answer.request.url.path}"
    assert len(problem["correlation_id"]) == 36
    assert problem["detail"]


def test_flood_of_one_route_returns_429_for_it_only(api: Api) -> None:
    """A route that needs no token, with the limits that the template gives it."""

    def ask(_: int) -> httpx.Response:
        return api(None, "GET", "/openapi.json")

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(60)))
    found = Counter(answer.status_code for answer in answers)
    assert set(found) == {200, 429}
    assert found[200] >= 10, "a burst is taken"
    for answer in answers:
        if answer.status_code == 429:
            is_problem(answer, 429)
            assert answer.headers["Retry-After"] == "1"
    assert api("requester", "GET", "/tasks").status_code == 200
    assert api(None, "GET", "/health").status_code == 200


def test_every_route_has_the_limits_of_the_template(api: Api) -> None:
    stage = api.cloud.client("apigateway").get_stage(restApiId=api.cloud.outputs["ApiId"], stageName="v1")
    limits = {
        route: (settings["throttlingRateLimit"], settings["throttlingBurstLimit"])
        for route, settings in stage["methodSettings"].items()
    }
    assert limits["/task/start/POST"] == (1000, 1000), "the limit of the local cloud"
    assert limits["/openapi.json/GET"] == (5, 10), "the limit of this test"
    stages = api.cloud.client("apigateway").get_stages(restApiId=api.cloud.outputs["ApiId"])["item"]
    assert [each["stageName"] for each in stages] == ["v1"]


def test_gateway_refusal_is_a_problem(api: Api) -> None:
    nobody = api(None, "GET", "/tasks")
    is_problem(nobody, 401)
    assert nobody.headers["WWW-Authenticate"] == "Bearer"
    is_problem(api("operator", "GET", "/nothing/of/this"), 404)


@pytest.mark.parametrize("method", ["DELETE", "PUT", "PATCH", "TRACE", "QUERY"])
def test_method_that_a_path_does_not_have_is_not_found(api: Api, method: str) -> None:
    is_problem(api("operator", method, "/health"), 404)
    is_problem(api("operator", method, "/task/start"), 404)


def test_line_break_in_a_query_is_refused_by_the_service(api: Api) -> None:
    answer = api("operator", "GET", "/policy?action_type=%0Atransfer")
    assert answer.status_code == 422
    assert [error["field"] for error in answer.json()["errors"]] == ["action_type"]
