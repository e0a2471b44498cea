"""Subscriptions, and single checkpoints that an application keeps itself."""

from __future__ import annotations

import pytest
from sqlalchemy import Connection, func, select
from sqlalchemy.exc import IntegrityError

from checkpoints import (
    CheckpointStatus,
    SubscriptionStatus,
    add_or_update_subscription,
    ensure_checkpoint_exists,
    get_subscription,
    lock_checkpoint,
    replay_subscription,
    set_subscription_status,
)
from checkpoints.tables import subscription_groups
from tests.support.factories import GROUP, add_checkpoint, add_subscription, reserve, state


def test_a_subscription_is_added_uninitialized_with_its_group(connection: Connection) -> None:
    row = connection.execute(add_or_update_subscription("new", "balances")).one()
    assert tuple(row)[1:2] == (SubscriptionStatus.UNINITIALIZED,)
    assert row.replay_target_position is None
    assert tuple(connection.execute(get_subscription("new", "balances")).one()) == tuple(row)


def test_a_subscription_that_is_there_is_left_as_it_is(connection: Connection) -> None:
    id = add_subscription(connection, status=SubscriptionStatus.PAUSED)
    row = connection.execute(add_or_update_subscription(GROUP, "balances")).one()
    assert (row.id, row.status) == (id, SubscriptionStatus.PAUSED)


def test_a_second_subscription_shares_the_group(connection: Connection) -> None:
    for name in ("balances", "statements"):
        connection.execute(add_or_update_subscription(GROUP, name))
    assert connection.scalar(select(func.count()).select_from(subscription_groups)) == 1


def test_a_subscription_committed_meanwhile_is_returned(connection: Connection) -> None:
    """As when two processes start at once: the second waits for the first, and gets its row."""
    first = connection.execute(add_or_update_subscription(GROUP, "balances")).one()
    connection.commit()
    with connection.engine.connect() as other:
        other.execution_options(isolation_level="REPEATABLE READ")
        assert other.execute(add_or_update_subscription(GROUP, "balances")).one().id == first.id


def test_an_unknown_subscription_is_no_row(connection: Connection) -> None:
    assert connection.execute(get_subscription(GROUP, "none")).all() == []
    assert connection.execute(set_subscription_status(77, SubscriptionStatus.ACTIVE)).all() == []


@pytest.mark.parametrize("status", SubscriptionStatus)
def test_any_status_can_be_set(connection: Connection, status: SubscriptionStatus) -> None:
    id = add_subscription(connection)
    assert tuple(connection.execute(set_subscription_status(id, status)).one()) == (id, status)
    assert connection.execute(get_subscription(GROUP, "balances")).one().status is status


def test_active_ends_a_replay(connection: Connection) -> None:
    id = add_subscription(connection, status=SubscriptionStatus.PAUSED)
    connection.execute(replay_subscription(id, target_position=9))
    connection.execute(set_subscription_status(id, SubscriptionStatus.PAUSED))
    assert connection.execute(get_subscription(GROUP, "balances")).one()[3] == 9
    connection.execute(set_subscription_status(id, SubscriptionStatus.ACTIVE))
    assert connection.execute(get_subscription(GROUP, "balances")).one()[3] is None


def test_ensure_adds_a_checkpoint_once(connection: Connection) -> None:
    subscription = add_subscription(connection)
    first = connection.execute(ensure_checkpoint_exists(subscription, "$global")).one()
    assert tuple(first)[1:] == (0, 0)
    again = connection.execute(ensure_checkpoint_exists(subscription, "$global", 9, 4)).one()
    assert tuple(again) == tuple(first)


def test_ensure_begins_where_it_is_told(connection: Connection) -> None:
    subscription = add_subscription(connection)
    row = connection.execute(ensure_checkpoint_exists(subscription, "account-1", 9, 4)).one()
    assert tuple(row)[1:] == (9, 4)
    assert state(connection, row.id).ready is not None


def test_ensure_refuses_an_unknown_subscription(connection: Connection) -> None:
    with pytest.raises(IntegrityError, match="fk_checkpoints_subscription_id"):
        connection.execute(ensure_checkpoint_exists(77, "account-1"))


def test_lock_says_how_the_checkpoint_stands(connection: Connection) -> None:
    subscription = add_subscription(connection)
    id = add_checkpoint(connection, subscription, version=5, position=2)
    held = reserve(connection)
    row = connection.execute(lock_checkpoint(subscription, "account-1")).one()
    assert tuple(row) == (id, 5, 2, CheckpointStatus.ACTIVE, held.reserved_until)
    assert connection.execute(lock_checkpoint(subscription, "none")).all() == []


def test_lock_is_held_until_the_transaction_ends(connection: Connection) -> None:
    subscription = add_subscription(connection)
    add_checkpoint(connection, subscription)
    connection.commit()
    connection.execute(lock_checkpoint(subscription, "account-1"))
    taken = lock_checkpoint(subscription, "account-1").with_for_update(nowait=True)
    with connection.engine.connect() as other:
        with pytest.raises(Exception, match="could not obtain lock"):
            other.execute(taken)
        other.rollback()
        connection.commit()
        assert other.execute(taken).one()
