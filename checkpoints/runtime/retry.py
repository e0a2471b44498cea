"""After a handler failed: how long to wait, how often to try, and what is kept of the error."""

from __future__ import annotations

import random
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta

from checkpoints import _arguments as arguments
from checkpoints.records import JSONValue

__all__ = ["RetryPolicy", "describe_error", "message_of"]

_MESSAGE_LIMIT = 2_000
_TRACEBACK_LIMIT = 8_000


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often a checkpoint is tried, and how long it waits in between.

    After attempt n it waits `first_delay` times `factor` to the power n-1, at most
    `longest_delay`, more or less by up to the fraction `jitter`, but never longer. After
    `max_attempts` it has failed. `max_attempts_by_type` says otherwise for exceptions of some types
    (the nearest class counts); 1: no second attempt.
    """

    max_attempts: int = 10
    first_delay: timedelta = timedelta(seconds=1)
    factor: float = 2.0
    longest_delay: timedelta = timedelta(hours=1)
    jitter: float = 0.2
    max_attempts_by_type: Mapping[type[BaseException], int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        arguments.limit("max_attempts", self.max_attempts)
        if not isinstance(self.max_attempts_by_type, Mapping):
            raise TypeError(
                "max_attempts_by_type must be a mapping of exception types to integers, not "
                f"{self.max_attempts_by_type!r}"
            )
        for type_, attempts in self.max_attempts_by_type.items():
            if not (isinstance(type_, type) and issubclass(type_, BaseException)):
                raise TypeError(
                    f"a key of max_attempts_by_type must be an exception type, not {type_!r}"
                )
            arguments.limit(f"max_attempts_by_type[{type_!r}]", attempts)
        arguments.timeout("first_delay", self.first_delay)
        arguments.timeout("longest_delay", self.longest_delay)
        _check_number("factor", self.factor, 1, 1000)
        _check_number("jitter", self.jitter, 0, 1)

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
            if seconds >= longest:
                break
            seconds *= self.factor
        # Jitter downwards alone at the end: the longest delay is the longest.
        most = min(longest, min(seconds, longest) * (1 + self.jitter))
        least = min(seconds, longest) * (1 - self.jitter)
        return timedelta(seconds=random.uniform(least, most))  # noqa: S311  # not a secret


def _check_number(name: str, value: float, least: float, most: float) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most}, not {value!r}")


def describe_error(error: BaseException) -> JSONValue:
    """The error as JSON: type, message and traceback, each within bounds.

    The traceback keeps its end, which says where the error arose. The statement that records it
    adds the attempt, the position and the time.
    """
    return {
        "type": f"{type(error).__module__}.{type(error).__qualname__}",
        "message": message_of(error),
        "traceback": _storable(_traceback(error)[-_TRACEBACK_LIMIT:]),
    }


def message_of(error: BaseException) -> str:
    """What an error says of itself, within bounds, whatever it is."""
    try:
        message = str(error)
    except Exception as failure:  # an exception of the application's, with a __str__ of its own
        message = f"<no message: {type(failure).__name__}>"
    return _storable(message[:_MESSAGE_LIMIT])


def _traceback(error: BaseException) -> str:
    try:
        return "".join(traceback.format_exception(error))
    except Exception as failure:  # as above, such as a __cause__ or __notes__ of its own
        return f"<no traceback: {type(failure).__name__}>"


def _storable(text: str) -> str:
    """Without what PostgreSQL cannot hold in JSON: NUL, and halves of surrogate pairs."""
    return text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode()
