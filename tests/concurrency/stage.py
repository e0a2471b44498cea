"""Actors with a connection and a thread each, and an observer that sees who waits for a lock."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from sqlalchemy import Connection, Engine, Executable
from sqlalchemy.exc import DBAPIError

from tests.support.factories import add_subscription

READ_COMMITTED = "READ COMMITTED"
REPEATABLE_READ = "REPEATABLE READ"
SERIALIZABLE = "SERIALIZABLE"
ISOLATION_LEVELS = (READ_COMMITTED, REPEATABLE_READ, SERIALIZABLE)


@dataclass(frozen=True)
class Outcome:
    """What a statement answered, or the SQLSTATE that it ended with."""

    rows: Sequence[tuple[Any, ...]] = ()
    sqlstate: str | None = None


def sqlstate(error: DBAPIError) -> str:
    """The SQLSTATE of a database's error."""
    state: str = getattr(error.orig, "sqlstate", None) or repr(error.orig)
    return state


class Actor:
    """A connection whose statements run in a thread of its own."""

    def __init__(self, engine: Engine) -> None:
        self.connection: Connection = engine.connect()
        self._thread = ThreadPoolExecutor(1)
        self._running: Future[Outcome] | None = None
        self.isolate(READ_COMMITTED)
        self.pid = self.run(_backend_pid)
        self.rollback()

    def isolate(self, level: str) -> None:
        """Give the transactions to come an isolation level."""
        self.connection.exec_driver_sql(
            f"SET SESSION CHARACTERISTICS AS TRANSACTION ISOLATION LEVEL {level}"
        )
        self.connection.commit()

    def start(self, statement: Executable, *, commit: bool = False) -> Future[Outcome]:
        """Begin to execute; the transaction stays open, unless it is to commit."""
        self._running = self._thread.submit(self.execute, statement, commit=commit)
        return self._running

    def execute(self, statement: Executable, *, commit: bool = False) -> Outcome:
        """Execute, here and now; the transaction stays open unless it failed or is to commit.

        A statement that returns no rows answers an empty one for each that it changed.
        """
        try:
            result = self.connection.execute(statement)
            rows = [tuple(row) for row in result] if result.returns_rows else []
            outcome = Outcome(rows or [()] * (0 if result.returns_rows else result.rowcount))
            if commit:
                self.connection.commit()
            return outcome
        except DBAPIError as error:
            self.connection.rollback()
            return Outcome(sqlstate=sqlstate(error))

    def run(self, work: Callable[[Connection], Any]) -> Any:
        """Do something with the connection in the thread of the caller."""
        return work(self.connection)

    def commit(self) -> str | None:
        """Commit; the SQLSTATE, should that fail."""
        try:
            self.connection.commit()
        except DBAPIError as error:
            self.connection.rollback()
            return sqlstate(error)
        return None

    def rollback(self) -> None:
        """Roll back."""
        self.connection.rollback()

    def stop(self) -> None:
        """End a statement that a failed test left waiting, and the transaction."""
        if self._running is not None and not self._running.done():
            driver: Any = self.connection.connection.driver_connection
            driver.cancel_safe(timeout=60)
            wait([self._running], timeout=60)
        self.connection.rollback()

    def close(self) -> None:
        """End the thread and the connection."""
        self.stop()
        self._thread.shutdown()
        self.connection.close()


def _backend_pid(connection: Connection) -> int:
    pid: int = connection.exec_driver_sql("SELECT pg_backend_pid()").scalar_one()
    return pid


# Who is not the superuser passes a gate with each row of the main table that a statement looks at:
# while the observer keeps it shut, the statement has its snapshot and has not locked a row yet. The
# role is one that every server has, and that owns nothing.
GATE = """
CREATE FUNCTION public.gate() RETURNS boolean LANGUAGE plpgsql AS $$
BEGIN
  PERFORM pg_advisory_xact_lock_shared(1);
  RETURN true;
END $$;
CREATE POLICY gate ON checkpoints.checkpoints USING (public.gate()) WITH CHECK (true);
ALTER TABLE checkpoints.checkpoints ENABLE ROW LEVEL SECURITY;
GRANT USAGE ON SCHEMA checkpoints, public TO pg_monitor;
GRANT ALL ON ALL TABLES IN SCHEMA checkpoints TO pg_monitor;
"""


class Stage:
    """Actors `a` and `b`, and an `observer` in autocommit."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.a = Actor(engine)
        self.b = Actor(engine)
        self.observer = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        self.subscription = 0

    def __enter__(self) -> Self:
        self.subscription = add_subscription(self.observer)
        self.observer.exec_driver_sql(GATE)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.a.close()
        self.b.close()
        self.observer.close()

    def clear(self) -> None:
        """Leave the subscription, active, and nothing else."""
        self.observer.exec_driver_sql(
            f"DELETE FROM checkpoints.checkpoints;"
            f"DELETE FROM checkpoints.subscriptions WHERE id <> {self.subscription};"
            f"UPDATE checkpoints.subscriptions SET status = 'active' WHERE status <> 'active'"
        )

    def end(self) -> None:
        """End what the actors began, and give them back the usual isolation level."""
        self.open_gate()
        for actor in (self.a, self.b):
            actor.stop()
            actor.isolate(READ_COMMITTED)

    def shut_gate(self, actor: Actor) -> None:
        """Have the actor's next statement stop with its snapshot taken and nothing locked."""
        self.observer.exec_driver_sql("SELECT pg_advisory_lock(1)")
        actor.connection.exec_driver_sql("SET LOCAL ROLE pg_monitor")

    def open_gate(self) -> None:
        """Let it go on."""
        self.observer.exec_driver_sql("SELECT pg_advisory_unlock_all()")

    def waits(self, future: Future[Outcome], actor: Actor) -> bool:
        """Whether the actor's statement waits for a lock; False once it has ended."""
        while not wait([future], timeout=0.001).done:
            # Only who really waits for another's lock is listed: nothing is guessed from time.
            blocked: list[int] = self.observer.exec_driver_sql(
                f"SELECT pg_blocking_pids({actor.pid})"
            ).scalar_one()
            if blocked:
                return True
        return False
