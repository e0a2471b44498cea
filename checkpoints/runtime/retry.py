"""After a handler failed: how long to wait, how often to try, and what is kept of the error."""

from __future__ import annotations

import random
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from types import MappingProxyType

from checkpoints import _arguments as arguments
from checkpoints.records import JSONValue

__all__ = ["RetryPolicy", "describe_error"]

_MESSAGE_LIMIT = 2_000
_TRACEBACK_LIMIT = 8_000


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a checkpoint is tried, and how long it waits in between.

    After attempt n it waits `first_delay` times `factor` to the power n-1, at most
    `longest_delay`, more or less by up to the fraction `jitter`. After `max_attempts` it has
    failed. `max_attempts_by_type` says otherwise for exceptions of some types (the nearest class
    counts); 1: no second attempt.
    """

    max_attempts: int = 10
    first_delay: timedelta = timedelta(seconds=1)
    factor: float = 2.0
    longest_delay: timedelta = timedelta(hours=1)
    jitter: float = 0.2
    max_attempts_by_type: Mapping[type[BaseException], int] = field(
        default_factory=lambda: MappingProxyType({})
    )

    def __post_init__(self) -> None:
        arguments.limit("max_attempts", self.max_attempts)
        for type_, attempts in self.max_attempts_by_type.items():
            arguments.limit(f"max_attempts_by_type[{type_!r}]", attempts)
        arguments.timeout("first_delay", self.first_delay)
        arguments.timeout("longest_delay", self.longest_delay)
        if not 1 <= self.factor <= 1000:
            raise ValueError(f"factor must be from 1 to 1000, not {self.factor!r}")
        if not 0 <= self.jitter <= 1:
            raise ValueError(f"jitter must be from 0 to 1, not {self.jitter!r}")

    def attempts_for(self, error: BaseException) -> int:
        """How many attempts an error of this type allows."""
        for type_ in type(error).__mro__:
            if type_ in self.max_attempts_by_type:
                return self.max_attempts_by_type[type_]
        return self.max_attempts

    def delay_after(self, attempt: int) -> timedelta:
        """How long to wait after the attempt of this number; the first is 1."""
        longest = self.longest_delay.total_seconds()
        seconds = self.first_delay.total_seconds()
        for _ in range(attempt - 1):
            seconds *= self.factor
            if seconds >= longest:
                break
        jittered = min(seconds, longest) * random.uniform(1 - self.jitter, 1 + self.jitter)  # noqa: S311
        return timedelta(seconds=jittered)


def describe_error(error: BaseException) -> JSONValue:
    """The error as JSON: type, message and traceback, each within bounds.

    The traceback keeps its end, which says where the error arose. The statement that records it
    adds the attempt, the position and the time.
    """
    described = traceback.format_exception(error)
    return {
        "type": f"{type(error).__module__}.{type(error).__qualname__}",
        "message": _storable(_message(error)[:_MESSAGE_LIMIT]),
        "traceback": _storable("".join(described)[-_TRACEBACK_LIMIT:]),
    }


def _message(error: BaseException) -> str:
    try:
        return str(error)
    except Exception as failure:  # an exception of the application's, with a __str__ of its own
        return f"<no message: {type(failure).__name__}>"


def _storable(text: str) -> str:
    """Without what PostgreSQL cannot hold in JSON: NUL, and halves of surrogate pairs."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()
