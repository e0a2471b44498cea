"""Completing many checkpoints in one statement."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection

from checkpoints import (
    Checkpoints,
    CheckpointStatus,
    PositionUpdate,
    Reservation,
    ReservationsLost,
    reserve_next_available_checkpoint,
    update_checkpoint_position,
    update_checkpoint_positions,
)
from tests.support.factories import (
    FAR_AHEAD,
    GROUP,
    LONG_AGO,
    MINUTE,
    add_checkpoint,
    add_subscription,
    database_time,
    state,
    violations,
)


@pytest.fixture
def held(connection: Connection) -> list[Reservation]:
    """Three of a retry each, the first by id first."""
    subscription = add_subscription(connection)
    for stream in ("account-3", "account-1", "account-2"):
        add_checkpoint(
            connection,
            subscription,
            stream,
            position=1,
            status=CheckpointStatus.RETRY,
            retry_attempts=2,
            retries=["refused"],
            process_at=LONG_AGO,
        )
    rows = connection.execute(reserve_next_available_checkpoint(GROUP, MINUTE, limit=9)).all()
    return sorted((Reservation(*row) for row in rows), key=lambda one: one.id)


def test_does_for_each_what_the_statement_for_one_does(
    connection: Connection, held: list[Reservation]
) -> None:
    other = add_checkpoint(connection, held[0].subscription_id, "other", process_at=LONG_AGO)
    positions = [3, 2, 0]
    expected = []
    with connection.begin_nested() as savepoint:
        for one, position in zip(held, positions, strict=True):
            row = connection.execute(
                update_checkpoint_position(one.id, one.reserved_until, position)
            ).one()
            expected.append((tuple(row), state(connection, one.id)))
        savepoint.rollback()
    untouched = state(connection, other)

    rows = connection.execute(
        update_checkpoint_positions(
            [PositionUpdate.of(one, at) for one, at in zip(held, positions, strict=True)]
        )
    ).all()

    assert sorted(map(tuple, rows)) == [row for row, _ in expected]
    for one, (_, one_by_one) in zip(held, expected, strict=True):
        now = state(connection, one.id)
        assert (now.process_at is None) == (one_by_one.process_at is None)
        assert now.ready == now.process_at
        for name in ("version", "position", "status", "retry_attempts", "retries", "reserved"):
            assert getattr(now, name) == getattr(one_by_one, name)
    assert state(connection, other) == untouched
    assert violations(connection) == []


def test_each_token_is_fenced_by_itself(connection: Connection, held: list[Reservation]) -> None:
    lost, kept, gone = held
    rows = connection.execute(
        update_checkpoint_positions(
            [
                PositionUpdate(lost.id, LONG_AGO, 3),
                PositionUpdate(2**40, gone.reserved_until, 3),
                PositionUpdate.of(kept, 3),
            ]
        )
    ).all()
    assert [row.id for row in rows] == [kept.id]
    assert state(connection, lost.id).reserved == lost.reserved_until
    assert state(connection, lost.id).position == 1


def test_what_still_lags_is_ready_when_it_is_said(
    connection: Connection, held: list[Reservation]
) -> None:
    now, later, at = held
    before = database_time(connection)
    connection.execute(
        update_checkpoint_positions(
            [
                PositionUpdate.of(now, 2),
                PositionUpdate.of(later, 2, process_at=timedelta(hours=1)),
                PositionUpdate.of(at, 2, process_at=FAR_AHEAD),
            ]
        )
    )
    after = database_time(connection)
    times = [state(connection, one.id).ready for one in held]
    assert times[0] is not None
    assert before <= times[0] <= after
    assert times[1] is not None
    assert before <= times[1] - timedelta(hours=1) <= after
    assert times[2] == FAR_AHEAD


def test_of_nothing_it_does_nothing(connection: Connection) -> None:
    assert connection.execute(update_checkpoint_positions([])).all() == []
    assert Checkpoints(connection).update_checkpoint_positions([]) == []


def test_many_in_one_statement(connection: Connection) -> None:
    subscription = add_subscription(connection)
    connection.exec_driver_sql(
        "INSERT INTO checkpoints.checkpoints (subscription_id, stream_name, stream_version)"
        f" SELECT {subscription}, 'account-' || n, 1 FROM generate_series(1, 3000) AS n"
    )
    checkpoints = Checkpoints(connection)
    held = checkpoints.reserve_next_available_checkpoint(GROUP, MINUTE, limit=3000)
    done = checkpoints.update_checkpoint_positions(PositionUpdate.of(one, 1) for one in held)
    assert {one.id for one in done} == {one.id for one in held}
    assert len(done) == 3000
    assert violations(connection) == []


def test_the_executing_layer_names_those_that_are_lost(
    connection: Connection, held: list[Reservation]
) -> None:
    checkpoints = Checkpoints(connection)
    checkpoints.release_checkpoint_reservation(held[0])
    checkpoints.release_checkpoint_reservation(held[2])
    with pytest.raises(ReservationsLost, match=rf"{held[0].id}, {held[2].id} are lost") as raised:
        checkpoints.update_checkpoint_positions([PositionUpdate.of(one, 3) for one in held])
    assert raised.value.lost == [(one.id, one.reserved_until) for one in (held[0], held[2])]
    assert raised.value.id == held[0].id


@pytest.mark.parametrize(
    ("updates", "error", "match"),
    [
        (7, TypeError, "updates must be an iterable of PositionUpdate, not 7"),
        ([(1, FAR_AHEAD, 3)], TypeError, r"updates\[0\] must be a PositionUpdate"),
        (
            [PositionUpdate(5, FAR_AHEAD, 3), PositionUpdate(5, FAR_AHEAD, 4)],
            ValueError,
            r"updates\[1\] must be another checkpoint: 5 is there twice",
        ),
    ],
)
def test_bad_updates_are_refused(updates: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        update_checkpoint_positions(updates)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((0, FAR_AHEAD, 3), ValueError, "id must be from 1"),
        ((1, "today", 3), TypeError, "reserved_until must be an aware datetime"),
        ((1, FAR_AHEAD, -1), ValueError, "stream_position must be from 0"),
        ((1, FAR_AHEAD, 3, 5), TypeError, "process_at must be an aware datetime or a timedelta"),
    ],
)
def test_a_bad_update_is_refused(arguments: Any, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        PositionUpdate(*arguments)
