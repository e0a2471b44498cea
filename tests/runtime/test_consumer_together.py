"""Handlers that share a transaction, of both consumers: one commit, or each by itself."""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import URL, Engine, event, text

from checkpoints import CheckpointStatus, release_checkpoint_reservation
from checkpoints.runtime import AsyncConsumer, RetryPolicy
from checkpoints.runtime._held import Holding
from tests.runtime.consumers import Bench, Outside, Runner, Steps, Work, until
from tests.support.factories import MINUTE, State, state, violations

ONCE = RetryPolicy(max_attempts=1)
STREAMS = [f"account-{n}" for n in range(9)]


async def write(work: Work) -> None:
    await work.write()


def together(bench: Bench, steps: Steps, **settings: Any) -> Runner:
    settings = {"concurrency": 1, "handlers_per_transaction": 9, "listen": False} | settings
    return bench.consumer(steps, **settings)


def notes(bench: Bench) -> dict[str, str]:
    """The transaction that wrote each stream's note; no stream has two."""
    with bench.engine.begin() as connection:
        rows = connection.execute(text("SELECT stream_name, CAST(xmin AS text) FROM notes")).all()
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0]: row[1] for row in rows}


def after(bench: Bench, id: int) -> State:
    with bench.engine.connect() as connection:
        return state(connection, id)


def error_of(bench: Bench, id: int) -> Any:
    """The one error of a checkpoint."""
    (entry,) = after(bench, id).retries or []
    return entry["error"]


def reserved(bench: Bench) -> Any:
    return bench.ask("SELECT count(*) FROM checkpoints.checkpoints_reserved")


def release(bench: Bench, id: int) -> None:
    """As an operator does who ends a reservation."""
    with bench.engine.begin() as connection:
        connection.execute(release_checkpoint_reservation(id))


def sound(bench: Bench) -> None:
    with bench.engine.connect() as connection:
        assert violations(connection) == []


@pytest.fixture
def ids(bench: Bench) -> list[int]:
    """Nine streams of a subscription, the first due first."""
    return bench.fill(*STREAMS)


@pytest.fixture
def async_bench(migrated_url: URL, engine: Engine) -> Iterator[Bench]:
    made = Bench("asyncio", migrated_url, engine)
    made.fill(*STREAMS)
    yield made
    made.close()


class Stubborn:
    """A handler of which one stream's hangs, in spite of being cancelled, until it is let go."""

    def __init__(self, stream: str) -> None:
        self.stream = stream
        self.hangs, self.go_on = threading.Event(), threading.Event()

    async def __call__(self, work: Work) -> None:
        if work.reservation.stream_name == self.stream:
            self.hangs.set()
            while not self.go_on.is_set():
                with suppress(asyncio.CancelledError):
                    await work.wait(self.go_on)
        await work.write()


class Sleeper:
    """A handler of which one stream's waits for the database the first time it runs."""

    def __init__(self, stream: str) -> None:
        self.stream = stream
        self.sleeps = threading.Event()
        self.runs: Counter[str] = Counter()

    async def __call__(self, work: Work) -> None:
        name = work.reservation.stream_name
        self.runs[name] += 1
        await work.write()
        if name == self.stream and self.runs[name] == 1:
            self.sleeps.set()
            await work.execute(text("SELECT pg_sleep(60)"))


# --- one transaction


def test_their_positions_and_writes_are_one_transaction(bench: Bench, ids: list[int]) -> None:
    runner = together(bench, write)
    with runner.statements() as executed:
        assert runner.drain() == 9
    assert len(set(notes(bench).values())) == 1
    assert [after(bench, id).position for id in ids] == [3] * 9
    assert sum("SET stream_position" in statement for statement in executed) == 1
    sound(bench)


@pytest.mark.parametrize(
    ("concurrency", "number", "most"), [(1, 4, 4), (2, 9, 5), (3, 9, 3), (4, 1, 1)]
)
@pytest.mark.usefixtures("ids")
def test_those_that_wait_are_shared_out(
    bench: Bench, concurrency: int, number: int, most: int
) -> None:
    runner = together(
        bench, write, concurrency=concurrency, handlers_per_transaction=number, batch=9
    )
    assert runner.drain() == 9
    assert max(Counter(notes(bench).values()).values()) <= most
    assert len(notes(bench)) == 9


