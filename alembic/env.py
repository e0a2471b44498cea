"""How `alembic` reaches the database: URL and schema.

It imports nothing from the package, unless the tables are compared (`alembic check`). The
connection must be one to the server, or to a pooler that gives each client a session of its own:
settings and a lock are the session's.
"""

from __future__ import annotations

import logging
import os
import time
from configparser import InterpolationError
from logging.config import fileConfig

from alembic.runtime.migration import MigrationContext, MigrationInfo
from alembic.util import CommandError
from sqlalchemy import DDL, URL, Connection, MetaData, create_engine, func, make_url, select, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, PendingRollbackError
from sqlalchemy.pool import NullPool

from alembic import context

config = context.config
arguments = context.get_x_argument(as_dictionary=True)
log = logging.getLogger("alembic.env")

# A caller that passes its own Config sets attributes instead, and keeps its own logging.
if config.config_file_name is not None and config.file_config.has_section("loggers"):
    fileConfig(config.config_file_name, disable_existing_loggers=False)

for option, value in arguments.items():
    # One that was misspelt must not lead to another database or schema.
    if option not in {"url", "schema"} or not isinstance(value, str) or not value:
        raise CommandError(f"-x {option}={value or ''}: expected -x url=… or -x schema=…")
schema = arguments.get("schema") or config.attributes.get("schema", "checkpoints")
if len(schema.encode()) > 63:
    raise CommandError(f"a schema's name has at most 63 bytes, unlike {schema!r}")

EXPECTED = "expected postgresql+psycopg://user@host/database"

# What a role has set for an application would cut a migration short: a backfill is one statement.
# A lock is waited for shortly only, since others wait behind.
SETTINGS = """
DO $$
BEGIN
  PERFORM set_config(name, '0', false) FROM pg_settings WHERE name IN
    ('statement_timeout', 'transaction_timeout', 'idle_in_transaction_session_timeout');
  PERFORM set_config('lock_timeout', '2s', false);
  PERFORM set_config('default_transaction_isolation', 'read committed', false);
END $$
"""

CREATE_SCHEMA = "CREATE SCHEMA IF NOT EXISTS %(schema)s"

# Not when it is there: CREATE SCHEMA IF NOT EXISTS needs the right to create all the same.
BEGINNING_OF_A_SCRIPT = """
DO $$
BEGIN
  PERFORM pg_advisory_lock(hashtextextended(%(lock)s, 0));
  IF NOT EXISTS (SELECT FROM pg_namespace WHERE nspname = %(name)s) THEN
    CREATE SCHEMA %(schema)s;
  END IF;
END $$
"""

# What the package's `verify` reads; `checkpoints.migrations` writes the same.
RECORD = """
DO $$
BEGIN
  IF to_regtype(%(type_literal)s) IS NOT NULL THEN
    COMMENT ON TYPE %(type)s IS %(comment)s;
  END IF;
END $$
"""

# A role that may migrate needs no rights on what it looks at here.
RECORDED = """
SELECT obj_description(pg_type.oid, 'pg_type') FROM pg_type
JOIN pg_namespace ON pg_namespace.oid = typnamespace
WHERE nspname = :schema AND typname = 'checkpoint_status'
"""


def database_url() -> URL:
    """The URL from `-x url=`, the Config's attributes, DATABASE_URL or alembic.ini."""
    try:
        given = (
            arguments.get("url")
            or config.attributes.get("url")
            or os.environ.get("DATABASE_URL")
            or config.get_main_option("sqlalchemy.url")
        )
        if not given:
            raise CommandError(f"no database: set DATABASE_URL, or pass -x url=…: {EXPECTED}")
        url = make_url(given)
    except (ArgumentError, ValueError):
        raise CommandError(f"the database URL cannot be read: {EXPECTED}") from None
    except InterpolationError:
        raise CommandError("sqlalchemy.url in alembic.ini: write each % in it as %%") from None
    if url.drivername in {"postgres", "postgresql"}:
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() != "postgresql":
        raise CommandError(f"the database must be PostgreSQL, not {url.get_backend_name()!r}")
    return url


def connect(url: URL) -> Connection:
    """A connection of its own, or one line that says why not."""
    # A query may hold a password too.
    shown = url.set(query={key: url.query[key] for key in ("host", "port") if key in url.query})
    try:
        engine = create_engine(url, poolclass=NullPool)
    except (NoSuchModuleError, ImportError) as error:
        raise CommandError(f"the database's driver is missing: {error}; {EXPECTED}") from None
    if engine.dialect.is_async:
        raise CommandError(f"the driver {engine.driver!r} is for asyncio only; {EXPECTED}")
    try:
        return engine.connect()
    except DBAPIError as error:
        reason = " ".join(str(error.orig).split())
        raise CommandError(f"the database at {shown!r} cannot be reached: {reason}") from None


