"""One database for each module: its rows are deleted between cases, and connections are kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from sqlalchemy import Engine, create_engine

from tests.concurrency.stage import Stage
from tests.support.databases import Databases, disposed


@pytest.fixture(scope="module")
def stage_engine(databases: Databases) -> Iterator[Engine]:
    """An engine on a migrated database of the module."""
    url = databases.create_migrated()
    # Deadlocks are to be found at once, should there be any.
    with disposed(
        create_engine(url, pool_size=20, connect_args={"options": "-c deadlock_timeout=50ms"})
    ) as engine:
        yield engine
    databases.drop(url)


@pytest.fixture(scope="module")
def module_stage(stage_engine: Engine) -> Iterator[Stage]:
    """Connections and threads of the module."""
    with Stage(stage_engine) as stage:
        yield stage


@pytest.fixture
def stage(module_stage: Stage) -> Iterator[Stage]:
    """Two actors and an observer on a database with one active subscription and nothing else."""
    module_stage.clear()
    yield module_stage
    module_stage.end()
