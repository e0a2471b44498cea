"""An application that runs the packaged revisions in its own history."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from alembic.operations import Operations
from alembic.runtime.migration import MigrationContext
from sqlalchemy import URL, Connection, create_engine, text
from sqlalchemy.exc import ProgrammingError

from checkpoints import Checkpoints, MigrationRefused, metadata, migrations
from checkpoints.migrations.revisions import known
from tests.migrations.catalogue import fingerprint
from tests.migrations.projects import Project, install, start_project
from tests.migrations.support import (
    WAITS_FOR_A_ROW,
    alembic,
    engine_of,
    eventually,
    fill,
    psql,
    upgrade,
)
from tests.support.databases import disposed
from tests.support.factories import violations

HEAD = migrations.head()
BEFORE = known()[-2]
PER_MIGRATION = "transaction_per_migration=True"


@pytest.fixture
def project(tmp_path: Path, database_url: URL) -> Project:
    return start_project(tmp_path, database_url)


@pytest.fixture
def connection(project: Project) -> Iterator[Connection]:
    with engine_of(project.url) as engine, engine.connect() as made:
        yield made


def installed(connection: Connection, schema: str | None = None) -> str | None:
    found = migrations.installed_revision(connection, schema=schema)
    connection.rollback()
    return found


def application_is_at(connection: Connection) -> str:
    found = connection.scalars(text("SELECT version_num FROM public.alembic_version")).one()
    connection.rollback()
    return str(found)


@pytest.fixture
def standard(migrated_url: URL) -> list[str]:
    """What the migrations make when they are run apart."""
    with engine_of(migrated_url) as engine, engine.connect() as connection:
        return fingerprint(connection)


@pytest.mark.parametrize("options", ["", PER_MIGRATION], ids=["one_transaction", "per_migration"])
@pytest.mark.parametrize(
    ("template", "schema"),
    [
        ("generic", "checkpoints"),
        ("generic", "public"),
        ("generic", "my \"per%cent's"),
        ("async", "checkpoints"),
    ],
)
def test_the_whole_life_in_the_applications_history(
    *,
    tmp_path: Path,
    database_url: URL,
    standard: list[str],
    options: str,
    template: str,
    schema: str,
) -> None:
    project = start_project(tmp_path, database_url, template=template)
    project.configure(options)
    written = project.write("base", "--schema", schema)
    with engine_of(project.url) as engine, engine.connect() as connection:
        project.alembic("upgrade", "head")
        project.alembic("current", "--check-heads")
        if schema == "public":
            assert set(standard) <= set(fingerprint(connection, schema))
        else:
            assert fingerprint(connection, schema) == standard
        translated = connection.execution_options(schema_translate_map={"checkpoints": schema})
        migrations.verify(translated)
        Checkpoints(translated).add_or_update_subscription("accounts", "balances")
        assert violations(translated) == []
        connection.rollback()
        assert written.name.startswith(application_is_at(connection))

        project.alembic("downgrade", "-1")
        assert installed(connection, schema) is None
        assert [line for line in fingerprint(connection, schema) if line in standard] == []
        project.alembic("upgrade", "head")
        assert installed(connection, schema) == HEAD


@pytest.mark.parametrize("options", ["", PER_MIGRATION], ids=["one_transaction", "per_migration"])
def test_two_revisions_of_the_application_go_up_with_rows_and_down(
    project: Project, connection: Connection, options: str
) -> None:
    project.configure(options)
    first, second = known()[1:3]
    project.write("base", "--to", first)
    project.alembic("upgrade", "head")
    assert installed(connection) == first
    fill(connection, 12_000)
    project.write(first, "--to", second)
    project.alembic("upgrade", "head")
    assert installed(connection) == second
    if second == HEAD:
        assert violations(connection) == []
        connection.rollback()
    project.alembic("downgrade", "-1")
    assert installed(connection) == first
    project.alembic("downgrade", "base")
    assert installed(connection) is None


def test_both_in_one_command_from_nothing(project: Project, connection: Connection) -> None:
    project.write("base", "--to", BEFORE)
    # A second one on the command line, as `-m` of Alembic.
    project.write(BEFORE, "-m", "then the newest")
    project.alembic("upgrade", "head")
    assert installed(connection) == HEAD
    project.alembic("downgrade", "base")
    assert installed(connection) is None


@pytest.mark.parametrize("schema", ["checkpoints", "public", "my \"schema's"])
def test_the_script_does_what_the_migration_does(
    project: Project, connection: Connection, standard: list[str], schema: str
) -> None:
    project.alembic("upgrade", "head")
    project.write("base", "--schema", schema)
    script = project.alembic("upgrade", f"{application_is_at(connection)}:head", "--sql")
    done = psql(project.url, "\\set ON_ERROR_STOP on\n" + script)
    assert (done.returncode, done.stderr) == (0, "")
    assert set(standard) <= set(fingerprint(connection, schema))
    assert installed(connection, schema) == HEAD
    project.alembic("current", "--check-heads")
    revision = application_is_at(connection)
    script = project.alembic("downgrade", f"{revision}:-1", "--sql")
    done = psql(project.url, "\\set ON_ERROR_STOP on\n" + script)
    assert (done.returncode, done.stderr) == (0, "")
    assert installed(connection, schema) is None


CONCURRENTLY = f"""
from alembic import op

