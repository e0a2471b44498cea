"""The worker processes: started, watched, killed, replaced and stopped by the parent."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from sqlalchemy import URL

from checkpoints.demo import DemoError
from checkpoints.demo.worker import Settings, work
from checkpoints.runtime import Handler

__all__ = ["LOST", "RECOVERED", "RETRIED", "Workers"]

# What consumers log, without arguments.
RECOVERED = "a reservation expired; %s"
LOST = "the reservation was lost; what the handler wrote is rolled back"
RETRIED = "attempt %d failed%s: %s"

# Not fork: a fork of a process with threads and database connections may hang.
_spawn = multiprocessing.get_context("spawn")
_STOP_SECONDS = 5.0
# A pipe takes so much whole or not at all, from a process that is killed or frozen as well.
_REPORT_CHARACTERS = 1000


class Workers:
    """A number of worker processes; one that was killed from here is replaced."""

    def __init__(
        self, url: URL, count: int, handlers: Mapping[str, Handler], settings: Settings
    ) -> None:
        self.killed = 0
        self.frozen = 0
        self.reports: Counter[str] = Counter()
        """The warnings and errors that they logged, without arguments: how many of each."""
        self._job = (url, handlers, settings)
        self._processes: dict[str, SpawnProcess] = {}
        self._pipes: dict[str, Connection] = {}
        self._names = [f"checkpoints demo worker {number}" for number in range(1, count + 1)]

    def start(self) -> None:
        """Start them all; they need about a second until they work."""
        for name in self._names:
            self._start(name)

    @property
    def names(self) -> list[str]:
        """Their names, which are the application names of their database sessions."""
        return list(self._names)

    def kill(self, name: str) -> None:
        """Kill one with SIGKILL, so that it cannot clean up, and start another in its place."""
        process = self._processes[name]
        process.kill()
        process.join()
        # It may have ended by itself just before; then what it says is worth reading.
        self._check(name, expected=-signal.SIGKILL)
        self.killed += 1
        self._start(name)

    def freeze(self, name: str) -> None:
        """Stop one where it stands, with its transaction open, as a machine out of memory would."""
        self._signal(name, signal.SIGSTOP)
        self.frozen += 1

    def thaw(self, name: str) -> None:
        """Let one go on as if nothing had happened."""
        self._signal(name, signal.SIGCONT)

    def check(self) -> None:
        """See that all are alive, and take their reports.

        Raises:
            DemoError: one ended by itself.
        """
        for name, process in self._processes.items():
            if process.exitcode is None:
                self._take_reports(name)
            else:
                self._check(name)

    def stop(self) -> None:
        """Ask them to stop, and kill those that do not; none is left."""
        for name, process in self._processes.items():
            process.terminate()
            self.thaw(name)
        deadline = time.monotonic() + _STOP_SECONDS
        for process in self._processes.values():
            process.join(max(0.0, deadline - time.monotonic()))
            if process.exitcode is None:
                process.kill()
                process.join()
        for name in self._processes:
            self._take_reports(name)

    def _signal(self, name: str, number: signal.Signals) -> None:
        process = self._processes[name]
        # One that has ended is not waited for yet, so that its id cannot be another's.
        if process.pid is not None and process.exitcode is None:
            os.kill(process.pid, number)

    def _start(self, name: str) -> None:
        pipe, reports = _spawn.Pipe(duplex=False)
        process = _spawn.Process(
            target=_run, args=(reports, name, *self._job), name=name, daemon=True
        )
        # Starting a process starts the tracker if need be, and that lets interrupts through.
        resource_tracker.ensure_running()
        with _interrupts_held():
            process.start()
            self._processes[name] = process
            self._pipes[name] = pipe
        reports.close()

    def _check(self, name: str, expected: int | None = None) -> None:
        exit_code = self._processes[name].exitcode
        last = self._take_reports(name)
        self._pipes[name].close()
        if exit_code != expected:
            said = last if exit_code == 1 and last else f"exit code {exit_code}"
            raise DemoError(f"{name} ended early: {said}")

    def _take_reports(self, name: str) -> str | None:
        """Count what it said; the last of it."""
        last = None
        with suppress(EOFError, OSError):
            while self._pipes[name].poll():
                last = self._pipes[name].recv()
                self.reports[last] += 1
        return last


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back: a child starts with it blocked, the parent gets it afterwards.

    The terminal sends it to the children too, and one that has not loaded yet would print a
    traceback.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Reporter(logging.Handler):
    """Sends warnings and errors to the parent."""

    def __init__(self, pipe: Connection) -> None:
        super().__init__(logging.WARNING)
        self._pipe = pipe

    def emit(self, record: logging.LogRecord) -> None:
        # The parent may be gone.
        with suppress(OSError):
            self._pipe.send(str(record.msg)[:_REPORT_CHARACTERS])


def _run(
    pipe: Connection,
    name: str,
    url: URL,
    handlers: Mapping[str, Handler],
    settings: Settings,
) -> None:
    """The main function of a worker process."""
    logger = logging.getLogger("checkpoints")
    logger.addHandler(_Reporter(pipe))
    try:
        work(url, name, handlers, settings)
    except Exception as error:
        logger.critical(" ".join(f"{type(error).__name__}: {error}".split()))
        raise SystemExit(1) from None