def test_a_retry_and_a_handler_outside_a_transaction_share_none(
    bench: Bench, ids: list[int]
) -> None:
    bench.execute(
        "UPDATE checkpoints.checkpoints SET status = 'retry', retry_attempts = 1 WHERE id = :id",
        id=ids[4],
    )
    bench.fill("mail-1", "mail-2", subscription="mails")
    mailed: list[str] = []

    async def mail(work: Work) -> None:
        assert work.connection is None
        mailed.append(work.reservation.stream_name)

    assert together(bench, {"balances": write, "mails": Outside(mail)}).drain() == 11
    assert sorted(mailed) == ["mail-1", "mail-2"]
    written = notes(bench)
    own = written.pop("account-4")
    assert own not in written.values()


def test_a_reservation_that_is_extended_meanwhile_is_updated_by_its_new_token(
    bench: Bench, ids: list[int]
) -> None:
    waits, go_on = threading.Event(), threading.Event()

    async def handler(work: Work) -> None:
        await work.write()
        if work.reservation.stream_name == "account-8":
            waits.set()
            await work.wait(go_on)

    runner = together(bench, handler, reservation_timeout=timedelta(seconds=3))
    drained = runner.start_drain()
    assert waits.wait(10)
    first = [after(bench, id).reserved_until for id in ids]
    until(lambda: all(after(bench, id).reserved_until not in first for id in ids))
    go_on.set()
    assert drained.result(20) == 9
    assert len(set(notes(bench).values())) == 1


@pytest.mark.usefixtures("ids")
def test_a_pool_of_one_connection_is_enough(bench: Bench) -> None:
    runner = together(
        bench,
        write,
        engine={"pool_size": 1, "max_overflow": 0},
        concurrency=2,
        handlers_per_transaction=3,
        reservation_timeout=timedelta(seconds=1),
    )
    assert runner.drain() == 9
    assert max(Counter(notes(bench).values()).values()) == 3


def test_several_consumers_do_the_work_once(bench: Bench) -> None:
    bench.fill(*(f"account-{number}" for number in range(100)))
    runners = [
        together(bench, write, concurrency=2, handlers_per_transaction=number)
        for number in (1, 4, 7)
    ]
    assert sum(one.result(30) for one in [runner.start_drain() for runner in runners]) == 100
    assert len(notes(bench)) == 100
    sound(bench)


@pytest.mark.usefixtures("ids")
def test_each_handler_is_given_the_whole_of_its_time(bench: Bench) -> None:
    """All of them together take longer than one may."""

    async def handler(work: Work) -> None:
        await work.write()
        await work.execute(text("SELECT pg_sleep(0.25)"))

    assert together(bench, handler, handler_timeout=timedelta(seconds=1.5)).drain() == 9
    assert len(set(notes(bench).values())) == 1


def test_finished_work_is_not_kept_in_memory(bench: Bench) -> None:
    bench.fill(*(f"account-{number}" for number in range(300)))
    runner = together(bench, write, handlers_per_transaction=25)

    def alive() -> int:
        return sum(isinstance(one, Holding) for one in gc.get_objects())

    gc.collect()
    gc.disable()
    try:
        before = alive()
        with runner.running():
            until(lambda: bench.ask("SELECT count(*) FROM notes") == 300)
            until(lambda: reserved(bench) == 0)
            # At once, without a collection of cycles.
            until(lambda: alive() <= before)
    finally:
        gc.enable()


# --- each by itself


def test_when_one_raises_the_others_are_processed_alone(bench: Bench, ids: list[int]) -> None:
    runs: Counter[str] = Counter()

    async def handler(work: Work) -> None:
        runs[work.reservation.stream_name] += 1
        await work.write()
        if work.reservation.stream_name == "account-4":
            raise ValueError("refused")

    assert together(bench, handler, retry=ONCE).run_once() == 8
    written = notes(bench)
    assert set(written) == set(STREAMS) - {"account-4"}
    assert len(set(written.values())) == 8
    assert runs["account-4"] == 2
    assert runs["account-8"] == 1
    failed = after(bench, ids[4])
    assert (failed.status, failed.retry_attempts) == (CheckpointStatus.FAILED, 1)
    sound(bench)


