"""Fixtures: a server for the run, a database for the test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import URL, Connection, Engine, create_engine

from tests.support.databases import Databases, databases, disposed


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--postgres-major",
        type=int,
        default=None,
        help="major of the embedded PostgreSQL (default: the newest that is installed)",
    )
    parser.addoption(
        "--update-rendered",
        action="store_true",
        help="rewrite tests/rendered/ and docs/reference/ as of today, to be reviewed as a diff",
    )


@pytest.fixture(scope="session", name="databases")
def databases_of_the_run(request: pytest.FixtureRequest) -> Iterator[Databases]:
    """Throw-away databases on the server of this run."""
    with databases(request.config.getoption("--postgres-major")) as made:
        yield made


@pytest.fixture
def database_url(databases: Databases) -> Iterator[URL]:
    """An empty database, for the superuser."""
    url = databases.create()
    yield url
    databases.drop(url)


@pytest.fixture
def migrated_url(databases: Databases) -> Iterator[URL]:
    """A database with the schema at head."""
    url = databases.create_migrated()
    yield url
    databases.drop(url)


@pytest.fixture
def engine(migrated_url: URL) -> Iterator[Engine]:
    """An engine on a database with the schema at head."""
    with disposed(create_engine(migrated_url, pool_size=20)) as made:
        yield made


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    """A connection whose transaction is rolled back at the end, unless the test commits."""
    with engine.connect() as made:
        yield made
