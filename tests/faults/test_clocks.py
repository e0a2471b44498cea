"""Workers whose clocks are wrong."""

from __future__ import annotations

import logging
from datetime import datetime, timedelta
from itertools import pairwise

import pytest

from tests.faults.processes import Workers
from tests.faults.waiting import eventually
from tests.faults.world import World
from tests.support.factories import database_time

pytestmark = pytest.mark.timeout(120)

HOUR = 3600.0
STREAMS = [f"stream-{number}" for number in range(20)]


def test_delays_and_timeouts_go_by_the_databases_clock(
    world: World, workers: Workers, kind: str
) -> None:
    with world.engine.connect() as connection:
        began = database_time(connection)
    world.append(STREAMS)
    world.append(["twice"], type="raise", times=2)
    world.append(["never"], type="raise", times=99)
    world.append(["hanging"], type="hang", times=1)
    job = {
        "kind": kind,
        "retry": {"first_delay": timedelta(seconds=1), "max_attempts": 3, "jitter": 0.0},
        "consumer": {"handler_timeout": timedelta(seconds=2)},
        "handling": {"think": 0.02},
    }
    workers.start("ahead", shift=HOUR, **job)
    workers.start("behind", shift=-HOUR, **job)
    for name in ("ahead", "behind"):
        # Its reservations expire by the database's clock, and the other finds them.
        world.append(STREAMS)
        world.await_in_transaction(name, STREAMS)
        workers.kill(name)
        workers.restart(name)

    world.await_finished(60)
    world.check(failed=["never"])
    with world.engine.connect() as connection:
        ended = database_time(connection)
    errors = world.column("never", "retries")
    times = [datetime.fromisoformat(error["recorded_at"]) for error in errors]
    assert len(times) == 3
    assert began < times[0] < times[-1] < ended
    gaps = [(later - earlier).total_seconds() for earlier, later in pairwise(times)]
    # After one second, and after two more. A worker that was killed may have held it, too: the
    # delay after an expiry is spread from half of that on.
    for gap, delay, error in zip(gaps, (1, 2), errors, strict=False):
        expired = error["error"]["type"] == "ReservationExpired"
        assert delay * (0.5 if expired else 1) <= gap < 30, errors


def test_a_clock_that_is_shifted_is_shifted(workers: Workers) -> None:
    workers.start("ahead", shift=HOUR, level=logging.DEBUG)
    eventually(lambda: workers.log("ahead"), "it has begun")
    told = workers.log("ahead")[0]["at"]
    assert timedelta(minutes=50) < datetime.fromisoformat(told) - datetime.now().astimezone()
