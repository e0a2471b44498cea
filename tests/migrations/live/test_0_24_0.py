"""The migration to 0.24.0 while an application of 0.23.0 reads and writes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
from sqlalchemy import URL, Connection, text
from sqlalchemy.exc import OperationalError

from tests.migrations.support import (
    HEAD,
    ROOT,
    UNPROJECTED,
    VERSION,
    WAITS_FOR_A_ROW,
    WAITS_FOR_THE_TABLE,
    downgrade,
    engine_of,
    eventually,
    fill,
    upgrade,
)
from tests.support.factories import violations

WITHOUT_SUBSCRIPTION = text(
    "SELECT id FROM checkpoints.checkpoints_ready WHERE subscription_id IS NULL "
    "UNION ALL SELECT id FROM checkpoints.checkpoints_reserved WHERE subscription_id IS NULL"
)
# As 0.23.0 had them; one of them the benchmark runs too.
STATEMENTS = {
    "reserve": ROOT / "tests" / "benchmarks" / "sql" / "0_23_0" / "reserve.sql",
    "recover": Path(__file__).with_name("recover_0_23_0.sql"),
}
INVALID = text("SELECT CAST(indexrelid AS regclass) FROM pg_index WHERE NOT indisvalid")
WAITS_FOR_TRANSACTIONS = """
SELECT pid FROM pg_stat_activity
WHERE datname = current_database() AND query LIKE 'CREATE INDEX CONCURRENTLY%'
  AND wait_event = 'virtualxid'
