"""What an operator does with a whole subscription, and how it and its checkpoints stand then."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy import Connection, Text, column, delete, func, select, table
from sqlalchemy.exc import IntegrityError

from checkpoints import (
    CheckpointStatus,
    Reservation,
    SubscriptionStatus,
    delete_subscription,
    delete_subscription_checkpoints,
    finish_replay,
    get_subscription,
    move_subscription,
    pause_subscription,
    rename_subscription,
    replay_subscription,
    reserve_next_available_checkpoint,
    reset_subscription_checkpoints,
    resume_subscription,
    set_subscription_status,
    update_checkpoint_position,
)
from checkpoints.tables import checkpoints, subscription_groups
from tests.support.factories import (
    FAR_AHEAD,
    GROUP,
    LONG_AGO,
    MINUTE,
    State,
    add_checkpoint,
    add_subscription,
    reserve,
    state,
    violations,
)

ACTIVE, PAUSED = SubscriptionStatus.ACTIVE, SubscriptionStatus.PAUSED
REPLAY = SubscriptionStatus.REPLAY
NOT_SERVED = [status for status in SubscriptionStatus if status not in (ACTIVE, REPLAY)]


@pytest.fixture
def subscription(connection: Connection) -> int:
    return add_subscription(connection)


def stands(
    connection: Connection, name: str = "balances", group: str = GROUP
) -> tuple[SubscriptionStatus, int | None]:
    """The status and the replay's target of a subscription."""
    row = connection.execute(get_subscription(group, name)).one()
    return row.status, row.replay_target_position


def reserved(connection: Connection, group: str = GROUP) -> list[int]:
    """Reserve all that a consumer of the group would be given."""
    rows = connection.execute(reserve_next_available_checkpoint(group, MINUTE, limit=99))
    return [row.id for row in rows]


def add_in_every_state(connection: Connection, subscription: int) -> dict[str, int]:
    """Checkpoints as they may stand, beyond position 1; all but one have work left."""
    columns: dict[str, dict[str, Any]] = {
        "caught up": {"version": 3, "position": 3},
        "lagging": {"version": 3, "position": 2},
        "scheduled": {"version": 3, "position": 2, "process_at": FAR_AHEAD},
        "reserved": {"version": 3, "position": 2, "reserved_until": FAR_AHEAD},
        "expired": {"version": 3, "position": 2, "reserved_until": LONG_AGO},
        "retry": {"status": CheckpointStatus.RETRY, "process_at": FAR_AHEAD},
        "failed": {"status": CheckpointStatus.FAILED},
        "failed and scheduled": {"status": CheckpointStatus.FAILED, "process_at": FAR_AHEAD},
    }
    troubled = {"version": 3, "position": 2, "retry_attempts": 4, "retries": [{"error": "x"}]}
    return {
        name: add_checkpoint(
            connection,
            subscription,
            name,
            **({**troubled, **given} if "status" in given else given),
        )
        for name, given in columns.items()
    }


# Pause and resume.


@pytest.mark.parametrize("status", [ACTIVE, REPLAY, PAUSED])
def test_pause_stops_what_consumers_are_given(
    connection: Connection, subscription: int, status: SubscriptionStatus
) -> None:
    add_checkpoint(connection, subscription)
    connection.execute(set_subscription_status(subscription, status))
    row = connection.execute(pause_subscription(subscription)).one()
    assert tuple(row) == (subscription, PAUSED)
    assert stands(connection) == (PAUSED, None)
    assert reserved(connection) == []


@pytest.mark.parametrize("status", [s for s in NOT_SERVED if s is not PAUSED])
def test_pause_and_resume_leave_a_subscription_that_never_ran(
    connection: Connection, subscription: int, status: SubscriptionStatus
) -> None:
    connection.execute(set_subscription_status(subscription, status))
    for statement in (pause_subscription(subscription), resume_subscription(subscription)):
        assert tuple(connection.execute(statement).one()) == (subscription, status)
        assert stands(connection) == (status, None)


def test_pause_leaves_the_checkpoints_and_the_reservations(
    connection: Connection, subscription: int
) -> None:
    ids = add_in_every_state(connection, subscription)
    held = reserve(connection)
    before = {id: state(connection, id) for id in ids.values()}
    connection.execute(pause_subscription(subscription))
    assert {id: state(connection, id) for id in ids.values()} == before
    done = connection.execute(update_checkpoint_position(held.id, held.reserved_until, 3))
    assert done.one().stream_position == 3


def test_resume_gives_consumers_the_checkpoints_again(
    connection: Connection, subscription: int
) -> None:
    id = add_checkpoint(connection, subscription)
    connection.execute(pause_subscription(subscription))
    row = connection.execute(resume_subscription(subscription)).one()
    assert tuple(row) == (subscription, ACTIVE)
    assert reserved(connection) == [id]


