"""The recorder: reads new messages in global order and raises the checkpoints of those who follow.

What it records and how far it has read are one transaction, under a lock on the group's global
position: nothing is lost and nothing counted twice, whatever dies when. Run as many as you like for
one group; each batch is the work of one of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Engine

from checkpoints.runtime import _recording as recording
from checkpoints.runtime._driver import check_driver
from checkpoints.runtime._outage import Backoff, OutageLog, is_conflict, is_outage
from checkpoints.runtime._recording import Group, Interest, RecorderSettings, Start, Turn
from checkpoints.runtime.reading import Message, Position

__all__ = ["Interest", "Read", "Recorder", "Start"]

Read = Callable[[Connection, Position, int], Sequence[Message]]


class Recorder:
    """Records the messages that `read` finds for the subscriptions of a group.

    `read(connection, position, limit)` answers the next messages after a position, at most `limit`,
    in an order that never changes and, in each stream, by their positions; none: there are no more
    for now. It runs in the recorder's transaction (READ COMMITTED). A `MessageTable` is one; if it
    has a method `end(connection)`, subscriptions that start now need not read what there is.

    `run()` in one thread; `stop()` and `notify()` from any. It takes one connection of the
    engine's pool, for a batch at a time. The other arguments: see `RecorderSettings`.

    Raises:
        TypeError, ValueError: a bad argument, an engine of another driver than psycopg, or `read`
            answered messages out of order.
    """

    def __init__(
        self, engine: Engine, group: str, read: Read, interests: Iterable[Interest], **settings: Any
    ) -> None:
        if not isinstance(engine, Engine):
            raise TypeError(f"engine must be an Engine, not {engine!r}")
        check_driver(engine)
        self.settings = RecorderSettings(
            group=group, read=read, interests=recording.listed_interests(interests), **settings
        )
        if self.settings.awaits:
            raise TypeError(f"read must not be a coroutine function, not {read!r}: AsyncRecorder")
        self._engine = engine
        self._group: Group | None = None
        self._turns = 0
        self._in_vain = 0
        self._stopped = threading.Event()
        self._woken = threading.Event()

    def run(self) -> None:
        """Record until `stop()`. While the database is away, it waits and tries again.

        What `read` raises, and every error that is not an outage, ends it.
        """
        backoff = Backoff()
        outages = OutageLog(self.settings.group)
        while not self._stopped.is_set():
            try:
                passed = self._step()
            except Exception as error:
                if is_outage(error):
                    outages.away(error)
                elif not is_conflict(error):
                    raise
                self._stopped.wait(backoff.next())
                continue
            outages.back()
            backoff.reset()
            if passed:
                self._in_vain = 0
            else:
                self._pause()

    def run_once(self) -> int:
        """Record one batch; how many messages it passed.

        0: there are none for now, or another recorder of the group is at work.
        """
        return self._step() or 0

    def drain(self) -> int:
        """Record until there is nothing more, or `stop()`; how many messages it passed.

        While another recorder is at work, it waits. Messages read again for a subscription that
        catches up count again.
        """
        total = 0
        while not self._stopped.is_set():
            passed = self._step()
            if passed == 0:
                break
            if passed is None:
                self._pause()
            total += passed or 0
        return total

    def stop(self) -> None:
        """Let `run()` and `drain()` end after the batch at hand. A stopped recorder stays so."""
        self._stopped.set()
        self._woken.set()

    def notify(self) -> None:
        """Look for messages now: the application has heard of some, say by LISTEN."""
        self._woken.set()

    def _pause(self) -> None:
        self._in_vain += 1
        if self._woken.wait(self.settings.idle_seconds(self._in_vain)):
            self._in_vain = 0
        self._woken.clear()

    def _step(self) -> int | None:
        """Record one batch; how many messages it passed, or None: another recorder is at work."""
        try:
            with self._engine.connect().execution_options(**recording.OPTIONS) as connection:
                return self._turn(connection)
        except BaseException:
            # What was deleted, or restored, is looked up anew.
            self._group = None
            raise

    def _turn(self, connection: Connection) -> int | None:
        if self._group is None:
            group = recording.join(connection, self.settings)
            connection.commit()
            self._group = group
        turn = recording.begin_turn(connection, self.settings, self._group)
        if turn is None:
            return None
        passed = self._take(connection, turn)
        # Where nothing was written it is rolled back, which does not wait for the disk.
        if turn.finish(connection):
            connection.commit()
            turn.told(passed)
        return passed

    def _take(self, connection: Connection, turn: Turn) -> int:
        settings = self.settings
        if turn.newcomers:
            end = self._end(connection, turn) if turn.needs_end else None
            if self._stopped.is_set():
                return 0
            turn.admit(connection, end)
        self._turns += 1
        for cohort in turn.cohorts(self._turns):
            messages = settings.read(connection, cohort.after, settings.batch)
            passed = turn.take(connection, cohort, messages)
            if passed:
                return passed
        return 0

    def _end(self, connection: Connection, turn: Turn) -> Position:
        """Where the messages end for now; without the method that says it, all are read."""
        settings = self.settings
        end: Callable[[Connection], Position] | None = getattr(settings.read, "end", None)
        if end is not None:
            return end(connection)
        position = turn.head
        while not self._stopped.is_set():
            messages = settings.read(connection, position, settings.batch)
            if not messages:
                break
            position = recording.in_order(messages, position)[-1].position
        return position
