"""The checkpoints that a blocking consumer holds, and their tokens, which change while it does."""

from __future__ import annotations

import threading
import time
from contextlib import suppress
from datetime import timedelta

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError

from checkpoints.errors import ReservationLost
from checkpoints.records import Reservation


class Held:
    """A reservation in this process.

    `lock` is held by whoever uses or changes the token: the worker from the update of the position
    to the commit, the keeper while it extends or gives up.
    """

    def __init__(self, reservation: Reservation) -> None:
        self.reservation = reservation
        self.lock = threading.Lock()
        self.held_since = time.monotonic()
        self.started_at: float | None = None
        self.lost = False
        """The reservation is gone: no use of the token can succeed any more."""
        self.abandoned = False
        """Nobody waits for its worker any more."""
        self.finished = False
        """Its worker is done with it, well or not."""
        self.processed = False
        """The position was updated."""
        self.ended = False
        """Its reservation was ended by this process: extend it no more."""
        self._connection: Connection | None = None

    def check(self) -> None:
        """Raise unless the token may still be used."""
        if self.lost or self.ended:
            raise ReservationLost(self.reservation.id, self.reservation.reserved_until)

    def use(self, connection: Connection | None) -> None:
        """The connection that the handler works on now."""
        self._connection = connection

    def cancel(self) -> None:
        """Interrupt the statement that the handler waits for, if any."""
        connection = self._connection
        if connection is not None:
            with suppress(SQLAlchemyError, AttributeError, OSError):
                driver = connection.connection.driver_connection
                if driver is not None:
                    driver.cancel_safe(timeout=5)

    def running_for(self) -> timedelta:
        """How long its handler has run."""
        started = self.started_at
        return timedelta(seconds=0 if started is None else time.monotonic() - started)
