"""How both consumers begin and end: stops, signals, threads, arguments."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import inspect
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from sqlalchemy import URL, create_engine, event, text

from checkpoints import SchemaNotMigrated
from checkpoints.runtime import AsyncConsumer, Consumer, ConsumerSettings, OutsideTransaction
from checkpoints.runtime._held import Holding
from tests.runtime.consumers import (
    DEADLINE,
    AsyncRunner,
    Bench,
    BlockingRunner,
    Runner,
    Work,
    until,
)
from tests.support.factories import LONG_AGO

HOUR = timedelta(hours=1)
ROOT = Path(__file__).parents[2]


async def write(work: Work) -> None:
    await work.write()


def reserved(bench: Bench) -> Any:
    return bench.ask("SELECT count(*) FROM checkpoints.checkpoints_reserved")


@contextmanager
def nothing_left_behind(runner: Runner) -> Iterator[None]:
    """No thread, and no task, more than there was."""
    before = set(threading.enumerate())
    yield
    if isinstance(runner, AsyncRunner):
        until(lambda: not runner.tasks(), "tasks end")
        # With a libpq before 17, psycopg cancels in a thread, which the loop keeps.
        ending = runner.loop.shutdown_default_executor()
        asyncio.run_coroutine_threadsafe(ending, runner.loop).result(DEADLINE)
    until(lambda: not {t for t in threading.enumerate() if t not in before}, "threads end")


class Gate:
    """A handler that waits until it is let go."""

    def __init__(self) -> None:
        self.started = threading.Event()
        self.go_on = threading.Event()

    async def __call__(self, work: Work) -> None:
        await work.write()
        self.started.set()
        await work.wait(self.go_on)


# --- stopping


def test_a_stop_gives_back_at_once_what_was_not_started_and_lets_the_rest_finish(
    bench: Bench,
) -> None:
    bench.fill(*(f"account-{number}" for number in range(5)))
    gate = Gate()
    runner = bench.consumer(gate, concurrency=1, batch=5)
    with nothing_left_behind(runner):
        future = runner.start()
        assert gate.started.wait(10)
        assert reserved(bench) == 5
        runner.stop()
        until(lambda: reserved(bench) == 1)
        assert not future.done()
        gate.go_on.set()
        future.result(10)

    assert len(bench.notes()) == 1
    assert reserved(bench) == 0
    assert bench.ask("SELECT count(*) FROM checkpoints.checkpoints_ready") == 4
    assert bench.ask("SELECT max(retry_attempts) FROM checkpoints.checkpoints") == 0


@pytest.mark.parametrize("how", ["twice", "grace"])
def test_a_second_stop_or_the_end_of_the_grace_time_gives_up_what_runs(
    bench: Bench, how: str
) -> None:
    bench.fill("account-1")
    gate = Gate()
    grace = timedelta(seconds=0.2) if how == "grace" else HOUR
    runner = bench.consumer(gate, grace=grace)
    with nothing_left_behind(runner):
        future = runner.start()
        assert gate.started.wait(10)
        runner.stop()
        if how == "twice":
            runner.stop()
        future.result(10)
        assert reserved(bench) == 0
        gate.go_on.set()

    assert bench.notes() == []
    assert bench.ask("SELECT retry_attempts FROM checkpoints.checkpoints") == 0


def test_a_handler_that_waits_for_the_database_is_interrupted_when_given_up(bench: Bench) -> None:
    bench.fill("account-1")
    started = threading.Event()

    async def sleeping(work: Work) -> None:
        started.set()
        await work.execute(text("SELECT pg_sleep(60)"))

    runner = bench.consumer(sleeping, grace=HOUR)
    with nothing_left_behind(runner):
        future = runner.start()
        assert started.wait(10)
        runner.stop()
        runner.stop()
        future.result(10)
    assert reserved(bench) == 0


def test_a_handler_that_refuses_to_end_does_not_hold_up_the_stop(bench: Bench) -> None:
    bench.fill("account-1")
    started, go_on = threading.Event(), threading.Event()

    async def stubborn(work: Work) -> None:
        await work.write()
        started.set()
        while not go_on.is_set():
            with suppress(asyncio.CancelledError):
                await work.wait(go_on)

    runner = bench.consumer(stubborn, grace=HOUR)
    with nothing_left_behind(runner):
        future = runner.start()
        assert started.wait(10)
        runner.stop()
        runner.stop()
        future.result(10)
        assert reserved(bench) == 0
        go_on.set()
    assert bench.notes() == []


def test_a_stop_before_the_run_ends_it_at_once(bench: Bench) -> None:
    bench.fill("account-1")
    runner = bench.consumer(write)
    runner.stop()

    runner.start().result(10)

    assert bench.notes() == []
    # It held for that run alone.
    assert runner.drain() == 1


def test_a_stop_ends_a_drain(bench: Bench) -> None:
    bench.fill("account-1", "account-2")
    gate = Gate()
    runner = bench.consumer(gate, concurrency=1)
    drained = runner.start_drain()
    assert gate.started.wait(10)
    runner.stop()
    gate.go_on.set()
    assert drained.result(10) == 1


def test_one_consumer_may_run_again_and_again(bench: Bench) -> None:
    runner = bench.consumer(write)
    with nothing_left_behind(runner):
        for number in range(3):
            bench.fill(f"account-{number}")
            assert runner.drain() == 1
            assert runner.drain() == 0
        for number in range(3, 6):
            with runner.running():
                bench.fill(f"account-{number}")
                until(lambda: len(bench.notes()) == number + 1)  # noqa: B023  # called at once
        bench.fill("account-6")
        assert runner.run_once() == 1


def test_it_works_again_after_handlers_were_given_up(bench: Bench) -> None:
    ids = bench.fill(*(f"account-{number}" for number in range(8)))
    gate = Gate()
    runner = bench.consumer(gate, grace=HOUR)
    future = runner.start()
    until(lambda: reserved(bench) == 4)
    assert gate.started.wait(10)
    runner.stop()
    runner.stop()
    future.result(10)
    gate.go_on.set()

    assert runner.drain() == len(ids)
    assert sorted(bench.notes()) == [f"account-{number}" for number in range(8)]


def test_a_handler_given_up_that_ends_in_the_next_run_is_nothing_to_that(bench: Bench) -> None:
    """Its slot is of a run that is over."""
    bench.fill(*(f"account-{number}" for number in range(8)))
    gate = Gate()
    runner = bench.consumer(gate, grace=HOUR)
    future = runner.start()
    until(lambda: reserved(bench) == 4)
    workers = {t for t in threading.enumerate() if t.name.startswith("checkpoints-worker")}
    assert gate.started.wait(10)
    runner.stop()
    runner.stop()
    future.result(10)
    bench.execute("UPDATE checkpoints.subscriptions SET status = 'paused'")
    with runner.statements() as executed, runner.running():
        until(lambda: any("reserve_claimed" in one for one in list(executed)), "it looks for work")
        gate.go_on.set()
        until(lambda: not any(worker.is_alive() for worker in workers), "threads end")
        bench.execute("UPDATE checkpoints.subscriptions SET status = 'active'")
        until(lambda: len(bench.notes()) == 8, "all are processed")


@pytest.mark.parametrize("method", ["drain", "run", "run_once"])
def test_it_runs_once_at_a_time(bench: Bench, method: str) -> None:
    bench.fill("account-1")
    gate = Gate()
    runner = bench.consumer(gate)
    drained = runner.start_drain()
    assert gate.started.wait(10)

    with pytest.raises(RuntimeError, match="already"):
        runner._call(method).result(10)

    gate.go_on.set()
    assert drained.result(10) == 1


def test_an_error_that_waiting_cannot_mend_ends_it(bench: Bench) -> None:
    bench.fill("account-1")
    runner = bench.consumer(write)
    bench.execute("ALTER TABLE checkpoints.checkpoints_ready RENAME TO elsewhere")

    with nothing_left_behind(runner), pytest.raises(SchemaNotMigrated):
        runner.start().result(10)


def test_a_schema_that_is_not_there_is_said_at_the_start(bench: Bench) -> None:
    runner = bench.consumer(write)
    bench.execute("ALTER SCHEMA checkpoints RENAME TO elsewhere")

    with nothing_left_behind(runner), pytest.raises(SchemaNotMigrated, match="run the migration"):
        runner.start().result(10)


def test_an_error_in_reserving_lets_running_handlers_finish_and_gives_the_rest_back(
    bench: Bench,
) -> None:
    bench.fill("account-1", "account-2", "account-3")
    gate = Gate()
    runner = bench.consumer(gate, concurrency=2, batch=2, poll_interval=timedelta(seconds=0.02))
    bench.execute("UPDATE checkpoints.checkpoints SET process_at = '2090-01-01' WHERE id <> 1")
    with nothing_left_behind(runner):
        future = runner.start()
        assert gate.started.wait(10)
        bench.execute("ALTER TABLE checkpoints.subscription_groups RENAME TO elsewhere")
        gate.go_on.set()
        with pytest.raises(SchemaNotMigrated):
            future.result(10)
    assert len(bench.notes()) == 1
    assert reserved(bench) == 0


def test_finished_work_is_not_kept_in_memory(bench: Bench) -> None:
    bench.fill(*(f"account-{number}" for number in range(300)))
    runner = bench.consumer(write, batch=50)

    def alive() -> int:
        return sum(isinstance(one, Holding) for one in gc.get_objects())

    gc.collect()
    before = alive()
    with runner.running():
        until(lambda: bench.ask("SELECT count(*) FROM notes") == 300)
        until(lambda: reserved(bench) == 0)
        # At once, without a collection of cycles.
        until(lambda: alive() - before <= 8)


# --- signals

SCRIPT = """
import asyncio, signal, sys, threading, time
from datetime import timedelta
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine
from checkpoints.runtime import AsyncConsumer, Consumer

