"""The actions that a policy can have rules for: the built-in ones, and those that a format 2 document defines."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, field_validator, model_validator

from qaes.domain.addresses import parse_url
from qaes.domain.errors import InvalidInputError
from qaes.domain.policy.names import POINTER_PATTERN, TRANSFER_ACTION, Name, once
from qaes.domain.policy.rules import policy_error
from qaes.domain.step_types import StepType
from qaes.domain.text import is_blank

Effect = Literal["none", "reversible", "irreversible"]
JsonSchema = dict[str, Any]
MAX_POINTERS = 50

Pointer = Annotated[str, Field(pattern=POINTER_PATTERN, max_length=512)]
"""A JSON Pointer (RFC 6901) to a member; never to the whole value."""

TASK_TYPES = {"monitor_wallet": "monitoring"}
"""Task types whose action has another name."""


@dataclass(frozen=True)
class BuiltIn:
    """An action that the system performs itself: every policy has it, and no document can redefine it.

    Attributes
    ----------
    step
        The type of the step that performs the action.
    needs
        The parameters without which a request is refused.
    takes
        The parameters of the step, each with the name of the request's parameter; None: the step takes the whole
        request.
    """

    title: str
    effect: Effect
    step: StepType
    parameters: JsonSchema
    needs: tuple[str, ...]
    takes: Mapping[str, str] | None = None
    amount: str | None = None
    destination: str | None = None
    source: str | None = "/wallet_address"
    unit: str = "QU"


_ADDRESS = {"type": "string", "description": "an identity of 60 capital letters, or on the mock 0x and 16 to 40 digits"}
_QU = {"type": "integer", "minimum": 1, "maximum": 10**15}

BUILT_IN: Mapping[str, BuiltIn] = {
    "monitoring": BuiltIn(
        title="Monitor a wallet",
        effect="none",
        step="monitor_action",
        parameters={
            "type": "object",
            "properties": {"wallet_address": _ADDRESS, "alert_threshold": _QU | {"minimum": 0}},
            "required": ["wallet_address"],
        },
        needs=("wallet_address",),
        takes={"wallet_address": "wallet_address", "alert_threshold": "alert_threshold"},
    ),
    "transaction": BuiltIn(
        title="Record an instruction",
        effect="none",
        step="generic_action",
        parameters={
            "type": "object",
            "properties": {"wallet_address": _ADDRESS, "to_address": _ADDRESS, "amount": _QU},
        },
        needs=(),
        amount="/amount",
        destination="/to_address",
    ),
    TRANSFER_ACTION: BuiltIn(
        title="Transfer QU",
        effect="irreversible",
        step="onchain_action",
        parameters={
            "type": "object",
            "properties": {"wallet_address": _ADDRESS, "to_address": _ADDRESS, "amount": _QU},
            "required": ["wallet_address", "to_address", "amount"],
        },
        needs=("wallet_address", "to_address", "amount"),
        takes={"from_address": "wallet_address", "to_address": "to_address", "amount": "amount"},
        amount="/amount",
        destination="/to_address",
    ),
}
RESERVED = frozenset({*BUILT_IN, *TASK_TYPES})
"""The names that no document can define."""

ACTION_STEPS: frozenset[StepType] = frozenset(action.step for action in BUILT_IN.values())
"""The types of steps that perform an action, and so can need an approval: the last step of each plan."""


def step_of(action: str) -> StepType:
    """Return the type of the step that performs an action: any action but a built-in one is recorded only."""
    return BUILT_IN[action].step if action in BUILT_IN else "generic_action"


def action_of(task_type: str) -> str:
    """Return the action that a task of that type requests: the name that the policy has a rule for."""
    return TASK_TYPES.get(task_type, task_type)


class LambdaHandler(BaseModel):
    """A function of the operator's account that performs the action."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["lambda"]
    function_name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,64}$")


