"""Checks of what callers give, before it reaches the database.

Each function names the argument, the value and what was expected: TypeError when the type is
wrong, ValueError when the value is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import datetime, timedelta
from enum import Enum
from typing import Any, TypeVar

_BIGINT_MAX = 2**63 - 1
_INTEGER_MAX = 2**31 - 1
# What fits into an entry of an index (2,704 bytes) beside the rest of its key.
_NAME_BYTES = 2_000
_LONGEST = timedelta(days=36525)
_E = TypeVar("_E", bound=Enum)
_T = TypeVar("_T")


def _integer(name: str, value: object, *, least: int, most: int) -> int:
    # Nearly all are: there are three of them for each checkpoint of a batch.
    if type(value) is int and least <= value <= most:
        return value
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    if not least <= value <= most:
        raise ValueError(f"{name} must be from {least} to {most}, not {value!r}")
    return value


def identifier(name: str, value: int) -> int:
    """A row's id: a positive bigint."""
    return _integer(name, value, least=1, most=_BIGINT_MAX)


def identifiers(name: str, values: Iterable[int]) -> list[int]:
    """The ids of rows, each a positive bigint."""
    if isinstance(values, int | str | bytes):
        raise TypeError(f"{name} must be an iterable of integers, not {values!r}")
    return [identifier(f"{name}[{index}]", value) for index, value in enumerate(values)]


def position(name: str, value: int) -> int:
    """A position or version in a stream: 0 (before the first message) or more."""
    return _integer(name, value, least=0, most=_BIGINT_MAX)


def attempts(name: str, value: int) -> int:
    """A count of attempts: 0 or more."""
    return _integer(name, value, least=0, most=_INTEGER_MAX)


def limit(name: str, value: int) -> int:
    """How many rows at the most: 1 or more."""
    return _integer(name, value, least=1, most=_INTEGER_MAX)


def offset(name: str, value: int) -> int:
    """How many rows to pass over: 0 or more."""
    return _integer(name, value, least=0, most=_BIGINT_MAX)


def boolean(name: str, value: bool) -> bool:
    """True or False, and nothing that only counts as such."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, not {value!r}")
    return value


def text(name: str, value: str) -> str:
    """A text that PostgreSQL can store: no NUL, no lone surrogate."""
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {value!r}")
    if "\x00" in value:
        raise ValueError(
            f"{name} must not hold a NUL character, which PostgreSQL refuses: {value!r}"
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be valid Unicode, without surrogates: {value!r}") from None
    return value


def name(name: str, value: str) -> str:
    """The name of a group, a subscription or a stream: a text that is not empty, nor too long."""
    if not text(name, value):
        raise ValueError(f"{name} must not be empty: {value!r}")
    size = len(value.encode())
    if size > _NAME_BYTES:
        raise ValueError(
            f"{name} must have at most {_NAME_BYTES} bytes of UTF-8, not {size}: {value[:80]!r}…"
        )
    return value


def names(argument: str, values: Iterable[str]) -> list[str]:
    """Names, each a text that is not empty."""
    if isinstance(values, str | bytes):
        raise TypeError(f"{argument} must be an iterable of strings, not {values!r}")
    return [name(f"{argument}[{index}]", value) for index, value in enumerate(values)]


def moment(name: str, value: datetime) -> datetime:
    """A point in time: an aware datetime."""
    if not isinstance(value, datetime):
        raise TypeError(f"{name} must be an aware datetime, not {value!r}")
    if value.utcoffset() is None:
        raise ValueError(f"{name} must be an aware datetime (with tzinfo), not {value!r}")
    return value


def due(name: str, value: datetime | timedelta) -> tuple[datetime | None, timedelta | None]:
    """A point in time, or how long from the statement's time: one of the two is not None."""
    if isinstance(value, timedelta):
        if not timedelta(0) <= value <= _LONGEST:
            raise ValueError(f"{name} must be from zero to a hundred years, not {value!r}")
        return None, value
    if not isinstance(value, datetime):
        raise TypeError(f"{name} must be an aware datetime or a timedelta, not {value!r}")
    return moment(name, value), None


def timeout(name: str, value: timedelta) -> timedelta:
    """A duration: a timedelta longer than zero."""
    if not isinstance(value, timedelta):
        raise TypeError(f"{name} must be a timedelta, not {value!r}")
    if value <= timedelta(0):
        raise ValueError(f"{name} must be longer than zero, not {value!r}")
    if value > _LONGEST:
        raise ValueError(f"{name} must be at most a hundred years, not {value!r}")
    return value


def member(name: str, value: object, enumeration: type[_E]) -> _E:
    """A member of an enumeration, or the value of one."""
    try:
        return enumeration(value)
    except ValueError:
        expected = ", ".join(repr(member.value) for member in enumeration)
        raise ValueError(f"{name} must be one of {expected}, not {value!r}") from None


def checkpoint(
    subscription_id: int, stream_name: str, stream_version: int, stream_position: int
) -> None:
    """What makes a checkpoint, with a position that is not past the version."""
    identifier("subscription_id", subscription_id)
    name("stream_name", stream_name)
    position("stream_version", stream_version)
    position("stream_position", stream_position)
    if stream_position > stream_version:
        raise ValueError(
            f"stream_position must not be past stream_version: "
            f"{stream_position!r} > {stream_version!r} (stream {stream_name!r})"
        )


def json_value(name: str, value: object) -> object:
    """A value that JSON can hold and that `jsonb` takes: no NaN, no NUL in a text."""
    try:
        json.dumps(value, allow_nan=False)
    except TypeError as error:
        raise TypeError(f"{name} must be a JSON value ({error}), not {value!r}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} must be a JSON value ({error}), not {value!r}") from None
    _check_texts(name, value)
    return value


def _check_texts(name: str, value: object) -> None:
    match value:
        case str():
            text(name, value)
        case dict():
            for key, item in value.items():
                _check_texts(name, key)
                _check_texts(name, item)
        case list() | tuple():
            for item in value:
                _check_texts(name, item)


def instance(name: str, value: _T, expected: type[Any]) -> _T:
    """An object of a class."""
    if not isinstance(value, expected):
        raise TypeError(f"{name} must be a {expected.__name__}, not {value!r}")
    return value


def instances(name: str, values: Iterable[_T], expected: type[_T]) -> list[_T]:
    """Objects of a class."""
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} must be an iterable of {expected.__name__}, not {values!r}")
    given = list(values)
    for index, value in enumerate(given):
        if not isinstance(value, expected):
            instance(f"{name}[{index}]", value, expected)
    return given
