"""Everything at once: no snapshot breaks the rule, and every message is processed exactly once."""

from __future__ import annotations

import random
import threading
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import pairwise
from typing import Any, TypeAlias

import pytest
from sqlalchemy import Connection, Engine, text
from sqlalchemy.exc import DBAPIError

from checkpoints import (
    CheckpointRecord,
    Checkpoints,
    CheckpointStatus,
    Reservation,
    ReservationLost,
    SubscriptionStatus,
)
from tests.concurrency.stage import ISOLATION_LEVELS, READ_COMMITTED, sqlstate
from tests.rule.invariants import broken
from tests.support.factories import GROUP, LONG_AGO, MINUTE, add_subscription, violations

THREADS = 8
ROUNDS = 220
STREAMS = 30
AT_ONCE = timedelta(microseconds=1)

# The ledger: each move of a position is noted by the database, in the transaction that makes it;
# each consumer notes what it processed.
LEDGER = """
CREATE TABLE moves (
  checkpoint_id bigint, from_position bigint, to_position bigint, transaction xid8,
  number bigint GENERATED ALWAYS AS IDENTITY
);
CREATE TABLE projection (
  checkpoint_id bigint, from_position bigint, to_position bigint, transaction xid8
);
CREATE TABLE falls (checkpoint_id bigint, what text);
CREATE FUNCTION note_move() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.stream_position <> OLD.stream_position THEN
    INSERT INTO moves VALUES (
      NEW.id, OLD.stream_position, NEW.stream_position, pg_current_xact_id()
    );
  END IF;
  IF NEW.stream_position < OLD.stream_position THEN
    INSERT INTO falls VALUES (NEW.id, 'position');
  END IF;
  IF NEW.stream_version < OLD.stream_version THEN
    INSERT INTO falls VALUES (NEW.id, 'version');
  END IF;
  RETURN NULL;
END $$;
CREATE TRIGGER note_move AFTER UPDATE ON checkpoints.checkpoints
FOR EACH ROW EXECUTE FUNCTION note_move();
"""

Step: TypeAlias = Callable[["Actor"], None]


