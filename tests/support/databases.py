"""Throw-away databases on one server: each test gets a clone of a migrated template."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import URL, Engine, create_engine, make_url, text
from sqlalchemy.pool import NullPool

from alembic import command
from checkpoints import alembic_config
from checkpoints.embedded import start_server

_numbers = itertools.count(1)


class Databases:
    """Databases of one server, made and dropped by number."""

    def __init__(self, server: URL) -> None:
        self._server = server
        # Several processes may share a server.
        self._prefix = f"test_{os.getpid()}"
        self._admin = create_engine(server, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        self._template: str | None = None

    def url(self, name: str) -> URL:
        """The URL of a database of the server."""
        return self._server.set(database=name)

    def create(self, template: str = "template0") -> URL:
        """A new database, a copy of the template."""
        name = f"{self._prefix}_{next(_numbers)}"
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
        """A new database with the schema at head, in the schema `checkpoints`."""
        if self._template is None:
            template = self.create()
            command.upgrade(alembic_config(template), "head")
            self._template = template.database
            assert self._template is not None
        return self.create(self._template)

    def close(self) -> None:
        """Drop the template."""
        if self._template is not None:
            self.drop(self.url(self._template))


@contextmanager
def databases(major: int | None) -> Iterator[Databases]:
    """Databases of the server at CHECKPOINTS_TEST_URL, or of an embedded one of a major."""
    given = os.environ.get("CHECKPOINTS_TEST_URL")
    if given:
        made = Databases(make_url(given))
        yield made
        made.close()
    else:
        with start_server(major, settings={"max_connections": "300"}) as server:
            yield Databases(server.url())


@contextmanager
def disposed(engine: Engine) -> Iterator[Engine]:
    """Close the engine's connections at the end."""
    try:
        yield engine
    finally:
        engine.dispose()
