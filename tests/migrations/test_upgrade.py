"""What an upgrade makes of rows in every state, and a downgrade of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import URL, Connection, Row, text

from checkpoints import (
    advance_lagging_subscription_checkpoints,
    reserve_next_available_checkpoint,
)
from tests.migrations.support import downgrade, engine_of, fill, upgrade
from tests.support.factories import MINUTE, violations

# name: columns in 0.22.0, and where the checkpoint is in 0.23.0.
STATES: dict[str, tuple[dict[str, str], str | None]] = {
    "caught up": ({}, None),
    "lagging": ({"stream_version": "3"}, "ready"),
    "lagging, scheduled later": (
        {"stream_version": "3", "process_at": "'2090-01-01'"},
        "ready",
    ),
    "reserved": (
        {"stream_version": "3", "process_at": "'2020-01-01'", "reserved_until": "'2090-01-01'"},
        "reserved",
    ),
    "reserved and expired": (
        {"stream_version": "3", "process_at": "'2020-01-01'", "reserved_until": "'2020-01-01'"},
        "reserved",
    ),
    "reserved and caught up": ({"reserved_until": "'2090-01-01'"}, "reserved"),
    "reserved retry": (
        {
            "stream_version": "3",
            "status": "'retry'",
            "process_at": "'2020-01-01'",
            "reserved_until": "'2090-01-01'",
        },
        "reserved",
    ),
    "retry": (
        {
            "stream_version": "3",
            "status": "'retry'",
            "process_at": "'2090-01-01'",
            "retry_attempts": "2",
            "retries": """'[{"attempt": 1, "error": "100%"}, {"attempt": 2, "error": null}]'""",
        },
        "ready",
    ),
    "failed": ({"stream_version": "3", "status": "'failed'", "retries": "'[1]'"}, None),
    "failed, scheduled": (
        {"stream_version": "3", "status": "'failed'", "process_at": "'2020-01-01'"},
        "ready",
    ),
    "failed, reserved": (
        {"stream_version": "3", "status": "'failed'", "reserved_until": "'2020-01-01'"},
        "reserved",
    ),
}
# These broke the rule before there was one; with what process_at becomes.
BROKEN: dict[str, tuple[dict[str, str], str | None]] = {
    "retry without process_at": ({"stream_version": "3", "status": "'retry'"}, "ready"),
    "caught up with process_at": ({"process_at": "'2020-01-01'"}, None),
    "reserved retry without process_at": (
        {"stream_version": "3", "status": "'retry'", "reserved_until": "'2020-01-01'"},
        "reserved",
    ),
}
LAGGING_WITHOUT_PROCESS_AT = "lagging without process_at"

ROWS = text("SELECT * FROM checkpoints.checkpoints ORDER BY id")
READY = text(
    "SELECT stream_name FROM checkpoints.checkpoints_ready JOIN checkpoints.checkpoints USING (id)"
)
RESERVED = text(
    "SELECT stream_name FROM checkpoints.checkpoints_reserved "
    "JOIN checkpoints.checkpoints USING (id)"
)


@pytest.fixture(name="connection")
def connection_to_the_old_schema(database_url: URL) -> Iterator[Connection]:
    """A connection to a database at 0.22.0 with a row in every state."""
    upgrade(database_url, "0.22.0")
    with engine_of(database_url) as engine, engine.connect() as connection:
        fill(connection, 0)
        for name, (columns, _) in (STATES | BROKEN).items():
            insert(connection, name, columns)
        # The trigger of 0.22.0 sees to it that there is none; somebody got round it.
        connection.execute(text("SET session_replication_role = replica"))
        insert(connection, LAGGING_WITHOUT_PROCESS_AT, {"stream_version": "3"})
        connection.execute(
            text("UPDATE checkpoints.checkpoints SET created_at = :day, updated_at = :day"),
            {"day": "2021-02-03"},
        )
        connection.execute(text("RESET session_replication_role"))
        connection.commit()
        yield connection


def insert(connection: Connection, name: str, columns: dict[str, str]) -> None:
    connection.execute(
        text(
            "INSERT INTO checkpoints.checkpoints "
            f"({', '.join(['subscription_id', 'stream_name', *columns])}) "
            f"SELECT {', '.join(['min(id)', ':name', *columns.values()])} "
            "FROM checkpoints.subscriptions"
        ),
        {"name": name},
    )


def rows(connection: Connection) -> dict[str, Row[Any]]:
    found = {row.stream_name: row for row in connection.execute(ROWS)}
    connection.rollback()
    return found


def test_every_row_is_projected_and_no_other(connection: Connection, database_url: URL) -> None:
    before = rows(connection)
    upgrade(database_url)

    expected = STATES | BROKEN | {LAGGING_WITHOUT_PROCESS_AT: ({}, "ready")}
    for table, query in (("ready", READY), ("reserved", RESERVED)):
        assert set(connection.scalars(query)) == {
            name for name, (_, place) in expected.items() if place == table
        }
    assert violations(connection) == []
    after = rows(connection)
    assert {name: after[name] for name in STATES} == {name: before[name] for name in STATES}


def test_rows_that_broke_the_rule_are_mended_and_nothing_else_of_them(
    connection: Connection, database_url: URL
) -> None:
    before = rows(connection)
    upgrade(database_url)
    after = rows(connection)
    for name in (*BROKEN, LAGGING_WITHOUT_PROCESS_AT):
        old, new = before[name]._asdict(), after[name]._asdict()
        assert (old.pop("process_at") is None) == (new.pop("process_at") is not None), name
        assert old == new


def test_up_down_and_up_again_keeps_every_row(connection: Connection, database_url: URL) -> None:
    upgrade(database_url)
    upgraded = rows(connection)
    downgrade(database_url, "0.22.0")
    assert rows(connection) == upgraded
    connection.execute(
        text("UPDATE checkpoints.checkpoints SET process_at = NULL WHERE stream_name = 'retry'")
    )
    connection.commit()
    upgrade(database_url)
    again = rows(connection)
    assert again.pop("retry").process_at is not None
    upgraded.pop("retry")
    assert again == upgraded
    assert violations(connection) == []


def test_a_change_after_the_upgrade_is_a_change_again(
    connection: Connection, database_url: URL
) -> None:
    """The projecting of old rows leaves `updated_at`; that must end with it."""
    upgrade(database_url)
    connection.execute(text("SELECT set_config('checkpoints.backfill', 'on', true)"))
    changed = connection.scalar(
        text(
            "UPDATE checkpoints.checkpoints SET retry_attempts = 1 WHERE stream_name = 'lagging' "
            "RETURNING updated_at = statement_timestamp()"
        )
    )
    assert changed


@pytest.fixture
def old_url(database_url: URL) -> URL:
    """A database at 0.22.0 with rows for some batches."""
    upgrade(database_url, "0.22.0")
    with engine_of(database_url) as engine, engine.connect() as connection:
        fill(connection, 22_000)
    return database_url


def test_many_rows_are_projected_in_several_transactions(old_url: URL) -> None:
    with engine_of(old_url) as engine, engine.connect() as connection:
        # Not in id order, and with gaps.
        connection.execute(
            text("DELETE FROM checkpoints.checkpoints WHERE id BETWEEN 3000 AND 4000")
        )
        connection.commit()
        # The second looks through hot rows only.
        for revision, batches in (("0.23.0", 5), ("0.24.0", 3)):
            upgrade(old_url, revision)
            transactions, most = connection.execute(
                text(
                    "SELECT count(*), max(n) FROM (SELECT count(*) AS n FROM ("
                    "SELECT xmin FROM checkpoints.checkpoints_ready "
                    "UNION ALL SELECT xmin FROM checkpoints.checkpoints_reserved"
                    ") AS rows GROUP BY CAST(xmin AS text)) AS transactions"
                )
            ).one()
            connection.rollback()
            assert transactions == batches
            assert most <= 5000
        assert violations(connection) == []


@pytest.fixture
def role(old_url: URL) -> Iterator[str]:
    """A role with an impatient set of defaults, dropped at the end."""
    role = f"{old_url.database}_role"
    with engine_of(old_url) as engine, engine.connect() as connection:
        connection.execute(text(f"CREATE ROLE {role} LOGIN"))
        connection.commit()
        yield role
        connection.rollback()
        connection.execute(text(f"DROP OWNED BY {role} CASCADE"))
        connection.execute(text(f"DROP ROLE {role}"))
        connection.commit()


def give_to(role: str, connection: Connection) -> None:
    """Make a role the owner of all that there is in the schema, and of no more."""
    for kind, name in connection.execute(
        text(
            "SELECT 'TABLE', relname FROM pg_class WHERE relkind = 'r' "
            "AND relnamespace = CAST('checkpoints' AS regnamespace) UNION ALL "
            "SELECT 'TYPE', typname FROM pg_type WHERE typtype = 'e' "
            "AND typnamespace = CAST('checkpoints' AS regnamespace) UNION ALL "
            "SELECT 'FUNCTION', proname FROM pg_proc "
            "WHERE pronamespace = CAST('checkpoints' AS regnamespace)"
        )
    ).all():
        connection.execute(text(f"ALTER {kind} checkpoints.{name} OWNER TO {role}"))
    connection.execute(text(f"GRANT USAGE, CREATE ON SCHEMA checkpoints TO {role}"))
    connection.commit()


@pytest.mark.parametrize("isolation", ["repeatable read", "serializable"])
def test_a_role_that_owns_the_tables_only_can_migrate_whatever_its_settings(
    old_url: URL, role: str, isolation: str
) -> None:
    with engine_of(old_url) as engine, engine.connect() as connection:
        give_to(role, connection)
        for setting, value in {
            "statement_timeout": "50ms",
            "lock_timeout": "50ms",
            "idle_in_transaction_session_timeout": "50ms",
            "default_transaction_isolation": isolation,
        }.items():
            connection.execute(text(f"ALTER ROLE {role} SET {setting} = '{value}'"))
        connection.commit()
        url = old_url.set(username=role)
        upgrade(url)
        assert violations(connection) == []
        connection.rollback()
        downgrade(url, "base")


def test_who_may_write_checkpoints_still_may_after_the_upgrade(old_url: URL, role: str) -> None:
    """The trigger writes the hot tables as the role that writes, which is not the owner."""
    with engine_of(old_url) as engine, engine.connect() as connection:
        connection.execute(text(f"GRANT USAGE ON SCHEMA checkpoints TO {role}"))
        connection.execute(text(f"GRANT SELECT ON ALL TABLES IN SCHEMA checkpoints TO {role}"))
        connection.execute(
            text(f"GRANT INSERT, UPDATE, DELETE ON checkpoints.checkpoints TO {role}")
        )
        connection.execute(text("GRANT SELECT ON checkpoints.checkpoints TO PUBLIC"))
        connection.execute(text("ALTER DEFAULT PRIVILEGES REVOKE EXECUTE ON FUNCTIONS FROM PUBLIC"))
        connection.commit()
        upgrade(old_url)
        connection.execute(text(f"SET ROLE {role}"))
        held = connection.execute(reserve_next_available_checkpoint("accounts", MINUTE)).all()
        assert len(held) == 1
        assert connection.execute(advance_lagging_subscription_checkpoints(1)).all()
        connection.execute(
            text("UPDATE checkpoints.checkpoints SET stream_version = stream_version + 1")
        )
        connection.execute(text("DELETE FROM checkpoints.checkpoints"))
        connection.rollback()
        privileges = {
            (row.grantee, row.table_name, row.privilege_type)
            for row in connection.execute(
                text(
                    "SELECT grantee, table_name, privilege_type "
                    "FROM information_schema.role_table_grants WHERE table_schema = 'checkpoints' "
                    "AND table_name LIKE 'checkpoints\\__%' AND grantee IN (:role, 'PUBLIC')"
                ),
                {"role": role},
            )
        }
        hot = ("checkpoints_ready", "checkpoints_reserved")
        assert privileges == {
            (role, table, privilege)
            for table in hot
            for privilege in ("SELECT", "INSERT", "UPDATE", "DELETE")
        } | {("PUBLIC", table, "SELECT") for table in hot}
