"""The errors of the package. Driver errors that are not listed here pass unwrapped."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime

from alembic.util import CommandError

__all__ = [
    "CheckpointsError",
    "MigrationRefused",
    "ReservationLost",
    "ReservationsLost",
    "SchemaNotMigrated",
    "SubscriptionExists",
    "SubscriptionRunning",
    "UnknownSubscription",
    "WrongSchemaRevision",
]


class CheckpointsError(Exception):
    """The root of every error that this package raises, bad arguments aside."""


class ReservationLost(CheckpointsError):
    """The reservation is no longer held: it expired and was recovered, or an operator ended it.

    Let it leave the transaction's block, so that what the handler wrote is rolled back: another
    consumer has the checkpoint, or will have it.
    """

    def __init__(self, id: int, reserved_until: datetime) -> None:
        super().__init__(
            f"the reservation of checkpoint {id!r} until {reserved_until.isoformat()} is lost: "
            "it expired and was recovered, or an operator ended it; roll back this transaction"
        )
        self.id = id
        self.reserved_until = reserved_until


class ReservationsLost(ReservationLost):
    """Reservations of a batch are no longer held; `lost` has the id and the token of each.

    Let it leave the transaction's block, so that what was written for all of the batch is rolled
    back; then process those that are still held again. `id` and `reserved_until` are of the first.
    """

    def __init__(self, lost: Sequence[tuple[int, datetime]]) -> None:
        super().__init__(*lost[0])
        ids = ", ".join(repr(id) for id, _ in lost)
        self.args = (
            f"the reservations of checkpoints {ids} are lost: they expired and were recovered, or "
            "an operator ended them; roll back this transaction, which is of others too",
        )
        self.lost = list(lost)


class UnknownSubscription(CheckpointsError):
    """There is no subscription with the id that was given; nothing was changed.

    When it was a record of a checkpoint that named it, the transaction is aborted, as after every
    database error: roll it back, or run the call in a savepoint. `subscription_id` is None if the
    server does not say which it was.
    """

    def __init__(self, subscription_id: int | None) -> None:
        which = "that was given" if subscription_id is None else repr(subscription_id)
        super().__init__(
            f"there is no subscription with id {which}: nothing was changed; "
            "give the id that add_or_update_subscription() returns"
        )
        self.subscription_id = subscription_id


class SubscriptionExists(CheckpointsError):
    """The group has another subscription of that name; nothing was changed.

    The transaction is aborted, as after every database error: roll it back, or run the call in a
    savepoint. `subscription_group_id` and `name` are None if the server does not say which it was.
    """

    def __init__(self, subscription_group_id: int | None, name: str | None) -> None:
        which = (
            "the group has a subscription of that name"
            if name is None
            else f"group {subscription_group_id!r} has a subscription {name!r}"
        )
        super().__init__(f"{which} already: nothing was changed; rename one of the two first")
        self.subscription_group_id = subscription_group_id
        self.name = name


class SubscriptionRunning(CheckpointsError):
    """Consumers are given the subscription's checkpoints; nothing was changed."""

    def __init__(self, subscription_id: int, status: str) -> None:
        super().__init__(
            f"subscription {subscription_id!r} is {status!r}, and consumers are given its "
            "checkpoints: nothing was changed; stop it first with pause_subscription()"
        )
        self.subscription_id = subscription_id
        self.status = status


class SchemaNotMigrated(CheckpointsError):
    """The tables, types or functions of this package are missing in the schema that is used."""

    def __init__(self, missing: str) -> None:
        super().__init__(
            f"the schema of checkpoints is missing or too old ({missing}): run the migration for "
            "this database and schema: the application's own, `checkpoints migrate`, or "
            "`alembic upgrade head` in a clone; checkpoints.migrations.verify() says which it needs"
        )


class WrongSchemaRevision(CheckpointsError):
    """The schema is not at the revision that this code needs; `verify` looks.

    `installed` is the revision that the database records: None if the tables are not there,
    and "unknown" if they are and no revision is recorded.
    """

    def __init__(self, schema: str, installed: str | None, needed: str, remedy: str) -> None:
        found = {
            None: "has no tables of checkpoints",
            "unknown": "has tables of checkpoints, but does not say of which revision",
        }.get(installed, f"is at revision {installed!r} of checkpoints")
        super().__init__(f"the schema {schema!r} {found}; this code needs {needed!r}: {remedy}")
        self.schema = schema
        self.installed = installed
        self.needed = needed


class MigrationRefused(CheckpointsError, CommandError):
    """A migration cannot be run as it was asked for; the transaction must be rolled back.

    It is one of Alembic's errors too, so that the command `alembic` shows it as one line.
    """