revision = "99.0.0"
down_revision = "{HEAD}"


def upgrade() -> None:
    schema = op.get_context().version_table_schema
    columns = ["stream_name", "id"]
    with op.get_context().autocommit_block():
        op.create_index(
            "ix_next", "checkpoints", columns, schema=schema, postgresql_concurrently=True
        )


def downgrade() -> None:
    schema = op.get_context().version_table_schema
    with op.get_context().autocommit_block():
        op.drop_index("ix_next", "checkpoints", schema=schema, postgresql_concurrently=True)
"""


@pytest.mark.parametrize("options", ["", PER_MIGRATION], ids=["one_transaction", "per_migration"])
def test_an_index_is_built_concurrently(
    project: Project, connection: Connection, tmp_path: Path, options: str
) -> None:
    """By a revision of a newer package, which is not here yet."""
    newer = install(tmp_path / "newer", CONCURRENTLY)
    project.environment["PYTHONPATH"] = os.pathsep.join([str(newer), str(tmp_path)])
    project.configure(options)
    valid = text("SELECT bool_and(indisvalid) FROM pg_index WHERE indexrelid = to_regclass(:name)")

    def built() -> bool | None:
        found: bool | None = connection.scalar(valid, {"name": "checkpoints.ix_next"})
        connection.rollback()
        return found

    written = project.write("base")
    assert 'to="99.0.0"' in written.read_text()
    project.alembic("upgrade", "head")
    assert (built(), installed(connection)) == (True, "99.0.0")

    def by_script(*arguments: str) -> None:
        script = project.alembic(*arguments, "--sql")
        done = psql(project.url, "\\set ON_ERROR_STOP on\n" + script)
        assert (done.returncode, done.stderr) == (0, "")

    by_script("downgrade", f"{application_is_at(connection)}:-1")
    assert (built(), installed(connection)) == (None, None)
    by_script("upgrade", f"{application_is_at(connection)}:head")
    assert (built(), installed(connection)) == (True, "99.0.0")
    project.alembic("downgrade", "-1")
    assert (built(), installed(connection)) == (None, None)


def test_a_script_for_another_revision_stops_before_it_changes_anything(
    project: Project, connection: Connection
) -> None:
    project.alembic("upgrade", "head")
    project.write("base")
    script = project.alembic("upgrade", f"{application_is_at(connection)}:head", "--sql")
    upgrade(project.url, BEFORE)
    before = fingerprint(connection)
    done = psql(project.url, "\\set ON_ERROR_STOP on\n" + script)
    assert done.returncode == 3
    assert "is not at revision base of checkpoints" in done.stderr
    assert fingerprint(connection) == before


def test_a_script_without_from_is_refused(project: Project) -> None:
    project.revise(
        "tables",
        f"migrations.upgrade(op, to={HEAD!r})",
        "migrations.downgrade(op, to='base')",
    )
    assert "give it, as migrations.upgrade(op, from_=" in project.refused(
        "upgrade", "head", "--sql"
    )
    project.alembic("upgrade", "head")
    project.alembic("downgrade", "-1")


def test_tables_that_are_there_are_passed_over(project: Project, connection: Connection) -> None:
    """An application takes over what was migrated apart, and new databases get all of it."""
    upgrade(project.url, BEFORE)
    project.write("base", "--to", BEFORE)
    project.alembic("upgrade", "head")
    assert installed(connection) == BEFORE
    project.write(BEFORE)
    project.alembic("upgrade", "head")
    assert installed(connection) == HEAD
    # The version table of the migrations that are run apart follows.
    done = alembic("current", DATABASE_URL=project.url.render_as_string(hide_password=False))
    assert done.stdout == f"{HEAD} (head)\n"
    project.alembic("downgrade", "-2")
    done = alembic("current", DATABASE_URL=project.url.render_as_string(hide_password=False))
    assert done.stdout == ""


def test_a_database_before_from_is_refused(project: Project, connection: Connection) -> None:
    written = project.write(BEFORE)
    line = project.refused("upgrade", "head")
    assert f"is at revision 'base' of checkpoints, and not at from_, {BEFORE!r}" in line
    assert installed(connection) is None
    project.change(written, f'upgrade(op, from_="{BEFORE}"', 'upgrade(op, from_="base"')
    project.alembic("upgrade", "head")
    assert installed(connection) == HEAD


def test_a_revision_that_is_not_known_is_refused(project: Project, connection: Connection) -> None:
    upgrade(project.url)
    connection.execute(
        text("COMMENT ON TYPE checkpoints.checkpoint_status IS 'revision 99.0.0 of checkpoints'")
    )
    connection.commit()
    project.write("base")
    line = project.refused("upgrade", "head")
    assert "is at revision '99.0.0' of checkpoints, which this installation" in line


def test_a_downgrade_of_an_earlier_revision_is_refused(
    project: Project, connection: Connection
) -> None:
    """The later ones were run apart: what they made must not be dropped unseen."""
    project.write("base", "--to", BEFORE)
    project.alembic("upgrade", "head")
    with engine_of(project.url) as engine, engine.begin() as other:
        operations = Operations(MigrationContext.configure(other))
        with pytest.raises(MigrationRefused, match="is not Alembic's"):
            migrations.upgrade(operations, to=HEAD)
    with engine_of(project.url) as engine, engine.connect() as other:
        context = MigrationContext.configure(other)
        with context.begin_transaction():
            migrations.upgrade(Operations(context), to=HEAD)
    assert installed(connection) == HEAD
    line = project.refused("downgrade", "-1")
    assert f"and not at from_, {BEFORE!r}" in line
    assert installed(connection) == HEAD


TRANSACTIONS_OF_OTHERS = {
    "begun by the engine": ("with connectable.connect()", "with connectable.begin()"),
    "begun by a statement": (
        "        context.configure(\n            connection",
        "        connection.exec_driver_sql('SELECT 1')\n"
        "        context.configure(\n            connection",
    ),
    "none at all": (
        "        with context.begin_transaction():\n            context.run_migrations()\n\n\nif",
        "        context.run_migrations()\n\n\nif",
    ),
}


@pytest.mark.parametrize("change", TRANSACTIONS_OF_OTHERS.values(), ids=TRANSACTIONS_OF_OTHERS)
def test_a_transaction_that_cannot_be_committed_is_one_line_that_says_what_to_set(
    project: Project, connection: Connection, change: tuple[str, str]
) -> None:
    project.change(project.env, *change)
    project.write("base")
    line = project.refused("upgrade", "head")
    assert "commits in between, and the transaction that it runs in is not Alembic's" in line
    assert "transaction_per_migration=True" in line
    assert installed(connection) is None
    assert fingerprint(connection) == []


def test_an_interrupted_migration_goes_on_when_it_is_run_again(
    project: Project, connection: Connection
) -> None:
    first, second = known()[1:3]
    assert second == "0.23.0"
    project.write("base", "--to", first)
    project.alembic("upgrade", "head")
    fill(connection, 12_000)
    project.write(first)
    with (
        engine_of(project.url) as engine,
        ThreadPoolExecutor(1) as executor,
        engine.connect() as holder,
        engine.connect() as other,
    ):
        holder.execute(text("SELECT FROM checkpoints.checkpoints WHERE id = 6001 FOR UPDATE"))
        migration = executor.submit(project.run, "alembic", "upgrade", "head")
        pid = eventually(other, WAITS_FOR_A_ROW)
        line = project.refused("upgrade", "head")
        assert "another migration of checkpoints in the schema 'checkpoints' is running" in line
        other.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
        other.commit()
        assert migration.result().returncode != 0
    assert installed(connection) == first
    project.alembic("upgrade", "head")
    assert installed(connection) == HEAD
    assert violations(connection) == []


def test_the_settings_of_a_role_do_not_matter_and_hold_again_afterwards(
    project: Project, connection: Connection
) -> None:
    first = known()[1]
    project.write("base", "--to", first)
    project.alembic("upgrade", "head")
    fill(connection, 22_000)
    settings = {
        "statement_timeout": "150ms",
        "lock_timeout": "150ms",
        "idle_in_transaction_session_timeout": "150ms",
        "default_transaction_isolation": "serializable",
    }
    for name, value in settings.items():
        connection.execute(
            text(f"ALTER DATABASE \"{project.url.database}\" SET {name} = '{value}'")
        )
    connection.commit()
    written = project.write(first)
    call = f'upgrade(op, from_="{first}", to="{HEAD}", schema="checkpoints")'
    queries = {
        "timeouts": "SELECT count(*) FROM pg_settings WHERE setting = '150'",
        "isolation": "SHOW default_transaction_isolation",
        "locks": "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'",
    }
    shown = [
        f'    print("{name}", op.get_bind().exec_driver_sql("{query}").scalar())'
        for name, query in queries.items()
    ]
    project.change(written, call, "\n".join([call, *shown]))
    output = project.alembic("upgrade", "head")
    assert "timeouts 3\n" in output
    assert "isolation serializable\n" in output
    # The next migration waits until this one is committed.
    assert "locks 1\n" in output
    connection.rollback()
    assert connection.scalar(text("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'")) == 0


def test_a_failure_leaves_no_lock_and_no_setting_in_a_pool(connection_only: Connection) -> None:
    connection_only.execute(text("CREATE SCHEMA checkpoints"))
    connection_only.execute(text("CREATE TYPE checkpoints.subscription_status AS ENUM ('mine')"))
    connection_only.commit()
    engine = create_engine(connection_only.engine.url, pool_size=1, max_overflow=0)
    with disposed(engine):
        with engine.connect() as connection:
            context = MigrationContext.configure(connection)
            with (
                pytest.raises(ProgrammingError, match="already exists"),
                context.begin_transaction(),
            ):
                migrations.upgrade(Operations(context), to=HEAD)
        with engine.connect() as connection:
            assert connection.scalar(text("SHOW lock_timeout")) == "0"
            advisory = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'"
            assert connection.scalar(text(advisory)) == 0


def test_tables_of_which_nothing_is_recorded_need_from(connection_only: Connection) -> None:
    metadata.create_all(connection_only)
    connection_only.execute(text("COMMENT ON TYPE checkpoints.checkpoint_status IS NULL"))
    connection_only.commit()

    def run(from_: str | None) -> None:
        context = MigrationContext.configure(connection_only)
        with context.begin_transaction():
            migrations.upgrade(Operations(context), to=HEAD, from_=from_)

    for from_ in (None, "base"):
        with pytest.raises(MigrationRefused, match="does not say of which revision"):
            run(from_)
    run(HEAD)
    assert installed(connection_only) == HEAD


def test_the_version_tables_schema_is_the_applications_again_afterwards(project: Project) -> None:
    written = project.write("base")
    project.change(
        written,
        f'to="{HEAD}", schema="checkpoints")',
        f'to="{HEAD}", schema="checkpoints")\n'
        "    print('schema', op.get_context().version_table_schema)\n"
        "    with op.get_context().autocommit_block():\n"
        "        op.execute('SELECT 1')",
    )
    assert "schema None" in project.alembic("upgrade", "head")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"to": "head"}, ValueError, "to must be one of '0.22.0', '0.23.0'"),
        ({"to": "base"}, ValueError, "to must be one of '0.22.0'"),
        ({"to": None}, TypeError, "to must be a string"),
        ({"to": HEAD, "from_": "0.1.0"}, ValueError, "from_ must be one of 'base', '0.22.0'"),
        ({"to": BEFORE, "from_": HEAD}, ValueError, "to must not be before from_"),
        ({"to": HEAD, "schema": ""}, ValueError, "schema must not be empty"),
        ({"to": HEAD, "schema": "s" * 64}, ValueError, "schema must have at most 63 bytes"),
    ],
)
def test_arguments_are_checked(
    arguments: dict[str, str], error: type[Exception], message: str, connection_only: Connection
) -> None:
    operations = Operations(MigrationContext.configure(connection_only))
    with pytest.raises(error, match=re.escape(message)):
        migrations.upgrade(operations, **arguments)


@pytest.fixture
def connection_only(database_url: URL) -> Iterator[Connection]:
    with engine_of(database_url) as engine, engine.connect() as made:
        yield made


def test_another_database_is_refused() -> None:
    context = MigrationContext.configure(dialect_name="sqlite", opts={"as_sql": True})
    with pytest.raises(MigrationRefused, match="this migration is for 'sqlite'"):
        migrations.upgrade(Operations(context), from_="base", to=HEAD)
