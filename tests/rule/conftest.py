"""One database for each module: its rows are deleted between tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import URL, Engine, create_engine

from tests.support.databases import Databases, disposed


@pytest.fixture(scope="module")
def migrated_url(databases: Databases) -> Iterator[URL]:
    """A database with the schema at head."""
    url = databases.create_migrated()
    yield url
    databases.drop(url)


@pytest.fixture
def engine(migrated_url: URL) -> Iterator[Engine]:
    """An engine on that database."""
    with disposed(create_engine(migrated_url)) as made:
        yield made
        with made.begin() as connection:
            connection.exec_driver_sql(
                "DELETE FROM checkpoints.checkpoints;"
                "DELETE FROM checkpoints.subscriptions;"
                "DELETE FROM checkpoints.subscription_groups"
            )
