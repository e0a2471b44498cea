"""What the triggers alone keep, when an application or psql writes to `checkpoints`."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import psycopg
import pytest
from sqlalchemy import URL, Connection, Engine, create_engine, delete, func, select, text, update
from sqlalchemy.exc import IntegrityError

from checkpoints import (
    CheckpointRecord,
    CheckpointStatus,
    SubscriptionStatus,
    add_or_update_subscription,
    advance_lagging_subscription_checkpoints,
    audit_checkpoints,
    record_checkpoint_error,
    record_checkpoints,
    recover_expired_checkpoint_reservations,
    release_checkpoint_reservation,
    repair_checkpoints,
    schedule_checkpoints,
    set_subscription_status,
    skip_checkpoints,
    update_checkpoint_position,
)
from checkpoints.tables import checkpoints, checkpoints_ready, checkpoints_reserved, metadata
from tests.rule.invariants import broken
from tests.support.databases import disposed
from tests.support.factories import (
    FAR_AHEAD,
    GROUP,
    LONG_AGO,
    State,
    add_checkpoint,
    add_subscription,
    reserve,
    state,
    violations,
)

# How a checkpoint may stand, by its status, what it lags, and its two times.
STANDINGS: list[dict[str, Any]] = [
    {"status": status, "position": position, "process_at": process_at, "reserved_until": reserved}
    for status, position, process_at, reserved in itertools.product(
        CheckpointStatus, (0, 3), (None, LONG_AGO), (None, FAR_AHEAD)
    )
]


def _label(standing: dict[str, Any]) -> str:
    return " ".join(
        (
            standing["status"],
            "caught up" if standing["position"] else "lagging",
            *(name for name in ("process_at", "reserved_until") if standing[name]),
        )
    )


@pytest.fixture
def subscription(connection: Connection) -> int:
    return add_subscription(connection)


def assert_rule(connection: Connection) -> None:
    assert violations(connection) == []
    assert broken(connection) == []


def expected_process_at(standing: dict[str, Any], *, became_failed: bool) -> datetime | str | None:
    """What `process_at` must be when a plain write asks for this standing; "now": a time."""
    given: datetime | None = standing["process_at"]
    match standing["status"]:
        case CheckpointStatus.FAILED:
            return None if became_failed else given
        case CheckpointStatus.RETRY:
            return given or "now"
    if standing["position"] < 3:
        return given or "now"
    return given if standing["reserved_until"] else None


def assert_stands(now: State, standing: dict[str, Any], process_at: datetime | str | None) -> None:
    assert (now.status, now.position) == (standing["status"], standing["position"])
    assert now.reserved_until == now.reserved == standing["reserved_until"]
    if process_at == "now":
        assert now.process_at is not None
        assert now.process_at > LONG_AGO
    else:
        assert now.process_at == process_at
    assert now.ready == (None if now.reserved_until else now.process_at)


@pytest.mark.parametrize("standing", STANDINGS, ids=_label)
def test_an_insert_stands_as_it_must(
    connection: Connection, subscription: int, standing: dict[str, Any]
) -> None:
    id = add_checkpoint(connection, subscription, **standing)
    assert_stands(
        state(connection, id), standing, expected_process_at(standing, became_failed=False)
    )
    assert_rule(connection)


@pytest.mark.parametrize("after", STANDINGS, ids=_label)
def test_an_update_from_any_standing_stands_as_it_must(
    connection: Connection, subscription: int, after: dict[str, Any]
) -> None:
    for number, before in enumerate(STANDINGS):
        id = add_checkpoint(connection, subscription, f"account-{number}", **before)
        connection.execute(
            update(checkpoints)
            .where(checkpoints.c.id == id)
            .values(
                stream_position=after["position"],
                status=after["status"],
                process_at=after["process_at"],
                reserved_until=after["reserved_until"],
            )
        )
        became_failed = before["status"] is not CheckpointStatus.FAILED
        assert_stands(
            state(connection, id), after, expected_process_at(after, became_failed=became_failed)
        )
    assert_rule(connection)


@pytest.mark.parametrize(
    "change",
    [
        {"status": "active"},
        {"status": "retry"},
        {"status": "failed"},
        {"stream_position": 0},
        {"stream_position": 3},
        {"stream_position": 9},
        {"stream_version": 0},
        {"stream_version": 9},
        {"process_at": None},
        {"process_at": LONG_AGO},
        {"process_at": FAR_AHEAD},
        {"reserved_until": None},
        {"reserved_until": LONG_AGO},
        {"reserved_until": FAR_AHEAD},
        {"retries": None, "retry_attempts": 0},
        {"stream_name": "renamed"},
    ],
    ids=lambda change: " ".join(f"{name}={value}" for name, value in change.items()),
)
def test_an_update_of_one_column_keeps_the_rule_from_any_standing(
    connection: Connection, subscription: int, change: dict[str, Any]
) -> None:
    for number, before in enumerate(STANDINGS):
        id = add_checkpoint(connection, subscription, f"account-{number}", **before)
        with connection.begin_nested() as savepoint:
            connection.execute(update(checkpoints).where(checkpoints.c.id == id).values(**change))
            assert_rule(connection)
            savepoint.rollback()
    if "stream_name" not in change:
        connection.execute(update(checkpoints).values(**change))
        assert_rule(connection)


def test_an_update_of_the_primary_key_is_refused_or_keeps_the_rule(
    connection: Connection, subscription: int
) -> None:
    for number, standing in enumerate(STANDINGS):
        id = add_checkpoint(connection, subscription, f"account-{number}", **standing)
        for values in ({}, {"stream_version": 9}, {"reserved_until": None}):
            with connection.begin_nested() as savepoint:
                try:
                    connection.execute(
                        update(checkpoints)
                        .where(checkpoints.c.id == id)
                        .values(id=id + 1_000_000, **values)
                    )
                    connection.execute(text("SET CONSTRAINTS ALL IMMEDIATE"))
                except IntegrityError:
                    savepoint.rollback()
                else:
                    assert_rule(connection)
                    savepoint.rollback()
    assert_rule(connection)


def test_a_checkpoint_may_move_to_another_subscription(
    connection: Connection, subscription: int
) -> None:
    other = add_subscription(connection, "other", group="others")
    for number, standing in enumerate(STANDINGS):
        add_checkpoint(connection, subscription, f"account-{number}", **standing)
    connection.execute(update(checkpoints).values(subscription_id=other))
    assert_rule(connection)
    assert reserve(connection, group="others").subscription_id == other


def test_a_delete_takes_the_hot_rows_along(connection: Connection, subscription: int) -> None:
    add_checkpoint(connection, subscription, "account-1")
    add_checkpoint(connection, subscription, "account-2", reserved_until=FAR_AHEAD)
    connection.execute(delete(checkpoints))
    assert_rule(connection)
    for table in (checkpoints_ready, checkpoints_reserved):
        assert connection.execute(select(func.count()).select_from(table)).scalar_one() == 0


def test_truncate_cascade_takes_the_hot_rows_along(
    connection: Connection, subscription: int
) -> None:
    add_checkpoint(connection, subscription, "account-1")
    add_checkpoint(connection, subscription, "account-2", reserved_until=FAR_AHEAD)
    connection.execute(text("TRUNCATE checkpoints.checkpoints CASCADE"))
    assert_rule(connection)
    assert connection.execute(select(func.count()).select_from(checkpoints_ready)).scalar_one() == 0


def test_an_update_that_moves_no_time_rewrites_no_hot_row(
    connection: Connection, subscription: int
) -> None:
    ready = add_checkpoint(connection, subscription, "account-1", process_at=LONG_AGO)
    reserved = add_checkpoint(connection, subscription, "account-2", reserved_until=FAR_AHEAD)
    retry = add_checkpoint(
        connection, subscription, "account-3", status="retry", process_at=FAR_AHEAD
    )
    connection.commit()

    def physical() -> list[Any]:
        """Where the hot rows lie, and who wrote them."""
        return [
            connection.execute(
                text(f"SELECT id, ctid::text, xmin::text FROM checkpoints.{table} ORDER BY id")
            ).all()
            for table in ("checkpoints_ready", "checkpoints_reserved")
        ]

    before = physical()
    assert [[row.id for row in rows] for rows in before] == [[ready, retry], [reserved]]
    connection.commit()
    connection.execute(
        record_checkpoints(
            [CheckpointRecord(subscription, f"account-{number}", 9) for number in (1, 2, 3)]
        )
    )
    connection.commit()
    for change in (
        {"stream_version": checkpoints.c.stream_version + 1},
        {"stream_position": 1},
        {"retry_attempts": 7},
        {"updated_at": LONG_AGO},
        {"process_at": checkpoints.c.process_at},
        {"reserved_until": checkpoints.c.reserved_until, "stream_position": 2},
    ):
        connection.execute(update(checkpoints).values(change))
        connection.commit()
    assert physical() == before


def test_updated_at_is_the_time_of_the_statement_whatever_is_given(
    connection: Connection, subscription: int
) -> None:
    id = add_checkpoint(connection, subscription)
    connection.commit()
    connection.execute(select(1))
    before = connection.execute(select(func.clock_timestamp())).scalar_one()
    connection.execute(
        update(checkpoints).where(checkpoints.c.id == id).values(updated_at=LONG_AGO)
    )
    updated_at = connection.execute(select(checkpoints.c.updated_at)).scalar_one()
    assert before <= updated_at <= connection.execute(select(func.clock_timestamp())).scalar_one()


class TestBrokenByReplica:
    """`session_replication_role = replica` goes round the triggers."""

    # Violations: how the checkpoint stands first, the SQL that breaks it, and how it stands mended.
    CASES: tuple[tuple[str, dict[str, Any], tuple[str, ...]], ...] = (
        (
            "lags and has no process_at",
            {},
            (
                "UPDATE checkpoints.checkpoints SET process_at = NULL",
                "DELETE FROM checkpoints.checkpoints_ready",
            ),
        ),
        (
            "waits for a retry and has no process_at",
            {"status": "retry"},
            (
                "UPDATE checkpoints.checkpoints SET process_at = NULL",
                "DELETE FROM checkpoints.checkpoints_ready",
            ),
        ),
        (
            "has nothing to do and a process_at",
            {},
            ("UPDATE checkpoints.checkpoints SET stream_position = stream_version",),
        ),
        (
            "is missing in checkpoints_ready",
            {},
            ("DELETE FROM checkpoints.checkpoints_ready",),
        ),
        (
            "has another process_at in checkpoints_ready",
            {},
            ("UPDATE checkpoints.checkpoints_ready SET process_at = '2001-01-01'",),
        ),
        (
            "must not be in checkpoints_ready",
            {},
            ("UPDATE checkpoints.checkpoints SET status = 'failed', process_at = NULL",),
        ),
        (
            "is missing in checkpoints_reserved",
            {"reserved_until": FAR_AHEAD},
            ("DELETE FROM checkpoints.checkpoints_reserved",),
        ),
        (
            "has another reserved_until in checkpoints_reserved",
            {"reserved_until": FAR_AHEAD},
            ("UPDATE checkpoints.checkpoints_reserved SET reserved_until = '2001-01-01'",),
        ),
        (
            "must not be in checkpoints_reserved",
            {"reserved_until": FAR_AHEAD, "position": 3},
            ("UPDATE checkpoints.checkpoints SET reserved_until = NULL",),
        ),
    )

    @pytest.mark.parametrize(
        ("violation", "columns", "breaking"), CASES, ids=lambda case: str(case)[:50]
    )
    def test_is_found_and_mended(
        self,
        connection: Connection,
        subscription: int,
        violation: str,
        columns: dict[str, Any],
        breaking: tuple[str, ...],
    ) -> None:
        id = add_checkpoint(connection, subscription, **columns)
        connection.execute(text("SET LOCAL session_replication_role = 'replica'"))
        for sql in breaking:
            connection.execute(text(sql))
        connection.execute(text("SET LOCAL session_replication_role = 'origin'"))
        before = state(connection, id)
        assert violations(connection) == [(id, violation)]
        assert broken(connection) != []

        assert [tuple(row) for row in connection.execute(repair_checkpoints())] == [
            (id, [violation])
        ]

        assert_rule(connection)
        assert connection.execute(repair_checkpoints()).all() == []
        after = state(connection, id)
        assert (after.version, after.position, after.status, after.reserved_until) == (
            before.version,
            before.position,
            before.status,
            before.reserved_until,
        )

    def test_both_tables_at_once(self, connection: Connection, subscription: int) -> None:
        id = add_checkpoint(connection, subscription)
        connection.execute(text("SET LOCAL session_replication_role = 'replica'"))
        connection.execute(update(checkpoints).values(reserved_until=FAR_AHEAD))
        connection.execute(text("SET LOCAL session_replication_role = 'origin'"))
        assert violations(connection) == [
            (id, "is missing in checkpoints_reserved"),
            (id, "must not be in checkpoints_ready"),
        ]
        assert len(connection.execute(repair_checkpoints()).all()) == 1
        assert_rule(connection)
        after = state(connection, id)
        assert (after.ready, after.reserved) == (None, FAR_AHEAD)

    @pytest.mark.parametrize("table", ["checkpoints_ready", "checkpoints_reserved"])
    def test_a_plain_write_of_the_times_mends_as_well(
        self, connection: Connection, subscription: int, table: str
    ) -> None:
        add_checkpoint(connection, subscription, "account-1")
        add_checkpoint(connection, subscription, "account-2", reserved_until=FAR_AHEAD)
        connection.execute(text(f"DELETE FROM checkpoints.{table}"))
        assert broken(connection) != []
        connection.execute(update(checkpoints).values(process_at=checkpoints.c.process_at))
        assert_rule(connection)

    @pytest.mark.parametrize(
        "columns", [{}, {"reserved_until": FAR_AHEAD}], ids=["ready", "reserved"]
    )
    def test_a_hot_row_of_no_checkpoint_is_found_and_mended(
        self, connection: Connection, subscription: int, columns: dict[str, Any]
    ) -> None:
        """Replica mode turns the foreign keys' cascade off too."""
        id = add_checkpoint(connection, subscription, **columns)
        connection.execute(text("SET LOCAL session_replication_role = 'replica'"))
        connection.execute(delete(checkpoints))
        connection.execute(text("SET LOCAL session_replication_role = 'origin'"))
        assert broken(connection) != []
        assert [row.id for row in connection.execute(audit_checkpoints())] == [id]
        connection.execute(repair_checkpoints())
        assert_rule(connection)


