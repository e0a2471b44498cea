"""Statements that lock several checkpoints lock them in one order, and so never deadlock."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeAlias

import pytest
from sqlalchemy import Executable, select, text, update
from sqlalchemy.exc import DBAPIError

from checkpoints import (
    CheckpointRecord,
    PositionUpdate,
    advance_lagging_subscription_checkpoints,
    record_checkpoints,
    recover_expired_checkpoint_reservations,
    repair_checkpoints,
    reserve_next_available_checkpoint,
    schedule_checkpoints,
    set_subscription_status,
    skip_checkpoints,
    update_checkpoint_position,
    update_checkpoint_positions,
)
from checkpoints.records import SubscriptionStatus
from checkpoints.tables import checkpoints
from tests.concurrency.stage import (
    ISOLATION_LEVELS,
    READ_COMMITTED,
    Actor,
    Outcome,
    Stage,
    sqlstate,
)
from tests.rule.invariants import broken
from tests.support.factories import (
    FAR_AHEAD,
    GROUP,
    LONG_AGO,
    MINUTE,
    add_checkpoint,
    add_subscription,
    violations,
)

# The order of the names is neither that of the ids nor that of any other column.
STREAMS = ["account-7", "account-2", "account-9", "account-1", "account-5", "account-3"]
Many: TypeAlias = Callable[[int, list[int]], Executable]

MANY: dict[str, Many] = {
    "record": lambda subscription, _: record_checkpoints(
        [CheckpointRecord(subscription, stream, 9) for stream in STREAMS]
    ),
    "record in another order": lambda subscription, _: record_checkpoints(
        [CheckpointRecord(subscription, stream, 9) for stream in reversed(STREAMS)]
    ),
    "advance": lambda subscription, _: advance_lagging_subscription_checkpoints(subscription),
    "skip": lambda _, ids: skip_checkpoints(ids),
    "skip in another order": lambda _, ids: skip_checkpoints(reversed(ids)),
    "schedule": lambda _, ids: schedule_checkpoints(ids, LONG_AGO),
    "schedule in another order": lambda _, ids: schedule_checkpoints(reversed(ids), LONG_AGO),
    "update": lambda _, ids: update_checkpoint_positions(
        [PositionUpdate(id, FAR_AHEAD, 3) for id in ids]
    ),
    "update in another order": lambda _, ids: update_checkpoint_positions(
        [PositionUpdate(id, FAR_AHEAD, 3) for id in reversed(ids)]
    ),
    "repair": lambda _, __: repair_checkpoints(),
}


@pytest.mark.parametrize("operation", MANY)
@pytest.mark.parametrize("at", range(len(STREAMS)))
def test_waits_with_just_those_before_it_locked(stage: Stage, operation: str, at: int) -> None:
    """A waiting statement holds the rows up to the one it waits for, and none after."""
    ids = {stream: add_checkpoint(stage.observer, stage.subscription, stream) for stream in STREAMS}
    if operation.startswith("update"):
        stage.observer.execute(update(checkpoints).values(reserved_until=FAR_AHEAD))
    if operation == "repair":
        stage.observer.execute(text("DELETE FROM checkpoints.checkpoints_ready"))
    in_order = sorted(STREAMS)
    stage.a.execute(
        select(checkpoints.c.id).where(checkpoints.c.id == ids[in_order[at]]).with_for_update()
    )
    future = stage.b.start(MANY[operation](stage.subscription, list(ids.values())))
    assert stage.waits(future, stage.b)
    free = stage.observer.execute(
        select(checkpoints.c.stream_name)
        .order_by(checkpoints.c.stream_name)
        .with_for_update(skip_locked=True)
    ).scalars()
    assert list(free) == in_order[at + 1 :]
    stage.a.commit()
    assert len(future.result(timeout=60).rows) == len(STREAMS)
    stage.b.commit()
    assert violations(stage.observer) == []


def test_the_subscription_comes_before_the_stream(stage: Stage) -> None:
    first = stage.subscription
    second = add_subscription(stage.observer, "second")
    later = add_checkpoint(stage.observer, second, "account-1")
    earlier = add_checkpoint(stage.observer, first, "account-2")
    for statement in (
        record_checkpoints(
            [CheckpointRecord(second, "account-1", 9), CheckpointRecord(first, "account-2", 9)]
        ),
        skip_checkpoints([later, earlier]),
        schedule_checkpoints([later, earlier], LONG_AGO),
    ):
        stage.a.execute(select(checkpoints.c.id).where(checkpoints.c.id == later).with_for_update())
        future = stage.b.start(statement)
        assert stage.waits(future, stage.b)
        held = select(checkpoints.c.id).where(checkpoints.c.id == earlier)
        assert stage.observer.execute(held.with_for_update(skip_locked=True)).all() == []
        stage.a.rollback()
        assert future.result(timeout=60).sqlstate is None
        stage.b.commit()


def test_recorders_with_overlapping_batches_of_new_checkpoints_wait_for_each_other(
    stage: Stage,
) -> None:
    a = [CheckpointRecord(stage.subscription, f"account-{number}", 1) for number in range(50)]
    b = [
        CheckpointRecord(stage.subscription, f"account-{number}", 2) for number in range(99, 24, -1)
    ]
    stage.a.execute(record_checkpoints(a))
    future = stage.b.start(record_checkpoints(b))
    assert stage.waits(future, stage.b)
    stage.a.commit()
    assert len(future.result(timeout=60).rows) == 75
    stage.b.commit()
    versions = stage.observer.execute(
        select(checkpoints.c.stream_name, checkpoints.c.stream_version)
    )
    assert {row[0]: row[1] for row in versions} == {
        f"account-{number}": 1 if number < 25 else 2 for number in range(100)
    }
    assert broken(stage.observer) == []


@pytest.mark.parametrize("level", ISOLATION_LEVELS)
@pytest.mark.parametrize(
    "operations",
    [("record", "record"), ("record", "advance", "skip", "schedule", "reserve", "recover")],
    ids=["recorders", "all"],
)
def test_overlapping_batches_in_any_order_never_deadlock(
    stage: Stage, level: str, operations: tuple[str, ...]
) -> None:
    """Real threads, each at its own pace, over the same checkpoints in an order of its own."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    streams = [f"account-{number}" for number in range(60)]
    shuffled = random.Random(seed)
    shuffled.shuffle(streams)
    ids = [add_checkpoint(stage.observer, stage.subscription, stream) for stream in streams]

    def work(number: int) -> list[str]:
        rng = random.Random(seed + number)
        states = []
        with stage.engine.connect().execution_options(isolation_level=level) as connection:
            for version in range(4, 34):
                statement = _batch(
                    operations[number],
                    stage.subscription,
                    rng=rng,
                    streams=streams,
                    ids=ids,
                    version=version,
                )
                try:
                    connection.execute(statement)
                    connection.commit()
                except DBAPIError as error:
                    connection.rollback()
                    states.append(sqlstate(error))
        return states

    with ThreadPoolExecutor(len(operations)) as threads:
        ended = [state for states in threads.map(work, range(len(operations))) for state in states]
    assert set(ended) <= (set() if level == READ_COMMITTED else {"40001"})
    assert violations(stage.observer) == []
    assert broken(stage.observer) == []


