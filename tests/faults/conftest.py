"""A world and its worker processes for each test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import URL, Engine

from tests.faults.processes import Workers
from tests.faults.world import World


@pytest.fixture
def world(engine: Engine) -> World:
    """A database with the schema at head, the tables of these tests and a subscription."""
    return World(engine)


@pytest.fixture
def workers(world: World, migrated_url: URL, tmp_path: Path) -> Iterator[Workers]:
    """No worker processes yet; all that a test starts are killed at its end."""
    made = Workers(migrated_url, tmp_path)
    # Not to wait in vain.
    world.check_workers = made.check
    yield made
    made.check()
    made.close()


@pytest.fixture(params=["blocking", "asyncio"])
def kind(request: pytest.FixtureRequest) -> str:
    """Which consumer the workers run."""
    return str(request.param)
