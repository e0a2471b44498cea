"""The consumer's statements: reserve, then say how it went.

`reserved_until` of a reservation is its token. Every statement that names a token changes nothing
when the checkpoint is no longer reserved until then; no row back means that the reservation is
lost, and the transaction must be rolled back.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime, timedelta
from functools import cache
from typing import Any

from sqlalchemy import (
    CTE,
    BigInteger,
    ColumnElement,
    FromClause,
    Integer,
    Select,
    Text,
    and_,
    any_,
    case,
    cast,
    column,
    func,
    literal_column,
    null,
    select,
    true,
    type_coerce,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL
from sqlalchemy.sql.expression import bindparam

from checkpoints import _arguments as arguments
from checkpoints.records import CheckpointStatus, JSONValue, PositionUpdate, ReplayMode
from checkpoints.statements import _template as template
from checkpoints.statements._claiming import claim, main, subscription
from checkpoints.tables import (
    checkpoint_status,
    checkpoints,
    checkpoints_ready,
    subscription_groups,
    subscription_status,
    subscriptions,
)

__all__ = [
    "extend_checkpoint_reservation",
    "get_next_process_at",
    "record_checkpoint_error",
    "release_checkpoint_reservation",
    "reserve_next_available_checkpoint",
    "update_checkpoint_position",
    "update_checkpoint_positions",
]


def reserve_next_available_checkpoint(
    group_name: str,
    reservation_timeout: timedelta,
    *,
    replay_mode: ReplayMode = ReplayMode.ALL,
    subscription_names: Iterable[str] | None = None,
    due_since: datetime | None = None,
    limit: int = 1,
    synchronous_commit: bool = True,
) -> Select[int, int, str, str, int, int, int, CheckpointStatus, int | None, datetime, datetime]:
    """Reserve the checkpoints of a group that have been due longest, at most `limit`.

    A checkpoint is claimed when it is ready, its `process_at` has come, and its subscription is
    active or replays, as `replay_mode` says, and is one of `subscription_names` (None: any). The
    reservation lasts `reservation_timeout` from now. Commit at once, and process in other
    transactions. The first is of the subscription that has waited longest, and so are the others,
    as far as it has more.

    `due_since`: what was due before is not looked for (None: all is). A consumer gives the
    `process_at` of what it took last, and so does not read the dead rows of what was taken before,
    which stay for as long as any transaction in the database is open. It must look for all now and
    then: a checkpoint that is released, or is scheduled for a time that is past, lies before.

    `synchronous_commit` False: PostgreSQL's setting of this name is off for the rest of the
    transaction, whose commit does not wait for the disk. A crash of the server may undo it, and the
    reservation is lost then, as if it had expired: the update finds that. Write nothing else in
    that transaction.

    Rows, those due longest first: id, subscription_id, subscription_name, stream_name,
    stream_position, stream_version, retry_attempts, status, replay_target_position (None: no
    replay), reserved_until (the token), process_at (since when it was due). No row: nothing is due,
    or others hold it, or there is no such group. Locks what it claims until the transaction ends,
    and what another took at the very same moment; never waits for a lock.
    """
    names = _names("reserve", subscription_names)
    return template.bind(
        _reserve(
            arguments.member("replay_mode", replay_mode, ReplayMode),
            named=bool(names),
            synchronous_commit=arguments.boolean("synchronous_commit", synchronous_commit),
        ),
        reserve_group_name=arguments.name("group_name", group_name),
        reserve_timeout=arguments.timeout("reservation_timeout", reservation_timeout),
        **names,
        reserve_due_since=_due_since(due_since),
        reserve_limit=arguments.limit("limit", limit),
    )


def _due_since(due_since: datetime | None) -> datetime | None:
    return None if due_since is None else arguments.moment("due_since", due_since)


def _names(prefix: str, subscription_names: Iterable[str] | None) -> dict[str, list[str]]:
    """The names that are served, for a template that asks for them; none: all are."""
    if subscription_names is None:
        return {}
    return {f"{prefix}_names": arguments.names("subscription_names", subscription_names)}


def _is_served(
    prefix: str, served: FromClause, replay_mode: ReplayMode, *, named: bool
) -> tuple[ColumnElement[bool], ...]:
    """That a subscription has one of the statuses and, where names are given, one of those.

    The statuses stand in the text: with parameters the plan for these values, of which the planner
    expects other numbers of subscriptions, would be another than the one for any.
    """
    statuses = [
        literal_column(f"'{status.value}'", subscription_status)
        for status in replay_mode.subscription_statuses
    ]
    has_status = served.c.status.in_(statuses)
    if not named:
        return (has_status,)
    names = template.unknown(template.strings(f"{prefix}_names"))
    return (has_status, served.c.name == any_(cast(names, ARRAY(Text))))


@cache
def _reserve(
    replay_mode: ReplayMode, *, named: bool, synchronous_commit: bool
) -> Select[int, int, str, str, int, int, int, CheckpointStatus, int | None, datetime, datetime]:
    claimed = claim(
        "reserve",
        checkpoints_ready.c.process_at,
        main.c.process_at <= template.statement_time(),
        main.c.reserved_until.is_(None),
        is_served=_is_served("reserve", subscription, replay_mode, named=named),
        due_since=template.timestamp("reserve_due_since"),
    )
    reserved = (
        template.update_checkpoints(main)
        .where(template.is_one_of(claimed, main))
        .values(reserved_until=template.statement_time() + template.duration("reserve_timeout"))
        .returning(
            main.c.id,
            main.c.subscription_id,
            main.c.stream_name,
            main.c.stream_position,
            main.c.stream_version,
            main.c.retry_attempts,
            main.c.status,
            main.c.process_at,
            main.c.reserved_until,
        )
        .cte("reserved")
    )
    reservations = reservations_of(reserved)
    if synchronous_commit:
        return reservations
    # In a subquery, which is run once and not for each row.
    setting = select(
        func.set_config(
            template.word("synchronous_commit"), template.word("off"), true(), type_=Text
        )
    )
    return reservations.where(setting.scalar_subquery() == template.word("off"))


def reservations_of(
    reserved: CTE,
) -> Select[int, int, str, str, int, int, int, CheckpointStatus, int | None, datetime, datetime]:
    """The rows of reservations, of main rows that were reserved."""
    return (
        select(
            reserved.c.id,
            reserved.c.subscription_id,
            subscription.c.name.label("subscription_name"),
            reserved.c.stream_name,
            reserved.c.stream_position,
            reserved.c.stream_version,
            reserved.c.retry_attempts,
            reserved.c.status,
            subscription.c.replay_target_position,
            reserved.c.reserved_until,
            reserved.c.process_at,
        )
        .join(subscription, subscription.c.id == reserved.c.subscription_id)
        .order_by(reserved.c.process_at, reserved.c.id)
    )


def get_next_process_at(
    group_name: str,
    *,
    replay_mode: ReplayMode = ReplayMode.ALL,
    subscription_names: Iterable[str] | None = None,
    due_since: datetime | None = None,
) -> Select[int, datetime, timedelta]:
    """When the next checkpoint that `reserve_next_available_checkpoint` would take is due.

    For a consumer that found nothing, to sleep no longer than that. `due_since`: what was due
    before is not looked for (None: all is), as by the reserve that found nothing. Locks nothing.

    Rows: id, process_at, due_in (from now, by the database's clock; negative: it is due, and
    others hold it). No row: nothing is ready.
    """
    names = _names("next", subscription_names)
    return template.bind(
        _next_process_at(
            arguments.member("replay_mode", replay_mode, ReplayMode), named=bool(names)
        ),
        next_group_name=arguments.name("group_name", group_name),
        next_due_since=_due_since(due_since),
        **names,
    )


@cache
def _next_process_at(replay_mode: ReplayMode, *, named: bool) -> Select[int, datetime, timedelta]:
    since = func.coalesce(template.timestamp("next_due_since"), template.LONG_AGO)
    oldest = (
        template.oldest_of_subscription(
            checkpoints_ready.c.process_at, subscriptions.c.id, since=since
        )
        .add_columns(checkpoints_ready.c.process_at)
        .limit(literal_column("1", Integer()))
        .lateral("oldest")
    )
    return (
        select(
            oldest.c.id,
            oldest.c.process_at,
            type_coerce(oldest.c.process_at - template.statement_time(), INTERVAL()).label(
                "due_in"
            ),
        )
        .select_from(subscriptions)
        .join(
            subscription_groups, subscription_groups.c.id == subscriptions.c.subscription_group_id
        )
        .join(oldest, true())
        .where(
            subscription_groups.c.name == template.string("next_group_name"),
            *_is_served("next", subscriptions, replay_mode, named=named),
        )
        .order_by(oldest.c.process_at)
        .limit(literal_column("1", Integer()))
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
    id: int,
    reserved_until: datetime,
    stream_position: int,
    *,
    process_at: datetime | timedelta | None = None,
) -> Select[int, int, int]:
    """Move a checkpoint forward and end its reservation: the work is done.

    The position never moves backwards. Status active, attempts and errors cleared. A checkpoint
    that still lags is ready again, at `process_at` (a timedelta: so long from now; None: now). Run
    it in the transaction of the handler's own writes.

    Rows: id, stream_version, stream_position. No row: the reservation is lost. Locks the
    checkpoint.
    """
    return template.bind(
        _update(),
        **_held("update", id, reserved_until),
        update_stream_position=arguments.position("stream_position", stream_position),
        **template.due_values("update", process_at),
    )


@cache
def _update() -> Select[int, int, int]:
    updated = (
        template.update_checkpoints()
        .where(*_is_held("update"))
        .values(**_processed(template.bigint("update_stream_position"), template.due_at("update")))
        .returning(checkpoints.c.id, checkpoints.c.stream_version, checkpoints.c.stream_position)
        .cte("updated")
    )
    return select(updated.c.id, updated.c.stream_version, updated.c.stream_position)


def _processed(
    stream_position: ColumnElement[int], process_at: ColumnElement[datetime | None]
) -> dict[str, Any]:
    """The values of a checkpoint that was processed up to a position."""
    position = func.greatest(checkpoints.c.stream_position, stream_position)
    return {
        "stream_position": position,
        **template.succeeded(),
        # As the trigger would set it, which is not called for a row that is complete.
        "process_at": case(
            (
                checkpoints.c.stream_version > position,
                func.coalesce(process_at, template.statement_time()),
            ),
            else_=null(),
        ),
        "reserved_until": null(),
    }


def update_checkpoint_positions(updates: Iterable[PositionUpdate]) -> Select[int, int, int]:
    """Move many checkpoints forward and end their reservations, as `update_checkpoint_position`.

    One statement for all; any number has one SQL text. Each is changed only when it is still
    reserved until its token, whatever becomes of the others.

    Rows: id, stream_version, stream_position of each that was changed. One that is missing: its
    reservation is lost, and what was written for it must be rolled back, so with all the others of
    the transaction. Locks the checkpoints in the common order and waits.

    Raises:
        TypeError, ValueError: an update is not a `PositionUpdate`, or a checkpoint is there twice.
    """
    given = arguments.instances("updates", updates, PositionUpdate)
    ids = [update.id for update in given]
    if len(set(ids)) < len(ids):
        index, id = next((n, id) for n, id in enumerate(ids) if id in ids[:n])
        raise ValueError(f"updates[{index}] must be another checkpoint: {id!r} is there twice")
    # Null for an array of nothing else: beside longer arrays `unnest` gives nulls for it.
    moments: list[datetime | None] | None = None
    delays: list[timedelta | None] | None = None
    if any(update.process_at is not None for update in given):
        dues = [template.due(update.process_at) for update in given]
        moments, delays = [moment for moment, _ in dues], [delay for _, delay in dues]
    return template.bind(
        _update_many(),
        update_many_ids=ids,
        update_many_reserved_until=[update.reserved_until for update in given],
        update_many_stream_positions=[update.stream_position for update in given],
        update_many_process_at=moments,
        update_many_process_in=delays,
    )


@cache
def _update_many() -> Select[int, int, int]:
    given = (
        func.unnest(
            template.unknown(template.bigints("update_many_ids")),
            template.timestamps("update_many_reserved_until"),
            template.bigints("update_many_stream_positions"),
            template.timestamps("update_many_process_at"),
            template.durations("update_many_process_in"),
        )
        .table_valued(
            column("id", BigInteger),
            column("reserved_until", template.TIMESTAMP),
            column("stream_position", BigInteger),
            column("process_at", template.TIMESTAMP),
            column("process_in", INTERVAL),
        )
        .render_derived(name="given")
    )
    process_at = func.coalesce(
        given.c.process_at, template.statement_time() + given.c.process_in
    ).label("process_at")
    held = template.materialized(
        select(checkpoints.c.id, given.c.stream_position, process_at)
        .select_from(given)
        .join(
            checkpoints,
            and_(
                checkpoints.c.id == given.c.id,
                checkpoints.c.reserved_until == given.c.reserved_until,
            ),
        )
        .order_by(checkpoints.c.subscription_id, checkpoints.c.stream_name)
        .with_for_update(of=checkpoints, key_share=True),
        "update_many_held",
    )
    updated = (
        template.update_checkpoints()
        .where(checkpoints.c.id == held.c.id)
        .values(**_processed(held.c.stream_position, held.c.process_at))
        .returning(checkpoints.c.id, checkpoints.c.stream_version, checkpoints.c.stream_position)
        .cte("updated_many")
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
    process_at: datetime | timedelta | None = None,
) -> Select[int, CheckpointStatus]:
    """Note that an attempt failed and end the reservation.

    `status` retry: another attempt at `process_at`, which must be given (a timedelta: so long from
    now, by the database's clock). `failed`: none until an
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
        raise ValueError(
            "process_at must be an aware datetime or a timedelta when status is 'retry', not None"
        )
    if status is CheckpointStatus.FAILED and process_at is not None:
        raise ValueError(f"process_at must be None when status is 'failed', not {process_at!r}")
    return template.bind(
        _record_error(),
        **_held("error", id, reserved_until),
        error_stream_position=arguments.position("stream_position", stream_position),
        error_status=status,
        error_retry_attempts=arguments.attempts("retry_attempts", retry_attempts),
        error_value=arguments.json_value("error", error),
        **template.due_values("error", process_at),
    )


@cache
def _record_error() -> Select[int, CheckpointStatus]:
    position = func.greatest(
        checkpoints.c.stream_position, template.bigint("error_stream_position")
    )
    errored = (
        template.update_checkpoints()
        .where(*_is_held("error"))
        .values(
            stream_position=position,
            status=bindparam("error_status", type_=checkpoint_status),
            retry_attempts=template.integer("error_retry_attempts"),
            retries=template.appended(
                template.integer("error_retry_attempts"), position, template.json("error_value")
            ),
            process_at=template.due_at("error"),
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
        return template.bind(_release_any(), release_any_id=arguments.identifier("id", id))
    return template.bind(_release(), **_held("release", id, reserved_until))


@cache
def _release() -> Select[int]:
    released = (
        template.update_checkpoints()
        .where(*_is_held("release"))
        .values(reserved_until=null())
        .returning(checkpoints.c.id)
        .cte("released")
    )
    return select(released.c.id)


@cache
def _release_any() -> Select[int]:
    released = (
        template.update_checkpoints()
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
    return template.bind(
        _extend(),
        **_held("extend", id, reserved_until),
        extend_timeout=arguments.timeout("reservation_timeout", reservation_timeout),
    )


@cache
def _extend() -> Select[int, datetime]:
    extended = (
        template.update_checkpoints()
        .where(*_is_held("extend"))
        .values(reserved_until=template.statement_time() + template.duration("extend_timeout"))
        .returning(checkpoints.c.id, checkpoints.c.reserved_until)
        .cte("extended")
    )
    return select(extended.c.id, extended.c.reserved_until)
