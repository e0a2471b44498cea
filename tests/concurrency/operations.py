"""Every operation that can touch one checkpoint, and how that may stand before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, TypeAlias

from sqlalchemy import Connection, Executable, delete, func, select, update
from sqlalchemy.dialects.postgresql import insert

from checkpoints import (
    CheckpointRecord,
    CheckpointStatus,
    PositionUpdate,
    advance_lagging_subscription_checkpoints,
    ensure_checkpoint_exists,
    extend_checkpoint_reservation,
    lock_checkpoint,
    record_checkpoint_error,
    record_checkpoints,
    recover_expired_checkpoint_reservations,
    release_checkpoint_reservation,
    repair_checkpoints,
    reserve_next_available_checkpoint,
    schedule_checkpoints,
    skip_checkpoints,
    update_checkpoint_position,
    update_checkpoint_positions,
)
from checkpoints.tables import checkpoints, checkpoints_ready, checkpoints_reserved
from tests.support.factories import FAR_AHEAD, GROUP, LONG_AGO, MINUTE

STREAM = "account-1"
TOKEN = datetime(2021, 1, 1, tzinfo=UTC)
"""The token of whatever is reserved at the start: expired, and not recovered yet."""
SCHEDULED = datetime(2022, 1, 1, tzinfo=UTC)
BACKOFF = datetime(2023, 1, 1, tzinfo=UTC)

VERSION = 3
"""The version at the start."""


@dataclass(frozen=True)
class Scene:
    """The checkpoint that both actors are after."""

    subscription: int
    id: int


Operation: TypeAlias = Callable[[Scene], Executable]

# What each begins to do at its start fits what the others do: a recorder brings 5, the holder did
# everything up to VERSION, an error came after the first message.
OPERATIONS: dict[str, Operation] = {
    "record": lambda scene: record_checkpoints([CheckpointRecord(scene.subscription, STREAM, 5)]),
    "advance": lambda scene: advance_lagging_subscription_checkpoints(scene.subscription),
    "reserve": lambda _: reserve_next_available_checkpoint(GROUP, MINUTE),
    "update": lambda scene: update_checkpoint_position(scene.id, TOKEN, VERSION),
    "update_many": lambda scene: update_checkpoint_positions(
        [PositionUpdate(scene.id, TOKEN, VERSION)]
    ),
    "error": lambda scene: record_checkpoint_error(
        scene.id,
        TOKEN,
        1,
        status=CheckpointStatus.RETRY,
        retry_attempts=1,
        error="refused",
        process_at=BACKOFF,
    ),
    "give_up": lambda scene: record_checkpoint_error(
        scene.id, TOKEN, 1, status=CheckpointStatus.FAILED, retry_attempts=1, error="refused"
    ),
    "release": lambda scene: release_checkpoint_reservation(scene.id, TOKEN),
    "release_by_operator": lambda scene: release_checkpoint_reservation(scene.id),
    "extend": lambda scene: extend_checkpoint_reservation(scene.id, TOKEN, timedelta(hours=1)),
    "recover": lambda _: recover_expired_checkpoint_reservations(GROUP),
    "skip": lambda scene: skip_checkpoints([scene.id]),
    "schedule": lambda scene: schedule_checkpoints([scene.id], SCHEDULED),
    "postpone": lambda scene: schedule_checkpoints([scene.id], FAR_AHEAD),
    "ensure": lambda scene: ensure_checkpoint_exists(scene.subscription, STREAM),
    "lock": lambda scene: lock_checkpoint(scene.subscription, STREAM),
    "repair": lambda _: repair_checkpoints(),
    "plain_version": lambda scene: (
        update(checkpoints)
        .where(checkpoints.c.id == scene.id)
        .values(stream_version=func.greatest(checkpoints.c.stream_version, 4))
    ),
    "plain_reset": lambda scene: (
        update(checkpoints)
        .where(checkpoints.c.id == scene.id)
        .values(status="active", retry_attempts=0, process_at=None, reserved_until=None)
    ),
    "plain_upsert": lambda scene: (
        insert(checkpoints)
        .values(subscription_id=scene.subscription, stream_name=STREAM, stream_version=4)
        .on_conflict_do_update(
            index_elements=["subscription_id", "stream_name"],
            set_={
                "process_at": None,
                "stream_version": func.greatest(4, checkpoints.c.stream_version),
            },
        )
    ),
    "plain_delete": lambda scene: delete(checkpoints).where(checkpoints.c.id == scene.id),
}

NEVER_WAIT = {"reserve", "recover"}
TOKEN_GIVEN = {"reserve", "extend"}
TOKEN_NAMED = {"update", "update_many", "error", "give_up", "release", "extend"}
TOKEN_ENDED = TOKEN_NAMED | {
    "release_by_operator",
    "recover",
    "skip",
    "plain_reset",
    "plain_delete",
}

STARTS: dict[str, dict[str, Any]] = {
    "ready": {"process_at": LONG_AGO},
    "held": {"process_at": LONG_AGO, "reserved_until": TOKEN},
    "caught up": {"stream_position": VERSION},
    "retry": {
        "status": "retry",
        "retry_attempts": 1,
        "retries": ["refused"],
        "process_at": LONG_AGO,
        "stream_position": 1,
    },
    "failed": {"status": "failed", "retry_attempts": 9, "retries": ["refused"]},
}
ABSENT = "absent"
BROKEN = "broken"
MAKERS = {"record", "ensure", "plain_upsert"}


def arrange(connection: Connection, subscription: int, id: int, start: str) -> Scene:
    """Leave one checkpoint, as it is to stand."""
    connection.execute(delete(checkpoints))
    if start != ABSENT:
        connection.execute(
            insert(checkpoints).values(
                id=id,
                subscription_id=subscription,
                stream_name=STREAM,
                stream_version=VERSION,
                **STARTS["ready" if start == BROKEN else start],
            )
        )
    if start == BROKEN:
        connection.exec_driver_sql("DELETE FROM checkpoints.checkpoints_ready")
    return Scene(subscription, id)


@dataclass(frozen=True)
class Standing:
    """How a checkpoint stands, with times told apart by their kind."""

    version: int
    position: int
    status: str
    retry_attempts: int
    retries: int
    process_at: str
    reserved_until: str
    ready: str
    reserved: str


def _kind(moment: datetime | None, now: datetime) -> str:
    if moment is None:
        return "none"
    if moment < datetime(2025, 1, 1, tzinfo=UTC):
        return f"{moment:%Y}"
    return "now" if moment <= now else "ahead"


def standing(connection: Connection) -> Standing | None:
    """How the one checkpoint stands; None: it is gone."""
    row = connection.execute(
        select(
            checkpoints.c.stream_version,
            checkpoints.c.stream_position,
            checkpoints.c.status,
            checkpoints.c.retry_attempts,
            func.coalesce(func.jsonb_array_length(checkpoints.c.retries), 0),
            checkpoints.c.process_at,
            checkpoints.c.reserved_until,
            checkpoints_ready.c.process_at,
            checkpoints_reserved.c.reserved_until,
            func.clock_timestamp(),
        )
        .outerjoin(checkpoints_ready, checkpoints_ready.c.id == checkpoints.c.id)
        .outerjoin(checkpoints_reserved, checkpoints_reserved.c.id == checkpoints.c.id)
    ).one_or_none()
    if row is None:
        return None
    *values, now = row
    return Standing(*values[:5], *(_kind(moment, now) for moment in values[5:]))
