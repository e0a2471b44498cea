"""Subscriptions, and single checkpoints that an application keeps itself."""

from __future__ import annotations

from datetime import datetime
from functools import cache

from sqlalchemy import Select, case, cast, exists, literal_column, null, select, union_all, update
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.sql.expression import bindparam

from checkpoints import _arguments as arguments
from checkpoints.records import CheckpointStatus, SubscriptionStatus
from checkpoints.statements import _template as template
from checkpoints.tables import (
    checkpoints,
    subscription_groups,
    subscription_status,
    subscriptions,
)

__all__ = [
    "add_or_update_subscription",
    "ensure_checkpoint_exists",
    "get_subscription",
    "lock_checkpoint",
    "set_subscription_status",
]


def get_subscription(
    group_name: str, name: str
) -> Select[int, SubscriptionStatus, int, int | None]:
    """A subscription by its names. Locks nothing.

    Rows: id, status, subscription_group_id, replay_target_position (None: no replay). No row: there
    is no such subscription.
    """
    return template.bind(
        _get(),
        get_subscription_group_name=arguments.name("group_name", group_name),
        get_subscription_name=arguments.name("name", name),
    )


@cache
def _get() -> Select[int, SubscriptionStatus, int, int | None]:
    return (
        select(
            subscriptions.c.id,
            subscriptions.c.status,
            subscriptions.c.subscription_group_id,
            subscriptions.c.replay_target_position,
        )
        .join(
            subscription_groups, subscription_groups.c.id == subscriptions.c.subscription_group_id
        )
        .where(
            subscription_groups.c.name == template.string("get_subscription_group_name"),
            subscriptions.c.name == template.string("get_subscription_name"),
        )
    )


def add_or_update_subscription(
    group_name: str, name: str
) -> Select[int, SubscriptionStatus, int, int | None]:
    """Add a subscription, and its group, unless they are there.

    A new one is uninitialized: consumers are given its checkpoints once `set_subscription_status`
    has made it active. One that is there is left as it is. Many processes may run it at once.

    Rows: id, status, subscription_group_id, replay_target_position, always one row. Locks what it
    adds; waits for one that another transaction is adding.
    """
    return template.bind(
        _add(),
        add_group_name=arguments.name("group_name", group_name),
        add_name=arguments.name("name", name),
    )


@cache
def _add() -> Select[int, SubscriptionStatus, int, int | None]:
    # ON CONFLICT DO UPDATE, not DO NOTHING: only so is a row returned that was committed after
    # this statement began. Rows that are there already are found first, and never written.
    found_group = (
        select(subscription_groups.c.id)
        .where(subscription_groups.c.name == template.string("add_group_name"))
        .cte("found_group")
    )
    group_insertion = insert(subscription_groups).from_select(
        ["name"],
        select(template.string("add_group_name")).where(~exists(select(found_group.c.id))),
    )
    added_group = (
        group_insertion.on_conflict_do_update(
            index_elements=[subscription_groups.c.name],
            set_={"name": group_insertion.excluded.name},
        )
        .returning(subscription_groups.c.id)
        .cte("added_group")
    )
    group = union_all(select(found_group.c.id), select(added_group.c.id)).cte("the_group")

    columns = (
        subscriptions.c.id,
        subscriptions.c.status,
        subscriptions.c.subscription_group_id,
        subscriptions.c.replay_target_position,
    )
    found = (
        select(*columns)
        .join(found_group, found_group.c.id == subscriptions.c.subscription_group_id)
        .where(subscriptions.c.name == template.string("add_name"))
        .cte("found")
    )
    insertion = insert(subscriptions).from_select(
        ["subscription_group_id", "name"],
        select(group.c.id, template.string("add_name")).where(~exists(select(found.c.id))),
    )
    added = (
        insertion.on_conflict_do_update(
            index_elements=[subscriptions.c.subscription_group_id, subscriptions.c.name],
            set_={"name": insertion.excluded.name},
        )
        .returning(*columns)
        .cte("added")
    )
    either = union_all(select(*found.c), select(*added.c)).subquery("either")
    return select(
        either.c.id,
        either.c.status,
        either.c.subscription_group_id,
        either.c.replay_target_position,
    )


