"""The executing layer: the same verbs, typed records, errors with a meaning, never a commit."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace
from typing import Any

import pytest
from sqlalchemy import URL, Connection, Engine, create_engine, delete
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from alembic import command
from checkpoints import (
    AsyncCheckpoints,
    CheckpointPosition,
    CheckpointRecord,
    Checkpoints,
    CheckpointStatus,
    CheckpointViolation,
    Reservation,
    ReservationLost,
    SchemaNotMigrated,
    Subscription,
    SubscriptionExists,
    SubscriptionRunning,
    SubscriptionStatus,
    UnknownSubscription,
    _calls,
    alembic_config,
    records,
    statements,
)
from checkpoints.executing import translated
from checkpoints.tables import subscriptions
from tests.support.factories import (
    GROUP,
    LONG_AGO,
    MINUTE,
    add_checkpoint,
    add_subscription,
    state,
)
from tests.support.samples import SAMPLES, TOKEN

VERBS = sorted(name for name in statements.__all__ if name.islower())
LOST = Reservation(1, 1, "s", "a", 0, 3, 0, CheckpointStatus.ACTIVE, None, TOKEN, TOKEN)


@pytest.fixture
def subscription(connection: Connection) -> int:
    return add_subscription(connection)


@pytest.mark.parametrize("layer", [Checkpoints, AsyncCheckpoints])
def test_has_every_verb_with_a_docstring_and_a_signature(layer: type) -> None:
    methods = {name: method for name, method in vars(layer).items() if name[0] != "_"}
    assert sorted(methods) == VERBS
    for name, method in methods.items():
        assert method.__doc__
        own = list(inspect.signature(method).parameters)[1:]
        assert own == list(inspect.signature(getattr(_calls, name)).parameters)


@pytest.mark.parametrize(
    ("statement", "record"),
    [
        ("record_checkpoints", records.RecordedCheckpoint),
        ("reserve_next_available_checkpoint", records.Reservation),
        ("record_expired_checkpoint_reservations", records.ExpiredReservation),
        ("update_checkpoint_position", records.CheckpointPosition),
        ("ensure_checkpoint_exists", records.CheckpointPosition),
        ("list_reservations", records.ListedReservation),
        ("list_lagging", records.ListedCheckpoint),
        ("list_retries", records.ListedCheckpoint),
        ("list_failed", records.ListedCheckpoint),
        ("get_checkpoint", records.CheckpointDetail),
        ("get_metrics", records.SubscriptionMetrics),
        ("get_subscription", records.Subscription),
        ("add_or_update_subscription", records.Subscription),
        ("lock_checkpoint", records.LockedCheckpoint),
        ("audit_checkpoints", records.CheckpointViolation),
    ],
)
def test_records_have_the_columns_of_their_statement(statement: str, record: type) -> None:
    assert [field.name for field in fields(record)] == SAMPLES[statement].selected_columns.keys()


def whole_life(checkpoints: Checkpoints) -> None:  # noqa: PLR0915  # one story
    """Every verb once, in an order that makes sense."""
    subscription = checkpoints.add_or_update_subscription(GROUP, "balances")
    assert subscription.status is SubscriptionStatus.UNINITIALIZED
    checkpoints.set_subscription_status(subscription.id, SubscriptionStatus.ACTIVE)
    found = checkpoints.get_subscription(GROUP, "balances")
    assert found == replace(subscription, status=SubscriptionStatus.ACTIVE)
    assert checkpoints.get_subscription(GROUP, "none") is None

    ensured = checkpoints.ensure_checkpoint_exists(subscription.id, "$global")
    assert ensured == CheckpointPosition(ensured.id, 0, 0)
    locked = checkpoints.lock_checkpoint(subscription.id, "$global")
    assert locked is not None
    assert (locked.id, locked.status) == (ensured.id, CheckpointStatus.ACTIVE)
    assert checkpoints.lock_checkpoint(subscription.id, "none") is None

    recorded = checkpoints.record_checkpoints(
        CheckpointRecord(subscription.id, name, 3) for name in ("account-1", "account-2")
    )
    assert [record.stream_name for record in recorded] == ["account-1", "account-2"]
    reservations = checkpoints.reserve_next_available_checkpoint(GROUP, MINUTE, limit=9)
    first, second = sorted(reservations, key=lambda reservation: reservation.stream_name)
    assert [row.id for row in checkpoints.list_reservations()] == [first.id, second.id]

    extended = checkpoints.extend_checkpoint_reservation(first, MINUTE * 2)
    assert extended.reserved_until > first.reserved_until
    assert replace(extended, reserved_until=first.reserved_until) == first
    done = checkpoints.update_checkpoint_position(extended, 3)
    assert done == CheckpointPosition(first.id, 3, 3)

    status = checkpoints.record_checkpoint_error(
        second,
        1,
        status=CheckpointStatus.RETRY,
        retry_attempts=1,
        error={"type": "KeyError"},
        process_at=LONG_AGO,
    )
    assert status is CheckpointStatus.RETRY
    (retry,) = checkpoints.list_retries()
    assert (retry.id, retry.lag) == (second.id, 2)
    (again,) = checkpoints.reserve_next_available_checkpoint(GROUP, MINUTE)
    assert checkpoints.release_checkpoint_reservation(again) is True
    (again,) = checkpoints.reserve_next_available_checkpoint(GROUP, MINUTE)
    assert checkpoints.release_checkpoint_reservation(again.id) is True
    assert checkpoints.release_checkpoint_reservation(again.id) is False

    (again,) = checkpoints.reserve_next_available_checkpoint(GROUP, MINUTE)
    status = checkpoints.record_checkpoint_error(
        again, 1, status=CheckpointStatus.FAILED, retry_attempts=2, error="x"
    )
    assert status is CheckpointStatus.FAILED
    assert [row.id for row in checkpoints.list_failed()] == [second.id]
    assert checkpoints.schedule_checkpoints([second.id], LONG_AGO) == [second.id]
    assert checkpoints.skip_checkpoints([second.id]) == [second.id]
    assert [row.id for row in checkpoints.list_lagging()] == [second.id]
    assert checkpoints.advance_lagging_subscription_checkpoints(subscription.id) == 1
    detail = checkpoints.get_checkpoint(second.id)
    assert detail is not None
    assert (detail.stream_position, detail.status) == (3, CheckpointStatus.ACTIVE)
    assert checkpoints.get_checkpoint(2**40) is None
    assert checkpoints.recover_expired_checkpoint_reservations(GROUP) == []
    assert checkpoints.record_expired_checkpoint_reservations(GROUP, max_attempts=5) == []
    assert checkpoints.get_next_process_at(GROUP) is None
    (metrics,) = checkpoints.get_metrics()
    assert (metrics.id, metrics.lag) == (subscription.id, 0)

    with pytest.raises(SubscriptionRunning, match=r"is 'active'.*pause_subscription"):
        checkpoints.reset_subscription_checkpoints(subscription.id)
    assert checkpoints.pause_subscription(subscription.id) is SubscriptionStatus.PAUSED
    assert checkpoints.reset_subscription_checkpoints(
        subscription.id, stream_position=1, limit=9
    ) == ["account-1", "account-2"]
    assert checkpoints.reset_subscription_checkpoints(subscription.id, after="account-1") == [
        "account-2"
    ]
    assert checkpoints.resume_subscription(subscription.id) is SubscriptionStatus.ACTIVE
    checkpoints.replay_subscription(subscription.id, target_position=70)
    assert checkpoints.finish_replay(subscription.id) is False
    (again, last) = checkpoints.reserve_next_available_checkpoint(GROUP, MINUTE, limit=9)
    assert {again.replay_target_position, last.replay_target_position} == {70}
    for reservation in (again, last):
        checkpoints.update_checkpoint_position(reservation, 3)
    assert checkpoints.finish_replay(subscription.id) is True
    checkpoints.rename_subscription(subscription.id, "saldi")
    checkpoints.move_subscription(subscription.id, "reports")
    moved = checkpoints.get_subscription("reports", "saldi")
    assert moved is not None
    assert (moved.id, moved.status) == (subscription.id, SubscriptionStatus.ACTIVE)
    assert moved.replay_target_position is None
    assert checkpoints.delete_subscription(subscription.id) is False
    assert checkpoints.delete_subscription_checkpoints(subscription.id) == 3
    assert checkpoints.delete_subscription(subscription.id) is True

    assert checkpoints.audit_checkpoints() == []
    assert checkpoints.repair_checkpoints() == []


def test_every_verb_on_a_connection(connection: Connection) -> None:
    whole_life(Checkpoints(connection))


def test_every_verb_on_a_session(engine: Engine) -> None:
    with Session(engine) as session:
        whole_life(Checkpoints(session))


class Awaited:
    """A blocking face of `AsyncCheckpoints`, so that one story serves both."""

    def __init__(self, checkpoints: AsyncCheckpoints, run: Callable[[Awaitable[Any]], Any]) -> None:
        self._checkpoints = checkpoints
        self._run = run

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._checkpoints, name)
        return lambda *args, **kwargs: self._run(method(*args, **kwargs))


def test_every_verb_with_asyncio(engine: Engine) -> None:
    async_engine = create_async_engine(engine.url)
    with asyncio.Runner() as runner:

        async def awaiting(awaitable: Awaitable[Any]) -> Any:
            return await awaitable

        def run(awaitable: Awaitable[Any]) -> Any:
            return runner.run(awaiting(awaitable))

        connection = AsyncConnection(async_engine)
        run(connection.start())
        whole_life(Awaited(AsyncCheckpoints(connection), run))  # type: ignore[arg-type]
        run(connection.rollback())
        run(connection.close())
        session = AsyncSession(async_engine)
        whole_life(Awaited(AsyncCheckpoints(session), run))  # type: ignore[arg-type]
        run(session.close())
        run(async_engine.dispose())


def test_never_commits(engine: Engine) -> None:
    with engine.connect() as connection:
        whole_life(Checkpoints(connection))
        connection.rollback()
        assert Checkpoints(connection).get_metrics() == []


def test_repair_says_each_violation(connection: Connection, subscription: int) -> None:
    id = add_checkpoint(connection, subscription)
    connection.exec_driver_sql("DELETE FROM checkpoints.checkpoints_ready")
    expected = [CheckpointViolation(id, "is missing in checkpoints_ready")]
    assert Checkpoints(connection).audit_checkpoints() == expected
    assert Checkpoints(connection).repair_checkpoints() == expected


LOST_VERBS: dict[str, Callable[[Checkpoints], Any]] = {
    "update": lambda c: c.update_checkpoint_position(LOST, 3),
    "error": lambda c: c.record_checkpoint_error(
        LOST, 0, status=CheckpointStatus.FAILED, retry_attempts=1, error="x"
    ),
    "release": lambda c: c.release_checkpoint_reservation(LOST),
    "extend": lambda c: c.extend_checkpoint_reservation(LOST, MINUTE),
}


@pytest.mark.parametrize("verb", LOST_VERBS)
def test_a_token_that_is_gone_is_an_error(connection: Connection, verb: str) -> None:
    with pytest.raises(ReservationLost, match="the reservation of checkpoint 1 until") as raised:
        LOST_VERBS[verb](Checkpoints(connection))
    assert (raised.value.id, raised.value.reserved_until) == (LOST.id, LOST.reserved_until)


def test_a_lost_reservation_rolls_back_what_the_handler_wrote(engine: Engine) -> None:
    with engine.begin() as connection:
        subscription = add_subscription(connection)
        id = add_checkpoint(connection, subscription)
        (held,) = Checkpoints(connection).reserve_next_available_checkpoint(GROUP, MINUTE)
        Checkpoints(connection).release_checkpoint_reservation(id)

    def zombie() -> None:
        with engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE written_by_handler ()")
            Checkpoints(connection).update_checkpoint_position(held, 3)

    with pytest.raises(ReservationLost):
        zombie()
    with engine.connect() as connection:
        assert not engine.dialect.has_table(connection, "written_by_handler")
        assert state(connection, id).position == 0


def test_an_unknown_subscription_is_named_and_nothing_is_recorded(
    connection: Connection, subscription: int
) -> None:
    given = [CheckpointRecord(id, "account-1", 1) for id in (subscription, 987_654)]
    with (
        pytest.raises(UnknownSubscription, match="no subscription with id 987654") as raised,
        connection.begin_nested(),
    ):
        Checkpoints(connection).record_checkpoints(given)
    assert raised.value.subscription_id == 987_654
    assert Checkpoints(connection).list_lagging() == []


def test_an_unknown_subscription_is_named_wherever_one_is_given(connection: Connection) -> None:
    with pytest.raises(UnknownSubscription, match="987654"), connection.begin_nested():
        Checkpoints(connection).ensure_checkpoint_exists(987_654, "account-1")
    with pytest.raises(UnknownSubscription, match="987654"):
        Checkpoints(connection).set_subscription_status(987_654, SubscriptionStatus.ACTIVE)


UNKNOWN_VERBS: dict[str, Callable[[Checkpoints], Any]] = {
    "pause": lambda c: c.pause_subscription(987_654),
    "resume": lambda c: c.resume_subscription(987_654),
    "reset": lambda c: c.reset_subscription_checkpoints(987_654),
    "replay": lambda c: c.replay_subscription(987_654, target_position=1),
    "rename": lambda c: c.rename_subscription(987_654, "balances"),
    "move": lambda c: c.move_subscription(987_654, "reports"),
    "delete": lambda c: c.delete_subscription(987_654),
}


@pytest.mark.parametrize("verb", UNKNOWN_VERBS)
def test_a_subscription_that_is_not_there_is_an_error(connection: Connection, verb: str) -> None:
    with pytest.raises(UnknownSubscription, match="no subscription with id 987654"):
        UNKNOWN_VERBS[verb](Checkpoints(connection))


@pytest.mark.parametrize("name", ["balances", "a, (b)=(c)"])
def test_a_name_that_is_taken_is_an_error(connection: Connection, name: str) -> None:
    taken = Checkpoints(connection).add_or_update_subscription(GROUP, name)
    renamed = add_subscription(connection, "statements")
    moved = add_subscription(connection, name, group="reports")
    calls: list[Callable[[], None]] = [
        lambda: Checkpoints(connection).rename_subscription(renamed, name),
        lambda: Checkpoints(connection).move_subscription(moved, GROUP),
    ]
    for call in calls:
        with pytest.raises(SubscriptionExists) as raised, connection.begin_nested():
            call()
        assert raised.value.name == name
        assert raised.value.subscription_group_id == taken.subscription_group_id
        assert f"a subscription {name!r} already" in str(raised.value)


def test_a_subscription_that_is_referred_to_is_no_unknown_one(
    connection: Connection, subscription: int
) -> None:
    """The same constraint is broken from its other side; an application's DELETE may do that."""
    add_checkpoint(connection, subscription)
    broken = delete(subscriptions).where(subscriptions.c.id == subscription)
    with pytest.raises(IntegrityError) as raised:
        connection.execute(broken)
    assert translated(raised.value) is raised.value


