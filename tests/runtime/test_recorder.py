"""The recorder: every message counts once, for those who follow it, whatever dies when."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, func, select, text
from sqlalchemy.exc import DBAPIError

from alembic import command
from checkpoints import (
    Checkpoints,
    SubscriptionStatus,
    add_or_update_subscription,
    alembic_config,
    set_subscription_status,
)
from checkpoints.embedded import start_server
from checkpoints.runtime.reading import BEGINNING, Message, Position
from checkpoints.runtime.recorder import Interest, Recorder, Start
from checkpoints.tables import checkpoints, checkpoints_ready, metadata, subscriptions
from tests.runtime.test_reading import IN_ORDER, append, create_messages, messages, settle
from tests.support.databases import disposed
from tests.support.factories import GROUP, violations

EVERYTHING = Interest("everything")
FAST: dict[str, Any] = {"poll_interval": timedelta(milliseconds=50)}
WAIT = 20


@pytest.fixture(autouse=True)
def message_table(engine: Engine) -> None:
    create_messages(engine)


def append_to(engine: Engine, stream: str, *types: str) -> None:
    """Append messages that can be read at once."""
    with engine.begin() as connection:
        append(connection, stream, *types)
    settle(engine)


def versions(engine: Engine, subscription: str) -> dict[str, tuple[int, int]]:
    """Version and position by stream."""
    with engine.connect() as connection:
        return {
            stream: (version, position)
            for stream, version, position in connection.execute(
                select(
                    checkpoints.c.stream_name,
                    checkpoints.c.stream_version,
                    checkpoints.c.stream_position,
                )
                .join(subscriptions, subscriptions.c.id == checkpoints.c.subscription_id)
                .where(subscriptions.c.name == subscription)
            )
        }


def expected(engine: Engine, *conditions: Any) -> dict[str, tuple[int, int]]:
    """What a subscription must have from the beginning, computed by the database."""
    with engine.connect() as connection:
        rows = connection.execute(
            select(messages.c.stream_name, func.max(messages.c.stream_position))
            .where(*conditions)
            .group_by(messages.c.stream_name)
        )
        return {stream: (version, 0) for stream, version in rows}


def terminate(engine: Engine, pid: int) -> None:
    with engine.connect() as connection:
        connection.execute(select(func.pg_terminate_backend(pid, 5000))).one()


@contextmanager
def running(recorder: Recorder) -> Iterator[None]:
    """Run it in a thread, and stop it at the end; what ended it is raised."""
    with ThreadPoolExecutor(1) as pool:
        run = pool.submit(recorder.run)
        try:
            yield
        finally:
            recorder.stop()
            run.result(WAIT)


class Spy:
    """A `read` that can be held up, and says when there is nothing more."""

    def __init__(self) -> None:
        self.reads = 0
        self.pid = 0
        self.reading = threading.Event()
        self.go_on = threading.Event()
        self.go_on.set()
        self.idle = threading.Event()

    def __call__(self, connection: Connection, after: Position, limit: int) -> Sequence[Message]:
        self.reads += 1
        self.pid = connection.execute(select(func.pg_backend_pid())).scalar_one()
        self.reading.set()
        assert self.go_on.wait(WAIT)
        found = IN_ORDER(connection, after, limit)
        if not found:
            self.idle.set()
        return found

    def wait_until_idle(self) -> None:
        # Twice: the first read may have begun before what the test did last.
        for _ in range(2):
            self.idle.clear()
            assert self.idle.wait(WAIT)


def test_records_in_batches_each_stream_at_its_highest_version(engine: Engine) -> None:
    for n in range(10):
        append_to(engine, f"account-{n % 3}", "Opened", "Deposited")
    recorder = Recorder(engine, GROUP, IN_ORDER, [EVERYTHING], batch=6)
    assert [recorder.run_once() for _ in range(5)] == [6, 6, 6, 2, 0]
    assert versions(engine, "everything") == expected(engine)
    append_to(engine, "account-0")
    assert recorder.drain() == 1
    assert versions(engine, "everything") == expected(engine)


def test_filters_by_category_type_and_function(engine: Engine) -> None:
    append_to(engine, "account-1", "Opened", "Deposited", "Closed", "Noted")
    append_to(engine, "order-1", "Opened", "Shipped")
    interests = [
        Interest("accounts", categories=["account"]),
        Interest("openings", types=["Opened"]),
        Interest("both", categories=["account"], types=["Deposited", "Closed"]),
        Interest("odd", matches=lambda message: message.stream_position == 1),
        Interest("none", types=["Vanished"]),
    ]
    Recorder(engine, GROUP, IN_ORDER, interests).drain()
    assert versions(engine, "accounts") == {"account-1": (4, 0)}
    assert versions(engine, "openings") == {"account-1": (1, 0), "order-1": (1, 0)}
    assert versions(engine, "both") == {"account-1": (3, 0)}
    assert versions(engine, "odd") == {"account-1": (1, 0), "order-1": (1, 0)}
    assert versions(engine, "none") == {}


def test_nothing_of_its_own_is_ever_ready(engine: Engine) -> None:
    append_to(engine, "account-1")
    Recorder(engine, GROUP, IN_ORDER, [EVERYTHING]).drain()
    with engine.connect() as connection:
        ready = connection.execute(
            select(checkpoints.c.stream_name).join(
                checkpoints_ready, checkpoints_ready.c.id == checkpoints.c.id
            )
        ).scalars()
        assert list(ready) == ["account-1"]
        assert violations(connection) == []
        own = Checkpoints(connection).get_subscription(GROUP, "$recorder")
    assert own is not None
    assert own.status is SubscriptionStatus.UNINITIALIZED
    assert versions(engine, "$recorder")["$global"] == (1, 1)


def test_adds_subscriptions_and_makes_new_ones_active_once(engine: Engine) -> None:
    def status() -> SubscriptionStatus:
        with engine.connect() as connection:
            found = Checkpoints(connection).get_subscription(GROUP, "everything")
        assert found is not None
        return found.status

    Recorder(engine, GROUP, IN_ORDER, [EVERYTHING]).run_once()
    assert status() is SubscriptionStatus.ACTIVE
    with engine.begin() as connection:
        id = connection.execute(add_or_update_subscription(GROUP, "everything")).one()[0]
        connection.execute(set_subscription_status(id, SubscriptionStatus.UNINITIALIZED))
    Recorder(engine, GROUP, IN_ORDER, [EVERYTHING]).run_once()
    assert status() is SubscriptionStatus.UNINITIALIZED


def test_a_paused_subscription_stays_so_and_is_recorded(engine: Engine) -> None:
    with engine.begin() as connection:
        id = connection.execute(add_or_update_subscription(GROUP, "everything")).one()[0]
        connection.execute(set_subscription_status(id, SubscriptionStatus.PAUSED))
    append_to(engine, "account-1")
    Recorder(engine, GROUP, IN_ORDER, [EVERYTHING]).drain()
    with engine.connect() as connection:
        found = Checkpoints(connection).get_subscription(GROUP, "everything")
    assert found is not None
    assert found.status is SubscriptionStatus.PAUSED
    assert versions(engine, "everything") == {"account-1": (1, 0)}


def test_from_now_the_messages_before_are_passed_over(engine: Engine) -> None:
    append_to(engine, "account-1", "Opened", "Deposited")
    append_to(engine, "account-2", "Opened")
    late = Interest("late", start=Start.NOW)
    recorder = Recorder(engine, GROUP, IN_ORDER, [EVERYTHING, late], batch=1)
    recorder.run_once()
    append_to(engine, "account-1", "Deposited", "Deposited")
    append_to(engine, "account-3", "Opened")
    recorder.drain()
    assert versions(engine, "late") == {"account-1": (4, 2), "account-3": (1, 0)}
    assert versions(engine, "everything") == expected(engine)


def test_from_now_keeps_the_first_message_of_a_stream_however_transactions_interleave(
    engine: Engine,
) -> None:
    late = Interest("late", start=Start.NOW)
    recorder = Recorder(engine, GROUP, IN_ORDER, [late], batch=1)
    recorder.run_once()
    with engine.connect() as older, engine.connect() as younger:
        older.execute(select(func.pg_current_xact_id()))
        append(younger, "account-1")
        younger.commit()
        append(older, "account-1")
        older.commit()
    settle(engine)
    assert recorder.drain() == 2
    assert versions(engine, "late") == {"account-1": (2, 0)}


def test_from_now_works_with_a_plain_function(engine: Engine) -> None:
    append_to(engine, "account-1", "Opened", "Deposited", "Closed")
    late = Interest("late", start=Start.NOW)
    recorder = Recorder(engine, GROUP, Spy(), [late], batch=2)
    assert recorder.run_once() == 0
    append_to(engine, "account-1", "Opened")
    assert recorder.drain() == 1
    assert versions(engine, "late") == {"account-1": (4, 3)}


def test_from_a_position_where_another_recorder_left_off(engine: Engine) -> None:
    append_to(engine, "account-1", "Opened")
    with engine.connect() as connection:
        left_off = IN_ORDER.end(connection)
    append_to(engine, "account-1", "Deposited")
    Recorder(engine, GROUP, IN_ORDER, [Interest("moved", start=left_off)]).drain()
    assert versions(engine, "moved") == {"account-1": (2, 1)}


def test_a_subscription_added_later_catches_up_while_others_go_on(engine: Engine) -> None:
    append_to(engine, "account-1", *["Deposited"] * 20)
    append_to(engine, "account-2", *["Deposited"] * 20)
    Recorder(engine, GROUP, IN_ORDER, [EVERYTHING]).drain()
    interests = [EVERYTHING, Interest("late", types=["Deposited"])]
    recorder = Recorder(engine, GROUP, IN_ORDER, interests, batch=5)
    for n in range(4):
        append_to(engine, f"new-{n}")
        recorder.run_once()
    assert versions(engine, "everything") == expected(engine)
    assert versions(engine, "late") == {"account-1": (10, 0)}
    # Another process goes on where the first left off.
    Recorder(engine, GROUP, IN_ORDER, interests, batch=5).drain()
    assert versions(engine, "late") == versions(engine, "everything") == expected(engine)


def test_who_has_caught_up_is_read_for_together_with_the_others(engine: Engine) -> None:
    append_to(engine, "account-1", *["Deposited"] * 20)
    Recorder(engine, GROUP, IN_ORDER, [EVERYTHING]).drain()
    append_to(engine, "account-1")
    recorder = Recorder(engine, GROUP, IN_ORDER, [EVERYTHING, Interest("late")])
    # As far as the others have come, and not past them: they would never meet.
    assert [recorder.run_once() for _ in range(3)] == [20, 1, 0]
    assert versions(engine, "late") == versions(engine, "everything") == expected(engine)


def test_a_recorder_that_does_not_know_a_subscription_passes_over_none_of_its_messages(
    engine: Engine,
) -> None:
    old = Recorder(engine, GROUP, IN_ORDER, [EVERYTHING])
    new = Recorder(engine, GROUP, IN_ORDER, [EVERYTHING, Interest("late")])
    for recorder in (old, new, old, old, new, old, new):
        append_to(engine, "account-1")
        recorder.drain()
    assert versions(engine, "late") == versions(engine, "everything") == {"account-1": (7, 0)}


def test_transactions_that_commit_late_are_recorded(engine: Engine) -> None:
    recorder = Recorder(engine, GROUP, IN_ORDER, [EVERYTHING])
    with engine.connect() as first, engine.connect() as second:
        second.execute(select(func.pg_current_xact_id()))
        append(first, "account-1")
        append(second, "account-2")
        second.commit()
        settle(engine)
        assert recorder.drain() == 1
        first.commit()
        settle(engine)
        assert recorder.drain() == 1
    assert versions(engine, "everything") == expected(engine)


CHILD = """
import sys
from sqlalchemy import create_engine, event
from checkpoints.runtime.recorder import Interest, Recorder
from tests.runtime.test_reading import IN_ORDER

