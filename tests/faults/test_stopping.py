"""Workers that are asked to stop in the middle of their work."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from tests.faults.processes import Workers
from tests.faults.waiting import eventually
from tests.faults.world import World

pytestmark = pytest.mark.timeout(120)

STREAMS = [f"stream-{number}" for number in range(10)]


def _start(world: World, workers: Workers, kind: str, grace: float) -> Path:
    """A worker with two handlers that wait and eight reservations that were not started."""
    gate = workers.folder / "gate"
    world.append(STREAMS, type="gate-late", times=1)
    workers.start(
        "worker",
        kind=kind,
        handling={"gate": str(gate)},
        consumer={
            "concurrency": 2,
            "batch": 10,
            "reservation_timeout": timedelta(minutes=5),
            "grace": timedelta(seconds=grace),
        },
    )
    eventually(
        lambda: len(list(workers.folder.glob("gate-*"))) == 2 and world.reserved() == 10,
        "two handlers wait, ten are reserved",
    )
    return gate


def test_after_sigterm_the_running_handlers_finish_and_the_rest_is_given_back_at_once(
    world: World, workers: Workers, kind: str
) -> None:
    gate = _start(world, workers, kind, grace=30)
    workers.terminate("worker")
    eventually(lambda: world.reserved() == 2, "what was not started is given back", 15)
    assert workers.exit_code("worker") is None

    # Another can have them at once.
    workers.start("other", kind=kind)
    eventually(lambda: sum(map(world.position, STREAMS)) == 8, "the other has done them")
    gate.touch()
    assert workers.await_exit("worker", 20) == 0
    world.await_finished(30)
    world.check()
    assert workers.told("reservation was lost") == []


def test_a_second_sigterm_gives_running_handlers_up_at_once(
    world: World, workers: Workers, kind: str
) -> None:
    _start(world, workers, kind, grace=60)
    workers.terminate("worker")
    eventually(lambda: world.reserved() == 2, "what was not started is given back", 15)
    workers.terminate("worker")
    assert workers.await_exit("worker", 20) == 0
    # Nothing waits for a timeout, and what the two had written is rolled back.
    assert world.reserved() == 0
    workers.start("other", kind=kind)
    world.await_finished(30)
    world.check()


def test_after_the_grace_running_handlers_are_given_up(
    world: World, workers: Workers, kind: str
) -> None:
    _start(world, workers, kind, grace=1)
    workers.terminate("worker")
    assert workers.await_exit("worker", 20) == 0
    assert world.reserved() == 0
    workers.start("other", kind=kind)
    world.await_finished(30)
    world.check()


def test_workers_that_are_stopped_one_after_the_other_lose_and_delay_nothing(
    world: World, workers: Workers, kind: str
) -> None:
    for _ in range(5):
        world.append(STREAMS)
    timeout = {"reservation_timeout": timedelta(minutes=5), "batch": 8}
    for number in range(3):
        workers.start(f"worker-{number}", kind=kind, handling={"think": 0.02}, consumer=timeout)
    for _ in range(10):
        world.append_some(STREAMS, 20)
        name = world.random.choice(workers.names)
        world.await_in_transaction(name, STREAMS)
        workers.terminate(name)
        assert workers.await_exit(name, 20) == 0
        workers.restart(name)

    # Far below the timeout: nothing was left reserved.
    world.await_finished(30)
    world.check()
