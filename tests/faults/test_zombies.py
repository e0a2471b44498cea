"""Workers that stand still past their reservation, and then go on as if nothing had happened."""

from __future__ import annotations

import pytest

from tests.faults.processes import Workers
from tests.faults.waiting import eventually
from tests.faults.world import World

pytestmark = pytest.mark.timeout(120)

# The server ends a session that stands so long in an open transaction.
BOUND_IDLE = "-c idle_in_transaction_session_timeout=1000"


def _freeze_at_gate(world: World, workers: Workers, kind: str, type: str, options: str) -> None:
    """A worker that is frozen in its handler, and another that has not begun."""
    world.append(["frozen"], type=type, times=1)
    gate = workers.folder / "gate"
    workers.start("zombie", kind=kind, handling={"gate": str(gate)}, options=options)
    eventually((workers.folder / "gate-frozen").exists, "the handler is at the gate")
    workers.freeze("zombie")
    # For the zombie, after its return, and for nobody else: it goes on with what it was doing.
    gate.touch()
    world.append(["frozen", "other-1", "other-2"])
    workers.start("heir", kind=kind)


def test_a_zombie_in_python_loses_to_the_worker_that_recovered_its_reservation(
    world: World, workers: Workers, kind: str
) -> None:
    _freeze_at_gate(world, workers, kind, "gate", "")
    # It has read but not written: nothing is in the other's way.
    world.await_finished(60)
    world.check()

    workers.thaw("zombie")
    eventually(lambda: workers.told("reservation was lost", "zombie"), "the zombie lost")
    # It is of use again.
    workers.kill("heir")
    world.append(["frozen", "other-1"])
    world.await_finished(60)
    world.check()


def test_a_zombie_in_a_transaction_loses_and_is_rolled_back(
    world: World, workers: Workers, kind: str
) -> None:
    _freeze_at_gate(world, workers, kind, "gate-late", BOUND_IDLE)
    # It has written: the row of the projection is locked until the server ends its session.
    world.await_finished(60)
    world.check()

    workers.thaw("zombie")
    eventually(lambda: workers.told("reservation was lost", "zombie"), "the zombie lost")
    workers.kill("heir")
    world.append(["frozen", "other-1"])
    world.await_finished(60)
    world.check()


def test_without_a_bound_on_idle_transactions_only_the_streams_own_heir_waits_for_a_zombie(
    world: World, workers: Workers, kind: str
) -> None:
    _freeze_at_gate(world, workers, kind, "gate-late", "")
    eventually(
        lambda: world.position("other-1") == world.position("other-2") == 1, "other streams go on"
    )
    eventually(
        lambda: world.sessions("application_name = 'heir' AND wait_event_type = 'Lock'"),
        "the heir waits for the row that the zombie has written",
    )
    # While it waits it goes on with others, and keeps its reservation.
    world.append(["other-1"])
    eventually(lambda: world.position("other-1") == 2, "other streams go on")

    workers.thaw("zombie")
    world.await_finished(60)
    world.check()
    assert workers.told("reservation was lost", "zombie")
