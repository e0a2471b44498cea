"""The worker processes: started, watched, killed, replaced and stopped by the parent."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from types import FrameType

from sqlalchemy import URL

from checkpoints.demo import DemoError
from checkpoints.demo.projection import Handler
from checkpoints.demo.tables import demo_engine
from checkpoints.demo.worker import Settings, work

__all__ = ["Workers"]

# Not fork: a fork of a process with threads and database connections may hang.
_spawn = multiprocessing.get_context("spawn")
_STOP_SECONDS = 5.0


class Workers:
    """A number of worker processes; one that was killed from here is replaced."""

    def __init__(
        self, url: URL, count: int, handlers: Mapping[str, Handler], settings: Settings
    ) -> None:
        self.killed = 0
        self.frozen = 0
        self._job = (url, handlers, settings)
        self._processes: dict[str, SpawnProcess] = {}
        self._complaints: dict[str, Connection] = {}
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
        """See that all are alive.

        Raises:
            DemoError: one ended by itself.
        """
        for name, process in self._processes.items():
            if process.exitcode is not None:
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

    def _signal(self, name: str, number: signal.Signals) -> None:
        process = self._processes[name]
        # One that has ended is not waited for yet, so that its id cannot be another's.
        if process.pid is not None and process.exitcode is None:
            os.kill(process.pid, number)

    def _start(self, name: str) -> None:
        complaint, complains = _spawn.Pipe(duplex=False)
        process = _spawn.Process(
            target=_run, args=(name, *self._job, complains), name=name, daemon=True
        )
        # Starting a process starts the tracker if need be, and that lets interrupts through.
        resource_tracker.ensure_running()
        with _interrupts_held():
            process.start()
            self._processes[name] = process
            self._complaints[name] = complaint
        complains.close()

    def _check(self, name: str, expected: int | None = None) -> None:
        exit_code = self._processes[name].exitcode
        said = f"exit code {exit_code}"
        with self._complaints[name] as complaint, suppress(EOFError, OSError):
            if complaint.poll():
                said, expected = complaint.recv(), None
        if exit_code != expected:
            raise DemoError(f"{name} ended early: {said}")


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


def _run(
    name: str,
    url: URL,
    handlers: Mapping[str, Handler],
    settings: Settings,
    complains: Connection,
) -> None:
    """The main function of a worker process."""
    is_stopping = _stop_on_sigterm()
    engine = demo_engine(url, application_name=name)
    try:
        work(engine, handlers, is_stopping, settings)
    except Exception as error:
        # When asked to stop, or without a parent, the server may be gone too.
        if not is_stopping():
            complains.send(" ".join(f"{type(error).__name__}: {error}".split()))
            raise SystemExit(1) from None
    finally:
        engine.dispose()


def _stop_on_sigterm() -> Callable[[], bool]:
    """What tells whether the worker is to stop: it was asked to, or the parent was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101  # for the type checker
    # A plain flag: the signal may come while the lock inside of an Event is held.
    asked = False

    def ask(_number: int, _frame: FrameType | None) -> None:
        nonlocal asked
        asked = True

    signal.signal(signal.SIGTERM, ask)
    return lambda: asked or os.getppid() != parent.pid
