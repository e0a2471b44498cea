"""The verbs of the executing layer: each a statement, and what its rows become.

One function serves the blocking and the asyncio class. Its docstring is that of their methods.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar

from sqlalchemy import Row, Select

from checkpoints import _arguments as arguments
from checkpoints import statements
from checkpoints.errors import (
    ReservationLost,
    ReservationsLost,
    SubscriptionRunning,
    UnknownSubscription,
)
from checkpoints.records import (
    CheckpointDetail,
    CheckpointPosition,
    CheckpointRecord,
    CheckpointStatus,
    CheckpointViolation,
    ExpiredReservation,
    JSONValue,
    ListedCheckpoint,
    ListedReservation,
    LockedCheckpoint,
    PositionUpdate,
    RecordedCheckpoint,
    ReplayMode,
    Reservation,
    Subscription,
    SubscriptionMetrics,
    SubscriptionStatus,
)
from checkpoints.statements import _template as template

T = TypeVar("T")
Rows = Sequence[Row[*tuple[Any, ...]]]


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """A statement to execute, and what to make of its rows."""

    statement: Select[*tuple[Any, ...]]
    answer: Callable[[Rows], T]

    @property
    def parts(self) -> tuple[Select[*tuple[Any, ...]], dict[str, Any]]:
        """The statement as it is executed fastest: its template, and the values apart."""
        return template.parts(self.statement)


def _ids(rows: Rows) -> list[int]:
    return [row[0] for row in rows]


def _all(record: Callable[..., T]) -> Callable[[Rows], list[T]]:
    return lambda rows: [record(*row) for row in rows]


def _one(record: Callable[..., T]) -> Callable[[Rows], T]:
    return lambda rows: record(*rows[0])


def _one_or_none(record: Callable[..., T]) -> Callable[[Rows], T | None]:
    return lambda rows: record(*rows[0]) if rows else None


def _held(reservation: Reservation, answer: Callable[[Rows], T]) -> Callable[[Rows], T]:
    """The answer of a statement that names a token: no row means that the token is gone."""

    def held(rows: Rows) -> T:
        if not rows:
            raise ReservationLost(reservation.id, reservation.reserved_until)
        return answer(rows)

    return held


def _token(reservation: Reservation) -> tuple[int, datetime]:
    """The id and the token, for a statement."""
    arguments.instance("reservation", reservation, Reservation)
    return reservation.id, reservation.reserved_until


def record_checkpoints(records: Iterable[CheckpointRecord]) -> Call[list[RecordedCheckpoint]]:
    """Add checkpoints, or raise the version of those that exist; those that are new or rose.

    See `checkpoints.record_checkpoints`.

    Raises:
        UnknownSubscription: a record names a subscription that does not exist; nothing was
            recorded.
    """
    return Call(statements.record_checkpoints(records), _all(RecordedCheckpoint))


def advance_lagging_subscription_checkpoints(
    subscription_id: int, *, limit: int = 500
) -> Call[int]:
    """Move lagging checkpoints to their version, at most `limit`; how many were moved.

    Call it, each time in a transaction of its own, until it answers 0. See
    `checkpoints.advance_lagging_subscription_checkpoints`.
    """
    return Call(
        statements.advance_lagging_subscription_checkpoints(subscription_id, limit=limit), len
    )


def reserve_next_available_checkpoint(
    group_name: str,
    reservation_timeout: timedelta,
    *,
    replay_mode: ReplayMode = ReplayMode.ALL,
    subscription_names: Iterable[str] | None = None,
    due_since: datetime | None = None,
    limit: int = 1,
    synchronous_commit: bool = True,
) -> Call[list[Reservation]]:
    """Reserve the checkpoints of a group that have been due longest, at most `limit`.

    An empty list: nothing is due, or others hold it, or there is no such group. Commit at once.
    See `checkpoints.reserve_next_available_checkpoint`.
    """
    return Call(
        statements.reserve_next_available_checkpoint(
            group_name,
            reservation_timeout,
            replay_mode=replay_mode,
            subscription_names=subscription_names,
            due_since=due_since,
            limit=limit,
            synchronous_commit=synchronous_commit,
        ),
        _all(Reservation),
    )


def update_checkpoint_position(
    reservation: Reservation,
    stream_position: int,
    *,
    process_at: datetime | timedelta | None = None,
) -> Call[CheckpointPosition]:
    """Move a checkpoint forward and end its reservation, in the transaction of the handler.

    See `checkpoints.update_checkpoint_position`.

    Raises:
        ReservationLost: let it roll the transaction back.
    """
    return Call(
        statements.update_checkpoint_position(
            *_token(reservation), stream_position, process_at=process_at
        ),
        _held(reservation, _one(CheckpointPosition)),
    )


def update_checkpoint_positions(
    updates: Iterable[PositionUpdate],
) -> Call[list[CheckpointPosition]]:
    """Move many checkpoints forward and end their reservations, in the handlers' transaction.

    `PositionUpdate.of(reservation, position)` makes an update. See
    `checkpoints.update_checkpoint_positions`.

    Raises:
        ReservationsLost: some of them are lost, and the others were updated: let it roll the
            transaction back.
    """
    given = list(updates)

    def all_held(rows: Rows) -> list[CheckpointPosition]:
        if len(rows) < len(given):
            changed = set(_ids(rows))
            raise ReservationsLost(
                [(one.id, one.reserved_until) for one in given if one.id not in changed]
            )
        return [CheckpointPosition(*row) for row in rows]

    return Call(statements.update_checkpoint_positions(given), all_held)


def record_checkpoint_error(
    reservation: Reservation,
    stream_position: int,
    *,
    status: CheckpointStatus,
    retry_attempts: int,
    error: JSONValue,
    process_at: datetime | timedelta | None = None,
) -> Call[CheckpointStatus]:
    """Note that an attempt failed and end the reservation; the status that the checkpoint has now.

    In a transaction of its own, after the handler's was rolled back. See
    `checkpoints.record_checkpoint_error`.

    Raises:
        ReservationLost: nothing was noted.
    """

    def new_status(rows: Rows) -> CheckpointStatus:
        given: CheckpointStatus = rows[0][1]
        return given

    return Call(
        statements.record_checkpoint_error(
            *_token(reservation),
            stream_position,
            status=status,
            retry_attempts=retry_attempts,
            error=error,
            process_at=process_at,
        ),
        _held(reservation, new_status),
    )


def release_checkpoint_reservation(reservation: Reservation | int) -> Call[bool]:
    """Give a checkpoint back without having processed it; whether a reservation was ended.

    An operator gives the id of a checkpoint instead, and ends whatever reservation there is:
    False: there was none. See `checkpoints.release_checkpoint_reservation`.

    Raises:
        ReservationLost: the reservation that was given is not held any more.
    """
    if isinstance(reservation, Reservation):
        return Call(
            statements.release_checkpoint_reservation(reservation.id, reservation.reserved_until),
            _held(reservation, bool),
        )
    return Call(statements.release_checkpoint_reservation(reservation), bool)


def extend_checkpoint_reservation(
    reservation: Reservation, reservation_timeout: timedelta
) -> Call[Reservation]:
    """Keep a checkpoint for longer; the reservation to go on with, for the old token is gone.

    See `checkpoints.extend_checkpoint_reservation`.

    Raises:
        ReservationLost: let it roll the transaction back.
    """
    return Call(
        statements.extend_checkpoint_reservation(*_token(reservation), reservation_timeout),
        _held(reservation, lambda rows: replace(reservation, reserved_until=rows[0][1])),
    )


def get_next_process_at(
    group_name: str,
    *,
    replay_mode: ReplayMode = ReplayMode.ALL,
    subscription_names: Iterable[str] | None = None,
    due_since: datetime | None = None,
) -> Call[timedelta | None]:
    """How long until the next checkpoint of a group is due; None: nothing is ready.

    Negative: it is due, and others hold it. See `checkpoints.get_next_process_at`.
    """

    def due_in(rows: Rows) -> timedelta | None:
        return rows[0][2] if rows else None

    return Call(
        statements.get_next_process_at(
            group_name,
            replay_mode=replay_mode,
            subscription_names=subscription_names,
            due_since=due_since,
        ),
        due_in,
    )


def record_expired_checkpoint_reservations(
    group_name: str,
    *,
    max_attempts: int,
    process_at: timedelta = timedelta(seconds=1),
    limit: int = 100,
) -> Call[list[ExpiredReservation]]:
    """Recover reservations that expired, and count each as an attempt that failed.

    See `checkpoints.record_expired_checkpoint_reservations`.
    """
    return Call(
        statements.record_expired_checkpoint_reservations(
            group_name, max_attempts=max_attempts, process_at=process_at, limit=limit
        ),
        _all(ExpiredReservation),
    )


def recover_expired_checkpoint_reservations(
    group_name: str, *, limit: int = 100
) -> Call[list[int]]:
    """End the reservations of a group that have expired, at most `limit`; the checkpoints' ids.

    See `checkpoints.recover_expired_checkpoint_reservations`.
    """
    return Call(statements.recover_expired_checkpoint_reservations(group_name, limit=limit), _ids)


def list_reservations(
    *, search: str | None = None, offset: int = 0, limit: int = 25
) -> Call[list[ListedReservation]]:
    """A page of the checkpoints that are reserved now, the next to expire first.

    See `checkpoints.list_reservations`.
    """
    return Call(
        statements.list_reservations(search=search, offset=offset, limit=limit),
        _all(ListedReservation),
    )


def list_lagging(
    *, search: str | None = None, offset: int = 0, limit: int = 25
) -> Call[list[ListedCheckpoint]]:
    """A page of the active checkpoints with messages left, those due longest first.

    See `checkpoints.list_lagging`.
    """
    return Call(
        statements.list_lagging(search=search, offset=offset, limit=limit), _all(ListedCheckpoint)
    )


def list_retries(
    *, search: str | None = None, offset: int = 0, limit: int = 25
) -> Call[list[ListedCheckpoint]]:
    """A page of the checkpoints that wait for another attempt, the next one first.

    See `checkpoints.list_retries`.
    """
    return Call(
        statements.list_retries(search=search, offset=offset, limit=limit), _all(ListedCheckpoint)
    )


def list_failed(
    *, search: str | None = None, offset: int = 0, limit: int = 25
) -> Call[list[ListedCheckpoint]]:
    """A page of the checkpoints that were given up, the last to fail first.

    See `checkpoints.list_failed`.
    """
    return Call(
        statements.list_failed(search=search, offset=offset, limit=limit), _all(ListedCheckpoint)
    )


def get_checkpoint(id: int) -> Call[CheckpointDetail | None]:
    """All of one checkpoint; None: there is no such checkpoint."""
    return Call(statements.get_checkpoint(id), _one_or_none(CheckpointDetail))


def get_metrics() -> Call[list[SubscriptionMetrics]]:
    """What is at hand for each subscription, by group and name."""
    return Call(statements.get_metrics(), _all(SubscriptionMetrics))


def skip_checkpoints(ids: Iterable[int]) -> Call[list[int]]:
    """Move checkpoints past the message they stand at; the ids of those that changed.

    See `checkpoints.skip_checkpoints`.
    """
    return Call(statements.skip_checkpoints(ids), _ids)


def schedule_checkpoints(ids: Iterable[int], process_at: datetime | timedelta) -> Call[list[int]]:
    """Have checkpoints processed at a time; the ids of those that were scheduled.

    See `checkpoints.schedule_checkpoints`.
    """
    return Call(statements.schedule_checkpoints(ids, process_at), _ids)


def get_subscription(group_name: str, name: str) -> Call[Subscription | None]:
    """A subscription by its names; None: there is no such subscription."""
    return Call(statements.get_subscription(group_name, name), _one_or_none(Subscription))


def add_or_update_subscription(group_name: str, name: str) -> Call[Subscription]:
    """Add a subscription, and its group, unless they are there; how it stands.

    See `checkpoints.add_or_update_subscription`.
    """
    return Call(statements.add_or_update_subscription(group_name, name), _one(Subscription))


def set_subscription_status(id: int, status: SubscriptionStatus) -> Call[None]:
    """Set the status of a subscription. See `checkpoints.set_subscription_status`.

    Raises:
        UnknownSubscription: there is no such subscription.
    """

    def check(rows: Rows) -> None:
        if not rows:
            raise UnknownSubscription(id)

    return Call(statements.set_subscription_status(id, status), check)


def lock_checkpoint(subscription_id: int, stream_name: str) -> Call[LockedCheckpoint | None]:
    """Lock a checkpoint until the transaction ends; None: there is no such checkpoint.

    See `checkpoints.lock_checkpoint`.
    """
    return Call(
        statements.lock_checkpoint(subscription_id, stream_name), _one_or_none(LockedCheckpoint)
    )


def ensure_checkpoint_exists(
    subscription_id: int, stream_name: str, stream_version: int = 0, stream_position: int = 0
) -> Call[CheckpointPosition]:
    """Add a checkpoint unless it is there; how it stands.

    See `checkpoints.ensure_checkpoint_exists`.

    Raises:
        UnknownSubscription: there is no such subscription.
    """
    return Call(
        statements.ensure_checkpoint_exists(
            subscription_id, stream_name, stream_version, stream_position
        ),
        _one(CheckpointPosition),
    )


def _known(subscription_id: int, answer: Callable[[Rows], T]) -> Callable[[Rows], T]:
    """The answer of a statement of a subscription: no row means that there is none."""

    def known(rows: Rows) -> T:
        if not rows:
            raise UnknownSubscription(subscription_id)
        return answer(rows)

    return known


def _status(rows: Rows) -> SubscriptionStatus:
    status: SubscriptionStatus = rows[0][1]
    return status


def _nothing(_: Rows) -> None:
    return None


def pause_subscription(id: int) -> Call[SubscriptionStatus]:
    """Give consumers nothing more of a subscription; the status that it has now.

    Not paused, if it is neither active nor replays. See `checkpoints.pause_subscription`.

    Raises:
        UnknownSubscription: there is no such subscription.
    """
    return Call(statements.pause_subscription(id), _known(id, _status))


def resume_subscription(id: int) -> Call[SubscriptionStatus]:
    """Give consumers a paused subscription again; the status that it has now.

    Replay, if it was paused while it replayed. See `checkpoints.resume_subscription`.

    Raises:
        UnknownSubscription: there is no such subscription.
    """
    return Call(statements.resume_subscription(id), _known(id, _status))


def reset_subscription_checkpoints(
    subscription_id: int, *, stream_position: int = 0, after: str = "", limit: int = 500
) -> Call[list[str]]:
    """Take checkpoints of a paused subscription back, at most `limit`; their streams, in order.

    Call it, each time in a transaction of its own, with the last stream as `after`; when it
    answers an empty list, from the beginning again, until that answers an empty list too. See
    `checkpoints.reset_subscription_checkpoints`.

    Raises:
        SubscriptionRunning: it is active or replays; nothing was changed.
        UnknownSubscription: there is no such subscription.
    """

    def stream_names(rows: Rows) -> list[str]:
        _, status, names = rows[0]
        if status in (SubscriptionStatus.ACTIVE, SubscriptionStatus.REPLAY):
            raise SubscriptionRunning(subscription_id, status.value)
        return list(names)

    return Call(
        statements.reset_subscription_checkpoints(
            subscription_id, stream_position=stream_position, after=after, limit=limit
        ),
        _known(subscription_id, stream_names),
    )


def replay_subscription(id: int, *, target_position: int) -> Call[None]:
    """Have consumers process a subscription as a replay that ends at a global position.

    See `checkpoints.replay_subscription`.

    Raises:
        UnknownSubscription: there is no such subscription.
    """
    return Call(
        statements.replay_subscription(id, target_position=target_position), _known(id, _nothing)
    )


def finish_replay(subscription_id: int) -> Call[bool]:
    """End a replay that has nothing left to do; whether it was ended.

    In a transaction of its own. See `checkpoints.finish_replay`.
    """
    return Call(statements.finish_replay(subscription_id), bool)


def rename_subscription(id: int, name: str) -> Call[None]:
    """Give a subscription another name. See `checkpoints.rename_subscription`.

    Raises:
        SubscriptionExists: the group has another one of that name.
        UnknownSubscription: there is no such subscription.
    """
    return Call(statements.rename_subscription(id, name), _known(id, _nothing))


def move_subscription(id: int, group_name: str) -> Call[None]:
    """Move a subscription to another group, which is made unless it is there.

    See `checkpoints.move_subscription`.

    Raises:
        SubscriptionExists: that group has one of the same name.
        UnknownSubscription: there is no such subscription.
    """
    return Call(statements.move_subscription(id, group_name), _known(id, _nothing))


def delete_subscription_checkpoints(subscription_id: int, *, limit: int = 500) -> Call[int]:
    """Delete checkpoints of a subscription, at most `limit`; how many were deleted.

    Call it and then `delete_subscription`, each time both in one transaction, until that answers
    True. 0 before: others lock what is left; wait a moment. See
    `checkpoints.delete_subscription_checkpoints`.
    """
    return Call(statements.delete_subscription_checkpoints(subscription_id, limit=limit), len)


def delete_subscription(id: int) -> Call[bool]:
    """Delete a subscription that has no checkpoints any more; False: it has some, and stays.

    See `checkpoints.delete_subscription`.

    Raises:
        UnknownSubscription: there is no such subscription.
    """

    def deleted(rows: Rows) -> bool:
        was_deleted: bool = rows[0][1]
        return was_deleted

    return Call(statements.delete_subscription(id), _known(id, deleted))


def audit_checkpoints() -> Call[list[CheckpointViolation]]:
    """Every violation of the rule between the main table and the hot tables; none: all is well.

    See `checkpoints.audit_checkpoints`.
    """
    return Call(statements.audit_checkpoints(), _all(CheckpointViolation))


def repair_checkpoints(*, limit: int = 1000) -> Call[list[CheckpointViolation]]:
    """Mend checkpoints that break the rule, at most `limit`; what was mended.

    Call it, each time in a transaction of its own, until it answers an empty list. See
    `checkpoints.repair_checkpoints`.
    """

    def mended(rows: Rows) -> list[CheckpointViolation]:
        return [
            CheckpointViolation(id, violation) for id, all_of_it in rows for violation in all_of_it
        ]

    return Call(statements.repair_checkpoints(limit=limit), mended)
