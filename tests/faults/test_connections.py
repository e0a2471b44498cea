"""Connections that break while workers use them."""

from __future__ import annotations

import pytest

from tests.faults.processes import Workers
from tests.faults.world import World

pytestmark = pytest.mark.timeout(180)

TERMINATIONS = 100


def test_nothing_is_lost_or_applied_twice_when_connections_are_terminated(
    world: World, workers: Workers, kind: str
) -> None:
    streams = [f"stream-{number}" for number in range(60)]
    world.append(streams)
    for number in range(4):
        workers.start(f"worker-{number}", kind=kind, handling={"think": 0.01})
    for name in workers.names:
        world.await_in_transaction(name, streams)
    terminated = 0
    while terminated < TERMINATIONS:
        world.append_some(streams, 10)
        # In the pool or in a transaction, of a handler or of the consumer's own, or the listener's.
        pids = world.sessions(
            "application_name LIKE 'worker-%' AND (state <> 'idle' OR random() < 0.2)"
        )
        if pids:
            terminated += world.terminate_sessions([world.random.choice(pids)])

    world.await_finished(60)
    world.check()
    assert workers.sqlstates().count("57P01") >= TERMINATIONS / 10
    # A broken connection is no error of the handler's.
    assert workers.failed_attempts() == []
    assert all(workers.exit_code(name) is None for name in workers.names)
