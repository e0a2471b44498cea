"""What goes into the statements and what comes out of the executing layer."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Self, TypeAlias

from checkpoints import _arguments as arguments

__all__ = [
    "CheckpointDetail",
    "CheckpointPosition",
    "CheckpointRecord",
    "CheckpointStatus",
    "CheckpointViolation",
    "ExpiredReservation",
    "JSONValue",
    "ListedCheckpoint",
    "ListedReservation",
    "LockedCheckpoint",
    "PositionUpdate",
    "RecordedCheckpoint",
    "ReplayMode",
    "Reservation",
    "Subscription",
    "SubscriptionMetrics",
    "SubscriptionStatus",
]

_JSONScalar: TypeAlias = str | int | float | bool | None
# One text: of several, which Python joins, pyright makes nothing.
JSONValue: TypeAlias = (
    "dict[str, JSONValue] | list[JSONValue] | tuple[JSONValue, ...] | _JSONScalar"
)


class SubscriptionStatus(StrEnum):
    """Where a subscription stands. Only `ACTIVE` and `REPLAY` ones are given to consumers."""

    UNINITIALIZED = "uninitialized"
    ACTIVE = "active"
    PAUSED = "paused"
    UNKNOWN = "unknown"
    REPLAY = "replay"
    BACKFILL = "backfill"


class CheckpointStatus(StrEnum):
    """Where a checkpoint stands: in order, waiting for another attempt, or given up."""

    ACTIVE = "active"
    RETRY = "retry"
    FAILED = "failed"


class ReplayMode(StrEnum):
    """Which subscriptions a consumer serves."""

    ALL = "all"
    """Active ones and ones that replay."""
    LIVE = "live"
    """Active ones only."""
    REPLAY = "replay"
    """Only ones that replay."""

    @property
    def subscription_statuses(self) -> list[SubscriptionStatus]:
        """The statuses of the subscriptions served."""
        match self:
            case ReplayMode.LIVE:
                return [SubscriptionStatus.ACTIVE]
            case ReplayMode.REPLAY:
                return [SubscriptionStatus.REPLAY]
            case _:
                return [SubscriptionStatus.ACTIVE, SubscriptionStatus.REPLAY]


@dataclass(frozen=True, slots=True)
class CheckpointRecord:
    """What the recorder has seen: a stream that a subscription follows stands at a version.

    `stream_position` is where the checkpoint starts if it does not exist yet (0: at the stream's
    first message); of one that exists the position is left as it is.
    """

    subscription_id: int
    stream_name: str
    stream_version: int
    stream_position: int = 0

    def __post_init__(self) -> None:
        arguments.checkpoint(
            self.subscription_id, self.stream_name, self.stream_version, self.stream_position
        )


@dataclass(frozen=True, slots=True)
class RecordedCheckpoint:
    """A checkpoint that is new, or whose version rose."""

    id: int
    subscription_id: int
    stream_name: str
    stream_version: int
    stream_position: int


@dataclass(frozen=True, slots=True)
class Reservation:
    """A checkpoint that is yours until `reserved_until`, which is also the token that proves it."""

    id: int
    subscription_id: int
    subscription_name: str
    stream_name: str
    stream_position: int
    stream_version: int
    retry_attempts: int
    status: CheckpointStatus
    replay_target_position: int | None
    reserved_until: datetime
    process_at: datetime


@dataclass(frozen=True, slots=True)
class PositionUpdate:
    """That a reserved checkpoint was processed up to a position; of a reservation by `of`.

    `process_at` is when it is ready again if it still lags (a timedelta: so long from now; None:
    now).
    """

    id: int
    reserved_until: datetime
    stream_position: int
    process_at: datetime | timedelta | None = None

    def __post_init__(self) -> None:
        arguments.identifier("id", self.id)
        arguments.moment("reserved_until", self.reserved_until)
        arguments.position("stream_position", self.stream_position)
        if self.process_at is not None:
            arguments.due("process_at", self.process_at)

    @classmethod
    def of(
        cls,
        reservation: Reservation,
        stream_position: int,
        *,
        process_at: datetime | timedelta | None = None,
    ) -> Self:
        """The update of a checkpoint that is held by a reservation."""
        arguments.instance("reservation", reservation, Reservation)
        return cls(reservation.id, reservation.reserved_until, stream_position, process_at)


@dataclass(frozen=True, slots=True)
class CheckpointPosition:
    """How far a checkpoint stands after an update."""

    id: int
    stream_version: int
    stream_position: int


@dataclass(frozen=True, slots=True)
class ExpiredReservation:
    """A checkpoint whose reservation expired and was counted as an attempt."""

    id: int
    status: CheckpointStatus
    retry_attempts: int


@dataclass(frozen=True, slots=True)
class LockedCheckpoint:
    """A checkpoint whose row the transaction holds locked."""

    id: int
    stream_version: int
    stream_position: int
    status: CheckpointStatus
    reserved_until: datetime | None


@dataclass(frozen=True, slots=True)
class Subscription:
    """A subscription and how it stands."""

    id: int
    status: SubscriptionStatus
    subscription_group_id: int
    replay_target_position: int | None


@dataclass(frozen=True, slots=True)
class ListedReservation:
    """A row of the reservations list."""

    id: int
    group_name: str
    name: str
    stream_name: str
    stream_position: int
    reserved_until: datetime
    total_results: int


@dataclass(frozen=True, slots=True)
class ListedCheckpoint:
    """A row of the lists of lagging, retrying and failed checkpoints."""

    id: int
    group_name: str
    name: str
    stream_name: str
    stream_version: int
    stream_position: int
    status: CheckpointStatus
    retry_attempts: int
    retries: list[JSONValue] | None
    process_at: datetime | None
    reserved_until: datetime | None
    updated_at: datetime
    total_results: int

    @property
    def lag(self) -> int:
        """How many messages are left."""
        return max(0, self.stream_version - self.stream_position)


@dataclass(frozen=True, slots=True)
class CheckpointDetail:
    """All of one checkpoint."""

    id: int
    subscription_id: int
    group_name: str
    name: str
    subscription_status: SubscriptionStatus
    stream_name: str
    stream_version: int
    stream_position: int
    status: CheckpointStatus
    retry_attempts: int
    retries: list[JSONValue] | None
    process_at: datetime | None
    reserved_until: datetime | None
    created_at: datetime
    updated_at: datetime


@dataclass(frozen=True, slots=True)
class SubscriptionMetrics:
    """What is at hand for one subscription. Counts are of checkpoints, `lag` is of messages."""

    id: int
    group_name: str
    name: str
    status: SubscriptionStatus
    ready: int
    due: int
    reserved: int
    expired: int
    retry: int
    failed: int
    lag: int
    oldest_due_at: datetime | None


@dataclass(frozen=True, slots=True)
class CheckpointViolation:
    """A checkpoint that breaks the rule between the main table and the hot tables, and how."""

    id: int
    violation: str
