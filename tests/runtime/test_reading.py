"""Reading in order: no transaction that commits late is skipped, and no stream is turned round."""

from __future__ import annotations

import inspect
import random
import re
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest
from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Engine,
    Identity,
    MetaData,
    Select,
    Table,
    Text,
    column,
    create_engine,
    func,
    insert,
    select,
    text,
    update,
)

from checkpoints.runtime import reading
from checkpoints.runtime.reading import (
    BEGINNING,
    XID8,
    ForeignTransactionIds,
    Message,
    MessageTable,
    Position,
)
from tests.support.databases import Databases, disposed

messages = Table(
    "messages",
    MetaData(),
    Column("global_position", BigInteger, Identity(always=True), primary_key=True),
    Column("transaction_id", XID8, nullable=False, server_default=text("pg_current_xact_id()")),
    Column("stream_name", Text, nullable=False),
    Column("stream_position", BigInteger, nullable=False),
    Column("type", Text, nullable=False),
)
IN_ORDER = MessageTable(
    global_position=messages.c.global_position,
    transaction_id=messages.c.transaction_id,
    stream_name=messages.c.stream_name,
    stream_position=messages.c.stream_position,
    type=messages.c.type,
)


def documented_ddl() -> str:
    """The statements in the module's docstring."""
    lines = inspect.cleandoc(reading.__doc__ or "").splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("    CREATE TABLE"))
    last = next(n for n, line in enumerate(lines) if line.startswith("Why it is right"))
    return textwrap.dedent("\n".join(lines[first:last]))


def create_messages(engine: Engine) -> None:
    """Make the table as it is documented."""
    with engine.begin() as connection:
        connection.exec_driver_sql(documented_ddl())


def append(connection: Connection, stream: str, *types: str) -> None:
    """Append messages to a stream, after those that can be seen."""
    for type in types or ("Deposited",):
        last = select(func.coalesce(func.max(messages.c.stream_position), 0)).where(
            messages.c.stream_name == stream
        )
        connection.execute(
            insert(messages).values(
                stream_name=stream, stream_position=last.scalar_subquery() + 1, type=type
            )
        )


def settle(engine: Engine) -> None:
    """Wait until all messages that can be seen are of transactions before the oldest that runs.

    The server has more to do, such as other tests and autovacuum, whose transactions may be in the
    way for a moment.
    """
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        with engine.connect() as connection:
            held_back = connection.execute(
                select(func.count())
                .select_from(messages)
                .where(messages.c.transaction_id >= reading._first_running())
            ).scalar_one()
        if not held_back:
            return
    raise AssertionError(f"{held_back} messages are still held back")


def take_transaction_id(connection: Connection) -> None:
    """What a transaction does that writes to another table first."""
    connection.execute(select(func.pg_current_xact_id()))


def places(found: list[Message]) -> list[tuple[str, int]]:
    return [(message.stream_name, message.stream_position) for message in found]


class Cursor:
    """A reader that goes on from where it stands, a transaction each time."""

    def __init__(self, engine: Engine, limit: int = 100) -> None:
        self._engine = engine
        self._position = BEGINNING
        self.limit = limit

    def read(self) -> list[tuple[str, int]]:
        with self._engine.connect() as connection:
            found = self.find(connection, self._position)
        if found:
            self._position = found[-1].position
        return places(found)

    def find(self, connection: Connection, after: Position) -> list[Message]:
        return IN_ORDER(connection, after, self.limit)


class PositionOnly(Cursor):
    """What is tempting: the messages of finished transactions past the last global position."""

    first_running = staticmethod(reading._first_running)

    def find(self, connection: Connection, after: Position) -> list[Message]:
        found: Select[*tuple[Any, ...]] = (
            select(
                messages.c.global_position,
                messages.c.stream_name,
                messages.c.stream_position,
                messages.c.type,
            )
            .where(
                messages.c.global_position > after.global_position,
                messages.c.transaction_id < self.first_running(),
            )
            .order_by(messages.c.global_position)
            .limit(self.limit)
        )
        return [Message(*row) for row in connection.execute(found)]


