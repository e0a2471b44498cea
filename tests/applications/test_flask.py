"""Flask-SQLAlchemy: a request records in its own transaction, a consumer works beside it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from flask import Flask, request
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import URL, BigInteger, Connection, Engine, Identity, Text, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from checkpoints import CheckpointRecord, Checkpoints, Reservation, SubscriptionStatus
from checkpoints.runtime import Consumer
from tests.applications import bank


class Base(DeclarativeBase):
    pass


class Booking(Base):
    """A message."""

    __tablename__ = "bookings"

    id: Mapped[int] = mapped_column(BigInteger, Identity(), primary_key=True)
    account: Mapped[str] = mapped_column(Text)
    version: Mapped[int] = mapped_column(BigInteger)
    amount: Mapped[int] = mapped_column(BigInteger)


class Total(Base):
    """The projection."""

    __tablename__ = "totals"

    account: Mapped[str] = mapped_column(Text, primary_key=True)
    amount: Mapped[int] = mapped_column(BigInteger)


class Bank:
    """The application, its database and its subscription."""

    def __init__(self, url: URL) -> None:
        self.db = SQLAlchemy(model_class=Base)
        self.app = Flask("bank")
        self.app.config["SQLALCHEMY_DATABASE_URI"] = url
        self.db.init_app(self.app)
        with self.app.app_context():
            Base.metadata.create_all(self.db.engine)
            self.engine = self.db.engine
            toolkit = Checkpoints(self.db.session)
            self.subscription = toolkit.add_or_update_subscription(bank.GROUP, "totals")
            toolkit.set_subscription_status(self.subscription.id, SubscriptionStatus.ACTIVE)
            self.db.session.commit()
        self.app.post("/accounts/<account>")(self.book)
        self.app.get("/accounts/<account>")(self.show)

    def book(self, account: str) -> Any:
        """Append a message, and record it in the transaction of the request."""
        session = self.db.session
        version = session.execute(
            select(func.count()).select_from(Booking).where(Booking.account == account)
        ).scalar_one()
        session.add(Booking(account=account, version=version + 1, amount=request.json["amount"]))
        id = request.json.get("subscription_id", self.subscription.id)
        Checkpoints(session).record_checkpoints([CheckpointRecord(id, account, version + 1)])
        if request.json.get("refused"):
            session.rollback()
            return {"version": None}, 409
        session.commit()
        return {"version": version + 1}, 201

    def show(self, account: str) -> Any:
        total = self.db.session.get(Total, account)
        return {"amount": total and total.amount}

    def apply(self, connection: Connection, reservation: Reservation) -> None:
        """The handler: in the application's context, but on the consumer's connection."""
        with self.app.app_context(), Session(connection) as session:
            added = session.scalar(
                select(func.sum(Booking.amount)).where(
                    Booking.account == reservation.stream_name,
                    Booking.version > reservation.stream_position,
                    Booking.version <= reservation.stream_version,
                )
            )
            total = session.get(Total, reservation.stream_name)
            if total is None:
                total = Total(account=reservation.stream_name, amount=0)
                session.add(total)
            total.amount += int(added or 0)
            session.commit()


@pytest.fixture
def application(migrated_url: URL) -> Iterator[Bank]:
    made = Bank(migrated_url)
    yield made
    made.engine.dispose()


def test_requests_record_and_a_consumer_thread_applies(application: Bank, engine: Engine) -> None:
    client = application.app.test_client()
    consumer = Consumer(application.engine, bank.GROUP, application.apply, concurrency=2)
    with bank.running(consumer):
        for amount in (100, -30):
            answer = client.post("/accounts/account-1", json={"amount": amount})
            assert answer.status_code == 201
        bank.until(
            lambda: client.get("/accounts/account-1").json == {"amount": 70}, "both are applied"
        )
    bank.assert_sound(engine)


def test_a_request_that_rolls_back_records_nothing(application: Bank, engine: Engine) -> None:
    client = application.app.test_client()
    answer = client.post("/accounts/account-1", json={"amount": 5, "refused": True})
    assert answer.status_code == 409
    with engine.connect() as connection:
        assert Checkpoints(connection).list_lagging() == []
    assert Consumer(application.engine, bank.GROUP, application.apply).drain() == 0


def test_an_error_of_a_request_leaves_the_next_one_a_clean_session(
    application: Bank, engine: Engine
) -> None:
    client = application.app.test_client()
    body = {"amount": 5, "subscription_id": 987654}
    assert client.post("/accounts/account-1", json=body).status_code == 500
    assert client.post("/accounts/account-1", json={"amount": 5}).json == {"version": 1}
    assert Consumer(application.engine, bank.GROUP, application.apply).drain() == 1
    assert client.get("/accounts/account-1").json == {"amount": 5}
    bank.assert_sound(engine)
