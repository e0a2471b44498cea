"""A database with messages, the subscription that follows them, and what must come of it."""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from sqlalchemy import Connection, Engine, func, insert, or_, select, text

from checkpoints import CheckpointRecord, CheckpointStatus
from checkpoints.executing import Checkpoints
from checkpoints.tables import checkpoints, checkpoints_ready, checkpoints_reserved
from tests.faults.handling import SHARED_ROWS, shared_row_of
from tests.faults.tables import messages, metadata, shared, totals
from tests.faults.waiting import eventually
from tests.support.factories import add_subscription, violations

__all__ = ["World"]


class World:
    """Messages, appended and recorded; checkpoints; and the check that all was applied once."""

    def __init__(self, engine: Engine, seed: int = 0) -> None:
        self.engine = engine
        self.random = random.Random(seed)
        self.check_workers: Callable[[], None] = lambda: None
        self._versions: Counter[str] = Counter()
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE SCHEMA faults")
            metadata.create_all(connection)
            connection.execute(
                insert(shared), [{"key": key, "messages": 0} for key in range(SHARED_ROWS)]
            )
            self.subscription_id = add_subscription(connection)

    def append(
        self,
        streams: Iterable[str],
        *,
        type: str = "plain",
        times: int = 0,
        record: bool = True,
        connection: Connection | None = None,
    ) -> None:
        """Append a message to each of the streams (those named twice get two), and record them."""
        if connection is None:
            with self.engine.begin() as own:
                self.append(streams, type=type, times=times, record=record, connection=own)
            return
        rows: list[dict[str, Any]] = []
        for stream in streams:
            self._versions[stream] += 1
            rows.append(
                {
                    "stream_name": stream,
                    "stream_position": self._versions[stream],
                    "type": type,
                    "times": times,
                    "amount": self.random.randrange(1_000),
                }
            )
        connection.execute(insert(messages), rows)
        if record:
            Checkpoints(connection).record_checkpoints(
                [
                    CheckpointRecord(self.subscription_id, stream, self._versions[stream])
                    for stream in {row["stream_name"] for row in rows}
                ]
            )

    def append_some(self, streams: Sequence[str], count: int, **how: Any) -> None:
        """Append so many messages to streams by chance."""
        self.append(self.random.choices(streams, k=count), **how)

    # --- what came of it

    def unfinished(self) -> list[Any]:
        """The checkpoints that are due, planned or reserved."""
        self.check_workers()
        with self.engine.connect() as connection:
            return list(
                connection.execute(
                    select(
                        checkpoints.c.stream_name,
                        checkpoints.c.status,
                        checkpoints.c.retry_attempts,
                        checkpoints.c.process_at,
                        checkpoints.c.reserved_until,
                    ).where(
                        or_(
                            checkpoints.c.process_at.is_not(None),
                            checkpoints.c.reserved_until.is_not(None),
                        )
                    )
                )
            )

    def position(self, stream: str) -> int:
        """How far a stream is processed."""
        return int(self.column(stream, "stream_position"))

    def applied(self) -> int:
        """How many messages are in the projection."""
        with self.engine.connect() as connection:
            count = connection.execute(select(func.sum(totals.c.messages))).scalar_one()
        return int(count or 0)

    def column(self, stream: str, name: str) -> Any:
        """A column of the checkpoint of a stream."""
        with self.engine.connect() as connection:
            return connection.execute(
                select(checkpoints.c[name]).where(
                    checkpoints.c.subscription_id == self.subscription_id,
                    checkpoints.c.stream_name == stream,
                )
            ).scalar_one()

    def reserved(self) -> int:
        """How many checkpoints are reserved."""
        with self.engine.connect() as connection:
            return connection.execute(
                select(func.count()).select_from(checkpoints_reserved)
            ).scalar_one()

    def in_transaction(self, name: str) -> bool:
        """Whether a handler of the worker stands in an open transaction."""
        return bool(self.sessions("application_name = :name AND state LIKE 'idle in%'", name=name))

    def await_in_transaction(self, name: str, streams: Sequence[str]) -> None:
        """Wait until a handler of the worker is at work; when all is done, give more to do."""

        def is_at_work() -> bool:
            if not self.unfinished():
                self.append_some(streams, 40)
            return self.in_transaction(name)

        eventually(is_at_work, f"a handler of {name} is at work", 60)

    def sessions(self, condition: str, **values: Any) -> list[int]:
        """The process ids of the database's sessions that meet a condition."""
        found = text(
            "SELECT pid FROM pg_stat_activity WHERE datname = current_database() AND " + condition
        )
        with self.engine.connect() as connection:
            return list(connection.execute(found, values).scalars())

    def terminate_sessions(self, pids: Iterable[int]) -> int:
        """End sessions of the database; how many were there to be ended."""
        ended = text("SELECT pg_terminate_backend(pid) FROM unnest(CAST(:pids AS int[])) AS pid")
        with self.engine.connect() as connection:
            return sum(connection.execute(ended, {"pids": list(pids)}).scalars())

    def await_finished(self, seconds: float) -> float:
        """Wait until no work is left; how many seconds that took."""
        return eventually(
            lambda: not self.unfinished(),
            lambda: f"no work left; there is {self.unfinished()[:5]}",
            seconds,
        )

    def check(self, failed: Iterable[str] = ()) -> None:
        """All was applied once, in order, but for the streams that failed at their first one."""
        given_up = set(failed)
        with self.engine.connect() as connection:
            assert violations(connection) == []
            for table in (checkpoints_ready, checkpoints_reserved):
                assert connection.execute(select(func.count()).select_from(table)).scalar() == 0
            found = connection.execute(
                select(checkpoints.c.stream_name).where(
                    checkpoints.c.status == CheckpointStatus.FAILED
                )
            ).scalars()
            assert set(found) == given_up
            lagging = connection.execute(
                select(checkpoints.c.stream_name).where(
                    checkpoints.c.subscription_id == self.subscription_id,
                    checkpoints.c.stream_version > checkpoints.c.stream_position,
                )
            ).scalars()
            assert set(lagging) == given_up
            applied = {
                stream: tuple(total)
                for stream, *total in connection.execute(
                    select(totals.c.stream_name, totals.c.messages, totals.c.amount, totals.c.chain)
                )
            }
            assert applied == _expected(connection, given_up)

    def check_shared(self) -> None:
        """The rows that many streams touch."""
        with self.engine.connect() as connection:
            counts = dict(connection.execute(select(shared.c.key, shared.c.messages)).all())
            streams = connection.execute(select(messages.c.stream_name)).scalars()
            expected = Counter(map(shared_row_of, streams))
        assert counts == {key: expected[key] for key in range(SHARED_ROWS)}


def _expected(connection: Connection, given_up: set[str]) -> dict[str, tuple[int, int, str]]:
    """The projection, computed another way: from all messages at once, in Python."""
    by_stream: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for stream, position, amount in connection.execute(
        select(messages.c.stream_name, messages.c.stream_position, messages.c.amount)
    ):
        by_stream[stream].append((position, amount))
    expected = {}
    for stream, found in by_stream.items():
        chain = ""
        for number, (position, _) in enumerate(sorted(found), 1):
            assert number == position
            # As PostgreSQL's md5().
            chain = hashlib.md5(f"{chain}{position}".encode(), usedforsecurity=False).hexdigest()
        expected[stream] = (len(found), sum(amount for _, amount in found), chain)
    return {stream: total for stream, total in expected.items() if stream not in given_up}
