"""A server that crashes and comes back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine

from alembic import command
from checkpoints import alembic_config
from checkpoints.embedded import EmbeddedServer, start_server
from tests.faults.processes import Workers
from tests.faults.world import World
from tests.support.databases import disposed

pytestmark = pytest.mark.timeout(180)

RESTARTS = 3


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    """A server of this test's own, whose commits survive a crash."""
    with start_server(request.config.getoption("--postgres-major"), durable=True) as started:
        command.upgrade(alembic_config(started.url()), "head")
        yield started


def test_nothing_is_lost_or_applied_twice_when_the_server_crashes(
    server: EmbeddedServer, tmp_path: Path, kind: str
) -> None:
    with disposed(create_engine(server.url(), pool_pre_ping=True)) as engine:
        world = World(engine)
        workers = Workers(server.url(), tmp_path)
        world.check_workers = workers.check
        streams = [f"stream-{number}" for number in range(60)]
        try:
            for number in range(4):
                workers.start(f"worker-{number}", kind=kind, handling={"think": 0.02})
            for restart in range(RESTARTS):
                for _ in range(3 + restart):
                    world.append(streams)
                for name in workers.names:
                    world.await_in_transaction(name, streams)
                server.restart("immediate")

            world.await_finished(60)
            world.check()
            assert all(workers.exit_code(name) is None for name in workers.names)
            for name in workers.names:
                away = len(workers.told("the database is away", name))
                assert away == len(workers.told("the database is back", name)) >= 1
            # A server that is away is no error of the handler's.
            assert workers.failed_attempts() == []
        finally:
            workers.close()
