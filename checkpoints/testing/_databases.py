"""Throw-away databases on one server: each test gets a clone of a migrated template."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sqlalchemy import URL, create_engine, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.pool import NullPool

from alembic import command
from checkpoints.embedded import ServerUnavailable, start_server
from checkpoints.migrations import alembic_config

__all__ = ["VARIABLE", "Databases", "databases", "migrate"]

VARIABLE = "CHECKPOINTS_TEST_URL"


def migrate(url: URL) -> None:
    """Make the schema, at head."""
    command.upgrade(alembic_config(url), "head")


class Databases:
    """Databases of one server, made and dropped by number.

    `migrate` makes what the clones of the template have.
    """

    def __init__(self, server: URL, migrate: Callable[[URL], None] = migrate) -> None:
        self._server = server
        self._migrate = migrate
        self._numbers = itertools.count(1)
        # Several processes, of several machines, may share a server.
        self._prefix = f"checkpoints_test_{secrets.token_hex(4)}"
        self._admin = create_engine(server, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        self._template: str | None = None

    def url(self, name: str) -> URL:
        """The URL of a database of the server."""
        return self._server.set(database=name)

    def create(self, template: str = "template0") -> URL:
        """A new database, a copy of the template."""
        name = f"{self._prefix}_{next(self._numbers)}"
        with self._admin.connect() as connection:
            connection.execute(
                text(f'CREATE DATABASE "{name}" TEMPLATE "{template}" ENCODING \'UTF8\'')
            )
        return self.url(name)

    def drop(self, url: URL) -> None:
        """Drop a database and end who is connected to it."""
        with self._admin.connect() as connection:
            connection.execute(text(f'DROP DATABASE IF EXISTS "{url.database}" WITH (FORCE)'))

    def create_migrated(self) -> URL:
        """A new database with what `migrate` makes."""
        if self._template is None:
            template = self.create()
            try:
                self._migrate(template)
            except BaseException:
                self.drop(template)
                raise
            self._template = template.database
            with self._admin.connect() as connection:
                # An engine of `migrate` may have kept connections, and nothing is cloned meanwhile.
                connection.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                        " WHERE datname = :template"
                    ),
                    {"template": self._template},
                )
        assert self._template is not None  # noqa: S101 - a database that was created has a name
        return self.create(self._template)

    def close(self) -> None:
        """Drop the template."""
        if self._template is not None:
            self.drop(self.url(self._template))


@contextmanager
def databases(
    major: int | None = None, migrate: Callable[[URL], None] = migrate
) -> Iterator[Databases]:
    """Databases of the server at CHECKPOINTS_TEST_URL, or of an embedded one of a major.

    Raises:
        ServerUnavailable: There is neither.
    """
    given = os.environ.get(VARIABLE)
    if given:
        made = Databases(_reachable(given), migrate)
        try:
            yield made
        finally:
            made.close()
    else:
        # Consumers and pools of a test may hold many.
        with start_server(major, settings={"max_connections": "300"}) as server:
            yield Databases(server.url(), migrate)


def _reachable(given: str) -> URL:
    """The URL of a server that can be had; a password is not shown."""
    try:
        url = make_url(given)
    except ArgumentError:
        raise ServerUnavailable(
            f"{VARIABLE} must be a URL such as postgresql+psycopg://user@host/postgres"
        ) from None
    if url.get_backend_name() != "postgresql" or url.get_driver_name() != "psycopg":
        raise ServerUnavailable(
            f"{VARIABLE} must begin with postgresql+psycopg://, not {url.drivername}://"
        )
    engine = create_engine(url, poolclass=NullPool)
    try:
        with engine.connect() as connection:
            may = connection.scalar(
                text("SELECT rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user")
            )
    except DBAPIError as error:
        raise ServerUnavailable(
            f"the server of {VARIABLE} cannot be had, {url!r}: {error.orig}"
        ) from error
    if not may:
        raise ServerUnavailable(
            f"the role of {VARIABLE} must be allowed to create databases, {url!r}: "
            "ALTER ROLE … CREATEDB"
        )
    return url
