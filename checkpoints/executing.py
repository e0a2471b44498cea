"""The executing layer: the statements as methods, with typed records in and out.

It executes on the connection or session that it is given, in the caller's transaction, and never
commits or rolls back.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Coroutine
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, NamedTuple, ParamSpec, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, scoped_session

from checkpoints import _calls as calls
from checkpoints._calls import Call
from checkpoints.errors import SchemaNotMigrated, SubscriptionExists, UnknownSubscription

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, async_scoped_session

__all__ = ["AsyncCheckpoints", "Checkpoints"]

P = ParamSpec("P")
T = TypeVar("T")

# The schema, a table, a column, a type or a function is not there.
_MISSING = {"3F000", "42P01", "42703", "42704", "42883"}
_FOREIGN_KEY = "fk_checkpoints_subscription_id"
_NAME_IN_GROUP = "uq_subscriptions_subscription_group_id_name"


class _Diagnosis(NamedTuple):
    """What the server said of an error."""

    sqlstate: str | None
    message: str | None
    detail: str | None
    constraint: str | None


def _diagnosed(error: DBAPIError) -> _Diagnosis | None:
    """What the server said; None: it said nothing, or the driver tells it otherwise."""
    diagnosis = getattr(error.orig, "diag", None)
    if diagnosis is not None:
        return _Diagnosis(
            diagnosis.sqlstate,
            diagnosis.message_primary,
            diagnosis.message_detail,
            diagnosis.constraint_name,
        )
    # asyncpg's error has it as attributes, each only where the server sent it.
    raised: Any = error.driver_exception
    if not hasattr(raised, "sqlstate"):
        return None
    return _Diagnosis(
        raised.sqlstate,
        getattr(raised, "message", None),
        getattr(raised, "detail", None),
        getattr(raised, "constraint_name", None),
    )


def translated(error: DBAPIError) -> Exception:
    """What the error means to the caller; itself, where this layer knows no better."""
    diagnosis = _diagnosed(error)
    if diagnosis is None:
        return error
    if diagnosis.sqlstate in _MISSING:
        return SchemaNotMigrated(diagnosis.message or diagnosis.sqlstate)
    # Whatever the server's language, a detail quotes columns and values: Key (…)=(…).
    detail = diagnosis.detail or ""
    if diagnosis.sqlstate == "23503" and diagnosis.constraint == _FOREIGN_KEY:
        if "(id)=" in detail:
            # The other side: a subscription was deleted that a checkpoint refers to.
            return error
        named = re.search(r"=\((\d+)\)", detail)
        return UnknownSubscription(int(named[1]) if named else None)
    if diagnosis.sqlstate == "23505" and diagnosis.constraint == _NAME_IN_GROUP:
        named = re.search(r"=\((\d+), (.*)\)", detail, re.DOTALL)
        return (
            SubscriptionExists(int(named[1]), named[2]) if named else SubscriptionExists(None, None)
        )
    return error


def _blocking(call: Callable[P, Call[T]]) -> Callable[Concatenate[Checkpoints, P], T]:
    """A method that executes the call."""

    @wraps(call)
    def method(self: Checkpoints, /, *args: P.args, **kwargs: P.kwargs) -> T:
        called = call(*args, **kwargs)
        try:
            rows = self._connection.execute(*called.parts).all()
        except DBAPIError as error:
            raise translated(error) from error.orig
        return called.answer(rows)

    return _as_method(method)


def _awaitable(
    call: Callable[P, Call[T]],
) -> Callable[Concatenate[AsyncCheckpoints, P], Coroutine[Any, Any, T]]:
    """A coroutine method that executes the call."""

    @wraps(call)
    async def method(self: AsyncCheckpoints, /, *args: P.args, **kwargs: P.kwargs) -> T:
        called = call(*args, **kwargs)
        try:
            result = await self._connection.execute(*called.parts)
        except DBAPIError as error:
            raise translated(error) from error.orig
        return called.answer(result.all())

    return _as_method(method)


_M = TypeVar("_M", bound=Callable[..., Any])


def _as_method(method: _M) -> _M:
    """Give it the signature for `help()`: `self`, the call's parameters, and what it answers."""
    wrapped = inspect.signature(method)
    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    answer = str(wrapped.return_annotation).removeprefix("Call[").removesuffix("]")
    method.__signature__ = wrapped.replace(  # type: ignore[attr-defined]
        parameters=[own, *wrapped.parameters.values()], return_annotation=answer
    )
    method.__module__ = __name__
    return method


