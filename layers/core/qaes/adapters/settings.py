"""Settings from the environment: read when first needed, each missing one named at once."""

from __future__ import annotations

import os


class SettingsError(RuntimeError):
    """An environment variable is missing or not of its form."""


def text(name: str) -> str:
    value = os.environ.get(name, "")
    if not value:
        raise SettingsError(f"the environment variable {name} is not set")
    return value


def optional(name: str) -> str:
    """Return a setting that may be left out: an empty text then."""
    return os.environ.get(name, "")


def number(name: str) -> int:
    value = text(name)
    if not value.isdecimal():
        raise SettingsError(f"the environment variable {name} is not a number")
    return int(value)
