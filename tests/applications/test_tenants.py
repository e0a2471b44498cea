"""Tenants: a schema each, with engines and consumers side by side in one process."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from datetime import timedelta

import pytest
from sqlalchemy import URL, Connection, Engine, create_engine, text

from alembic import command
from checkpoints import (
    CheckpointRecord,
    Checkpoints,
    Reservation,
    SubscriptionStatus,
    alembic_config,
)
from checkpoints.runtime import Consumer
from tests.applications import bank
from tests.support.databases import disposed

# One is case-sensitive, which a channel is only when it is quoted.
TENANTS = ("north", "South Ltd")


class Tenant:
    """An engine that shares the pool of the others, and what its consumer applied."""

    def __init__(self, shared: Engine, schema: str) -> None:
        self.schema = schema
        self.engine = shared.execution_options(schema_translate_map={"checkpoints": schema})
        self.applied: list[str] = []
        self.woken = threading.Event()
        with self.engine.begin() as connection:
            checkpoints = Checkpoints(connection)
            subscription = checkpoints.add_or_update_subscription(bank.GROUP, "balances")
            checkpoints.set_subscription_status(subscription.id, SubscriptionStatus.ACTIVE)
        self.subscription_id = subscription.id

    def record(self, stream_name: str) -> None:
        with self.engine.begin() as connection:
            Checkpoints(connection).record_checkpoints(
                [CheckpointRecord(self.subscription_id, stream_name, 1)]
            )

    def apply(self, _connection: Connection, reservation: Reservation) -> None:
        self.applied.append(reservation.stream_name)

    def consumer(self) -> Consumer:
        # So seldom does it poll that only a notification can wake it in time.
        return Consumer(self.engine, bank.GROUP, self.apply, poll_interval=timedelta(minutes=10))


@pytest.fixture
def tenants(database_url: URL) -> list[Tenant]:
    for schema in TENANTS:
        command.upgrade(alembic_config(database_url, schema=schema), "head")
    shared = create_engine(database_url, pool_size=20)
    return [Tenant(shared, schema) for schema in TENANTS]


def listening(engine: Engine) -> set[str]:
    with engine.connect() as connection:
        rows = connection.execute(
            text(
                "SELECT query FROM pg_stat_activity"
                " WHERE datname = current_database() AND query LIKE 'LISTEN %'"
            )
        )
        return {row[0] for row in rows}


def test_consumers_of_two_tenants_each_get_their_own_work(tenants: list[Tenant]) -> None:
    north, south = tenants
    with disposed(north.engine):
        # The same ids, groups and streams in both.
        assert north.subscription_id == south.subscription_id
        with ExitStack() as stack:
            for tenant in tenants:
                stack.enter_context(bank.running(tenant.consumer()))
            channels = {'LISTEN "north"', 'LISTEN "South Ltd"'}
            bank.until(lambda: listening(north.engine) == channels, "both listen")
            north.record("account-1")
            bank.until(lambda: north.applied == ["account-1"], "north is woken")
            assert south.applied == []
            south.record("account-1")
            south.record("account-2")
            bank.until(lambda: len(south.applied) == 2, "south is woken")
            assert north.applied == ["account-1"]
        for tenant in tenants:
            bank.assert_sound(tenant.engine)


def test_a_notification_names_the_schema_of_the_tenant(tenants: list[Tenant]) -> None:
    north, south = tenants
    with disposed(north.engine), north.engine.connect() as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        connection.exec_driver_sql('LISTEN "north"')
        connection.exec_driver_sql('LISTEN "South Ltd"')
        connection.commit()
        south.record("account-1")
        # A round trip after the commit: what was notified has come with it.
        connection.exec_driver_sql("SELECT 1")
        heard = [(n.channel, n.payload) for n in driver.notifies(timeout=0)]
        assert heard == [("South Ltd", bank.GROUP)]


def test_one_tenant_that_is_not_migrated_does_not_stop_the_other(
    tenants: list[Tenant],
) -> None:
    north, south = tenants
    with disposed(north.engine):
        with north.engine.begin() as connection:
            connection.exec_driver_sql('ALTER SCHEMA "South Ltd" RENAME TO "gone"')
        north.record("account-1")
        with pytest.raises(Exception, match="South Ltd"):
            south.consumer().drain()
        assert north.consumer().drain() == 1
        bank.assert_sound(north.engine)
