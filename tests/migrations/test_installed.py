"""The revision that a database records, and what `verify` says of it."""

from __future__ import annotations

import asyncio
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from alembic.util import CommandError
from sqlalchemy import URL, Connection, text
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session

from alembic import command
from checkpoints import (
    CheckpointsError,
    WrongSchemaRevision,
    alembic_config,
    metadata,
    migrations,
)
from checkpoints.embedded import _binaries
from checkpoints.migrations.revisions import known
from tests.migrations.support import alembic, downgrade, engine_of, psql, upgrade

HEAD = migrations.head()
REVISIONS = known()[1:]
SCHEMAS = ["checkpoints", "public", "my per%cent", "quo\"te's"]


@pytest.fixture
def connection(database_url: URL) -> Iterator[Connection]:
    with engine_of(database_url) as engine, engine.connect() as made:
        yield made


def installed(connection: Connection, schema: str = "checkpoints") -> str | None:
    found = migrations.installed_revision(connection, schema=schema)
    connection.rollback()
    return found


def verified(
    connection: Connection, schema: str = "checkpoints", *, allow_newer: bool = False
) -> str:
    """What `verify` complains about."""
    with pytest.raises(WrongSchemaRevision) as raised:
        migrations.verify(connection, schema=schema, allow_newer=allow_newer)
    connection.rollback()
    assert isinstance(raised.value, CheckpointsError)
    assert (raised.value.schema, raised.value.needed) == (schema, HEAD)
    assert raised.value.installed == installed(connection, schema)
    return str(raised.value)


def test_the_head_is_the_newest_file() -> None:
    files = sorted((migrations.script_location() / "versions").glob("*.py"))
    assert [file.name.startswith(HEAD.replace(".", "_")) for file in files][-1]
    assert len(files) == len(REVISIONS)


@pytest.mark.parametrize("schema", SCHEMAS)
def test_each_way_up_and_down_is_recorded(
    database_url: URL, connection: Connection, schema: str
) -> None:
    assert installed(connection, schema) is None
    for revision in REVISIONS:
        upgrade(database_url, revision, schema=schema)
        assert installed(connection, schema) == revision
    migrations.verify(connection, schema=schema)
    connection.rollback()
    for revision in REVISIONS[-2::-1]:
        downgrade(database_url, revision, schema=schema)
        assert installed(connection, schema) == revision
    downgrade(database_url, "base", schema=schema)
    assert installed(connection, schema) is None


@pytest.mark.parametrize("schema", SCHEMAS)
def test_the_printed_script_records_it_too(
    database_url: URL, connection: Connection, schema: str
) -> None:
    for revision in ("upgrade", HEAD), ("downgrade", f"{HEAD}:{REVISIONS[0]}"):
        script = alembic("-x", f"schema={schema}", *revision, "--sql").stdout
        done = psql(database_url, script)
        assert (done.returncode, done.stderr) == (0, "")
        assert installed(connection, schema) == revision[1].rpartition(":")[2]


def test_create_all_records_it(connection: Connection) -> None:
    for schema in SCHEMAS:
        translated = connection.execution_options(schema_translate_map={"checkpoints": schema})
        metadata.create_all(translated)
        migrations.verify(translated)
    connection.rollback()


def test_create_all_beside_older_tables_does_not_say_they_are_new(
    database_url: URL, connection: Connection
) -> None:
    upgrade(database_url, REVISIONS[0])
    metadata.create_all(connection)
    connection.commit()
    assert installed(connection) == REVISIONS[0]


def test_a_stamp_records_it(database_url: URL, connection: Connection) -> None:
    config = alembic_config(database_url)
    command.stamp(config, REVISIONS[0])
    assert installed(connection) is None
    command.stamp(config, "base")
    upgrade(database_url)
    command.stamp(config, REVISIONS[0])
    assert installed(connection) == REVISIONS[0]
    command.stamp(config, "base")
    assert installed(connection) == "unknown"


def major(program: Path) -> int:
    """The major version of a program of PostgreSQL."""
    said = subprocess.run([program, "--version"], check=True, capture_output=True, text=True)
    found = re.search(r"\d+", said.stdout)
    assert found
    return int(found[0])


