"""Two transactions after the same checkpoint: every ordered pair, at every isolation level.

The first executes and stays open, the second begins. What they leave must be what they would leave
one after the other, in either order.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

import pytest
from sqlalchemy import Executable, select

from checkpoints import repair_checkpoints
from checkpoints.tables import checkpoints
from tests.concurrency.operations import (
    ABSENT,
    BROKEN,
    MAKERS,
    NEVER_WAIT,
    OPERATIONS,
    STARTS,
    TOKEN_ENDED,
    TOKEN_GIVEN,
    TOKEN_NAMED,
    Scene,
    Standing,
    arrange,
    standing,
)
from tests.concurrency.stage import (
    ISOLATION_LEVELS,
    READ_COMMITTED,
    SERIALIZABLE,
    Outcome,
    Stage,
)
from tests.rule.invariants import broken
from tests.support.factories import violations

COMMIT = "the first commits"
ROLLBACK = "the first rolls back"
STALE = "the first commits after the second took its snapshot"

# Columns that are neither ids nor times.
TELLING = {
    "record": slice(3, None),
    "reserve": slice(4, 8),
    "ensure": slice(1, None),
    "lock": slice(1, 4),
}

GATED = "the first begins and commits while the second has its snapshot and no lock"

_ids = itertools.count(1_000)


@dataclass(frozen=True)
class Played:
    """What both answered (None: did not take place), and what they left."""

    first: Any
    second: Any
    left: Standing | None


def _told(operation: str, outcome: Outcome) -> Any:
    """What an answer says, without ids and times."""
    if outcome.sqlstate:
        return outcome.sqlstate
    if operation == "repair":
        # One that waited for who mended it tells of what it saw before.
        return None
    columns = TELLING.get(operation)
    return [row[columns] for row in outcome.rows] if columns else len(outcome.rows)


class Theatre:
    """Plays pairs, and knows what one after the other would leave."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage
        self._known: dict[tuple[str, ...], Played] = {}

    def arrange(self, start: str) -> Scene:
        return arrange(self.stage.observer, self.stage.subscription, next(_ids), start)

    def in_turn(self, start: str, *operations: str) -> Played:
        """What operations leave that run one after the other, and what they answer."""
        key = (start, *operations)
        if key not in self._known:
            scene = self.arrange(start)
            told: list[Any] = [None, None]
            for at, operation in enumerate(operations):
                outcome = self.stage.a.execute(OPERATIONS[operation](scene))
                assert self.stage.a.commit() is None
                told[at] = _told(operation, outcome)
            self._known[key] = Played(told[0], told[1], standing(self.stage.observer))
        return self._known[key]

    def does_nothing(self, start: str, operation: str) -> bool:
        """Whether there is nothing to interleave with: it changes, answers and locks nothing."""
        played = self.in_turn(start, operation)
        return not played.first and played.left == self.in_turn(start).left


@pytest.fixture(scope="module")
def theatre(module_stage: Stage) -> Theatre:
    return Theatre(module_stage)


def _starts(first: str, second: str) -> Iterator[str]:
    yield from STARTS
    if first in MAKERS:
        yield ABSENT
    if "repair" in (first, second):
        yield BROKEN


def _endings(level: str) -> tuple[str, ...]:
    # At READ COMMITTED an older snapshot of the transaction means nothing.
    return (COMMIT, ROLLBACK, GATED) if level == READ_COMMITTED else (COMMIT, ROLLBACK, STALE)


@pytest.mark.parametrize("first", OPERATIONS)
@pytest.mark.parametrize("second", OPERATIONS)
@pytest.mark.parametrize("level", ISOLATION_LEVELS)
@pytest.mark.usefixtures("stage")
def test_a_pair_leaves_what_one_after_the_other_would(
    theatre: Theatre, level: str, first: str, second: str
) -> None:
    for start in _starts(first, second):
        if theatre.does_nothing(start, first):
            continue
        for ending in _endings(level):
            try:
                _play(theatre, level=level, first=first, second=second, start=start, ending=ending)
            except AssertionError as error:
                raise AssertionError(
                    f"{first}, then {second}, at {level}, of a checkpoint that is {start}, {ending}"
                ) from error