@pytest.mark.parametrize(
    "error", [SystemExit(3), asyncio.CancelledError("by itself"), GeneratorExit("odd")], ids=repr
)
def test_whatever_one_raises_is_kept_and_costs_the_others_nothing(
    bench: Bench, ids: list[int], error: BaseException
) -> None:
    async def handler(work: Work) -> None:
        await work.write()
        if work.reservation.stream_name == "account-4":
            raise error

    assert together(bench, handler, retry=ONCE).run_once() == 8
    assert set(notes(bench)) == set(STREAMS) - {"account-4"}
    assert error_of(bench, ids[4])["message"] == str(error)


def test_one_that_ends_the_transaction_is_in_error(bench: Bench, ids: list[int]) -> None:
    async def handler(work: Work) -> None:
        await work.write()
        if work.reservation.stream_name == "account-4":
            await work.rollback()

    assert together(bench, handler, retry=ONCE).run_once() == 8
    assert set(notes(bench)) == set(STREAMS) - {"account-4"}
    assert "ended the transaction" in error_of(bench, ids[4])["message"]


def test_an_answer_that_is_no_position_is_the_error_of_its_handler_alone(
    bench: Bench, ids: list[int]
) -> None:
    async def handler(work: Work) -> Any:
        await work.write()
        return "3" if work.reservation.stream_name == "account-4" else None

    assert together(bench, handler, retry=ONCE).run_once() == 8
    assert set(notes(bench)) == set(STREAMS) - {"account-4"}
    assert "stream_position must be" in error_of(bench, ids[4])["message"]


def test_a_connection_that_breaks_under_them_costs_no_attempt(bench: Bench, ids: list[int]) -> None:
    runs: Counter[str] = Counter()

    async def handler(work: Work) -> None:
        name = work.reservation.stream_name
        runs[name] += 1
        await work.write()
        if name == "account-4" and runs[name] == 1:
            await work.execute(text("SELECT pg_terminate_backend(pg_backend_pid())"))

    assert together(bench, handler).run_once() == 9
    assert set(notes(bench)) == set(STREAMS)
    assert all(after(bench, id).retries is None for id in ids)


def test_a_conflict_with_another_transaction_costs_no_attempt(bench: Bench, ids: list[int]) -> None:
    bench.execute("CREATE TABLE totals AS SELECT 0 AS total")
    runs: Counter[str] = Counter()

    async def handler(work: Work) -> None:
        name = work.reservation.stream_name
        runs[name] += 1
        await work.write()
        if name == "account-4":
            await work.execute(text("SELECT total FROM totals"))
            if runs[name] == 1:
                bench.execute("UPDATE totals SET total = total + 1")
            await work.execute(text("UPDATE totals SET total = total + 1"))

    runner = together(bench, handler, engine={"isolation_level": "REPEATABLE READ"})
    assert runner.run_once() == 9
    assert runs["account-4"] == 2
    assert set(notes(bench)) == set(STREAMS)
    assert all(after(bench, id).retries is None for id in ids)


# --- reservations that are lost


def test_when_one_is_lost_the_others_are_processed_alone(bench: Bench, ids: list[int]) -> None:
    async def handler(work: Work) -> None:
        await work.write()
        if work.reservation.stream_name == "account-0":
            release(bench, ids[5])

    runner = together(bench, handler)
    assert runner.run_once() == 8
    assert set(notes(bench)) == set(STREAMS) - {"account-5"}
    assert after(bench, ids[5]).ready is not None
    assert runner.drain() == 1
    assert len(notes(bench)) == 9


@pytest.mark.parametrize("lost", [2, 4, 6], ids=["done", "running", "waiting"])
def test_when_one_is_lost_the_handler_that_runs_is_interrupted(
    bench: Bench, ids: list[int], lost: int, caplog: pytest.LogCaptureFixture
) -> None:
    sleeper = Sleeper("account-4")
    runner = together(bench, sleeper, reservation_timeout=timedelta(seconds=1.5))
    future = runner._call("run_once")
    assert sleeper.sleeps.wait(10)
    release(bench, ids[lost])
    assert future.result(20) == 8
    assert set(notes(bench)) == set(STREAMS) - {f"account-{lost}"}
    assert len(set(notes(bench).values())) == 8
    assert after(bench, ids[lost]).retries is None
    said = [record for record in caplog.records if "lost" in record.getMessage()]
    assert len(said) == 1


