"""A worker whose clock is off: a process of its own, in which the package sees another time."""

from __future__ import annotations

import datetime
import sys
import time
from datetime import datetime as _datetime
from typing import Any

# Before the shift: these know types by their class, and keep the true one.
import psycopg  # noqa: F401
import sqlalchemy.dialects.postgresql.psycopg  # noqa: F401

__all__ = ["run"]


def run(seconds: float, job: dict[str, Any]) -> None:
    """Shift the clock, then import the package, and work."""
    assert "checkpoints" not in sys.modules
    _shift(seconds)
    from tests.faults import worker

    worker.run(worker.Job(**job))


def _shift(seconds: float) -> None:
    true_time = time.time
    by = datetime.timedelta(seconds=seconds)

    class _Meta(type):
        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, _datetime)

    class Shifted(_datetime, metaclass=_Meta):
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> Any:
            return _datetime.now(tz) + by

        @classmethod
        def utcnow(cls) -> Any:
            return _datetime.now(datetime.UTC).replace(tzinfo=None) + by

        @classmethod
        def today(cls) -> Any:
            return cls.now()

    time.time = lambda: true_time() + seconds
    time.time_ns = lambda: int((true_time() + seconds) * 1e9)
    datetime.datetime = Shifted  # type: ignore[misc]