def _batch(
    operation: str,
    subscription: int,
    *,
    rng: random.Random,
    streams: list[str],
    ids: list[int],
    version: int,
) -> Executable:
    chosen = rng.sample(range(len(streams)), 40)
    match operation:
        case "record":
            return record_checkpoints(
                [CheckpointRecord(subscription, streams[at], version) for at in chosen]
            )
        case "advance":
            return advance_lagging_subscription_checkpoints(subscription, limit=40)
        case "skip":
            return skip_checkpoints([ids[at] for at in chosen])
        case "schedule":
            return schedule_checkpoints([ids[at] for at in chosen], LONG_AGO)
        case "reserve":
            return reserve_next_available_checkpoint(GROUP, MINUTE, limit=10)
    return recover_expired_checkpoint_reservations(GROUP)


class TestReserveHoldsUpNobody:
    def test_two_consumers_of_a_group_get_different_checkpoints_at_once(self, stage: Stage) -> None:
        ids = [
            add_checkpoint(stage.observer, stage.subscription, f"account-{number}")
            for number in range(2)
        ]
        reserve = reserve_next_available_checkpoint(GROUP, MINUTE)
        first = stage.a.execute(reserve)
        future = stage.b.start(reserve)
        assert not stage.waits(future, stage.b)
        second = future.result(timeout=60)
        assert [row[0] for row in (*first.rows, *second.rows)] == ids

    def test_the_group_and_the_subscription_stay_unlocked(self, stage: Stage) -> None:
        add_checkpoint(stage.observer, stage.subscription, "account-1")
        add_checkpoint(stage.observer, stage.subscription, "account-2", reserved_until=LONG_AGO)
        stage.a.execute(recover_expired_checkpoint_reservations(GROUP))
        assert stage.a.execute(reserve_next_available_checkpoint(GROUP, MINUTE)).rows
        future = stage.b.start(
            set_subscription_status(stage.subscription, SubscriptionStatus.PAUSED)
        )
        assert not stage.waits(future, stage.b)
        stage.b.commit()
        for table in ("subscriptions", "subscription_groups"):
            future = stage.b.start(
                text(f"SELECT FROM checkpoints.{table} FOR NO KEY UPDATE NOWAIT")
            )
            assert not stage.waits(future, stage.b)
            assert future.result(timeout=60).sqlstate is None

    def test_what_a_recorder_is_writing_is_passed_over(self, stage: Stage) -> None:
        locked = add_checkpoint(
            stage.observer, stage.subscription, "account-1", process_at=LONG_AGO
        )
        free = add_checkpoint(stage.observer, stage.subscription, "account-2")
        stage.a.execute(record_checkpoints([CheckpointRecord(stage.subscription, "account-1", 9)]))
        future = stage.b.start(reserve_next_available_checkpoint(GROUP, MINUTE, limit=9))
        assert not stage.waits(future, stage.b)
        assert [row[0] for row in future.result(timeout=60).rows] == [free]
        stage.b.commit()
        stage.a.commit()
        given = stage.b.execute(reserve_next_available_checkpoint(GROUP, MINUTE))
        assert [row[0] for row in given.rows] == [locked]

    @pytest.mark.parametrize("operation", ["reserve", "recover"])
    def test_what_was_passed_over_is_held_by_nobody(self, stage: Stage, operation: str) -> None:
        """Having passed over a checkpoint, an open transaction must not hold up its writer."""
        times: dict[str, Any] = (
            {"process_at": LONG_AGO} if operation == "reserve" else {"reserved_until": LONG_AGO}
        )
        id = add_checkpoint(stage.observer, stage.subscription, **times)
        stage.a.execute(record_checkpoints([CheckpointRecord(stage.subscription, "account-1", 9)]))
        passing = {
            "reserve": reserve_next_available_checkpoint(GROUP, MINUTE),
            "recover": recover_expired_checkpoint_reservations(GROUP),
        }[operation]
        assert stage.b.execute(passing).rows == []
        future = stage.a.start(skip_checkpoints([id]))
        assert not stage.waits(future, stage.a)


