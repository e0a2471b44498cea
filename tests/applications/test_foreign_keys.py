"""Tables of the application that refer to checkpoints: they follow deletes, and survive resets."""

from __future__ import annotations

import pytest
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    ForeignKey,
    MetaData,
    Table,
    Text,
    func,
    insert,
    select,
)
from sqlalchemy.exc import IntegrityError

from checkpoints import Checkpoints
from checkpoints.runtime import Consumer
from checkpoints.tables import checkpoints as checkpoints_table
from tests.applications import bank

metadata = MetaData()


def referring(name: str, ondelete: str | None = None) -> Table:
    """A table of the application's own metadata, that refers to the toolkit's column."""
    return Table(
        name,
        metadata,
        Column(
            "checkpoint_id",
            BigInteger,
            ForeignKey(checkpoints_table.c.id, ondelete=ondelete),
            primary_key=True,
        ),
        Column("note", Text),
    )


notes = referring("notes", ondelete="CASCADE")
strict = referring("strict_notes")


@pytest.fixture
def noted(engine: Engine) -> int:
    """A subscription whose three checkpoints are processed and each have a note; its id."""
    metadata.create_all(engine)
    subscription_id = bank.found(engine)
    with engine.begin() as connection:
        for number in range(3):
            bank.append(connection, subscription_id, f"account-{number}", 1)
    assert Consumer(engine, bank.GROUP, bank.apply).drain() == 3
    with engine.begin() as connection:
        connection.execute(
            insert(notes).from_select(
                ["checkpoint_id", "note"],
                select(checkpoints_table.c.id, checkpoints_table.c.stream_name),
            )
        )
    return subscription_id


def counted(connection: Connection, table: Table) -> int:
    return connection.execute(select(func.count()).select_from(table)).scalar_one()


def test_deleting_a_subscription_deletes_what_refers_to_its_checkpoints(
    engine: Engine, noted: int
) -> None:
    with engine.begin() as connection:
        Checkpoints(connection).pause_subscription(noted)
    rounds = []
    while True:
        with engine.begin() as connection:
            toolkit = Checkpoints(connection)
            toolkit.delete_subscription_checkpoints(noted, limit=2)
            rounds.append(counted(connection, notes))
            if toolkit.delete_subscription(noted):
                break
    assert rounds == [1, 0]
    bank.assert_sound(engine)


def test_a_reset_keeps_the_checkpoints_and_what_refers_to_them(engine: Engine, noted: int) -> None:
    with engine.begin() as connection:
        toolkit = Checkpoints(connection)
        toolkit.pause_subscription(noted)
        assert len(toolkit.reset_subscription_checkpoints(noted)) == 3
        connection.execute(bank.balances.delete())
        toolkit.resume_subscription(noted)
        assert counted(connection, notes) == 3
    assert Consumer(engine, bank.GROUP, bank.apply).drain() == 3
    assert bank.balance(engine, "account-0") == 1
    with engine.connect() as connection:
        assert counted(connection, notes) == 3
    bank.assert_sound(engine)


def test_a_key_without_cascade_keeps_the_checkpoints_and_passes_the_error_on(
    engine: Engine, noted: int
) -> None:
    with engine.begin() as connection:
        Checkpoints(connection).pause_subscription(noted)
        ids = select(checkpoints_table.c.id, checkpoints_table.c.stream_name).limit(1)
        connection.execute(insert(strict).from_select(["checkpoint_id", "note"], ids))
    with pytest.raises(IntegrityError, match="strict_notes"), engine.begin() as connection:
        Checkpoints(connection).delete_subscription_checkpoints(noted)
    with engine.connect() as connection:
        assert counted(connection, checkpoints_table) == 3
        assert counted(connection, notes) == 3
    bank.assert_sound(engine)


def test_a_reference_does_not_hold_up_reserving(engine: Engine, noted: int) -> None:
    """The key's check locks FOR KEY SHARE, which an update of other columns does not wait for."""
    with engine.begin() as connection:
        bank.append(connection, noted, "account-0", 4)
    with engine.connect() as referrer:
        id = referrer.execute(
            select(checkpoints_table.c.id).where(checkpoints_table.c.stream_name == "account-0")
        ).scalar_one()
        referrer.execute(insert(strict).values(checkpoint_id=id, note="not committed"))
        assert Consumer(engine, bank.GROUP, bank.apply).drain() == 1
        referrer.commit()
    assert bank.balance(engine, "account-0") == 5
    bank.assert_sound(engine)
