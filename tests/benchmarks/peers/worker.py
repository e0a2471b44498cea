"""The worker's side of `running`, for peers in Python."""

from __future__ import annotations

import asyncio
import os
import sys
import threading

__all__ = ["Reporter"]

_TELL_SECONDS = 0.01


class Reporter:
    """Tells who started this process that it is ready, and how many items it has handled."""

    def __init__(self) -> None:
        self.handled = 0
        self._told = 0
        self._go = asyncio.Event()
        self._telling: asyncio.Task[None] | None = None

    async def ready(self) -> None:
        """Say that work could start, and wait until it may; at once the second time."""
        if self._telling is None:
            self._telling = asyncio.create_task(self._tell())
            threading.Thread(
                target=self._read, args=(asyncio.get_running_loop(),), daemon=True
            ).start()
            _say(b"ready\n")
        await self._go.wait()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        if sys.stdin.buffer.readline():
            loop.call_soon_threadsafe(self._go.set)
            sys.stdin.buffer.read()
        os._exit(1)

    async def _tell(self) -> None:
        while True:
            await asyncio.sleep(_TELL_SECONDS)
            if self.handled != self._told:
                self._told = self.handled
                _say(b"%d\n" % self._told)


def _say(line: bytes) -> None:
    os.write(sys.stdout.fileno(), line)