def test_resume_goes_on_with_a_replay(connection: Connection, subscription: int) -> None:
    connection.execute(replay_subscription(subscription, target_position=70))
    connection.execute(pause_subscription(subscription))
    assert stands(connection) == (PAUSED, 70)
    row = connection.execute(resume_subscription(subscription)).one()
    assert tuple(row) == (subscription, REPLAY)
    assert stands(connection) == (REPLAY, 70)


@pytest.mark.parametrize("status", [ACTIVE, REPLAY])
def test_resume_leaves_one_that_runs(
    connection: Connection, subscription: int, status: SubscriptionStatus
) -> None:
    connection.execute(set_subscription_status(subscription, status))
    assert connection.execute(resume_subscription(subscription)).one().status is status


# Replay.


@pytest.mark.parametrize("status", SubscriptionStatus)
def test_replay_gives_its_target_with_each_reservation(
    connection: Connection, subscription: int, status: SubscriptionStatus
) -> None:
    add_checkpoint(connection, subscription)
    connection.execute(set_subscription_status(subscription, status))
    row = connection.execute(replay_subscription(subscription, target_position=70)).one()
    assert tuple(row) == (subscription, REPLAY, 70)
    assert reserve(connection).replay_target_position == 70


def test_finish_ends_a_replay_that_has_caught_up(connection: Connection, subscription: int) -> None:
    add_checkpoint(connection, subscription)
    connection.execute(replay_subscription(subscription, target_position=70))
    held = reserve(connection)
    connection.execute(update_checkpoint_position(held.id, held.reserved_until, 3))
    assert tuple(connection.execute(finish_replay(subscription)).one()) == (subscription,)
    assert stands(connection) == (ACTIVE, None)
    assert connection.execute(finish_replay(subscription)).all() == []


def test_finish_ends_a_replay_of_nothing(connection: Connection, subscription: int) -> None:
    connection.execute(replay_subscription(subscription, target_position=0))
    assert connection.execute(finish_replay(subscription)).all() == [(subscription,)]


@pytest.mark.parametrize(
    "left", ["lagging", "scheduled", "reserved", "expired", "retry", "failed and scheduled"]
)
def test_finish_waits_for_what_is_left(
    connection: Connection, subscription: int, left: str
) -> None:
    ids = add_in_every_state(connection, subscription)
    others = [id for name, id in ids.items() if name not in (left, "caught up", "failed")]
    connection.execute(delete(checkpoints).where(checkpoints.c.id.in_(others)))
    connection.execute(replay_subscription(subscription, target_position=70))
    assert connection.execute(finish_replay(subscription)).all() == []
    assert stands(connection) == (REPLAY, 70)
    connection.execute(delete(checkpoints).where(checkpoints.c.id == ids[left]))
    assert connection.execute(finish_replay(subscription)).all() == [(subscription,)]


def test_finish_does_not_wait_for_others(connection: Connection, subscription: int) -> None:
    add_in_every_state(connection, add_subscription(connection, "statements"))
    connection.execute(replay_subscription(subscription, target_position=70))
    assert connection.execute(finish_replay(subscription)).all() == [(subscription,)]
    assert stands(connection, "statements") == (ACTIVE, None)


@pytest.mark.parametrize("status", [s for s in SubscriptionStatus if s is not REPLAY])
def test_finish_leaves_one_that_does_not_replay(
    connection: Connection, subscription: int, status: SubscriptionStatus
) -> None:
    connection.execute(replay_subscription(subscription, target_position=70))
    connection.execute(set_subscription_status(subscription, status))
    assert connection.execute(finish_replay(subscription)).all() == []


# Reset.


def reset(connection: Connection, subscription: int, **arguments: Any) -> list[str]:
    """Take a batch back; the streams."""
    row = connection.execute(reset_subscription_checkpoints(subscription, **arguments)).one()
    assert row.id == subscription
    return list(row.stream_names)


@pytest.mark.parametrize("position", [0, 2])
def test_reset_takes_checkpoints_back_and_clears_their_errors(
    connection: Connection, subscription: int, position: int
) -> None:
    ids = add_in_every_state(connection, subscription)
    before = {name: state(connection, id) for name, id in ids.items()}
    connection.execute(pause_subscription(subscription))
    names = reset(connection, subscription, stream_position=position)
    # At position 2 these two have nothing to take back.
    kept = {"lagging", "scheduled"} if position == 2 else set()
    assert sorted(names) == sorted(ids.keys() - kept)
    for name, id in ids.items():
        now = state(connection, id)
        if name in kept:
            assert now == before[name]
        else:
            assert now == State(
                version=3,
                position=position,
                status=CheckpointStatus.ACTIVE,
                retry_attempts=0,
                retries=None,
                process_at=now.process_at,
                reserved_until=None,
                ready=now.process_at,
                reserved=None,
            )
            assert now.process_at is not None
            assert now.process_at < FAR_AHEAD
    assert violations(connection) == []


