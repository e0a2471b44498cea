"""What a consumer is told, checked once, the same for the blocking and the asyncio one."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, TypedDict, TypeVar

from checkpoints import _arguments as arguments
from checkpoints.records import ReplayMode, Reservation
from checkpoints.runtime._outage import Backoff
from checkpoints.runtime.retry import RetryPolicy

__all__ = ["ConsumerOptions", "ConsumerSettings", "OutsideTransaction"]

_Answer_co = TypeVar("_Answer_co", covariant=True)

# With a checkpoint that others hold locked, at the most this long until the next look.
_LONGEST_HELD_UP = 1.0


@dataclass(frozen=True, slots=True)
class OutsideTransaction(Generic[_Answer_co]):
    """A handler that must not run in a transaction, such as a call to another system.

    It is a function of the reservation alone; what it did is noted in a transaction of its own
    afterwards. So it is run at least once: again, when the process dies in between. Give the other
    system a key to know a repetition by, such as the subscription, the stream and the position.
    """

    function: Callable[[Reservation], _Answer_co]


class ConsumerOptions(TypedDict, total=False):
    """The arguments that `Consumer` and `AsyncConsumer` share; see `ConsumerSettings`."""

    concurrency: int
    batch: int | None
    handlers_per_transaction: int
    reservation_timeout: timedelta
    handler_timeout: timedelta | None
    grace: timedelta
    poll_interval: timedelta
    recover_interval: timedelta
    listen: bool
    replay_mode: ReplayMode
    retry: RetryPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsumerSettings:
    """How a consumer works; each is an argument of `Consumer` and `AsyncConsumer`.

    - `concurrency`: how many handlers run at once; each takes a connection of the engine's pool.
    - `batch`: how many checkpoints it holds at the most, reserved in one statement (None, or less
      than `concurrency` times `handlers_per_transaction`: as many as that). Those not started yet
      wait in this process, and are given back when it stops.
    - `handlers_per_transaction`: how many handlers may run, one after the other, in one transaction
      that commits all of their positions: for small handlers several times as fast. When one
      raises, or a reservation is lost, all is rolled back, and each runs again in a transaction of
      its own; retries always do.
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
    handlers_per_transaction: int = 1
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
        arguments.limit("handlers_per_transaction", self.handlers_per_transaction)
        arguments.timeout("reservation_timeout", self.reservation_timeout)
        if self.handler_timeout is not None:
            arguments.timeout("handler_timeout", self.handler_timeout)
        arguments.timeout("grace", self.grace)
        arguments.timeout("poll_interval", self.poll_interval)
        arguments.timeout("recover_interval", self.recover_interval)
        if not isinstance(self.listen, bool):
            raise TypeError(f"listen must be True or False, not {self.listen!r}")
        arguments.member("replay_mode", self.replay_mode, ReplayMode)
        if not isinstance(self.retry, RetryPolicy):
            raise TypeError(f"retry must be a RetryPolicy, not {self.retry!r}")

    def room(self, held: int) -> int:
        """How many checkpoints to reserve, when so many are held: none while all slots are busy."""
        at_once = self.concurrency * self.handlers_per_transaction
        if held >= at_once:
            return 0
        return max(self.batch or 0, at_once) - held

    def share(self, waiting: int, free: int) -> int:
        """How many of those that wait one of so many free workers takes."""
        return min(self.handlers_per_transaction, -(-waiting // free))

    def idle_seconds(self, due_in: timedelta | None, held_up: Backoff) -> float:
        """How long to sleep when nothing was found, and the next is due in so long (None: none).

        `held_up`: the waits for one that is due and yet not to be had, for others hold it locked.
        """
        seconds = jittered(self.poll_interval)
        if due_in is None or due_in > timedelta(0):
            held_up.reset()
        if due_in is None:
            return seconds
        return min(seconds, due_in.total_seconds() if due_in > timedelta(0) else held_up.next())

    def keeping_seconds(self, until_recovery: float) -> float:
        """Until there may be a reservation to extend, a handler to end, or some to recover."""
        seconds = min(until_recovery, self.reservation_timeout.total_seconds() / 9)
        if self.handler_timeout is not None:
            seconds = min(seconds, self.handler_timeout.total_seconds() / 4)
        return max(0.01, seconds)


def jittered(interval: timedelta) -> float:
    """The interval in seconds, give or take a fifth, so that processes do not fall into step."""
    return interval.total_seconds() * random.uniform(0.8, 1.2)  # noqa: S311  # not a secret


def held_up_backoff() -> Backoff:
    """Waits for a checkpoint that others hold locked: for a moment mostly, but who knows."""
    return Backoff(0.05, _LONGEST_HELD_UP)


def checked_handlers(
    handlers: object, *, blocking: bool
) -> tuple[Mapping[str, Any] | None, Callable[[str], Any]]:
    """The handlers by subscription (None: one for all), and the one to take for a subscription."""
    if isinstance(handlers, Mapping):
        if not handlers:
            raise ValueError("handlers must name at least one subscription, not {}")
        for name, handler in handlers.items():
            arguments.name("a key of handlers", name)
            _check(f"handlers[{name!r}]", handler, blocking=blocking)
        by_name = dict(handlers)
        return by_name, by_name.__getitem__
    _check("handlers", handlers, blocking=blocking)
    return None, lambda _: handlers


def _check(name: str, handler: object, *, blocking: bool) -> None:
    function = handler.function if isinstance(handler, OutsideTransaction) else handler
    if not callable(function):
        raise TypeError(
            f"{name} must be a function of (connection, reservation), an OutsideTransaction of "
            f"a function of (reservation), or a mapping of subscription names to those, not "
            f"{handler!r}"
        )
    if blocking and inspect.iscoroutinefunction(function):
        raise TypeError(
            f"{name} must not be a coroutine function, which an AsyncConsumer runs: {handler!r}"
        )
