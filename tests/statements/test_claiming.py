"""Where a reserve looks: by subscription, for a group of many at the head first, and since when."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import Connection, text

from checkpoints import (
    SubscriptionStatus,
    get_next_process_at,
    recover_expired_checkpoint_reservations,
    reserve_next_available_checkpoint,
)
from checkpoints.statements import _claiming as claiming
from tests.support.factories import (
    FAR_AHEAD,
    GROUP,
    LONG_AGO,
    MINUTE,
    add_checkpoint,
    add_subscription,
)

FEW = claiming._FEW
AT_HEAD = claiming._AT_HEAD


def ids_of(connection: Connection, limit: int = 1, **options: object) -> list[int]:
    statement = reserve_next_available_checkpoint(
        GROUP,
        MINUTE,
        limit=limit,
        **options,  # type: ignore[arg-type]
    )
    return [row.id for row in connection.execute(statement)]


def add_many(connection: Connection, subscription_id: int, count: int) -> None:
    """Checkpoints that have been due longer than any other."""
    connection.execute(
        text(
            "INSERT INTO checkpoints.checkpoints"
            " (subscription_id, stream_name, stream_version, process_at)"
            " SELECT :subscription_id, 'old-' || n, 1, '2019-01-01'"
            " FROM generate_series(1, :n) AS n"
        ),
        {"subscription_id": subscription_id, "n": count},
    )


@pytest.fixture(params=[1, FEW, FEW + 1, 3 * FEW], ids=lambda count: f"{count} subscriptions")
def subscriptions(connection: Connection, request: pytest.FixtureRequest) -> list[int]:
    return [add_subscription(connection, f"s-{n}") for n in range(request.param)]


def test_each_is_given_once_in_the_order_of_the_times(
    connection: Connection, subscriptions: list[int]
) -> None:
    ids = [
        add_checkpoint(connection, id, process_at=LONG_AGO - timedelta(seconds=number))
        for number, id in enumerate(subscriptions)
    ]
    taken = [id for _ in ids for id in ids_of(connection)]
    assert taken == ids[::-1]
    assert ids_of(connection) == []


@pytest.mark.parametrize("others", [1, AT_HEAD + 2, 300])
@pytest.mark.parametrize("kind", ["of another group", "paused"])
def test_what_others_have_waiting_is_not_in_the_way(
    connection: Connection, subscriptions: list[int], kind: str, others: int
) -> None:
    other = (
        add_subscription(connection, "other", status=SubscriptionStatus.PAUSED)
        if kind == "paused"
        else add_subscription(connection, "other", group="others")
    )
    add_many(connection, other, others)
    ids = {add_checkpoint(connection, id, process_at=LONG_AGO) for id in subscriptions[-5:]}
    taken = {id for _ in ids for id in ids_of(connection)}
    assert taken == ids
    assert ids_of(connection) == []


@pytest.mark.parametrize("limit", [1, 7, 1000])
def test_all_of_a_backlog_is_given_whatever_the_limit(
    connection: Connection, subscriptions: list[int], limit: int
) -> None:
    add_many(connection, subscriptions[0], 200)
    ids = {add_checkpoint(connection, id) for id in subscriptions}
    taken: list[int] = []
    while some := ids_of(connection, limit):
        assert len(some) <= limit
        taken += some
    assert len(taken) == len(set(taken)) == 200 + len(ids)


def test_the_subscription_that_has_waited_longest_is_served_first(connection: Connection) -> None:
    """And as far as it has more, before the others."""
    late, early = add_subscription(connection, "late"), add_subscription(connection, "early")
    first = add_checkpoint(connection, early, "a", process_at=LONG_AGO)
    then = add_checkpoint(connection, late, "a", process_at=LONG_AGO + timedelta(seconds=1))
    more = add_checkpoint(connection, early, "b", process_at=LONG_AGO + timedelta(seconds=2))
    assert ids_of(connection, 2) == [first, more]
    assert ids_of(connection, 2) == [then]


def test_what_was_due_before_is_not_looked_for(
    connection: Connection, subscriptions: list[int]
) -> None:
    since = LONG_AGO + timedelta(days=1)
    before = add_checkpoint(connection, subscriptions[0], "a", process_at=LONG_AGO)
    at = add_checkpoint(connection, subscriptions[-1], "b", process_at=since)
    after = add_checkpoint(
        connection, subscriptions[0], "c", process_at=since + timedelta(seconds=1)
    )
    assert set(ids_of(connection, 9, due_since=since)) == {at, after}
    assert ids_of(connection, 9, due_since=since) == []
    assert ids_of(connection, 9) == [before]


def test_the_next_is_that_of_any_subscription(
    connection: Connection, subscriptions: list[int]
) -> None:
    for id in subscriptions:
        add_checkpoint(connection, id, process_at=FAR_AHEAD)
    add_checkpoint(
        connection, add_subscription(connection, group="others"), "b", process_at=LONG_AGO
    )
    next_id = add_checkpoint(
        connection, subscriptions[-1], "b", process_at=FAR_AHEAD - timedelta(days=1)
    )
    assert connection.execute(get_next_process_at(GROUP)).one().id == next_id


def test_only_what_expired_in_the_group_is_recovered(
    connection: Connection, subscriptions: list[int]
) -> None:
    ids = {
        add_checkpoint(connection, id, reserved_until=LONG_AGO, process_at=LONG_AGO)
        for id in subscriptions
    }
    add_checkpoint(connection, subscriptions[0], "held", reserved_until=FAR_AHEAD)
    add_checkpoint(
        connection, add_subscription(connection, group="others"), "b", reserved_until=LONG_AGO
    )
    recovered = connection.execute(recover_expired_checkpoint_reservations(GROUP)).all()
    assert {row.id for row in recovered} == ids


def test_what_is_at_the_head_does_not_count_twice(connection: Connection) -> None:
    """A quarter of what has waited longest is the group's: the head alone has not enough."""
    own = [add_subscription(connection, f"s-{n}") for n in range(FEW + 1)]
    other = add_subscription(connection, "other", group="others")
    connection.execute(
        text(
            "INSERT INTO checkpoints.checkpoints"
            " (subscription_id, stream_name, stream_version, process_at)"
            " SELECT CASE WHEN n % 4 > 0 THEN :other WHEN n < 500 THEN :first"
            " ELSE (CAST(:own AS bigint[]))[n % 17 + 1] END,"
            " 's' || n, 1, now() - interval '1 hour' + n * interval '1 ms'"
            " FROM generate_series(1, 4000) AS n"
        ),
        {"other": other, "first": own[0], "own": own},
    )
    assert len(set(ids_of(connection, 200))) == 200
