"""A worker: an engine, handlers, a consumer. Begin your own worker with this file.

It may be killed at any moment: what it had not committed is rolled back, its reservations expire,
and another worker takes the checkpoints over.
"""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import URL

from checkpoints.demo.tables import GROUP, demo_engine
from checkpoints.runtime import Consumer, Handler, RetryPolicy

__all__ = ["Settings", "work"]


@dataclass(frozen=True)
class Settings:
    """What chaos sets otherwise."""

    reservation_timeout: timedelta = timedelta(seconds=30)
    max_attempts: int = 5


def work(url: URL, name: str, handlers: Mapping[str, Handler], settings: Settings) -> None:
    """Process checkpoints until SIGTERM; then finish the one at hand, and give back the others."""
    engine = demo_engine(url, pool_size=3, application_name=name)
    consumer = Consumer(
        engine,
        GROUP,
        handlers,
        # There are other processes, and one statement reserves for many short handlers.
        concurrency=1,
        batch=20,
        reservation_timeout=settings.reservation_timeout,
        recover_interval=timedelta(seconds=0.5),
        retry=RetryPolicy(
            settings.max_attempts,
            first_delay=timedelta(seconds=0.1),
            longest_delay=timedelta(seconds=1),
        ),
    )
    threading.Thread(target=_stop_without_parent, args=(consumer,), daemon=True).start()
    consumer.run()
    engine.dispose()


def _stop_without_parent(consumer: Consumer) -> None:
    """The processes of the demonstration end with the one that started them, even if killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None  # noqa: S101  # for the type checker
    parent.join()
    consumer.stop()
