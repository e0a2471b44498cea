"""A great number of checkpoints at once."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
from sqlalchemy import text

from tests.faults.processes import Workers
from tests.faults.waiting import eventually
from tests.faults.world import World

pytestmark = pytest.mark.timeout(600)

CHECKPOINTS = int(os.environ.get("CHECKPOINTS_BULK", "100000"))


def test_sixteen_workers_drain_a_hundred_thousand_checkpoints(
    world: World, workers: Workers
) -> None:
    with world.engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO faults.messages"
                " (stream_name, stream_position, type, times, amount) "
                "SELECT 'stream-' || number, 1, 'plain', 0, number % 1000 "
                "FROM generate_series(1, :count) AS number"
            ),
            {"count": CHECKPOINTS},
        )
        connection.execute(
            text(
                "INSERT INTO checkpoints.checkpoints"
                " (subscription_id, stream_name, stream_version, stream_position) "
                "SELECT :id, stream_name, 1, 0 FROM faults.messages"
            ),
            {"id": world.subscription_id},
        )
    with world.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("ANALYZE"))
    began = time.monotonic()
    for number in range(4):
        workers.start(
            f"worker-{number}",
            engine={"pool_size": 6},
            consumer={
                "concurrency": 4,
                "batch": 100,
                "reservation_timeout": timedelta(seconds=30),
            },
        )
    eventually(lambda: world.applied() == CHECKPOINTS, lambda: f"all: {world.applied()}", 500)
    seconds = time.monotonic() - began
    print(f"{CHECKPOINTS} checkpoints in {seconds:.1f} s: {CHECKPOINTS / seconds:.0f}/s")

    world.await_finished(30)
    world.check()
    assert workers.log() == []