def set_subscription_status(id: int, status: SubscriptionStatus) -> Select[int, SubscriptionStatus]:
    """Set the status of a subscription, such as active, or paused.

    Active ends a replay: its target is forgotten.

    The checkpoints of a paused one stay as they are, and recorders go on recording; consumers are
    given none of it. Reservations that run go on to their end. Becoming active or replay wakes
    consumers that sleep.

    Rows: id, status. No row: there is no such subscription. Locks the subscription.
    """
    return template.bind(
        _set_status(),
        set_status_id=arguments.identifier("id", id),
        set_status_status=arguments.member("status", status, SubscriptionStatus),
    )


@cache
def _set_status() -> Select[int, SubscriptionStatus]:
    status = cast(bindparam("set_status_status", type_=subscription_status), subscription_status)
    active = literal_column("'active'", subscription_status)
    changed = (
        update(subscriptions)
        .where(subscriptions.c.id == template.bigint("set_status_id"))
        .values(
            status=status,
            # A replay that is over must not come back when the subscription is resumed.
            replay_target_position=case(
                (status == active, null()),
                else_=subscriptions.c.replay_target_position,
            ),
        )
        .returning(subscriptions.c.id, subscriptions.c.status)
        .cte("changed")
    )
    return select(changed.c.id, changed.c.status)


def lock_checkpoint(
    subscription_id: int, stream_name: str
) -> Select[int, int, int, CheckpointStatus, datetime | None]:
    """Lock a checkpoint until the transaction ends, such as a recorder's own global position.

    Rows: id, stream_version, stream_position, status, reserved_until. No row: there is no such
    checkpoint. Waits for the lock, as long as `lock_timeout` lets it.
    """
    return template.bind(
        _lock(),
        lock_subscription_id=arguments.identifier("subscription_id", subscription_id),
        lock_stream_name=arguments.name("stream_name", stream_name),
    )


@cache
def _lock() -> Select[int, int, int, CheckpointStatus, datetime | None]:
    return (
        select(
            checkpoints.c.id,
            checkpoints.c.stream_version,
            checkpoints.c.stream_position,
            checkpoints.c.status,
            checkpoints.c.reserved_until,
        )
        .where(
            checkpoints.c.subscription_id == template.bigint("lock_subscription_id"),
            checkpoints.c.stream_name == template.string("lock_stream_name"),
        )
        .with_for_update(of=checkpoints, key_share=True)
    )


def ensure_checkpoint_exists(
    subscription_id: int, stream_name: str, stream_version: int = 0, stream_position: int = 0
) -> Select[int, int, int]:
    """Add a checkpoint unless it is there; one that is there is left as it is.

    Rows: id, stream_version, stream_position, always one row. Locks what it adds; waits for one
    that another transaction is adding.

    Raises:
        sqlalchemy.exc.IntegrityError: on execution, for an unknown subscription. The executing
            layer raises `UnknownSubscription`.
    """
    arguments.checkpoint(subscription_id, stream_name, stream_version, stream_position)
    return template.bind(
        _ensure(),
        ensure_subscription_id=subscription_id,
        ensure_stream_name=stream_name,
        ensure_stream_version=stream_version,
        ensure_stream_position=stream_position,
    )


@cache
def _ensure() -> Select[int, int, int]:
    columns = (checkpoints.c.id, checkpoints.c.stream_version, checkpoints.c.stream_position)
    existing = (
        select(*columns)
        .where(
            checkpoints.c.subscription_id == template.bigint("ensure_subscription_id"),
            checkpoints.c.stream_name == template.string("ensure_stream_name"),
        )
        .cte("existing")
    )
    insertion = insert(checkpoints).from_select(
        ["subscription_id", "stream_name", "stream_version", "stream_position"],
        select(
            template.bigint("ensure_subscription_id"),
            template.string("ensure_stream_name"),
            template.bigint("ensure_stream_version"),
            template.bigint("ensure_stream_position"),
        ).where(~exists(select(existing.c.id))),
    )
    ensured = (
        insertion.on_conflict_do_update(
            index_elements=[checkpoints.c.subscription_id, checkpoints.c.stream_name],
            set_={"stream_name": insertion.excluded.stream_name},
        )
        .returning(*columns)
        .cte("ensured")
    )
    either = union_all(select(*existing.c), select(*ensured.c)).subquery("either")
    return select(either.c.id, either.c.stream_version, either.c.stream_position)
