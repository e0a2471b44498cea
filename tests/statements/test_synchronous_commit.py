"""A reservation whose commit need not wait for the disk."""

from __future__ import annotations

import pytest
from sqlalchemy import Connection

from checkpoints import reserve_next_available_checkpoint
from tests.support.factories import GROUP, MINUTE, add_checkpoint, add_subscription


def setting(connection: Connection) -> str:
    return str(connection.exec_driver_sql("SHOW synchronous_commit").scalar_one())


@pytest.fixture(autouse=True)
def waits_for_the_disk(connection: Connection) -> None:
    """The test server does not, to be quick."""
    connection.exec_driver_sql("SET synchronous_commit = on")
    connection.commit()


@pytest.mark.parametrize(("synchronous", "told"), [(True, "on"), (False, "off")])
def test_the_transaction_that_reserved_does_not_wait(
    connection: Connection, synchronous: bool, told: str
) -> None:
    subscription = add_subscription(connection)
    ids = {add_checkpoint(connection, subscription, f"account-{n}") for n in range(3)}
    connection.commit()

    statement = reserve_next_available_checkpoint(
        GROUP, MINUTE, limit=9, synchronous_commit=synchronous
    )
    rows = connection.execute(statement).all()

    assert {row.id for row in rows} == ids
    assert setting(connection) == told
    connection.commit()
    assert setting(connection) == "on"


def test_a_subtransaction_that_is_rolled_back_changes_nothing(connection: Connection) -> None:
    add_checkpoint(connection, add_subscription(connection), "account-1")
    nested = connection.begin_nested()
    statement = reserve_next_available_checkpoint(GROUP, MINUTE, synchronous_commit=False)
    assert len(connection.execute(statement).all()) == 1
    nested.rollback()
    assert setting(connection) == "on"