@pytest.mark.parametrize("verb", ["get_metrics", "audit_checkpoints"])
def test_a_schema_that_is_not_migrated_says_so(database_url: URL, verb: str) -> None:
    engine = create_engine(database_url)
    with (
        engine.connect() as connection,
        pytest.raises(SchemaNotMigrated, match="run the migration"),
    ):
        getattr(Checkpoints(connection), verb)()
    with engine.connect() as connection, pytest.raises(SchemaNotMigrated, match="alembic upgrade"):
        Checkpoints(connection).reserve_next_available_checkpoint(GROUP, MINUTE)
    engine.dispose()


def test_a_schema_of_the_revision_before_says_so(database_url: URL) -> None:
    command.upgrade(alembic_config(database_url), "0.22.0")
    engine = create_engine(database_url)
    with (
        engine.connect() as connection,
        pytest.raises(SchemaNotMigrated, match="checkpoints_ready"),
    ):
        Checkpoints(connection).reserve_next_available_checkpoint(GROUP, MINUTE)
    engine.dispose()


def test_other_errors_of_the_driver_pass_unwrapped(connection: Connection) -> None:
    connection.exec_driver_sql(
        "CREATE FUNCTION pg_temp.slow() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(9); RETURN NEW; END $$"
    )
    connection.exec_driver_sql(
        "CREATE TRIGGER slow BEFORE INSERT ON checkpoints.subscription_groups"
        " FOR EACH ROW EXECUTE FUNCTION pg_temp.slow()"
    )
    connection.exec_driver_sql("SET LOCAL statement_timeout = '100ms'")
    with pytest.raises(OperationalError, match="statement timeout"):
        Checkpoints(connection).add_or_update_subscription("new", "s")


