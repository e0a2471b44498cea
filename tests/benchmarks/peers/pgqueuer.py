"""PgQueuer (https://pgqueuer.readthedocs.io), with asyncpg or psycopg.

Settings, from its performance guide and its benchmark tool:

- installed as `durable`, its default, and `pgqueuer autovac` run, the first of its checklist;
- one connection for each worker, not a pool, as the guide says of the QueueManager;
- `batch_size` as given (the guide: raise it for short jobs), no limit of tasks, continuous mode;
- uvloop, as its command `pgqueuer run` has it. That command itself fails with typer 0.29, whose
  enum options it gets as strings; `install` and `autovac` do not, and the worker here calls the
  library, so typer need not be held back.

With psycopg it may stand still for a second at its start: its listener holds the connection until a
notification comes or a second has passed. A drain has that in it, one at a time has not.

One at a time: `batch_size=1`. PgQueuer has no setting for one job at a time in each process (its
`concurrency_limit` is one for all workers, and `max_concurrent_tasks=2`, the least it allows, adds
a query's part): the next job may be fetched while the last is being logged as done.

Foreign: an entrypoint that no worker registers. Paused: PgQueuer has no pause; the items are of
the drained entrypoint and deferred for ten years by `execute_after`. (Its workers could leave the
entrypoint out too, which is what "foreign" measures.)
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass
from datetime import timedelta
from typing import Literal

import psycopg

from tests.benchmarks.peers.measured import MeasuredPeer
from tests.benchmarks.peers.peer import Kind
from tests.benchmarks.peers.workers import connect, environment, run

__all__ = ["ENTRYPOINT", "PgQueuer"]

ENTRYPOINT = "work"

_DEFERRED = timedelta(days=3650)


@dataclass(frozen=True)
class PgQueuer(MeasuredPeer):
    """PgQueuer with one of its drivers."""

    driver: Literal["asyncpg", "psycopg"]

    @property
    def name(self) -> str:
        return f"PgQueuer {self.driver}"

    def version(self) -> str:
        return importlib.metadata.version("pgqueuer")

    def missing(self) -> str | None:
        # The worker's module imports both drivers.
        for package in ("pgqueuer", "uvloop", "asyncpg", "psycopg"):
            if importlib.util.find_spec(package) is None:
                return f"the package {package} is not installed (the extra `benchmarks` has it)"
        return None

    def prepare(self, url: str) -> None:
        tool = (sys.executable, "-m", "pgqueuer")
        run((*tool, "install", "--durability", "durable"), environment(url))
        run((*tool, "autovac"), environment(url))

    def add(self, url: str, count: int, kind: Kind) -> None:
        # What its `enqueue` writes: a job, and a line in the log.
        with connect(url) as connection:
            connection.execute(
                """
                WITH inserted AS (
                    INSERT INTO pgqueuer (priority, entrypoint, execute_after, status)
                    SELECT 0, %s, now() + %s, 'queued' FROM generate_series(1, %s)
                    RETURNING id, entrypoint, priority
                )
                INSERT INTO pgqueuer_log (job_id, status, entrypoint, priority)
                SELECT id, 'queued', entrypoint, priority FROM inserted
                """,
                (
                    "foreign" if kind == "foreign" else ENTRYPOINT,
                    _DEFERRED if kind == "paused" else timedelta(0),
                    count,
                ),
            )
            connection.execute("ANALYZE pgqueuer, pgqueuer_log")

    def drain_command(self, batch: int) -> tuple[str, ...]:
        module = "tests.benchmarks.peers.pgqueuer_worker"
        return (sys.executable, "-m", module, self.driver, str(batch))

    def single_command(self) -> tuple[str, ...]:
        return self.drain_command(1)

    def waiting(self, connection: psycopg.Connection, first: int) -> tuple[int, int | None]:
        """How many jobs are queued or picked, and the first of them."""
        return connection.execute(
            """
            SELECT count(*), min(id) FROM pgqueuer
            WHERE id >= %s AND entrypoint = %s AND execute_after <= now()
            """,
            (first, ENTRYPOINT),
        ).fetchone() or (0, None)

    def done(self, connection: psycopg.Connection, first: int, count: int) -> int:  # noqa: ARG002
        """How many jobs the log calls successful."""
        row = connection.execute(
            """
            SELECT count(DISTINCT job_id) FROM pgqueuer_log
            WHERE job_id >= %s AND entrypoint = %s AND status = 'successful'
            """,
            (first, ENTRYPOINT),
        ).fetchone()
        assert row is not None
        return int(row[0])