kind, method, url, behaviour = sys.argv[1:]
settings = dict(concurrency=1, batch=3, grace=timedelta(seconds=30))
go_on = text("SELECT pg_advisory_xact_lock(1)")
note = text("INSERT INTO notes (stream_name) VALUES ('done')")

def say(what):
    print(what, flush=True)

def handler(connection, given):
    say("started")
    if behaviour == "hangs":
        time.sleep(0.2)
        connection.execute(text("SELECT pg_sleep(60)"))
    if behaviour == "signals":
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    connection.execute(go_on)
    connection.execute(note)

async def async_handler(connection, given):
    say("started")
    if behaviour == "signals":
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    await connection.execute(text("SELECT pg_sleep(60)") if behaviour == "hangs" else go_on)
    await connection.execute(note)

async def main():
    engine = create_async_engine(url)
    try:
        await getattr(AsyncConsumer(engine, "accounts", async_handler, **settings), method)()
    finally:
        await engine.dispose()

try:
    if kind == "asyncio":
        asyncio.run(main())
    else:
        engine = create_engine(url)
        getattr(Consumer(engine, "accounts", handler, **settings), method)()
        engine.dispose()
except KeyboardInterrupt:
    say("interrupted")
    sys.exit(130)
say("ended")
"""


@contextmanager
def process(bench: Bench, method: str, behaviour: str) -> Iterator[subprocess.Popen[str]]:
    url = bench.url.render_as_string(hide_password=False)
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCRIPT, bench.kind, method, url, behaviour],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    ) as started:
        try:
            assert started.stdout is not None
            assert started.stdout.readline() == "started\n"
            yield started
        finally:
            started.kill()


@contextmanager
def held_up(bench: Bench) -> Iterator[Callable[[], None]]:
    """Handlers that work wait in the database until what is yielded is called."""
    with bench.engine.connect() as connection:
        connection.execute(text("SELECT pg_advisory_xact_lock(1)"))
        yield connection.rollback


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_runs_finish_and_gives_the_rest_back(bench: Bench, number: int) -> None:
    bench.fill("account-1", "account-2", "account-3")

    with held_up(bench) as go_on, process(bench, "run", "works") as running:
        running.send_signal(number)
        until(lambda: reserved(bench) == 1, "the rest is given back")
        go_on()
        out, err = running.communicate(timeout=20)

    assert (out, err, running.returncode) == ("ended\n", "", 0)
    assert bench.notes() == ["done"]
    assert reserved(bench) == 0
    assert bench.ask("SELECT max(retry_attempts) FROM checkpoints.checkpoints") == 0


def test_a_signal_that_does_not_wake_the_main_thread_is_noticed_all_the_same(bench: Bench) -> None:
    """As one that comes just before that begins to wait."""
    bench.fill("account-1", "account-2", "account-3")

    with held_up(bench) as go_on, process(bench, "run", "signals") as running:
        until(lambda: reserved(bench) == 1, "the rest is given back")
        go_on()
        out, _ = running.communicate(timeout=20)

    assert (out, running.returncode) == ("ended\n", 0)


def test_a_second_signal_stops_now(bench: Bench) -> None:
    bench.fill("account-1", "account-2", "account-3")

    with process(bench, "run", "hangs") as running:
        running.send_signal(signal.SIGTERM)
        until(lambda: reserved(bench) == 1)
        running.send_signal(signal.SIGTERM)
        out, _ = running.communicate(timeout=15)

    assert (out, running.returncode) == ("ended\n", 0)
    assert bench.notes() == []
    assert reserved(bench) == 0
    assert bench.ask("SELECT max(retry_attempts) FROM checkpoints.checkpoints") == 0


def test_ctrl_c_in_a_script_that_drains_gives_everything_back(bench: Bench) -> None:
    bench.fill("account-1", "account-2", "account-3")

    with held_up(bench) as go_on, process(bench, "drain", "works") as running:
        running.send_signal(signal.SIGINT)
        # The asyncio one does not let what runs finish.
        until(lambda: reserved(bench) <= 1, "the rest is given back")
        go_on()
        out, _ = running.communicate(timeout=20)

    assert (out, running.returncode) == ("interrupted\n", 130)
    assert reserved(bench) == 0
    assert bench.ask("SELECT max(retry_attempts) FROM checkpoints.checkpoints") == 0


def test_the_signal_handlers_of_before_are_back_after_a_run(engine: Any) -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        consumer = Consumer(engine, "accounts", lambda _connection, _given: None)
        consumer.stop()
        consumer.run()
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


# --- asyncio alone


def test_a_cancelled_task_gives_everything_back(migrated_url: URL, engine: Any) -> None:
    bench = Bench("asyncio", migrated_url, engine)
    bench.fill("account-1", "account-2", "account-3")
    gate = Gate()
    runner = bench.consumer(gate, concurrency=1, batch=3)
    with nothing_left_behind(runner):
        future = runner.start()
        assert gate.started.wait(10)
        future.cancel()
        until(lambda: reserved(bench) == 0)
        assert bench.notes() == []
    bench.close()


def test_a_task_cancelled_while_it_reserves_gives_back_what_it_reserved(
    migrated_url: URL, engine: Any
) -> None:
    bench = Bench("asyncio", migrated_url, engine)
    bench.fill("account-1", "account-2")
    runner = bench.consumer(write, batch=2, listen=False)
    assert isinstance(runner, AsyncRunner)
    reserved_by: list[Any] = []

    def executed(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "reserve_claimed" in statement:
            reserved_by.append(connection)
            future.cancel()

    event.listen(runner.sync_engine, "after_cursor_execute", executed)
    future = runner.start()
    until(lambda: future.done() and not runner.tasks())
    assert reserved_by
    assert (reserved(bench), bench.notes()) == (0, [])
    bench.close()


def test_one_consumer_serves_several_loops(migrated_url: URL, engine: Any) -> None:
    from sqlalchemy.ext.asyncio import create_async_engine
    from sqlalchemy.pool import NullPool

    bench = Bench("asyncio", migrated_url, engine)

    async def handler(connection: Any, _given: Any) -> None:
        await connection.execute(text("INSERT INTO notes DEFAULT VALUES"))

    consumer = AsyncConsumer(
        create_async_engine(migrated_url, poolclass=NullPool), "accounts", handler
    )

    async def run_a_moment(expected: int) -> None:
        task = asyncio.create_task(consumer.run())
        while bench.ask("SELECT count(*) FROM notes") < expected:
            await asyncio.sleep(0.01)
        consumer.stop()
        await task

    for number in (1, 2):
        bench.fill(f"account-{number}")
        asyncio.run(run_a_moment(number))


# --- arguments

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"group": ""}, ValueError, "group must not be empty"),
    ({"group": 7}, TypeError, "group must be a string"),
    ({"concurrency": 0}, ValueError, "concurrency must be"),
    ({"concurrency": True}, TypeError, "concurrency must be an integer"),
    ({"batch": 0}, ValueError, "batch must be"),
    ({"reservation_timeout": 30}, TypeError, "reservation_timeout must be a timedelta"),
    ({"handler_timeout": timedelta(0)}, ValueError, "handler_timeout must be longer"),
    ({"grace": -HOUR}, ValueError, "grace must be"),
    ({"poll_interval": None}, TypeError, "poll_interval must be a timedelta"),
    ({"recover_interval": 1.5}, TypeError, "recover_interval must be a timedelta"),
    ({"replay_mode": "some"}, ValueError, "replay_mode must be one of"),
    ({"retry": 3}, TypeError, "retry must be a RetryPolicy"),
    ({"listen": "no"}, TypeError, "listen must be"),
    ({"concurency": 3}, TypeError, "concurency"),
    ({"handlers": {}}, ValueError, "handlers must name at least one"),
    ({"handlers": {"": print}}, ValueError, "a key of handlers must not be empty"),
    ({"handlers": {"balances": 7}}, TypeError, r"handlers\['balances'\] must be a function"),
    ({"handlers": None}, TypeError, "handlers must be a function"),
    ({"handlers": OutsideTransaction(7)}, TypeError, "handlers must be a function"),  # type: ignore[arg-type]
    ({"engine": "postgresql://"}, TypeError, "engine must be an"),
]


@pytest.mark.parametrize("kind", [Consumer, AsyncConsumer])
@pytest.mark.parametrize(("given", "error", "said"), BAD, ids=lambda value: str(value)[:40])
def test_a_bad_argument_is_named(
    kind: Any, given: dict[str, Any], error: type[Exception], said: str
) -> None:
    from sqlalchemy.ext.asyncio import create_async_engine

    make = create_engine if kind is Consumer else create_async_engine
    arguments = {"engine": make("postgresql+psycopg://"), "group": "accounts", "handlers": print}

    with pytest.raises(error, match=said):
        kind(**(arguments | given))


def test_a_coroutine_function_is_no_handler_of_the_blocking_consumer() -> None:
    async def handler(_connection: Any, _given: Any) -> None: ...

    with pytest.raises(TypeError, match="AsyncConsumer"):
        Consumer(create_engine("postgresql+psycopg://"), "accounts", handler)  # type: ignore[arg-type]


def test_the_engine_of_the_other_kind_is_refused(engine: Any) -> None:
    with pytest.raises(TypeError, match="engine must be an AsyncEngine"):
        AsyncConsumer(engine, "accounts", print)  # type: ignore[arg-type]


def test_the_typed_arguments_are_the_settings() -> None:
    from checkpoints.runtime.settings import ConsumerOptions

    fields = {field.name: field.type for field in dataclasses.fields(ConsumerSettings)}
    del fields["group"]
    assert set(get_type_hints(ConsumerOptions)) == set(fields)
    declared = inspect.get_annotations(ConsumerOptions)
    assert {name: str(hint.__forward_arg__) for name, hint in declared.items()} == fields
    assert not ConsumerOptions.__required_keys__


SAMPLE = """
from datetime import timedelta
from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from checkpoints import Reservation
from checkpoints.runtime import AsyncConsumer, Consumer, OutsideTransaction

