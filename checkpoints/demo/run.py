"""The demonstration from beginning to end."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from sqlalchemy import URL, Engine

from checkpoints import Checkpoints
from checkpoints.demo import DemoError, chaos
from checkpoints.demo.display import Display, Progress
from checkpoints.demo.history import Repository
from checkpoints.demo.importer import Importer
from checkpoints.demo.projection import HANDLERS
from checkpoints.demo.recorder import Recording
from checkpoints.demo.schema import database_url, demo_schema
from checkpoints.demo.tables import demo_engine
from checkpoints.demo.verdict import verdict
from checkpoints.demo.worker import Settings
from checkpoints.demo.workers import LOST, RECOVERED, RETRIED, Workers
from checkpoints.embedded import start_server

__all__ = ["demonstrate"]

_TICK_SECONDS = 0.02
_SHOW_SECONDS = 0.25
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def demonstrate(repo: Path | None, *, processes: int, with_chaos: bool, url: str | None) -> bool:
    """Process a repository's history and compare the result with what git says: whether it holds.

    Raises:
        DemoError: it could not be carried out.
        ServerUnavailable: there is no PostgreSQL here.
    """
    # What ends the demonstration is raised; what does not would spoil the display.
    logging.getLogger("checkpoints").addHandler(logging.NullHandler())
    display = Display()
    repository = Repository.at(_default_repository() if repo is None else repo)
    with _ended_by_signals(), _server(url) as (server_url, description):
        display.say(f"history: {repository.path} at {repository.head[:12]}")
        display.say(f"database: {description}")
        with ExitStack() as cleanup:
            cleanup.enter_context(demo_schema(server_url))
            engine = demo_engine(server_url, pool_size=3)
            cleanup.callback(engine.dispose)
            threads = cleanup.enter_context(ThreadPoolExecutor())
            gates = chaos.gates(repository) if with_chaos else ()
            importer = Importer(engine, repository, gates=gates)
            cleanup.callback(importer.stop)
            recording = Recording(engine)
            cleanup.callback(recording.stop)
            handlers = chaos.unlucky_handlers(repository) if with_chaos else HANDLERS
            settings = chaos.SETTINGS if with_chaos else Settings()
            workers = Workers(server_url, processes, handlers, settings)
            cleanup.callback(workers.stop)
            cleanup.enter_context(_uninterrupted_cleanup())

            killer = chaos.Killer(engine, workers, importer, recording) if with_chaos else None
            started = time.monotonic()
            workers.start()
            running = [threads.submit(importer.run), threads.submit(recording.run)]
            with display.progressing():
                _watch(engine, running, importer, recording, workers, killer, display)
            seconds = time.monotonic() - started
            workers.stop()
            display.say("all is done; comparing it with git log --numstat, read another way")
            checks = verdict(engine, repository)
            figures = _figures(importer, seconds)
            if with_chaos:
                figures |= _chaos_figures(workers, recording)
            display.conclude(figures, checks)
    return all(check.holds for check in checks)


def _default_repository() -> Path:
    """The clone that this package lies in, else the current directory."""
    clone = Path(__file__).parents[2]
    return clone if (clone / ".git").exists() and (clone / "pyproject.toml").exists() else Path()


@contextmanager
def _server(url: str | None) -> Iterator[tuple[URL, str]]:
    if url is not None:
        given = database_url(url)
        yield given, f"{given.host or 'local'}, {given.database or 'the default database'}"
        return
    with start_server() as server:
        yield server.url("postgres"), f"{server.description}, for this run only"


@contextmanager
def _ended_by_signals() -> Iterator[None]:
    """What would end the process at once is an exception instead, so that it cleans up."""

    def end(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.getsignal(number) for number in _ENDING}
    for number in (signal.SIGTERM, signal.SIGHUP):
        # nohup had it ignored, and so it stays.
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _uninterrupted_cleanup() -> Iterator[None]:
    """At the end of the block, a second Ctrl-C does not stop what the first one began."""
    try:
        yield
    finally:
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)


def _watch(
    engine: Engine,
    running: list[Future[None]],
    importer: Importer,
    recording: Recording,
    workers: Workers,
    killer: chaos.Killer | None,
    display: Display,
) -> None:
    """Look on until all is recorded and nothing is left to do; in between, kill."""
    show_at = 0.0
    importing, _ = running
    while True:
        if killer is not None:
            killer.step()
        workers.check()
        if time.monotonic() >= show_at:
            # Asked before the work is counted: what it recorded last is in the counts then.
            is_recorded = importing.done() and recording.has_all(importer)
            for future in running:
                if future.done():
                    future.result()
            counted_from = time.monotonic()
            progress = _progress(engine, importer, recording, workers)
            display.show(progress)
            harm_done = killer is None or killer.is_done
            if is_recorded and harm_done and not (progress.ready or progress.reserved):
                return
            # Counting must stay a small part of the work, however much there is to count.
            took = time.monotonic() - counted_from
            show_at = time.monotonic() + max(_SHOW_SECONDS, 10 * took)
        time.sleep(_TICK_SECONDS)


def _progress(
    engine: Engine, importer: Importer, recording: Recording, workers: Workers
) -> Progress:
    # Before the lag, or what is recorded in between would make `done` less than nothing.
    recorded = recording.messages * len(HANDLERS)
    with engine.begin() as connection:
        metrics = Checkpoints(connection).get_metrics()
    return Progress(
        commits=importer.imported.commits,
        all_commits=importer.repository.commits,
        messages=importer.imported.changes * len(HANDLERS),
        done=max(0, recorded - sum(each.lag for each in metrics)),
        ready=sum(each.ready for each in metrics),
        reserved=sum(each.reserved for each in metrics),
        retrying=sum(each.retry for each in metrics),
        failed=sum(each.failed for each in metrics),
        killed=workers.killed,
    )


def _figures(importer: Importer, seconds: float) -> dict[str, str]:
    repository, imported = importer.repository, importer.imported
    if imported.commits != repository.commits:
        raise DemoError(
            f"git log gave {imported.commits:,} commits where git rev-list counted "
            f"{repository.commits:,}"
        )
    messages = imported.changes * len(HANDLERS)
    return {
        "commits": f"{imported.commits:,}" + (" (shallow clone)" if repository.shallow else ""),
        "merges, without changes of their own": f"{imported.merges:,}",
        "empty commits": f"{imported.empty:,}",
        "changes recorded": f"{imported.changes:,}",
        "changes of binary files": f"{imported.binaries:,}",
        "streams (paths)": f"{imported.streams:,}",
        f"messages applied by {len(HANDLERS)} subscriptions": f"{messages:,}",
        "time": f"{seconds:,.1f} s, {messages / seconds:,.0f} messages/s",
    }


def _chaos_figures(workers: Workers, recording: Recording) -> dict[str, str]:
    return {
        "workers killed": f"{workers.killed:,}",
        "workers frozen for a while": f"{workers.frozen:,}",
        "recorders replaced": f"{recording.restarts:,}",
        "reservations recovered": f"{workers.reports[RECOVERED]:,}",
        "reservations lost, and rolled back": f"{workers.reports[LOST]:,}",
        "errors retried": f"{workers.reports[RETRIED]:,}",
    }
