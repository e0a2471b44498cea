"""Chaos: workers are killed and frozen at random, and messages fail at first."""

from __future__ import annotations

import hashlib
import random
import time
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import Connection, Engine, column, exists, func, select, table

from checkpoints import Checkpoints, Reservation
from checkpoints.demo.history import Repository
from checkpoints.demo.importer import Importer
from checkpoints.demo.projection import HANDLERS, Message, read_messages
from checkpoints.demo.recorder import Recording
from checkpoints.demo.worker import Settings
from checkpoints.demo.workers import Workers
from checkpoints.runtime import Handler
from checkpoints.tables import checkpoints_ready, checkpoints_reserved

__all__ = ["SETTINGS", "Killer", "Misfortune", "Unlucky", "gates", "unlucky_handlers"]

# What a killed worker held is free again soon, and counts as an attempt.
SETTINGS = Settings(reservation_timeout=timedelta(seconds=1.5), max_attempts=1000)

_KILLS = 3
_FROZEN_PER_KILL = 0.25
# Longer than a reservation, and the time until somebody recovers it.
_FROZEN_SECONDS = 3.0
_SECONDS_BETWEEN_KILLS = (3.0, 8.0)
_SECONDS_TO_FIND_ONE_AT_WORK = 5.0


class Misfortune(Exception):
    """What an unlucky message raises."""


@dataclass(frozen=True)
class Unlucky:
    """A handler that fails for some messages, once or twice.

    Which ones depends on the message alone, so that the result of a run is always the same. It
    fails after it wrote, so that a rollback that did not happen would show.
    """

    handler: Handler
    one_in: int
    head: str
    """The messages of this commit fail in any case: a short history has bad luck too."""
    pause: float
    """Seconds that a call takes longer, to have somebody to kill in a short history."""

    def __call__(self, connection: Connection, reservation: Reservation) -> int | None:
        """Apply the messages, and raise if one of them is still out of luck."""
        position = self.handler(connection, reservation)
        time.sleep(self.pause)
        for message in read_messages(connection, reservation):
            failures = self.failures(reservation, message)
            if failures and _failed(connection, reservation) < failures:
                raise Misfortune(
                    f"message {message.version} of {reservation.stream_name!r} fails "
                    f"{failures} times"
                )
        return position

    def failures(self, reservation: Reservation, message: Message) -> int:
        """How many attempts fail: none, one or two."""
        key = f"{reservation.subscription_name}\0{reservation.stream_name}\0{message.version}"
        lot = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8])
        if lot % self.one_in and message.commit != self.head:
            return 0
        return 1 + lot // self.one_in % 2


def _failed(connection: Connection, reservation: Reservation) -> int:
    """How many attempts have failed with misfortune; the others ended with their worker."""
    checkpoint = Checkpoints(connection).get_checkpoint(reservation.id)
    errors = checkpoint.retries if checkpoint else None
    return sum(Misfortune.__name__ in str(error) for error in errors or ())


def unlucky_handlers(repository: Repository) -> dict[str, Handler]:
    """The handlers, with one in 20 messages failing and all pauses together some seconds."""
    pause = min(0.05, 2 / repository.commits)
    return {
        name: Unlucky(handler, 20, repository.head, pause) for name, handler in HANDLERS.items()
    }


def gates(repository: Repository) -> set[int]:
    """After which commits the importer waits for somebody to be killed, for a run may be short."""
    return {-(-repository.commits * part // (_KILLS + 1)) for part in range(1, _KILLS + 1)}


class Killer:
    """Kills a worker every few seconds, and whenever the importer waits for it.

    Then another recorder goes on, too. Now and then it freezes a worker until its reservations are
    another's, and lets it go on: what it then writes must be rolled back.
    """

    def __init__(
        self, engine: Engine, workers: Workers, importer: Importer, recording: Recording
    ) -> None:
        self._engine = engine
        self._workers = workers
        self._importer = importer
        self._recording = recording
        self._random = random.Random()  # noqa: S311  # nothing secret about it
        self._next = self._some_time_later()
        self._frozen: str | None = None
        self._thaw_at = 0.0

    @property
    def is_done(self) -> bool:
        """Whether nobody is frozen."""
        return self._frozen is None

    def step(self) -> None:
        """Do harm if it is time to."""
        if self._frozen is not None and time.monotonic() >= self._thaw_at:
            self._workers.thaw(self._frozen)
            self._frozen = None
        if self._importer.waits and self._recording.has_all(self._importer):
            self._kill()
            if not self._workers.frozen:
                self._freeze()
            self._recording.restart()
            self._importer.go_on()
        elif time.monotonic() >= self._next:
            self._kill()
            if self._random.random() < _FROZEN_PER_KILL:
                self._freeze()

    def _kill(self) -> None:
        alive = [name for name in self._workers.names if name != self._frozen]
        self._workers.kill(self._random.choice(self._at_work() or alive))
        self._next = self._some_time_later()

    def _freeze(self) -> None:
        # Somebody must be left to take over.
        if self._frozen is None and len(self._workers.names) > 1 and (found := self._at_work()):
            self._frozen = self._random.choice(found)
            self._thaw_at = time.monotonic() + _FROZEN_SECONDS
            self._workers.freeze(self._frozen)

    def _at_work(self) -> list[str]:
        """Who has written something and not committed yet."""
        candidates = {name for name in self._workers.names if name != self._frozen}
        deadline = time.monotonic() + _SECONDS_TO_FIND_ONE_AT_WORK
        while candidates and time.monotonic() < deadline:
            with self._engine.connect() as connection:
                busy = connection.execute(_busy).scalars().all()
                has_work = connection.execute(_has_work).scalar_one()
            if found := [name for name in busy if name in candidates]:
                return found
            if not has_work:
                break
            time.sleep(0.005)
        return []

    def _some_time_later(self) -> float:
        return time.monotonic() + self._random.uniform(*_SECONDS_BETWEEN_KILLS)


# With the id of a transaction, which it has from its first write on.
_sessions = table(
    "pg_stat_activity", column("application_name"), column("backend_xid"), column("datname")
)
_busy = select(_sessions.c.application_name).where(
    _sessions.c.datname == func.current_database(), _sessions.c.backend_xid.is_not(None)
)
_has_work = select(
    exists(select(checkpoints_ready.c.id)) | exists(select(checkpoints_reserved.c.id))
)
