"""What a recorder does in a transaction, the same for the blocking and the asyncio one.

Each subscription has a cursor of its own, kept as checkpoints of a subscription that the group
reserves for it, `$recorder`, whose status keeps it from consumers:

- `$global`: locked while a recorder is at work; the furthest global position of all.
- `$global-<subscription id>` and `$global-<subscription id>-transaction`: the two numbers of the
  cursor. Version and position are equal, so that none of them ever becomes ready.

A cursor of its own for each, and not one for the group, so that a subscription added later catches
up by itself, and so that a recorder of an older deployment, which does not know of a subscription,
cannot pass over its messages. Subscriptions at the same cursor, nearly always all of them, are read
for together.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from enum import StrEnum
from functools import cache
from typing import Any

from sqlalchemy import BigInteger, Connection, Select, Text, any_, column, func, select
from sqlalchemy.dialects.postgresql import insert

from checkpoints import _arguments as arguments
from checkpoints.executing import Checkpoints
from checkpoints.records import CheckpointRecord, SubscriptionStatus
from checkpoints.runtime.reading import BEGINNING, Message, Position
from checkpoints.runtime.settings import jittered
from checkpoints.runtime.telemetry import logger
from checkpoints.statements import _template as template
from checkpoints.tables import checkpoints

__all__ = ["RESERVED_SUBSCRIPTION", "Interest", "RecorderSettings", "Start"]

RESERVED_SUBSCRIPTION = "$recorder"
_GLOBAL = "$global"
_LONGEST_MILLISECONDS = 2**31 - 1
_FIRST_LOOK = timedelta(milliseconds=20)

# Of the connection, whatever the engine's: in autocommit there would be no lock, and where one
# snapshot serves the whole transaction, needless conflicts.
OPTIONS: dict[str, Any] = {"isolation_level": "READ COMMITTED"}


class Start(StrEnum):
    """Which messages a subscription is to process that a recorder meets for the first time."""

    BEGINNING = "beginning"
    """All that there are."""
    NOW = "now"
    """Those to come."""


@dataclass(frozen=True, slots=True)
class Interest:
    """What a subscription follows: messages of these categories, of these types, that match.

    None: any. A checkpoint's version rises to the last message that is followed; what a consumer
    finds between position and version may hold others too, for it reads the stream itself.

    `start` is where a recorder begins that meets the subscription for the first time; a `Position`
    is where another recorder left off. Leave it as it is afterwards: from any start but the
    beginning, the checkpoint of a stream that is new stands before the first message recorded.

    A subscription that does not exist is added, and an uninitialized one that is met for the first
    time becomes active. Other filters, given later, count for the messages from then on.
    """

    name: str
    categories: Iterable[str] | None = None
    types: Iterable[str] | None = None
    matches: Callable[[Message], bool] | None = None
    start: Start | Position = Start.BEGINNING

    def __post_init__(self) -> None:
        arguments.name("name", self.name)
        if self.name == RESERVED_SUBSCRIPTION:
            raise ValueError(f"name must not be {self.name!r}, which is the recorder's own")
        for argument in ("categories", "types"):
            given = getattr(self, argument)
            if given is not None:
                names = frozenset(arguments.names(argument, given))
                if not names:
                    raise ValueError(
                        f"{argument} must name at least one, or be None for any (subscription "
                        f"{self.name!r})"
                    )
                object.__setattr__(self, argument, names)
        if self.matches is not None and not callable(self.matches):
            raise TypeError(f"matches must be a function of a message, not {self.matches!r}")
        if isinstance(self.start, Position):
            arguments.position("start.transaction_id", self.start.transaction_id)
            arguments.position("start.global_position", self.start.global_position)
        else:
            object.__setattr__(self, "start", arguments.member("start", self.start, Start))

    def follows(self, message: Message) -> bool:
        """Whether the subscription processes this message."""
        return (
            (self.categories is None or message.category in self.categories)
            and (self.types is None or message.type in self.types)
            and (self.matches is None or self.matches(message))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RecorderSettings:
    """How a recorder works; each but `interests` and `read` is a keyword of `Recorder`.

    - `batch`: how many messages are read at once and recorded in one transaction.
    - `poll_interval`: how often it looks for messages that `notify()` did not tell of, and whether
      another recorder has left off; more often at first after it was told or found some.
    - `idle_timeout`: how long its transaction may stand idle, as when its machine was cut off,
      before the server ends it and another recorder can go on. `read` must ask the database
      something more often than that.
    """

    group: str
    interests: tuple[Interest, ...]
    read: Callable[..., Any]
    batch: int = 1000
    poll_interval: timedelta = timedelta(milliseconds=500)
    idle_timeout: timedelta = timedelta(seconds=30)

    def __post_init__(self) -> None:
        arguments.name("group", self.group)
        _check_interests(self.interests)
        if not callable(self.read):
            raise TypeError(
                "read must be a function of (connection, position, limit) that answers a sequence "
                f"of Message, such as a MessageTable, not {self.read!r}"
            )
        arguments.limit("batch", self.batch)
        arguments.timeout("poll_interval", self.poll_interval)
        arguments.timeout("idle_timeout", self.idle_timeout)

    @property
    def idle_milliseconds(self) -> str:
        """The idle timeout as the server's setting; 0 would be none."""
        given = self.idle_timeout // timedelta(milliseconds=1)
        return str(min(max(given, 1), _LONGEST_MILLISECONDS))

    def idle_seconds(self, in_vain: int) -> float:
        """How long to sleep after so many looks in vain since it was told of, or found, messages.

        Not the whole interval at once: what it was told of may be held back for a moment by an
        older transaction.
        """
        doubled = _FIRST_LOOK * 2 ** min(in_vain, 16)
        return jittered(min(self.poll_interval, doubled))

    @property
    def awaits(self) -> bool:
        """Whether `read` is a coroutine function."""
        return inspect.iscoroutinefunction(self.read) or inspect.iscoroutinefunction(
            getattr(self.read, "__call__", None)  # noqa: B004  # an object with an async __call__
        )


