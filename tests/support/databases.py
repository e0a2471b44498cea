"""Throw-away databases, and engines on them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Engine

from checkpoints.testing._databases import Databases, databases

__all__ = ["Databases", "databases", "disposed"]


@contextmanager
def disposed(engine: Engine) -> Iterator[Engine]:
    """Close the engine's connections at the end."""
    try:
        yield engine
    finally:
        engine.dispose()
