"""Runs handlers: their transactions, their errors, and what to do after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sqlalchemy import Connection, Engine

from checkpoints.errors import ReservationLost, ReservationsLost
from checkpoints.runtime import _outcomes as outcomes
from checkpoints.runtime._held import Bundle, Held, locked
from checkpoints.runtime._outage import Backoff, OutageLog, is_outage
from checkpoints.runtime._outcomes import Attempt, Failure
from checkpoints.runtime.settings import ConsumerSettings, OutsideTransaction
from checkpoints.runtime.telemetry import Telemetry


class Worker:
    """What the worker threads of a consumer share.

    `engine` is the handlers'; `own` is for the consumer's own statements.
    """

    def __init__(
        self,
        engine: Engine,
        own: Engine,
        settings: ConsumerSettings,
        handler_of: Callable[[str], Any],
        telemetry: Telemetry,
        outage: OutageLog,
    ) -> None:
        self._engine = engine
        self._own = own
        self._settings = settings
        self._handler_of = handler_of
        self._telemetry = telemetry
        self._outage = outage

    def process(self, held: Held) -> None:
        """Run the handler to its end, whatever that is; it raises nothing."""
        held.started_at = time.monotonic()
        try:
            with self._telemetry.span(held.reservation):
                error = self._try(held)
                held.finished = True
                if error is None:
                    outcomes.log_processed(self._telemetry, self._settings.group, held)
                else:
                    self._fail(held, error)
        except ReservationLost:
            self.lose(held)
        except BaseException:
            outcomes.log_unexpected(self._settings.group, "a worker failed", held.reservation)
        finally:
            held.finished = True
            if not held.abandoned:
                held.end()

    def process_all(self, bundle: Bundle[Held]) -> Iterator[Sequence[Held]]:
        """Run the handlers of a bundle; those of it that are done, as soon as they are."""
        if len(bundle.helds) > 1 and self._process_together(bundle.helds):
            yield bundle.helds
            return
        for held in bundle.helds:
            if bundle.is_given_up:
                return
            # It may have been lost, or its error recorded, when it ran with the others.
            if not held.over:
                self.process(held)
            yield (held,)

    def _process_together(self, helds: Sequence[Held]) -> bool:
        """Run handlers one after the other, and commit for all or for none; whether for all."""
        running: Held | None = None
        try:
            with self._engine.connect() as connection:
                try:
                    transaction = connection.begin()
                    positions: list[int | None] = []
                    for held in helds:
                        held.use(connection)
                    for held in helds:
                        held.check()
                        if running is not None:
                            running.finished = True
                        running = held
                        held.started_at = time.monotonic()
                        handler = self._handler_of(held.reservation.subscription_name)
                        with self._telemetry.span(held.reservation):
                            positions.append(handler(connection, held.reservation))
                        outcomes.check_transaction(
                            held.reservation, is_active=transaction.is_active
                        )
                    self._complete_together(connection, helds, positions)
                finally:
                    for held in helds:
                        held.use(None)
        except BaseException as error:  # SystemExit in a handler, too
            try:
                self._take_apart(helds, running, error)
            except BaseException:
                outcomes.log_unexpected(self._settings.group, "a worker failed")
                if running is not None and not running.abandoned:
                    running.end()
                for held in helds:
                    held.start_anew()
            return False
        for held in helds:
            held.finished = True
            outcomes.log_processed(self._telemetry, self._settings.group, held)
        return True

    def _take_apart(
        self, helds: Sequence[Held], running: Held | None, error: BaseException
    ) -> None:
        """All was rolled back, and each is to run alone.

        The handler that the error is of meets it again then. But one that took too long must not
        take as long once more.
        """
        if isinstance(error, ReservationsLost):
            outcomes.lose_some(self._telemetry, self._settings.group, helds, error)
        elif running is not None and running.timed_out and not running.abandoned:
            try:
                self._fail(running, error)
            except ReservationLost:
                self.lose(running)
        for held in helds:
            held.start_anew()

    def _complete_together(
        self, connection: Connection, helds: Sequence[Held], positions: Sequence[int | None]
    ) -> None:
        with locked(helds):
            for held in helds:
                held.check()
            outcomes.update_many(connection, helds, positions, self._settings)
            connection.commit()
            for held in helds:
                held.processed = True
                held.end()
        self._outage.back()

    def lose(self, held: Held) -> None:
        """The token is gone, or was ended here: then that was told already."""
        outcomes.lose(self._telemetry, self._settings.group, held)

    def _try(self, held: Held) -> BaseException | None:
        """Run the handler until the position is updated; None, or the error of the handler."""
        handler = self._handler_of(held.reservation.subscription_name)
        attempt = Attempt()
        while True:
            attempt.in_handler = attempt.connected = False
            broken = False
            try:
                if isinstance(handler, OutsideTransaction) and not attempt.done_outside:
                    attempt.in_handler = True
                    attempt.position = handler.function(held.reservation)
                    attempt.in_handler = False
                    attempt.done_outside = True
                with self._engine.connect() as connection:
                    attempt.connected = True
                    held.use(connection)
                    try:
                        if not attempt.done_outside:
                            self._run(handler, connection, held, attempt)
                        self._complete(connection, held, attempt.position)
                    finally:
                        broken = connection.invalidated
                        held.use(None)
                return None
            except BaseException as error:  # SystemExit in a handler, too
                if isinstance(error, ReservationLost) and not attempt.in_handler:
                    raise
                held.check()
                seconds = attempt.repeat_in(
                    error, outside=isinstance(handler, OutsideTransaction), broken=broken
                )
                if held.timed_out or seconds is None:
                    return error
                if is_outage(error):
                    self._outage.away(error)
            held.wait(seconds)

    def _run(self, handler: Any, connection: Connection, held: Held, attempt: Attempt) -> None:
        transaction = connection.begin()
        attempt.in_handler = True
        attempt.position = handler(connection, held.reservation)
        outcomes.check_transaction(held.reservation, is_active=transaction.is_active)
        attempt.in_handler = False

    def _complete(self, connection: Connection, held: Held, position: int | None) -> None:
        with held.lock:
            held.check()
            outcomes.update(connection, held.reservation, position, self._settings)
            connection.commit()
            held.processed = True
            held.end()
        self._outage.back()

    def _fail(self, held: Held, error: BaseException) -> None:
        """Record the error: waits for the database, but no longer than the token is of use."""
        if held.timed_out:
            error = outcomes.timed_out(held.reservation, self._settings, error)
        failure = Failure.of(held.reservation, error, self._settings.retry)
        backoff = Backoff()
        while not self._record(held, failure, wait=True):
            held.wait(backoff.next())

    def give_up(self, held: Held) -> bool:
        """Record that a handler that nobody can stop took too long; False: not now."""
        try:
            error = outcomes.timed_out(held.reservation, self._settings)
            failure = Failure.of(held.reservation, error, self._settings.retry)
            return self._record(held, failure, wait=False)
        except ReservationLost:
            self.lose(held)
            return True
        except Exception:
            # As of a retry policy's own: it must not keep the keeper from the others.
            outcomes.log_unexpected(self._settings.group, "giving up failed", held.reservation)
            held.end()
            return True

    def _record(self, held: Held, failure: Failure, *, wait: bool) -> bool:
        """End the reservation with an error: another attempt later, or failed; False: not now."""
        failed: Exception | None = None
        try:
            with self._own.connect() as connection:
                if not held.lock.acquire(blocking=wait):
                    return False
                try:
                    held.check()
                    with connection.begin():
                        outcomes.record(connection, held.reservation, failure, self._settings)
                    held.end()
                finally:
                    held.lock.release()
        except ReservationLost:
            raise
        except Exception as error:
            failed = error
        return outcomes.after_recording(
            self._telemetry, self._outage, self._settings.group, held, failure, failed
        )
