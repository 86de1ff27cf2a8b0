"""A mock of the Qubic network on one DynamoDB table. What it says proves nothing to an outsider.

Its transactions are real ones in form: encoded and signed as Qubic's, by a demo key that everybody can read here. Each
is a record, of amount 0 from that key to itself, whose payload is the SHA-256 that it writes: a caller's hash, or that
of a transfer's terms. Balances are rows of the table, since nobody here holds the keys of the accounts.

Items (pk / sk): TX#<txid>/TX, HASH#<hash>/HASH, BALANCE#<address>/BALANCE, REFERENCE#<sha256>/REFERENCE,
POLICY/CURRENT, POLICY/VERSION#<number>. None but a balance and POLICY/CURRENT is ever changed.
"""

from __future__ import annotations

import base64
import json
import random
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import cache
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from qaes.adapters import clients, settings
from qaes.domain.canonical import canonical_json, hash_of, sha256_hex
from qaes.domain.errors import InvalidInputError, NotFoundError, RefusedError, UnavailableError
from qaes.domain.ids import now, timestamp
from qaes.domain.policy import Policy, Rule
from qaes.domain.qubic.identity import check_address
from qaes.domain.qubic.transaction import Transaction
from qubic.chain.base import HashEntry, Receipt, TransactionRecord, Transfer, check_amount, check_reference

NETWORK = "mock"
DEMO_SEED = "qaesmockledgerdemokeythatanybodymayreadandnoonemaytrust"
DEMO_BALANCES = {"0x1234567890abcdef": 1000, "0xabcdef1234567890": 500, "0xfedcba0987654321": 0}
DEFAULT_RULES = {
    "monitoring": Rule(allowed=True, requires_approval=False, risk_level="low"),
    "transaction": Rule(allowed=True, requires_approval=True, risk_level="medium"),
    "transfer_funds": Rule(allowed=True, requires_approval=True, risk_level="high"),
}

FIRST_TICK = 20_000_000
GENESIS = datetime(2026, 1, 1, tzinfo=UTC)
HASH_INPUT_TYPE = 0x5148
TRANSFER_INPUT_TYPE = 0x5154

_ATTEMPTS = 12
_HASHES_A_TRANSACTION = 40  # two items each; DynamoDB takes 100
_RETRY_REASONS = {"ConditionalCheckFailed", "TransactionConflict", "ThrottlingError", "ProvisionedThroughputExceeded"}

Item = dict[str, Any]


@cache
def _demo_key() -> tuple[bytes, bytes]:
    """(subseed, public key)."""
    from qaes.domain.qubic import schnorrq

    subseed = schnorrq.subseed_of(DEMO_SEED)
    return subseed, schnorrq.public_key_of(subseed)


def _record(hash_: str, tick: int, input_type: int) -> Transaction:
    subseed, public_key = _demo_key()
    return Transaction(public_key, public_key, 0, tick, input_type, bytes.fromhex(hash_)).sign(subseed)


