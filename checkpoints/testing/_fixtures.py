"""The fixtures of the plugin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from sqlalchemy import URL, Connection, Engine, create_engine, event

from checkpoints.embedded import ServerUnavailable
from checkpoints.testing._databases import VARIABLE, Databases, databases, migrate

__all__ = [
    "checkpoints_connection",
    "checkpoints_databases",
    "checkpoints_engine",
    "checkpoints_migrate",
    "checkpoints_rolled_back_engine",
    "checkpoints_url",
]


@pytest.fixture(scope="session")
def checkpoints_migrate() -> Callable[[URL], None]:
    """What makes the tables in the template of the databases: override it to add your own."""
    return migrate


@pytest.fixture(scope="session")
def checkpoints_databases(checkpoints_migrate: Callable[[URL], None]) -> Iterator[Databases]:
    """The databases of this session, on a server of its own or on that of CHECKPOINTS_TEST_URL."""
    with ExitStack() as stack:
        try:
            made = stack.enter_context(databases(migrate=checkpoints_migrate))
        except ServerUnavailable as error:
            # Its traceback would say nothing more.
            raise pytest.fail.Exception(
                f"no PostgreSQL server for the tests: {error}\n"
                f"A running one is named in {VARIABLE}.",
                pytrace=False,
            ) from None
        yield made


@pytest.fixture
def checkpoints_url(checkpoints_databases: Databases) -> Iterator[URL]:
    """A migrated database of this test alone, which is dropped at its end."""
    url = checkpoints_databases.create_migrated()
    yield url
    checkpoints_databases.drop(url)


@pytest.fixture
def checkpoints_engine(checkpoints_url: URL) -> Iterator[Engine]:
    """An engine on the database of this test alone."""
    engine = create_engine(checkpoints_url)
    yield engine
    engine.dispose()


@pytest.fixture(scope="session")
def checkpoints_rolled_back_engine(checkpoints_databases: Databases) -> Iterator[Engine]:
    """An engine on a database that `checkpoints_connection` shares: nothing is committed in it."""
    url = checkpoints_databases.create_migrated()
    engine = create_engine(url)
    yield engine
    engine.dispose()
    checkpoints_databases.drop(url)


@pytest.fixture
def checkpoints_connection(request: pytest.FixtureRequest) -> Iterator[Connection]:
    """A connection in a transaction that is rolled back at the end of the test.

    It is in a savepoint, too: a `Session` that is bound to it begins a savepoint of its own, so
    that what the application commits and rolls back is that. To commit the connection itself is
    refused. Its database is that of `checkpoints_url` if the test asks for that, or else one
    that the session's tests share, which costs nothing to make.
    """
    of_the_test = "checkpoints_url" in request.fixturenames
    engine: Engine = request.getfixturevalue(
        "checkpoints_engine" if of_the_test else "checkpoints_rolled_back_engine"
    )
    with engine.connect() as connection:
        connection.begin()
        connection.begin_nested()
        event.listen(connection, "commit", _refuse)
        yield connection
        connection.rollback()


def _refuse(_: Connection) -> None:
    raise RuntimeError(
        "checkpoints_connection is rolled back when the test ends, and must not be committed: "
        "bind a Session to it, whose commit ends a savepoint; or use checkpoints_engine"
    )