class Listener:
    """What a second session hears, up to now."""

    def __init__(self, url: URL, channel: str = "checkpoints") -> None:
        conninfo = url.set(drivername="postgresql").render_as_string(hide_password=False)
        self.connection = psycopg.connect(conninfo, autocommit=True)
        self.marking = psycopg.connect(conninfo, autocommit=True)
        self.connection.execute(f'LISTEN "{channel}"')
        self.connection.execute("LISTEN so_far")

    def heard(self) -> list[tuple[str, str]]:
        """Channel and payload of each notification since the last call."""
        # Notifications are queued in the order of the commits: a mark of our own comes last. It
        # is sent by another connection: psycopg before 3.2.4 forgets what comes while one executes.
        self.marking.execute("NOTIFY so_far")
        heard: list[tuple[str, str]] = []
        for notification in self.connection.notifies(timeout=60):
            if notification.channel == "so_far":
                return heard
            heard.append((notification.channel, notification.payload))
        raise AssertionError("not even our own mark was heard")

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: object) -> None:
        self.connection.close()
        self.marking.close()


@pytest.fixture
def listener(migrated_url: URL) -> Iterator[Listener]:
    with Listener(migrated_url) as made:
        yield made


ONCE = [("checkpoints", GROUP)]
SERVED = {SubscriptionStatus.ACTIVE, SubscriptionStatus.REPLAY}


