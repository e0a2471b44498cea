"""The server that is measured, with settings under which a commit survives a crash."""

from __future__ import annotations

import glob
import itertools
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psycopg
from sqlalchemy import URL, make_url

from alembic import command
from checkpoints import alembic_config
from checkpoints.embedded import ServerUnavailable, _binaries, start_server
from tests.benchmarks.work import connect

__all__ = ["VARIABLE", "NotDurable", "Server", "durable_server"]

VARIABLE = "CHECKPOINTS_BENCHMARK_URL"

_DURABLE = ("fsync", "synchronous_commit", "full_page_writes")
_SHARED_BUFFERS = 1024
_SETTINGS = {
    "max_connections": "200",
    # The server's own checkpoints fall into no measurement.
    "max_wal_size": "8GB",
    "checkpoint_timeout": "30min",
}


class NotDurable(Exception):
    """The server answers before a commit is safe: no figure of it means anything."""


class Server:
    """Databases of a server, made and dropped by number."""

    def __init__(self, url: URL, pgbench: str | None) -> None:
        self.url = url
        self.pgbench = pgbench
        self._prefix = f"benchmark_{os.getpid()}"
        self._numbers = itertools.count(1)
        self._made: list[str] = []

    def create(self, revision: str | None = "head", template: str = "template0") -> str:
        """A new database, migrated to a revision (None: not at all); its URL."""
        name = f"{self._prefix}_{next(self._numbers)}"
        # A filled one is copied as files: not each page of it through the WAL.
        copied = "STRATEGY FILE_COPY" if revision is None and self.version >= 150000 else ""
        with self.connect() as connection:
            connection.execute(f'CREATE DATABASE "{name}" TEMPLATE "{template}" {copied}'.encode())
        self._made.append(name)
        url = self.url.set(database=name)
        if revision is not None:
            command.upgrade(alembic_config(url), revision)
        return url.render_as_string(hide_password=False)

    def copy(self, url: str) -> str:
        """A copy of a database that nobody is connected to."""
        return self.create(None, make_url(url).database or "")

    def drop(self, url: str) -> None:
        """Drop a database."""
        name = make_url(url).database
        with self.connect() as connection:
            connection.execute(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'.encode())
        if name in self._made:
            self._made.remove(name)

    def drop_all(self) -> None:
        """Drop what is left."""
        for name in list(self._made):
            self.drop(self.url.set(database=name).render_as_string(hide_password=False))

    def connect(self) -> psycopg.Connection:
        """A connection to the database that the server was given with."""
        return connect(self.url.render_as_string(hide_password=False))

    def settle(self) -> None:
        """Write out what filling has left, so that it falls into no measurement."""
        with self.connect() as connection:
            connection.execute("CHECKPOINT")

    def show(self, name: str) -> str:
        """A setting."""
        with self.connect() as connection:
            row = connection.execute(f"SHOW {name}".encode()).fetchone()
        return str(row[0]) if row else ""

    @property
    def version(self) -> int:
        """The server's version as a number, such as 180001."""
        return int(self.show("server_version_num"))


@contextmanager
def durable_server(given: str | None, major: int | None) -> Iterator[Server]:
    """The server at a URL, or a throw-away one of a major; all databases made on it are dropped.

    Raises:
        NotDurable: A commit on it may be lost in a crash.
    """
    given = given or os.environ.get(VARIABLE)
    if given:
        url = make_url(given).set(drivername="postgresql+psycopg")
        yield from _checked(Server(url, _find_pgbench(None)))
        return
    buffers = min(_SHARED_BUFFERS, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 22)
    settings = {**_SETTINGS, "shared_buffers": f"{buffers}MB"}
    with start_server(major, settings=settings, durable=True) as embedded:
        yield from _checked(Server(embedded.url(), _find_pgbench(major)))


def _checked(server: Server) -> Iterator[Server]:
    off = [f"{name}={value}" for name in _DURABLE if (value := server.show(name)) == "off"]
    if off:
        raise NotDurable(
            f"{', '.join(off)} on {server.url!r}: each must be on, for without it a commit "
            "costs nothing"
        )
    try:
        yield server
    finally:
        server.drop_all()


def _find_pgbench(major: int | None) -> str | None:
    """The program beside the server's own, or any of the system."""
    folders: list[Path] = []
    with suppress(ServerUnavailable):
        folders.append(_binaries.find(major).folder)
    folders += [Path(name) for name in sorted(glob.glob("/usr/lib/postgresql/*/bin"), reverse=True)]
    for folder in folders:
        if (folder / "pgbench").is_file():
            return str(folder / "pgbench")
    return shutil.which("pgbench")
