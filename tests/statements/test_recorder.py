"""What the recorder's statements do to checkpoints."""

from __future__ import annotations

import random
from datetime import timedelta

import pytest
from sqlalchemy import Connection, func, select
from sqlalchemy.exc import IntegrityError

from checkpoints import (
    CheckpointRecord,
    CheckpointStatus,
    advance_lagging_subscription_checkpoints,
    record_checkpoints,
    update_checkpoint_position,
)
from checkpoints.tables import checkpoints
from tests.support.factories import (
    FAR_AHEAD,
    LONG_AGO,
    add_checkpoint,
    add_subscription,
    database_time,
    reserve,
    state,
    violations,
)


@pytest.fixture
def subscription(connection: Connection) -> int:
    return add_subscription(connection)


class TestRecord:
    def test_adds_a_checkpoint_that_is_ready_now(
        self, connection: Connection, subscription: int
    ) -> None:
        before = database_time(connection)
        row = connection.execute(
            record_checkpoints([CheckpointRecord(subscription, "account-1", 3)])
        ).one()
        assert tuple(row)[1:] == (subscription, "account-1", 3, 0)
        after = state(connection, row.id)
        assert (after.version, after.position, after.status) == (3, 0, CheckpointStatus.ACTIVE)
        assert after.ready == after.process_at
        assert after.ready is not None
        assert before <= after.ready <= database_time(connection)
        assert after.reserved is None

    def test_begins_where_the_record_says(self, connection: Connection, subscription: int) -> None:
        row = connection.execute(
            record_checkpoints([CheckpointRecord(subscription, "account-1", 3, 3)])
        ).one()
        after = state(connection, row.id)
        assert (after.version, after.position, after.ready) == (3, 3, None)

    def test_raises_a_version_and_answers_only_what_rose(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription, "account-1", version=3, position=3)
        add_checkpoint(connection, subscription, "account-2", version=9, position=3)
        rows = connection.execute(
            record_checkpoints(
                [
                    CheckpointRecord(subscription, "account-1", 4, 1),
                    CheckpointRecord(subscription, "account-2", 9),
                ]
            )
        ).all()
        assert [tuple(row) for row in rows] == [(id, subscription, "account-1", 4, 3)]
        assert state(connection, id).ready is not None

    def test_a_version_never_falls(self, connection: Connection, subscription: int) -> None:
        id = add_checkpoint(connection, subscription, version=9)
        before = state(connection, id)
        rows = connection.execute(
            record_checkpoints([CheckpointRecord(subscription, "account-1", 4)])
        ).all()
        assert rows == []
        assert state(connection, id) == before

    def test_records_of_one_checkpoint_collapse_to_the_highest_version(
        self, connection: Connection, subscription: int
    ) -> None:
        row = connection.execute(
            record_checkpoints(
                [
                    CheckpointRecord(subscription, "account-1", version, position)
                    for version, position in ((3, 2), (7, 5), (5, 4))
                ]
            )
        ).one()
        assert (row.stream_version, row.stream_position) == (7, 2)

    def test_no_records_are_no_rows(self, connection: Connection) -> None:
        assert connection.execute(record_checkpoints([])).all() == []

    def test_any_iterable_of_records_will_do(
        self, connection: Connection, subscription: int
    ) -> None:
        rows = connection.execute(
            record_checkpoints(CheckpointRecord(subscription, f"account-{n}", 1) for n in range(3))
        ).all()
        assert len(rows) == 3

    def test_never_touches_a_reservation(self, connection: Connection, subscription: int) -> None:
        id = add_checkpoint(connection, subscription, version=3)
        held = reserve(connection)
        before = state(connection, id)
        connection.execute(record_checkpoints([CheckpointRecord(subscription, "account-1", 5)]))
        after = state(connection, id)
        assert after.version == 5
        assert (after.reserved_until, after.reserved, after.ready, after.process_at) == (
            before.reserved_until,
            before.reserved,
            None,
            before.process_at,
        )
        connection.execute(update_checkpoint_position(id, held.reserved_until, 3))
        assert state(connection, id).ready is not None

    def test_lets_the_backoff_of_a_retry_stand(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription, status="retry", process_at=FAR_AHEAD)
        connection.execute(record_checkpoints([CheckpointRecord(subscription, "account-1", 5)]))
        after = state(connection, id)
        assert (after.version, after.status, after.ready) == (5, CheckpointStatus.RETRY, FAR_AHEAD)

    def test_leaves_a_failed_checkpoint_failed(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription, status="failed")
        connection.execute(record_checkpoints([CheckpointRecord(subscription, "account-1", 5)]))
        after = state(connection, id)
        assert (after.version, after.status, after.ready) == (5, CheckpointStatus.FAILED, None)

    def test_keeps_the_place_in_the_queue_of_one_that_waits(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription, process_at=LONG_AGO)
        connection.execute(record_checkpoints([CheckpointRecord(subscription, "account-1", 5)]))
        assert state(connection, id).ready == LONG_AGO

    def test_of_an_unknown_subscription_records_nothing(
        self, connection: Connection, subscription: int
    ) -> None:
        records = [CheckpointRecord(id, "account-1", 1) for id in (subscription, 987_654)]
        with pytest.raises(IntegrityError, match="987654"), connection.begin_nested():
            connection.execute(record_checkpoints(records))
        assert connection.scalar(select(func.count()).select_from(checkpoints)) == 0

    def test_ten_thousand_in_one_call(self, connection: Connection, subscription: int) -> None:
        records = [CheckpointRecord(subscription, f"account-{n}", 1) for n in range(10_000)]
        assert len(connection.execute(record_checkpoints(records)).all()) == 10_000
        assert violations(connection) == []

    def test_the_longest_name_fits(self, connection: Connection, subscription: int) -> None:
        # Random, for what repeats itself is compressed.
        name = "".join(chr(0x4E00 + n) for n in random.Random(1).sample(range(20_000), 666))
        row = connection.execute(
            record_checkpoints([CheckpointRecord(subscription, name, 1)])
        ).one()
        assert row.stream_name == name

    @pytest.mark.parametrize("name", ["account-'1'", "ac\tcount\n\\x", "счёт-1", "$1 %s %(a)s :b"])
    def test_names_are_data(self, connection: Connection, subscription: int, name: str) -> None:
        row = connection.execute(
            record_checkpoints([CheckpointRecord(subscription, name, 1)])
        ).one()
        assert row.stream_name == name


