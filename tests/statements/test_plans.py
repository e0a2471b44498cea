"""The plans of the hot statements, as the server makes them.

A generic plan, of a prepared statement, is made without the values: a LIMIT or an array of unknown
size must not lead to a scan of the main table. A custom one knows them, as for the first five
executions, and must not be worse for it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, Select, create_engine, make_url

from checkpoints import reserve_next_available_checkpoint
from tests.support.databases import Databases, disposed
from tests.support.factories import FAR_AHEAD, add_subscription
from tests.support.samples import SAMPLES, TIMEOUT

CHECKPOINTS = 200_000


@pytest.fixture(scope="module")
def filled(databases: Databases) -> Iterator[Engine]:
    """So many that a scan is never the cheapest, with a few hundred at hand."""
    url = databases.create_migrated()
    with disposed(create_engine(url)) as engine:
        with engine.begin() as connection:
            subscription = add_subscription(connection)
            connection.exec_driver_sql(
                "INSERT INTO checkpoints.checkpoints"
                " (subscription_id, stream_name, stream_version, stream_position, reserved_until)"
                f" SELECT {subscription}, 'account-' || n, 1,"
                " CASE WHEN mod(n, 400) = 0 THEN 0 ELSE 1 END,"
                f" CASE WHEN mod(n, 1000) = 1 THEN '{FAR_AHEAD}'::timestamptz END"
                f" FROM generate_series(1, {CHECKPOINTS}) AS n"
            )
            connection.exec_driver_sql(
                "UPDATE checkpoints.checkpoints SET status = 'failed' WHERE mod(id, 10000) = 2"
            )
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")
        yield engine
    databases.drop(url)


def generic_plan(connection: Connection, name: str) -> str:
    """EXPLAIN of the statement as it is prepared on the server."""
    compiled = SAMPLES[name].compile(dialect=make_url("postgresql+psycopg://").get_dialect()())
    values: dict[str, Any] = dict(compiled.params)
    numbered: list[str] = []

    def number(match: re.Match[str]) -> str:
        if match[1] not in numbered:
            numbered.append(match[1])
        return f"${numbered.index(match[1]) + 1}"

    text = re.sub(r"%\((\w+)\)s", number, str(compiled)).replace("%%", "%")
    nulls = ", ".join("NULL" for _ in numbered)
    assert values.keys() == set(numbered)
    connection.exec_driver_sql("SET plan_cache_mode = force_generic_plan")
    connection.exec_driver_sql(f"PREPARE planned AS {text}")
    arguments = f"({nulls})" if numbered else ""
    rows = connection.exec_driver_sql(f"EXPLAIN EXECUTE planned{arguments}").scalars().all()
    connection.exec_driver_sql("DEALLOCATE planned")
    return "\n".join(rows)


def custom_plan(connection: Connection, name: str) -> str:
    """EXPLAIN of the statement with the values of its sample."""
    compiled = SAMPLES[name].compile(dialect=connection.dialect)
    connection.exec_driver_sql("SET plan_cache_mode = force_custom_plan")
    rows = connection.exec_driver_sql(f"EXPLAIN {compiled}", compiled.params).scalars().all()
    return "\n".join(rows)


# Also what a hash join over the whole table would read.
SCAN_OF_MAIN = "Seq Scan on checkpoints "

ON_THE_HOT_PATH = [
    "record_checkpoints",
    "reserve_next_available_checkpoint",
    "update_checkpoint_position",
    "update_checkpoint_positions",
    "advance_lagging_subscription_checkpoints",
    "record_checkpoint_error",
    "release_checkpoint_reservation",
    "extend_checkpoint_reservation",
    "recover_expired_checkpoint_reservations",
    "skip_checkpoints",
    "schedule_checkpoints",
    "lock_checkpoint",
    "ensure_checkpoint_exists",
    "get_checkpoint",
    "list_reservations",
    "list_lagging",
    "list_retries",
    "list_failed",
    "get_metrics",
    "finish_replay",
    "reset_subscription_checkpoints",
    "delete_subscription_checkpoints",
    "delete_subscription",
]


@pytest.mark.parametrize("name", ON_THE_HOT_PATH)
def test_never_scans_the_main_table(filled: Engine, name: str) -> None:
    with filled.connect() as connection:
        plan = generic_plan(connection, name)
    assert SCAN_OF_MAIN not in plan, plan


@pytest.mark.parametrize("planned", [generic_plan, custom_plan])
@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("reserve_next_available_checkpoint", "ix_checkpoints_ready_subscription_id_process_at"),
        (
            "recover_expired_checkpoint_reservations",
            "ix_checkpoints_reserved_subscription_id_reserved_until",
        ),
    ],
)
def test_walks_the_hot_table_by_its_time(
    filled: Engine, name: str, index: str, planned: Callable[[Connection, str], str]
) -> None:
    """Oldest first without a sort, so that it stops at the limit."""
    with filled.connect() as connection:
        plan = planned(connection, name)
    assert f"Index Scan using {index}" in plan, plan
    by_subscription = plan[plan.rindex(index) :].partition("CTE")[0]
    assert "LockRows" in by_subscription, plan
    assert "Sort" not in by_subscription, plan
    assert "Bitmap" not in plan, plan


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("reset_subscription_checkpoints", "uq_checkpoints_subscription_id_stream_name"),
        ("delete_subscription_checkpoints", "uq_checkpoints_subscription_id_stream_name"),
    ],
)
def test_a_batch_stops_at_its_limit(filled: Engine, name: str, index: str) -> None:
    """In the common order without a sort: of a million checkpoints it reads one batch."""
    with filled.connect() as connection:
        plan = generic_plan(connection, name)
    candidates = plan[plan.index("Limit") :].partition("CTE taken_back")[0]
    candidates = candidates.partition("CTE deleted_checkpoints")[0]
    assert f"Index Scan using {index}" in candidates, plan
    assert "Sort" not in candidates, plan


def test_the_end_of_a_replay_is_looked_up_by_subscription(filled: Engine) -> None:
    with filled.connect() as connection:
        plan = generic_plan(connection, "finish_replay")
    for table, time in (("ready", "process_at"), ("reserved", "reserved_until")):
        index = f"ix_checkpoints_{table}_subscription_id_{time}"
        assert re.search(rf"Index (Only )?Scan using {index}", plan), plan
        assert f"Index Cond: ((ROW(subscription_id, {time}) >= ROW($1" in plan, plan


PLANNED_ONCE: dict[str, Select[*tuple[Any, ...]]] = {
    name: SAMPLES[name]
    for name in (
        "record_checkpoints",
        "reserve_next_available_checkpoint",
        "update_checkpoint_position",
        "update_checkpoint_positions",
        "record_checkpoint_error",
        "release_checkpoint_reservation",
        "extend_checkpoint_reservation",
        "recover_expired_checkpoint_reservations",
        "record_expired_checkpoint_reservations",
        "get_next_process_at",
    )
} | {
    "reserve of a few subscriptions": reserve_next_available_checkpoint(
        "accounts", TIMEOUT, subscription_names=["balances-1"], limit=20, synchronous_commit=False
    )
}


@pytest.mark.parametrize("name", PLANNED_ONCE)
def test_is_planned_once_for_a_connection(filled: Engine, name: str) -> None:
    """A value that makes a custom plan look cheaper has the server plan at each execution.

    That takes longer than the execution.
    """
    with filled.connect() as connection:
        connection.exec_driver_sql("SET plan_cache_mode = auto")
        # So many are ready that the plan for one is much cheaper than the one for any number.
        connection.exec_driver_sql(
            "UPDATE checkpoints.checkpoints SET stream_version = 2 WHERE mod(id, 4) = 0"
        )
        for number in range(3):
            add_subscription(connection, f"balances-{number}")
        add_subscription(connection, "of others", group="others")
        connection.exec_driver_sql(
            "ANALYZE checkpoints.checkpoints_ready, checkpoints.subscriptions,"
            " checkpoints.subscription_groups"
        )
        for _ in range(12):
            connection.execute(PLANNED_ONCE[name])
        generic, custom = connection.exec_driver_sql(
            "SELECT sum(generic_plans), sum(custom_plans) FROM pg_prepared_statements"
            " WHERE NOT from_sql AND statement LIKE '%%checkpoints%%'"
        ).one()
        connection.rollback()
    assert generic, custom
