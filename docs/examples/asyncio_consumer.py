"""The same with asyncio: several checkpoints of a group at a time, until SIGTERM or Ctrl-C."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from contextlib import suppress
from datetime import timedelta

import ledger
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from checkpoints import AsyncCheckpoints, CheckpointStatus, Reservation, ReservationLost

log = logging.getLogger("consumer")

TIMEOUT = timedelta(seconds=30)
CONCURRENCY = 4
POLL_SECONDS = 0.2
ATTEMPTS = 5
FIRST_RETRY_AFTER = timedelta(seconds=1)


async def run(engine: AsyncEngine, stopping: asyncio.Event) -> None:
    """Reserve as many as are processed at a time, and process them side by side."""
    while not stopping.is_set():
        async with engine.begin() as connection:
            commands = AsyncCheckpoints(connection)
            await commands.recover_expired_checkpoint_reservations(ledger.GROUP)
        async with engine.begin() as connection:
            reservations = await AsyncCheckpoints(connection).reserve_next_available_checkpoint(
                ledger.GROUP, TIMEOUT, limit=CONCURRENCY
            )
        async with asyncio.TaskGroup() as tasks:
            for reservation in reservations:
                tasks.create_task(process(engine, reservation))
        if not reservations:
            with suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), POLL_SECONDS)


async def process(engine: AsyncEngine, reservation: Reservation) -> None:
    """Apply messages and move the position, both or neither."""
    try:
        async with engine.begin() as connection:
            rows = await connection.execute(
                ledger.stream(reservation.stream_name, reservation.stream_position)
            )
            received = [ledger.Message(*row) for row in rows]
            position = reservation.stream_version
            if received:
                await connection.execute(ledger.added(reservation.stream_name, received))
                position = received[-1].version
            await AsyncCheckpoints(connection).update_checkpoint_position(reservation, position)
    except ReservationLost as lost:
        log.warning("%s", lost)
    except Exception as error:
        log.exception("stream %s", reservation.stream_name)
        await record_error(engine, reservation, error)


async def record_error(engine: AsyncEngine, reservation: Reservation, error: Exception) -> None:
    """Have it tried again later, each time after twice as long, or give up."""
    attempts = reservation.retry_attempts + 1
    gives_up = attempts >= ATTEMPTS
    wait = FIRST_RETRY_AFTER * 2 ** (attempts - 1)
    with suppress(ReservationLost):
        async with engine.begin() as connection:
            await AsyncCheckpoints(connection).record_checkpoint_error(
                reservation,
                reservation.stream_position,
                status=CheckpointStatus.FAILED if gives_up else CheckpointStatus.RETRY,
                retry_attempts=attempts,
                error={"type": type(error).__name__, "message": str(error)},
                process_at=None if gives_up else wait,
            )


async def main() -> None:
    """Run until told to stop."""
    logging.basicConfig(level=logging.INFO)
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stopping.set)
    engine = create_async_engine(os.environ["DATABASE_URL"])
    await run(engine, stopping)
    await engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())
