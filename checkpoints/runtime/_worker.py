"""Runs one handler: its transaction, its errors, and what to do after each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection, Engine

from checkpoints.errors import ReservationLost
from checkpoints.executing import Checkpoints
from checkpoints.records import CheckpointPosition, CheckpointStatus, Reservation
from checkpoints.runtime._held import Held
from checkpoints.runtime._outage import Backoff, OutageLog, is_conflict, is_outage
from checkpoints.runtime.retry import describe_error
from checkpoints.runtime.settings import ConsumerSettings, OutsideTransaction
from checkpoints.runtime.telemetry import Telemetry, fields, logger

# After so many conflicts with other transactions in a row, one counts as an error of the handler.
_CONFLICTS = 20


@dataclass
class _Handled:
    """What the handler answered, over the attempts of one run."""

    position: int | None = None
    raised: bool = False
    outside: bool = False


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
                self._telemetry.count("lost", 1, held.reservation.subscription_name)
                logger.warning(
                    "the reservation was lost; what the handler wrote is rolled back",
                    extra=fields(held.reservation),
                )
            except BaseException as error:  # SystemExit in a handler, too
                self.record_error(held, error)
            finally:
                held.use(None)

    def _try(self, held: Held) -> None:
        backoff = Backoff()
        conflicts = 0
        handled = _Handled()
        while True:
            try:
                self._attempt(held, handled)
                return
            except ReservationLost:
                raise
            except Exception as error:
                if held.lost or held.ended:
                    reservation = held.reservation
                    raise ReservationLost(reservation.id, reservation.reserved_until) from error
                if is_conflict(error) and conflicts < _CONFLICTS:
                    conflicts += 1
                    time.sleep(backoff.next() / 10)
                elif is_outage(error) and not handled.raised:
                    self._outage.away(error)
                    time.sleep(backoff.next())
                else:
                    raise

    def _attempt(self, held: Held, handled: _Handled) -> None:
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
                self._run(handler, connection, held, handled)
            self._complete(connection, held, handled.position)

    def _run(
        self,
        handler: Callable[[Connection, Reservation], int | None],
        connection: Connection,
        held: Held,
        handled: _Handled,
    ) -> None:
        transaction = connection.begin()
        try:
            handled.position = handler(connection, held.reservation)
        except BaseException:
            # An error that it met on another connection, of its own, is its own.
            handled.raised = not connection.invalidated
            raise
        if not transaction.is_active:
            raise RuntimeError(
                f"the handler of {held.reservation.subscription_name!r} ended the transaction that "
                "it was given; it must leave that to the consumer"
            )

    def _complete(self, connection: Connection, held: Held, position: int | None) -> None:
        reservation = held.reservation
        if position is None:
            position = reservation.stream_version
        with held.lock:
            if held.lost or held.ended:
                raise ReservationLost(reservation.id, reservation.reserved_until)
            # Without progress it would come back at once, for ever.
            stuck = position <= reservation.stream_position < reservation.stream_version
            updated = Checkpoints(connection).update_checkpoint_position(
                held.reservation,
                position,
                process_at=self._settings.poll_interval if stuck else None,
            )
            connection.commit()
            held.ended = True
        self._outage.back()
        self._done(held, updated)

    def _done(self, held: Held, updated: CheckpointPosition) -> None:
        held.processed = True
        reservation = held.reservation
        took = held.running_for()
        self._telemetry.done(reservation, took)
        logger.debug(
            "processed up to %d in %.3f s",
            updated.stream_position,
            took.total_seconds(),
            extra=fields(reservation),
        )

    def record_error(self, held: Held, error: BaseException) -> None:
        """End the reservation with an error: another attempt later, or failed."""
        reservation = held.reservation
        attempt = reservation.retry_attempts + 1
        delay: timedelta | None = self._settings.retry.delay_after(attempt)
        status = CheckpointStatus.RETRY
        if attempt >= self._settings.retry.attempts_for(error):
            status, delay = CheckpointStatus.FAILED, None
        try:
            with held.lock, self._engine.begin() as connection:
                if held.lost or held.ended:
                    return
                Checkpoints(connection).record_checkpoint_error(
                    held.reservation,
                    reservation.stream_position,
                    status=status,
                    retry_attempts=attempt,
                    error=describe_error(error),
                    process_at=delay,
                )
                held.ended = True
        except ReservationLost:
            held.lost = True
            return
        except Exception as failure:
            held.ended = False
            logger.error(
                "an error could not be recorded, and its reservation will expire: %s",
                failure,
                exc_info=error,
                extra=fields(reservation, attempt=attempt),
            )
            return
        if status is CheckpointStatus.FAILED:
            self._telemetry.count("failed", 1, reservation.subscription_name)
            logger.error(
                "failed after %d attempts",
                attempt,
                exc_info=error,
                extra=fields(reservation, attempt=attempt),
            )
        else:
            self._telemetry.count("retried", 1, reservation.subscription_name)
            logger.warning(
                "attempt %d failed: %s",
                attempt,
                error,
                exc_info=error,
                extra=fields(reservation, attempt=attempt),
            )
