"""The consumer for asyncio: one task for each handler at once, one that keeps, one that listens."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from typing import Any, TypeAlias, Unpack

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from checkpoints.errors import ReservationLost
from checkpoints.records import Reservation
from checkpoints.runtime import _outcomes as outcomes
from checkpoints.runtime._async_held import AsyncHeld
from checkpoints.runtime._async_keeper import AsyncKeeper
from checkpoints.runtime._async_listener import AsyncListener
from checkpoints.runtime._async_worker import AsyncWorker
from checkpoints.runtime._driver import check_driver
from checkpoints.runtime._due_since import DueSince
from checkpoints.runtime._held import Bundle, next_bundle
from checkpoints.runtime._outage import Backoff, OutageLog, is_outage, is_passing
from checkpoints.runtime._outcomes import Goal
from checkpoints.runtime._tasks import uninterrupted, wait
from checkpoints.runtime.settings import (
    ConsumerOptions,
    ConsumerSettings,
    OutsideTransaction,
    checked_handlers,
    held_up_backoff,
)
from checkpoints.runtime.telemetry import Telemetry

__all__ = ["AsyncConsumer", "AsyncHandler"]

AsyncHandler: TypeAlias = Callable[[AsyncConnection, Reservation], Awaitable[int | None]]
"""As `Handler`, a coroutine function."""

# At the end: how long a handler may take to clean up after it was cancelled, and the keeper to end
# a statement: cancelled in the middle of connecting, it would leave the connection open.
_PATIENCE = 2.0
_LONGEST_END = 10.0


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
        self._names, self._handler_of = checked_handlers(handlers, blocking=False)
        self._telemetry = Telemetry(group)
        self._outage = OutageLog(group)
        self._worker = AsyncWorker(
            engine, self._own, self._settings, self._handler_of, self._telemetry, self._outage
        )
        self._keeper = self._new_keeper()
        self._due_since = DueSince()
        self._serving = False
        self._woken = asyncio.Event()
        self._waiting: deque[AsyncHeld] = deque()
        self._running: set[AsyncHeld] = set()
        self._busy: set[Bundle[AsyncHeld]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stops = 0

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

    def _new_keeper(self) -> AsyncKeeper:
        return AsyncKeeper(
            self._engine,
            self._own,
            self._settings,
            self._worker,
            self._telemetry,
            self._outage,
            self._replace,
        )

    async def _serve(self, goal: Goal) -> int:
        if self._serving:
            raise RuntimeError("this consumer runs already: wait for its end, or make another")
        self._serving = True
        self._worker.processed = 0
        # Of this loop, which may be another than the last time.
        self._woken = asyncio.Event()
        self._keeper = self._new_keeper()
        keeping = asyncio.create_task(self._keeper.run())
        beside = {keeping}

        def listen() -> None:
            if self._settings.listen and goal is Goal.NEVER:
                listener = AsyncListener(self._engine.sync_engine, self._settings.group, self.wake)
                beside.add(asyncio.create_task(listener.run()))

        try:
            try:
                await self._dispatch(goal, listen)
            except asyncio.CancelledError:
                self._stops = 2
                raise
            finally:
                await self._finish()
                self._keeper.stop()
                await asyncio.wait({keeping}, timeout=_LONGEST_END)
        finally:
            self._serving = False
            # What came too late for this run is not meant for the next.
            self._stops = 0
            for task in beside:
                task.cancel()
            # One that waits for a database that does not answer ends by itself, later.
            await asyncio.wait(beside, timeout=_PATIENCE)
        return self._worker.processed

    async def _dispatch(self, goal: Goal, listen: Callable[[], None]) -> None:
        backoff, held_up = Backoff(), held_up_backoff()
        by_itself: bool | None = None
        while not self._stops:
            seconds: float | None = None
            self._woken.clear()
            # Before reserving: what is done meanwhile may leave something for the next turn.
            was_running = bool(self._running)
            room = self._settings.room(len(self._waiting) + len(self._running))
            if room:
                try:
                    if by_itself is None:
                        async with self._engine.connect() as connection:
                            by_itself = await connection.run_sync(
                                outcomes.check_start, self._settings, self._names
                            )
                        listen()
                    reserving = asyncio.create_task(self._reserve(room, goal, by_itself))
                    reserved, due_in = await uninterrupted(reserving)
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
            await wait(self._woken, seconds)

    async def _reserve(
        self, limit: int, goal: Goal, by_itself: bool
    ) -> tuple[bool, timedelta | None]:
        """Reserve, to hand out or give back; when nothing is to be had, when the next is due."""
        async with self._engine.connect() as connection:
            reserved, due_in = await connection.run_sync(
                outcomes.reserve,
                self._settings,
                self._names,
                self._due_since,
                limit,
                goal,
                by_itself=by_itself,
            )
        self._telemetry.count("reserved", len(reserved))
        for reservation in reserved:
            held = AsyncHeld(reservation, self._settings.reservation_timeout)
            self._keeper.keep(held)
            self._waiting.append(held)
        return bool(reserved), due_in

    async def _settle(self) -> None:
        while (self._waiting or self._running) and not self._stops:
            self._woken.clear()
            await wait(self._woken, None)

    def _hand_out(self) -> None:
        while self._waiting and len(self._busy) < self._settings.concurrency:
            bundle = next_bundle(
                self._waiting,
                self._settings.concurrency - len(self._busy),
                self._settings,
                self._handler_of,
                self._keeper.forget,
            )
            if not bundle.helds:
                continue
            self._running |= bundle.left
            self._busy.add(bundle)
            task = asyncio.create_task(self._worker.process_all(bundle, self._on_done))
            for held in bundle.helds:
                held.worker = task
            self._tasks.add(task)
            task.add_done_callback(lambda task, bundle=bundle: self._on_ended(task, bundle))  # type: ignore[misc]

    def _on_done(self, held: AsyncHeld) -> None:
        """Its handler has come to an end, and so has all that followed."""
        bundle = held.bundle
        if bundle is not None and bundle in self._busy:
            self._forget([held], bundle)
            if not bundle.left:
                self._free(bundle)
            self._woken.set()

    def _on_ended(self, task: asyncio.Task[None], bundle: Bundle[AsyncHeld]) -> None:
        self._tasks.discard(task)
        # When it was cancelled from outside, some are left.
        if bundle in self._busy:
            self._forget(list(bundle.left), bundle)
            self._free(bundle)

    def _forget(self, helds: Iterable[AsyncHeld], bundle: Bundle[AsyncHeld]) -> None:
        for held in helds:
            self._running.discard(held)
            self._keeper.forget(held)
            bundle.left.discard(held)

    def _free(self, bundle: Bundle[AsyncHeld]) -> None:
        """Its slot is for the next."""
        self._busy.discard(bundle)
        bundle.part()
        if not self._stops:
            self._hand_out()
        self._woken.set()

    def _replace(self, abandoned: AsyncHeld) -> None:
        """Do without a task that hangs, and give the rest of what it had to another."""
        bundle = abandoned.bundle
        if bundle is None or bundle not in self._busy:
            return
        left = list(bundle.left)
        self._forget(left, bundle)
        for held in left:
            if not held.over:
                again = held.anew()
                self._keeper.keep(again)
                self._waiting.append(again)
        self._free(bundle)

    # --- ending

    async def _finish(self) -> None:
        """Give back what was not started, await what runs, and give that up when time is over."""
        try:
            await self._give_back_waiting()
            ends = time.monotonic() + self._settings.grace.total_seconds()
            while self._running and self._stops < 2 and (left := ends - time.monotonic()) > 0:
                self._woken.clear()
                await wait(self._woken, left)
                # What was with one that hangs waits again.
                await self._give_back_waiting()
        finally:
            running = [held for held in self._running if not held.over]
            tasks = _tasks_of(self._running)
            self._running.clear()
            self._busy.clear()
            for held in running:
                outcomes.log_given_up(self._settings.group, held.reservation)
                held.abandoned = True
            for task in _tasks_of(running):
                task.cancel()
            if tasks:
                await asyncio.wait(tasks, timeout=_PATIENCE)
            for held in running:
                held.sever()
            await self._give_back(running)

    async def _give_back_waiting(self) -> None:
        waiting = list(self._waiting)
        self._waiting.clear()
        await self._give_back(waiting)

    async def _give_back(self, helds: Iterable[AsyncHeld]) -> None:
        left = list(helds)
        for held in left:
            self._keeper.forget(held)
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

    async def _release(self, connection: AsyncConnection, held: AsyncHeld) -> None:
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


def _tasks_of(helds: Iterable[AsyncHeld]) -> set[asyncio.Task[Any]]:
    """The tasks that run their handlers, and those that see to them."""
    return {task for held in helds for task in (held.task, held.worker) if task is not None}