class Actor:
    """A thread: it does a random thing, commits, and does the next."""

    def __init__(self, engine: Engine, seed: int, subscriptions: list[int], level: str) -> None:
        self.random = random.Random(seed)
        self.engine = engine.execution_options(isolation_level=level)
        self.subscriptions = subscriptions
        self.states: Counter[str] = Counter()
        self.done: Counter[str] = Counter()
        self.zombies: list[Reservation] = []

    def live(self) -> None:
        steps: list[tuple[Step, int]] = [
            (Actor.record, 4),
            (Actor.consume, 10),
            (Actor.come_back, 2),
            (Actor.recover, 3),
            (Actor.skip, 1),
            (Actor.schedule, 2),
            (Actor.advance, 1),
            (Actor.release, 1),
            (Actor.ensure, 1),
            (Actor.repair, 1),
            (Actor.pause, 1),
            (Actor.plain, 4),
        ]
        for step in self.random.choices(*zip(*steps, strict=True), k=ROUNDS):
            self.attempt(step)

    def attempt(self, step: Step) -> None:
        """Do it; again if it was a serialization failure, a few times."""
        for _ in range(5):
            try:
                step(self)
            except ReservationLost:
                self.done["lost"] += 1
                return
            except DBAPIError as error:
                self.states[sqlstate(error)] += 1
                continue
            self.done[step.__name__] += 1
            return

    def some_streams(self) -> list[tuple[int, str]]:
        """Keys of some checkpoints, in no order."""
        return [
            (self.random.choice(self.subscriptions), f"account-{self.random.randrange(STREAMS)}")
            for _ in range(self.random.randint(1, 12))
        ]

    def some_ids(self, connection: Connection) -> list[int]:
        ids = list(connection.execute(text("SELECT id FROM checkpoints.checkpoints")).scalars())
        self.random.shuffle(ids)
        return ids[: self.random.randint(1, 8)]

    # The recorder

    def record(self) -> None:
        with self.engine.begin() as connection:
            Checkpoints(connection).record_checkpoints(
                [CheckpointRecord(*key, self.random.randint(1, 40)) for key in self.some_streams()]
            )

    def advance(self) -> None:
        with self.engine.begin() as connection:
            Checkpoints(connection).advance_lagging_subscription_checkpoints(
                self.random.choice(self.subscriptions), limit=3
            )

    def ensure(self) -> None:
        with self.engine.begin() as connection:
            Checkpoints(connection).ensure_checkpoint_exists(*self.some_streams()[0])

    # Consumers

    def consume(self) -> None:
        with self.engine.begin() as connection:
            held = Checkpoints(connection).reserve_next_available_checkpoint(
                GROUP,
                self.random.choice([MINUTE, AT_ONCE]),
                limit=self.random.choice([1, 1, 3]),
            )
        for reservation in held:
            try:
                self.handle(reservation)
            except DBAPIError as error:
                # The process dies; others recover, and it comes back as a zombie.
                self.states[sqlstate(error)] += 1
                self.zombies.append(reservation)

    def come_back(self) -> None:
        if self.zombies:
            self.handle(self.zombies.pop())

    def handle(self, reservation: Reservation) -> None:
        fate = self.random.random()
        if fate < 0.15:
            self.zombies.append(reservation)
            return
        with self.engine.begin() as connection:
            checkpoints = Checkpoints(connection)
            if fate < 0.25:
                checkpoints.release_checkpoint_reservation(reservation)
                return
            if fate < 0.4:
                gives_up = fate < 0.28
                checkpoints.record_checkpoint_error(
                    reservation,
                    reservation.stream_position,
                    status=CheckpointStatus.FAILED if gives_up else CheckpointStatus.RETRY,
                    retry_attempts=reservation.retry_attempts + 1,
                    error="refused",
                    process_at=None if gives_up else LONG_AGO,
                )
                return
            if fate < 0.55:
                reservation = checkpoints.extend_checkpoint_reservation(reservation, MINUTE)
            reached = self.random.randint(reservation.stream_position, reservation.stream_version)
            connection.execute(
                text("INSERT INTO projection VALUES (:id, :from, :to, pg_current_xact_id())"),
                {"id": reservation.id, "from": reservation.stream_position, "to": reached},
            )
            checkpoints.update_checkpoint_position(reservation, reached)
        self.done["processed"] += reached > reservation.stream_position

    def recover(self) -> None:
        with self.engine.begin() as connection:
            Checkpoints(connection).recover_expired_checkpoint_reservations(GROUP, limit=5)

    # Operators

    def skip(self) -> None:
        with self.engine.begin() as connection:
            Checkpoints(connection).skip_checkpoints(self.some_ids(connection))

    def schedule(self) -> None:
        with self.engine.begin() as connection:
            Checkpoints(connection).schedule_checkpoints(self.some_ids(connection), LONG_AGO)

    def release(self) -> None:
        with self.engine.begin() as connection:
            for id in self.some_ids(connection)[:1]:
                Checkpoints(connection).release_checkpoint_reservation(id)

    def repair(self) -> None:
        with self.engine.begin() as connection:
            self.done["repaired"] += len(Checkpoints(connection).repair_checkpoints())

    def pause(self) -> None:
        for status in (SubscriptionStatus.PAUSED, SubscriptionStatus.ACTIVE):
            with self.engine.begin() as connection:
                Checkpoints(connection).set_subscription_status(self.subscriptions[0], status)

    # psql, one row a transaction: several would have to be locked in the common order

    PLAIN = (
        "UPDATE checkpoints.checkpoints SET status = 'active' WHERE id = :id",
        "UPDATE checkpoints.checkpoints SET status = 'failed' WHERE id = :id",
        "UPDATE checkpoints.checkpoints SET status = 'retry', process_at = NULL WHERE id = :id",
        "UPDATE checkpoints.checkpoints SET reserved_until = NULL, process_at = NULL"
        " WHERE id = :id",
        "UPDATE checkpoints.checkpoints SET reserved_until = now() - interval '1 s' WHERE id = :id",
        "UPDATE checkpoints.checkpoints SET process_at = now() + interval '1 h' WHERE id = :id",
        "UPDATE checkpoints.checkpoints SET process_at = process_at - interval '1 h'"
        " WHERE id = :id",
        "UPDATE checkpoints.checkpoints SET stream_version = stream_version + 1 WHERE id = :id",
        "UPDATE checkpoints.checkpoints SET stream_position = stream_version"
        " WHERE id = :id AND lagging AND reserved_until IS NULL",
        "DELETE FROM checkpoints.checkpoints WHERE id = :id AND NOT lagging",
    )

    def plain(self) -> None:
        with self.engine.begin() as connection:
            for id in self.some_ids(connection)[:1]:
                connection.execute(text(self.random.choice(self.PLAIN)), {"id": id})


