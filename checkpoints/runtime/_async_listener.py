"""Wake-up by LISTEN for asyncio, as `listening` does for threads."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from sqlalchemy import Engine
from sqlalchemy.util import greenlet_spawn

from checkpoints.runtime._outage import Backoff
from checkpoints.runtime._tasks import uninterrupted
from checkpoints.runtime.listening import listen_sql, open_connection
from checkpoints.runtime.telemetry import logger

# At the end: how long the connection may take to be as it was.
_PATIENCE = 1.0


class AsyncListener:
    """For one task: calls `wake` when work may have become ready, and after each reconnection."""

    def __init__(self, engine: Engine, group: str, wake: Callable[[], None]) -> None:
        self._engine = engine
        self._group = group
        self._wake = wake

    async def run(self) -> None:
        """Listen until cancelled; without a connection, polling serves meanwhile."""
        backoff = Backoff()
        while True:
            try:
                await self._listen(backoff)
            except Exception as error:
                with suppress(Exception):
                    logger.debug(
                        "listening was interrupted: %s",
                        error,
                        extra={"group": self._group},
                    )
                await asyncio.sleep(backoff.next())

    async def _listen(self, backoff: Backoff) -> None:
        opening = asyncio.create_task(greenlet_spawn(open_connection, self._engine))
        try:
            # Interrupted in the middle, the connection would be left open.
            connection = await uninterrupted(opening)
        except asyncio.CancelledError:
            if not opening.cancelled() and opening.exception() is None:
                await opening.result().close()
            raise
        try:
            await connection.rollback()
            await connection.set_autocommit(True)
            await connection.execute(listen_sql(self._engine))
            backoff.reset()
            # What was notified before LISTEN took effect is not told again.
            self._wake()
            async for notification in connection.notifies():
                if notification.payload == self._group:
                    self._wake()
        finally:
            # As it was taken: an application's creator may have taken it from a pool of its own,
            # and in autocommit the next handler's writes and position would commit apart.
            with suppress(Exception):
                async with asyncio.timeout(_PATIENCE):
                    await connection.execute("UNLISTEN *")
            with suppress(Exception):
                await connection.set_autocommit(False)
            await connection.close()