def test_several_that_are_lost_at_once_hold_up_nobody(bench: Bench, ids: list[int]) -> None:
    sleeper = Sleeper("account-4")
    runner = together(bench, sleeper, reservation_timeout=timedelta(seconds=1.5))
    future = runner._call("run_once")
    assert sleeper.sleeps.wait(10)
    for number in (0, 3, 5, 8):
        release(bench, ids[number])
    assert future.result(20) == 5
    assert set(notes(bench)) == {f"account-{n}" for n in (1, 2, 4, 6, 7)}
    assert runner.drain() == 4
    sound(bench)


# --- handlers that take too long


def test_one_that_takes_too_long_is_not_run_again_with_its_attempt(
    bench: Bench, ids: list[int]
) -> None:
    sleeper = Sleeper("account-4")
    runner = together(bench, sleeper, retry=ONCE, handler_timeout=timedelta(seconds=1), batch=9)
    assert runner.run_once() == 8
    assert sleeper.runs["account-4"] == 1
    assert after(bench, ids[4]).status is CheckpointStatus.FAILED
    assert error_of(bench, ids[4])["type"] == "builtins.TimeoutError"
    # Where it hung.
    assert "pg_sleep" in error_of(bench, ids[4])["traceback"]
    assert len(notes(bench)) == 8


def test_one_that_takes_too_long_with_the_only_connection_is_recorded(
    bench: Bench, ids: list[int]
) -> None:
    runner = together(
        bench,
        Sleeper("account-4"),
        engine={"pool_size": 1, "max_overflow": 0, "pool_timeout": 10},
        retry=ONCE,
        handler_timeout=timedelta(seconds=1.5),
    )
    assert runner.run_once() == 8
    assert error_of(bench, ids[4])["type"] == "builtins.TimeoutError"


@pytest.mark.parametrize("number", [0, 4, 8])
def test_what_shares_with_a_handler_that_hangs_is_given_to_another_worker(
    bench: Bench, ids: list[int], number: int
) -> None:
    stubborn = Stubborn(f"account-{number}")
    runner = together(bench, stubborn, retry=ONCE, handler_timeout=timedelta(seconds=1.5))
    with runner.running():
        try:
            assert stubborn.hangs.wait(10)
            until(lambda: len(notes(bench)) == 8)
            until(lambda: after(bench, ids[number]).status is CheckpointStatus.FAILED)
        finally:
            stubborn.go_on.set()
    assert len(notes(bench)) == 8
    assert error_of(bench, ids[number])["type"] == "builtins.TimeoutError"
    sound(bench)


def test_one_that_hangs_when_it_runs_alone_holds_up_no_other(bench: Bench, ids: list[int]) -> None:
    stubborn = Stubborn("account-4")

    async def handler(work: Work) -> None:
        if work.reservation.stream_name == "account-0":
            raise ValueError("so that each runs alone")
        await stubborn(work)

    runner = together(bench, handler, retry=ONCE, handler_timeout=timedelta(seconds=1.5))
    with runner.running():
        try:
            assert stubborn.hangs.wait(10)
            until(lambda: len(notes(bench)) == 7)
            until(lambda: after(bench, ids[4]).status is CheckpointStatus.FAILED)
        finally:
            stubborn.go_on.set()
    assert len(notes(bench)) == 7
    sound(bench)