def listed_interests(interests: object) -> tuple[Interest, ...]:
    """The interests as they were given, one or many."""
    if isinstance(interests, str | bytes) or not isinstance(interests, Iterable):
        raise TypeError(f"interests must be an iterable of Interest, not {interests!r}")
    return tuple(interests)


def _check_interests(interests: Sequence[object]) -> None:
    if not interests:
        raise ValueError("interests must name at least one subscription, not ()")
    names = set()
    for index, interest in enumerate(interests):
        if not isinstance(interest, Interest):
            raise TypeError(f"interests[{index}] must be an Interest, not {interest!r}")
        if interest.name in names:
            raise ValueError(f"interests must name a subscription once: {interest.name!r} is twice")
        names.add(interest.name)


@dataclass(frozen=True, slots=True)
class Followed:
    """A subscription of the recorder, and what it follows."""

    id: int
    interest: Interest


@dataclass(frozen=True, slots=True)
class Cohort:
    """Subscriptions that have read equally far, and how far those before them have (None: none)."""

    after: Position
    followed: Sequence[Followed]
    until: Position | None


@dataclass(frozen=True, slots=True)
class Group:
    """The recorder's own subscription, and those that it records for."""

    recorder_id: int
    followed: Sequence[Followed]


def join(connection: Connection, settings: RecorderSettings) -> Group:
    """Add what is missing of subscriptions and the row that is locked."""
    toolkit = Checkpoints(connection)
    recorder = toolkit.add_or_update_subscription(settings.group, RESERVED_SUBSCRIPTION)
    toolkit.ensure_checkpoint_exists(recorder.id, _GLOBAL)
    return Group(
        recorder.id,
        [
            Followed(toolkit.add_or_update_subscription(settings.group, interest.name).id, interest)
            for interest in settings.interests
        ],
    )


