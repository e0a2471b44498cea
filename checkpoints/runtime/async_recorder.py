"""The recorder for asyncio; see `checkpoints.runtime.recorder`."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from checkpoints.runtime import _recording as recording
from checkpoints.runtime._driver import check_driver
from checkpoints.runtime._outage import Backoff, OutageLog, is_conflict, is_outage
from checkpoints.runtime._recording import Group, Interest, RecorderSettings, Turn
from checkpoints.runtime.reading import Message, Position
from checkpoints.runtime.recorder import Read

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

__all__ = ["AsyncRead", "AsyncRecorder"]

AsyncRead = Callable[["AsyncConnection", Position, int], Awaitable[Sequence[Message]]]


class AsyncRecorder:
    """`Recorder`, awaited.

    `read` is a coroutine function of an `AsyncConnection`, or a function of a `Connection`, such as
    a `MessageTable`. The same holds for its method `end`, if it has one.

    All methods belong to the event loop's thread; from another one, say
    `loop.call_soon_threadsafe(recorder.stop)`. Cancelled, it rolls back the batch at hand.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        group: str,
        read: AsyncRead | Read,
        interests: Iterable[Interest],
        **settings: Any,
    ) -> None:
        # Not isinstance: sqlalchemy.ext.asyncio needs greenlet, which not everybody has.
        if not hasattr(engine, "sync_engine"):
            raise TypeError(f"engine must be an AsyncEngine, not {engine!r}")
        check_driver(engine.sync_engine)
        self.settings = RecorderSettings(
            group=group, read=read, interests=recording.listed_interests(interests), **settings
        )
        self._engine = engine
        self._group: Group | None = None
        self._turns = 0
        self._in_vain = 0
        self._stopped = asyncio.Event()
        self._woken = asyncio.Event()

    async def run(self) -> None:
        """Record until `stop()`. While the database is away, it waits and tries again.

        What `read` raises, and every error that is not an outage, ends it.
        """
        backoff = Backoff()
        outages = OutageLog(self.settings.group)
        while not self._stopped.is_set():
            try:
                passed = await self._step()
            except Exception as error:
                if is_outage(error):
                    outages.away(error)
                elif not is_conflict(error):
                    raise
                await _wait(self._stopped, backoff.next())
                continue
            outages.back()
            backoff.reset()
            if passed:
                self._in_vain = 0
            else:
                await self._pause()

    async def run_once(self) -> int:
        """Record one batch; how many messages it passed.

        0: there are none for now, or another recorder of the group is at work.
        """
        return await self._step() or 0

    async def drain(self) -> int:
        """Record until there is nothing more, or `stop()`; how many messages it passed.

        While another recorder is at work, it waits. Messages read again for a subscription that
        catches up count again.
        """
        total = 0
        while not self._stopped.is_set():
            passed = await self._step()
            if passed == 0:
                break
            if passed is None:
                await self._pause()
            total += passed or 0
        return total

    def stop(self) -> None:
        """Let `run()` and `drain()` end after the batch at hand. A stopped recorder stays so."""
        self._stopped.set()
        self._woken.set()

    def notify(self) -> None:
        """Look for messages now: the application has heard of some, say by LISTEN."""
        self._woken.set()

    async def _pause(self) -> None:
        self._in_vain += 1
        if await _wait(self._woken, self.settings.idle_seconds(self._in_vain)):
            self._in_vain = 0
        self._woken.clear()

    async def _step(self) -> int | None:
        """Record one batch; how many messages it passed, or None: another recorder is at work."""
        try:
            async with self._engine.connect() as connection:
                await connection.execution_options(**recording.OPTIONS)
                return await self._turn(connection)
        except BaseException:
            # What was deleted, or restored, is looked up anew.
            self._group = None
            raise

    async def _turn(self, connection: AsyncConnection) -> int | None:
        if self._group is None:
            group = await connection.run_sync(recording.join, self.settings)
            await connection.commit()
            self._group = group
        turn = await connection.run_sync(recording.begin_turn, self.settings, self._group)
        if turn is None:
            return None
        passed = await self._take(connection, turn)
        # Where nothing was written it is rolled back, which does not wait for the disk.
        if await connection.run_sync(turn.finish):
            await connection.commit()
            turn.told(passed)
        return passed

    async def _take(self, connection: AsyncConnection, turn: Turn) -> int:
        if turn.newcomers:
            end = await self._end(connection, turn) if turn.needs_end else None
            if self._stopped.is_set():
                return 0
            await connection.run_sync(turn.admit, end)
        self._turns += 1
        for cohort in turn.cohorts(self._turns):
            messages = await self._read(connection, cohort.after)
            passed = await connection.run_sync(turn.take, cohort, messages)
            if passed:
                return passed
        return 0

    async def _read(self, connection: AsyncConnection, after: Position) -> Sequence[Message]:
        settings = self.settings
        answer: Sequence[Message]
        if settings.awaits:
            answer = await settings.read(connection, after, settings.batch)
        else:
            answer = await connection.run_sync(settings.read, after, settings.batch)
        return answer

    async def _end(self, connection: AsyncConnection, turn: Turn) -> Position:
        """Where the messages end for now; without the method that says it, all are read."""
        end: Callable[..., Any] | None = getattr(self.settings.read, "end", None)
        found: Position
        if end is not None:
            if self.settings.awaits:
                found = await end(connection)
            else:
                found = await connection.run_sync(end)
            return found
        position = turn.head
        while not self._stopped.is_set():
            messages = await self._read(connection, position)
            if not messages:
                break
            position = recording.in_order(messages, position)[-1].position
        return position


async def _wait(event: asyncio.Event, seconds: float) -> bool:
    """Whether the event was set in time."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(event.wait(), seconds)
    return event.is_set()
