"""Time a peer's processes from outside.

The workers say how many items they have handled; the database is asked only when that is all of
them, until it agrees. Counting meanwhile would slow down what is measured.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import psycopg

from tests.benchmarks.peers.peer import NotAllDone, PeerError
from tests.benchmarks.peers.workers import connect, environment, started

__all__ = ["MeasuredPeer"]

_LISTEN_SECONDS = 0.005
# A peer that does not finish one item in this time has stopped.
_STALL_SECONDS = 60.0
# Before a rate is taken: connections fill their caches, and PgQueuer's psycopg driver may wait for
# a second, once.
_WARM_UP_SECONDS = 1.2


@dataclass(frozen=True, kw_only=True)
class MeasuredPeer(ABC):
    """What all peers here have in common; a drain is given up after `limit` seconds."""

    limit: float = 300.0

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name and driver."""

    @abstractmethod
    def drain_command(self, batch: int) -> Sequence[str]:
        """The worker, with its settings for throughput."""

    @abstractmethod
    def single_command(self) -> Sequence[str]:
        """The worker, one item at a time."""

    @abstractmethod
    def waiting(self, connection: psycopg.Connection, first: int) -> tuple[int, int | None]:
        """How many work items from this id on are not done yet, and the least id of them."""

    @abstractmethod
    def done(self, connection: psycopg.Connection, first: int, count: int) -> int:
        """How many of the `count` work items from this id on were done, with success."""

    def limited(self, seconds: float) -> Self:
        """The same peer with another `limit`."""
        return replace(self, limit=seconds)

    def drain(self, url: str, count: int, processes: int, batch: int) -> float:
        """Work off the `count` items that wait; see `Peer.drain`."""
        with connect(url) as connection:
            waiting, first = self.waiting(connection, 0)
            if waiting != count or first is None:
                raise PeerError(f"{self.name}: {waiting} work items wait, not {count}")
            with started(self.drain_command(batch), environment(url), processes) as workers:
                start = moved = time.monotonic()
                workers.go()
                why = None
                while why is None:
                    handled = workers.handled
                    now = time.monotonic()
                    if handled >= count and self.waiting(connection, first)[0] == 0:
                        # What the statement saw was so at `now`, when it began.
                        why = "the others failed"
                    elif now - start > self.limit:
                        why = f"the limit is {self.limit:g} s"
                    elif now - moved > _STALL_SECONDS:
                        why = f"none was handled for {_STALL_SECONDS:g} s"
                    else:
                        workers.listen(_LISTEN_SECONDS)
                        if workers.handled != handled:
                            moved = now
                seconds = now - start
            done = self.done(connection, first, count)
        if done != count:
            raise NotAllDone(self.name, done, count, seconds, why)
        if handled != count:
            raise PeerError(f"{self.name}: {count} items were handled {handled} times")
        return seconds

    def one_at_a_time(self, url: str, seconds: float, processes: int) -> float:
        """Items/s, one at a time; see `Peer.one_at_a_time`."""
        with connect(url) as connection:
            count, first = self.waiting(connection, 0)
            if first is None:
                raise PeerError(f"{self.name}: no work item waits")
            with started(self.single_command(), environment(url), processes) as workers:
                workers.go()
                warm = time.monotonic() + _WARM_UP_SECONDS
                while time.monotonic() < warm:
                    workers.listen(_LISTEN_SECONDS)
                start = time.monotonic()
                before = self.done(connection, first, count)
                end = start + seconds
                while (now := time.monotonic()) < end and workers.handled < count:
                    workers.listen(_LISTEN_SECONDS)
                done = self.done(connection, first, count)
        if workers.handled >= count:
            raise PeerError(f"{self.name}: {count} items are not enough for {seconds:g} s")
        return (done - before) / (now - start)
