"""Start a peer's worker processes, hear what they say, and be rid of them for sure.

A worker is a program that connects, says `ready`, waits for a line on standard input, then works
and says now and then how many items it has handled since. It ends when standard input does, so
that it never outlives who started it.
"""

from __future__ import annotations

import os
import selectors
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NoReturn

import psycopg
from sqlalchemy import make_url

from tests.benchmarks.peers.peer import PeerError

__all__ = ["Workers", "connect", "environment", "run", "started"]

_START_SECONDS = 60.0
# From where `python -m tests…` finds the workers.
_ROOT = Path(__file__).parents[3]

_VARIABLES = {"host": "PGHOST", "port": "PGPORT", "sslmode": "PGSSLMODE"}


def environment(url: str) -> dict[str, str]:
    """This process's environment with libpq's variables for a database, and no others of them.

    All drivers here take them: libpq, asyncpg and node's pg. Whatever else would reach a session
    from outside (PGOPTIONS, a peer's own variables) is left out: it might change its durability.
    """
    parsed = make_url(url)
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PG", "PROCRASTINATE_"))}
    given = {
        "PGHOST": parsed.host,
        "PGPORT": parsed.port,
        "PGUSER": parsed.username,
        "PGPASSWORD": parsed.password,
        "PGDATABASE": parsed.database,
    }
    made = {variable: str(value) for variable, value in given.items() if value is not None}
    for key, value in parsed.query.items():
        if key not in _VARIABLES or not isinstance(value, str):
            raise PeerError(f"the URL's {key}={value!r} is not one of {sorted(_VARIABLES)}")
        made[_VARIABLES[key]] = value
    return kept | made


def connect(url: str) -> psycopg.Connection:
    """A connection with autocommit, for filling and counting."""
    libpq = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(libpq, autocommit=True)


def run(command: Sequence[str], environ: Mapping[str, str], seconds: float = 120.0) -> str:
    """Run a peer's own tool to its end and return what it printed.

    Raises:
        PeerError: It is not there, failed, or took longer.
    """
    try:
        done = subprocess.run(
            command,
            cwd=_ROOT,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=seconds,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerError(f"{' '.join(command)}: {error}") from error
    if done.returncode != 0:
        raise PeerError(f"{' '.join(command)} ended with {done.returncode}: {done.stdout[-2000:]}")
    return done.stdout


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    errors: IO[bytes]
    unread: bytes = b""
    ready: bool = False
    handled: int = 0

    @property
    def input(self) -> IO[bytes]:
        assert self.process.stdin is not None
        return self.process.stdin

    @property
    def output(self) -> IO[bytes]:
        assert self.process.stdout is not None
        return self.process.stdout


class Workers:
    """Worker processes that are up and connected, each a process group of its own."""

    def __init__(self, workers: Sequence[_Worker]) -> None:
        self._workers = workers
        self._selector = selectors.DefaultSelector()
        for worker in workers:
            self._selector.register(worker.output, selectors.EVENT_READ, worker)

    @property
    def handled(self) -> int:
        """How many items they have said to have handled."""
        return sum(worker.handled for worker in self._workers)

    def wait_until_ready(self) -> None:
        """Wait until each is connected and could start.

        Raises:
            PeerError: One has ended, or takes too long.
        """
        deadline = time.monotonic() + _START_SECONDS
        while not all(worker.ready for worker in self._workers):
            if time.monotonic() > deadline:
                raise PeerError(f"a worker was not ready after {_START_SECONDS:g} s")
            self.listen(0.1)

    def go(self) -> None:
        """Let them start."""
        for worker in self._workers:
            try:
                os.write(worker.input.fileno(), b"go\n")
            except BrokenPipeError:
                self._fail(worker)

    def listen(self, seconds: float) -> None:
        """Take in what they say, for at most these seconds.

        Raises:
            PeerError: One has ended; with what it wrote last.
        """
        for key, _ in self._selector.select(seconds):
            worker: _Worker = key.data
            read = os.read(worker.output.fileno(), 65536)
            if not read:
                self._fail(worker)
            *lines, worker.unread = (worker.unread + read).split(b"\n")
            for line in lines:
                if line == b"ready":
                    worker.ready = True
                else:
                    worker.handled = int(line)

    def close(self) -> None:
        """Forget them; `started` ends the processes."""
        self._selector.close()

    def _fail(self, worker: _Worker) -> NoReturn:
        status = worker.process.wait(10)
        worker.errors.seek(0)
        said = worker.errors.read().decode(errors="replace")[-2000:]
        raise PeerError(f"a worker ended with {status} before it was to: {said}")


@contextmanager
def started(
    command: Sequence[str], environ: Mapping[str, str], processes: int
) -> Iterator[Workers]:
    """Start the processes and wait until all are ready; at the end none is left."""
    with ExitStack() as stack:
        made = []
        for _ in range(processes):
            errors = stack.enter_context(tempfile.TemporaryFile())
            process = subprocess.Popen(
                command,
                cwd=_ROOT,
                env=environ,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            )
            stack.callback(_end, process)
            made.append(_Worker(process, errors))
        workers = Workers(made)
        stack.callback(workers.close)
        workers.wait_until_ready()
        yield workers


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children. Until it is waited for, its number is nobody else's."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
