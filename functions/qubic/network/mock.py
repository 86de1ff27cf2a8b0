"""The Qubic network, simulated on one DynamoDB table. Its transactions prove nothing to an outsider.

No process runs between two calls. The clock determines the current tick. The first call after a tick has passed
closes it, and executes the transactions that wait for it:

1. A conditional write advances `closed_tick` once. After that, the pool accepts no transaction for these ticks, so the
   set of waiting transactions is final.
2. Every caller executes the waiting transactions in the order of (tick, id), each exactly once: the place in the pool,
   the transaction's item and the balances change in one DynamoDB transaction, whose conditions hold only once.
3. Only then does a caller get a response. A tick that was reported as processed never changes.

Every caller takes these steps, so a caller that crashes half-way does no harm.

The pool has one place for each source, as the pool of a Qubic node has: a transaction for a later tick replaces the
waiting one; a transaction for the same or an earlier tick is accepted, but never executes. The same holds for a tick
more than `MAX_TICKS_AHEAD` ahead, and for a source without a balance: the public RPC passes both to the nodes, which
drop them.

Items (pk / sk): STATE/STATE, BALANCE#<identity>/BALANCE, POOL/<identity>, TX#<id>/TX,
IDENTITY#<identity>/TICK#<tick>#<id>. Items are never deleted: a used place in the pool has `waiting` false.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import datetime
from typing import Any, Literal

from botocore.exceptions import BotoCoreError, ClientError

from qaes.adapters import dynamo, settings
from qaes.domain.errors import InvalidInputError, PermanentError, TransientError
from qaes.domain.ids import now
from qaes.domain.qubic.identity import decode_identity, encode_identity, is_transaction_id_shaped
from qaes.domain.qubic.transaction import decode
from qubic.items import ChangedError, Item, Items, attempts, item_key
from qubic.network.base import Balance, Included, ProcessedTick, SentList, TickInfo
from qubic.network.faults import Counter, Faults, Place, State, changes_for, left_of
from qubic.network.rules import MAX_TICK, check_ticks

NETWORK = "mock"
FIRST_TICK = 20_000_000
FIRST_EPOCH = 1
MAX_TICKS_AHEAD = 100_000
MAX_GENESIS = 90
"""DynamoDB accepts 100 items in one transaction."""


class MockChain:
    """The `Chain` on a DynamoDB table.

    Parameters
    ----------
    genesis
        Identity → QU: the initial balances. The first call on an empty table writes them; later calls ignore them. An
        initial balance counts as an incoming transfer, because a Qubic balance is the incoming less the outgoing
        amount.
    table
        Name of the table; the default is CHAIN_TABLE.
    clock
        Returns the current time.
    tick_milliseconds
        Duration of a tick; the default is QUBIC_TICK_MILLISECONDS. A change applies from the current tick on.

    Raises
    ------
    ValueError
        The genesis is too large, has a malformed identity, or has a negative amount.
    """

    network: str = NETWORK

    def __init__(
        self,
        *,
        genesis: Mapping[str, int],
        table: str | None = None,
        clock: Callable[[], datetime] = now,
        tick_milliseconds: int | None = None,
    ) -> None:
        if len(genesis) > MAX_GENESIS:
            raise ValueError(f"the genesis must have at most {MAX_GENESIS} identities")
        for identity, amount in genesis.items():
            decode_identity(identity)
            if amount < 0:
                raise ValueError("the genesis must not have a negative amount")
        self._genesis = dict(genesis)
        self._table = table or settings.text("CHAIN_TABLE")
        self._items = Items(self._table)
        self._clock = clock
        self._tick_milliseconds = tick_milliseconds or settings.number("QUBIC_TICK_MILLISECONDS")
        if self._tick_milliseconds < 1:
            raise ValueError("a tick must take at least one millisecond")

    # Reads

    def tick_info(self) -> TickInfo:
        with _answering():
            state = self._asked()
            seconds = max(1, round(state.tick_milliseconds / 1000))
            return TickInfo(tick=state.tick, epoch=state.epoch, duration=seconds, initial_tick=state.initial_tick)

    def last_processed_tick(self) -> ProcessedTick:
        with _answering():
            state = self._asked()
            return ProcessedTick(state.processed_tick, state.epoch, state.initial_tick)

    def balance(self, identity: str) -> Balance:
        _checked(identity)
        with _answering():
            state = self._asked()
            return _balance(identity, state.closed_tick, self._items.get(*_balance_key(identity)))

    def transaction(self, txid: str) -> Included | None:
        if not is_transaction_id_shaped(txid):
            return None
        with _answering():
            state = self._asked()
            item = self._items.get(f"TX#{txid}", "TX")
        if item is None or int(item["tick"]["N"]) > state.processed_tick:
            return None
        return _included(item)

    def sent(self, identity: str, first_tick: int, last_tick: int) -> SentList:
        _checked(identity)
        check_ticks(first_tick, last_tick)
        found, valid_for_tick = self.transactions(identity, first_tick, last_tick)
        return SentList(
            tuple(each for each in found if encode_identity(each.transaction.source) == identity), valid_for_tick
        )

    def transactions(self, identity: str, first_tick: int = 0, last_tick: int = MAX_TICK) -> tuple[list[Included], int]:
        """List the transactions from or to an identity, newest first; also return the last tick of look-ups."""
        with _answering():
            state = self._asked()
            last_tick = min(last_tick, state.processed_tick)
            if first_tick > last_tick:
                return [], state.processed_tick
            pages = self._query(
                KeyConditionExpression="pk = :identity AND sk BETWEEN :first AND :last",
                ExpressionAttributeValues={
                    ":identity": {"S": f"IDENTITY#{identity}"},
                    ":first": {"S": f"TICK#{first_tick:010d}#"},
                    ":last": {"S": f"TICK#{last_tick:010d}#~"},
                },
                ScanIndexForward=False,
            )
            return [_included(item) for page in pages for item in page["Items"]], state.processed_tick

    # Broadcasts

    def broadcast(self, encoded: bytes) -> str:
        with _answering():
            state = self._asked()
            try:
                transaction = decode(encoded)
            except ValueError as error:
                raise PermanentError("broadcast_refused", f"the transaction is malformed: {error}") from error
            if not transaction.is_signed_by_source():
                raise PermanentError("broadcast_refused", "the signature is not the source's")
            if transaction.tick <= state.tick:
                late = (
                    f"Target tick: {transaction.tick} for the transaction should be greater than max tick: {state.tick}"
                )
                raise PermanentError("broadcast_refused", late)
            place = Place(transaction.id, transaction.tick, transaction)
            if self._balance_of(place.source) > 0 and not (state.drop and self._consume("drop")):
                self._take_place(place, state)
            if state.fail_after_accepting and self._consume("fail_after_accepting"):
                raise TransientError("the node failed after it accepted the transaction")
            return place.txid

    def _balance_of(self, identity: str) -> int:
        item = self._items.get(*_balance_key(identity))
        return int(item["balance"]["N"]) if item else 0

    def _take_place(self, place: Place, state: State) -> None:
        """Put a transaction into its source's place, if its tick is open and no transaction for a later tick waits."""
        for attempt in attempts(20, 0.005):
            if attempt:
                state = self._advance()
            in_time = state.tick + state.delay < place.tick <= state.tick + MAX_TICKS_AHEAD
            item = self._items.get("POOL", place.source)
            waiting = int(item["tick"]["N"]) if item and item["waiting"]["BOOL"] else None
            if not in_time or (waiting is not None and waiting >= place.tick):
                return
            try:
                self._items.write(self._take(place, item), self._not_closed(min(place.tick, waiting or place.tick)))
            except ChangedError:
                continue
            return
        raise TransientError("other callers keep changing the same place of the pool; try again")

    def _take(self, place: Place, before: Item | None) -> Item:
        unchanged_since_read = "attribute_not_exists(pk)" if before is None else "txid = :before AND waiting = :waiting"
        put: Item = {
            "TableName": self._table,
            "Item": item_key("POOL", place.source)
            | {
                "txid": {"S": place.txid},
                "tick": {"N": str(place.tick)},
                "encoded": {"B": place.transaction.encode()},
                "waiting": {"BOOL": True},
            },
            "ConditionExpression": unchanged_since_read,
        }
        if before is not None:
            put["ExpressionAttributeValues"] = {":before": before["txid"], ":waiting": before["waiting"]}
        return {"Put": put}

    def _not_closed(self, tick: int) -> Item:
        """Require that `tick` is open: a new transaction is in time, and a due one is not replaced."""
        return {
            "ConditionCheck": {
                "TableName": self._table,
                "Key": item_key("STATE", "STATE"),
                "ConditionExpression": "closed_tick < :tick",
                "ExpressionAttributeValues": {":tick": {"N": str(tick)}},
            }
        }

    # Faults

    def faults(self) -> Faults:
        """Return the remaining faults."""
        with _answering():
            state = self._advance()
        return left_of(state)

    def set_faults(self, faults: Faults) -> None:
        """Replace all faults with these."""
        with _answering():
            for _ in attempts(20, 0.005):
                state = self._advance()
                try:
                    self._change(state, *changes_for(faults, state, self._milliseconds()))
                except ChangedError:
                    continue
                return
        raise TransientError("other callers keep changing the mock's faults; try again")

    def _consume(self, counter: Counter) -> bool:
        """Use up one occurrence of a counted fault. Return False if no occurrence is left."""
        try:
            self._items.update(
                Key=item_key("STATE", "STATE"),
                UpdateExpression="SET #counter = #counter - :one",
                ConditionExpression="#counter >= :one",
                ExpressionAttributeNames={"#counter": counter},
                ExpressionAttributeValues={":one": {"N": "1"}},
            )
        except ChangedError:
            return False
        return True

    # Progress of ticks

    def _asked(self) -> State:
        """Begin a call: execute all due transactions, and raise if a simulated fault applies to this call."""
        state = self._advance()
        if state.fail_requests and self._consume("fail_requests"):
            raise TransientError("the node does not respond")
        return state

    def _advance(self) -> State:
        """Close the ticks that have passed, and execute the transactions that waited for them."""
        for _ in attempts(20, 0.005):
            state = self._state()
            moment = self._milliseconds()
            tick = state.tick_at(moment)
            try:
                if tick > state.tick:
                    state = self._close(state, tick - 1)
                if state.tick_milliseconds != self._tick_milliseconds:
                    duration = {
                        "tick_milliseconds": self._tick_milliseconds,
                        "origin_tick": state.tick,
                        "origin_time": moment,
                    }
                    self._change(state, duration, list(state.skipped))
                    continue
            except ChangedError:
                continue
            for place in self._due(state):
                self._execute(place, state)
            return state
        raise TransientError("other callers keep changing the mock's state; try again")

    def _state(self) -> State:
        item = self._items.get("STATE", "STATE")
        if item is None:
            self._write_genesis()
            item = self._items.get("STATE", "STATE")
            if item is None:
                raise TransientError("the mock's state cannot be read")
        names = {field.name for field in fields(State)} - {"skipped"}
        numbers = {name: int(item[name]["N"]) for name in names}
        skipped = tuple((first, last) for first, last in json.loads(item["skipped"]["S"]))
        return State(skipped=skipped, **numbers)

    def _write_genesis(self) -> None:
        first = State(
            supply=sum(self._genesis.values()),
            version=1,
            closed_tick=FIRST_TICK - 1,
            origin_tick=FIRST_TICK,
            origin_time=self._milliseconds(),
            tick_milliseconds=self._tick_milliseconds,
            paused=0,
            epoch=FIRST_EPOCH,
            initial_tick=FIRST_TICK,
            empty_from=FIRST_TICK,
            empty_to=FIRST_TICK - 1,
            delay=0,
            lag=0,
            drop=0,
            fail_after_accepting=0,
            fail_requests=0,
        )
        numbers = {field.name: getattr(first, field.name) for field in fields(State) if field.name != "skipped"}
        state = {name: {"N": str(value)} for name, value in numbers.items()}
        items = [self._items.put_new(item_key("STATE", "STATE") | state | {"skipped": {"S": "[]"}})]
        for identity, amount in self._genesis.items():
            if amount:
                given = {
                    "balance": amount,
                    "incoming_amount": amount,
                    "number_of_incoming_transfers": 1,
                    "latest_incoming_transfer_tick": FIRST_TICK,
                }
                values = {name: {"N": str(value)} for name, value in given.items()}
                items.append(self._items.put_new(item_key(*_balance_key(identity)) | values))
        try:
            self._items.write(*items)
        except ChangedError:
            return  # another caller has written it

    def _close(self, state: State, tick: int) -> State:
        self._update_state({"closed_tick": {"N": str(tick)}}, state)
        return replace(state, closed_tick=tick)

    def _change(self, state: State, changes: dict[str, int], skipped: list[tuple[int, int]]) -> None:
        numbers = {name: {"N": str(value)} for name, value in (changes | {"version": state.version + 1}).items()}
        self._update_state(numbers | {"skipped": {"S": json.dumps(skipped)}}, state)

    def _update_state(self, changes: Item, state: State) -> None:
        """Change STATE if it is unchanged since the read. Raises ChangedError otherwise."""
        unchanged_since_read = "#version = :version_as_read AND #closed_tick = :closed_as_read"
        names = {"version", "closed_tick", *changes}
        self._items.update(
            Key=item_key("STATE", "STATE"),
            UpdateExpression="SET " + ", ".join(f"#{name} = :{name}" for name in changes),
            ConditionExpression=unchanged_since_read,
            ExpressionAttributeNames={f"#{name}": name for name in names},
            ExpressionAttributeValues={f":{name}": value for name, value in changes.items()}
            | {":version_as_read": {"N": str(state.version)}, ":closed_as_read": {"N": str(state.closed_tick)}},
        )

    # Execution

    def _due(self, state: State) -> list[Place]:
        """Return the transactions that wait for closed ticks, in the order of execution."""
        found = []
        for page in self._query(
            KeyConditionExpression="pk = :pool",
            FilterExpression="waiting = :true AND tick <= :closed",
            ExpressionAttributeValues={
                ":pool": {"S": "POOL"},
                ":true": {"BOOL": True},
                ":closed": {"N": str(state.closed_tick)},
            },
        ):
            for item in page["Items"]:
                transaction = decode(bytes(item["encoded"]["B"]))
                found.append(Place(item["txid"]["S"], transaction.tick, transaction))
        return sorted(found, key=lambda place: (place.tick, place.txid))

    def _execute(self, place: Place, state: State) -> None:
        """Execute the transaction of a place once. All earlier transactions have been executed."""
        for attempt in attempts(20, 0.005):
            if attempt:
                item = self._items.get("POOL", place.source)
                if not (item and item["waiting"]["BOOL"] and item["txid"]["S"] == place.txid):
                    return
            items = [self._leave(place)]
            if not state.comes_out_empty(place.tick):
                items += self._inclusion(place, state)
            try:
                self._items.write(*items)
            except ChangedError:
                continue
            return
        raise TransientError("other callers keep changing the due transactions; try again")

    def _leave(self, place: Place) -> Item:
        return {
            "Update": {
                "TableName": self._table,
                "Key": item_key("POOL", place.source),
                "UpdateExpression": "SET waiting = :no",
                "ConditionExpression": "waiting = :yes AND txid = :txid",
                "ExpressionAttributeValues": {
                    ":no": {"BOOL": False},
                    ":yes": {"BOOL": True},
                    ":txid": {"S": place.txid},
                },
            }
        }

    def _inclusion(self, place: Place, state: State) -> list[Item]:
        transaction = place.transaction
        source, destination = place.source, encode_identity(transaction.destination)
        balance = self._balance_of(source)
        moves = source != destination and 0 < transaction.amount <= balance
        record = {
            "txid": {"S": place.txid},
            "tick": {"N": str(place.tick)},
            "encoded": {"B": transaction.encode()},
            "time": {"N": str(state.time_of(place.tick))},
            "money_flew": {"BOOL": moves},
        }
        items = [self._items.put_new(item_key(f"TX#{place.txid}", "TX") | record)]
        items += [
            self._items.put_new(item_key(f"IDENTITY#{identity}", f"TICK#{place.tick:010d}#{place.txid}") | record)
            for identity in dict.fromkeys((source, destination))
        ]
        if moves:
            items.append(self._pay(source, transaction.amount, place.tick, "outgoing", balance))
            items.append(self._pay(destination, transaction.amount, place.tick, "incoming"))
        return items

    def _pay(
        self, identity: str, amount: int, tick: int, way: Literal["incoming", "outgoing"], balance: int | None = None
    ) -> Item:
        pk, sk = _balance_key(identity)
        update: Item = {
            "TableName": self._table,
            "Key": item_key(pk, sk),
            "UpdateExpression": f"SET latest_{way}_transfer_tick = :tick "
            f"ADD balance :change, {way}_amount :amount, number_of_{way}_transfers :one",
            "ExpressionAttributeValues": {
                ":tick": {"N": str(tick)},
                ":change": {"N": str(amount if way == "incoming" else -amount)},
                ":amount": {"N": str(amount)},
                ":one": {"N": "1"},
            },
        }
        if balance is not None:
            update["ConditionExpression"] = "balance = :as_read"
            update["ExpressionAttributeValues"][":as_read"] = {"N": str(balance)}
        return {"Update": update}

    # DynamoDB

    def _milliseconds(self) -> int:
        return int(self._clock().timestamp() * 1000)

    def _query(self, **which: Any) -> Iterator[Item]:
        return dynamo.pages(TableName=self._table, ConsistentRead=True, **which)


@contextmanager
def _answering() -> Iterator[None]:
    """Report errors of the table as an unavailable network."""
    try:
        yield
    except ClientError as error:
        raise TransientError(f"the mock's table does not respond: {error.response['Error']['Code']}") from error
    except BotoCoreError as error:
        raise TransientError(f"the mock's table does not respond: {type(error).__name__}") from error


def _checked(identity: str) -> None:
    try:
        decode_identity(identity)
    except ValueError as error:
        raise InvalidInputError(str(error), field="identity") from error


def _balance(identity: str, tick: int, item: Item | None) -> Balance:
    found = item or {}
    names = {field.name for field in fields(Balance)} - {"identity", "valid_for_tick"}
    numbers = {name: int(found[name]["N"]) if name in found else 0 for name in names}
    return Balance(identity=identity, valid_for_tick=tick, **numbers)


def _included(item: Item) -> Included:
    transaction = decode(bytes(item["encoded"]["B"]))
    return Included(transaction, timestamp=int(item["time"]["N"]), money_flew=item["money_flew"]["BOOL"])


def _balance_key(identity: str) -> tuple[str, str]:
    return f"BALANCE#{identity}", "BALANCE"