class Checker:
    """Reads the rule in one snapshot after another."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.snapshots = 0
        self.found: list[Any] = []
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._read)

    def __enter__(self) -> Checker:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self._thread.join()

    def _read(self) -> None:
        with self.engine.connect().execution_options(
            isolation_level="REPEATABLE READ"
        ) as connection:
            while not self._stopping.is_set():
                self.found += violations(connection)
                self.found += broken(connection)
                connection.rollback()
                self.snapshots += 1


@pytest.mark.parametrize("level", ISOLATION_LEVELS)
def test_everything_at_once(engine: Engine, level: str) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    with engine.begin() as connection:
        connection.exec_driver_sql(LEDGER)
        subscriptions = [add_subscription(connection, name) for name in ("balances", "mails")]
    actors = [Actor(engine, seed + number, subscriptions, level) for number in range(THREADS)]

    with Checker(engine) as checker, ThreadPoolExecutor(THREADS) as threads:
        for _ in threads.map(Actor.live, actors):
            pass

    done = sum((actor.done for actor in actors), Counter[str]())
    states = sum((actor.states for actor in actors), Counter[str]())
    print(f"{done} {states} snapshots {checker.snapshots}")
    assert checker.found == []
    assert checker.snapshots > 20
    assert set(states) <= (set() if level == READ_COMMITTED else {"40001"})
    assert done["repaired"] == 0
    assert done["processed"] > 50
    assert done["lost"] > 5
    with engine.begin() as connection:
        assert violations(connection) == []
        assert broken(connection) == []
        _check_ledger(connection)


def _check_ledger(connection: Connection) -> None:
    """Positions move on from where they stand, and consumers moved what they say they did."""
    assert connection.execute(text("SELECT * FROM falls")).all() == []
    projected: dict[tuple[int, int, int, str], int] = Counter(
        tuple(row)
        for row in connection.execute(
            text(
                "SELECT checkpoint_id, from_position, to_position, transaction::text"
                " FROM projection WHERE from_position < to_position"
            )
        )
    )
    moved = defaultdict(list)
    for row in connection.execute(
        text(
            "SELECT checkpoint_id, from_position, to_position, transaction::text"
            " FROM moves ORDER BY checkpoint_id, from_position, number"
        )
    ):
        id, start, end, _ = row
        moved[id].append((start, end))
        projected.pop(tuple(row), None)
    # Each interval that a handler processed is one move, of the same transaction: so what is
    # left of the moves is what was skipped or advanced.
    assert projected == {}, {id: moved[id] for id, *_ in projected}
    for intervals in moved.values():
        assert intervals[0][0] == 0
        for (_, end), (start, _) in pairwise(intervals):
            assert end == start
    for id, position in connection.execute(
        text("SELECT id, stream_position FROM checkpoints.checkpoints")
    ):
        assert position == (moved[id][-1][1] if moved[id] else 0)