def _play(
    theatre: Theatre, *, level: str, first: str, second: str, start: str, ending: str
) -> None:
    stage = theatre.stage
    a, b = stage.a, stage.b
    a.isolate(level)
    b.isolate(level)
    scene = theatre.arrange(start)
    before = standing(stage.observer)

    a_outcome, a_failure, b_outcome, b_failure = {
        COMMIT: _overlap,
        ROLLBACK: _overlap,
        STALE: _stale,
        GATED: _gated,
    }[ending](
        stage,
        OPERATIONS[first](scene),
        OPERATIONS[second](scene),
        commits=ending != ROLLBACK,
        may_wait=second not in NEVER_WAIT,
    )
    assert a_outcome.sqlstate is None
    left = standing(stage.observer)

    # Nothing but a serialization failure, and that only where a caller must expect it.
    assert b_outcome.sqlstate in ({None} if level == READ_COMMITTED else {None, "40001"})
    serialized = {None, "40001"} if level == SERIALIZABLE else {None}
    assert b_failure in serialized
    assert a_failure in serialized | {"rolled back"}

    a_took_place = a_failure is None
    b_took_place = b_outcome.sqlstate is None and b_failure is None
    played = Played(
        _told(first, a_outcome) if a_took_place else None,
        _told(second, b_outcome) if b_took_place else None,
        left,
    )
    assert played in _allowed(
        theatre, start, first, second, a_took_place=a_took_place, b_took_place=b_took_place
    )

    repaired = (first == "repair" and a_took_place) or (second == "repair" and b_took_place)
    if start != BROKEN or repaired:
        assert_rule(stage)
    if left is not None and before is not None and "plain_delete" not in (first, second):
        assert left.version >= before.version
        assert left.position >= before.position
    if a_took_place and b_took_place and a_outcome.rows and b_outcome.rows:
        assert not (first in TOKEN_GIVEN and second in TOKEN_GIVEN), "both hold it"
        if start == "held":
            assert not (first in TOKEN_ENDED and second in TOKEN_NAMED), "both ended it"


# Each way answers with what the first said and how its commit failed, and the same of the second.
Ended: TypeAlias = tuple[Outcome, str | None, Outcome, str | None]


def _overlap(
    stage: Stage, first: Executable, second: Executable, *, commits: bool, may_wait: bool
) -> Ended:
    """The first executes, the second begins, and then the first ends."""
    a, b = stage.a, stage.b
    a_outcome = a.execute(first)
    future = b.start(second)
    waits = stage.waits(future, b)
    assert may_wait or not waits
    b_failure = None if waits else b.commit()
    if commits:
        a_failure = a.commit()
    else:
        a.rollback()
        a_failure = "rolled back"
    b_outcome = future.result(timeout=60)
    if waits:
        b_failure = b.commit()
    return a_outcome, a_failure, b_outcome, b_failure


def _stale(
    stage: Stage, first: Executable, second: Executable, *, commits: bool, may_wait: bool
) -> Ended:
    """The first executes and commits, and the second then uses a snapshot from before."""
    assert commits
    a, b = stage.a, stage.b
    b.execute(select(checkpoints.c.id))
    a_outcome = a.execute(first)
    a_failure = a.commit()
    future = b.start(second)
    assert may_wait or not stage.waits(future, b)
    return a_outcome, a_failure, future.result(timeout=60), b.commit()


def _gated(
    stage: Stage, first: Executable, second: Executable, *, commits: bool, may_wait: bool
) -> Ended:
    """The second has its snapshot and has not locked anything when the first begins and commits.

    Between one's snapshot and one's locks there are but microseconds; the gate makes them long.
    """
    assert commits
    a, b = stage.a, stage.b
    stage.shut_gate(b)
    b_future = b.start(second)
    stopped = stage.waits(b_future, b)
    b_failure = None if stopped else b.commit()
    a_future = a.start(first)
    if stage.waits(a_future, a):
        # What inserts or else updates looks at the row when it has locked it.
        assert may_wait
        stage.open_gate()
        b_outcome = b_future.result(timeout=60)
        b_failure = b.commit()
        return a_future.result(timeout=60), a.commit(), b_outcome, b_failure
    a_outcome = a_future.result(timeout=60)
    a_failure = a.commit()
    stage.open_gate()
    b_outcome = b_future.result(timeout=60)
    if stopped:
        b_failure = b.commit()
    return a_outcome, a_failure, b_outcome, b_failure


def _allowed(
    theatre: Theatre,
    start: str,
    first: str,
    second: str,
    *,
    a_took_place: bool,
    b_took_place: bool,
) -> list[Played]:
    """What they may have answered and left."""
    nothing: Any = [] if second == "reserve" else 0
    if a_took_place and b_took_place:
        reverse = theatre.in_turn(start, second, first)
        allowed = [
            theatre.in_turn(start, first, second),
            Played(reverse.second, reverse.first, reverse.left),
        ]
        if second in NEVER_WAIT:
            alone = theatre.in_turn(start, first)
            allowed.append(Played(alone.first, nothing, alone.left))
        return allowed
    if a_took_place:
        return [theatre.in_turn(start, first)]
    unchanged = theatre.in_turn(start).left
    if not b_took_place:
        return [Played(None, None, unchanged)]
    alone = theatre.in_turn(start, second)
    allowed = [Played(None, alone.first, alone.left)]
    if second in NEVER_WAIT:
        allowed.append(Played(None, nothing, unchanged))
    return allowed


def assert_rule(stage: Stage) -> None:
    assert violations(stage.observer) == []
    assert broken(stage.observer) == []


