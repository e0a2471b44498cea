"""Keeps what a consumer holds: extends reservations, ends what hangs, recovers what expired."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from sqlalchemy import Connection, Engine

from checkpoints.errors import ReservationLost
from checkpoints.runtime import _outcomes as outcomes
from checkpoints.runtime._held import Held
from checkpoints.runtime._outage import OutageLog, is_outage
from checkpoints.runtime._worker import Worker
from checkpoints.runtime.settings import ConsumerSettings, jittered
from checkpoints.runtime.telemetry import Telemetry


class Keeper(threading.Thread):
    """One thread beside the workers of a consumer; `on_abandoned` hears of handlers given up."""

    def __init__(
        self,
        engine: Engine,
        own: Engine,
        settings: ConsumerSettings,
        worker: Worker,
        telemetry: Telemetry,
        outage: OutageLog,
        on_abandoned: Callable[[Sequence[Held]], None],
    ) -> None:
        super().__init__(name=f"checkpoints-keeper-{settings.group}", daemon=True)
        self._engine = engine
        self._own = own
        self._settings = settings
        self._worker = worker
        self._telemetry = telemetry
        self._outage = outage
        self._on_abandoned = on_abandoned
        self._kept: set[Held] = set()
        self._guard = threading.Lock()
        self._stopped = threading.Event()
        self._third = settings.reservation_timeout.total_seconds() / 3
        self._extends_running: bool | None = None

    def keep(self, *helds: Held) -> None:
        """Extend these reservations until they are over or forgotten."""
        with self._guard:
            self._kept.update(helds)

    def forget(self, *helds: Held) -> None:
        """Look after them no more."""
        with self._guard:
            self._kept.difference_update(helds)

    def stop(self) -> None:
        """End soon."""
        self._stopped.set()

    def run(self) -> None:
        """Look after what is kept, recover and end replays until stopped, and once more then."""
        recover_at = time.monotonic()
        while True:
            last = self._stopped.is_set()
            try:
                self._end_hanging()
                self._extend_due()
                if time.monotonic() >= recover_at:
                    recover_at = time.monotonic() + jittered(self._settings.recover_interval)
                    if self._recover() == outcomes.RECOVERED_AT_ONCE:
                        recover_at = time.monotonic()
                    self._finish_replays()
                elif last:
                    self._finish_replays()
            except Exception as error:
                if is_outage(error):
                    self._outage.away(error)
                else:
                    outcomes.log_unexpected(self._settings.group, "keeping failed")
            if last:
                return
            self._stopped.wait(self._settings.keeping_seconds(recover_at - time.monotonic()))

    def _all(self) -> list[Held]:
        with self._guard:
            return list(self._kept)

    def _end_hanging(self) -> None:
        """Interrupt handlers that take too long; free the slot of one that goes on regardless."""
        for held in self._all():
            if not held.runs_longer_than(self._settings.handler_timeout):
                continue
            if not held.timed_out:
                held.timed_out = True
                held.cancel()
            else:
                held.sever()
                if held.over or self._worker.give_up(held):
                    held.abandoned = True
                    self._on_abandoned((held,))

    # --- extending

    def _extend_due(self) -> None:
        now = time.monotonic()
        due = [held for held in self._all() if now - held.extended_at >= self._third]
        due = [held for held in due if not held.over and self._may_extend(held)]
        if not due:
            return
        with self._own.connect() as connection:
            for held in due:
                self._extend(connection, held)
        self._outage.back()

    def _may_extend(self, held: Held) -> bool:
        if held.started_at is None:
            return True
        if self._extends_running is None:
            # With a snapshot older than the extension, the update of the position would fail.
            with self._engine.connect() as connection:
                self._extends_running = connection.get_isolation_level() == "READ COMMITTED"
        return self._extends_running

    def _extend(self, connection: Connection, held: Held) -> None:
        # Whoever has the lock is ending the reservation.
        if not held.lock.acquire(blocking=False):
            return
        lost = False
        try:
            if held.over or held.abandoned:
                return
            with connection.begin():
                extended = outcomes.extend(connection, held.reservation, self._settings)
            held.reservation = extended
            held.extended_at = time.monotonic()
        except ReservationLost:
            self._worker.lose(held)
            lost = True
        except Exception as error:
            if is_outage(error):
                raise
            outcomes.log_not_extended(self._settings.group, held.reservation, error)
        finally:
            held.lock.release()
        if lost:
            # Whatever it still does is for nothing, and may hold up the one that does it now.
            held.cancel()
            held.sever()

    def _recover(self) -> int:
        with self._own.begin() as connection:
            expired = outcomes.recover(connection, self._settings)
        outcomes.log_expired(self._telemetry, self._settings.group, expired)
        return len(expired)

    def _finish_replays(self) -> None:
        with self._own.begin() as connection:
            replayed = outcomes.finish_replays(connection, self._settings)
        outcomes.log_replayed(self._settings.group, replayed)
