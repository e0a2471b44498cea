"""Reading a message table in an order that never skips a transaction which commits late.

Identity values and sequences are handed out at the INSERT, not at the commit: a reader that has
seen position 6 may still be given 5, by a transaction that commits later, and one that asks for
what is past 6 never sees it. So each message keeps the id of its transaction, and a reader takes
the messages of finished transactions only, ordered by (transaction id, global position):

    CREATE TABLE messages (
        global_position bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
        transaction_id xid8 NOT NULL DEFAULT pg_current_xact_id(),
        stream_name text NOT NULL,
        stream_position bigint NOT NULL CHECK (stream_position > 0),
        type text NOT NULL,
        data jsonb NOT NULL DEFAULT '{}',
        UNIQUE (stream_name, stream_position)
    );

    CREATE INDEX messages_in_order ON messages (transaction_id, global_position);

    CREATE FUNCTION keep_stream_order() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN
      NEW.transaction_id = greatest(pg_current_xact_id(), (
        SELECT before.transaction_id FROM messages AS before
        WHERE before.stream_name = NEW.stream_name
          AND before.stream_position = NEW.stream_position - 1));
      RETURN NEW;
    END $$;

    CREATE TRIGGER keep_stream_order BEFORE INSERT ON messages
    FOR EACH ROW EXECUTE FUNCTION keep_stream_order();

Why it is right. A snapshot names the transactions that are running, and `pg_snapshot_xmin` is the
oldest. Every transaction below it has ended, and every message yet to appear has a `transaction_id`
that is not below it: what is below is final, and a cursor of both numbers passes over nothing.
Neither number will do alone: by the global position alone, even among finished transactions, a
message is skipped when the older transaction took the higher position; by the transaction's id
alone, a batch would have to hold whole transactions.

Why the trigger. A transaction that has written elsewhere has its id already; if it then appends to
a stream after a younger one has committed to it, the younger one's message, which comes first in
the stream, would come second in this order. The trigger gives a message at least the id of the one
before it in its stream, for an index lookup a message. Without it nothing is skipped, and
subscriptions that start at the beginning need no more; those that start later do need it.

What it costs to know:

- A transaction that has written anything in the database holds back the messages of those that
  began after it, until it ends: keep writing transactions short, handlers included, and set
  `idle_in_transaction_session_timeout`. Transactions that only read hold back nothing. Nor, with a
  `MessageTable`, do those of other databases of the cluster, which a plain comparison with
  `pg_snapshot_xmin` waits for.
- Transaction ids belong to a cluster. `pg_upgrade` and physical copies keep them. After a restore
  of a dump, or a move by logical replication, the messages carry ids which the new cluster has yet
  to reach, and reading raises `ForeignTransactionIds`. Before such a move, stop writers and let
  recorders finish. After it, and before anything starts, set `transaction_id` to '1' in all
  messages and delete the checkpoints of the subscription `$recorder`: recorders then begin anew.
  What they record a second time changes nothing, for versions only rise.
- The sequence must not be cached (CACHE 1, the default), for the order in a stream.

A table without such a column. Where appending transactions wait for each other, say by
`SELECT pg_advisory_xact_lock(…)` before the INSERT and until their commit, positions appear in
order, and a plain `global_position > …` is right (`transaction_id=None`); they then commit one at a
time. Where they do not, and no column can be added, only a reader that waits at every gap is left,
for as long as a transaction may run: a number that was rolled back and one that is late look alike.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Integer,
    Select,
    Text,
    bindparam,
    cast,
    column,
    exists,
    false,
    func,
    literal_column,
    null,
    select,
    table,
    tuple_,
)
from sqlalchemy.types import UserDefinedType

from checkpoints import _arguments as arguments
from checkpoints.errors import CheckpointsError

__all__ = ["BEGINNING", "XID8", "ForeignTransactionIds", "Message", "MessageTable", "Position"]


class Position(NamedTuple):
    """A place in the global order: after the message that has these two numbers.

    A table whose appending transactions wait for each other has no transaction ids: 0, always.
    """

    transaction_id: int
    global_position: int


BEGINNING = Position(0, 0)
_ONE: ColumnElement[int] = literal_column("1", Integer())


@dataclass(frozen=True, slots=True)
class Message:
    """What the recorder must know of a message. Positions count from 1.

    `category` is the stream's name up to its first hyphen, unless it is given.
    """

    global_position: int
    stream_name: str
    stream_position: int
    type: str
    category: str = ""
    transaction_id: int = 0

    def __post_init__(self) -> None:
        arguments.identifier("global_position", self.global_position)
        arguments.identifier("stream_position", self.stream_position)
        arguments.position("transaction_id", self.transaction_id)
        arguments.name("stream_name", self.stream_name)
        if not self.category:
            object.__setattr__(self, "category", self.stream_name.partition("-")[0])

    @property
    def position(self) -> Position:
        """The place in the global order after this message."""
        return Position(self.transaction_id, self.global_position)


class ForeignTransactionIds(CheckpointsError):
    """Messages carry transaction ids that this cluster has not reached: they come from another.

    They would never be read, and later ones would be sorted before them.
    """

    def __init__(self, table: str) -> None:
        super().__init__(
            f"messages in {table} carry transaction ids that this cluster has not reached: they "
            "were restored from a dump or copied from another cluster. With writers and recorders "
            "stopped, set transaction_id to '1' in all of them and delete the checkpoints of the "
            "subscription $recorder; see checkpoints.runtime.reading"
        )


class _XID(UserDefinedType[int]):
    """The id of a transaction without its epoch, as `pg_locks` has it."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """The type's name."""
        return "XID"


