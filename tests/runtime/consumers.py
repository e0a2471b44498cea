"""Both consumers behind one face, so that one test says what holds for both.

A handler of a test is a coroutine function of `Work`. For the blocking consumer its awaits block
and never suspend; for the asyncio one they are real ones, in a loop of their own thread.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from typing import Any

from sqlalchemy import URL, Connection, Engine, Executable, create_engine, event, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from checkpoints import Reservation
from checkpoints.runtime import AsyncConsumer, Consumer, OutsideTransaction
from tests.support.factories import GROUP, add_checkpoint, add_subscription

DEADLINE = 15.0

Step = Callable[["Work"], Coroutine[Any, Any, Any]]


def until(condition: Callable[[], Any], what: str = "", deadline: float = DEADLINE) -> Any:
    """What the condition answers, as soon as that is true."""
    ends = time.monotonic() + deadline
    while not (answer := condition()):
        assert time.monotonic() < ends, f"not within {deadline} s: {what or condition}"
        time.sleep(0.005)
    return answer


class Work:
    """What a handler of a test is given."""

    def __init__(self, connection: Connection | AsyncConnection | None, reservation: Reservation):
        self.connection = connection
        self.reservation = reservation

    async def execute(self, statement: Executable, values: dict[str, Any] | None = None) -> Any:
        if isinstance(self.connection, AsyncConnection):
            return await self.connection.execute(statement, values)
        assert self.connection is not None
        return self.connection.execute(statement, values)

    async def write(self) -> None:
        """Note in the table `notes` that the handler was here."""
        await self.execute(
            text("INSERT INTO notes (stream_name, version) VALUES (:stream, :version)"),
            {"stream": self.reservation.stream_name, "version": self.reservation.stream_version},
        )

    async def commit(self) -> None:
        if isinstance(self.connection, AsyncConnection):
            await self.connection.commit()
        elif self.connection is not None:
            self.connection.commit()

    async def rollback(self) -> None:
        if isinstance(self.connection, AsyncConnection):
            await self.connection.rollback()
        elif self.connection is not None:
            self.connection.rollback()

    async def wait(self, awaited: threading.Event) -> None:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            assert awaited.wait(DEADLINE)
        else:
            while not awaited.is_set():
                await asyncio.sleep(0.005)


def _finished(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine that never suspends."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        return end.value
    finally:
        coroutine.close()
    raise AssertionError("it must not suspend")


class Outside:
    """Marks a handler of a test as one that runs outside a transaction."""

    def __init__(self, step: Step) -> None:
        self.step = step


Steps = Step | Outside | Mapping[str, Step | Outside]


class Runner:
    """A consumer of one of the two kinds, with an engine of its own."""

    def __init__(
        self, url: URL, steps: Steps, *, group: str = GROUP, engine: dict[str, Any], **settings: Any
    ) -> None:
        raise NotImplementedError

    consumer: Consumer | AsyncConsumer

    def drain(self) -> int:
        return int(self._call("drain").result(DEADLINE * 2))

    def run_once(self) -> int:
        return int(self._call("run_once").result(DEADLINE * 2))

    def start(self) -> Future[Any]:
        """Begin `run()`; the future is done when it returns."""
        return self._call("run", handle_signals=False)

    def start_drain(self) -> Future[Any]:
        return self._call("drain")

    def _call(self, method: str, **arguments: Any) -> Future[Any]:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError

    @property
    def sync_engine(self) -> Engine:
        raise NotImplementedError

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run, and stop at the end."""
        future = self.start()
        try:
            yield
        finally:
            self.stop()
            future.result(DEADLINE * 2)

    @contextmanager
    def statements(self) -> Iterator[list[str]]:
        """The statements that its engine executes."""
        executed: list[str] = []

        def note(_conn: Any, _cursor: Any, statement: str, *_: Any) -> None:
            executed.append(statement)

        event.listen(self.sync_engine, "before_cursor_execute", note)
        yield executed
        event.remove(self.sync_engine, "before_cursor_execute", note)


def _mapped(steps: Steps, adapt: Callable[[Step], Any], outside: Callable[[Step], Any]) -> Any:
    if isinstance(steps, Mapping):
        return {name: _mapped(step, adapt, outside) for name, step in steps.items()}
    if isinstance(steps, Outside):
        return OutsideTransaction(outside(steps.step))
    return adapt(steps)


