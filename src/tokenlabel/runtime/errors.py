"""Errors in configurations, and those of other libraries in messages of our own."""

from __future__ import annotations


class ConfigError(ValueError):
    """A configuration that cannot be read, or that means nothing."""


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, for a message of one line of our own."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class FirstRankError(ValueError):
    """What the first rank was to do for all failed there."""