class TestNotification:
    @pytest.fixture
    def subscription(self, connection: Connection, listener: Listener) -> int:
        id = add_subscription(connection)
        connection.commit()
        listener.heard()
        return id

    def test_of_what_is_recorded_names_the_group_once_a_transaction(
        self, connection: Connection, subscription: int, listener: Listener
    ) -> None:
        other = add_subscription(connection, "mails", group="others")
        connection.commit()
        listener.heard()
        for version in (1, 2):
            connection.execute(
                record_checkpoints(
                    [
                        CheckpointRecord(id, f"account-{version}-{number}", version)
                        for number in range(50)
                        for id in (subscription, other)
                    ]
                )
            )
        assert listener.heard() == []
        connection.commit()
        assert sorted(listener.heard()) == [*ONCE, ("checkpoints", "others")]

    def test_is_not_sent_when_it_was_ready_already(
        self, connection: Connection, subscription: int, listener: Listener
    ) -> None:
        for version, heard in ((1, ONCE), (2, []), (2, [])):
            connection.execute(
                record_checkpoints([CheckpointRecord(subscription, "account-1", version)])
            )
            connection.commit()
            assert listener.heard() == heard

    def test_is_sent_when_it_was_caught_up(
        self, connection: Connection, subscription: int, listener: Listener
    ) -> None:
        add_checkpoint(connection, subscription, position=3)
        connection.commit()
        assert listener.heard() == []
        connection.execute(record_checkpoints([CheckpointRecord(subscription, "account-1", 4)]))
        connection.commit()
        assert listener.heard() == ONCE

    def test_is_not_sent_while_it_is_reserved_waits_for_a_retry_or_has_failed(
        self, connection: Connection, subscription: int, listener: Listener
    ) -> None:
        add_checkpoint(connection, subscription, "account-1", reserved_until=FAR_AHEAD)
        add_checkpoint(connection, subscription, "account-2", status="retry", process_at=FAR_AHEAD)
        add_checkpoint(connection, subscription, "account-3", status="failed")
        connection.commit()
        listener.heard()
        connection.execute(
            record_checkpoints(
                [CheckpointRecord(subscription, f"account-{number}", 9) for number in (1, 2, 3)]
            )
        )
        connection.commit()
        assert listener.heard() == []

    def test_of_a_schedule(
        self, connection: Connection, subscription: int, listener: Listener
    ) -> None:
        id = add_checkpoint(connection, subscription, status="failed")
        connection.commit()
        assert listener.heard() == []
        connection.execute(schedule_checkpoints([id], LONG_AGO))
        connection.commit()
        assert listener.heard() == ONCE

    def test_is_not_sent_by_the_consumer_that_goes_on(
        self, connection: Connection, subscription: int, listener: Listener
    ) -> None:
        add_checkpoint(connection, subscription)
        connection.commit()
        listener.heard()

        held = reserve(connection)
        connection.execute(update_checkpoint_position(held.id, held.reserved_until, 1))
        connection.commit()
        assert listener.heard() == []

        held = reserve(connection)
        connection.execute(release_checkpoint_reservation(held.id, held.reserved_until))
        connection.commit()
        assert listener.heard() == []

        held = reserve(connection)
        connection.execute(
            record_checkpoint_error(
                held.id,
                held.reserved_until,
                0,
                status=CheckpointStatus.RETRY,
                retry_attempts=1,
                error="refused",
                process_at=LONG_AGO,
            )
        )
        connection.commit()
        assert listener.heard() == []

    def test_is_not_sent_when_nothing_becomes_ready(
        self, connection: Connection, subscription: int, listener: Listener
    ) -> None:
        id = add_checkpoint(connection, subscription, version=1)
        add_checkpoint(connection, subscription, "account-2")
        connection.commit()
        listener.heard()
        connection.execute(skip_checkpoints([id]))
        connection.execute(advance_lagging_subscription_checkpoints(subscription))
        connection.execute(recover_expired_checkpoint_reservations(GROUP))
        connection.execute(repair_checkpoints())
        connection.execute(delete(checkpoints))
        connection.commit()
        assert listener.heard() == []

    def test_is_not_sent_when_it_is_rolled_back(
        self, connection: Connection, subscription: int, listener: Listener
    ) -> None:
        add_checkpoint(connection, subscription)
        connection.rollback()
        assert listener.heard() == []

    @pytest.mark.parametrize("status", list(SubscriptionStatus))
    def test_is_of_subscriptions_that_consumers_are_given(
        self,
        connection: Connection,
        subscription: int,
        listener: Listener,
        status: SubscriptionStatus,
    ) -> None:
        connection.execute(set_subscription_status(subscription, status))
        connection.commit()
        listener.heard()
        add_checkpoint(connection, subscription)
        connection.commit()
        assert listener.heard() == (ONCE if status in SERVED else [])

    @pytest.mark.parametrize(
        ("before", "after"),
        list(itertools.product(SubscriptionStatus, SubscriptionStatus)),
    )
    def test_of_a_subscription_that_is_served_as_it_was_not_before(
        self,
        connection: Connection,
        subscription: int,
        listener: Listener,
        before: SubscriptionStatus,
        after: SubscriptionStatus,
    ) -> None:
        connection.execute(set_subscription_status(subscription, before))
        connection.commit()
        listener.heard()
        connection.execute(set_subscription_status(subscription, after))
        connection.commit()
        # From active to replay too: consumers of the other replay mode may sleep.
        assert listener.heard() == (ONCE if after in SERVED and after != before else [])

    def test_can_be_switched_off(
        self, connection: Connection, subscription: int, listener: Listener
    ) -> None:
        connection.execute(text("SET checkpoints.notify = 'off'"))
        id = add_checkpoint(connection, subscription, status="failed")
        connection.execute(schedule_checkpoints([id], LONG_AGO))
        connection.execute(record_checkpoints([CheckpointRecord(subscription, "account-2", 1)]))
        connection.execute(set_subscription_status(subscription, SubscriptionStatus.PAUSED))
        connection.execute(set_subscription_status(subscription, SubscriptionStatus.ACTIVE))
        connection.commit()
        assert listener.heard() == []
        connection.execute(text("SET checkpoints.notify = 'on'"))
        connection.execute(record_checkpoints([CheckpointRecord(subscription, "account-3", 1)]))
        connection.commit()
        assert listener.heard() == ONCE

    def test_the_channel_is_the_schema(self, database_url: URL) -> None:
        schema = 'my "other" schema'
        with disposed(
            create_engine(
                database_url, execution_options={"schema_translate_map": {"checkpoints": schema}}
            )
        ) as engine:
            metadata.create_all(engine)
            with Listener(database_url, schema.replace('"', '""')) as listener:
                _record_one(engine)
                assert listener.heard() == [(schema, GROUP)]


