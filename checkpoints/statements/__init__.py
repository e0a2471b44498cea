"""The statements, by who runs them; each function returns one that is bound and can be composed."""

from checkpoints.statements.consumer import (
    extend_checkpoint_reservation,
    get_next_process_at,
    record_checkpoint_error,
    release_checkpoint_reservation,
    reserve_next_available_checkpoint,
    update_checkpoint_position,
    update_checkpoint_positions,
)
from checkpoints.statements.dashboard import (
    TOTAL_LIMIT,
    get_checkpoint,
    get_metrics,
    list_failed,
    list_lagging,
    list_reservations,
    list_retries,
    schedule_checkpoints,
    skip_checkpoints,
)
from checkpoints.statements.integrity import audit_checkpoints, repair_checkpoints
from checkpoints.statements.lifecycle import (
    delete_subscription,
    delete_subscription_checkpoints,
    finish_replay,
    move_subscription,
    pause_subscription,
    rename_subscription,
    replay_subscription,
    reset_subscription_checkpoints,
    resume_subscription,
)
from checkpoints.statements.recorder import (
    advance_lagging_subscription_checkpoints,
    record_checkpoints,
)
from checkpoints.statements.recovery import (
    record_expired_checkpoint_reservations,
    recover_expired_checkpoint_reservations,
)
from checkpoints.statements.subscriptions import (
    add_or_update_subscription,
    ensure_checkpoint_exists,
    get_subscription,
    lock_checkpoint,
    set_subscription_status,
)

__all__ = [
    "TOTAL_LIMIT",
    "add_or_update_subscription",
    "advance_lagging_subscription_checkpoints",
    "audit_checkpoints",
    "delete_subscription",
    "delete_subscription_checkpoints",
    "ensure_checkpoint_exists",
    "extend_checkpoint_reservation",
    "finish_replay",
    "get_checkpoint",
    "get_metrics",
    "get_next_process_at",
    "get_subscription",
    "list_failed",
    "list_lagging",
    "list_reservations",
    "list_retries",
    "lock_checkpoint",
    "move_subscription",
    "pause_subscription",
    "record_checkpoint_error",
    "record_checkpoints",
    "record_expired_checkpoint_reservations",
    "recover_expired_checkpoint_reservations",
    "release_checkpoint_reservation",
    "rename_subscription",
    "repair_checkpoints",
    "replay_subscription",
    "reserve_next_available_checkpoint",
    "reset_subscription_checkpoints",
    "resume_subscription",
    "schedule_checkpoints",
    "set_subscription_status",
    "skip_checkpoints",
    "update_checkpoint_position",
    "update_checkpoint_positions",
]
