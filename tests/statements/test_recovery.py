"""Reservations that expired, counted as attempts."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection

from checkpoints import (
    CheckpointStatus,
    SubscriptionStatus,
    get_next_process_at,
    record_expired_checkpoint_reservations,
    reserve_next_available_checkpoint,
)
from tests.support.factories import (
    FAR_AHEAD,
    GROUP,
    LONG_AGO,
    MINUTE,
    add_checkpoint,
    add_subscription,
    database_time,
    state,
    violations,
)


@pytest.fixture
def subscription(connection: Connection) -> int:
    return add_subscription(connection)


def expire(connection: Connection, **arguments: Any) -> list[tuple[Any, ...]]:
    statement = record_expired_checkpoint_reservations(GROUP, max_attempts=3, **arguments)
    return [tuple(row) for row in connection.execute(statement)]


class TestRecordExpired:
    @pytest.mark.parametrize("status", ["active", "retry", "failed"])
    def test_counts_an_attempt_and_waits_for_the_next(
        self, connection: Connection, subscription: int, status: str
    ) -> None:
        id = add_checkpoint(
            connection, subscription, status=status, process_at=LONG_AGO, reserved_until=LONG_AGO
        )
        assert expire(connection, process_at=MINUTE) == [(id, CheckpointStatus.RETRY, 1)]
        after = state(connection, id)
        assert (after.reserved_until, after.reserved) == (None, None)
        assert after.ready is not None
        # Half of it is chance, so that those that were held together come apart.
        waits = after.ready - database_time(connection)
        assert MINUTE * 0.4 < waits < MINUTE * 1.5
        assert after.retries is not None
        (entry,) = after.retries
        assert (entry["attempt"], entry["stream_position"]) == (1, 0)
        assert entry["error"]["type"] == "ReservationExpired"
        assert violations(connection) == []

    def test_doubles_the_wait_with_each_attempt_before(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(
            connection,
            subscription,
            status="retry",
            retry_attempts=1,
            process_at=LONG_AGO,
            reserved_until=LONG_AGO,
        )
        expire(connection, process_at=MINUTE)
        ready = state(connection, id).ready
        assert ready is not None
        assert MINUTE * 0.9 < ready - database_time(connection) < MINUTE * 3

    def test_gives_up_at_the_last_attempt(self, connection: Connection, subscription: int) -> None:
        id = add_checkpoint(
            connection,
            subscription,
            status="retry",
            retry_attempts=2,
            process_at=LONG_AGO,
            reserved_until=LONG_AGO,
        )
        assert expire(connection) == [(id, CheckpointStatus.FAILED, 3)]
        after = state(connection, id)
        assert (after.ready, after.reserved, after.process_at) == (None, None, None)
        assert violations(connection) == []

    def test_counts_nothing_where_there_is_nothing_to_do(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription, position=3, reserved_until=LONG_AGO)
        assert expire(connection) == [(id, CheckpointStatus.ACTIVE, 0)]
        after = state(connection, id)
        assert (after.retries, after.ready, after.reserved) == (None, None, None)

    def test_leaves_what_has_not_expired_and_other_groups(
        self, connection: Connection, subscription: int
    ) -> None:
        add_checkpoint(connection, subscription, reserved_until=FAR_AHEAD)
        other = add_subscription(connection, group="others")
        add_checkpoint(connection, other, reserved_until=LONG_AGO)
        assert expire(connection) == []


class TestNext:
    def test_says_how_long_until_the_next_is_due(
        self, connection: Connection, subscription: int
    ) -> None:
        add_checkpoint(connection, subscription, "later", process_at=FAR_AHEAD)
        id = add_checkpoint(connection, subscription, "next", process_at=LONG_AGO)
        row = connection.execute(get_next_process_at(GROUP)).one()
        assert (row.id, row.process_at) == (id, LONG_AGO)
        assert row.due_in < timedelta(0)

    def test_does_not_look_for_what_was_due_before(
        self, connection: Connection, subscription: int
    ) -> None:
        add_checkpoint(connection, subscription, "before", process_at=LONG_AGO)
        id = add_checkpoint(connection, subscription, "next", process_at=FAR_AHEAD)
        for since, found in ((LONG_AGO, 1), (LONG_AGO + MINUTE, 2), (FAR_AHEAD, 2)):
            row = connection.execute(get_next_process_at(GROUP, due_since=since)).one()
            assert (row.id == id) is (found == 2)
        beyond = get_next_process_at(GROUP, due_since=FAR_AHEAD + MINUTE)
        assert connection.execute(beyond).all() == []

    def test_looks_at_what_reserve_would_take(
        self, connection: Connection, subscription: int
    ) -> None:
        paused = add_subscription(connection, "paused", status=SubscriptionStatus.PAUSED)
        add_checkpoint(connection, paused)
        add_checkpoint(connection, subscription)
        for names, found in ((None, 1), (["balances"], 1), (["paused"], 0), ([], 0)):
            next_one = get_next_process_at(GROUP, subscription_names=names)
            assert len(connection.execute(next_one).all()) == found


@pytest.mark.parametrize(
    ("names", "found"), [(None, 1), (["balances", "x"], 1), (["x"], 0), ([], 0)]
)
def test_reserve_takes_only_the_subscriptions_that_are_named(
    connection: Connection, subscription: int, names: list[str] | None, found: int
) -> None:
    add_checkpoint(connection, subscription)
    statement = reserve_next_available_checkpoint(GROUP, MINUTE, subscription_names=names)
    assert len(connection.execute(statement).all()) == found
