"""Sharded keys for busy indexes: many tasks write them at once, and one partition takes 1,000 writes a second.

A key contains the number of its shard, a hash of the task's id. A task's shard never changes, so a reader of all
shards of a key finds every task once. A status in which tasks stay for long has one key: a list reads one partition.
"""

from __future__ import annotations

from zlib import crc32

IN_FLIGHT = "transfer_under_way"
"""`status_key` of a step whose transfer is in flight. Stored items have this older word (decision 19)."""

SPREAD = frozenset({"pending", "executing", IN_FLIGHT})
"""Keys of `by_status` that every task enters and leaves within seconds."""
STATUS_SHARDS = 4
DAY_SHARDS = 8


def status_key(status: str, task_id: str) -> str:
    """Return the key of `by_status` for a task, or a step, in this status."""
    return f"{status}#{_shard(task_id, STATUS_SHARDS)}" if status in SPREAD else status


def status_keys(status: str) -> list[str]:
    """Return all keys of `by_status` for this status."""
    return [f"{status}#{shard}" for shard in range(STATUS_SHARDS)] if status in SPREAD else [status]


def day_key(day: str, task_id: str) -> str:
    """Return the key of `by_day` for an event of a task on this day."""
    return f"{day}#{_shard(task_id, DAY_SHARDS)}"


def day_keys(day: str) -> list[str]:
    """Return all keys of `by_day` for this day."""
    return [f"{day}#{shard}" for shard in range(DAY_SHARDS)]


def _shard(task_id: str, shards: int) -> int:
    return crc32(task_id.encode()) % shards