def test_it_survives_a_dump(
    database_url: URL, connection: Connection, migrated_url: URL, tmp_path: Path
) -> None:
    # One that is older than the server refuses it; what a newer one writes the server may not know.
    server = connection.scalars(text("SELECT current_setting('server_version_num')::int")).one()
    programs = [folder / "pg_dump" for folder, _, _ in _binaries._candidates()]
    fit = [one for one in programs if one.is_file() and major(one) >= server // 10000]
    program = min(fit, key=major)
    file = tmp_path / "dump.sql"
    dsn = migrated_url.set(drivername="postgresql").render_as_string(hide_password=False)
    subprocess.run([program, "-n", "checkpoints", "-f", file, dsn], check=True, timeout=120)
    done = psql(database_url, file.read_text())
    assert (done.returncode, done.stderr) == (0, "")
    assert installed(connection) == HEAD


def test_a_database_without_the_record_is_known_by_its_version_table(
    database_url: URL, connection: Connection
) -> None:
    upgrade(database_url, REVISIONS[0])
    connection.execute(text("COMMENT ON TYPE checkpoints.checkpoint_status IS NULL"))
    connection.commit()
    assert installed(connection) == REVISIONS[0]
    connection.execute(text("DROP TABLE checkpoints.alembic_version"))
    connection.commit()
    assert installed(connection) == "unknown"


def test_a_role_without_rights_can_look(database_url: URL, connection: Connection) -> None:
    role = f"{database_url.database}_role"
    upgrade(database_url)
    connection.execute(text(f"CREATE ROLE {role}"))
    connection.commit()
    try:
        connection.execute(text(f"SET ROLE {role}"))
        migrations.verify(connection)
        connection.rollback()
        connection.execute(text("RESET ROLE"))
        connection.execute(text("COMMENT ON TYPE checkpoints.checkpoint_status IS NULL"))
        connection.execute(text(f"SET ROLE {role}"))
        assert migrations.installed_revision(connection) == "unknown"
        connection.rollback()
    finally:
        connection.rollback()
        connection.execute(text(f"DROP ROLE {role}"))
        connection.commit()


def test_verify_says_what_to_do_without_the_tables(connection: Connection) -> None:
    message = verified(connection)
    assert "the schema 'checkpoints' has no tables of checkpoints" in message
    assert f"this code needs {HEAD!r}" in message
    assert "`checkpoints revision --from base`" in message
    assert "--from base --schema 'my Schema'`" in verified(connection, "my Schema")


@pytest.mark.parametrize("revision", REVISIONS[:-1])
def test_verify_says_which_revision_to_write(
    database_url: URL, connection: Connection, revision: str
) -> None:
    upgrade(database_url, revision)
    for allow_newer in (False, True):
        message = verified(connection, allow_newer=allow_newer)
        assert f"is at revision {revision!r} of checkpoints; this code needs {HEAD!r}" in message
        assert f"`checkpoints revision --from {revision}`" in message


def test_verify_refuses_a_newer_one_unless_it_may(connection: Connection) -> None:
    metadata.create_all(connection)
    connection.execute(
        text("COMMENT ON TYPE checkpoints.checkpoint_status IS 'revision 99.0.0 of checkpoints'")
    )
    connection.commit()
    assert "that revision is newer than this installation" in verified(connection)
    migrations.verify(connection, allow_newer=True)


def test_verify_says_when_nothing_is_recorded(connection: Connection) -> None:
    metadata.create_all(connection)
    connection.execute(text("COMMENT ON TYPE checkpoints.checkpoint_status IS 'of the DBA'"))
    connection.commit()
    assert "does not say of which revision" in verified(connection)
    assert "does not say of which revision" in verified(connection, allow_newer=True)


def test_verify_looks_where_the_statements_go(database_url: URL, connection: Connection) -> None:
    upgrade(database_url, schema="billing")
    with pytest.raises(WrongSchemaRevision):
        migrations.verify(connection)
    migrations.verify(connection.execution_options(schema_translate_map={"checkpoints": "billing"}))
    with pytest.raises(WrongSchemaRevision):
        migrations.verify(connection, schema="checkpoints")


def test_verify_runs_on_a_session_and_with_asyncio(migrated_url: URL) -> None:
    with engine_of(migrated_url) as engine, Session(engine) as session:
        migrations.verify(session.connection())
        with pytest.raises(TypeError, match=r"session\.connection\(\)"):
            migrations.verify(session)  # type: ignore[arg-type]

    async def run() -> None:
        engine = create_async_engine(migrated_url)
        async with engine.connect() as connection:
            await connection.run_sync(migrations.verify)
            with pytest.raises(TypeError, match="run_sync"):
                migrations.verify(connection)  # type: ignore[arg-type]
        await engine.dispose()

    asyncio.run(run())


UNFIT: list[Callable[[URL], None]] = [upgrade, lambda url: upgrade(url, REVISIONS[0])]


@pytest.mark.parametrize("migrate", UNFIT, ids=["head", "first"])
def test_tables_of_another_environment_are_not_made_again(
    database_url: URL, connection: Connection, migrate: Callable[[URL], None]
) -> None:
    """An application's migrations have no version table in the schema."""
    metadata.create_all(connection)
    connection.commit()
    url = f"url={database_url.render_as_string(hide_password=False)}"
    with pytest.raises(CommandError, match="were not made by this environment"):
        migrate(database_url)
    assert installed(connection) == HEAD
    done = alembic("-x", url, "stamp", HEAD)
    assert done.returncode == 0, done.stderr
    upgrade(database_url)
    assert alembic("-x", url, "current").stdout == f"{HEAD} (head)\n"
