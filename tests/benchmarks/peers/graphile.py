"""Graphile Worker (https://worker.graphile.org), from npm, on node; with its local queue or not.

Settings, from its page "Performance" and its own perfTest:

- `concurrentJobs: 24` and `maxPoolSize: 25` in each process, `completeJobBatchDelay: 0` and
  `failJobBatchDelay: 0` ("in general, we'd advise all users to enable these"), and only errors
  and warnings logged;
- with the local queue: `localQueue: { size: 500 }`, which is its batch: `batch` is not used.

One at a time: `concurrentJobs: 1`, no local queue, no batching of completions.

Foreign: another task, which no worker has. Paused: Graphile Worker has no pause; the jobs are of
the drained task with a `run_at` ten years ahead. (`forbiddenFlags` comes near too, but workers that
have any do without the local queue.)

The package is installed by npm into a folder of the user's cache, once. Its package.json asks for
node 22.18 or newer; on older ones, to 20, npm warns and it works.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import psycopg

from tests.benchmarks.peers.measured import MeasuredPeer
from tests.benchmarks.peers.peer import Kind, PeerError
from tests.benchmarks.peers.workers import connect, environment, run

__all__ = ["GraphileWorker"]

TASK = "work"

_PACKAGE = "graphile-worker"
_VERSION = "0.18.0"
_LEAST_NODE = 20
_CONCURRENCY = 24
_LOCAL_QUEUE = 500
_WORKER = Path(__file__).with_name("graphile_worker.mjs")


@dataclass(frozen=True)
class GraphileWorker(MeasuredPeer):
    """Graphile Worker, with its local queue or without."""

    local_queue: bool

    @property
    def name(self) -> str:
        return f"{_PACKAGE}, local queue {_LOCAL_QUEUE}" if self.local_queue else _PACKAGE

    def version(self) -> str:
        return _VERSION

    def missing(self) -> str | None:
        """Why it cannot run here. Where node and npm are, the package is installed by this."""
        for program in ("node", "npm"):
            if shutil.which(program) is None:
                return f"{program} is not on the PATH"
        try:
            version = run(("node", "--version"), os.environ, 30.0).strip()
            found = re.match(r"v(\d+)\.", version)
            if found is None or int(found[1]) < _LEAST_NODE:
                return f"node is {version}, and {_LEAST_NODE} or newer is needed"
            _installed()
        except PeerError as error:
            return str(error)
        return None

    def prepare(self, url: str) -> None:
        command = ("node", str(_installed() / "dist" / "cli.js"), "--schema-only")
        run(command, environment(url))

    def add(self, url: str, count: int, kind: Kind) -> None:
        # Its function for adding many.
        with connect(url) as connection:
            connection.execute(
                """
                SELECT count(*) FROM graphile_worker.add_jobs(ARRAY(
                    SELECT json_populate_record(NULL::graphile_worker.job_spec, json_build_object(
                        'identifier', %s::text,
                        'payload', json_build_object('id', number),
                        'run_at', now() + %s::interval
                    ))
                    FROM generate_series(1, %s) AS number
                ))
                """,
                (
                    "foreign" if kind == "foreign" else TASK,
                    "10 years" if kind == "paused" else "0",
                    count,
                ),
            )
            connection.execute("ANALYZE graphile_worker._private_jobs")

    def drain_command(self, batch: int) -> tuple[str, ...]:  # noqa: ARG002
        return _command(_CONCURRENCY, _LOCAL_QUEUE if self.local_queue else -1, 0)

    def single_command(self) -> tuple[str, ...]:
        return _command(1, -1, -1)

    def waiting(self, connection: psycopg.Connection, first: int) -> tuple[int, int | None]:
        """How many jobs are there, locked, failed or neither, and the first of them."""
        return connection.execute(
            """
            SELECT count(*), min(jobs.id)
            FROM graphile_worker._private_jobs AS jobs
            JOIN graphile_worker._private_tasks AS tasks ON tasks.id = jobs.task_id
            WHERE jobs.id >= %s AND tasks.identifier = %s
            AND jobs.run_at <= now() + interval '1 year'
            """,
            (first, TASK),
        ).fetchone() or (0, None)

    def done(self, connection: psycopg.Connection, first: int, count: int) -> int:
        """How many jobs are gone: those that fail stay, and only success deletes one."""
        return count - self.waiting(connection, first)[0]


def _command(concurrency: int, local_queue: int, delay: int) -> tuple[str, ...]:
    settings = (str(concurrency), str(local_queue), str(delay))
    return ("node", str(_WORKER), str(_installed().parent), TASK, *settings)


@functools.cache
def _installed() -> Path:
    """The package's folder, installed by npm if it is not there yet."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "checkpoints-benchmarks" / f"{_PACKAGE}-{_VERSION}"
    package = folder / "node_modules" / _PACKAGE
    if not package.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Renamed when complete: an installation that was cut short is never taken for one.
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            options = ("--prefix", str(made), "--no-audit", "--no-fund", "--no-save")
            run(("npm", "install", *options, f"{_PACKAGE}@{_VERSION}"), os.environ, 300.0)
            try:
                made.rename(folder)
            except OSError as error:
                if not package.is_dir():
                    raise PeerError(f"{folder} could not be made: {error}") from error
    return package
