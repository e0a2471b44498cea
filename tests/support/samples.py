"""One call of every statement."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Select

import checkpoints
from checkpoints import CheckpointRecord, CheckpointStatus, PositionUpdate, SubscriptionStatus

TOKEN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
TIMEOUT = timedelta(seconds=30)

SAMPLES: dict[str, Select[*tuple[Any, ...]]] = {
    "record_checkpoints": checkpoints.record_checkpoints([CheckpointRecord(1, "account-1", 3)]),
    "advance_lagging_subscription_checkpoints": (
        checkpoints.advance_lagging_subscription_checkpoints(1)
    ),
    "reserve_next_available_checkpoint": checkpoints.reserve_next_available_checkpoint(
        "accounts", TIMEOUT
    ),
    "update_checkpoint_position": checkpoints.update_checkpoint_position(1, TOKEN, 3),
    "update_checkpoint_positions": checkpoints.update_checkpoint_positions(
        [PositionUpdate(1, TOKEN, 3), PositionUpdate(2, TOKEN, 4, TOKEN)]
    ),
    "record_checkpoint_error": checkpoints.record_checkpoint_error(
        1,
        TOKEN,
        2,
        status=CheckpointStatus.RETRY,
        retry_attempts=1,
        error={"type": "KeyError"},
        process_at=TOKEN,
    ),
    "release_checkpoint_reservation": checkpoints.release_checkpoint_reservation(1, TOKEN),
    "release_checkpoint_reservation_by_operator": checkpoints.release_checkpoint_reservation(1),
    "extend_checkpoint_reservation": checkpoints.extend_checkpoint_reservation(1, TOKEN, TIMEOUT),
    "recover_expired_checkpoint_reservations": (
        checkpoints.recover_expired_checkpoint_reservations("accounts")
    ),
    "record_expired_checkpoint_reservations": (
        checkpoints.record_expired_checkpoint_reservations("accounts", max_attempts=5)
    ),
    "get_next_process_at": checkpoints.get_next_process_at("accounts"),
    "list_reservations": checkpoints.list_reservations(search="account"),
    "list_lagging": checkpoints.list_lagging(search="account"),
    "list_retries": checkpoints.list_retries(search="account"),
    "list_failed": checkpoints.list_failed(search="account"),
    "get_checkpoint": checkpoints.get_checkpoint(1),
    "get_metrics": checkpoints.get_metrics(),
    "skip_checkpoints": checkpoints.skip_checkpoints([1, 2]),
    "schedule_checkpoints": checkpoints.schedule_checkpoints([1, 2], TOKEN),
    "get_subscription": checkpoints.get_subscription("accounts", "balances"),
    "add_or_update_subscription": checkpoints.add_or_update_subscription("accounts", "balances"),
    "set_subscription_status": checkpoints.set_subscription_status(1, SubscriptionStatus.ACTIVE),
    "lock_checkpoint": checkpoints.lock_checkpoint(1, "account-1"),
    "ensure_checkpoint_exists": checkpoints.ensure_checkpoint_exists(1, "account-1"),
    "pause_subscription": checkpoints.pause_subscription(1),
    "resume_subscription": checkpoints.resume_subscription(1),
    "reset_subscription_checkpoints": checkpoints.reset_subscription_checkpoints(1),
    "replay_subscription": checkpoints.replay_subscription(1, target_position=9),
    "finish_replay": checkpoints.finish_replay(1),
    "rename_subscription": checkpoints.rename_subscription(1, "balances"),
    "move_subscription": checkpoints.move_subscription(1, "accounts"),
    "delete_subscription_checkpoints": checkpoints.delete_subscription_checkpoints(1),
    "delete_subscription": checkpoints.delete_subscription(1),
    "audit_checkpoints": checkpoints.audit_checkpoints(),
    "repair_checkpoints": checkpoints.repair_checkpoints(),
}
