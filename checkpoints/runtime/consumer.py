"""The consumer: reserves checkpoints, runs handlers, and says how it went.

Three kinds of threads. The one that calls `run()` dispatches: it reserves, hands out, and ends. One
for each handler at once works. One keeps: it extends reservations, stops handlers that take too
long, and recovers what other consumers left. They talk to the dispatcher by events alone.
"""

from __future__ import annotations

import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from enum import Enum, auto
from types import FrameType
from typing import Any, TypeAlias

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from checkpoints.errors import ReservationLost
from checkpoints.executing import Checkpoints
from checkpoints.records import Reservation
from checkpoints.runtime import _outcomes as outcomes
from checkpoints.runtime._held import Held
from checkpoints.runtime._keeper import Keeper
from checkpoints.runtime._outage import Backoff, OutageLog, is_outage
from checkpoints.runtime._outcomes import Goal
from checkpoints.runtime._worker import Worker
from checkpoints.runtime.listening import Listener
from checkpoints.runtime.settings import ConsumerSettings, OutsideTransaction, checked_handlers
from checkpoints.runtime.telemetry import Telemetry

__all__ = ["Consumer", "Handler"]

Handler: TypeAlias = Callable[[Connection, Reservation], int | None]
"""Applies the messages from `stream_position` to `stream_version`; answers the new position.

None: all of them, up to `stream_version`. It runs in the transaction that updates the position; it
must not commit or roll back.
"""

_LONG = 3600.0


class _Event(Enum):
    WOKEN = auto()
    STOP = auto()


