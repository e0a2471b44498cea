"""Keeps what a consumer holds: extends reservations, ends what hangs, recovers what expired."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from sqlalchemy import Connection, Engine, text

from checkpoints.errors import ReservationLost
from checkpoints.executing import Checkpoints
from checkpoints.runtime import _outcomes as outcomes
from checkpoints.runtime._held import Held
from checkpoints.runtime._outage import OutageLog, is_outage
from checkpoints.runtime._worker import Worker
from checkpoints.runtime.settings import ConsumerSettings, jittered
from checkpoints.runtime.telemetry import Telemetry, fields, logger


class Keeper(threading.Thread):
    """One thread beside the workers of a consumer; `on_abandoned` hears of handlers given up."""

    def __init__(
        self,
        engine: Engine,
        settings: ConsumerSettings,
        worker: Worker,
        telemetry: Telemetry,
        outage: OutageLog,
        on_abandoned: Callable[[Held], None],
    ) -> None:
        super().__init__(name=f"checkpoints-keeper-{settings.group}", daemon=True)
        self._engine = engine
        self._settings = settings
        self._worker = worker
        self._telemetry = telemetry
        self._outage = outage
        self._on_abandoned = on_abandoned
        self._kept: dict[int, Held] = {}
        self._guard = threading.Lock()
        self._stopped = threading.Event()
        self._third = settings.reservation_timeout.total_seconds() / 3
        self._extends_running: bool | None = None

    def keep(self, held: Held) -> None:
        """Extend this reservation until it is ended, lost or forgotten."""
        with self._guard:
            self._kept[held.reservation.id] = held

    def forget(self, held: Held) -> None:
        """Extend it no more."""
        with self._guard:
            if self._kept.get(held.reservation.id) is held:
                del self._kept[held.reservation.id]

    def stop(self) -> None:
        """End soon."""
        self._stopped.set()

    def run(self) -> None:
        """Keep until stopped."""
        recover_at = time.monotonic()
        while not self._stopped.is_set():
            try:
                self._end_hanging()
                self._extend_due()
                if time.monotonic() >= recover_at:
                    recover_at = time.monotonic() + jittered(self._settings.recover_interval)
                    self._recover()
            except Exception as error:
                if is_outage(error):
                    self._outage.away(error)
                else:
                    logger.exception("keeping failed", extra={"group": self._settings.group})
            self._stopped.wait(self._settings.keeping_seconds(recover_at - time.monotonic()))

    def _all(self) -> list[Held]:
        with self._guard:
            for id, held in list(self._kept.items()):
                if held.ended or held.lost:
                    del self._kept[id]
            return list(self._kept.values())

    # --- hanging handlers

    def _end_hanging(self) -> None:
        longest = self._settings.handler_timeout
        if longest is None:
            return
        for held in self._all():
            if held.running_for() > longest and not held.finished:
                held.cancel()
                error = outcomes.timed_out(held.reservation, longest)
                self._worker.record_error(held, error)
                with held.lock:
                    if held.finished or held.processed:
                        continue
                    held.abandoned = True
                self._on_abandoned(held)

    # --- extending

    def _extend_due(self) -> None:
        now = time.monotonic()
        due = [held for held in self._all() if now - held.held_since >= self._third]
        if not due:
            return
        with self._engine.connect() as connection:
            if self._extends_running is None:
                # With a snapshot older than the extension, the update of the position would fail.
                self._extends_running = connection.get_isolation_level() == "READ COMMITTED"
                connection.rollback()
            for held in due:
                if self._extends_running or held.started_at is None:
                    self._extend(connection, held)
        self._outage.back()

    def _extend(self, connection: Connection, held: Held) -> None:
        # Whoever has the lock is ending the reservation.
        if not held.lock.acquire(blocking=False):
            return
        try:
            if held.ended or held.lost:
                return
            with connection.begin():
                # Another transaction that holds the row must not keep the others from theirs.
                connection.execute(
                    text(f"SET LOCAL lock_timeout = {max(1, int(self._third * 500))}")
                )
                extended = Checkpoints(connection).extend_checkpoint_reservation(
                    held.reservation, self._settings.reservation_timeout
                )
            held.reservation = extended
            held.held_since = time.monotonic()
        except ReservationLost:
            held.lost = True
            held.cancel()
            logger.warning(
                "the reservation is lost while the handler runs", extra=fields(held.reservation)
            )
        except Exception as error:
            if is_outage(error):
                raise
            logger.warning(
                "a reservation could not be extended: %s", error, extra=fields(held.reservation)
            )
        finally:
            held.lock.release()

    # --- recovering

    def _recover(self) -> None:
        """End expired reservations, each counted as an attempt of a consumer that died or hung."""
        while not self._stopped.is_set():
            with self._engine.begin() as connection:
                expired = Checkpoints(connection).record_expired_checkpoint_reservations(
                    **outcomes.recovery(self._settings)
                )
            outcomes.log_expired(self._telemetry, expired)
            if len(expired) < outcomes.RECOVERED_AT_ONCE:
                return