def handler(connection: Connection, reservation: Reservation) -> int | None: return None
def silent(connection: Connection, reservation: Reservation) -> None: ...
def outside(reservation: Reservation) -> None: ...
def wrong(connection: Connection, reservation: Reservation) -> str: return ""
async def async_handler(connection: AsyncConnection, reservation: Reservation) -> int | None:
    return None
async def async_outside(reservation: Reservation) -> int: return 3

def good(engine: Engine, async_engine: AsyncEngine) -> None:
    Consumer(engine, "g", handler, concurrency=3, grace=timedelta(seconds=1))
    Consumer(engine, "g", silent)
    Consumer(engine, "g", OutsideTransaction(outside))
    Consumer(engine, "g", {"a": handler, "b": OutsideTransaction(outside)})
    AsyncConsumer(async_engine, "g", async_handler, batch=None)
    AsyncConsumer(async_engine, "g", {"a": async_handler})
    AsyncConsumer(async_engine, "g", OutsideTransaction(async_outside))

def bad(engine: Engine, async_engine: AsyncEngine) -> None:
    Consumer(engine, "g", wrong)
    Consumer(engine, "g", async_handler)
    Consumer(engine, "g", outside)
    Consumer(engine, "g", handler, concurency=3)
    Consumer(engine, "g", handler, grace=1)
    Consumer(async_engine, "g", handler)
    Consumer(engine, "g", OutsideTransaction(async_outside))
    AsyncConsumer(async_engine, "g", handler)
    AsyncConsumer(async_engine, "g", async_handler, poll_interval=1)
