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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from enum import Enum, auto
from types import FrameType
from typing import TypeAlias, Unpack

from sqlalchemy import Connection, Engine
from sqlalchemy.exc import SQLAlchemyError

from checkpoints.errors import ReservationLost
from checkpoints.records import Reservation
from checkpoints.runtime import _outcomes as outcomes
from checkpoints.runtime._driver import check_driver
from checkpoints.runtime._due_since import DueSince
from checkpoints.runtime._held import Bundle, Held, next_bundle
from checkpoints.runtime._keeper import Keeper
from checkpoints.runtime._outage import Backoff, OutageLog, is_outage, is_passing
from checkpoints.runtime._outcomes import Goal
from checkpoints.runtime._worker import Worker
from checkpoints.runtime.listening import Listener
from checkpoints.runtime.settings import (
    ConsumerOptions,
    ConsumerSettings,
    OutsideTransaction,
    checked_handlers,
    held_up_backoff,
)
from checkpoints.runtime.telemetry import Telemetry

__all__ = ["Consumer", "Handler"]

Handler: TypeAlias = Callable[[Connection, Reservation], int | None]
"""Applies the messages from `stream_position` to `stream_version`; answers the new position.

None: all of them, up to `stream_version`. It runs in the transaction that updates the position; it
must not commit or roll back.
"""

_LONG = 3600.0
_SIGNALS_NOTICED = 0.5

# At the end: how long to wait for a handler that is just ending its reservation, and for threads
# that are in the middle of a statement.
_PATIENCE = 2.0
_LONGEST_END = 10.0


class _Event(Enum):
    WOKEN = auto()
    STOP = auto()


