"""How often and when a failed attempt is repeated, and what is kept of an error."""

from __future__ import annotations

import json
from datetime import timedelta
from typing import Any

import pytest

from checkpoints.runtime import RetryPolicy
from checkpoints.runtime.retry import describe_error, message_of

SECOND = timedelta(seconds=1)


def test_delays_grow_by_the_factor_up_to_the_longest() -> None:
    policy = RetryPolicy(first_delay=SECOND, factor=3, longest_delay=20 * SECOND, jitter=0)

    delays = [policy.delay_after(attempt).total_seconds() for attempt in range(1, 6)]

    assert delays == [1, 3, 9, 20, 20]


def test_jitter_spreads_the_delays_and_none_is_longer_than_the_longest() -> None:
    policy = RetryPolicy(first_delay=SECOND, longest_delay=8 * SECOND, jitter=0.5)

    first = {policy.delay_after(1).total_seconds() for _ in range(200)}
    last = {policy.delay_after(9).total_seconds() for _ in range(200)}

    assert len(first) > 100
    assert 0.5 <= min(first) < max(first) <= 1.5
    assert 4 <= min(last) < max(last) <= 8


def test_a_late_attempt_costs_no_time_and_overflows_nothing() -> None:
    policy = RetryPolicy(
        max_attempts=2**31 - 1, factor=1000, longest_delay=timedelta(days=36525), jitter=1
    )

    assert policy.delay_after(2**31 - 1) <= timedelta(days=36525)
    assert RetryPolicy(factor=1, longest_delay=SECOND).delay_after(10**6) <= SECOND


class Late(LookupError):
    pass


def test_the_nearest_class_says_how_many_attempts_there_are() -> None:
    policy = RetryPolicy(max_attempts=5, max_attempts_by_type={LookupError: 2, KeyError: 1})

    assert policy.attempts_for(KeyError()) == 1
    assert policy.attempts_for(Late()) == 2
    assert policy.attempts_for(ValueError()) == 5
    assert policy.attempts_for(SystemExit()) == 5


BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_attempts": 0}, ValueError, "max_attempts must be"),
    ({"max_attempts": 1.0}, TypeError, "max_attempts must be an integer"),
    ({"first_delay": 1}, TypeError, "first_delay must be a timedelta"),
    ({"longest_delay": timedelta(0)}, ValueError, "longest_delay must be longer"),
    ({"factor": 0.5}, ValueError, "factor must be from 1 to 1000"),
    ({"factor": float("nan")}, ValueError, "factor must be"),
    ({"factor": "2"}, TypeError, "factor must be a number"),
    ({"jitter": 2}, ValueError, "jitter must be from 0 to 1"),
    ({"jitter": None}, TypeError, "jitter must be a number"),
    ({"max_attempts_by_type": [KeyError]}, TypeError, "max_attempts_by_type must be a mapping"),
    ({"max_attempts_by_type": {"KeyError": 1}}, TypeError, "a key of max_attempts_by_type"),
    ({"max_attempts_by_type": {KeyError: 0}}, ValueError, r"max_attempts_by_type\["),
]


@pytest.mark.parametrize(("given", "error", "said"), BAD, ids=lambda value: str(value)[:30])
def test_a_bad_argument_is_named(given: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        RetryPolicy(**given)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


class Silent(Exception):
    __str__ = object.__init__  # type: ignore[assignment]  # it answers None


class Untraceable(Exception):
    @property
    def __cause__(self) -> BaseException | None:  # type: ignore[override]
        raise RuntimeError("no cause")


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught


def deep(depth: int) -> None:
    if depth:
        deep(depth - 1)
    raise ValueError("x" * 10_000_000)


def nested(depth: int) -> Exception:
    error: Exception = ValueError("inner \x00")
    for _ in range(depth):
        error = ExceptionGroup("several", [error, KeyError("other")])
    return error


@pytest.mark.parametrize(
    "error",
    [
        Unspeakable(),
        Silent(),
        Untraceable(),
        ValueError("\x00 \ud800 \U0001f600"),
        nested(60),
        ExceptionGroup("wide", [ValueError(str(number)) for number in range(10_000)]),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_every_error_becomes_json_within_bounds(error: BaseException) -> None:
    described: Any = describe_error(raised(error))

    text = json.dumps(described)
    assert described["type"].endswith(type(error).__qualname__)
    assert len(text) < 100_000
    assert "\x00" not in described["message"] + described["traceback"]
    (described["message"] + described["traceback"]).encode()


def test_of_a_long_traceback_the_end_is_kept() -> None:
    with pytest.raises(ValueError, match="x") as caught:
        deep(200)

    described: Any = describe_error(caught.value)

    assert len(described["message"]) == 2_000
    assert len(described["traceback"]) == 8_000
    assert message_of(caught.value) == "x" * 2_000
