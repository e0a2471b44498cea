"""Handlers that raise, that hang, and that end their process."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest

from checkpoints import CheckpointStatus
from tests.faults.processes import Workers
from tests.faults.waiting import eventually
from tests.faults.world import World

pytestmark = pytest.mark.timeout(180)

PLAIN = [f"plain-{number}" for number in range(20)]
SOON = {"first_delay": timedelta(seconds=0.2), "max_attempts": 5}


def _start(
    workers: Workers,
    kind: str,
    count: int = 2,
    retry: dict[str, Any] = SOON,
    **consumer: Any,
) -> None:
    for number in range(count):
        workers.start(
            f"worker-{number}",
            kind=kind,
            handling={"think": 0.01},
            retry=retry,
            consumer=consumer,
        )


def test_handlers_that_raise_are_tried_again_and_others_go_on(
    world: World, workers: Workers, kind: str
) -> None:
    world.append(PLAIN)
    world.append([f"once-{number}" for number in range(5)], type="raise", times=1)
    world.append([f"late-{number}" for number in range(5)], type="raise-late", times=3)
    world.append(["never"], type="raise-late", times=99)
    world.append([*PLAIN, "once-0", "late-0", "never"])
    _start(workers, kind)

    world.await_finished(60)
    world.check(failed=["never"])
    assert world.column("never", "retry_attempts") == 5
    assert len(world.column("never", "retries")) == 5
    # What the application has mended, an operator schedules again.
    assert len(workers.failed_attempts()) == 5 * 1 + 5 * 3 + 5


@pytest.mark.parametrize("where", ["hang", "hang-in-sql", "hang-regardless"])
def test_a_handler_that_hangs_is_ended_and_its_message_tried_again(
    world: World, workers: Workers, kind: str, where: str
) -> None:
    hanging = [f"hanging-{number}" for number in range(6)]
    world.append(hanging, type=where, times=1)
    world.append(PLAIN)
    # All slots hang at once, after having written.
    _start(workers, kind, count=1, handler_timeout=timedelta(seconds=1))

    world.await_finished(60)
    world.check()
    assert len(workers.failed_attempts()) == len(hanging)
    assert workers.exit_code("worker-0") is None


def test_a_handler_that_hangs_always_ends_as_failed(
    world: World, workers: Workers, kind: str
) -> None:
    world.append(["hanging"], type="hang-regardless", times=99)
    world.append([*PLAIN, "hanging"])
    _start(
        workers,
        kind,
        count=1,
        concurrency=1,
        handler_timeout=timedelta(seconds=0.5),
        retry={"first_delay": timedelta(seconds=0.1), "max_attempts": 3},
    )

    world.await_finished(60)
    world.check(failed=["hanging"])
    world.append(PLAIN)
    world.await_finished(60)
    # Nothing of its attempts is left in the database.
    idle = "application_name = 'worker-0' AND state = 'idle in transaction'"
    eventually(lambda: not world.sessions(idle), "no transaction is left open")


def test_a_handler_that_was_given_up_and_goes_on_changes_nothing(
    world: World, workers: Workers, kind: str
) -> None:
    world.append(["late"], type="gate-regardless", times=1)
    world.append(["late", "late"])
    world.append(PLAIN)
    gate = workers.folder / "gate"
    workers.start(
        "worker",
        kind=kind,
        retry=SOON,
        handling={"gate": str(gate)},
        consumer={"concurrency": 1, "handler_timeout": timedelta(seconds=0.5)},
    )
    # While the handler still waits, the next attempt is done.
    world.await_finished(60)
    world.check()
    assert len(workers.failed_attempts()) == 1

    # Now it goes on, with the two messages that follow.
    gate.touch()
    eventually(lambda: len(workers.told("a statement failed")) > 0, "it finds that it is alone")
    world.append(PLAIN)
    world.await_finished(60)
    world.check()
    assert not world.sessions("application_name = 'worker' AND state LIKE 'idle in%'")
    assert workers.told("a worker failed") == workers.told("a handler's task failed") == []


def test_a_handler_that_hangs_with_the_only_connection_does_not_stop_its_consumer(
    world: World, workers: Workers, kind: str
) -> None:
    world.append(["hanging"], type="hang-regardless", times=1)
    world.append(PLAIN)
    workers.start(
        "worker",
        kind=kind,
        engine={"pool_size": 1, "max_overflow": 0, "pool_timeout": 2},
        retry=SOON,
        consumer={"handler_timeout": timedelta(seconds=1)},
    )

    world.await_finished(60)
    world.check()


def test_a_handler_that_hangs_when_its_reservation_is_gone_gives_its_slot_back(
    world: World, workers: Workers, kind: str
) -> None:
    world.append(["hanging"], type="hang-regardless", times=1)
    _start(workers, kind, count=1, concurrency=1, handler_timeout=timedelta(seconds=3))
    eventually(lambda: world.in_transaction("worker-0"), "the handler hangs")
    # An operator passes over the message; its handler hangs on.
    with world.engine.begin() as connection:
        connection.exec_driver_sql(
            "UPDATE checkpoints.checkpoints SET reserved_until = NULL, retry_attempts = 1"
        )
    world.append(PLAIN)

    world.await_finished(60)
    world.check()


def test_a_handler_that_ends_its_process_is_tried_again(
    world: World, workers: Workers, kind: str
) -> None:
    world.append(PLAIN)
    world.append(["exit-0", "exit-1"], type="exit", times=2)
    world.append([*PLAIN, "exit-0", "exit-1"])
    _start(workers, kind, count=2, reservation_timeout=timedelta(seconds=1))

    eventually(lambda: _replaced(workers) and not world.unfinished(), "all is done", 90)
    world.check()


@pytest.mark.parametrize("streams", [1, 3])
def test_a_poison_message_fails_and_takes_no_other_with_it(
    world: World, workers: Workers, kind: str, streams: int
) -> None:
    world.append(["poison"], type="kill", times=99)
    for _ in range(3):
        world.append(PLAIN)
    fellows = [f"fellow-{number}" for number in range(streams)]
    world.append(["poison", *fellows])
    policy = {"first_delay": timedelta(seconds=0.5), "max_attempts": 4}
    _start(workers, kind, count=2, reservation_timeout=timedelta(seconds=1), retry=policy)

    eventually(lambda: _replaced(workers) and not world.unfinished(), "all is done", 90)
    world.check(failed=["poison"])
    assert world.column("poison", "status") is CheckpointStatus.FAILED
    assert world.column("poison", "retry_attempts") == 4
    assert [error["error"]["type"] for error in world.column("poison", "retries")] == [
        "ReservationExpired"
    ] * 4


def _replaced(workers: Workers) -> bool:
    """Start those anew that have ended, as a supervisor does."""
    for name in workers.names:
        if workers.exit_code(name) is not None:
            workers.restart(name)
    return True
