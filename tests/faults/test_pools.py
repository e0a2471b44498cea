"""A pool that is too small."""

from __future__ import annotations

from datetime import timedelta

import pytest

from tests.faults.processes import Workers
from tests.faults.world import World

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("pool_timeout", [0.05, 30])
def test_a_pool_of_one_connection_serves_four_handlers(
    world: World, workers: Workers, kind: str, pool_timeout: float
) -> None:
    streams = [f"stream-{number}" for number in range(20)]
    for _ in range(3):
        world.append(streams)
    workers.start(
        "worker",
        kind=kind,
        engine={"pool_size": 1, "max_overflow": 0, "pool_timeout": pool_timeout},
        handling={"think": 0.02},
        consumer={"concurrency": 4, "batch": 8, "reservation_timeout": timedelta(seconds=5)},
    )
    world.append_some(streams, 40)

    world.await_finished(60)
    world.check()
    # To wait for a connection is no error of the handler's.
    assert workers.failed_attempts() == []
