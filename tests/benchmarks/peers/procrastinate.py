"""Procrastinate (https://procrastinate.readthedocs.io), with its psycopg connector.

Settings, from "Execute multiple jobs at the same time" and "Mind the size of your PostgreSQL pool":

- an asynchronous task with `concurrency=30`, the guide's figure, in each process;
- a pool of one more connection than that, as it advises for short jobs;
- finished jobs are kept, its default. It has no batches: `batch` is not used.

One at a time: `concurrency=1`, its default.

Foreign: another queue. Paused: Procrastinate has no pause; the jobs are of the drained queue and
scheduled ten years ahead.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from dataclasses import dataclass

import psycopg

from tests.benchmarks.peers.measured import MeasuredPeer
from tests.benchmarks.peers.peer import Kind
from tests.benchmarks.peers.workers import connect, environment, run

__all__ = ["QUEUE", "TASK", "Procrastinate"]

QUEUE = "work"
TASK = "handle"

_CONCURRENCY = 30


@dataclass(frozen=True)
class Procrastinate(MeasuredPeer):
    """Procrastinate with psycopg."""

    @property
    def name(self) -> str:
        return "Procrastinate psycopg"

    def version(self) -> str:
        return importlib.metadata.version("procrastinate")

    def missing(self) -> str | None:
        for package in ("procrastinate", "psycopg_pool"):
            if importlib.util.find_spec(package) is None:
                return f"the package {package} is not installed (the extra `benchmarks` has it)"
        return None

    def prepare(self, url: str) -> None:
        app = "tests.benchmarks.peers.procrastinate_worker.app"
        tool = (sys.executable, "-m", "procrastinate", "--app", app)
        run((*tool, "schema", "--apply"), environment(url))

    def add(self, url: str, count: int, kind: Kind) -> None:
        # The function that its `batch_defer` calls.
        with connect(url) as connection:
            connection.execute(
                """
                SELECT cardinality(procrastinate_defer_jobs_v1(array_agg(ROW(
                    %s, %s, 0, NULL, NULL, '{}', CASE WHEN %s THEN now() + interval '10 years' END
                )::procrastinate_job_to_defer_v1)))
                FROM generate_series(1, %s)
                """,
                ("foreign" if kind == "foreign" else QUEUE, TASK, kind == "paused", count),
            )
            connection.execute("ANALYZE procrastinate_jobs, procrastinate_events")

    def drain_command(self, batch: int) -> tuple[str, ...]:  # noqa: ARG002
        return _command(_CONCURRENCY)

    def single_command(self) -> tuple[str, ...]:
        return _command(1)

    def waiting(self, connection: psycopg.Connection, first: int) -> tuple[int, int | None]:
        """How many jobs are to do or being done, and the first of them."""
        return connection.execute(
            """
            SELECT count(*), min(id) FROM procrastinate_jobs
            WHERE id >= %s AND queue_name = %s AND scheduled_at IS NULL
            AND status IN ('todo', 'doing')
            """,
            (first, QUEUE),
        ).fetchone() or (0, None)

    def done(self, connection: psycopg.Connection, first: int, count: int) -> int:  # noqa: ARG002
        """How many jobs succeeded."""
        row = connection.execute(
            """
            SELECT count(*) FROM procrastinate_jobs
            WHERE id >= %s AND queue_name = %s AND status = 'succeeded'
            """,
            (first, QUEUE),
        ).fetchone()
        assert row is not None
        return int(row[0])


def _command(concurrency: int) -> tuple[str, ...]:
    module = "tests.benchmarks.peers.procrastinate_worker"
    return (sys.executable, "-m", module, str(concurrency))
