"""The checkpoints that a consumer holds, and their tokens, which change while it does."""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from socket import SHUT_RDWR, socket
from typing import Any, Generic, Self, TypeVar

from sqlalchemy import Connection

from checkpoints.errors import ReservationLost
from checkpoints.records import Reservation
from checkpoints.runtime.settings import ConsumerSettings, OutsideTransaction


class Holding:
    """A reservation in this process: what threads and tasks have in common."""

    def __init__(self, reservation: Reservation, reservation_timeout: timedelta) -> None:
        self.reservation = reservation
        self.bundle: Bundle[Self] | None = None
        self._reservation_timeout = reservation_timeout
        self.reserved_at = self.extended_at = time.monotonic()
        # By the database's clock alone: it was reserved a timeout before the reservation ends.
        waited = reservation.reserved_until - reservation_timeout - reservation.process_at
        self._waited = max(0.0, waited.total_seconds())
        self.started_at: float | None = None
        self.finished = False
        """Its handler has come to an end, well or not."""
        self.processed = False
        """The position was updated."""
        self.over = False
        """The token is of no use any more: the reservation was ended here, or is lost."""
        self.timed_out = False
        """Its handler has been told to end, for it takes too long."""
        self.abandoned = False
        """Nobody waits for its handler any more, which must use the token no more either."""

    def end(self) -> None:
        """Use the token no more."""
        self.over = True

    def start_anew(self) -> None:
        """What its handler did was rolled back, and it is to run again."""
        self.started_at = None
        self.finished = False
        self.timed_out = False

    def anew(self) -> Self:
        """The same for another worker or task; the one that has it must use the token no more."""
        self.abandoned = True
        again = type(self)(self.reservation, self._reservation_timeout)
        again.reserved_at, again.extended_at = self.reserved_at, self.extended_at
        again._waited = self._waited
        return again

    def check(self) -> None:
        """Raise unless the token may still be used."""
        if self.over or self.abandoned:
            raise ReservationLost(self.reservation.id, self.reservation.reserved_until)

    def runs_longer_than(self, longest: timedelta | None) -> bool:
        """Whether its handler runs, and takes too long."""
        if longest is None or self.started_at is None or self.finished or self.abandoned:
            return False
        return time.monotonic() - self.started_at > longest.total_seconds()

    def took(self) -> float:
        """The seconds since its handler began."""
        return time.monotonic() - (self.started_at or self.reserved_at)

    def latency(self) -> float:
        """The seconds since the checkpoint was due."""
        return self._waited + time.monotonic() - self.reserved_at


class Held(Holding):
    """Held by a blocking consumer.

    `lock` is held by whoever uses or changes the token: the worker from the update of the position
    to the commit, the keeper while it extends or gives up. Get a connection first, and then the
    lock: the other way round, a handler that has the last connection would wait for the lock.
    """

    def __init__(self, reservation: Reservation, reservation_timeout: timedelta) -> None:
        super().__init__(reservation, reservation_timeout)
        self.lock = threading.Lock()
        self.worker: threading.Thread | None = None
        self._ended: threading.Event | None = None
        self._guard = threading.Lock()
        self._connection: Connection | None = None

    def end(self) -> None:
        super().end()
        if self._ended is not None:
            self._ended.set()

    def wait(self, seconds: float) -> None:
        """Wait, but no longer than the token is of use."""
        # Made here, for most are never waited with. Whichever of this and `end` comes second sees
        # what the first has set.
        self._ended = threading.Event()
        if not self.over:
            self._ended.wait(seconds)

    def use(self, connection: Connection | None) -> None:
        """The connection that the handler works on now; None before it goes back to the pool."""
        with self._guard:
            self._connection = connection

    def cancel(self) -> None:
        """Interrupt the statement that the handler waits for, if any."""
        # Guarded: else it might hit the next user of the connection.
        with self._guard, suppress(Exception):
            if self._connection is not None:
                driver = self._connection.connection.driver_connection
                if driver is not None:
                    driver.cancel_safe(timeout=5)

    def sever(self) -> None:
        """Break the connection of a handler that nobody waits for.

        Not while the worker ends the reservation: that is no hanging.
        """
        if not self.lock.acquire(blocking=False):
            return
        try:
            with self._guard:
                connection, self._connection = self._connection, None
                sever(connection)
        finally:
            self.lock.release()


@contextmanager
def locked(helds: Iterable[Held]) -> Iterator[None]:
    """Nobody else uses or changes the tokens."""
    taken = []
    try:
        for held in helds:
            held.lock.acquire()
            taken.append(held.lock)
        yield
    finally:
        for lock in taken:
            lock.release()


HeldT = TypeVar("HeldT", bound=Holding)


class Bundle(Generic[HeldT]):
    """Held checkpoints that one worker has: their handlers run in one transaction if all goes well.

    A worker is a thread, or a task of an asyncio consumer. `left` is what the dispatcher has not
    heard of yet.
    """

    def __init__(self, helds: Iterable[HeldT]) -> None:
        self.helds = tuple(helds)
        self.left = set(self.helds)
        for held in self.helds:
            held.bundle = self

    @property
    def is_given_up(self) -> bool:
        """Whether its worker hung, and must do no more with any of it."""
        return any(held.abandoned for held in self.helds)

    def part(self) -> None:
        """All of it is done: keep none in memory for another."""
        for held in self.helds:
            held.bundle = None


def next_bundle(
    waiting: deque[HeldT],
    free: int,
    settings: ConsumerSettings,
    handler_of: Callable[[str], Any],
    forget: Callable[[HeldT], None],
) -> Bundle[HeldT]:
    """Take what the next of so many free workers is to do: several, if they can share.

    A handler may not run in a transaction with others if it is to run outside of one, or has failed
    before. `forget` is for what is over already.
    """

    def may_share(held: HeldT) -> bool:
        handler = handler_of(held.reservation.subscription_name)
        return not (held.reservation.retry_attempts or isinstance(handler, OutsideTransaction))

    def take() -> Iterator[HeldT]:
        share = settings.share(len(waiting), free)
        taken = 0
        while waiting and taken < share:
            held = waiting[0]
            if held.over:
                forget(held)
            else:
                shares = may_share(held)
                if taken and not shares:
                    return
                taken = taken + 1 if shares else share
                yield held
            waiting.popleft()

    return Bundle(take())


def sever(connection: Connection | None) -> None:
    """Break a connection that another thread or task may be using: its transaction ends.

    Else the locks of a handler that hangs would hold up the next attempt for as long as it hangs,
    until that has failed, too; and its place in the pool would be lost.
    """
    # None: there is none. An error: it is broken already.
    with suppress(Exception):
        if connection is not None:
            pooled = connection.connection
            driver: Any = pooled.driver_connection
            # Not closed: whoever uses it finds it broken, and its number is not another's.
            with socket(fileno=os.dup(driver.fileno())) as stream:
                stream.shutdown(SHUT_RDWR)
            # The pool may make another in its place.
            pooled.detach()
