"""What an operator does with a whole subscription: pause, reset, replay, rename, move, delete.

Statements that lock both lock the subscription first, then its checkpoints in the common order.
The recorder has them the other way round: a new checkpoint's foreign key locks its subscription
FOR KEY SHARE. So what waits for checkpoints holds the subscription FOR SHARE at most, which lets
the recorder by; and what must hold it FOR UPDATE, to delete, waits for no checkpoint.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    CTE,
    ColumnElement,
    Integer,
    Select,
    Text,
    case,
    delete,
    exists,
    func,
    literal_column,
    null,
    or_,
    select,
    union_all,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, insert

from checkpoints import _arguments as arguments
from checkpoints.records import SubscriptionStatus
from checkpoints.statements import _template as template
from checkpoints.tables import (
    checkpoints,
    checkpoints_ready,
    checkpoints_reserved,
    subscription_groups,
    subscription_status,
    subscriptions,
)

__all__ = [
    "delete_subscription",
    "delete_subscription_checkpoints",
    "finish_replay",
    "move_subscription",
    "pause_subscription",
    "rename_subscription",
    "replay_subscription",
    "reset_subscription_checkpoints",
    "resume_subscription",
]

_ACTIVE: ColumnElement[Any] = literal_column("'active'", subscription_status)
_REPLAY: ColumnElement[Any] = literal_column("'replay'", subscription_status)
_PAUSED: ColumnElement[Any] = literal_column("'paused'", subscription_status)


def _is_none(rows: Select[int]) -> ColumnElement[bool]:
    """That there is no row, by the first in the order of an index.

    Not EXISTS, for which the order is dropped: where most rows are of that kind, by statistics
    that may be old, it is planned as a scan of the table.
    """
    return rows.limit(literal_column("1", Integer())).scalar_subquery().is_(None)


def pause_subscription(id: int) -> Select[int, SubscriptionStatus]:
    """Give consumers nothing more of a subscription that is active or replays.

    One of another status, such as one that is not initialized yet, is left as it is: it is not
    given to consumers either, and `resume_subscription` must not start it. Reservations that run
    go on to their end, and recorders go on recording. A replay's target is kept, for resume.

    The ready checkpoints stay in `checkpoints_ready`, where no reserve reads them.

    Rows: id, status, as it stands now. No row: there is no such subscription. Locks the
    subscription.
    """
    return _pause().params(pause_id=arguments.identifier("id", id))


@cache
def _pause() -> Select[int, SubscriptionStatus]:
    paused = (
        update(subscriptions)
        .where(subscriptions.c.id == template.bigint("pause_id"))
        .values(
            status=case(
                (subscriptions.c.status.in_([_ACTIVE, _REPLAY]), _PAUSED),
                else_=subscriptions.c.status,
            )
        )
        .returning(subscriptions.c.id, subscriptions.c.status)
        .cte("paused")
    )
    return select(paused.c.id, paused.c.status)


def resume_subscription(id: int) -> Select[int, SubscriptionStatus]:
    """Give consumers a paused subscription again: to go on with its replay, if it has a target.

    Without a replay's target it is active. One that is not paused is left as it is. Wakes
    consumers that sleep. Waits for a batch of `reset_subscription_checkpoints` that runs.

    Rows: id, status, as it stands now. No row: there is no such subscription. Locks the
    subscription.
    """
    return _resume().params(resume_id=arguments.identifier("id", id))


@cache
def _resume() -> Select[int, SubscriptionStatus]:
    is_paused = subscriptions.c.status == _PAUSED
    resumed = (
        update(subscriptions)
        .where(subscriptions.c.id == template.bigint("resume_id"))
        .values(
            status=case(
                (is_paused & subscriptions.c.replay_target_position.is_not(None), _REPLAY),
                (is_paused, _ACTIVE),
                else_=subscriptions.c.status,
            )
        )
        .returning(subscriptions.c.id, subscriptions.c.status)
        .cte("resumed")
    )
    return select(resumed.c.id, resumed.c.status)


def replay_subscription(id: int, *, target_position: int) -> Select[int, SubscriptionStatus, int]:
    """Have consumers process a subscription as a replay that ends at a global position.

    Its checkpoints stay where they are. To replay what was processed already: pause it, call
    `reset_subscription_checkpoints` until nothing is left, then this. Whatever its status was, it
    is replay, and each reservation carries the target: a handler knows by it which messages are
    old. `finish_replay` ends it. Wakes consumers that sleep.

    Rows: id, status, replay_target_position. No row: there is no such subscription. Locks the
    subscription.
    """
    return _replay().params(
        replay_subscription_id=arguments.identifier("id", id),
        replay_subscription_target=arguments.position("target_position", target_position),
    )


@cache
def _replay() -> Select[int, SubscriptionStatus, int]:
    replaying = (
        update(subscriptions)
        .where(subscriptions.c.id == template.bigint("replay_subscription_id"))
        .values(
            status=_REPLAY, replay_target_position=template.bigint("replay_subscription_target")
        )
        .returning(
            subscriptions.c.id,
            subscriptions.c.status,
            subscriptions.c.replay_target_position,
        )
        .cte("replaying")
    )
    return select(replaying.c.id, replaying.c.status, replaying.c.replay_target_position)


def finish_replay(subscription_id: int) -> Select[int]:
    """End a replay that has nothing left to do: status active, and no target.

    It has something left while a checkpoint is ready, now or later, or reserved with work. Failed
    ones do not count, unless they are scheduled.

    Call it after a checkpoint of the replay has caught up, in a transaction of its own: in that of
    the position, two consumers that finish the last two checkpoints at once would each see the
    other's as unfinished, and the replay would not end. A subscription that was changed while it
    ran is left alone. So call it now and then too, and after `replay_subscription`, for a replay
    of which nothing is left.

    Rows: id. None: it is not finished, or does not replay, or there is none. Costs two look-ups
    in an index when it is not finished. Locks the subscription when it is.
    """
    return _finish().params(
        finish_subscription_id=arguments.identifier("subscription_id", subscription_id)
    )


@cache
def _finish() -> Select[int]:
    id = template.bigint("finish_subscription_id")
    replay = subscriptions.alias("replay")
    seen = subscriptions.alias("seen")
    ready = template.oldest_of_subscription(checkpoints_ready.c.process_at, id)
    worked_on = (
        template.oldest_of_subscription(checkpoints_reserved.c.reserved_until, id)
        .join(checkpoints, checkpoints.c.id == checkpoints_reserved.c.id)
        .where(
            or_(
                checkpoints.c.status != template.ACTIVE,
                checkpoints.c.stream_version > checkpoints.c.stream_position,
            )
        )
    )
    # Having waited for the row, PostgreSQL asks again whether it replays, but looks for checkpoints
    # with the old snapshot still. A replay that was started anew meanwhile would end at once. Its
    # row has another xmin.
    is_as_seen: ColumnElement[bool] = literal_column("replay.xmin", Text()) == (
        select(literal_column("seen.xmin", Text()))
        .select_from(seen)
        .where(seen.c.id == id)
        .scalar_subquery()
    )
    reached = template.materialized(
        select(replay.c.id)
        .where(
            replay.c.id == id,
            replay.c.status == _REPLAY,
            _is_none(ready),
            _is_none(worked_on),
            is_as_seen,
        )
        .with_for_update(of=replay, key_share=True),
        "reached",
    )
    finished = (
        update(subscriptions)
        .where(subscriptions.c.id == select(reached.c.id).scalar_subquery())
        .values(status=_ACTIVE, replay_target_position=null())
        .returning(subscriptions.c.id)
        .cte("finished")
    )
    return select(finished.c.id)


def reset_subscription_checkpoints(
    subscription_id: int, *, stream_position: int = 0, after: str = "", limit: int = 500
) -> Select[int, SubscriptionStatus, list[str]]:
    """Take checkpoints of a subscription back to `stream_position`, at most `limit`.

    Only while consumers are given none of it: pause it first. One that is active or replays is
    left alone, and its status says so.

    Taken back are those beyond the position, and also those that are reserved (the holder finds
    its token gone), retry or failed: status active, attempts and errors cleared, ready now if they
    lag. A call takes the streams that follow `after` by name: give it the last name of the call
    before, so that it need not pass over what is done. When nothing more follows, begin again
    (`after` empty): it is done when that finds nothing. After an interruption, begin again.

    Clear what the handlers have written after the last call, before the subscription runs again:
    by then no transaction of a handler can commit any more. Or clear it stream by stream, in the
    same transaction.

    Rows: one, with id and status of the subscription and stream_names, the list of those taken
    back, in order. No row: there is no such subscription. Locks the subscription FOR SHARE, so that
    its status stays, then the checkpoints in the common order, and waits.
    """
    return _reset().params(
        reset_subscription_id=arguments.identifier("subscription_id", subscription_id),
        reset_stream_position=arguments.position("stream_position", stream_position),
        reset_after=arguments.text("after", after),
        reset_limit=arguments.limit("limit", limit),
    )


@cache
def _reset() -> Select[int, SubscriptionStatus, list[str]]:
    position = template.bigint("reset_stream_position")
    stopped = template.materialized(
        select(subscriptions.c.id, subscriptions.c.status)
        .where(subscriptions.c.id == template.bigint("reset_subscription_id"))
        .with_for_update(of=subscriptions, read=True),
        "stopped",
    )
    resettable = template.materialized(
        select(checkpoints.c.id)
        .where(
            checkpoints.c.subscription_id
            == select(stopped.c.id)
            .where(stopped.c.status.not_in([_ACTIVE, _REPLAY]))
            .scalar_subquery(),
            checkpoints.c.stream_name > template.string("reset_after"),
            or_(
                checkpoints.c.stream_position > position,
                checkpoints.c.reserved_until.is_not(None),
                checkpoints.c.status != template.ACTIVE,
            ),
        )
        .order_by(checkpoints.c.subscription_id, checkpoints.c.stream_name)
        .limit(template.integer("reset_limit"))
        .with_for_update(of=checkpoints, key_share=True),
        "resettable",
    )
    taken_back = (
        template.update_checkpoints()
        .where(template.is_one_of(resettable))
        .values(
            stream_position=func.least(checkpoints.c.stream_position, position),
            process_at=null(),
            reserved_until=null(),
            **template.succeeded(),
        )
        .returning(checkpoints.c.stream_name)
        .cte("taken_back")
    )
    names: ColumnElement[list[str]] = func.array(
        select(taken_back.c.stream_name).order_by(taken_back.c.stream_name).scalar_subquery(),
        type_=ARRAY(Text()),
    )
    return select(stopped.c.id, stopped.c.status, names.label("stream_names"))


def rename_subscription(id: int, name: str) -> Select[int, str]:
    """Give a subscription another name.

    Consumers that serve it by name must be told the new one. Reservations that run go on.

    Rows: id, name. No row: there is no such subscription. Locks the subscription, and waits for
    recorders that add checkpoints to it.

    Raises:
        sqlalchemy.exc.IntegrityError: on execution, when the group has another one of that name.
            The executing layer raises `SubscriptionExists`.
    """
    return _rename().params(
        rename_id=arguments.identifier("id", id), rename_name=arguments.name("name", name)
    )


@cache
def _rename() -> Select[int, str]:
    renamed = (
        update(subscriptions)
        .where(subscriptions.c.id == template.bigint("rename_id"))
        .values(name=template.string("rename_name"))
        .returning(subscriptions.c.id, subscriptions.c.name)
        .cte("renamed")
    )
    return select(renamed.c.id, renamed.c.name)


def move_subscription(id: int, group_name: str) -> Select[int, int]:
    """Move a subscription to another group, which is made unless it is there.

    Its old group is left, even if it is empty now. Reservations that run go on; once they expire,
    it is for the new group to recover them. Consumers of the new group are not woken: they find
    the subscription when they look the next time.

    Rows: id, subscription_group_id. No row: there is no such subscription. Locks the subscription
    and a group that it adds; waits for recorders that add checkpoints to the subscription, and for
    a transaction that is adding the group.

    Raises:
        sqlalchemy.exc.IntegrityError: on execution, when that group has one of the same name. The
            executing layer raises `SubscriptionExists`.
    """
    return _move().params(
        move_id=arguments.identifier("id", id),
        move_group_name=arguments.name("group_name", group_name),
    )


@cache
def _move() -> Select[int, int]:
    id = template.bigint("move_id")
    name = template.string("move_group_name")
    found = (
        select(subscription_groups.c.id)
        .where(subscription_groups.c.name == name)
        .cte("move_found_group")
    )
    insertion = insert(subscription_groups).from_select(
        ["name"],
        select(name).where(~exists(select(found.c.id)), exists().where(subscriptions.c.id == id)),
    )
    # DO UPDATE, not DO NOTHING: only so is a row returned that was committed after this began.
    added = (
        insertion.on_conflict_do_update(
            index_elements=[subscription_groups.c.name], set_={"name": insertion.excluded.name}
        )
        .returning(subscription_groups.c.id)
        .cte("move_added_group")
    )
    group: CTE = union_all(select(found.c.id), select(added.c.id)).cte("move_group")
    moved = (
        update(subscriptions)
        .where(subscriptions.c.id == id)
        .values(subscription_group_id=select(group.c.id).scalar_subquery())
        .returning(subscriptions.c.id, subscriptions.c.subscription_group_id)
        .cte("moved")
    )
    return select(moved.c.id, moved.c.subscription_group_id)


def delete_subscription_checkpoints(subscription_id: int, *, limit: int = 500) -> Select[int]:
    """Delete checkpoints of a subscription, at most `limit`; those that others lock are left.

    Consumers may run: whoever holds one finds the token gone. Until the transaction ends, nobody
    adds a checkpoint to the subscription: recorders that would, wait. So in each transaction call
    `delete_subscription` after it, until that has deleted; then those recorders are refused, as an
    unknown subscription, and nothing of their batch is recorded.

    Rows: id of each that was deleted. None: none is left, or others lock the rest for the moment,
    or there is no such subscription. Locks the subscription FOR UPDATE, and waits for recorders
    that add to it; waits for no checkpoint. Make it the first statement of its transaction.
    """
    return _delete_checkpoints().params(
        delete_checkpoints_subscription_id=arguments.identifier("subscription_id", subscription_id),
        delete_checkpoints_limit=arguments.limit("limit", limit),
    )


@cache
def _delete_checkpoints() -> Select[int]:
    # A recorder with locked checkpoints may wait for this lock: waiting for them would be a
    # deadlock.
    closed = template.materialized(
        select(subscriptions.c.id)
        .where(subscriptions.c.id == template.bigint("delete_checkpoints_subscription_id"))
        .with_for_update(of=subscriptions),
        "closed",
    )
    deletable = template.materialized(
        select(checkpoints.c.id)
        .where(checkpoints.c.subscription_id == select(closed.c.id).scalar_subquery())
        .order_by(checkpoints.c.subscription_id, checkpoints.c.stream_name)
        .limit(template.integer("delete_checkpoints_limit"))
        .with_for_update(of=checkpoints, skip_locked=True),
        "deletable",
    )
    deleted = (
        delete(checkpoints)
        .where(template.is_one_of(deletable))
        .returning(checkpoints.c.id)
        .cte("deleted_checkpoints")
    )
    return select(deleted.c.id)


def delete_subscription(id: int) -> Select[int, bool]:
    """Delete a subscription that has no checkpoints any more. Its group is left.

    Rows: id, deleted (False: it has checkpoints, and is left as it is). No row: there is no such
    subscription. Locks the subscription, and waits for recorders that add checkpoints to it.

    Raises:
        sqlalchemy.exc.IntegrityError: on execution, when a recorder that it waited for has added
            a checkpoint. After `delete_subscription_checkpoints` in the same transaction (READ
            COMMITTED), that cannot be.
    """
    return _delete().params(delete_id=arguments.identifier("id", id))


@cache
def _delete() -> Select[int, bool]:
    unneeded = template.materialized(
        select(subscriptions.c.id)
        .where(subscriptions.c.id == template.bigint("delete_id"))
        .with_for_update(of=subscriptions),
        "unneeded",
    )
    first = (
        select(checkpoints.c.id)
        .where(checkpoints.c.subscription_id == template.bigint("delete_id"))
        .order_by(checkpoints.c.subscription_id, checkpoints.c.stream_name)
    )
    deleted = (
        delete(subscriptions)
        .where(
            subscriptions.c.id == select(unneeded.c.id).scalar_subquery(),
            _is_none(first),
        )
        .returning(subscriptions.c.id)
        .cte("deleted_subscription")
    )
    was_deleted: ColumnElement[bool] = exists(select(deleted.c.id))
    return select(unneeded.c.id, was_deleted.label("deleted"))