def stay(*_):
    print("here", flush=True)
    sys.stdin.read()

def read(connection, after, limit):
    found = IN_ORDER(connection, after, limit)
    if found and sys.argv[2] == "read":
        stay()
    if found and sys.argv[2] == "commit":
        event.listen(connection, "commit", stay)
    return found

engine = create_engine(sys.argv[1])
Recorder(engine, "accounts", read, [Interest("everything")]).run()
"""


@pytest.mark.parametrize("where", ["read", "commit"])
def test_a_recorder_killed_before_its_commit_has_recorded_nothing(
    engine: Engine, where: str
) -> None:
    append_to(engine, "account-1", "Opened", "Deposited")
    url = engine.url.render_as_string(hide_password=False)
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, url, where],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        text=True,
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        child.send_signal(signal.SIGKILL)
        child.wait(WAIT)
    recorder = Recorder(engine, GROUP, IN_ORDER, [EVERYTHING], **FAST)
    assert versions(engine, "everything") == {}
    assert recorder.drain() == 2
    assert versions(engine, "everything") == expected(engine)


def test_whichever_statement_its_connection_ends_at_nothing_is_lost(engine: Engine) -> None:
    append_to(engine, "account-1", "Opened", "Deposited")
    for statement in range(30):
        group, interests = f"group-{statement}", [Interest(f"subscription-{statement}")]
        left = statement
        with disposed(create_engine(engine.url)) as own:

            def end(connection: Connection, *_: Any) -> None:
                nonlocal left
                left -= 1
                if left == -1:
                    driver: Any = connection.connection.driver_connection
                    terminate(engine, driver.info.backend_pid)

            event.listen(own, "before_cursor_execute", end)
            event.listen(own, "commit", end)
            with suppress(DBAPIError):
                Recorder(own, group, IN_ORDER, interests).run_once()
        Recorder(engine, group, IN_ORDER, interests, **FAST).drain()
        assert versions(engine, interests[0].name) == expected(engine), statement
        if left >= 0:
            break
    assert left >= 0
    assert statement > 8


def test_a_connection_that_ends_while_it_reads_loses_nothing(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    append_to(engine, "account-1", "Opened", "Deposited")
    spy = Spy()
    spy.go_on.clear()
    caplog.set_level(logging.INFO, "checkpoints")
    with running(Recorder(engine, GROUP, spy, [EVERYTHING], **FAST)):
        assert spy.reading.wait(WAIT)
        terminate(engine, spy.pid)
        spy.go_on.set()
        spy.wait_until_idle()
    assert versions(engine, "everything") == expected(engine)
    said = [record.getMessage() for record in caplog.records]
    assert len([message for message in said if "away" in message]) == 1
    assert len([message for message in said if "back" in message]) == 1


def test_one_recorder_works_and_another_takes_over_when_its_connection_ends(
    engine: Engine,
) -> None:
    append_to(engine, "account-1", "Opened", "Deposited")
    holder, standby = Spy(), Spy()
    holder.go_on.clear()
    with running(Recorder(engine, GROUP, holder, [EVERYTHING], **FAST)):
        assert holder.reading.wait(WAIT)
        second = Recorder(engine, GROUP, standby, [EVERYTHING])
        assert second.run_once() == 0
        assert standby.reads == 0
        with engine.connect() as connection:  # the standby holds neither lock nor snapshot
            others = connection.exec_driver_sql(
                "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
                " AND pid <> pg_backend_pid() AND (wait_event_type = 'Lock' OR"
                " state <> 'idle' AND pid <> %(holder)s)",
                {"holder": holder.pid},
            ).scalar_one()
        assert others == 0
        terminate(engine, holder.pid)
        began = time.monotonic()
        assert second.drain() == 2
        assert time.monotonic() - began < 2
        holder.go_on.set()
        append_to(engine, "account-2")
        holder.wait_until_idle()
    assert versions(engine, "everything") == expected(engine)


def test_a_standby_takes_over_from_a_holder_that_was_cut_off(engine: Engine) -> None:
    append_to(engine, "account-1")
    spy = Spy()
    spy.go_on.clear()
    cut_off = Recorder(
        engine, GROUP, spy, [EVERYTHING], idle_timeout=timedelta(milliseconds=100), **FAST
    )
    with running(cut_off):
        assert spy.reading.wait(WAIT)
        assert Recorder(engine, GROUP, IN_ORDER, [EVERYTHING], **FAST).drain() == 1
        spy.go_on.set()
    assert versions(engine, "everything") == expected(engine)


def test_it_locks_on_an_engine_in_autocommit_too(engine: Engine) -> None:
    append_to(engine, "account-1")
    plain = Recorder(engine, GROUP, IN_ORDER, [EVERYTHING])
    tried = []

    def read(connection: Connection, after: Position, limit: int) -> Sequence[Message]:
        tried.append(plain.run_once())
        return IN_ORDER(connection, after, limit)

    autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
    assert Recorder(autocommit, GROUP, read, [EVERYTHING]).drain() == 1
    assert tried == [0, 0]


def test_under_appends_rollbacks_and_lost_connections_each_message_counts_once(
    engine: Engine,
) -> None:
    interests = [EVERYTHING, Interest("deposits", types=["Deposited"])]
    spies = [Spy(), Spy()]
    own = create_engine(engine.url)  # a pool in which all connections are recorders'
    recorders = [Recorder(own, GROUP, spy, interests, batch=7, **FAST) for spy in spies]

    def append_some(seed: int) -> None:
        chance = random.Random(seed)
        with engine.connect() as connection:
            for n in range(80):
                if chance.random() < 0.5:
                    connection.execute(select(func.pg_current_xact_id()))
                types = chance.choices(["Opened", "Deposited"], k=chance.randint(1, 3))
                append(connection, f"account-{seed}-{chance.randint(1, 5)}", *types)
                connection.rollback() if chance.random() < 0.2 else connection.commit()
                if n % 16 == 15:
                    terminate(engine, chance.choice(spies).pid)

    with disposed(own), running(recorders[0]), running(recorders[1]):
        for spy in spies:
            assert spy.reading.wait(WAIT)
        with ThreadPoolExecutor(3) as pool:
            for done in [pool.submit(append_some, seed) for seed in range(3)]:
                done.result(WAIT)
    settle(engine)
    Recorder(engine, GROUP, IN_ORDER, interests).drain()
    assert versions(engine, "everything") == expected(engine)
    assert versions(engine, "deposits") == expected(engine, messages.c.type == "Deposited")
    with engine.connect() as connection:
        assert violations(connection) == []


def test_waits_for_a_database_that_restarts(caplog: pytest.LogCaptureFixture) -> None:
    with start_server(durable=True) as server:
        command.upgrade(alembic_config(server.url()), "head")
        with disposed(create_engine(server.url())) as engine:
            create_messages(engine)
            spy = Spy()
            with running(Recorder(engine, GROUP, spy, [EVERYTHING], **FAST)):
                append_to(engine, "account-1")
                spy.wait_until_idle()
                with caplog.at_level(logging.WARNING, "checkpoints"):
                    server.restart("immediate")
                # What the recorder holds while its pool is disposed of would be closed by nobody.
                with disposed(create_engine(server.url())) as own:
                    append_to(own, "account-1")
                spy.wait_until_idle()
            Recorder(engine, GROUP, IN_ORDER, [EVERYTHING]).drain()
            assert versions(engine, "everything") == {"account-1": (2, 0)}
    assert len([record for record in caplog.records if "away" in record.getMessage()]) == 1


def test_is_woken_and_stopped_at_once_however_long_it_would_sleep(engine: Engine) -> None:
    spy = Spy()
    recorder = Recorder(engine, GROUP, spy, [EVERYTHING], poll_interval=timedelta(hours=1))
    with running(recorder):
        assert spy.idle.wait(WAIT)
        spy.idle.clear()
        append_to(engine, "account-1")
        recorder.notify()
        assert spy.idle.wait(WAIT)
        assert versions(engine, "everything") == {"account-1": (1, 0)}
    recorder.run()  # it was stopped, and stays so
    assert recorder.drain() == 0


def test_looking_for_messages_in_vain_commits_nothing(engine: Engine) -> None:
    recorder = Recorder(engine, GROUP, IN_ORDER, [EVERYTHING])
    recorder.drain()
    committed: list[Connection] = []
    event.listen(engine, "commit", committed.append)
    assert recorder.run_once() == 0
    assert committed == []


def test_says_what_it_recorded_with_the_ids_as_fields(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    append_to(engine, "account-1", "Opened", "Deposited")
    with caplog.at_level(logging.DEBUG, "checkpoints"):
        Recorder(engine, GROUP, IN_ORDER, [EVERYTHING]).drain()
    first, recorded = (vars(record) for record in caplog.records)
    assert (first["group"], first["subscription"]) == (GROUP, "everything")
    assert recorded["msg"] == "recorded %d messages"
    assert (recorded["messages"], recorded["checkpoints"]) == (2, 1)
    assert recorded["global_position"] == 2


def test_works_in_another_schema(database_url: Any) -> None:
    with disposed(create_engine(database_url)) as plain:
        other = plain.execution_options(schema_translate_map={"checkpoints": "other"})
        with other.begin() as connection:
            metadata.create_all(connection)
        create_messages(plain)
        append_to(plain, "account-1")
        Recorder(other, GROUP, IN_ORDER, [EVERYTHING]).drain()
        assert versions(other, "everything") == {"account-1": (1, 0)}


def test_a_subscription_that_was_deleted_is_added_anew(engine: Engine) -> None:
    append_to(engine, "account-1")
    recorder = Recorder(engine, GROUP, IN_ORDER, [EVERYTHING])
    recorder.drain()
    with engine.begin() as connection:
        connection.execute(text("DELETE FROM checkpoints.checkpoints WHERE stream_name ~ '^acc'"))
        connection.execute(text("DELETE FROM checkpoints.subscriptions WHERE name ~ '^every'"))
    Recorder(engine, GROUP, IN_ORDER, [EVERYTHING]).drain()
    assert versions(engine, "everything") == {"account-1": (1, 0)}


@pytest.mark.parametrize(
    ("answer", "error", "named"),
    [
        ([Message(2, "a-1", 2, "T"), Message(1, "a-1", 1, "T")], ValueError, "in the order of"),
        ([Message(1, "a-1", 1, "T"), Message(1, "a-1", 1, "T")], ValueError, "in the order of"),
        ([("a-1", 1)], TypeError, "a sequence of Message, not of"),
    ],
)
def test_an_answer_that_would_lose_messages_ends_it(
    engine: Engine, answer: list[Any], error: type[Exception], named: str
) -> None:
    recorder = Recorder(engine, GROUP, lambda *_: answer, [EVERYTHING])
    with pytest.raises(error, match=named):
        recorder.run()
    assert versions(engine, "everything") == {}


def test_what_read_raises_ends_it_and_records_nothing(engine: Engine) -> None:
    def read(connection: Connection, after: Position, limit: int) -> Sequence[Message]:
        assert after == BEGINNING
        IN_ORDER(connection, after, limit)
        raise LookupError("no such table")

    append_to(engine, "account-1")
    with pytest.raises(LookupError):
        Recorder(engine, GROUP, read, [EVERYTHING]).run()
    assert Recorder(engine, GROUP, IN_ORDER, [EVERYTHING]).drain() == 1


make_recorder: Any = Recorder
make_interest: Any = Interest


async def read_later(*_: Any) -> list[Message]:
    return []


@pytest.mark.parametrize(
    ("make", "error", "named"),
    [
        (
            lambda _: make_recorder("url", GROUP, IN_ORDER, [EVERYTHING]),
            TypeError,
            "engine must be",
        ),
        (
            lambda e: make_recorder(e, "", IN_ORDER, [EVERYTHING]),
            ValueError,
            "group must not be empty",
        ),
        (
            lambda e: make_recorder(e, GROUP, None, [EVERYTHING]),
            TypeError,
            "read must be a function",
        ),
        (lambda e: make_recorder(e, GROUP, read_later, [EVERYTHING]), TypeError, "AsyncRecorder"),
        (lambda e: make_recorder(e, GROUP, IN_ORDER, "name"), TypeError, "an iterable of Interest"),
        (
            lambda e: make_recorder(e, GROUP, IN_ORDER, ["name"]),
            TypeError,
            r"interests\[0\] must be",
        ),
        (lambda e: make_recorder(e, GROUP, IN_ORDER, []), ValueError, "at least one subscription"),
        (
            lambda e: make_recorder(e, GROUP, IN_ORDER, [EVERYTHING, EVERYTHING]),
            ValueError,
            "'everything' is twice",
        ),
        (
            lambda e: make_recorder(e, GROUP, IN_ORDER, [EVERYTHING], batch=0),
            ValueError,
            "batch must be from 1",
        ),
        (
            lambda e: make_recorder(e, GROUP, IN_ORDER, [EVERYTHING], poll_interval=1),
            TypeError,
            "poll_interval must be a timedelta",
        ),
        (lambda _: make_interest(""), ValueError, "name must not be empty"),
        (lambda _: make_interest("$recorder"), ValueError, "the recorder's own"),
        (lambda _: make_interest("a", types="Opened"), TypeError, "types must be an iterable"),
        (
            lambda _: make_interest("a", categories=[]),
            ValueError,
            "categories must name at least one",
        ),
        (lambda _: make_interest("a", matches="Opened"), TypeError, "matches must be a function"),
        (
            lambda _: make_interest("a", start="later"),
            ValueError,
            "start must be one of 'beginning'",
        ),
        (lambda _: make_interest("a", start=Position(0, -1)), ValueError, "start.global_position"),
    ],
)
def test_a_bad_argument_is_named(
    engine: Engine, make: Callable[[Any], Any], error: type[Exception], named: str
) -> None:
    with pytest.raises(error, match=named):
        make(engine)