def test_no_more_run_at_once_than_concurrency_says_when_one_was_given_up(
    bench: Bench, ids: list[int]
) -> None:
    stubborn = Stubborn("account-0")
    running: set[str] = set()
    most: list[int] = []

    async def handler(work: Work) -> None:
        name = work.reservation.stream_name
        running.add(name)
        most.append(len(running - {"account-0"}))
        await work.execute(text("SELECT pg_sleep(0.02)"))
        if name != "account-0":
            await work.write()
            running.discard(name)
        else:
            await stubborn(work)

    runner = together(
        bench,
        handler,
        concurrency=2,
        handlers_per_transaction=3,
        retry=ONCE,
        handler_timeout=timedelta(seconds=0.5),
    )
    with runner.running():
        try:
            until(lambda: len(notes(bench)) == 8)
            until(lambda: after(bench, ids[0]).status is CheckpointStatus.FAILED)
            stubborn.go_on.set()
            bench.execute("DELETE FROM notes")
            bench.fill(*(f"later-{n}" for n in range(20)), subscription="later")
            until(lambda: len(notes(bench)) == 20)
        finally:
            stubborn.go_on.set()
    assert max(most) == 2


@pytest.mark.parametrize("seconds", [3.3, 3.6, 3.9])
@pytest.mark.usefixtures("ids")
def test_what_shares_with_one_that_hangs_is_not_lost_when_it_is_extended_just_then(
    bench: Bench, seconds: float, caplog: pytest.LogCaptureFixture
) -> None:
    stubborn = Stubborn("account-2")
    runner = together(
        bench,
        stubborn,
        handler_timeout=timedelta(seconds=1),
        reservation_timeout=timedelta(seconds=seconds),
        recover_interval=MINUTE,
        retry=ONCE,
    )
    with runner.running():
        try:
            until(lambda: len(notes(bench)) == 8)
        finally:
            stubborn.go_on.set()
    assert [record for record in caplog.records if "lost" in record.getMessage()] == []


@pytest.mark.usefixtures("ids")
def test_a_retry_policy_that_raises_keeps_no_slot(bench: Bench) -> None:
    class Strict(RetryPolicy):
        def attempts_for(self, error: BaseException) -> int:
            raise LookupError(f"no rule for {error!r}")

    runner = together(
        bench, Sleeper("account-2"), handler_timeout=timedelta(seconds=1.5), retry=Strict()
    )
    with runner.running():
        until(lambda: len(notes(bench)) == 8)


def test_what_took_too_long_with_others_fails_by_its_own_error_alone(
    bench: Bench, ids: list[int]
) -> None:
    """It is told to end, does not, and is rolled back for the error of another."""
    runs: list[str] = []

    async def handler(work: Work) -> None:
        name = work.reservation.stream_name
        runs.append(name)
        if name == "account-0" and runs.count(name) == 1:
            # Without a statement, which would be interrupted.
            await told_to_end(work, runner)
            return
        if name in {"account-0", "account-1"}:
            raise ValueError("its own")
        await work.write()

    runner = together(bench, handler, handler_timeout=timedelta(seconds=4), retry=ONCE)
    assert runner.run_once() == 7
    assert error_of(bench, ids[0])["type"] == "builtins.ValueError"


async def told_to_end(work: Work, runner: Runner) -> None:
    """Go on until the handler is told that it takes too long, and no longer."""
    (held,) = (
        one for one in list(runner.consumer._running) if one.reservation.id == work.reservation.id
    )
    if isinstance(runner.consumer, AsyncConsumer):
        with suppress(asyncio.CancelledError):
            await asyncio.sleep(30)
        assert held.timed_out
    else:
        until(lambda: held.timed_out)


@pytest.mark.usefixtures("ids")
def test_one_that_ends_in_spite_of_being_told_to_commits_with_the_others(bench: Bench) -> None:
    async def handler(work: Work) -> None:
        await work.write()
        if work.reservation.stream_name == "account-4":
            await told_to_end(work, runner)

    runner = together(bench, handler, handler_timeout=timedelta(seconds=4))
    assert runner.run_once() == 9
    assert len(set(notes(bench).values())) == 1