class Consumer:
    """Processes checkpoints of a group: a handler, and the new position, in one transaction.

    `handlers` is a function for all subscriptions of the group, or a mapping of the names of
    subscriptions to functions; then only those subscriptions are served. A function is a `Handler`
    or an `OutsideTransaction`. Further arguments are those of `ConsumerSettings`.

    A handler that raises is rolled back, and tried again as `retry` says; other streams go on. A
    handler whose reservation is lost is interrupted where it waits for the database, and rolled
    back in any case. When the database is away the consumer waits for it.

    The engine's pool should hold `concurrency` + 2 connections. With an isolation level of
    REPEATABLE READ or SERIALIZABLE the reservation of a running handler cannot be extended, so let
    `reservation_timeout` be longer than handlers take.
    """

    def __init__(
        self,
        engine: Engine,
        group: str,
        handlers: Handler | OutsideTransaction | Mapping[str, Handler | OutsideTransaction],
        **settings: Any,
    ) -> None:
        self._engine = engine
        self._settings = ConsumerSettings(group=group, **settings)
        by_name, for_all = checked_handlers(handlers)
        self._names = None if by_name is None else list(by_name)
        self._telemetry = Telemetry(group)
        self._outage = OutageLog(group)
        # Reentrant, so that a signal handler may put into it.
        self._events: queue.SimpleQueue[_Event | Held] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[Held | None] = queue.SimpleQueue()
        self._waiting: deque[Held] = deque()
        self._running: dict[int, Held] = {}
        self._stops = 0
        self._processed = 0
        self._worker = Worker(
            engine,
            self._settings,
            (lambda name: by_name[name]) if by_name is not None else (lambda _: for_all),
            self._telemetry,
            self._outage,
        )

    def run(self, *, handle_signals: bool = True) -> None:
        """Process until stopped: by `stop()`, or, in the main thread, by SIGTERM or SIGINT.

        Then it reserves no more, gives back what was not started, and lets running handlers finish
        within `grace`. A second stop or signal gives those up at once.
        """
        if handle_signals and threading.current_thread() is threading.main_thread():
            with self._signals():
                self._serve(Goal.NEVER)
        else:
            self._serve(Goal.NEVER)

    def run_once(self) -> int:
        """Process one batch of what is due now; how many checkpoints were processed."""
        return self._serve(Goal.ONE_BATCH)

    def drain(self) -> int:
        """Process until nothing is due; how many checkpoints were processed.

        What is due later, a retry such as, is left.
        """
        return self._serve(Goal.DRAINED)

    def stop(self) -> None:
        """End `run()` as SIGTERM does; from any thread, or a signal handler. Twice: at once."""
        self._events.put(_Event.STOP)

    def wake(self) -> None:
        """Look for work now, as after a notification; from any thread."""
        self._events.put(_Event.WOKEN)

    # --- dispatching, in the thread of the caller

    def _serve(self, goal: Goal) -> int:
        self._stops = self._processed = 0
        threads = [self._start_worker() for _ in range(self._settings.concurrency)]
        keeper = Keeper(
            self._engine,
            self._settings,
            self._worker,
            self._telemetry,
            self._outage,
            self._events.put,
        )
        keeper.start()
        listener = None
        if self._settings.listen and goal is Goal.NEVER:
            listener = Listener(self._engine, self._settings.group, self.wake)
            listener.start()
        try:
            self._dispatch(goal, keeper)
            self._finish(keeper)
        finally:
            if listener is not None:
                listener.stop()
            keeper.stop()
            for _ in threads:
                self._jobs.put(None)
        keeper.join()
        if listener is not None:
            listener.join()
        return self._processed

    def _start_worker(self) -> threading.Thread:
        thread = threading.Thread(
            target=self._work, name=f"checkpoints-worker-{self._settings.group}", daemon=True
        )
        thread.start()
        return thread

    def _work(self) -> None:
        while (held := self._jobs.get()) is not None:
            self._worker.process(held)
            with held.lock:
                held.finished = True
                replaced = held.abandoned
            self._events.put(held)
            if replaced:
                return

    def _dispatch(self, goal: Goal, keeper: Keeper) -> None:
        backoff = Backoff()
        while not self._stops:
            seconds = _LONG
            room = self._settings.room(len(self._waiting) + len(self._running))
            if room:
                try:
                    reserved, due_in = self._reserve(room)
                except Exception as error:
                    if not is_outage(error):
                        raise
                    self._outage.away(error)
                    seconds = backoff.next()
                else:
                    self._outage.back()
                    backoff.reset()
                    for reservation in reserved:
                        held = Held(reservation)
                        keeper.keep(held)
                        self._waiting.append(held)
                    self._hand_out()
                    if goal is Goal.ONE_BATCH:
                        self._settle()
                        return
                    if not reserved:
                        if goal is Goal.DRAINED and not self._running:
                            return
                        seconds = self._settings.idle_seconds(due_in)
                    elif self._settings.room(len(self._waiting) + len(self._running)):
                        seconds = 0
            self._await_events(seconds)

    def _settle(self) -> None:
        while (self._waiting or self._running) and not self._stops:
            self._await_events(_LONG)

    def _reserve(self, limit: int) -> tuple[list[Reservation], timedelta | None]:
        """Reserve; when nothing is to be had, say when the next is due."""
        with self._engine.begin() as connection:
            checkpoints = Checkpoints(connection)
            reserved = checkpoints.reserve_next_available_checkpoint(
                self._settings.group,
                self._settings.reservation_timeout,
                replay_mode=self._settings.replay_mode,
                subscription_names=self._names,
                limit=limit,
            )
            due_in = None
            if not reserved:
                due_in = checkpoints.get_next_process_at(
                    self._settings.group,
                    replay_mode=self._settings.replay_mode,
                    subscription_names=self._names,
                )
        self._telemetry.count("reserved", len(reserved))
        return reserved, due_in

    def _hand_out(self) -> None:
        while self._waiting and len(self._running) < self._settings.concurrency:
            held = self._waiting.popleft()
            if held.lost:
                continue
            self._running[held.reservation.id] = held
            self._jobs.put(held)

    def _await_events(self, seconds: float) -> None:
        """Wait for one event, then take all there are."""
        with suppress(queue.Empty):
            self._take(self._events.get(timeout=seconds) if seconds else self._events.get_nowait())
            while True:
                self._take(self._events.get_nowait())

    def _take(self, event: _Event | Held) -> None:
        if event is _Event.STOP:
            self._stops += 1
        elif isinstance(event, Held) and self._running.get(event.reservation.id) is event:
            del self._running[event.reservation.id]
            self._processed += event.processed
            if event.abandoned:
                self._start_worker()
            if not self._stops:
                self._hand_out()

    # --- ending

    def _finish(self, keeper: Keeper) -> None:
        """Give back what was not started, await what runs, and give that up when time is over."""
        self._give_back(self._waiting, keeper)
        self._waiting.clear()
        ends = time.monotonic() + self._settings.grace.total_seconds()
        while self._running and self._stops < 2 and (left := ends - time.monotonic()) > 0:
            self._await_events(left)
        for held in self._running.values():
            held.abandoned = True
            held.cancel()
        self._give_back(self._running.values(), keeper)
        self._running.clear()

    def _give_back(self, helds: Any, keeper: Keeper) -> None:
        for held in list(helds):
            keeper.forget(held)
            try:
                with held.lock, self._engine.begin() as connection:
                    if not (held.lost or held.ended):
                        held.lost = True
                        Checkpoints(connection).release_checkpoint_reservation(held.reservation)
            except ReservationLost:
                pass
            except SQLAlchemyError as error:
                outcomes.log_not_given_back(held.reservation, error)

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def on_signal(_number: int, _frame: FrameType | None) -> None:
            self.stop()

        before = {
            number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