def lock_name() -> str:
    """What two migrations of one schema at a time must not both have."""
    return f"checkpoints migrations {schema}"


def prepare(connection: Connection) -> None:
    """Have the schema to oneself, and see that it is there: the version table lies in it."""
    connection.execute(DDL(SETTINGS))
    locked = select(func.pg_try_advisory_lock(func.hashtextextended(lock_name(), 0)))
    waiting = False
    # Not in one statement: its snapshot would keep rows from being vacuumed.
    while not connection.scalar(locked):
        connection.commit()
        if not waiting:
            log.info("Another migration of the schema %s is running: waiting for it", schema)
        waiting = True
        time.sleep(0.5)
    if not connection.dialect.has_schema(connection, schema):
        connection.execute(DDL(CREATE_SCHEMA, context={"schema": quoted_schema()}))
    connection.commit()


def see_that_it_is_ours(connection: Connection) -> None:
    """Refuse to begin at the base where another environment has made the tables."""
    migration = context.get_context()
    options = migration.opts
    # That of `alembic stamp`, which is how to take them over, is a tuple.
    if not isinstance(options.get("destination_rev"), str) or migration.get_current_heads():
        return
    recorded = connection.scalar(text(RECORDED), {"schema": schema})
    if recorded:
        raise CommandError(
            f"the tables in the schema {schema!r} ({recorded}) were not made by this environment, "
            "whose version table is empty: run the migrations of the application that made them, "
            "or take them over by `alembic stamp` with that revision"
        )


def record(*, ctx: MigrationContext, step: MigrationInfo, **_: object) -> None:
    """Say in the database which revision the tables are of."""
    reached = [each for each in step.destination_revision_ids if each]
    name = f"{quoted_schema()}.checkpoint_status"
    comment = literal(f"revision {reached[0]} of checkpoints") if reached else "NULL"
    ctx.execute(
        DDL(RECORD, context={"type": name, "type_literal": literal(name), "comment": comment})
    )


def quoted_schema() -> str:
    """The schema as SQL. A driver's paramstyle would double each %, as DDL() does."""
    return postgresql.dialect(paramstyle="named").identifier_preparer.quote(schema)


def literal(value: str) -> str:
    """A text as SQL, in a script."""
    return "'" + value.replace("'", "''") + "'"


def target_metadata() -> MetaData:
    """The tables as the package has them, in the schema that is migrated."""
    from checkpoints.tables import metadata  # noqa: PLC0415 - the others do without the package

    target = MetaData(naming_convention=metadata.naming_convention)
    for table in metadata.sorted_tables:
        table.to_metadata(target, schema=schema)
    return target


def run_offline() -> None:
    """Print the SQL of the migration, for psql."""
    context.configure(
        dialect_name="postgresql",
        # Or else each % is doubled, as for a driver.
        dialect_opts={"paramstyle": "named"},
        version_table_schema=schema,
        transaction_per_migration=True,
        on_version_apply=record,
        literal_binds=True,
    )
    migration = context.get_context()
    migration.impl.static_output("\\set ON_ERROR_STOP on")
    names = {"lock": literal(lock_name()), "name": literal(schema), "schema": quoted_schema()}
    context.execute(DDL(BEGINNING_OF_A_SCRIPT, context=names))
    context.execute(DDL(SETTINGS))
    context.run_migrations()


def run_online() -> None:
    """Run the migration."""
    with connect(database_url()) as connection:
        context.configure(
            connection=connection,
            version_table_schema=schema,
            transaction_per_migration=True,
            on_version_apply=record,
            include_schemas=True,
            include_name=lambda name, kind, _: kind != "schema" or name == schema,
        )
        options = context.get_context().opts
        if "revision_context" in options:
            options["target_metadata"] = target_metadata()
        # `alembic current` only looks.
        if not options.get("dont_mutate"):
            prepare(connection)
            see_that_it_is_ours(connection)
            connection.commit()
        try:
            with context.begin_transaction():
                context.run_migrations()
        except PendingRollbackError as error:
            raise lost(error) from None


def lost(error: BaseException) -> BaseException:
    """What broke the connection, where all that is said is that it is broken."""
    while error.__context__ is not None and not isinstance(error, DBAPIError):
        error = error.__context__
    return error


if context.is_offline_mode():
    run_offline()
else:
    run_online()
