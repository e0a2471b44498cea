"""Schemas of any name, and several in one database: none of them touches another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import psycopg
import pytest
from sqlalchemy import URL, Connection, text

from checkpoints import (
    CheckpointRecord,
    CheckpointStatus,
    SubscriptionStatus,
    advance_lagging_subscription_checkpoints,
    audit_checkpoints,
    get_metrics,
    list_failed,
    list_lagging,
    list_reservations,
    list_retries,
    record_checkpoint_error,
    record_checkpoints,
    recover_expired_checkpoint_reservations,
    release_checkpoint_reservation,
    repair_checkpoints,
    reserve_next_available_checkpoint,
    schedule_checkpoints,
    set_subscription_status,
    skip_checkpoints,
    update_checkpoint_position,
)
from tests.migrations.support import engine_of, upgrade
from tests.support.factories import (
    GROUP,
    LONG_AGO,
    MINUTE,
    add_checkpoint,
    add_subscription,
    reserve,
    state,
    violations,
)

NAMES = ["my Schema", "per%cent", "quo\"te's", "UPPER", "select"]
TABLES = (
    "subscription_groups",
    "subscriptions",
    "checkpoints",
    "checkpoints_ready",
    "checkpoints_reserved",
)


@dataclass
class Schema:
    """A schema beside the default one, which has rows too, and connections to both."""

    name: str
    connection: Connection
    default: Connection

    def content(self) -> list[list[str]]:
        """Every row of the default schema."""
        queries = [f"SELECT CAST(t AS text) FROM checkpoints.{table} AS t" for table in TABLES]
        found = [list(self.default.scalars(text(query))) for query in queries]
        self.default.rollback()
        return found


@pytest.fixture(params=NAMES)
def schema(request: pytest.FixtureRequest, migrated_url: URL) -> Iterator[Schema]:
    upgrade(migrated_url, schema=request.param)
    translate = {"checkpoints": request.param}
    with engine_of(migrated_url) as engine, engine.connect() as default:
        subscription = add_subscription(default)
        for number in range(9):
            add_checkpoint(default, subscription, f"account-{number}")
        reserve(default)
        default.commit()
        with engine.connect() as plain:
            connection = plain.execution_options(schema_translate_map=translate)
            yield Schema(request.param, connection, default)


def test_every_statement_keeps_to_its_schema(schema: Schema) -> None:
    before = schema.content()
    connection = schema.connection
    subscription = add_subscription(connection)
    records = [CheckpointRecord(subscription, f"account-{number}", 3) for number in range(3)]
    assert len(connection.execute(record_checkpoints(records)).all()) == 3
    held = reserve(connection)
    assert connection.execute(update_checkpoint_position(held.id, held.reserved_until, 1)).all()
    held = reserve(connection)
    error = record_checkpoint_error(
        held.id,
        held.reserved_until,
        0,
        status=CheckpointStatus.RETRY,
        retry_attempts=1,
        error="100%",
        process_at=LONG_AGO,
    )
    assert connection.execute(error).all()
    assert len(connection.execute(list_retries()).all()) == 1
    assert connection.execute(schedule_checkpoints([held.id], LONG_AGO)).all()
    held = reserve(connection)
    assert len(connection.execute(list_reservations()).all()) == 1
    assert connection.execute(release_checkpoint_reservation(held.id)).all()
    assert connection.execute(recover_expired_checkpoint_reservations(GROUP)).all() == []
    assert connection.execute(skip_checkpoints([held.id])).all()
    assert len(connection.execute(list_lagging()).all()) == 3
    assert connection.execute(list_failed()).all() == []
    assert connection.execute(get_metrics()).all()
    assert (
        len(connection.execute(advance_lagging_subscription_checkpoints(subscription)).all()) == 3
    )
    assert connection.execute(repair_checkpoints()).all() == []
    assert connection.execute(audit_checkpoints()).all() == []
    assert connection.execute(reserve_next_available_checkpoint(GROUP, MINUTE)).all() == []
    connection.commit()
    assert schema.content() == before


def test_the_triggers_of_a_schema_keep_its_hot_tables(schema: Schema) -> None:
    connection = schema.connection
    id = add_checkpoint(connection, add_subscription(connection), "account-1")
    assert state(connection, id).ready is not None
    quoted = '"' + schema.name.replace('"', '""') + '"'
    update = text(f"UPDATE {quoted}.checkpoints SET reserved_until = now() WHERE id = :id")
    connection.execute(update, {"id": id})
    after = state(connection, id)
    assert (after.ready, after.reserved) == (None, after.reserved_until)
    connection.execute(text(f"DELETE FROM {quoted}.checkpoints"))
    assert connection.scalars(text(f"SELECT id FROM {quoted}.checkpoints_reserved")).all() == []
    assert violations(schema.default) == []


def test_each_schema_notifies_on_a_channel_of_its_own_name(schema: Schema) -> None:
    engine = schema.connection.engine
    positional, options = engine.dialect.create_connect_args(engine.url)
    with psycopg.connect(*positional, **options, autocommit=True) as listener:
        for channel in (schema.name, "checkpoints"):
            listener.execute(psycopg.sql.SQL("LISTEN {}").format(psycopg.sql.Identifier(channel)))
        one = add_subscription(
            schema.connection, group="one", status=SubscriptionStatus.UNINITIALIZED
        )
        two = add_subscription(schema.default, group="two", status=SubscriptionStatus.UNINITIALIZED)
        for connection, subscription in ((schema.connection, one), (schema.default, two)):
            connection.commit()
            # By the trigger of the subscriptions, then by that of the checkpoints.
            connection.execute(set_subscription_status(subscription, SubscriptionStatus.ACTIVE))
            connection.commit()
            add_checkpoint(connection, subscription)
            connection.commit()
        heard = [
            (notification.channel, notification.payload)
            for notification in listener.notifies(timeout=10, stop_after=4)
        ]
    assert heard == [(schema.name, "one")] * 2 + [("checkpoints", "two")] * 2
