"""The checkpoints that an asyncio consumer holds."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection

from checkpoints.records import Reservation
from checkpoints.runtime._held import Holding, sever


class AsyncHeld(Holding):
    """Held by an asyncio consumer; its `lock` is held by whoever uses or changes the token."""

    def __init__(self, reservation: Reservation, reservation_timeout: timedelta) -> None:
        super().__init__(reservation, reservation_timeout)
        self.lock = asyncio.Lock()
        self.worker: asyncio.Task[None] | None = None
        """That sees to its bundle."""
        self.task: asyncio.Task[Any] | None = None
        """That runs its handler, and perhaps those of others; it is cancelled for each of them."""

        self.connection: Connection | None = None
        """That the handler works on now."""

    def sever(self) -> None:
        """Break the connection of a handler that nobody waits for; not while it is at its end."""
        if not self.lock.locked():
            connection, self.connection = self.connection, None
            sever(connection)

    def cancel(self) -> None:
        """Cancel what runs its handler, if that was started."""
        if self.task is not None:
            self.task.cancel()