@pytest.fixture
def appenders(engine: Engine) -> Iterator[list[Connection]]:
    """Connections on a database with the table."""
    create_messages(engine)
    with ExitStack() as stack:
        yield [stack.enter_context(engine.connect()) for _ in range(4)]


def test_messages_after_a_running_transaction_wait_for_it(
    engine: Engine, appenders: list[Connection]
) -> None:
    first, second, *_ = appenders
    cursor = Cursor(engine)
    append(first, "a-1")
    append(second, "b-1")
    second.commit()
    assert cursor.read() == []
    first.commit()
    settle(engine)
    assert cursor.read() == [("a-1", 1), ("b-1", 1)]
    assert cursor.read() == []


def test_a_position_taken_early_by_a_younger_transaction_is_not_skipped(
    engine: Engine, appenders: list[Connection]
) -> None:
    older, younger, *_ = appenders
    both, one = Cursor(engine), PositionOnly(engine)
    take_transaction_id(older)
    append(younger, "a-1")
    append(older, "b-1")
    older.commit()
    settle(engine)
    assert both.read() == one.read() == [("b-1", 1)]
    younger.commit()
    settle(engine)
    assert both.read() == [("a-1", 1)]
    assert one.read() == []  # skipped, for good


def test_a_stream_is_read_in_its_order_though_the_older_transaction_appends_last(
    engine: Engine, appenders: list[Connection]
) -> None:
    older, running, younger, _ = appenders
    cursor = Cursor(engine, limit=1)
    take_transaction_id(older)
    take_transaction_id(running)
    append(younger, "a-1")
    younger.commit()
    append(older, "a-1")
    older.commit()
    assert cursor.read() == []
    running.commit()
    settle(engine)
    assert cursor.read() == [("a-1", 1)]
    assert cursor.read() == [("a-1", 2)]


def test_without_the_trigger_nothing_is_skipped_but_a_stream_may_be_turned_round(
    engine: Engine, appenders: list[Connection]
) -> None:
    older, younger, *_ = appenders
    with engine.begin() as connection:
        connection.execute(text("DROP TRIGGER keep_stream_order ON messages"))
    take_transaction_id(older)
    append(younger, "a-1")
    younger.commit()
    append(older, "a-1")
    older.commit()
    settle(engine)
    assert Cursor(engine).read() == [("a-1", 2), ("a-1", 1)]


def interleave(engine: Engine, connections: list[Connection], seed: int) -> tuple[list[Any], ...]:
    """Transactions that append, commit and roll back in any order, read meanwhile by two readers.

    What was committed, and what each reader has read.
    """
    chance = random.Random(seed)
    writing: dict[Connection, set[str]] = {}
    both, one = Cursor(engine), PositionOnly(engine)
    read: tuple[list[Any], list[Any]] = ([], [])

    def read_some() -> int:
        before = sum(map(len, read))
        for cursor, into in zip((both, one), read, strict=True):
            cursor.limit = chance.randint(1, 3)
            into.extend(cursor.read())
        return sum(map(len, read)) - before

    def end(connection: Connection) -> None:
        connection.rollback() if chance.random() < 0.2 else connection.commit()
        writing.pop(connection)

    for _ in range(60):
        connection = chance.choice(connections)
        # Two that append to one stream wait for each other, so that here only one does.
        free = {"a-1", "a-2", "b-1"} - set().union(
            *(streams for other, streams in writing.items() if other is not connection)
        )
        match chance.choice(("begin", "append", "append", "savepoint", "end", "read")):
            case "begin" if connection not in writing:
                take_transaction_id(connection)
                writing[connection] = set()
            case "append" if free:
                stream = chance.choice(sorted(free))
                append(connection, stream, *["Deposited"] * chance.randint(1, 2))
                writing.setdefault(connection, set()).add(stream)
            case "savepoint" if free:
                stream = chance.choice(sorted(free))
                savepoint = connection.begin_nested()
                append(connection, stream)
                savepoint.rollback() if chance.random() < 0.5 else savepoint.commit()
                writing.setdefault(connection, set()).add(stream)
            case "end" if connection in writing:
                end(connection)
            case "read":
                read_some()
    for connection in list(writing):
        end(connection)
    settle(engine)
    while read_some():
        pass
    with engine.begin() as connection:
        committed = connection.execute(
            select(messages.c.stream_name, messages.c.stream_position)
        ).all()
        connection.execute(text("TRUNCATE messages"))
    return [tuple(row) for row in committed], *read