class BlockingRunner(Runner):
    def __init__(
        self, url: URL, steps: Steps, *, group: str = GROUP, engine: dict[str, Any], **settings: Any
    ) -> None:
        self._engine = create_engine(url, **{"pool_size": 20, **engine})
        handlers = _mapped(
            steps,
            lambda step: lambda connection, given: _finished(step(Work(connection, given))),
            lambda step: lambda given: _finished(step(Work(None, given))),
        )
        self.consumer: Consumer = Consumer(self._engine, group, handlers, **settings)

    def _call(self, method: str, **arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()

        def call() -> None:
            try:
                future.set_result(getattr(self.consumer, method)(**arguments))
            except BaseException as error:
                future.set_exception(error)

        threading.Thread(target=call, name="caller").start()
        return future

    def stop(self) -> None:
        self.consumer.stop()

    def close(self) -> None:
        self._engine.dispose()

    @property
    def sync_engine(self) -> Engine:
        return self._engine


class AsyncRunner(Runner):
    def __init__(
        self, url: URL, steps: Steps, *, group: str = GROUP, engine: dict[str, Any], **settings: Any
    ) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="loop")
        self._thread.start()
        self.async_engine: AsyncEngine = create_async_engine(url, **{"pool_size": 20, **engine})

        def adapt(step: Step) -> Any:
            async def handler(connection: AsyncConnection, given: Reservation) -> Any:
                return await step(Work(connection, given))

            return handler

        def outside(step: Step) -> Any:
            async def handler(given: Reservation) -> Any:
                return await step(Work(None, given))

            return handler

        self.consumer: AsyncConsumer = AsyncConsumer(
            self.async_engine, group, _mapped(steps, adapt, outside), **settings
        )

    def _call(self, method: str, **arguments: Any) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(
            getattr(self.consumer, method)(**arguments), self.loop
        )

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.consumer.stop)

    def tasks(self) -> set[asyncio.Task[Any]]:
        """What still runs in the loop."""
        return {task for task in asyncio.all_tasks(self.loop) if not task.done()}

    def close(self) -> None:
        until(lambda: not self.tasks(), "tasks end")
        asyncio.run_coroutine_threadsafe(self.async_engine.dispose(), self.loop).result(DEADLINE)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()

    @property
    def sync_engine(self) -> Engine:
        return self.async_engine.sync_engine


class Bench:
    """Makes consumers of one kind on one database, and looks at what they did."""

    def __init__(self, kind: str, url: URL, engine: Engine) -> None:
        self.kind = kind
        self.url = url
        self.engine = engine
        self._runners: list[Runner] = []
        with engine.begin() as connection:
            connection.execute(
                text("CREATE TABLE notes (id serial, stream_name text, version bigint)")
            )

    @property
    def is_async(self) -> bool:
        return self.kind == "asyncio"

    def consumer(
        self, steps: Steps, *, engine: Mapping[str, Any] | None = None, **settings: Any
    ) -> Runner:
        make = AsyncRunner if self.is_async else BlockingRunner
        runner = make(self.url, steps, engine=dict(engine or {}), **settings)
        self._runners.append(runner)
        return runner

    def close(self) -> None:
        for runner in self._runners:
            runner.close()

    def fill(self, *streams: str, subscription: str = "balances", **columns: Any) -> list[int]:
        """Add a subscription with these streams, each with three messages to process."""
        with self.engine.begin() as connection:
            subscription_id = add_subscription(connection, subscription)
            return [
                add_checkpoint(connection, subscription_id, stream, **columns)
                for stream in streams or ("account-1",)
            ]

    def execute(self, statement: str, **values: Any) -> None:
        with self.engine.begin() as connection:
            connection.execute(text(statement), values)

    def ask(self, statement: str, **values: Any) -> Any:
        with self.engine.begin() as connection:
            return connection.execute(text(statement), values).scalar()

    def notes(self) -> list[str]:
        """The streams of the writes that were committed."""
        with self.engine.begin() as connection:
            rows = connection.execute(text("SELECT stream_name FROM notes ORDER BY id"))
            return [row[0] for row in rows]

    def backends(self, query: str) -> list[int]:
        """The processes of the server whose last statement is like this."""
        with self.engine.begin() as connection:
            rows = connection.execute(
                text(
                    "SELECT pid FROM pg_stat_activity WHERE datname = current_database()"
                    " AND query LIKE :query AND pid <> pg_backend_pid()"
                ),
                {"query": query},
            )
            return [row[0] for row in rows]

    def terminate(self, query: str = "%") -> int:
        """End the connections whose last statement is like this."""
        pids = self.backends(query)
        for pid in pids:
            self.ask("SELECT pg_terminate_backend(:pid)", pid=pid)
        return len(pids)

    @contextmanager
    def away(self) -> Iterator[None]:
        """The database accepts no connections, and has ended those there were."""
        admin = create_engine(self.url.set(database="postgres"), isolation_level="AUTOCOMMIT")
        name = self.url.database
        self.engine.dispose()
        with admin.connect() as connection:
            connection.execute(text(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false'))
            connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
                ),
                {"name": name},
            )
            try:
                yield
            finally:
                connection.execute(text(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true'))
        admin.dispose()
