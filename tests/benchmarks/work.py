"""What a client does: each kind of work is prepared once, then done step by step and counted."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from datetime import datetime
from operator import itemgetter
from typing import Any, TypedDict

import psycopg
from sqlalchemy import Connection, Engine, create_engine, make_url

from checkpoints import Checkpoints, PositionUpdate, Reservation
from checkpoints.runtime import Consumer
from checkpoints.runtime._due_since import DueSince
from tests.benchmarks.texts import GROUP, TIMEOUT, Text, texts

__all__ = ["Job", "Step", "connect", "step_of"]

Step = Callable[[], int]
"""Does one transaction or cycle; how many checkpoints it really moved, 0 when there was none."""


class Job(TypedDict, total=False):
    """What a client is told; it goes over a pipe as JSON."""

    work: str
    url: str
    design: str
    batch: int
    ending: bool
    """Whether the position goes up to the version, so that nothing is left to do."""
    handlers: int
    """How many handlers of a consumer share a transaction."""
    due_since: bool
    """Whether reserves pass over dead rows as a consumer's do."""
    crash_safe: bool
    """Whether a reservation's commit waits for the disk too, as that of the update always does."""
    seconds: float
    """After so many a drain by a consumer is ended."""
    size: int
    subscription_id: int
    first: int
    streams: int


def connect(url: str) -> psycopg.Connection:
    """A connection with a transaction for each statement."""
    libpq = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(libpq, autocommit=True)


@contextmanager
def step_of(job: Job) -> Iterator[Step]:
    """The step of a job, its connections open."""
    with WORK[job["work"]](job) as step:
        yield step


@contextmanager
def _psycopg(job: Job) -> Iterator[Step]:
    """Reserve and update by prepared SQL text, without a library between."""
    batch, ending = job.get("batch", 1), job.get("ending", False)
    made = texts(job["design"], batch)
    reserve, update, many = made.reserve, made.update, made.update_many
    bound = reserve.bound()
    with connect(job["url"]) as connection, connection.cursor() as cursor:

        def run(text: Text, values: dict[str, Any]) -> list[Any]:
            return cursor.execute(text.sql.encode(), values, prepare=True).fetchall()

        run(reserve, reserve.bound() | _nobody(reserve))
        assert cursor.description is not None
        at = {column.name: index for index, column in enumerate(cursor.description)}
        id, token = at["id"], at["reserved_until"]
        position = at.get("stream_version" if ending else "stream_position", 0)
        further = 0 if ending else 1
        takes_position = "position" in update.names

        since = DueSince() if job.get("due_since", False) else None

        def look(due_since: datetime | None) -> list[Any]:
            bound["reserve_due_since"] = due_since
            return run(reserve, bound)

        def taken() -> list[Any]:
            if since is None:
                return run(reserve, bound)
            return since.take(look, itemgetter(at["process_at"]), surely=True)

        def one() -> int:
            moved = 0
            for row in taken():
                values = {"id": row[id], "token": row[token]}
                if takes_position:
                    values["position"] = row[position] + further
                moved += len(run(update, update.bound(**values)))
            return moved

        def together() -> int:
            assert many is not None
            rows = run(reserve, bound)
            if not rows:
                return 0
            values: dict[str, list[Any]] = {
                "ids": [row[id] for row in rows],
                "tokens": [row[token] for row in rows],
                "positions": [row[position] + further for row in rows],
            }
            return len(run(many, many.bound(**{key: values[key] for key in many.names})))

        yield one if batch == 1 else together


def _nobody(reserve: Text) -> dict[str, Any]:
    """A reservation of nothing, to learn the columns."""
    return {name: 0 for name in ("reserve_limit",) if name in reserve.fixed}


@contextmanager
def _engine(job: Job) -> Iterator[Engine]:
    engine = create_engine(job["url"])
    try:
        yield engine
    finally:
        engine.dispose()


def _moved(api: Checkpoints, found: list[Reservation], ending: bool) -> int:
    """Update the positions of reservations, each by a statement or all by one."""
    moves = [
        (reserved, reserved.stream_version if ending else reserved.stream_position + 1)
        for reserved in found
    ]
    if len(moves) == 1:
        api.update_checkpoint_position(*moves[0])
        return 1
    return len(api.update_checkpoint_positions([PositionUpdate.of(*move) for move in moves]))


@contextmanager
def _toolkit(job: Job) -> Iterator[Step]:
    """The toolkit on one connection, a transaction for each statement without BEGIN and COMMIT."""
    batch, ending = job.get("batch", 1), job.get("ending", False)
    crash_safe = job.get("crash_safe", True)
    with _engine(job) as engine, engine.connect() as opened:
        connection: Connection = opened.execution_options(isolation_level="AUTOCOMMIT")
        api = Checkpoints(connection)

        def step() -> int:
            found = api.reserve_next_available_checkpoint(
                GROUP, TIMEOUT, limit=batch, synchronous_commit=crash_safe
            )
            return _moved(api, found, ending) if found else 0

        yield step


