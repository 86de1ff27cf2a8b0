"""Handling of Ctrl-C and other end signals: a program cleans up, and prints no traceback.

This module has no slow imports, so that a program can call `stop_on_signals` first.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopError(BaseException):
    """A signal requested the end of this process. It is a BaseException, so that no handler swallows it."""


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    ignore_signals()
    raise StopError(signal.Signals(signum).name)


def ignore_signals() -> None:
    """Ignore further signals: this process is cleaning up, and a second Ctrl-C must not interrupt that."""
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)


def stop_on_signals() -> None:
    """Raise StopError in this process at the first SIGINT, SIGTERM or SIGHUP."""
    for signum in SIGNALS:
        signal.signal(signum, _stop)


@contextlib.contextmanager
def deferred_signals() -> Iterator[None]:
    """Delay a signal that arrives inside the `with` block until its end."""
    arrived: list[int] = []
    handlers = {signum: signal.signal(signum, lambda number, _: arrived.append(number)) for signum in SIGNALS}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        if arrived:
            signal.raise_signal(arrived[0])
