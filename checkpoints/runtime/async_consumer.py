"""The consumer for asyncio: one task for each handler at once, one that keeps, one that listens."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any, TypeAlias

from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from checkpoints.errors import ReservationLost
from checkpoints.executing import AsyncCheckpoints
from checkpoints.records import Reservation
from checkpoints.runtime import _outcomes as outcomes
from checkpoints.runtime._outage import Backoff, OutageLog, is_conflict, is_outage
from checkpoints.runtime._outcomes import Goal
from checkpoints.runtime.listening import listen_sql
from checkpoints.runtime.settings import (
    ConsumerSettings,
    OutsideTransaction,
    checked_handlers,
    jittered,
)
from checkpoints.runtime.telemetry import Telemetry, fields, logger

__all__ = ["AsyncConsumer", "AsyncHandler"]

AsyncHandler: TypeAlias = Callable[[AsyncConnection, Reservation], Awaitable[int | None]]
"""As `Handler`, a coroutine function."""


async def _uninterrupted(coroutine: Coroutine[Any, Any, None]) -> None:
    """Await it to its end, also when cancelled: cut in two, nobody would know how it ended."""
    task = asyncio.create_task(coroutine)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


class _Held:
    """A reservation in this process, and the task that processes it."""

    def __init__(self, reservation: Reservation) -> None:
        self.reservation = reservation
        # Held by whoever uses or changes the token.
        self.lock = asyncio.Lock()
        self.held_since = time.monotonic()
        self.started_at: float | None = None
        self.task: asyncio.Task[None] | None = None
        self.lost = False
        self.ended = False
        self.timed_out = False

    def check(self) -> None:
        """Whether the token may still be used."""
        if self.lost or self.ended:
            raise ReservationLost(self.reservation.id, self.reservation.reserved_until)

    def running_for(self) -> timedelta:
        """How long its handler has run."""
        started = self.started_at
        return timedelta(seconds=0 if started is None else time.monotonic() - started)


class AsyncConsumer:
    """`Consumer` for asyncio: handlers are coroutine functions, and run in the caller's loop.

    A handler whose reservation is lost, or that takes too long, is cancelled. An
    `OutsideTransaction` wraps a coroutine function of the reservation.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        group: str,
        handlers: AsyncHandler
        | OutsideTransaction
        | Mapping[str, AsyncHandler | OutsideTransaction],
        **settings: Any,
    ) -> None:
        self._engine = engine
        self._settings = ConsumerSettings(group=group, **settings)
        self._by_name, self._for_all = checked_handlers(handlers)
        self._names = None if self._by_name is None else list(self._by_name)
        self._telemetry = Telemetry(group)
        self._outage = OutageLog(group)
        self._waiting: list[_Held] = []
        self._running: dict[int, _Held] = {}
        self._woken = asyncio.Event()
        self._stops = 0
        self._processed = 0

    async def run(self, *, handle_signals: bool = True) -> None:
        """Process until stopped: by `stop()`, SIGTERM or SIGINT; as `Consumer.run`.

        When its task is cancelled it gives up at once what runs, and gives back all that it holds.
        """
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGTERM, signal.SIGINT) if handle_signals else ()
        handled = []
        for number in numbers:
            # Not outside the main thread, and not on every platform.
            with suppress(NotImplementedError, RuntimeError, ValueError):
                loop.add_signal_handler(number, self.stop)
                handled.append(number)
        try:
            await self._serve(Goal.NEVER)
        finally:
            for number in handled:
                loop.remove_signal_handler(number)

    async def run_once(self) -> int:
        """Process one batch of what is due now; how many checkpoints were processed."""
        return await self._serve(Goal.ONE_BATCH)

    async def drain(self) -> int:
        """Process until nothing is due; how many checkpoints were processed."""
        return await self._serve(Goal.DRAINED)

    def stop(self) -> None:
        """End `run()` as SIGTERM does; from the loop's thread. Twice: at once."""
        self._stops += 1
        self._woken.set()

    def wake(self) -> None:
        """Look for work now, as after a notification; from the loop's thread."""
        self._woken.set()

    # --- dispatching

    async def _serve(self, goal: Goal) -> int:
        self._stops = self._processed = 0
        beside = [asyncio.create_task(self._keep())]
        if self._settings.listen and goal is Goal.NEVER:
            beside.append(asyncio.create_task(self._listen()))
        try:
            await self._dispatch(goal)
        except asyncio.CancelledError:
            self._stops = 2
            raise
        finally:
            try:
                await self._finish()
            finally:
                for task in beside:
                    task.cancel()
                await asyncio.gather(*beside, return_exceptions=True)
        return self._processed

    async def _dispatch(self, goal: Goal) -> None:
        backoff = Backoff()
        while not self._stops:
            seconds: float | None = None
            self._woken.clear()
            room = self._settings.room(len(self._waiting) + len(self._running))
            if room:
                try:
                    reserved, due_in = await self._reserve(room)
                except Exception as error:
                    if not is_outage(error):
                        raise
                    self._outage.away(error)
                    seconds = backoff.next()
                else:
                    self._outage.back()
                    backoff.reset()
                    self._waiting.extend(_Held(reservation) for reservation in reserved)
                    self._hand_out()
                    if goal is Goal.ONE_BATCH:
                        await self._settle()
                        return
                    if not reserved:
                        if goal is Goal.DRAINED and not self._running:
                            return
                        seconds = self._settings.idle_seconds(due_in)
                    elif self._settings.room(len(self._waiting) + len(self._running)):
                        continue
            await self._await_wake(seconds)

    async def _settle(self) -> None:
        while (self._waiting or self._running) and not self._stops:
            await self._await_wake(None)
            self._woken.clear()

    async def _await_wake(self, seconds: float | None) -> None:
        with suppress(TimeoutError):
            await asyncio.wait_for(self._woken.wait(), seconds)

    async def _reserve(self, limit: int) -> tuple[list[Reservation], timedelta | None]:
        """Reserve; when nothing is to be had, say when the next is due."""
        async with self._engine.begin() as connection:
            checkpoints = AsyncCheckpoints(connection)
            reserved = await checkpoints.reserve_next_available_checkpoint(
                self._settings.group,
                self._settings.reservation_timeout,
                replay_mode=self._settings.replay_mode,
                subscription_names=self._names,
                limit=limit,
            )
            due_in = None
            if not reserved:
                due_in = await checkpoints.get_next_process_at(
                    self._settings.group,
                    replay_mode=self._settings.replay_mode,
                    subscription_names=self._names,
                )
        self._telemetry.count("reserved", len(reserved))
        return reserved, due_in

    def _hand_out(self) -> None:
        while self._waiting and len(self._running) < self._settings.concurrency:
            held = self._waiting.pop(0)
            if held.lost:
                continue
            self._running[held.reservation.id] = held
            held.task = asyncio.create_task(self._process(held))
            held.task.add_done_callback(lambda _, held=held: self._on_done(held))  # type: ignore[misc]

    def _on_done(self, held: _Held) -> None:
        if self._running.get(held.reservation.id) is held:
            del self._running[held.reservation.id]
        if not self._stops:
            self._hand_out()
        self._woken.set()

    # --- one checkpoint

    async def _process(self, held: _Held) -> None:
        held.started_at = time.monotonic()
        with self._telemetry.span(held.reservation):
            try:
                await self._try(held)
                self._processed += 1
                outcomes.log_processed(self._telemetry, held.reservation, held.running_for())
            except ReservationLost:
                held.lost = True
                outcomes.log_lost(self._telemetry, held.reservation)
            except asyncio.CancelledError:
                if held.ended:
                    self._processed += 1
                    outcomes.log_processed(self._telemetry, held.reservation, held.running_for())
                elif held.timed_out:
                    await self._record_error(
                        held, outcomes.timed_out(held.reservation, self._settings.handler_timeout)
                    )
                elif held.lost:
                    outcomes.log_lost(self._telemetry, held.reservation)
                else:
                    raise
            except Exception as error:
                await self._record_error(held, error)

    async def _try(self, held: _Held) -> None:
        backoff = Backoff()
        conflicts = 0
        handled = outcomes.Handled()
        while True:
            try:
                await self._attempt(held, handled)
                return
            except ReservationLost:
                raise
            except Exception as error:
                held.check()
                if is_conflict(error) and conflicts < outcomes.CONFLICTS:
                    conflicts += 1
                    await asyncio.sleep(backoff.next() / 10)
                elif is_outage(error) and not handled.raised:
                    self._outage.away(error)
                    await asyncio.sleep(backoff.next())
                else:
                    raise

    async def _attempt(self, held: _Held, handled: outcomes.Handled) -> None:
        """One transaction: what the handler does, and the update of the position."""
        name = held.reservation.subscription_name
        handler = self._for_all if self._by_name is None else self._by_name[name]
        handled.raised = False
        if isinstance(handler, OutsideTransaction) and not handled.outside:
            handled.raised = True
            handled.position = await handler.function(held.reservation)
            handled.raised = False
            # Once done it is not done again because the database went away after it.
            handled.outside = True
        async with self._engine.connect() as connection:
            if not handled.outside:
                transaction = await connection.begin()
                try:
                    handled.position = await handler(connection, held.reservation)
                except BaseException:
                    # An error that it met on another connection, of its own, is its own.
                    handled.raised = not connection.invalidated
                    raise
                outcomes.check_transaction(held.reservation, is_active=transaction.is_active)
            await _uninterrupted(self._complete(connection, held, handled.position))

    async def _complete(
        self, connection: AsyncConnection, held: _Held, position: int | None
    ) -> None:
        async with held.lock:
            held.check()
            reservation = held.reservation
            await AsyncCheckpoints(connection).update_checkpoint_position(
                reservation,
                reservation.stream_version if position is None else position,
                process_at=outcomes.pause(reservation, position, self._settings),
            )
            await connection.commit()
            held.ended = True
        self._outage.back()

    async def _record_error(self, held: _Held, error: BaseException) -> None:
        """End the reservation with an error: another attempt later, or failed."""
        failure = outcomes.Failure.of(held.reservation, error, self._settings.retry)
        try:
            async with held.lock:
                held.check()
                async with self._engine.begin() as connection:
                    await AsyncCheckpoints(connection).record_checkpoint_error(
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

    # --- keeping

    async def _keep(self) -> None:
        recover_at = time.monotonic()
        third = self._settings.reservation_timeout.total_seconds() / 3
        while True:
            try:
                self._end_hanging()
                await self._extend_due(third)
                if time.monotonic() >= recover_at:
                    recover_at = time.monotonic() + jittered(self._settings.recover_interval)
                    await self._recover()
            except Exception as error:
                if is_outage(error):
                    self._outage.away(error)
                else:
                    logger.exception("keeping failed", extra={"group": self._settings.group})
            await asyncio.sleep(self._settings.keeping_seconds(recover_at - time.monotonic()))

    def _held(self) -> list[_Held]:
        held = [*self._running.values(), *self._waiting]
        return [one for one in held if not (one.ended or one.lost)]

    def _end_hanging(self) -> None:
        longest = self._settings.handler_timeout
        for held in self._held():
            if longest is not None and held.running_for() > longest and not held.lock.locked():
                held.timed_out = True
                if held.task is not None:
                    held.task.cancel()

    async def _extend_due(self, third: float) -> None:
        now = time.monotonic()
        due = [held for held in self._held() if now - held.held_since >= third]
        if not due:
            return
        async with self._engine.connect() as connection:
            extends_running = await connection.get_isolation_level() == "READ COMMITTED"
            await connection.rollback()
            for held in due:
                # With a snapshot older than the extension, the update of the position would fail.
                # Whoever has the lock is ending the reservation.
                if (extends_running or held.started_at is None) and not held.lock.locked():
                    async with held.lock:
                        await self._extend(connection, held, third)
        self._outage.back()

    async def _extend(self, connection: AsyncConnection, held: _Held, third: float) -> None:
        if held.ended or held.lost:
            return
        try:
            async with connection.begin():
                # Another transaction that holds the row must not keep the others from theirs.
                milliseconds = max(1, int(third * 500))
                await connection.execute(text(f"SET LOCAL lock_timeout = {milliseconds}"))
                extended = await AsyncCheckpoints(connection).extend_checkpoint_reservation(
                    held.reservation, self._settings.reservation_timeout
                )
            held.reservation = extended
            held.held_since = time.monotonic()
        except ReservationLost:
            held.lost = True
            if held.task is not None:
                held.task.cancel()
        except Exception as error:
            if is_outage(error):
                raise
            logger.warning(
                "a reservation could not be extended: %s", error, extra=fields(held.reservation)
            )

    async def _recover(self) -> None:
        """End expired reservations, each counted as an attempt of a consumer that died or hung."""
        while True:
            async with self._engine.begin() as connection:
                expired = await AsyncCheckpoints(connection).record_expired_checkpoint_reservations(
                    **outcomes.recovery(self._settings)
                )
            outcomes.log_expired(self._telemetry, expired)
            if len(expired) < outcomes.RECOVERED_AT_ONCE:
                return

    # --- listening

    async def _listen(self) -> None:
        """Wake up when work may have become ready; without a connection, polling serves."""
        backoff = Backoff()
        while True:
            try:
                await self._listen_once(backoff)
            except Exception as error:
                logger.debug(
                    "listening was interrupted: %s", error, extra={"group": self._settings.group}
                )
                await asyncio.sleep(backoff.next())

    async def _listen_once(self, backoff: Backoff) -> None:
        # Taken out of the pool, so that it does not count against its size.
        pooled = await self._engine.raw_connection()
        connection: Any = pooled.driver_connection
        pooled.detach()
        try:
            await connection.rollback()
            await connection.set_autocommit(True)
            await connection.execute(listen_sql(self._engine.sync_engine))
            backoff.reset()
            self.wake()
            async for notification in connection.notifies():
                if notification.payload == self._settings.group:
                    self.wake()
        finally:
            await connection.close()

    # --- ending

    async def _finish(self) -> None:
        """Give back what was not started, await what runs, and give that up when time is over."""
        waiting, self._waiting = self._waiting, []
        await self._give_back(waiting)
        ends = time.monotonic() + self._settings.grace.total_seconds()
        while self._running and self._stops < 2 and (left := ends - time.monotonic()) > 0:
            self._woken.clear()
            await self._await_wake(left)
        running = list(self._running.values())
        for held in running:
            held.lost = True
            if held.task is not None:
                held.task.cancel()
        await asyncio.gather(
            *(held.task for held in running if held.task is not None), return_exceptions=True
        )
        await self._give_back(held for held in running if not held.ended)

    async def _give_back(self, helds: Iterable[_Held]) -> None:
        for held in helds:
            try:
                async with held.lock, self._engine.begin() as connection:
                    await AsyncCheckpoints(connection).release_checkpoint_reservation(
                        held.reservation
                    )
                held.lost = True
            except ReservationLost:
                held.lost = True
            except SQLAlchemyError as error:
                outcomes.log_not_given_back(held.reservation, error)
