"""ORM sessions: the projection's objects and the position in one transaction."""

from __future__ import annotations

import asyncio

import pytest
from sqlalchemy import URL, BigInteger, Connection, Engine, Text, func, select
from sqlalchemy.ext.asyncio import (
    AsyncConnection,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from checkpoints import AsyncCheckpoints, Checkpoints, Reservation, ReservationLost
from checkpoints.runtime import AsyncConsumer, Consumer
from tests.applications import bank
from tests.support.factories import MINUTE, reserve


class Base(DeclarativeBase):
    pass


class Account(Base):
    """A projection that the unit of work writes."""

    __tablename__ = "orm_accounts"

    stream_name: Mapped[str] = mapped_column(Text, primary_key=True)
    balance: Mapped[int] = mapped_column(BigInteger, default=0)


def project(session: Session, reservation: Reservation) -> None:
    """Add what is new to the account."""
    added = session.execute(
        select(func.sum(bank.messages.c.amount)).where(
            bank.messages.c.stream_name == reservation.stream_name,
            bank.messages.c.version > reservation.stream_position,
            bank.messages.c.version <= reservation.stream_version,
        )
    ).scalar_one()
    account = session.get(Account, reservation.stream_name)
    if account is None:
        account = Account(stream_name=reservation.stream_name, balance=0)
        session.add(account)
    account.balance += int(added)


pytestmark = pytest.mark.usefixtures("booked")


@pytest.fixture
def booked(engine: Engine) -> None:
    """Two messages of an account."""
    Base.metadata.create_all(engine)
    subscription_id = bank.found(engine)
    with engine.begin() as connection:
        for amount in (100, -30):
            bank.append(connection, subscription_id, "account-1", amount)


def projected(engine: Engine) -> int | None:
    with Session(engine) as session:
        return session.scalar(select(Account.balance))


def test_the_unit_of_work_is_rolled_back_with_a_lost_reservation(engine: Engine) -> None:
    sessions = sessionmaker(engine)
    with engine.begin() as connection:
        held = reserve(connection)
        Checkpoints(connection).release_checkpoint_reservation(held)

    def work() -> None:
        with sessions.begin() as session:
            project(session, held)
            session.flush()
            Checkpoints(session).update_checkpoint_position(held, held.stream_version)

    with pytest.raises(ReservationLost):
        work()
    assert projected(engine) is None
    bank.assert_sound(engine)


def test_a_handler_of_the_consumer_uses_a_session_on_its_connection(engine: Engine) -> None:
    attempts: list[int] = []

    def handler(connection: Connection, reservation: Reservation) -> None:
        # It joins the consumer's transaction: its commit flushes, and ends nothing.
        with Session(connection, join_transaction_mode="conditional_savepoint") as session:
            project(session, reservation)
            session.commit()
        attempts.append(reservation.retry_attempts)

    assert Consumer(engine, bank.GROUP, handler).drain() == 1
    assert attempts == [0]
    assert projected(engine) == 70
    bank.assert_sound(engine)


def test_what_a_session_flushed_goes_when_the_handler_raises(engine: Engine) -> None:
    def handler(connection: Connection, reservation: Reservation) -> None:
        with Session(connection) as session:
            project(session, reservation)
            session.commit()
        raise LookupError("after the flush")

    assert Consumer(engine, bank.GROUP, handler).drain() == 0
    assert projected(engine) is None
    bank.assert_sound(engine)


def test_an_async_session_projects_and_moves_the_position(
    migrated_url: URL, engine: Engine
) -> None:
    async def work() -> None:
        async_engine = create_async_engine(migrated_url)
        sessions = async_sessionmaker(async_engine)
        async with sessions.begin() as session:
            (held,) = await AsyncCheckpoints(session).reserve_next_available_checkpoint(
                bank.GROUP, MINUTE
            )
        async with sessions.begin() as session:
            await session.run_sync(project, held)
            await session.flush()
            await AsyncCheckpoints(session).update_checkpoint_position(held, held.stream_version)

        async def again() -> None:
            async with sessions.begin() as session:
                await session.run_sync(project, held)
                await AsyncCheckpoints(session).update_checkpoint_position(held, 2)

        with pytest.raises(ReservationLost):
            await again()
        await async_engine.dispose()

    asyncio.run(work())
    assert projected(engine) == 70
    bank.assert_sound(engine)


def test_a_handler_of_the_async_consumer_uses_an_async_session(
    migrated_url: URL, engine: Engine
) -> None:
    async def handler(connection: AsyncConnection, reservation: Reservation) -> None:
        async with AsyncSession(connection) as session:
            await session.run_sync(project, reservation)
            await session.commit()

    async def work() -> int:
        async_engine = create_async_engine(migrated_url)
        done = await AsyncConsumer(async_engine, bank.GROUP, handler).drain()
        await async_engine.dispose()
        return done

    assert asyncio.run(work()) == 1
    assert projected(engine) == 70
    bank.assert_sound(engine)