class Checkpoints:
    """The statements on a `Connection` or a `Session`; see `AsyncCheckpoints` for asyncio.

    It never commits. Errors: `ReservationLost`, `UnknownSubscription`, `SubscriptionExists`,
    `SubscriptionRunning`, `SchemaNotMigrated`, bad arguments as TypeError or ValueError; others of
    the driver pass unwrapped.
    """

    def __init__(self, connection: Connection | Session | scoped_session[Any]) -> None:
        if not isinstance(connection, Connection | Session | scoped_session):
            raise TypeError(
                f"connection must be a Connection or a Session, not {connection!r}; "
                "such as that of `with engine.begin() as connection`"
            )
        self._connection = connection

    record_checkpoints = _blocking(calls.record_checkpoints)
    advance_lagging_subscription_checkpoints = _blocking(
        calls.advance_lagging_subscription_checkpoints
    )

    reserve_next_available_checkpoint = _blocking(calls.reserve_next_available_checkpoint)
    get_next_process_at = _blocking(calls.get_next_process_at)
    update_checkpoint_position = _blocking(calls.update_checkpoint_position)
    update_checkpoint_positions = _blocking(calls.update_checkpoint_positions)
    record_checkpoint_error = _blocking(calls.record_checkpoint_error)
    release_checkpoint_reservation = _blocking(calls.release_checkpoint_reservation)
    extend_checkpoint_reservation = _blocking(calls.extend_checkpoint_reservation)
    recover_expired_checkpoint_reservations = _blocking(
        calls.recover_expired_checkpoint_reservations
    )
    record_expired_checkpoint_reservations = _blocking(calls.record_expired_checkpoint_reservations)

    list_reservations = _blocking(calls.list_reservations)
    list_lagging = _blocking(calls.list_lagging)
    list_retries = _blocking(calls.list_retries)
    list_failed = _blocking(calls.list_failed)
    get_checkpoint = _blocking(calls.get_checkpoint)
    get_metrics = _blocking(calls.get_metrics)
    skip_checkpoints = _blocking(calls.skip_checkpoints)
    schedule_checkpoints = _blocking(calls.schedule_checkpoints)

    get_subscription = _blocking(calls.get_subscription)
    add_or_update_subscription = _blocking(calls.add_or_update_subscription)
    set_subscription_status = _blocking(calls.set_subscription_status)
    lock_checkpoint = _blocking(calls.lock_checkpoint)
    ensure_checkpoint_exists = _blocking(calls.ensure_checkpoint_exists)

    pause_subscription = _blocking(calls.pause_subscription)
    resume_subscription = _blocking(calls.resume_subscription)
    reset_subscription_checkpoints = _blocking(calls.reset_subscription_checkpoints)
    replay_subscription = _blocking(calls.replay_subscription)
    finish_replay = _blocking(calls.finish_replay)
    rename_subscription = _blocking(calls.rename_subscription)
    move_subscription = _blocking(calls.move_subscription)
    delete_subscription_checkpoints = _blocking(calls.delete_subscription_checkpoints)
    delete_subscription = _blocking(calls.delete_subscription)

    audit_checkpoints = _blocking(calls.audit_checkpoints)
    repair_checkpoints = _blocking(calls.repair_checkpoints)


class AsyncCheckpoints:
    """The statements on an `AsyncConnection` or an `AsyncSession`: `Checkpoints`, awaited."""

    def __init__(
        self, connection: AsyncConnection | AsyncSession | async_scoped_session[Any]
    ) -> None:
        # Not imported here, for it needs greenlet; without it there is no such connection.
        loaded: Any = sys.modules.get("sqlalchemy.ext.asyncio")
        kinds = loaded and (
            loaded.AsyncConnection,
            loaded.AsyncSession,
            loaded.async_scoped_session,
        )
        if not isinstance(connection, kinds or ()):
            raise TypeError(
                f"connection must be an AsyncConnection or an AsyncSession, not {connection!r}; "
                "such as that of `async with engine.begin() as connection`"
            )
        self._connection = connection

    record_checkpoints = _awaitable(calls.record_checkpoints)
    advance_lagging_subscription_checkpoints = _awaitable(
        calls.advance_lagging_subscription_checkpoints
    )

    reserve_next_available_checkpoint = _awaitable(calls.reserve_next_available_checkpoint)
    get_next_process_at = _awaitable(calls.get_next_process_at)
    update_checkpoint_position = _awaitable(calls.update_checkpoint_position)
    update_checkpoint_positions = _awaitable(calls.update_checkpoint_positions)
    record_checkpoint_error = _awaitable(calls.record_checkpoint_error)
    release_checkpoint_reservation = _awaitable(calls.release_checkpoint_reservation)
    extend_checkpoint_reservation = _awaitable(calls.extend_checkpoint_reservation)
    recover_expired_checkpoint_reservations = _awaitable(
        calls.recover_expired_checkpoint_reservations
    )
    record_expired_checkpoint_reservations = _awaitable(
        calls.record_expired_checkpoint_reservations
    )

    list_reservations = _awaitable(calls.list_reservations)
    list_lagging = _awaitable(calls.list_lagging)
    list_retries = _awaitable(calls.list_retries)
    list_failed = _awaitable(calls.list_failed)
    get_checkpoint = _awaitable(calls.get_checkpoint)
    get_metrics = _awaitable(calls.get_metrics)
    skip_checkpoints = _awaitable(calls.skip_checkpoints)
    schedule_checkpoints = _awaitable(calls.schedule_checkpoints)

    get_subscription = _awaitable(calls.get_subscription)
    add_or_update_subscription = _awaitable(calls.add_or_update_subscription)
    set_subscription_status = _awaitable(calls.set_subscription_status)
    lock_checkpoint = _awaitable(calls.lock_checkpoint)
    ensure_checkpoint_exists = _awaitable(calls.ensure_checkpoint_exists)

    pause_subscription = _awaitable(calls.pause_subscription)
    resume_subscription = _awaitable(calls.resume_subscription)
    reset_subscription_checkpoints = _awaitable(calls.reset_subscription_checkpoints)
    replay_subscription = _awaitable(calls.replay_subscription)
    finish_replay = _awaitable(calls.finish_replay)
    rename_subscription = _awaitable(calls.rename_subscription)
    move_subscription = _awaitable(calls.move_subscription)
    delete_subscription_checkpoints = _awaitable(calls.delete_subscription_checkpoints)
    delete_subscription = _awaitable(calls.delete_subscription)

    audit_checkpoints = _awaitable(calls.audit_checkpoints)
    repair_checkpoints = _awaitable(calls.repair_checkpoints)
