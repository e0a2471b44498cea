"""A projection of ORM classes: the session's transaction holds the position too."""

from __future__ import annotations

import logging
import os
from datetime import timedelta

import ledger
from sqlalchemy import create_engine, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from checkpoints import CheckpointRecord, Checkpoints, Reservation, SubscriptionStatus

log = logging.getLogger("orm_projection")

GROUP = "statements"


class Base(DeclarativeBase):
    """The ORM classes of the projection."""


class Account(Base):
    """An account, as its messages left it."""

    __tablename__ = "orm_accounts"

    stream_name: Mapped[str] = mapped_column(primary_key=True)
    balance: Mapped[int] = mapped_column(default=0)
    bookings: Mapped[int] = mapped_column(default=0)


def project(session: Session, reservation: Reservation) -> None:
    """Apply what is new to the account, and move the position with it."""
    received = ledger.read(
        session.connection(), reservation.stream_name, reservation.stream_position
    )
    account = session.get(Account, reservation.stream_name)
    if account is None:
        account = Account(stream_name=reservation.stream_name, balance=0, bookings=0)
        session.add(account)
    for message in received:
        account.balance += message.amount
        account.bookings += 1
    # So that an error of the projection shows before the position is locked.
    session.flush()
    Checkpoints(session).update_checkpoint_position(reservation, received[-1].version)


def main() -> None:
    """Append to two accounts, and project both."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    engine = create_engine(os.environ["DATABASE_URL"])
    sessions = sessionmaker(engine)
    Base.metadata.create_all(engine)

    with sessions.begin() as session:
        checkpoints = Checkpoints(session)
        subscription = checkpoints.add_or_update_subscription(GROUP, "accounts")
        checkpoints.set_subscription_status(subscription.id, SubscriptionStatus.ACTIVE)
        for stream_name, amounts in {"account-1": (100, -30), "account-2": (5,)}.items():
            version = ledger.append(session.connection(), stream_name, *amounts)
            checkpoints.record_checkpoints(
                [CheckpointRecord(subscription.id, stream_name, version)]
            )

    while True:
        with sessions.begin() as session:
            reservations = Checkpoints(session).reserve_next_available_checkpoint(
                GROUP, timedelta(seconds=30)
            )
        if not reservations:
            break
        for reservation in reservations:
            with sessions.begin() as session:
                project(session, reservation)

    with sessions() as session:
        for account in session.scalars(select(Account).order_by(Account.stream_name)):
            log.info("%s: %d in %d", account.stream_name, account.balance, account.bookings)
    engine.dispose()


if __name__ == "__main__":
    main()
