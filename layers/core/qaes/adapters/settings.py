"""Settings from the environment. They are read at the first use, and an error names the missing variable."""

from __future__ import annotations

import os


class SettingsError(RuntimeError):
    """An environment variable is missing or malformed."""


def text(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise SettingsError(f"the environment variable {name} is not set")
    return value


def optional(name: str) -> str:
    """Return an optional setting; empty if it is not set."""
    return os.environ.get(name, "")


def number(name: str) -> int:
    value = text(name)
    if not value.isdecimal():
        raise SettingsError(f"the environment variable {name} must be a number")
    return int(value)
