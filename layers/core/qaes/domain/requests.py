"""The bodies of `POST /task/start` and of `POST /plan/create`, and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from qaes.domain.canonical import canonical_json
from qaes.domain.errors import InvalidInputError
from qaes.domain.policy import TRANSFER_ACTION, Policy
from qaes.domain.policy.actions import BUILT_IN, action_of
from qaes.domain.qubic import MAX_QU
from qaes.domain.qubic.demo import is_same_wallet
from qaes.domain.qubic.identity import check_address, check_payable, is_identity_shaped
from qaes.domain.text import is_blank

MAX_PARAMETERS_BYTES = 32 * 1024

_ADDRESSES = ("wallet_address", "to_address")
_KNOWN_PARAMETERS = (*_ADDRESSES, "amount", "alert_threshold")
"""Parameters in which null means absent."""


def _shows_something(text: str) -> str:
    if is_blank(text):
        raise ValueError("has no visible character")
    return text


Description = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=4000), AfterValidator(_shows_something)
]


class TaskRequest(BaseModel):
    """A requested task. `wallet_address` is an alternative to `parameters.wallet_address`."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    task_type: str = Field(
        pattern=r"^[A-Za-z0-9_.-]{1,64}$",
        description="type of the action: monitor_wallet, transfer_funds, or another word",
    )
    description: Description
    wallet_address: str | None = Field(
        None,
        description="an identity of 60 capital letters including its checksum, or 0x and 16 to 40 hexadecimal digits",
        json_schema_extra={"pattern": "^(0[xX][0-9a-fA-F]{16,40}|[A-Z]{60})$"},
    )
    parameters: dict[str, Any] | None = Field(None, description="at most 32 KiB of canonical JSON")

    def resolved(self, network: str, *, operators: bool = False) -> dict[str, Any]:
        """Check the parameters, and return them in the form that is stored, hashed, shown and executed.

        Parameters
        ----------
        network
            The ledger's network. Only the mock has the older clients' addresses.
        operators
            Whether the task's type is an operator's action: then only its schema defines its parameters.

        Raises
        ------
        InvalidInputError
            A parameter is missing, malformed or contradicts another; all parameters together are too large; or the task
            can never run: it transfers to the paying wallet, or names an address that the network does not have.
            `check_destination` checks whether the policy lets a transfer go to a smart contract.
        """
        if operators:
            return self._as_given()
        parameters = {
            name: value
            for name, value in (self.parameters or {}).items()
            if value is not None or name not in _KNOWN_PARAMETERS
        }
        for name in _ADDRESSES:
            if name in parameters:
                parameters[name] = _check_address(parameters[name], network, f"parameters.{name}")
        if self.wallet_address is not None:
            wallet = _check_address(self.wallet_address, network, "wallet_address")
            if parameters.setdefault("wallet_address", wallet) != wallet:
                raise InvalidInputError("must be the same as parameters.wallet_address", field="wallet_address")
        _check_whole_number(parameters, "amount", 1)
        _check_whole_number(parameters, "alert_threshold", 0)
        action = action_of(self.task_type)
        for name in BUILT_IN[action].needs if action in BUILT_IN else ():
            if name not in parameters:
                raise InvalidInputError(f"a task of type {self.task_type} requires {name}", field=f"parameters.{name}")
        if action == TRANSFER_ACTION:
            check_payable(parameters["wallet_address"], "parameters.wallet_address")
        if action == TRANSFER_ACTION and is_same_wallet(parameters["wallet_address"], parameters["to_address"]):
            raise InvalidInputError("must not be the paying wallet", field="parameters.to_address")
        _check_size(parameters)
        return parameters

    def _as_given(self) -> dict[str, Any]:
        parameters = dict(self.parameters or {})
        if self.wallet_address is not None and parameters.setdefault("wallet_address", self.wallet_address) != (
            self.wallet_address
        ):
            raise InvalidInputError("differs from parameters.wallet_address", field="wallet_address")
        _check_size(parameters)
        return parameters


class PlanRequest(TaskRequest):
    """A requested plan, with or without a task."""

    task_id: str | None = Field(None, pattern=r"^[A-Za-z0-9_.-]{1,64}$")


def check_destination(policy: Policy, action: str, parameters: Mapping[str, Any]) -> None:
    """Check that a transfer goes to a wallet, or that the policy allows smart contracts and the zero address.

    Raises InvalidInputError.
    """
    if action == TRANSFER_ACTION and not policy.pays_contracts:
        check_payable(parameters["to_address"], "parameters.to_address")


def _check_address(address: object, network: str, field: str) -> str:
    checked = check_address(address, field)
    if network != "mock" and not is_identity_shaped(checked):
        raise InvalidInputError(f"on {network} an address must be an identity of 60 capital letters", field=field)
    return checked


def _check_whole_number(parameters: dict[str, Any], name: str, least: int) -> None:
    value = parameters.get(name, least)
    # In Python, a bool is an int. A fraction such as 1.0 is not accepted as an amount either.
    if type(value) is not int or not least <= value <= MAX_QU:
        raise InvalidInputError(f"must be a whole number from {least} to {MAX_QU}", field=f"parameters.{name}")


def _check_size(parameters: dict[str, Any]) -> None:
    try:
        size = len(canonical_json(parameters).encode())
    except InvalidInputError as error:
        raise InvalidInputError(error.message, field="parameters") from error
    if size > MAX_PARAMETERS_BYTES:
        raise InvalidInputError(f"must have at most {MAX_PARAMETERS_BYTES} bytes of canonical JSON", field="parameters")
