"""Bad input is refused before it reaches the database, and the message says what was expected."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

import checkpoints
from checkpoints import CheckpointRecord, CheckpointStatus
from tests.support.samples import TIMEOUT, TOKEN

NAIVE = datetime(2026, 1, 2)  # noqa: DTZ001  # that is the point
RETRY = {"status": CheckpointStatus.RETRY, "retry_attempts": 1, "process_at": TOKEN}
FAILED = {"status": CheckpointStatus.FAILED, "retry_attempts": 1}

CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "record": (CheckpointRecord, {"subscription_id": 1, "stream_name": "a", "stream_version": 3}),
    "advance": (
        checkpoints.advance_lagging_subscription_checkpoints,
        {"subscription_id": 1, "limit": 1},
    ),
    "reserve": (
        checkpoints.reserve_next_available_checkpoint,
        {"group_name": "g", "reservation_timeout": TIMEOUT},
    ),
    "update": (
        checkpoints.update_checkpoint_position,
        {"id": 1, "reserved_until": TOKEN, "stream_position": 3},
    ),
    "error": (
        checkpoints.record_checkpoint_error,
        {"id": 1, "reserved_until": TOKEN, "stream_position": 3, "error": "x", **RETRY},
    ),
    "release": (
        checkpoints.release_checkpoint_reservation,
        {"id": 1, "reserved_until": TOKEN},
    ),
    "extend": (
        checkpoints.extend_checkpoint_reservation,
        {"id": 1, "reserved_until": TOKEN, "reservation_timeout": TIMEOUT},
    ),
    "expire": (
        checkpoints.record_expired_checkpoint_reservations,
        {"group_name": "g", "max_attempts": 5, "limit": 1},
    ),
    "next": (checkpoints.get_next_process_at, {"group_name": "g"}),
    "recover": (checkpoints.recover_expired_checkpoint_reservations, {"group_name": "g"}),
    "reservations": (checkpoints.list_reservations, {}),
    "lagging": (checkpoints.list_lagging, {}),
    "retries": (checkpoints.list_retries, {}),
    "failed": (checkpoints.list_failed, {}),
    "skip": (checkpoints.skip_checkpoints, {"ids": [1]}),
    "schedule": (checkpoints.schedule_checkpoints, {"ids": [1], "process_at": TOKEN}),
    "get": (checkpoints.get_checkpoint, {"id": 1}),
    "subscription": (checkpoints.get_subscription, {"group_name": "g", "name": "s"}),
    "add": (checkpoints.add_or_update_subscription, {"group_name": "g", "name": "s"}),
    "status": (checkpoints.set_subscription_status, {"id": 1, "status": "active"}),
    "lock": (checkpoints.lock_checkpoint, {"subscription_id": 1, "stream_name": "a"}),
    "ensure": (
        checkpoints.ensure_checkpoint_exists,
        {"subscription_id": 1, "stream_name": "a", "stream_version": 3, "stream_position": 0},
    ),
    "pause": (checkpoints.pause_subscription, {"id": 1}),
    "resume": (checkpoints.resume_subscription, {"id": 1}),
    "reset": (checkpoints.reset_subscription_checkpoints, {"subscription_id": 1}),
    "replay": (checkpoints.replay_subscription, {"id": 1, "target_position": 9}),
    "finish": (checkpoints.finish_replay, {"subscription_id": 1}),
    "rename": (checkpoints.rename_subscription, {"id": 1, "name": "s"}),
    "move": (checkpoints.move_subscription, {"id": 1, "group_name": "g"}),
    "empty": (checkpoints.delete_subscription_checkpoints, {"subscription_id": 1}),
    "delete": (checkpoints.delete_subscription, {"id": 1}),
    "repair": (checkpoints.repair_checkpoints, {"limit": 1}),
}

IDS = [
    (-1, ValueError),
    (0, ValueError),
    (2**63, ValueError),
    ("1", TypeError),
    (1.0, TypeError),
    (True, TypeError),
    (None, TypeError),
]
POSITIONS = [
    (-1, ValueError),
    (2**63, ValueError),
    ("1", TypeError),
    (1.5, TypeError),
    (False, TypeError),
]
NAMES = [("", ValueError), ("a\x00b", ValueError), ("\ud800", ValueError), (b"a", TypeError)]
MOMENTS = [(NAIVE, ValueError), ("2026-01-02", TypeError), (1.5, TypeError)]
TIMEOUTS = [
    (timedelta(0), ValueError),
    (timedelta(seconds=-1), ValueError),
    (timedelta.max, ValueError),
    (30, TypeError),
]
LIMITS = [(0, ValueError), (-1, ValueError), (2**31, ValueError), (1.0, TypeError)]

BAD_VALUES: dict[str, list[tuple[Any, type[Exception]]]] = {
    "id": IDS,
    "subscription_id": IDS,
    "stream_position": POSITIONS,
    "stream_version": POSITIONS,
    "target_position": [*POSITIONS, (None, TypeError)],
    "retry_attempts": POSITIONS,
    "group_name": NAMES,
    "name": NAMES,
    "stream_name": NAMES,
    "reserved_until": MOMENTS,
    "process_at": [*MOMENTS, (timedelta(seconds=-1), ValueError), (timedelta.max, ValueError)],
    "subscription_names": [(["a", ""], ValueError), ("balances", TypeError), ([1], TypeError)],
    "reservation_timeout": TIMEOUTS,
    "limit": LIMITS,
    "max_attempts": LIMITS,
    "offset": [(-1, ValueError), ("0", TypeError)],
    "after": [("a\x00b", ValueError), (b"a", TypeError)],
    "search": [("a\x00b", ValueError), (1, TypeError)],
    "status": [("done", ValueError), (None, ValueError)],
    "replay_mode": [("some", ValueError)],
    "synchronous_commit": [(0, TypeError), ("off", TypeError), (None, TypeError)],
    "error": [
        (object(), TypeError),
        ({1, 2}, TypeError),
        (float("nan"), ValueError),
    ],
}
# What a sample call leaves to its default.
OPTIONAL = {
    "record": ["stream_position"],
    "reserve": ["limit", "replay_mode", "subscription_names", "synchronous_commit"],
    "update": ["process_at"],
    "recover": ["limit"],
    "reset": ["stream_position", "after", "limit"],
    "empty": ["limit"],
    "reservations": ["search", "offset", "limit"],
    "lagging": ["search", "offset", "limit"],
    "retries": ["search", "offset", "limit"],
    "failed": ["search", "offset", "limit"],
}

CASES = [
    pytest.param(call, name, value, error, id=f"{call}-{name}-{number}")
    for call, (_, arguments) in CALLS.items()
    for name in [*arguments, *OPTIONAL.get(call, [])]
    for number, (value, error) in enumerate(BAD_VALUES.get(name, []))
]


@pytest.mark.parametrize("call", CALLS)
def test_the_sample_call_is_good(call: str) -> None:
    function, arguments = CALLS[call]
    function(**arguments)


@pytest.mark.parametrize(("call", "name", "value", "error"), CASES)
def test_bad_value_is_refused_by_name(
    call: str, name: str, value: object, error: type[Exception]
) -> None:
    function, arguments = CALLS[call]
    with pytest.raises(error) as raised:
        function(**{**arguments, name: value})
    assert name in str(raised.value)
    shown = value[-1] if isinstance(value, list) else value
    assert repr(shown) in str(raised.value)


@pytest.mark.parametrize("call", ["skip", "schedule"])
def test_bad_id_in_a_list_is_refused_by_its_place(call: str) -> None:
    function, arguments = CALLS[call]
    with pytest.raises(ValueError, match=r"ids\[1\] must be .* not -5"):
        function(**{**arguments, "ids": [1, -5]})
    for value in ("12", 12, b"12"):
        with pytest.raises(TypeError, match="ids must be an iterable of integers"):
            function(**{**arguments, "ids": value})


@pytest.mark.parametrize("error", [{"message": ["a\x00b"]}, {"a\x00b": 1}, "a\x00b"])
def test_a_nul_anywhere_in_an_error_is_refused(error: Any) -> None:
    function, arguments = CALLS["error"]
    with pytest.raises(ValueError, match=r"error must not hold a NUL character.*'a\\x00b'"):
        function(**{**arguments, "error": error})


def test_a_name_that_no_index_could_hold_is_refused_by_its_size() -> None:
    with pytest.raises(ValueError, match=r"stream_name must have at most 2000 bytes .* not 2002"):
        CheckpointRecord(1, "é" * 1001, 1)
    CheckpointRecord(1, "é" * 1000, 1)


def test_a_position_past_the_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"stream_position .* 4 > 3"):
        CheckpointRecord(1, "a", 3, 4)
    with pytest.raises(ValueError, match=r"stream_position .* 4 > 3"):
        checkpoints.ensure_checkpoint_exists(1, "a", 3, 4)


@pytest.mark.parametrize("record", [(1, "a", 3), None, {"subscription_id": 1}])
def test_what_is_no_record_is_refused(record: object) -> None:
    good = CheckpointRecord(1, "a", 3)
    with pytest.raises(TypeError, match=r"records\[1\] must be a CheckpointRecord"):
        checkpoints.record_checkpoints([good, record])  # type: ignore[list-item]


def test_a_retry_needs_a_time_and_a_failure_must_have_none() -> None:
    error = checkpoints.record_checkpoint_error
    with pytest.raises(ValueError, match=r"process_at must be .* when status is 'retry'"):
        error(1, TOKEN, 0, status=CheckpointStatus.RETRY, retry_attempts=1, error="x")
    with pytest.raises(ValueError, match="process_at must be None when status is 'failed'"):
        error(1, TOKEN, 0, error="x", process_at=TOKEN, **FAILED)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="status must be 'retry' or 'failed', not 'active'"):
        error(1, TOKEN, 0, status=CheckpointStatus.ACTIVE, retry_attempts=1, error="x")


def test_a_status_may_be_given_by_its_value() -> None:
    checkpoints.set_subscription_status(1, "replay")  # type: ignore[arg-type]


def test_an_aware_time_of_any_zone_is_good() -> None:
    local = datetime(2026, 1, 2, tzinfo=UTC).astimezone()
    checkpoints.update_checkpoint_position(1, local, 3, process_at=local)
