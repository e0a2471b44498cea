"""Since when a consumer looks for what is due."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from typing import TypeVar

T = TypeVar("T")

_COMMITTED_LATE = timedelta(milliseconds=200)

# How often to look further back while there is enough to do, in seconds.
_LATE_OFTEN = 0.05
_ALL_OFTEN = 0.5
# Looking further back takes no more than a twentieth of the time, if need be.
_TIMES = 20
_LONGEST = 30.0


class DueSince:
    """Since when to look: since the oldest that was taken the last time.

    What was taken before leaves dead rows at the head of the index, which cannot be removed while
    any transaction in the database is open, and are walked past by whoever looks from the
    beginning. Now and then it looks back a little, for what transactions that began before, and
    committed later, have made ready; and for all: what is released, scheduled for a time that is
    past, or resumed lies anywhere. How often depends on how long that takes.
    """

    def __init__(self) -> None:
        self._moment: datetime | None = None
        self._is_idle = False
        self._late = _Pace(_LATE_OFTEN)
        self._all = _Pace(_ALL_OFTEN)
        self.looked: datetime | None = None
        """Since when it has looked the last time (None: for all)."""

    def take(
        self,
        reserve: Callable[[datetime | None], list[T]],
        process_at: Callable[[T], datetime],
        *,
        surely: bool,
    ) -> list[T]:
        """Reserve what is due since then; look further back when that is nothing.

        `reserve` is given the moment (None: all), `process_at` says when one was due. `surely`:
        answer nothing only after a look for all; else `until_all` says when that may be.
        """
        for since, pace in self._looks(surely=surely):
            begun = time.monotonic()
            reserved = reserve(since)
            if pace is not None:
                pace.looked(time.monotonic() - begun)
            self.looked = since
            self._is_idle = not reserved
            if reserved:
                self._moment = min(map(process_at, reserved))
                return reserved
        return []

    def until_all(self) -> timedelta:
        """How long until it may look for all again, when there is nothing else to do."""
        return timedelta(seconds=max(0.001, self._all.idle_at - time.monotonic()))

    def _looks(self, *, surely: bool) -> Iterator[tuple[datetime | None, _Pace | None]]:
        """Where to look, one after the other until something is found."""
        now = time.monotonic()
        may_for_all = surely or now >= self._all.idle_at
        must_for_all = now >= (self._all.idle_at if self._is_idle else self._all.busy_at)
        if self._moment is not None and not must_for_all:
            is_late = self._is_idle or now >= self._late.busy_at
            if not is_late:
                yield self._moment, None
            if is_late or not may_for_all:
                yield self._moment - _COMMITTED_LATE, self._late
            if not may_for_all:
                return
        yield None, self._all


class _Pace:
    """When it is time to look again: with something to do, and without."""

    def __init__(self, often: float) -> None:
        self._often = often
        self.busy_at = self.idle_at = 0.0

    def looked(self, seconds: float) -> None:
        """It was done now, and took so long."""
        now = time.monotonic()
        wait = min(_TIMES * seconds, _LONGEST)
        self.idle_at = now + wait
        self.busy_at = now + max(wait, self._often)