class TestSnapshotTrap:
    """A statement that waited for a lock decides on what it then finds, not on what it saw."""

    def test_an_update_that_waited_sees_the_version_that_rose(self, stage: Stage) -> None:
        id = add_checkpoint(stage.observer, stage.subscription, reserved_until=FAR_AHEAD)
        stage.a.execute(record_checkpoints([CheckpointRecord(stage.subscription, "account-1", 9)]))
        future = stage.b.start(update_checkpoint_position(id, FAR_AHEAD, 3))
        assert stage.waits(future, stage.b)
        stage.a.commit()
        assert future.result(timeout=60).rows == [(id, 9, 3)]
        stage.b.commit()
        given = stage.a.execute(reserve_next_available_checkpoint(GROUP, MINUTE))
        assert [row[4:6] for row in given.rows] == [(3, 9)]

    def test_a_chain_of_waiters_leaves_no_orphans(self, stage: Stage) -> None:
        """Several wait for one row, each for a change of the other hot table."""
        id = add_checkpoint(stage.observer, stage.subscription, process_at=LONG_AGO)
        plain = update(checkpoints).where(checkpoints.c.id == id)
        changes = [
            plain.values(reserved_until=FAR_AHEAD),
            plain.values(reserved_until=None),
            plain.values(reserved_until=LONG_AGO, status="failed"),
            plain.values(reserved_until=None, process_at=None),
            plain.values(status="active", stream_position=1),
            plain.values(stream_position=3),
            plain.values(stream_version=9),
        ]
        stage.a.execute(select(checkpoints.c.id).with_for_update())
        actors = [Actor(stage.engine) for _ in changes]
        try:
            futures = []
            for actor, change in zip(actors, changes, strict=True):
                futures.append(actor.start(change, commit=True))
                assert stage.waits(futures[-1], actor)
            stage.a.commit()
            for future in futures:
                assert future.result(timeout=60) == Outcome([()])
        finally:
            stage.a.rollback()
            for actor in actors:
                actor.close()
        assert violations(stage.observer) == []
        assert broken(stage.observer) == []


