"""A migration while an application of 0.22.0 writes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from sqlalchemy import URL, Connection, text
from sqlalchemy.exc import OperationalError

from tests.migrations.support import (
    HEAD,
    UNPROJECTED,
    VERSION,
    WAITS_FOR_A_ROW,
    WAITS_FOR_THE_TABLE,
    OldApplication,
    alembic,
    downgrade,
    engine_of,
    eventually,
    fill,
    start_alembic,
    upgrade,
)
from tests.support.factories import violations

WRITERS = 8


@pytest.fixture(name="url")
def url_of_the_old_schema(database_url: URL) -> URL:
    """A database at 0.22.0 with rows for three batches."""
    upgrade(database_url, "0.22.0")
    with engine_of(database_url) as engine, engine.connect() as connection:
        fill(connection, 12_000)
    return database_url


def change(connection: Connection, *ids: int, table: str = "checkpoints") -> None:
    """Update rows without a commit, in the order given. It must not have to wait."""
    connection.execute(text("SET LOCAL lock_timeout = '500ms'"))
    for id in ids:
        column = "stream_version" if table == "checkpoints" else "replay_target_position"
        connection.execute(
            text(f"UPDATE checkpoints.{table} SET {column} = 7 WHERE id = :id"), {"id": id}
        )


def test_writers_lose_nothing_and_see_no_error(url: URL) -> None:
    stop = threading.Event()
    errors: list[BaseException] = []
    written = [0] * WRITERS

    def write(number: int) -> None:
        application = OldApplication(seed=number)
        try:
            with engine_of(url) as engine, engine.connect() as connection:
                while not stop.is_set():
                    # What a writer has written last is what the next of its writes counts on.
                    connection.execute(
                        text(
                            "INSERT INTO checkpoints.checkpoints "
                            "(subscription_id, stream_name, stream_version) "
                            "SELECT min(id), :name, 1 FROM checkpoints.subscriptions "
                            "ON CONFLICT (subscription_id, stream_name) DO UPDATE "
                            "SET stream_version = checkpoints.stream_version + 1"
                        ),
                        {"name": f"ledger-{number}"},
                    )
                    application.write(connection)
                    written[number] += 1
        except BaseException as error:
            errors.append(error)
            raise

    with engine_of(url) as engine, engine.connect() as connection:

        def let_write() -> None:
            """Until every writer has written on."""
            goals = [count + 20 for count in written]
            pause = threading.Event()
            while not errors and any(map(int.__lt__, written, goals)):
                pause.wait(0.01)

        with ThreadPoolExecutor(WRITERS) as executor:
            writers = [executor.submit(write, number) for number in range(WRITERS)]
            try:
                for migrate in (
                    upgrade,
                    partial(downgrade, revision="0.22.0"),
                    upgrade,
                ):
                    let_write()
                    migrate(url)
                    if migrate is upgrade:
                        assert violations(connection) == []
                        let_write()
                        assert violations(connection) == []
                    connection.rollback()
            finally:
                stop.set()
            for writer in writers:
                writer.result()
        assert errors == []
        assert violations(connection) == []
        ledger = connection.execute(
            text(
                "SELECT stream_name, stream_version FROM checkpoints.checkpoints "
                "WHERE stream_name LIKE 'ledger-%'"
            )
        )
        assert {row.stream_name: row.stream_version for row in ledger} == {
            f"ledger-{number}": count for number, count in enumerate(written)
        }


def test_an_interrupted_upgrade_goes_on_when_it_is_run_again(
    url: URL, connection: Connection, other: Connection, in_a_thread: ThreadPoolExecutor
) -> None:
    # Not in the way of the migration's lock of the table, as a change would be.
    connection.execute(text("SELECT FROM checkpoints.checkpoints WHERE id = 6001 FOR UPDATE"))
    migration = in_a_thread.submit(upgrade, url)
    pid = eventually(other, WAITS_FOR_A_ROW)

    # All the others are projected, and free.
    assert other.scalars(text(UNPROJECTED)).all() == [6001]
    change(other, 1, 6000, 6002, 12_000)
    other.commit()

    assert other.scalar(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})
    other.commit()
    with pytest.raises(OperationalError, match="terminating connection"):
        migration.result()
    assert other.scalar(VERSION) == "0.22.0"
    other.rollback()
    connection.rollback()
    # The application meets the row that was left.
    change(connection, 6001)
    connection.commit()

    upgrade(url)
    assert violations(other) == []
    assert other.scalar(VERSION) == HEAD


@pytest.mark.parametrize("isolation", ["read committed", "repeatable read", "serializable"])
def test_a_writer_in_another_order_is_no_victim_of_the_backfill(
    *,
    url: URL,
    connection: Connection,
    other: Connection,
    in_a_thread: ThreadPoolExecutor,
    isolation: str,
) -> None:
    """The backfill waits for a row only while it holds no other, and then sees what became of it.

    The isolation level is the default of the database, which the migration must not take.
    """
    connection.execute(
        text(f"ALTER DATABASE \"{url.database}\" SET default_transaction_isolation = '{isolation}'")
    )
    connection.commit()
    connection.execute(text("SELECT FROM checkpoints.checkpoints WHERE id = 4999 FOR UPDATE"))
    migration = in_a_thread.submit(upgrade, url)
    eventually(other, WAITS_FOR_A_ROW)
    change(connection, 4999, 5000, 4998, 1, 12_000)
    connection.commit()
    migration.result()
    assert violations(connection) == []


MIGRATIONS = [
    pytest.param("0.22.0", upgrade, id="upgrade to 0.23.0"),
    pytest.param("0.23.0", partial(downgrade, revision="0.22.0"), id="downgrade to 0.22.0"),
]


@pytest.mark.parametrize(("begin", "migrate"), MIGRATIONS)
def test_writers_get_through_while_the_migration_waits_for_the_table(
    *,
    url: URL,
    connection: Connection,
    other: Connection,
    in_a_thread: ThreadPoolExecutor,
    begin: str,
    migrate: Callable[[URL], None],
) -> None:
    upgrade(url, begin)
    change(connection, 1)
    migration = in_a_thread.submit(migrate, url)
    eventually(other, WAITS_FOR_THE_TABLE)
    # It waits behind the migration, until that lets the others pass after two seconds.
    other.execute(text("SET LOCAL lock_timeout = '5s'"))
    other.execute(text("UPDATE checkpoints.checkpoints SET stream_version = 8 WHERE id = 2"))
    other.commit()
    assert not migration.done()
    eventually(other, WAITS_FOR_THE_TABLE)
    connection.commit()
    migration.result()
    assert other.scalar(VERSION) != begin


@pytest.mark.parametrize(("begin", "migrate"), MIGRATIONS)
@pytest.mark.parametrize(
    ("first", "then"), [("checkpoints", "subscriptions"), ("subscriptions", "checkpoints")]
)
def test_the_migration_holds_no_table_while_it_waits_for_another(
    *,
    url: URL,
    connection: Connection,
    other: Connection,
    in_a_thread: ThreadPoolExecutor,
    begin: str,
    migrate: Callable[[URL], None],
    first: str,
    then: str,
) -> None:
    upgrade(url, begin)
    change(connection, 1, table=first)
    migration = in_a_thread.submit(migrate, url)
    eventually(
        other,
        "SELECT true FROM pg_locks WHERE NOT granted "
        "AND relation = to_regclass('checkpoints.' || :table)",
        table=first,
    )
    change(connection, 1, table=then)
    connection.commit()
    migration.result()


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_transaction_that_cannot_see_the_new_hot_rows_fails_and_leaves_none_behind(
    url: URL, connection: Connection, other: Connection, isolation: str
) -> None:
    connection.execution_options(isolation_level=isolation)
    assert connection.scalar(text("SELECT count(*) FROM checkpoints.checkpoints"))
    upgrade(url, "0.23.0")
    with pytest.raises(OperationalError, match="could not serialize access"):
        connection.execute(
            text("UPDATE checkpoints.checkpoints SET reserved_until = now() WHERE id = 2")
        )
    connection.rollback()
    assert other.scalars(text(UNPROJECTED)).all() == []


def test_two_upgrades_at_once_go_one_after_the_other(database_url: URL) -> None:
    shown = f"url={database_url.render_as_string(hide_password=False)}"
    with engine_of(database_url) as engine, engine.connect() as connection:
        lock = "pg_advisory_lock(hashtextextended('checkpoints migrations checkpoints', 0))"
        connection.execute(text(f"SELECT {lock}"))
        connection.commit()
        with (
            start_alembic("-x", shown, "upgrade", "head") as one,
            start_alembic("-x", shown, "upgrade", "head") as two,
        ):
            eventually(
                connection,
                "SELECT count(*) = 2 FROM pg_stat_activity WHERE datname = current_database() "
                "AND pid <> pg_backend_pid() AND query = 'COMMIT'",
            )
            # To look is not to migrate.
            assert alembic("-x", shown, "current").returncode == 0
            connection.execute(text("SELECT pg_advisory_unlock_all()"))
            connection.commit()
            for process in (one, two):
                _, errors = process.communicate(timeout=60)
                assert process.returncode == 0, errors
                assert "waiting for it" in errors
        assert connection.scalar(VERSION) == HEAD
