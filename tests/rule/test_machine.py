"""Random sequences of all statements and of plain SQL, against a model of the contract.

The model knows nothing of the code: each step foretells the rows that come back and how every
checkpoint then stands. After each step the rule must hold, by the audit and by SQL of our own.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import Any, TypeAlias

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from psycopg.types.json import Jsonb
from sqlalchemy import Connection, Engine, create_engine, text

from checkpoints import (
    CheckpointRecord,
    CheckpointStatus,
    ReplayMode,
    SubscriptionStatus,
    advance_lagging_subscription_checkpoints,
    ensure_checkpoint_exists,
    extend_checkpoint_reservation,
    record_checkpoint_error,
    record_checkpoints,
    recover_expired_checkpoint_reservations,
    release_checkpoint_reservation,
    repair_checkpoints,
    reserve_next_available_checkpoint,
    schedule_checkpoints,
    set_subscription_status,
    skip_checkpoints,
    update_checkpoint_position,
)
from tests.rule.invariants import broken
from tests.support.databases import Databases, disposed
from tests.support.factories import GROUP, add_subscription, violations

ACTIVE, RETRY, FAILED = CheckpointStatus
OTHER_GROUP = "others"
STREAMS = ("account-1", "account-2", "account-3")
HOUR = timedelta(hours=1)


@dataclass(frozen=True)
class Now:
    """Some time during the step, later by a timeout."""

    later: timedelta = timedelta(0)


Time: TypeAlias = datetime | Now | None


@dataclass(frozen=True)
class Checkpoint:
    """The model of one."""

    subscription: int
    stream: str
    version: int = 0
    position: int = 0
    status: CheckpointStatus = ACTIVE
    attempts: int = 0
    errors: tuple[Any, ...] | None = None
    process_at: Time = None
    reserved_until: Time = None

    @property
    def lags(self) -> bool:
        return self.version > self.position

    @property
    def is_ready(self) -> bool:
        return self.process_at is not None and self.reserved_until is None

    def settled(self, before: Checkpoint | None = None) -> Checkpoint:
        """What the contract makes of a row that was written, by whomever."""
        if self.status is FAILED and before is not None and before.status is not FAILED:
            return replace(self, process_at=None)
        if self.status is RETRY or (self.status is ACTIVE and self.lags):
            return self if self.process_at else replace(self, process_at=Now())
        if self.status is ACTIVE and self.reserved_until is None:
            return replace(self, process_at=None)
        return self

    def succeeded(self, **columns: Any) -> Checkpoint:
        """Active, without attempts and errors, not reserved."""
        return replace(self, status=ACTIVE, attempts=0, errors=None, reserved_until=None, **columns)


# Times are told by their year. Past ones are due or expired, whatever the clock says.
past = st.integers(2000, 2020).map(lambda year: datetime(year, 1, 1, tzinfo=UTC))
ahead = st.integers(2080, 2090).map(lambda year: datetime(year, 1, 1, tzinfo=UTC))
times = st.one_of(past, ahead)
maybe_times = st.one_of(st.none(), past, ahead)
versions = st.integers(0, 6)
statuses = st.sampled_from(CheckpointStatus)
errors = st.one_of(st.none(), st.text("ab{}", max_size=3), st.integers(0, 3), st.just({"a": [1]}))
picks = st.integers(0, 11)
mostly = st.sampled_from([True, True, True, False])
columns = st.fixed_dictionaries(
    {},
    optional={
        "version": versions,
        "position": versions,
        "status": statuses,
        "attempts": st.integers(0, 3),
        "errors": st.one_of(st.none(), st.just(("plain",))),
        "process_at": maybe_times,
        "reserved_until": maybe_times,
    },
).filter(bool)
COLUMNS = {
    "subscription": "subscription_id",
    "stream": "stream_name",
    "version": "stream_version",
    "position": "stream_position",
    "status": "status",
    "attempts": "retry_attempts",
    "errors": "retries",
    "process_at": "process_at",
    "reserved_until": "reserved_until",
}


def _parameter(name: str, value: Any) -> Any:
    if name == "errors":
        return None if value is None else Jsonb(list(value))
    return str(value) if name == "status" else value


def _assignments(values: dict[str, Any], prefix: str = "") -> str:
    """`SET` of columns, as psql would."""
    return ", ".join(f"{COLUMNS[name]} = {_mark(name, prefix)}" for name in values)


def _mark(name: str, prefix: str = "") -> str:
    """A parameter of the column's type."""
    kind = {
        "stream": "text",
        "status": "checkpoints.checkpoint_status",
        "errors": "jsonb",
        "process_at": "timestamptz",
        "reserved_until": "timestamptz",
    }.get(name, "bigint")
    return f"CAST(:{prefix}{name} AS {kind})"