@dataclass(slots=True)
class Turn:
    """What a recorder may do in a transaction: it holds the lock, so the cursors are its own."""

    settings: RecorderSettings
    group: Group
    cursors: dict[int, Position]
    moved: dict[int, Position] = field(default_factory=dict)
    recorded: int = 0
    news: list[tuple[str, dict[str, object]]] = field(default_factory=list)

    @property
    def head(self) -> Position:
        """The furthest of the cursors."""
        return max(self.cursors.values(), default=BEGINNING)

    @property
    def newcomers(self) -> list[Followed]:
        """Subscriptions that have no cursor yet."""
        return [followed for followed in self.group.followed if followed.id not in self.cursors]

    @property
    def needs_end(self) -> bool:
        """Whether a newcomer starts at the end of what there is."""
        return any(followed.interest.start == Start.NOW for followed in self.newcomers)

    def admit(self, connection: Connection, end: Position | None) -> None:
        """Give newcomers a cursor, and make active those that nobody has made anything else."""
        toolkit = Checkpoints(connection)
        for followed in self.newcomers:
            start = followed.interest.start
            if start == Start.NOW:
                if end is None:
                    raise ValueError("a newcomer that starts now needs the end")
                start = end
            first = start if isinstance(start, Position) else BEGINNING
            self._move([followed], first)
            name = followed.interest.name
            found = toolkit.get_subscription(self.settings.group, name)
            if found is not None and found.status is SubscriptionStatus.UNINITIALIZED:
                toolkit.set_subscription_status(followed.id, SubscriptionStatus.ACTIVE)
            fields = {"subscription": name, "subscription_id": followed.id, **_place(first)}
            self.news.append(("a subscription is recorded for the first time", fields))

    def cohorts(self, turns: int) -> Iterator[Cohort]:
        """The subscriptions by cursor, the furthest first, rotated by how many turns there were."""
        by_cursor: dict[Position, list[Followed]] = {}
        for followed in self.group.followed:
            by_cursor.setdefault(self.cursors[followed.id], []).append(followed)
        ordered = sorted(by_cursor, reverse=True)
        made = [
            Cohort(after, by_cursor[after], ordered[rank - 1] if rank else None)
            for rank, after in enumerate(ordered)
        ]
        first = turns % len(made)
        yield from made[first:] + made[:first]

    def take(self, connection: Connection, cohort: Cohort, messages: Sequence[Message]) -> int:
        """Record messages for a cohort and move its cursor; how many messages it passed."""
        given = in_order(messages, cohort.after)
        checked, cursor = given, given[-1].position if given else cohort.after
        if cohort.until is not None:
            until = cohort.until
            checked = [message for message in given if message.position <= until]
            # What those before it have passed is final: nothing more comes up to there.
            if not checked or len(checked) < len(given):
                cursor = until
            if cursor == until:
                names = [followed.interest.name for followed in cohort.followed]
                self.news.append(
                    ("subscriptions caught up", {"subscriptions": names, **_place(until)})
                )
        records = _records(checked, cohort.followed)
        if records:
            Checkpoints(connection).record_checkpoints(records)
            self.recorded += len(records)
        if cursor != cohort.after:
            self._move(cohort.followed, cursor)
        return len(checked)

    def finish(self, connection: Connection) -> bool:
        """Note the cursors that moved; False: nothing was written, and the lock is all there is."""
        if not self.moved:
            return False
        numbers = {_GLOBAL: self.head.global_position}
        for id, cursor in self.moved.items():
            numbers[f"{_GLOBAL}-{id}"] = cursor.global_position
            numbers[f"{_GLOBAL}-{id}-transaction"] = cursor.transaction_id
        connection.execute(
            _note().params(
                note_subscription_id=self.group.recorder_id,
                note_stream_names=list(numbers),
                note_numbers=list(numbers.values()),
            )
        )
        return True

    def told(self, messages: int) -> None:
        """Say what was committed."""
        group = {"group": self.settings.group}
        for what, fields in self.news:
            logger.info(what, extra={**group, **fields})
        logger.debug(
            "recorded %d messages",
            messages,
            extra={
                **group,
                "messages": messages,
                "checkpoints": self.recorded,
                **_place(self.head),
            },
        )

    def _move(self, followed: Iterable[Followed], cursor: Position) -> None:
        for each in followed:
            self.cursors[each.id] = self.moved[each.id] = cursor


