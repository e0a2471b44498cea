"""Many consumers that want the same."""

from __future__ import annotations

from datetime import timedelta

import pytest

from tests.faults.processes import Workers
from tests.faults.world import World

pytestmark = pytest.mark.timeout(180)

ROUNDS = 150


def test_sixteen_consumers_keep_the_order_of_one_stream_that_grows_all_the_time(
    world: World, workers: Workers
) -> None:
    for number in range(4):
        workers.start(f"worker-{number}", consumers=4, consumer={"concurrency": 1})
    for _ in range(ROUNDS):
        world.append(["busy"] * world.random.randint(1, 3))

    world.await_finished(60)
    world.check()
    assert workers.failed_attempts() == []
    assert workers.told("lost") == []


@pytest.mark.parametrize("isolation_level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_conflicts_of_strict_isolation_levels_are_run_again(
    world: World, workers: Workers, kind: str, isolation_level: str
) -> None:
    streams = [f"stream-{number}" for number in range(30)]
    for number in range(4):
        workers.start(
            f"worker-{number}",
            kind=kind,
            engine={"isolation_level": isolation_level},
            # All streams touch the same three rows.
            handling={"share": True, "think": 0.002},
            # It cannot be extended while the handler runs.
            consumer={"reservation_timeout": timedelta(seconds=20)},
        )
    for _ in range(10):
        world.append_some(streams, 30)

    world.await_finished(60)
    world.check()
    world.check_shared()
    assert workers.sqlstates().count("40001") > 0
    # A conflict is no error of the handler's, and ends no consumer.
    assert workers.failed_attempts() == []
    assert all(workers.exit_code(name) is None for name in workers.names)
