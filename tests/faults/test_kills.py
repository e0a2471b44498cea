"""Workers that are killed."""

from __future__ import annotations

import pytest

from tests.faults.processes import Workers
from tests.faults.world import World

pytestmark = pytest.mark.timeout(180)

KILLS = 50


def test_nothing_is_lost_or_applied_twice_when_workers_are_killed(
    world: World, workers: Workers, kind: str
) -> None:
    streams = [f"stream-{number}" for number in range(60)]
    world.append(streams)
    for number in range(4):
        workers.start(f"worker-{number}", kind=kind, handling={"think": 0.02})
    for _ in range(KILLS):
        world.append_some(streams, 40)
        name = world.random.choice(workers.names)
        # Killed in the middle of a handler that has written already.
        world.await_in_transaction(name, streams)
        workers.kill(name)
        workers.restart(name)

    # The last reservation expires after 2 s; the delay doubles with each expiry in a row.
    world.await_finished(90)
    world.check()
    assert len(workers.told("a reservation expired")) >= KILLS / 2
