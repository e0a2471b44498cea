"""Recorders that are killed or frozen between reading and committing, and several at once."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from tests.faults.processes import Workers
from tests.faults.waiting import eventually
from tests.faults.world import World

pytestmark = pytest.mark.timeout(120)

STREAMS = [f"stream-{number}" for number in range(20)]


def _start_recorder(workers: Workers, name: str, **job: Any) -> None:
    settings = {"poll_interval": timedelta(seconds=0.1), "idle_timeout": timedelta(seconds=1)}
    workers.start(
        name, kind="recorder", interests=["balances"], recorder={"batch": 7, **settings}, **job
    )


@pytest.mark.parametrize("fate", ["killed", "frozen"])
def test_a_recorder_that_ends_between_reading_and_committing_skips_nothing(
    world: World, workers: Workers, fate: str
) -> None:
    world.append(STREAMS, record=False)
    _start_recorder(workers, "first", handling={"gate": str(workers.folder / "gate")})
    eventually((workers.folder / "gate-recorder").exists, "the recorder has read")
    if fate == "killed":
        workers.kill("first")
    else:
        workers.freeze("first")
    _start_recorder(workers, "second")
    workers.start("consumer")
    eventually(lambda: world.applied() == len(STREAMS), "another recorder goes on")

    world.await_finished(30)
    if fate == "frozen":
        (workers.folder / "gate").touch()
        workers.thaw("first")
        world.append(STREAMS, record=False)
        workers.kill("second")
        eventually(lambda: world.applied() == 2 * len(STREAMS), "the first is of use again")
        world.await_finished(30)
    world.check()


def test_two_recorders_that_are_killed_at_random_skip_nothing(
    world: World, workers: Workers
) -> None:
    for name in ("recorder-0", "recorder-1"):
        _start_recorder(workers, name)
    for number in range(2):
        workers.start(f"consumer-{number}")
    appended = 0
    for _ in range(20):
        # Two transactions, the older of which commits later.
        with world.engine.begin() as early:
            world.append_some(STREAMS[:10], 15, record=False, connection=early)
            world.append_some(STREAMS[10:], 15, record=False)
        appended += 30
        name = world.random.choice(["recorder-0", "recorder-1"])
        workers.kill(name)
        workers.restart(name)

    eventually(lambda: world.applied() == appended, lambda: f"all: {world.applied()}", 30)
    world.await_finished(30)
    world.check()
