"""Ctrl-C and other signals that ask a program to end: it cleans up, and prints no traceback.

This module imports nothing that takes time, so that a program can call `stop_on_signals` before all else.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopError(BaseException):
    """A signal asked this process to end; not an Exception, so that nothing on the way swallows it."""


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    ignore_signals()
    raise StopError(signal.Signals(signum).name)


def ignore_signals() -> None:
    """From here on this process is cleaning up, and a second Ctrl-C does not interrupt that."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def stop_on_signals() -> None:
    """Let SIGINT, SIGTERM and SIGHUP raise StopError in this process, once."""
    for signum in SIGNALS:
        signal.signal(signum, _stop)


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Let a signal that arrives inside of the `with` block take effect at its end."""
    arrived: list[int] = []
    handlers = {signum: signal.signal(signum, lambda number, _: arrived.append(number)) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        if arrived:
            signal.raise_signal(arrived[0])
