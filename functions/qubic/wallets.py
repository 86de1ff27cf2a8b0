"""The keys of the qubic service: its own key, and on the mock network the keys of the demo wallets.

The service's own key signs the records on the ledger (policy, anchors, hashes). Only the ledger's functions can read
its seed, which is a secret. The API, which is reachable from the internet, cannot; it invokes these functions. A public
rule derives the demo wallets' seeds from their names: they serve for trials on the mock network, and have no value.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

from qaes.adapters import clients, settings
from qaes.adapters.ledger_client import LedgerClient
from qaes.domain.errors import InvalidInputError, PermanentError, ThrottledError, TransientError
from qaes.domain.qubic.demo import demo_seed
from qaes.domain.qubic.identity import (
    check_address,
    check_payable,
    decode_identity,
    encode_identity,
    is_identity_shaped,
)

DEMO_BALANCES: Mapping[str, int] = {"0x1234567890abcdef": 1000, "0xabcdef1234567890": 500, "0xfedcba0987654321": 0}
"""Balances in QU. The addresses have the older clients' format; each has its own identity."""
SERVICE_BALANCE = 1_000_000
"""Balance in QU of the service's own identity on the mock: the network drops transactions without a balance."""


@dataclass(frozen=True)
class Key:
    """The key that signs for an identity."""

    identity: str
    public_key: bytes
    subseed: bytes = field(repr=False)


def key_of_seed(seed: str) -> Key:
    """Derive the key of a seed of 55 letters. Raises ValueError for any other text."""
    from qaes.domain.qubic import schnorrq

    subseed = schnorrq.subseed_of(seed)
    public_key = schnorrq.public_key_of(subseed)
    return Key(encode_identity(public_key), public_key, subseed)


def holds_key() -> bool:
    """Return whether this function can sign. Other functions have no QUBIC_SEED_SECRET."""
    return bool(settings.optional("QUBIC_SEED_SECRET"))


def service_identity() -> str:
    """Return the service's identity. A function without the key requests it once for each process."""
    return service_key().identity if holds_key() else _identity_of_the_ledger()


@cache
def _identity_of_the_ledger() -> str:
    return LedgerClient().identity()


def service_key() -> Key:
    """Read the service's own key from the secret that QUBIC_SEED_SECRET names.

    Raises
    ------
    SettingsError
        The secret is not a seed of 55 letters a to z, or this function has no secret.
    TransientError
        The secret cannot be read now.
    """
    return _key_of_secret(settings.text("QUBIC_SEED_SECRET"))


@cache
def _key_of_secret(secret: str) -> Key:
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        found = clients.client("secretsmanager").get_secret_value(SecretId=secret)
    except (BotoCoreError, ClientError) as error:
        code = error.response["Error"]["Code"] if isinstance(error, ClientError) else type(error).__name__
        kind = ThrottledError if clients.is_busy(code) else TransientError
        raise kind(f"the secret with the ledger's key cannot be read ({code})") from error
    try:
        return key_of_seed(found.get("SecretString", ""))
    except ValueError:
        raise settings.SettingsError("the secret of QUBIC_SEED_SECRET must have 55 letters a to z") from None


@cache
def demo_key(address: str) -> Key:
    """Derive the key of a demo wallet; `address` has the older clients' format."""
    return key_of_seed(demo_seed(address))


@cache
def _demo_identities() -> dict[str, str]:
    return {demo_key(address).identity: address for address in DEMO_BALANCES}


class Wallets:
    """The keys of a network."""

    def __init__(self, network: str) -> None:
        self._network = network

    def identity(self, address: str, field: str = "address") -> str:
        """Return the identity of an address.

        Raises
        ------
        InvalidInputError
            The address is malformed.
        PermanentError
            `invalid_address`: the address has the older clients' format, which only the mock network supports.
        """
        address = check_address(address, field)
        if is_identity_shaped(address):
            return address
        if self._network != "mock":
            raise PermanentError(
                "invalid_address", f"{field}: on {self._network} an address must be an identity of 60 capital letters"
            )
        return demo_key(address).identity

    def key(self, address: str, field: str = "source") -> Key:
        """Return the key that signs for an address.

        Raises
        ------
        InvalidInputError
            The address is malformed.
        PermanentError
            `no_key`: this service does not hold the key of the address. Other errors as `identity`.
        """
        demo = self._held(address, field)
        return service_key() if demo is None else demo_key(demo)

    def _held(self, address: str, field: str) -> str | None:
        """Return the older address of a demo wallet, None for the service's own. Raises as `key`; reads no seed."""
        identity = self.identity(address, field)
        if self._network == "mock":
            checked = check_address(address, field)
            if not is_identity_shaped(checked):
                return checked
            if identity in _demo_identities():
                return _demo_identities()[identity]
        if identity == service_identity():
            return None
        raise PermanentError("no_key", "this service does not hold the key of the source wallet")

    def parties(self, source: str, destination: str) -> tuple[Key, str]:
        """Return the source's key and the destination's identity. Raises the same errors as `check_parties`."""
        to = self.check_parties(source, destination)
        return self.key(source), to

    def check_parties(self, source: str, destination: str) -> str:
        """Check that the service can sign a transfer between two wallets. Return the destination's identity.

        Raises
        ------
        InvalidInputError
            An address is malformed; the source is a smart contract or the zero address; or both are the same wallet.
            The policy's rule decides on the destination (`qubic.spending.rule_for`).
        PermanentError
            As `identity` and `key`.
        """
        check_payable(self.identity(check_payable(source, "source"), "source"), "source")
        to = self.identity(destination, "destination")
        self._held(source, "source")
        if self.identity(source, "source") == to:
            raise InvalidInputError("source and destination must be different wallets", field="destination")
        return to


def genesis() -> dict[str, int]:
    """Return the initial balance of each identity of a new mock network."""
    demo = {demo_key(address).identity: balance for address, balance in DEMO_BALANCES.items()}
    return demo | {service_identity(): SERVICE_BALANCE}


def public_key(identity: str) -> bytes:
    return decode_identity(identity)