def test_a_checkpoint_that_is_locked_holds_up_no_other_for_ever(
    bench: Bench, ids: list[int]
) -> None:
    """The update of the positions waits for the lock, and so does the record of the error."""
    with bench.engine.connect() as other:
        reached = threading.Event()

        async def handler(work: Work) -> None:
            await work.write()
            if work.reservation.stream_name == "account-8" and not reached.is_set():
                other.execute(
                    text("SELECT 1 FROM checkpoints.checkpoints WHERE id = :id FOR UPDATE"),
                    {"id": ids[8]},
                )
                reached.set()

        runner = together(bench, handler, handler_timeout=timedelta(seconds=2))
        drained = runner.start_drain()
        assert reached.wait(10)
        until(lambda: bench.backends("%SET stream_position%"))
        until(lambda: not bench.backends("%SET stream_position%"))
        other.rollback()
        drained.result(20)
    until(lambda: reserved(bench) == 0)
    assert set(notes(bench)) >= set(STREAMS) - {"account-8"}
    sound(bench)


# --- the end


@pytest.mark.usefixtures("ids")
def test_a_stop_lets_those_that_run_together_finish_and_gives_the_rest_back(bench: Bench) -> None:
    started, go_on = threading.Event(), threading.Event()

    async def handler(work: Work) -> None:
        await work.write()
        started.set()
        await work.wait(go_on)

    runner = together(bench, handler, handlers_per_transaction=3, batch=9)
    future = runner.start()
    assert started.wait(10)
    assert reserved(bench) == 9
    runner.stop()
    until(lambda: reserved(bench) == 3)
    assert not future.done()
    go_on.set()
    future.result(10)
    assert sorted(notes(bench)) == STREAMS[:3]
    assert len(set(notes(bench).values())) == 1
    assert reserved(bench) == 0


@pytest.mark.parametrize("how", ["twice", "grace"])
def test_those_that_run_together_are_given_up_and_given_back_together(
    bench: Bench, ids: list[int], how: str
) -> None:
    sleeper = Sleeper("account-4")
    grace = timedelta(seconds=0.2) if how == "grace" else MINUTE
    runner = together(bench, sleeper, grace=grace)
    future = runner.start()
    assert sleeper.sleeps.wait(10)
    runner.stop()
    if how == "twice":
        runner.stop()
    future.result(15)
    assert (notes(bench), reserved(bench)) == ({}, 0)
    assert all(after(bench, id).retry_attempts == 0 for id in ids)
    assert runner.drain() == 9


@pytest.mark.usefixtures("ids")
def test_one_that_refuses_to_end_does_not_hold_up_the_stop(bench: Bench) -> None:
    stubborn = Stubborn("account-4")
    runner = together(bench, stubborn, grace=MINUTE)
    future = runner.start()
    assert stubborn.hangs.wait(10)
    runner.stop()
    runner.stop()
    try:
        future.result(15)
        assert reserved(bench) == 0
    finally:
        stubborn.go_on.set()
    assert notes(bench) == {}
    assert runner.drain() == 9


def test_what_shares_with_one_that_hangs_when_it_stops_is_given_back(
    bench: Bench, ids: list[int]
) -> None:
    stubborn = Stubborn("account-4")
    runner = together(
        bench, stubborn, retry=ONCE, handler_timeout=timedelta(seconds=1), grace=MINUTE
    )
    future = runner.start()
    assert stubborn.hangs.wait(10)
    runner.stop()
    try:
        future.result(15)
        assert reserved(bench) == 0
        assert after(bench, ids[4]).status is CheckpointStatus.FAILED
    finally:
        stubborn.go_on.set()
    assert notes(bench) == {}
    assert runner.drain() == 8


# --- threads alone


class SlowLog(logging.Handler):
    """Of the application's: it takes its time, such as one that writes over a network."""

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002
        time.sleep(0.2)


@pytest.fixture
def slow_log() -> Iterator[None]:
    slow = SlowLog()
    logging.getLogger("checkpoints").addHandler(slow)
    yield
    logging.getLogger("checkpoints").removeHandler(slow)


@pytest.mark.usefixtures("slow_log")
def test_a_handler_that_wakes_when_it_is_given_up_keeps_no_slot(
    migrated_url: URL, engine: Engine
) -> None:
    """It goes on after each error of the database, and ends when its connection is broken."""
    bench = Bench("blocking", migrated_url, engine)
    ids = bench.fill(*STREAMS)

    async def handler(work: Work) -> None:
        connection: Any = work.connection
        if work.reservation.stream_name == "account-2":
            while True:
                with connection.begin_nested():
                    try:
                        with connection.begin_nested():
                            connection.execute(text("SELECT pg_sleep(60)"))
                    except Exception as error:
                        if "cancel" not in str(error):
                            time.sleep(0.05)
                            raise
        await work.write()

    runner = together(
        bench, handler, handler_timeout=timedelta(milliseconds=300), retry=ONCE, grace=MINUTE
    )
    with runner.running():
        until(lambda: len(notes(bench)) == 8)
        until(lambda: after(bench, ids[2]).status is CheckpointStatus.FAILED)
    bench.close()


