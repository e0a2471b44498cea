"""A consumer without the runtime, until SIGTERM or Ctrl-C. Start any number."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from contextlib import suppress
from datetime import timedelta
from types import FrameType

import ledger
import psycopg
from sqlalchemy import Engine, create_engine

from checkpoints import Checkpoints, CheckpointStatus, Reservation, ReservationLost

log = logging.getLogger("consumer")

TIMEOUT = timedelta(seconds=30)
RESERVE = 10
POLL_SECONDS = 1.0
RECOVER_SECONDS = 5.0
ATTEMPTS = 5
FIRST_RETRY_AFTER = timedelta(seconds=1)


def run(engine: Engine, stopping: threading.Event) -> None:
    """Reserve, process, say how it went; asleep when nothing is due."""
    with listening(engine) as notifications:
        recover_at = 0.0
        while not stopping.is_set():
            if time.monotonic() >= recover_at:
                with engine.begin() as connection:
                    Checkpoints(connection).recover_expired_checkpoint_reservations(ledger.GROUP)
                recover_at = time.monotonic() + RECOVER_SECONDS
            with engine.begin() as connection:
                reservations = Checkpoints(connection).reserve_next_available_checkpoint(
                    ledger.GROUP, TIMEOUT, limit=RESERVE
                )
            for reservation in reservations:
                if stopping.is_set():
                    release(engine, reservation)
                else:
                    process(engine, reservation)
            if not reservations:
                # A notification ends the wait early. Nobody announces that a retry has come due.
                for _ in notifications.notifies(timeout=POLL_SECONDS, stop_after=1):
                    pass


def process(engine: Engine, reservation: Reservation) -> None:
    """Apply messages and move the position, both or neither."""
    try:
        with engine.begin() as connection:
            received = ledger.read(connection, reservation.stream_name, reservation.stream_position)
            position = reservation.stream_version
            if received:
                ledger.apply(connection, reservation.stream_name, received)
                position = received[-1].version
            Checkpoints(connection).update_checkpoint_position(reservation, position)
    except ReservationLost as lost:
        log.warning("%s", lost)
    except Exception as error:
        log.exception("stream %s", reservation.stream_name)
        record_error(engine, reservation, error)


def record_error(engine: Engine, reservation: Reservation, error: Exception) -> None:
    """Have it tried again later, each time after twice as long, or give up."""
    attempts = reservation.retry_attempts + 1
    gives_up = attempts >= ATTEMPTS
    wait = FIRST_RETRY_AFTER * 2 ** (attempts - 1)
    with suppress(ReservationLost), engine.begin() as connection:
        Checkpoints(connection).record_checkpoint_error(
            reservation,
            reservation.stream_position,
            status=CheckpointStatus.FAILED if gives_up else CheckpointStatus.RETRY,
            retry_attempts=attempts,
            error={"type": type(error).__name__, "message": str(error)},
            process_at=None if gives_up else wait,
        )


def release(engine: Engine, reservation: Reservation) -> None:
    """Give back what was not begun."""
    with suppress(ReservationLost), engine.begin() as connection:
        Checkpoints(connection).release_checkpoint_reservation(reservation)


def listening(engine: Engine) -> psycopg.Connection:
    """A connection outside of the pool that hears when something becomes ready."""
    pooled = engine.raw_connection()
    connection: psycopg.Connection = pooled.driver_connection  # type: ignore[assignment]
    pooled.detach()
    connection.autocommit = True
    connection.execute("LISTEN checkpoints")
    return connection


def main() -> None:
    """Run until told to stop."""
    logging.basicConfig(level=logging.INFO)
    stopping = threading.Event()

    def stop(_number: int, _frame: FrameType | None) -> None:
        stopping.set()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    engine = create_engine(os.environ["DATABASE_URL"])
    run(engine, stopping)
    engine.dispose()


if __name__ == "__main__":
    main()
