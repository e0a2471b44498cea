"""The schema of the demonstration: made, migrated, and dropped at the end."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from alembic.util import CommandError
from sqlalchemy import URL, Engine, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.schema import CreateSchema, DropSchema

from alembic import command
from checkpoints import alembic_config
from checkpoints.demo import DemoError
from checkpoints.demo.tables import SCHEMA, demo_engine, metadata

__all__ = ["database_url", "demo_schema", "one_line"]

_DUPLICATE_SCHEMA = "42P06"
_DROP = f"DROP SCHEMA {SCHEMA} CASCADE"


def one_line(error: DBAPIError) -> str:
    """What the driver says, without line breaks."""
    return " ".join(str(error.orig).split())


def database_url(given: str) -> URL:
    """The URL of a user's database, for psycopg.

    Raises:
        DemoError: it cannot be read, or is not one of PostgreSQL.
    """
    try:
        url = make_url(given)
    except ArgumentError:
        raise DemoError(
            "the URL cannot be read: expected postgresql://user:password@host/database"
        ) from None
    if url.get_backend_name() not in {"postgresql", "postgres"}:
        raise DemoError(f"the database must be PostgreSQL, not {url.get_backend_name()!r}")
    url = url.set(drivername="postgresql+psycopg")
    if "connect_timeout" not in url.query:
        url = url.update_query_dict({"connect_timeout": "10"})
    return url


@contextmanager
def demo_schema(url: URL) -> Iterator[None]:
    """The schema with all tables, for a while.

    Raises:
        DemoError: the database cannot be reached, may not be changed, or has such a schema.
    """
    engine = demo_engine(url)
    try:
        _create(engine, url)
        try:
            command.upgrade(alembic_config(url, schema=SCHEMA), "head")
            metadata.create_all(engine)
            yield
        finally:
            _drop(engine)
    except CommandError as error:
        raise DemoError(f"the migration failed: {error}") from error
    finally:
        engine.dispose()


def _create(engine: Engine, url: URL) -> None:
    shown = url.difference_update_query(["connect_timeout"]).render_as_string(hide_password=True)
    try:
        with engine.begin() as connection:
            encoding = connection.execute(text("SHOW server_encoding")).scalar_one()
            if encoding != "UTF8":
                raise DemoError(f"the database at {shown} must have the encoding UTF8: {encoding}")
            # Without IF NOT EXISTS: of two runs at once, one must fail.
            connection.execute(CreateSchema(SCHEMA))
    except DBAPIError as error:
        if getattr(error.orig, "sqlstate", None) == _DUPLICATE_SCHEMA:
            raise DemoError(
                f"the database at {shown} has a schema {SCHEMA!r} already: another demonstration "
                f"is running there, or one was killed; if nobody needs it, `{_DROP}` and try again"
            ) from error
        raise DemoError(f"the database at {shown} cannot be used: {one_line(error)}") from error


def _drop(engine: Engine) -> None:
    try:
        with engine.begin() as connection:
            connection.execute(DropSchema(SCHEMA, cascade=True))
    except DBAPIError as error:
        # Not raised: why the demonstration ended matters more.
        sys.stderr.write(
            f"checkpoints: the schema {SCHEMA!r} could not be dropped ({one_line(error)}); "
            f"if the database is still there, `{_DROP}`\n"
        )
