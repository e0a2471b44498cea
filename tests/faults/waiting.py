"""Waiting for a condition, within a bounded time."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["eventually"]


def eventually(condition: Callable[[], object], what: object, seconds: float = 30) -> float:
    """Wait until the condition holds; how many seconds that took."""
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        if waited > seconds:
            told = what() if callable(what) else what
            raise AssertionError(f"not within {seconds:g} s: {told}")
        time.sleep(0.02)
    return time.monotonic() - began
