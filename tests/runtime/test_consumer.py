"""What both consumers do with the work that there is."""

from __future__ import annotations

import asyncio
import threading
import time
from datetime import timedelta
from typing import Any

import pytest
from psycopg import IsolationLevel
from sqlalchemy import event, text

from checkpoints import (
    CheckpointRecord,
    Checkpoints,
    CheckpointStatus,
    ReplayMode,
    Subscription,
    SubscriptionStatus,
    record_checkpoints,
)
from tests.runtime.consumers import Bench, Outside, Work, until
from tests.support.factories import FAR_AHEAD, GROUP, LONG_AGO, state, violations

HOUR = timedelta(hours=1)


async def write(work: Work) -> None:
    await work.write()


def record(bench: Bench, subscription_id: int, stream: str, version: int) -> None:
    with bench.engine.begin() as connection:
        connection.execute(record_checkpoints([CheckpointRecord(subscription_id, stream, version)]))


def test_the_writes_of_a_handler_and_the_position_commit_together(bench: Bench) -> None:
    ids = bench.fill("account-1", "account-2")

    assert bench.consumer(write).drain() == 2

    assert sorted(bench.notes()) == ["account-1", "account-2"]
    with bench.engine.connect() as connection:
        for id in ids:
            after = state(connection, id)
            assert (after.position, after.ready, after.reserved) == (3, None, None)
        assert violations(connection) == []
        same = connection.execute(
            text(
                "SELECT count(*) FROM checkpoints.checkpoints c JOIN notes USING (stream_name)"
                " WHERE c.xmin = notes.xmin"
            )
        ).scalar()
    assert same == 2