class XID8(UserDefinedType[int]):
    """PostgreSQL's `xid8`, the id of a transaction that is never used twice, as an integer."""

    cache_ok = True

    def get_col_spec(self, **_: Any) -> str:
        """The type's name in DDL."""
        return "XID8"

    def bind_processor(self, dialect: object) -> Callable[[int | None], str | None]:  # noqa: ARG002
        """There is no cast from integers, only from text."""
        return lambda value: None if value is None else str(value)

    def result_processor(self, dialect: object, coltype: object) -> Callable[[Any], int | None]:  # noqa: ARG002
        """The driver answers text."""
        return lambda value: None if value is None else int(value)


@dataclass(frozen=True, kw_only=True, eq=False)
class MessageTable:
    """The columns of a message table; called, it reads the messages after a position.

    Give it to `Recorder` and `AsyncRecorder` as `read`. `transaction_id=None` is for a table whose
    appending transactions wait for each other. `category=None`: see `Message`. `where` narrows it,
    such as to the messages of one tenant.
    """

    global_position: ColumnElement[int]
    transaction_id: ColumnElement[Any] | None
    stream_name: ColumnElement[str]
    stream_position: ColumnElement[int]
    type: ColumnElement[str]
    category: ColumnElement[str] | None = None
    where: ColumnElement[bool] | None = field(default=None)

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            optional = name in ("transaction_id", "category", "where")
            if not isinstance(value, ColumnElement) and not (optional and value is None):
                raise TypeError(f"{name} must be a column, not {value!r}")

    def __call__(self, connection: Connection, after: Position, limit: int) -> list[Message]:
        """The next messages, at most `limit`; none: nothing more has been finished so far.

        Raises:
            ForeignTransactionIds: the table was filled in another cluster.
        """
        rows = connection.execute(self.select_messages(after, limit)).all()
        if not rows:
            self._check_transaction_ids(connection)
        return [Message(*row) for row in rows]

    def select_messages(self, after: Position, limit: int) -> Select[int, str, int, str, str, int]:
        """The next messages of transactions that have ended, in order, at most `limit`.

        Rows: global_position, stream_name, stream_position, type, category, transaction_id. Locks
        nothing.
        """
        return self._messages.params(
            read_after_transaction=str(arguments.position("transaction_id", after[0])),
            read_after_position=arguments.position("global_position", after[1]),
            read_limit=arguments.limit("limit", limit),
        )

    def end(self, connection: Connection) -> Position:
        """The position after the last message of the transactions that have ended."""
        found = connection.execute(self._end).one_or_none()
        return Position(*found) if found else BEGINNING

    @cached_property
    def _messages(self) -> Select[int, str, int, str, str, int]:
        after_position = bindparam("read_after_position", type_=BigInteger())
        chosen = select(
            self.global_position,
            self.stream_name,
            self.stream_position,
            self.type,
            _no_category()
            if self.category is None
            else func.coalesce(self.category, _no_category()),
            self._transaction_id,
        ).limit(bindparam("read_limit", type_=Integer()))
        if self.where is not None:
            chosen = chosen.where(self.where)
        if self.transaction_id is None:
            return chosen.where(self.global_position > after_position).order_by(
                self.global_position
            )
        # One comparison of rows, which is one range of the index on both columns.
        after_transaction = cast(bindparam("read_after_transaction", type_=Text()), XID8())
        return chosen.where(
            tuple_(self.transaction_id, self.global_position)
            > tuple_(after_transaction, after_position),
            self.transaction_id < _first_running(),
        ).order_by(self.transaction_id, self.global_position)

    @cached_property
    def _end(self) -> Select[int, int]:
        last = select(self._transaction_id, self.global_position).limit(_ONE)
        if self.transaction_id is None:
            return last.order_by(self.global_position.desc())
        return last.where(self.transaction_id < _first_running()).order_by(
            self.transaction_id.desc(), self.global_position.desc()
        )

    @property
    def _transaction_id(self) -> ColumnElement[int]:
        if self.transaction_id is None:
            return literal_column("0", BigInteger())
        return cast(cast(self.transaction_id, Text()), BigInteger())

    def _check_transaction_ids(self, connection: Connection) -> None:
        if self.transaction_id is None:
            return
        if connection.execute(select(self._foreign)).scalar_one():
            raise ForeignTransactionIds(str(getattr(self.transaction_id, "table", None)))

    @cached_property
    def _foreign(self) -> ColumnElement[bool]:
        # The last row of the index and not EXISTS, for which the planner would scan the table. A
        # snapshot sees nothing of the transactions from its xmax on, but for its own.
        assert self.transaction_id is not None  # noqa: S101  # for the type checker
        last = (
            select(self.transaction_id)
            .order_by(self.transaction_id.desc(), self.global_position.desc())
            .limit(_ONE)
            .scalar_subquery()
        )
        reached = func.greatest(
            func.pg_current_xact_id_if_assigned(),
            func.pg_snapshot_xmax(func.pg_current_snapshot()),
        )
        return func.coalesce(last > reached, false())