def test_whatever_the_order_of_commits_each_message_is_read_once_and_streams_in_order(
    engine: Engine, appenders: list[Connection]
) -> None:
    skipped = 0
    for seed in range(20):
        committed, read, by_position_only = interleave(engine, appenders, seed)
        assert sorted(read) == sorted(committed), seed
        for stream in {stream for stream, _ in committed}:
            positions = [position for name, position in read if name == stream]
            assert positions == sorted(positions), seed
        skipped += len(set(committed) - set(by_position_only))
    # The same transactions, for a cursor of one number: the test can tell.
    assert skipped > 0


def test_a_transaction_of_many_messages_is_read_in_parts(
    engine: Engine, appenders: list[Connection]
) -> None:
    append(appenders[0], "a-1", *["Deposited"] * 5)
    appenders[0].commit()
    settle(engine)
    cursor = Cursor(engine, limit=2)
    assert [len(cursor.read()) for _ in range(4)] == [2, 2, 1, 0]


def test_a_transaction_that_only_reads_holds_back_nothing(
    engine: Engine, appenders: list[Connection]
) -> None:
    reader, writer, *_ = appenders
    reader.execution_options(isolation_level="REPEATABLE READ").execute(select(messages)).all()
    append(writer, "a-1")
    writer.commit()
    settle(engine)
    assert Cursor(engine).read() == [("a-1", 1)]


def test_a_transaction_of_another_database_holds_back_nothing(
    databases: Databases, engine: Engine, appenders: list[Connection]
) -> None:
    url = databases.create()
    with disposed(create_engine(url)) as other, other.connect() as connection:
        take_transaction_id(connection)
        append(appenders[0], "a-1")
        appenders[0].commit()
        settle(engine)
        assert Cursor(engine).read() == [("a-1", 1)]
        connection.rollback()
    databases.drop(url)


def test_the_end_is_after_the_last_message_before_the_oldest_transaction_that_runs(
    engine: Engine, appenders: list[Connection]
) -> None:
    first, older, younger, _ = appenders
    with engine.connect() as connection:
        assert IN_ORDER.end(connection) == BEGINNING
    append(first, "a-1", "Opened", "Deposited")
    first.commit()
    settle(engine)
    append(older, "b-1")
    append(younger, "c-1")
    younger.commit()
    with engine.connect() as connection:
        end = IN_ORDER.end(connection)
    older.commit()
    settle(engine)
    with engine.connect() as connection:
        assert places(IN_ORDER(connection, end, 10)) == [("b-1", 1), ("c-1", 1)]


@pytest.mark.parametrize(
    "statement",
    [IN_ORDER.select_messages(Position(1, 1), 100), IN_ORDER._end, select(IN_ORDER._foreign)],
    ids=["messages", "end", "foreign"],
)
def test_reading_uses_one_range_of_the_index(
    engine: Engine, appenders: list[Connection], statement: Select[*tuple[Any, ...]]
) -> None:
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO messages (stream_name, stream_position, type)"
            " SELECT 'a-' || n, 1, 'Deposited' FROM generate_series(1, 20000) AS n"
        )
        connection.exec_driver_sql("ANALYZE messages")
    compiled = statement.compile(dialect=engine.dialect)
    plan = "\n".join(appenders[0].exec_driver_sql(f"EXPLAIN {compiled}", compiled.params).scalars())
    assert re.search(r"Index (Only )?Scan (Backward )?using messages_in_order", plan)
    assert "Scan on messages" not in plan
    assert "Filter: (transaction_id" not in plan