def test_reset_never_moves_a_checkpoint_forward(connection: Connection, subscription: int) -> None:
    id = add_checkpoint(connection, subscription, version=9, position=1, reserved_until=FAR_AHEAD)
    connection.execute(pause_subscription(subscription))
    assert reset(connection, subscription, stream_position=5) == ["account-1"]
    now = state(connection, id)
    assert (now.position, now.reserved_until, now.reserved) == (1, None, None)


def test_reset_to_the_version_leaves_nothing_to_do(
    connection: Connection, subscription: int
) -> None:
    id = add_checkpoint(connection, subscription, status=CheckpointStatus.FAILED, position=3)
    connection.execute(pause_subscription(subscription))
    assert reset(connection, subscription, stream_position=3) == ["account-1"]
    now = state(connection, id)
    assert (now.status, now.process_at, now.ready) == (CheckpointStatus.ACTIVE, None, None)


def test_reset_ends_reservations(connection: Connection, subscription: int) -> None:
    add_checkpoint(connection, subscription)
    held = reserve(connection)
    connection.execute(pause_subscription(subscription))
    assert reset(connection, subscription) == ["account-1"]
    lost = connection.execute(update_checkpoint_position(held.id, held.reserved_until, 3))
    assert lost.all() == []
    assert state(connection, held.id).position == 0


def test_reset_goes_on_where_it_is_told_and_does_each_once(
    connection: Connection, subscription: int
) -> None:
    for n in range(7):
        add_checkpoint(connection, subscription, f"account-{n}", position=n % 3)
    connection.execute(pause_subscription(subscription))
    calls = []
    after = ""
    while batch := reset(connection, subscription, after=after, limit=2):
        calls.append(batch)
        after = batch[-1]
    assert calls == [["account-1", "account-2"], ["account-4", "account-5"]]
    assert reset(connection, subscription) == []


def test_reset_begun_again_passes_over_what_is_done(
    connection: Connection, subscription: int
) -> None:
    for n in range(6):
        add_checkpoint(connection, subscription, f"account-{n}", position=3)
    connection.execute(pause_subscription(subscription))
    assert reset(connection, subscription, limit=2) == ["account-0", "account-1"]
    assert reset(connection, subscription, limit=9) == [f"account-{n}" for n in range(2, 6)]


@pytest.mark.parametrize("status", [ACTIVE, REPLAY])
def test_reset_leaves_a_subscription_that_runs(
    connection: Connection, subscription: int, status: SubscriptionStatus
) -> None:
    id = add_checkpoint(connection, subscription, position=3)
    connection.execute(set_subscription_status(subscription, status))
    row = connection.execute(reset_subscription_checkpoints(subscription)).one()
    assert tuple(row) == (subscription, status, [])
    assert state(connection, id).position == 3


@pytest.mark.parametrize("status", NOT_SERVED)
def test_reset_works_while_consumers_are_given_nothing(
    connection: Connection, subscription: int, status: SubscriptionStatus
) -> None:
    add_checkpoint(connection, subscription, position=3)
    connection.execute(set_subscription_status(subscription, status))
    row = connection.execute(reset_subscription_checkpoints(subscription)).one()
    assert tuple(row) == (subscription, status, ["account-1"])


def test_reset_leaves_other_subscriptions(connection: Connection, subscription: int) -> None:
    other = add_subscription(connection, "statements")
    id = add_checkpoint(connection, other, position=3)
    connection.execute(pause_subscription(subscription))
    assert reset(connection, subscription) == []
    assert state(connection, id).position == 3


# Rename and move.


def test_rename_keeps_all_but_the_name(connection: Connection, subscription: int) -> None:
    id = add_checkpoint(connection, subscription)
    held = reserve(connection)
    row = connection.execute(rename_subscription(subscription, "saldi")).one()
    assert tuple(row) == (subscription, "saldi")
    assert connection.execute(get_subscription(GROUP, "balances")).all() == []
    connection.execute(update_checkpoint_position(id, held.reserved_until, 2)).one()
    again = reserve(connection)
    assert (again.id, again.subscription_name, again.stream_position) == (id, "saldi", 2)


def test_rename_to_its_own_name_changes_nothing(connection: Connection, subscription: int) -> None:
    row = connection.execute(rename_subscription(subscription, "balances")).one()
    assert tuple(row) == (subscription, "balances")


