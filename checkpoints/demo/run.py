"""The demonstration from beginning to end."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

from sqlalchemy import URL, Engine, func, select

from checkpoints import Checkpoints
from checkpoints.demo import DemoError, chaos
from checkpoints.demo.display import Display, Progress
from checkpoints.demo.history import Repository
from checkpoints.demo.projection import HANDLERS
from checkpoints.demo.recorder import Recorder
from checkpoints.demo.schema import database_url, demo_schema
from checkpoints.demo.tables import demo_engine, incidents
from checkpoints.demo.verdict import verdict
from checkpoints.demo.worker import Settings
from checkpoints.demo.workers import Workers
from checkpoints.embedded import start_server

__all__ = ["demonstrate"]

_TICK_SECONDS = 0.02
_SHOW_SECONDS = 0.25
_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def demonstrate(repo: Path | None, *, workers: int, with_chaos: bool, url: str | None) -> bool:
    """Process a repository's history and compare the result with what git says: whether it holds.

    Raises:
        DemoError: it could not be carried out.
        ServerUnavailable: there is no PostgreSQL here.
    """
    display = Display()
    repository = Repository.at(_default_repository() if repo is None else repo)
    with _ended_by_signals(), _server(url) as (server_url, description):
        display.say(f"history: {repository.path} at {repository.head[:12]}")
        display.say(f"database: {description}")
        with ExitStack() as cleanup:
            subscription_ids = cleanup.enter_context(demo_schema(server_url))
            engine = demo_engine(server_url, pool_size=2)
            cleanup.callback(engine.dispose)
            handlers = chaos.unlucky_handlers(repository) if with_chaos else HANDLERS
            settings = chaos.SETTINGS if with_chaos else Settings()
            gates = chaos.gates(repository) if with_chaos else ()
            recorder = Recorder(engine, repository, subscription_ids, gates=gates)
            cleanup.callback(recorder.stop)
            processes = Workers(server_url, workers, handlers, settings)
            cleanup.callback(processes.stop)
            cleanup.enter_context(_uninterrupted_cleanup())

            killer = chaos.Killer(engine, processes, recorder) if with_chaos else None
            started = time.monotonic()
            processes.start()
            recorder.start()
            with display.progressing():
                _watch(engine, recorder, processes, killer, display)
            seconds = time.monotonic() - started
            processes.stop()
            display.say("all is done; comparing it with git log --numstat, read another way")
            checks = verdict(engine, repository)
            figures = _figures(recorder, seconds)
            if with_chaos:
                figures |= _chaos_figures(engine, processes)
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
    recorder: Recorder,
    workers: Workers,
    killer: chaos.Killer | None,
    display: Display,
) -> None:
    """Look on until all is recorded and nothing is left to do; in between, kill."""
    show_at = 0.0
    while True:
        if killer is not None:
            killer.step()
        workers.check()
        if time.monotonic() >= show_at:
            # Asked before the work is counted: what it recorded last is in the counts then.
            is_recorded = not recorder.is_alive()
            if recorder.error is not None:
                raise recorder.error
            counted_from = time.monotonic()
            progress = _progress(engine, recorder, workers)
            display.show(progress)
            harm_done = killer is None or killer.is_done
            if is_recorded and harm_done and not (progress.ready or progress.reserved):
                return
            # Counting must stay a small part of the work, however much there is to count.
            took = time.monotonic() - counted_from
            show_at = time.monotonic() + max(_SHOW_SECONDS, 10 * took)
        time.sleep(_TICK_SECONDS)


def _progress(engine: Engine, recorder: Recorder, workers: Workers) -> Progress:
    recorded = recorder.recorded
    # Before the lag, or what is recorded in between would make `done` less than nothing.
    messages = recorded.changes * len(HANDLERS)
    with engine.begin() as connection:
        metrics = Checkpoints(connection).get_metrics()
    return Progress(
        commits=recorded.commits,
        all_commits=recorder.repository.commits,
        messages=messages,
        done=max(0, messages - sum(each.lag for each in metrics)),
        ready=sum(each.ready for each in metrics),
        reserved=sum(each.reserved for each in metrics),
        retrying=sum(each.retry for each in metrics),
        failed=sum(each.failed for each in metrics),
        killed=workers.killed,
    )


def _figures(recorder: Recorder, seconds: float) -> dict[str, str]:
    repository, recorded = recorder.repository, recorder.recorded
    if recorded.commits != repository.commits:
        raise DemoError(
            f"git log gave {recorded.commits:,} commits where git rev-list counted "
            f"{repository.commits:,}"
        )
    messages = recorded.changes * len(HANDLERS)
    return {
        "commits": f"{recorded.commits:,}" + (" (shallow clone)" if repository.shallow else ""),
        "merges, without changes of their own": f"{recorded.merges:,}",
        "empty commits": f"{recorded.empty:,}",
        "changes recorded": f"{recorded.changes:,}",
        "changes of binary files": f"{recorded.binaries:,}",
        "streams (paths)": f"{recorded.streams:,}",
        f"messages applied by {len(HANDLERS)} subscriptions": f"{messages:,}",
        "time": f"{seconds:,.1f} s, {messages / seconds:,.0f} messages/s",
    }


def _chaos_figures(engine: Engine, workers: Workers) -> dict[str, str]:
    statement = select(incidents.c.kind, func.sum(incidents.c.count)).group_by(incidents.c.kind)
    with engine.connect() as connection:
        counts = {kind: int(count) for kind, count in connection.execute(statement)}
    return {
        "workers killed": f"{workers.killed:,}",
        "workers frozen for a while": f"{workers.frozen:,}",
        "reservations recovered": f"{counts.get('recovered', 0):,}",
        "reservations lost, and rolled back": f"{counts.get('lost', 0):,}",
        "errors retried": f"{counts.get('error', 0):,}",
    }
