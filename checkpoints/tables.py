"""The tables. `metadata.create_all()` makes what the migrations make, triggers included.

The main row is the truth; `checkpoints_ready` and `checkpoints_reserved` are its projection, kept
by the triggers of `checkpoints.triggers`. Write to `checkpoints` only.

The schema is `checkpoints`; another one by `schema_translate_map={"checkpoints": "other"}`.
"""

from __future__ import annotations

from datetime import datetime
from enum import StrEnum

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Computed,
    DateTime,
    Enum,
    ForeignKey,
    Identity,
    Index,
    Integer,
    MetaData,
    Named,
    Table,
    Text,
    TypedColumns,
    UniqueConstraint,
    event,
    func,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from checkpoints import triggers
from checkpoints.records import CheckpointStatus, JSONValue, SubscriptionStatus

__all__ = [
    "DEFAULT_SCHEMA",
    "checkpoint_status",
    "checkpoints",
    "checkpoints_ready",
    "checkpoints_reserved",
    "metadata",
    "subscription_groups",
    "subscription_status",
    "subscriptions",
]

DEFAULT_SCHEMA = "checkpoints"

metadata = MetaData(
    schema=DEFAULT_SCHEMA,
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
    },
)
# Before the enums are made: they listen too, and their types need the schema.
event.listen(metadata, "before_create", triggers.create_schema)
event.listen(metadata, "after_create", triggers.create_triggers)
event.listen(metadata, "after_drop", triggers.drop_functions)


def _values(enumeration: type[StrEnum]) -> list[str]:
    return [member.value for member in enumeration]


subscription_status = Enum(
    SubscriptionStatus, name="subscription_status", metadata=metadata, values_callable=_values
)
checkpoint_status = Enum(
    CheckpointStatus, name="checkpoint_status", metadata=metadata, values_callable=_values
)

_TIMESTAMP = DateTime(timezone=True)


# Room on each page for the next version of a row.
_STORAGE_OF_MAIN = {"fillfactor": 85, "autovacuum_vacuum_scale_factor": 0.05}
# Narrow tables of short-lived rows: vacuumed by the number of dead rows, at full speed, and never
# made shorter, which would lock them.
_STORAGE_OF_HOT = {
    "autovacuum_vacuum_scale_factor": 0,
    "autovacuum_vacuum_threshold": 5000,
    "autovacuum_vacuum_cost_delay": 0,
    "vacuum_truncate": "false",
}


class SubscriptionGroupColumns(TypedColumns):
    """Columns of `subscription_groups`."""

    id = Column(BigInteger, Identity(always=False), primary_key=True, comment="Key of the group")
    name: Named[str] = Column(Text, unique=True, comment="Name that consumers reserve by")


class SubscriptionColumns(TypedColumns):
    """Columns of `subscriptions`."""

    id = Column(
        BigInteger, Identity(always=False), primary_key=True, comment="Key of the subscription"
    )
    subscription_group_id: Named[int] = Column(
        BigInteger, ForeignKey("checkpoints.subscription_groups.id"), comment="Group it belongs to"
    )
    name: Named[str] = Column(Text, comment="Name, unique in the group")
    status: Named[SubscriptionStatus] = Column(
        subscription_status,
        server_default=text("'uninitialized'"),
        comment="Consumers are given checkpoints of active and replay subscriptions only",
    )
    replay_target_position: Named[int | None] = Column(
        BigInteger, comment="Global position at which a replay ends; null: no replay"
    )


class CheckpointColumns(TypedColumns):
    """Columns of `checkpoints`."""

    id = Column(
        BigInteger, Identity(always=False), primary_key=True, comment="Key of the checkpoint"
    )
    subscription_id: Named[int] = Column(
        BigInteger, ForeignKey("checkpoints.subscriptions.id"), comment="Subscription that follows"
    )
    stream_name: Named[str] = Column(Text, comment="Stream that is followed")
    stream_version: Named[int] = Column(
        BigInteger, server_default=text("0"), comment="Position of the stream's last known message"
    )
    stream_position: Named[int] = Column(
        BigInteger, server_default=text("0"), comment="Position of the last message processed"
    )
    status: Named[CheckpointStatus] = Column(
        checkpoint_status, server_default=text("'active'"), comment="active, retry or failed"
    )
    retry_attempts: Named[int] = Column(
        Integer, server_default=text("0"), comment="Attempts that failed since the last success"
    )
    retries: Named[list[JSONValue] | None] = Column(
        JSONB(none_as_null=True), comment="Errors of those attempts, oldest first"
    )
    process_at: Named[datetime | None] = Column(
        _TIMESTAMP, comment="When there is work to do, and from when; null: none"
    )
    reserved_until: Named[datetime | None] = Column(
        _TIMESTAMP, comment="End of the running reservation, and its token; null: not reserved"
    )
    lagging: Named[bool] = Column(
        Boolean,
        Computed("stream_version > stream_position", persisted=True),
        nullable=False,
        comment="Messages are left to process",
    )
    created_at: Named[datetime] = Column(
        _TIMESTAMP, server_default=func.now(), comment="When the row was made"
    )
    updated_at: Named[datetime] = Column(
        _TIMESTAMP, server_default=func.now(), comment="When the row last changed"
    )


class ReadyColumns(TypedColumns):
    """Columns of `checkpoints_ready`."""

    id = Column(
        BigInteger,
        ForeignKey("checkpoints.checkpoints.id", ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
        comment="The checkpoint",
    )
    process_at: Named[datetime] = Column(
        _TIMESTAMP, index=True, comment="Its process_at: from when it may be claimed"
    )
    subscription_id: Named[int] = Column(BigInteger, comment="Its subscription")


class ReservedColumns(TypedColumns):
    """Columns of `checkpoints_reserved`."""

    id = Column(
        BigInteger,
        ForeignKey("checkpoints.checkpoints.id", ondelete="CASCADE"),
        primary_key=True,
        autoincrement=False,
        comment="The checkpoint",
    )
    reserved_until: Named[datetime] = Column(
        _TIMESTAMP, comment="Its reserved_until: when the reservation expires"
    )
    subscription_id: Named[int] = Column(BigInteger, comment="Its subscription")


subscription_groups = Table(
    "subscription_groups",
    metadata,
    SubscriptionGroupColumns,
    comment="Subscriptions that are recorded and consumed together",
)

subscriptions = Table(
    "subscriptions",
    metadata,
    SubscriptionColumns,
    UniqueConstraint("subscription_group_id", "name"),
    comment="Who follows streams",
)

checkpoints = Table(
    "checkpoints",
    metadata,
    CheckpointColumns,
    UniqueConstraint("subscription_id", "stream_name"),
    # No index holds a time or what says whether it lags: then nearly every update is a HOT one.
    Index(
        "ix_checkpoints_status_subscription_id",
        "status",
        "subscription_id",
        postgresql_where=text("status <> 'active'"),
    ),
    postgresql_with=_STORAGE_OF_MAIN,
    comment="How far each subscription has processed each stream: the truth",
)

checkpoints_ready = Table(
    "checkpoints_ready",
    metadata,
    ReadyColumns,
    Index(None, "subscription_id", "process_at"),
    postgresql_with=_STORAGE_OF_HOT,
    comment="Projection of checkpoints, kept by a trigger: what can be claimed",
)

checkpoints_reserved = Table(
    "checkpoints_reserved",
    metadata,
    ReservedColumns,
    Index(None, "subscription_id", "reserved_until"),
    postgresql_with=_STORAGE_OF_HOT,
    comment="Projection of checkpoints, kept by a trigger: what is claimed now",
)
