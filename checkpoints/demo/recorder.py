"""The recorder: reads the commits in order, stores messages and raises the checkpoints."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine

from checkpoints import CheckpointRecord, Checkpoints
from checkpoints.demo.history import Commit, Repository, read_commits
from checkpoints.demo.tables import copy_rows, messages

__all__ = ["Recorded", "Recorder"]

# Changes in a transaction: few enough for the workers to begin at once, enough to cost little.
_BATCH = 2000


@dataclass
class Recorded:
    """What was read so far."""

    commits: int = 0
    merges: int = 0
    empty: int = 0
    changes: int = 0
    binaries: int = 0
    streams: int = 0


class Recorder(threading.Thread):
    """Records the history in the background; `error` is what ended it early.

    At each of the numbers of commits in `gates` it waits for `go_on()`.
    """

    def __init__(
        self,
        engine: Engine,
        repository: Repository,
        subscription_ids: Sequence[int],
        *,
        gates: Collection[int] = (),
    ) -> None:
        super().__init__(name="recorder", daemon=True)
        self.recorded = Recorded()
        self.waits = False
        self.error: Exception | None = None
        self._engine = engine
        self.repository = repository
        self._subscription_ids = subscription_ids
        self._gates = gates
        self._opened = threading.Event()
        self._stopped = False
        # One number per path: what grows with the history is in the database alone.
        self._versions: defaultdict[str, int] = defaultdict(int)

    def run(self) -> None:
        """Read to the end, or until stopped."""
        try:
            with closing(self._batches()) as batches:
                for batch in batches:
                    self._record(batch)
                    if self.recorded.commits in self._gates and not self._stopped:
                        self.waits = True
                        self._opened.wait()
                        self._opened.clear()
                    if self._stopped:
                        return
        except Exception as error:
            self.error = error

    def go_on(self) -> None:
        """Open the gate at which it waits."""
        self.waits = False
        self._opened.set()

    def stop(self) -> None:
        """End after the batch at hand, and wait for that."""
        self._stopped = True
        self._opened.set()
        if self.ident is not None:
            self.join()

    def _batches(self) -> Generator[list[Commit]]:
        batch: list[Commit] = []
        size = 0
        with closing(read_commits(self.repository)) as commits:
            for number, commit in enumerate(commits, 1):
                batch.append(commit)
                size += len(commit.changes) or 1
                if size >= _BATCH or number in self._gates:
                    yield batch
                    batch, size = [], 0
        if batch:
            yield batch

    def _record(self, batch: list[Commit]) -> None:
        """Store the messages and raise the versions of both subscriptions: one transaction."""
        touched: dict[str, int] = {}
        rows: list[tuple[Any, ...]] = []
        for commit in batch:
            for change in commit.changes:
                self._versions[change.path] += 1
                version = touched[change.path] = self._versions[change.path]
                rows.append(
                    (
                        change.path,
                        version,
                        commit.id,
                        commit.author,
                        change.added,
                        change.deleted,
                        change.binary,
                    )
                )
        if rows:
            with self._engine.begin() as connection:
                copy_rows(connection, messages, rows)
                Checkpoints(connection).record_checkpoints(
                    [
                        CheckpointRecord(subscription_id, stream_name, version)
                        for subscription_id in self._subscription_ids
                        for stream_name, version in touched.items()
                    ]
                )
        self._count(batch)

    def _count(self, batch: list[Commit]) -> None:
        recorded = self.recorded
        for commit in batch:
            recorded.commits += 1
            recorded.changes += len(commit.changes)
            recorded.binaries += sum(change.binary for change in commit.changes)
            recorded.merges += commit.parents > 1
            # git gives a merge no changes of its own, so that says nothing about it.
            recorded.empty += commit.parents <= 1 and not commit.changes
        recorded.streams = len(self._versions)
