"""Runs coroutine functions as handlers: their transactions, their errors, and what to do after."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from checkpoints.errors import ReservationLost, ReservationsLost
from checkpoints.runtime import _outcomes as outcomes
from checkpoints.runtime._async_held import AsyncHeld
from checkpoints.runtime._held import Bundle
from checkpoints.runtime._outage import Backoff, OutageLog, is_outage
from checkpoints.runtime._outcomes import Attempt, Failure
from checkpoints.runtime._tasks import uninterrupted
from checkpoints.runtime.settings import ConsumerSettings, OutsideTransaction
from checkpoints.runtime.telemetry import Telemetry

_T = TypeVar("_T")


class AsyncWorker:
    """What the tasks that run handlers share.

    `engine` is the handlers'; `own` is for the consumer's own statements.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        own: AsyncEngine,
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
        self.processed = 0
        """How many positions were updated."""

    async def process_all(
        self, bundle: Bundle[AsyncHeld], on_done: Callable[[AsyncHeld], None]
    ) -> None:
        """Run the handlers of a bundle; `on_done` hears of each of it, when it is done."""
        if len(bundle.helds) == 1:
            (alone,) = bundle.helds
            alone.task = asyncio.current_task()
            await self.process(alone)
            on_done(alone)
            return
        done = await self._process_together(bundle.helds)
        for held in bundle.helds:
            if not done:
                if bundle.is_given_up:
                    return
                # It may have been lost, or its error recorded, when it ran with the others.
                if not held.over:
                    await _in_a_task([held], self.process(held))
            on_done(held)

    async def process(self, held: AsyncHeld) -> None:
        """Run the handler to its end, whatever that is; only a cancellation goes through."""
        held.started_at = time.monotonic()
        try:
            with self._telemetry.span(held.reservation):
                error = await self._try(held)
                held.finished = True
                if error is not None:
                    await self._fail(held, error)
        except ReservationLost:
            self.lose(held)
        except asyncio.CancelledError:
            # The consumer gave it up, and has told so; or else the loop ends.
            if not (held.over or held.abandoned):
                raise
        except Exception:
            outcomes.log_unexpected(self._settings.group, "a handler's task failed")
        finally:
            if held.processed:
                self.processed += 1
                outcomes.log_processed(self._telemetry, self._settings.group, held)
            held.finished = True

    async def _process_together(self, helds: Sequence[AsyncHeld]) -> bool:
        """Run handlers one after the other, and commit for all or for none; whether for all."""
        failed = await _in_a_task(helds, self._try_together(helds))
        if failed is None:
            return True
        running, error = failed
        try:
            await self._take_apart(helds, running, error)
        except Exception:
            outcomes.log_unexpected(self._settings.group, "a handler's task failed")
            if running is not None and not running.abandoned:
                running.end()
        finally:
            for held in helds:
                held.start_anew()
        return False

    async def _try_together(
        self, helds: Sequence[AsyncHeld]
    ) -> tuple[AsyncHeld | None, BaseException] | None:
        """None, or the error, and whose handler ran then."""
        running: AsyncHeld | None = None
        try:
            async with self._engine.connect() as connection:
                try:
                    transaction = await connection.begin()
                    positions: list[int | None] = []
                    for held in helds:
                        held.connection = connection.sync_connection
                    for held in helds:
                        held.check()
                        if running is not None:
                            running.finished = True
                        running = held
                        held.started_at = time.monotonic()
                        handler = self._handler_of(held.reservation.subscription_name)
                        with self._telemetry.span(held.reservation):
                            positions.append(await handler(connection, held.reservation))
                        outcomes.check_transaction(
                            held.reservation, is_active=transaction.is_active
                        )
                        _check_cancelled(held, connection)
                    await self._complete_together(connection, helds, positions)
                finally:
                    for held in helds:
                        held.connection = None
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            if running is not None:
                # Before its error is recorded, which is no hanging.
                running.finished = True
            if not helds[0].processed:
                if isinstance(error, asyncio.CancelledError) and _are_cancelled(helds, running):
                    raise
                return running, error
        for held in helds:
            held.finished = True
            self.processed += 1
            outcomes.log_processed(self._telemetry, self._settings.group, held)
        return None

    async def _take_apart(
        self, helds: Sequence[AsyncHeld], running: AsyncHeld | None, error: BaseException
    ) -> None:
        """All was rolled back, and each is to run alone.

        The handler that the error is of meets it again then. But one that took too long must not
        take as long once more.
        """
        if isinstance(error, ReservationsLost):
            outcomes.lose_some(self._telemetry, self._settings.group, helds, error)
        elif running is not None and running.timed_out and not running.abandoned:
            try:
                await self._fail(running, error)
            except ReservationLost:
                self.lose(running)

    async def _complete_together(
        self,
        connection: AsyncConnection,
        helds: Sequence[AsyncHeld],
        positions: Sequence[int | None],
    ) -> None:
        async with AsyncExitStack() as locks:
            for held in helds:
                await locks.enter_async_context(held.lock)
            for held in helds:
                held.check()
            await connection.run_sync(outcomes.update_many, helds, positions, self._settings)
            await uninterrupted(asyncio.create_task(self._commit(connection, helds)))
        self._outage.back()

    def lose(self, held: AsyncHeld) -> None:
        """The token is gone, or was ended here: then that was told already."""
        outcomes.lose(self._telemetry, self._settings.group, held)

    async def _try(self, held: AsyncHeld) -> BaseException | None:
        """Run the handler until the position is updated; None, or the error of the handler."""
        handler = self._handler_of(held.reservation.subscription_name)
        attempt = Attempt()
        seconds: float | None = None
        while True:
            attempt.in_handler = attempt.connected = False
            broken = False
            try:
                if seconds is not None:
                    await asyncio.sleep(seconds)
                if isinstance(handler, OutsideTransaction) and not attempt.done_outside:
                    attempt.in_handler = True
                    attempt.position = await handler.function(held.reservation)
                    attempt.in_handler = False
                    attempt.done_outside = True
                async with self._engine.connect() as connection:
                    attempt.connected = True
                    held.connection = connection.sync_connection
                    try:
                        if not attempt.done_outside:
                            await self._run(handler, connection, held, attempt)
                        await self._complete(connection, held, attempt.position)
                    finally:
                        broken = connection.invalidated
                        held.connection = None
                return None
            except KeyboardInterrupt:
                # In the loop's thread it is no error of the handler, but for the program.
                raise
            except BaseException as error:
                if held.processed:
                    return None
                if isinstance(error, ReservationLost) and not attempt.in_handler:
                    raise
                if isinstance(error, asyncio.CancelledError) and self._is_cancelled(held):
                    raise
                held.check()
                seconds = attempt.repeat_in(
                    error, outside=isinstance(handler, OutsideTransaction), broken=broken
                )
                if held.timed_out or seconds is None:
                    return error
                if is_outage(error):
                    self._outage.away(error)

    def _is_cancelled(self, held: AsyncHeld) -> bool:
        """Whether it was cancelled from outside: not by the handler, nor for taking too long."""
        task = held.task
        if task is None or not task.cancelling():
            return False
        return held.over or held.abandoned or not held.timed_out

    async def _run(
        self, handler: Any, connection: AsyncConnection, held: AsyncHeld, attempt: Attempt
    ) -> None:
        transaction = await connection.begin()
        attempt.in_handler = True
        attempt.position = await handler(connection, held.reservation)
        outcomes.check_transaction(held.reservation, is_active=transaction.is_active)
        attempt.in_handler = False

    async def _complete(
        self, connection: AsyncConnection, held: AsyncHeld, position: int | None
    ) -> None:
        async with held.lock:
            held.check()
            await connection.run_sync(outcomes.update, held.reservation, position, self._settings)
            await uninterrupted(asyncio.create_task(self._commit(connection, [held])))
        self._outage.back()

    async def _commit(self, connection: AsyncConnection, helds: Sequence[AsyncHeld]) -> None:
        await connection.commit()
        for held in helds:
            held.processed = True
            held.end()

    async def _fail(self, held: AsyncHeld, error: BaseException) -> None:
        """Record the error: waits for the database, but no longer than the token is of use."""
        if held.timed_out:
            error = outcomes.timed_out(held.reservation, self._settings, error)
        failure = Failure.of(held.reservation, error, self._settings.retry)
        backoff = Backoff()
        while not await self._record(held, failure):
            await asyncio.sleep(backoff.next())

    async def give_up(self, held: AsyncHeld) -> bool:
        """Record that a handler that nobody can stop took too long; False: not now."""
        try:
            error = outcomes.timed_out(held.reservation, self._settings)
            failure = Failure.of(held.reservation, error, self._settings.retry)
            return not held.lock.locked() and await self._record(held, failure)
        except ReservationLost:
            self.lose(held)
            return True
        except Exception:
            # As of a retry policy's own: it must not keep the keeper from the others.
            outcomes.log_unexpected(self._settings.group, "giving up failed", held.reservation)
            held.end()
            return True

    async def _record(self, held: AsyncHeld, failure: Failure) -> bool:
        """End the reservation with an error: another attempt later, or failed; False: not now."""
        failed: Exception | None = None
        try:
            async with self._own.connect() as connection, held.lock:
                held.check()
                async with connection.begin():
                    await connection.run_sync(
                        outcomes.record, held.reservation, failure, self._settings
                    )
                held.end()
        except ReservationLost:
            raise
        except Exception as error:
            failed = error
        return outcomes.after_recording(
            self._telemetry, self._outage, self._settings.group, held, failure, failed
        )


async def _in_a_task(helds: Sequence[AsyncHeld], work: Coroutine[Any, Any, _T]) -> _T:
    """Do it in a task of its own: who cancels that for these handlers ends nothing else."""
    task = asyncio.create_task(work)
    for held in helds:
        held.task = task
    try:
        return await uninterrupted(task)
    finally:
        for held in helds:
            held.task = None


def _check_cancelled(held: AsyncHeld, connection: AsyncConnection) -> None:
    """After a handler that ends well: it may have been cancelled all the same."""
    if held.task is not None and held.task.cancelling():
        if not held.timed_out or held.over or held.abandoned or connection.invalidated:
            raise asyncio.CancelledError
        # It alone was told to end, and the next must not take that for its own.
        held.task.uncancel()


def _are_cancelled(helds: Sequence[AsyncHeld], running: AsyncHeld | None) -> bool:
    """Whether they were cancelled from outside: not by a handler, nor for one of them."""
    task = helds[0].task
    if task is None or not task.cancelling():
        return False
    if running is not None and running.timed_out:
        return False
    return not any(held.over or held.abandoned for held in helds)