def test_rename_refuses_the_name_of_another(connection: Connection, subscription: int) -> None:
    add_subscription(connection, "statements")
    with pytest.raises(IntegrityError, match="uq_subscriptions_subscription_group_id_name"):
        connection.execute(rename_subscription(subscription, "statements"))


@pytest.mark.parametrize("exists", [False, True])
def test_move_gives_the_checkpoints_to_another_group(
    connection: Connection, subscription: int, exists: bool
) -> None:
    id = add_checkpoint(connection, subscription)
    if exists:
        add_subscription(connection, "others", group="reports")
    row = connection.execute(move_subscription(subscription, "reports")).one()
    group = connection.execute(
        select(subscription_groups.c.id).where(subscription_groups.c.name == "reports")
    ).scalar_one()
    assert tuple(row) == (subscription, group)
    assert reserved(connection) == []
    assert reserved(connection, "reports") == [id]


def test_move_within_its_group_changes_nothing(connection: Connection, subscription: int) -> None:
    id = add_checkpoint(connection, subscription)
    connection.execute(move_subscription(subscription, GROUP)).one()
    assert reserved(connection) == [id]


def test_move_refuses_a_group_that_has_the_name(connection: Connection, subscription: int) -> None:
    add_subscription(connection, group="reports")
    with pytest.raises(IntegrityError, match="uq_subscriptions_subscription_group_id_name"):
        connection.execute(move_subscription(subscription, "reports"))


# Delete.


def test_delete_removes_checkpoints_in_batches_then_the_subscription(
    connection: Connection, subscription: int
) -> None:
    ids = add_in_every_state(connection, subscription)
    other = add_checkpoint(connection, add_subscription(connection, "statements"))
    first = connection.execute(delete_subscription_checkpoints(subscription, limit=5))
    assert len(first.all()) == 5
    assert tuple(connection.execute(delete_subscription(subscription)).one()) == (
        subscription,
        False,
    )
    second = connection.execute(delete_subscription_checkpoints(subscription, limit=5))
    assert len(second.all()) == len(ids) - 5
    assert connection.execute(delete_subscription_checkpoints(subscription)).all() == []
    assert tuple(connection.execute(delete_subscription(subscription)).one()) == (
        subscription,
        True,
    )
    assert connection.execute(get_subscription(GROUP, "balances")).all() == []
    assert connection.scalars(select(checkpoints.c.id)).all() == [other]
    assert violations(connection) == []


def test_delete_takes_a_checkpoint_from_its_holder(
    connection: Connection, subscription: int
) -> None:
    add_checkpoint(connection, subscription)
    held: Reservation = reserve(connection)
    connection.execute(delete_subscription_checkpoints(subscription))
    lost = connection.execute(update_checkpoint_position(held.id, held.reserved_until, 3))
    assert lost.all() == []


def test_delete_leaves_the_group(connection: Connection, subscription: int) -> None:
    connection.execute(delete_subscription(subscription))
    assert connection.scalar(select(func.count()).select_from(subscription_groups)) == 1


@pytest.mark.parametrize(
    "statement",
    [
        pause_subscription(77),
        resume_subscription(77),
        replay_subscription(77, target_position=1),
        finish_replay(77),
        reset_subscription_checkpoints(77),
        rename_subscription(77, "balances"),
        move_subscription(77, "new"),
        delete_subscription_checkpoints(77),
        delete_subscription(77),
    ],
)
def test_an_unknown_subscription_is_no_row(connection: Connection, statement: Any) -> None:
    add_checkpoint(connection, add_subscription(connection))
    assert connection.execute(statement).all() == []
    assert connection.scalar(select(func.count()).select_from(subscription_groups)) == 1
    assert connection.scalar(select(func.count()).select_from(checkpoints)) == 1


def test_the_projection_can_be_reset_in_the_same_statement(
    connection: Connection, subscription: int
) -> None:
    add_checkpoint(connection, subscription, "account-1", position=3)
    add_checkpoint(connection, subscription, "account-2", position=0)
    connection.exec_driver_sql("CREATE TABLE balances (stream_name text)")
    connection.exec_driver_sql("INSERT INTO balances VALUES ('account-1'), ('account-2')")
    balances = table("balances", column("stream_name", Text))
    connection.execute(pause_subscription(subscription))
    batch = reset_subscription_checkpoints(subscription).cte("batch")
    connection.execute(
        delete(balances).where(
            balances.c.stream_name.in_(select(func.unnest(batch.c.stream_names)))
        )
    )
    assert connection.scalars(select(balances.c.stream_name)).all() == ["account-2"]
