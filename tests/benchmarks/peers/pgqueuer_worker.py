"""A worker of PgQueuer: `python -m tests.benchmarks.peers.pgqueuer_worker DRIVER BATCH`."""

from __future__ import annotations

import sys
from typing import Any

import asyncpg
import psycopg
import uvloop
from pgqueuer import PgQueuer
from pgqueuer.db import AsyncpgDriver, Driver, PsycopgDriver
from pgqueuer.models import Job
from pgqueuer.queries import Queries

from tests.benchmarks.peers.pgqueuer import ENTRYPOINT
from tests.benchmarks.peers.worker import Reporter


class _HeldQueries(Queries):
    """Queries that wait before the first dequeue, when the worker is up and listens."""

    reporter: Reporter

    async def dequeue(self, *args: Any, **options: Any) -> list[Job]:
        await self.reporter.ready()
        return await super().dequeue(*args, **options)


async def _connected(driver: str) -> Driver:
    # Where to is in libpq's variables.
    if driver == "asyncpg":
        return AsyncpgDriver(await asyncpg.connect())
    return PsycopgDriver(await psycopg.AsyncConnection.connect(autocommit=True))


async def _main(driver: str, batch: int) -> None:
    queries = _HeldQueries(await _connected(driver))
    queries.reporter = reporter = Reporter()
    queue = PgQueuer(queries.driver, queries=queries)

    async def handle(_job: Job) -> None:
        reporter.handled += 1

    queue.entrypoint(ENTRYPOINT)(handle)
    await queue.run(batch_size=batch)


if __name__ == "__main__":
    uvloop.run(_main(sys.argv[1], int(sys.argv[2])))