def test_a_table_can_be_narrowed_and_may_name_categories(
    engine: Engine, appenders: list[Connection]
) -> None:
    append(appenders[0], "a-1", "Opened", "Deposited")
    appenders[0].commit()
    settle(engine)
    narrowed = MessageTable(
        global_position=messages.c.global_position,
        transaction_id=messages.c.transaction_id,
        stream_name=messages.c.stream_name,
        stream_position=messages.c.stream_position,
        type=messages.c.type,
        category=func.nullif(func.lower(messages.c.type), "opened"),
        where=messages.c.type != "Nothing",
    )
    found = narrowed(appenders[0], BEGINNING, 10)
    assert [message.category for message in found] == ["a", "deposited"]


def test_where_appends_wait_for_each_other_the_global_position_will_do(
    engine: Engine, appenders: list[Connection]
) -> None:
    serial = MessageTable(
        global_position=messages.c.global_position,
        transaction_id=None,
        stream_name=messages.c.stream_name,
        stream_position=messages.c.stream_position,
        type=messages.c.type,
    )
    first, second, third, _ = appenders
    take_transaction_id(third)  # holds back nothing here
    first.execute(select(func.pg_advisory_xact_lock(1)))
    append(first, "a-1")
    assert not second.execute(select(func.pg_try_advisory_xact_lock(1))).scalar_one()
    first.commit()
    with engine.connect() as connection:
        [message] = serial(connection, BEGINNING, 10)
        assert message.position == Position(0, 1)
        assert serial(connection, message.position, 10) == []
        assert serial.end(connection) == message.position


def test_messages_of_another_cluster_are_refused(
    engine: Engine, appenders: list[Connection]
) -> None:
    append(appenders[0], "a-1")
    appenders[0].commit()
    with engine.begin() as connection:
        connection.execute(update(messages).values(transaction_id=2**40))
    with pytest.raises(ForeignTransactionIds, match="messages"):
        Cursor(engine).read()
    with engine.begin() as connection:
        connection.execute(update(messages).values(transaction_id=1))
    assert Cursor(engine).read() == [("a-1", 1)]


def test_own_messages_are_not_those_of_another_cluster(appenders: list[Connection]) -> None:
    append(appenders[0], "a-1")
    assert IN_ORDER(appenders[0], BEGINNING, 10) == []


def test_a_transaction_id_is_an_integer(appenders: list[Connection]) -> None:
    append(appenders[0], "a-1")
    stored = appenders[0].execute(select(messages.c.transaction_id)).scalar_one()
    assert type(stored) is int
    assert XID8().get_col_spec() == "XID8"


def test_a_message_has_a_category_and_a_place() -> None:
    message = Message(7, "account-1-2", 3, "Deposited", transaction_id=9)
    assert message.category == "account"
    assert message.position == (9, 7)
    assert Message(7, "account-1", 3, "Deposited", "money").category == "money"
    assert Message(7, "alone", 3, "Deposited").category == "alone"


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((0, "a-1", 1, "Deposited"), "global_position must be from 1"),
        ((1, "a-1", 0, "Deposited"), "stream_position must be from 1"),
        ((1, "", 1, "Deposited"), "stream_name must not be empty"),
        ((1, "a-1", 1, "Deposited", "", -1), "transaction_id must be from 0"),
    ],
)
def test_a_message_names_what_is_wrong(arguments: tuple[Any, ...], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Message(*arguments)


def test_reading_names_what_is_wrong(connection: Connection) -> None:
    with pytest.raises(ValueError, match="limit must be from 1"):
        IN_ORDER.select_messages(BEGINNING, 0)
    with pytest.raises(ValueError, match="global_position must be from 0"):
        IN_ORDER(connection, Position(0, -1), 10)
    with pytest.raises(TypeError, match="stream_name must be a column, not 'stream_name'"):
        MessageTable(
            global_position=column("global_position", BigInteger),
            transaction_id=None,
            stream_name="stream_name",  # type: ignore[arg-type]
            stream_position=column("stream_position", BigInteger),
            type=column("type", Text),
        )