@contextmanager
def _threads(job: Job) -> Iterator[Step]:
    """The toolkit in two threads, so that one works while the other waits; a step drains all."""
    with ExitStack() as stack, ThreadPoolExecutor(2) as pool:
        steps = [stack.enter_context(_toolkit(job)) for _ in range(2)]

        def drain_one(step: Step) -> int:
            ends = time.monotonic() + job["seconds"]
            done = 0
            while time.monotonic() < ends and (moved := step()):
                done += moved
            return done

        yield lambda: sum(pool.map(drain_one, steps))


@contextmanager
def _transactions(job: Job) -> Iterator[Step]:
    """The toolkit as its pages show it: `engine.begin()` around each statement."""
    batch, ending = job.get("batch", 1), job.get("ending", False)
    with _engine(job) as engine:

        def step() -> int:
            with engine.begin() as connection:
                found = Checkpoints(connection).reserve_next_available_checkpoint(
                    GROUP, TIMEOUT, limit=batch
                )
            if not found:
                return 0
            with engine.begin() as connection:
                return _moved(Checkpoints(connection), found, ending)

        yield step


@contextmanager
def _consumer(job: Job) -> Iterator[Step]:
    """A consumer with a handler that does nothing; a step drains all that is due."""
    # Where handlers that wait for nothing share a transaction, one thread works in Python while the
    # other waits for the server; more are in each other's way.
    concurrency = 2 if job.get("handlers", 1) > 1 else min(4, job["batch"])
    with _consuming(job, lambda: None, concurrency=concurrency) as consumer:

        def drain() -> int:
            late = threading.Timer(job["seconds"], consumer.stop)
            late.start()
            try:
                return consumer.drain()
            finally:
                late.cancel()

        yield drain


@contextmanager
def _running(job: Job) -> Iterator[Step]:
    """A consumer that runs, one checkpoint at a time; a step is a look at what it has done."""
    handled = looked = 0

    def count() -> None:
        nonlocal handled
        handled += 1

    def step() -> int:
        nonlocal looked
        time.sleep(0.002)
        before, looked = looked, handled
        return looked - before

    with _consuming(job, count, concurrency=1) as consumer:
        thread = threading.Thread(target=consumer.run)
        started = False

        def begun() -> int:
            nonlocal started
            if not started:
                started = True
                thread.start()
            return step()

        try:
            yield begun
        finally:
            consumer.stop()
            if started:
                thread.join()


@contextmanager
def _consuming(job: Job, handled: Callable[[], None], *, concurrency: int) -> Iterator[Consumer]:
    def handler(connection: Connection, reservation: Reservation) -> None:  # noqa: ARG001
        handled()

    engine = create_engine(job["url"], pool_size=concurrency + 2)
    try:
        # Connected before the start, as the others are.
        with engine.connect():
            yield Consumer(
                engine,
                GROUP,
                handler,
                concurrency=concurrency,
                batch=job["batch"] * (2 if job.get("handlers", 1) > 1 else 1),
                handlers_per_transaction=job.get("handlers", 1),
                listen=False,
            )
    finally:
        engine.dispose()


@contextmanager
def _record(job: Job) -> Iterator[Step]:
    """Raise the versions of `size` streams that were caught up; what follows resets them.

    A step answers microseconds, which only the recording took.
    """
    record = texts(job["design"]).record
    assert record is not None
    size, first, streams = job["size"], job["first"], job["streams"]
    with connect(job["url"]) as connection, connection.cursor() as cursor:
        number = 0

        def step() -> int:
            nonlocal number
            names = [f"stream-{first + (number + n) % streams}" for n in range(size)]
            number = (number + size) % streams
            values = record.bound(
                ids=[job["subscription_id"]] * size,
                streams=names,
                versions=[2] * size,
                positions=[1] * size,
            )
            begun = time.perf_counter_ns()
            found = cursor.execute(record.sql.encode(), values, prepare=True).fetchall()
            taken = time.perf_counter_ns() - begun
            assert len(found) == size, f"{len(found)} of {size} were recorded"
            cursor.execute(
                "UPDATE checkpoints.checkpoints"
                " SET stream_version = 1, stream_position = 1, process_at = NULL"
                " WHERE subscription_id = %s AND stream_name = ANY (%s)",
                (job["subscription_id"], names),
                prepare=True,
            )
            return max(1, taken // 1000)

        yield step


WORK: dict[str, Callable[[Job], contextlib.AbstractContextManager[Step]]] = {
    "psycopg": _psycopg,
    "toolkit": _toolkit,
    "threads": _threads,
    "transactions": _transactions,
    "consumer": _consumer,
    "running consumer": _running,
    "record": _record,
}
