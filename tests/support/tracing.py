"""Coverage of the product's code without the cost of tracing moto and botocore.

Up to Python 3.13, coverage installs a trace function in each thread. It slows down every call in that thread, measured
or not: the tests took twice the CPU time. `untraced` removes a thread's trace function while other code than the
product's runs; `traced` restores it for the product's code that moto calls. With `sys.monitoring` (Python 3.14, or
COVERAGE_CORE=sysmon) no thread has a trace function, and these decorators do nothing.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

_removed = threading.local()
"""The trace function that was removed from this thread, as `tracer`."""


def untraced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function that is not the product's, without the thread's trace function."""

    # One frame removes and restores it: coverage counts the calls and the returns that it sees.
    @wraps(function)
    def run_untraced(*args: Any, **kwargs: Any) -> Any:
        tracer = sys.gettrace()
        if tracer is None:
            return function(*args, **kwargs)
        outer, _removed.tracer = getattr(_removed, "tracer", None), tracer
        sys.settrace(None)
        try:
            return function(*args, **kwargs)
        finally:
            _removed.tracer = outer
            sys.settrace(tracer)

    return run_untraced


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """Run a function that calls the product's code with the trace function that `untraced` removed."""

    @wraps(function)
    def run_traced(*args: Any, **kwargs: Any) -> Any:
        tracer = getattr(_removed, "tracer", None)
        if tracer is None or sys.gettrace() is not None:
            return function(*args, **kwargs)
        sys.settrace(tracer)
        try:
            return function(*args, **kwargs)
        finally:
            _removed.tracer = sys.gettrace()
            sys.settrace(None)

    return run_traced


@contextmanager
def untraced_threads(package: str) -> Iterator[None]:
    """Start threads whose target is a function of `package` as if within `untraced`."""
    tracer = threading.gettrace()
    if tracer is None:
        yield
        return

    def start(frame: Any, event: str, argument: Any) -> Any:
        target = getattr(threading.current_thread(), "_target", None)
        if getattr(target, "__module__", "").partition(".")[0] != package:
            return tracer(frame, event, argument)
        _removed.tracer = tracer
        sys.settrace(None)
        return None

    threading.settrace(start)
    try:
        yield
    finally:
        threading.settrace(tracer)
