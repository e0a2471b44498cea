"""What is done with a whole subscription while consumers and recorders run."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import pytest
from sqlalchemy import Connection, Engine, func, insert, select

from checkpoints import (
    CheckpointRecord,
    Checkpoints,
    CheckpointStatus,
    Reservation,
    ReservationLost,
    SubscriptionExists,
    SubscriptionStatus,
    UnknownSubscription,
)
from checkpoints.tables import checkpoints as checkpoints_table
from tests.support.factories import (
    GROUP,
    MINUTE,
    add_checkpoint,
    add_subscription,
    state,
    violations,
)

T = TypeVar("T")
OTHER_GROUP = "reports"


@contextmanager
def transaction(engine: Engine) -> Iterator[Checkpoints]:
    """The statements in a transaction of their own."""
    with engine.begin() as connection:
        yield Checkpoints(connection)


@pytest.fixture
def subscription(engine: Engine) -> int:
    with engine.begin() as connection:
        return add_subscription(connection)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as executor:
        yield executor


def fill(engine: Engine, subscription: int, count: int, *, position: int) -> None:
    """Checkpoints of streams of three messages."""
    with engine.begin() as connection:
        numbers = select(func.generate_series(1, count).label("n")).subquery()
        connection.execute(
            insert(checkpoints_table).from_select(
                ["subscription_id", "stream_name", "stream_version", "stream_position"],
                select(subscription, func.concat("account-", numbers.c.n), 3, position),  # type: ignore[call-overload]
            )
        )


def positions(engine: Engine, subscription: int) -> Counter[tuple[int, CheckpointStatus, bool]]:
    """How many checkpoints stand where: position, status, whether reserved."""
    with engine.connect() as connection:
        rows = connection.execute(
            select(
                checkpoints_table.c.stream_position,
                checkpoints_table.c.status,
                checkpoints_table.c.reserved_until.is_not(None),
            ).where(checkpoints_table.c.subscription_id == subscription)
        )
        return Counter((position, status, held) for position, status, held in rows)


def all_is_well(engine: Engine) -> bool:
    with engine.connect() as connection:
        return violations(connection) == []


def blocked(
    threads: ThreadPoolExecutor, engine: Engine, act: Callable[[Checkpoints], T]
) -> Future[T]:
    """Run a call in another transaction, and come back when it waits for a lock."""
    pids: list[int] = []

    def run() -> T:
        with engine.begin() as connection:
            pids.append(connection.execute(select(func.pg_backend_pid())).scalar_one())
            return act(Checkpoints(connection))

    future = threads.submit(run)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        while True:
            assert not future.done(), f"it waits for nothing: {future}"
            waits = (
                pids
                and connection.execute(
                    select(func.cardinality(func.pg_blocking_pids(pids[0])) > 0)
                ).scalar_one()
            )
            if waits:
                return future
            time.sleep(0.005)


def reserve_one(engine: Engine, group: str = GROUP) -> Reservation:
    with transaction(engine) as checkpoints:
        (held,) = checkpoints.reserve_next_available_checkpoint(group, MINUTE)
        return held


class Consumer:
    """Takes what there is, in batches, until told to stop."""

    def __init__(self, engine: Engine, group: str = GROUP, *, limit: int = 20) -> None:
        self._engine = engine
        self._group = group
        self._limit = limit
        self.stopped = threading.Event()
        self.processed: Counter[int] = Counter()
        self.lost = 0
        self.finished = 0

    def run(self) -> None:
        while not self.stopped.is_set():
            with transaction(self._engine) as checkpoints:
                held = checkpoints.reserve_next_available_checkpoint(
                    self._group, MINUTE, limit=self._limit
                )
            for reservation in held:
                self._process(reservation)
            if not held:
                self.stopped.wait(0.01)

    def _process(self, reservation: Reservation) -> None:
        try:
            with transaction(self._engine) as checkpoints:
                checkpoints.update_checkpoint_position(reservation, reservation.stream_version)
        except ReservationLost:
            self.lost += 1
            return
        self.processed[reservation.id] += 1
        if reservation.replay_target_position is not None:
            with transaction(self._engine) as checkpoints:
                self.finished += checkpoints.finish_replay(reservation.subscription_id)


@contextmanager
def running(threads: ThreadPoolExecutor, *consumers: Consumer) -> Iterator[None]:
    """Consumers at work; what they raise fails the test."""
    futures = [threads.submit(consumer.run) for consumer in consumers]
    try:
        yield
    finally:
        for consumer in consumers:
            consumer.stopped.set()
        for future in futures:
            future.result()


def reset_all(engine: Engine, subscription: int, *, limit: int = 500) -> list[str]:
    """The whole procedure; every stream that was taken back."""
    names: list[str] = []
    after = ""
    while True:
        with transaction(engine) as checkpoints:
            batch = checkpoints.reset_subscription_checkpoints(
                subscription, after=after, limit=limit
            )
        if not batch and not after:
            return names
        names += batch
        after = batch[-1] if batch else ""


def delete_all(engine: Engine, subscription: int, *, limit: int = 500) -> None:
    """The whole procedure."""
    while True:
        with transaction(engine) as checkpoints:
            count = checkpoints.delete_subscription_checkpoints(subscription, limit=limit)
            if checkpoints.delete_subscription(subscription):
                return
        if not count:
            time.sleep(0.005)


# Reset and replay.


def test_a_holder_loses_its_reservation_by_a_reset(engine: Engine, subscription: int) -> None:
    fill(engine, subscription, 1, position=1)
    held = reserve_one(engine)
    with transaction(engine) as checkpoints:
        checkpoints.pause_subscription(subscription)
    assert reset_all(engine, subscription) == ["account-1"]
    with pytest.raises(ReservationLost), transaction(engine) as checkpoints:
        checkpoints.update_checkpoint_position(held, 3)
    assert positions(engine, subscription) == {(0, CheckpointStatus.ACTIVE, False): 1}


def test_reset_waits_for_a_position_under_way_and_takes_it_back(
    engine: Engine, subscription: int, threads: ThreadPoolExecutor
) -> None:
    """Its snapshot still says that there is nothing to take back but the reservation."""
    fill(engine, subscription, 1, position=0)
    held = reserve_one(engine)
    with transaction(engine) as checkpoints:
        checkpoints.pause_subscription(subscription)
    with transaction(engine) as checkpoints:
        checkpoints.update_checkpoint_position(held, 3)
        future = blocked(threads, engine, lambda c: c.reset_subscription_checkpoints(subscription))
    assert future.result() == ["account-1"]
    assert positions(engine, subscription) == {(0, CheckpointStatus.ACTIVE, False): 1}
    assert all_is_well(engine)


def test_resume_waits_for_a_batch_under_way(
    engine: Engine, subscription: int, threads: ThreadPoolExecutor
) -> None:
    """So no consumer is given a checkpoint that the batch is about to take back."""
    fill(engine, subscription, 1, position=3)
    with transaction(engine) as checkpoints:
        checkpoints.pause_subscription(subscription)
    with transaction(engine) as checkpoints:
        checkpoints.reset_subscription_checkpoints(subscription)
        future = blocked(threads, engine, lambda c: c.resume_subscription(subscription))
    assert future.result() is SubscriptionStatus.ACTIVE


def test_a_recorder_passes_a_batch_under_way(engine: Engine, subscription: int) -> None:
    fill(engine, subscription, 1, position=3)
    with transaction(engine) as checkpoints:
        checkpoints.pause_subscription(subscription)
    with transaction(engine) as checkpoints:
        checkpoints.reset_subscription_checkpoints(subscription)
        with transaction(engine) as recorder:
            assert recorder.record_checkpoints([CheckpointRecord(subscription, "account-2", 1)])


def test_an_interrupted_reset_goes_on_and_takes_each_back_once(
    engine: Engine, subscription: int, threads: ThreadPoolExecutor
) -> None:
    """20,000, with consumers that still hold some, and a recorder that goes on."""
    count = 20_000
    fill(engine, subscription, count - 100, position=3)
    with engine.begin() as connection:
        for n in range(count - 100, count):
            add_checkpoint(connection, subscription, f"account-{n + 1}", position=1)
    recorded_until = threading.Event()

    def record() -> None:
        version = 4
        while not recorded_until.is_set():
            with transaction(engine) as checkpoints:
                checkpoints.record_checkpoints(
                    CheckpointRecord(subscription, f"account-{n}", version)
                    for n in range(1, count, 400)
                )
            version += 1

    taken_back: Counter[str] = Counter()
    consumers = [Consumer(engine, limit=5) for _ in range(2)]
    with running(threads, *consumers):
        recorder = threads.submit(record)
        try:
            with transaction(engine) as checkpoints:
                checkpoints.pause_subscription(subscription)
            after = ""
            for _ in range(10):
                with transaction(engine) as checkpoints:
                    batch = checkpoints.reset_subscription_checkpoints(subscription, after=after)
                taken_back.update(batch)
                after = batch[-1]
            # The process dies in the middle of a batch, and nobody knows how far it was.
            with engine.connect() as connection:
                Checkpoints(connection).reset_subscription_checkpoints(subscription, after=after)
                connection.rollback()
            taken_back.update(reset_all(engine, subscription))
        finally:
            recorded_until.set()
            recorder.result()
        assert positions(engine, subscription) == {(0, CheckpointStatus.ACTIVE, False): count}
    # What a reserve under way took after the pause was taken back twice.
    assert taken_back.total() - len(taken_back) <= 10
    assert len(taken_back) >= count - 100
    assert all_is_well(engine)


def test_a_replay_is_finished_once_by_the_consumer_that_is_last(
    engine: Engine, subscription: int, threads: ThreadPoolExecutor
) -> None:
    count = 60
    fill(engine, subscription, count, position=3)
    consumers = [Consumer(engine, limit=2) for _ in range(4)]
    with running(threads, *consumers):
        for round_ in range(1, 9):
            with transaction(engine) as checkpoints:
                checkpoints.pause_subscription(subscription)
            assert len(reset_all(engine, subscription)) == count
            with transaction(engine) as checkpoints:
                checkpoints.replay_subscription(subscription, target_position=round_)
            while True:
                with transaction(engine) as checkpoints:
                    stands = checkpoints.get_subscription(GROUP, "balances")
                assert stands is not None
                if stands.status is SubscriptionStatus.ACTIVE:
                    break
                time.sleep(0.005)
            assert stands.replay_target_position is None
            assert sum(consumer.finished for consumer in consumers) <= round_
            assert positions(engine, subscription) == {(3, CheckpointStatus.ACTIVE, False): count}
    assert sum(consumer.finished for consumer in consumers) == 8
    done = sum((consumer.processed for consumer in consumers), Counter[int]())
    assert set(done.values()) == {8}


def test_finish_in_the_transaction_of_the_position_may_miss_the_end(
    engine: Engine, subscription: int
) -> None:
    """Why it wants one of its own."""
    fill(engine, subscription, 2, position=0)
    with transaction(engine) as checkpoints:
        checkpoints.replay_subscription(subscription, target_position=1)
    first, second = reserve_one(engine), reserve_one(engine)
    with transaction(engine) as one, transaction(engine) as other:
        one.update_checkpoint_position(first, 3)
        other.update_checkpoint_position(second, 3)
        assert not one.finish_replay(subscription)
        assert not other.finish_replay(subscription)
    with transaction(engine) as checkpoints:
        assert checkpoints.finish_replay(subscription)


def test_finish_leaves_a_replay_that_was_started_anew_while_it_waited(
    engine: Engine, subscription: int, threads: ThreadPoolExecutor
) -> None:
    """Its snapshot says that nothing is left, and the row again that it replays to the same end."""
    fill(engine, subscription, 1, position=3)
    with transaction(engine) as checkpoints:
        checkpoints.replay_subscription(subscription, target_position=1)
    with transaction(engine) as checkpoints:
        checkpoints.pause_subscription(subscription)
        checkpoints.reset_subscription_checkpoints(subscription)
        checkpoints.replay_subscription(subscription, target_position=1)
        future = blocked(threads, engine, lambda c: c.finish_replay(subscription))
    assert future.result() is False
    with transaction(engine) as checkpoints:
        (held,) = checkpoints.reserve_next_available_checkpoint(GROUP, MINUTE)
        assert held.replay_target_position == 1


# Delete.


def test_delete_while_consumers_and_a_recorder_run(
    engine: Engine, subscription: int, threads: ThreadPoolExecutor
) -> None:
    with engine.begin() as connection:
        kept = add_subscription(connection, "statements")
    fill(engine, subscription, 2_000, position=0)
    refused: list[int | None] = []

    def record() -> None:
        """What it has seen, for both subscriptions in one statement, for ever new streams too."""
        followers = [subscription, kept]
        for version in range(4, 1_000):
            if len(followers) == 1 and version % 20 == 0:
                return
            given = [
                CheckpointRecord(follower, name, version)
                for name in [*(f"account-{n}" for n in range(1, 60)), f"new-{version}"]
                for follower in followers
            ]
            try:
                with transaction(engine) as checkpoints:
                    checkpoints.record_checkpoints(given)
            except UnknownSubscription as error:
                refused.append(error.subscription_id)
                followers.remove(subscription)
                with engine.connect() as connection:
                    # Of a batch that is refused, nothing is recorded.
                    new = select(checkpoints_table.c.id).where(
                        checkpoints_table.c.stream_name == f"new-{version}"
                    )
                    assert connection.execute(new).all() == []

    consumers = [Consumer(engine) for _ in range(4)]
    with running(threads, *consumers):
        recorder = threads.submit(record)
        delete_all(engine, subscription, limit=100)
        recorder.result()
        assert refused == [subscription]
    assert positions(engine, subscription) == {}
    with transaction(engine) as checkpoints:
        assert checkpoints.get_subscription(GROUP, "balances") is None
        assert [row.id for row in checkpoints.get_metrics()] == [kept]
    assert positions(engine, kept).total() > 59
    assert all_is_well(engine)


def test_a_holder_loses_its_reservation_by_the_delete(engine: Engine, subscription: int) -> None:
    fill(engine, subscription, 1, position=0)
    held = reserve_one(engine)
    delete_all(engine, subscription)
    with pytest.raises(ReservationLost), transaction(engine) as checkpoints:
        checkpoints.update_checkpoint_position(held, 3)


def test_delete_passes_over_what_a_recorder_holds_and_never_deadlocks_with_it(
    engine: Engine, subscription: int, threads: ThreadPoolExecutor
) -> None:
    fill(engine, subscription, 3, position=3)
    with engine.connect() as connection:
        recorder = Checkpoints(connection)
        recorder.record_checkpoints([CheckpointRecord(subscription, "account-2", 9)])
        with transaction(engine) as deleter:
            assert deleter.delete_subscription_checkpoints(subscription) == 2
            assert deleter.delete_subscription(subscription) is False
            adding = threads.submit(
                recorder.record_checkpoints, [CheckpointRecord(subscription, "account-4", 1)]
            )
            wait_until_blocked(engine, connection)
        assert len(adding.result()) == 1
        connection.commit()
    delete_all(engine, subscription)
    assert all_is_well(engine)


def test_a_recorder_that_waited_for_the_delete_is_refused_as_a_whole(
    engine: Engine, subscription: int, threads: ThreadPoolExecutor
) -> None:
    with engine.begin() as connection:
        kept = add_subscription(connection, "statements")
        kept_id = add_checkpoint(connection, kept, version=3)
    fill(engine, subscription, 3, position=3)
    records = [CheckpointRecord(id, "account-1", 9) for id in (kept, subscription)]
    with transaction(engine) as deleter:
        assert deleter.delete_subscription_checkpoints(subscription) == 3
        assert deleter.delete_subscription(subscription) is True
        future = blocked(threads, engine, lambda c: c.record_checkpoints(records))
    with pytest.raises(UnknownSubscription, match=f"with id {subscription}"):
        future.result()
    with engine.connect() as connection:
        assert state(connection, kept_id).version == 3


def test_delete_sees_what_a_recorder_added_while_it_waited(
    engine: Engine, subscription: int, threads: ThreadPoolExecutor
) -> None:
    def delete_rest(checkpoints: Checkpoints) -> tuple[int, bool]:
        count = checkpoints.delete_subscription_checkpoints(subscription)
        return count, checkpoints.delete_subscription(subscription)

    with transaction(engine) as recorder:
        recorder.record_checkpoints([CheckpointRecord(subscription, "account-1", 1)])
        future = blocked(threads, engine, delete_rest)
    assert future.result() == (0, False)
    with transaction(engine) as checkpoints:
        assert delete_rest(checkpoints) == (1, True)


def wait_until_blocked(engine: Engine, connection: Connection) -> None:
    """Until the statement that another thread runs on the connection waits for a lock."""
    driver = connection.connection.driver_connection
    assert driver is not None
    pid = driver.info.backend_pid
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watching:
        waits = select(func.cardinality(func.pg_blocking_pids(pid)) > 0)
        while not watching.execute(waits).scalar_one():
            time.sleep(0.005)


# Rename and move.


def test_move_while_consumers_of_both_groups_reserve(
    engine: Engine, subscription: int, threads: ThreadPoolExecutor
) -> None:
    count = 400
    fill(engine, subscription, count, position=0)
    consumers = [Consumer(engine, group, limit=3) for group in (GROUP, OTHER_GROUP) * 2]
    with running(threads, *consumers):
        groups = [OTHER_GROUP, GROUP]
        while positions(engine, subscription)[(3, CheckpointStatus.ACTIVE, False)] < count:
            with transaction(engine) as checkpoints:
                checkpoints.move_subscription(subscription, groups[0])
            groups.reverse()
    done = sum((consumer.processed for consumer in consumers), Counter[int]())
    assert set(done.values()) == {1}
    assert len(done) == count
    assert sum(consumer.lost for consumer in consumers) == 0
    assert all_is_well(engine)


def test_of_two_that_move_to_a_new_group_under_one_name_the_second_is_refused(
    engine: Engine, subscription: int, threads: ThreadPoolExecutor
) -> None:
    with engine.begin() as connection:
        other = add_subscription(connection, group="others")
    with transaction(engine) as checkpoints:
        checkpoints.move_subscription(subscription, OTHER_GROUP)
        future = blocked(threads, engine, lambda c: c.move_subscription(other, OTHER_GROUP))
    with pytest.raises(SubscriptionExists, match="'balances' already"):
        future.result()