@pytest.mark.parametrize(
    ("default", "arguments", "autocommits"),
    [
        ("read committed", {}, True),
        ("read committed", {"isolation_level": "SERIALIZABLE"}, True),
        ("repeatable read", {}, False),
        ("repeatable read", {"isolation_level": "READ COMMITTED"}, False),
    ],
)
def test_a_reserve_is_a_transaction_by_itself_unless_the_default_is_stricter(
    bench: Bench, default: str, arguments: dict[str, Any], autocommits: bool
) -> None:
    """Without BEGIN and COMMIT it is one way to the server instead of three."""
    bench.fill("account-1")
    escaped = default.replace(" ", "\\ ")
    options = {"options": f"-c default_transaction_isolation={escaped}"}
    runner = bench.consumer(write, engine={"connect_args": options, **arguments})
    reserves: set[tuple[bool, IsolationLevel | None]] = set()
    handlers: set[bool] = set()

    def executed(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        driver = connection.connection.driver_connection
        if "reserve_claimed" in statement:
            reserves.add((driver.autocommit, driver.isolation_level))
        elif "INTO notes" in statement:
            handlers.add(driver.autocommit)

    event.listen(runner.sync_engine, "before_cursor_execute", executed)
    assert runner.drain() == 1
    assert reserves == {(autocommits, None if autocommits else IsolationLevel.READ_COMMITTED)}
    assert handlers == {False}


def test_the_position_that_a_handler_answers_is_where_the_next_begins(bench: Bench) -> None:
    bench.fill("account-1")
    begun: list[int] = []

    async def one_message(work: Work) -> int:
        begun.append(work.reservation.stream_position)
        return work.reservation.stream_position + 1

    assert bench.consumer(one_message).drain() == 3

    assert begun == [0, 1, 2]


def test_a_handler_that_gets_nowhere_waits_before_it_is_tried_again(bench: Bench) -> None:
    ids = bench.fill("account-1")

    async def nowhere(work: Work) -> int:
        return work.reservation.stream_position

    assert bench.consumer(nowhere, poll_interval=HOUR).drain() == 1

    with bench.engine.connect() as connection:
        after = state(connection, ids[0])
    assert (after.status, after.retry_attempts) == (CheckpointStatus.ACTIVE, 0)
    assert after.ready is not None


@pytest.mark.parametrize("answer", ["3", True, -1, 2.5])
def test_an_answer_that_is_no_position_is_the_handlers_error(bench: Bench, answer: Any) -> None:
    ids = bench.fill("account-1")

    async def wrong(work: Work) -> Any:
        await work.write()
        return answer

    bench.consumer(wrong).drain()

    with bench.engine.connect() as connection:
        after = state(connection, ids[0])
    assert after.status is CheckpointStatus.RETRY
    assert after.retries is not None
    assert "stream_position must be" in after.retries[0]["error"]["message"]
    assert bench.notes() == []


def test_a_handler_that_ends_its_transaction_is_in_error(bench: Bench) -> None:
    ids = bench.fill("account-1")

    async def committing(work: Work) -> None:
        await work.write()
        await work.commit()

    bench.consumer(committing).drain()

    with bench.engine.connect() as connection:
        after = state(connection, ids[0])
    assert after.position == 0
    assert after.retries is not None
    assert "ended the transaction" in after.retries[0]["error"]["message"]


def test_a_handler_outside_a_transaction_is_given_the_reservation_alone(bench: Bench) -> None:
    ids = bench.fill("account-1")
    seen: list[str] = []

    async def outside(work: Work) -> None:
        assert work.connection is None
        seen.append(work.reservation.stream_name)

    assert bench.consumer(Outside(outside)).drain() == 1

    assert seen == ["account-1"]
    with bench.engine.connect() as connection:
        assert state(connection, ids[0]).position == 3


def test_no_connection_is_held_while_a_handler_outside_a_transaction_runs(bench: Bench) -> None:
    bench.fill("account-1")
    held: list[int] = []

    async def outside(_work: Work) -> None:
        pool: Any = runner.sync_engine.pool
        ends = time.monotonic() + 10
        # The keeper takes one for a moment now and then.
        while pool.checkedout() and time.monotonic() < ends:
            if bench.is_async:
                await asyncio.sleep(0.005)
            else:
                time.sleep(0.005)
        held.append(pool.checkedout())

    runner = bench.consumer(Outside(outside), concurrency=1, listen=False)
    runner.drain()

    assert held == [0]


def test_as_many_handlers_run_at_once_as_concurrency_says_and_no_more(bench: Bench) -> None:
    bench.fill(*(f"account-{number}" for number in range(12)))
    lock = threading.Lock()
    running: list[int] = [0, 0]
    three = threading.Event()

    async def counted(work: Work) -> None:
        with lock:
            running[0] += 1
            running[1] = max(running)
            if running[0] == 3:
                three.set()
        await work.wait(three)
        with lock:
            running[0] -= 1

    assert bench.consumer(counted, concurrency=3).drain() == 12

    assert running[1] == 3


def test_a_batch_is_reserved_at_once_and_started_one_by_one(bench: Bench) -> None:
    bench.fill(*(f"account-{number}" for number in range(10)))
    started, go_on = threading.Event(), threading.Event()
    order: list[str] = []

    async def held_up(work: Work) -> None:
        order.append(work.reservation.stream_name)
        started.set()
        await work.wait(go_on)

    runner = bench.consumer(held_up, concurrency=1, batch=10)
    with runner.statements() as executed:
        drained = runner.start_drain()
        assert started.wait(10)
        assert bench.ask("SELECT count(*) FROM checkpoints.checkpoints_reserved") == 10
        go_on.set()
        assert drained.result(20) == 10
    assert sum("reserve_claimed" in statement for statement in executed) <= 3
    assert len(order) == 10


def test_what_was_due_longest_is_taken_first_whatever_its_subscription(bench: Bench) -> None:
    many = bench.fill(*(f"busy-{number}" for number in range(20)))
    few = bench.fill("quiet-1", subscription="mails")
    bench.execute(
        "UPDATE checkpoints.checkpoints SET process_at = :at WHERE id = ANY(:ids)",
        at=LONG_AGO + HOUR,
        ids=many[:10] + few,
    )
    bench.execute(
        "UPDATE checkpoints.checkpoints SET process_at = :at WHERE id = ANY(:ids)",
        at=LONG_AGO + 2 * HOUR,
        ids=many[10:],
    )
    order: list[str] = []

    async def noted(work: Work) -> None:
        order.append(work.reservation.stream_name)

    assert bench.consumer(noted, concurrency=1).drain() == 21

    assert "quiet-1" in order[:11]
    assert set(order[11:]) == {f"busy-{number}" for number in range(10, 20)}


def test_a_mapping_serves_the_subscriptions_that_it_names_alone(bench: Bench) -> None:
    bench.fill("account-1", "account-2")
    bench.fill("mail-1", subscription="mails")
    bench.fill("other-1", subscription="others")

    assert bench.consumer({"balances": write, "mails": write}).drain() == 3

    assert sorted(bench.notes()) == ["account-1", "account-2", "mail-1"]


def test_a_consumer_of_replays_leaves_live_subscriptions(bench: Bench) -> None:
    bench.fill("account-1")

    assert bench.consumer(write, replay_mode=ReplayMode.REPLAY).drain() == 0
    assert bench.consumer(write, replay_mode=ReplayMode.LIVE).drain() == 1


def replay(bench: Bench, **columns: Any) -> Subscription:
    """Replay a stream with three messages, drain, and see how the subscription stands."""
    bench.fill("account-1", **columns)
    with bench.engine.begin() as connection:
        Checkpoints(connection).pause_subscription(1)
        Checkpoints(connection).replay_subscription(1, target_position=9)
    targets = []

    async def step(work: Work) -> None:
        targets.append(work.reservation.replay_target_position)

    assert bench.consumer(step).drain() == len(targets)
    assert set(targets) <= {9}
    with bench.engine.connect() as connection:
        subscription = Checkpoints(connection).get_subscription(GROUP, "balances")
    assert subscription is not None
    return subscription


def test_a_replay_ends_when_nothing_of_it_is_left(bench: Bench) -> None:
    ended = replay(bench)
    assert (ended.status, ended.replay_target_position) == (SubscriptionStatus.ACTIVE, None)


def test_a_replay_with_work_left_goes_on(bench: Bench) -> None:
    going_on = replay(bench, process_at=FAR_AHEAD)
    assert (going_on.status, going_on.replay_target_position) == (SubscriptionStatus.REPLAY, 9)


def test_run_once_processes_one_batch(bench: Bench) -> None:
    bench.fill(*(f"account-{number}" for number in range(5)))
    runner = bench.consumer(write, concurrency=2)

    assert [runner.run_once() for _ in range(4)] == [2, 2, 1, 0]


def test_drain_leaves_what_is_due_later(bench: Bench) -> None:
    bench.fill("account-1")
    bench.fill("account-2", subscription="mails", process_at=FAR_AHEAD)

    assert bench.consumer(write).drain() == 1

    assert bench.notes() == ["account-1"]


# --- waking up


def subscription_of(bench: Bench) -> int:
    bench.fill("account-0", version=0)
    return int(bench.ask("SELECT id FROM checkpoints.subscriptions"))


def listening(bench: Bench) -> list[int]:
    return bench.backends("LISTEN%")


def test_a_notification_wakes_it(bench: Bench) -> None:
    subscription_id = subscription_of(bench)

    with bench.consumer(write, poll_interval=HOUR).running():
        until(lambda: listening(bench))
        for version in (1, 2, 3):
            record(bench, subscription_id, "account-1", version)
            until(lambda: len(bench.notes()) == version)  # noqa: B023  # called at once


def test_it_listens_again_when_its_listening_connection_was_ended(bench: Bench) -> None:
    subscription_id = subscription_of(bench)

    with bench.consumer(write, poll_interval=HOUR).running():
        first = until(lambda: listening(bench))
        assert bench.terminate("LISTEN%") == 1
        # What is recorded while nobody listens is found after the reconnection.
        record(bench, subscription_id, "account-1", 1)
        until(lambda: len(bench.notes()) == 1)
        until(lambda: listening(bench) not in ([], first))
        record(bench, subscription_id, "account-1", 2)
        until(lambda: len(bench.notes()) == 2)


def test_it_polls_when_it_does_not_listen(bench: Bench) -> None:
    subscription_id = subscription_of(bench)

    with bench.consumer(write, listen=False, poll_interval=timedelta(milliseconds=50)).running():
        record(bench, subscription_id, "account-1", 1)
        until(lambda: len(bench.notes()) == 1)
        assert listening(bench) == []


def test_it_polls_when_notifications_are_switched_off(bench: Bench) -> None:
    subscription_id = subscription_of(bench)

    with bench.consumer(write, poll_interval=timedelta(milliseconds=50)).running():
        until(lambda: listening(bench))
        with bench.engine.begin() as connection:
            connection.execute(text("SET LOCAL checkpoints.notify = 'off'"))
            connection.execute(
                record_checkpoints([CheckpointRecord(subscription_id, "account-1", 1)])
            )
        until(lambda: len(bench.notes()) == 1)


def test_the_listener_takes_no_connection_of_the_pool(bench: Bench) -> None:
    bench.fill("account-1")
    started, go_on = threading.Event(), threading.Event()

    async def holding_the_only_one(work: Work) -> None:
        started.set()
        await work.wait(go_on)

    runner = bench.consumer(
        holding_the_only_one,
        concurrency=1,
        engine={"pool_size": 1, "max_overflow": 0},
    )
    with runner.running():
        assert started.wait(10)
        until(lambda: listening(bench))
        go_on.set()


def test_an_idle_consumer_polls_and_does_nothing_else(bench: Bench) -> None:
    bench.fill("account-0", version=0)
    runner = bench.consumer(write, poll_interval=timedelta(seconds=0.1), recover_interval=HOUR)

    def reserves() -> int:
        return sum("reserve_claimed" in statement for statement in executed)

    with runner.statements() as executed, runner.running():
        until(lambda: listening(bench))
        before, began = reserves(), time.monotonic()
        until(lambda: reserves() >= before + 8)
        took = time.monotonic() - began
    # Jitter may make a wait shorter by a fifth.
    assert took >= 7 * 0.1 * 0.8
    # Two a poll: reserve, and when the next is due.
    assert len(executed) <= 2 * reserves() + 6


def test_a_checkpoint_that_others_hold_locked_makes_no_busy_loop(bench: Bench) -> None:
    ids = bench.fill("account-1")
    runner = bench.consumer(write, poll_interval=timedelta(seconds=0.4), recover_interval=HOUR)
    with bench.engine.connect() as other, runner.statements() as executed:
        other.execute(
            text("SELECT 1 FROM checkpoints.checkpoints WHERE id = :id FOR UPDATE"), {"id": ids[0]}
        )
        began = time.monotonic()
        with runner.running():
            until(lambda: sum("reserve_claimed" in one for one in executed) >= 9)
            took = time.monotonic() - began
            other.rollback()
            until(lambda: bench.notes() == ["account-1"])
    # The waits grow up to poll_interval: nine at 20 to 100 ms would take half a second at most.
    assert took >= 1


def test_what_is_due_later_is_taken_in_time_without_a_poll(bench: Bench) -> None:
    bench.fill("account-1")
    bench.execute(
        "UPDATE checkpoints.checkpoints SET process_at = clock_timestamp() + interval '0.4 s'"
    )

    with bench.consumer(write, poll_interval=HOUR, listen=False).running():
        until(lambda: bench.notes() == ["account-1"])

    late = bench.ask(
        "SELECT extract(epoch FROM updated_at - created_at) FROM checkpoints.checkpoints"
    )
    assert 0.35 < late < 3


# --- keeping


def reserved_until(bench: Bench) -> Any:
    return bench.ask("SELECT reserved_until FROM checkpoints.checkpoints")


def test_the_reservation_of_a_running_handler_is_extended_and_nobody_else_gets_it(
    bench: Bench,
) -> None:
    bench.fill("account-1")
    started, go_on = threading.Event(), threading.Event()
    runs: list[str] = []

    async def slow(work: Work) -> None:
        runs.append(work.reservation.stream_name)
        started.set()
        await work.write()
        await work.wait(go_on)

    settings: dict[str, Any] = {"reservation_timeout": timedelta(seconds=0.9)}
    one = bench.consumer(slow, **settings)
    other = bench.consumer(slow, recover_interval=timedelta(seconds=0.05), **settings)
    with one.running(), other.running():
        assert started.wait(10)
        first = reserved_until(bench)
        until(lambda: reserved_until(bench) > first + timedelta(seconds=1.2))
        go_on.set()
        until(lambda: bench.notes() == ["account-1"])
    assert runs == ["account-1"]


def test_those_that_wait_in_a_batch_are_kept_too(bench: Bench) -> None:
    bench.fill("account-1", "account-2", "account-3")
    started, go_on = threading.Event(), threading.Event()

    async def slow(work: Work) -> None:
        started.set()
        await work.wait(go_on)

    runner = bench.consumer(
        slow, concurrency=1, batch=3, reservation_timeout=timedelta(seconds=0.6)
    )
    drained = runner.start_drain()
    assert started.wait(10)
    first = bench.ask("SELECT max(reserved_until) FROM checkpoints.checkpoints_reserved")
    until(
        lambda: (
            bench.ask("SELECT min(reserved_until) FROM checkpoints.checkpoints_reserved")
            > first + timedelta(seconds=0.7)
        )
    )
    go_on.set()
    assert drained.result(20) == 3


def test_a_locked_checkpoint_does_not_keep_the_others_from_being_extended(bench: Bench) -> None:
    ids = bench.fill(*(f"account-{number}" for number in range(4)))
    go_on = threading.Event()
    started: list[str] = []

    async def slow(work: Work) -> None:
        if work.reservation.id != ids[3]:
            await work.execute(
                text("SELECT 1 FROM checkpoints.checkpoints WHERE id = :id FOR UPDATE"),
                {"id": work.reservation.id},
            )
        started.append(work.reservation.stream_name)
        await work.wait(go_on)

    def token(id: int) -> Any:
        return bench.ask("SELECT reserved_until FROM checkpoints.checkpoints WHERE id = :id", id=id)

    runner = bench.consumer(slow, reservation_timeout=timedelta(seconds=1.2))
    drained = runner.start_drain()
    until(lambda: len(started) == 4)
    for _ in range(3):
        before = token(ids[3])
        until(lambda: token(ids[3]) > before)  # noqa: B023  # called at once
        # Never less than a third was left when it was extended.
        assert token(ids[3]) - before < timedelta(seconds=0.8)
    go_on.set()
    assert drained.result(20) >= 1


def test_a_handler_whose_reservation_is_lost_is_interrupted_and_rolled_back(bench: Bench) -> None:
    ids = bench.fill("account-1")
    started = threading.Event()
    runs: list[int] = []

    async def waiting_for_the_database(work: Work) -> None:
        runs.append(1)
        await work.write()
        if len(runs) == 1:
            started.set()
            await work.execute(text("SELECT pg_sleep(60)"))

    runner = bench.consumer(waiting_for_the_database, reservation_timeout=timedelta(seconds=0.9))
    with runner.running():
        assert started.wait(10)
        bench.execute(
            "UPDATE checkpoints.checkpoints SET reserved_until = NULL WHERE id = :id", id=ids[0]
        )
        until(lambda: bench.notes() == ["account-1"])

    assert len(runs) == 2
    with bench.engine.connect() as connection:
        after = state(connection, ids[0])
    # A loss is no error of the handler's.
    assert (after.position, after.retry_attempts) == (3, 0)


def test_a_late_update_of_a_lost_reservation_is_rolled_back(bench: Bench) -> None:
    bench.fill("account-1")

    async def losing(work: Work) -> None:
        await work.write()
        bench.execute("UPDATE checkpoints.checkpoints SET reserved_until = :at", at=FAR_AHEAD)

    assert bench.consumer(losing).drain() == 0

    assert bench.notes() == []
    assert bench.ask("SELECT stream_position FROM checkpoints.checkpoints") == 0


def expire(bench: Bench) -> None:
    bench.execute("UPDATE checkpoints.checkpoints SET reserved_until = :at", at=LONG_AGO)


def test_what_others_left_is_recovered_and_counted_as_an_attempt(bench: Bench) -> None:
    ids = bench.fill("account-1")
    expire(bench)

    with bench.consumer(write).running():
        until(lambda: bench.notes() == ["account-1"])

    with bench.engine.connect() as connection:
        assert state(connection, ids[0]).retry_attempts == 0


@pytest.mark.parametrize("method", ["drain", "run_once"])
def test_scripts_recover_too(bench: Bench, method: str) -> None:
    ids = bench.fill("account-1")
    expire(bench)

    getattr(bench.consumer(write), method)()

    with bench.engine.connect() as connection:
        after = state(connection, ids[0])
    assert (after.status, after.retry_attempts) == (CheckpointStatus.RETRY, 1)


def test_many_expired_reservations_are_all_recovered(bench: Bench) -> None:
    bench.fill(*(f"account-{number}" for number in range(250)))
    expire(bench)

    with bench.consumer(write, concurrency=1, recover_interval=HOUR).running():
        until(lambda: bench.ask("SELECT count(*) FROM checkpoints.checkpoints_reserved") == 0)


def test_the_work_of_ten_consumers_is_done_once(bench: Bench) -> None:
    bench.fill(*(f"account-{number}" for number in range(60)))
    runners = [bench.consumer(write, concurrency=2, engine={"pool_size": 4}) for _ in range(5)]

    futures = [runner.start_drain() for runner in runners]

    assert sum(future.result(30) for future in futures) == 60
    assert len(bench.notes()) == 60
    with bench.engine.connect() as connection:
        assert violations(connection) == []


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_stricter_isolation_levels_conflict_and_lose_nothing(bench: Bench, level: str) -> None:
    bench.fill(*(f"account-{number}" for number in range(30)))
    bench.execute("CREATE TABLE totals (total bigint)")
    bench.execute("INSERT INTO totals VALUES (0)")

    async def counting(work: Work) -> None:
        await work.execute(text("UPDATE totals SET total = total + 1"))

    runners = [
        bench.consumer(counting, engine={"isolation_level": level, "pool_size": 8})
        for _ in range(2)
    ]
    futures = [runner.start_drain() for runner in runners]

    assert sum(future.result(30) for future in futures) == 30
    assert bench.ask("SELECT total FROM totals") == 30
    assert bench.ask("SELECT count(*) FROM checkpoints.checkpoints WHERE retries IS NOT NULL") == 0


def test_an_engine_in_autocommit_mode_is_refused(bench: Bench) -> None:
    bench.fill("account-1")

    with pytest.raises(ValueError, match="AUTOCOMMIT"):
        bench.consumer(write, engine={"isolation_level": "AUTOCOMMIT"}).drain()


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["balances", "mials"], "no subscription named 'mials' in the group 'accounts'"),
        (["balances"], None),
    ],
)
def test_a_handler_for_a_subscription_that_is_not_there_is_warned_of(
    bench: Bench, caplog: pytest.LogCaptureFixture, names: list[str], said: str | None
) -> None:
    bench.fill("account-1")

    assert bench.consumer(dict.fromkeys(names, write)).drain() == 1

    warned = [record.getMessage() for record in caplog.records]
    assert [message.split(";")[0] for message in warned] == ([said] if said else [])


def test_a_group_without_subscriptions_is_warned_of(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    bench.fill("account-1")

    assert bench.consumer(write, group="acounts").drain() == 0

    assert "the group 'acounts' has no subscriptions" in caplog.text


def test_log_records_carry_the_ids_as_fields(
    bench: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    ids = bench.fill("account-1")

    with caplog.at_level("DEBUG", logger="checkpoints"):
        bench.consumer(write).drain()

    (record,) = [record for record in caplog.records if "processed" in record.getMessage()]
    fields = record.__dict__
    assert fields["checkpoint_id"] == ids[0]
    assert fields["subscription"] == "balances"
    assert fields["stream_name"] == "account-1"
    assert (fields["stream_position"], fields["stream_version"]) == (0, 3)
    assert fields["group"] == GROUP