class TestComposed:
    """Transactions of several statements lock in the order of their statements."""

    def prepare(self, stage: Stage) -> tuple[int, int]:
        return (
            add_checkpoint(stage.observer, stage.subscription, "account-1", process_at=LONG_AGO),
            add_checkpoint(stage.observer, stage.subscription, "account-2"),
        )

    def record(self, stage: Stage, *streams: str) -> Executable:
        return record_checkpoints(
            [CheckpointRecord(stage.subscription, stream, 9) for stream in streams]
        )

    def test_reserve_and_record_in_one_transaction_can_deadlock(self, stage: Stage) -> None:
        """Each holds what it reserved and records what the other reserved: so commit a reserve."""
        self.prepare(stage)
        reserve = reserve_next_available_checkpoint(GROUP, MINUTE)
        assert [row[3] for row in stage.a.execute(reserve).rows] == ["account-1"]
        assert [row[3] for row in stage.b.execute(reserve).rows] == ["account-2"]
        a = stage.a.start(self.record(stage, "account-2"))
        assert stage.waits(a, stage.a)
        b = stage.b.start(self.record(stage, "account-1"))
        outcomes = [b.result(timeout=60).sqlstate]
        stage.b.rollback()
        outcomes.append(a.result(timeout=60).sqlstate)
        assert sorted(map(str, outcomes)) == ["40P01", "None"]
        stage.a.commit()
        assert broken(stage.observer) == []

    def test_record_of_others_does_not_deadlock_when_the_reserve_was_committed(
        self, stage: Stage
    ) -> None:
        """The handler records first, all at once: then it holds nothing while it waits."""
        self.prepare(stage)
        held: list[tuple[Any, ...]] = []
        for actor in (stage.a, stage.b):
            held += actor.execute(reserve_next_available_checkpoint(GROUP, MINUTE)).rows
            actor.commit()
        # With its own stream among those recorded, all locks are taken in the common order.
        stage.a.execute(self.record(stage, "account-1", "account-2"))
        b = stage.b.start(self.record(stage, "account-2", "account-1"))
        assert stage.waits(b, stage.b)
        assert stage.a.execute(update_checkpoint_position(held[0][0], held[0][9], 3)).rows
        stage.a.commit()
        assert b.result(timeout=60).sqlstate is None
        assert stage.b.execute(update_checkpoint_position(held[1][0], held[1][9], 3)).rows
        stage.b.commit()
        assert broken(stage.observer) == []
