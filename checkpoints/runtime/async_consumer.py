"""The consumer for asyncio: one task for each handler at once, one that keeps, one that listens."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeAlias, TypeVar, Unpack

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.util import greenlet_spawn

from checkpoints.errors import ReservationLost
from checkpoints.records import Reservation
from checkpoints.runtime import _outcomes as outcomes
from checkpoints.runtime._driver import check_driver
from checkpoints.runtime._held import Holding, sever
from checkpoints.runtime._outage import Backoff, OutageLog, is_outage, is_passing
from checkpoints.runtime._outcomes import Attempt, Failure, Goal
from checkpoints.runtime.listening import listen_sql, open_connection
from checkpoints.runtime.settings import (
    ConsumerOptions,
    ConsumerSettings,
    OutsideTransaction,
    checked_handlers,
    held_up_backoff,
    jittered,
)
from checkpoints.runtime.telemetry import Telemetry, logger

__all__ = ["AsyncConsumer", "AsyncHandler"]

AsyncHandler: TypeAlias = Callable[[AsyncConnection, Reservation], Awaitable[int | None]]
"""As `Handler`, a coroutine function."""

_T = TypeVar("_T")

# At the end: how long a handler may take to clean up after it was cancelled, and the keeper to end
# a statement: cancelled in the middle of connecting, it would leave the connection open.
_PATIENCE = 2.0
_LONGEST_END = 10.0


async def _uninterrupted(task: asyncio.Task[_T]) -> _T:
    """Await it to its end, also when cancelled: cut in two, nobody would know how it ended."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        # Also so that asyncio does not say that nobody looked at it.
        task.exception()
        raise cancelled
    return task.result()


