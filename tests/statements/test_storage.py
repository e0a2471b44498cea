"""What the statements cost on disk and in memory."""

from __future__ import annotations

import tracemalloc

import pytest
from sqlalchemy import Connection, text

from checkpoints import (
    CheckpointRecord,
    Checkpoints,
    CheckpointStatus,
    PositionUpdate,
)
from tests.support.factories import GROUP, MINUTE, add_subscription

HOT = text(
    "SELECT n_tup_upd, n_tup_hot_upd FROM pg_stat_xact_user_tables"
    " WHERE schemaname = 'checkpoints' AND relname = 'checkpoints'"
)


@pytest.fixture
def checkpoints(connection: Connection) -> Checkpoints:
    """Thirty streams that lag."""
    subscription = add_subscription(connection)
    checkpoints = Checkpoints(connection)
    checkpoints.record_checkpoints(
        CheckpointRecord(subscription, f"account-{n}", 3) for n in range(30)
    )
    connection.commit()
    return checkpoints


def test_an_update_of_a_checkpoint_changes_no_index(
    connection: Connection, checkpoints: Checkpoints
) -> None:
    """As long as there is room on its page, PostgreSQL makes it a heap-only one."""
    held = checkpoints.reserve_next_available_checkpoint(GROUP, MINUTE, limit=6)
    one, other, *many, last = held
    checkpoints.extend_checkpoint_reservation(last, MINUTE)
    checkpoints.update_checkpoint_position(one, 3)
    checkpoints.release_checkpoint_reservation(other)
    checkpoints.update_checkpoint_positions([PositionUpdate.of(each, 2) for each in many])
    checkpoints.record_checkpoints(
        [CheckpointRecord(each.subscription_id, each.stream_name, 9) for each in held]
    )
    updated, hot = connection.execute(HOT).one()
    assert updated == hot == 6 + 1 + 1 + 1 + len(many) + 6


def test_only_a_status_that_changes_is_indexed(
    connection: Connection, checkpoints: Checkpoints
) -> None:
    (held,) = checkpoints.reserve_next_available_checkpoint(GROUP, MINUTE)
    checkpoints.record_checkpoint_error(
        held, 1, status=CheckpointStatus.FAILED, retry_attempts=1, error="refused"
    )
    updated, hot = connection.execute(HOT).one()
    assert (updated, hot) == (2, 1)


def test_a_stream_of_batches_is_recorded_in_the_memory_of_one(connection: Connection) -> None:
    subscription = add_subscription(connection)
    checkpoints = Checkpoints(connection)

    def record(batch: int) -> int:
        """How much the batch needs at the most."""
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        recorded = checkpoints.record_checkpoints(
            CheckpointRecord(subscription, f"account-{n}", 1)
            for n in range(batch * 10_000, (batch + 1) * 10_000)
        )
        assert len(recorded) == 10_000
        return tracemalloc.get_traced_memory()[1] - before

    tracemalloc.start()
    try:
        first, *others = [record(batch) for batch in range(5)]
        left = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert max(others) < 1.2 * first
    assert left < first / 2