class TestAdvance:
    def test_moves_what_lags_to_its_version(
        self, connection: Connection, subscription: int
    ) -> None:
        lagging = [
            add_checkpoint(connection, subscription, "account-1", version=3),
            add_checkpoint(
                connection,
                subscription,
                "account-2",
                version=7,
                position=2,
                status="retry",
                retry_attempts=2,
                retries=["x"],
                process_at=FAR_AHEAD,
            ),
            add_checkpoint(connection, subscription, "account-3", version=7, status="failed"),
        ]
        add_checkpoint(connection, subscription, "account-4", version=3, position=3)

        rows = connection.execute(advance_lagging_subscription_checkpoints(subscription)).all()

        assert {row.id for row in rows} == set(lagging)
        for id in lagging:
            after = state(connection, id)
            assert after.position == after.version
            assert (after.status, after.retry_attempts, after.retries) == (
                CheckpointStatus.ACTIVE,
                0,
                None,
            )
            assert (after.process_at, after.ready, after.reserved) == (None, None, None)

    def test_leaves_reserved_ones_alone(self, connection: Connection, subscription: int) -> None:
        id = add_checkpoint(connection, subscription)
        reserve(connection, timedelta(hours=1))
        before = state(connection, id)
        rows = connection.execute(advance_lagging_subscription_checkpoints(subscription)).all()
        assert rows == []
        assert state(connection, id) == before

    def test_leaves_other_subscriptions_alone(
        self, connection: Connection, subscription: int
    ) -> None:
        add_checkpoint(connection, add_subscription(connection, "other"))
        rows = connection.execute(advance_lagging_subscription_checkpoints(subscription)).all()
        assert rows == []

    def test_goes_on_in_batches_until_nothing_is_left(
        self, connection: Connection, subscription: int
    ) -> None:
        for n in range(5):
            add_checkpoint(connection, subscription, f"account-{n}")
        batches = [
            len(
                connection.execute(
                    advance_lagging_subscription_checkpoints(subscription, limit=2)
                ).all()
            )
            for _ in range(4)
        ]
        assert batches == [2, 2, 1, 0]
