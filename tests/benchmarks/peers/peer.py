"""What a peer does for the benchmark."""

from __future__ import annotations

from typing import Literal, Protocol, Self

__all__ = ["Kind", "NotAllDone", "Peer", "PeerError"]

Kind = Literal["work", "foreign", "paused"]


class PeerError(Exception):
    """A peer could not be installed, started or worked with; says what it said."""


class NotAllDone(PeerError):
    """A drain ended before all items were done; the rate of those that were is still a figure.

    Attributes:
        done: How many items the database says were done.
        count: How many were to be done.
        seconds: From the first start of work until the drain was given up.
    """

    def __init__(self, name: str, done: int, count: int, seconds: float, why: str) -> None:
        super().__init__(f"{name}: {done} of {count} items done after {seconds:.1f} s: {why}")
        self.done = done
        self.count = count
        self.seconds = seconds


class Peer(Protocol):
    """A queue to compare with; a database that it was prepared in is its own.

    Every `url` is SQLAlchemy's or libpq's form of one, as a string.
    """

    @property
    def name(self) -> str:
        """Its name and driver, as the report shows it."""

    def version(self) -> str:
        """The installed version; only where nothing is `missing`."""

    def missing(self) -> str | None:
        """Why it cannot run on this machine, or None if it can."""

    def limited(self, seconds: float) -> Self:
        """The same peer, whose drains are given up after these seconds."""

    def prepare(self, url: str) -> None:
        """Install its schema in a fresh database, by its own tool."""

    def add(self, url: str, count: int, kind: Kind) -> None:
        """Add items in bulk, then ANALYZE.

        "work" is drained; "foreign" are items of another queue that nobody drains; "paused" are
        what comes nearest to the items of a paused subscription, as the peer's docstring says.
        """

    def drain(self, url: str, count: int, processes: int, batch: int) -> float:
        """Work off the `count` items that wait, and return the seconds it took.

        They run from the first start of work, the processes being up and connected, to the last
        item being done in the database. `batch` is for peers that have such a setting.

        Raises:
            NotAllDone: The database says otherwise at the end, or it took too long.
            PeerError: Other than `count` items wait, or a process failed.
        """

    def one_at_a_time(self, url: str, seconds: float, processes: int) -> float:
        """Items/s with one item at a time in each process: no concurrency, no batches.

        It takes from the items that `add` put there, for `seconds` after a second to warm up.

        Raises:
            PeerError: No item waits, too few for so long, or a process failed.
        """
