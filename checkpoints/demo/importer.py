"""The importer, the application of the demonstration: appends a message for each change."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Collection, Generator
from contextlib import closing
from dataclasses import dataclass

from sqlalchemy import Engine

from checkpoints.demo.history import Commit, Repository, read_commits
from checkpoints.demo.tables import copy_rows, messages

__all__ = ["Imported", "Importer"]

# Changes in a transaction: few enough for the workers to begin at once, enough to cost little.
_BATCH = 2000
_COLUMNS = [
    messages.c[name]
    for name in ("stream_name", "version", "type", "commit", "author", "added", "deleted")
]


@dataclass
class Imported:
    """What was read so far."""

    commits: int = 0
    merges: int = 0
    empty: int = 0
    changes: int = 0
    binaries: int = 0
    streams: int = 0


class Importer:
    """Reads the commits in order; at each of the numbers in `gates` it waits for `go_on()`."""

    def __init__(
        self, engine: Engine, repository: Repository, *, gates: Collection[int] = ()
    ) -> None:
        self.repository = repository
        self.imported = Imported()
        self.waits = False
        self._engine = engine
        self._gates = gates
        self._opened = threading.Event()
        self._stopped = False
        # One number per path: what grows with the history is in the database alone.
        self._versions: defaultdict[str, int] = defaultdict(int)

    def run(self) -> None:
        """Read to the end, or until stopped."""
        with closing(self._batches()) as batches:
            for batch in batches:
                self._append(batch)
                if self.imported.commits in self._gates and not self._stopped:
                    self.waits = True
                    self._opened.wait()
                    self._opened.clear()
                if self._stopped:
                    return

    def go_on(self) -> None:
        """Open the gate at which it waits."""
        self.waits = False
        self._opened.set()

    def stop(self) -> None:
        """Let `run()` end after the batch at hand."""
        self._stopped = True
        self._opened.set()

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

    def _append(self, batch: list[Commit]) -> None:
        rows = []
        for commit in batch:
            for change in commit.changes:
                self._versions[change.path] += 1
                rows.append(
                    (
                        change.path,
                        self._versions[change.path],
                        "binary" if change.binary else "text",
                        commit.id,
                        commit.author,
                        change.added,
                        change.deleted,
                    )
                )
        if rows:
            with self._engine.begin() as connection:
                copy_rows(connection, messages, _COLUMNS, rows)
        self._count(batch)

    def _count(self, batch: list[Commit]) -> None:
        imported = self.imported
        for commit in batch:
            imported.commits += 1
            imported.changes += len(commit.changes)
            imported.binaries += sum(change.binary for change in commit.changes)
            imported.merges += commit.parents > 1
            # git gives a merge no changes of its own, so that says nothing about it.
            imported.empty += commit.parents <= 1 and not commit.changes
        imported.streams = len(self._versions)