class MockChain:
    """The chain of `Chain` on the ledger table.

    Parameters
    ----------
    table
        The table's name; by default that of LEDGER_TABLE.
    clock
        The present moment; ticks are the seconds since the mock's genesis.
    """

    network: str = NETWORK

    def __init__(self, table: str | None = None, clock: Callable[[], datetime] = now) -> None:
        self._table = table or settings.text("LEDGER_TABLE")
        self._clock = clock

    # Policy

    def policy(self) -> Policy:
        """The policy in force; the default one is published by the first who asks."""
        item = self._get("POLICY", "CURRENT")
        if item is None:
            try:
                return self._publish(1, DEFAULT_RULES)
            except _ChangedError:
                item = self._get("POLICY", "CURRENT")
                if item is None:
                    raise UnavailableError("the policy cannot be read") from None
        return Policy.model_validate_json(item["data"]["S"])

    def publish_policy(self, rules: dict[str, Rule]) -> Policy:
        """Put a new version in force. All versions are kept."""
        for _ in _attempts():
            try:
                return self._publish(self.policy().version + 1, rules)
            except _ChangedError:
                continue
        raise UnavailableError("the policy is being changed by others")

    def _publish(self, version: int, rules: dict[str, Rule]) -> Policy:
        canonical = canonical_json({name: rule.model_dump(mode="json") for name, rule in rules.items()})
        policy = Policy(policy_id=f"policy-v{version}-{sha256_hex(canonical)[:12]}", version=version, rules=rules)
        data = {"data": {"S": policy.model_dump_json()}, "published_at": {"S": timestamp(self._clock())}}
        self._transact(
            [
                self._put("POLICY", f"VERSION#{version:06d}", data),
                {"Put": {"TableName": self._table, "Item": _key("POLICY", "CURRENT") | data}},
            ]
        )
        return policy

    # Balances and transfers

    def balance(self, address: str) -> int:
        """The balance in QU; 0 for an unknown address. Raises InvalidInputError for what is no address."""
        address = check_address(address)
        item = self._get(f"BALANCE#{address}", "BALANCE")
        if item is None and address in DEMO_BALANCES:
            self._seed(address)
            item = self._get(f"BALANCE#{address}", "BALANCE")
        return int(item["balance"]["N"]) if item else 0

    def _seed(self, address: str) -> None:
        try:
            clients.client("dynamodb").put_item(
                TableName=self._table,
                Item=_key(f"BALANCE#{address}", "BALANCE") | {"balance": {"N": str(DEMO_BALANCES[address])}},
                ConditionExpression="attribute_not_exists(pk)",
            )
        except ClientError as error:
            # Seeded by somebody else, who may be moving it already.
            seeded = {"ConditionalCheckFailedException", "TransactionConflictException"}
            if error.response["Error"]["Code"] not in seeded:
                raise

    def transfer(self, *, reference: str, source: str, destination: str, amount: int) -> Transfer:
        """Move `amount` QU from `source` to `destination`, once for each `reference`.

        Raises
        ------
        InvalidInputError
            An address, the amount (1 to 10^15) or the reference is not acceptable.
        RefusedError
            `insufficient_balance`, or `reference_conflict`: the reference stands for another transfer.
        UnavailableError
            Others kept changing the same balances.
        """
        reference = check_reference(reference)
        source = check_address(source, field="source")
        destination = check_address(destination, field="destination")
        if source == destination:
            raise InvalidInputError("source and destination are the same", field="destination")
        amount = check_amount(amount)
        terms = {"reference": reference, "source": source, "destination": destination, "amount": amount}
        for _ in _attempts():
            # The balances first: whoever sees them after a twin's transfer then sees the twin's reference, too.
            before = (self.balance(source), self.balance(destination))
            made = self._made(terms)
            if made is not None:
                return made
            if before[0] < amount:
                raise RefusedError(
                    "insufficient_balance", "the source's balance is too small", balance=before[0], amount=amount
                )
            try:
                return self._move(terms, before)
            except _ChangedError:
                continue
        raise UnavailableError("the balances are being changed by others")

    def _made(self, terms: dict[str, Any]) -> Transfer | None:
        item = self._get(_reference_key(terms["reference"]), "REFERENCE")
        if item is None:
            return None
        if item["terms_hash"]["S"] != hash_of(terms):
            raise RefusedError("reference_conflict", "this reference was used for another transfer")
        return Transfer(
            txid=item["txid"]["S"],
            tick=int(item["tick"]["N"]),
            source_balance=int(item["source_balance"]["N"]),
            destination_balance=int(item["destination_balance"]["N"]),
            replayed=True,
        )

    def _move(self, terms: dict[str, Any], before: tuple[int, int]) -> Transfer:
        moment = self._clock()
        tick = _tick(moment)
        # The tick is part of what is hashed, so that nobody can occupy the hash of a transfer that is still to come.
        hash_ = hash_of(terms | {"kind": "transfer", "tick": tick})
        transaction = _record(hash_, tick, TRANSFER_INPUT_TYPE)
        after = (before[0] - terms["amount"], before[1] + terms["amount"])
        made = Transfer(transaction.id, tick, after[0], after[1], replayed=False)
        reference = {
            "txid": {"S": made.txid},
            "tick": {"N": str(tick)},
            "terms_hash": {"S": hash_of(terms)},
            "source_balance": {"N": str(after[0])},
            "destination_balance": {"N": str(after[1])},
        }
        self._transact(
            [
                self._put(_reference_key(terms["reference"]), "REFERENCE", reference),
                self._change_balance(terms["source"], before[0], after[0], enough=terms["amount"]),
                self._change_balance(terms["destination"], before[1], after[1]),
                *self._transaction_items(transaction, hash_, terms, moment),
            ]
        )
        return made

    def _change_balance(self, address: str, before: int, after: int, enough: int = 0) -> Item:
        # The balance is as it was read, so that the one after it is exact; and it never becomes less than nothing.
        unchanged = "balance = :before" if before else "(attribute_not_exists(pk) OR balance = :before)"
        covers_the_debit = " AND balance >= :enough" if enough else ""
        values = {":before": {"N": str(before)}, ":after": {"N": str(after)}}
        return {
            "Update": {
                "TableName": self._table,
                "Key": _key(f"BALANCE#{address}", "BALANCE"),
                "UpdateExpression": "SET balance = :after",
                "ConditionExpression": unchanged + covers_the_debit,
                "ExpressionAttributeValues": values | ({":enough": {"N": str(enough)}} if enough else {}),
            }
        }

    # Hashes and transactions

    def write_hashes(self, entries: list[HashEntry]) -> list[Receipt]:
        """Write each hash, once for ever; receipts in the same order. The first metadata of a hash stands."""
        wanted: dict[str, dict[str, Any]] = {}
        for entry in entries:
            wanted.setdefault(entry.hash, entry.metadata)
        hashes = list(wanted)
        receipts: dict[str, Receipt] = {}
        for start in range(0, len(hashes), _HASHES_A_TRANSACTION):
            receipts |= self._write({hash_: wanted[hash_] for hash_ in hashes[start : start + _HASHES_A_TRANSACTION]})
        return [receipts[entry.hash] for entry in entries]

    def _write(self, wanted: dict[str, dict[str, Any]]) -> dict[str, Receipt]:
        for _ in _attempts():
            receipts = {hash_: found for hash_ in wanted if (found := self.verify(hash_))}
            missing = {hash_: metadata for hash_, metadata in wanted.items() if hash_ not in receipts}
            if not missing:
                return receipts
            moment = self._clock()
            items: list[Item] = []
            for hash_, metadata in missing.items():
                transaction = _record(hash_, _tick(moment), HASH_INPUT_TYPE)
                items += self._transaction_items(transaction, hash_, metadata, moment)
                receipts[hash_] = Receipt(transaction.id, hash_, timestamp(moment), transaction.tick)
            try:
                self._transact(items)
            except _ChangedError:
                continue  # somebody else wrote one of them: their transaction stands
            return receipts
        raise UnavailableError("the hashes are being written by others")

    def _transaction_items(
        self, transaction: Transaction, hash_: str, metadata: dict[str, Any], moment: datetime
    ) -> list[Item]:
        receipt = {
            "txid": {"S": transaction.id},
            "hash": {"S": hash_},
            "timestamp": {"S": timestamp(moment)},
            "tick": {"N": str(transaction.tick)},
        }
        # Metadata stays text: DynamoDB would make Decimals of its numbers.
        body = {"metadata": {"S": canonical_json(metadata)}, "encoded": {"B": transaction.encode()}}
        return [
            self._put(f"TX#{transaction.id}", "TX", receipt | body),
            self._put(f"HASH#{hash_}", "HASH", receipt),
        ]

    def verify(self, hash_: str) -> Receipt | None:
        """The transaction that wrote the hash, if one did."""
        item = self._get(f"HASH#{hash_}", "HASH")
        return Receipt(**_receipt(item)) if item else None

    def transaction(self, txid: str) -> TransactionRecord:
        """Raises NotFoundError."""
        item = self._get(f"TX#{txid}", "TX")
        if item is None:
            raise NotFoundError("no such transaction", field="txid")
        return TransactionRecord(
            **_receipt(item),
            metadata=json.loads(item["metadata"]["S"]),
            encoded=base64.b64encode(item["encoded"]["B"]).decode(),
        )

    def health(self) -> int:
        """The present tick, once the table has answered."""
        try:
            self._get("POLICY", "CURRENT")
        except (BotoCoreError, ClientError) as error:
            raise UnavailableError("the ledger's table does not answer") from error
        return _tick(self._clock())

    # DynamoDB

    def _get(self, pk: str, sk: str) -> Item | None:
        found = clients.client("dynamodb").get_item(TableName=self._table, Key=_key(pk, sk), ConsistentRead=True)
        item: Item | None = found.get("Item")
        return item

    def _put(self, pk: str, sk: str, attributes: Item) -> Item:
        not_there_yet = "attribute_not_exists(pk)"
        return {
            "Put": {
                "TableName": self._table,
                "Item": _key(pk, sk) | attributes,
                "ConditionExpression": not_there_yet,
            }
        }

    def _transact(self, items: list[Item]) -> None:
        """All or nothing. Raises _ChangedError when it is worth reading again."""
        try:
            clients.client("dynamodb").transact_write_items(TransactItems=items)
        except ClientError as error:
            reasons = {each.get("Code") for each in error.response.get("CancellationReasons", ())} - {"None", None}
            cancelled = error.response["Error"]["Code"] == "TransactionCanceledException"
            if cancelled and reasons and reasons <= _RETRY_REASONS:
                raise _ChangedError from error
            raise


def _attempts() -> Iterator[None]:
    """A few attempts, with growing random pauses in between."""
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(random.uniform(0, min(0.01 * 2**attempt, 0.2)))  # noqa: S311 (a pause, no secret)
        yield


class _ChangedError(Exception):
    """What was read is no longer so, or was being changed: nothing has been written."""


def _key(pk: str, sk: str) -> Item:
    return {"pk": {"S": pk}, "sk": {"S": sk}}


def _reference_key(reference: str) -> str:
    return f"REFERENCE#{sha256_hex(reference)}"


def _receipt(item: Item) -> dict[str, Any]:
    return {
        "txid": item["txid"]["S"],
        "hash": item["hash"]["S"],
        "timestamp": item["timestamp"]["S"],
        "tick": int(item["tick"]["N"]),
    }


def _tick(moment: datetime) -> int:
    return FIRST_TICK + max(0, int((moment - GENESIS).total_seconds()))
