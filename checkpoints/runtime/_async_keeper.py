"""Keeps what an asyncio consumer holds, as `_keeper` does for threads."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from checkpoints.errors import ReservationLost
from checkpoints.runtime import _outcomes as outcomes
from checkpoints.runtime._async_held import AsyncHeld
from checkpoints.runtime._async_worker import AsyncWorker
from checkpoints.runtime._outage import OutageLog, is_outage
from checkpoints.runtime._tasks import wait
from checkpoints.runtime.settings import ConsumerSettings, jittered
from checkpoints.runtime.telemetry import Telemetry


class AsyncKeeper:
    """For one task beside the handlers; `on_abandoned` hears of those given up."""

    def __init__(
        self,
        engine: AsyncEngine,
        own: AsyncEngine,
        settings: ConsumerSettings,
        worker: AsyncWorker,
        telemetry: Telemetry,
        outage: OutageLog,
        on_abandoned: Callable[[AsyncHeld], None],
    ) -> None:
        self._engine = engine
        self._own = own
        self._settings = settings
        self._worker = worker
        self._telemetry = telemetry
        self._outage = outage
        self._on_abandoned = on_abandoned
        self._kept: set[AsyncHeld] = set()
        self._stopped = asyncio.Event()
        self._third = settings.reservation_timeout.total_seconds() / 3
        self._extends_running: bool | None = None

    def keep(self, held: AsyncHeld) -> None:
        """Extend this reservation until it is over or forgotten."""
        self._kept.add(held)

    def forget(self, held: AsyncHeld) -> None:
        """Look after it no more."""
        self._kept.discard(held)

    def stop(self) -> None:
        """End soon."""
        self._stopped.set()

    async def run(self) -> None:
        """Look after what is kept, recover and end replays until stopped, and once more then."""
        recover_at = time.monotonic()
        while True:
            last = self._stopped.is_set()
            try:
                await self._end_hanging()
                await self._extend_due()
                if time.monotonic() >= recover_at:
                    recover_at = time.monotonic() + jittered(self._settings.recover_interval)
                    if await self._recover() == outcomes.RECOVERED_AT_ONCE:
                        recover_at = time.monotonic()
                    await self._finish_replays()
                elif last:
                    await self._finish_replays()
            except Exception as error:
                if is_outage(error):
                    self._outage.away(error)
                else:
                    outcomes.log_unexpected(self._settings.group, "keeping failed")
            if last:
                return
            await wait(self._stopped, self._settings.keeping_seconds(recover_at - time.monotonic()))

    async def _end_hanging(self) -> None:
        """Cancel handlers that take too long; free the slot of one that goes on regardless."""
        for held in list(self._kept):
            if not held.runs_longer_than(self._settings.handler_timeout):
                continue
            if not held.timed_out:
                held.timed_out = True
                held.cancel()
                continue
            # It goes on in spite of that.
            held.sever()
            given_up = held.over or await self._worker.give_up(held)
            # It may have come to its end meanwhile.
            if given_up and held.runs_longer_than(self._settings.handler_timeout):
                held.abandoned = True
                self._on_abandoned(held)

    # --- extending

    async def _extend_due(self) -> None:
        now = time.monotonic()
        due = [
            held for held in self._kept if not held.over and now - held.extended_at >= self._third
        ]
        if self._extends_running is None and any(held.started_at is not None for held in due):
            # With a snapshot older than the extension, the update of the position would fail.
            async with self._engine.connect() as connection:
                level = await connection.get_isolation_level()
                self._extends_running = level == "READ COMMITTED"
        due = [held for held in due if held.started_at is None or self._extends_running]
        if not due:
            return
        async with self._own.connect() as connection:
            for held in due:
                await self._extend(connection, held)
        self._outage.back()

    async def _extend(self, connection: AsyncConnection, held: AsyncHeld) -> None:
        # Whoever has the lock is ending the reservation.
        if held.lock.locked() or held.over:
            return
        try:
            async with held.lock, connection.begin():
                extended = await connection.run_sync(
                    outcomes.extend, held.reservation, self._settings
                )
            held.reservation = extended
            held.extended_at = time.monotonic()
        except ReservationLost:
            self._worker.lose(held)
            held.cancel()
        except Exception as error:
            if is_outage(error):
                raise
            outcomes.log_not_extended(self._settings.group, held.reservation, error)

    async def _recover(self) -> int:
        async with self._own.begin() as connection:
            expired = await connection.run_sync(outcomes.recover, self._settings)
        outcomes.log_expired(self._telemetry, self._settings.group, expired)
        return len(expired)

    async def _finish_replays(self) -> None:
        async with self._own.begin() as connection:
            replayed = await connection.run_sync(outcomes.finish_replays, self._settings)
        outcomes.log_replayed(self._settings.group, replayed)
