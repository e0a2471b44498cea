"""The recorder for asyncio: what the blocking one does, awaited."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import timedelta
from typing import Any, TypeVar

import pytest
from sqlalchemy import Engine, create_engine, func, select
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from alembic import command
from checkpoints import alembic_config
from checkpoints.embedded import start_server
from checkpoints.runtime.async_recorder import AsyncRecorder
from checkpoints.runtime.reading import Message, Position
from checkpoints.runtime.recorder import Interest, Recorder, Start
from tests.runtime.test_reading import IN_ORDER, create_messages
from tests.runtime.test_recorder import EVERYTHING, FAST, append_to, expected, terminate, versions
from tests.support.databases import disposed
from tests.support.factories import GROUP

T = TypeVar("T")
WAIT = 20


@pytest.fixture(autouse=True)
def message_table(engine: Engine) -> None:
    create_messages(engine)


def run(work: Coroutine[Any, Any, T]) -> T:
    async def within_bounds() -> T:
        return await asyncio.wait_for(work, WAIT)

    return asyncio.run(within_bounds())


@asynccontextmanager
async def connected(engine: Engine) -> AsyncIterator[AsyncEngine]:
    made = create_async_engine(engine.url)
    try:
        yield made
    finally:
        await made.dispose()


@asynccontextmanager
async def running(recorder: AsyncRecorder) -> AsyncIterator[None]:
    """Run it beside, and stop it at the end; what ended it is raised."""
    task = asyncio.create_task(recorder.run())
    try:
        yield
    finally:
        recorder.stop()
        await task


class Spy:
    """A coroutine function `read` that can be held up, and says when there is nothing more."""

    def __init__(self) -> None:
        self.reads = 0
        self.pid = 0
        self.reading = asyncio.Event()
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.idle = asyncio.Event()

    async def __call__(
        self, connection: AsyncConnection, after: Position, limit: int
    ) -> Sequence[Message]:
        self.reads += 1
        self.pid = (await connection.execute(select(func.pg_backend_pid()))).scalar_one()
        self.reading.set()
        await self.go_on.wait()
        found = await connection.run_sync(IN_ORDER, after, limit)
        if not found:
            self.idle.set()
        return found

    async def wait_until_idle(self) -> None:
        # Twice: the first read may have begun before what the test did last.
        for _ in range(2):
            self.idle.clear()
            await self.idle.wait()


@pytest.mark.parametrize("awaited", [False, True], ids=["table", "coroutine function"])
def test_records_in_batches_from_the_beginning_and_from_now(engine: Engine, awaited: bool) -> None:
    async def work() -> None:
        read = Spy() if awaited else IN_ORDER
        interests = [EVERYTHING, Interest("late", types=["Deposited"], start=Start.NOW)]
        await asyncio.to_thread(append_to, engine, "account-1", "Opened", "Deposited", "Deposited")
        async with connected(engine) as made:
            recorder = AsyncRecorder(made, GROUP, read, interests, batch=2)
            assert await recorder.run_once() == 2
            await asyncio.to_thread(append_to, engine, "account-1", "Noted", "Deposited")
            await recorder.drain()
            assert await recorder.run_once() == 0

    run(work())
    assert versions(engine, "everything") == expected(engine)
    assert versions(engine, "late") == {"account-1": (5, 4)}


def test_one_works_and_another_takes_over_when_its_connection_ends(engine: Engine) -> None:
    async def work() -> None:
        await asyncio.to_thread(append_to, engine, "account-1", "Opened", "Deposited")
        holder, standby = Spy(), Spy()
        holder.go_on.clear()
        async with (
            connected(engine) as made,
            running(AsyncRecorder(made, GROUP, holder, [EVERYTHING], **FAST)),
        ):
            await holder.reading.wait()
            second = AsyncRecorder(made, GROUP, standby, [EVERYTHING], **FAST)
            assert await second.run_once() == 0
            assert standby.reads == 0
            await asyncio.to_thread(terminate, engine, holder.pid)
            assert await second.drain() == 2
            holder.go_on.set()
            await asyncio.to_thread(append_to, engine, "account-2")
            await holder.wait_until_idle()

    run(work())
    assert versions(engine, "everything") == expected(engine)


def test_a_connection_that_ends_while_it_reads_loses_nothing(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    async def work() -> None:
        await asyncio.to_thread(append_to, engine, "account-1", "Opened", "Deposited")
        spy = Spy()
        spy.go_on.clear()
        async with (
            connected(engine) as made,
            running(AsyncRecorder(made, GROUP, spy, [EVERYTHING], **FAST)),
        ):
            await spy.reading.wait()
            await asyncio.to_thread(terminate, engine, spy.pid)
            spy.go_on.set()
            await spy.wait_until_idle()

    with caplog.at_level(logging.WARNING, "checkpoints"):
        run(work())
    assert versions(engine, "everything") == expected(engine)
    assert len([record for record in caplog.records if "away" in record.getMessage()]) == 1


def test_cancelled_it_has_recorded_nothing_and_holds_no_lock(engine: Engine) -> None:
    async def work() -> None:
        await asyncio.to_thread(append_to, engine, "account-1")
        spy = Spy()
        spy.go_on.clear()
        async with connected(engine) as made:
            task = asyncio.create_task(AsyncRecorder(made, GROUP, spy, [EVERYTHING]).run())
            await spy.reading.wait()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            assert task.cancelled()
            assert versions(engine, "everything") == {}
            assert Recorder(engine, GROUP, IN_ORDER, [EVERYTHING]).run_once() == 1

    run(work())


def test_waits_for_a_database_that_restarts() -> None:
    async def work(engine: Engine, restart: Any) -> None:
        spy = Spy()
        async with connected(engine) as made:
            async with running(AsyncRecorder(made, GROUP, spy, [EVERYTHING], **FAST)):
                await asyncio.to_thread(append_to, engine, "account-1")
                await spy.wait_until_idle()
                await asyncio.to_thread(restart, "immediate")
                engine.dispose()
                await asyncio.to_thread(append_to, engine, "account-1")
                await spy.wait_until_idle()
            await AsyncRecorder(made, GROUP, IN_ORDER, [EVERYTHING]).drain()

    with start_server(durable=True) as server:
        command.upgrade(alembic_config(server.url()), "head")
        with disposed(create_engine(server.url())) as engine:
            create_messages(engine)
            run(work(engine, server.restart))
            assert versions(engine, "everything") == {"account-1": (2, 0)}


def test_is_woken_and_stopped_at_once_however_long_it_would_sleep(engine: Engine) -> None:
    async def work() -> None:
        spy = Spy()
        async with connected(engine) as made:
            recorder = AsyncRecorder(
                made, GROUP, spy, [EVERYTHING], poll_interval=timedelta(hours=1)
            )
            async with running(recorder):
                await spy.idle.wait()
                spy.idle.clear()
                await asyncio.to_thread(append_to, engine, "account-1")
                recorder.notify()
                await spy.idle.wait()
                assert versions(engine, "everything") == {"account-1": (1, 0)}

    run(work())


def test_what_read_raises_ends_it(engine: Engine) -> None:
    async def read(*_: Any) -> Sequence[Message]:
        raise LookupError("no such table")

    async def work() -> None:
        async with connected(engine) as made:
            with pytest.raises(LookupError):
                await AsyncRecorder(made, GROUP, read, [EVERYTHING]).run()

    run(work())


def test_a_bad_argument_is_named(engine: Engine) -> None:
    with pytest.raises(TypeError, match="engine must be an AsyncEngine"):
        AsyncRecorder(engine, GROUP, IN_ORDER, [EVERYTHING])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch must be from 1"):
        AsyncRecorder(create_async_engine(engine.url), GROUP, IN_ORDER, [EVERYTHING], batch=0)
