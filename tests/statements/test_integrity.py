"""The audit finds every way to break the rule, and the repair mends it."""

from __future__ import annotations

import pytest
from sqlalchemy import Connection, text

from checkpoints import audit_checkpoints, repair_checkpoints
from tests.support.factories import add_checkpoint, add_subscription, state, violations

# Statements that get round the triggers, on a checkpoint that is ready, reserved or idle.
BROKEN = {
    "lags and has no process_at": "UPDATE checkpoints SET process_at = NULL WHERE id = :ready",
    "waits for a retry and has no process_at": (
        "UPDATE checkpoints SET process_at = NULL, status = 'retry' WHERE id = :ready"
    ),
    "has nothing to do and a process_at": (
        "UPDATE checkpoints SET process_at = now() WHERE id = :idle"
    ),
    "is missing in checkpoints_ready": "DELETE FROM checkpoints_ready WHERE id = :ready",
    "has another process_at in checkpoints_ready": (
        "UPDATE checkpoints_ready SET process_at = process_at + interval '1s' WHERE id = :ready"
    ),
    "must not be in checkpoints_ready": (
        "INSERT INTO checkpoints_ready (id, process_at, subscription_id)"
        " VALUES (:reserved, now(), 1)"
    ),
    "is missing in checkpoints_reserved": "DELETE FROM checkpoints_reserved WHERE id = :reserved",
    "has another reserved_until in checkpoints_reserved": (
        "UPDATE checkpoints_reserved SET reserved_until = now() WHERE id = :reserved"
    ),
    "must not be in checkpoints_reserved": (
        "INSERT INTO checkpoints_reserved (id, reserved_until, subscription_id)"
        " VALUES (:idle, now(), 1)"
    ),
    "has another subscription_id in checkpoints_ready": (
        "UPDATE checkpoints_ready SET subscription_id = 99 WHERE id = :ready"
    ),
    "has another subscription_id in checkpoints_reserved": (
        "UPDATE checkpoints_reserved SET subscription_id = 99 WHERE id = :reserved"
    ),
}


@pytest.fixture
def ids(connection: Connection) -> dict[str, int]:
    subscription = add_subscription(connection)
    return {
        "ready": add_checkpoint(connection, subscription, "ready"),
        "reserved": add_checkpoint(
            connection, subscription, "reserved", reserved_until=text("now() + interval '1h'")
        ),
        "idle": add_checkpoint(connection, subscription, "idle", position=3),
        "failed": add_checkpoint(connection, subscription, "failed", status="failed"),
    }


def break_rule(connection: Connection, ids: dict[str, int], statement: str) -> None:
    connection.exec_driver_sql("SET LOCAL search_path = checkpoints")
    connection.exec_driver_sql("SET LOCAL session_replication_role = replica")
    used = {name: id for name, id in ids.items() if f":{name}" in statement}
    connection.execute(text(statement), used)
    connection.exec_driver_sql("SET LOCAL session_replication_role = origin")


@pytest.mark.usefixtures("ids")
def test_audit_of_sound_checkpoints_is_empty(connection: Connection) -> None:
    assert connection.execute(audit_checkpoints()).all() == []
    assert connection.execute(repair_checkpoints()).all() == []


@pytest.mark.parametrize("violation", BROKEN)
def test_audit_names_the_violation_and_repair_mends_it(
    connection: Connection, ids: dict[str, int], violation: str
) -> None:
    break_rule(connection, ids, BROKEN[violation])

    found = violations(connection)
    mended = connection.execute(repair_checkpoints()).all()

    assert violation in [what for _, what in found]
    assert {(id, what) for id, broken in mended for what in broken} == set(found)
    assert violations(connection) == []
    assert connection.execute(repair_checkpoints()).all() == []


def test_repair_believes_the_main_row(connection: Connection, ids: dict[str, int]) -> None:
    before = {id: state(connection, id) for id in ids.values()}
    break_rule(connection, ids, BROKEN["is missing in checkpoints_ready"])
    break_rule(connection, ids, BROKEN["must not be in checkpoints_ready"])
    connection.execute(repair_checkpoints())
    assert {id: state(connection, id) for id in ids.values()} == before


def test_repair_goes_on_in_batches(connection: Connection, ids: dict[str, int]) -> None:
    break_rule(connection, ids, BROKEN["is missing in checkpoints_ready"])
    break_rule(connection, ids, BROKEN["is missing in checkpoints_reserved"])
    rows = [len(connection.execute(repair_checkpoints(limit=1)).all()) for _ in range(3)]
    assert rows == [1, 1, 0]
