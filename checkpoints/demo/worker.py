"""The loop of a worker: reserve checkpoints, process their messages, say how it went.

This is the loop to begin your own worker with. It may be killed at any moment: what it had not
committed is rolled back, its reservations expire, and another worker takes the checkpoints over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, Engine, insert

from checkpoints import Checkpoints, CheckpointStatus, Reservation, ReservationLost
from checkpoints.demo.projection import Handler, read_messages
from checkpoints.demo.tables import GROUP, incidents

__all__ = ["Settings", "work"]


@dataclass(frozen=True)
class Settings:
    """How a worker goes about its work."""

    reserve: int = 10
    """Checkpoints reserved at once: one reservation statement for many is cheaper."""
    messages: int = 500
    """Messages in one transaction, at most."""
    reservation_timeout: timedelta = timedelta(seconds=30)
    """Longer than all of the reserved checkpoints take; what a dead worker held waits so long."""
    recover_every: timedelta = timedelta(seconds=1)
    poll_every: timedelta = timedelta(milliseconds=50)
    attempts: int = 5
    """After so many attempts a checkpoint is failed and waits for an operator."""
    first_retry_after: timedelta = timedelta(milliseconds=100)
    """The second retry waits twice as long, and so on."""


def work(
    engine: Engine,
    handlers: Mapping[str, Handler],
    is_stopping: Callable[[], bool],
    settings: Settings | None = None,
) -> None:
    """Process checkpoints until asked to stop; then finish the one at hand, release the others."""
    settings = settings or Settings()
    recover_at = 0.0
    while not is_stopping():
        if time.monotonic() >= recover_at:
            _recover_expired(engine)
            recover_at = time.monotonic() + settings.recover_every.total_seconds()

        # Committed at once: from here on nobody else takes them, and no lock is held.
        with engine.begin() as connection:
            reservations = Checkpoints(connection).reserve_next_available_checkpoint(
                GROUP, settings.reservation_timeout, limit=settings.reserve
            )
        if not reservations:
            time.sleep(settings.poll_every.total_seconds())
        for reservation in reservations:
            if is_stopping():
                _release(engine, reservation)
            else:
                _process(engine, handlers[reservation.subscription_name], reservation, settings)


def _process(
    engine: Engine, handler: Handler, reservation: Reservation, settings: Settings
) -> None:
    try:
        # One transaction: the handler's writes and the new position, both or neither.
        with engine.begin() as connection:
            messages = read_messages(connection, reservation, limit=settings.messages)
            position = reservation.stream_version
            if messages:
                handler(connection, reservation, messages)
                position = messages[-1].version
            # Still behind the version? Then it is ready again.
            Checkpoints(connection).update_checkpoint_position(reservation, position)
    except ReservationLost:
        _note_lost(engine)
    except Exception as error:
        _record_error(engine, reservation, error, settings)


def _record_error(
    engine: Engine, reservation: Reservation, error: Exception, settings: Settings
) -> None:
    """Note what went wrong, in a transaction of its own: the handler's was rolled back."""
    attempts = reservation.retry_attempts + 1
    gives_up = attempts >= settings.attempts
    wait = settings.first_retry_after * 2 ** (attempts - 1)
    try:
        with engine.begin() as connection:
            Checkpoints(connection).record_checkpoint_error(
                reservation,
                # Rolled back, so no further than before.
                reservation.stream_position,
                status=CheckpointStatus.FAILED if gives_up else CheckpointStatus.RETRY,
                retry_attempts=attempts,
                error={"type": type(error).__name__, "message": str(error)},
                process_at=None if gives_up else datetime.now(UTC) + wait,
            )
            _note(connection, "error")
    except ReservationLost:
        _note_lost(engine)


def _release(engine: Engine, reservation: Reservation) -> None:
    try:
        with engine.begin() as connection:
            Checkpoints(connection).release_checkpoint_reservation(reservation)
    except ReservationLost:
        _note_lost(engine)


def _recover_expired(engine: Engine) -> None:
    """Give back what dead workers held; every worker may do so."""
    with engine.begin() as connection:
        recovered = Checkpoints(connection).recover_expired_checkpoint_reservations(GROUP)
        if recovered:
            _note(connection, "recovered", len(recovered))


def _note_lost(engine: Engine) -> None:
    """Another worker has the checkpoint: nothing to do. Counted for the report only."""
    with engine.begin() as connection:
        _note(connection, "lost")


def _note(connection: Connection, kind: str, count: int = 1) -> None:
    connection.execute(insert(incidents).values(kind=kind, count=count))
