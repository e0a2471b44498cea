"""How the tasks of an asyncio consumer wait: for each other, and for events."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import TypeVar

_T = TypeVar("_T")


async def uninterrupted(task: asyncio.Task[_T]) -> _T:
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


async def wait(event: asyncio.Event, seconds: float | None) -> bool:
    """Wait for the event; whether it was set in time."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
