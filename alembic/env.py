"""How `alembic` reaches the database: URL and schema. It imports nothing from the package."""

from __future__ import annotations

import os
from logging.config import fileConfig

from alembic.util import CommandError
from sqlalchemy import DDL, URL, create_engine, make_url
from sqlalchemy.dialects import postgresql
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError
from sqlalchemy.pool import NullPool

from alembic import context

config = context.config
arguments = context.get_x_argument(as_dictionary=True)

# A caller that passes its own Config sets attributes instead, and keeps its own logging.
schema = arguments.get("schema") or config.attributes.get("schema") or "checkpoints"
if config.config_file_name is not None:
    fileConfig(config.config_file_name, disable_existing_loggers=False)


def database_url() -> URL:
    """The URL from `-x url=`, the Config's attributes, DATABASE_URL or alembic.ini."""
    given = (
        arguments.get("url")
        or config.attributes.get("url")
        or os.environ.get("DATABASE_URL")
        or config.get_main_option("sqlalchemy.url")
    )
    if not given:
        raise CommandError(
            "no database: set DATABASE_URL, or pass -x url=postgresql+psycopg://user@host/database"
        )
    try:
        url = make_url(given)
    except ArgumentError:
        raise CommandError(
            "the database URL cannot be read: expected postgresql+psycopg://user@host/database"
        ) from None
    if url.drivername in {"postgres", "postgresql"}:
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() != "postgresql":
        raise CommandError(f"the database must be PostgreSQL, not {url.get_backend_name()!r}")
    return url


def create_schema() -> DDL:
    """The schema must be there before the version table, which lies in it."""
    quoted = postgresql.dialect().identifier_preparer.quote(schema)
    return DDL("CREATE SCHEMA IF NOT EXISTS %(schema)s", context={"schema": quoted})


def run_offline() -> None:
    """Print the SQL of the migration, for psql."""
    context.configure(
        dialect_name="postgresql",
        version_table_schema=schema,
        transaction_per_migration=True,
        literal_binds=True,
    )
    context.get_context().impl.static_output("\\set ON_ERROR_STOP on")
    context.execute(create_schema())
    context.run_migrations()


def run_online() -> None:
    """Run the migration."""
    url = database_url()
    try:
        engine = create_engine(url, poolclass=NullPool)
        connection = engine.connect()
    except NoSuchModuleError as error:
        raise CommandError(f"the database's driver is missing: {error}") from None
    except OperationalError as error:
        shown = url.render_as_string(hide_password=True)
        reason = " ".join(str(error.orig).split())
        raise CommandError(f"the database at {shown} cannot be reached: {reason}") from None
    with connection:
        # Not when it is there: CREATE SCHEMA IF NOT EXISTS needs the right to create all the same.
        if not connection.dialect.has_schema(connection, schema):
            connection.execute(create_schema())
        connection.commit()
        context.configure(
            connection=connection, version_table_schema=schema, transaction_per_migration=True
        )
        with context.begin_transaction():
            context.run_migrations()


if context.is_offline_mode():
    run_offline()
else:
    run_online()
