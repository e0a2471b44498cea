"""What operators see, and what their statements do."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import Connection

from checkpoints import (
    CheckpointStatus,
    SubscriptionStatus,
    get_checkpoint,
    get_metrics,
    list_failed,
    list_lagging,
    list_reservations,
    list_retries,
    schedule_checkpoints,
    skip_checkpoints,
    update_checkpoint_position,
)
from tests.support.factories import (
    FAR_AHEAD,
    GROUP,
    LONG_AGO,
    add_checkpoint,
    add_subscription,
    reserve,
    state,
)


@pytest.fixture
def subscription(connection: Connection) -> int:
    return add_subscription(connection)


class TestListReservations:
    def test_shows_what_is_reserved_the_next_to_expire_first(
        self, connection: Connection, subscription: int
    ) -> None:
        later = add_checkpoint(connection, subscription, "account-1", reserved_until=FAR_AHEAD)
        expired = add_checkpoint(
            connection, subscription, "account-2", position=2, reserved_until=LONG_AGO
        )
        add_checkpoint(connection, subscription, "account-3")
        rows = connection.execute(list_reservations()).all()
        assert [tuple(row) for row in rows] == [
            (expired, GROUP, "balances", "account-2", 2, LONG_AGO, 2),
            (later, GROUP, "balances", "account-1", 0, FAR_AHEAD, 2),
        ]

    def test_pages_say_the_total_of_all_pages(
        self, connection: Connection, subscription: int
    ) -> None:
        ids = [
            add_checkpoint(
                connection,
                subscription,
                f"account-{n}",
                reserved_until=LONG_AGO + timedelta(minutes=n),
            )
            for n in range(5)
        ]
        pages = [
            connection.execute(list_reservations(offset=offset, limit=2)).all()
            for offset in (0, 2, 4, 6)
        ]
        assert [row.id for page in pages for row in page] == ids
        assert {row.total_results for page in pages for row in page} == {5}

    @pytest.mark.parametrize(
        ("search", "found"),
        [
            (None, {"Konto_1", "konto-1", "50%"}),
            ("", {"Konto_1", "konto-1", "50%"}),
            ("KONTO", {"Konto_1", "konto-1"}),
            ("o_1", {"Konto_1"}),
            ("%", {"50%"}),
            ("\\", set()),
            ("ALANC", {"Konto_1", "konto-1", "50%"}),
            ("accounts", {"Konto_1", "konto-1", "50%"}),
            ("nothing", set()),
        ],
    )
    def test_search_matches_group_subscription_or_stream_literally_in_any_case(
        self,
        connection: Connection,
        subscription: int,
        search: str | None,
        found: set[str],
    ) -> None:
        for name in ("Konto_1", "konto-1", "50%"):
            add_checkpoint(connection, subscription, name, reserved_until=FAR_AHEAD)
        rows = connection.execute(list_reservations(search=search)).all()
        assert {row.stream_name for row in rows} == found
        assert {row.total_results for row in rows} <= {len(found)}


class TestListCheckpoints:
    @pytest.fixture
    def ids(self, connection: Connection, subscription: int) -> dict[str, int]:
        return {
            "late": add_checkpoint(connection, subscription, "late", process_at=LONG_AGO),
            "later": add_checkpoint(connection, subscription, "later", process_at=FAR_AHEAD),
            "reserved": add_checkpoint(
                connection,
                subscription,
                "reserved",
                process_at=LONG_AGO + timedelta(1),
                reserved_until=FAR_AHEAD,
            ),
            "idle": add_checkpoint(connection, subscription, "idle", position=3),
            "retry": add_checkpoint(
                connection,
                subscription,
                "retry",
                status="retry",
                retry_attempts=2,
                retries=[{"error": "x"}],
                process_at=FAR_AHEAD,
            ),
            "sooner": add_checkpoint(
                connection, subscription, "sooner", status="retry", process_at=LONG_AGO
            ),
            "failed": add_checkpoint(connection, subscription, "failed", status="failed"),
        }

    @pytest.mark.usefixtures("ids")
    def test_lagging_are_active_with_work_left_those_due_longest_first(
        self, connection: Connection
    ) -> None:
        rows = connection.execute(list_lagging()).all()
        assert [row.stream_name for row in rows] == ["late", "reserved", "later"]
        assert {row.total_results for row in rows} == {3}

    @pytest.mark.usefixtures("ids")
    def test_retries_are_the_next_one_first_with_their_errors(self, connection: Connection) -> None:
        rows = connection.execute(list_retries()).all()
        assert [row.stream_name for row in rows] == ["sooner", "retry"]
        last = rows[1]
        assert (last.status, last.retry_attempts, last.retries, last.process_at) == (
            CheckpointStatus.RETRY,
            2,
            [{"error": "x"}],
            FAR_AHEAD,
        )

    def test_failed_are_those_given_up(self, connection: Connection, ids: dict[str, int]) -> None:
        rows = connection.execute(list_failed()).all()
        assert [(row.id, row.total_results) for row in rows] == [(ids["failed"], 1)]

    @pytest.mark.usefixtures("ids")
    def test_search_and_pages_work_for_each_list(self, connection: Connection) -> None:
        for listed, name in (
            (list_lagging, "later"),
            (list_retries, "sooner"),
            (list_failed, "failed"),
        ):
            found = connection.execute(listed(search=name.upper())).all()
            assert [row.stream_name for row in found] == [name]
            assert connection.execute(listed(offset=9)).all() == []

    def test_total_stops_at_its_limit(self, connection: Connection, subscription: int) -> None:
        connection.exec_driver_sql(
            "INSERT INTO checkpoints.checkpoints (subscription_id, stream_name, stream_version)"
            f" SELECT {subscription}, 'account-' || n, 1 FROM generate_series(1, 10100) AS n"
        )
        assert connection.execute(list_lagging(limit=1)).one().total_results == 10_000


def test_get_checkpoint_says_all_of_it(connection: Connection, subscription: int) -> None:
    id = add_checkpoint(connection, subscription, "account-1", version=5, position=2)
    row = connection.execute(get_checkpoint(id)).one()
    assert tuple(row)[:11] == (
        id,
        subscription,
        GROUP,
        "balances",
        SubscriptionStatus.ACTIVE,
        "account-1",
        5,
        2,
        CheckpointStatus.ACTIVE,
        0,
        None,
    )
    assert row.process_at is not None
    assert row.created_at <= row.updated_at
    assert connection.execute(get_checkpoint(id + 1)).all() == []


def test_metrics_count_what_is_at_hand_for_each_subscription(
    connection: Connection, subscription: int
) -> None:
    add_checkpoint(connection, subscription, "due", process_at=LONG_AGO)
    add_checkpoint(connection, subscription, "later", version=5, process_at=FAR_AHEAD)
    add_checkpoint(connection, subscription, "reserved", version=7, reserved_until=FAR_AHEAD)
    add_checkpoint(connection, subscription, "expired", reserved_until=LONG_AGO)
    add_checkpoint(connection, subscription, "retry", status="retry", process_at=FAR_AHEAD)
    add_checkpoint(connection, subscription, "failed", status="failed")
    add_checkpoint(connection, subscription, "idle", position=3)
    idle = add_subscription(connection, "idle", status=SubscriptionStatus.PAUSED)

    rows = connection.execute(get_metrics()).mappings().all()

    assert [dict(row) for row in rows] == [
        {
            "id": subscription,
            "group_name": GROUP,
            "name": "balances",
            "status": SubscriptionStatus.ACTIVE,
            "ready": 3,
            "due": 1,
            "reserved": 2,
            "expired": 1,
            "retry": 1,
            "failed": 1,
            "lag": 3 + 5 + 7 + 3 + 3,
            "oldest_due_at": LONG_AGO,
        },
        {
            "id": idle,
            "group_name": GROUP,
            "name": "idle",
            "status": SubscriptionStatus.PAUSED,
            **dict.fromkeys(("ready", "due", "reserved", "expired", "retry", "failed", "lag"), 0),
            "oldest_due_at": None,
        },
    ]


class TestSkip:
    def test_moves_past_one_message_and_is_ready_again_if_it_lags(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(
            connection,
            subscription,
            version=3,
            position=1,
            status="failed",
            retry_attempts=5,
            retries=["x"],
        )
        assert connection.execute(skip_checkpoints([id])).one().id == id
        after = state(connection, id)
        assert (after.position, after.status, after.retry_attempts, after.retries) == (
            2,
            CheckpointStatus.ACTIVE,
            0,
            None,
        )
        assert after.ready is not None
        connection.execute(skip_checkpoints([id]))
        assert (state(connection, id).position, state(connection, id).ready) == (3, None)

    def test_never_goes_past_the_version(self, connection: Connection, subscription: int) -> None:
        id = add_checkpoint(connection, subscription, version=3, position=3, status="failed")
        connection.execute(skip_checkpoints([id]))
        after = state(connection, id)
        assert (after.position, after.status) == (3, CheckpointStatus.ACTIVE)

    def test_ends_a_reservation_whose_holder_finds_its_token_gone(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription)
        held = reserve(connection)
        connection.execute(skip_checkpoints([id]))
        after = state(connection, id)
        assert (after.position, after.reserved) == (1, None)
        assert after.ready is not None
        lost = connection.execute(update_checkpoint_position(id, held.reserved_until, 3)).all()
        assert lost == []

    def test_is_nothing_where_there_is_nothing_to_skip(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(connection, subscription, version=3, position=3)
        assert connection.execute(skip_checkpoints([id, id + 1])).all() == []

    def test_skips_many_each_once(self, connection: Connection, subscription: int) -> None:
        ids = [add_checkpoint(connection, subscription, f"account-{n}") for n in range(3)]
        rows = connection.execute(skip_checkpoints([*ids, *ids])).all()
        assert {row.id for row in rows} == set(ids)
        assert {state(connection, id).position for id in ids} == {1}

    def test_of_nothing_is_nothing(self, connection: Connection) -> None:
        assert connection.execute(skip_checkpoints([])).all() == []


class TestSchedule:
    @pytest.mark.parametrize("status", ["active", "retry", "failed"])
    def test_works_for_each_status_and_keeps_it(
        self, connection: Connection, subscription: int, status: str
    ) -> None:
        at = None if status == "failed" else FAR_AHEAD
        id = add_checkpoint(connection, subscription, status=status, process_at=at)
        assert connection.execute(schedule_checkpoints([id], LONG_AGO)).one().id == id
        after = state(connection, id)
        assert (after.status.value, after.process_at, after.ready) == (status, LONG_AGO, LONG_AGO)
        assert reserve(connection).id == id

    def test_works_for_a_retry_that_has_caught_up(
        self, connection: Connection, subscription: int
    ) -> None:
        id = add_checkpoint(
            connection, subscription, position=3, status="retry", process_at=FAR_AHEAD
        )
        assert connection.execute(schedule_checkpoints([id], LONG_AGO)).one().id == id

    def test_leaves_what_is_reserved_or_has_no_work(
        self, connection: Connection, subscription: int
    ) -> None:
        reserved = add_checkpoint(connection, subscription, "reserved", reserved_until=FAR_AHEAD)
        idle = add_checkpoint(connection, subscription, "idle", position=3)
        before = [state(connection, id) for id in (reserved, idle)]
        assert connection.execute(schedule_checkpoints([reserved, idle], LONG_AGO)).all() == []
        assert [state(connection, id) for id in (reserved, idle)] == before