# --- asyncio alone


def test_a_cancelled_task_gives_back_what_runs_together(async_bench: Bench) -> None:
    sleeper = Sleeper("account-4")
    runner = together(async_bench, sleeper, handlers_per_transaction=5, batch=9)
    future = runner.start()
    assert sleeper.sleeps.wait(10)
    future.cancel()
    until(lambda: reserved(async_bench) == 0)
    assert notes(async_bench) == {}
    assert async_bench.ask("SELECT max(retry_attempts) FROM checkpoints.checkpoints") == 0


def test_a_cancelled_task_ends_nothing_in_the_middle_of_a_commit(async_bench: Bench) -> None:
    runner = together(async_bench, write)
    updated: set[Any] = set()

    def executed(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "SET stream_position" in statement:
            updated.add(connection)

    def committing(connection: Any) -> None:
        if connection in updated:
            future.cancel()

    event.listen(runner.sync_engine, "before_cursor_execute", executed)
    event.listen(runner.sync_engine, "commit", committing)
    future = runner.start()
    until(lambda: future.done() and not runner.tasks())  # type: ignore[attr-defined]
    assert updated
    assert len(set(notes(async_bench).values())) == 1
    assert len(notes(async_bench)) == 9
    assert reserved(async_bench) == 0


def test_the_cancellation_of_one_is_not_seen_by_the_next(async_bench: Bench) -> None:
    """A TaskGroup or a timeout of the next handler would take it for its own."""
    cancelling: list[int] = []

    async def handler(work: Work) -> None:
        task = asyncio.current_task()
        assert task is not None
        cancelling.append(task.cancelling())
        await work.write()
        if work.reservation.stream_name == "account-4":
            await told_to_end(work, runner)

    runner = together(async_bench, handler, handler_timeout=timedelta(seconds=3))
    assert runner.run_once() == 9
    assert cancelling == [0] * 9


def test_a_handler_that_breaks_the_connection_when_told_to_end_has_taken_too_long(
    async_bench: Bench,
) -> None:
    """The driver breaks a connection whose statement is cancelled."""
    runs: Counter[str] = Counter()

    async def handler(work: Work) -> None:
        name = work.reservation.stream_name
        runs[name] += 1
        await work.write()
        if name == "account-4":
            with suppress(asyncio.CancelledError):
                await work.execute(text("SELECT pg_sleep(60)"))

    runner = together(async_bench, handler, handler_timeout=timedelta(seconds=1.5), retry=ONCE)
    assert runner.run_once() == 8
    assert runs["account-4"] == 1
    assert len(notes(async_bench)) == 8
    failed = async_bench.ask(
        "SELECT retries -> 0 -> 'error' ->> 'type' FROM checkpoints.checkpoints"
        " WHERE status = 'failed'"
    )
    assert failed == "builtins.TimeoutError"


def test_handlers_run_alone_are_not_cancelled_for_each_other(async_bench: Bench) -> None:
    cancelling: list[int] = []
    sleeper = Sleeper("account-4")

    async def handler(work: Work) -> None:
        task = asyncio.current_task()
        assert task is not None
        cancelling.append(task.cancelling())
        await sleeper(work)

    runner = together(async_bench, handler, handler_timeout=timedelta(seconds=1.5), retry=ONCE)
    assert runner.run_once() == 8
    assert set(cancelling) == {0}


# --- arguments


@pytest.mark.parametrize("value", [0, -1, 1.5, True])
def test_a_bad_number_is_refused(bench: Bench, value: Any) -> None:
    with pytest.raises((TypeError, ValueError), match="handlers_per_transaction must be"):
        together(bench, write, handlers_per_transaction=value)
