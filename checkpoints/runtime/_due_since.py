"""Since when a consumer looks for what is due."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TypeVar

T = TypeVar("T")

# How far to look back: while there is enough to do, and before nothing is found.
_A_LITTLE = timedelta(milliseconds=200)
_FURTHER = timedelta(seconds=5)

# How often to look back while there is enough to do, in seconds.
_BACK_OFTEN = 0.05
_ALL_OFTEN = 0.5
# In times of what looking back takes, so that it takes a twentieth of the time.
_TIMES = 20
_LONGEST = 10.0


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
        self._back = _Pace(_BACK_OFTEN)
        self._all = _Pace(_ALL_OFTEN)
        self._exact_seconds = 0.0
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

        `reserve` is given the moment (None: all), and gives those first that have been due longest;
        `process_at` says since when. `surely`: answer nothing only after a look for all; else
        `until_all` says when that may be.
        """
        for since, pace in self._looks(surely=surely):
            begun = time.monotonic()
            try:
                reserved = reserve(since)
            finally:
                # Also of one that failed, by a timeout say: the next must not be the same at once.
                self._took(time.monotonic() - begun, since, pace)
            self.looked = since
            self._is_idle = not reserved
            if reserved:
                # In UTC: Python's arithmetic within another zone passes over changes of its clock.
                self._moment = process_at(reserved[0]).astimezone(UTC)
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
            if not self._is_idle:
                if now >= self._back.busy_at:
                    yield self._moment - _A_LITTLE, self._back
                else:
                    yield self._moment, None
            if not may_for_all:
                yield self._moment - _FURTHER, None
                return
        yield None, self._all

    def _took(self, seconds: float, since: datetime | None, pace: _Pace | None) -> None:
        if pace is not None:
            # What is taken costs the same wherever the look began.
            pace.looked(max(0.0, seconds - self._exact_seconds))
        elif since == self._moment:
            self._exact_seconds = seconds


class _Pace:
    """When it is time to look again: with something to do, and without."""

    def __init__(self, often: float) -> None:
        self._often = often
        self._seconds = 0.0
        self.busy_at = self.idle_at = 0.0

    def looked(self, seconds: float) -> None:
        """It was done now, and took so long; a single one that took longer does not count."""
        counted, self._seconds = min(seconds, self._seconds), seconds
        now = time.monotonic()
        wait = min(_TIMES * counted, _LONGEST)
        self.idle_at = now + wait
        self.busy_at = now + max(wait, self._often)
