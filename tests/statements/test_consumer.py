"""What the consumer's statements do to a checkpoint."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, select, update
from sqlalchemy.exc import DBAPIError

from checkpoints import (
    CheckpointRecord,
    CheckpointStatus,
    ReplayMode,
    Reservation,
    SubscriptionStatus,
    extend_checkpoint_reservation,
    record_checkpoint_error,
    record_checkpoints,
    recover_expired_checkpoint_reservations,
    release_checkpoint_reservation,
    reserve_next_available_checkpoint,
    schedule_checkpoints,
    set_subscription_status,
    update_checkpoint_position,
)
from checkpoints.tables import checkpoints, subscriptions
from tests.support.factories import (
    FAR_AHEAD,
    GROUP,
    LONG_AGO,
    MINUTE,
    add_checkpoint,
    add_subscription,
    database_time,
    reserve,
    state,
    violations,
)

OTHER_TOKEN = LONG_AGO


@pytest.fixture
def subscription(connection: Connection) -> int:
    return add_subscription(connection)


class TestReserve:
    def test_takes_a_due_checkpoint_and_says_all_of_it(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription, "account-1", version=5, position=2)
        before = database_time(connection)

        row = connection.execute(reserve_next_available_checkpoint(GROUP, MINUTE)).one()

        assert tuple(row)[:-2] == (
            id,
            subscription,
            "balances",
            "account-1",
            2,
            5,
            0,
            CheckpointStatus.ACTIVE,
            None,
        )
        assert row.process_at <= before
        assert before <= row.reserved_until - MINUTE <= database_time(connection)
        after = state(connection, id)
        assert after.reserved_until == after.reserved == row.reserved_until
        assert after.ready is None
        assert after.process_at is not None

    def test_lasts_from_the_statement_not_from_the_start_of_the_transaction(
        self, connection: Connection, subscription: int
    ) -> None:
        add_checkpoint(connection, subscription)
        before = database_time(connection)
        assert reserve(connection).reserved_until - MINUTE >= before

    def test_finds_what_became_ready_since_the_transaction_began(
        self, connection: Connection, subscription: int
    ) -> None:
        database_time(connection)
        id = add_checkpoint(connection, subscription)
        assert reserve(connection).id == id

    def test_gives_the_one_due_longest_first_and_no_more_than_the_limit(
        self, connection: Connection, subscription: int
    ) -> None:
        ids = [
            add_checkpoint(
                connection,
                subscription,
                f"account-{minutes}",
                process_at=LONG_AGO - timedelta(minutes=minutes),
            )
            for minutes in (1, 3, 2)
        ]
        rows = connection.execute(reserve_next_available_checkpoint(GROUP, MINUTE, limit=2)).all()
        assert [row.id for row in rows] == [ids[1], ids[2]]

    def test_does_not_give_the_same_twice(self, connection: Connection, subscription: int) -> None:
        add_checkpoint(connection, subscription)
        reserve(connection)
        assert connection.execute(reserve_next_available_checkpoint(GROUP, MINUTE)).all() == []

    def test_leaves_what_is_not_due_yet(self, connection: Connection, subscription: int) -> None:
        add_checkpoint(connection, subscription, process_at=FAR_AHEAD)
        assert connection.execute(reserve_next_available_checkpoint(GROUP, MINUTE)).all() == []

    def test_leaves_other_groups_alone(self, connection: Connection) -> None:
        add_checkpoint(connection, add_subscription(connection, group="others"))
        assert connection.execute(reserve_next_available_checkpoint(GROUP, MINUTE)).all() == []

    def test_of_an_unknown_group_there_is_nothing(self, connection: Connection) -> None:
        assert connection.execute(reserve_next_available_checkpoint("none", MINUTE)).all() == []

    @pytest.mark.parametrize(
        ("status", "modes"),
        [
            (SubscriptionStatus.ACTIVE, {ReplayMode.ALL, ReplayMode.LIVE}),
            (SubscriptionStatus.REPLAY, {ReplayMode.ALL, ReplayMode.REPLAY}),
            (SubscriptionStatus.PAUSED, set()),
            (SubscriptionStatus.UNINITIALIZED, set()),
            (SubscriptionStatus.UNKNOWN, set()),
            (SubscriptionStatus.BACKFILL, set()),
        ],
    )
    def test_serves_the_subscriptions_of_its_replay_mode(
        self, connection: Connection, status: SubscriptionStatus, modes: set[ReplayMode]
    ) -> None:
        add_checkpoint(connection, add_subscription(connection, status=status))
        for mode in ReplayMode:
            with connection.begin_nested() as savepoint:
                rows = connection.execute(
                    reserve_next_available_checkpoint(GROUP, MINUTE, replay_mode=mode)
                ).all()
                savepoint.rollback()
            assert bool(rows) == (mode in modes)

    def test_says_the_replay_target(self, connection: Connection, subscription: int) -> None:
        connection.execute(
            update(subscriptions)
            .where(subscriptions.c.id == subscription)
            .values(status=SubscriptionStatus.REPLAY, replay_target_position=77)
        )
        add_checkpoint(connection, subscription)
        assert reserve(connection).replay_target_position == 77

    def test_gives_a_retry_when_its_time_has_come(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(
            connection, subscription, status="retry", retry_attempts=2, process_at=LONG_AGO
        )
        reservation = reserve(connection)
        assert (reservation.id, reservation.status, reservation.retry_attempts) == (
            id,
            CheckpointStatus.RETRY,
            2,
        )

    def test_leaves_a_failed_checkpoint_until_it_is_scheduled(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription, status="failed")
        assert connection.execute(reserve_next_available_checkpoint(GROUP, MINUTE)).all() == []
        connection.execute(schedule_checkpoints([id], LONG_AGO))
        assert reserve(connection).status is CheckpointStatus.FAILED


class TestUpdate:
    def test_moves_the_position_and_ends_the_reservation(
        self, connection: Connection, subscription: int
    ) -> None:
        add_checkpoint(connection, subscription, version=3)
        held = reserve(connection)

        row = connection.execute(update_checkpoint_position(held.id, held.reserved_until, 3)).one()

        assert tuple(row) == (held.id, 3, 3)
        after = state(connection, held.id)
        assert (after.position, after.process_at, after.reserved_until) == (3, None, None)
        assert (after.ready, after.reserved) == (None, None)

    def test_is_ready_again_now_when_it_still_lags(
        self, connection: Connection, subscription: int
    ) -> None:
        add_checkpoint(connection, subscription, version=3)
        held = reserve(connection)
        before = database_time(connection)
        connection.execute(update_checkpoint_position(held.id, held.reserved_until, 1))
        after = state(connection, held.id)
        assert after.ready is not None
        assert before <= after.ready <= database_time(connection)
        assert after.ready == after.process_at
        assert after.reserved is None

    def test_is_ready_at_the_time_given_when_it_still_lags(
        self, connection: Connection, subscription: int
    ) -> None:
        add_checkpoint(connection, subscription, version=3)
        held = reserve(connection)
        connection.execute(
            update_checkpoint_position(held.id, held.reserved_until, 1, process_at=FAR_AHEAD)
        )
        assert state(connection, held.id).ready == FAR_AHEAD

    def test_forgets_the_time_given_when_nothing_is_left(
        self, connection: Connection, subscription: int
    ) -> None:
        add_checkpoint(connection, subscription, version=3)
        held = reserve(connection)
        connection.execute(
            update_checkpoint_position(held.id, held.reserved_until, 3, process_at=FAR_AHEAD)
        )
        after = state(connection, held.id)
        assert (after.ready, after.process_at) == (None, None)

    def test_never_moves_the_position_backwards(
        self, connection: Connection, subscription: int
    ) -> None:
        add_checkpoint(connection, subscription, version=9, position=5)
        held = reserve(connection)
        row = connection.execute(update_checkpoint_position(held.id, held.reserved_until, 2)).one()
        assert row.stream_position == 5

    def test_may_go_past_the_version_that_is_known(
        self, connection: Connection, subscription: int
    ) -> None:
        add_checkpoint(connection, subscription, version=3)
        held = reserve(connection)
        connection.execute(update_checkpoint_position(held.id, held.reserved_until, 8))
        connection.execute(record_checkpoints([CheckpointRecord(subscription, "account-1", 8)]))
        after = state(connection, held.id)
        assert (after.version, after.position, after.ready) == (8, 8, None)

    def test_clears_the_errors(self, connection: Connection, subscription: int) -> None:
        add_checkpoint(
            connection,
            subscription,
            status="retry",
            retry_attempts=2,
            retries=[{"error": "x"}],
            process_at=LONG_AGO,
        )
        held = reserve(connection)
        connection.execute(update_checkpoint_position(held.id, held.reserved_until, 3))
        after = state(connection, held.id)
        assert (after.status, after.retry_attempts, after.retries) == (
            CheckpointStatus.ACTIVE,
            0,
            None,
        )

    def test_changes_nothing_with_another_token(
        self, connection: Connection, subscription: int
    ) -> None:
        add_checkpoint(connection, subscription)
        held = reserve(connection)
        before = state(connection, held.id)
        assert connection.execute(update_checkpoint_position(held.id, OTHER_TOKEN, 3)).all() == []
        assert state(connection, held.id) == before

    def test_works_after_the_time_ran_out_when_nobody_recovered_it(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription, reserved_until=LONG_AGO)
        assert connection.execute(update_checkpoint_position(id, LONG_AGO, 3)).one().id == id


class TestRecordError:
    def test_keeps_the_errors_of_every_attempt_and_waits_for_the_next(
        self, connection: Connection, subscription: int
    ) -> None:
        add_checkpoint(connection, subscription)
        for attempt in (1, 2):
            held = reserve(connection)
            row = connection.execute(
                record_checkpoint_error(
                    held.id,
                    held.reserved_until,
                    attempt,
                    status=CheckpointStatus.RETRY,
                    retry_attempts=attempt,
                    error={"type": "KeyError", "n": attempt},
                    process_at=LONG_AGO,
                )
            ).one()
            assert tuple(row) == (held.id, CheckpointStatus.RETRY)

        after = state(connection, held.id)
        assert (after.status, after.retry_attempts, after.position) == (
            CheckpointStatus.RETRY,
            2,
            2,
        )
        assert after.process_at == after.ready == LONG_AGO
        assert (after.reserved_until, after.reserved) == (None, None)
        assert after.retries is not None
        assert [
            (entry["attempt"], entry["stream_position"], entry["error"]) for entry in after.retries
        ] == [
            (1, 1, {"type": "KeyError", "n": 1}),
            (2, 2, {"type": "KeyError", "n": 2}),
        ]
        times = [datetime.fromisoformat(entry["recorded_at"]) for entry in after.retries]
        assert times == sorted(times)
        assert times[-1] <= database_time(connection)

    def test_gives_up_with_status_failed(self, connection: Connection, subscription: int) -> None:
        add_checkpoint(connection, subscription)
        held = reserve(connection)
        connection.execute(
            record_checkpoint_error(
                held.id,
                held.reserved_until,
                0,
                status=CheckpointStatus.FAILED,
                retry_attempts=5,
                error="too much",
            )
        )
        after = state(connection, held.id)
        assert after.status is CheckpointStatus.FAILED
        assert (after.process_at, after.ready, after.reserved) == (None, None, None)

    @pytest.mark.parametrize("error", [None, "text", 1.5, [1, {"a": None}], {"ключ": "знач"}])
    def test_any_json_value_is_an_error(
        self, connection: Connection, subscription: int, error: object
    ) -> None:
        add_checkpoint(connection, subscription)
        held = reserve(connection)
        connection.execute(
            record_checkpoint_error(
                held.id,
                held.reserved_until,
                0,
                status=CheckpointStatus.FAILED,
                retry_attempts=1,
                error=error,  # type: ignore[arg-type]
            )
        )
        retries = state(connection, held.id).retries
        assert retries is not None
        assert retries[0]["error"] == error

    def test_changes_nothing_with_another_token(
        self, connection: Connection, subscription: int
    ) -> None:
        add_checkpoint(connection, subscription)
        held = reserve(connection)
        before = state(connection, held.id)
        assert (
            connection.execute(
                record_checkpoint_error(
                    held.id,
                    OTHER_TOKEN,
                    0,
                    status=CheckpointStatus.FAILED,
                    retry_attempts=1,
                    error="lost",
                )
            ).all()
            == []
        )
        assert state(connection, held.id) == before


class TestRelease:
    def test_makes_what_has_work_ready_again_when_it_was(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription, process_at=LONG_AGO)
        held = reserve(connection)
        row = connection.execute(release_checkpoint_reservation(id, held.reserved_until)).one()
        assert row.id == id
        after = state(connection, id)
        assert (after.ready, after.reserved, after.position) == (LONG_AGO, None, 0)

    def test_of_what_has_no_work_leaves_nothing(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription, position=3, reserved_until=FAR_AHEAD)
        connection.execute(release_checkpoint_reservation(id, FAR_AHEAD))
        after = state(connection, id)
        assert (after.process_at, after.ready, after.reserved) == (None, None, None)

    def test_changes_nothing_with_another_token(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription)
        reserve(connection)
        before = state(connection, id)
        assert connection.execute(release_checkpoint_reservation(id, OTHER_TOKEN)).all() == []
        assert state(connection, id) == before

    def test_by_an_operator_needs_no_token(self, connection: Connection, subscription: int) -> None:
        id = add_checkpoint(connection, subscription)
        held = reserve(connection)
        assert connection.execute(release_checkpoint_reservation(id)).one().id == id
        assert state(connection, id).ready is not None
        assert (
            connection.execute(update_checkpoint_position(id, held.reserved_until, 3)).all() == []
        )

    def test_by_an_operator_of_what_is_not_reserved_is_nothing(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription)
        assert connection.execute(release_checkpoint_reservation(id)).all() == []


class TestExtend:
    def test_gives_a_new_token_and_takes_the_old(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription)
        held = reserve(connection)
        row = connection.execute(
            extend_checkpoint_reservation(id, held.reserved_until, timedelta(hours=1))
        ).one()
        assert row.id == id
        assert row.reserved_until > held.reserved_until + timedelta(minutes=58)
        after = state(connection, id)
        assert after.reserved_until == after.reserved == row.reserved_until
        old = update_checkpoint_position(id, held.reserved_until, 3)
        new = update_checkpoint_position(id, row.reserved_until, 3)
        assert connection.execute(old).all() == []
        assert connection.execute(new).one().id == id

    def test_works_after_the_time_ran_out_when_nobody_recovered_it(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription, reserved_until=LONG_AGO)
        assert connection.execute(extend_checkpoint_reservation(id, LONG_AGO, MINUTE)).one()

    def test_changes_nothing_after_recovery(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription, reserved_until=LONG_AGO)
        connection.execute(recover_expired_checkpoint_reservations(GROUP))
        assert connection.execute(extend_checkpoint_reservation(id, LONG_AGO, MINUTE)).all() == []


class TestRecover:
    @pytest.mark.parametrize(
        ("columns", "ready"),
        [
            ({"process_at": LONG_AGO}, LONG_AGO),
            ({"status": "retry", "retry_attempts": 1, "process_at": LONG_AGO}, LONG_AGO),
            ({"status": "failed", "process_at": LONG_AGO}, LONG_AGO),
            ({"status": "failed"}, None),
            ({"position": 3}, None),
        ],
        ids=["lagging", "retry", "failed and scheduled", "failed", "nothing to do"],
    )
    def test_makes_what_has_work_ready_again_and_keeps_the_status(
        self,
        connection: Connection,
        subscription: int,
        columns: dict[str, Any],
        ready: datetime | None,
    ) -> None:
        id = add_checkpoint(connection, subscription, reserved_until=LONG_AGO, **columns)
        before = state(connection, id)
        rows = connection.execute(recover_expired_checkpoint_reservations(GROUP)).all()
        assert [row.id for row in rows] == [id]
        after = state(connection, id)
        assert (after.status, after.retry_attempts) == (before.status, before.retry_attempts)
        assert (after.ready, after.reserved, after.reserved_until) == (ready, None, None)
        assert violations(connection) == []

    def test_leaves_what_has_not_expired(self, connection: Connection, subscription: int) -> None:
        add_checkpoint(connection, subscription, reserved_until=FAR_AHEAD)
        assert connection.execute(recover_expired_checkpoint_reservations(GROUP)).all() == []

    def test_recovers_those_of_a_paused_subscription_too(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription, reserved_until=LONG_AGO)
        connection.execute(set_subscription_status(subscription, SubscriptionStatus.PAUSED))
        rows = connection.execute(recover_expired_checkpoint_reservations(GROUP)).all()
        assert [row.id for row in rows] == [id]

    def test_leaves_other_groups_alone(self, connection: Connection) -> None:
        other = add_subscription(connection, group="others")
        add_checkpoint(connection, other, reserved_until=LONG_AGO)
        assert connection.execute(recover_expired_checkpoint_reservations(GROUP)).all() == []

    def test_takes_no_more_than_the_limit_the_longest_expired_first(
        self, connection: Connection, subscription: int
    ) -> None:
        ids = [
            add_checkpoint(
                connection,
                subscription,
                f"account-{minutes}",
                reserved_until=LONG_AGO - timedelta(minutes=minutes),
            )
            for minutes in (1, 3, 2)
        ]
        rows = connection.execute(recover_expired_checkpoint_reservations(GROUP, limit=2)).all()
        assert {row.id for row in rows} == {ids[1], ids[2]}

    def test_the_former_holder_finds_its_token_gone(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription, reserved_until=LONG_AGO)
        connection.execute(recover_expired_checkpoint_reservations(GROUP))
        held = reserve(connection)
        zombie = [
            update_checkpoint_position(id, LONG_AGO, 3),
            extend_checkpoint_reservation(id, LONG_AGO, MINUTE),
            release_checkpoint_reservation(id, LONG_AGO),
            record_checkpoint_error(
                id,
                LONG_AGO,
                0,
                status=CheckpointStatus.FAILED,
                retry_attempts=1,
                error="zombie",
            ),
        ]
        for statement in zombie:
            assert connection.execute(statement).all() == []
        assert state(connection, id).reserved_until == held.reserved_until


def test_reservation_has_the_columns_of_the_statement() -> None:
    columns = reserve_next_available_checkpoint(GROUP, MINUTE).selected_columns.keys()
    assert list(Reservation.__dataclass_fields__) == columns


def test_a_lock_is_never_waited_for_by_reserve_or_recover(connection: Connection) -> None:
    """With a lock timeout of a millisecond, a wait would be an error."""
    subscription = add_subscription(connection)
    add_checkpoint(connection, subscription, "account-1")
    add_checkpoint(connection, subscription, "account-2", reserved_until=LONG_AGO)
    connection.commit()
    with connection.engine.connect() as other:
        other.exec_driver_sql("SET lock_timeout = '1ms'")
        other.commit()
        connection.execute(select(checkpoints.c.id).with_for_update())
        assert other.execute(reserve_next_available_checkpoint(GROUP, MINUTE)).all() == []
        assert other.execute(recover_expired_checkpoint_reservations(GROUP)).all() == []
        with pytest.raises(DBAPIError, match="lock timeout"):
            other.execute(release_checkpoint_reservation(2))