def _first_running() -> ColumnElement[Any]:
    """The oldest transaction of this database that may still be running: all before have ended.

    A snapshot names the running transactions of the whole cluster. Those of a process that works in
    another database can append nothing here. Which process runs a transaction, and which database
    it works in, never changes: it does no harm to look after the snapshot was taken, and who is not
    found (it has just ended, or is prepared) counts as one of this database.
    """
    snapshot = func.pg_current_snapshot()
    running = (
        func.pg_snapshot_xip(snapshot)
        .table_valued(column("id", XID8()))
        .render_derived(name="running")
    )
    held = table(
        "pg_locks",
        column("transactionid", _XID()),
        column("mode", Text()),
        column("pid", Integer()),
        schema="pg_catalog",
    )
    process = table(
        "pg_stat_activity",
        column("pid", Integer()),
        column("datname", Text()),
        schema="pg_catalog",
    )
    of_another = exists(
        select(null())
        .select_from(held)
        .join(process, process.c.pid == held.c.pid)
        .where(
            held.c.transactionid == cast(running.c.id, _XID()),
            # Who waits for the transaction to end has a row with its id too, of another mode.
            held.c.mode == _word("ExclusiveLock"),
            process.c.datname != func.current_database(),
        )
    )
    first = select(running.c.id).where(~of_another).order_by(running.c.id).limit(_ONE)
    # Its own transaction is not in a snapshot, and may have more to append.
    return select(
        func.least(
            func.pg_current_xact_id_if_assigned(),
            func.coalesce(first.scalar_subquery(), func.pg_snapshot_xmax(snapshot)),
            type_=XID8(),
        )
    ).scalar_subquery()


def _word(value: str) -> ColumnElement[str]:
    return literal_column(f"'{value}'", Text())


def _no_category() -> ColumnElement[str]:
    return _word("")