class Consumer:
    """Processes checkpoints of a group: a handler, and the new position, in one transaction.

    `handlers` is a function for all subscriptions of the group, or a mapping of the names of
    subscriptions to functions; then only those subscriptions are served. A function is a `Handler`
    or an `OutsideTransaction`. Further arguments are those of `ConsumerSettings`.

    What was due longest comes first, whatever its subscription: a busy subscription does not starve
    a quiet one, whose checkpoints wait as long as any that became due when they did.

    A handler that raises is rolled back, and tried again as `retry` says; other streams go on. A
    handler whose reservation is lost, or that takes too long, is interrupted where it waits for the
    database, and rolled back in any case; one that waits for something else cannot be interrupted,
    and goes on in its thread while another takes its slot, but its connection is broken. When the
    database is away the consumer waits for it.

    It also recovers what consumers that are gone left, each expiry counted as an attempt, and makes
    subscriptions of the group active again whose replay has nothing left to do.

    A handler may be run again in the same attempt, after a conflict with another transaction
    (SQLSTATE 40001, 40P01) or when its connection broke; what it wrote before is rolled back.

    The engine's pool should hold `concurrency` + 2 connections; fewer work, and wait for each
    other. A connection that listens is made besides. An engine of another driver than psycopg is
    refused, by ValueError. With an isolation level of REPEATABLE READ or
    SERIALIZABLE the reservation of a running handler cannot be extended, so let
    `reservation_timeout` be longer than handlers take. AUTOCOMMIT is refused.
    """

    def __init__(
        self,
        engine: Engine,
        group: str,
        handlers: Handler
        | OutsideTransaction[int | None]
        | Mapping[str, Handler | OutsideTransaction[int | None]],
        **settings: Unpack[ConsumerOptions],
    ) -> None:
        if not isinstance(engine, Engine):
            raise TypeError(f"engine must be an Engine, not {engine!r}")
        check_driver(engine)
        self._engine = engine
        # Its own statements are one a transaction, and gain nothing by a stricter level.
        self._own = engine.execution_options(isolation_level="READ COMMITTED")
        self._settings = ConsumerSettings(group=group, **settings)
        self._names, self._handler_of = checked_handlers(handlers, blocking=True)
        self._telemetry = Telemetry(group)
        self._outage = OutageLog(group)
        self._worker = Worker(
            engine, self._own, self._settings, self._handler_of, self._telemetry, self._outage
        )
        self._serving = threading.Lock()
        # Reentrant, so that a signal handler may put into it.
        self._events: queue.SimpleQueue[_Event | Sequence[Held]] = queue.SimpleQueue()
        self._jobs: queue.SimpleQueue[Bundle[Held] | None] = queue.SimpleQueue()
        self._threads: set[threading.Thread] = set()
        self._waiting: deque[Held] = deque()
        # By identity: a checkpoint may be reserved again before it is known here that it was done.
        self._running: set[Held] = set()
        self._busy = 0
        self._due_since = DueSince()
        self._stops = 0
        self._processed = 0

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

        What is due later, a retry such as, is left, and so is what other consumers hold.
        """
        return self._serve(Goal.DRAINED)

    def stop(self) -> None:
        """End `run()` as SIGTERM does; from any thread, or a signal handler. Twice: at once.

        While it does not run: the next `run()`, `run_once()` or `drain()` ends before it begins.
        """
        self._events.put(_Event.STOP)

    def wake(self) -> None:
        """Look for work now, as after a notification; from any thread."""
        self._events.put(_Event.WOKEN)

    # --- dispatching, in the thread of the caller

    def _serve(self, goal: Goal) -> int:
        if not self._serving.acquire(blocking=False):
            raise RuntimeError(
                "this consumer runs already: wait for its end, or make another for this thread"
            )
        try:
            return self._serve_alone(goal)
        finally:
            self._serving.release()

    def _serve_alone(self, goal: Goal) -> int:
        self._stops = self._processed = self._busy = 0
        self._jobs = queue.SimpleQueue()
        self._threads = set()
        keeper = Keeper(
            self._engine,
            self._own,
            self._settings,
            self._worker,
            self._telemetry,
            self._outage,
            self._events.put,
        )
        beside: list[Keeper | Listener] = []
        try:
            # A stop that came before.
            self._await_events(0, keeper)
            keeper.start()
            beside.append(keeper)

            def listen() -> None:
                if self._settings.listen and goal is Goal.NEVER:
                    listener = Listener(self._engine, self._settings.group, self.wake)
                    listener.start()
                    beside.append(listener)

            try:
                self._dispatch(goal, keeper, listen)
            finally:
                self._finish(keeper)
        finally:
            for thread in beside:
                thread.stop()
            self._jobs.put(None)
            # One that waits for a database that does not answer ends by itself, later.
            ends = time.monotonic() + _LONGEST_END
            for one in (*beside, *self._threads):
                one.join(max(0.0, ends - time.monotonic()))
            # What came too late for this run is not meant for the next.
            with suppress(queue.Empty):
                while True:
                    self._events.get_nowait()
        return self._processed

    def _start_worker(self) -> None:
        thread = threading.Thread(
            target=self._work,
            args=(self._jobs,),
            name=f"checkpoints-worker-{self._settings.group}",
            daemon=True,
        )
        thread.start()
        self._threads.add(thread)

    def _work(self, jobs: queue.SimpleQueue[Bundle[Held] | None]) -> None:
        while (bundle := jobs.get()) is not None:
            if not self._work_on(bundle):
                return
            # Not kept in memory while there is nothing to do.
            del bundle
        # For the next of them.
        jobs.put(None)

    def _work_on(self, bundle: Bundle[Held]) -> bool:
        """Process it; whether this thread may go on with the next."""
        for held in bundle.helds:
            held.worker = threading.current_thread()
        for done in self._worker.process_all(bundle):
            self._events.put(done)
        return not bundle.is_given_up

    def _dispatch(self, goal: Goal, keeper: Keeper, listen: Callable[[], None]) -> None:
        backoff, held_up = Backoff(), held_up_backoff()
        by_itself: bool | None = None
        while not self._stops:
            seconds = _LONG
            room = self._settings.room(len(self._waiting) + len(self._running))
            if room:
                try:
                    if by_itself is None:
                        with self._engine.connect() as connection:
                            by_itself = outcomes.check_start(
                                connection, self._settings, self._names
                            )
                        listen()
                    with self._engine.connect() as connection:
                        reserved, due_in = outcomes.reserve(
                            connection,
                            self._settings,
                            self._names,
                            self._due_since,
                            room,
                            goal,
                            by_itself=by_itself,
                        )
                except Exception as error:
                    if not is_passing(error):
                        raise
                    self._outage.away(error)
                    seconds = backoff.next()
                else:
                    self._outage.back()
                    backoff.reset()
                    self._take_over(reserved, keeper)
                    if goal is Goal.ONE_BATCH:
                        while (self._waiting or self._running) and not self._stops:
                            self._await_events(_LONG, keeper)
                        return
                    if not reserved:
                        if goal is Goal.DRAINED and not self._running:
                            return
                        seconds = self._settings.idle_seconds(due_in, held_up)
                    elif self._settings.room(len(self._waiting) + len(self._running)):
                        seconds = 0
            self._await_events(seconds, keeper)

    def _take_over(self, reserved: list[Reservation], keeper: Keeper) -> None:
        self._telemetry.count("reserved", len(reserved))
        timeout = self._settings.reservation_timeout
        helds = [Held(reservation, timeout) for reservation in reserved]
        keeper.keep(*helds)
        self._waiting += helds
        self._hand_out(keeper)

    def _hand_out(self, keeper: Keeper) -> None:
        while self._waiting and self._busy < self._settings.concurrency:
            bundle = next_bundle(
                self._waiting,
                self._settings.concurrency - self._busy,
                self._settings,
                self._handler_of,
                keeper.forget,
            )
            if not bundle.helds:
                continue
            self._running |= bundle.left
            self._busy += 1
            if len(self._threads) < self._busy:
                self._start_worker()
            self._jobs.put(bundle)

    def _await_events(self, seconds: float, keeper: Keeper) -> None:
        """Wait for one event, then take all there are."""
        with suppress(queue.Empty):
            event = self._next_event(seconds)
            while True:
                self._take(event, keeper)
                event = self._events.get_nowait()

    def _next_event(self, seconds: float) -> _Event | Sequence[Held]:
        ends = time.monotonic() + seconds
        while (left := ends - time.monotonic()) > _SIGNALS_NOTICED:
            # A signal that comes just before the wait begins does not end it, and Python calls its
            # handler only after.
            with suppress(queue.Empty):
                return self._events.get(timeout=_SIGNALS_NOTICED)
        return self._events.get(timeout=left) if left > 0 else self._events.get_nowait()

    def _take(self, event: _Event | Sequence[Held], keeper: Keeper) -> None:
        if event is _Event.STOP:
            self._stops += 1
        elif not isinstance(event, _Event):
            keeper.forget(*event)
            for held in event:
                self._take_done(held, keeper)
            if not self._stops:
                self._hand_out(keeper)

    def _take_done(self, held: Held, keeper: Keeper) -> None:
        """It is done, or given up."""
        bundle = held.bundle
        if bundle is None or not bundle.left:
            return
        if held in self._running:
            self._running.discard(held)
            self._processed += held.processed
            bundle.left.discard(held)
            if not held.abandoned and not bundle.left:
                self._busy -= 1
                bundle.part()
        # Also when it was heard of before it was given up: its worker leaves the rest undone.
        if held.abandoned:
            self._replace(held, keeper)

    def _replace(self, abandoned: Held, keeper: Keeper) -> None:
        """Do without a worker that hangs, and give the rest of what it had to another."""
        if abandoned.worker is not None:
            self._threads.discard(abandoned.worker)
        self._busy -= 1
        bundle, abandoned.bundle = abandoned.bundle, None
        left = set() if bundle is None else bundle.left & self._running
        if bundle is not None:
            bundle.left.clear()
        for held in left:
            self._running.discard(held)
            keeper.forget(held)
            # The keeper may just be changing the token.
            with held.lock:
                again = held.anew()
            if not held.over:
                keeper.keep(again)
                self._waiting.append(again)

    # --- ending

    def _finish(self, keeper: Keeper) -> None:
        """Give back what was not started, await what runs, and give that up when time is over."""
        try:
            self._give_back_waiting(keeper)
            ends = time.monotonic() + self._settings.grace.total_seconds()
            while self._running and self._stops < 2 and (left := ends - time.monotonic()) > 0:
                self._await_events(left, keeper)
                # What was with one that hangs waits again.
                self._give_back_waiting(keeper)
        finally:
            running = list(self._running)
            self._running.clear()
            for held in running:
                outcomes.log_given_up(self._settings.group, held.reservation)
                held.abandoned = True
                # What its worker says of it later is of a run that is over.
                held.bundle = None
                held.cancel()
                held.sever()
            self._give_back(running, keeper)
            # A handler that waits for something else than the database goes on by itself.
            self._threads -= {held.worker for held in running if not held.finished}

    def _give_back_waiting(self, keeper: Keeper) -> None:
        waiting = list(self._waiting)
        self._waiting.clear()
        self._give_back(waiting, keeper)

    def _give_back(self, helds: Iterable[Held], keeper: Keeper) -> None:
        left = list(helds)
        keeper.forget(*left)
        # Twice, for a connection that the pool had kept may have broken meanwhile.
        for is_last in (False, True):
            if not left:
                return
            try:
                with self._own.connect() as connection:
                    while left:
                        self._release(connection, left[-1])
                        left.pop()
            except SQLAlchemyError as error:
                if is_last:
                    for held in left:
                        held.end()
                        outcomes.log_not_given_back(self._settings.group, held.reservation, error)

    def _release(self, connection: Connection, held: Held) -> None:
        if not held.lock.acquire(timeout=_PATIENCE):
            outcomes.log_not_given_back(self._settings.group, held.reservation, None)
            return
        try:
            if not held.over:
                with connection.begin():
                    outcomes.release(connection, held.reservation, self._settings)
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
                # None: it was not installed from Python, and cannot be put back.
                if handler is not None:
                    signal.signal(number, handler)