class PublicKey(BaseModel):
    """A key that signs the handler's callbacks."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    keyid: Name
    ed25519: str = Field(description="the 32 bytes of the public key, in base64")

    @field_validator("ed25519")
    @classmethod
    def _has_32_bytes(cls, text: str) -> str:
        try:
            data = base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            data = b""
        if len(data) != 32 or base64.b64encode(data).decode() != text:
            raise ValueError("must be the 32 bytes of an Ed25519 public key, in base64 with padding")
        return text


class Credential(BaseModel):
    """The secret that the dispatcher sends to the handler."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["bearer", "basic", "header", "oauth2"]
    secret: str = Field(
        pattern=r"^qaes/actions/[A-Za-z0-9_.-]{1,64}$",
        description="the name of the secret in Secrets Manager, under qaes/actions/",
    )


class HttpsHandler(BaseModel):
    """A service that performs the action."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    type: Literal["https"]
    url: str = Field(max_length=2048)
    public_keys: tuple[PublicKey, ...] = Field((), max_length=10)
    credential: Credential | None = None

    @field_validator("url")
    @classmethod
    def _is_public(cls, url: str) -> str:
        if flaw := url_flaw(url):
            raise ValueError(flaw)
        return url

    @field_validator("public_keys")
    @classmethod
    def _once(cls, keys: tuple[PublicKey, ...]) -> tuple[PublicKey, ...]:
        once(key.keyid for key in keys)
        return keys


def _kind_of_handler(value: Any) -> str | None:
    kind = value.get("type") if isinstance(value, Mapping) else getattr(value, "type", None)
    return f"<{kind}>" if kind in ("lambda", "https") else None


Handler = Annotated[
    Annotated[LambdaHandler, Tag("<lambda>")] | Annotated[HttpsHandler, Tag("<https>")],
    Discriminator(
        _kind_of_handler,
        custom_error_type="handler_type",
        custom_error_message="a handler is an object whose `type` is `lambda` or `https`",
    ),
]


class Action(BaseModel):
    """An operator's action, as a format 2 document defines it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = Field(min_length=1, max_length=100)
    description: str = Field("", max_length=2000)
    effect: Effect = Field(description="`none`: a plain step without an intent")
    handler: Handler
    parameters: JsonSchema = Field(description="JSON Schema 2020-12 of the parameters")
    result: JsonSchema | None = Field(None, description="JSON Schema 2020-12 of the result; null: any result")
    amount: Pointer | None = Field(None, description="points to the amount in the parameters")
    unit: Name | None = Field(None, description="the unit of the amount: one action per currency")
    destination: Pointer | None = Field(None, description="points to the destination in the parameters")
    sensitive: tuple[Pointer, ...] = Field((), max_length=MAX_POINTERS)
    timeout_seconds: int = Field(20, ge=1, le=20, strict=True)
    result_timeout_seconds: int = Field(86_400, ge=1, le=604_800, strict=True)
    dry_run: bool = Field(default=False, strict=True)

    @model_validator(mode="after")
    def _names_its_unit(self) -> Action:
        if self.amount is not None and self.unit is None:
            raise policy_error("an action with an `amount` needs the unit of the amount", "unit")
        if self.amount is None and self.unit is not None:
            raise policy_error("has no effect without `amount`: leave it out", "unit")
        return self

    @field_validator("title")
    @classmethod
    def _shows_something(cls, title: str) -> str:
        if is_blank(title):
            raise ValueError("has no visible character")
        return title

    @field_validator("sensitive")
    @classmethod
    def _once(cls, pointers: tuple[str, ...]) -> tuple[str, ...]:
        once(pointers)
        return pointers

    @property
    def source(self) -> None:
        """Only built-in actions have a source."""
        return


def url_flaw(url: str) -> str | None:
    """Return why a handler's URL is refused; None when it is acceptable.

    The dispatcher checks the address that it connects to as well: a name can resolve to any address.
    """
    try:
        parse_url(url)
    except InvalidInputError as error:
        return error.message
    return None


def pointed(value: object, pointer: str | None) -> object:
    """Return the member that a JSON Pointer leads to, through objects only; None when there is no such member."""
    if pointer is None:
        return None
    for part in pointer.split("/")[1:]:
        if not isinstance(value, Mapping):
            return None
        value = value.get(part.replace("~1", "/").replace("~0", "~"))
    return value
