"""What the local AWS leaves out when it deploys an API: its gateway responses, and the limits of single routes.

It knows both when they are asked for by API Gateway's own calls, but reads neither from a template: the responses are
in the API's body, and a route is written with `~1` for `/` there. AWS needs nothing of this.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RESPONSES = "x-amazon-apigateway-gateway-responses"
LIMITS = {"throttlingRateLimit": "throttling/rateLimit", "throttlingBurstLimit": "throttling/burstLimit"}


def complete(
    gateway: Any, api_id: str, template: Mapping[str, Any], parameters: Mapping[str, str], name: str = "Api"
) -> None:
    """Give the API and its stage what they have on AWS.

    Parameters
    ----------
    gateway : client
        Of the local AWS.
    api_id : str
        The API, as it was deployed.
    template : dict
        The stack's template after SAM's transformation.
    parameters : dict
        The stack's parameters.
    name : str
        The API's name in the template.
    """
    resources = template["Resources"]
    put_responses(gateway, api_id, resources[name]["Properties"]["Body"][RESPONSES], parameters)
    stage = gateway.get_stage(restApiId=api_id, stageName="v1")
    limits = [
        {"op": "replace", "path": f"{route}/{name}", "value": str(settings[limit])}
        for route, settings in stage["methodSettings"].items()
        if "~1" in route
        for limit, name in LIMITS.items()
    ]
    # The responses that count are those of the stage's deployment.
    deployment = gateway.create_deployment(restApiId=api_id)
    patch = [{"op": "replace", "path": "/deploymentId", "value": deployment["id"]}, *limits]
    gateway.update_stage(restApiId=api_id, stageName="v1", patchOperations=patch)


def put_responses(gateway: Any, api_id: str, responses: Mapping[str, Any], parameters: Mapping[str, str]) -> None:
    """Put the gateway responses of an API's body."""
    for kind, response in responses.items():
        headers = {
            name: text
            for name, value in response["responseParameters"].items()
            if (text := header(value, parameters)) is not None
        }
        gateway.put_gateway_response(
            restApiId=api_id,
            responseType=kind,
            statusCode=str(response["statusCode"]),
            responseParameters=headers,
            responseTemplates=response["responseTemplates"],
        )


def header(value: Any, parameters: Mapping[str, str]) -> str | None:
    """Return a header's value, which may depend on whether there is an origin; None when there is no such header.

    Raises
    ------
    ValueError
        The template says it in a way that this does not know.
    """
    match value:
        case str():
            return value
        case {"Fn::If": ["HasCors", given, otherwise]}:
            return header(given if parameters.get("CorsAllowOrigin") else otherwise, parameters)
        case {"Fn::Sub": str(text)}:
            return text.replace("${CorsAllowOrigin}", parameters["CorsAllowOrigin"])
        case {"Ref": "AWS::NoValue"}:
            return None
    raise ValueError(f"local/gateway.py cannot tell what {value} is")
