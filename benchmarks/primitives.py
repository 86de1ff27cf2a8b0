"""The Qubic primitives as multiples of a SHA-256 over 1 MiB in the same run."""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable

from qaes.domain.qubic import schnorrq
from qaes.domain.qubic.k12 import k12

ROUNDS = 30
LIMITS = {"one signature": 10.0, "one verification": 20.0}
TRANSACTION_BYTES = 80 + 93 + 64


def measure() -> dict[str, tuple[float, float]]:
    """Return (milliseconds, multiple) by name, medians over interleaved rounds."""
    subseed = schnorrq.subseed_of("a" * 55)
    key, digest = schnorrq.public_key_of(subseed), bytes(32)
    signature, data, transaction = schnorrq.sign(subseed, key, digest), bytes(1 << 20), bytes(TRANSACTION_BYTES)
    calls: dict[str, Callable[[], object]] = {
        "SHA-256 of 1 MiB": lambda: hashlib.sha256(data).digest(),
        "one signature": lambda: schnorrq.sign(subseed, key, digest),
        "one verification": lambda: schnorrq.verify(key, digest, signature),
        "K12 of a transaction": lambda: k12(transaction),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 2):
        for name, call in calls.items():
            begin = time.perf_counter()
            call()
            if number >= 2:
                times[name].append((time.perf_counter() - begin) * 1000)
    median = {name: statistics.median(values) for name, values in times.items()}
    return {name: (value, value / median["SHA-256 of 1 MiB"]) for name, value in median.items()}