@pytest.mark.parametrize("layer", [Checkpoints, AsyncCheckpoints])
@pytest.mark.parametrize(
    "connection", [None, "postgresql://", create_engine("postgresql+psycopg://")]
)
def test_what_is_no_connection_is_refused(layer: Any, connection: object) -> None:
    with pytest.raises(TypeError, match=r"connection must be an? (Async)?Connection or an? "):
        layer(connection)


def test_connections_of_the_other_kind_are_refused(connection: Connection, engine: Engine) -> None:
    with pytest.raises(TypeError, match="connection must be an AsyncConnection"):
        AsyncCheckpoints(connection)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="connection must be a Connection"):
        Checkpoints(AsyncConnection(create_async_engine(engine.url)))  # type: ignore[arg-type]


@pytest.mark.parametrize("verb", ["update", "error", "extend"])
def test_what_is_no_reservation_is_refused(connection: Connection, verb: str) -> None:
    called: dict[str, Callable[[Checkpoints], Any]] = {
        "update": lambda c: c.update_checkpoint_position(7, 3),  # type: ignore[arg-type]
        "error": lambda c: c.record_checkpoint_error(
            7,  # type: ignore[arg-type]
            0,
            status=CheckpointStatus.FAILED,
            retry_attempts=1,
            error="x",
        ),
        "extend": lambda c: c.extend_checkpoint_reservation(7, MINUTE),  # type: ignore[arg-type]
    }
    with pytest.raises(TypeError, match="reservation must be a Reservation, not 7"):
        called[verb](Checkpoints(connection))


def test_one_record_is_not_many(connection: Connection) -> None:
    with pytest.raises(TypeError, match="records must be an iterable of CheckpointRecord"):
        Checkpoints(connection).record_checkpoints(CheckpointRecord(1, "a", 1))  # type: ignore[arg-type]


def test_a_subscription_is_a_record(connection: Connection) -> None:
    made = Checkpoints(connection).add_or_update_subscription("new", "s")
    assert isinstance(made, Subscription)
