"""Runs a handler for one stream, in the transaction of a test, as a consumer would."""

from __future__ import annotations

from collections.abc import Awaitable
from datetime import timedelta
from typing import TYPE_CHECKING

from sqlalchemy import Connection, func, update

from checkpoints.errors import CheckpointsError
from checkpoints.executing import Checkpoints
from checkpoints.records import CheckpointDetail, CheckpointRecord, CheckpointStatus, Reservation
from checkpoints.runtime import ConsumerSettings, Handler, OutsideTransaction
from checkpoints.runtime import _outcomes as outcomes
from checkpoints.runtime.settings import checked_handlers
from checkpoints.statements.consumer import reservations_of
from checkpoints.tables import checkpoints

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncConnection

    from checkpoints.runtime import AsyncHandler

__all__ = ["NothingToProcess", "process", "process_async"]

# What a consumer does has its defaults; the group is not asked for.
_SETTINGS = ConsumerSettings(group="testing")
# The transaction is not seen by others, who could recover it.
_RESERVED_FOR = timedelta(hours=1)


class NothingToProcess(CheckpointsError):
    """A consumer would not be given this checkpoint; the handler was not run."""

    def __init__(self, subscription_id: int, stream_name: str, why: str) -> None:
        super().__init__(
            f"nothing to process in the stream {stream_name!r} for subscription "
            f"{subscription_id!r}: {why}"
        )
        self.subscription_id = subscription_id
        self.stream_name = stream_name


def process(
    connection: Connection,
    handler: Handler | OutsideTransaction[int | None],
    subscription_id: int,
    stream_name: str,
    stream_version: int | None = None,
) -> CheckpointDetail:
    """Run a handler for a stream, and move the checkpoint, in your transaction; how it stands then.

    `stream_version` is what the recorder is to have seen: the checkpoint is made with it at
    position 0, or raised to it. None: as it was recorded, or made by `ensure_checkpoint_exists`.

    It is as in a consumer that was given this checkpoint: the handler is given a reservation, what
    it answers becomes the position, and it must not end the transaction. But neither the status of
    the subscription nor the time when the checkpoint is due keep it from being processed. It all is
    in a savepoint: when the handler raises, what it wrote is rolled back as in a consumer, the
    error is raised here, and nothing is recorded of it; your transaction can go on. So a `Session`
    that the handler binds to the connection ends a savepoint of its own when it is rolled back,
    where in a consumer it ends the transaction, which is refused.

    Raises:
        NothingToProcess: there is no such checkpoint, it is at its version, it has failed, or it
            is reserved.
        UnknownSubscription: there is no such subscription.
        RuntimeError: the handler ended the transaction.
    """
    if not isinstance(connection, Connection):
        raise TypeError(
            f"connection must be a Connection, such as session.connection(), not {connection!r}"
        )
    checked_handlers(handler, blocking=True)
    with connection.begin_nested() as savepoint:
        reservation = _reserve(connection, subscription_id, stream_name, stream_version)
        if isinstance(handler, OutsideTransaction):
            position = handler.function(reservation)
        else:
            position = handler(connection, reservation)
        outcomes.check_transaction(reservation, is_active=savepoint.is_active)
        return _update(connection, reservation, position)


async def process_async(
    connection: AsyncConnection,
    handler: AsyncHandler | OutsideTransaction[Awaitable[int | None]],
    subscription_id: int,
    stream_name: str,
    stream_version: int | None = None,
) -> CheckpointDetail:
    """Run a handler of an `AsyncConsumer`; all else is as `process` says."""
    if not hasattr(connection, "run_sync"):
        raise TypeError(f"connection must be an AsyncConnection, not {connection!r}")
    checked_handlers(handler, blocking=False)
    async with connection.begin_nested() as savepoint:
        reservation = await connection.run_sync(
            _reserve, subscription_id, stream_name, stream_version
        )
        if isinstance(handler, OutsideTransaction):
            position = await handler.function(reservation)
        else:
            position = await handler(connection, reservation)
        outcomes.check_transaction(reservation, is_active=savepoint.is_active)
        return await connection.run_sync(_update, reservation, position)


def _reserve(
    connection: Connection, subscription_id: int, stream_name: str, stream_version: int | None
) -> Reservation:
    """Reserve the checkpoint of a stream, which no statement of a consumer can name."""
    # Checks the arguments, too.
    record = CheckpointRecord(subscription_id, stream_name, stream_version or 0)
    if stream_version is not None:
        Checkpoints(connection).record_checkpoints([record])
    reserved = (
        update(checkpoints)
        .where(
            checkpoints.c.subscription_id == subscription_id,
            checkpoints.c.stream_name == stream_name,
            checkpoints.c.process_at.is_not(None),
            checkpoints.c.reserved_until.is_(None),
        )
        .values(reserved_until=func.statement_timestamp() + _RESERVED_FOR)
        .returning(*checkpoints.c)
        .cte("reserved")
    )
    row = connection.execute(reservations_of(reserved)).one_or_none()
    if row is None:
        raise NothingToProcess(
            subscription_id, stream_name, _why_not(connection, subscription_id, stream_name)
        )
    return Reservation(*row)


def _why_not(connection: Connection, subscription_id: int, stream_name: str) -> str:
    found = Checkpoints(connection).lock_checkpoint(subscription_id, stream_name)
    if found is None:
        return "there is no checkpoint; give stream_version, or record it before"
    if found.reserved_until is not None:
        return f"it is reserved until {found.reserved_until.isoformat()}; release it before"
    if found.status is CheckpointStatus.FAILED:
        return "it has failed; schedule it before, with schedule_checkpoints()"
    return (
        f"its position is {found.stream_position} and its version is {found.stream_version}; give "
        "a higher stream_version"
    )


def _update(
    connection: Connection, reservation: Reservation, position: int | None
) -> CheckpointDetail:
    outcomes.update(connection, reservation, position, _SETTINGS)
    detail = Checkpoints(connection).get_checkpoint(reservation.id)
    assert detail is not None  # noqa: S101 - its row was updated in this transaction
    return detail
