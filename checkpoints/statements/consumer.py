"""The consumer's statements: reserve, then say how it went.

`reserved_until` of a reservation is its token. Every statement that names a token changes nothing
when the checkpoint is no longer reserved until then; no row back means that the reservation is
lost, and the transaction must be rolled back.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import CTE, Column, ColumnElement, Select, any_, func, null, select, true, update
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.sql.expression import bindparam

from checkpoints import _arguments as arguments
from checkpoints.records import CheckpointStatus, JSONValue, ReplayMode
from checkpoints.statements import _template as template
from checkpoints.tables import (
    checkpoint_status,
    checkpoints,
    checkpoints_ready,
    checkpoints_reserved,
    subscription_groups,
    subscription_status,
    subscriptions,
)

__all__ = [
    "extend_checkpoint_reservation",
    "record_checkpoint_error",
    "recover_expired_checkpoint_reservations",
    "release_checkpoint_reservation",
    "reserve_next_available_checkpoint",
    "update_checkpoint_position",
]


def reserve_next_available_checkpoint(
    group_name: str,
    reservation_timeout: timedelta,
    *,
    replay_mode: ReplayMode = ReplayMode.ALL,
    limit: int = 1,
) -> Select[int, int, str, str, int, int, int, CheckpointStatus, int | None, datetime]:
    """Reserve the checkpoints of a group that have been due longest, at most `limit`.

    A checkpoint is claimed when it is ready, its `process_at` has come, and its subscription is
    active or replays, as `replay_mode` says. The reservation lasts `reservation_timeout` from now.
    Commit at once, and process in other transactions.

    Rows, those due longest first: id, subscription_id, subscription_name, stream_name,
    stream_position, stream_version, retry_attempts, status, replay_target_position (None: no
    replay), reserved_until (the token). No row: nothing is due, or others hold it, or there is no
    such group. Locks what it claims until the transaction ends, and what another took at the very
    same moment; never waits for a lock.
    """
    return _reserve().params(
        reserve_group_name=arguments.name("group_name", group_name),
        reserve_timeout=arguments.timeout("reservation_timeout", reservation_timeout),
        reserve_subscription_statuses=arguments.member(
            "replay_mode", replay_mode, ReplayMode
        ).subscription_statuses,
        reserve_limit=arguments.limit("limit", limit),
    )


@cache
def _reserve() -> Select[int, int, str, str, int, int, int, CheckpointStatus, int | None, datetime]:
    claimed = _claimed(
        "reserve",
        checkpoints_ready.c.process_at,
        checkpoints.c.process_at <= template.statement_time(),
        checkpoints.c.reserved_until.is_(None),
        subscriptions.c.status
        == any_(bindparam("reserve_subscription_statuses", type_=ARRAY(subscription_status))),
    )
    reserved = (
        update(checkpoints)
        .where(template.is_one_of(claimed))
        .values(reserved_until=template.statement_time() + template.duration("reserve_timeout"))
        .returning(
            checkpoints.c.id,
            checkpoints.c.subscription_id,
            checkpoints.c.stream_name,
            checkpoints.c.stream_position,
            checkpoints.c.stream_version,
            checkpoints.c.retry_attempts,
            checkpoints.c.status,
            checkpoints.c.process_at,
            checkpoints.c.reserved_until,
        )
        .cte("reserved")
    )
    return (
        select(
            reserved.c.id,
            reserved.c.subscription_id,
            subscriptions.c.name.label("subscription_name"),
            reserved.c.stream_name,
            reserved.c.stream_position,
            reserved.c.stream_version,
            reserved.c.retry_attempts,
            reserved.c.status,
            subscriptions.c.replay_target_position,
            reserved.c.reserved_until,
        )
        .join(subscriptions, subscriptions.c.id == reserved.c.subscription_id)
        .order_by(reserved.c.process_at, reserved.c.id)
    )


def _claimed(prefix: str, due_at: Column[datetime], *conditions: ColumnElement[bool]) -> CTE:
    """Lock checkpoints of a group that are due in a hot table, the oldest first, waiting for none.

    The due rows come in order, and each is looked up and locked before the next: a join in one
    step may be planned as one over all rows at hand, or sorted only after all of them are locked.
    Only the main row is locked, which guards the checkpoint: a hot row locked beside it would stay
    locked when the main row is passed over, and its holder would wait for this transaction.
    `conditions` ask the main row again: when another transaction changed it meanwhile, PostgreSQL
    checks them once more on what it became. Never without OF: that would lock the group and the
    subscription, and hold up all other consumers.
    """
    hot = due_at.table
    due = (
        select(hot.c.id, due_at)
        .where(due_at <= template.statement_time())
        .order_by(due_at)
        .subquery("due")
    )
    locked = (
        select(checkpoints.c.id)
        .join(subscriptions, subscriptions.c.id == checkpoints.c.subscription_id)
        .join(
            subscription_groups, subscription_groups.c.id == subscriptions.c.subscription_group_id
        )
        .where(
            checkpoints.c.id == due.c.id,
            subscription_groups.c.name == template.string(f"{prefix}_group_name"),
            *conditions,
        )
        .with_for_update(of=checkpoints, key_share=True, skip_locked=True)
        .lateral("locked")
    )
    return template.materialized(
        select(locked.c.id)
        .select_from(due.join(locked, true()))
        .limit(template.integer(f"{prefix}_limit")),
        f"{prefix}_claimed",
    )


def _is_held(prefix: str) -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """That a checkpoint is reserved with this token."""
    return (
        checkpoints.c.id == template.bigint(f"{prefix}_id"),
        checkpoints.c.reserved_until == template.timestamp(f"{prefix}_reserved_until"),
    )


def _held(prefix: str, id: int, reserved_until: datetime) -> dict[str, Any]:
    return {
        f"{prefix}_id": arguments.identifier("id", id),
        f"{prefix}_reserved_until": arguments.moment("reserved_until", reserved_until),
    }


def update_checkpoint_position(
    id: int, reserved_until: datetime, stream_position: int, *, process_at: datetime | None = None
) -> Select[int, int, int]:
    """Move a checkpoint forward and end its reservation: the work is done.

    The position never moves backwards. Status active, attempts and errors cleared. A checkpoint
    that still lags is ready again, at `process_at` (None: now). Run it in the transaction of the
    handler's own writes.

    Rows: id, stream_version, stream_position. No row: the reservation is lost. Locks the
    checkpoint.
    """
    return _update().params(
        **_held("update", id, reserved_until),
        update_stream_position=arguments.position("stream_position", stream_position),
        update_process_at=process_at and arguments.moment("process_at", process_at),
    )


@cache
def _update() -> Select[int, int, int]:
    updated = (
        update(checkpoints)
        .where(*_is_held("update"))
        .values(
            stream_position=func.greatest(
                checkpoints.c.stream_position, template.bigint("update_stream_position")
            ),
            **template.succeeded(),
            process_at=template.timestamp("update_process_at"),
            reserved_until=null(),
        )
        .returning(checkpoints.c.id, checkpoints.c.stream_version, checkpoints.c.stream_position)
        .cte("updated")
    )
    return select(updated.c.id, updated.c.stream_version, updated.c.stream_position)


def record_checkpoint_error(
    id: int,
    reserved_until: datetime,
    stream_position: int,
    *,
    status: CheckpointStatus,
    retry_attempts: int,
    error: JSONValue,
    process_at: datetime | None = None,
) -> Select[int, CheckpointStatus]:
    """Note that an attempt failed and end the reservation.

    `status` retry: another attempt at `process_at`, which must be given. `failed`: none until an
    operator schedules it, and `process_at` must be None. `stream_position` is how far the attempt
    got before the error; the position never moves backwards. `retry_attempts` is the number of
    attempts that failed so far. `error`, any JSON value, is appended to `retries` with the attempt,
    the position and the time. Run it in a transaction of its own, after the handler's was rolled
    back.

    Rows: id, status. No row: the reservation is lost. Locks the checkpoint.
    """
    status = arguments.member("status", status, CheckpointStatus)
    if status is CheckpointStatus.ACTIVE:
        raise ValueError(f"status must be 'retry' or 'failed', not {status.value!r}")
    if status is CheckpointStatus.RETRY and process_at is None:
        raise ValueError("process_at must be an aware datetime when status is 'retry', not None")
    if status is CheckpointStatus.FAILED and process_at is not None:
        raise ValueError(f"process_at must be None when status is 'failed', not {process_at!r}")
    return _record_error().params(
        **_held("error", id, reserved_until),
        error_stream_position=arguments.position("stream_position", stream_position),
        error_status=status,
        error_retry_attempts=arguments.attempts("retry_attempts", retry_attempts),
        error_value=arguments.json_value("error", error),
        error_process_at=process_at and arguments.moment("process_at", process_at),
    )


@cache
def _record_error() -> Select[int, CheckpointStatus]:
    position = func.greatest(
        checkpoints.c.stream_position, template.bigint("error_stream_position")
    )
    attempt = func.jsonb_build_array(
        func.jsonb_build_object(
            template.word("attempt"),
            template.integer("error_retry_attempts"),
            template.word("stream_position"),
            position,
            template.word("recorded_at"),
            template.statement_time(),
            template.word("error"),
            template.json("error_value"),
            type_=JSONB,
        ),
        type_=JSONB,
    )
    errored = (
        update(checkpoints)
        .where(*_is_held("error"))
        .values(
            stream_position=position,
            status=bindparam("error_status", type_=checkpoint_status),
            retry_attempts=template.integer("error_retry_attempts"),
            retries=func.coalesce(checkpoints.c.retries, func.jsonb_build_array(type_=JSONB)).op(
                "||"
            )(attempt),
            process_at=template.timestamp("error_process_at"),
            reserved_until=null(),
        )
        .returning(checkpoints.c.id, checkpoints.c.status)
        .cte("errored")
    )
    return select(errored.c.id, errored.c.status)


def release_checkpoint_reservation(id: int, reserved_until: datetime | None = None) -> Select[int]:
    """Give a checkpoint back without having processed it: ready again if there is work.

    A consumer names its token. An operator gives None and ends whatever reservation there is; its
    holder finds its token gone.

    Rows: id. No row: the reservation is lost, or for an operator, there was none. Locks the
    checkpoint.
    """
    if reserved_until is None:
        return _release_any().params(release_any_id=arguments.identifier("id", id))
    return _release().params(**_held("release", id, reserved_until))


@cache
def _release() -> Select[int]:
    released = (
        update(checkpoints)
        .where(*_is_held("release"))
        .values(reserved_until=null())
        .returning(checkpoints.c.id)
        .cte("released")
    )
    return select(released.c.id)


@cache
def _release_any() -> Select[int]:
    released = (
        update(checkpoints)
        .where(
            checkpoints.c.id == template.bigint("release_any_id"),
            checkpoints.c.reserved_until.is_not(None),
        )
        .values(reserved_until=null())
        .returning(checkpoints.c.id)
        .cte("released_any")
    )
    return select(released.c.id)


def extend_checkpoint_reservation(
    id: int, reserved_until: datetime, reservation_timeout: timedelta
) -> Select[int, datetime]:
    """Keep a checkpoint for longer: until `reservation_timeout` from now.

    Works after the reservation expired too, as long as nobody recovered it.

    Rows: id, reserved_until, which is the new token; the old one is gone. No row: the reservation
    is lost. Locks the checkpoint.
    """
    return _extend().params(
        **_held("extend", id, reserved_until),
        extend_timeout=arguments.timeout("reservation_timeout", reservation_timeout),
    )


@cache
def _extend() -> Select[int, datetime]:
    extended = (
        update(checkpoints)
        .where(*_is_held("extend"))
        .values(reserved_until=template.statement_time() + template.duration("extend_timeout"))
        .returning(checkpoints.c.id, checkpoints.c.reserved_until)
        .cte("extended")
    )
    return select(extended.c.id, extended.c.reserved_until)


def recover_expired_checkpoint_reservations(group_name: str, *, limit: int = 100) -> Select[int]:
    """End the reservations of a group that have expired, at most `limit`.

    What still has work is ready again, its status kept. Any process may run it, at any time.

    Rows: id of each whose reservation ended. Locks them, and never waits for a lock.
    """
    return _recover().params(
        recover_group_name=arguments.name("group_name", group_name),
        recover_limit=arguments.limit("limit", limit),
    )


@cache
def _recover() -> Select[int]:
    expired = _claimed(
        "recover",
        checkpoints_reserved.c.reserved_until,
        checkpoints.c.reserved_until <= template.statement_time(),
    )
    recovered = (
        update(checkpoints)
        .where(template.is_one_of(expired))
        .values(reserved_until=null())
        .returning(checkpoints.c.id)
        .cte("recovered")
    )
    return select(recovered.c.id)