def _record_one(engine: Engine) -> None:
    with engine.begin() as connection:
        id = connection.execute(add_or_update_subscription(GROUP, "balances")).one()[0]
        connection.execute(set_subscription_status(id, SubscriptionStatus.ACTIVE))
        connection.execute(record_checkpoints([CheckpointRecord(id, "account-1", 1)]))


def test_many_rows_are_looked_up_by_plans_that_were_made_when_there_were_few(
    connection: Connection,
) -> None:
    """The hot tables are next to empty most of the time: such a plan may scan one for each row."""
    subscription = add_subscription(connection)
    connection.exec_driver_sql(
        "INSERT INTO checkpoints.checkpoints (subscription_id, stream_name)"
        f" SELECT {subscription}, 'account-' || n FROM generate_series(1, 3000) AS n"
    )
    connection.exec_driver_sql("UPDATE checkpoints.checkpoints SET stream_version = 1 WHERE id < 5")
    connection.exec_driver_sql("ANALYZE")
    connection.commit()
    update_all = (
        "UPDATE checkpoints.checkpoints SET reserved_until = {} WHERE process_at IS NOT NULL"
    )
    reserve_and_release = [update_all.format(value) for value in ("'2090-01-01'", "NULL")]
    for _ in range(8):
        for statement in reserve_and_release:
            connection.exec_driver_sql(statement)
    connection.exec_driver_sql("UPDATE checkpoints.checkpoints SET stream_version = 1")
    connection.commit()
    for statement in reserve_and_release:
        connection.exec_driver_sql(statement)
    scanned = connection.execute(
        text(
            "SELECT sum(seq_tup_read) FROM pg_stat_xact_user_tables"
            " WHERE schemaname = 'checkpoints' AND relname LIKE 'checkpoints\\__%'"
        )
    ).scalar_one()
    assert scanned == 0
