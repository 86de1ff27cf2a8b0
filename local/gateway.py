"""Parts of an API's deployment that the local AWS omits: gateway responses, and throttling of single routes.

The local AWS supports both through API Gateway's calls, but does not read them from a template: the responses are in
the API's body, where a route is written with `~1` for `/`. AWS does not need this module.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

RESPONSES = "x-amazon-apigateway-gateway-responses"
LIMITS = {"throttlingRateLimit": "throttling/rateLimit", "throttlingBurstLimit": "throttling/burstLimit"}


def complete(
    gateway: Any, api_id: str, template: Mapping[str, Any], parameters: Mapping[str, str], name: str = "Api"
) -> None:
    """Complete the deployed API and its stage, so that they match AWS.

    Parameters
    ----------
    gateway : client
        Client of the local AWS.
    api_id : str
        Id of the deployed API.
    template : dict
        The stack's template after SAM's transformation.
    parameters : dict
        The stack's parameters.
    name : str
        Logical id of the API in the template.
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
    # The responses of the stage's deployment apply.
    deployment = gateway.create_deployment(restApiId=api_id)
    patch = [{"op": "replace", "path": "/deploymentId", "value": deployment["id"]}, *limits]
    gateway.update_stage(restApiId=api_id, stageName="v1", patchOperations=patch)


def put_responses(gateway: Any, api_id: str, responses: Mapping[str, Any], parameters: Mapping[str, str]) -> None:
    """Set the gateway responses of an API's body."""
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
    """Return a header's value, which may depend on the parameter for the origin; None if the header is absent.

    Raises
    ------
    ValueError
        The template uses a construction that this function does not support.
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
    raise ValueError(f"local/gateway.py does not support {value}")
