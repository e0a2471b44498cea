"""What runs in a worker process: consumers, or a recorder, until it is killed or stopped."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, ExceptionContext, create_engine, event
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from checkpoints import Reservation
from checkpoints.runtime import AsyncConsumer, Consumer, RetryPolicy
from checkpoints.runtime.reading import Message, Position
from checkpoints.runtime.recorder import Interest, Recorder
from tests.faults.handling import ASYNCHRONOUS, BLOCKING, Handling
from tests.faults.tables import read_messages
from tests.support.factories import GROUP

__all__ = ["Job", "run"]


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker process is to do.

    `kind`: "blocking", "asyncio" or "recorder". `consumers`: so many in threads of the process.
    `handling`, `engine`, `consumer`, `retry`, `recorder`: arguments of Handling, create_engine,
    Consumer, RetryPolicy and Recorder. `interests`: the subscriptions of the recorder.
    """

    url: URL
    log: str
    kind: str = "blocking"
    name: str = "worker"
    consumers: int = 1
    level: int = logging.INFO
    options: str = ""
    retry: dict[str, Any] = field(default_factory=dict)
    handling: dict[str, Any] = field(default_factory=dict)
    engine: dict[str, Any] = field(default_factory=dict)
    consumer: dict[str, Any] = field(default_factory=dict)
    recorder: dict[str, Any] = field(default_factory=dict)
    interests: Sequence[str] = ()


def run(job: Job) -> None:
    """The main function of the process."""
    _end_with_the_parent()
    _log_to(job.log, job.level)
    logging.getLogger("checkpoints").debug("begun")
    arguments = {
        "connect_args": {"application_name": job.name, "options": job.options},
        **job.engine,
    }
    if job.kind == "asyncio":
        asyncio.run(_consume_asynchronously(create_async_engine(job.url, **arguments), job))
        return
    engine = create_engine(job.url, **arguments)
    event.listen(engine, "handle_error", _log_error)
    if job.kind == "recorder":
        interests = [Interest(name) for name in job.interests]
        Recorder(engine, GROUP, _reader(job), interests, **job.recorder).run()
    else:
        _consume(engine, job)
    engine.dispose()


def _consume(engine: Engine, job: Job) -> None:
    handling = Handling(BLOCKING, **job.handling)
    settings = {"retry": RetryPolicy(**job.retry), **job.consumer}
    consumers = [Consumer(engine, GROUP, handling, **settings) for _ in range(job.consumers)]
    others = [threading.Thread(target=consumer.run) for consumer in consumers[1:]]
    for other in others:
        other.start()
    consumers[0].run()
    for consumer in consumers[1:]:
        consumer.stop()
    for other in others:
        other.join()


async def _consume_asynchronously(engine: AsyncEngine, job: Job) -> None:
    event.listen(engine.sync_engine, "handle_error", _log_error)
    handling = Handling(ASYNCHRONOUS, **job.handling)

    async def handle(connection: AsyncConnection, reservation: Reservation) -> None:
        await connection.run_sync(handling, reservation)

    settings = {"retry": RetryPolicy(**job.retry), **job.consumer}
    await AsyncConsumer(engine, GROUP, handle, **settings).run()
    await engine.dispose()


def _reader(job: Job) -> Any:
    """Reads messages; with a gate, it stands there between reading and committing."""

    def read(connection: Connection, after: Position, limit: int) -> Sequence[Message]:
        read = read_messages(connection, after, limit)
        if read and job.handling.get("gate"):
            gate = Path(job.handling["gate"])
            gate.with_name(f"{gate.name}-recorder").touch()
            while not gate.exists():
                time.sleep(0.01)
        return read

    return read


def _end_with_the_parent() -> None:
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(9)

    threading.Thread(target=watch, daemon=True).start()


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        told = {
            "at": datetime.now().astimezone().isoformat(),
            "level": record.levelname,
            "message": record.getMessage(),
            "stream": getattr(record, "stream_name", None),
            "sqlstate": getattr(record, "sqlstate", None),
        }
        if record.exc_info:
            told["traceback"] = self.formatException(record.exc_info)
        return json.dumps(told)


def _log_to(path: str, level: int) -> None:
    handler = logging.FileHandler(path)
    handler.setFormatter(_Formatter())
    logging.getLogger("checkpoints").addHandler(handler)
    logging.getLogger("checkpoints").setLevel(level)


def _log_error(context: ExceptionContext) -> None:
    sqlstate = getattr(context.original_exception, "sqlstate", None)
    logging.getLogger("checkpoints").info("a statement failed", extra={"sqlstate": sqlstate})