"""


def test_the_types_of_handlers_and_arguments_are_checked(tmp_path: Path) -> None:
    sample = tmp_path / "sample.py"
    sample.write_text(SAMPLE)
    checked = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--cache-dir", ROOT / ".mypy_cache", sample],
        cwd=ROOT,
        env=os.environ | {"MYPYPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = {int(line.split(":")[1]) for line in checked.stdout.splitlines() if ": error:" in line}
    bad = SAMPLE.splitlines().index("def bad(engine: Engine, async_engine: AsyncEngine) -> None:")
    assert lines == set(range(bad + 2, len(SAMPLE.splitlines()) + 1)), checked.stdout


def test_no_decision_rests_on_the_clock_of_this_machine() -> None:
    for path in (ROOT / "checkpoints" / "runtime").glob("*.py"):
        source = path.read_text()
        for clock in ("datetime.now", "time.time", "utcnow", "date.today", "time_ns"):
            assert clock not in source, (path.name, clock)


def test_the_fixtures_are_of_both_kinds(bench: Bench) -> None:
    runner = bench.consumer(write)
    assert isinstance(runner, AsyncRunner if bench.is_async else BlockingRunner)
    assert LONG_AGO.year == 2020


def test_it_listens_only_when_the_engine_has_connected_once(bench: Bench) -> None:
    """SQLAlchemy readies the dialect at the first connection, for one pool at a time."""
    bench.fill("account-1")
    runner = bench.consumer(write)
    ready_for_listening: list[bool] = []

    def connecting(dialect: Any, *_: Any) -> None:
        who = threading.current_thread().name
        if bench.is_async:
            task = asyncio.current_task()
            who = "" if task is None else getattr(task.get_coro(), "__name__", "")
        if "listener" in who or who == "greenlet_spawn":
            ready_for_listening.append(hasattr(dialect, "default_isolation_level"))

    event.listen(runner.sync_engine, "do_connect", connecting)
    with runner.running():
        until(lambda: ready_for_listening)
        until(lambda: bench.notes() == ["account-1"])

    assert all(ready_for_listening)