# Start, first, second: whether the second waits, what each answers (in READ COMMITTED, the first
# committing), and then version, position, status, where it is.
OUTCOMES = [
    # The recorder raises the version while a consumer claims or completes.
    ("ready", "record", "reserve", False, 1, 0, (5, 0, "active", "ready")),
    ("ready", "reserve", "record", True, 1, 1, (5, 0, "active", "reserved")),
    ("held", "record", "update", True, 1, 1, (5, 3, "active", "ready")),
    ("held", "update", "record", True, 1, 1, (5, 3, "active", "ready")),
    ("held", "record", "error", True, 1, 1, (5, 1, "retry", "ready")),
    ("held", "give_up", "record", True, 1, 1, (5, 1, "failed", "neither")),
    ("caught up", "record", "record", True, 1, 0, (5, 3, "active", "ready")),
    ("absent", "record", "record", True, 1, 0, (5, 0, "active", "ready")),
    ("absent", "record", "ensure", True, 1, 1, (5, 0, "active", "ready")),
    ("absent", "ensure", "record", True, 1, 1, (5, 0, "active", "ready")),
    # Exactly one ends an expired reservation.
    ("held", "recover", "update", True, 1, 0, (3, 0, "active", "ready")),
    ("held", "update", "recover", False, 1, 0, (3, 3, "active", "neither")),
    ("held", "extend", "recover", False, 1, 0, (3, 0, "active", "reserved")),
    ("held", "recover", "extend", True, 1, 0, (3, 0, "active", "ready")),
    ("held", "recover", "error", True, 1, 0, (3, 0, "active", "ready")),
    ("held", "recover", "recover", False, 1, 0, (3, 0, "active", "ready")),
    ("held", "extend", "update", True, 1, 0, (3, 0, "active", "reserved")),
    ("held", "extend", "extend", True, 1, 0, (3, 0, "active", "reserved")),
    ("held", "release_by_operator", "update", True, 1, 0, (3, 0, "active", "ready")),
    ("held", "update", "release_by_operator", True, 1, 0, (3, 3, "active", "neither")),
    # An operator skips while a consumer works.
    ("held", "skip", "update", True, 1, 0, (3, 1, "active", "ready")),
    ("held", "update", "skip", True, 1, 0, (3, 3, "active", "neither")),
    ("held", "error", "skip", True, 1, 1, (3, 2, "active", "ready")),
    ("held", "skip", "error", True, 1, 0, (3, 1, "active", "ready")),
    ("ready", "skip", "skip", True, 1, 1, (3, 2, "active", "ready")),
    # Nothing is given twice, and a reservation is not moved by others.
    ("ready", "reserve", "reserve", False, 1, 0, (3, 0, "active", "reserved")),
    ("ready", "schedule", "reserve", False, 1, 0, (3, 0, "active", "ready")),
    ("ready", "reserve", "schedule", True, 1, 0, (3, 0, "active", "reserved")),
    ("ready", "reserve", "advance", True, 1, 0, (3, 0, "active", "reserved")),
    ("ready", "advance", "reserve", False, 1, 0, (3, 3, "active", "neither")),
    ("ready", "record", "advance", True, 1, 1, (5, 5, "active", "neither")),
    ("broken", "repair", "reserve", False, 1, 0, (3, 0, "active", "ready")),
    ("broken", "repair", "repair", True, 1, 1, (3, 0, "active", "ready")),
    # Plain SQL.
    ("ready", "plain_delete", "reserve", False, 1, 0, None),
    ("ready", "reserve", "plain_delete", True, 1, 1, None),
    ("held", "plain_delete", "update", True, 1, 0, None),
    ("held", "plain_reset", "update", True, 1, 0, (3, 0, "active", "ready")),
    ("held", "update", "plain_reset", True, 1, 1, (3, 3, "active", "neither")),
]


@pytest.mark.parametrize(
    ("start", "first", "second", "waits", "first_rows", "second_rows", "left"),
    OUTCOMES,
    ids=[f"{start}: {first}, {second}" for start, first, second, *_ in OUTCOMES],
)
def test_what_becomes_of_a_pair(
    stage: Stage,
    *,
    start: str,
    first: str,
    second: str,
    waits: bool,
    first_rows: int,
    second_rows: int,
    left: tuple[int, int, str, str] | None,
) -> None:
    scene = arrange(stage.observer, stage.subscription, next(_ids), start)

    a_outcome = stage.a.execute(OPERATIONS[first](scene))
    future = stage.b.start(OPERATIONS[second](scene))
    assert stage.waits(future, stage.b) == waits
    assert stage.a.commit() is None
    b_outcome = future.result(timeout=60)
    assert stage.b.commit() is None

    assert (len(a_outcome.rows), len(b_outcome.rows)) == (first_rows, second_rows)
    after = standing(stage.observer)
    if after is None:
        assert left is None
    else:
        place = {
            (True, False): "ready",
            (False, True): "reserved",
            (False, False): "neither",
        }[(after.ready != "none", after.reserved != "none")]
        assert (after.version, after.position, after.status, place) == left
    assert stage.observer.execute(repair_checkpoints()).all() == []
    assert_rule(stage)
