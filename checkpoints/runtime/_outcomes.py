"""What a consumer does in the database, and what it says of it: the same for threads and asyncio.

The functions of a connection block; the asyncio consumer calls them by `run_sync`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import Enum, auto
from functools import wraps
from operator import attrgetter
from typing import ParamSpec, Self

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import DBAPIError

from checkpoints.errors import ReservationsLost
from checkpoints.executing import Checkpoints, translated
from checkpoints.records import (
    CheckpointStatus,
    ExpiredReservation,
    JSONValue,
    PositionUpdate,
    Reservation,
    SubscriptionStatus,
)
from checkpoints.runtime._due_since import DueSince
from checkpoints.runtime._held import Holding
from checkpoints.runtime._outage import Backoff, OutageLog, is_conflict, is_outage, is_passing
from checkpoints.runtime.retry import RetryPolicy, describe_error, message_of
from checkpoints.runtime.settings import ConsumerSettings
from checkpoints.runtime.telemetry import Telemetry, fields, logger
from checkpoints.tables import subscription_groups, subscriptions

P = ParamSpec("P")

RECOVERED_AT_ONCE = 100

# After so many in a row, one counts as the handler's error.
_CONFLICTS = 20
_BROKEN = 5


class Goal(Enum):
    """When a consumer ends, besides being stopped."""

    NEVER = auto()
    DRAINED = auto()
    ONE_BATCH = auto()


@dataclass(slots=True)
class Attempt:
    """One attempt at a checkpoint, over its repetitions: the database may get in the way."""

    position: int | None = None
    in_handler: bool = False
    """The handler runs, or raised."""
    connected: bool = False
    """It had a connection."""
    done_outside: bool = False
    """A handler outside a transaction is done, and not run again when noting that fails."""
    backoff: Backoff = field(default_factory=Backoff)
    conflicts: int = 0
    broken: int = 0

    def repeat_in(self, error: BaseException, *, outside: bool, broken: bool) -> float | None:
        """The seconds until the attempt is repeated; None: the error is the handler's.

        `outside`: the handler has no transaction that could be repeated. `broken`: the connection
        that the attempt had broke, whatever the handler made of that.
        """
        if outside and self.in_handler:
            return None
        if is_conflict(error):
            self.conflicts += 1
            return None if self.conflicts > _CONFLICTS else self.backoff.next() / 10
        if not broken and (self.in_handler or not is_outage(error)):
            return None
        if self.connected:
            # The database may be restarting; or this is what brings it down.
            self.broken += 1
            if self.broken > _BROKEN:
                return None
        return self.backoff.next()


@dataclass(frozen=True, slots=True)
class Failure:
    """An attempt that failed, and what follows."""

    error: BaseException
    attempt: int
    status: CheckpointStatus
    delay: timedelta | None
    description: JSONValue

    @classmethod
    def of(cls, reservation: Reservation, error: BaseException, retry: RetryPolicy) -> Self:
        """What the policy says of this error."""
        attempt = reservation.retry_attempts + 1
        failed = attempt >= retry.attempts_for(error)
        return cls(
            error,
            attempt,
            CheckpointStatus.FAILED if failed else CheckpointStatus.RETRY,
            None if failed else retry.delay_after(attempt),
            describe_error(error),
        )


def timed_out(
    reservation: Reservation, settings: ConsumerSettings, cause: BaseException | None = None
) -> TimeoutError:
    """The error of a handler that took too long; the cause says where it was ended."""
    longest = settings.handler_timeout or timedelta(0)
    error = TimeoutError(
        f"the handler of {reservation.subscription_name!r} took longer than "
        f"{longest.total_seconds():g} s"
    )
    error.__cause__ = cause
    return error


def check_transaction(reservation: Reservation, *, is_active: bool) -> None:
    """A handler must not end the transaction: position and writes would commit apart."""
    if not is_active:
        raise RuntimeError(
            f"the handler of {reservation.subscription_name!r} ended the transaction that it was "
            "given; it must leave that to the consumer"
        )


def lose(telemetry: Telemetry, group: str, held: Holding) -> None:
    """The token is gone, or was ended here: then that was told already."""
    if not (held.over or held.abandoned):
        held.end()
        log_lost(telemetry, group, held.reservation)


def lose_some(
    telemetry: Telemetry, group: str, helds: Sequence[Holding], error: ReservationsLost
) -> None:
    """Of those whose handlers ran together, the tokens that the error names are gone."""
    lost = {id for id, _ in error.lost}
    for held in helds:
        if held.reservation.id in lost:
            lose(telemetry, group, held)


def after_recording(
    telemetry: Telemetry,
    outage: OutageLog,
    group: str,
    held: Holding,
    failure: Failure,
    error: Exception | None,
) -> bool:
    """What follows when a failure was recorded, or that failed; False: it may succeed later."""
    if error is None:
        log_failure(telemetry, group, held.reservation, failure)
        return True
    if is_passing(error):
        if is_outage(error):
            outage.away(error)
        return False
    held.end()
    log_unrecorded(group, held.reservation, failure, error)
    return True


# --- in the database


def check_start(
    connection: Connection, settings: ConsumerSettings, names: Collection[str] | None
) -> bool:
    """Refuse an engine that commits each statement, and a schema that is not there.

    Warns of names that nothing has. Answers whether a statement by itself is READ COMMITTED, by the
    server's default for this connection, which is not always that of its transactions.
    """
    driver = connection.connection.driver_connection
    if getattr(driver, "autocommit", False):
        raise ValueError(
            "engine must not have the isolation level AUTOCOMMIT: what a handler writes and the "
            "position would not commit together"
        )
    group = settings.group
    named = (
        select(subscriptions.c.name)
        .join(
            subscription_groups, subscription_groups.c.id == subscriptions.c.subscription_group_id
        )
        .where(subscription_groups.c.name == group)
    )
    try:
        there = set(connection.scalars(named))
    except DBAPIError as error:
        raise translated(error) from error.orig
    log_unknown(group, there, names)
    default = connection.scalar(select(func.current_setting("default_transaction_isolation")))
    return str(default) == "read committed"


def reserve(
    connection: Connection,
    settings: ConsumerSettings,
    names: Collection[str] | None,
    since: DueSince,
    limit: int,
    goal: Goal,
    *,
    by_itself: bool,
) -> tuple[list[Reservation], timedelta | None]:
    """Reserve, and commit; when nothing is to be had, say when to look again (None: not known).

    `by_itself`: without BEGIN, as `check_start` has answered.
    """
    # A stricter level gains nothing but conflicts. A statement by itself has the server's default,
    # and needs no BEGIN and COMMIT, which would be two more ways to the server.
    level = "AUTOCOMMIT" if by_itself else "READ COMMITTED"
    checkpoints = Checkpoints(connection.execution_options(isolation_level=level))

    def look(due_since: datetime | None) -> list[Reservation]:
        return checkpoints.reserve_next_available_checkpoint(
            settings.group,
            settings.reservation_timeout,
            replay_mode=settings.replay_mode,
            subscription_names=names,
            due_since=due_since,
            limit=limit,
            # Should a crash undo it, the token is gone, and what was written for it rolls back.
            synchronous_commit=False,
        )

    due_in = None
    # One that ends when nothing is due must know; one that goes on finds it a little later.
    reserved = since.take(look, attrgetter("process_at"), surely=goal is not Goal.NEVER)
    if not reserved:
        due_in = checkpoints.get_next_process_at(
            settings.group,
            replay_mode=settings.replay_mode,
            subscription_names=names,
            due_since=since.looked,
        )
        if since.looked is not None:
            again = since.until_all()
            due_in = again if due_in is None or due_in > again else due_in
    connection.commit()
    return reserved, due_in


def update(
    connection: Connection,
    reservation: Reservation,
    position: int | None,
    settings: ConsumerSettings,
) -> None:
    """Move the checkpoint to what the handler answered."""
    new = _position_update(reservation, position, settings)
    Checkpoints(connection).update_checkpoint_position(
        reservation, new.stream_position, process_at=new.process_at
    )


def update_many(
    connection: Connection,
    helds: Sequence[Holding],
    positions: Sequence[int | None],
    settings: ConsumerSettings,
) -> None:
    """Move checkpoints to what their handlers answered."""
    Checkpoints(connection).update_checkpoint_positions(
        [
            _position_update(held.reservation, position, settings)
            for held, position in zip(helds, positions, strict=True)
        ]
    )


def _position_update(
    reservation: Reservation, position: int | None, settings: ConsumerSettings
) -> PositionUpdate:
    pause = None
    if isinstance(position, int) and position <= reservation.stream_position:
        # It made no progress: else it came back at once, for ever.
        pause = settings.poll_interval
    return PositionUpdate.of(
        reservation,
        reservation.stream_version if position is None else position,
        process_at=pause,
    )


def record(
    connection: Connection, reservation: Reservation, failure: Failure, settings: ConsumerSettings
) -> None:
    """Note that an attempt failed."""
    _wait_briefly(connection, settings)
    Checkpoints(connection).record_checkpoint_error(
        reservation,
        reservation.stream_position,
        status=failure.status,
        retry_attempts=failure.attempt,
        error=failure.description,
        process_at=failure.delay,
    )


def extend(
    connection: Connection, reservation: Reservation, settings: ConsumerSettings
) -> Reservation:
    """Keep the checkpoint; the reservation to go on with."""
    _wait_briefly(connection, settings)
    return Checkpoints(connection).extend_checkpoint_reservation(
        reservation, settings.reservation_timeout
    )


def release(connection: Connection, reservation: Reservation, settings: ConsumerSettings) -> None:
    """Give the checkpoint back."""
    _wait_briefly(connection, settings)
    Checkpoints(connection).release_checkpoint_reservation(reservation)


def recover(connection: Connection, settings: ConsumerSettings) -> list[ExpiredReservation]:
    """End expired reservations, each counted as an attempt of a consumer that died or hung."""
    return Checkpoints(connection).record_expired_checkpoint_reservations(
        settings.group,
        max_attempts=settings.retry.max_attempts,
        process_at=settings.retry.first_delay,
        limit=RECOVERED_AT_ONCE,
    )


def finish_replays(connection: Connection, settings: ConsumerSettings) -> list[str]:
    """Make subscriptions active again whose replay has nothing left to do; their names.

    In a transaction of its own: in that of a position, the last two consumers of a replay would
    each see the other at work.
    """
    replaying = connection.execute(
        select(subscriptions.c.id, subscriptions.c.name)
        .join(
            subscription_groups, subscription_groups.c.id == subscriptions.c.subscription_group_id
        )
        .where(
            subscription_groups.c.name == settings.group,
            subscriptions.c.status == SubscriptionStatus.REPLAY,
        )
        .order_by(subscriptions.c.id)
    ).all()
    checkpoints = Checkpoints(connection)
    return [name for id, name in replaying if checkpoints.finish_replay(id)]


def _wait_briefly(connection: Connection, settings: ConsumerSettings) -> None:
    """Whoever has the row locked for long must not keep the other checkpoints from their turn."""
    milliseconds = max(10, int(settings.reservation_timeout.total_seconds() * 1000 / 60))
    connection.execute(select(func.set_config("lock_timeout", f"{milliseconds}ms", True)))


# --- what is said


def _harmless(say: Callable[P, None]) -> Callable[P, None]:
    """Logging and telemetry of the application's that raise must not stop the work."""

    @wraps(say)
    def said(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            say(*args, **kwargs)
        except Exception:
            # What is left to say it with is what has just failed.
            return

    return said


@_harmless
def log_unknown(group: str, there: set[str], names: Collection[str] | None) -> None:
    """Subscriptions that handlers are for, and that are not there, or not yet."""
    if not there and names is None:
        logger.warning(
            "the group %r has no subscriptions; nothing is processed until there are some",
            group,
            extra={"group": group},
        )
    for name in sorted(set(names or ()) - there):
        logger.warning(
            "no subscription named %r in the group %r; its handler waits until it is added",
            name,
            group,
            extra={"group": group, "subscription": name},
        )


@_harmless
def log_processed(telemetry: Telemetry, group: str, held: Holding) -> None:
    """The position was updated."""
    took = held.took()
    telemetry.processed(held.reservation, took, held.latency())
    if logger.isEnabledFor(logging.DEBUG):
        logger.debug("processed in %.3f s", took, extra=fields(group, held.reservation))


@_harmless
def log_lost(telemetry: Telemetry, group: str, reservation: Reservation) -> None:
    """The reservation went to another while it was held."""
    telemetry.count("lost", 1, reservation.subscription_name)
    logger.warning(
        "the reservation was lost; what the handler wrote is rolled back",
        extra=fields(group, reservation),
    )


@_harmless
def log_failure(
    telemetry: Telemetry, group: str, reservation: Reservation, failure: Failure
) -> None:
    """An attempt failed, and that was recorded."""
    failed = failure.status is CheckpointStatus.FAILED
    telemetry.failed(reservation, failure.error, is_last=failed)
    logger.log(
        logging.ERROR if failed else logging.WARNING,
        "attempt %d failed%s: %s",
        failure.attempt,
        ", the last one" if failed else "",
        message_of(failure.error),
        exc_info=failure.error,
        extra=fields(group, reservation, attempt=failure.attempt),
    )


@_harmless
def log_unrecorded(
    group: str, reservation: Reservation, failure: Failure, error: BaseException
) -> None:
    """An attempt failed, and that could not be recorded."""
    logger.error(
        "an error could not be recorded, and its reservation will expire: %s",
        message_of(error),
        exc_info=failure.error,
        extra=fields(group, reservation, attempt=failure.attempt),
    )


@_harmless
def log_given_up(group: str, reservation: Reservation) -> None:
    """A handler did not end in time when the consumer stopped."""
    logger.warning(
        "the consumer stops and gives the handler up; the checkpoint is given back",
        extra=fields(group, reservation),
    )


@_harmless
def log_not_given_back(group: str, reservation: Reservation, error: BaseException | None) -> None:
    """A reservation outlives its consumer."""
    logger.warning(
        "a reservation could not be given back and will expire: %s",
        message_of(error) if error else "its handler is about to end it",
        extra=fields(group, reservation),
    )


@_harmless
def log_not_extended(group: str, reservation: Reservation, error: BaseException) -> None:
    """A reservation could not be extended this time."""
    logger.warning(
        "a reservation could not be extended: %s",
        message_of(error),
        extra=fields(group, reservation),
    )


@_harmless
def log_unexpected(group: str, what: str, reservation: Reservation | None = None) -> None:
    """An error that nobody foresaw, now being handled."""
    extra = {"group": group} if reservation is None else fields(group, reservation)
    logger.exception(what, extra=extra)


@_harmless
def log_expired(telemetry: Telemetry, group: str, expired: Sequence[ExpiredReservation]) -> None:
    """Reservations of consumers that died or hung were ended."""
    telemetry.count("expired", len(expired))
    for record in expired:
        failed = record.status is CheckpointStatus.FAILED
        logger.log(
            logging.ERROR if failed else logging.WARNING,
            "a reservation expired; %s",
            "the checkpoint has failed" if failed else "another attempt follows",
            extra={
                "group": group,
                "checkpoint_id": record.id,
                "attempt": record.retry_attempts,
            },
        )


@_harmless
def log_replayed(group: str, names: Sequence[str]) -> None:
    """Replays reached their end."""
    for name in names:
        logger.info("the replay of %r is done", name, extra={"group": group, "subscription": name})
