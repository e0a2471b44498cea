"""`metadata.create_all()` makes what the revisions make, and takes all of it away again."""

from __future__ import annotations

import pytest
from sqlalchemy import URL, Connection, text
from sqlalchemy.exc import ProgrammingError

from checkpoints.tables import metadata
from tests.migrations.catalogue import fingerprint
from tests.migrations.support import downgrade, engine_of, upgrade

NAMES = ["checkpoints", "other", "my Schema", "per%cent", "quo\"te's", "UPPER"]


def translated(connection: Connection, schema: str) -> Connection:
    return connection.execution_options(schema_translate_map={"checkpoints": schema})


@pytest.mark.parametrize("schema", NAMES)
def test_create_all_makes_what_the_revisions_make(
    database_url: URL, migrated_url: URL, schema: str
) -> None:
    with engine_of(migrated_url) as engine, engine.connect() as connection:
        migrated = fingerprint(connection)
    with engine_of(database_url) as engine, engine.connect() as connection:
        metadata.create_all(translated(connection, schema))
        connection.commit()
        assert fingerprint(connection, schema) == migrated
    kinds = {line.partition(" ")[0] for line in migrated}
    assert kinds == {
        *("relation", "column", "sequence", "constraint", "index"),
        *("trigger", "function", "enum"),
    }


@pytest.mark.parametrize("schema", NAMES[1:])
def test_the_revisions_make_the_same_in_every_schema(
    database_url: URL, migrated_url: URL, schema: str
) -> None:
    upgrade(database_url, schema=schema)
    with (
        engine_of(database_url) as engine,
        engine_of(migrated_url) as other,
        engine.connect() as connection,
        other.connect() as default,
    ):
        assert fingerprint(connection, schema) == fingerprint(default)
        assert fingerprint(connection) == []


def test_create_all_again_changes_nothing(migrated_url: URL) -> None:
    with engine_of(migrated_url) as engine, engine.connect() as connection:
        before = fingerprint(connection)
        for _ in range(2):
            metadata.create_all(connection)
            connection.commit()
        assert fingerprint(connection) == before


@pytest.mark.parametrize("schema", ["checkpoints", "per%cent"])
def test_drop_all_leaves_an_empty_schema(database_url: URL, schema: str) -> None:
    with engine_of(database_url) as engine, engine.connect() as connection:
        metadata.create_all(translated(connection, schema))
        metadata.drop_all(translated(connection, schema))
        connection.commit()
        assert fingerprint(connection, schema) == []
        assert connection.dialect.has_schema(connection, schema)


def test_create_all_needs_no_right_to_create_a_schema_that_is_there(database_url: URL) -> None:
    with engine_of(database_url) as engine, engine.connect() as connection:
        connection.execute(text("CREATE SCHEMA checkpoints"))
        connection.execute(text(f"CREATE ROLE {database_url.database}"))
        connection.execute(
            text(f"GRANT USAGE, CREATE ON SCHEMA checkpoints TO {database_url.database}")
        )
        connection.execute(text(f"SET ROLE {database_url.database}"))
        with pytest.raises(ProgrammingError, match="permission denied"), connection.begin_nested():
            connection.execute(text("CREATE SCHEMA IF NOT EXISTS checkpoints"))
        metadata.create_all(connection)
        connection.rollback()


def test_a_downgrade_leaves_what_there_was(database_url: URL) -> None:
    with engine_of(database_url) as engine, engine.connect() as connection:
        upgrade(database_url, "0.22.0")
        single = fingerprint(connection)
        upgrade(database_url, "0.23.0")
        hot = fingerprint(connection)
        upgrade(database_url, "0.24.0")
        head = fingerprint(connection)
        downgrade(database_url, "0.23.0")
        assert fingerprint(connection) == hot
        downgrade(database_url, "0.22.0")
        assert fingerprint(connection) == single
        upgrade(database_url, "0.23.0")
        assert fingerprint(connection) == hot
        downgrade(database_url, "base")
        assert fingerprint(connection) == []
        assert (
            connection.scalars(text("SELECT version_num FROM checkpoints.alembic_version")).all()
            == []
        )
        connection.rollback()
        upgrade(database_url)
        assert fingerprint(connection) == head
    assert single != hot
    assert hot != head


@pytest.mark.parametrize(
    "change",
    [
        "ALTER TABLE checkpoints.checkpoints ALTER stream_version SET DEFAULT 1",
        "ALTER TABLE checkpoints.checkpoints ALTER retry_attempts TYPE bigint",
        "ALTER TABLE checkpoints.checkpoints ALTER retries SET NOT NULL",
        "ALTER TABLE checkpoints.checkpoints ALTER id SET GENERATED ALWAYS",
        "ALTER TABLE checkpoints.checkpoints DISABLE TRIGGER checkpoint_postprocessor",
        "COMMENT ON COLUMN checkpoints.checkpoints.lagging IS 'other'",
        "COMMENT ON TABLE checkpoints.subscriptions IS NULL",
        "DROP INDEX checkpoints.ix_checkpoints_status_subscription_id",
        "ALTER TABLE checkpoints.checkpoints RESET (fillfactor)",
        "ALTER TABLE checkpoints.checkpoints_ready DROP CONSTRAINT fk_checkpoints_ready_id",
        "ALTER TYPE checkpoints.checkpoint_status RENAME VALUE 'retry' TO 'again'",
        "DROP TRIGGER subscription_notifier ON checkpoints.subscriptions",
        "ALTER FUNCTION checkpoints.checkpoint_preprocessor SECURITY DEFINER",
    ],
)
def test_the_comparison_sees_a_difference(connection: Connection, change: str) -> None:
    before = fingerprint(connection)
    connection.execute(text(change))
    connection.commit()
    assert fingerprint(connection) != before
