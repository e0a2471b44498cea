"""What the templates of all statements share.

A template is built once, every parameter typed, and bound with `.params()`. The names of its
parameters and CTEs begin with, or are, the statement's own word, so that different statements can
stand in one.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, TypeVar

from sqlalchemy import (
    CTE,
    BigInteger,
    BindParameter,
    Column,
    ColumnElement,
    CompoundSelect,
    DateTime,
    FromClause,
    Integer,
    Select,
    Text,
    Update,
    any_,
    bindparam,
    func,
    literal_column,
    null,
    select,
    tuple_,
    update,
)
from sqlalchemy.dialects.postgresql import ARRAY, INTERVAL, JSONB
from sqlalchemy.sql.functions import FunctionElement

from checkpoints import _arguments as arguments
from checkpoints.tables import checkpoint_status, checkpoints

TIMESTAMP = DateTime(timezone=True)

_PARTS = "_checkpoints_parts"
S = TypeVar("S", bound=Select[*tuple[Any, ...]])
V = TypeVar("V")

# Constants stand in the SQL text: the planner knows them, and nobody has to bind them.
ZERO: ColumnElement[int] = literal_column("0", Integer())
ACTIVE: ColumnElement[Any] = literal_column("'active'", checkpoint_status)
RETRY: ColumnElement[Any] = literal_column("'retry'", checkpoint_status)
FAILED: ColumnElement[Any] = literal_column("'failed'", checkpoint_status)
LONG_AGO: ColumnElement[datetime] = literal_column("'-infinity'::timestamptz", TIMESTAMP)
FAR_AHEAD: ColumnElement[datetime] = literal_column("'infinity'::timestamptz", TIMESTAMP)


def bind(statement: S, /, **values: Any) -> S:
    """A template with its values, a statement like any other."""
    bound = statement.params(**values)
    bound.__dict__[_PARTS] = (statement, values)
    return bound


def parts(bound: S) -> tuple[S, dict[str, Any]]:
    """The template and the values of what `bind` has just made, to be executed as such.

    The template keeps the key that SQLAlchemy caches the compiled text by; for one with values of
    its own the key is generated anew each time, which takes 160 µs for a reserve.
    """
    known: tuple[S, dict[str, Any]] = bound.__dict__.get(_PARTS, (bound, {}))
    return known


def bigint(name: str) -> BindParameter[int]:
    """An id, a position or a version."""
    return bindparam(name, type_=BigInteger())


def bigints(name: str) -> BindParameter[Any]:
    """Many of them: one SQL text for one and for ten thousand."""
    return bindparam(name, type_=ARRAY(BigInteger()))


def integer(name: str) -> BindParameter[int]:
    """A count."""
    return bindparam(name, type_=Integer())


def string(name: str) -> BindParameter[str]:
    """A name."""
    return bindparam(name, type_=Text())


def strings(name: str) -> BindParameter[Any]:
    """Many names."""
    return bindparam(name, type_=ARRAY(Text()))


def timestamp(name: str) -> BindParameter[datetime | None]:
    """A point in time."""
    return bindparam(name, type_=TIMESTAMP)


def timestamps(name: str) -> BindParameter[Any]:
    """Many points in time."""
    return bindparam(name, type_=ARRAY(TIMESTAMP))


def durations(name: str) -> BindParameter[Any]:
    """Many spans of time."""
    return bindparam(name, type_=ARRAY(INTERVAL()))


def duration(name: str) -> BindParameter[Any]:
    """A span of time."""
    return bindparam(name, type_=INTERVAL())


def json(name: str) -> BindParameter[Any]:
    """A JSON value; None is JSON's null."""
    return bindparam(name, type_=JSONB())


def word(value: str) -> ColumnElement[str]:
    """A fixed text of our own."""
    return literal_column(f"'{value}'", Text())