def _parameters(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    return {prefix + name: _parameter(name, value) for name, value in values.items()}


@dataclass
class Model:
    """All checkpoints, by id, and the subscriptions' statuses."""

    checkpoints: dict[int, Checkpoint] = field(default_factory=dict)
    subscriptions: dict[int, SubscriptionStatus] = field(default_factory=dict)

    def id_of(self, subscription: int, stream: str) -> int | None:
        for id, checkpoint in self.checkpoints.items():
            if (checkpoint.subscription, checkpoint.stream) == (subscription, stream):
                return id
        return None

    def set(self, id: int, after: Checkpoint) -> None:
        self.checkpoints[id] = after.settled(self.checkpoints.get(id))


def claims(rows: Iterable[list[tuple[Any, int]]], limit: int) -> list[list[Any]]:
    """The times of what may be claimed, of the times and ids that each subscription has.

    Of the subscription that has waited longest, as far as it has more; then of the next. Which of
    two that have waited as long comes first is not said.
    """
    allowed = []
    for order in permutations(sorted(of_one) for of_one in rows):
        oldest = [of_one[0][0] for of_one in order]
        if oldest == sorted(oldest):
            in_order = [row for of_one in order for row in of_one]
            allowed.append(sorted(time for time, _ in in_order[:limit]))
    return allowed


class Machine(RuleBasedStateMachine):
    """One connection, in a transaction that is rolled back at the end."""

    engine: Engine
    ids: tuple[int, ...]
    """Two subscriptions of the group, and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.connection: Connection = self.engine.connect()
        self.model = Model()
        self.stale: datetime = datetime(1999, 1, 1, tzinfo=UTC)
        self.began = self.clock()

    def teardown(self) -> None:
        self.connection.close()

    @initialize(records=st.lists(st.tuples(picks, versions, versions), min_size=1, max_size=4))
    def begin(self, records: list[tuple[int, int, int]]) -> None:
        self.model.subscriptions = dict.fromkeys(self.ids, SubscriptionStatus.ACTIVE)
        self._record(records)

    # Helpers

    def clock(self) -> datetime:
        time: datetime = self.connection.execute(text("SELECT clock_timestamp()")).scalar_one()
        return time

    def sql(self, sql: str, **parameters: Any) -> list[Any]:
        """Plain SQL; its rows, if it returns any."""
        result = self.connection.execute(text(sql), parameters)
        return list(result) if result.returns_rows else []

    def pick(self, pick: int) -> int:
        """One of the checkpoints there are, or an id of none."""
        ids = sorted(self.model.checkpoints)
        return ids[pick % len(ids)] if ids else 1_000_000

    def pick_held(self, pick: int) -> int:
        """Mostly one that is reserved, if there is any."""
        held = [
            id
            for id, checkpoint in sorted(self.model.checkpoints.items())
            if checkpoint.reserved_until is not None
        ]
        return held[pick // 4 % len(held)] if held and pick % 4 else self.pick(pick)

    def key(self, pick: int) -> tuple[int, str]:
        """One of the nine streams that subscriptions may follow."""
        return self.ids[pick % 3], STREAMS[pick // 3 % 3]

    def token(self, id: int, is_right: bool) -> tuple[datetime, bool]:
        """A token, and whether it is that of the checkpoint's reservation."""
        checkpoint = self.model.checkpoints.get(id)
        held = checkpoint.reserved_until if checkpoint else None
        token = held if is_right and isinstance(held, datetime) else self.stale
        return token, token == held

    def has_come(self, time: Time) -> bool:
        return isinstance(time, datetime) and time <= self.began

    def in_group(self, checkpoint: Checkpoint) -> bool:
        return checkpoint.subscription in self.ids[:2]

    @invariant()
    def model_and_database_agree(self) -> None:
        """And what the model knew only roughly, it now knows exactly."""
        now = self.clock()
        rows = self.sql(
            "SELECT main.id, subscription_id, stream_name, stream_version, stream_position,"
            " status::text, retry_attempts, retries, main.process_at, main.reserved_until,"
            " (SELECT process_at FROM checkpoints.checkpoints_ready AS ready"
            "  WHERE ready.id = main.id) AS ready,"
            " (SELECT reserved_until FROM checkpoints.checkpoints_reserved AS reserved"
            "  WHERE reserved.id = main.id) AS reserved"
            " FROM checkpoints.checkpoints AS main ORDER BY id"
        )
        assert [row.id for row in rows] == sorted(self.model.checkpoints)
        for row in rows:
            model = self.model.checkpoints[row.id]
            process_at = self.exact(model.process_at, row.process_at, now)
            reserved_until = self.exact(model.reserved_until, row.reserved_until, now)
            model = replace(model, process_at=process_at, reserved_until=reserved_until)
            self.model.checkpoints[row.id] = model
            assert (
                Checkpoint(
                    row.subscription_id,
                    row.stream_name,
                    row.stream_version,
                    row.stream_position,
                    CheckpointStatus(row.status),
                    row.retry_attempts,
                    None if row.retries is None else tuple(map(_error_of, row.retries)),
                    row.process_at,
                    row.reserved_until,
                )
                == model
            )
            assert row.ready == (process_at if model.is_ready else None)
            assert row.reserved == reserved_until
        self.began = now

    def exact(self, foretold: Time, actual: datetime | None, now: datetime) -> datetime | None:
        if isinstance(foretold, Now):
            assert actual is not None
            assert self.began <= actual - foretold.later <= now
            return actual
        return foretold

    @invariant()
    def rule_holds(self) -> None:
        assert violations(self.connection) == []
        assert broken(self.connection) == []

    # The recorder

    @rule(records=st.lists(st.tuples(picks, versions, versions), max_size=4))
    def record(self, records: list[tuple[int, int, int]]) -> None:
        self._record(records)

    def _record(self, records: list[tuple[int, int, int]]) -> None:
        given = [
            CheckpointRecord(*self.key(pick), max(version, position), min(version, position))
            for pick, version, position in records
        ]
        highest: dict[tuple[int, str], CheckpointRecord] = {}
        for record in given:
            key = (record.subscription_id, record.stream_name)
            best = highest.get(key, record)
            highest[key] = replace(
                record,
                stream_version=max(record.stream_version, best.stream_version),
                stream_position=min(record.stream_position, best.stream_position),
            )
        rows = self.connection.execute(record_checkpoints(given)).all()
        answered = {(row[1], row[2]): row for row in rows}
        assert len(answered) == len(rows)
        for key, record in highest.items():
            id = self.model.id_of(*key)
            row = answered.pop(key, None)
            if id is None:
                assert row is not None
                id = row[0]
                self.model.set(id, Checkpoint(*key, record.stream_version, record.stream_position))
            elif self.model.checkpoints[id].version < record.stream_version:
                before = self.model.checkpoints[id]
                self.model.set(id, replace(before, version=record.stream_version))
            else:
                assert row is None
                continue
            after = self.model.checkpoints[id]
            assert row is not None
            assert tuple(row) == (id, *key, after.version, after.position)
        assert answered == {}

    @rule(subscription=st.integers(0, 2), limit=st.integers(1, 4))
    def advance(self, subscription: int, limit: int) -> None:
        lagging = {
            id
            for id, checkpoint in self.model.checkpoints.items()
            if checkpoint.subscription == self.ids[subscription]
            and checkpoint.lags
            and checkpoint.reserved_until is None
        }
        rows = self.connection.execute(
            advance_lagging_subscription_checkpoints(self.ids[subscription], limit=limit)
        ).all()
        moved = {row[0] for row in rows}
        # Which of them come first is not said.
        assert moved <= lagging
        assert len(moved) == len(rows) == min(limit, len(lagging))
        for id in moved:
            checkpoint = self.model.checkpoints[id]
            self.model.set(id, checkpoint.succeeded(position=checkpoint.version))

    # Consumers

    @rule(
        mode=st.sampled_from([ReplayMode.ALL, ReplayMode.ALL, *ReplayMode]),
        limit=st.integers(1, 3),
        expired=st.booleans(),
    )
    def reserve(self, mode: ReplayMode, limit: int, expired: bool) -> None:
        # The shortest reservation has expired when the next statement runs.
        self._reserve(mode, limit, timedelta(microseconds=1) if expired else HOUR)

    def _reserve(self, mode: ReplayMode, limit: int, timeout: timedelta) -> None:
        served = {
            ReplayMode.ALL: {SubscriptionStatus.ACTIVE, SubscriptionStatus.REPLAY},
            ReplayMode.LIVE: {SubscriptionStatus.ACTIVE},
            ReplayMode.REPLAY: {SubscriptionStatus.REPLAY},
        }[mode]
        due: dict[int, list[tuple[Any, int]]] = {}
        for id, checkpoint in self.model.checkpoints.items():
            if (
                checkpoint.is_ready
                and self.has_come(checkpoint.process_at)
                and self.in_group(checkpoint)
                and self.model.subscriptions[checkpoint.subscription] in served
            ):
                due.setdefault(checkpoint.subscription, []).append((checkpoint.process_at, id))
        allowed = claims(due.values(), limit)
        rows = self.connection.execute(
            reserve_next_available_checkpoint(GROUP, timeout, replay_mode=mode, limit=limit)
        ).all()
        taken = [(self.model.checkpoints[row.id].process_at, row.id) for row in rows]
        assert taken == sorted(taken)
        assert [time for time, _ in taken] in allowed
        assert set(taken) <= {one for rows in due.values() for one in rows}
        for row in rows:
            before = self.model.checkpoints[row.id]
            assert tuple(row)[3:8] == (
                before.stream,
                before.position,
                before.version,
                before.attempts,
                before.status,
            )
            self.model.set(row.id, replace(before, reserved_until=Now(timeout)))

    @rule()
    def reserve_all(self) -> None:
        self._reserve(ReplayMode.ALL, limit=9, timeout=HOUR)

    @rule(pick=picks, is_right=mostly, position=versions, process_at=maybe_times)
    def update(self, pick: int, is_right: bool, position: int, process_at: datetime | None) -> None:
        id = self.pick_held(pick)
        token, is_held = self.token(id, is_right)
        rows = self.connection.execute(
            update_checkpoint_position(id, token, position, process_at=process_at)
        ).all()
        if not is_held:
            assert rows == []
            return
        before = self.model.checkpoints[id]
        after = before.succeeded(position=max(before.position, position), process_at=process_at)
        self.stale = token
        self.model.set(id, after)
        assert [tuple(row) for row in rows] == [(id, after.version, after.position)]

    @rule(
        pick=picks,
        is_right=mostly,
        position=versions,
        attempts=st.integers(0, 3),
        error=errors,
        process_at=maybe_times,
    )
    def record_error(
        self,
        *,
        pick: int,
        is_right: bool,
        position: int,
        attempts: int,
        error: Any,
        process_at: datetime | None,
    ) -> None:
        id = self.pick_held(pick)
        token, is_held = self.token(id, is_right)
        status = RETRY if process_at else FAILED
        rows = self.connection.execute(
            record_checkpoint_error(
                id,
                token,
                position,
                status=status,
                retry_attempts=attempts,
                error=error,
                process_at=process_at,
            )
        ).all()
        if not is_held:
            assert rows == []
            return
        before = self.model.checkpoints[id]
        reached = max(before.position, position)
        self.stale = token
        self.model.set(
            id,
            replace(
                before,
                position=reached,
                status=status,
                attempts=attempts,
                errors=(*(before.errors or ()), (attempts, reached, error)),
                process_at=process_at,
                reserved_until=None,
            ),
        )
        assert [tuple(row) for row in rows] == [(id, status)]

    @rule(pick=picks, is_right=mostly)
    def release(self, pick: int, is_right: bool) -> None:
        id = self.pick_held(pick)
        token, is_held = self.token(id, is_right)
        rows = self.connection.execute(release_checkpoint_reservation(id, token)).all()
        self._released(id, rows, is_held)

    @rule(pick=picks)
    def release_by_operator(self, pick: int) -> None:
        id = self.pick(pick)
        _, is_held = self.token(id, True)
        rows = self.connection.execute(release_checkpoint_reservation(id)).all()
        self._released(id, rows, is_held)

    def _released(self, id: int, rows: Any, is_held: bool) -> None:
        assert [tuple(row) for row in rows] == ([(id,)] if is_held else [])
        if is_held:
            self.stale, _ = self.token(id, True)
            self.model.set(id, replace(self.model.checkpoints[id], reserved_until=None))

    @rule(pick=picks, is_right=mostly)
    def extend(self, pick: int, is_right: bool) -> None:
        id = self.pick_held(pick)
        token, is_held = self.token(id, is_right)
        rows = self.connection.execute(extend_checkpoint_reservation(id, token, HOUR)).all()
        assert [row.id for row in rows] == ([id] if is_held else [])
        if is_held:
            self.stale = token
            before = self.model.checkpoints[id]
            self.model.set(id, replace(before, reserved_until=rows[0].reserved_until))
            assert self.began <= rows[0].reserved_until - HOUR <= self.clock()

    @rule(limit=st.integers(1, 4))
    def recover(self, limit: int) -> None:
        expired: dict[int, list[tuple[Any, int]]] = {}
        for id, checkpoint in self.model.checkpoints.items():
            if self.has_come(checkpoint.reserved_until) and self.in_group(checkpoint):
                row = (checkpoint.reserved_until, id)
                expired.setdefault(checkpoint.subscription, []).append(row)
        rows = self.connection.execute(
            recover_expired_checkpoint_reservations(GROUP, limit=limit)
        ).all()
        ended = sorted((self.model.checkpoints[row[0]].reserved_until, row[0]) for row in rows)
        assert [time for time, _ in ended] in claims(expired.values(), limit)
        for time, id in ended:
            assert isinstance(time, datetime)
            self.stale = time
            self.model.set(id, replace(self.model.checkpoints[id], reserved_until=None))

    # Operators

    @rule(chosen=st.lists(picks, max_size=4))
    def skip(self, chosen: list[int]) -> None:
        ids = {self.pick(pick) for pick in chosen}
        rows = self.connection.execute(skip_checkpoints(sorted(ids, reverse=True))).all()
        skipped = set()
        for id in ids & self.model.checkpoints.keys():
            before = self.model.checkpoints[id]
            if not before.lags and before.status is ACTIVE and before.reserved_until is None:
                continue
            skipped.add(id)
            position = before.position + 1 if before.lags else before.position
            self.model.set(id, before.succeeded(position=position, process_at=None))
        assert sorted(row[0] for row in rows) == sorted(skipped)

    @rule(chosen=st.lists(picks, max_size=4), process_at=times)
    def schedule(self, chosen: list[int], process_at: datetime) -> None:
        ids = {self.pick(pick) for pick in chosen}
        rows = self.connection.execute(schedule_checkpoints(ids, process_at)).all()
        scheduled = {
            id
            for id in ids & self.model.checkpoints.keys()
            if (checkpoint := self.model.checkpoints[id]).reserved_until is None
            and (checkpoint.lags or checkpoint.status is not ACTIVE)
        }
        assert sorted(row[0] for row in rows) == sorted(scheduled)
        for id in scheduled:
            self.model.set(id, replace(self.model.checkpoints[id], process_at=process_at))

    @rule(
        subscription=st.integers(0, 2),
        status=st.sampled_from([SubscriptionStatus.ACTIVE, *SubscriptionStatus]),
    )
    def set_status(self, subscription: int, status: SubscriptionStatus) -> None:
        id = self.ids[subscription]
        rows = self.connection.execute(set_subscription_status(id, status)).all()
        assert [tuple(row) for row in rows] == [(id, status)]
        self.model.subscriptions[id] = status

    @rule(pick=picks, version=versions, position=versions)
    def ensure(self, pick: int, version: int, position: int) -> None:
        key = self.key(pick)
        version, position = max(version, position), min(version, position)
        row = self.connection.execute(ensure_checkpoint_exists(*key, version, position)).one()
        id = self.model.id_of(*key)
        if id is None:
            id = row[0]
            self.model.set(id, Checkpoint(*key, version, position))
        after = self.model.checkpoints[id]
        assert tuple(row) == (id, after.version, after.position)

    @rule()
    def repair(self) -> None:
        assert self.connection.execute(repair_checkpoints()).all() == []

    @precondition(lambda self: self.model.checkpoints)
    @rule(table=st.sampled_from(["checkpoints_ready", "checkpoints_reserved"]))
    def break_and_repair(self, table: str) -> None:
        gone = self.sql(f"DELETE FROM checkpoints.{table} RETURNING id")
        rows = self.connection.execute(repair_checkpoints()).all()
        assert sorted(row[0] for row in rows) == sorted(row[0] for row in gone)

    # Plain SQL on the main table

    def _insertable(self, pick: int, values: dict[str, Any]) -> dict[str, Any]:
        subscription, stream = self.key(pick)
        return {"subscription": subscription, "stream": stream, **values}

    @rule(pick=picks, values=columns)
    def plain_insert(self, pick: int, values: dict[str, Any]) -> None:
        values = self._insertable(pick, values)
        if self.model.id_of(*self.key(pick)) is not None:
            return
        names = ", ".join(COLUMNS[name] for name in values)
        marks = ", ".join(map(_mark, values))
        ((id,),) = self.sql(
            f"INSERT INTO checkpoints.checkpoints ({names}) VALUES ({marks}) RETURNING id",
            **_parameters(values),
        )
        self.model.set(id, Checkpoint(**values))

    @rule(pick=picks, values=columns, moved_to=st.one_of(st.none(), st.none(), picks))
    def plain_update(self, pick: int, values: dict[str, Any], moved_to: int | None) -> None:
        id = self.pick(pick)
        if moved_to is not None and self.model.id_of(*self.key(moved_to)) is None:
            values = self._insertable(moved_to, values)
        self.sql(
            f"UPDATE checkpoints.checkpoints SET {_assignments(values)} WHERE id = :id",
            id=id,
            **_parameters(values),
        )
        self._changed([id], values)

    @rule(values=columns, subscription=st.integers(0, 2))
    def plain_update_of_many(self, values: dict[str, Any], subscription: int) -> None:
        self.sql(
            f"UPDATE checkpoints.checkpoints SET {_assignments(values)}"
            " WHERE subscription_id = :of",
            of=self.ids[subscription],
            **_parameters(values),
        )
        self._changed(
            [
                id
                for id, checkpoint in self.model.checkpoints.items()
                if checkpoint.subscription == self.ids[subscription]
            ],
            values,
        )

    def _changed(self, ids: list[int], values: dict[str, Any]) -> None:
        for id in ids:
            if id in self.model.checkpoints:
                self.model.set(id, replace(self.model.checkpoints[id], **values))

    @rule(pick=picks, many=st.booleans())
    def plain_delete(self, pick: int, many: bool) -> None:
        id = self.pick(pick)
        self.sql(f"DELETE FROM checkpoints.checkpoints WHERE id {'<=' if many else '='} :id", id=id)
        for there in list(self.model.checkpoints):
            if there == id or (many and there < id):
                del self.model.checkpoints[there]

    @rule(pick=picks, values=columns, change=columns)
    def plain_upsert(self, pick: int, values: dict[str, Any], change: dict[str, Any]) -> None:
        values = self._insertable(pick, values)
        names = ", ".join(COLUMNS[name] for name in values)
        marks = ", ".join(map(_mark, values))
        ((id,),) = self.sql(
            f"INSERT INTO checkpoints.checkpoints ({names}) VALUES ({marks})"
            " ON CONFLICT (subscription_id, stream_name)"
            f" DO UPDATE SET {_assignments(change, 'new_')} RETURNING id",
            **_parameters(values),
            **_parameters(change, "new_"),
        )
        if id in self.model.checkpoints:
            self._changed([id], change)
        else:
            self.model.set(id, Checkpoint(**values))

    @rule(chosen=st.lists(picks, min_size=1, max_size=4, unique=True), change=columns)
    def plain_merge(self, chosen: list[int], change: dict[str, Any]) -> None:
        """What lags is deleted, what does not is changed, what is not there is inserted."""
        keys = sorted({self.key(pick) for pick in chosen})
        self.sql(
            "MERGE INTO checkpoints.checkpoints AS main"
            " USING unnest(CAST(:subscriptions AS bigint[]), CAST(:streams AS text[]))"
            " AS given (subscription, stream)"
            " ON main.subscription_id = given.subscription AND main.stream_name = given.stream"
            " WHEN MATCHED AND main.lagging THEN DELETE"
            f" WHEN MATCHED THEN UPDATE SET {_assignments(change)}"
            " WHEN NOT MATCHED THEN INSERT (subscription_id, stream_name, stream_version)"
            " VALUES (given.subscription, given.stream, 2)",
            subscriptions=[subscription for subscription, _ in keys],
            streams=[stream for _, stream in keys],
            **_parameters(change),
        )
        for key in keys:
            id = self.model.id_of(*key)
            if id is None:
                ((id,),) = self.sql(
                    "SELECT id FROM checkpoints.checkpoints"
                    " WHERE subscription_id = :subscription AND stream_name = :stream",
                    subscription=key[0],
                    stream=key[1],
                )
                self.model.set(id, Checkpoint(*key, version=2))
            elif self.model.checkpoints[id].lags:
                del self.model.checkpoints[id]
            else:
                self._changed([id], change)

    @rule(
        chosen=st.lists(picks, min_size=1, max_size=3, unique=True),
        version=versions,
        status=statuses,
        process_at=maybe_times,
        reserved_until=maybe_times,
    )
    def plain_copy(
        self,
        chosen: list[int],
        version: int,
        status: CheckpointStatus,
        process_at: datetime | None,
        reserved_until: datetime | None,
    ) -> None:
        keys = {key for pick in chosen if self.model.id_of(*(key := self.key(pick))) is None}
        driver: Any = self.connection.connection.driver_connection
        with (
            driver.cursor() as cursor,
            cursor.copy(
                "COPY checkpoints.checkpoints"
                " (subscription_id, stream_name, stream_version, status, process_at,"
                " reserved_until) FROM STDIN"
            ) as copy,
        ):
            for key in sorted(keys):
                copy.write_row((*key, version, str(status), process_at, reserved_until))
        for key in keys:
            ((id,),) = self.sql(
                "SELECT id FROM checkpoints.checkpoints"
                " WHERE subscription_id = :subscription AND stream_name = :stream",
                subscription=key[0],
                stream=key[1],
            )
            self.model.set(
                id,
                Checkpoint(
                    *key,
                    version=version,
                    status=status,
                    process_at=process_at,
                    reserved_until=reserved_until,
                ),
            )


def _error_of(entry: Any) -> Any:
    """An error as the model has it: without its time, which the consumer's tests look at."""
    if isinstance(entry, dict):
        assert entry.keys() == {"attempt", "stream_position", "recorded_at", "error"}
        return entry["attempt"], entry["stream_position"], entry["error"]
    return entry


@pytest.fixture(scope="module")
def machine(databases: Databases) -> Iterator[type[Machine]]:
    url = databases.create_migrated()
    with disposed(create_engine(url)) as engine:
        with engine.begin() as connection:
            ids = (
                add_subscription(connection, "balances"),
                add_subscription(connection, "mails"),
                add_subscription(connection, "balances", group=OTHER_GROUP),
            )
        yield type("BoundMachine", (Machine,), {"engine": engine, "ids": ids})
    databases.drop(url)


def test_every_sequence_keeps_the_contract(machine: type[Machine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=int(os.environ.get("CHECKPOINTS_TEST_EXAMPLES", "120")),
            stateful_step_count=30,
            deadline=None,
            database=None,
            print_blob=True,
            # The same sequences on every run of the automation; new ones at home.
            derandomize=bool(os.environ.get("CI")),
            suppress_health_check=list(HealthCheck),
            # Shrinking a failure of a database takes minutes; the steps are told anyway.
            phases=[Phase.explicit, Phase.generate],
        ),
    )