async def _wait(event: asyncio.Event, seconds: float | None) -> bool:
    """Wait for the event; whether it was set in time."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


class _Held(Holding):
    """Held by an asyncio consumer; its lock is held by whoever uses or changes the token."""

    def __init__(self, reservation: Reservation, settings: ConsumerSettings) -> None:
        super().__init__(reservation, settings.reservation_timeout)
        self.lock = asyncio.Lock()
        self.task: asyncio.Task[None] | None = None

        self.connection: Connection | None = None
        """That the handler works on now."""

    def sever(self) -> None:
        """Break the connection of a handler that nobody waits for; not while it is at its end."""
        if not self.lock.locked():
            connection, self.connection = self.connection, None
            sever(connection)

    def cancel(self) -> None:
        """Cancel its handler, if it was started."""
        if self.task is not None:
            self.task.cancel()


class AsyncConsumer:
    """`Consumer` for asyncio: handlers are coroutine functions, and run in the caller's loop.

    A handler whose reservation is lost, or that takes too long, is cancelled; when it goes on in
    spite of that, another takes its slot. An `OutsideTransaction` wraps a coroutine function of the
    reservation. A handler that blocks the loop blocks the consumer, too: its reservations expire.

    All methods are to be called in the loop's thread.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        group: str,
        handlers: AsyncHandler
        | OutsideTransaction[Awaitable[int | None]]
        | Mapping[str, AsyncHandler | OutsideTransaction[Awaitable[int | None]]],
        **settings: Unpack[ConsumerOptions],
    ) -> None:
        if not isinstance(engine, AsyncEngine):
            raise TypeError(f"engine must be an AsyncEngine, not {engine!r}")
        check_driver(engine.sync_engine)
        self._engine = engine
        # Its own statements are one a transaction, and gain nothing by a stricter level.
        self._own = engine.execution_options(isolation_level="READ COMMITTED")
        self._settings = ConsumerSettings(group=group, **settings)
        if self._settings.handlers_per_transaction != 1:
            raise ValueError(
                "handlers_per_transaction must be 1 for an AsyncConsumer, which runs its handlers "
                f"at once, not {self._settings.handlers_per_transaction!r}"
            )
        self._names, self._handler_of = checked_handlers(handlers, blocking=False)
        self._telemetry = Telemetry(group)
        self._due_since = outcomes.DueSince()
        self._outage = OutageLog(group)
        self._third = self._settings.reservation_timeout.total_seconds() / 3
        self._extends_running: bool | None = None
        self._serving = False
        self._woken = asyncio.Event()
        self._waiting: deque[_Held] = deque()
        self._running: set[_Held] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stops = 0
        self._processed = 0

    async def run(self, *, handle_signals: bool = True) -> None:
        """Process until stopped: by `stop()`, SIGTERM or SIGINT; as `Consumer.run`.

        When its task is cancelled it gives up at once what runs, and gives back all that it holds.
        """
        with self._signals() if handle_signals else nullcontext():
            await self._serve(Goal.NEVER)

    async def run_once(self) -> int:
        """Process one batch of what is due now; how many checkpoints were processed."""
        return await self._serve(Goal.ONE_BATCH)

    async def drain(self) -> int:
        """Process until nothing is due; how many were processed; as `Consumer.drain`."""
        return await self._serve(Goal.DRAINED)

    def stop(self) -> None:
        """End `run()` as SIGTERM does. Twice: at once.

        While it does not run: the next `run()`, `run_once()` or `drain()` ends before it begins.
        """
        self._stops += 1
        self._woken.set()

    def wake(self) -> None:
        """Look for work now, as after a notification."""
        self._woken.set()

    @contextmanager
    def _signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        handled = []
        for number in (signal.SIGTERM, signal.SIGINT):
            # Not outside the main thread, and not on every platform.
            with suppress(NotImplementedError, RuntimeError, ValueError):
                before = signal.getsignal(number)
                loop.add_signal_handler(number, self.stop)
                handled.append((number, before))
        try:
            yield
        finally:
            for number, before in handled:
                loop.remove_signal_handler(number)
                # asyncio.run() has a handler of its own for SIGINT.
                if before is not None:
                    signal.signal(number, before)

    # --- dispatching

    async def _serve(self, goal: Goal) -> int:
        if self._serving:
            raise RuntimeError("this consumer runs already: wait for its end, or make another")
        self._serving = True
        self._processed = 0
        # Of this loop, which may be another than the last time.
        self._woken = asyncio.Event()
        ending = asyncio.Event()
        keeping = asyncio.create_task(self._keep(ending))
        beside = {keeping}

        def listen() -> None:
            if self._settings.listen and goal is Goal.NEVER:
                beside.add(asyncio.create_task(self._listen()))

        try:
            try:
                await self._dispatch(goal, listen)
            except asyncio.CancelledError:
                self._stops = 2
                raise
            finally:
                await self._finish()
                ending.set()
                await asyncio.wait({keeping}, timeout=_LONGEST_END)
        finally:
            self._serving = False
            # What came too late for this run is not meant for the next.
            self._stops = 0
            for task in beside:
                task.cancel()
            # One that waits for a database that does not answer ends by itself, later.
            await asyncio.wait(beside, timeout=_PATIENCE)
        return self._processed

    async def _dispatch(self, goal: Goal, listen: Callable[[], None]) -> None:
        backoff, held_up = Backoff(), held_up_backoff()
        checked = False
        while not self._stops:
            seconds: float | None = None
            self._woken.clear()
            # Before reserving: what is done meanwhile may leave something for the next turn.
            was_running = bool(self._running)
            room = self._settings.room(len(self._waiting) + len(self._running))
            if room:
                try:
                    if not checked:
                        async with self._engine.connect() as connection:
                            await connection.run_sync(
                                outcomes.check_start, self._settings, self._names
                            )
                        checked = True
                        listen()
                    reserving = asyncio.create_task(self._reserve(room))
                    reserved, due_in = await _uninterrupted(reserving)
                except Exception as error:
                    if not is_passing(error):
                        raise
                    self._outage.away(error)
                    seconds = backoff.next()
                else:
                    self._outage.back()
                    backoff.reset()
                    self._hand_out()
                    if goal is Goal.ONE_BATCH:
                        await self._settle()
                        return
                    if not reserved:
                        if goal is Goal.DRAINED and not was_running:
                            return
                        seconds = self._settings.idle_seconds(due_in, held_up)
                    elif self._settings.room(len(self._waiting) + len(self._running)):
                        continue
            await _wait(self._woken, seconds)

    async def _reserve(self, limit: int) -> tuple[bool, timedelta | None]:
        """Reserve, to hand out or give back; when nothing is to be had, when the next is due."""
        async with self._own.begin() as connection:
            reserved, due_in = await connection.run_sync(
                outcomes.reserve, self._settings, self._names, self._due_since, limit
            )
        self._telemetry.count("reserved", len(reserved))
        self._waiting.extend(_Held(one, self._settings) for one in reserved)
        return bool(reserved), due_in

    async def _settle(self) -> None:
        while (self._waiting or self._running) and not self._stops:
            self._woken.clear()
            await _wait(self._woken, None)

    def _hand_out(self) -> None:
        while self._waiting and len(self._running) < self._settings.concurrency:
            held = self._waiting.popleft()
            if held.over:
                continue
            self._running.add(held)
            held.task = asyncio.create_task(self._process(held))
            self._tasks.add(held.task)
            held.task.add_done_callback(lambda task, held=held: self._on_done(task, held))  # type: ignore[misc]

    def _on_done(self, task: asyncio.Task[None], held: _Held) -> None:
        self._tasks.discard(task)
        self._free(held)

    def _free(self, held: _Held) -> None:
        """Its slot is for the next."""
        if held in self._running:
            self._running.discard(held)
            if not self._stops:
                self._hand_out()
            self._woken.set()

    # --- one checkpoint

    async def _process(self, held: _Held) -> None:
        held.started_at = time.monotonic()
        try:
            with self._telemetry.span(held.reservation):
                error = await self._try(held)
                held.finished = True
                if error is not None:
                    await self._fail(held, error)
        except ReservationLost:
            self._lose(held)
        except asyncio.CancelledError:
            # The consumer gave it up, and has told so; or else the loop ends.
            if not (held.over or held.abandoned):
                raise
        except Exception:
            outcomes.log_unexpected(self._settings.group, "a handler's task failed")
        finally:
            if held.processed:
                self._processed += 1
                outcomes.log_processed(self._telemetry, self._settings.group, held)
            held.finished = True

    def _lose(self, held: _Held) -> None:
        """The token is gone, or was ended here: then that was told already."""
        if not (held.over or held.abandoned):
            held.end()
            outcomes.log_lost(self._telemetry, self._settings.group, held.reservation)

    async def _try(self, held: _Held) -> BaseException | None:
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

    def _is_cancelled(self, held: _Held) -> bool:
        """Whether it was cancelled from outside: not by the handler, nor for taking too long."""
        task = held.task
        if task is None or not task.cancelling():
            return False
        return held.over or held.abandoned or not held.timed_out

    async def _run(
        self, handler: Any, connection: AsyncConnection, held: _Held, attempt: Attempt
    ) -> None:
        transaction = await connection.begin()
        attempt.in_handler = True
        attempt.position = await handler(connection, held.reservation)
        outcomes.check_transaction(held.reservation, is_active=transaction.is_active)
        attempt.in_handler = False

    async def _complete(
        self, connection: AsyncConnection, held: _Held, position: int | None
    ) -> None:
        async with held.lock:
            held.check()
            await connection.run_sync(outcomes.update, held.reservation, position, self._settings)
            await _uninterrupted(asyncio.create_task(self._commit(connection, held)))
        self._outage.back()

    async def _commit(self, connection: AsyncConnection, held: _Held) -> None:
        await connection.commit()
        held.processed = True
        held.end()

    async def _fail(self, held: _Held, error: BaseException) -> None:
        """Record the error: waits for the database, but no longer than the token is of use."""
        if held.timed_out:
            error = outcomes.timed_out(held.reservation, self._settings, error)
        failure = Failure.of(held.reservation, error, self._settings.retry)
        backoff = Backoff()
        while not await self._record(held, failure):
            await asyncio.sleep(backoff.next())

    async def _give_up(self, held: _Held) -> bool:
        """Record that a handler that nobody can stop took too long; False: not now."""
        error = outcomes.timed_out(held.reservation, self._settings)
        failure = Failure.of(held.reservation, error, self._settings.retry)
        try:
            return not held.lock.locked() and await self._record(held, failure)
        except ReservationLost:
            self._lose(held)
            return True

    async def _record(self, held: _Held, failure: Failure) -> bool:
        """End the reservation with an error: another attempt later, or failed; False: not now."""
        group = self._settings.group
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
            if is_passing(error):
                if is_outage(error):
                    self._outage.away(error)
                return False
            held.end()
            outcomes.log_unrecorded(group, held.reservation, failure, error)
        else:
            outcomes.log_failure(self._telemetry, group, held.reservation, failure)
        return True

    # --- keeping

    async def _keep(self, ending: asyncio.Event) -> None:
        """Look after what is held, recover and end replays until the end, and once more then."""
        recover_at = time.monotonic()
        while True:
            last = ending.is_set()
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
            await _wait(ending, self._settings.keeping_seconds(recover_at - time.monotonic()))

    async def _end_hanging(self) -> None:
        """Cancel handlers that take too long; free the slot of one that goes on regardless."""
        for held in list(self._running):
            if not held.runs_longer_than(self._settings.handler_timeout):
                continue
            if not held.timed_out:
                held.timed_out = True
                held.cancel()
                continue
            # It goes on in spite of that.
            held.sever()
            if held.over or await self._give_up(held):
                held.abandoned = True
                self._free(held)

    async def _extend_due(self) -> None:
        now = time.monotonic()
        due = [
            held
            for held in [*self._running, *self._waiting]
            if not held.over and now - held.extended_at >= self._third
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

    async def _extend(self, connection: AsyncConnection, held: _Held) -> None:
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
            self._lose(held)
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

    # --- listening

    async def _listen(self) -> None:
        """Wake up when work may have become ready; without a connection, polling serves."""
        backoff = Backoff()
        while True:
            try:
                await self._listen_once(backoff)
            except Exception as error:
                with suppress(Exception):
                    logger.debug(
                        "listening was interrupted: %s",
                        error,
                        extra={"group": self._settings.group},
                    )
                await asyncio.sleep(backoff.next())

    async def _listen_once(self, backoff: Backoff) -> None:
        opening = asyncio.create_task(greenlet_spawn(open_connection, self._engine.sync_engine))
        try:
            # Interrupted in the middle, the connection would be left open.
            connection = await _uninterrupted(opening)
        except asyncio.CancelledError:
            if not opening.cancelled() and opening.exception() is None:
                await opening.result().close()
            raise
        try:
            await connection.rollback()
            await connection.set_autocommit(True)
            await connection.execute(listen_sql(self._engine.sync_engine))
            backoff.reset()
            # What was notified before LISTEN took effect is not told again.
            self.wake()
            async for notification in connection.notifies():
                if notification.payload == self._settings.group:
                    self.wake()
        finally:
            # As it was taken: an application's creator may have taken it from a pool of its own,
            # and in autocommit the next handler's writes and position would commit apart.
            with suppress(Exception):
                async with asyncio.timeout(_PATIENCE / 2):
                    await connection.execute("UNLISTEN *")
            with suppress(Exception):
                await connection.set_autocommit(False)
            await connection.close()

    # --- ending

    async def _finish(self) -> None:
        """Give back what was not started, await what runs, and give that up when time is over."""
        try:
            await self._give_back(self._waiting)
            self._waiting.clear()
            ends = time.monotonic() + self._settings.grace.total_seconds()
            while self._running and self._stops < 2 and (left := ends - time.monotonic()) > 0:
                self._woken.clear()
                await _wait(self._woken, left)
        finally:
            running = [held for held in self._running if not held.over]
            tasks = {held.task for held in self._running if held.task is not None}
            self._running.clear()
            for held in running:
                outcomes.log_given_up(self._settings.group, held.reservation)
                held.abandoned = True
                held.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=_PATIENCE)
            for held in running:
                held.sever()
            await self._give_back(running)

    async def _give_back(self, helds: Iterable[_Held]) -> None:
        left = list(helds)
        # Twice, for a connection that the pool had kept may have broken meanwhile.
        for is_last in (False, True):
            if not left:
                return
            try:
                async with self._own.connect() as connection:
                    while left:
                        await self._release(connection, left[-1])
                        left.pop()
            except SQLAlchemyError as error:
                if is_last:
                    for held in left:
                        held.end()
                        outcomes.log_not_given_back(self._settings.group, held.reservation, error)

    async def _release(self, connection: AsyncConnection, held: _Held) -> None:
        try:
            async with asyncio.timeout(_PATIENCE):
                await held.lock.acquire()
        except TimeoutError:
            outcomes.log_not_given_back(self._settings.group, held.reservation, None)
            return
        try:
            if not held.over:
                async with connection.begin():
                    await connection.run_sync(outcomes.release, held.reservation, self._settings)
                held.end()
        except ReservationLost:
            held.end()
        except SQLAlchemyError as error:
            if is_outage(error):
                raise
            held.end()
            outcomes.log_not_given_back(self._settings.group, held.reservation, error)
        finally:
            held.lock.release()
