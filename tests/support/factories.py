"""Rows to begin with, and how a checkpoint stands, read from all three tables at once."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, DateTime, func, insert, select

from checkpoints import (
    CheckpointStatus,
    Reservation,
    SubscriptionStatus,
    add_or_update_subscription,
    audit_checkpoints,
    reserve_next_available_checkpoint,
    set_subscription_status,
)
from checkpoints.tables import checkpoints, checkpoints_ready, checkpoints_reserved

GROUP = "accounts"
LONG_AGO = datetime(2020, 1, 1, tzinfo=UTC)
FAR_AHEAD = datetime(2090, 1, 1, tzinfo=UTC)
MINUTE = timedelta(minutes=1)


def add_subscription(
    connection: Connection,
    name: str = "balances",
    *,
    group: str = GROUP,
    status: SubscriptionStatus = SubscriptionStatus.ACTIVE,
) -> int:
    """Add a subscription with a status."""
    id = connection.execute(add_or_update_subscription(group, name)).one()[0]
    connection.execute(set_subscription_status(id, status))
    return id


def add_checkpoint(
    connection: Connection,
    subscription_id: int,
    stream_name: str = "account-1",
    *,
    version: int = 3,
    position: int = 0,
    **columns: Any,
) -> int:
    """Add a checkpoint by a plain INSERT; the triggers do the rest."""
    return connection.execute(
        insert(checkpoints)
        .values(
            subscription_id=subscription_id,
            stream_name=stream_name,
            stream_version=version,
            stream_position=position,
            **columns,
        )
        .returning(checkpoints.c.id)
    ).scalar_one()


def reserve(
    connection: Connection, timeout: timedelta = MINUTE, *, group: str = GROUP
) -> Reservation:
    """Reserve the one checkpoint that is due."""
    row = connection.execute(reserve_next_available_checkpoint(group, timeout)).one()
    return Reservation(*row)


@dataclass(frozen=True)
class State:
    """A checkpoint in the main table, and in the hot tables (None: it is not there)."""

    version: int
    position: int
    status: CheckpointStatus
    retry_attempts: int
    retries: list[Any] | None
    process_at: datetime | None
    reserved_until: datetime | None
    ready: datetime | None
    reserved: datetime | None


def state(connection: Connection, id: int) -> State:
    """How a checkpoint stands."""
    row = connection.execute(
        select(
            checkpoints.c.stream_version,
            checkpoints.c.stream_position,
            checkpoints.c.status,
            checkpoints.c.retry_attempts,
            checkpoints.c.retries,
            checkpoints.c.process_at,
            checkpoints.c.reserved_until,
            checkpoints_ready.c.process_at,
            checkpoints_reserved.c.reserved_until,
        )
        .outerjoin(checkpoints_ready, checkpoints_ready.c.id == checkpoints.c.id)
        .outerjoin(checkpoints_reserved, checkpoints_reserved.c.id == checkpoints.c.id)
        .where(checkpoints.c.id == id)
    ).one()
    return State(*row)


def violations(connection: Connection) -> list[tuple[int, str]]:
    """What breaks the rule; nothing, if all is well."""
    return [(row.id, row.violation) for row in connection.execute(audit_checkpoints())]


def database_time(connection: Connection) -> datetime:
    """The database's clock now."""
    return connection.execute(select(func.clock_timestamp(type_=DateTime(True)))).scalar_one()