"""


@pytest.fixture(name="url")
def url_at_0_23_0(database_url: URL) -> URL:
    """A database at 0.23.0 with hot rows for three batches."""
    upgrade(database_url, "0.22.0")
    with engine_of(database_url) as engine, engine.connect() as connection:
        fill(connection, 18_000)
    upgrade(database_url, "0.23.0")
    return database_url


def terminate(connection: Connection, pid: int) -> None:
    assert connection.scalar(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
    connection.commit()


def change(connection: Connection, *ids: int) -> None:
    """Have rows reserved without a commit, in the order given. It must not have to wait."""
    connection.execute(text("SET LOCAL lock_timeout = '500ms'"))
    for id in ids:
        connection.execute(
            text("UPDATE checkpoints.checkpoints SET reserved_until = now() WHERE id = :id"),
            {"id": id},
        )


def test_an_upgrade_that_is_interrupted_in_its_batches_goes_on(
    url: URL, connection: Connection, other: Connection, in_a_thread: ThreadPoolExecutor
) -> None:
    connection.execute(text("SELECT FROM checkpoints.checkpoints WHERE id = 8000 FOR UPDATE"))
    migration = in_a_thread.submit(upgrade, url)
    pid = eventually(other, WAITS_FOR_A_ROW)

    # All the others are done, and free.
    assert other.scalars(WITHOUT_SUBSCRIPTION).all() == [8000]
    change(other, 1, 7999, 8001, 18_000)
    other.commit()

    terminate(other, pid)
    with pytest.raises(OperationalError, match="terminating connection"):
        migration.result()
    assert other.scalar(VERSION) == "0.23.0"
    other.rollback()
    connection.rollback()
    # The application meets the row that was left, and so mends it.
    change(connection, 8000)
    connection.commit()
    assert other.scalars(WITHOUT_SUBSCRIPTION).all() == []
    other.rollback()

    upgrade(url)
    assert violations(other) == []
    assert other.scalar(VERSION) == HEAD


def test_an_index_that_was_left_half_built_is_built_anew(
    url: URL, connection: Connection, other: Connection, in_a_thread: ThreadPoolExecutor
) -> None:
    connection.execution_options(isolation_level="REPEATABLE READ")
    assert connection.scalar(text("SELECT count(*) FROM pg_class"))
    migration = in_a_thread.submit(upgrade, url)
    terminate(other, eventually(other, WAITS_FOR_TRANSACTIONS))
    with pytest.raises(OperationalError, match="terminating connection"):
        migration.result()
    assert other.scalars(INVALID).all() != []
    other.rollback()

    connection.rollback()
    upgrade(url)
    assert other.scalars(INVALID).all() == []
    assert other.scalar(VERSION) == HEAD


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_a_writer_in_another_order_is_no_victim_of_the_batches(
    *,
    url: URL,
    connection: Connection,
    other: Connection,
    in_a_thread: ThreadPoolExecutor,
    isolation: str,
) -> None:
    connection.execute(
        text(f"ALTER DATABASE \"{url.database}\" SET default_transaction_isolation = '{isolation}'")
    )
    connection.commit()
    connection.execute(text("SELECT FROM checkpoints.checkpoints WHERE id = 7999 FOR UPDATE"))
    migration = in_a_thread.submit(upgrade, url)
    eventually(other, WAITS_FOR_A_ROW)
    change(connection, 7999, 8000, 7998, 1, 18_000)
    connection.commit()
    migration.result()
    assert violations(connection) == []


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_transaction_that_cannot_see_the_new_hot_rows_fails_and_leaves_none_behind(
    url: URL,
    connection: Connection,
    other: Connection,
    in_a_thread: ThreadPoolExecutor,
    isolation: str,
) -> None:
    connection.execution_options(isolation_level=isolation)
    # Without a lock on the tables, which the migration would wait for.
    assert connection.scalar(text("SELECT count(*) FROM pg_class"))
    migration = in_a_thread.submit(upgrade, url)
    # The indexes are built after the batches, and wait for this transaction.
    eventually(other, WAITS_FOR_TRANSACTIONS)
    with pytest.raises(OperationalError, match="could not serialize access"):
        change(connection, 2)
    connection.rollback()
    migration.result()
    assert violations(other) == []


@pytest.mark.parametrize("statement", STATEMENTS)
def test_the_statements_of_0_23_0_still_work(
    url: URL, connection: Connection, statement: str
) -> None:
    """The application may go on until it is deployed anew."""
    upgrade(url)
    sql = STATEMENTS[statement].read_text()
    values = {
        "reserve_group_name": "accounts",
        "reserve_timeout": "1 min",
        "reserve_subscription_statuses": ["active"],
        "reserve_subscription_names": None,
        "reserve_limit": 10,
        "recover_group_name": "accounts",
        "recover_limit": 10,
    }
    connection.execute(
        text("UPDATE checkpoints.checkpoints SET reserved_until = now() WHERE id < 100")
    )
    connection.commit()
    assert len(connection.exec_driver_sql(sql, values).all()) == 10
    connection.commit()
    assert violations(connection) == []


def test_writers_get_through_while_the_upgrade_waits_for_the_table(
    url: URL, connection: Connection, other: Connection, in_a_thread: ThreadPoolExecutor
) -> None:
    change(connection, 1)
    migration = in_a_thread.submit(upgrade, url)
    eventually(other, WAITS_FOR_THE_TABLE)
    # It waits behind the migration, until that lets the others pass after two seconds.
    other.execute(text("SET LOCAL lock_timeout = '5s'"))
    other.execute(text("UPDATE checkpoints.checkpoints SET stream_version = 8 WHERE id = 2"))
    other.commit()
    assert not migration.done()
    connection.commit()
    migration.result()
    assert violations(other) == []


def test_who_reads_a_hot_table_and_then_writes_is_no_victim_of_the_upgrade(
    url: URL, connection: Connection, other: Connection, in_a_thread: ThreadPoolExecutor
) -> None:
    """The upgrade has locked the main table, and waits for the hot one no longer than a moment."""
    connection.execute(text("SELECT count(*) FROM checkpoints.checkpoints_ready"))
    migration = in_a_thread.submit(upgrade, url)
    eventually(
        other,
        "SELECT true FROM pg_locks WHERE NOT granted "
        "AND relation = to_regclass('checkpoints.checkpoints_ready')",
    )
    connection.execute(text("UPDATE checkpoints.checkpoints SET stream_version = 8 WHERE id = 2"))
    connection.commit()
    migration.result()
    assert violations(other) == []


def test_who_has_one_hot_table_and_wants_the_other_is_no_victim_of_the_end(
    url: URL, connection: Connection, other: Connection, in_a_thread: ThreadPoolExecutor
) -> None:
    """At the end, too, the upgrade waits for the writers before it locks a hot table."""
    connection.execution_options(isolation_level="REPEATABLE READ")
    connection.execute(text("SELECT count(*) FROM pg_class"))
    migration = in_a_thread.submit(upgrade, url)
    eventually(other, WAITS_FOR_TRANSACTIONS)
    with engine_of(url) as engine, engine.connect() as reader, ThreadPoolExecutor(1) as executor:
        reader.execute(text("SELECT count(*) FROM checkpoints.checkpoints_ready"))
        connection.rollback()
        # It has built the indexes, and comes to the reader.
        eventually(
            other,
            "SELECT true FROM pg_locks WHERE NOT granted "
            "AND relation = to_regclass('checkpoints.checkpoints_ready')",
        )
        # Finds a circle sooner than the upgrade gives up its wait for the second of the two.
        other.execute(text("SET deadlock_timeout = '60ms'"))
        other.execute(
            text(
                "UPDATE checkpoints.checkpoints SET reserved_until = now() + interval '2 hours' "
                "WHERE id = (SELECT min(id) FROM checkpoints.checkpoints_reserved)"
            )
        )
        statement = text("UPDATE checkpoints.checkpoints SET process_at = now() WHERE id = 2")
        writing = executor.submit(other.execute, statement)
        # It may wait behind the upgrade, and that for the reader, which ends before the circle is
        # looked for.
        wait([writing], timeout=0.02)
        reader.rollback()
        assert writing.result(timeout=30).rowcount == 1
        other.commit()
    migration.result()
    assert violations(other) == []


def test_writers_get_through_while_the_downgrade_builds_indexes(
    url: URL, connection: Connection, other: Connection, in_a_thread: ThreadPoolExecutor
) -> None:
    upgrade(url)
    change(connection, 1)
    migration = in_a_thread.submit(downgrade, url, "0.23.0")
    eventually(other, WAITS_FOR_TRANSACTIONS)
    change(other, 2)
    other.commit()
    assert not migration.done()
    connection.commit()
    migration.result()
    assert other.scalars(text(UNPROJECTED)).all() == []