def statement_time() -> FunctionElement[datetime]:
    """Now: not `now()`, which stands still from the start of the caller's transaction."""
    return func.statement_timestamp(type_=TIMESTAMP)


def due_at(prefix: str) -> ColumnElement[datetime | None]:
    """A point in time that is given as such, or as how long from now; null: neither is given."""
    return func.coalesce(
        timestamp(f"{prefix}_process_at"), statement_time() + duration(f"{prefix}_process_in")
    )


def due_values(prefix: str, process_at: datetime | timedelta | None) -> dict[str, Any]:
    """The values of the parameters of `due_at`."""
    moment, delay = due(process_at)
    return {f"{prefix}_process_at": moment, f"{prefix}_process_in": delay}


def due(process_at: datetime | timedelta | None) -> tuple[datetime | None, timedelta | None]:
    """A point in time, or how long from now; neither of the two, when none is given."""
    return (None, None) if process_at is None else arguments.due("process_at", process_at)


def oldest_of_subscription(
    time: Column[Any],
    subscription_id: ColumnElement[int],
    *,
    since: ColumnElement[datetime] | ColumnElement[datetime | None] = LONG_AGO,
    until: ColumnElement[datetime] = FAR_AHEAD,
) -> Select[int]:
    """The rows of a subscription in a hot table, the oldest first.

    Both columns are compared at once, and both are ordered by. With an equality on the subscription
    the order would be that of the time alone, and where most rows are of one subscription, by
    statistics that may be old, another index is walked past all the others.
    """
    hot = time.table
    key = tuple_(hot.c.subscription_id, time)
    return (
        select(hot.c.id)
        .where(key >= tuple_(subscription_id, since), key <= tuple_(subscription_id, until))
        .order_by(hot.c.subscription_id, time)
    )


def unknown(value: ColumnElement[V]) -> ColumnElement[V]:
    """A value that the planner cannot know: of a limit, or an array of any length.

    It knows even a parameter's when it plans for one execution. Knowing that a limit is large, it
    may read and sort all; knowing that few rows are wanted, it finds its plan so much cheaper than
    one for any number that it plans anew at each execution, which takes longer than to execute.
    """
    return select(value).scalar_subquery()


def materialized(
    rows: Select[*tuple[Any, ...]] | CompoundSelect[*tuple[Any, ...]], name: str
) -> CTE:
    """A CTE that is run once, whatever the planner thinks of it."""
    return rows.cte(name).prefix_with("MATERIALIZED")


def is_one_of(rows: CTE, main: FromClause = checkpoints) -> ColumnElement[bool]:
    """Whether a checkpoint is in a CTE, by its id.

    Through an array, computed once, because a plain IN lets a generic plan hash-join the whole
    main table.
    """
    ids = func.array(select(rows.c.id).scalar_subquery(), type_=ARRAY(BigInteger()))
    return main.c.id == any_(ids)


def update_checkpoints(main: Any = checkpoints) -> Update:
    """An update of main rows.

    It sets `updated_at` itself, and so spares a call of the trigger that would, for each row.
    `main` is the table, or an alias of it.
    """
    return update(main).values(updated_at=statement_time())


def appended(
    attempt: ColumnElement[int], position: ColumnElement[int], error: ColumnElement[Any]
) -> ColumnElement[Any]:
    """The errors of a checkpoint and one more, with its attempt, position and time."""
    entry = func.jsonb_build_object(
        word("attempt"),
        attempt,
        word("stream_position"),
        position,
        word("recorded_at"),
        statement_time(),
        word("error"),
        error,
        type_=JSONB,
    )
    before = func.coalesce(checkpoints.c.retries, func.jsonb_build_array(type_=JSONB))
    return before.op("||")(func.jsonb_build_array(entry, type_=JSONB))


def succeeded() -> dict[str, Any]:
    """What clears a checkpoint's errors, for the values of an update."""
    return {"status": ACTIVE, "retry_attempts": ZERO, "retries": null()}