def begin_turn(connection: Connection, settings: RecorderSettings, group: Group) -> Turn | None:
    """Lock the group's global position and read the cursors; None: another recorder has it locked.

    It does not wait for the lock. A recorder that did would take a snapshot and hold it, and would
    queue for a lock that is free again after each batch.
    """
    locked = connection.execute(
        _take().params(
            take_subscription_id=group.recorder_id,
            take_idle_timeout=settings.idle_milliseconds,
        )
    ).all()
    if not locked:
        return None
    # A statement of its own: the one that locks sees the other rows as they were when it began.
    ids = [followed.id for followed in group.followed]
    names = [f"{_GLOBAL}-{id}{suffix}" for id in ids for suffix in ("", "-transaction")]
    found: dict[str, int] = {}
    for name, number in connection.execute(
        _numbers().params(numbers_subscription_id=group.recorder_id, numbers_stream_names=names)
    ):
        found[name] = number
    return Turn(
        settings,
        group,
        {
            id: Position(found.get(f"{_GLOBAL}-{id}-transaction", 0), found[f"{_GLOBAL}-{id}"])
            for id in ids
            if f"{_GLOBAL}-{id}" in found
        },
    )


def _place(position: Position) -> dict[str, object]:
    """A position, as fields of a log record."""
    return {
        "global_position": position.global_position,
        "transaction_id": position.transaction_id,
    }


def in_order(messages: Iterable[Message], after: Position) -> list[Message]:
    """The messages, each after the one before it: else the cursor would pass over some."""
    last = after
    given = list(messages)
    for message in given:
        if not isinstance(message, Message):
            raise TypeError(f"read must answer a sequence of Message, not of {message!r}")
        if message.position <= last:
            raise ValueError(
                f"read must answer messages in the order of their positions, and only those after "
                f"{tuple(after)!r}: {tuple(message.position)!r} came after {tuple(last)!r}"
            )
        last = message.position
    return given


def _records(messages: Sequence[Message], followed: Iterable[Followed]) -> list[CheckpointRecord]:
    """The highest version of each stream, and the position to start at where it is new."""
    records = []
    for each in followed:
        interest = each.interest
        from_start = interest.start in (Start.BEGINNING, BEGINNING)
        first: dict[str, int] = {}
        highest: dict[str, int] = {}
        for message in messages:
            if interest.follows(message):
                stream = message.stream_name
                version = message.stream_position
                first[stream] = min(first.get(stream, version), version)
                highest[stream] = max(highest.get(stream, version), version)
        records += [
            CheckpointRecord(each.id, stream, version, 0 if from_start else first[stream] - 1)
            for stream, version in highest.items()
        ]
    return records


@cache
def _take() -> Select[int, str]:
    """Lock the group's global position unless it is locked, and bound how long that can last."""
    return (
        select(
            checkpoints.c.id,
            func.set_config(
                template.word("idle_in_transaction_session_timeout"),
                template.string("take_idle_timeout"),
                True,
                type_=Text(),
            ).label("idle_timeout"),
        )
        .where(
            checkpoints.c.subscription_id == template.bigint("take_subscription_id"),
            checkpoints.c.stream_name == template.word(_GLOBAL),
        )
        .with_for_update(of=checkpoints, key_share=True, skip_locked=True)
    )


@cache
def _numbers() -> Select[str, int]:
    """The numbers that are kept as checkpoints of a subscription."""
    return select(checkpoints.c.stream_name, checkpoints.c.stream_version).where(
        checkpoints.c.subscription_id == template.bigint("numbers_subscription_id"),
        checkpoints.c.stream_name == any_(template.strings("numbers_stream_names")),
    )


@cache
def _note() -> Select[int]:
    """Note numbers: unlike versions, they may fall, for the order is not that of either number."""
    given = (
        func.unnest(template.strings("note_stream_names"), template.bigints("note_numbers"))
        .table_valued(column("stream_name", Text), column("number", BigInteger))
        .render_derived(name="given")
    )
    insertion = insert(checkpoints).from_select(
        ["subscription_id", "stream_name", "stream_version", "stream_position"],
        select(
            template.bigint("note_subscription_id"),
            given.c.stream_name,
            given.c.number,
            given.c.number,
        ).order_by(given.c.stream_name),
    )
    noted = (
        insertion.on_conflict_do_update(
            index_elements=[checkpoints.c.subscription_id, checkpoints.c.stream_name],
            set_={
                "stream_version": insertion.excluded.stream_version,
                "stream_position": insertion.excluded.stream_position,
            },
            where=checkpoints.c.stream_version != insertion.excluded.stream_version,
        )
        .returning(checkpoints.c.id)
        .cte("noted")
    )
    return select(noted.c.id)
