"""Runs one handler: its transaction, its errors, and what to do after each."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Engine

from checkpoints.errors import ReservationLost
from checkpoints.executing import Checkpoints
from checkpoints.records import Reservation
from checkpoints.runtime import _outcomes as outcomes
from checkpoints.runtime._held import Held
from checkpoints.runtime._outage import Backoff, OutageLog, is_conflict, is_outage
from checkpoints.runtime.settings import ConsumerSettings, OutsideTransaction
from checkpoints.runtime.telemetry import Telemetry


class Worker:
    """What the worker threads of a consumer share."""

    def __init__(
        self,
        engine: Engine,
        settings: ConsumerSettings,
        handler_of: Callable[[str], Any],
        telemetry: Telemetry,
        outage: OutageLog,
    ) -> None:
        self._engine = engine
        self._settings = settings
        self._handler_of = handler_of
        self._telemetry = telemetry
        self._outage = outage

    def process(self, held: Held) -> None:
        """Run the handler to its end, whatever that is; it raises nothing."""
        held.started_at = time.monotonic()
        with self._telemetry.span(held.reservation):
            try:
                self._try(held)
            except ReservationLost:
                held.lost = True
                outcomes.log_lost(self._telemetry, held.reservation)
            except BaseException as error:  # SystemExit in a handler, too
                self.record_error(held, error)
            else:
                held.processed = True
                outcomes.log_processed(self._telemetry, held.reservation, held.running_for())
            finally:
                held.use(None)

    def _try(self, held: Held) -> None:
        backoff = Backoff()
        conflicts = 0
        handled = outcomes.Handled()
        while True:
            try:
                self._attempt(held, handled)
                return
            except ReservationLost:
                raise
            except Exception as error:
                held.check()
                if is_conflict(error) and conflicts < outcomes.CONFLICTS:
                    conflicts += 1
                    time.sleep(backoff.next() / 10)
                elif is_outage(error) and not handled.raised:
                    self._outage.away(error)
                    time.sleep(backoff.next())
                else:
                    raise

    def _attempt(self, held: Held, handled: outcomes.Handled) -> None:
        """One transaction: what the handler does, and the update of the position."""
        handler = self._handler_of(held.reservation.subscription_name)
        handled.raised = False
        if isinstance(handler, OutsideTransaction) and not handled.outside:
            handled.raised = True
            handled.position = handler.function(held.reservation)
            handled.raised = False
            # Once done it is not done again because the database went away after it.
            handled.outside = True
        with self._engine.connect() as connection:
            held.use(connection)
            if not handled.outside:
                self._run(handler, connection, held.reservation, handled)
            self._complete(connection, held, handled.position)

    def _run(
        self,
        handler: Callable[[Connection, Reservation], int | None],
        connection: Connection,
        reservation: Reservation,
        handled: outcomes.Handled,
    ) -> None:
        transaction = connection.begin()
        try:
            handled.position = handler(connection, reservation)
        except BaseException:
            # An error that it met on another connection, of its own, is its own.
            handled.raised = not connection.invalidated
            raise
        outcomes.check_transaction(reservation, is_active=transaction.is_active)

    def _complete(self, connection: Connection, held: Held, position: int | None) -> None:
        with held.lock:
            held.check()
            reservation = held.reservation
            Checkpoints(connection).update_checkpoint_position(
                reservation,
                reservation.stream_version if position is None else position,
                process_at=outcomes.pause(reservation, position, self._settings),
            )
            connection.commit()
            held.ended = True
        self._outage.back()

    def record_error(self, held: Held, error: BaseException) -> None:
        """End the reservation with an error: another attempt later, or failed."""
        failure = outcomes.Failure.of(held.reservation, error, self._settings.retry)
        try:
            with held.lock:
                held.check()
                with self._engine.begin() as connection:
                    Checkpoints(connection).record_checkpoint_error(
                        held.reservation,
                        held.reservation.stream_position,
                        status=failure.status,
                        retry_attempts=failure.attempt,
                        error=failure.description,
                        process_at=failure.delay,
                    )
                held.ended = True
        except ReservationLost:
            held.lost = True
        except Exception as unrecorded:
            outcomes.log_unrecorded(held.reservation, failure, unrecorded)
        else:
            outcomes.log_failure(self._telemetry, held.reservation, failure)
