"""Since when a consumer looks for what is due."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TypeVar

T = TypeVar("T")

_COMMITTED_LATE = timedelta(milliseconds=200)

# Between two looks for all, in seconds; and in times of what the last one took, so that looking
# takes no more than a twentieth of the time.
_OFTEN = 0.5
_LONGEST = 30.0
_TIMES = 20


class DueSince:
    """Since when to look: since the oldest that was taken the last time.

    What was taken before that leaves dead rows at the head of the index, which cannot be removed
    while any transaction in the database is open. Now and then all are looked for: what is
    released, scheduled for a time that is past, or resumed lies before. How often depends on how
    long that takes, since it walks past all of the dead rows.
    """

    def __init__(self) -> None:
        self._moment: datetime | None = None
        self._looks_for_all_at = 0.0

    def take(
        self, reserve: Callable[[datetime | None], list[T]], process_at: Callable[[T], datetime]
    ) -> list[T]:
        """Reserve what is due since then, and all when that is nothing, or it is time for it.

        `reserve` is given the moment (None: all), `process_at` says when one was due.
        """
        due_since = None if time.monotonic() >= self._looks_for_all_at else self._moment
        while True:
            begun = time.monotonic()
            reserved = reserve(due_since)
            if due_since is None:
                now = time.monotonic()
                self._looks_for_all_at = now + min(max(_OFTEN, _TIMES * (now - begun)), _LONGEST)
            if reserved:
                # Transactions that began before, and commit later, may make older ones ready.
                self._moment = min(map(process_at, reserved)) - _COMMITTED_LATE
            if reserved or due_since is None:
                return reserved
            due_since = None
