"""What a consumer is told, checked once, the same for the blocking and the asyncio one."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

from checkpoints import _arguments as arguments
from checkpoints.records import ReplayMode, Reservation
from checkpoints.runtime.retry import RetryPolicy

__all__ = ["ConsumerSettings", "OutsideTransaction"]


@dataclass(frozen=True, slots=True)
class OutsideTransaction:
    """A handler that must not run in a transaction, such as a call to another system.

    It is a function of the reservation alone; what it did is noted in a transaction of its own
    afterwards. So it is run at least once: again, when the process dies in between. Give the other
    system a key to know a repetition by, such as the subscription, the stream and the position.
    """

    function: Callable[[Reservation], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerSettings:
    """How a consumer works; each is an argument of `Consumer` and `AsyncConsumer`.

    - `concurrency`: how many handlers run at once; each takes a connection of the engine's pool.
    - `batch`: how many checkpoints are reserved in one statement (None: as many as `concurrency`).
      Those not started yet wait in this process, and are given back when it stops.
    - `reservation_timeout`: how long a checkpoint stays with a process that died. While it lives,
      the reservation is extended at a third of that.
    - `handler_timeout`: how long a handler may take (None: for ever). Then its attempt has failed;
      it is cancelled where it can be.
    - `grace`: how long running handlers may take to finish after `stop()` or SIGTERM.
    - `poll_interval`: how often it looks for work that no notification told of.
    - `listen`: whether notifications wake it, over a connection of its own. Not through PgBouncer
      in transaction mode.
    - `recover_interval`: how often it looks for reservations that expired.
    - `replay_mode`: whether it serves live subscriptions, replaying ones, or both.
    - `retry`: how often a handler that raises is tried again, and when.
    """

    group: str
    concurrency: int = 4
    batch: int | None = None
    reservation_timeout: timedelta = timedelta(seconds=30)
    handler_timeout: timedelta | None = timedelta(minutes=5)
    grace: timedelta = timedelta(seconds=20)
    poll_interval: timedelta = timedelta(seconds=1)
    recover_interval: timedelta = timedelta(seconds=5)
    listen: bool = True
    replay_mode: ReplayMode = ReplayMode.ALL
    retry: RetryPolicy = field(default_factory=RetryPolicy)

    def __post_init__(self) -> None:
        arguments.name("group", self.group)
        arguments.limit("concurrency", self.concurrency)
        if self.batch is not None:
            arguments.limit("batch", self.batch)
        arguments.timeout("reservation_timeout", self.reservation_timeout)
        if self.handler_timeout is not None:
            arguments.timeout("handler_timeout", self.handler_timeout)
        arguments.timeout("grace", self.grace)
        arguments.timeout("poll_interval", self.poll_interval)
        arguments.timeout("recover_interval", self.recover_interval)
        arguments.member("replay_mode", self.replay_mode, ReplayMode)
        if not isinstance(self.retry, RetryPolicy):
            raise TypeError(f"retry must be a RetryPolicy, not {self.retry!r}")

    def room(self, held: int) -> int:
        """How many checkpoints to reserve, when so many are held: none while all slots are busy."""
        if held >= self.concurrency:
            return 0
        return max(self.batch or 0, self.concurrency) - held

    def idle_seconds(self, due_in: timedelta | None) -> float:
        """How long to sleep when nothing was found, and the next is due in so long (None: none)."""
        seconds = jittered(self.poll_interval)
        if due_in is None:
            return seconds
        # Due already, and yet not to be had: others hold it locked, for a moment.
        return min(seconds, max(due_in.total_seconds(), random.uniform(0.02, 0.1)))  # noqa: S311

    def keeping_seconds(self, until_recovery: float) -> float:
        """Until there may be a reservation to extend, a handler to end, or some to recover."""
        seconds = min(until_recovery, self.reservation_timeout.total_seconds() / 9)
        if self.handler_timeout is not None:
            seconds = min(seconds, self.handler_timeout.total_seconds() / 4)
        return max(0.01, seconds)


def jittered(interval: timedelta) -> float:
    """The interval in seconds, give or take a fifth, so that processes do not fall into step."""
    return interval.total_seconds() * random.uniform(0.8, 1.2)  # noqa: S311  # not a secret


def checked_handlers(handlers: object) -> tuple[Mapping[str, Any] | None, Any]:
    """The handlers by subscription, or the one for all subscriptions of the group."""
    if isinstance(handlers, Mapping):
        if not handlers:
            raise ValueError("handlers must name at least one subscription, not {}")
        for name, handler in handlers.items():
            arguments.name("a key of handlers", name)
            _check(f"handlers[{name!r}]", handler)
        return dict(handlers), None
    _check("handlers", handlers)
    return None, handlers


def _check(name: str, handler: object) -> None:
    if not callable(handler) and not isinstance(handler, OutsideTransaction):
        raise TypeError(
            f"{name} must be a function of (connection, reservation), an OutsideTransaction, or "
            f"a mapping of subscription names to those, not {handler!r}"
        )
